//! Our subject: control with a directory of Kubernetes objects, and an inbound sidecar beside the model server, which shares
//! its pod's address. The pod is permissive, so that the load reaches the sidecar in plaintext as it reaches the others.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::Result;
use penstock_api::names::{annotation, port};

use crate::control;
use crate::mesh::sidecars::{NAMESPACE, Pod, arguments, ready};
use crate::process::{self, Process};

/// The Service before the server.
const SERVICE: &str = "model";
/// Whose certificate the sidecar has.
const ACCOUNT: &str = "server";

/// A running sidecar with its control plane.
pub(crate) struct Sidecar {
    pub(crate) control: Process,
    pub(crate) proxy: Process,
    /// Where it listens for the mesh.
    pub(crate) inbound: SocketAddr,
}

/// The `Host` that the Service is asked by.
pub(crate) fn host() -> String {
    format!("{SERVICE}.{NAMESPACE}")
}

/// Starts both beside a server, and waits until the sidecar is ready.
pub(crate) async fn start(
    ip: Ipv4Addr,
    server: u16,
    annotations: &[(&str, &str)],
    programs: &Path,
    dir: &Path,
) -> Result<Sidecar> {
    let source = dir.join("source");
    fs::create_dir(&source)?;
    fs::write(source.join("all.yaml"), objects(ip, server, annotations))?;
    let control_program = programs.join("penstock-control");
    let (control, push) = control::start(&control_program, dir, &source).await?;
    let token = dir.join("token");
    fs::write(&token, control::issue_token(&control_program, dir, ACCOUNT).await?)?;
    let pod = Pod { name: SERVICE.to_owned(), ip, account: ACCOUNT };
    let args = arguments(&pod, push, &dir.join("state/anchors.pem"), &token);
    let mut proxy =
        process::spawn(None, "penstock-proxy", &programs.join("penstock-proxy"), &args, dir, false)?;
    ready(&pod, &mut proxy).await?;
    Ok(Sidecar { control, proxy, inbound: pod.at(port::INBOUND) })
}

fn objects(ip: Ipv4Addr, server: u16, annotations: &[(&str, &str)]) -> String {
    let mut of_service = String::new();
    for (key, value) in annotations {
        let _ = write!(of_service, "\n    {key}: \"{value}\"");
    }
    if of_service.is_empty() {
        of_service.push_str(" {}");
    }
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {SERVICE}
  namespace: {NAMESPACE}
  labels: {{app: {SERVICE}}}
  annotations: {{{inject}: enabled, {inbound}: \"{port}\", {mtls}: permissive}}
spec:
  serviceAccountName: {ACCOUNT}
  containers: [{{name: app, ports: [{{name: http, containerPort: {server}}}]}}]
status: {{phase: Running, podIP: {ip}}}
---
apiVersion: v1
kind: Service
metadata:
  name: {SERVICE}
  namespace: {NAMESPACE}
  annotations:{of_service}
spec:
  selector: {{app: {SERVICE}}}
  ports: [{{name: http, port: 80, targetPort: {server}, appProtocol: http}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {SERVICE}-1
  namespace: {NAMESPACE}
  labels: {{kubernetes.io/service-name: {SERVICE}}}
addressType: IPv4
ports: [{{name: http, port: {server}, protocol: TCP, appProtocol: http}}]
endpoints:
- {{addresses: [{ip}], conditions: {{ready: true}}, targetRef: {{kind: Pod, namespace: {NAMESPACE}, name: {SERVICE}}}}}
",
        inject = annotation::INJECT,
        inbound = annotation::INBOUND_PORT,
        port = port::INBOUND,
        mtls = annotation::MTLS,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotations_are_the_services() {
        let yaml = objects(Ipv4Addr::LOCALHOST, 8000, &[(annotation::BATCH, "max=32,delay=2ms")]);
        let service = yaml.split("---").nth(1).unwrap();
        assert!(service.contains("penstock.io/batch: \"max=32,delay=2ms\""), "{yaml}");
        assert!(objects(Ipv4Addr::LOCALHOST, 8000, &[]).contains("annotations: {}"));
        assert_eq!(host(), "model.bench");
    }
}
