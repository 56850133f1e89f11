//! The endpoint picker of the Gateway API inference extension (llm-d router), with its default profile: one central
//! picker that scrapes every replica each 50 ms.
//!
//! Score = 2 × queue + 2 × KV + 3 × prefix, the highest wins, a tie is drawn. Queue = (max − q) / (max − min) over the
//! replicas, KV = 1 − usage, prefix = the share of the prompt's blocks that an index of what was sent where has for the
//! replica (llm-d-router `pkg/epp/config/loader/defaults.go`, `datalayer`, prefix-cache plugin: an LRU of 31,250 blocks a
//! replica). Its picks do not show in its scrape until the next one.

use std::collections::HashMap;

use rand::Rng;
use rand::rngs::SmallRng;

use super::{Asked, Policy};
use crate::server::{MS, Nanos};
use crate::world::Truth;

const LRU: usize = 31_250;

#[derive(Default)]
struct Replica {
    queue: f64,
    kv: f64,
    blocks: HashMap<u64, u64>,
    stamp: u64,
}

pub(super) struct Epp {
    replicas: Vec<Replica>,
}

impl Epp {
    pub(super) fn new(servers: usize) -> Self {
        Self { replicas: (0..servers).map(|_| Replica::default()).collect() }
    }
}

impl Policy for Epp {
    fn pick(&mut self, _client: usize, asked: &Asked<'_>, random: &mut SmallRng) -> usize {
        let blocks = &asked.request.job.blocks;
        let prompt =
            &blocks[..((asked.request.job.prompt / crate::server::BLOCK) as usize).min(blocks.len())];
        let queues = asked.up.iter().map(|i| self.replicas[*i].queue);
        let (min, max) = queues.fold((f64::MAX, 0.0f64), |(min, max), q| (min.min(q), max.max(q)));
        let mut best = (f64::MIN, 0usize, 0u32);
        for &i in asked.up {
            let replica = &self.replicas[i];
            let queue = if max > min { (max - replica.queue) / (max - min) } else { 1.0 };
            let matched = prompt.iter().take_while(|block| replica.blocks.contains_key(block)).count();
            let prefix = matched as f64 / prompt.len().max(1) as f64;
            let score = 2.0 * queue + 2.0 * (1.0 - replica.kv) + 3.0 * prefix;
            if score > best.0 {
                best = (score, i, 1);
            } else if score == best.0 {
                best.2 += 1;
                if random.random_range(0..best.2) == 0 {
                    best.1 = i;
                }
            }
        }
        let replica = &mut self.replicas[best.1];
        for block in prompt {
            replica.stamp += 1;
            replica.blocks.insert(*block, replica.stamp);
        }
        if replica.blocks.len() > LRU + LRU / 8 {
            let keep = replica.stamp.saturating_sub(LRU as u64);
            replica.blocks.retain(|_, stamp| *stamp > keep);
        }
        best.1
    }

    fn scrapes_every(&self) -> Option<Nanos> {
        Some(50 * MS)
    }

    fn scrape(&mut self, truth: &Truth, _now: Nanos) {
        for (replica, server) in self.replicas.iter_mut().zip(&truth.servers) {
            replica.queue = server.waiting() as f64;
            replica.kv = server.kv_usage();
        }
    }
}
