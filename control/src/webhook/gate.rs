//! The gate of a pod of which the Deployment has a Canary: with it Kubernetes takes the pod for ready when the Canary lets it serve.
//!
//! In: a pod that is being made, and the Canaries in force. Out: what gives it the gate, if it is to have one. Pure. A Canary of which nothing is
//! decided yet holds nothing: what is there when it is made, serves.

use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use penstock_api::names::PROMOTED;
use serde_json::{Value, json};

use crate::canary::template::{course_of, made};
use crate::objects::{Body, Object};

/// Steps of a JSON Patch, none if it needs no gate.
pub(super) fn steps(pod: &Value, namespace: &str, canaries: &[Arc<Object>]) -> Vec<Value> {
    let metadata = serde_json::from_value::<ObjectMeta>(pod["metadata"].clone()).unwrap_or_default();
    let Some(made) = made(namespace, &metadata) else { return Vec::new() };
    let holds = |object: &Object| match &object.body {
        Body::Canary(canary) => {
            object.id.namespace == namespace && course_of(canary, made.deployment).is_some()
        }
        _ => false,
    };
    if !canaries.iter().any(|object| holds(object)) {
        return Vec::new();
    }
    let gate = json!({"conditionType": PROMOTED});
    match pod["spec"]["readinessGates"].as_array() {
        Some(gates) if gates.contains(&gate) => Vec::new(),
        Some(_) => vec![json!({"op": "add", "path": "/spec/readinessGates/-", "value": gate})],
        None => vec![json!({"op": "add", "path": "/spec/readinessGates", "value": [gate]})],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::decode;

    fn canaries(status: &str) -> Vec<Arc<Object>> {
        let text = format!(
            "apiVersion: penstock.io/v1alpha1\nkind: Canary\nmetadata: {{name: cart, namespace: shop}}\n\
             spec: {{service: cart, deployment: cart, steps: [{{weight: 5}}]}}\nstatus: {{{status}}}\n"
        );
        decode::file(&"shop.yaml".into(), &text).objects
    }

    fn pod(deployment: &str, gates: Value) -> Value {
        let name = format!("{deployment}-5d9c");
        let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": name, "uid": "u", "controller": true});
        json!({
            "metadata": {"labels": {"pod-template-hash": "5d9c"}, "ownerReferences": [owner]},
            "spec": {"containers": [{"name": "a"}], "readinessGates": gates},
        })
    }

    #[test]
    fn a_pod_gets_the_gate_once_and_keeps_those_that_it_has() {
        let canaries =
            canaries("course: {run: r, weight: 0, stable: cart-a.template, candidate: cart-a.template}");
        for (gates, after) in [
            (Value::Null, json!([{"conditionType": PROMOTED}])),
            (json!([]), json!([{"conditionType": PROMOTED}])),
            (json!([{"conditionType": "a"}]), json!([{"conditionType": "a"}, {"conditionType": PROMOTED}])),
        ] {
            let mut pod = pod("cart", gates);
            let steps_of = Value::from(steps(&pod, "shop", &canaries));
            let patch: json_patch::Patch = serde_json::from_value(steps_of).unwrap();
            json_patch::patch(&mut pod, &patch).unwrap();
            assert_eq!(pod["spec"]["readinessGates"], after);
            assert!(steps(&pod, "shop", &canaries).is_empty());
        }
    }

    #[test]
    fn a_pod_that_no_canary_is_about_gets_none() {
        let begun =
            canaries("course: {run: r, weight: 0, stable: cart-a.template, candidate: cart-a.template}");
        assert!(steps(&pod("till", Value::Null), "shop", &begun).is_empty());
        assert!(steps(&pod("cart", Value::Null), "other", &begun).is_empty());
        assert!(steps(&json!({"metadata": {"name": "cart"}, "spec": {}}), "shop", &begun).is_empty());
        assert!(steps(&pod("cart", Value::Null), "shop", &canaries("")).is_empty(), "nothing is decided yet");
    }
}
