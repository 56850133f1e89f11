//! Ours, exactly as the sidecar runs it: `penstock_balance::Pool` with a state for each client.
//!
//! `orca-wrr`, which is gRPC's and Envoy's policy too (gRFC A58), is run from here as well.

use penstock_balance::load::EndpointState;
use penstock_balance::pick::Candidate;
use penstock_balance::{Ask, LoadReport, Members, Outcome, Policy as Balance, Pool, Sent, Settings};
use rand::rngs::SmallRng;
use std::collections::HashMap;
use std::sync::Arc;

use super::{Asked, Policy};
use crate::server::{BLOCK, Nanos};
use crate::world::duration;

struct Endpoint {
    server: usize,
    state: EndpointState,
}

impl Candidate for Endpoint {
    fn state(&self) -> &EndpointState {
        &self.state
    }

    fn name(&self) -> u64 {
        self.server as u64 + 1
    }
}

struct Client {
    pool: Pool,
    known: Vec<Arc<Endpoint>>,
    members: Members<Arc<Endpoint>>,
}

pub(super) struct Ours {
    settings: Settings,
    clients: Vec<Client>,
    sent: HashMap<usize, Sent>,
    /// Whether it asks for reports without a request.
    asks: bool,
    worth_asking: Option<usize>,
}

impl Ours {
    pub(super) fn new(policy: Balance, clients: usize, servers: usize) -> Self {
        let known = || {
            (0..servers)
                .map(|server| Arc::new(Endpoint { server, state: EndpointState::default() }))
                .collect()
        };
        let client = |_| Client { pool: Pool::default(), known: known(), members: Members::default() };
        Self {
            settings: Settings { policy, ..Settings::default() },
            clients: (0..clients).map(client).collect(),
            sent: HashMap::new(),
            asks: false,
            worth_asking: None,
        }
    }
}

impl Ours {
    pub(super) fn asking(self) -> Self {
        Self { asks: true, ..self }
    }
}

impl Policy for Ours {
    fn pick(&mut self, client: usize, asked: &Asked<'_>, random: &mut SmallRng) -> usize {
        let client = &mut self.clients[client];
        let job = &asked.request.job;
        let prompt = (job.prompt / BLOCK) as usize;
        let ask = Ask {
            units: if job.prompt > 0 { job.prompt as f32 } else { job.rows },
            key: asked.request.key,
            blocks: &job.blocks[..prompt.min(job.blocks.len())],
            block_units: BLOCK as f32,
            model: 0,
            avoid: &[],
            now: duration(asked.now),
        };
        match client.pool.pick(&client.members, &self.settings, &ask, random) {
            Ok(picked) => {
                self.sent.insert(job.request, picked.sent);
                self.worth_asking = picked.worth_asking.map(|i| client.members[i].server);
                client.members[picked.index].server
            }
            Err(_) => asked.up[0],
        }
    }

    fn members(&mut self, up: &[usize], _now: Nanos) {
        for client in &mut self.clients {
            client.members =
                Members::new(up.iter().map(|server| Arc::clone(&client.known[*server])).collect());
        }
    }

    fn head(&mut self, client: usize, request: usize, server: usize, _ms: f64, now: Nanos) {
        let client = &self.clients[client];
        if let Some(sent) = self.sent.get_mut(&request) {
            client.pool.first_byte(&client.known[server].state, sent, duration(now));
        }
    }

    fn over(&mut self, client: usize, request: usize, server: usize, _ms: f64, failed: bool, now: Nanos) {
        let client = &self.clients[client];
        if let Some(sent) = self.sent.remove(&request) {
            let outcome = if failed { Outcome::Failed } else { Outcome::Served };
            client.pool.over(&client.known[server].state, sent, outcome, duration(now));
        }
    }

    fn report(&mut self, client: usize, server: usize, report: &LoadReport, now: Nanos) {
        let client = &self.clients[client];
        client.pool.told(&client.known[server].state, *report, duration(now));
    }

    fn probes(&mut self, _client: usize, _up: &[usize], _random: &mut SmallRng, to: &mut Vec<usize>) {
        if self.asks {
            to.extend(self.worth_asking);
        }
    }

    fn probed(&mut self, client: usize, server: usize, probe: &super::Probe, now: Nanos) {
        self.report(client, server, &probe.report, now);
    }

    fn tend(&mut self, now: Nanos) {
        for client in &self.clients {
            client.members.tend(duration(now));
        }
    }
}

