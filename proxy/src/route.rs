//! Where a request goes: which Service its host means, which rule of its routes matches, which version the weights
//! choose. Deciding is pure; only the first question may have to wait for control.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use http::uri::Authority;
use penstock_api::names::annotation;
use penstock_api::v1::Protocol;
use penstock_api::{Reason, ServiceName, path};
use penstock_balance::split;
use rand::Rng;

use crate::config::compile::passing;
use crate::config::matcher::Match;
use crate::config::{Address, Backend, Cluster, Known, Rule, Service, ServicePort, Sticky};
use crate::failure::Failure;
use crate::worker::Worker;
use crate::{headers, outside};

/// What a request is for.
#[derive(Clone, Debug)]
pub struct Destination {
    /// The Service.
    pub service: Arc<Service>,
    /// Its port.
    pub port: u16,
}

/// The Service that a host means, or the host itself where it lies outside the mesh. A redirected connection's
/// original address decides before the host does. What is known already is found at once; waiting for control or for
/// a name is rare and boxed, to keep every request's own future small.
pub async fn destination(
    worker: &Rc<Worker>,
    authority: &Authority,
    original: Option<SocketAddr>,
) -> Result<Destination, Failure> {
    if let Some(address) = original {
        return Box::pin(at_address(worker, address)).await;
    }
    let port = authority.port_u16().unwrap_or(80);
    let Some(name) = ServiceName::from_host(authority.host(), &worker.shared.namespace) else {
        return Box::pin(outside::destination(worker, authority.host(), port)).await;
    };
    let known = worker.shared.store.snapshot().services.get(&name).cloned();
    worker.uses(&name);
    match known {
        Some(Known::Here(service)) => Ok(Destination { service, port }),
        Some(Known::Absent) => Box::pin(outside::destination(worker, authority.host(), port)).await,
        None => Box::pin(unknown(worker, authority, &name, port)).await,
    }
}

async fn unknown(
    worker: &Rc<Worker>,
    authority: &Authority,
    name: &ServiceName,
    port: u16,
) -> Result<Destination, Failure> {
    match worker.shared.store.service(name).await {
        Ok(Known::Here(service)) => Ok(Destination { service, port }),
        Ok(Known::Absent) => outside::destination(worker, authority.host(), port).await,
        Err(unanswered) => Err(Failure::unprocessed(Reason::NoConfig, format!("{name}: {unanswered}"))),
    }
}

/// What lies at the original address of a redirected connection.
pub async fn at_address(worker: &Rc<Worker>, address: SocketAddr) -> Result<Destination, Failure> {
    let no_config = |what: &dyn std::fmt::Display, why: &dyn std::fmt::Display| {
        Failure::unprocessed(Reason::NoConfig, format!("{what}: {why}"))
    };
    worker.uses_address(address);
    match worker.shared.store.address(address).await {
        Ok(Known::Here(known)) => match &*known {
            Address::Service(name, port) => match worker.shared.store.service(name).await {
                Ok(Known::Here(service)) => {
                    worker.uses(&service.name);
                    Ok(Destination { service, port: *port })
                }
                Ok(Known::Absent) => Err(no_config(name, &"control has an address for it but no Service")),
                Err(unanswered) => Err(no_config(name, &unanswered)),
            },
            Address::Pod(cluster) => Ok(alone(cluster)),
            Address::Undeclared(pod) => Err(undeclared(pod, address)),
        },
        Ok(Known::Absent) => unlisted(worker, address).await,
        Err(unanswered) => Err(no_config(&address, &unanswered)),
    }
}

/// An address that control does not list lies outside, unless it is a pod's that is in the mesh: such a pod is never
/// called in plaintext, whatever the port.
async fn unlisted(worker: &Rc<Worker>, address: SocketAddr) -> Result<Destination, Failure> {
    let pod = SocketAddr::new(address.ip(), 0);
    worker.uses_address(pod);
    match worker.shared.store.address(pod).await {
        Ok(Known::Here(known)) => match &*known {
            Address::Undeclared(pod) => Err(undeclared(pod, address)),
            other => Err(Failure::unprocessed(Reason::NoConfig, format!("{address} leads to {other:?}"))),
        },
        Ok(Known::Absent) => outside::destination(worker, &address.ip().to_string(), address.port()).await,
        Err(unanswered) => Err(Failure::unprocessed(Reason::NoConfig, format!("{address}: {unanswered}"))),
    }
}

fn undeclared(pod: &str, address: SocketAddr) -> Failure {
    let port = address.port();
    Failure::unprocessed(
        Reason::UnknownPort,
        format!(
            "{address} is the pod {pod} of the mesh, which does not declare port {port}; declare it there as a \
             containerPort, or let it past both proxies: {} there, {} here",
            annotation::SKIP_INBOUND_PORTS,
            annotation::SKIP_OUTBOUND_PORTS
        ),
    )
}

/// The protocol declared for the original address of a redirected connection.
pub async fn declared(worker: &Rc<Worker>, address: SocketAddr) -> Result<Protocol, Failure> {
    let destination = at_address(worker, address).await?;
    Ok(destination.service.port(destination.port).map_or(Protocol::Detect, |port| port.protocol))
}

/// A destination with no routes: one cluster.
pub fn alone(cluster: &Arc<Cluster>) -> Destination {
    let itself = Arc::new(passing(cluster.service.as_str(), cluster));
    let port =
        ServicePort { port: cluster.port, protocol: cluster.protocol, cluster: Arc::clone(cluster), itself };
    let service =
        Service { name: cluster.service.clone(), ports: vec![port], rules: Vec::new(), sticky: None };
    Destination { port: cluster.port, service: Arc::new(service) }
}

/// Where routes choose by the path, all of them see it in one form, and so does everybody after. What goes to a Service
/// whose routes do not, or outside the mesh, keeps the path that the application wrote.
pub fn settle_path(destination: &Destination, uri: &mut http::Uri) -> Result<(), Failure> {
    let looks = |rule: &Arc<Rule>| rule.matches.iter().any(Match::looks_at_path);
    match destination.service.rules.iter().any(looks) {
        true => headers::settle_path(uri, path::routable),
        false => Ok(()),
    }
}

/// The rule that a request matches: the first, in order of precedence.
pub fn rule<'a>(
    destination: &'a Destination,
    host: &str,
    request: &http::request::Parts,
) -> Result<(&'a Arc<Rule>, &'a str), Failure> {
    let Destination { service, port } = destination;
    let mut of_port =
        service.rules.iter().filter(|rule| rule.port.is_none_or(|only| only == *port)).peekable();
    if of_port.peek().is_none() {
        let Some(port) = service.port(*port) else {
            let ports: Vec<_> = service.ports.iter().map(|port| port.port.to_string()).collect();
            return Err(Failure::unprocessed(
                Reason::UnknownPort,
                format!("{} has no port {port}; it has {}", service.name, ports.join(", ")),
            ));
        };
        return Ok((&port.itself, ""));
    }
    for rule in of_port {
        if !rule.hostnames.is_empty() && !rule.hostnames.iter().any(|name| name.matches(host)) {
            continue;
        }
        if rule.matches.is_empty() {
            return Ok((rule, ""));
        }
        if let Some(matched) = rule.matches.iter().find(|candidate| candidate.matches(request)) {
            return Ok((rule, matched.prefix()));
        }
    }
    // Gateway API: once a Service has routes, what matches none of them is not served.
    Err(Failure::unprocessed(
        Reason::NoRoute,
        format!(
            "none of the {} rules for {} matches {} {}",
            service.rules.len(),
            service.name,
            request.method,
            request.uri.path()
        ),
    ))
}

/// The version that a request goes to, by the rule's weights.
pub fn split<'a>(
    rule: &'a Rule,
    default_sticky: Option<&Sticky>,
    request: &http::request::Parts,
    random: &mut impl Rng,
) -> Result<&'a Backend, Failure> {
    let chosen = match rule.backends.as_slice() {
        [only] if only.weight > 0 => Some(only),
        backends => {
            let key = rule.sticky.as_ref().or(default_sticky).and_then(|sticky| sticky_key(sticky, request));
            let index = match key {
                Some(key) => {
                    split::by_key(backends.iter().map(|b| (b.weight, b.cluster.service.as_str())), key)
                }
                None => split::draw(backends.iter().map(|backend| backend.weight), random),
            };
            index.map(|index| &backends[index])
        }
    };
    let Some(backend) = chosen else {
        return Err(Failure::unprocessed(
            Reason::BadBackend,
            format!("rule {} has no backend with a weight", rule.label),
        ));
    };
    match &backend.invalid {
        None => Ok(backend),
        Some(why) => Err(Failure::unprocessed(Reason::BadBackend, format!("rule {}: {why}", rule.label))),
    }
}

/// The user's key, if the request carries it.
fn sticky_key<'a>(sticky: &Sticky, request: &'a http::request::Parts) -> Option<&'a [u8]> {
    match sticky {
        Sticky::Header(name) => request.headers.get(name).map(|value| value.as_bytes()),
        Sticky::Cookie(name) => request
            .headers
            .get_all(http::header::COOKIE)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b';'))
            .map(<[u8]>::trim_ascii)
            .find_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"=")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Policy, matcher};
    use penstock_api::v1;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    fn cluster(name: &str) -> Arc<Cluster> {
        Arc::new(Cluster::new(name.parse().unwrap(), 80, v1::Protocol::Http, Policy::default()))
    }

    fn request(uri: &str, headers: &[(&str, &str)]) -> http::request::Parts {
        let mut request = http::Request::builder().uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    fn rule_for(prefix: &str, to: &str) -> Rule {
        let kind = Some(v1::string_match::Kind::Prefix(prefix.into()));
        let from = v1::Match { path: Some(v1::StringMatch { kind }), ..Default::default() };
        Rule { matches: vec![matcher::Match::compile(&from).unwrap()], ..passing(to, &cluster(to)) }
    }

    #[test]
    fn the_first_rule_that_matches_wins_and_none_is_a_404() {
        let mut destination = alone(&cluster("a/svc"));
        assert_eq!(&*rule(&destination, "svc", &request("/x", &[])).unwrap().0.label, "a/svc");
        Arc::get_mut(&mut destination.service).unwrap().rules =
            vec![Arc::new(rule_for("/v2/x", "a/x")), Arc::new(rule_for("/v2", "a/y"))];
        let label = |uri| {
            rule(&destination, "svc", &request(uri, &[]))
                .map(|(rule, prefix)| (rule.label.to_string(), prefix))
        };
        assert_eq!(label("/v2/x/y").unwrap(), ("a/x".into(), "/v2/x"));
        assert_eq!(label("/v2").unwrap(), ("a/y".into(), "/v2"));
        assert_eq!(label("/other").unwrap_err().reason, Reason::NoRoute);
        destination.port = 81;
        Arc::get_mut(&mut destination.service).unwrap().rules.clear();
        let error = rule(&destination, "svc", &request("/", &[])).unwrap_err();
        assert_eq!(
            (error.reason, error.story.as_ref()),
            (Reason::UnknownPort, "a/svc has no port 81; it has 80")
        );
    }

    fn canary(weights: [u32; 2]) -> Rule {
        let mut rule = passing("a/svc", &cluster("a/v1"));
        rule.backends[0].weight = weights[0];
        let mut second = passing("", &cluster("a/v2")).backends;
        second[0].weight = weights[1];
        rule.backends.append(&mut second);
        rule
    }

    #[test]
    fn a_user_stays_on_a_version_by_header_or_cookie() {
        let rule = canary([50, 50]);
        let mut random = SmallRng::seed_from_u64(1);
        let cookie = Sticky::Cookie("session".into());
        let mut choose = |sticky: &Sticky, headers: &[(&str, &str)]| {
            split(&rule, Some(sticky), &request("/", headers), &mut random)
                .unwrap()
                .cluster
                .service
                .to_string()
        };
        for user in ["1", "2", "3", "4", "5", "6"] {
            let pair = format!("a=b; session={user}");
            let first = choose(&cookie, &[("cookie", &pair)]);
            assert!((0..20).all(|_| choose(&cookie, &[("cookie", &pair)]) == first));
            let header = Sticky::Header("x-user".parse().unwrap());
            assert_eq!(choose(&header, &[("x-user", user)]), first, "the key counts, not where it was");
        }
        let without: std::collections::BTreeSet<_> = (0..50).map(|_| choose(&cookie, &[])).collect();
        assert_eq!(without.len(), 2, "without a key it is a draw");
    }

    #[test]
    fn no_weight_and_no_such_backend_are_500s_that_say_why() {
        let mut random = SmallRng::seed_from_u64(1);
        let error = split(&canary([0, 0]), None, &request("/", &[]), &mut random).unwrap_err();
        assert_eq!(error.reason, Reason::BadBackend);
        let mut rule = canary([0, 1]);
        rule.backends[1].invalid = Some("Service a/v2 does not exist".into());
        let error = split(&rule, None, &request("/", &[]), &mut random).unwrap_err();
        assert!(error.story.contains("a/v2 does not exist"));
    }
}
