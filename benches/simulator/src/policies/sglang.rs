//! SGLang's cache-aware policy: one central router that counts every request in flight itself.
//!
//! If `max − min` of the loads is above the absolute threshold and `max > relative × min`: the least loaded. Else, if the
//! best prefix match in its tree covers more than the cache threshold of the prompt: that replica; else the least loaded
//! (sgl-model-gateway `policies/cache_aware.rs`: the documentation says "smallest tree", the code takes the least
//! load). The tree keeps the text of each replica; here, its blocks.

use std::collections::HashMap;

use rand::rngs::SmallRng;

use super::{Asked, Policy};
use crate::server::{BLOCK, Nanos};

#[derive(Clone, Copy)]
pub(super) struct Thresholds {
    cache: f64,
    absolute: u32,
    relative: f64,
}

/// What its command line sets.
pub(super) const COMMAND_LINE: Thresholds = Thresholds { cache: 0.3, absolute: 64, relative: 1.5 };
/// What its library sets.
pub(super) const LIBRARY: Thresholds = Thresholds { cache: 0.5, absolute: 32, relative: 1.1 };

/// Nodes of its tree (`max_tree_size`, 2^26 characters) are more than a run ever fills.
pub(super) struct CacheAware {
    thresholds: Thresholds,
    load: Vec<u32>,
    blocks: HashMap<u64, Vec<usize>>,
}

impl CacheAware {
    pub(super) fn new(servers: usize, thresholds: Thresholds) -> Self {
        Self { thresholds, load: vec![0; servers], blocks: HashMap::new() }
    }
}

impl Policy for CacheAware {
    fn pick(&mut self, _client: usize, asked: &Asked<'_>, _random: &mut SmallRng) -> usize {
        let blocks = &asked.request.job.blocks;
        let prompt = &blocks[..((asked.request.job.prompt / BLOCK) as usize).min(blocks.len())];
        let least = asked.up.iter().copied().min_by_key(|i| self.load[*i]).unwrap_or(0);
        let max = asked.up.iter().map(|i| self.load[*i]).max().unwrap_or(0);
        let min = self.load[least];
        let uneven = max - min > self.thresholds.absolute
            && f64::from(max) > self.thresholds.relative * f64::from(min);
        let mut chosen = least;
        if !uneven {
            let known = prompt.iter().map_while(|block| self.blocks.get(block));
            if let Some((depth, tenants)) = known.enumerate().last()
                && (depth + 1) as f64 / prompt.len() as f64 > self.thresholds.cache
                && let Some(tenant) = tenants.last()
            {
                chosen = *tenant;
            }
        }
        for block in prompt {
            let tenants = self.blocks.entry(*block).or_default();
            tenants.retain(|tenant| *tenant != chosen);
            tenants.push(chosen);
        }
        self.load[chosen] += 1;
        chosen
    }

    fn over(&mut self, _client: usize, _request: usize, server: usize, _ms: f64, _failed: bool, _now: Nanos) {
        self.load[server] -= 1;
    }
}
