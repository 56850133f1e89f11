//! One run: clients with their sidecars, replicas with theirs, and the network between, as discrete events.
//!
//! A request is picked for when it arrives at its client's sidecar, reaches the replica one network delay later, and its
//! answer comes back with a load report on its head. What the replica's sidecar reports it has found out by watching,
//! with `penstock_balance::Estimator`; it knows nothing of the simulated GPU's inside. Events at the same nanosecond
//! happen in the order in which they were scheduled, so a seed gives the same run on every machine.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use penstock_balance::estimate::Watched;
use penstock_balance::memory::Memory;
use penstock_balance::{Estimator, LoadReport};
use rand::Rng;
use rand::rngs::SmallRng;

use crate::cases::{Case, Change, Kind};
use crate::measure::Figures;
use crate::policies::{Asked, Policy, Probe};
use crate::random::stream;
use crate::server::batch::Batching;
use crate::server::llm::Llm;
use crate::server::{BLOCK, Did, Job, MS, Nanos, S, Server};
use crate::workload::Request;

/// Between two answers of a batch.
const SERIAL: Nanos = MS / 50;

/// What only an oracle may know.
#[derive(Debug)]
pub struct Truth {
    /// The replicas.
    pub servers: Vec<Server>,
    /// Their present rates.
    pub rates: Vec<f64>,
    /// Requests on their way to each.
    pub coming: Vec<Vec<Job>>,
    /// When a stalled replica goes on; 0 = not stalled.
    pub resumes: Vec<Nanos>,
    /// Replicas that answer with errors at once.
    pub failing: Vec<bool>,
}

/// The sidecar in front of a replica.
#[derive(Debug, Default)]
struct Inbound {
    estimator: Estimator,
    memory: Option<Box<Memory>>,
    /// Requests in flight on arrival and milliseconds, of the last answers: what Prequal's server side keeps.
    latest: Vec<(u32, f32)>,
    next: usize,
}

#[derive(Clone, Copy, Debug)]
enum Event {
    Arrive(usize),
    Reach(usize),
    Wake(usize, u64),
    Answer(Did),
    Head(usize),
    End(usize, bool),
    Report(usize, usize, usize),
    Probe(usize, usize),
    Probed(usize, usize, Probe),
    Change(usize),
    Scrape,
    Tend,
}

#[derive(Clone, Copy, Debug)]
struct Flight {
    server: usize,
    sent: Nanos,
    watched: Option<Watched>,
    found: u32,
    failed: bool,
}

/// A run.
pub struct World<'a> {
    case: &'a Case,
    policy: &'a mut dyn Policy,
    requests: Vec<Request>,
    flights: Vec<Option<Flight>>,
    truth: Truth,
    inbound: Vec<Inbound>,
    wakes: Vec<u64>,
    up: Vec<usize>,
    factor: Vec<f64>,
    heap: BinaryHeap<Reverse<(Nanos, u64, usize)>>,
    events: Vec<Event>,
    spare: Vec<usize>,
    order: u64,
    reports: Vec<LoadReport>,
    random: SmallRng,
    /// Milliseconds of the requests that count, when they arrived.
    latencies: Vec<f64>,
    expected: usize,
}

/// Runs a case under a policy.
pub fn run(case: &Case, policy: &mut dyn Policy, seed: u64) -> Figures {
    let requests = case.requests(seed);
    let servers: Vec<Server> = case
        .replicas
        .iter()
        .zip(100u64..)
        .map(|(replica, i)| match replica.kind {
            Kind::Tensor(cost) => Server::Batching(Batching::new(cost, stream(seed, i))),
            Kind::Llm(cost) => Server::Llm(Llm::new(cost, stream(seed, i))),
        })
        .collect();
    let n = servers.len();
    let mut world = World {
        case,
        policy,
        flights: vec![None; requests.len()],
        requests,
        inbound: (0..n)
            .map(|i| Inbound {
                memory: matches!(case.replicas[i].kind, Kind::Llm(_)).then(Box::default),
                ..Inbound::default()
            })
            .collect(),
        truth: Truth {
            servers,
            rates: vec![0.0; n],
            coming: vec![Vec::new(); n],
            resumes: vec![0; n],
            failing: vec![false; n],
        },
        wakes: vec![0; n],
        up: (0..n).filter(|i| !case.joins_later(*i)).collect(),
        factor: vec![1.0; n],
        heap: BinaryHeap::new(),
        events: Vec::new(),
        spare: Vec::new(),
        order: 0,
        reports: Vec::new(),
        random: stream(seed, 3),
        latencies: Vec::new(),
        expected: 0,
    };
    world.go();
    world.figures()
}

impl World<'_> {
    fn at(&mut self, time: Nanos, event: Event) {
        self.order += 1;
        let slot = match self.spare.pop() {
            Some(slot) => {
                self.events[slot] = event;
                slot
            }
            None => {
                self.events.push(event);
                self.events.len() - 1
            }
        };
        self.heap.push(Reverse((time, self.order, slot)));
    }

    fn go(&mut self) {
        for i in 0..self.truth.servers.len() {
            self.retime(i, 0);
        }
        for i in (0..self.requests.len()).rev() {
            if !self.requests[i].follows {
                self.at(self.requests[i].at, Event::Arrive(i));
            }
        }
        for i in 0..self.case.changes.len() {
            self.at(self.case.changes[i].0, Event::Change(i));
        }
        self.policy.members(&self.up, 0);
        if let Some(every) = self.policy.scrapes_every() {
            self.at(every, Event::Scrape);
        }
        self.at(S, Event::Tend);
        let end = self.case.end() + 60 * S;
        while let Some(Reverse((now, _, slot))) = self.heap.pop() {
            let event = self.events[slot];
            self.spare.push(slot);
            if now > end {
                break;
            }
            self.happen(event, now);
        }
    }

    fn happen(&mut self, event: Event, now: Nanos) {
        match event {
            Event::Arrive(i) => self.arrive(i, now),
            Event::Reach(i) => self.reach(i, now),
            Event::Wake(server, number) => {
                if self.wakes[server] == number {
                    self.wake(server, now);
                }
            }
            Event::Answer(Did::First(i)) => self.answer(i, now, false),
            Event::Answer(Did::Last(i)) => self.end(i, now),
            Event::Head(i) => {
                let Some(flight) = self.flights[i] else { return };
                let ms = (now - flight.sent) as f64 / MS as f64;
                self.policy.head(self.requests[i].client, i, flight.server, ms, now);
                if !flight.failed {
                    self.note(flight.sent, ms);
                }
            }
            Event::End(i, failed) => {
                let Some(flight) = self.flights[i].take() else { return };
                let ms = (now - flight.sent) as f64 / MS as f64;
                self.policy.over(self.requests[i].client, i, flight.server, ms, failed, now);
                if failed {
                    self.note(flight.sent, f64::INFINITY);
                }
                if let Some(next) = self.requests[i].next {
                    self.at(now + self.requests[next].at, Event::Arrive(next));
                }
            }
            Event::Report(client, server, report) => {
                let report = self.reports[report];
                self.policy.report(client, server, &report, now);
            }
            Event::Probe(client, server) => {
                // The sidecar answers, not the model: a stalled GPU does not hold its probes up.
                let probe = Probe { report: self.load(server, now), ..self.inbound[server].probe() };
                // A probe is a report too: it is as late and as easily lost as one.
                if self.random.random::<f64>() >= self.case.report_loss {
                    let at = now + self.case.network + self.case.report_delay;
                    self.at(at, Event::Probed(client, server, probe));
                }
            }
            Event::Probed(client, server, probe) => self.policy.probed(client, server, &probe, now),
            Event::Change(i) => self.change(i, now),
            Event::Scrape => {
                self.policy.scrape(&self.truth, now);
                if let Some(every) = self.policy.scrapes_every()
                    && now < self.case.end()
                {
                    self.at(now + every, Event::Scrape);
                }
            }
            Event::Tend => {
                self.policy.tend(now);
                if now < self.case.end() {
                    self.at(now + S, Event::Tend);
                }
            }
        }
    }

    fn counts(&self, arrived: Nanos) -> bool {
        arrived >= self.case.warm_up && arrived < self.case.end()
    }

    fn note(&mut self, sent: Nanos, ms: f64) {
        if self.counts(sent) {
            self.latencies.push(ms);
        }
    }

    fn arrive(&mut self, i: usize, now: Nanos) {
        if now >= self.case.end() {
            return;
        }
        if self.counts(now) {
            self.expected += 1;
        }
        let request = &self.requests[i];
        let asked = Asked { request, up: &self.up, truth: &self.truth, now };
        let server = self.policy.pick(request.client, &asked, &mut self.random);
        let (client, job) = (request.client, request.job.clone());
        self.flights[i] = Some(Flight { server, sent: now, watched: None, found: 0, failed: false });
        self.truth.coming[server].push(job);
        self.at(now + self.case.network, Event::Reach(i));
        let mut probes = Vec::new();
        self.policy.probes(client, &self.up, &mut self.random, &mut probes);
        for server in probes {
            self.at(now + self.case.network, Event::Probe(client, server));
        }
    }

    fn reach(&mut self, i: usize, now: Nanos) {
        let Some(flight) = self.flights[i].as_mut() else { return };
        let server = flight.server;
        self.truth.coming[server].retain(|job| job.request != i);
        let job = self.requests[i].job.clone();
        let inbound = &mut self.inbound[server];
        let units = match &inbound.memory {
            Some(memory) => {
                let prompt = &job.blocks[..((job.prompt / BLOCK) as usize).min(job.blocks.len())];
                let matched = memory.matched(prompt, 0, duration(now)) as u32 * BLOCK;
                memory.remember(&job.blocks, 0, duration(now));
                job.prompt.saturating_sub(matched) as f32
            }
            None => job.rows,
        };
        flight.found = inbound.estimator.in_flight();
        flight.watched = Some(inbound.estimator.arrived(units, duration(now)));
        if self.truth.failing[server] {
            flight.failed = true;
            self.answer(i, now + MS / 5, true);
            return;
        }
        self.truth.servers[server].arrive(job, now);
        self.retime(server, now);
    }

    /// The replica's sidecar sees the last byte.
    fn end(&mut self, i: usize, now: Nanos) {
        if let Some(flight) = &self.flights[i]
            && let Some(watched) = flight.watched
        {
            self.inbound[flight.server].estimator.finished(watched, false, duration(now));
            self.at(now + self.case.network, Event::End(i, false));
        }
    }

    /// The replica's sidecar sees the first byte, or all of the answer.
    fn answer(&mut self, i: usize, now: Nanos, failed: bool) {
        let Some(flight) = self.flights[i].as_mut() else { return };
        let server = flight.server;
        let inbound = &mut self.inbound[server];
        let Some(watched) = flight.watched.as_mut() else { return };
        if failed {
            inbound.estimator.finished(*watched, true, duration(now));
        } else {
            let ms = inbound.estimator.started(watched, duration(now));
            inbound.remember(flight.found, ms);
        }
        let report = self.load(server, now);
        self.at(now + self.case.network, Event::Head(i));
        if failed {
            self.at(now + self.case.network, Event::End(i, true));
        }
        if self.random.random::<f64>() >= self.case.report_loss {
            self.reports.push(report);
            let at = now + self.case.network + self.case.report_delay;
            self.at(at, Event::Report(self.requests[i].client, server, self.reports.len() - 1));
        }
    }

    fn wake(&mut self, server: usize, now: Nanos) {
        let mut did = Vec::new();
        self.truth.servers[server].advance(now, &mut did);
        // The answers of a batch are written one after the other.
        for (k, event) in (0u64..).zip(did) {
            self.at(now + k / 2 * SERIAL, Event::Answer(event));
        }
        self.retime(server, now);
    }

    /// The rates of a replica and its neighbours on the GPU may have changed, and with them when they wake.
    fn retime(&mut self, server: usize, now: Nanos) {
        let gpu = self.case.replicas[server].gpu;
        let on_it = |i: usize| self.case.replicas[i].gpu == gpu;
        let busy =
            (0..self.truth.servers.len()).filter(|i| on_it(*i) && self.truth.servers[*i].busy()).count();
        for i in (0..self.truth.servers.len()).filter(|i| on_it(*i)) {
            let stalled = self.truth.resumes[i] > now;
            // Time slicing gives every busy process the same share.
            let share = 1.0 / (busy.max(1) as f64);
            let rate = if stalled { 0.0 } else { self.case.replicas[i].speed * self.factor[i] * share };
            if i == server || rate != self.truth.rates[i] {
                self.truth.rates[i] = rate;
                self.truth.servers[i].set_rate(rate, now);
                self.wakes[i] += 1;
                if let Some(due) = self.truth.servers[i].due() {
                    self.at(due.max(now), Event::Wake(i, self.wakes[i]));
                }
            }
        }
    }

    fn change(&mut self, i: usize, now: Nanos) {
        match self.case.changes[i].1 {
            Change::Stall(server, until) => {
                if self.truth.resumes[server] <= now && until > now {
                    self.truth.resumes[server] = until;
                    self.at(until, Event::Change(i));
                }
                self.retime(server, now);
            }
            Change::Factor(server, factor) => {
                self.factor[server] = factor;
                self.retime(server, now);
            }
            Change::Fail(server, failing) => self.truth.failing[server] = failing,
            Change::Join(server) => {
                self.up.push(server);
                self.policy.members(&self.up, now);
            }
        }
    }

    fn load(&mut self, server: usize, now: Nanos) -> LoadReport {
        let inbound = &self.inbound[server];
        LoadReport {
            gpu: Some(self.case.replicas[server].gpu as u64),
            ..LoadReport::of(&inbound.estimator, duration(now))
        }
    }

    fn figures(mut self) -> Figures {
        let seconds = (self.case.end() - self.case.warm_up) as f64 / S as f64;
        // Who never got an answer waited for ever.
        let missing = self.expected.saturating_sub(self.latencies.len());
        self.latencies.extend(std::iter::repeat_n(f64::INFINITY, missing));
        let mut figures = Figures::of(self.latencies, self.case.objective_ms, seconds);
        let end = self.case.end();
        let busy: Vec<f64> = self.truth.servers.iter().map(|s| s.busy_time(end + 61 * S) as f64).collect();
        let mean = busy.iter().sum::<f64>() / busy.len() as f64;
        figures.unfairness = busy.iter().copied().fold(0.0, f64::max) / mean.max(1.0);
        let hits = self.truth.servers.iter().filter_map(|s| match s {
            Server::Llm(llm) => Some(llm.hits),
            Server::Batching(_) => None,
        });
        let (found, all) = hits.fold((0, 0), |sum, hits| (sum.0 + hits.0, sum.1 + hits.1));
        figures.hit_rate = found as f64 / (all.max(1)) as f64;
        figures
    }
}

impl Inbound {
    fn remember(&mut self, found: u32, ms: f32) {
        if self.latest.len() < 64 {
            self.latest.push((found, ms));
        } else {
            self.latest[self.next % 64] = (found, ms);
            self.next += 1;
        }
    }

    /// Requests in flight, and the median time of the last answers that found about as many (Wydrowski et al. 2024).
    fn probe(&self) -> Probe {
        let rif = self.estimator.in_flight();
        let mut near: Vec<(u32, f32)> =
            self.latest.iter().map(|(found, ms)| (found.abs_diff(rif), *ms)).collect();
        near.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
        near.truncate(16);
        let mut ms: Vec<f32> = near.into_iter().map(|(_, ms)| ms).collect();
        ms.sort_unstable_by(f32::total_cmp);
        let latency = ms.get(ms.len() / 2).copied().unwrap_or(0.0);
        Probe { rif, latency, report: LoadReport::default() }
    }
}

/// A moment as the balance crate takes it.
pub fn duration(now: Nanos) -> Duration {
    Duration::from_nanos(now)
}
