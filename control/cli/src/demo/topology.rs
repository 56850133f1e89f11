//! What exists in the demo: pods, where they listen, and the Kubernetes objects that say so.
//!
//! In: what the script decided (a share for version 2, a pod that leaves). Out: YAML files that control watches.
//! A file is replaced by renaming a finished one over it, so control never reads half a file.

use std::fmt::Write;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::path::{Path, PathBuf};

use penstock_api::names::{annotation, port};

use super::photos;
use crate::failure::Failure;

/// The namespace of everything in the demo.
pub(crate) const NAMESPACE: &str = "demo";
/// The Service that the client asks for.
pub(crate) const SERVICE: &str = "digits";
/// The Host header of the client's requests.
pub(crate) const HOST: &str = "digits.demo.svc.cluster.local";
/// Weights are written in thousandths, so that a step of a tenth of a percent is a change.
pub(crate) const WHOLE: u32 = 1000;

/// How far ports move when the usual ones are taken, and how often before giving up.
const PORT_STEP: u16 = 100;
const PORT_TRIES: u16 = 40;

/// What a careful user asks of every client of a version. Inference changes nothing on the server, so an answer that
/// was lost may be asked for again.
const CARE: [(&str, &str); 5] = [
    (annotation::RETRY, "attempts=2,on=502+503+504,budget=20%,buffer=64Ki"),
    (annotation::TIMEOUT, "connect=1s,request=10s,per-try=3s,idle=5m"),
    (annotation::OUTLIER, "failures=3,base=1s,max=30s,ejected=50%"),
    (annotation::BATCH, "max=32"),
    (annotation::COALESCE, "single-flight"),
];

/// What the EndpointSlice says of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    /// Ready.
    Ready,
    /// On its way out: takes no new work, finishes what it has.
    Terminating,
    /// Not listed.
    Absent,
}

/// A pod.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    /// Its name.
    pub(crate) name: &'static str,
    /// Its address: one of loopback's 16 million stands in for a pod network.
    pub(crate) ip: Ipv4Addr,
    /// Its service account, which becomes its identity.
    pub(crate) account: &'static str,
    /// The model version it serves; `None` for the client.
    pub(crate) version: Option<u8>,
    /// What the EndpointSlice says.
    pub(crate) presence: Presence,
}

impl Pod {
    const fn new(name: &'static str, host: u8, account: &'static str, version: Option<u8>) -> Self {
        let ip = Ipv4Addr::new(127, 0, 0, host);
        Self { name, ip, account, version, presence: Presence::Ready }
    }

    /// The name that control knows its proxy by.
    pub(crate) fn node(&self) -> String {
        format!("{NAMESPACE}/{}", self.name)
    }
}

/// Ports, the same on every pod, as it would be in a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ports {
    /// The model server.
    pub(crate) server: u16,
    /// The sidecar for the mesh.
    pub(crate) inbound: u16,
    /// The sidecar for its own application.
    pub(crate) outbound: u16,
    /// The sidecar's admin pages.
    pub(crate) admin: u16,
    /// The sidecar's health.
    pub(crate) health: u16,
}

impl Default for Ports {
    fn default() -> Self {
        Self {
            server: 8000,
            inbound: port::INBOUND,
            outbound: port::OUTBOUND,
            admin: port::ADMIN,
            health: port::HEALTH,
        }
    }
}

impl Ports {
    /// The usual ports, or the next ones that are free on all `ips`.
    fn free(ips: &[Ipv4Addr]) -> Result<Self, Failure> {
        let usual = Self::default();
        Ok(Self {
            server: free_port(ips, usual.server)?,
            inbound: free_port(ips, usual.inbound)?,
            outbound: free_port(ips, usual.outbound)?,
            admin: free_port(ips, usual.admin)?,
            health: free_port(ips, usual.health)?,
        })
    }
}

/// The first of `preferred`, `preferred` + 100, … that can be bound on every address.
pub(crate) fn free_port(ips: &[Ipv4Addr], preferred: u16) -> Result<u16, Failure> {
    let mut refusal = None;
    for candidate in (0..PORT_TRIES).filter_map(|step| preferred.checked_add(step * PORT_STEP)) {
        let bind = |ip: &Ipv4Addr| TcpListener::bind(SocketAddrV4::new(*ip, candidate)).map_err(|e| (*ip, e));
        match ips.iter().map(bind).collect::<Result<Vec<_>, _>>() {
            Ok(_) => return Ok(candidate),
            Err((ip, error)) if error.kind() == io::ErrorKind::AddrNotAvailable => {
                return Err(Failure::Problem(format!(
                    "the demo's pods live on 127.0.0.10 to 127.0.0.13, and {ip} cannot be used here ({error}); on \
                     macOS `sudo ifconfig lo0 alias {ip}` adds an address"
                )));
            }
            Err((ip, error)) => refusal = Some(format!("{ip}:{candidate}: {error}")),
        }
    }
    let refusal = refusal.unwrap_or_default();
    Err(Failure::Problem(format!("no free port near {preferred} for the demo (last tried {refusal})")))
}

/// Everything, as the objects in the directory say it.
#[derive(Clone, Debug)]
pub(crate) struct Topology {
    /// The client, then the model servers.
    pub(crate) pods: [Pod; 4],
    /// Where they listen.
    pub(crate) ports: Ports,
    /// Version 2's weight, of [`WHOLE`].
    pub(crate) v2: u32,
}

/// The client's place among the pods.
pub(crate) const CLIENT: usize = 0;
/// The replica of version 1 that is restarted in good order.
pub(crate) const RESTARTED: usize = 1;
/// The replica of version 1 that is killed without warning.
pub(crate) const KILLED: usize = 2;
/// The replica of version 2, which has all traffic in the end.
pub(crate) const BETTER: usize = 3;

impl Topology {
    /// The demo's pods on the usual ports, as manifests/examples/digits shows them.
    pub(crate) fn usual() -> Self {
        Self {
            pods: [
                Pod::new("client", 10, "client", None),
                Pod::new("digits-v1-a", 11, "digits-v1", Some(1)),
                Pod::new("digits-v1-b", 12, "digits-v1", Some(1)),
                Pod::new("digits-v2-a", 13, "digits-v2", Some(2)),
            ],
            ports: Ports::default(),
            v2: 0,
        }
    }

    /// The demo's pods on ports that are free.
    pub(crate) fn on_free_ports() -> Result<Self, Failure> {
        let mut topology = Self::usual();
        topology.ports = Ports::free(&topology.pods.each_ref().map(|pod| pod.ip))?;
        Ok(topology)
    }

    /// The Services: the one that clients ask for, with the split, and one a version.
    pub(crate) fn services(&self) -> String {
        let mut yaml = String::new();
        let split = format!("digits-v1={},digits-v2={}", WHOLE - self.v2, self.v2);
        let split = [(annotation::TRAFFIC_SPLIT, split.as_str())];
        for (name, annotations) in [(SERVICE, &split[..]), ("digits-v1", &CARE), ("digits-v2", &CARE)] {
            let _ = write!(
                yaml,
                "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {NAMESPACE}\n  annotations:\n"
            );
            for (key, value) in annotations {
                let _ = writeln!(yaml, "    {key}: \"{value}\"");
            }
            let _ = write!(
                yaml,
                "spec:\n  ports:\n    - {{name: http, port: 80, targetPort: {}, appProtocol: http}}\n",
                self.ports.server
            );
        }
        yaml
    }

    /// The EndpointSlices: which pods serve which version now.
    pub(crate) fn slices(&self) -> String {
        let mut yaml = String::new();
        for service in ["digits-v1", "digits-v2"] {
            let _ = write!(
                yaml,
                "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {service}-1\n  \
                 namespace: {NAMESPACE}\n  labels:\n    kubernetes.io/service-name: {service}\naddressType: IPv4\n\
                 ports:\n  - {{name: http, port: {}, protocol: TCP, appProtocol: http}}\nendpoints:",
                self.ports.server
            );
            let listed = self.pods.iter().filter(|p| p.account == service && p.presence != Presence::Absent);
            let mut empty = true;
            for pod in listed {
                empty = false;
                let ready = pod.presence == Presence::Ready;
                let _ = write!(
                    yaml,
                    "\n  - addresses: [{}]\n    conditions: {{ready: {ready}, serving: true, terminating: {}}}\n    \
                     targetRef: {{kind: Pod, namespace: {NAMESPACE}, name: {}}}",
                    pod.ip, !ready, pod.name
                );
            }
            yaml.push_str(if empty { " []\n" } else { "\n" });
        }
        yaml
    }

    /// The Pods: who runs where under which account.
    pub(crate) fn pods(&self) -> String {
        let mut yaml = String::new();
        for pod in &self.pods {
            let _ = write!(
                yaml,
                "---\napiVersion: v1\nkind: Pod\nmetadata:\n  name: {}\n  namespace: {NAMESPACE}\n  annotations:\n    \
                 {}: enabled\n    {}: \"{}\"\nspec:\n  serviceAccountName: {}\n  containers:\n",
                pod.name,
                annotation::INJECT,
                annotation::INBOUND_PORT,
                self.ports.inbound,
                pod.account,
            );
            let _ = match pod.version {
                None => writeln!(yaml, "    - name: client"),
                Some(_) => writeln!(
                    yaml,
                    "    - name: server\n      ports:\n        - {{name: http, containerPort: {}}}",
                    self.ports.server
                ),
            };
            let _ = write!(yaml, "status:\n  phase: Running\n  podIP: {}\n", pod.ip);
        }
        yaml
    }
}

/// The directory that control watches.
#[derive(Clone, Debug)]
pub(crate) struct Mesh {
    directory: PathBuf,
}

impl Mesh {
    /// Makes the directory and writes all objects.
    pub(crate) fn create(directory: PathBuf, topology: &Topology) -> io::Result<Self> {
        std::fs::create_dir_all(&directory)?;
        let mesh = Self { directory };
        mesh.replace("pods.yaml", &topology.pods())?;
        mesh.slices(topology)?;
        mesh.services(topology)?;
        Ok(mesh)
    }

    /// The directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The file that holds the split.
    pub(crate) fn services_file(&self) -> PathBuf {
        self.directory.join("services.yaml")
    }

    /// Writes the Services anew.
    pub(crate) fn services(&self, topology: &Topology) -> io::Result<()> {
        self.replace("services.yaml", &topology.services())
    }

    /// Writes the EndpointSlices anew.
    pub(crate) fn slices(&self, topology: &Topology) -> io::Result<()> {
        self.replace("endpointslices.yaml", &topology.slices())
    }

    /// Writes the policy that has the version's sidecars prepare photographs.
    pub(crate) fn photos(&self, service: &str) -> io::Result<()> {
        self.replace("policies.yaml", &photos::policy(NAMESPACE, service))
    }

    fn replace(&self, name: &str, yaml: &str) -> io::Result<()> {
        // A leading dot and no .yaml at the end: nothing that control would read.
        let draft = self.directory.join(format!(".{name}.draft"));
        std::fs::write(&draft, yaml)?;
        std::fs::rename(draft, self.directory.join(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    fn objects(yaml: &str) -> Vec<Value> {
        serde_saphyr::from_multiple(yaml).unwrap()
    }

    #[test]
    fn what_is_written_reads_back_as_the_same_topology() {
        let mut topology = Topology::usual();
        topology.v2 = 105;
        topology.pods[RESTARTED].presence = Presence::Terminating;
        topology.pods[KILLED].presence = Presence::Absent;

        let services = objects(&topology.services());
        assert_eq!(services.len(), 3);
        assert_eq!(services[0]["metadata"]["name"], SERVICE);
        let annotations = &services[0]["metadata"]["annotations"];
        assert_eq!(annotations[annotation::TRAFFIC_SPLIT], "digits-v1=895,digits-v2=105");
        assert_eq!(services[1]["spec"]["ports"][0]["targetPort"], topology.ports.server);

        let slices = objects(&topology.slices());
        assert_eq!(slices[0]["endpoints"].as_array().map(Vec::len), Some(1));
        assert_eq!(slices[0]["endpoints"][0]["conditions"]["terminating"], true);
        assert_eq!(slices[0]["endpoints"][0]["conditions"]["ready"], false);
        assert_eq!(slices[0]["endpoints"][0]["targetRef"]["name"], "digits-v1-a");
        assert_eq!(slices[1]["endpoints"][0]["conditions"]["ready"], true);

        topology.pods[RESTARTED].presence = Presence::Absent;
        assert_eq!(objects(&topology.slices())[0]["endpoints"], Value::Array(vec![]));

        let pods = objects(&topology.pods());
        assert_eq!(pods.len(), 4);
        for (pod, written) in topology.pods.iter().zip(&pods) {
            assert_eq!(written["metadata"]["name"], pod.name);
            assert_eq!(written["status"]["podIP"], pod.ip.to_string());
            assert_eq!(written["spec"]["serviceAccountName"], pod.account);
            assert_eq!(written["metadata"]["annotations"][annotation::INBOUND_PORT], "15006");
        }
    }

    #[test]
    fn the_examples_for_people_are_the_objects_of_the_demo() {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/examples/digits");
        let topology = Topology { v2: 100, ..Topology::usual() };
        for (file, written) in [
            ("services.yaml", topology.services()),
            ("endpointslices.yaml", topology.slices()),
            ("pods.yaml", topology.pods()),
        ] {
            let example = std::fs::read_to_string(directory.join(file)).unwrap();
            let mut example = objects(&example);
            // People write percent; the demo's steps are finer.
            let split = example[0]["metadata"]
                .get_mut("annotations")
                .and_then(|annotations| annotations.get_mut(annotation::TRAFFIC_SPLIT));
            if let Some(split) = split {
                assert_eq!(split, "digits-v1=90,digits-v2=10");
                *split = "digits-v1=900,digits-v2=100".into();
            }
            assert_eq!(example, objects(&written), "{file}");
        }
    }

    #[test]
    fn a_taken_port_is_left_alone() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        assert_ne!(free_port(&[Ipv4Addr::LOCALHOST], port).unwrap(), port);
    }
}
