//! Services: their ports, protocols, policies and addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use penstock_api::ServiceName;
use penstock_api::names::annotation;
use penstock_api::resource::Kind;
use penstock_api::v1::{self, Protocol};

use super::annotations;
use super::faults::Faults;
use super::view::View;
use crate::objects::{Object, ObjectId, ObjectKind, annotation_pointer};
use crate::snapshot::Builder;

/// A Service as the mesh sees it.
pub(super) struct ServiceModel<'a> {
    pub object: &'a Object,
    pub name: ServiceName,
    /// The TCP ports, in the order of the object.
    pub ports: Vec<v1::ServicePort>,
    /// Where each of them stands in `spec.ports`, which may have UDP ports too.
    pub indices: Vec<usize>,
    pub policy: v1::Policy,
    /// The InferencePolicy that the policy has something of.
    pub inference: Option<&'a ObjectId>,
    /// What the annotation asks for: names of Services of the namespace, and weights.
    pub split: Option<Vec<(String, u32)>>,
    /// The cluster IPs; none when it is headless.
    pub addresses: Vec<IpAddr>,
}

/// All Services by name.
pub(super) type Services<'a> = BTreeMap<ServiceName, ServiceModel<'a>>;

impl ServiceModel<'_> {
    /// Whether it has a port of the number.
    pub(super) fn has_port(&self, number: u32) -> bool {
        self.ports.iter().any(|port| port.port == number)
    }

    /// Its port for what comes to `port` of another Service: that of the same number, else of the same name, else the only one.
    pub(super) fn port_for(&self, port: &v1::ServicePort) -> Option<&v1::ServicePort> {
        let same_number = self.ports.iter().find(|known| known.port == port.port);
        let same_name = || self.ports.iter().find(|known| !known.name.is_empty() && known.name == port.name);
        let only = || self.ports.first().filter(|_| self.ports.len() == 1);
        same_number.or_else(same_name).or_else(only)
    }

    /// Its ports, in words.
    pub(super) fn ports_in_words(&self) -> String {
        match self.ports.is_empty() {
            true => "none".to_owned(),
            false => self.ports.iter().map(|port| port.port.to_string()).collect::<Vec<_>>().join(", "),
        }
    }
}

/// Reads the Services. One of type ExternalName is an alias in DNS, not a Service of the mesh.
pub(super) fn read<'a>(view: &View<'a>, faults: &mut Faults) -> Services<'a> {
    let mut services = Services::new();
    for (object, service) in &view.services {
        let Ok(name) = ServiceName::new(&object.id.namespace, &object.id.name) else { continue };
        let spec = service.spec.clone().unwrap_or_default();
        if spec.type_.as_deref() == Some("ExternalName") {
            continue;
        }
        let (mut ports, mut indices) = (Vec::new(), Vec::new());
        for (index, port) in spec.ports.iter().flatten().enumerate() {
            if port.protocol.as_deref().unwrap_or("TCP") != "TCP" {
                continue;
            }
            let Some(number) = u16::try_from(port.port).ok().filter(|number| *number > 0) else {
                let message = format!("{} is not a port; write a number from 1 to 65535", port.port);
                faults.refuse(object, format!("/spec/ports/{index}/port"), message);
                continue;
            };
            let name = port.name.clone().unwrap_or_default();
            let protocol = protocol(port.app_protocol.as_deref(), &name);
            indices.push(index);
            ports.push(v1::ServicePort { port: number.into(), name, protocol: protocol.into() });
        }
        let policy = policy(object, faults);
        let split = object.annotation(annotation::TRAFFIC_SPLIT).and_then(|text| {
            let pointer = annotation_pointer(annotation::TRAFFIC_SPLIT);
            annotations::traffic_split(text)
                .map_err(|error| {
                    faults.refuse(
                        object,
                        pointer,
                        format!("annotation {}: {error}", annotation::TRAFFIC_SPLIT),
                    );
                })
                .ok()
        });
        let mut addresses = Vec::new();
        for text in spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip) {
            match text.parse() {
                Ok(ip) if !addresses.contains(&ip) => addresses.push(ip),
                Ok(_) => {}
                Err(_) if text.is_empty() || text == "None" => {}
                Err(_) => faults.refuse(object, "/spec/clusterIP", format!("{text:?} is not an IP address")),
            }
        }
        let inference = None;
        services.insert(
            name.clone(),
            ServiceModel { object, name, ports, indices, policy, inference, split, addresses },
        );
    }
    services
}

/// What the annotations of a Service, or of a pool, ask.
pub(super) fn policy(object: &Object, faults: &mut Faults) -> v1::Policy {
    let mut policy = v1::Policy::default();
    for (key, read) in annotations::OF_POLICY {
        if let Some(Err(error)) = object.annotation(key).map(|text| read(text, &mut policy)) {
            faults.refuse(object, annotation_pointer(key), format!("annotation {key}: {error}"));
        }
    }
    policy
}

/// Adds the Services and their addresses.
pub(super) fn add(services: &Services<'_>, builder: &mut Builder, faults: &mut Faults) {
    let mut taken: BTreeMap<SocketAddr, &ServiceName> = BTreeMap::new();
    for (name, service) in services {
        // How inputs are prepared and requests queued concerns the endpoints' own proxies alone.
        let policy = v1::Policy { pipelines: Vec::new(), admission: None, ..service.policy.clone() };
        let message = v1::Service {
            namespace: name.namespace().to_owned(),
            name: name.name().to_owned(),
            ports: service.ports.clone(),
            policy: (policy != v1::Policy::default()).then_some(policy),
        };
        builder.add(Kind::Service, name.as_str(), &message);
        let pool = (service.object.id.kind == ObjectKind::InferencePool).then_some(&service.object.id);
        for of in [service.inference, pool].into_iter().flatten() {
            builder.part_of(of, Kind::Service, name.as_str());
        }
        for ip in &service.addresses {
            for port in &service.ports {
                let address = SocketAddr::new(*ip, u16::try_from(port.port).unwrap_or_default());
                if let Some(owner) = taken.get(&address) {
                    let message = format!(
                        "its address {address} belongs to {owner} already, and connections to it go there; \
                         give each Service its own clusterIP"
                    );
                    faults.note(service.object, "/spec/clusterIP", message);
                    continue;
                }
                taken.insert(address, name);
                let target = Some(v1::address::Target::Service(name.to_string()));
                let message = v1::Address { target, port: port.port, protocol: port.protocol };
                builder.add(Kind::Address, address.to_string(), &message);
            }
        }
    }
}

/// The protocol of a port: what `appProtocol` says, else the port's name (`grpc`, `http-metrics`), else to be looked
/// at. An `appProtocol` that is not known says nothing.
pub(super) fn protocol(app_protocol: Option<&str>, port_name: &str) -> Protocol {
    let declared = app_protocol.and_then(|word| {
        let word = word.to_ascii_lowercase();
        protocol_of_word(word.strip_prefix("kubernetes.io/").unwrap_or(&word))
    });
    declared
        .or_else(|| protocol_of_word(port_name))
        .or_else(|| port_name.rsplit_once('-').and_then(|_| protocol_of_prefix(port_name)))
        .unwrap_or(Protocol::Detect)
}

/// The longest `<protocol>-` that the name starts with: `grpc-web-ui` is `grpc-web`, not `grpc`.
fn protocol_of_prefix(name: &str) -> Option<Protocol> {
    name.match_indices('-').rev().find_map(|(end, _)| protocol_of_word(&name[..end]))
}

fn protocol_of_word(word: &str) -> Option<Protocol> {
    Some(match word {
        "http" | "grpc-web" => Protocol::Http,
        "http1" | "http/1.1" | "ws" => Protocol::Http1,
        "http2" | "h2c" | "h2" => Protocol::Http2,
        "grpc" => Protocol::Grpc,
        "https" | "tls" | "wss" => Protocol::Tls,
        // Protocols in which the server may speak first, or that are nothing for a proxy to look into.
        "tcp" | "mysql" | "mongo" | "mongodb" | "redis" | "postgres" | "postgresql" | "kafka" | "amqp"
        | "nats" | "smtp" => Protocol::Opaque,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_protocol_is_declared_by_app_protocol_then_by_name() {
        let table = [
            (None, "", Protocol::Detect),
            (None, "main", Protocol::Detect),
            (None, "http", Protocol::Http),
            (None, "http-metrics", Protocol::Http),
            (None, "httpish", Protocol::Detect),
            (None, "http2-api", Protocol::Http2),
            (None, "grpc", Protocol::Grpc),
            (None, "grpc-web", Protocol::Http),
            (None, "grpc-web-ui", Protocol::Http),
            (None, "grpc-inference", Protocol::Grpc),
            (None, "h2c-x", Protocol::Http2),
            (None, "tcp-raw", Protocol::Opaque),
            (None, "tls-raw", Protocol::Tls),
            (Some("kubernetes.io/h2c"), "http", Protocol::Http2),
            (Some("kubernetes.io/ws"), "http", Protocol::Http1),
            (Some("kubernetes.io/wss"), "http", Protocol::Tls),
            (Some("grpc"), "http", Protocol::Grpc),
            (Some("HTTPS"), "", Protocol::Tls),
            (Some("example.com/own"), "http", Protocol::Http),
            (Some("example.com/own"), "", Protocol::Detect),
        ];
        for (app_protocol, name, expected) in table {
            assert_eq!(protocol(app_protocol, name), expected, "{app_protocol:?} {name:?}");
        }
    }
}
