//! Where the pods are in objects that make pods: Deployments, Jobs, Lists and so on.

use serde_json::Value;

/// A pod, or the template of pods, within an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// JSON pointer to it, empty for the object itself.
    pub pointer: String,
    /// What it is in, `Deployment demo/web`.
    pub of: String,
    /// The namespace that the object names.
    pub namespace: Option<String>,
}

/// The places of all pods in an object; in that of a List, of all its items.
#[must_use]
pub fn pods(object: &Value) -> Vec<Place> {
    let mut found = Vec::new();
    search(object, String::new(), &mut found);
    found
}

fn search(object: &Value, at: String, found: &mut Vec<Place>) {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str);
    let kind = text("/kind").unwrap_or_default();
    let group = text("/apiVersion").unwrap_or_default();
    let template = match (group, kind) {
        ("v1", "Pod") => "",
        ("v1", "ReplicationController")
        | ("apps/v1", "Deployment" | "StatefulSet" | "DaemonSet" | "ReplicaSet") => "/spec/template",
        ("batch/v1", "Job") => "/spec/template",
        ("batch/v1", "CronJob") => "/spec/jobTemplate/spec/template",
        ("v1", list) if list.ends_with("List") => {
            for (index, item) in
                object.get("items").and_then(Value::as_array).into_iter().flatten().enumerate()
            {
                search(item, format!("{at}/items/{index}"), found);
            }
            return;
        }
        _ => return,
    };
    let namespace = text("/metadata/namespace").map(str::to_owned);
    let name = text("/metadata/name").or_else(|| text("/metadata/generateName")).unwrap_or("without a name");
    let of = namespace.as_ref().map_or(format!("{kind} {name}"), |space| format!("{kind} {space}/{name}"));
    found.push(Place { pointer: format!("{at}{template}"), of, namespace });
}

/// Replaces the pod at a place by what is made of it.
///
/// # Errors
///
/// Those of `make`. An object that has nothing at its place is left alone.
pub fn remake<E>(
    object: &mut Value,
    place: &Place,
    make: impl FnOnce(&Value) -> Result<Option<Value>, E>,
) -> Result<(), E> {
    if let Some(pod) = object.pointer_mut(&place.pointer)
        && let Some(made) = make(pod)?
    {
        *pod = made;
    }
    Ok(())
}
