//! Prequal: probing to reduce queuing and latency (Wydrowski, Kleinberg, Rumble and Archer, NSDI 2024), asynchronous
//! mode, each client for itself.
//!
//! Three probes to a query go to random replicas and come back with requests in flight (RIF) and an estimate of the
//! latency at that RIF. A pool holds up to 16 of them; one is dropped when it is 1 s old, when it was used as often as
//! the reuse budget allows, or when the pool is full (the oldest); after each query one more is removed, alternately the
//! oldest and the worst. Probes with a RIF above the quantile 2^-0.25 of recent RIFs are hot; the cold one with the least
//! latency is picked, else the hot one with the least RIF; the client adds its own pick to the probe. With fewer than two
//! probes the choice is random. Constants as in the paper's section 4, which has hundreds of replicas: here the pool is
//! never more than half of them, and a probe replaces one of the same replica, both in its favour.

use rand::Rng;
use rand::rngs::SmallRng;

use super::{Asked, Policy, Probe};
use crate::server::{Nanos, S};

const POOL: usize = 16;
const PROBES: usize = 3;
const REMOVE: f64 = 1.0;
const QUANTILE: f64 = 0.840_896_415_253_714_6;
const AGE: Nanos = S;
const DELTA: f64 = 1.0;

#[derive(Clone, Copy)]
struct Held {
    server: usize,
    rif: u32,
    latency: f32,
    at: Nanos,
    uses: f64,
}

#[derive(Default)]
struct Client {
    pool: Vec<Held>,
    recent: Vec<u32>,
    next: usize,
    oldest_next: bool,
}

pub(super) struct Prequal {
    clients: Vec<Client>,
    size: usize,
    reuse: f64,
}

impl Prequal {
    pub(super) fn new(clients: usize, servers: usize) -> Self {
        // Equation 1 of the paper: how often a probe may be used.
        let size = POOL.min(servers / 2).max(2);
        let (m, n) = (size as f64, servers as f64);
        let rate = (1.0 - m / n) * PROBES as f64 - REMOVE;
        let reuse = if rate > 0.0 { ((1.0 + DELTA) / rate).max(1.0) } else { f64::INFINITY };
        Self { clients: (0..clients).map(|_| Client::default()).collect(), size, reuse }
    }
}

impl Client {
    fn edge(&self) -> u32 {
        let mut recent = self.recent.clone();
        recent.sort_unstable();
        let at = ((recent.len() as f64 * QUANTILE) as usize).min(recent.len().saturating_sub(1));
        recent.get(at).copied().unwrap_or(u32::MAX)
    }

    /// The best by the hot/cold rule, or the worst by its inverse.
    fn best(&self, edge: u32) -> Option<usize> {
        let cold = (0..self.pool.len()).filter(|i| self.pool[*i].rif <= edge);
        cold.min_by(|a, b| self.pool[*a].latency.total_cmp(&self.pool[*b].latency))
            .or_else(|| (0..self.pool.len()).min_by_key(|i| self.pool[*i].rif))
    }

    fn worst(&self, edge: u32) -> Option<usize> {
        let hot = (0..self.pool.len()).filter(|i| self.pool[*i].rif > edge);
        hot.max_by_key(|i| self.pool[*i].rif).or_else(|| {
            (0..self.pool.len()).max_by(|a, b| self.pool[*a].latency.total_cmp(&self.pool[*b].latency))
        })
    }
}

impl Policy for Prequal {
    fn pick(&mut self, client: usize, asked: &Asked<'_>, random: &mut SmallRng) -> usize {
        let reuse = self.reuse;
        let client = &mut self.clients[client];
        client.pool.retain(|held| asked.now - held.at <= AGE && asked.up.contains(&held.server));
        let edge = client.edge();
        let chosen = match client.best(edge).filter(|_| client.pool.len() >= 2) {
            Some(i) => {
                let held = &mut client.pool[i];
                held.rif += 1;
                held.uses += 1.0;
                let server = held.server;
                if held.uses >= reuse {
                    client.pool.swap_remove(i);
                }
                server
            }
            None => asked.up[random.random_range(0..asked.up.len())],
        };
        client.oldest_next = !client.oldest_next;
        let gone = if client.oldest_next {
            (0..client.pool.len()).min_by_key(|i| client.pool[*i].at)
        } else {
            client.worst(edge)
        };
        if let Some(gone) = gone.filter(|_| client.pool.len() > 2) {
            client.pool.swap_remove(gone);
        }
        chosen
    }

    fn probes(&mut self, _client: usize, up: &[usize], random: &mut SmallRng, to: &mut Vec<usize>) {
        while to.len() < PROBES.min(up.len()) {
            let server = up[random.random_range(0..up.len())];
            if !to.contains(&server) {
                to.push(server);
            }
        }
    }

    fn probed(&mut self, client: usize, server: usize, probe: &Probe, now: Nanos) {
        let client = &mut self.clients[client];
        if client.recent.len() < 128 {
            client.recent.push(probe.rif);
        } else {
            client.recent[client.next % 128] = probe.rif;
            client.next += 1;
        }
        client.pool.retain(|held| held.server != server);
        if client.pool.len() >= self.size
            && let Some(oldest) = (0..client.pool.len()).min_by_key(|i| client.pool[*i].at)
        {
            client.pool.swap_remove(oldest);
        }
        client.pool.push(Held { server, rif: probe.rif, latency: probe.latency, at: now, uses: 0.0 });
    }
}
