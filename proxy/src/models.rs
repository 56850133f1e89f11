//! The models behind this proxy: what each costs, and how much of it waits. Inbound measures here what its load
//! reports tell.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use penstock_balance::Estimator;
use penstock_balance::memory::Memory;
use penstock_inference::orca::Load;
use tokio::runtime::Handle;
use tokio::time::Instant;

use crate::admission::{Adaptive, Gate, Limit, Outlook};
use crate::coalesce::batcher::Batcher;
use crate::config::Admission;
use crate::work::{BLOCK_UNITS, Work};

/// Models that are told apart; requests for further ones count as for none in particular. Clients choose the names, so
/// there must be an end.
const MAX_MODELS: usize = 64;
/// The longest name that is told apart, bytes.
const MAX_NAME: usize = 256;

/// One model.
#[derive(Debug)]
pub struct Model {
    /// `name` or `name/version`; empty: none in particular.
    pub name: Box<str>,
    /// Its cost and its work in flight.
    pub estimator: Estimator,
    /// What its requests wait at, once admission was asked for.
    gate: OnceLock<Gate>,
    /// The prompts that it has seen lately, and so most likely has in its cache.
    prompts: OnceLock<Memory>,
    /// Where its requests share executions.
    batcher: OnceLock<Batcher>,
}

impl Model {
    fn new(name: &str) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            estimator: Estimator::default(),
            gate: OnceLock::new(),
            prompts: OnceLock::new(),
            batcher: OnceLock::new(),
        })
    }

    /// Where its requests share executions.
    pub fn batcher(&self) -> &Batcher {
        self.batcher.get_or_init(Batcher::default)
    }

    /// Of its requests those that wait for an execution, and the batches that are on their way.
    pub fn open_batches(&self) -> (usize, usize) {
        self.batcher.get().map_or((0, 0), Batcher::open)
    }

    /// Where its requests wait.
    pub fn gate(&self) -> Option<&Gate> {
        self.gate.get()
    }

    /// What is foretold of a request with so many units of work that arrives now.
    pub fn outlook(&self, units: f32, now: Duration) -> Outlook {
        let Some(cost) = self.estimator.cost() else { return Outlook::default() };
        let time = |ms: f32| Duration::try_from_secs_f32(ms / 1e3).unwrap_or_default();
        let service_ms = cost.fixed_ms + cost.unit_ms * units;
        Outlook {
            backlog: time(self.estimator.backlog(now).drains_ms),
            unit: time(service_ms / units.max(1.0)),
            service: time(service_ms),
        }
    }

    /// The work that a request really is: what the model has of its prompt is taken off.
    pub fn units(&self, work: &Work, now: Duration) -> f32 {
        if work.blocks.is_empty() {
            return work.units;
        }
        let prompts = self.prompts.get_or_init(Memory::default);
        let known = prompts.matched(&work.blocks, 0, now);
        prompts.remember(&work.blocks, 0, now);
        (work.units - known as f32 * BLOCK_UNITS).max(1.0)
    }
}

/// All models.
#[derive(Debug)]
pub struct Models {
    /// Where the queues run, and the epoch of their deadlines.
    runtime: Handle,
    epoch: Instant,
    admission: Mutex<Option<Admission>>,
    none: Arc<Model>,
    by_name: Mutex<HashMap<Box<str>, Arc<Model>>>,
    all: ArcSwap<Vec<Arc<Model>>>,
}

impl Models {
    /// None yet. Their queues run on the current runtime; their times count from `epoch`.
    pub fn new(epoch: Instant) -> Self {
        let none = Model::new("");
        Self {
            runtime: Handle::current(),
            epoch,
            admission: Mutex::default(),
            all: ArcSwap::from_pointee(vec![Arc::clone(&none)]),
            none,
            by_name: Mutex::default(),
        }
    }

    /// Where requests for a model wait, under these rules.
    pub fn gate_of<'a>(&self, model: &'a Model, rules: Admission) -> &'a Gate {
        model.gate.get_or_init(|| {
            let (gate, owner) = Gate::new(limit(rules), rules.queue, self.epoch);
            self.runtime.spawn(owner.run());
            gate
        })
    }

    /// Has the rules followed by the queues there are.
    pub fn follow(&self, rules: Option<Admission>) {
        let mut followed = self.admission.lock().unwrap_or_else(PoisonError::into_inner);
        if *followed == rules {
            return;
        }
        *followed = rules;
        let Some(rules) = rules else { return };
        for model in self.all().iter() {
            if let Some(gate) = model.gate() {
                gate.set(limit(rules), rules.queue);
            }
        }
    }

    /// The model of that name. Takes a lock, so workers remember what it answered.
    pub fn of(&self, name: &str) -> Arc<Model> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Arc::clone(&self.none);
        }
        let mut by_name = self.by_name.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(model) = by_name.get(name) {
            return Arc::clone(model);
        }
        if by_name.len() >= MAX_MODELS {
            return Arc::clone(&self.none);
        }
        let model = Model::new(name);
        by_name.insert(name.into(), Arc::clone(&model));
        let mut all = Vec::clone(&self.all.load());
        all.push(Arc::clone(&model));
        self.all.store(Arc::new(all));
        model
    }

    /// Every model that there was a request for.
    pub fn all(&self) -> arc_swap::Guard<Arc<Vec<Arc<Model>>>> {
        self.all.load()
    }

    /// What is reported on a response of `model`: its own cost, and the work of all, since they share the GPU.
    pub fn load(&self, model: &Model, now: Duration) -> Load {
        let number = |value: f32| Some(f64::from(value));
        let own = model.estimator.backlog(now);
        let (cost, rates) = (model.estimator.cost(), model.estimator.rates(now));
        let mut load = Load {
            fixed_ms: cost.map(|cost| f64::from(cost.fixed_ms)),
            unit_ms: cost.map(|cost| f64::from(cost.unit_ms)),
            // One by one goes without saying.
            at_once: number(model.estimator.at_once()).filter(|at_once| *at_once >= 1.05),
            closes_ms: number(own.closes_ms),
            room: number(own.room),
            ..Load::default()
        };
        let mut sum = Sum { drains_ms: own.drains_ms, units: model.estimator.units(), ..Sum::default() };
        sum.count(model.estimator.in_flight(), rates);
        for other in self.all().iter().filter(|other| !std::ptr::eq(&***other, model)) {
            sum.drains_ms += other.estimator.backlog(now).drains_ms;
            sum.units += other.estimator.units();
            sum.count(other.estimator.in_flight(), other.estimator.rates(now));
        }
        load.in_flight = Some(f64::from(sum.in_flight));
        load.units = number(sum.units);
        load.backlog_ms = number(sum.drains_ms);
        load.application_utilization = number(sum.utilization);
        load.rps = number(sum.rps);
        load.eps = number(sum.eps);
        load
    }
}

fn limit(rules: Admission) -> Limit {
    match rules.limit {
        Some(limit) => Limit::Fixed(limit),
        None => Limit::Adaptive(Adaptive::new(START, LEAST, MOST)),
    }
}

/// Where an adaptive limit begins, and the bounds that it keeps: one at a time is what every server can do, and above a
/// thousand it is the queue of the server that should be shorter.
const START: u32 = 16;
const LEAST: u32 = 1;
const MOST: u32 = 1024;

#[derive(Default)]
struct Sum {
    in_flight: u32,
    drains_ms: f32,
    units: f32,
    utilization: f32,
    rps: f32,
    eps: f32,
}

impl Sum {
    fn count(&mut self, in_flight: u32, rates: penstock_balance::estimate::Rates) {
        self.in_flight += in_flight;
        self.utilization += rates.utilization;
        self.rps += rates.rps;
        self.eps += rates.eps;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[tokio::test]
    async fn names_have_an_end() {
        let models = Models::new(Instant::now());
        for i in 0..2 * MAX_MODELS {
            models.of(&i.to_string());
        }
        assert_eq!(models.all().len(), MAX_MODELS + 1);
        assert_eq!(&*models.of("100").name, "");
        assert_eq!(&*models.of("5").name, "5");
        assert_eq!(&*models.of(&"x".repeat(MAX_NAME + 1)).name, "");
    }

    #[tokio::test]
    async fn the_report_has_a_models_own_cost_and_the_work_of_all() {
        let models = Models::new(Instant::now());
        let (slow, fast) = (models.of("slow"), models.of("fast"));
        for (model, takes) in [(&slow, 100), (&fast, 10)] {
            for i in 0..20 {
                let at = ms(i * 1000);
                let watched = model.estimator.arrived(1.0, at);
                model.estimator.finished(watched, false, at + ms(takes));
            }
        }
        let now = ms(100_000);
        let _one = slow.estimator.arrived(1.0, now);
        let load = models.load(&fast, now);
        assert_eq!(load.in_flight, Some(1.0));
        let cost = load.fixed_ms.unwrap() + load.unit_ms.unwrap();
        assert!((cost - 10.0).abs() < 1.0, "{cost}");
        let backlog = load.backlog_ms.unwrap();
        assert!((90.0..=110.0).contains(&backlog), "{backlog}");
    }
}
