//! Control and sidecars as processes on loopback, with a directory of Kubernetes YAML between them.
//!
//! Each pod has an address of its own, as in a cluster, so ports are the usual ones. Applications are
//! [`Origin`](super::origin::Origin)s of the test at [`Mesh::application`].

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use penstock_api::names::{annotation, port};
use penstock_api::view::Status;
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use super::process::{Process, program};
use super::proxy::{counts_are_told, metric};
use super::wire::{Wire, get};
use super::{PATIENCE, own_ip, wait_until};

/// The namespace of everything.
pub const NAMESPACE: &str = "test";
/// The port of every application.
const APPLICATION: u16 = 8_000;
/// The port for gRPC of applications that have one, in the pod and in its Service.
pub const GRPC: u16 = 8_001;

/// What the EndpointSlice says of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listed {
    /// Takes requests.
    Ready,
    /// Finishes what it has.
    Terminating,
    /// Is not there.
    Not,
}

#[derive(Debug)]
struct Pod {
    ip: Ipv4Addr,
    account: String,
    service: Option<String>,
    annotations: Vec<(&'static str, String)>,
    variables: Vec<(&'static str, String)>,
    options: Vec<String>,
    probe: Option<String>,
    listed: Listed,
    sidecar: Option<Process>,
}

/// A mesh.
#[derive(Debug)]
pub struct Mesh {
    ip: Ipv4Addr,
    push_ip: Ipv4Addr,
    leaf_lifetime: String,
    /// Control; `None` while it is down.
    pub control: Option<Process>,
    /// What control is started through: words that end by running the program that follows them.
    pub control_through: Vec<String>,
    pods: BTreeMap<String, Pod>,
    services: BTreeMap<String, BTreeMap<&'static str, String>>,
    more: BTreeMap<String, String>,
    snapshot: String,
    protocol: &'static str,
    grpc: bool,
    /// Goes last: what processes have said lies in it, and is shown when they end.
    folder: TempDir,
}

impl Default for Mesh {
    fn default() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ip = own_ip();
        for name in ["objects", "tokens"] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
        }
        Self {
            folder,
            ip,
            push_ip: ip,
            leaf_lifetime: "1h".to_owned(),
            control: None,
            control_through: Vec::new(),
            pods: BTreeMap::new(),
            services: BTreeMap::new(),
            more: BTreeMap::new(),
            snapshot: String::new(),
            protocol: "http",
            grpc: false,
        }
    }
}

impl Mesh {
    /// How long certificates live.
    pub fn leaf_lifetime(mut self, time: &str) -> Self {
        self.leaf_lifetime = time.to_owned();
        self
    }

    /// Where control takes proxies, if they are not on loopback.
    pub fn listen_at(mut self, ip: Ipv4Addr) -> Self {
        self.push_ip = ip;
        self
    }

    /// What Services declare as `appProtocol`.
    pub fn protocol(mut self, protocol: &'static str) -> Self {
        self.protocol = protocol;
        self
    }

    /// Applications speak gRPC too, on a port of its own, as model servers do.
    pub fn grpc(mut self) -> Self {
        self.grpc = true;
        self
    }

    /// A Service with annotations.
    pub fn service(mut self, name: &str, annotations: &[(&'static str, &str)]) -> Self {
        self.annotate(name, annotations);
        self
    }

    /// A pod with a sidecar; its account has its name. `service`: whose endpoint it is.
    pub fn pod(mut self, name: &str, service: Option<&str>) -> Self {
        let pod = Pod {
            ip: own_ip(),
            account: name.to_owned(),
            service: service.map(str::to_owned),
            annotations: Vec::new(),
            variables: Vec::new(),
            options: Vec::new(),
            probe: None,
            listed: Listed::Ready,
            sidecar: None,
        };
        self.pods.insert(name.to_owned(), pod);
        self
    }

    /// Starts a pod's sidecar with one more option.
    pub fn option(mut self, pod: &str, option: &str) -> Self {
        if let Some(pod) = self.pods.get_mut(pod) {
            pod.options.push(option.to_owned());
        }
        self
    }

    /// Adds or replaces an annotation of a pod.
    pub fn annotate_pod(mut self, pod: &str, key: &'static str, value: &str) -> Self {
        if let Some(pod) = self.pods.get_mut(pod) {
            pod.annotations.retain(|(known, _)| *known != key);
            pod.annotations.push((key, value.to_owned()));
        }
        self
    }

    /// A variable of the environment of a pod's sidecar.
    pub fn variable(mut self, pod: &str, name: &'static str, value: &str) -> Self {
        self.pods.get_mut(pod).unwrap().variables.push((name, value.to_owned()));
        self
    }

    /// Has the kubelet ask a pod's application for a path.
    pub fn probe(mut self, pod: &str, path: &str) -> Self {
        self.pods.get_mut(pod).unwrap().probe = Some(path.to_owned());
        self
    }

    /// Starts control and all sidecars, and waits until all is applied.
    pub async fn start(mut self) -> Self {
        self.write();
        self.start_control().await;
        let names: Vec<_> = self.pods.keys().cloned().collect();
        for name in &names {
            self.issue_token(name);
            self.start_sidecar(name);
        }
        for name in &names {
            self.sidecar_is_ready(name).await;
        }
        let count = names.len();
        wait_until("all sidecars are connected", PATIENCE, async || {
            let status = self.status().await;
            status.proxies.iter().filter(|proxy| proxy.connected).count() == count && status.all_applied()
        })
        .await;
        self.snapshot = self.status().await.snapshot;
        self
    }

    /// Adds or replaces annotations of a Service; [`Mesh::apply`] makes it so.
    pub fn annotate(&mut self, service: &str, annotations: &[(&'static str, &str)]) {
        let known = self.services.entry(service.to_owned()).or_default();
        known.extend(annotations.iter().map(|(key, value)| (*key, (*value).to_owned())));
    }

    /// Splits a Service's requests over others.
    pub fn split(&mut self, service: &str, weights: &str) {
        self.annotate(service, &[(annotation::TRAFFIC_SPLIT, weights)]);
    }

    /// What the EndpointSlice will say of a pod.
    pub fn list(&mut self, pod: &str, listed: Listed) {
        self.pods.get_mut(pod).unwrap().listed = listed;
    }

    /// A file of more objects.
    pub fn file(&mut self, name: &str, yaml: &str) {
        self.more.insert(name.to_owned(), yaml.to_owned());
    }

    /// Writes all objects.
    pub fn write(&self) {
        let mut files = self.more.clone();
        files.insert("services.yaml".to_owned(), self.services_yaml());
        files.insert("pods.yaml".to_owned(), self.pods_yaml());
        for (name, yaml) in files {
            let folder = self.folder.path().join("objects");
            let draft = folder.join(format!(".{name}.draft"));
            if std::fs::read_to_string(folder.join(&name)).is_ok_and(|known| known == yaml) {
                continue;
            }
            std::fs::write(&draft, yaml).unwrap();
            std::fs::rename(draft, folder.join(name)).unwrap();
        }
    }

    /// Writes all objects, and waits until every sidecar has applied what changed.
    pub async fn apply(&mut self) {
        self.write();
        let before = self.snapshot.clone();
        wait_until("a change is applied by all sidecars", PATIENCE, async || {
            let status = self.status().await;
            self.snapshot = status.snapshot.clone();
            status.snapshot != before && status.all_applied()
        })
        .await;
    }

    fn services_yaml(&self) -> String {
        let mut yaml = String::new();
        let protocol = self.protocol;
        let more = |fields: &str| match self.grpc {
            true => format!("\n{fields}, appProtocol: grpc}}"),
            false => String::new(),
        };
        let of_service = more(&format!("  - {{name: grpc, port: {GRPC}, targetPort: {GRPC}"));
        let of_slice = more(&format!("- {{name: grpc, port: {GRPC}, protocol: TCP"));
        for (name, annotations) in &self.services {
            let _ = write!(
                yaml,
                "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {NAMESPACE}\n"
            );
            if !annotations.is_empty() {
                yaml.push_str("  annotations:\n");
            }
            for (key, value) in annotations {
                let _ = writeln!(yaml, "    {key}: \"{value}\"");
            }
            let _ = write!(
                yaml,
                "spec:\n  ports:\n  - {{name: main, port: 80, targetPort: {APPLICATION}, appProtocol: {protocol}}}{of_service}\n\
                 ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-1\n  \
                 namespace: {NAMESPACE}\n  labels: {{kubernetes.io/service-name: {name}}}\naddressType: IPv4\n\
                 ports:\n- {{name: main, port: {APPLICATION}, protocol: TCP, appProtocol: {protocol}}}{of_slice}\n\
                 endpoints:"
            );
            let mut empty = true;
            for (pod_name, pod) in &self.pods {
                if pod.service.as_ref() != Some(name) || pod.listed == Listed::Not {
                    continue;
                }
                empty = false;
                let ready = pod.listed == Listed::Ready;
                let _ = write!(
                    yaml,
                    "\n- addresses: [{}]\n  conditions: {{ready: {ready}, serving: true, terminating: {}}}\n  \
                     targetRef: {{kind: Pod, namespace: {NAMESPACE}, name: {pod_name}}}",
                    pod.ip, !ready
                );
            }
            yaml.push_str(if empty { " []\n" } else { "\n" });
        }
        yaml
    }

    fn pods_yaml(&self) -> String {
        let mut yaml = String::new();
        for (name, pod) in &self.pods {
            let grpc =
                if self.grpc { format!(", {{name: grpc, containerPort: {GRPC}}}") } else { String::new() };
            let ports = match &pod.service {
                Some(_) => format!("\n    ports: [{{name: main, containerPort: {APPLICATION}}}{grpc}]"),
                None => String::new(),
            };
            let probe = pod.probe.as_ref().map_or_else(String::new, |path| {
                format!("\n    readinessProbe: {{httpGet: {{port: {APPLICATION}, path: {path}}}}}")
            });
            let app = pod.service.as_ref().unwrap_or(name);
            let annotations: String =
                pod.annotations.iter().map(|(key, value)| format!("    {key}: \"{value}\"\n")).collect();
            let _ = write!(
                yaml,
                "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {NAMESPACE}\n  labels: {{app: {app}}}\n  annotations:\n    \
                 {}: enabled\n    {}: \"{}\"\n{annotations}spec:\n  serviceAccountName: {}\n  containers:\n  - name: main{ports}{probe}\n\
                 status: {{phase: Running, podIP: {}}}\n",
                annotation::INJECT,
                annotation::INBOUND_PORT,
                port::INBOUND,
                pod.account,
                pod.ip
            );
        }
        yaml
    }

    /// Starts control and waits until it answers.
    pub async fn start_control(&mut self) {
        let mut args = vec![
            "run".to_owned(),
            format!("--source=dir:{}", self.folder.path().join("objects").display()),
            format!("--state={}", self.state().display()),
            format!("--listen={}", self.push()),
            format!("--api={}", self.api()),
            format!("--leaf-lifetime={}", self.leaf_lifetime),
        ];
        let mut program = program("penstock-control");
        if self.push_ip != self.ip {
            // On a network of the test's own: even a test that is killed leaves nobody behind who keeps it.
            let with_the_test = ["--pdeathsig", "KILL", "--"].map(str::to_owned);
            let through = with_the_test.into_iter().chain(self.control_through.iter().cloned());
            args.splice(0..0, through.chain([program.display().to_string()]));
            program = PathBuf::from("setpriv");
        }
        self.control = Some(Process::start("control", &program, &args, self.folder.path()));
        let api = self.api();
        let process = self.control.as_mut().unwrap();
        wait_until("control answers", PATIENCE, async || {
            assert!(process.runs(), "control ended at once: {}", process.said());
            get(api, "/healthz").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
    }

    /// Kills control at once.
    pub fn kill_control(&mut self) {
        // Dropping a process kills it.
        self.control = None;
    }

    /// Runs a subcommand of control on the state directory, and returns what it printed.
    pub fn control_command(&self, command: &str, args: &[&str]) -> String {
        let output = std::process::Command::new(program("penstock-control"))
            .arg(command)
            .arg(format!("--state={}", self.state().display()))
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn issue_token(&self, pod: &str) {
        let account = &self.pods[pod].account;
        let args = ["--namespace", NAMESPACE, "--service-account", account, "--pod", pod];
        std::fs::write(self.token(pod), self.control_command("token", &args)).unwrap();
    }

    /// The file of a pod's token.
    pub fn token(&self, pod: &str) -> PathBuf {
        self.folder.path().join("tokens").join(pod)
    }

    /// Control's state directory.
    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// Where control takes proxies.
    pub fn push(&self) -> SocketAddr {
        at(self.push_ip, port::CONTROL)
    }

    /// Where control's API is.
    pub fn api(&self) -> SocketAddr {
        at(self.ip, port::CONTROL_API)
    }

    /// Where a pod's application listens.
    pub fn application(&self, pod: &str) -> SocketAddr {
        at(self.pods[pod].ip, APPLICATION)
    }

    /// Where a pod's application listens for gRPC.
    pub fn application_grpc(&self, pod: &str) -> SocketAddr {
        at(self.pods[pod].ip, GRPC)
    }

    /// Where a pod's application finds its sidecar.
    pub fn outbound(&self, pod: &str) -> SocketAddr {
        at(self.pods[pod].ip, port::OUTBOUND)
    }

    /// Where a pod's sidecar takes what comes from others.
    pub fn inbound(&self, pod: &str) -> SocketAddr {
        at(self.pods[pod].ip, port::INBOUND)
    }

    /// A sidecar's admin pages.
    pub fn admin(&self, pod: &str) -> SocketAddr {
        at(self.pods[pod].ip, port::ADMIN)
    }

    /// Starts a pod's sidecar.
    pub fn start_sidecar(&mut self, pod: &str) {
        let ip = self.pods[pod].ip;
        let mut args = vec![
            "run".to_owned(),
            format!("--control={}", self.push()),
            format!("--control-ca={}", self.state().join("anchors.pem").display()),
            format!("--token={}", self.token(pod).display()),
            format!("--node={NAMESPACE}/{pod}"),
            format!("--service-account={}", self.pods[pod].account),
            format!("--outbound={}", at(ip, port::OUTBOUND)),
            format!("--inbound={}", at(ip, port::INBOUND)),
            format!("--admin={}", at(ip, port::ADMIN)),
            format!("--health={}", at(ip, port::HEALTH)),
            // What only shows between workers, such as a connection that one of them keeps, has to show in tests.
            "--workers=2".to_owned(),
            "--drain-timeout=10s".to_owned(),
        ];
        args.extend_from_slice(&self.pods[pod].options);
        let variables = &self.pods[pod].variables;
        let process =
            Process::start_with(pod, &program("penstock-proxy"), &args, variables, self.folder.path());
        self.pods.get_mut(pod).unwrap().sidecar = Some(process);
    }

    /// Waits until a sidecar can serve.
    pub async fn sidecar_is_ready(&mut self, pod: &str) {
        let admin = self.admin(pod);
        let process = self.sidecar(pod);
        wait_until(&format!("the sidecar of {pod} is ready"), PATIENCE, async || {
            assert!(process.runs(), "the sidecar ended at once: {}", process.said());
            get(admin, "/ready").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
    }

    /// A pod's sidecar.
    pub fn sidecar(&mut self, pod: &str) -> &mut Process {
        self.pods.get_mut(pod).unwrap().sidecar.as_mut().unwrap()
    }

    /// Waits until the sidecars of the pods `client` and `a`, a client and a model server, hold nothing any more.
    pub async fn nothing_is_held(&self) {
        const HELD: [(&str, &str); 8] = [
            ("client", "penstock_requests_in_flight"),
            ("a", "penstock_requests_in_flight"),
            ("a", "penstock_arena_bytes"),
            ("a", "penstock_coalesce_held_bytes"),
            ("a", "penstock_coalesce_flights"),
            ("a", "penstock_batch_waiting"),
            ("a", "penstock_batches_in_flight"),
            ("a", "penstock_prepare_waiting"),
        ];
        counts_are_told().await;
        for (pod, name) in HELD {
            wait_until(&format!("{name} of {pod} is zero"), PATIENCE / 3, async || {
                metric(self.admin(pod), name, &[]).await == 0.0
            })
            .await;
        }
    }

    /// A page of control's API.
    pub async fn page<T: DeserializeOwned>(&self, path: &str) -> T {
        let answer = get(self.api(), path).await.unwrap();
        assert_eq!(answer.status(), 200, "{}", answer.text());
        serde_json::from_slice(&answer.body).unwrap()
    }

    /// How control sees the mesh.
    pub async fn status(&self) -> Status {
        self.page("/status").await
    }

    /// The serial number of the certificate that a sidecar uses.
    pub async fn serial(&self, pod: &str) -> String {
        let page = get(self.admin(pod), "/certs").await.unwrap();
        let certificates: Vec<penstock_api::view::Certificate> = serde_json::from_slice(&page.body).unwrap();
        certificates.into_iter().find(|one| one.role == "leaf").unwrap().serial
    }

    /// A connection of a pod's application to its sidecar.
    pub async fn client(&self, pod: &str) -> Wire {
        Wire::connect(self.outbound(pod)).await
    }

    /// Waits until the sidecar of `pod` reaches `service`, which it may have to ask control about first.
    pub async fn reaches(&self, pod: &str, service: &str) {
        let mut said = String::new();
        let limit = Duration::from_secs(10);
        wait_until(&format!("{pod} reaches {service}"), limit, async || {
            let request = format!("GET / HTTP/1.1\r\nhost: {service}.{NAMESPACE}\r\n\r\n");
            let answer = self.client(pod).await.ask(request).await;
            let next = format!("{answer:?}");
            if next != said {
                eprintln!("{service}: {next}");
                said = next;
            }
            answer.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
    }
}

fn at(ip: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(ip), port)
}
