//! Two readings of one server, and what happened between them.

use super::Reading;
use std::time::Duration;

/// What happened between two readings. `None`: not told, or nothing happened that could be measured.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// Requests answered per second.
    pub requests: Option<f64>,
    /// Requests failed per second.
    pub failures: Option<f64>,
    /// Rows executed per second.
    pub rows: Option<f64>,
    /// Rows in a batch, on average.
    pub batch_rows: Option<f64>,
    /// Requests that waited inside the server, on average over the time between.
    pub waiting: Option<f64>,
    /// Milliseconds that a request waited, on average.
    pub queue_ms: Option<f64>,
    /// Milliseconds that a request was computed, on average.
    pub compute_ms: Option<f64>,
    /// Milliseconds to the first token, on average.
    pub first_token_ms: Option<f64>,
    /// Milliseconds between tokens, on average.
    pub token_ms: Option<f64>,
    /// Share of prompt tokens found in the prefix cache.
    pub hit_rate: Option<f64>,
    /// Preemptions per second.
    pub preemptions: Option<f64>,
}

impl Rates {
    /// Between `before` and `now`, `elapsed` apart. A counter that went back (the server started anew) tells nothing
    /// this time.
    pub fn between(before: &Reading, now: &Reading, elapsed: Duration) -> Self {
        if before.kind != now.kind || elapsed.is_zero() {
            return Self::default();
        }
        let grown = |field: fn(&Reading) -> Option<f64>| {
            let grown = field(now)? - field(before)?;
            (grown >= 0.0).then_some(grown)
        };
        let per_second = |grown: Option<f64>| grown.map(|grown| grown / elapsed.as_secs_f64());
        let ratio = |part: Option<f64>, whole: Option<f64>| {
            let whole = whole.filter(|whole| *whole > 0.0)?;
            part.map(|part| part / whole)
        };
        let ms = |mean: Option<f64>| mean.map(|seconds| seconds * 1e3);

        let requests = grown(|r| r.requests);
        let queue_seconds = grown(|r| r.queue_seconds);
        let depth = ratio(grown(|r| r.depth_sum), grown(|r| r.depth_count));
        Self {
            requests: per_second(requests),
            failures: per_second(grown(|r| r.failures)),
            rows: per_second(grown(|r| r.rows)),
            batch_rows: ratio(grown(|r| r.rows), grown(|r| r.executions)),
            // Little's law: seconds waited per second are the requests that waited at once. A histogram of depths
            // says it more directly where there is one.
            waiting: depth.or(per_second(queue_seconds)),
            queue_ms: ms(ratio(queue_seconds, grown(|r| r.queue_count).or(requests))),
            compute_ms: ms(ratio(grown(|r| r.compute_seconds), requests)),
            first_token_ms: ms(ratio(grown(|r| r.first_token_seconds), grown(|r| r.first_token_count))),
            token_ms: ms(ratio(grown(|r| r.token_seconds), grown(|r| r.token_count))),
            hit_rate: ratio(grown(|r| r.prefix_hits), grown(|r| r.prefix_queries)).or(now.hit_rate),
            preemptions: per_second(grown(|r| r.preemptions)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Kind;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn counters_become_rates_and_means() {
        let before = Reading {
            kind: Some(Kind::Triton),
            requests: Some(100.0),
            rows: Some(1000.0),
            executions: Some(100.0),
            queue_seconds: Some(5.0),
            compute_seconds: Some(1.0),
            ..Reading::default()
        };
        let now = Reading {
            requests: Some(150.0),
            rows: Some(1800.0),
            executions: Some(200.0),
            queue_seconds: Some(6.0),
            compute_seconds: Some(2.5),
            ..before
        };
        let rates = Rates::between(&before, &now, Duration::from_millis(500));
        assert_eq!((rates.requests, rates.rows, rates.batch_rows), (Some(100.0), Some(1600.0), Some(8.0)));
        assert_eq!((rates.queue_ms, rates.compute_ms), (Some(20.0), Some(30.0)));
        assert_eq!(rates.waiting, Some(2.0), "1 s waited in 0.5 s");
        assert_eq!(rates.failures, None);
    }

    #[test]
    fn a_server_that_started_anew_tells_nothing_this_time() {
        let before = Reading { requests: Some(100.0), ..Reading::default() };
        let now = Reading { requests: Some(3.0), ..Reading::default() };
        assert_eq!(Rates::between(&before, &now, SECOND), Rates::default());
        assert_eq!(Rates::between(&now, &before, Duration::ZERO), Rates::default());
        let other = Reading { kind: Some(Kind::Vllm), ..before };
        assert_eq!(Rates::between(&now, &other, SECOND), Rates::default());
    }

    #[test]
    fn where_nothing_happened_there_is_no_mean() {
        let still = Reading { requests: Some(7.0), queue_seconds: Some(1.0), ..Reading::default() };
        let rates = Rates::between(&still, &still, SECOND);
        assert_eq!((rates.requests, rates.queue_ms, rates.waiting), (Some(0.0), None, Some(0.0)));
    }

    #[test]
    fn depths_that_were_observed_are_averaged() {
        let before = Reading { depth_sum: Some(10.0), depth_count: Some(5.0), ..Reading::default() };
        let now = Reading { depth_sum: Some(22.0), depth_count: Some(9.0), ..Reading::default() };
        assert_eq!(Rates::between(&before, &now, SECOND).waiting, Some(3.0));
    }
}
