//! The mesh: control with a directory of Kubernetes objects, a sidecar beside each replica and beside each client.
//!
//! All pods have addresses of their own on loopback, so that ports are the usual ones. There is a Service for each policy
//! over the same replicas; a request chooses the policy by its host. Replicas are permissive, so that Envoy can be answered,
//! and stamped with load reports, in plaintext; between our sidecars there is mutual TLS all the same.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use hyper::Method;
use penstock_api::names::{annotation, port};
use tokio::time::Instant;

use super::client::ask;
use super::fleet::{self, PORT};
use super::subject::Subject;
use crate::control;
use crate::process::{self, Process};

/// The namespace of everything.
pub(crate) const NAMESPACE: &str = "bench";
/// The last byte of the first client's address.
const FIRST_CLIENT: u8 = 31;
/// How long a sidecar may take to be ready.
const READY: Duration = Duration::from_secs(30);

/// A pod.
pub(crate) struct Pod {
    pub(crate) name: String,
    pub(crate) ip: Ipv4Addr,
    pub(crate) account: &'static str,
}

/// A running mesh.
pub(crate) struct Sidecars {
    processes: Vec<Process>,
    /// Where the clients' applications find their sidecars.
    pub(crate) outbound: Vec<SocketAddr>,
    /// Where the replicas' sidecars listen for the mesh.
    pub(crate) inbound: Vec<SocketAddr>,
}

/// The host under which a policy of ours is asked for.
pub(crate) fn host(balance: &str) -> String {
    format!("{}.{NAMESPACE}", service(balance))
}

fn service(balance: &str) -> String {
    format!("sim-{balance}")
}

impl Sidecars {
    /// Starts control and all sidecars, and waits until they are ready.
    pub(crate) async fn start(
        subjects: &[Subject],
        replicas: &[SocketAddr],
        clients: u8,
        programs: &Path,
        dir: &Path,
    ) -> Result<Self> {
        let servers: Vec<Pod> = replicas
            .iter()
            .enumerate()
            .filter_map(|(at, address)| match address.ip() {
                IpAddr::V4(ip) => Some(Pod { name: format!("sim-{at}"), ip, account: "server" }),
                IpAddr::V6(_) => None,
            })
            .collect();
        let clients: Vec<Pod> = (0..clients)
            .zip(FIRST_CLIENT..)
            .map(|(at, last)| Pod { name: format!("client-{at}"), ip: fleet::ip(last), account: "client" })
            .collect();
        let source = dir.join("source");
        fs::create_dir(&source)?;
        fs::write(source.join("pods.yaml"), pods(&servers, &clients))?;
        let balances: Vec<&str> = subjects.iter().filter_map(|subject| subject.balance()).collect();
        fs::write(source.join("services.yaml"), services(&balances, &servers))?;

        let control_program = programs.join("penstock-control");
        let (process, push) = control::start(&control_program, dir, &source).await?;
        let mut sidecars = Self { processes: vec![process], outbound: Vec::new(), inbound: Vec::new() };
        let mut tokens = BTreeMap::new();
        for account in ["server", "client"] {
            let token = dir.join(format!("token-{account}"));
            fs::write(&token, control::issue_token(&control_program, dir, account).await?)?;
            tokens.insert(account, token);
        }
        for pod in servers.iter().chain(&clients) {
            let token = tokens.get(pod.account).context("the token of an account")?;
            let args = arguments(pod, push, &dir.join("state/anchors.pem"), token);
            let name = format!("sidecar-{}", pod.name);
            let program = programs.join("penstock-proxy");
            sidecars.processes.push(process::spawn(None, &name, &program, &args, dir, false)?);
        }
        for (at, pod) in servers.iter().chain(&clients).enumerate() {
            ready(pod, &mut sidecars.processes[at + 1]).await?;
        }
        sidecars.inbound = servers.iter().map(|pod| pod.at(port::INBOUND)).collect();
        sidecars.outbound = clients.iter().map(|pod| pod.at(port::OUTBOUND)).collect();
        Ok(sidecars)
    }

    /// Its processes.
    pub(crate) fn into_processes(self) -> Vec<Process> {
        self.processes
    }
}

impl Pod {
    /// An address of it.
    pub(crate) fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.ip), port)
    }
}

/// The command line of a pod's sidecar.
pub(crate) fn arguments(pod: &Pod, push: SocketAddr, anchors: &Path, token: &Path) -> Vec<OsString> {
    let mut args: Vec<OsString> = vec!["run".into()];
    let mut flag = |name: &str, value: OsString| args.extend([format!("--{name}").into(), value]);
    flag("control", push.to_string().into());
    flag("control-ca", anchors.into());
    flag("token", token.into());
    flag("node", format!("{NAMESPACE}/{}", pod.name).into());
    flag("service-account", pod.account.into());
    for (name, port) in [
        ("outbound", port::OUTBOUND),
        ("inbound", port::INBOUND),
        ("admin", port::ADMIN),
        ("health", port::HEALTH),
    ] {
        flag(name, pod.at(port).to_string().into());
    }
    flag("workers", "1".into());
    flag("access-log", "off".into());
    args
}

/// Waits until a pod's sidecar is ready.
pub(crate) async fn ready(pod: &Pod, process: &mut Process) -> Result<()> {
    let deadline = Instant::now() + READY;
    let admin = pod.at(port::ADMIN);
    loop {
        process.check()?;
        let page = ask(Method::GET, admin, "admin", "/ready", Bytes::new(), Duration::from_secs(1)).await;
        if page.is_ok_and(|(status, _)| status == 200) {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(process.story(&format!("was not ready within {READY:?}")));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn pods(servers: &[Pod], clients: &[Pod]) -> String {
    let mut yaml = String::new();
    for pod in servers.iter().chain(clients) {
        let serves = pod.account == "server";
        let ports =
            if serves { format!(", ports: [{{name: http, containerPort: {PORT}}}]") } else { String::new() };
        let _ = write!(
            yaml,
            "---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {NAMESPACE}
  annotations: {{{inject}: enabled, {inbound}: \"{port}\", {mtls}: permissive}}
spec:
  serviceAccountName: {account}
  containers: [{{name: app{ports}}}]
status: {{phase: Running, podIP: {ip}}}
",
            name = pod.name,
            inject = annotation::INJECT,
            inbound = annotation::INBOUND_PORT,
            port = port::INBOUND,
            mtls = annotation::MTLS,
            account = pod.account,
            ip = pod.ip,
        );
    }
    yaml
}

fn services(balances: &[&str], servers: &[Pod]) -> String {
    let mut yaml = String::new();
    for balance in balances {
        let service = service(balance);
        let _ = write!(
            yaml,
            "---
apiVersion: v1
kind: Service
metadata: {{name: {service}, namespace: {NAMESPACE}, annotations: {{{annotation}: {balance}}}}}
spec:
  ports: [{{name: http, port: 80, targetPort: {PORT}, appProtocol: http}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: {service}-1
  namespace: {NAMESPACE}
  labels: {{kubernetes.io/service-name: {service}}}
addressType: IPv4
ports: [{{name: http, port: {PORT}, protocol: TCP, appProtocol: http}}]
endpoints:
",
            annotation = annotation::BALANCE,
        );
        for pod in servers {
            let _ = writeln!(
                yaml,
                "- {{addresses: [{}], conditions: {{ready: true}}, targetRef: {{kind: Pod, namespace: {NAMESPACE}, name: {}}}}}",
                pod.ip, pod.name
            );
        }
    }
    yaml
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_policy_is_a_service_over_all_replicas() {
        let pod =
            |at: u8| Pod { name: format!("sim-{at}"), ip: Ipv4Addr::new(127, 9, 9, at), account: "server" };
        let servers = [pod(1), pod(2)];
        let yaml = services(&["gpu", "least-request"], &servers);
        assert_eq!(yaml.matches("kind: Service\n").count(), 2);
        assert_eq!(yaml.matches("addresses: [127.9.9.2]").count(), 2);
        assert!(yaml.contains("penstock.io/balance: least-request"), "{yaml}");
        assert_eq!(host("gpu"), "sim-gpu.bench");
        assert_eq!(pods(&servers, &[]).matches("containerPort: 8000").count(), 2);
    }
}
