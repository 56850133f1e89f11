//! Small ways into a pod that is JSON.

use serde_json::{Map, Value};

use crate::Error;

/// All containers that run by themselves, each with its path.
pub(crate) fn containers(pod: &Value) -> impl Iterator<Item = (String, &Value)> {
    ["initContainers", "containers"].into_iter().flat_map(move |kind| {
        let list = pod.get("spec").and_then(|spec| spec.get(kind)).and_then(Value::as_array);
        list.into_iter().flatten().enumerate().map(move |(at, one)| (format!("spec.{kind}[{at}]"), one))
    })
}

pub(crate) fn name(value: &Value) -> Option<&str> {
    value.get("name")?.as_str()
}

pub(crate) fn annotation<'a>(pod: &'a Value, key: &str) -> Option<&'a str> {
    pod.get("metadata")?.get("annotations")?.get(key)?.as_str()
}

pub(crate) fn label<'a>(pod: &'a Value, key: &str) -> Option<&'a str> {
    pod.get("metadata")?.get("labels")?.get(key)?.as_str()
}

/// The mapping at a path, made where there is none.
pub(crate) fn map<'a>(root: &'a mut Value, path: &[&str]) -> Result<&'a mut Map<String, Value>, Error> {
    let mut at = root;
    for key in path {
        let wrong = || Error::field(path.join("."), "this is to be a mapping");
        at = at.as_object_mut().ok_or_else(wrong)?.entry(*key).or_insert(Value::Null);
        if at.is_null() {
            *at = Value::Object(Map::new());
        }
    }
    at.as_object_mut().ok_or_else(|| Error::field(path.join("."), "this is to be a mapping"))
}

/// The list under a key of a mapping, made where there is none.
pub(crate) fn list<'a>(map: &'a mut Map<String, Value>, key: &str) -> Result<&'a mut Vec<Value>, Error> {
    let at = map.entry(key).or_insert(Value::Null);
    if at.is_null() {
        *at = Value::Array(Vec::new());
    }
    at.as_array_mut().ok_or_else(|| Error::field(key, "this is to be a list"))
}
