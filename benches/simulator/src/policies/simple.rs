//! Random, round robin, and least-request with two choices as Envoy does it.

use rand::Rng;
use rand::rngs::SmallRng;

use super::{Asked, Policy};
use crate::server::Nanos;

pub(super) struct Random;

impl Policy for Random {
    fn pick(&mut self, _client: usize, asked: &Asked<'_>, random: &mut SmallRng) -> usize {
        asked.up[random.random_range(0..asked.up.len())]
    }
}

pub(super) struct RoundRobin {
    turns: Vec<Option<usize>>,
}

impl RoundRobin {
    pub(super) fn new(clients: usize) -> Self {
        Self { turns: vec![None; clients] }
    }
}

impl Policy for RoundRobin {
    fn pick(&mut self, client: usize, asked: &Asked<'_>, random: &mut SmallRng) -> usize {
        // Each client starts somewhere else, as Envoy's and gRPC's do.
        let turn = self.turns[client].get_or_insert_with(|| random.random_range(0..asked.up.len()));
        *turn += 1;
        asked.up[*turn % asked.up.len()]
    }
}

/// Envoy's `LEAST_REQUEST` at equal weights: of two hosts drawn with replacement (`choice_count` 2) the one with fewer
/// active requests of this Envoy, the first on a tie (Envoy docs, "Load balancers", weighted least request).
pub(super) struct LeastRequest {
    active: Vec<Vec<u32>>,
}

impl LeastRequest {
    pub(super) fn new(clients: usize, servers: usize) -> Self {
        Self { active: vec![vec![0; servers]; clients] }
    }
}

impl Policy for LeastRequest {
    fn pick(&mut self, client: usize, asked: &Asked<'_>, random: &mut SmallRng) -> usize {
        let mut draw = || asked.up[random.random_range(0..asked.up.len())];
        let (a, b) = (draw(), draw());
        let active = &mut self.active[client];
        let chosen = if active[b] < active[a] { b } else { a };
        active[chosen] += 1;
        chosen
    }

    fn over(&mut self, client: usize, _request: usize, server: usize, _ms: f64, _failed: bool, _now: Nanos) {
        self.active[client][server] -= 1;
    }
}
