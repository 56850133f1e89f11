//! Perfect knowledge: where this request would have its first byte soonest, given everything that is in the replicas and on
//! its way to them, the true costs, rates, caches and stalls. It is greedy: it does not know what comes later.

use rand::rngs::SmallRng;

use super::{Asked, Policy};

pub(super) struct Oracle;

impl Policy for Oracle {
    fn pick(&mut self, _client: usize, asked: &Asked<'_>, _random: &mut SmallRng) -> usize {
        let truth = asked.truth;
        let time = |server: usize| {
            let stall = truth.resumes[server].saturating_sub(asked.now) as f64 / 1e9;
            let (rate, failing) = (truth.rates[server], truth.failing[server]);
            let rate = if rate > 0.0 { rate } else { 1.0 };
            let coming = &truth.coming[server];
            let foreseen = truth.servers[server].foresee(coming, &asked.request.job, rate, asked.now);
            foreseen + stall + if failing { 1e9 } else { 0.0 }
        };
        let best = asked.up.iter().map(|server| (time(*server), *server)).min_by(|a, b| a.0.total_cmp(&b.0));
        best.map_or(0, |(_, server)| server)
    }
}
