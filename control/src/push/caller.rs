//! Who may open a stream, and under which node id.

use penstock_api::resource::Kind;
use penstock_api::{SpiffeId, v1};
use prost::Message as _;
use tonic::{Extensions, Status};

use crate::identity::tls::Peer;
use crate::snapshot::Snapshot;

/// The longest name of a pod.
const MAX_POD: usize = 253;

/// The identity that the connection proved.
pub fn identity(extensions: &Extensions) -> Result<SpiffeId, Status> {
    let peer = extensions.get::<Peer>();
    peer.and_then(|peer| peer.identity.clone()).ok_or_else(|| {
        Status::unauthenticated(
            "configuration needs a client certificate of the mesh; get one from penstock.v1.Identity/Sign with a bearer token",
        )
    })
}

/// Whether `identity` may be the node `<namespace>/<pod>` of `snapshot`: a certificate says which namespace and account a proxy
/// belongs to, and which of the account's pods it is, is its own word.
#[allow(clippy::result_large_err, reason = "tonic's own error, made once a stream")]
pub fn authorize(node: &str, identity: &SpiffeId, snapshot: &Snapshot) -> Result<(), Status> {
    let (_, proven, _) = identity.parts();
    let sound = |pod: &str| {
        (1..=MAX_POD).contains(&pod.len())
            && pod.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'.')
    };
    match node.split_once('/') {
        Some((namespace, pod)) if namespace == proven && sound(pod) => runs_as(node, identity, snapshot),
        Some((namespace, pod)) if sound(pod) => Err(Status::permission_denied(format!(
            "node {node} is in the namespace {namespace}, but its certificate is for {identity}; \
             start the proxy with --node {proven}/{pod} or a token of {namespace}"
        ))),
        _ => Err(Status::invalid_argument(format!(
            "the node id {:?} is not <namespace>/<pod>",
            node.chars().take(80).collect::<String>()
        ))),
    }
}

/// The same of a node whose name was looked at: whether it runs under the account that `identity` proves. A pod that `snapshot` does
/// not have has nothing yet that could be taken.
#[allow(clippy::result_large_err, reason = "tonic's own error, made once a stream")]
pub fn runs_as(node: &str, identity: &SpiffeId, snapshot: &Snapshot) -> Result<(), Status> {
    let (_, _, proven) = identity.parts();
    let known = snapshot.get(Kind::Workload, node);
    match known.and_then(|entry| v1::Workload::decode(&*entry.any.value).ok()) {
        Some(workload) if workload.service_account != proven => Err(Status::permission_denied(format!(
            "the pod {node} runs as the service account {}, but the certificate is for {identity}; \
             start the proxy with its own pod's --node, or with its token",
            workload.service_account
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn a_pod_belongs_to_its_account_alone() {
        let mut snapshot = crate::snapshot::Builder::default();
        let workload = v1::Workload { service_account: "resnet".into(), ..Default::default() };
        snapshot.add(Kind::Workload, "team-a/resnet-0", &workload);
        let snapshot = snapshot.build(Vec::new());
        let of = |account: &str| SpiffeId::new("cluster.local", "team-a", account).unwrap();
        assert!(runs_as("team-a/resnet-0", &of("resnet"), &snapshot).is_ok());
        let refused = runs_as("team-a/resnet-0", &of("other"), &snapshot).unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains("runs as the service account resnet"), "{refused}");
        assert!(runs_as("team-a/not-yet", &of("other"), &snapshot).is_ok());
    }

    #[test]
    fn a_node_belongs_to_the_namespace_that_its_certificate_proves() {
        let identity = SpiffeId::new("cluster.local", "team-a", "resnet").unwrap();
        let table = [
            ("team-a/resnet-0", None),
            ("team-b/resnet-0", Some(Code::PermissionDenied)),
            ("team-a", Some(Code::InvalidArgument)),
            ("team-a/", Some(Code::InvalidArgument)),
            ("team-a/a/b", Some(Code::InvalidArgument)),
            ("", Some(Code::InvalidArgument)),
        ];
        for (node, expected) in table {
            assert_eq!(
                authorize(node, &identity, &Snapshot::default()).err().map(|status| status.code()),
                expected,
                "{node}"
            );
        }
    }
}
