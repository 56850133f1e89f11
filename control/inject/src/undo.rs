//! Takes the sidecar out of a pod again: what has a name of ours by its name, the rest by a note that injecting left.
//! A mapping or list that is empty afterwards goes with it.

use std::fmt;

use penstock_api::names::{INJECTED_LABEL, PROXY_UID, annotation};
use serde_json::{Map, Value};

use crate::{IDENTITY, INIT, PROXY, SHM, json};

/// What was changed and has no name: `grace=30,group`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Changes {
    /// The grace period was lengthened; the pod said so much, or nothing.
    pub(crate) grace: Option<Option<u64>>,
    /// The proxy's group was added.
    pub(crate) group: bool,
    /// The process namespace was shared.
    pub(crate) processes: bool,
    /// The annotation that asks was added.
    pub(crate) marked: bool,
}

impl fmt::Display for Changes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let grace =
            self.grace.map(|grace| grace.map_or("grace".to_owned(), |grace| format!("grace={grace}")));
        let said = |yes: bool, word: &str| yes.then(|| word.to_owned());
        let words = [
            grace,
            said(self.group, "group"),
            said(self.processes, "processes"),
            said(self.marked, "inject"),
        ];
        f.write_str(&words.into_iter().flatten().collect::<Vec<_>>().join(","))
    }
}

impl Changes {
    fn read(text: &str) -> Self {
        let mut changes = Self::default();
        for word in text.split(',') {
            match (word, word.strip_prefix("grace=")) {
                ("grace", _) => changes.grace = Some(None),
                (_, Some(seconds)) => changes.grace = Some(seconds.parse().ok()),
                ("group", _) => changes.group = true,
                ("processes", _) => changes.processes = true,
                ("inject", _) => changes.marked = true,
                _ => {}
            }
        }
        changes
    }
}

/// The pod without what was injected; `None` if nothing was.
#[must_use]
pub fn uninject(pod: &Value) -> Option<Value> {
    json::annotation(pod, annotation::INJECTED_BY)?;
    let changes = Changes::read(json::annotation(pod, annotation::INJECTED_CHANGES).unwrap_or_default());
    let mut pod = pod.clone();
    let metadata = pod.get_mut("metadata")?.as_object_mut()?;
    without_key(metadata, "labels", INJECTED_LABEL);
    without_key(metadata, "annotations", annotation::INJECTED_BY);
    without_key(metadata, "annotations", annotation::INJECTED_CHANGES);
    if changes.marked {
        without_key(metadata, "annotations", annotation::INJECT);
    }
    if metadata.is_empty() {
        pod.as_object_mut()?.remove("metadata");
    }
    let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) else { return Some(pod) };
    let named = |value: &Value, names: &[&str]| json::name(value).is_some_and(|name| names.contains(&name));
    without(spec, "initContainers", |one| named(one, &[INIT, PROXY]));
    without(spec, "volumes", |one| named(one, &[IDENTITY, SHM]));
    for kind in ["containers", "initContainers"] {
        for container in spec.get_mut(kind).and_then(Value::as_array_mut).into_iter().flatten() {
            if let Some(container) = container.as_object_mut() {
                without(container, "volumeMounts", |one| named(one, &[IDENTITY, SHM]));
            }
        }
    }
    match changes.grace {
        Some(Some(seconds)) => drop(spec.insert("terminationGracePeriodSeconds".into(), seconds.into())),
        Some(None) => drop(spec.remove("terminationGracePeriodSeconds")),
        None => {}
    }
    if changes.processes {
        spec.remove("shareProcessNamespace");
    }
    if changes.group
        && let Some(context) = spec.get_mut("securityContext").and_then(Value::as_object_mut)
    {
        without(context, "supplementalGroups", |group| *group == PROXY_UID);
        if context.is_empty() {
            spec.remove("securityContext");
        }
    }
    Some(pod)
}

fn without_key(metadata: &mut Map<String, Value>, kind: &str, key: &str) {
    if let Some(all) = metadata.get_mut(kind).and_then(Value::as_object_mut)
        && all.remove(key).is_some()
        && all.is_empty()
    {
        metadata.remove(kind);
    }
}

fn without(map: &mut Map<String, Value>, key: &str, ours: impl Fn(&Value) -> bool) {
    if let Some(list) = map.get_mut(key).and_then(Value::as_array_mut) {
        let before = list.len();
        list.retain(|one| !ours(one));
        if list.is_empty() && before > 0 {
            map.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_changed_is_read_as_it_was_written() {
        for grace in [None, Some(None), Some(Some(30))] {
            for bits in 0..8 {
                let changes =
                    Changes { grace, group: bits & 1 > 0, processes: bits & 2 > 0, marked: bits & 4 > 0 };
                assert_eq!(Changes::read(&changes.to_string()), changes);
            }
        }
    }
}
