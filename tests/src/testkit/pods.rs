//! A mesh as Kubernetes makes it: each pod is a machine of its own, with redirect rules, a proxy under the proxy's user
//! and an application under another, and nobody names a proxy. Control and the test are at [`Network::HERE`].
//!
//! In: pods and Services. Out: [`Pods::pod`] to connect from and to listen in, as the application of that pod would.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use penstock_api::names::{PROXY_UID, annotation, port};
use tempfile::TempDir;

use super::mesh::{Listed, Mesh, NAMESPACE};
use super::namespace::{Machine, Network};
use super::origin::Origin;
use super::process::{Process, program};
use super::wire::{Wire, get};
use super::{PATIENCE, wait_until};

/// The port that every Service's first port leads to.
pub const APPLICATION: u16 = 8_000;

/// A pod.
#[derive(Debug)]
pub struct Pod {
    /// Its machine.
    pub machine: Machine,
    annotations: Vec<(&'static str, String)>,
    in_mesh: bool,
    ports: Vec<u16>,
    probe: Option<String>,
    listed: Listed,
    /// What its proxy is told besides.
    pub options: Vec<String>,
    /// What its proxy is started through: words that end by running the program that follows them.
    pub through: Vec<String>,
    /// Its proxy.
    pub sidecar: Option<Process>,
}

impl Pod {
    /// A connection of its application.
    pub fn connect(&self, to: SocketAddr) -> io::Result<Wire> {
        self.machine.namespace.connect(to).map(Wire::new)
    }

    /// Its application, which answers every request with its name and what it saw.
    pub fn mirror(&self, name: &str) -> Origin {
        mirror(self.machine.namespace.listen(APPLICATION), name)
    }
}

/// Answers every request over a listener with a name and what was seen of the request.
pub fn mirror(listener: tokio::net::TcpListener, name: &str) -> Origin {
    let name = name.to_owned();
    Origin::on(listener, move |mut client| {
        let name = name.clone();
        async move {
            while let Ok(request) = client.request().await {
                let mut body = format!("{name}\n{}\n", request.head.first);
                for (name, value) in &request.head.headers {
                    let _ = writeln!(body, "{name}: {value}");
                }
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                if client.send(answer).await.is_err() {
                    return;
                }
            }
        }
    })
}

#[derive(Debug)]
struct Service {
    number: u8,
    headless: bool,
    protocol: &'static str,
    annotations: Vec<(&'static str, String)>,
    pods: Vec<String>,
}

/// A mesh of pods.
#[derive(Debug)]
pub struct Pods {
    /// Control, and the objects.
    pub mesh: Mesh,
    pods: BTreeMap<String, Pod>,
    services: BTreeMap<String, Service>,
    /// What everybody may read: the program, the anchors, the tokens.
    folder: TempDir,
    /// Goes last: proxies end before their machines.
    pub network: Network,
}

impl Pods {
    /// None yet; `None` where there can be none, which is said.
    pub fn new() -> Option<Self> {
        let network = Network::new()?;
        let folder = tempfile::tempdir().unwrap();
        readable(folder.path());
        // The proxy's user cannot look into the home of whoever has built the program.
        let copy = folder.path().join("penstock-proxy");
        let built = program("penstock-proxy");
        if std::fs::hard_link(&built, &copy).is_err() {
            std::fs::copy(&built, &copy).unwrap();
        }
        let mesh = Mesh::default().listen_at(Network::HERE);
        Some(Self { mesh, pods: BTreeMap::new(), services: BTreeMap::new(), folder, network })
    }

    /// Adds a pod of the mesh.
    pub fn with(mut self, name: &str, annotations: &[(&'static str, &str)]) -> Self {
        let pod = Pod {
            machine: self.network.machine(),
            annotations: annotations.iter().map(|(key, value)| (*key, (*value).to_owned())).collect(),
            in_mesh: true,
            ports: Vec::new(),
            probe: None,
            listed: Listed::Ready,
            options: Vec::new(),
            through: Vec::new(),
            sidecar: None,
        };
        self.pods.insert(name.to_owned(), pod);
        self
    }

    /// Adds a pod that control knows and the mesh does not have.
    pub fn with_stranger(self, name: &str) -> Self {
        let mut pods = self.with(name, &[]);
        pods.pods.get_mut(name).unwrap().in_mesh = false;
        pods
    }

    /// Has the kubelet ask a pod's application for a path.
    pub fn probe(mut self, pod: &str, path: &'static str) -> Self {
        let probe = format!("readinessProbe: {{httpGet: {{port: {APPLICATION}, path: {path}}}}}");
        self.pods.get_mut(pod).unwrap().probe = Some(probe);
        self
    }

    /// Has the kubelet ask the health service of a pod's application for a service.
    pub fn grpc_probe(mut self, pod: &str, service: &str) -> Self {
        let probe = format!("livenessProbe: {{grpc: {{port: {APPLICATION}, service: {service}}}}}");
        self.pods.get_mut(pod).unwrap().probe = Some(probe);
        self
    }

    /// Adds a Service whose port 80 leads to [`APPLICATION`] of its pods.
    pub fn service(mut self, name: &str, protocol: &'static str, pods: &[&str]) -> Self {
        let number = self.services.len() as u8 + 1;
        for pod in pods {
            let ports = &mut self.pods.get_mut(*pod).unwrap().ports;
            if !ports.contains(&APPLICATION) {
                ports.push(APPLICATION);
            }
        }
        let pods = pods.iter().map(|pod| (*pod).to_owned()).collect();
        self.services.insert(
            name.to_owned(),
            Service { number, headless: false, protocol, annotations: Vec::new(), pods },
        );
        self
    }

    /// Adds an annotation to a Service.
    pub fn annotate(mut self, service: &str, key: &'static str, value: &str) -> Self {
        self.services.get_mut(service).unwrap().annotations.push((key, value.to_owned()));
        self
    }

    /// Has a pod declare one more port.
    pub fn declares(mut self, pod: &str, port: u16) -> Self {
        self.pods.get_mut(pod).unwrap().ports.push(port);
        self
    }

    /// Gives the proxy of a pod more options.
    pub fn option(mut self, pod: &str, option: &str) -> Self {
        self.pods.get_mut(pod).unwrap().options.push(option.to_owned());
        self
    }

    /// Makes a Service one without an address of its own.
    pub fn headless(mut self, name: &str) -> Self {
        self.services.get_mut(name).unwrap().headless = true;
        self
    }

    /// A Service's address.
    pub fn cluster_ip(&self, service: &str) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 96, 0, self.services[service].number)), 80)
    }

    /// A Service's IPv6 address.
    pub fn cluster_ip_v6(&self, service: &str) -> SocketAddr {
        let number = self.services[service].number.into();
        SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, number)), 80)
    }

    /// A pod.
    pub fn pod(&self, name: &str) -> &Pod {
        &self.pods[name]
    }

    /// A pod, to change it.
    pub fn pod_mut(&mut self, name: &str) -> &mut Pod {
        self.pods.get_mut(name).unwrap()
    }

    fn yaml(&self) -> String {
        let mut yaml = String::new();
        for (name, Service { number, headless, protocol, annotations, pods }) in &self.services {
            let addresses = match headless {
                true => "clusterIP: None".to_owned(),
                false => format!(
                    "clusterIP: 10.96.0.{number}\n  clusterIPs: [10.96.0.{number}, \"fd96::{number}\"]"
                ),
            };
            let annotations: Vec<_> =
                annotations.iter().map(|(key, value)| format!("{key}: \"{value}\"")).collect();
            let _ = write!(
                yaml,
                "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {NAMESPACE}\n  \
                 annotations: {{{}}}\nspec:\n  {addresses}\n  \
                 ports:\n  - {{name: main, port: 80, targetPort: {APPLICATION}, appProtocol: {protocol}}}\n",
                annotations.join(", ")
            );
            let _ = write!(
                yaml,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-1\n  namespace: {NAMESPACE}\n  \
                 labels: {{kubernetes.io/service-name: {name}}}\naddressType: IPv4\n\
                 ports:\n- {{name: main, port: {APPLICATION}, protocol: TCP, appProtocol: {protocol}}}\nendpoints:\n"
            );
            for name in pods {
                let pod = &self.pods[name];
                let ready = match pod.listed {
                    Listed::Ready => "ready: true",
                    Listed::Terminating => "ready: false, serving: true, terminating: true",
                    Listed::Not => continue,
                };
                let _ = writeln!(
                    yaml,
                    "- {{addresses: [{}], conditions: {{{ready}}}, targetRef: {{kind: Pod, namespace: {NAMESPACE}, name: {name}}}}}",
                    pod.machine.v4
                );
            }
        }
        for (name, pod) in &self.pods {
            let ports: Vec<_> = pod.ports.iter().map(|port| format!("{{containerPort: {port}}}")).collect();
            let probe = pod.probe.as_ref().map_or_else(String::new, |probe| format!(", {probe}"));
            let Machine { v4, v6, .. } = &pod.machine;
            let mut annotations =
                format!("    {}: {}\n", annotation::INJECT, if pod.in_mesh { "enabled" } else { "disabled" });
            for (key, value) in &pod.annotations {
                let _ = writeln!(annotations, "    {key}: \"{value}\"");
            }
            let _ = write!(
                yaml,
                "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {NAMESPACE}\n  annotations:\n{annotations}\
                 spec:\n  serviceAccountName: {name}\n  containers:\n  - {{name: main, ports: [{}]{probe}}}\n\
                 status: {{phase: Running, podIP: {v4}, podIPs: [{{ip: {v4}}}, {{ip: \"{v6}\"}}]}}\n",
                ports.join(", ")
            );
        }
        yaml
    }

    /// Runs a subcommand of `penstock-proxy` in a pod, as root.
    pub fn proxy_command(&self, pod: &str, args: &[&str]) -> Output {
        self.proxy_line(pod).args(args).output().unwrap()
    }

    /// `penstock-proxy` in a pod, as root, for more arguments.
    pub fn proxy_line(&self, pod: &str) -> Command {
        self.pods[pod].machine.namespace.command(self.folder.path().join("penstock-proxy"))
    }

    /// A file that every proxy may read.
    pub fn shared_file(&self, name: &str, content: &str) -> PathBuf {
        let file = self.folder.path().join(name);
        std::fs::write(&file, content).unwrap();
        readable(&file);
        file
    }

    /// What the EndpointSlices say of a pod; [`Pods::write`] tells control.
    pub fn list(&mut self, pod: &str, listed: Listed) {
        self.pods.get_mut(pod).unwrap().listed = listed;
    }

    /// Writes what there is for control.
    pub fn write(&mut self) {
        let yaml = self.yaml();
        self.mesh.file("pods-and-services.yaml", &yaml);
        self.mesh.write();
    }

    /// Has one more pod behind a Service, as its ReplicaSet does; its proxy is ready, and nobody is told of it yet.
    pub async fn scale_up(mut self, pod: &str, service: &str) -> Self {
        self = self.with(pod, &[]);
        let added = self.pods.get_mut(pod).unwrap();
        added.ports.push(APPLICATION);
        added.listed = Listed::Not;
        self.services.get_mut(service).unwrap().pods.push(pod.to_owned());
        self.write();
        self.lay(pod);
        self.start_sidecar(pod);
        self.sidecar_is_ready(pod).await;
        self
    }

    /// Lays the rules of a pod, as its annotations say.
    pub fn lay(&self, pod: &str) {
        let mut args = vec!["init"];
        for (key, value) in &self.pods[pod].annotations {
            if *key == annotation::SKIP_INBOUND_PORTS {
                args.extend(["--skip-inbound-ports", value]);
            }
        }
        let laid = self.proxy_command(pod, &args);
        assert!(laid.status.success(), "{}", String::from_utf8_lossy(&laid.stderr));
    }

    /// Starts control, and nothing else.
    pub async fn start_control(&mut self) {
        self.write();
        self.mesh.start_control().await;
        let anchors = self.folder.path().join("anchors.pem");
        std::fs::copy(self.mesh.state().join("anchors.pem"), &anchors).unwrap();
        readable(&anchors);
    }

    /// Starts control, and in each pod of the mesh the rules and the proxy; waits until all is applied.
    pub async fn start(mut self) -> Self {
        self.start_control().await;
        let names: Vec<_> =
            self.pods.iter().filter(|(_, pod)| pod.in_mesh).map(|(name, _)| name.clone()).collect();
        for name in &names {
            self.lay(name);
            self.start_sidecar(name);
        }
        for name in &names {
            self.sidecar_is_ready(name).await;
        }
        wait_until("all sidecars have applied everything", PATIENCE, async || {
            let status = self.mesh.status().await;
            status.proxies.iter().filter(|proxy| proxy.connected).count() == names.len()
                && status.all_applied()
        })
        .await;
        self
    }

    /// Starts a pod's proxy, as the proxy's user.
    pub fn start_sidecar(&mut self, name: &str) {
        let token = self.folder.path().join(format!("{name}.token"));
        let args = ["--namespace", NAMESPACE, "--service-account", name, "--pod", name];
        std::fs::write(&token, self.mesh.control_command("token", &args)).unwrap();
        readable(&token);
        let pod = self.pods.get_mut(name).unwrap();
        let in_pod = format!("--net={}", pod.machine.namespace.path());
        let user = PROXY_UID.to_string();
        let file = |name: &str| -> PathBuf { self.folder.path().join(name) };
        // It ends with the test even if the test is killed.
        let (in_pod, user) = (in_pod.as_str(), user.as_str());
        let mut args: Vec<String> =
            [in_pod, "--", "setpriv", "--reuid", user, "--regid", user, "--clear-groups"]
                .map(str::to_owned)
                .into();
        args.extend(["--pdeathsig", "KILL", "--"].map(str::to_owned));
        args.extend(pod.through.iter().cloned());
        args.push(file("penstock-proxy").display().to_string());
        args.extend([
            "run".to_owned(),
            "--redirected".to_owned(),
            format!("--control={}", self.mesh.push()),
            format!("--control-ca={}", file("anchors.pem").display()),
            format!("--token={}", token.display()),
            format!("--node={NAMESPACE}/{name}"),
            format!("--service-account={name}"),
            format!("--health=0.0.0.0:{}", port::HEALTH),
            "--access-log=all".to_owned(),
            "--workers=2".to_owned(),
            "--drain-timeout=10s".to_owned(),
        ]);
        args.extend(pod.options.iter().cloned());
        pod.sidecar = Some(Process::start(name, Path::new("nsenter"), &args, self.folder.path()));
    }

    /// Waits until a pod's proxy can serve, as the kubelet would.
    pub async fn sidecar_is_ready(&mut self, name: &str) {
        let pod = self.pods.get_mut(name).unwrap();
        let health = pod.machine.at(port::HEALTH);
        let process = pod.sidecar.as_mut().unwrap();
        wait_until(&format!("the sidecar of {name} is ready"), PATIENCE, async || {
            assert!(process.runs(), "the sidecar ended at once: {}", process.said());
            get(health, "/ready").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
    }
}

fn readable(path: &Path) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}
