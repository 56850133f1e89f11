//! What came out: rows for `target/bench/balance.json`, and tables.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use crate::cases::Case;
use crate::measure::Figures;

/// What ratios are against.
pub const BASELINE: &str = "least-request";

/// One figure of one subject in one case, over all seeds.
#[derive(Debug, Serialize)]
pub struct Row {
    case: String,
    subject: String,
    metric: String,
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    median: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max: Option<f64>,
    runs: usize,
    baseline: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'static str>,
}

/// The figures of a case: by subject, one for each seed.
pub type Results = BTreeMap<&'static str, Vec<Figures>>;

type Metric = (&'static str, &'static str, fn(&Figures) -> f64);

const METRICS: [Metric; 9] = [
    ("p50_ms", "ms", |f| f.p50),
    ("p99_ms", "ms", |f| f.p99),
    ("p999_ms", "ms", |f| f.p999),
    ("mean_ms", "ms", |f| f.mean),
    ("goodput", "requests/s", |f| f.goodput),
    ("throughput", "requests/s", |f| f.throughput),
    ("hit_rate", "share", |f| f.hit_rate),
    ("unfairness", "times the mean", |f| f.unfairness),
    ("unanswered", "requests", |f| f.unanswered),
];

/// Median, smallest and largest.
pub fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_unstable_by(f64::total_cmp);
    let n = values.len();
    let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    let median = if n % 2 == 1 { at(n / 2) } else { (at((n / 2).wrapping_sub(1)) + at(n / 2)) / 2.0 };
    (median, at(0), at(n.saturating_sub(1)))
}

/// All rows of a case.
pub fn rows(case: &Case, results: &Results) -> Vec<Row> {
    let mut rows = Vec::new();
    for (subject, figures) in results {
        for (metric, unit, of) in METRICS {
            if metric == "hit_rate" && !case.is_chat() {
                continue;
            }
            let values = figures.iter().map(of).collect();
            let against = results.get(BASELINE).map(|figures| spread(figures.iter().map(of).collect()).0);
            let ratio = against.map(|against| spread(figures.iter().map(of).collect()).0 / against);
            rows.push(row(case, subject, metric, unit, values, ratio));
        }
    }
    let Some(ours) = results.get("penstock") else { return rows };
    let names = if case.is_chat() {
        vec![
            ("ttft_p99_vs_least_request", BASELINE),
            ("ttft_p99_vs_oracle", "oracle"),
            ("ttft_p99_vs_cache_aware", "sglang"),
            ("ttft_p99_vs_cache_aware_library", "sglang-library"),
            ("ttft_p99_vs_epp", "epp"),
        ]
    } else {
        vec![("p99_vs_least_request", BASELINE), ("p99_vs_oracle", "oracle")]
    };
    for (metric, against) in names {
        let Some(theirs) = results.get(against) else { continue };
        // Where theirs lost too many requests to have a p99 there is nothing to divide by.
        if theirs.iter().any(|theirs| !theirs.p99.is_finite()) {
            continue;
        }
        let values = ours.iter().zip(theirs).map(|(ours, theirs)| ours.p99 / theirs.p99).collect();
        rows.push(row(case, "penstock", metric, "times", values, None));
    }
    rows
}

fn row(
    case: &Case,
    subject: &str,
    metric: &str,
    unit: &'static str,
    values: Vec<f64>,
    ratio: Option<f64>,
) -> Row {
    let runs = values.len();
    let (median, min, max) = spread(values);
    let finite = |value: f64| Some(value).filter(|value| value.is_finite());
    Row {
        case: case.name.to_owned(),
        subject: subject.to_owned(),
        metric: metric.to_owned(),
        unit,
        median: finite(median),
        min: finite(min),
        max: finite(max),
        runs,
        baseline: BASELINE,
        ratio: ratio.and_then(finite),
        error: (!median.is_finite())
            .then_some("more requests failed or were never answered than this quantile bears"),
    }
}

/// The table of a case, as people read it.
pub fn table(case: &Case, results: &Results) -> String {
    let mut text = format!("{}: {}\n", case.name, case.about);
    let what = if case.is_chat() { "first token" } else { "answer" };
    let _ = writeln!(
        text,
        "  {:16} {:>9} {:>9} {:>19} {:>9} {:>10} {:>9} {:>5} {:>7}",
        what, "p50 ms", "p99 ms", "(of all seeds)", "p99.9 ms", "goodput/s", "p99/LR", "hits", "failed"
    );
    let median = |figures: &[Figures], of: fn(&Figures) -> f64| spread(figures.iter().map(of).collect());
    let baseline = results.get(BASELINE).map_or(f64::NAN, |figures| median(figures, |f| f.p99).0);
    let mut subjects: Vec<_> = results.iter().map(|(s, f)| (median(f, |f| f.p99).0, *s, f)).collect();
    subjects.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (p99, subject, figures) in subjects {
        let (_, min, max) = median(figures, |f| f.p99);
        let hits = if case.is_chat() {
            format!("{:.2}", median(figures, |f| f.hit_rate).0)
        } else {
            "–".to_owned()
        };
        let ratio = Some(p99 / baseline).filter(|r| r.is_finite() && *r > 0.0);
        let ratio = ratio.map_or("–".to_owned(), |ratio| format!("{ratio:.2}"));
        let _ = writeln!(
            text,
            "  {subject:16} {:9.1} {p99:9.1} {:>19} {:9.1} {:10.1} {ratio:>9} {hits:>5} {:7.0}",
            median(figures, |f| f.p50).0,
            format!("{min:.1}–{max:.1}"),
            median(figures, |f| f.p999).0,
            median(figures, |f| f.goodput).0,
            median(figures, |f| f.unanswered).0,
        );
    }
    text
}
