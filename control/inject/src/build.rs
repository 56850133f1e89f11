//! Writes the sidecar into a pod. The shape is that of `manifests/examples/sidecar/pod.yaml`, where each line is argued.

use penstock_api::names::{DEFAULT_TRUST_DOMAIN, INJECTED_LABEL, PROXY_UID, annotation, port};
use serde_json::{Value, json};

use crate::annotations::Options;
use crate::json::{list, map, name};
use crate::undo::Changes;
use crate::{Error, IDENTITY, INIT, PROXY, SPARE_SECONDS, Settings, gpu, json as way};

/// Where token and anchors are mounted.
const SECRETS: &str = "/var/run/secrets/penstock";
/// How long Kubernetes waits for a pod that says nothing.
const GRACE_SECONDS: u64 = 30;

/// Adds all of it and returns what the pod's author should know.
pub(crate) fn add(pod: &mut Value, options: &Options, settings: &Settings) -> Result<Vec<String>, Error> {
    let share = gpu::share(pod, options.gpu);
    let mut changes = Changes::default();
    let account = ["serviceAccountName", "serviceAccount"];
    let account = account
        .into_iter()
        .find_map(|key| pod.get("spec")?.get(key)?.as_str().filter(|name| !name.is_empty()));
    let account = account.unwrap_or("default").to_owned();
    let marked = way::annotation(pod, annotation::INJECT).is_some();
    let spec = map(pod, &["spec"])?;

    // The pod's own time, then the proxy's, which ends after all others. Zero means at once, and stays.
    let grace = spec.get("terminationGracePeriodSeconds").and_then(Value::as_u64);
    if grace != Some(0) {
        let longer = grace.unwrap_or(GRACE_SECONDS) + settings.drain_seconds + SPARE_SECONDS;
        spec.insert("terminationGracePeriodSeconds".into(), longer.into());
        changes.grace = Some(grace);
    }
    for volume in list(spec, "volumes")?.iter() {
        if name(volume) == Some(IDENTITY) {
            return Err(Error::field(
                "spec.volumes",
                format!("{IDENTITY} is there already; the name is the sidecar's"),
            ));
        }
    }
    let volumes = list(spec, "volumes")?;
    volumes.push(identity(settings));
    if let Some(server) = share.make_for {
        volumes.push(gpu::volume(settings));
        if let Some(server) = list(spec, "containers")?.get_mut(server).and_then(Value::as_object_mut) {
            list(server, "volumeMounts")?.push(json!({"name": crate::SHM, "mountPath": "/dev/shm"}));
        }
    }
    if share.volume.is_some() {
        // The arena's files are of the proxy's group. fsGroup would do too, and have the kubelet change the group of every
        // file of a volume of models.
        let pod_wide = spec.entry("securityContext").or_insert(Value::Null);
        if pod_wide.is_null() {
            *pod_wide = json!({});
        }
        let wrong = || Error::field("spec.securityContext", "this is to be a mapping");
        let groups = list(pod_wide.as_object_mut().ok_or_else(wrong)?, "supplementalGroups")?;
        if !groups.contains(&PROXY_UID.into()) {
            groups.push(PROXY_UID.into());
            changes.group = true;
        }
    }
    if !share.claims.is_empty() && spec.get("shareProcessNamespace").is_none_or(Value::is_null) {
        spec.insert("shareProcessNamespace".into(), true.into());
        changes.processes = true;
    }
    // First, so that what downloads models has rules and a proxy that is ready.
    let first = [init(options, settings), proxy(options, settings, &account, &share)];
    list(spec, "initContainers")?.splice(0..0, first);

    map(pod, &["metadata", "labels"])?.insert(INJECTED_LABEL.into(), "true".into());
    let annotations = map(pod, &["metadata", "annotations"])?;
    annotations.insert(annotation::INJECTED_BY.into(), settings.version.as_str().into());
    if !marked {
        annotations.insert(annotation::INJECT.into(), "enabled".into());
        changes.marked = true;
    }
    annotations.insert(annotation::INJECTED_CHANGES.into(), changes.to_string().into());
    Ok(share.warnings)
}

fn identity(settings: &Settings) -> Value {
    // No fsGroup and no mode: the kubelet makes the token readable to all where containers have several users, and none but
    // the proxy mounts it.
    json!({"name": IDENTITY, "projected": {"sources": [
        {"serviceAccountToken": {
            "audience": settings.audience, "expirationSeconds": settings.token_seconds, "path": "token",
        }},
        {"configMap": {"name": settings.anchors, "items": [{"key": "anchors.pem", "path": "anchors.pem"}]}},
    ]}})
}

fn init(options: &Options, settings: &Settings) -> Value {
    let mut container = json!({
        "name": INIT,
        "image": settings.image,
        "command": ["penstock-proxy", "init"],
        // Root, since the added capability of another user is not in force; and said against a pod-wide runAsNonRoot.
        "securityContext": {
            "runAsUser": 0,
            "runAsGroup": 0,
            "runAsNonRoot": false,
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"], "add": ["NET_ADMIN"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "resources": {
            "requests": {"cpu": "10m", "memory": "16Mi"},
            "limits": {"memory": "64Mi"},
        },
    });
    if !options.init.is_empty() {
        container["args"] = json!(options.init);
    }
    container
}

fn proxy(options: &Options, settings: &Settings, account: &str, share: &gpu::Share) -> Value {
    let ready = json!({"port": port::HEALTH, "path": "/ready"});
    let mut args = vec![
        "--redirected".to_owned(),
        format!("--control={}", settings.control),
        format!("--control-ca={SECRETS}/anchors.pem"),
        format!("--token={SECRETS}/token"),
        format!("--service-account={account}"),
        format!("--health=0.0.0.0:{}", port::HEALTH),
        format!("--drain-timeout={}s", settings.drain_seconds),
    ];
    if settings.trust_domain != DEFAULT_TRUST_DOMAIN {
        args.push(format!("--trust-domain={}", settings.trust_domain));
    }
    let field =
        |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let mut mounts = vec![json!({"name": IDENTITY, "mountPath": SECRETS, "readOnly": true})];
    if let Some(volume) = &share.volume {
        mounts.push(json!({"name": volume, "mountPath": "/dev/shm"}));
    }
    let memory = |default: &String| options.memory.as_ref().unwrap_or(default).clone();
    let mut resources = json!({
        "requests": {"cpu": options.cpu.as_ref().unwrap_or(&settings.cpu), "memory": memory(&settings.memory)},
        "limits": {"memory": memory(&settings.memory_limit)},
    });
    if !share.claims.is_empty() {
        resources["claims"] = json!(share.claims);
    }
    json!({
        "name": PROXY,
        "image": settings.image,
        "restartPolicy": "Always",
        "command": ["penstock-proxy", "run"],
        "args": args,
        "env": [
            field("POD_NAMESPACE", "metadata.namespace"),
            field("POD_NAME", "metadata.name"),
            {"name": "PENSTOCK_NODE", "value": "$(POD_NAMESPACE)/$(POD_NAME)"},
        ],
        "securityContext": {
            "runAsUser": PROXY_UID,
            "runAsGroup": PROXY_UID,
            "runAsNonRoot": true,
            "privileged": false,
            "allowPrivilegeEscalation": false,
            "readOnlyRootFilesystem": true,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "startupProbe": {"httpGet": ready, "periodSeconds": 1, "failureThreshold": 60},
        "readinessProbe": {"httpGet": ready, "periodSeconds": 5},
        "lifecycle": {"preStop": {"exec": {"command": ["penstock-proxy", "drain"]}}},
        "resources": resources,
        "volumeMounts": mounts,
    })
}
