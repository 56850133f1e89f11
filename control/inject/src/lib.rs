//! Puts the sidecar into pods.
//!
//! In: a pod as JSON, what its namespace says, [`Settings`]. Out: an [`Outcome`]: the injected pod and the RFC 6902 patch that
//! makes it of the given one, or why it stays as it is. Can go wrong: an annotation that makes no sense, or a pod in which a
//! proxy could not work or would protect nobody ([`Error`]). Touches nothing: no cluster, no clock.
//!
//! Pods are JSON here and no typed objects, so that fields of a newer Kubernetes pass as they are. What is changed is little
//! and has a name, so that [`uninject`] finds it again; what has none is noted in `penstock.io/injected-changes`.

mod annotations;
mod build;
mod gpu;
mod json;
mod undo;
mod workload;

use penstock_api::annotation::Invalid;
use penstock_api::names::{DEFAULT_TRUST_DOMAIN, INJECTED_LABEL, PROXY_UID, annotation, port};
use serde_json::Value;

pub use annotations::asked;
pub use undo::uninject;
pub use workload::{Place, pods, remake};

/// The container that lays the rules.
pub const INIT: &str = "penstock-init";
/// The sidecar.
pub const PROXY: &str = "penstock-proxy";
/// The volume with token and trust anchors.
pub const IDENTITY: &str = "penstock-identity";
/// The volume that sidecar and model server share, where the pod has none of its own at /dev/shm.
pub const SHM: &str = "penstock-shm";

/// What injected pods have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The proxy's image, with its tag or digest.
    pub image: String,
    /// What is written as `penstock.io/injected-by`. A pod that another version injected is injected anew.
    pub version: String,
    /// Where proxies find control, `HOST:PORT`.
    pub control: String,
    /// The mesh's trust domain.
    pub trust_domain: String,
    /// The audience of the projected token.
    pub audience: String,
    /// Life of the projected token; the kubelet renews it at four fifths.
    pub token_seconds: u64,
    /// The ConfigMap with `anchors.pem`.
    pub anchors: String,
    /// `--drain-timeout` of the proxy. The pod's grace period grows by it and [`SPARE_SECONDS`].
    pub drain_seconds: u64,
    /// CPU that is asked for, unless `penstock.io/proxy-cpu` says otherwise. No limit: a throttled proxy is latency.
    pub cpu: String,
    /// Memory that is asked for, unless `penstock.io/proxy-memory` says otherwise.
    pub memory: String,
    /// The limit of memory, unless `penstock.io/proxy-memory` says otherwise. It counts the arena (128Mi) too.
    pub memory_limit: String,
    /// `sizeLimit` of the memory shared with a model server.
    pub shm: String,
}

/// What the grace period grows by besides the drain: the proxy's last words and the kubelet's own time.
pub const SPARE_SECONDS: u64 = 5;

impl Default for Settings {
    fn default() -> Self {
        let version = env!("CARGO_PKG_VERSION");
        Self {
            image: format!("penstock.io/proxy:{version}"),
            version: version.to_owned(),
            control: format!("penstock-control.penstock-system.svc:{}", port::CONTROL),
            trust_domain: DEFAULT_TRUST_DOMAIN.to_owned(),
            audience: "penstock.io".to_owned(),
            token_seconds: 3600,
            anchors: "penstock-anchors".to_owned(),
            drain_seconds: 30,
            cpu: "100m".to_owned(),
            memory: "128Mi".to_owned(),
            memory_limit: "1Gi".to_owned(),
            shm: "1Gi".to_owned(),
        }
    }
}

/// What a pod's namespace says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// Its label `penstock.io/inject`, as it is written.
    pub inject: Option<String>,
    /// Its label `pod-security.kubernetes.io/enforce`, as it is written.
    pub enforce: Option<String>,
}

/// What became of a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// It has a sidecar now.
    Injected(Injected),
    /// It stays as it is.
    Not(Because),
}

/// A pod that has a sidecar now.
#[derive(Clone, Debug, PartialEq)]
pub struct Injected {
    /// The pod.
    pub pod: Value,
    /// What makes it of the given one.
    pub patch: json_patch::Patch,
    /// What its author should know.
    pub warnings: Vec<String>,
}

/// Why a pod stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Because {
    /// Neither the pod nor its namespace asks.
    #[error("neither the pod nor its namespace says penstock.io/inject: enabled")]
    NotAsked,
    /// The pod says no.
    #[error("the pod says penstock.io/inject: disabled")]
    Disabled,
    /// The namespace says no, and the pod nothing.
    #[error("the namespace says penstock.io/inject: disabled")]
    NamespaceDisabled,
    /// It shares the node's network.
    #[error(
        "it has hostNetwork: the rules would redirect the node's own connections; run it without hostNetwork, or say \
         penstock.io/inject: disabled"
    )]
    HostNetwork,
    /// It runs on Windows.
    #[error("it runs on Windows, where there is no nf_tables and no Penstock")]
    Windows,
    /// This version has injected it.
    #[error("this version has injected it already")]
    Already,
    /// Somebody wrote the sidecar by hand.
    #[error("it has a container penstock-proxy or penstock-init that was written by hand")]
    ByHand,
}

/// Why a pod cannot be injected, though it is to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// An annotation or label of ours that makes no sense.
    #[error(transparent)]
    Annotation(#[from] Invalid),
    /// A field is not what Kubernetes says it is.
    #[error("{field}: {why}")]
    Field {
        /// Its path, `spec.containers[0].ports`.
        field: String,
        /// What is wrong and what to do.
        why: String,
    },
    /// Pod security would refuse the injected pod.
    #[error(
        "the namespace enforces pod security {0:?}, which forbids the capability NET_ADMIN of {INIT}: label it \
         pod-security.kubernetes.io/enforce: privileged, or the pod penstock.io/inject: disabled"
    )]
    PodSecurity(String),
}

impl Error {
    fn field(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Field { field: field.into(), why: why.into() }
    }
}

/// Injects a pod, or says why it stays as it is.
///
/// # Errors
///
/// The pod is to be injected and cannot be.
pub fn inject(pod: &Value, namespace: &Namespace, settings: &Settings) -> Result<Outcome, Error> {
    if !pod.is_object() {
        return Err(Error::field("", "a pod is a mapping"));
    }
    if let Some(because) = annotations::asked(pod, namespace)? {
        return Ok(Outcome::Not(because));
    }
    if pod.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)) {
        return Ok(Outcome::Not(Because::HostNetwork));
    }
    let windows = |pointer: &str| pod.pointer(pointer).and_then(Value::as_str) == Some("windows");
    if windows("/spec/os/name") || windows("/spec/nodeSelector/kubernetes.io~1os") {
        return Ok(Outcome::Not(Because::Windows));
    }
    let ours = json::label(pod, INJECTED_LABEL) == Some("true");
    let by = json::annotation(pod, annotation::INJECTED_BY);
    let there = json::containers(pod).any(|(_, one)| [Some(INIT), Some(PROXY)].contains(&json::name(one)));
    let mut made = match (there, ours && by.is_some()) {
        (true, false) => return Ok(Outcome::Not(Because::ByHand)),
        (true, true) if by == Some(settings.version.as_str()) => return Ok(Outcome::Not(Because::Already)),
        // Another version's, or what is left where somebody took the containers out: begin with the pod as it was.
        (_, true) => uninject(pod).unwrap_or_else(|| pod.clone()),
        (false, false) => pod.clone(),
    };
    if let Some(level) = &namespace.enforce
        && level != "privileged"
    {
        return Err(Error::PodSecurity(level.clone()));
    }
    free(&made)?;
    let options = annotations::read(&made)?;
    let warnings = build::add(&mut made, &options, settings)?;
    let patch = json_patch::diff(pod, &made);
    Ok(Outcome::Injected(Injected { pod: made, patch, warnings }))
}

/// Nobody else is the proxy's user or has its ports.
fn free(pod: &Value) -> Result<(), Error> {
    let user = u64::from(PROXY_UID);
    let whole = pod.pointer("/spec/securityContext/runAsUser").and_then(Value::as_u64);
    let mut any = false;
    for (field, container) in json::containers(pod) {
        any = true;
        let own = container.pointer("/securityContext/runAsUser").and_then(Value::as_u64);
        if own.or(whole) == Some(user) {
            return Err(Error::field(
                field,
                format!(
                    "it runs as user {user}, whose connections the rules let pass without mTLS: give it another runAsUser"
                ),
            ));
        }
        for taken in container.get("ports").and_then(Value::as_array).into_iter().flatten() {
            let number = taken.get("containerPort").and_then(Value::as_u64);
            if let Some(number) = number
                && (u64::from(port::ADMIN)..=u64::from(port::HEALTH)).contains(&number)
            {
                return Err(Error::field(
                    format!("{field}.ports"),
                    format!(
                        "port {number} is among {} to {}, which are the sidecar's",
                        port::ADMIN,
                        port::HEALTH
                    ),
                ));
            }
        }
    }
    if any { Ok(()) } else { Err(Error::field("spec.containers", "there is no container")) }
}
