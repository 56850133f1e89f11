//! Load reports: made where the load is true (inbound), read where the choice is made (outbound).

use std::cell::Cell;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use penstock_balance::{GpuHealth, LoadReport};
use penstock_inference::orca::{self, Load};
use tokio::time::Instant;

use crate::age;
use crate::exchange::Exchange;
use crate::headers::{self, ENDPOINT, Found, LOAD_REPORT, LOAD_REPORT_BIN, MODELS};
use crate::models::Model;
use crate::worker::Worker;

/// How long requests wait in this proxy before the application gets them, over all workers.
#[derive(Debug, Default)]
pub struct QueueWait {
    us: AtomicU32,
}

impl QueueWait {
    /// A request waited so long before it could be sent to the application. Averaged over about eight requests;
    /// workers that write at once lose one of the values, which an average can bear.
    pub fn waited(&self, wait: Duration) {
        let us = u32::try_from(wait.as_micros()).unwrap_or(u32::MAX);
        let before = self.us.load(Relaxed);
        self.us.store(before - before / 8 + us / 8, Relaxed);
    }

    /// Milliseconds that requests have waited lately.
    pub fn ms(&self) -> f64 {
        f64::from(self.us.load(Relaxed)) / 1e3
    }
}

/// The load of the application, as seen by a request for one of its models.
pub fn load(worker: &Worker, model: &Model) -> Load {
    let shared = &worker.shared;
    let now = worker.now();
    let measured = shared.models.load(model, now);
    Load { queue_wait_ms: Some(shared.queue_wait.ms()), ..measured.or(shared.signals.load(now)) }
}

fn load_of(exchange: &Exchange) -> Load {
    let worker = &exchange.worker;
    // A request that failed before it was known what it asks for is one for no model in particular.
    load(worker, &exchange.model().unwrap_or_else(|| worker.model("")))
}

/// How often a sidecar is told, on each of its connections. In between it knows what it sent itself, so more would
/// change no choice; at tens of thousands of responses a second it would cost more than the rest of the way.
const EVERY: Duration = Duration::from_millis(1);

/// How often a sidecar is told which models are loaded, on each of its connections: loading one takes seconds.
const MODELS_EVERY: Duration = Duration::from_secs(1);

/// When a connection's client was last told.
#[derive(Debug, Default)]
pub struct LastTold {
    load: Cell<Option<Instant>>,
    models: Cell<Option<Instant>>,
}

impl LastTold {
    /// Whether it is time again for the load; if so, it counts as told.
    pub fn is_due(&self, now: Instant) -> bool {
        due(&self.load, now, EVERY)
    }

    /// The same for the models.
    fn models_are_due(&self, now: Instant) -> bool {
        due(&self.models, now, MODELS_EVERY)
    }
}

fn due(last: &Cell<Option<Instant>>, now: Instant, every: Duration) -> bool {
    let due = last.get().is_none_or(|told| now.saturating_duration_since(told) >= every);
    if due {
        last.set(Some(now));
    }
    due
}

/// Inbound: tells a sidecar now and then what the model server has loaded, if that is known.
pub fn list_models(worker: &Worker, last: &LastTold, headers: &mut HeaderMap) {
    if last.models_are_due(Instant::now())
        && let Some(models) = worker.shared.signals.models(worker.now())
    {
        headers.insert(MODELS, models);
    }
}

/// Inbound: puts the report, and our own word that we are leaving, on a response. What the application itself reported
/// becomes a part of it. Whoever was not let in is told no load: a refusal says only why it is one.
pub fn stamp(exchange: &Exchange, headers: &mut HeaderMap) {
    let worker = &exchange.worker;
    if !exchange.is_let_in() {
        return leaving(worker, headers);
    }
    if exchange.reports() || headers.contains_key(LOAD_REPORT) || headers.contains_key(LOAD_REPORT_BIN) {
        load_of(exchange).merge(headers, exchange.shows_reports(), &mut worker.scratch());
    }
    leaving(worker, headers);
}

fn leaving(worker: &Worker, headers: &mut HeaderMap) {
    if worker.shared.drain.leaving() {
        headers.insert(ENDPOINT, HeaderValue::from_static("draining"));
    }
}

/// Inbound: puts the report on a gRPC response's trailers.
pub fn stamp_trailers(exchange: &Exchange, trailers: &mut HeaderMap) {
    // The application's own: it says nothing in our name.
    headers::strip_trailers(trailers);
    note_grpc_status(exchange, trailers);
    if exchange.is_let_in() && exchange.reports() && trailers.contains_key("grpc-status") {
        let worker = &exchange.worker;
        let asked = exchange.shows_reports().is_some();
        load_of(exchange).merge_trailers(trailers, asked, &mut worker.scratch());
    }
}

/// Outbound: reads the report off a response's headers.
pub fn take(exchange: &Exchange, headers: &mut HeaderMap, found: Found) {
    if found.report {
        read(exchange, headers);
    }
    if found.ours
        && let Some(models) = headers.remove(MODELS)
    {
        exchange.told_models(&models);
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
    if let Some(load) = Load::from_headers(headers) {
        exchange.told(told(&load));
    }
    if exchange.shows_reports().is_none() {
        headers.remove(LOAD_REPORT);
        headers.remove(LOAD_REPORT_BIN);
    }
}

/// A report on the wire, in the words of the balance.
pub fn told(load: &Load) -> LoadReport {
    let number = |value: Option<f64>| value.map(|value| value as f32);
    LoadReport {
        in_flight: number(load.in_flight),
        units: number(load.units),
        backlog_ms: number(load.backlog_ms),
        fixed_ms: number(load.fixed_ms),
        unit_ms: number(load.unit_ms),
        at_once: number(load.at_once),
        queue_wait_ms: number(load.queue_wait_ms),
        room: number(load.room),
        closes_ms: number(load.closes_ms),
        waiting: number(load.waiting),
        kv_usage: number(load.kv_usage),
        memory: number(load.mem_utilization),
        utilization: number(load.application_utilization),
        rps: number(load.rps),
        eps: number(load.eps),
        gpu: load.gpu.map(|gpu| gpu.number() as u64),
        health: load.gpu_health.map(|health| match health {
            orca::GpuHealth::Well => GpuHealth::Well,
            orca::GpuHealth::Throttled => GpuHealth::Throttled,
            orca::GpuHealth::Failed => GpuHealth::Failed,
        }),
    }
}

/// Whether a gRPC status means that the server failed, not that it refused: unknown, deadline exceeded, unimplemented,
/// internal, unavailable, data loss (gRPC status codes).
pub fn is_failure(grpc_status: &[u8]) -> bool {
    matches!(grpc_status, b"2" | b"4" | b"12" | b"13" | b"14" | b"15")
}

fn note_grpc_status(exchange: &Exchange, trailers: &HeaderMap) {
    if let Some(status) = trailers.get("grpc-status")
        && is_failure(status.as_bytes())
        && !age::is_farewell(trailers)
    {
        exchange.grpc_failed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_told_at_once_and_then_now_and_then() {
        let last = LastTold::default();
        assert!(last.is_due(Instant::now()));
        assert!(!last.is_due(Instant::now()));
        tokio::time::advance(EVERY).await;
        assert!(last.is_due(Instant::now()));
        assert!(last.models_are_due(Instant::now()), "each has a time of its own");
        tokio::time::advance(EVERY).await;
        assert!(!last.models_are_due(Instant::now()));
    }

    #[test]
    fn waits_are_averaged() {
        let wait = QueueWait::default();
        (0..100).for_each(|_| wait.waited(Duration::from_micros(800)));
        assert!((wait.ms() - 0.8).abs() < 0.01, "{}", wait.ms());
    }
}
