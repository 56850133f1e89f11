//! `/stat`: outcomes per Service and version, beside what the weights ask for. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_api::view::{Stat, StatRow};
use prost::Message;

use crate::fleet::{Totals, direction_word};
use crate::snapshot::Snapshot;

/// Makes the page of what was seen over `covered`.
pub(super) fn page(totals: &Totals, covered: Duration, snapshot: &Snapshot) -> Stat {
    let seconds = covered.as_secs_f64();
    let mut of_service: BTreeMap<(i32, &str), u64> = BTreeMap::new();
    for ((direction, service, _), total) in &totals.0 {
        *of_service.entry((*direction, service)).or_default() += total.requests;
    }
    let outbound = i32::from(v1::Direction::Outbound);
    let row = |((direction, service, backend), total): (&(i32, String, String), &crate::fleet::Total)| {
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let ms = |q| total.latency.quantile(q).map(|latency| latency.as_secs_f64() * 1e3);
        let of_clients = *direction == outbound;
        let whole = of_service.get(&(*direction, &**service)).copied().unwrap_or_default();
        StatRow {
            direction: direction_word(v1::Direction::try_from(*direction).unwrap_or_default()).to_owned(),
            service: service.clone(),
            backend: backend.clone(),
            requests: total.requests,
            rps: total.requests as f64 / seconds,
            success: share(total.requests.saturating_sub(total.failures), total.requests),
            mtls: share(total.mtls, total.requests),
            retries: total.retries,
            p50_ms: ms(0.5),
            p95_ms: ms(0.95),
            p99_ms: ms(0.99),
            share: share(total.requests, whole).filter(|_| of_clients),
            share_asked: asked(snapshot, service)
                .and_then(|asked| asked.get(backend).copied())
                .filter(|_| of_clients),
        }
    };
    let mut rows: Vec<StatRow> = totals.0.iter().map(row).collect();
    rows.sort_by(|a, b| (&a.service, &a.backend, &b.direction).cmp(&(&b.service, &b.backend, &a.direction)));
    Stat { window_s: seconds, rows }
}

/// The shares that a Service's weights ask for; `None` without a split, and when its rules ask for different ones,
/// so that no single number is true.
fn asked(snapshot: &Snapshot, service: &str) -> Option<BTreeMap<String, f64>> {
    let weights = snapshot.expand(Kind::Weights, service);
    let mut rules =
        weights.iter().filter_map(|(_, entry)| v1::Weights::decode(&*entry.any.value).ok()).map(|w| {
            let total: u64 = w.backends.iter().map(|backend| u64::from(backend.weight)).sum();
            let mut shares: BTreeMap<String, f64> = BTreeMap::new();
            for backend in &w.backends {
                *shares.entry(backend.service.clone()).or_default() +=
                    f64::from(backend.weight) / total.max(1) as f64;
            }
            shares
        });
    let first = rules.next()?;
    (first.len() > 1 && rules.all(|other| other == first)).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Total;
    use crate::snapshot::Builder;

    #[test]
    fn shares_are_of_what_clients_asked_for() {
        let backend =
            |service: &str, weight| v1::Backend { service: service.into(), weight, ..v1::Backend::default() };
        let mut builder = Builder::default();
        let weights = v1::Weights {
            backends: vec![backend("a/v1", 90), backend("a/v2", 10)],
            ..v1::Weights::default()
        };
        builder.add(Kind::Weights, "a/s/a/s/0", &weights);
        let snapshot = builder.build(Vec::new());
        let mut totals = Totals::default();
        let mut add = |direction: v1::Direction, backend: &str, requests, failures| {
            let total = Total { requests, failures, ..Total::default() };
            totals.0.insert((direction.into(), "a/s".into(), backend.into()), total);
        };
        add(v1::Direction::Outbound, "a/v1", 80, 0);
        add(v1::Direction::Outbound, "a/v2", 20, 5);
        add(v1::Direction::Inbound, "a/v2", 20, 0);
        let page = page(&totals, Duration::from_secs(10), &snapshot);
        let rows: Vec<_> = page
            .rows
            .iter()
            .map(|row| (&*row.direction, &*row.backend, row.rps, row.success, row.share, row.share_asked))
            .collect();
        assert_eq!(
            rows,
            [
                ("outbound", "a/v1", 8.0, Some(1.0), Some(0.8), Some(0.9)),
                ("outbound", "a/v2", 2.0, Some(0.75), Some(0.2), Some(0.1)),
                ("inbound", "a/v2", 2.0, Some(1.0), None, None),
            ]
        );
    }
}
