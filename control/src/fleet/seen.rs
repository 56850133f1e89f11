//! What clients' proxies saw of the two versions of a Service: what a canary is judged by. Pure.
//!
//! In: the last minutes of each proxy. Out: one sum for each backend of a Service, and one for each mirror of it. Replicas of control send
//! each other theirs, since each has other proxies, so sums can be added up, and written on the wire.

use std::collections::BTreeMap;

use penstock_api::latency::{BUCKETS, Histogram};
use penstock_api::v1::{self, Bucket, Direction, Outcome, SeenWindow};

use super::window::Total;

/// A Service as it was asked for, and where requests, or copies of them, went: both `<namespace>/<name>`.
pub type Pair = (String, String);

/// Sums over some time.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// By backend.
    pub backends: BTreeMap<Pair, Backend>,
    /// By mirror.
    pub shadows: BTreeMap<Pair, Shadow>,
}

/// What was seen of a backend.
#[derive(Clone, Debug, Default)]
pub struct Backend {
    /// Its requests.
    pub total: Total,
    /// How busy its endpoints say that they are, in thousandths: the sum, and how many reports it is of.
    pub load_permille: u64,
    /// See above.
    pub reports: u64,
}

impl Backend {
    /// How busy its endpoints are on average, from 0 to 1; `None` where none has said so.
    pub fn load(&self) -> Option<f64> {
        (self.reports > 0).then(|| self.load_permille as f64 / self.reports as f64 / 1e3)
    }
}

/// What was seen of the copies to a mirror; the fields are those of [`v1::Shadow`].
#[derive(Clone, Debug, Default)]
#[allow(missing_docs, reason = "see fleet.proto")]
pub struct Shadow {
    pub sent: u64,
    pub failures: u64,
    pub dropped: u64,
    pub compared: u64,
    pub agreed: u64,
    pub ranked: u64,
    pub same_top: u64,
    pub largest_difference: f64,
    pub latency: Histogram,
    pub client_latency: Histogram,
    pub bytes: u64,
    pub client_bytes: u64,
}

impl Shadow {
    /// Adds what a proxy, or a replica, has seen.
    pub fn add(&mut self, seen: &v1::Shadow) {
        self.sent += seen.sent;
        self.failures += seen.failures;
        self.dropped += seen.dropped;
        self.compared += seen.compared;
        self.agreed += seen.agreed;
        self.ranked += seen.ranked;
        self.same_top += seen.same_top;
        self.largest_difference = self.largest_difference.max(seen.largest_difference);
        fill(&mut self.latency, &seen.latency);
        fill(&mut self.client_latency, &seen.client_latency);
        self.bytes += seen.bytes;
        self.client_bytes += seen.client_bytes;
    }
}

impl Seen {
    /// Adds what another replica has seen.
    pub fn add(&mut self, window: SeenWindow) {
        for row in window.rows {
            let backend = self.backends.entry((row.service, row.backend)).or_default();
            backend.total.requests += row.requests;
            backend.total.failures += row.failures;
            backend.total.mtls += row.mtls;
            backend.total.retries += row.retries;
            fill(&mut backend.total.latency, &row.latency);
            if let Some(permille) = row.load_permille {
                // A replica's row is an average already, of as many reports as it says are in flight: see `wire`.
                backend.load_permille += u64::from(permille) * row.in_flight;
                backend.reports += row.in_flight;
            }
        }
        for shadow in window.shadows {
            let pair = (shadow.service.clone(), shadow.mirror.clone());
            self.shadows.entry(pair).or_default().add(&shadow);
        }
    }

    /// What is about `services`, for another replica. The count of load reports travels as `in_flight`, which has no other use here.
    pub fn wire(&self, services: &[String]) -> SeenWindow {
        let wanted = |pair: &Pair| services.contains(&pair.0);
        let rows =
            self.backends.iter().filter(|(pair, _)| wanted(pair)).map(|((service, to), seen)| Outcome {
                direction: Direction::Outbound.into(),
                service: service.clone(),
                backend: to.clone(),
                requests: seen.total.requests,
                failures: seen.total.failures,
                mtls: seen.total.mtls,
                retries: seen.total.retries,
                latency: buckets(&seen.total.latency),
                load_permille: seen.load().map(|load| (load * 1e3) as u32),
                in_flight: seen.reports,
                ..Outcome::default()
            });
        let shadows =
            self.shadows.iter().filter(|(pair, _)| wanted(pair)).map(|((service, to), seen)| v1::Shadow {
                service: service.clone(),
                mirror: to.clone(),
                sent: seen.sent,
                failures: seen.failures,
                dropped: seen.dropped,
                compared: seen.compared,
                agreed: seen.agreed,
                ranked: seen.ranked,
                same_top: seen.same_top,
                largest_difference: seen.largest_difference,
                latency: buckets(&seen.latency),
                client_latency: buckets(&seen.client_latency),
                bytes: seen.bytes,
                client_bytes: seen.client_bytes,
            });
        SeenWindow { rows: rows.collect(), shadows: shadows.collect() }
    }
}

fn fill(histogram: &mut Histogram, buckets: &[Bucket]) {
    for bucket in buckets.iter().take(BUCKETS) {
        histogram.add(bucket.index as usize, bucket.count);
    }
}

fn buckets(histogram: &Histogram) -> Vec<Bucket> {
    let of = |(index, count): (usize, u64)| Bucket { index: u32::try_from(index).unwrap_or(u32::MAX), count };
    histogram.nonzero().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_replica_tells_adds_up_to_what_it_saw() {
        let pair = ("a/s".to_owned(), "a/v2".to_owned());
        let mut seen = Seen::default();
        let backend = seen.backends.entry(pair.clone()).or_default();
        backend.total.requests = 10;
        backend.total.failures = 2;
        backend.total.latency.add(40, 10);
        backend.load_permille = 1_500;
        backend.reports = 3;
        let shadow = seen.shadows.entry(pair.clone()).or_default();
        shadow.compared = 7;
        shadow.agreed = 6;
        shadow.largest_difference = 0.5;
        seen.backends.insert(("a/other".to_owned(), "a/other".to_owned()), Backend::default());

        let wire = seen.wire(&["a/s".to_owned()]);
        assert_eq!((wire.rows.len(), wire.shadows.len()), (1, 1));
        let mut sum = Seen::default();
        sum.add(wire.clone());
        sum.add(wire);
        let (backend, shadow) = (&sum.backends[&pair], &sum.shadows[&pair]);
        assert_eq!(
            (backend.total.requests, backend.total.failures, backend.total.latency.total()),
            (20, 4, 20)
        );
        assert_eq!(backend.load(), Some(0.5));
        assert_eq!((shadow.compared, shadow.agreed, shadow.largest_difference), (14, 12, 0.5));
    }
}
