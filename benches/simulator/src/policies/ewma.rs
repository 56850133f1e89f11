//! Peak EWMA with two choices, as Linkerd and Finagle do it.
//!
//! Cost = moving average of the time to the first byte × (requests that wait for it + 1). The average jumps up to a
//! time above it at once and decays over 10 s, also while nothing comes; an endpoint that was never used starts at
//! 30 ms (Linkerd's defaults; linkerd.io, "Beyond Round Robin", 2016; tower's `peak_ewma`).

use rand::Rng;
use rand::rngs::SmallRng;

use super::{Asked, Policy};
use crate::server::{Nanos, S};

const DECAY: f64 = 10.0 * S as f64;
const DEFAULT_MS: f64 = 30.0;

#[derive(Clone, Copy)]
struct Endpoint {
    rtt: f64,
    at: Nanos,
    pending: u32,
}

impl Endpoint {
    fn update(&mut self, ms: f64, now: Nanos) {
        if ms > self.rtt {
            self.rtt = ms;
        } else {
            let keep = (-((now - self.at) as f64) / DECAY).exp();
            self.rtt = self.rtt * keep + ms * (1.0 - keep);
        }
        self.at = now;
    }

    fn cost(&mut self, now: Nanos) -> f64 {
        self.update(0.0, now);
        self.rtt * f64::from(self.pending + 1)
    }
}

pub(super) struct PeakEwma {
    clients: Vec<Vec<Endpoint>>,
    waiting: std::collections::HashSet<usize>,
}

impl PeakEwma {
    pub(super) fn new(clients: usize, servers: usize) -> Self {
        let endpoint = Endpoint { rtt: DEFAULT_MS, at: 0, pending: 0 };
        Self { clients: vec![vec![endpoint; servers]; clients], waiting: Default::default() }
    }
}

impl Policy for PeakEwma {
    fn pick(&mut self, client: usize, asked: &Asked<'_>, random: &mut SmallRng) -> usize {
        let n = asked.up.len();
        let a = random.random_range(0..n);
        // Two that differ.
        let b = if n > 1 { (a + random.random_range(1..n)) % n } else { a };
        let (a, b) = (asked.up[a], asked.up[b]);
        let endpoints = &mut self.clients[client];
        let chosen = if endpoints[b].cost(asked.now) < endpoints[a].cost(asked.now) { b } else { a };
        endpoints[chosen].pending += 1;
        self.waiting.insert(asked.request.job.request);
        chosen
    }

    fn head(&mut self, client: usize, request: usize, server: usize, ms: f64, now: Nanos) {
        if self.waiting.remove(&request) {
            let endpoint = &mut self.clients[client][server];
            endpoint.pending -= 1;
            endpoint.update(ms, now);
        }
    }
}
