//! From the text of a file to typed objects.
//!
//! In: text. Out: the objects of the kinds that the control plane reads; other kinds are ignored quietly. Can go
//! wrong: the text is no YAML, a document is no object, a field has the wrong type or is unknown. An unknown field is
//! an error as it is for `kubectl apply`: a `weigth: 10` that were ignored would send half of the traffic.

use std::sync::Arc;

use penstock_api::service::is_label;
use penstock_api::yaml::{self, Content, Node};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::pool;
use super::{Body, Broken, Object, ObjectId, ObjectKind, ObjectSet, Origin, Scope};

/// Reads all documents of a file.
pub fn file(file: &Arc<str>, text: &str) -> ObjectSet {
    let mut set = ObjectSet::default();
    match yaml::parse(text) {
        Ok(documents) => documents.into_iter().for_each(|document| read(file, document, &mut set)),
        Err(error) => set.broken.push(Broken {
            origin: Origin { file: file.clone(), line: error.line },
            scope: Scope::File,
            message: format!("this is not YAML: {error}; correct the file", error = error.message),
        }),
    }
    set
}

/// Reads one document, or the items of a list such as `kubectl get -o yaml` prints.
fn read(file: &Arc<str>, document: Node, set: &mut ObjectSet) {
    if document.get("kind").and_then(Node::text) == Some("List") {
        let Content::Map(entries) = document.content else { return };
        let items = entries.into_iter().find(|(key, _)| key == "items").map(|(_, node)| node.content);
        if let Some(Content::List(items)) = items {
            items.into_iter().for_each(|item| read(file, item, set));
        }
        return;
    }
    match object(file, document) {
        Ok(Some(object)) => set.objects.push(Arc::new(object)),
        Ok(None) => {}
        Err(broken) => set.broken.push(broken),
    }
}

fn object(file: &Arc<str>, document: Node) -> Result<Option<Object>, Broken> {
    let origin = Origin { file: file.clone(), line: document.line };
    let broken =
        |line, scope, message| Broken { origin: Origin { file: file.clone(), line }, scope, message };
    let field = |key: &str| {
        document.get(key).and_then(Node::text).ok_or_else(|| {
            let message = format!("this is no Kubernetes object: it has no {key}; write `{key}: …`");
            broken(document.line_of(&format!("/{key}")), Scope::File, message)
        })
    };
    let (kind, version) = (field("kind")?, field("apiVersion")?);
    let group = version.split_once('/').map_or("", |(group, _)| group);
    let kind = match (group, kind) {
        ("", "Service") => ObjectKind::Service,
        ("discovery.k8s.io", "EndpointSlice") => ObjectKind::EndpointSlice,
        ("", "Pod") => ObjectKind::Pod,
        (pool::GROUP, "InferencePool") => ObjectKind::InferencePool,
        ("gateway.networking.k8s.io", "HTTPRoute") => ObjectKind::HTTPRoute,
        ("gateway.networking.k8s.io", "GRPCRoute") => ObjectKind::GRPCRoute,
        ("gateway.networking.k8s.io", "ReferenceGrant") => ObjectKind::ReferenceGrant,
        ("penstock.io", "InferencePolicy") => ObjectKind::InferencePolicy,
        ("penstock.io", "AccessPolicy") => ObjectKind::AccessPolicy,
        ("penstock.io", "RateLimit") => ObjectKind::RateLimit,
        ("penstock.io", "Canary") => ObjectKind::Canary,
        ("penstock.io", unknown) => {
            let message = format!(
                "{unknown} is no kind of penstock.io; write InferencePolicy, AccessPolicy, RateLimit or Canary"
            );
            return Err(broken(document.line_of("/kind"), Scope::File, message));
        }
        _ => {
            tracing::debug!(%file, line = document.line, version, kind, "ignored: not a kind that is read");
            return Ok(None);
        }
    };
    let metadata = document.get("metadata");
    let text = |key: &str| metadata.and_then(|node| node.get(key)).and_then(Node::text);
    let Some(name) = text("name") else {
        let message = format!("this {kind:?} has no metadata.name; give it one");
        return Err(broken(document.line_of("/metadata/name"), Scope::File, message));
    };
    let namespace = text("namespace").unwrap_or("default");
    let id = ObjectId { kind, namespace: namespace.to_owned(), name: name.to_owned() };

    // A Service is found by its host name, so it is one label; the others may have dots.
    let named = if kind == ObjectKind::Service { is_label(name) } else { name.split('.').all(is_label) };
    if !named || !is_label(namespace) {
        let field = if named { "namespace" } else { "name" };
        let message = format!("metadata.{field} is not a DNS name: use a-z, 0-9 and inner hyphens");
        return Err(broken(document.line_of(&format!("/metadata/{field}")), Scope::Object(id), message));
    }
    let mut json = document.to_json();
    if kind == ObjectKind::Pod {
        quantities_to_text(&mut json);
    }
    let body = body(kind, &json).and_then(|body| match unknown_field(&document, &known(&body), "") {
        Some(pointer) => {
            Err((pointer, "there is no such field; is it misspelt, or in the wrong place?".to_owned()))
        }
        None => Ok(body),
    });
    match body {
        Ok(body) => Ok(Some(Object { origin, id, body, lines: Some(Arc::new(document)) })),
        Err((pointer, message)) => {
            let line = document.line_of(&pointer);
            let message = format!("{}: {message}", dotted(&pointer));
            Err(broken(line, Scope::Object(id), message))
        }
    }
}

/// Reads an object that the API server told. It has checked the fields against its own schema; those that are not known here belong
/// to a newer version of it, and are no mistake of anybody's.
pub fn of_api(origin: &Origin, id: &ObjectId, json: &Value) -> Result<Object, Broken> {
    match body(id.kind, json) {
        Ok(body) => Ok(Object { origin: origin.clone(), id: id.clone(), body, lines: None }),
        Err((pointer, message)) => Err(Broken {
            origin: origin.clone(),
            scope: Scope::Object(id.clone()),
            message: format!("{}: {message}", dotted(&pointer)),
        }),
    }
}

/// Reads an object of that kind. The error is the pointer of the field and what is wrong with it.
fn body(kind: ObjectKind, json: &Value) -> Result<Body, (String, String)> {
    Ok(match kind {
        ObjectKind::Service => Body::Service(typed(json)?),
        ObjectKind::EndpointSlice => Body::EndpointSlice(typed(json)?),
        ObjectKind::Pod => Body::Pod(typed(json)?),
        ObjectKind::InferencePool => Body::InferencePool(typed(json)?),
        ObjectKind::HTTPRoute => Body::HTTPRoute(typed(json)?),
        ObjectKind::GRPCRoute => Body::GRPCRoute(typed(json)?),
        ObjectKind::ReferenceGrant => Body::ReferenceGrant(typed(json)?),
        ObjectKind::InferencePolicy => Body::InferencePolicy(typed(json)?),
        ObjectKind::AccessPolicy => Body::AccessPolicy(typed(json)?),
        ObjectKind::RateLimit => Body::RateLimit(typed(json)?),
        ObjectKind::Canary => Body::Canary(typed(json)?),
    })
}

/// What the typed object knows of what was written.
fn known(body: &Body) -> Value {
    match body {
        Body::Service(object) => serde_json::to_value(object),
        Body::EndpointSlice(object) => serde_json::to_value(object),
        Body::Pod(object) => serde_json::to_value(object),
        Body::InferencePool(object) => serde_json::to_value(object),
        Body::HTTPRoute(object) => serde_json::to_value(object),
        Body::GRPCRoute(object) => serde_json::to_value(object),
        Body::ReferenceGrant(object) => serde_json::to_value(object),
        Body::InferencePolicy(object) => serde_json::to_value(object),
        Body::AccessPolicy(object) => serde_json::to_value(object),
        Body::RateLimit(object) => serde_json::to_value(object),
        Body::Canary(object) => serde_json::to_value(object),
    }
    .unwrap_or_default()
}

fn typed<T: DeserializeOwned>(json: &Value) -> Result<Box<T>, (String, String)> {
    serde_path_to_error::deserialize(json).map(Box::new).map_err(|error| {
        let mut pointer = String::new();
        for segment in error.path().iter() {
            if let serde_path_to_error::Segment::Seq { .. } | serde_path_to_error::Segment::Map { .. } =
                segment
            {
                let step = segment.to_string();
                let step = step.trim_start_matches('[').trim_end_matches(']');
                pointer.push('/');
                pointer.push_str(&step.replace('~', "~0").replace('/', "~1"));
            }
        }
        let said = error.inner().to_string();
        let is_word = said.contains("invalid type: boolean") && said.contains("expected a string");
        // YAML 1.1, which Kubernetes reads, has more spellings of booleans than two.
        let advice = if is_word {
            "YAML takes y, n, yes, no, on and off for booleans; quote it: \"y\""
        } else {
            "write what the API defines for this field"
        };
        (pointer, format!("{said}; {advice}"))
    })
}

/// The first field of the text that the typed object lost.
fn unknown_field(node: &Node, known: &Value, pointer: &str) -> Option<String> {
    match (&node.content, known) {
        (Content::Map(entries), Value::Object(known)) => entries.iter().find_map(|(key, node)| {
            let pointer = format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"));
            // What others write of an object is not the author's mistake.
            if pointer == "/status" || pointer == "/metadata/managedFields" {
                return None;
            }
            match known.get(key) {
                Some(known) => unknown_field(node, known, &pointer),
                None if node.content == Content::Scalar(Value::Null) => None,
                None => Some(pointer),
            }
        }),
        (Content::List(items), Value::Array(known)) => items
            .iter()
            .zip(known)
            .enumerate()
            .find_map(|(index, (node, known))| unknown_field(node, known, &format!("{pointer}/{index}"))),
        _ => None,
    }
}

/// Kubernetes takes `nvidia.com/gpu: 1` for the text "1"; the typed object knows only text.
fn quantities_to_text(value: &mut Value) {
    match value {
        Value::Object(entries) => {
            for (key, value) in entries {
                match value {
                    Value::Object(amounts) if key == "limits" || key == "requests" => {
                        for amount in amounts.values_mut().filter(|amount| amount.is_number()) {
                            *amount = Value::String(amount.to_string());
                        }
                    }
                    _ => quantities_to_text(value),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(quantities_to_text),
        _ => {}
    }
}

/// `/spec/ports/0/port` as people write it: `spec.ports[0].port`.
pub fn dotted(pointer: &str) -> String {
    let mut text = String::new();
    for step in pointer.split('/').skip(1) {
        match step.parse::<usize>() {
            Ok(index) => text.push_str(&format!("[{index}]")),
            Err(_) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(&step.replace("~1", "/").replace("~0", "~"));
            }
        }
    }
    if text.is_empty() { "the object".to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> ObjectSet {
        file(&"x.yaml".into(), text)
    }

    #[test]
    fn objects_are_read_and_other_kinds_ignored() {
        let set = read(
            "\
apiVersion: v1
kind: ConfigMap
metadata: {name: x}
---
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: x}
---
apiVersion: v1
kind: Pod
metadata: {name: resnet-1, namespace: team-a, creationTimestamp: null}
spec:
  containers:
    - name: server
      resources: {limits: {nvidia.com/gpu: 1, memory: 2Gi}}
---
apiVersion: v1
kind: List
items:
  - apiVersion: v1
    kind: Service
    metadata: {name: resnet}
",
        );
        assert_eq!(set.broken, []);
        let ids: Vec<_> = set.objects.iter().map(|o| (o.id.to_string(), o.origin.line)).collect();
        assert_eq!(ids, [("Pod team-a/resnet-1".to_owned(), 9), ("Service default/resnet".to_owned(), 20)]);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let route = |rest: &str| {
            format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata:\n  name: canary\nspec:\n{rest}"
            )
        };
        let table = [
            ("a: [", 0, "this is not YAML"),
            ("kind: Service\nmetadata: {name: x}\n", 1, "no apiVersion"),
            ("apiVersion: v1\nkind: Service\nmetadata:\n  labels: {}\n", 3, "no metadata.name"),
            ("apiVersion: v1\nkind: Service\nmetadata:\n  name: A_b\n", 4, "not a DNS name"),
            (
                "apiVersion: v1\nkind: Service\nmetadata:\n  name: x\nspec:\n  ports:\n    - name: http\n      port: many\n",
                8,
                "spec.ports[0].port: invalid type",
            ),
            (
                "apiVersion: v1\nkind: Pod\nmetadata:\n  name: x\n  annotations:\n    penstock.io/inbound-port: 15006\n",
                6,
                "expected a string",
            ),
            (
                &route("  rules:\n    - backendRefs:\n        - name: v1\n          weigth: 10\n"),
                9,
                "spec.rules[0].backendRefs[0].weigth: there is no such field",
            ),
            (
                &route("  rules:\n    - matches:\n        - method: FETCH\n"),
                8,
                "spec.rules[0].matches[0].method: unknown variant `FETCH`",
            ),
        ];
        for (text, line, words) in table {
            let set = read(text);
            let [broken] = &set.broken[..] else { panic!("{text}: {set:?}") };
            assert!(broken.message.contains(words), "{text}: {broken:?}");
            assert!(line == 0 || broken.origin.line == line, "{text}: {broken:?}");
        }
    }

    #[test]
    fn a_broken_object_does_not_take_its_neighbours_with_it() {
        let set = read(
            "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: 7\n---\napiVersion: v1\nkind: Service\nmetadata: {name: b}\n",
        );
        assert_eq!((set.objects.len(), set.broken.len()), (1, 1));
        assert!(matches!(&set.broken[0].scope, Scope::Object(id) if id.name == "a"));
    }
}
