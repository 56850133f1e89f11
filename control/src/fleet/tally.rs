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
            // Of each object: whether all is applied, and why something was refused.
            let mut seen: BTreeMap<&ObjectId, (bool, Option<&str>)> = BTreeMap::new();
            for kind in KINDS {
                for (name, held) in stream.held(kind, snapshot) {
                    for id in objects.get(&(kind, name)).into_iter().flatten() {
                        let (all, refused) = seen.entry(id).or_insert((true, None));
                        *all &= held;
                        if !held && refused.is_none() {
                            *refused = snapshot
                                .get(kind, name)
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
