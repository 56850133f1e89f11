//! Writes what became of objects: into their statuses, and as Events on those that are refused.
//!
//! In: outcomes of the snapshot in force, what proxies of all replicas have acknowledged, the statuses that are there. Out: statuses as they should be
//! (`conditions`), by the holder of the Lease alone. Each write names the version that it rests on, so that what another
//! controller has written meanwhile is not lost: it is looked at again when the watch has told it. One pass a second at most; a status
//! of which only numbers have changed waits longer, because a thousand proxies that come and go are no news to anybody. Can go wrong: the API
//! server is away, or refuses one status; what is wrong with one keeps no other waiting.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use metrics::counter;
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::replicas::{self, Others};
use super::{Outcome as Written, Place, written};
use crate::conditions::{Difference, complaint, difference};
use crate::events::{Event, Events, Regarding};
use crate::fleet::Fleet;
use crate::metric;
use crate::objects::{ObjectId, ObjectKind};
use crate::outcome::Outcomes;
use crate::push::Published;
use crate::source::kubernetes::{Statuses, Watched};
use crate::trouble::Trouble;

/// Who writes, in `managedFields`.
const WRITER: &str = "penstock-control-status";
/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// The same at most, while the API server is away.
const LONGEST: Duration = Duration::from_secs(30);
/// Between two writes: a thousand routes take 20 s, and the API server notices nothing.
const PACE: Duration = Duration::from_millis(20);
/// What was written is told by the watch within milliseconds; one that was refused is not tried again before.
const AGAIN: Duration = Duration::from_secs(5);
/// Between two writes of one status in which only words differ.
const WORDS: Duration = Duration::from_secs(30);
/// For so long an object has to be refused before it is told: a Service and its slices are not deleted at one moment.
const SETTLED: Duration = Duration::from_secs(10);

/// What statuses are made of.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) place: Place,
    pub(super) others: Others,
    pub(super) statuses: Statuses,
    pub(super) published: watch::Receiver<Published>,
    pub(super) fleet: Arc<Fleet>,
    pub(super) events: Events,
    pub(super) leads: watch::Receiver<bool>,
}

/// Writes until told to stop.
pub(super) async fn run(mut facts: Facts, stop: CancellationToken) -> Result<()> {
    let mut attempts = Attempts::default();
    let mut told = Told::default();
    let mut trouble = Trouble::new("statuses");
    let mut pause = EVERY;
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(pause) => {}
        }
        if !*facts.leads.borrow() {
            (attempts, told) = (Attempts::default(), Told::default());
            continue;
        }
        pause = match pass(&mut facts, &mut attempts, &stop).await {
            Pass::Whole => {
                trouble.over();
                EVERY
            }
            Pass::Waits => EVERY,
            Pass::Refused(error) => {
                trouble.met(&error);
                EVERY
            }
            Pass::Away(error) => {
                trouble.met(&error);
                (pause * 2).min(LONGEST)
            }
        };
        let snapshot = facts.published.borrow().snapshot.clone();
        for (complaint, event) in told.due(&snapshot.outcomes, Instant::now()) {
            if !facts.events.tell(event) {
                break;
            }
            told.told(&complaint);
        }
    }
}

/// How a look at all of them ended.
enum Pass {
    /// All that differed is written.
    Whole,
    /// The same, but for what was tried a moment ago: of that nothing is known.
    Waits,
    /// The API server wants some statuses not as they are; the last of them.
    Refused(anyhow::Error),
    /// The API server is away, and was asked no further.
    Away(anyhow::Error),
}

/// Looks at all of them once.
async fn pass(facts: &mut Facts, attempts: &mut Attempts, stop: &CancellationToken) -> Pass {
    let others = facts.others.ask().await;
    let snapshot = facts.published.borrow().snapshot.clone();
    let tallies = facts.fleet.tally(&snapshot);
    attempts.only(&snapshot.outcomes);
    let mut pass = Pass::Whole;
    for (id, outcome) in &snapshot.outcomes {
        let Some(known) = facts.statuses.known(id) else { continue };
        // Another object of the same name: this one is not compiled yet.
        if outcome.uid.as_ref().is_some_and(|uid| *uid != known.uid) {
            continue;
        }
        let own = tallies.get(id).cloned().unwrap_or_default();
        let reach = replicas::joined(id, own, &snapshot.digest(outcome), &others);
        let now = Timestamp::now();
        let Some(wanted) = difference(id, outcome, &reach, &known.status, known.generation, now) else {
            continue;
        };
        let words = matches!(wanted, Difference::Words(_));
        if !attempts.may(id, &known.version, words, Instant::now()) {
            if matches!(pass, Pass::Whole) {
                pass = Pass::Waits;
            }
            continue;
        }
        if !*facts.leads.borrow() || stop.is_cancelled() {
            break;
        }
        attempts.made(id, &known.version, Instant::now());
        let (Difference::Words(status) | Difference::Truth(status)) = wanted;
        let outcome = match write(&facts.place, id, &known.version, &status).await {
            Ok(Written::Done(_)) => "written",
            Ok(Written::Overtaken) => "overtaken",
            Err(error) => {
                let answered = matches!(error.downcast_ref(), Some(kube::Error::Api(_)));
                let error = error.context(format!("the status of {id}"));
                pass = if answered { Pass::Refused(error) } else { Pass::Away(error) };
                "failed"
            }
        };
        counter!(metric::STATUSES.name, "outcome" => outcome).increment(1);
        if matches!(pass, Pass::Away(_)) {
            break;
        }
        tokio::time::sleep(PACE).await;
    }
    pass
}

async fn write(
    place: &Place,
    id: &ObjectId,
    version: &str,
    status: &serde_json::Value,
) -> Result<Written<DynamicObject>> {
    let watched = Watched::of(id.kind).context("no kind that is watched")?;
    let api: Api<DynamicObject> =
        Api::namespaced_with(place.client.clone(), &id.namespace, &watched.resource());
    let patch = Patch::Merge(json!({"metadata": {"resourceVersion": version}, "status": status}));
    let params = PatchParams { field_manager: Some(WRITER.to_owned()), ..PatchParams::default() };
    written(api.patch_status(&id.name, &params, &patch)).await
}

/// When each status was written last, and on which version that rested. Pure.
#[derive(Debug, Default)]
struct Attempts(BTreeMap<ObjectId, (String, Instant)>);

impl Attempts {
    /// Whether it may be written now. `words`: only words differ.
    fn may(&self, id: &ObjectId, version: &str, words: bool, now: Instant) -> bool {
        let Some((on, at)) = self.0.get(id) else { return true };
        // The same version: the watch has not told yet what became of it, or it was refused.
        let wait = match (on == version, words) {
            (_, true) => WORDS,
            (true, false) => AGAIN,
            (false, false) => Duration::ZERO,
        };
        now >= *at + wait
    }

    fn made(&mut self, id: &ObjectId, version: &str, now: Instant) {
        self.0.insert(id.clone(), (version.to_owned(), now));
    }

    fn only(&mut self, outcomes: &Outcomes) {
        self.0.retain(|id, _| outcomes.contains_key(id));
    }
}

/// An object, and what it is refused for.
type Complaint = (ObjectId, String);

/// What objects are refused for, since when, and whether that was told. Pure.
#[derive(Debug, Default)]
struct Told(HashMap<Complaint, (Instant, bool)>);

impl Told {
    /// The Events that are due.
    fn due(&mut self, outcomes: &Outcomes, now: Instant) -> Vec<(Complaint, Event)> {
        let refused: HashMap<Complaint, &str> = outcomes
            .iter()
            .filter(|(id, _)| written_by_people(id.kind))
            .filter_map(|(id, outcome)| {
                Some(((id.clone(), complaint(outcome)?), outcome.uid.as_deref().unwrap_or_default()))
            })
            .collect();
        self.0.retain(|key, _| refused.contains_key(key));
        let mut due = Vec::new();
        for (key, uid) in refused {
            let (since, told) = *self.0.entry(key.clone()).or_insert((now, false));
            // Without the uid nobody knows which object of the name it was.
            if !told && !uid.is_empty() && now >= since + SETTLED {
                due.extend(event(&key.0, uid, &key.1).map(|event| (key, event)));
            }
        }
        due
    }

    fn told(&mut self, complaint: &Complaint) {
        if let Some((_, told)) = self.0.get_mut(complaint) {
            *told = true;
        }
    }
}

/// Of what controllers write, a complaint reaches nobody.
fn written_by_people(kind: ObjectKind) -> bool {
    !matches!(kind, ObjectKind::EndpointSlice)
}

fn event(id: &ObjectId, uid: &str, note: &str) -> Option<Event> {
    Some(Event {
        regarding: Regarding {
            api_version: Watched::of(id.kind)?.api_version(),
            kind: format!("{:?}", id.kind),
            namespace: id.namespace.clone(),
            name: id.name.clone(),
            uid: uid.to_owned(),
        },
        reason: "Refused",
        action: "Configure",
        warning: true,
        note: note.to_owned(),
        each: true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outcome::{Finding, Outcome, Reason};

    fn id(kind: ObjectKind) -> ObjectId {
        ObjectId { kind, namespace: "team-a".into(), name: "one".into() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_status_is_written_when_it_differs_and_not_before_the_last_write_was_seen() {
        let (mut attempts, route) = (Attempts::default(), id(ObjectKind::HTTPRoute));
        let start = Instant::now();
        assert!(attempts.may(&route, "1", false, start));
        attempts.made(&route, "1", start);
        assert!(!attempts.may(&route, "1", false, start + EVERY));
        assert!(attempts.may(&route, "1", false, start + AGAIN), "the write may have been lost");
        assert!(attempts.may(&route, "2", false, start + EVERY));
        assert!(!attempts.may(&route, "2", true, start + AGAIN), "words have time");
        assert!(attempts.may(&route, "2", true, start + WORDS));
        attempts.only(&Outcomes::new());
        assert!(attempts.may(&route, "1", false, start));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_that_lasts_is_told_once_and_another_one_again() {
        let outcomes = |message: &str, kind| {
            let finding = Finding {
                reason: Reason::Value,
                pointer: String::new(),
                message: message.into(),
                refused: true,
            };
            let outcome = Outcome { uid: Some("u".into()), findings: vec![finding], ..Outcome::default() };
            Outcomes::from([(id(kind), outcome)])
        };
        let notes = |told: &mut Told, outcomes: &Outcomes| {
            let due = told.due(outcomes, Instant::now());
            due.iter().for_each(|(complaint, _)| told.told(complaint));
            due.into_iter().map(|(_, event)| event.note).collect::<Vec<_>>()
        };
        let (mut told, nothing) = (Told::default(), [""; 0]);
        let first = outcomes("a", ObjectKind::Service);
        assert_eq!(notes(&mut told, &first), nothing);
        tokio::time::advance(SETTLED).await;
        assert_eq!(notes(&mut told, &first), ["a"]);
        assert_eq!(notes(&mut told, &first), nothing);
        let second = outcomes("b", ObjectKind::Service);
        assert_eq!(notes(&mut told, &second), nothing);
        tokio::time::advance(SETTLED).await;
        assert_eq!(notes(&mut told, &second), ["b"]);
        // One that was mended in time was never told, nor is what a controller has written.
        assert_eq!(notes(&mut told, &Outcomes::new()), nothing);
        let slice = outcomes("c", ObjectKind::EndpointSlice);
        notes(&mut told, &slice);
        tokio::time::advance(SETTLED).await;
        assert_eq!(notes(&mut told, &slice), nothing);
    }
}
