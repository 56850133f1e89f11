//! From objects to the snapshot that is pushed.
//!
//! In: an [`ObjectSet`], the trust anchors, and what earlier compilations accepted. Out: a [`Snapshot`] with its
//! problems. An object that makes no sense is reported, and its last good version stays in force; an object that has
//! none is in force as far as it makes sense. [`compile`] is pure; [`run`] feeds it and publishes what it makes.

mod access;
pub mod annotations;
mod canary;
mod consumers;
mod driver;
mod endpoints;
mod faults;
mod filters;
mod grpc;
mod inference;
mod matches;
mod memory;
mod mirrors;
mod pods;
mod pools;
mod rates;
mod routes;
mod services;
mod templates;
mod view;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use penstock_api::ServiceName;
use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_api::view::Problem;
use serde::{Deserialize, Serialize};
use serde_json::json;

use self::faults::{Fault, Faults};
use self::view::View;
use crate::objects::{Body, Object, ObjectId, ObjectKind, ObjectSet, Scope};
use crate::outcome::{Finding, Outcome, Outcomes, Parent, Reason};
use crate::snapshot::{Builder, Snapshot};

pub use driver::{resume, run};
pub(crate) use endpoints::SERVICE_NAME;

/// What workload certificates are verified against.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustAnchors {
    /// The trust domain, `cluster.local`.
    pub trust_domain: String,
    /// DER certificates.
    pub anchors: Vec<Vec<u8>>,
}

/// What earlier compilations accepted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    accepted: BTreeMap<ObjectId, Accepted>,
    /// What the Services that access policies and rate limits name lead to, or led to before they were gone.
    protected: access::Memory,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Accepted {
    /// The newest version that could be read.
    current: Arc<Object>,
    /// The newest version that made sense.
    good: Option<Arc<Object>>,
}

/// An object as it should be in force, unless it turns out to make no sense.
struct Candidate {
    object: Arc<Object>,
    /// It is an earlier version, because the newest could not be read.
    held: bool,
}

/// An access policy that cannot be read, and of which no version ever could.
struct Unread {
    id: ObjectId,
    /// Where, and why.
    why: String,
}

type Candidates = BTreeMap<ObjectId, Candidate>;

/// Compiles a set of objects.
pub fn compile(set: &ObjectSet, previous: &State, trust: &TrustAnchors) -> (Snapshot, State) {
    let mut problems = Vec::new();
    let candidates = gather(set, previous, &mut problems);
    let unread = unread(set, &candidates);
    let mut in_force: BTreeMap<ObjectId, Arc<Object>> =
        candidates.iter().map(|(id, candidate)| (id.clone(), candidate.object.clone())).collect();
    let mut replaced = BTreeSet::new();
    // What is wrong with the newest versions.
    let mut findings: BTreeMap<ObjectId, Vec<Finding>> = BTreeMap::new();

    // An object that falls back to its last good version changes what others refer to, so look again until all is
    // settled. What is referred to falls back first: it may be all that was wrong. Every turn replaces something, and
    // nothing twice, so this ends; it takes one turn when nothing is wrong.
    let (builder, faults, protected) = loop {
        let (builder, faults, protected) = resources(&in_force, &unread, trust, &previous.protected);
        let fallen = fall_back(&faults, &candidates, previous, &replaced);
        if fallen.is_empty() {
            break (builder, faults, protected);
        }
        for (id, good) in fallen {
            let causes = faults.iter().filter(|fault| fault.refused && fault.object == id);
            problems.extend(causes.clone().map(|fault| told(fault, &candidates, true)));
            findings.insert(id.clone(), causes.map(Fault::finding).collect());
            in_force.insert(id.clone(), good);
            replaced.insert(id);
        }
    };
    for fault in &faults {
        let mut problem = told(fault, &candidates, replaced.contains(&fault.object));
        if replaced.contains(&fault.object) {
            problem.message = format!("its last good version, which is in force: {}", problem.message);
        } else {
            findings.entry(fault.object.clone()).or_default().push(fault.finding());
        }
        problems.push(problem);
    }
    problems.sort_by(|a, b| {
        (&a.file, a.line, &a.object, &a.message).cmp(&(&b.file, b.line, &b.object, &b.message))
    });
    problems.dedup();

    let outcomes = outcomes(set, &candidates, &replaced, findings, &builder);
    let faulty: BTreeSet<_> =
        faults.iter().filter(|fault| fault.refused).map(|fault| &fault.object).collect();
    let accepted = candidates.into_iter().map(|(id, candidate)| {
        let good = match faulty.contains(&id) || replaced.contains(&id) {
            true => previous.accepted.get(&id).and_then(|known| known.good.clone()),
            false => Some(candidate.object.clone()),
        };
        (id, Accepted { current: candidate.object, good })
    });
    let state = State { accepted: accepted.collect(), protected };
    let mut snapshot = builder.build(problems);
    snapshot.outcomes = outcomes;
    in_force.retain(|id, _| id.kind == ObjectKind::Canary);
    snapshot.canaries = in_force.into_values().collect();
    (snapshot, state)
}

/// What became of the objects that have a status, and of those that make no sense.
fn outcomes(
    set: &ObjectSet,
    candidates: &Candidates,
    replaced: &BTreeSet<ObjectId>,
    mut findings: BTreeMap<ObjectId, Vec<Finding>>,
    builder: &Builder,
) -> Outcomes {
    for broken in &set.broken {
        if let Scope::Object(id) = &broken.scope {
            let message = broken.message.clone();
            let finding = Finding { reason: Reason::Value, pointer: String::new(), message, refused: true };
            findings.insert(id.clone(), vec![finding]);
        }
    }
    let refused = |id: &ObjectId| findings.get(id).is_some_and(|all| all.iter().any(|one| one.refused));
    let told = |id: &&ObjectId| id.kind.has_status() || refused(id);
    let all: BTreeSet<&ObjectId> = candidates.keys().chain(findings.keys()).filter(told).collect();
    let of = |id: &ObjectId| {
        let candidate = candidates.get(id);
        // A version that could not be read is nobody's whose number is known.
        let newest = candidate.filter(|candidate| !candidate.held).map(|candidate| &candidate.object);
        Outcome {
            generation: newest.and_then(|object| object.metadata().generation),
            uid: candidate.and_then(|candidate| candidate.object.metadata().uid.clone()),
            findings: findings.get(id).cloned().unwrap_or_default(),
            last_good: replaced.contains(id) || candidate.is_some_and(|candidate| candidate.held),
            parents: newest.map(|object| parents(object, builder)).unwrap_or_default(),
            resources: builder.parts(id),
            course: builder.course(id),
            templates: builder.templates(id),
        }
    };
    all.into_iter().map(|id| (id.clone(), of(id))).collect()
}

/// The parents of a route that are Services (those of other kinds are a Gateway's business), or the Services whose routes lead to a pool.
fn parents(object: &Object, builder: &Builder) -> Vec<Parent> {
    let refs: Vec<_> = match &object.body {
        Body::HTTPRoute(route) => references(route.spec.parent_refs.as_deref()),
        Body::GRPCRoute(route) => references(route.spec.parent_refs.as_deref()),
        Body::InferencePool(_) => {
            let service = |name: &ServiceName| json!({"group": "", "kind": "Service", "name": name.name(), "namespace": name.namespace()});
            builder.routed(&object.id).map(service).collect()
        }
        _ => Vec::new(),
    };
    let ours = refs.into_iter().enumerate().filter(|(_, reference)| reference["kind"] == "Service");
    ours.map(|(index, reference)| Parent { index, reference }).collect()
}

/// References, word for word.
fn references<T: Serialize>(refs: Option<&[T]>) -> Vec<serde_json::Value> {
    let refs = refs.unwrap_or_default().iter();
    refs.map(|reference| serde_json::to_value(reference).unwrap_or_default()).collect()
}

/// The newest readable version of every object that nobody deleted.
fn gather(set: &ObjectSet, previous: &State, problems: &mut Vec<Problem>) -> Candidates {
    let mut versions: BTreeMap<&ObjectId, Vec<&Arc<Object>>> = BTreeMap::new();
    for object in &set.objects {
        versions.entry(&object.id).or_default().push(object);
    }
    let mut candidates = Candidates::new();
    for (id, mut versions) in versions {
        // Of two, the one that was there before stays, so that a copy made by mistake changes nothing.
        let home = previous.accepted.get(id).map(|known| &known.current.origin.file);
        versions.sort_by_key(|object| (Some(&object.origin.file) != home, &object.origin));
        let [chosen, others @ ..] = &versions[..] else { continue };
        problems.extend(others.iter().map(|other| Problem {
            file: other.origin.file.to_string(),
            line: other.origin.line,
            object: id.to_string(),
            message: format!(
                "it is already defined at {}:{}, and that version is in force; remove one of the two",
                chosen.origin.file, chosen.origin.line
            ),
            last_good_in_force: false,
        }));
        candidates.insert(id.clone(), Candidate { object: steered(chosen, set), held: false });
    }
    for broken in &set.broken {
        let lost = |id: &ObjectId, known: &Accepted| match &broken.scope {
            Scope::Source => true,
            Scope::File => known.current.origin.file == broken.origin.file,
            Scope::Object(broken) => broken == id,
        };
        let mut held = 0;
        for (id, known) in previous.accepted.iter().filter(|(id, known)| lost(id, known)) {
            candidates.entry(id.clone()).or_insert_with(|| {
                held += 1;
                Candidate { object: steered(&known.current, set), held: true }
            });
        }
        let object = match &broken.scope {
            Scope::Object(id) => id.to_string(),
            Scope::Source | Scope::File => String::new(),
        };
        problems.push(Problem {
            file: broken.origin.file.to_string(),
            line: broken.origin.line,
            object,
            message: broken.message.clone(),
            last_good_in_force: held > 0,
        });
    }
    candidates
}

/// A Canary with where its requests go, if the object itself does not say it.
fn steered(object: &Arc<Object>, set: &ObjectSet) -> Arc<Object> {
    let (Body::Canary(canary), Some(course)) = (&object.body, set.courses.get(&object.id)) else {
        return object.clone();
    };
    let mut canary = canary.clone();
    canary.status.course = Some(course.clone());
    Arc::new(Object { body: Body::Canary(canary), ..(**object).clone() })
}

/// An earlier version of an object, with what has become of it since: the requests of a Canary go where its status says now.
fn as_of_now(good: &Arc<Object>, now: &Object) -> Arc<Object> {
    match (&good.body, &now.body) {
        (Body::Canary(asked), Body::Canary(current)) => {
            Arc::new(Object { body: Body::Canary(Box::new(asked.as_of(current))), ..(**good).clone() })
        }
        _ => good.clone(),
    }
}

/// The access policies that are lost altogether.
fn unread(set: &ObjectSet, candidates: &Candidates) -> Vec<Unread> {
    let lost = set.broken.iter().filter_map(|broken| match &broken.scope {
        Scope::Object(id) if id.kind == ObjectKind::AccessPolicy && !candidates.contains_key(id) => {
            let why = format!("{}:{}: {}", broken.origin.file, broken.origin.line, broken.message);
            Some(Unread { id: id.clone(), why })
        }
        _ => None,
    });
    lost.collect()
}

/// The refused objects that have another, good version, as far as they are of the first kind that has any.
fn fall_back(
    faults: &[Fault],
    candidates: &Candidates,
    previous: &State,
    replaced: &BTreeSet<ObjectId>,
) -> BTreeMap<ObjectId, Arc<Object>> {
    let mut fallen = BTreeMap::new();
    for id in faults.iter().filter(|fault| fault.refused).map(|fault| &fault.object) {
        let good = previous.accepted.get(id).and_then(|known| known.good.as_ref());
        let Some((good, candidate)) = good.zip(candidates.get(id)) else { continue };
        let good = as_of_now(good, &candidate.object);
        if !replaced.contains(id) && good.body != candidate.object.body {
            fallen.insert(id.clone(), good);
        }
    }
    if let Some(first) = fallen.keys().next().map(|id| id.kind) {
        fallen.retain(|id, _| id.kind == first);
    }
    fallen
}

/// A fault, at its place in the newest version of its object.
fn told(fault: &Fault, candidates: &Candidates, replaced: bool) -> Problem {
    let candidate = candidates.get(&fault.object);
    let origin = candidate.map(|candidate| &candidate.object.origin);
    Problem {
        file: origin.map_or_else(String::new, |origin| origin.file.to_string()),
        line: candidate.map_or(0, |candidate| candidate.object.line_of(&fault.pointer)),
        object: fault.object.to_string(),
        message: fault.message.clone(),
        last_good_in_force: replaced || candidate.is_some_and(|candidate| candidate.held),
    }
}

/// All resources of the objects in force, and what is wrong with these.
fn resources(
    in_force: &BTreeMap<ObjectId, Arc<Object>>,
    unread: &[Unread],
    trust: &TrustAnchors,
    before: &access::Memory,
) -> (Builder, Vec<Fault>, access::Memory) {
    let mut faults = Faults::default();
    let mut builder = Builder::default();
    if !trust.trust_domain.is_empty() {
        let bundle = v1::TrustBundle { anchors: trust.anchors.clone() };
        builder.add(Kind::TrustBundle, trust.trust_domain.as_str(), &bundle);
    }
    let view = View::new(in_force);
    let pods = pods::read(&view, &trust.trust_domain, &mut faults);
    let mut services = services::read(&view, &mut faults);
    pools::read(&view, &mut services, &mut faults);
    inference::join(&view, &mut services, &mut faults);
    let templates = templates::read(&view, &pods, &mut services, &mut builder, &mut faults);
    let joined = endpoints::join(&view, &pods, &mut services, &templates, &mut faults);
    services::add(&services, &mut builder, &mut faults);
    endpoints::add(&joined, &mut builder);
    pods::add(&pods, &services, &joined, &mut builder, &mut faults);
    let mesh = access::Mesh { view: &view, pods: &pods, services: &services, joined: &joined, before };
    let protected = access::add(&mesh, unread, &mut builder, &mut faults);
    routes::add(&view, &services, &joined, &mut builder, &mut faults);
    (builder, faults.into_vec(), protected)
}
