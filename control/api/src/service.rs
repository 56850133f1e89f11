//! The name of a Service, and how a host name is read as one.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// What follows the name of an InferencePool. No Service has a dot in its name, and no host name is read as one that has.
const POOL: &str = ".pool";
/// What follows the name of a ReplicaSet where the pods of one template of a Deployment are meant.
const TEMPLATE: &str = ".template";

/// `<namespace>/<name>` of a Kubernetes Service, or what is a backend like one: `<namespace>/<name>.pool` of an InferencePool,
/// `<namespace>/<replica set>.template` of the pods that a Deployment has made of one template. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName(Arc<str>);

/// Why a text is no service name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a service name: write <namespace>/<name>, each a DNS label")]
pub struct InvalidServiceName(String);

impl ServiceName {
    /// Joins the parts, which must be DNS labels.
    pub fn new(namespace: &str, name: &str) -> Result<Self, InvalidServiceName> {
        if is_label(namespace) && is_label(name) {
            Ok(Self(format!("{namespace}/{name}").into()))
        } else {
            Err(InvalidServiceName(format!("{namespace}/{name}")))
        }
    }

    /// What an InferencePool is called where Services are.
    pub fn pool(namespace: &str, name: &str) -> Result<Self, InvalidServiceName> {
        let Self(service) = Self::new(namespace, name)?;
        Ok(Self(format!("{service}{POOL}").into()))
    }

    /// What the pods of one template of a Deployment are called where Services are; their ReplicaSet has a name for each.
    pub fn template(namespace: &str, replica_set: &str) -> Result<Self, InvalidServiceName> {
        let Self(service) = Self::new(namespace, replica_set)?;
        Ok(Self(format!("{service}{TEMPLATE}").into()))
    }

    /// Stands for the service in the labels of requests that reached none.
    pub fn unrouted() -> Self {
        Self("penstock/unrouted".into())
    }

    /// Stands for every host outside the mesh in labels, since their names are the client's choice.
    pub fn outside() -> Self {
        Self("penstock/outside".into())
    }

    /// Reads a host (no port) as the application in `own_namespace` means it: `name`, `name.ns`, `name.ns.svc`,
    /// `name.ns.svc.cluster.local`. `None` when it cannot be a Service (an address, more labels, other suffixes).
    pub fn from_host(host: &str, own_namespace: &str) -> Option<Self> {
        let host = host.strip_suffix('.').unwrap_or(host);
        if host.parse::<std::net::IpAddr>().is_ok() {
            return None;
        }
        let mut labels = host.splitn(3, '.');
        let name = labels.next()?;
        let namespace = labels.next().unwrap_or(own_namespace);
        match labels.next() {
            None | Some("svc" | "svc.cluster.local") => {}
            Some(_) => return None,
        }
        // Host names are case-insensitive; labels are lower case.
        Self::new(&namespace.to_ascii_lowercase(), &name.to_ascii_lowercase()).ok()
    }

    /// `<namespace>/<name>`.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The namespace and the name.
    pub fn parts(&self) -> (&str, &str) {
        self.0.split_once('/').unwrap_or((&self.0, ""))
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        self.parts().0
    }

    /// The name inside the namespace.
    pub fn name(&self) -> &str {
        self.parts().1
    }
}

impl FromStr for ServiceName {
    type Err = InvalidServiceName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (namespace, name) = text.split_once('/').ok_or_else(|| InvalidServiceName(text.to_owned()))?;
        match (name.strip_suffix(POOL), name.strip_suffix(TEMPLATE)) {
            (Some(pool), _) => Self::pool(namespace, pool),
            (_, Some(replica_set)) => Self::template(namespace, replica_set),
            _ => Self::new(namespace, name),
        }
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A DNS label as RFC 1123 has it: 1 to 63 of `a-z 0-9 -`, no hyphen at either end.
pub fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_called_as_no_service_can_be() {
        let pool = ServiceName::pool("team-a", "llama").unwrap();
        assert_eq!((pool.namespace(), pool.name()), ("team-a", "llama.pool"));
        assert_eq!("team-a/llama.pool".parse(), Ok(pool));
        for bad in ["a.b", "", "llama.pool"] {
            assert!(ServiceName::pool("team-a", bad).is_err(), "{bad}");
        }
        assert_eq!(ServiceName::from_host("llama.pool", "team-a").unwrap().as_str(), "pool/llama");
        // Whoever names a Service does not reach a pool by it.
        assert!(ServiceName::new("team-a", "llama.pool").is_err());
        assert!("team-a/llama.other".parse::<ServiceName>().is_err());
    }

    #[test]
    fn a_template_of_a_deployment_is_called_as_no_service_can_be() {
        let template = ServiceName::template("team-a", "resnet-6d4cf56db6").unwrap();
        assert_eq!(template.as_str(), "team-a/resnet-6d4cf56db6.template");
        assert_eq!("team-a/resnet-6d4cf56db6.template".parse(), Ok(template));
        assert!(
            ServiceName::template("team-a", "a.b").is_err() && "a/.template".parse::<ServiceName>().is_err()
        );
    }

    #[test]
    fn a_host_is_read_as_the_application_means_it() {
        let table = [
            ("resnet", Some("team-a/resnet")),
            ("resnet.team-b", Some("team-b/resnet")),
            ("resnet.team-b.svc", Some("team-b/resnet")),
            ("resnet.team-b.svc.cluster.local", Some("team-b/resnet")),
            ("resnet.team-b.svc.cluster.local.", Some("team-b/resnet")),
            ("RESNET.Team-B", Some("team-b/resnet")),
            ("www.example.com", None),
            ("10.0.0.1", None),
            ("::1", None),
            ("", None),
            ("-x", None),
        ];
        for (host, expected) in table {
            let got = ServiceName::from_host(host, "team-a");
            assert_eq!(got.as_ref().map(ServiceName::as_str), expected, "{host}");
        }
    }
}
