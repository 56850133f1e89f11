//! Load reports: made where the load is true (inbound), read where the choice is made (outbound).

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use penstock_balance::Report;
use penstock_inference::orca::Load;

use crate::exchange::Exchange;
use crate::headers::{ENDPOINT, Found, LOAD_REPORT, LOAD_REPORT_BIN};
use crate::worker::Worker;

/// The load of the application behind this proxy, over all workers.
#[derive(Debug, Default)]
pub struct LocalLoad {
    in_flight: AtomicU32,
    finished: AtomicU64,
    failed: AtomicU64,
    /// Bits of `f32`, once a second.
    rps: AtomicU32,
    eps: AtomicU32,
    /// Moving average of the time from a request's arrival to its being sent to the application.
    queue_wait_us: AtomicU32,
}

impl LocalLoad {
    /// A request has arrived.
    pub fn begin(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// A request is over.
    pub fn end(&self, failed: bool) {
        self.in_flight.fetch_sub(1, Relaxed);
        self.finished.fetch_add(1, Relaxed);
        if failed {
            self.failed.fetch_add(1, Relaxed);
        }
    }

    /// A request waited so long before it could be sent to the application. Averaged over about eight requests;
    /// workers that write at once lose one of the values, which an average can bear.
    pub fn waited(&self, wait: Duration) {
        let us = u32::try_from(wait.as_micros()).unwrap_or(u32::MAX);
        let before = self.queue_wait_us.load(Relaxed);
        self.queue_wait_us.store(before - before / 8 + us / 8, Relaxed);
    }

    /// Computes the rates from what was counted since the last call, `interval` ago.
    pub fn tick(&self, before: (u64, u64), interval: Duration) -> (u64, u64) {
        let now = (self.finished.load(Relaxed), self.failed.load(Relaxed));
        let rate =
            |now: u64, before: u64| (now.saturating_sub(before) as f32 / interval.as_secs_f32()).to_bits();
        self.rps.store(rate(now.0, before.0), Relaxed);
        self.eps.store(rate(now.1, before.1), Relaxed);
        now
    }

    /// The load now.
    pub fn report(&self) -> Report {
        Report {
            in_flight: self.in_flight.load(Relaxed) as f32,
            queue_wait: Duration::from_micros(u64::from(self.queue_wait_us.load(Relaxed))),
            rps: f32::from_bits(self.rps.load(Relaxed)),
            eps: f32::from_bits(self.eps.load(Relaxed)),
        }
    }
}

/// Inbound: puts the report, and our own word that we are leaving, on a response.
pub fn stamp(worker: &Worker, headers: &mut HeaderMap) {
    load(&worker.shared.load.report()).stamp(headers, &mut worker.scratch());
    if worker.shared.drain.leaving() {
        headers.insert(ENDPOINT, HeaderValue::from_static("draining"));
    }
}

/// Inbound: puts the report on a gRPC response's trailers.
pub fn stamp_trailers(exchange: &Exchange, trailers: &mut HeaderMap) {
    note_grpc_status(exchange, trailers);
    if trailers.contains_key("grpc-status") {
        let worker = &exchange.worker;
        load(&worker.shared.load.report()).stamp_trailers(trailers, &mut worker.scratch());
    }
}

/// Outbound: reads the report off a response's headers.
pub fn take(exchange: &Exchange, headers: &mut HeaderMap, found: Found) {
    if found.report {
        read(exchange, headers);
    }
    if found.ours
        && let Some(word) = headers.remove(ENDPOINT)
        && word == "draining"
        && let Some(endpoint) = exchange.endpoint()
    {
        endpoint.state.leaving(exchange.worker.now());
    }
}

/// Outbound: reads the report off a response's trailers.
pub fn take_trailers(exchange: &Exchange, trailers: &mut HeaderMap) {
    note_grpc_status(exchange, trailers);
    if trailers.contains_key(LOAD_REPORT_BIN) || trailers.contains_key(LOAD_REPORT) {
        read(exchange, trailers);
    }
}

fn read(exchange: &Exchange, headers: &mut HeaderMap) {
    if let Some(load) = Load::from_headers(headers)
        && let Some(endpoint) = exchange.endpoint()
    {
        let number = |value: Option<f64>| value.unwrap_or(0.0) as f32;
        let report = Report {
            in_flight: number(load.in_flight),
            queue_wait: Duration::from_micros((load.queue_wait_ms.unwrap_or(0.0) * 1e3) as u64),
            rps: number(load.rps),
            eps: number(load.eps),
        };
        endpoint.state.report(report, exchange.worker.now());
    }
    if !exchange.shows_reports() {
        headers.remove(LOAD_REPORT);
        headers.remove(LOAD_REPORT_BIN);
    }
}

/// Statuses that mean that the server failed, not that it refused: unknown, deadline exceeded, unimplemented,
/// internal, unavailable, data loss (gRPC status codes).
fn note_grpc_status(exchange: &Exchange, trailers: &HeaderMap) {
    if let Some(status) = trailers.get("grpc-status")
        && matches!(status.as_bytes(), b"2" | b"4" | b"12" | b"13" | b"14" | b"15")
    {
        exchange.grpc_failed();
    }
}

fn load(report: &Report) -> Load {
    Load {
        application_utilization: None,
        in_flight: Some(f64::from(report.in_flight)),
        queue_wait_ms: Some(report.queue_wait.as_secs_f64() * 1e3),
        rps: Some(f64::from(report.rps)),
        eps: Some(f64::from(report.eps)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_per_second_and_waits_are_averaged() {
        let load = LocalLoad::default();
        for i in 0..20 {
            load.begin();
            if i < 19 {
                load.end(i < 4);
            }
        }
        load.tick((0, 0), Duration::from_secs(2));
        (0..100).for_each(|_| load.waited(Duration::from_micros(800)));
        let report = load.report();
        assert_eq!((report.in_flight, report.rps, report.eps), (1.0, 9.5, 2.0));
        assert!(report.queue_wait.abs_diff(Duration::from_micros(800)) < Duration::from_micros(10));
    }
}
