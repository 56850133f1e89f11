//! What the watches have told so far. Pure: no connection, no clock.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use kube::api::DynamicObject;

use super::{Watched, lean};
use crate::objects::{Broken, Object, ObjectId, ObjectKind, ObjectSet, Origin, Scope, decode};

/// An object as it was read, or why it could not be.
pub(super) type Read = (ObjectId, Result<Arc<Object>, Broken>);

/// What a watch says of its kind.
pub(super) enum Change {
    /// A list begins: what it does not name is gone.
    Begin,
    /// An object of the list.
    Listed(Box<Read>),
    /// The list has ended.
    End,
    /// There is no such kind.
    Absent,
    /// An object is new or other than before.
    Put(Box<Read>),
    /// An object is gone.
    Gone(ObjectId),
}

/// All objects of all kinds.
pub(super) struct Store {
    kinds: BTreeMap<ObjectKind, Kept>,
}

/// The objects of a kind.
#[derive(Default)]
struct Kept {
    /// Whether a list has been read to its end, ever.
    listed: bool,
    objects: HashMap<ObjectId, Result<Arc<Object>, Broken>>,
    /// A list that has not ended yet. Until it has, what was known stays.
    incoming: HashMap<ObjectId, Result<Arc<Object>, Broken>>,
}

impl Store {
    /// A store in which these kinds have to be listed before it is whole.
    pub(super) fn new(kinds: impl IntoIterator<Item = ObjectKind>) -> Self {
        Self { kinds: kinds.into_iter().map(|kind| (kind, Kept::default())).collect() }
    }

    /// Takes note of a change; whether anything is different now.
    pub(super) fn apply(&mut self, kind: ObjectKind, change: Change) -> bool {
        let Some(kept) = self.kinds.get_mut(&kind) else { return false };
        match change {
            Change::Begin => {
                kept.incoming.clear();
                false
            }
            Change::Listed(read) => {
                kept.incoming.insert(read.0, read.1);
                false
            }
            Change::End => {
                let listed = std::mem::take(&mut kept.incoming);
                let different = !kept.listed || kept.objects != listed;
                kept.listed = true;
                kept.objects = listed;
                different
            }
            Change::Absent => {
                let different = !kept.listed || !kept.objects.is_empty();
                *kept = Kept { listed: true, ..Kept::default() };
                different
            }
            Change::Put(read) => {
                let (id, object) = *read;
                let different = kept.objects.get(&id) != Some(&object);
                kept.objects.insert(id, object);
                different
            }
            Change::Gone(id) => kept.objects.remove(&id).is_some(),
        }
    }

    /// Everything, once every kind has been listed. In the order of names, so that equal stores give equal sets.
    pub(super) fn whole(&self) -> Option<ObjectSet> {
        if !self.kinds.values().all(|kept| kept.listed) {
            return None;
        }
        let mut all: Vec<_> = self.kinds.values().flat_map(|kept| &kept.objects).collect();
        all.sort_by_key(|(id, _)| *id);
        let mut set = ObjectSet::default();
        for (_, read) in all {
            match read {
                Ok(object) => set.objects.push(object.clone()),
                Err(broken) => set.broken.push(broken.clone()),
            }
        }
        Some(set)
    }
}

/// The name of an object.
pub(super) fn id_of(kind: ObjectKind, object: &DynamicObject) -> ObjectId {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    ObjectId { kind, namespace: text(&object.metadata.namespace), name: text(&object.metadata.name) }
}

/// Reads an object as the API server told it.
pub(super) fn read(watched: Watched, object: DynamicObject) -> Read {
    let id = id_of(watched.kind, &object);
    let origin = Origin { file: "kubernetes".into(), line: 0 };
    let refused =
        |message: String| Broken { origin: origin.clone(), scope: Scope::Object(id.clone()), message };
    let read =
        serde_json::to_value(&object).map_err(|error| refused(error.to_string())).and_then(|mut json| {
            lean::lean(watched.kind, &mut json);
            decode::of_api(&origin, &id, &json).map(Arc::new)
        });
    (id, read)
}

#[cfg(test)]
mod tests {
    use kube::api::{ApiResource, GroupVersionKind};
    use serde_json::{Value, json};

    use super::super::WATCHED;
    use super::*;

    fn service(name: &str, body: Value) -> Change {
        let watched = WATCHED[0];
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "Service"));
        let object = DynamicObject::new(name, &resource).within("team-a").data(body);
        Change::Put(Box::new(read(watched, object)))
    }

    fn names(set: &ObjectSet) -> Vec<String> {
        set.objects.iter().map(|object| object.id.to_string()).collect()
    }

    #[test]
    fn nothing_is_told_before_every_kind_was_listed_and_a_list_replaces_what_it_does_not_name() {
        let mut store = Store::new([ObjectKind::Service, ObjectKind::HTTPRoute]);
        assert!(!store.apply(ObjectKind::Service, Change::Begin));
        assert!(store.apply(ObjectKind::Service, Change::End));
        assert_eq!(store.whole(), None);
        // A kind that is not installed is an empty list.
        assert!(store.apply(ObjectKind::HTTPRoute, Change::Absent));
        assert!(!store.apply(ObjectKind::HTTPRoute, Change::Absent));
        assert_eq!(names(&store.whole().unwrap()), [""; 0]);

        let spec = json!({"spec": {"ports": [{"port": 80}]}});
        assert!(store.apply(ObjectKind::Service, service("web", spec.clone())));
        assert!(!store.apply(ObjectKind::Service, service("web", spec.clone())));
        assert!(store.apply(ObjectKind::Service, service("api", spec.clone())));
        assert_eq!(names(&store.whole().unwrap()), ["Service team-a/api", "Service team-a/web"]);

        // The API server was away; until its list has ended what is known stays.
        assert!(!store.apply(ObjectKind::Service, Change::Begin));
        let Change::Put(web) = service("web", spec) else { unreachable!() };
        assert!(!store.apply(ObjectKind::Service, Change::Listed(web)));
        assert_eq!(store.whole().unwrap().objects.len(), 2);
        assert!(store.apply(ObjectKind::Service, Change::End));
        assert_eq!(names(&store.whole().unwrap()), ["Service team-a/web"]);
    }

    #[test]
    fn an_object_that_makes_no_sense_is_named_and_fields_of_newer_versions_are_no_mistake() {
        let mut store = Store::new([ObjectKind::Service]);
        store.apply(ObjectKind::Service, Change::End);
        store.apply(
            ObjectKind::Service,
            service("new", json!({"spec": {"ports": [{"port": 80}], "fromTheFuture": 1}})),
        );
        store.apply(ObjectKind::Service, service("odd", json!({"spec": {"ports": "eighty"}})));
        let set = store.whole().unwrap();
        assert_eq!(names(&set), ["Service team-a/new"]);
        let [broken] = &set.broken[..] else { panic!("{set:?}") };
        assert!(matches!(&broken.scope, Scope::Object(id) if id.name == "odd"), "{broken:?}");
        assert!(broken.message.starts_with("spec.ports: "), "{broken:?}");
    }
}
