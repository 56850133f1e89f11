//! The Prometheus page: facts of the process, then the totals of the [`ledger`](super::ledger).

use std::fmt::Write;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use penstock_api::{Reason, latency};
use tokio::time::Instant;

use super::ledger::{Counts, Key};
use super::metric::{self, Kind, Metric};
use super::{direction_word, log};

/// Rendering is work; a page this young is served again.
const YOUNG: Duration = Duration::from_secs(1);

/// Upper bounds of the duration histogram, microseconds: half a millisecond to half a minute. The cells count finer,
/// so a bound is met to within an eighth.
const BOUNDS_US: [u64; 14] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000,
    10_000_000, 30_000_000,
];

static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();

/// Takes in what the rest of the process counts through the `metrics` crate.
pub(super) fn install_recorder() {
    RECORDER.get_or_init(|| {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!(
                "another recorder of metrics is installed; the process's own facts are missing here"
            );
        }
        for metric in metric::ALL {
            match metric.kind {
                Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
                Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
                Kind::Histogram => {}
            }
        }
        metrics::gauge!(metric::BUILD_INFO.name, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        handle
    });
}

/// The facts of the process, rendered.
pub(super) fn process() -> String {
    RECORDER.get().map(PrometheusHandle::render).unwrap_or_default()
}

/// The last page.
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<Option<(Instant, Bytes)>>);

impl Cache {
    /// The last page if it is young, else a new one.
    pub(super) fn get(&self, now: Instant, render: impl FnOnce() -> String) -> Bytes {
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match &*cached {
            Some((at, page)) if now.saturating_duration_since(*at) < YOUNG => page.clone(),
            _ => {
                let page = Bytes::from(render());
                *cached = Some((now, page.clone()));
                page
            }
        }
    }
}

/// The whole page.
pub(super) fn render(totals: &[(&Key, &Counts)], process: &str) -> String {
    let mut page = String::with_capacity(process.len() + 4096 * (totals.len() + 1));
    page.push_str(process);
    let rows: Vec<_> = totals.iter().map(|(key, counts)| (labels(key), *counts)).collect();
    by_class(&mut page, &rows);
    by_reason(&mut page, &rows);
    durations(&mut page, &rows);
    let mut plain = |metric: &Metric, value: fn(&Counts) -> u64| {
        head(&mut page, metric);
        for (labels, counts) in &rows {
            line(&mut page, metric.name, labels, value(counts));
        }
    };
    plain(&metric::REQUEST_FAILURES, |counts| counts.failures);
    plain(&metric::REQUESTS_IN_FLIGHT, |counts| counts.in_flight);
    plain(&metric::REQUESTS_MTLS, |counts| counts.mtls);
    plain(&metric::RETRIES, |counts| counts.retries);
    plain(&metric::REQUEST_BYTES, |counts| counts.request_bytes);
    plain(&metric::RESPONSE_BYTES, |counts| counts.response_bytes);
    page
}

fn by_class(page: &mut String, rows: &[(String, &Counts)]) {
    head(page, &metric::REQUESTS);
    for (labels, counts) in rows {
        for (digit, count) in counts.by_class.iter().enumerate().filter(|(_, count)| **count > 0) {
            let class = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"][digit];
            line(page, metric::REQUESTS.name, &format!("{labels},class=\"{class}\""), *count);
        }
    }
}

fn by_reason(page: &mut String, rows: &[(String, &Counts)]) {
    head(page, &metric::REQUEST_ERRORS);
    for (labels, counts) in rows {
        for reason in Reason::ALL {
            let count = counts.by_reason[*reason as usize];
            if count > 0 {
                line(page, metric::REQUEST_ERRORS.name, &format!("{labels},reason=\"{reason}\""), count);
            }
        }
    }
}

fn durations(page: &mut String, rows: &[(String, &Counts)]) {
    let name = metric::REQUEST_DURATION.name;
    head(page, &metric::REQUEST_DURATION);
    for (labels, counts) in rows {
        let mut buckets = counts.latency.nonzero().peekable();
        let mut below = 0;
        for bound in BOUNDS_US {
            while let Some((_, count)) =
                buckets.next_if(|(bucket, _)| log::micros(latency::upper_bound(*bucket)) <= bound + 1)
            {
                below += count;
            }
            let labels = format!("{labels},le=\"{}\"", seconds(bound));
            line(page, &format!("{name}_bucket"), &labels, below);
        }
        let total = counts.latency.total();
        line(page, &format!("{name}_bucket"), &format!("{labels},le=\"+Inf\""), total);
        let sum = seconds(counts.latency_sum_us);
        // Writing to a string cannot fail.
        let _ = writeln!(page, "{name}_sum{{{labels}}} {sum}");
        line(page, &format!("{name}_count"), labels, total);
    }
}

fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

pub(super) fn head(page: &mut String, metric: &Metric) {
    let _ = writeln!(page, "# HELP {} {}\n# TYPE {0} {}", metric.name, metric.help, metric.kind.as_str());
}

pub(super) fn line(page: &mut String, name: &str, labels: &str, value: u64) {
    let _ = writeln!(page, "{name}{{{labels}}} {value}");
}

fn labels(key: &Key) -> String {
    let mut text = format!("direction=\"{}\"", direction_word(key.direction));
    for (name, value) in
        [("service", key.service.as_str()), ("backend", key.backend.as_str()), ("route", &*key.route)]
    {
        let _ = write!(text, ",{name}=\"");
        for letter in value.chars() {
            match letter {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                letter => text.push(letter),
            }
        }
        text.push('"');
    }
    text
}

#[cfg(test)]
mod tests {
    use penstock_api::v1::Direction;

    use super::*;

    #[test]
    fn the_page_is_what_prometheus_reads() {
        let key = Key {
            direction: Direction::Outbound,
            service: "a/digits".parse().unwrap(),
            backend: "a/digits-v1".parse().unwrap(),
            route: "a/\"canary\"#0".into(),
        };
        let mut counts = Counts { failures: 1, retries: 2, in_flight: 3, ..Counts::default() };
        counts.by_class[2] = 5;
        counts.by_class[5] = 1;
        counts.by_reason[Reason::NoEndpoint as usize] = 1;
        (counts.request_bytes, counts.response_bytes, counts.mtls) = (100, 200, 6);
        for us in [400, 900, 2_000, 4_000, 40_000, 60_000_000] {
            counts.latency.record(Duration::from_micros(us));
            counts.latency_sum_us += us;
        }
        let page = render(&[(&key, &counts)], "# the process\n");
        let expected = include_str!("page.golden");
        assert_eq!(page, expected, "\n{page}");
    }

    #[test]
    fn a_young_page_is_served_again() {
        let (cache, now) = (Cache::default(), Instant::now());
        assert_eq!(cache.get(now, || "one".into()), "one");
        assert_eq!(cache.get(now + Duration::from_millis(999), || "two".into()), "one");
        assert_eq!(cache.get(now + Duration::from_secs(1), || "two".into()), "two");
    }
}
