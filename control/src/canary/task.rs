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
use super::{Diary, Entry, Facts, Phase, Plan, Reached, refused, walk, windows};
use crate::conditions::Reach;
use crate::fleet::{Fleet, Seen, Tally};
use crate::metric;
use crate::objects::canary::Canary;
use crate::objects::{Body, Object, ObjectId, ObjectSet};
use crate::outcome::Outcome;
use crate::push::Published;
use crate::snapshot::Snapshot;

/// Between two looks while something moves: proxies tell what they saw each second.
const MOVING: Duration = Duration::from_millis(250);
/// Between two looks while nothing does.
const RESTING: Duration = Duration::from_secs(1);
/// Control that has just started knows nothing of proxies that have not come back yet: until then nobody says that all of them have something. They try
/// again within 100 ms at first.
const SETTLED: Duration = Duration::from_secs(3);
/// Between two writes of one diary in which only numbers differ.
const NUMBERS: Duration = Duration::from_secs(2);

/// Where diaries are kept, and who else knows something.
pub trait Home: Send {
    /// Whether this replica writes.
    fn leads(&self) -> bool;
    /// What is written of a Canary; `None`: there is no such object any more.
    fn diary(&self, id: &ObjectId) -> Option<Diary>;
    /// What a person wants done.
    fn command(&self, object: &Object) -> Command;
    /// How far every object has come with the other replicas' proxies.
    fn reach(&mut self) -> impl Future<Output = ()> + Send;
    /// The same of one object, joined with what this replica's proxies have of it.
    fn joined(&self, id: &ObjectId, own: Tally, version: &str) -> Reach;
    /// What the other replicas' proxies saw.
    fn seen(&mut self, service: &str, windows: &[Duration]) -> impl Future<Output = Vec<SeenReply>> + Send;
    /// Writes a diary; whether it was written. Who was overtaken, or does not know yet what became of the write before, looks again.
    fn write(&mut self, id: &ObjectId, diary: &Diary) -> impl Future<Output = Result<bool>> + Send;
    /// Tells a person what happened.
    fn tell(&self, object: &Object, entry: &Entry);
}

/// What a look rests on.
#[derive(Debug)]
pub struct Sight {
    /// The objects.
    pub objects: watch::Receiver<Arc<ObjectSet>>,
    /// The snapshot in force.
    pub published: watch::Receiver<Published>,
    /// The proxies.
    pub fleet: Arc<Fleet>,
    /// The way to those outside.
    pub outside: Outside,
    /// Where what is known is shown.
    pub shown: watch::Sender<Arc<Vec<Shown>>>,
}

/// What this replica's proxies have of a Canary.
struct Own {
    tally: Tally,
    /// Whether all of them have had the time to connect.
    settled: bool,
}

/// Looks until told to stop.
pub async fn run<H: Home>(sight: Sight, mut home: H, stop: CancellationToken) -> Result<()> {
    let mut checks = Checks::over(sight.outside.clone().client()?);
    let mut written: BTreeMap<ObjectId, Instant> = BTreeMap::new();
    let mut trouble: Option<String> = None;
    let started = Instant::now();
    let mut pause = MOVING;
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
        let objects = sight.objects.borrow().clone();
        let canaries: Vec<(&Arc<Object>, &Canary)> = objects
            .objects
            .iter()
            .filter_map(|object| match &object.body {
                Body::Canary(canary) => Some((object, &**canary)),
                _ => None,
            })
            .collect();
        show(&sight, &home, &canaries);
        checks.only(|id| canaries.iter().any(|(object, _)| object.id == *id));
        written.retain(|id, _| canaries.iter().any(|(object, _)| object.id == *id));
        pause = RESTING;
        if canaries.is_empty() || !home.leads() {
            checks.only(|_| false);
            continue;
        }
        home.reach().await;
        let settled = started.elapsed() >= SETTLED;
        let snapshot = sight.published.borrow().snapshot.clone();
        let tallies = sight.fleet.tally(&snapshot);
        for (object, canary) in canaries {
            let Some(diary) = home.diary(&object.id) else { continue };
            let own = Own { tally: tallies.get(&object.id).cloned().unwrap_or_default(), settled };
            let next = look(&sight, &mut home, &mut checks, &snapshot, (object, canary), &diary, own).await;
            if !rests(next.phase) {
                pause = MOVING;
            }
            if next == diary {
                continue;
            }
            let numbers = next.same_but_for_numbers(&diary);
            let last = written.get(&object.id).copied();
            if numbers && last.is_some_and(|at| at.elapsed() < NUMBERS) {
                continue;
            }
            if !home.leads() || stop.is_cancelled() {
                break;
            }
            written.insert(object.id.clone(), Instant::now());
            match home.write(&object.id, &next).await {
                Ok(false) => {}
                Ok(true) => {
                    trouble = None;
                    let known = diary.history.last();
                    let fresh = next.history.iter().rev().take_while(|entry| Some(*entry) != known);
                    for entry in fresh.collect::<Vec<_>>().into_iter().rev() {
                        tell(&home, object, entry);
                    }
                }
                Err(error) => {
                    let why = format!("{error:#}");
                    if trouble.as_ref() != Some(&why) {
                        tracing::warn!(canary = %object.id, "what became of it is not written: {why}; it stays where it is, and is tried again");
                        trouble = Some(why);
                    }
                }
            }
        }
    }
}

/// Whether nothing moves by itself.
fn rests(phase: Phase) -> bool {
    matches!(phase, Phase::Succeeded | Phase::RolledBack | Phase::Invalid)
}

/// One Canary's next diary.
async fn look<H: Home>(
    sight: &Sight,
    home: &mut H,
    checks: &mut Checks,
    snapshot: &Snapshot,
    (object, canary): (&Object, &Canary),
    diary: &Diary,
    own: Own,
) -> Diary {
    let id = &object.id;
    let now = Timestamp::now();
    let generation = canary.metadata.generation;
    let command = home.command(object);
    let mut spec = canary.spec.clone();
    spec.paused = command.paused.unwrap_or(spec.paused);
    let mut plan = match Plan::read(&id.namespace, &spec) {
        Ok(plan) => plan,
        Err(wrong) => return refused(diary, generation, &wrong, now),
    };
    let nothing = Outcome::default();
    let outcome = snapshot.outcomes.get(id).unwrap_or(&nothing);
    let wrong: Vec<_> = outcome
        .findings
        .iter()
        .filter(|finding| finding.refused)
        .map(|finding| (finding.pointer.clone(), finding.message.clone()))
        .collect();
    if !wrong.is_empty() {
        plan.paused = true;
    }
    let asked = windows(diary, now);
    let looks = !rests(diary.phase) || diary.course.as_ref().is_none_or(|course| course.run != plan.run);
    let services = [plan.service.clone()];
    let mut seen: [Seen; 3] = asked.map(|window| sight.fleet.seen(&services, window, Instant::now()));
    if looks {
        for reply in home.seen(&plan.service, &asked).await {
            for (sum, window) in seen.iter_mut().zip(reply.windows) {
                sum.add(window);
            }
        }
    }
    let Reach { tally, unheard } = home.joined(id, own.tally, &snapshot.digest(outcome));
    let unheard = unheard + usize::from(!own.settled);
    let [first, second, third] = seen;
    let facts = Facts {
        now,
        generation,
        refused: wrong,
        missing: missing(&plan, snapshot),
        ready: ready(&plan.candidate, snapshot),
        reach: Reached {
            of: outcome.course.clone(),
            concerned: tally.concerned,
            applied: tally.applied,
            unheard,
            refused: tally.refused,
        },
        windows: [(asked[0], first), (asked[1], second), (asked[2], third)],
        checks: checks.of(id, &plan, looks, diary),
        promote: command.promote,
        abort: command.abort,
    };
    walk(&plan, diary, &facts)
}

/// Services of the plan that do not exist.
fn missing(plan: &Plan, snapshot: &Snapshot) -> Vec<String> {
    let mut names = vec![&plan.service, &plan.stable, &plan.candidate];
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

fn show<H: Home>(sight: &Sight, home: &H, canaries: &[(&Arc<Object>, &Canary)]) {
    let all: Vec<Shown> = canaries
        .iter()
        .map(|(object, canary)| {
            let command = home.command(object);
            shown(object, canary, home.diary(&object.id).unwrap_or_default(), command.paused)
        })
        .collect();
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
