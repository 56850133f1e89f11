//! A pod with a GPU: memory that sidecar and model server share, and, where the pod asks for it, the GPU itself.
//!
//! Which container is the model server is told by who asks for a GPU, or is the default container, or the first.

use serde_json::{Value, json};

use crate::{SHM, Settings, json as way};

/// What the sidecar gets of the pod's GPU and memory.
#[derive(Debug, Default)]
pub(crate) struct Share {
    /// The volume at /dev/shm.
    pub(crate) volume: Option<String>,
    /// It is ours, so it has to be made and mounted into this container of `spec.containers`.
    pub(crate) make_for: Option<usize>,
    /// Resource claims.
    pub(crate) claims: Vec<Value>,
    pub(crate) warnings: Vec<String>,
}

pub(crate) fn share(pod: &Value, asked: bool) -> Share {
    let mut share = Share::default();
    let containers = pod.pointer("/spec/containers").and_then(Value::as_array);
    let containers: &[Value] = containers.map_or(&[], Vec::as_slice);
    let default = way::annotation(pod, "kubectl.kubernetes.io/default-container");
    let server = containers.iter().position(has_gpu).or_else(|| {
        asked.then(|| {
            containers.iter().position(|one| default.is_some() && way::name(one) == default).unwrap_or(0)
        })
    });
    let Some(at) = server else { return share };
    let Some(server) = containers.get(at) else { return share };
    let name = way::name(server).unwrap_or("the first container");

    let mut mounts = server.get("volumeMounts").and_then(Value::as_array).into_iter().flatten();
    match mounts.find(|mount| {
        mount
            .get("mountPath")
            .and_then(Value::as_str)
            .is_some_and(|path| path.trim_end_matches('/') == "/dev/shm")
    }) {
        None => {
            share.volume = Some(SHM.to_owned());
            share.make_for = Some(at);
        }
        Some(mount) => {
            let volumes = pod.pointer("/spec/volumes").and_then(Value::as_array).into_iter().flatten();
            let volume = volumes
                .into_iter()
                .find(|volume| way::name(volume).is_some() && way::name(volume) == way::name(mount));
            let memory =
                volume.and_then(|volume| volume.pointer("/emptyDir/medium")?.as_str()) == Some("Memory");
            if memory && mount.get("subPath").is_none() {
                share.volume = way::name(mount).map(str::to_owned);
            } else {
                share.warnings.push(format!(
                    "{name} mounts something else than a whole emptyDir of medium Memory at /dev/shm, so tensors are not handed over \
                     in shared memory"
                ));
            }
        }
    }
    if asked {
        let claims = server.pointer("/resources/claims").and_then(Value::as_array);
        share.claims = claims.cloned().unwrap_or_default();
        if share.claims.is_empty() {
            share.warnings.push(format!(
                "penstock.io/gpu needs the same GPU in both containers, and {name} names no resource claim (two requests for \
                 nvidia.com/gpu are two GPUs), so tensors go through shared memory"
            ));
        }
        if !share.claims.is_empty() && pod.pointer("/spec/shareProcessNamespace") == Some(&json!(false)) {
            share
                .warnings
                .push("penstock.io/gpu needs shareProcessNamespace, which the pod refuses".to_owned());
        }
    }
    share
}

/// Claims count as GPUs: what is behind one cannot be seen from the pod, and memory is shared for nothing at worst.
fn has_gpu(container: &Value) -> bool {
    let lists = ["limits", "requests"]
        .map(|list| container.pointer(&format!("/resources/{list}")).and_then(Value::as_object));
    let gpu = |name: &String| {
        name.ends_with("/gpu") || name.starts_with("nvidia.com/mig-") || name == "nvidia.com/gpu.shared"
    };
    let zero = |count: &Value| count.as_u64() == Some(0) || count.as_str() == Some("0");
    let claims = container
        .pointer("/resources/claims")
        .and_then(Value::as_array)
        .is_some_and(|claims| !claims.is_empty());
    claims || lists.into_iter().flatten().flatten().any(|(name, count)| gpu(name) && !zero(count))
}

/// The volume of ours.
pub(crate) fn volume(settings: &Settings) -> Value {
    json!({"name": SHM, "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}})
}
