//! Pods: who they are, what their own proxy needs, and what lies at their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Pod, PodSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use penstock_api::SpiffeId;
use penstock_api::names::annotation;
use penstock_api::resource::Kind;
use penstock_api::v1::{self, Protocol};

use super::annotations;
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
    /// Its HTTP probes: port, and path with query.
    probes: BTreeSet<(u16, String)>,
    /// Ports whose bytes are not looked at.
    pub opaque: Vec<u16>,
    pub node: String,
    /// Its addresses, one of each family at most; the application is reached at the first.
    ips: Vec<IpAddr>,
    /// TCP ports of the containers, and their names.
    ports: BTreeMap<u16, String>,
    host_network: bool,
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

fn model<'a>(object: &'a Object, pod: &Pod, trust_domain: &str, faults: &mut Faults) -> PodModel<'a> {
    let injected =
        setting(object, annotation::INJECT, faults, |text| annotations::either(text, "enabled", "disabled"))
            .unwrap_or(false);
    let permissive =
        setting(object, annotation::MTLS, faults, |text| annotations::either(text, "permissive", "strict"))
            .unwrap_or(false);
    let admission = setting(object, annotation::ADMISSION, faults, annotations::admission);
    let forward_identity = setting(object, annotation::FORWARD_IDENTITY, faults, |text| {
        annotations::either(text, "true", "false")
    })
    .unwrap_or(false);
    let opaque = setting(object, annotation::OPAQUE_PORTS, faults, annotations::ports).unwrap_or_default();
    let inbound_port = setting(object, annotation::INBOUND_PORT, faults, annotations::port).unwrap_or(0);

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
    let probes = probes(spec, &ports);
    let mut ips: Vec<IpAddr> = Vec::new();
    if let Some(status) = &pod.status {
        let texts = status.pod_ip.iter().chain(status.pod_ips.iter().flatten().map(|ip| &ip.ip));
        for ip in texts.filter_map(|ip| ip.parse().ok()) {
            if !ips.contains(&ip) {
                ips.push(ip);
            }
        }
    }
    PodModel {
        object,
        service_account,
        injected,
        identity,
        inbound_port: inbound_port.into(),
        permissive,
        admission,
        forward_identity,
        probes,
        opaque,
        node: text(spec.and_then(|spec| spec.node_name.as_ref())),
        ips,
        ports,
        host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
    }
}

/// Reads an annotation; what doesn't parse is a fault and counts as not said.
fn setting<T>(
    object: &Object,
    key: &str,
    faults: &mut Faults,
    read: impl Fn(&str) -> Result<T, String>,
) -> Option<T> {
    match read(object.annotation(key)?) {
        Ok(value) => Some(value),
        Err(error) => {
            faults.refuse(object, annotation_pointer(key), format!("annotation {key}: {error}"));
            None
        }
    }
}

/// What the kubelet asks the pod for over plain HTTP.
fn probes(spec: Option<&PodSpec>, ports: &BTreeMap<u16, String>) -> BTreeSet<(u16, String)> {
    let containers =
        spec.into_iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    let each = containers.flat_map(|container| {
        [&container.readiness_probe, &container.liveness_probe, &container.startup_probe]
            .into_iter()
            .flatten()
    });
    let gets = each.filter_map(|probe| probe.http_get.as_ref());
    let plain = gets.filter(|get| get.scheme.as_deref().unwrap_or("HTTP") == "HTTP");
    let found = plain.filter_map(|get| {
        // One that goes elsewhere does not come here.
        let number = match &get.port {
            IntOrString::Int(number) => u16::try_from(*number).ok(),
            IntOrString::String(name) => {
                ports.iter().find(|(_, known)| *known == name).map(|(port, _)| *port)
            }
        };
        let path = get.path.as_deref().filter(|path| !path.is_empty()).unwrap_or("/");
        let slash = if path.starts_with('/') { "" } else { "/" };
        Some((number.filter(|number| *number > 0)?, format!("{slash}{path}")))
    });
    found.collect()
}

impl PodModel<'_> {
    /// The number of the port that a container calls so.
    pub(super) fn port_of(&self, name: &str) -> Option<u16> {
        self.ports.iter().find(|(_, known)| *known == name).map(|(port, _)| *port)
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
            // In Kubernetes it gets one in a moment.
            if pod.injected {
                let message = "it has no status.podIP, so its proxy is not configured; give it one";
                faults.note(pod.object, "/status/podIP", message);
            }
            continue;
        };
        let targets = joined.targets.get(name).unwrap_or(&nothing);
        let numbers: BTreeSet<u16> = pod.ports.keys().chain(targets.keys()).copied().collect();
        let mut ports = Vec::new();
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
            let policies = || leading.iter().filter_map(|(service, _)| Some(&services.get(service)?.policy));
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
                let mut endpoint = pod.endpoint(name, ip);
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
            let probes = pod.probes.iter().map(|(port, path)| v1::Probe {
                port: (*port).into(),
                path: path.clone(),
                application: SocketAddr::new(ip, *port).to_string(),
            });
            let probes = probes.collect();
            let message = v1::Workload {
                namespace: pod.object.id.namespace.clone(),
                name: pod.object.id.name.clone(),
                service_account: pod.service_account.clone(),
                ports,
                permissive: pod.permissive,
                admission: pod.admission,
                probes,
                forward_identity: pod.forward_identity,
            };
            builder.add(Kind::Workload, name.as_str(), &message);
        }
    }
}
