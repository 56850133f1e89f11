//! What an endpoint says of itself: the load report (ORCA) on its responses, in the words of this crate.

use std::time::Duration;

use crate::estimate::{Cost, Estimator, MOST_AT_ONCE};

/// A load report. Everything may be missing: "not told" is not zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LoadReport {
    /// Requests in flight there, from all clients.
    pub in_flight: Option<f32>,
    /// Units of work in flight there that wait for their first byte, from all clients.
    pub units: Option<f32>,
    /// Milliseconds until the work in flight is done.
    pub backlog_ms: Option<f32>,
    /// Milliseconds to a request of this model, whatever its size.
    pub fixed_ms: Option<f32>,
    /// Milliseconds to a unit of this model's work.
    pub unit_ms: Option<f32>,
    /// How many requests are served at once: what one takes that comes alone over what it costs. Not told: one.
    pub at_once: Option<f32>,
    /// Milliseconds that requests wait before they reach the application.
    pub queue_wait_ms: Option<f32>,
    /// Units that the open batch still takes.
    pub room: Option<f32>,
    /// Milliseconds until the open batch closes.
    pub closes_ms: Option<f32>,
    /// Requests that wait inside the model server.
    pub waiting: Option<f32>,
    /// The share of the KV cache in use.
    pub kv_usage: Option<f32>,
    /// The share of the GPU's memory in use.
    pub memory: Option<f32>,
    /// The busy share; 1 = never idle, more with a queue.
    pub utilization: Option<f32>,
    /// Requests a second.
    pub rps: Option<f32>,
    /// Errors a second.
    pub eps: Option<f32>,
    /// Which physical GPU serves it; replicas with the same value share one.
    pub gpu: Option<u64>,
    /// How the GPU is.
    pub health: Option<GpuHealth>,
}

/// How a GPU is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GpuHealth {
    /// Nothing is wrong.
    Well,
    /// Slowed down by heat or power.
    Throttled,
    /// It reported a fault that only a reset mends (Xid, uncorrectable ECC).
    Failed,
}

impl LoadReport {
    /// What is known of a server that `estimator` watches.
    pub fn of(estimator: &Estimator, now: Duration) -> Self {
        let (cost, backlog, rates) = (estimator.cost(), estimator.backlog(now), estimator.rates(now));
        Self {
            in_flight: Some(estimator.in_flight() as f32),
            units: Some(estimator.units()),
            backlog_ms: Some(backlog.drains_ms),
            fixed_ms: cost.map(|cost| cost.fixed_ms),
            unit_ms: cost.map(|cost| cost.unit_ms),
            at_once: Some(estimator.at_once()),
            room: Some(backlog.room),
            closes_ms: Some(backlog.closes_ms),
            utilization: Some(rates.utilization),
            rps: Some(rates.rps),
            eps: Some(rates.eps),
            ..Self::default()
        }
    }

    /// The two-parameter cost, if told whole and sane.
    pub fn cost(&self) -> Option<Cost> {
        let (fixed_ms, unit_ms) = (sane(self.fixed_ms)?, sane(self.unit_ms)?);
        Some(Cost { fixed_ms, unit_ms })
    }

    /// The same without values that are not finite or below zero: those count as not told.
    #[must_use]
    pub fn sane(self) -> Self {
        Self {
            in_flight: sane(self.in_flight),
            units: sane(self.units),
            backlog_ms: sane(self.backlog_ms),
            fixed_ms: sane(self.fixed_ms),
            unit_ms: sane(self.unit_ms),
            // Less than one says nothing.
            at_once: sane(self.at_once)
                .filter(|at_once| *at_once >= 1.0)
                .map(|at_once| at_once.min(MOST_AT_ONCE)),
            queue_wait_ms: sane(self.queue_wait_ms),
            room: sane(self.room),
            closes_ms: sane(self.closes_ms),
            waiting: sane(self.waiting),
            kv_usage: sane(self.kv_usage),
            memory: sane(self.memory),
            utilization: sane(self.utilization),
            rps: sane(self.rps),
            eps: sane(self.eps),
            gpu: self.gpu,
            health: self.health,
        }
    }
}

/// Larger than anything that is meant, and small enough that nothing overflows.
const LARGEST: f32 = 1e9;

fn sane(value: Option<f32>) -> Option<f32> {
    value.filter(|value| value.is_finite() && *value >= 0.0).map(|value| value.min(LARGEST))
}
