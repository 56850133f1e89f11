//! One immutable, versioned picture of everything that proxies may ask for.
//!
//! In: resources, compiled from a source's objects. Out: look-ups for the push. A snapshot never changes; a new one
//! replaces it. Versions are hashes of content, so two replicas of control that read the same objects agree on
//! every version, and a restart resends nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use penstock_api::ServiceName;
use penstock_api::resource::{Kind, version};
use penstock_api::view::Problem;
use prost::Message;

use crate::objects::ObjectId;
use crate::objects::canary::Course;
use crate::outcome::{Outcome, Outcomes};

/// A resource, packed for the wire.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Hash of the content.
    pub version: String,
    /// The packed message.
    pub any: prost_types::Any,
}

/// Everything, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Hash over all resources.
    pub version: String,
    /// What is wrong with the objects behind it.
    pub problems: Vec<Problem>,
    /// What became of the objects of which something is to be told.
    pub outcomes: Outcomes,
    resources: HashMap<Kind, BTreeMap<String, Entry>>,
    /// For each service, the services its routes lead to, itself included.
    closures: HashMap<String, BTreeSet<String>>,
}

/// Collects resources into a [`Snapshot`].
#[derive(Debug, Default)]
pub struct Builder {
    resources: HashMap<Kind, BTreeMap<String, Entry>>,
    closures: HashMap<String, BTreeSet<String>>,
    parts: BTreeMap<ObjectId, BTreeSet<(Kind, String)>>,
    routed: BTreeMap<ObjectId, BTreeSet<ServiceName>>,
    courses: BTreeMap<ObjectId, Course>,
}

impl Builder {
    /// Adds a resource; a second one of the same name replaces the first.
    pub fn add<M: Message>(&mut self, kind: Kind, name: impl Into<String>, message: &M) {
        let any = penstock_api::resource::pack(kind, message);
        let entry = Entry { version: version(&any.value), any };
        self.resources.entry(kind).or_default().insert(name.into(), entry);
    }

    /// Records that routes of `service` lead to `backend`.
    pub fn leads_to(&mut self, service: &str, backend: &str) {
        self.closures.entry(service.to_owned()).or_default().insert(backend.to_owned());
    }

    /// Records that an object is part of a resource.
    pub fn part_of(&mut self, object: &ObjectId, kind: Kind, name: impl Into<String>) {
        self.parts.entry(object.clone()).or_default().insert((kind, name.into()));
    }

    /// The resources that an object is part of.
    pub fn parts(&self, object: &ObjectId) -> BTreeSet<(Kind, String)> {
        self.parts.get(object).cloned().unwrap_or_default()
    }

    /// Records where requests go by a Canary.
    pub fn takes(&mut self, canary: &ObjectId, course: &Course) {
        self.courses.insert(canary.clone(), course.clone());
    }

    /// Where they go.
    pub fn course(&self, canary: &ObjectId) -> Option<Course> {
        self.courses.get(canary).cloned()
    }

    /// Records that a route of the Service `parent` leads to a pool.
    pub fn routes_to(&mut self, parent: &ServiceName, pool: &ObjectId) {
        self.routed.entry(pool.clone()).or_default().insert(parent.clone());
    }

    /// The Services whose routes lead to a pool.
    pub fn routed(&self, pool: &ObjectId) -> impl Iterator<Item = &ServiceName> {
        self.routed.get(pool).into_iter().flatten()
    }

    /// Finishes the snapshot.
    pub fn build(self, problems: Vec<Problem>) -> Snapshot {
        let mut hash = String::new();
        for kind in Kind::PUSH_ORDER {
            for (name, entry) in self.resources.get(&kind).into_iter().flatten() {
                hash.push_str(&format!("{kind:?}\0{name}\0{}\0", entry.version));
            }
        }
        Snapshot {
            version: version(hash.as_bytes()),
            problems,
            outcomes: Outcomes::new(),
            resources: self.resources,
            closures: self.closures,
        }
    }
}

impl Snapshot {
    /// A resource by its own name.
    pub fn get(&self, kind: Kind, name: &str) -> Option<&Entry> {
        self.resources.get(&kind)?.get(name)
    }

    /// All resources of a kind, by name.
    pub fn all(&self, kind: Kind) -> impl Iterator<Item = (&str, &Entry)> {
        self.resources.get(&kind).into_iter().flatten().map(|(name, entry)| (name.as_str(), entry))
    }

    /// A hash of what is in force of an object: the same on every replica that has compiled the same version of it.
    pub fn digest(&self, outcome: &Outcome) -> String {
        let mut text = format!("{:?}\0{}\0", outcome.generation, outcome.last_good);
        for (kind, name) in &outcome.resources {
            let version = self.get(*kind, name).map_or("", |entry| &entry.version);
            text.push_str(&format!("{kind:?}\0{name}\0{version}\0"));
        }
        version(text.as_bytes())
    }

    /// What a subscription to `name` means: for a service's name, the service and everything its routes lead to;
    /// for other kinds, the resource of that name. Empty when nothing of the kind exists under it.
    pub fn expand(&self, kind: Kind, name: &str) -> Vec<(&str, &Entry)> {
        let own = |name: &str| self.resources.get(&kind)?.get_key_value(name).map(|(n, e)| (n.as_str(), e));
        match kind {
            Kind::Service | Kind::Endpoints => {
                let also = self.closures.get(name).into_iter().flatten().filter(|backend| *backend != name);
                own(name).into_iter().chain(also.filter_map(|backend| own(backend))).collect()
            }
            Kind::Weights => {
                let prefix = format!("{name}/");
                self.resources
                    .get(&kind)
                    .map(|all| {
                        all.range(prefix.clone()..)
                            .take_while(|(name, _)| name.starts_with(&prefix))
                            .map(|(name, entry)| (name.as_str(), entry))
                            .collect()
                    })
                    .unwrap_or_default()
            }
            Kind::TrustBundle | Kind::Access | Kind::Workload | Kind::Address | Kind::Routes => {
                own(name).into_iter().collect()
            }
        }
    }
}
