//! Pods: who they are, what their own proxy needs, and what lies at their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{self as core, Pod, PodCondition, PodSpec, PodStatus};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use penstock_api::SpiffeId;
use penstock_api::annotation::{Ports, pod as of_pod};
use penstock_api::names::{PROMOTED, annotation};
use penstock_api::resource::Kind;
use penstock_api::v1::{self, Protocol};

use super::endpoints::Joined;
use super::faults::Faults;
use super::services::{Services, protocol};
use super::view::View;
use crate::objects::{Object, annotation_pointer};
use crate::snapshot::Builder;

/// A pod as the mesh sees it.
pub(super) struct PodModel<'a> {
    pub object: &'a Object,
    pub service_account: String,
    /// In the mesh: its traffic goes through a proxy.
    pub injected: bool,
    /// The SPIFFE id, of a pod in the mesh.
    pub identity: Option<SpiffeId>,
    /// Where its proxy is dialled, when traffic is not redirected; 0 otherwise.
    pub inbound_port: u32,
    pub permissive: bool,
    /// How the application's requests are queued.
    pub admission: Option<v1::Admission>,
    /// Its application is told who calls.
    pub forward_identity: bool,
    /// How its GPU's memory is shared with its application.
    pub gpu: Option<v1::Gpu>,
    /// Callers that get shared memory of their own.
    pub tenant_regions: u32,
    /// What the kubelet asks it for.
    probes: BTreeSet<Probe>,
    /// Ports that are reached past its proxy.
    past: Ports,
    /// It serves. One that does not say is ready when it runs.
    pub ready: bool,
    /// It would serve, if no gate were closed: all of its containers are ready.
    pub gated: bool,
    /// It is being ended.
    pub terminating: bool,
    /// Ports whose bytes are not looked at.
    pub opaque: Vec<u16>,
    pub node: String,
    /// It has not been started yet.
    pending: bool,
    /// Nobody has heard of its node, and nobody has said that anything is wrong with it.
    pub unheard: bool,
    /// Its addresses, one of each family at most; the application is reached at the first.
    ips: Vec<IpAddr>,
    /// TCP ports of the containers, and their names.
    ports: BTreeMap<u16, String>,
    host_network: bool,
}

/// A probe that a proxy can tell from everything else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Probe {
    /// A port, and a path with its query.
    Get(u16, String),
    /// A port, and the service that gRPC's health service is asked about.
    Health(u16, String),
}

/// All pods by `<namespace>/<name>`; those that have ended are left out.
pub(super) type Pods<'a> = BTreeMap<String, PodModel<'a>>;

/// Reads the pods.
pub(super) fn read<'a>(view: &View<'a>, trust_domain: &str, faults: &mut Faults) -> Pods<'a> {
    let mut pods = Pods::new();
    for (object, pod) in &view.pods {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        if !matches!(phase, Some("Succeeded" | "Failed")) {
            pods.insert(object.id.qualified(), model(object, pod, trust_domain, faults));
        }
    }
    pods
}

fn condition<'a>(status: &'a PodStatus, kind: &str) -> Option<&'a PodCondition> {
    status.conditions.iter().flatten().find(|one| one.type_ == kind)
}

/// Why a pod is not ready though all of its containers are.
#[derive(PartialEq)]
enum Unready {
    /// Its Canary's gate is closed, and no other.
    Gated,
    /// Another gate is closed, which says so itself.
    Closed,
    /// Its node has not been heard of, as after an outage of the API server: the kubelet's word, that all containers are ready, still stands.
    Unheard,
}

fn unready(pod: &Pod, status: &PodStatus) -> Option<Unready> {
    let so = |kind: &str, value: &str| condition(status, kind).is_some_and(|one| one.status == value);
    let gates = || pod.spec.iter().flat_map(|spec| spec.readiness_gates.iter().flatten());
    let mut others = gates().filter(|gate| gate.condition_type != PROMOTED);
    let reason = condition(status, "Ready").and_then(|ready| ready.reason.as_deref());
    let why = match reason {
        Some("ReadinessGatesNotReady") if others.all(|gate| so(&gate.condition_type, "True")) => {
            Unready::Gated
        }
        Some("ReadinessGatesNotReady") => Unready::Closed,
        _ => Unready::Unheard,
    };
    (so("Ready", "False") && so("ContainersReady", "True")).then_some(why)
}

fn model<'a>(object: &'a Object, pod: &Pod, trust_domain: &str, faults: &mut Faults) -> PodModel<'a> {
    let injected = setting(object, &of_pod::INJECT, faults).unwrap_or(false);
    let permissive = setting(object, &of_pod::PERMISSIVE, faults).unwrap_or(false);
    let admission = setting(object, &of_pod::ADMISSION, faults);
    let forward_identity = setting(object, &of_pod::FORWARD_IDENTITY, faults).unwrap_or(false);
    let gpu = setting(object, &of_pod::GPU, faults);
    let tenant_regions = setting(object, &of_pod::TENANT_REGIONS, faults).unwrap_or(0);
    let opaque = setting(object, &of_pod::OPAQUE_PORTS, faults).unwrap_or_default();
    let past = setting(object, &of_pod::SKIP_INBOUND_PORTS, faults).unwrap_or_default();
    let inbound_port = setting(object, &of_pod::INBOUND_PORT, faults).unwrap_or(0);

    let spec = pod.spec.as_ref();
    let text = |value: Option<&String>| value.cloned().unwrap_or_default();
    let service_account = spec
        .and_then(|spec| spec.service_account_name.clone())
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "default".to_owned());
    let identity = match SpiffeId::new(trust_domain, &object.id.namespace, &service_account) {
        Ok(id) if injected => Some(id),
        Err(error) if injected => {
            faults.refuse(object, "/spec/serviceAccountName", error.to_string());
            None
        }
        _ => None,
    };
    let mut ports = BTreeMap::new();
    let containers =
        spec.into_iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    for port in containers.flat_map(|container| container.ports.iter().flatten()) {
        if port.protocol.as_deref().unwrap_or("TCP") == "TCP"
            && let Ok(number) = u16::try_from(port.container_port)
        {
            ports.insert(number, text(port.name.as_ref()));
        }
    }
    let declared = Declared { object, injected, ports: &ports, past: &past };
    let probes = declared.probes(spec, faults);
    let mut ips: Vec<IpAddr> = Vec::new();
    if let Some(status) = &pod.status {
        let texts = status.pod_ip.iter().chain(status.pod_ips.iter().flatten().map(|ip| &ip.ip));
        for ip in texts.filter_map(|ip| ip.parse().ok()) {
            if !ips.contains(&ip) {
                ips.push(ip);
            }
        }
    }
    let said = pod.status.as_ref().and_then(|status| condition(status, "Ready"));
    let unready = pod.status.as_ref().and_then(|status| unready(pod, status));
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    PodModel {
        object,
        ready: said.map_or(phase == Some("Running"), |condition| condition.status == "True"),
        gated: unready == Some(Unready::Gated),
        terminating: pod.metadata.deletion_timestamp.is_some(),
        service_account,
        injected,
        identity,
        inbound_port: inbound_port.into(),
        permissive,
        admission,
        forward_identity,
        gpu,
        tenant_regions,
        probes,
        past,
        opaque,
        node: text(spec.and_then(|spec| spec.node_name.as_ref())),
        pending: phase == Some("Pending"),
        unheard: unready == Some(Unready::Unheard),
        ips,
        ports,
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
    }
}

/// Reads an annotation; what doesn't parse is a fault and counts as not said.
fn setting<T>(object: &Object, key: &of_pod::Key<T>, faults: &mut Faults) -> Option<T> {
    match key.read(object.annotation(key.name)?) {
        Ok(value) => Some(value),
        Err(error) => {
            faults.refuse(object, annotation_pointer(key.name), error.to_string());
            None
        }
    }
}

/// What matters about a pod for what the kubelet asks it.
struct Declared<'a> {
    object: &'a Object,
    injected: bool,
    ports: &'a BTreeMap<u16, String>,
    past: &'a Ports,
}

impl Declared<'_> {
    /// What the kubelet asks the pod for in plaintext, as far as its proxy can tell that from everything else. Of the rest it
    /// is said that it does not work, or says nothing.
    fn probes(&self, spec: Option<&PodSpec>, faults: &mut Faults) -> BTreeSet<Probe> {
        let mut found = BTreeSet::new();
        let containers = spec.into_iter().flat_map(|spec| {
            let init = spec.init_containers.iter().flatten().enumerate();
            let init = init.map(|(index, container)| (format!("/spec/initContainers/{index}"), container));
            let main = spec.containers.iter().enumerate();
            main.map(|(index, container)| (format!("/spec/containers/{index}"), container)).chain(init)
        });
        for (pointer, container) in containers {
            for (name, probe) in [
                ("readinessProbe", &container.readiness_probe),
                ("livenessProbe", &container.liveness_probe),
                ("startupProbe", &container.startup_probe),
            ] {
                let Some(probe) = probe else { continue };
                self.take(self.probe(probe), &format!("{pointer}/{name}"), &mut found, faults);
            }
            // The kubelet sends these as well, and kills a container whose postStart fails.
            let hooks = container.lifecycle.iter();
            let hooks =
                hooks.flat_map(|hooks| [("postStart", &hooks.post_start), ("preStop", &hooks.pre_stop)]);
            for (name, hook) in hooks {
                let Some(get) = hook.as_ref().and_then(|hook| hook.http_get.as_ref()) else { continue };
                self.take(self.get(get), &format!("{pointer}/lifecycle/{name}"), &mut found, faults);
            }
        }
        found
    }

    fn take(
        &self,
        probe: Result<Option<Probe>, String>,
        pointer: &str,
        found: &mut BTreeSet<Probe>,
        faults: &mut Faults,
    ) {
        match probe {
            Ok(probe) => found.extend(probe),
            Err(why) if self.injected => faults.note(self.object, pointer, why),
            Err(_) => {}
        }
    }

    fn get(&self, get: &core::HTTPGetAction) -> Result<Option<Probe>, String> {
        let Some(port) = self.redirected(&get.port) else { return Ok(None) };
        if get.scheme.as_deref().unwrap_or("HTTP") != "HTTP" {
            return Err(format!(
                "an HTTPS request of the kubelet to port {port} meets the proxy's mutual TLS and fails; ask over plain HTTP, gRPC \
                 or exec, or let the port past the proxy ({})",
                annotation::SKIP_INBOUND_PORTS
            ));
        }
        let path = get.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
        let slash = if path.starts_with('/') { "" } else { "/" };
        Ok(Some(Probe::Get(port, format!("{slash}{path}"))))
    }

    fn probe(&self, probe: &core::Probe) -> Result<Option<Probe>, String> {
        if let Some(get) = &probe.http_get {
            return self.get(get);
        }
        if let Some(grpc) = &probe.grpc {
            let port = self.redirected(&IntOrString::Int(grpc.port));
            return Ok(port.map(|port| Probe::Health(port, grpc.service.clone().unwrap_or_default())));
        }
        if let Some(tcp) = &probe.tcp_socket
            && let Some(port) = self.redirected(&tcp.port)
        {
            return Err(format!(
                "a tcpSocket probe of port {port} reaches the proxy, which takes every connection, so it says nothing about the \
                 application; probe over HTTP, gRPC or exec, or let the port past the proxy ({})",
                annotation::SKIP_INBOUND_PORTS
            ));
        }
        Ok(None)
    }

    /// The number of a port that comes by the proxy.
    fn redirected(&self, port: &IntOrString) -> Option<u16> {
        let number = match port {
            IntOrString::Int(number) => u16::try_from(*number).ok(),
            IntOrString::String(name) => {
                self.ports.iter().find(|(_, known)| *known == name).map(|(port, _)| *port)
            }
        };
        number.filter(|number| *number > 0 && !self.past.contains(*number))
    }
}

impl PodModel<'_> {
    /// Whether the port is reached past the pod's proxy, by the pod's own word: `penstock.io/skip-inbound-ports`.
    pub(super) fn is_past_proxy(&self, port: u16) -> bool {
        self.past.contains(port)
    }

    /// The ports that its containers declare.
    pub(super) fn declared(&self) -> impl Iterator<Item = u16> {
        self.ports.keys().copied()
    }

    /// The number of the port that a container calls so.
    pub(super) fn port_of(&self, name: &str) -> Option<u16> {
        self.ports.iter().find(|(_, known)| *known == name).map(|(port, _)| *port)
    }

    /// The pod as somebody else's proxy reaches a port of it. Where the pod says that the port is none of its proxy's,
    /// nobody is there who could prove an identity, and it is called as everything outside the mesh is.
    pub(super) fn endpoint_at(&self, name: &str, ip: IpAddr, port: u16) -> v1::Endpoint {
        let endpoint = self.endpoint(name, ip);
        if !self.injected || !self.is_past_proxy(port) {
            return endpoint;
        }
        v1::Endpoint { identity: String::new(), inbound_port: 0, ..endpoint }
    }

    /// Where its application is.
    pub(super) fn address(&self) -> Option<IpAddr> {
        self.ips.first().copied()
    }

    /// The pod as somebody else's proxy reaches it.
    pub(super) fn endpoint(&self, name: &str, ip: IpAddr) -> v1::Endpoint {
        v1::Endpoint {
            name: name.to_owned(),
            ip: ip.to_string(),
            identity: self.identity.as_ref().map_or_else(String::new, SpiffeId::to_string),
            inbound_port: if self.injected { self.inbound_port } else { 0 },
            node: self.node.clone(),
            ..v1::Endpoint::default()
        }
    }
}

/// Adds what lies at the pods' addresses, and the workloads of those in the mesh.
pub(super) fn add(
    pods: &Pods<'_>,
    services: &Services<'_>,
    joined: &Joined,
    builder: &mut Builder,
    faults: &mut Faults,
) {
    let mut taken: BTreeMap<SocketAddr, &str> = BTreeMap::new();
    let nothing = BTreeMap::new();
    for (name, pod) in pods {
        let Some(&ip) = pod.ips.first() else {
            // A pod that has just been made gets one in a moment.
            if pod.injected && !pod.pending {
                let message = "it has no status.podIP, so its proxy is not configured; give it one";
                faults.note(pod.object, "/status/podIP", message);
            }
            continue;
        };
        let targets = joined.targets.get(name).unwrap_or(&nothing);
        let numbers: BTreeSet<u16> = pod.ports.keys().chain(targets.keys()).copied().collect();
        let mut ports = Vec::new();
        // By a Service, of all that it leads to.
        let mut asked = None;
        for number in numbers {
            let leading = targets.get(&number).map(Vec::as_slice).unwrap_or_default();
            let protocol = if pod.opaque.contains(&number) {
                Protocol::Opaque
            } else {
                leading
                    .iter()
                    .filter_map(|(service, port)| {
                        services.get(service)?.ports.iter().find(|known| known.port == *port)
                    })
                    .map(v1::ServicePort::protocol)
                    .find(|protocol| *protocol != Protocol::Detect)
                    .unwrap_or_else(|| protocol(None, pod.ports.get(&number).map_or("", String::as_str)))
            };
            let address = SocketAddr::new(ip, number);
            let mut names: Vec<_> = leading.iter().map(|(service, _)| service.to_string()).collect();
            names.dedup();
            if pod.injected {
                for policy in leading.iter().filter_map(|(service, _)| services.get(service)?.inference) {
                    builder.part_of(policy, Kind::Workload, name.as_str());
                }
            }
            let policies = || leading.iter().filter_map(|(service, _)| Some(&services.get(service)?.policy));
            asked = asked.or_else(|| policies().find_map(|policy| policy.admission));
            ports.push(v1::WorkloadPort {
                port: number.into(),
                protocol: protocol.into(),
                application: address.to_string(),
                services: names,
                batch: policies().find_map(|policy| policy.batch),
                coalesce: policies().find_map(|policy| policy.coalesce.clone()),
                pipelines: policies()
                    .find(|policy| !policy.pipelines.is_empty())
                    .map(|policy| policy.pipelines.clone())
                    .unwrap_or_default(),
            });
            // The address of a node says nothing about which of its pods is meant.
            if pod.host_network || (pod.injected && pod.identity.is_none()) {
                continue;
            }
            // A pod is called at each of its addresses, and is the same endpoint at all of them.
            for &ip in &pod.ips {
                let address = SocketAddr::new(ip, number);
                if let Some(owner) = taken.get(&address) {
                    let message = format!(
                        "its address {address} belongs to Pod {owner} already, and connections to it go there; \
                         give each pod its own status.podIP, or its own ports"
                    );
                    faults.note(pod.object, "/status/podIP", message);
                    continue;
                }
                taken.insert(address, name);
                let mut endpoint = pod.endpoint_at(name, ip, number);
                endpoint.ports = vec![v1::PortTarget { service_port: number.into(), port: number.into() }];
                let target = Some(v1::address::Target::Endpoint(endpoint));
                let message = v1::Address { target, port: number.into(), protocol: protocol.into() };
                builder.add(Kind::Address, address.to_string(), &message);
            }
        }
        // All other ports: a proxy must not take them for something outside the mesh and call them in plaintext.
        if pod.injected && !pod.host_network {
            for &ip in &pod.ips {
                let rest = SocketAddr::new(ip, 0);
                if taken.insert(rest, name).is_none() {
                    let target = Some(v1::address::Target::Endpoint(pod.endpoint(name, ip)));
                    let message = v1::Address { target, ..v1::Address::default() };
                    builder.add(Kind::Address, rest.to_string(), &message);
                }
            }
        }
        if pod.injected {
            let (mut probes, mut grpc_probes) = (Vec::new(), Vec::new());
            for probe in &pod.probes {
                let (Probe::Get(port, text) | Probe::Health(port, text)) = probe;
                let application = SocketAddr::new(ip, *port).to_string();
                let (port, text) = (u32::from(*port), text.clone());
                match probe {
                    Probe::Get(..) => probes.push(v1::Probe { port, path: text, application }),
                    Probe::Health(..) => {
                        grpc_probes.push(v1::GrpcProbe { port, service: text, application });
                    }
                }
            }
            let message = v1::Workload {
                namespace: pod.object.id.namespace.clone(),
                name: pod.object.id.name.clone(),
                service_account: pod.service_account.clone(),
                ports,
                permissive: pod.permissive,
                admission: pod.admission.or(asked),
                probes,
                grpc_probes,
                forward_identity: pod.forward_identity,
                gpu: pod.gpu,
                tenant_regions: pod.tenant_regions,
            };
            builder.add(Kind::Workload, name.as_str(), &message);
        }
    }
}
