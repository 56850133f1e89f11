//! How many proxies an object concerns, and how many of them have applied it.
//!
//! In: which resources each object is part of, and what each stream wants and has acknowledged. Out: two numbers an object. A proxy is
//! concerned if it asks for one of the resources; it has applied the object when it has acknowledged all of those that it asks for as they
//! are now.

use std::collections::{BTreeMap, HashMap};

use penstock_api::resource::Kind;

use super::{Fleet, lock};
use crate::objects::ObjectId;
use crate::snapshot::Snapshot;

/// The kinds of resources that objects with a status are part of.
const KINDS: [Kind; 5] = [Kind::Access, Kind::Workload, Kind::Service, Kind::Routes, Kind::Weights];

/// How far one object has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Connected proxies that ask for something of it.
    pub concerned: usize,
    /// Of these, those that have applied all of it.
    pub applied: usize,
    /// One that refused something of it, and why.
    pub refused: Option<String>,
}

/// How far each object has come that any proxy asks for.
pub type Tallies = BTreeMap<ObjectId, Tally>;

impl Fleet {
    /// How far the objects of `snapshot` have come with the proxies that are connected here.
    pub fn tally(&self, snapshot: &Snapshot) -> Tallies {
        let mut objects: HashMap<(Kind, &str), Vec<&ObjectId>> = HashMap::new();
        for (id, outcome) in &snapshot.outcomes {
            for (kind, name) in &outcome.resources {
                objects.entry((*kind, name)).or_default().push(id);
            }
        }
        let mut tallies: BTreeMap<&ObjectId, Tally> = BTreeMap::new();
        for (node, proxy) in &*lock(&self.proxies) {
            let Some(config) = &proxy.config else { continue };
            let stream = lock(&config.stream);
            let namespace = node.split_once('/').map_or("", |(namespace, _)| namespace);
            // Of each object: whether all is applied, and why something was refused.
            let mut seen: BTreeMap<&ObjectId, (bool, Option<&str>)> = BTreeMap::new();
            for kind in KINDS {
                for (name, held) in stream.held(kind, snapshot) {
                    let ids = objects.get(&(kind, name)).into_iter().flatten();
                    for id in ids.filter(|id| kind != Kind::Routes || concerns(id, name, namespace)) {
                        let (all, refused) = seen.entry(id).or_insert((true, None));
                        *all &= held;
                        if !held && refused.is_none() {
                            *refused = snapshot
                                .get_for(namespace, kind, name)
                                .and_then(|entry| stream.refused_version(kind, name, &entry.version));
                        }
                    }
                }
            }
            for (id, (all, refused)) in seen {
                let tally = tallies.entry(id).or_default();
                tally.concerned += 1;
                tally.applied += usize::from(all);
                if let (None, Some(why)) = (&tally.refused, refused) {
                    tally.refused = Some(format!("{node} refused it: {why}"));
                }
            }
        }
        tallies.into_iter().map(|(id, tally)| (id.clone(), tally)).collect()
    }
}

/// Whether a route is for clients in `namespace`: one in its Service's own namespace is for all, another for those in its own.
fn concerns(route: &ObjectId, service: &str, namespace: &str) -> bool {
    service.split_once('/').is_some_and(|(own, _)| own == route.namespace) || route.namespace == namespace
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use penstock_api::discovery::{DeltaDiscoveryRequest, Status};
    use penstock_api::{SpiffeId, v1};
    use tokio::time::Instant;

    use super::*;
    use crate::objects::ObjectKind;
    use crate::outcome::{Outcome, Outcomes};
    use crate::push::{Published, Stream};
    use crate::snapshot::Builder;

    /// A route of `a/s`, with weights.
    fn published(weight: u32) -> Published {
        let mut builder = Builder::default();
        builder.add(Kind::Routes, "a/s", &v1::Routes::default());
        let backends = vec![v1::Backend { service: "a/s".into(), weight, ..v1::Backend::default() }];
        builder.add(Kind::Weights, "a/s/a/r/0", &v1::Weights { backends, ..v1::Weights::default() });
        let mut snapshot = builder.build(Vec::new());
        let resources = [(Kind::Routes, "a/s".to_owned()), (Kind::Weights, "a/s/a/r/0".to_owned())].into();
        let id = ObjectId { kind: ObjectKind::HTTPRoute, namespace: "a".into(), name: "r".into() };
        snapshot.outcomes = Outcomes::from([(id, Outcome { resources, ..Outcome::default() })]);
        Published { snapshot: Arc::new(snapshot), sequence: u64::from(weight), at: Instant::now() }
    }

    /// A proxy that asks for these Services' routes and weights.
    fn proxy(fleet: &Fleet, node: &str, service: &str) -> Arc<Mutex<Stream>> {
        let now = Instant::now();
        let mut stream = Stream::new(node, now);
        for kind in [Kind::Routes, Kind::Weights] {
            let request = DeltaDiscoveryRequest {
                type_url: kind.type_url().to_owned(),
                resource_names_subscribe: vec![service.to_owned()],
                ..DeltaDiscoveryRequest::default()
            };
            stream.request(&request).unwrap();
        }
        let stream = Arc::new(Mutex::new(stream));
        fleet.configured(node, &SpiffeId::new("cluster.local", "a", "web").unwrap(), stream.clone(), now);
        stream
    }

    /// Takes what is due, and answers all of it so.
    fn answers(stream: &Mutex<Stream>, published: &Published, error: Option<&str>) {
        let mut stream = lock(stream);
        for response in stream.responses(published, Instant::now()) {
            let answer = DeltaDiscoveryRequest {
                type_url: response.type_url,
                response_nonce: response.nonce,
                error_detail: error.map(|words| Status { message: words.into(), ..Status::default() }),
                ..DeltaDiscoveryRequest::default()
            };
            stream.request(&answer).unwrap();
        }
    }

    #[test]
    fn a_proxy_that_asks_for_a_part_is_concerned_and_has_it_when_it_has_said_so() {
        let fleet = Fleet::default();
        let (first, second) = (proxy(&fleet, "a/one", "a/s"), proxy(&fleet, "a/two", "a/s"));
        proxy(&fleet, "a/other", "a/else");
        let count = |published: &Published| {
            let tally = fleet.tally(&published.snapshot).into_values().next().unwrap_or_default();
            (tally.applied, tally.concerned, tally.refused)
        };
        let one = published(1);
        assert_eq!(count(&one), (0, 2, None));
        answers(&first, &one, None);
        assert_eq!(count(&one), (1, 2, None));
        answers(&second, &one, None);
        assert_eq!(count(&one), (2, 2, None));
        // Another weight: what was acknowledged was the one before.
        let two = published(2);
        assert_eq!(count(&two), (0, 2, None));
        answers(&first, &two, None);
        answers(&second, &two, Some("a/s/a/r/0: too heavy"));
        let (applied, concerned, refused) = count(&two);
        assert_eq!((applied, concerned), (1, 2));
        assert!(refused.unwrap().starts_with("a/two refused it: "));
    }

    #[test]
    fn a_route_for_the_clients_of_one_namespace_concerns_these_alone() {
        let fleet = Fleet::default();
        let (own, other) = (proxy(&fleet, "b/one", "a/s"), proxy(&fleet, "a/one", "a/s"));
        let mut builder = Builder::default();
        builder.add(Kind::Routes, "a/s", &v1::Routes::default());
        let rules = vec![v1::Rule { route: "b/r".into(), ..v1::Rule::default() }];
        builder.add_for("b", "a/s", &v1::Routes { rules });
        let mut snapshot = builder.build(Vec::new());
        let resources = [(Kind::Routes, "a/s".to_owned())].into();
        let id = ObjectId { kind: ObjectKind::HTTPRoute, namespace: "b".into(), name: "r".into() };
        snapshot.outcomes = Outcomes::from([(id, Outcome { resources, ..Outcome::default() })]);
        let published = Published { snapshot: Arc::new(snapshot), sequence: 1, at: Instant::now() };
        let count = || {
            let tally = fleet.tally(&published.snapshot).into_values().next().unwrap_or_default();
            (tally.applied, tally.concerned, tally.refused)
        };
        assert_eq!(count(), (0, 1, None));
        answers(&other, &published, None);
        assert_eq!(count(), (0, 1, None));
        answers(&own, &published, Some("a/s: not that"));
        let (applied, concerned, refused) = count();
        assert_eq!((applied, concerned), (0, 1));
        assert!(refused.unwrap().starts_with("b/one refused it: "));
    }
}
