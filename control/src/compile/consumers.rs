//! Routes in another namespace than their parent's: what the clients of that namespace see instead of what all others do.
//!
//! Nobody may change how the clients of other namespaces reach a Service but the namespace of the Service itself (GEP-1294: "producer" and
//! "consumer" routes). In: a namespace's own rules, and those for everybody. Out: the rules for its clients. The two are never mixed for one
//! port: where the namespace has rules, what they do not match is not served.

use std::collections::BTreeSet;

use penstock_api::{ServiceName, v1};

use super::services::ServiceModel;
use crate::snapshot::Builder;

/// The namespace's own rules, and everybody's for the ports of which these say nothing.
pub(super) fn seen(own: Vec<v1::Rule>, everybodys: &[v1::Rule], service: &ServiceModel<'_>) -> Vec<v1::Rule> {
    let covered: BTreeSet<u32> = own.iter().map(|rule| rule.port).collect();
    let mut seen = own;
    if covered.contains(&0) {
        return seen;
    }
    for rule in everybodys {
        match rule.port {
            // For all ports: now for each that is left.
            0 => seen.extend(
                service
                    .ports
                    .iter()
                    .filter(|port| !covered.contains(&port.port))
                    .map(|port| v1::Rule { port: port.port, ..rule.clone() }),
            ),
            port if covered.contains(&port) => {}
            _ => seen.push(rule.clone()),
        }
    }
    seen
}

/// Records that a route of `parent`, `<namespace>/<name>`, leads to `backend`: for everybody, or for the clients in its namespace.
pub(super) fn leads_to(parent: &ServiceName, route: &str, backend: &str, builder: &mut Builder) {
    match route.split('/').next() {
        Some(namespace) if namespace != parent.namespace() => {
            builder.leads_to_for(namespace, parent.as_str(), backend);
        }
        _ => builder.leads_to(parent.as_str(), backend),
    }
}
