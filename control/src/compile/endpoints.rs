//! Endpoints: EndpointSlices, and what pools and templates have in place of them, joined with the pods behind them.
//!
//! An endpoint whose pod is not known is left out: without its identity it would be dialled in plaintext, and a
//! downgrade must never come from an object that is late.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use penstock_api::ServiceName;
use penstock_api::resource::Kind;
use penstock_api::v1::{self, Protocol};

use super::faults::Faults;
use super::pods::Pods;
use super::pools;
use super::services::{ServiceModel, Services};
use super::templates::Templates;
use super::view::{Of, View};
use crate::objects::{Object, ObjectKind};
use crate::snapshot::Builder;

const SERVICE_NAME: &str = "kubernetes.io/service-name";

/// Endpoints and what they say about pods.
pub(super) struct Joined {
    /// Every Service has an entry, even without endpoints.
    endpoints: BTreeMap<ServiceName, v1::Endpoints>,
    /// For each pod and port, the Services and service ports that lead there, whether the pod is ready or not.
    pub targets: BTreeMap<String, BTreeMap<u16, Vec<(ServiceName, u32)>>>,
}

impl Joined {
    /// To how many endpoints of a Service requests may go.
    pub(super) fn ready(&self, service: &ServiceName) -> usize {
        let all = self.endpoints.get(service).into_iter().flat_map(|all| &all.endpoints);
        all.filter(|one| !one.draining).count()
    }
}

/// Joins slices with pods and Services. A service port that leads to a port which a pod declares opaque becomes
/// opaque too: both sides must read the same bytes alike.
pub(super) fn join(
    view: &View<'_>,
    pods: &Pods<'_>,
    services: &mut Services<'_>,
    templates: &Templates<'_, '_>,
    faults: &mut Faults,
) -> Joined {
    let mut slices: BTreeMap<ServiceName, Vec<Of<'_, EndpointSlice>>> = BTreeMap::new();
    for (object, slice) in &view.slices {
        match owner(object, services) {
            Ok(service) => slices.entry(service).or_default().push((object, slice)),
            Err(message) => {
                faults.refuse(
                    object,
                    format!("/metadata/labels/{}", SERVICE_NAME.replace('/', "~1")),
                    message,
                );
            }
        }
    }
    let pools = pools::slices(view, pods, services);
    for (name, (object, slice)) in &pools {
        slices.entry(name.clone()).or_default().push((object, slice));
    }
    let templates = templates.slices(services);
    for (name, (object, all)) in &templates {
        slices.entry(name.clone()).or_default().extend(all.iter().map(|slice| (*object, slice)));
    }
    let mut joined = Joined { endpoints: BTreeMap::new(), targets: BTreeMap::new() };
    for (name, service) in services.iter_mut() {
        let slices = slices.remove(name).unwrap_or_default();
        // What ports a template has is its pods' word, and the Service's own endpoints are held against its ports.
        if service.object.id.kind != ObjectKind::Canary {
            check_ports(service, &slices, faults);
        }
        let mut opaque = BTreeSet::new();
        let endpoints = endpoints(service, &slices, pods, &mut joined, &mut opaque, faults);
        joined.endpoints.insert(name.clone(), endpoints);
        for port in service.ports.iter_mut().filter(|port| opaque.contains(&port.port)) {
            port.set_protocol(Protocol::Opaque);
        }
    }
    joined
}

/// Adds the endpoints of every Service.
pub(super) fn add(joined: &Joined, builder: &mut Builder) {
    for (name, endpoints) in &joined.endpoints {
        builder.add(Kind::Endpoints, name.as_str(), endpoints);
    }
}

/// The Service that a slice belongs to.
fn owner(object: &Object, services: &Services<'_>) -> Result<ServiceName, String> {
    let label = object.metadata().labels.as_ref().and_then(|labels| labels.get(SERVICE_NAME));
    let name = label.ok_or_else(|| {
        format!("it does not say which Service it belongs to; add the label {SERVICE_NAME}: <service>")
    })?;
    ServiceName::new(&object.id.namespace, name)
        .ok()
        .filter(|name| services.contains_key(name))
        .ok_or_else(|| {
            format!(
                "it belongs to the Service {}/{name}, which does not exist; create it, or correct the label {SERVICE_NAME}",
                object.id.namespace
            )
        })
}

/// Refuses a Service with a port that none of its endpoints has. Without endpoints there is nothing to say.
fn check_ports(service: &ServiceModel<'_>, slices: &[Of<'_, EndpointSlice>], faults: &mut Faults) {
    let slices: Vec<_> = slices.iter().filter(|(_, slice)| !slice.endpoints.is_empty()).collect();
    let known: BTreeSet<&str> = slices
        .iter()
        .flat_map(|(_, slice)| slice.ports.iter().flatten())
        .map(|port| port.name.as_deref().unwrap_or(""))
        .collect();
    for (port, index) in service.ports.iter().zip(&service.indices) {
        if !slices.is_empty() && !known.contains(port.name.as_str()) {
            let in_words: Vec<_> = known.iter().map(|name| format!("{name:?}")).collect();
            let message = format!(
                "no endpoint of {} has a port named {:?} for service port {} (the endpoints' ports: {}); \
                 name a port of its EndpointSlices so, or remove it from the Service",
                service.name,
                port.name,
                port.port,
                if in_words.is_empty() { "none".to_owned() } else { in_words.join(", ") },
            );
            faults.refuse(service.object, format!("/spec/ports/{index}"), message);
        }
    }
}

/// The endpoints of one Service, and which of its ports some pod declares opaque. During a change an endpoint may be in two slices: their ports are joined.
fn endpoints(
    service: &ServiceModel<'_>,
    slices: &[Of<'_, EndpointSlice>],
    pods: &Pods<'_>,
    joined: &mut Joined,
    opaque: &mut BTreeSet<u32>,
    faults: &mut Faults,
) -> v1::Endpoints {
    // A pod of which some ports are reached past its proxy is two endpoints: who is there differs.
    let mut found: BTreeMap<(String, IpAddr, bool), v1::Endpoint> = BTreeMap::new();
    // Pods that are not ready only because their nodes have not been heard of.
    let mut last: BTreeSet<String> = BTreeSet::new();
    for (object, slice) in slices {
        if slice.address_type == "FQDN" {
            let message = "endpoints named by DNS are not supported and left out; use IPv4 or IPv6 addresses";
            faults.note(object, "/addressType", message);
            continue;
        }
        for (index, endpoint) in slice.endpoints.iter().enumerate() {
            let pointer = format!("/endpoints/{index}");
            let address = endpoint.addresses.first().map_or("", String::as_str);
            let Ok(ip) = address.parse::<IpAddr>() else {
                let message = format!("{address:?} is not an IP address, and the endpoint is left out");
                faults.refuse(object, format!("{pointer}/addresses/0"), message);
                continue;
            };
            let ports = ports(service, slice);
            let pod_name =
                endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
            let pod_name = pod_name.map(|target| {
                let namespace = target.namespace.as_deref().unwrap_or(&object.id.namespace);
                format!("{namespace}/{}", target.name.as_deref().unwrap_or_default())
            });
            let mut message = match &pod_name {
                None => v1::Endpoint { name: ip.to_string(), ip: ip.to_string(), ..v1::Endpoint::default() },
                Some(name) => match pods.get(name) {
                    Some(pod) if pod.injected && pod.identity.is_none() => continue,
                    Some(pod) => pod.endpoint(name, ip),
                    // On its way out: Kubernetes takes the endpoint away once it has taken the pod away.
                    None if state(endpoint) != Some(false) => continue,
                    None => {
                        let message = format!(
                            "the endpoint {ip} is left out: its Pod {name} is not known or has ended, so nobody \
                             can say which identity it must prove; add the Pod, or correct targetRef"
                        );
                        faults.note(object, format!("{pointer}/targetRef"), message);
                        continue;
                    }
                },
            };
            if let Some(name) = pod_name {
                let declared = pods.get(&name).map(|pod| pod.opaque.as_slice()).unwrap_or_default();
                let targets = joined.targets.entry(name).or_default();
                for target in &ports {
                    let number = u16::try_from(target.port).unwrap_or_default();
                    let leading = targets.entry(number).or_default();
                    let this = (service.name.clone(), target.service_port);
                    // A pod of a template is one of the Service, and has its name.
                    if !leading.contains(&this) && service.object.id.kind != ObjectKind::Canary {
                        leading.push(this);
                    }
                    if declared.contains(&number) {
                        opaque.insert(target.service_port);
                    }
                }
            }
            let leaves = endpoint.conditions.as_ref().and_then(|said| said.terminating).unwrap_or(false);
            let unheard = !leaves && pods.get(&message.name).is_some_and(|pod| pod.unheard);
            message.draining = match state(endpoint) {
                Some(draining) => draining,
                None if unheard => {
                    last.insert(message.name.clone());
                    false
                }
                None => continue,
            };
            message.zone = endpoint.zone.clone().unwrap_or_default();
            if let Some(node) = &endpoint.node_name {
                message.node.clone_from(node);
            }
            let pod = pods.get(&message.name);
            let is_past = |port: &v1::PortTarget| {
                pod.is_some_and(|pod| u16::try_from(port.port).is_ok_and(|port| pod.is_past_proxy(port)))
            };
            let (past, through): (Vec<_>, Vec<_>) = ports.into_iter().partition(is_past);
            for ports in [through, past] {
                let Some(first) = ports.first() else { continue };
                let number = u16::try_from(first.port).unwrap_or_default();
                let of_port = pod.map(|pod| pod.endpoint_at(&message.name, ip, number));
                let of_port = of_port.unwrap_or_else(|| message.clone());
                let message = v1::Endpoint {
                    ports: Vec::new(),
                    identity: of_port.identity,
                    inbound_port: of_port.inbound_port,
                    ..message.clone()
                };
                let known = found.entry((message.name.clone(), ip, is_past(first)));
                let known = known.or_insert_with(|| v1::Endpoint { draining: true, ..message.clone() });
                known.ports.extend(ports);
                known.ports.sort_by_key(|port| (port.service_port, port.port));
                known.ports.dedup();
                known.draining &= message.draining;
            }
        }
    }
    // Where most of a Service are such, it is not their nodes that are gone: after an outage of the API server all nodes count as away until
    // their kubelets have spoken again. Where most are ready, the others are left out as anybody's that is not.
    let names =
        |draining: bool| found.values().filter(move |one| one.draining == draining).map(|one| &one.name);
    let ready = names(false).filter(|name| !last.contains(*name)).collect::<BTreeSet<_>>().len();
    if ready >= last.len() {
        found.retain(|(name, ..), _| !last.contains(name));
    }
    v1::Endpoints { endpoints: found.into_values().collect() }
}

/// Whether an endpoint is draining; `None` when it takes no requests at all.
fn state(endpoint: &Endpoint) -> Option<bool> {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    // Unknown means ready, and serving means what ready means unless said (EndpointSlice API).
    let ready = conditions.ready.unwrap_or(true);
    let serving = conditions.serving.unwrap_or(ready);
    match (serving && conditions.terminating.unwrap_or(false), ready) {
        (true, _) => Some(true),
        (false, true) => Some(false),
        (false, false) => None,
    }
}

/// Where the ports of the Service lead in a slice: ports are paired by name.
fn ports(service: &ServiceModel<'_>, slice: &EndpointSlice) -> Vec<v1::PortTarget> {
    let target = |port: &v1::ServicePort| {
        let paired = slice.ports.iter().flatten().find(|paired| {
            paired.name.as_deref().unwrap_or("") == port.name
                && paired.protocol.as_deref().unwrap_or("TCP") == "TCP"
        })?;
        // A port without a number stands for every port.
        let number =
            paired.port.map_or(Some(port.port), |number| u16::try_from(number).ok().map(u32::from))?;
        Some(v1::PortTarget { service_port: port.port, port: number })
    };
    service.ports.iter().filter_map(target).collect()
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::discovery::v1::EndpointConditions;

    use super::*;

    #[test]
    fn an_endpoint_serves_drains_or_is_left_out() {
        let (yes, no) = (Some(true), Some(false));
        let table = [
            ((None, None, None), Some(false)),
            ((yes, yes, no), Some(false)),
            ((no, yes, yes), Some(true)),
            ((yes, yes, yes), Some(true)),
            ((no, no, yes), None),
            ((no, no, no), None),
            ((no, None, yes), None),
            // Ready is false while terminating; serving alone does not make an endpoint ready.
            ((no, yes, no), None),
        ];
        for ((ready, serving, terminating), expected) in table {
            let conditions = Some(EndpointConditions { ready, serving, terminating });
            let endpoint = Endpoint { conditions, ..Endpoint::default() };
            assert_eq!(state(&endpoint), expected, "{ready:?} {serving:?} {terminating:?}");
        }
    }
}
