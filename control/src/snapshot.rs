//! One immutable, versioned picture of everything that proxies may ask for.
//!
//! In: resources, compiled from a source's objects. Out: look-ups for the push. A snapshot never changes; a new one
//! replaces it. Versions are hashes of content, so two replicas of control that read the same objects agree on
//! every version, and a restart resends nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use penstock_api::ServiceName;
use penstock_api::resource::{Kind, version};
use penstock_api::v1;
use penstock_api::view::Problem;
use prost::Message;

use crate::canary::template::Template;
use crate::objects::canary::Course;
use crate::objects::{Object, ObjectId};
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
    /// The Canaries in force, by name: of one that is refused, the last good version.
    pub canaries: Vec<Arc<Object>>,
    resources: HashMap<Kind, BTreeMap<String, Entry>>,
    /// For each service, the services its routes lead to, itself included.
    closures: HashMap<String, BTreeSet<String>>,
    /// For each service, the namespaces that have routes of their own for it.
    consumers: BTreeMap<String, BTreeMap<String, Consumer>>,
}

/// How the clients of one namespace see a service for which that namespace has routes of its own. No other client sees any of it.
#[derive(Clone, Debug, Default)]
struct Consumer {
    /// Instead of the routes that all others see.
    routes: Option<Entry>,
    /// Where its own routes lead.
    closure: BTreeSet<String>,
}

/// Collects resources into a [`Snapshot`].
#[derive(Debug, Default)]
pub struct Builder {
    resources: HashMap<Kind, BTreeMap<String, Entry>>,
    closures: HashMap<String, BTreeSet<String>>,
    consumers: BTreeMap<String, BTreeMap<String, Consumer>>,
    parts: BTreeMap<ObjectId, BTreeSet<(Kind, String)>>,
    routed: BTreeMap<ObjectId, BTreeSet<ServiceName>>,
    courses: BTreeMap<ObjectId, Course>,
    templates: BTreeMap<ObjectId, Vec<Template>>,
}

impl Builder {
    /// Adds a resource; a second one of the same name replaces the first.
    pub fn add<M: Message>(&mut self, kind: Kind, name: impl Into<String>, message: &M) {
        self.resources.entry(kind).or_default().insert(name.into(), entry(kind, message));
    }

    /// Records that routes of `service` lead to `backend`.
    pub fn leads_to(&mut self, service: &str, backend: &str) {
        self.closures.entry(service.to_owned()).or_default().insert(backend.to_owned());
    }

    /// Adds the routes of `service` as clients in `namespace` see them.
    pub fn add_for(&mut self, namespace: &str, service: &str, routes: &v1::Routes) {
        self.consumer(namespace, service).routes = Some(entry(Kind::Routes, routes));
    }

    /// Records that the routes that `namespace` has of its own for `service` lead to `backend`.
    pub fn leads_to_for(&mut self, namespace: &str, service: &str, backend: &str) {
        self.consumer(namespace, service).closure.insert(backend.to_owned());
    }

    fn consumer(&mut self, namespace: &str, service: &str) -> &mut Consumer {
        let of_service = self.consumers.entry(service.to_owned()).or_default();
        of_service.entry(namespace.to_owned()).or_default()
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

    /// Records which templates the Deployment of a Canary has.
    pub fn has_templates(&mut self, canary: &ObjectId, templates: Vec<Template>) {
        self.templates.insert(canary.clone(), templates);
    }

    /// Which there are.
    pub fn templates(&self, canary: &ObjectId) -> Vec<Template> {
        self.templates.get(canary).cloned().unwrap_or_default()
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
        for (service, by_namespace) in &self.consumers {
            for (namespace, consumer) in by_namespace {
                let version = consumer.routes.as_ref().map_or("", |entry| &entry.version);
                hash.push_str(&format!("{service}\0{namespace}\0{version}\0"));
            }
        }
        Snapshot {
            version: version(hash.as_bytes()),
            problems,
            outcomes: Outcomes::new(),
            canaries: Vec::new(),
            resources: self.resources,
            closures: self.closures,
            consumers: self.consumers,
        }
    }
}

fn entry<M: Message>(kind: Kind, message: &M) -> Entry {
    let any = penstock_api::resource::pack(kind, message);
    Entry { version: version(&any.value), any }
}

impl Snapshot {
    /// A resource by its own name.
    pub fn get(&self, kind: Kind, name: &str) -> Option<&Entry> {
        self.resources.get(&kind)?.get(name)
    }

    /// A resource by its own name, as a client in `namespace` sees it.
    pub fn get_for(&self, namespace: &str, kind: Kind, name: &str) -> Option<&Entry> {
        let consumer = || self.consumers.get(name)?.get(namespace)?.routes.as_ref();
        let own = if kind == Kind::Routes { consumer() } else { None };
        own.or_else(|| self.get(kind, name))
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
            let of_routes = self.consumers.get(name).filter(|_| *kind == Kind::Routes);
            for consumer in of_routes.into_iter().flatten().filter_map(|(_, one)| one.routes.as_ref()) {
                text.push_str(&format!("{}\0", consumer.version));
            }
        }
        version(text.as_bytes())
    }

    /// The routes that namespaces have of their own for services of others: the service, the namespace, and how its clients see it.
    pub fn consumers(&self) -> impl Iterator<Item = (&str, &str, &Entry)> {
        self.consumers.iter().flat_map(|(service, by_namespace)| {
            let routes = by_namespace.iter().filter_map(|(name, one)| Some((name, one.routes.as_ref()?)));
            routes.map(|(namespace, entry)| (service.as_str(), namespace.as_str(), entry))
        })
    }

    /// What a subscription to `name` means for a client in `namespace`: as [`Self::expand`], but with the routes that its namespace has of
    /// its own for the service in the place of those that all others see, and without what other namespaces have of their own.
    pub fn seen(&self, namespace: &str, kind: Kind, name: &str) -> Vec<(&str, &Entry)> {
        let mut seen = self.expand(kind, name);
        let Some((service, by_namespace)) = self.consumers.get_key_value(name) else { return seen };
        let own = by_namespace.get(namespace);
        match kind {
            Kind::Routes => {
                if let Some(routes) = own.and_then(|own| own.routes.as_ref()) {
                    seen = vec![(service, routes)];
                }
            }
            Kind::Weights => seen.retain(|(weights, _)| visible(namespace, weights)),
            Kind::Service | Kind::Endpoints => {
                let all = self.resources.get(&kind);
                for backend in own.iter().flat_map(|own| &own.closure) {
                    let found = all.and_then(|all| all.get_key_value(backend));
                    if let Some((backend, entry)) =
                        found.filter(|(name, _)| !seen.iter().any(|s| s.0 == *name))
                    {
                        seen.push((backend, entry));
                    }
                }
            }
            Kind::TrustBundle | Kind::Access | Kind::Workload | Kind::Address => {}
        }
        seen
    }

    /// All resources of a kind that a client in `namespace` may see.
    pub fn all_seen(&self, namespace: &str, kind: Kind) -> Vec<(&str, &Entry)> {
        match kind {
            Kind::Routes => {
                let named = self.all(kind).map(|(name, _)| name);
                let names: BTreeSet<_> = named.chain(self.consumers().map(|(service, ..)| service)).collect();
                names.into_iter().flat_map(|name| self.seen(namespace, kind, name)).collect()
            }
            Kind::Weights => self.all(kind).filter(|(name, _)| visible(namespace, name)).collect(),
            _ => self.all(kind).collect(),
        }
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

/// Whether a client in `namespace` sees these weights, `<namespace>/<service>/<route-namespace>/<route>/<rule>`: those of the service's own
/// routes are everybody's, those of another namespace's routes that namespace's alone.
fn visible(namespace: &str, weights: &str) -> bool {
    let mut parts = weights.split('/');
    let (service, route) = (parts.next(), parts.nth(1));
    route == service || route == Some(namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_routes_of_its_own_sees_them_and_nobody_else_does() {
        let mut builder = Builder::default();
        let rules =
            |route: &str| v1::Routes { rules: vec![v1::Rule { route: route.into(), ..v1::Rule::default() }] };
        builder.add(Kind::Routes, "a/s", &rules("a/r"));
        builder.add_for("b", "a/s", &rules("b/r"));
        // Of a service without routes for everybody.
        builder.add_for("b", "a/t", &rules("b/r"));
        builder.leads_to_for("b", "a/s", "b/x");
        builder.leads_to_for("b", "a/s", "a/s");
        for service in ["a/s", "b/x"] {
            builder.add(Kind::Service, service, &v1::Service::default());
        }
        for weights in ["a/s/a/r/0", "a/s/b/r/0"] {
            builder.add(Kind::Weights, weights, &v1::Weights::default());
        }
        let snapshot = builder.build(Vec::new());
        let routes = |namespace: &str, service: &str| {
            let seen = snapshot.seen(namespace, Kind::Routes, service);
            let of = |(name, entry): &(&str, &Entry)| {
                let routes = v1::Routes::decode(&*entry.any.value).unwrap();
                format!("{name} {}", routes.rules[0].route)
            };
            seen.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(routes("a", "a/s"), ["a/s a/r"]);
        assert_eq!(routes("b", "a/s"), ["a/s b/r"]);
        assert_eq!(routes("c", "a/s"), ["a/s a/r"]);
        assert_eq!(routes("a", "a/t"), [""; 0]);
        assert_eq!(routes("b", "a/t"), ["a/t b/r"]);
        let names =
            |seen: Vec<(&str, &Entry)>| seen.into_iter().map(|one| one.0.to_owned()).collect::<Vec<_>>();
        for (namespace, services, weights) in
            [("a", vec!["a/s"], vec!["a/s/a/r/0"]), ("b", vec!["a/s", "b/x"], vec!["a/s/a/r/0", "a/s/b/r/0"])]
        {
            assert_eq!(names(snapshot.seen(namespace, Kind::Service, "a/s")), services);
            assert_eq!(names(snapshot.seen(namespace, Kind::Weights, "a/s")), weights);
            assert_eq!(names(snapshot.all_seen(namespace, Kind::Weights)), weights);
        }
        assert_eq!(names(snapshot.all_seen("a", Kind::Routes)), ["a/s"]);
        assert_eq!(names(snapshot.all_seen("b", Kind::Routes)), ["a/s", "a/t"]);
    }

    #[test]
    fn routes_of_one_namespace_alone_are_a_new_version_too() {
        let of = |route: &str| {
            let mut builder = Builder::default();
            let rules = vec![v1::Rule { route: route.into(), ..v1::Rule::default() }];
            builder.add_for("b", "a/s", &v1::Routes { rules });
            let snapshot = builder.build(Vec::new());
            let outcome =
                Outcome { resources: [(Kind::Routes, "a/s".to_owned())].into(), ..Outcome::default() };
            (snapshot.version.clone(), snapshot.digest(&outcome))
        };
        let (first, second) = (of("b/r"), of("b/other"));
        assert_eq!(first, of("b/r"));
        assert!(first.0 != second.0 && first.1 != second.1);
    }
}
