//! What is kept of an object. Of ten thousand pods most of the bytes are volumes, environment, and who wrote which field.

use penstock_inject::PROXY;
use serde_json::{Map, Value, json};

use crate::objects::ObjectKind;

/// Of metadata: nobody here reads them, and the version changes with every heartbeat that writes a status.
const METADATA: [&str; 3] = ["managedFields", "resourceVersion", "selfLink"];
/// Copies of the object in itself, by those who applied it.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Of a pod's status what says whether it runs, and where.
const STATUS: [&str; 4] = ["conditions", "phase", "podIP", "podIPs"];
/// Of a pod's specification.
const SPEC: [&str; 6] =
    ["containers", "hostNetwork", "initContainers", "nodeName", "readinessGates", "serviceAccountName"];
/// Of a container what the mesh has to do with: ports, and what the kubelet asks.
const CONTAINER: [&str; 7] =
    ["lifecycle", "livenessProbe", "name", "ports", "readinessProbe", "restartPolicy", "startupProbe"];

/// Leaves out what is not used.
pub(super) fn lean(kind: ObjectKind, object: &mut Value) {
    let Some(object) = object.as_object_mut() else { return };
    if let Some(metadata) = inner(object, "metadata") {
        metadata.retain(|key, _| !METADATA.contains(&key.as_str()));
        if let Some(annotations) = inner(metadata, "annotations") {
            annotations.remove(LAST_APPLIED);
        }
    }
    match kind {
        ObjectKind::Pod => {}
        // Where requests go, and none of the numbers beside it.
        ObjectKind::Canary => {
            if let Some(status) = inner(object, "status") {
                status.retain(|key, _| key == "course");
            }
            return;
        }
        // What others say of a route or a Service is nothing that it is compiled from.
        _ => {
            object.remove("status");
            return;
        }
    }
    let gates = object.get("spec").and_then(|spec| spec.get("readinessGates")).cloned().unwrap_or_default();
    if let Some(status) = inner(object, "status") {
        let said = status.remove("conditions");
        status.retain(|key, _| STATUS.contains(&key.as_str()));
        if let Some(said) = said {
            status.insert("conditions".to_owned(), telling(&said, &gates));
        }
    }
    if let Some(spec) = inner(object, "spec") {
        spec.retain(|key, _| SPEC.contains(&key.as_str()));
        // Typed, a container takes two thousand bytes whatever is in it, and an injected pod has three or four.
        if let Some(init) = spec.get_mut("initContainers").and_then(Value::as_array_mut) {
            init.retain(tells);
        }
        for list in ["containers", "initContainers"] {
            for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(container) = container.as_object_mut() {
                    container.retain(|key, _| CONTAINER.contains(&key.as_str()));
                }
            }
        }
    }
}

/// Whether the mesh has to do with an init container: it has ports, is asked by the kubelet, or is a sidecar of ours.
fn tells(container: &Value) -> bool {
    let asked = ["lifecycle", "livenessProbe", "ports", "readinessProbe", "startupProbe"];
    asked.iter().any(|key| container.get(key).is_some()) || container.get("name") == Some(&PROXY.into())
}

/// Of a pod's conditions, whether it is ready; where it is not though all of its containers are, that, and why; and those of its gates. When it was asked, and how
/// it said so, changes more often than what it said.
fn telling(conditions: &Value, gates: &Value) -> Value {
    let of = |kind: &str| conditions.as_array().and_then(|all| all.iter().find(|one| one["type"] == kind));
    let short = |one: &Value| json!({"type": one["type"], "status": one["status"]});
    let whole = |one: &Value| json!({"type": one["type"], "status": one["status"], "reason": one["reason"]});
    let mut kept: Vec<Value> = match (of("Ready"), of("ContainersReady")) {
        (Some(pod), Some(containers)) if pod["status"] == "False" && containers["status"] == "True" => {
            vec![whole(pod), whole(containers)]
        }
        (Some(pod), _) => vec![short(pod)],
        (None, _) => Vec::new(),
    };
    let gates = gates.as_array().into_iter().flatten().filter_map(|gate| gate["conditionType"].as_str());
    kept.extend(gates.filter_map(|kind| of(kind).map(short)));
    kept.into()
}

fn inner<'a>(object: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Map<String, Value>> {
    object.get_mut(key)?.as_object_mut()
}

#[cfg(test)]
mod tests {
    use penstock_api::names::PROMOTED;

    use super::*;

    #[test]
    fn a_pod_keeps_what_the_mesh_asks_of_it() {
        let mut pod = json!({
            "metadata": {
                "name": "resnet-0", "resourceVersion": "7", "managedFields": [{"manager": "kubectl"}],
                "annotations": {LAST_APPLIED: "{}", "penstock.io/mtls": "permissive"},
            },
            "spec": {
                "volumes": [{"name": "models"}], "nodeName": "node-1", "tolerations": [],
                "containers": [{
                    "name": "server", "image": "triton", "env": [{"name": "A", "value": "b"}],
                    "ports": [{"containerPort": 8000}],
                }],
                "initContainers": [
                    {"name": "storage-initializer", "image": "kserve"}, {"name": "penstock-proxy", "image": "proxy"},
                    {"name": "asked", "image": "a", "startupProbe": {"exec": {}}},
                ],
            },
            "status": {"phase": "Running", "podIP": "10.0.0.7", "conditions": [
                {"type": "Ready", "status": "True", "lastProbeTime": null}, {"type": "Initialized"},
            ]},
        });
        lean(ObjectKind::Pod, &mut pod);
        let kept = json!({
            "metadata": {"name": "resnet-0", "annotations": {"penstock.io/mtls": "permissive"}},
            "spec": {
                "nodeName": "node-1",
                "containers": [{"name": "server", "ports": [{"containerPort": 8000}]}],
                "initContainers": [{"name": "penstock-proxy"}, {"name": "asked", "startupProbe": {"exec": {}}}],
            },
            "status": {
                "phase": "Running", "podIP": "10.0.0.7",
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        assert_eq!(pod, kept);
    }

    #[test]
    fn of_conditions_those_are_kept_that_contradict_each_other() {
        let kept = |ready: &str, containers: &str| {
            let mut pod = json!({"status": {"conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:00Z"},
                {"type": "ContainersReady", "status": containers},
            ]}});
            lean(ObjectKind::Pod, &mut pod);
            pod["status"]["conditions"].as_array().map_or(0, Vec::len)
        };
        assert_eq!([kept("True", "True"), kept("False", "False"), kept("False", "True")], [1, 1, 2]);
    }

    #[test]
    fn a_gate_and_what_it_says_are_kept() {
        let gate = json!({"type": PROMOTED, "status": "False"});
        let mut pod = json!({
            "spec": {"readinessGates": [{"conditionType": PROMOTED}], "volumes": []},
            "status": {"conditions": [{"type": "Initialized", "status": "True"}, gate]},
        });
        lean(ObjectKind::Pod, &mut pod);
        let kept = json!({
            "spec": {"readinessGates": [{"conditionType": PROMOTED}]}, "status": {"conditions": [gate]},
        });
        assert_eq!(pod, kept);
    }
}
