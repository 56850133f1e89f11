//! The last minutes of what one proxy saw, as it told it: each second, sooner when requests fail. Pure: time is an argument.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use penstock_api::latency::Histogram;
use penstock_api::v1::{Direction, Outcome, Outcomes, Shadow};
use tokio::time::Instant;

use super::seen::Seen;

/// How far back it reaches.
const REACH: Duration = Duration::from_secs(300);
/// Messages that it holds: a proxy whose requests fail all the time tells four times a second.
const MESSAGES: usize = 4 * 300;
/// Rows that one message may have: what a pod talks to, with room. More are dropped, so that a proxy gone wrong
/// cannot fill control's memory.
const ROWS: usize = 2_048;
/// A proxy's word is not trusted to fit: no second counts for more than this.
const LONGEST: u64 = 60_000;

/// What a row is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    direction: i32,
    service: String,
    backend: String,
    endpoint: String,
    route: String,
}

#[derive(Debug)]
struct Row {
    key: Arc<Key>,
    counts: Counts,
    latency: Box<[(u16, u32)]>,
    load_permille: Option<u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    requests: u64,
    failures: u64,
    mtls: u64,
    retries: u64,
}

#[derive(Debug)]
struct Told {
    at: Instant,
    span: Duration,
    rows: Vec<Row>,
    shadows: Box<[Shadow]>,
}

/// One proxy's last minutes.
#[derive(Debug, Default)]
pub(super) struct Window {
    told: VecDeque<Told>,
    /// Rows of one kind share their names.
    keys: BTreeMap<Arc<Key>, ()>,
}

/// Outcomes of one Service and backend, over all proxies.
#[derive(Clone, Debug, Default)]
pub struct Total {
    /// Requests.
    pub requests: u64,
    /// Of these, failed.
    pub failures: u64,
    /// Of these, over mutual TLS.
    pub mtls: u64,
    /// Retries.
    pub retries: u64,
    /// Time to the response's headers.
    pub latency: Histogram,
}

/// Totals by direction, service and backend.
#[derive(Clone, Debug, Default)]
pub struct Totals(pub BTreeMap<(i32, String, String), Total>);

impl Row {
    fn sum_into(&self, total: &mut Total) {
        total.requests += self.counts.requests;
        total.failures += self.counts.failures;
        total.mtls += self.counts.mtls;
        total.retries += self.counts.retries;
        for (bucket, count) in &self.latency {
            total.latency.add(usize::from(*bucket), u64::from(*count));
        }
    }
}

impl Window {
    pub(super) fn add(&mut self, outcomes: Outcomes, now: Instant) {
        let span = Duration::from_millis(outcomes.interval_ms.clamp(1, LONGEST));
        let rows = outcomes.rows.into_iter().take(ROWS).map(|row| self.row(row)).collect();
        let shadows = outcomes.shadows.into_iter().take(ROWS).collect();
        self.told.push_back(Told { at: now, span, rows, shadows });
        let old = |told: &Told| now.saturating_duration_since(told.at) >= REACH;
        let held = self.told.len();
        while self.told.len() > MESSAGES || self.told.front().is_some_and(old) {
            self.told.pop_front();
        }
        if self.told.len() < held {
            // A name that no message uses any more is held by the set alone.
            self.keys.retain(|key, ()| Arc::strong_count(key) > 1);
        }
    }

    fn row(&mut self, row: Outcome) -> Row {
        let Outcome {
            direction,
            service,
            backend,
            endpoint,
            route,
            requests,
            failures,
            mtls,
            retries,
            load_permille,
            ..
        } = row;
        let key = Key { direction, service, backend, endpoint, route };
        let key = match self.keys.get_key_value(&key) {
            Some((known, ())) => known.clone(),
            None => {
                let key = Arc::new(key);
                self.keys.insert(key.clone(), ());
                key
            }
        };
        let bucket = |b: penstock_api::v1::Bucket| {
            (u16::try_from(b.index).unwrap_or(u16::MAX), u32::try_from(b.count).unwrap_or(u32::MAX))
        };
        let latency = row.latency.into_iter().take(penstock_api::latency::BUCKETS).map(bucket).collect();
        Row { key, counts: Counts { requests, failures, mtls, retries }, latency, load_permille }
    }

    /// Adds what the proxy saw in the last `window`; answers how much of it the proxy was there for.
    pub(super) fn sum_into(&self, totals: &mut Totals, window: Duration, now: Instant) -> Duration {
        let mut covered = Duration::ZERO;
        let recent = |told: &&Told| now.saturating_duration_since(told.at) < window;
        for told in self.told.iter().rev().take_while(recent) {
            covered = now.saturating_duration_since(told.at) + told.span;
            for row in &told.rows {
                let key = (row.key.direction, row.key.service.clone(), row.key.backend.clone());
                let total = totals.0.entry(key).or_default();
                row.sum_into(total);
            }
        }
        covered
    }

    /// Adds what the proxy saw of `services` as their client in the last `window`.
    pub(super) fn see_into(&self, seen: &mut Seen, services: &[String], window: Duration, now: Instant) {
        let recent = |told: &&Told| now.saturating_duration_since(told.at) < window;
        for told in self.told.iter().rev().take_while(recent) {
            let outbound = |row: &&Row| row.key.direction == i32::from(Direction::Outbound);
            let rows = told.rows.iter().filter(outbound);
            for row in rows.filter(|row| services.contains(&row.key.service)) {
                let pair = (row.key.service.clone(), row.key.backend.clone());
                let backend = seen.backends.entry(pair).or_default();
                row.sum_into(&mut backend.total);
                if let Some(permille) = row.load_permille {
                    backend.load_permille += u64::from(permille);
                    backend.reports += 1;
                }
            }
            for shadow in told.shadows.iter().filter(|shadow| services.contains(&shadow.service)) {
                let pair = (shadow.service.clone(), shadow.mirror.clone());
                seen.shadows.entry(pair).or_default().add(shadow);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(requests: u64) -> Outcomes {
        let row = |endpoint: &str| Outcome {
            service: "a/s".into(),
            backend: "a/v1".into(),
            endpoint: endpoint.into(),
            requests,
            latency: vec![penstock_api::v1::Bucket { index: 40, count: requests }],
            ..Outcome::default()
        };
        Outcomes { interval_ms: 1_000, rows: vec![row("a/p0"), row("a/p1")], shadows: Vec::new() }
    }

    #[test]
    fn only_the_seconds_inside_the_window_count() {
        let mut window = Window::default();
        let start = Instant::now();
        for second_of in 1..=20 {
            window.add(second(10), start + Duration::from_secs(second_of));
        }
        let mut totals = Totals::default();
        let now = start + Duration::from_millis(20_500);
        let covered = window.sum_into(&mut totals, Duration::from_secs(10), now);
        let total = &totals.0[&(0, "a/s".to_owned(), "a/v1".to_owned())];
        assert_eq!((total.requests, total.latency.total()), (200, 200));
        assert_eq!(covered, Duration::from_millis(10_500));
    }

    #[test]
    fn the_window_and_its_names_are_bounded() {
        // Each second, as often as a proxy may, and oftener.
        for (interval, held) in [(1_000, 300), (250, MESSAGES), (1, MESSAGES)] {
            let (mut window, start) = (Window::default(), Instant::now());
            for message in 0..2 * MESSAGES as u64 {
                let mut outcomes = second(1);
                outcomes.rows[0].endpoint = format!("a/p{message}");
                window.add(outcomes, start + Duration::from_millis(message * interval));
            }
            assert_eq!(window.told.len(), held);
            assert!(window.keys.len() <= held + 2, "{}", window.keys.len());
        }
    }
}
