//! Looks at every Canary a few times a second, and writes down where it is.
//!
//! In: the objects, the snapshot in force and who has applied it, what clients' proxies saw, what those outside said. Out: a new [`Diary`] wherever
//! [`walk()`] says that it differs. Where diaries are kept, and who else has to be asked, is the [`Home`]'s business: the status of the
//! object in a cluster, a file on one machine. Nothing is remembered here that a restart would miss.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::jiff::Timestamp;
use metrics::counter;
use penstock_api::ServiceName;
use penstock_api::resource::{Kind, Payload};
use penstock_api::v1::SeenReply;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::checks::Checks;
use super::desk::{Command, Shown, shown};
use super::outside::Outside;
use super::{Diary, Entry, Facts, Phase, Plan, Reached, Wrong, refused, walk, windows};
use crate::conditions::Reach;
use crate::fleet::{Fleet, Tally};
use crate::metric;
use crate::objects::canary::Canary;
use crate::objects::{Body, Object, ObjectId};
use crate::outcome::Outcome;
use crate::push::Published;
use crate::snapshot::Snapshot;
use crate::trouble::Trouble;

/// Between two looks while something moves: so soon do proxies tell of requests that fail.
const MOVING: Duration = Duration::from_millis(250);
/// Between two looks while nothing does.
const RESTING: Duration = Duration::from_secs(1);
/// Control that has just begun to lead knows nothing of proxies that have not come back yet: until then nobody says that all of them have something. They
/// try again within 100 ms at first.
const SETTLED: Duration = Duration::from_secs(3);
/// A proxy that was here may still come back, with what it had: it tries every 30 s at least. Until then it has not acknowledged anything.
const RETURNS: Duration = Duration::from_secs(35);
/// A Canary that is not there for so long is deleted, and not a file that is being replaced.
const GONE: Duration = Duration::from_secs(10);
/// Between two writes of one diary in which only numbers differ.
const NUMBERS: Duration = Duration::from_secs(2);

/// Where diaries are kept, and who else knows something.
pub trait Home: Send {
    /// Whether this replica writes.
    fn leads(&self) -> bool;
    /// What is written of a Canary; `None`: there is no such object any more.
    fn diary(&self, id: &ObjectId) -> Option<Diary>;
    /// These are all that there are: what is known of others is of no use any more.
    fn only(&mut self, keep: &(dyn Fn(&ObjectId) -> bool + Sync)) -> impl Future<Output = Result<()>> + Send;
    /// What a person wants done.
    fn command(&self, object: &Object) -> Command;
    /// How far every object has come with the other replicas' proxies.
    fn reach(&mut self) -> impl Future<Output = ()> + Send;
    /// The same of one object, joined with what this replica's proxies have of it.
    fn joined(&self, id: &ObjectId, own: Tally, version: &str) -> Reach;
    /// What the other replicas' proxies saw.
    fn seen(&self, service: &str, windows: &[Duration]) -> impl Future<Output = Vec<SeenReply>> + Send;
    /// Writes a diary; whether it was written. Who was overtaken, or does not know yet what became of the write before, looks again.
    fn write(&mut self, id: &ObjectId, diary: &Diary) -> impl Future<Output = Result<bool>> + Send;
    /// Tells a person what happened.
    fn tell(&self, object: &Object, entry: &Entry);
}

/// What a look rests on.
#[derive(Debug)]
pub struct Sight {
    /// The snapshot in force, and the Canaries in it.
    pub published: watch::Receiver<Published>,
    /// The proxies.
    pub fleet: Arc<Fleet>,
    /// The way to those outside.
    pub outside: Outside,
    /// Where what is known is shown.
    pub shown: watch::Sender<Arc<Vec<Shown>>>,
}

/// What is remembered of a Canary from look to look, and would be found out anew.
#[derive(Debug)]
struct Memory {
    /// The most proxies that it concerned lately, and until when any of them may come back.
    proxies: (usize, Instant),
    /// When its diary was written.
    written: Option<Instant>,
    /// When it was there last.
    there: Instant,
    trouble: Trouble,
}

impl Memory {
    fn of(id: &ObjectId, diary: &Diary, now: Instant) -> Self {
        let trouble = Trouble::new(format!("the diary of {id}"));
        Self { proxies: (diary.concerned, now + RETURNS), written: None, there: now, trouble }
    }

    /// How many proxies that were here lately are not, if so many are.
    fn lost(&mut self, concerned: usize, now: Instant) -> usize {
        let (most, until) = self.proxies;
        if concerned >= most || now >= until {
            self.proxies = (concerned, now + RETURNS);
        }
        self.proxies.0 - concerned
    }
}

/// Looks until told to stop.
pub async fn run<H: Home>(sight: Sight, mut home: H, stop: CancellationToken) -> Result<()> {
    let mut checks = Checks::over(sight.outside.clone().client()?);
    let mut memories: BTreeMap<ObjectId, Memory> = BTreeMap::new();
    let mut forgetting = Trouble::new("canaries that are gone");
    // Since when this replica leads.
    let mut leads: Option<Instant> = None;
    let mut pause = MOVING;
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
        let snapshot = sight.published.borrow().snapshot.clone();
        let canaries: Vec<(&Object, &Canary)> = canaries(&snapshot).collect();
        show(&sight, &home, &canaries);
        pause = RESTING;
        if !home.leads() {
            checks.only(|_| false);
            (leads, memories) = (None, BTreeMap::new());
            continue;
        }
        let now = Instant::now();
        let since = *leads.get_or_insert(now);
        for (object, _) in &canaries {
            let fresh = || Memory::of(&object.id, &home.diary(&object.id).unwrap_or_default(), now);
            memories.entry(object.id.clone()).or_insert_with(fresh).there = now;
        }
        memories.retain(|_, memory| now.duration_since(memory.there) < GONE);
        checks.only(|id| memories.contains_key(id));
        if now.duration_since(since) >= GONE {
            match home.only(&|id| memories.contains_key(id)).await {
                Ok(()) => forgetting.over(),
                Err(error) => forgetting.met(&error),
            }
        }
        if canaries.is_empty() {
            continue;
        }
        home.reach().await;
        let tallies = sight.fleet.tally(&snapshot);
        let settled = now.duration_since(since) >= SETTLED;
        // All at once: replicas that do not answer are waited for once a look.
        let asked = canaries.iter().map(|one| Asked::of(&home, &snapshot, *one));
        for asked in futures_util::future::join_all(asked).await.into_iter().flatten() {
            let Asked { object, diary, .. } = &asked;
            let Some(memory) = memories.get_mut(&object.id) else { continue };
            let tally = tallies.get(&object.id).cloned().unwrap_or_default();
            let mut reach = home.joined(&object.id, tally, &snapshot.digest(asked.outcome));
            reach.unheard += usize::from(!settled);
            let lost = memory.lost(reach.tally.concerned, now);
            let next = asked.look(&sight.fleet, &mut checks, &snapshot, &reach, lost);
            if !rests(next.phase) && !asked.plan.as_ref().is_some_and(Plan::idles) {
                pause = MOVING;
            }
            let waits = memory.written.is_some_and(|at| at.elapsed() < NUMBERS);
            if next == *diary || (waits && next.same_but_for_numbers(diary)) {
                continue;
            }
            if !home.leads() || stop.is_cancelled() {
                break;
            }
            memory.written = Some(Instant::now());
            match home.write(&object.id, &next).await {
                Ok(false) => {}
                Ok(true) => {
                    memory.trouble.over();
                    // The next look shows it.
                    pause = MOVING;
                    let known = diary.history.last();
                    let fresh = next.history.iter().rev().take_while(|entry| Some(*entry) != known);
                    for entry in fresh.collect::<Vec<_>>().into_iter().rev() {
                        tell(&home, object, entry);
                    }
                }
                Err(error) => memory.trouble.met(&error),
            }
        }
    }
}

/// Whether nothing moves by itself.
fn rests(phase: Phase) -> bool {
    matches!(phase, Phase::Succeeded | Phase::RolledBack | Phase::Invalid)
}

/// The Canaries in force.
fn canaries(snapshot: &Snapshot) -> impl Iterator<Item = (&Object, &Canary)> {
    snapshot.canaries.iter().filter_map(|object| match &object.body {
        Body::Canary(canary) => Some((&**object, &**canary)),
        _ => None,
    })
}

/// One Canary, and what other replicas say of it.
struct Asked<'a> {
    object: &'a Object,
    canary: &'a Canary,
    outcome: &'a Outcome,
    diary: Diary,
    command: Command,
    /// What is in force, if anything is, and why the newest version is not, if it is not.
    plan: Option<Plan>,
    wrong: Vec<Wrong>,
    /// Whether anybody looks at what is seen.
    looks: bool,
    at: Timestamp,
    windows: [Duration; 3],
    others: Vec<SeenReply>,
}

impl<'a> Asked<'a> {
    async fn of<H: Home>(
        home: &H,
        snapshot: &'a Snapshot,
        (object, canary): (&'a Object, &'a Canary),
    ) -> Option<Self> {
        let diary = home.diary(&object.id)?;
        let command = home.command(object);
        let outcome = snapshot.outcomes.get(&object.id)?;
        let (plan, wrong) = in_force(object, canary, &command, outcome, &diary);
        let between = |plan: Plan| plan.between(&object.id.namespace, &diary, &outcome.templates);
        let plan = plan.map(between);
        let goes_on = |plan: &Plan| !rests(diary.phase) && !plan.idles();
        let looks = plan.as_ref().is_some_and(|plan| goes_on(plan) || diary.run != plan.run);
        let at = Timestamp::now();
        let windows = windows(&diary, at);
        let others = match &plan {
            Some(plan) if looks => home.seen(&plan.service, &windows).await,
            _ => Vec::new(),
        };
        Some(Self { object, canary, outcome, diary, command, plan, wrong, looks, at, windows, others })
    }

    /// Its next diary. `lost`: proxies that may still come back.
    fn look(
        &self,
        fleet: &Fleet,
        checks: &mut Checks,
        snapshot: &Snapshot,
        reach: &Reach,
        lost: usize,
    ) -> Diary {
        let Self { object, canary, outcome, diary, .. } = self;
        let generation = canary.metadata.generation;
        let Some(plan) = &self.plan else { return refused(diary, generation, &self.wrong, self.at) };
        let services = [plan.service.clone()];
        let mut seen = self.windows.map(|window| (window, fleet.seen(&services, window, Instant::now())));
        for reply in &self.others {
            for ((_, sum), window) in seen.iter_mut().zip(&reply.windows) {
                sum.add(window.clone());
            }
        }
        let Reach { tally, unheard } = reach;
        let facts = Facts {
            now: self.at,
            generation,
            refused: self.wrong.clone(),
            missing: missing(plan, snapshot),
            ready: ready(&plan.candidate, snapshot),
            stable_ready: ready(&plan.stable, snapshot),
            pods: plan.pair.as_ref().map(|pair| pair.pods(&outcome.templates)),
            reach: Reached {
                of: outcome.course.clone(),
                concerned: tally.concerned + lost,
                applied: tally.applied,
                unheard: *unheard,
                refused: tally.refused.clone(),
            },
            windows: seen,
            checks: checks.of(&object.id, plan, self.looks, diary),
            promote: self.command.promote.clone(),
            abort: self.command.abort.clone(),
        };
        walk(plan, diary, &facts)
    }
}

/// What is in force of a Canary, and what is wrong with its newest version. What was in force before stays for as long as anything is wrong.
fn in_force(
    object: &Object,
    canary: &Canary,
    command: &Command,
    outcome: &Outcome,
    diary: &Diary,
) -> (Option<Plan>, Vec<Wrong>) {
    let mut spec = canary.spec.clone();
    spec.paused = command.paused.unwrap_or(spec.paused);
    let namespace = &object.id.namespace;
    let refused = outcome.findings.iter().filter(|finding| finding.refused);
    let mut wrong: Vec<Wrong> = refused.map(|one| (one.pointer.clone(), one.message.clone())).collect();
    if wrong.is_empty() && outcome.last_good {
        wrong.push((String::new(), "its newest version cannot be read".to_owned()));
    }
    let read = match Plan::read(namespace, &spec) {
        Ok(plan) if wrong.is_empty() => return (Some(plan), wrong),
        Ok(plan) => Some(plan),
        Err(all) => {
            wrong = all;
            None
        }
    };
    let before = diary.in_force.as_ref().and_then(|spec| Plan::read(namespace, spec).ok());
    (before.or(read), wrong)
}

/// Services of the plan that do not exist.
fn missing(plan: &Plan, snapshot: &Snapshot) -> Vec<String> {
    let mut names = vec![&plan.service];
    if plan.pair.is_none() {
        names.extend([&plan.stable, &plan.candidate]);
    }
    names.retain(|name| snapshot.get(Kind::Service, name).is_none());
    names.dedup();
    names.into_iter().cloned().collect()
}

/// Endpoints of a Service to which requests may go.
fn ready(service: &str, snapshot: &Snapshot) -> usize {
    let known = service.parse::<ServiceName>().ok();
    let entry = known.and_then(|name| snapshot.get(Kind::Endpoints, name.as_str()));
    match entry.map(|entry| Payload::decode(Kind::Endpoints, &entry.any.value)) {
        Some(Ok(Payload::Endpoints(all))) => all.endpoints.iter().filter(|one| !one.draining).count(),
        _ => 0,
    }
}

fn show<H: Home>(sight: &Sight, home: &H, canaries: &[(&Object, &Canary)]) {
    let one = |(object, canary): &(&Object, &Canary)| {
        shown(object, canary, &home.diary(&object.id).unwrap_or_default(), home.command(object).paused)
    };
    let all: Vec<Shown> = canaries.iter().map(one).collect();
    sight.shown.send_if_modified(|known| {
        let modified = **known != all;
        if modified {
            *known = Arc::new(all);
        }
        modified
    });
}

fn tell<H: Home>(home: &H, object: &Object, entry: &Entry) {
    let phase = format!("{:?}", entry.phase);
    counter!(metric::CANARIES.name, "phase" => phase.clone()).increment(1);
    tracing::info!(canary = %object.id, phase, step = entry.step, weight = entry.weight, "{}", entry.message);
    home.tell(object, entry);
}
