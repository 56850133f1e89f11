//! What a run was like.

/// The figures of one run.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Milliseconds until the answer, or until its first token: 50, 99, 99.9 %.
    pub p50: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// Mean.
    pub mean: f64,
    /// Requests within the objective, a second.
    pub goodput: f64,
    /// Requests answered, a second.
    pub throughput: f64,
    /// Prompt tokens found in a cache, share.
    pub hit_rate: f64,
    /// The busiest replica's busy share over the mean.
    pub unfairness: f64,
    /// Requests that were never answered.
    pub unanswered: f64,
    /// Milliseconds at each half percent, for the plot.
    pub curve: Vec<(f64, f64)>,
}

impl Figures {
    /// From the milliseconds of every request.
    pub fn of(mut ms: Vec<f64>, objective: f64, seconds: f64) -> Self {
        ms.sort_unstable_by(f64::total_cmp);
        let good = ms.partition_point(|ms| *ms <= objective);
        let answered = ms.iter().filter(|ms| ms.is_finite()).count();
        let steps =
            [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995];
        Self {
            p50: quantile(&ms, 0.5),
            p99: quantile(&ms, 0.99),
            p999: quantile(&ms, 0.999),
            mean: ms.iter().filter(|ms| ms.is_finite()).sum::<f64>() / answered.max(1) as f64,
            goodput: good as f64 / seconds,
            throughput: answered as f64 / seconds,
            unanswered: (ms.len() - answered) as f64,
            curve: steps.iter().map(|q| (*q, quantile(&ms, *q))).collect(),
            ..Self::default()
        }
    }
}

fn quantile(sorted: &[f64], q: f64) -> f64 {
    let i = ((sorted.len() as f64 * q) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(i).copied().unwrap_or(0.0)
}
