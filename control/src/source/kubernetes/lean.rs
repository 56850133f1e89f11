//! What is kept of an object. Of ten thousand pods most of the bytes are volumes, environment, and who wrote which field.

use serde_json::{Map, Value};

use crate::objects::ObjectKind;

/// Of metadata: nobody here reads them, and the version changes with every heartbeat that writes a status.
const METADATA: [&str; 3] = ["managedFields", "resourceVersion", "selfLink"];
/// Copies of the object in itself, by those who applied it.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";
/// Of a pod's status what says whether it runs, and where.
const STATUS: [&str; 4] = ["conditions", "phase", "podIP", "podIPs"];
/// The one condition that is used: whether it is ready, for pools; those of Services are in slices.
const READY: &str = "Ready";
/// Of a pod's specification.
const SPEC: [&str; 5] = ["containers", "hostNetwork", "initContainers", "nodeName", "serviceAccountName"];
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
    if kind != ObjectKind::Pod {
        // What others say of a route or a Service is nothing that it is compiled from.
        object.remove("status");
        return;
    }
    if let Some(status) = inner(object, "status") {
        status.retain(|key, _| STATUS.contains(&key.as_str()));
        if let Some(conditions) = status.get_mut("conditions").and_then(Value::as_array_mut) {
            conditions.retain(|condition| condition["type"] == READY);
            // When it was asked, and how it said so, changes more often than what it said.
            for condition in conditions.iter_mut().filter_map(Value::as_object_mut) {
                condition.retain(|key, _| matches!(key.as_str(), "type" | "status"));
            }
        }
    }
    if let Some(spec) = inner(object, "spec") {
        spec.retain(|key, _| SPEC.contains(&key.as_str()));
        for list in ["containers", "initContainers"] {
            for container in spec.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(container) = container.as_object_mut() {
                    container.retain(|key, _| CONTAINER.contains(&key.as_str()));
                }
            }
        }
    }
}

fn inner<'a>(object: &'a mut Map<String, Value>, key: &str) -> Option<&'a mut Map<String, Value>> {
    object.get_mut(key)?.as_object_mut()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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
            },
            "status": {
                "phase": "Running", "podIP": "10.0.0.7",
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        });
        assert_eq!(pod, kept);
    }
}
