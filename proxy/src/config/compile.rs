//! From messages to what the request path reads. Whatever control can say wrong is refused here, with a reason, so
//! that nothing later can fail on it.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};
use penstock_api::resource::WHOLE;
use penstock_api::v1::{self, Protocol};
use penstock_api::{ServiceName, SpiffeId};
use penstock_balance::pool::LOOKS;
use penstock_balance::{Policy as Balance, Settings};

use super::matcher::{Hostname, Match};
use super::{
    Admission, Backend, Batch, Cluster, Coalesce, Compare, Endpoint, Filters, Gpu, HeaderChange, Mirror,
    PathChange, Policy, Probes, Redirect, RetryPolicy, Rewrite, Rule, Service, ServicePort, Speak, Sticky,
    Timeouts, Tolerance, Workload, WorkloadPort,
};
use crate::limits;
use crate::prepare::Prepare;

/// Finds or makes the cluster of a service's port; successive snapshots must get the same one.
pub type Clusters<'a> = dyn FnMut(&ServiceName, u16) -> Arc<Cluster> + 'a;

/// A port number of a message.
pub fn port(number: u32) -> Result<u16, String> {
    u16::try_from(number).ok().filter(|port| *port > 0).ok_or(format!("{number} is not a port"))
}

/// A whole service: its own message, its routes and their weights.
pub fn service(
    message: &v1::Service,
    routes: Option<&v1::Routes>,
    weights: &dyn Fn(&str) -> Option<Arc<v1::Weights>>,
    clusters: &mut Clusters<'_>,
) -> Result<Service, String> {
    // Of a Service or of a pool.
    let name = format!("{}/{}", message.namespace, message.name);
    let name: ServiceName = name.parse().map_err(|error| format!("{error}"))?;
    let sticky = message.policy.as_ref().and_then(|policy| policy.sticky.as_ref()).map(sticky).transpose()?;
    let ports = message
        .ports
        .iter()
        .map(|from| {
            let number = port(from.port)?;
            let cluster = clusters(&name, number);
            let itself = Arc::new(passing(&name.to_string(), &cluster));
            Ok(ServicePort { port: number, protocol: from.protocol(), cluster, itself })
        })
        .collect::<Result<_, String>>()?;
    let mut rules: Vec<Rule> = routes
        .map(|routes| routes.rules.iter().map(|from| rule(&name, from, weights, clusters)).collect())
        .transpose()?
        .unwrap_or_default();
    // What a Service says of itself holds for whoever calls it, also where a split leads elsewhere; its routes may say
    // otherwise, and the versions have the last word on what neither says.
    let policy = message.policy.as_ref();
    let own_timeouts = timeouts(policy.and_then(|policy| policy.timeouts.as_ref()));
    let own_retry =
        policy.and_then(|policy| policy.retry.as_ref()).map(|from| retry(from, &Policy::default().retry));
    for rule in &mut rules {
        rule.retry = rule.retry.take().or_else(|| own_retry.clone());
        let said = &mut rule.timeouts;
        said.request = said.request.or(own_timeouts.request);
        said.per_try = said.per_try.or(own_timeouts.per_try);
        said.idle = said.idle.or(own_timeouts.idle);
    }
    let rules = rules.into_iter().map(Arc::new).collect();
    Ok(Service { name, ports, rules, sticky })
}

/// The rule that takes every request to one cluster.
pub fn passing(label: &str, cluster: &Arc<Cluster>) -> Rule {
    Rule {
        id: rule_id(&cluster.service, label),
        label: label.into(),
        port: None,
        hostnames: Vec::new(),
        matches: Vec::new(),
        filters: Filters::default(),
        timeouts: Timeouts::default(),
        retry: None,
        sticky: None,
        backends: vec![Backend {
            cluster: Arc::clone(cluster),
            weight: 1,
            filters: Filters::default(),
            invalid: None,
        }],
        mirrors: Vec::new(),
    }
}

fn rule_id(asked: &ServiceName, label: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (asked, label).hash(&mut hasher);
    hasher.finish()
}

fn rule(
    asked: &ServiceName,
    from: &v1::Rule,
    weights: &dyn Fn(&str) -> Option<Arc<v1::Weights>>,
    clusters: &mut Clusters<'_>,
) -> Result<Rule, String> {
    let label = format!("{}#{}", from.route, from.index);
    let in_rule = |reason: String| format!("rule {label}: {reason}");
    let matches = from.matches.iter().map(Match::compile).collect::<Result<Vec<_>, _>>().map_err(in_rule)?;
    let (backends, mirrors) = match from.weights.as_str() {
        "" => (Vec::new(), Vec::new()),
        name => {
            let weights =
                weights(name).ok_or_else(|| in_rule(format!("its weights {name} are not known")))?;
            destinations(&weights, clusters).map_err(in_rule)?
        }
    };
    Ok(Rule {
        id: rule_id(asked, &label),
        port: (from.port != 0).then(|| port(from.port)).transpose().map_err(in_rule)?,
        hostnames: from.hostnames.iter().map(|name| Hostname::new(name)).collect(),
        matches,
        filters: filters(&from.filters).map_err(in_rule)?,
        timeouts: timeouts(from.timeouts.as_ref()),
        retry: from.retry.as_ref().map(|from| retry(from, &Policy::default().retry)),
        sticky: from.sticky.as_ref().map(sticky).transpose().map_err(in_rule)?,
        backends,
        mirrors,
        label: label.into(),
    })
}

/// Where the requests of a rule go, and copies of them.
pub fn destinations(
    from: &v1::Weights,
    clusters: &mut Clusters<'_>,
) -> Result<(Vec<Backend>, Vec<Mirror>), String> {
    let backends = from.backends.iter().map(|from| backend(from, clusters)).collect::<Result<_, _>>()?;
    let mirrors = from.mirrors.iter().filter(|from| from.invalid.is_empty());
    let mirrors = mirrors.map(|from| mirror(from, clusters)).collect::<Result<_, _>>()?;
    Ok((backends, mirrors))
}

fn mirror(from: &v1::Mirror, clusters: &mut Clusters<'_>) -> Result<Mirror, String> {
    let service: ServiceName = from.service.parse().map_err(|error| format!("{error}"))?;
    let share_ppm = from.share_ppm;
    if share_ppm > WHOLE {
        return Err(format!("{share_ppm} of a million requests would be copied to {service}"));
    }
    let compare = from.compare.as_ref().map(compare).transpose()?;
    Ok(Mirror { cluster: clusters(&service, port(from.port)?), share_ppm, compare: compare.map(Arc::new) })
}

fn compare(from: &v1::Compare) -> Result<Compare, String> {
    let tolerance = Tolerance { absolute: from.absolute, relative: from.relative };
    for number in [tolerance.absolute, tolerance.relative] {
        if !number.is_finite() || number < 0.0 {
            return Err(format!("{number} is no tolerance for a comparison"));
        }
    }
    let max_bytes = if from.max_bytes == 0 { limits::COPY_BODY } else { from.max_bytes };
    Ok(Compare { tolerance, outputs: from.outputs.clone(), max_bytes: max_bytes.min(limits::COPY_BODY) })
}

fn backend(from: &v1::Backend, clusters: &mut Clusters<'_>) -> Result<Backend, String> {
    let service: ServiceName = from.service.parse().map_err(|error| format!("{error}"))?;
    let invalid = (!from.invalid.is_empty()).then(|| from.invalid.as_str().into());
    let number = match port(from.port) {
        Ok(number) => number,
        Err(_) if invalid.is_some() => 0,
        Err(reason) => return Err(reason),
    };
    Ok(Backend {
        cluster: clusters(&service, number),
        weight: from.weight,
        filters: filters(&from.filters)?,
        invalid,
    })
}

/// Compiles filters; a kind that this build doesn't know is refused, never skipped.
pub fn filters(from: &[v1::Filter]) -> Result<Filters, String> {
    use v1::filter::Kind;
    let mut filters = Filters::default();
    for filter in from {
        match &filter.kind {
            Some(Kind::RequestHeaders(change)) => header_changes(change, &mut filters.request)?,
            Some(Kind::ResponseHeaders(change)) => header_changes(change, &mut filters.response)?,
            Some(Kind::Redirect(from)) => filters.redirect = Some(redirect(from)?),
            Some(Kind::Rewrite(from)) => filters.rewrite = Some(rewrite(from)?),
            None => {
                return Err("a filter of a kind that this proxy does not know; upgrade the proxy".to_owned());
            }
        }
    }
    Ok(filters)
}

fn header_changes(from: &v1::HeaderChange, into: &mut Vec<HeaderChange>) -> Result<(), String> {
    let name = |name: &str| {
        let parsed = HeaderName::try_from(name).map_err(|_| format!("{name:?} is not a header name"))?;
        // Framing belongs to the connection; a filter that changed it would let requests be smuggled.
        let framing = ["content-length", "transfer-encoding", "connection", "host", "upgrade", "te"];
        if framing.contains(&parsed.as_str()) {
            return Err(format!(
                "the header {parsed} belongs to the connection and cannot be changed by a filter"
            ));
        }
        Ok(parsed)
    };
    let value =
        |text: &str| HeaderValue::try_from(text).map_err(|_| format!("{text:?} is not a header value"));
    for header in &from.set {
        into.push(HeaderChange::Set(name(&header.name)?, value(&header.value)?));
    }
    for header in &from.add {
        into.push(HeaderChange::Add(name(&header.name)?, value(&header.value)?));
    }
    for header in &from.remove {
        into.push(HeaderChange::Remove(name(header)?));
    }
    Ok(())
}

fn redirect(from: &v1::Redirect) -> Result<Redirect, String> {
    let status = if from.status == 0 { 302 } else { from.status };
    let status = u16::try_from(status)
        .ok()
        .and_then(|code| StatusCode::from_u16(code).ok())
        .filter(StatusCode::is_redirection)
        .ok_or_else(|| format!("{status} is not the status of a redirect"))?;
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    Ok(Redirect {
        scheme: some(&from.scheme),
        hostname: some(&from.hostname),
        port: (from.port != 0).then(|| port(from.port)).transpose()?,
        path: from.path.as_ref().and_then(path_change),
        status,
    })
}

fn rewrite(from: &v1::Rewrite) -> Result<Rewrite, String> {
    let hostname = match from.hostname.as_str() {
        "" => None,
        host => Some(HeaderValue::try_from(host).map_err(|_| format!("{host:?} is not a host name"))?),
    };
    Ok(Rewrite { hostname, path: from.path.as_ref().and_then(path_change) })
}

fn path_change(from: &v1::PathChange) -> Option<PathChange> {
    match from.kind.as_ref()? {
        v1::path_change::Kind::Full(path) => Some(PathChange::Full(path.clone())),
        v1::path_change::Kind::Prefix(prefix) => {
            Some(PathChange::Prefix(prefix.trim_end_matches('/').to_owned()))
        }
    }
}

fn sticky(from: &v1::Sticky) -> Result<Sticky, String> {
    match &from.key {
        Some(v1::sticky::Key::Header(name)) => HeaderName::try_from(name)
            .map(Sticky::Header)
            .map_err(|_| format!("stickiness by {name:?}, which is not a header name")),
        Some(v1::sticky::Key::Cookie(name)) => Ok(Sticky::Cookie(name.clone())),
        None => Err("stickiness by a key that this proxy does not know; upgrade the proxy".to_owned()),
    }
}

fn timeouts(from: Option<&v1::Timeouts>) -> Timeouts {
    let Some(from) = from else { return Timeouts::default() };
    Timeouts {
        connect: from.connect_ms.map(Duration::from_millis),
        request: from.request_ms.map(Duration::from_millis),
        per_try: from.per_try_ms.map(Duration::from_millis),
        idle: from.idle_ms.map(Duration::from_millis),
    }
}

fn retry(from: &v1::Retry, default: &RetryPolicy) -> RetryPolicy {
    RetryPolicy {
        attempts: from.attempts.unwrap_or(default.attempts).min(10),
        codes: from.codes.iter().filter_map(|code| u16::try_from(*code).ok()).collect(),
        buffer: from
            .buffer_bytes
            .map_or(default.buffer, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX)),
    }
}

/// The policy of a service, over the defaults.
pub fn policy(from: Option<&v1::Policy>) -> Policy {
    let default = Policy::default();
    let Some(from) = from else { return default };
    let said = timeouts(from.timeouts.as_ref());
    let limits = from.limits.unwrap_or_default();
    let outlier = from.outlier.unwrap_or_default();
    let tuning = from.tuning.unwrap_or_default();
    let share = |permille: Option<u32>, default: f32| permille.map_or(default, |share| share as f32 / 1e3);
    let or = |ms: Option<u64>, default: Duration| ms.map_or(default, Duration::from_millis);
    // Names of headers were looked at by control; with one that is none after all nothing is shared.
    let coalesced = from.coalesce.as_ref().filter(|from| from.outbound).and_then(|from| coalesce(from).ok());
    Policy {
        balance: Settings {
            policy: match from.balance() {
                v1::Balance::Gpu => Balance::Gpu,
                v1::Balance::Prefix => Balance::Prefix,
                v1::Balance::LeastRequest => Balance::LeastRequest,
                v1::Balance::RoundRobin => Balance::RoundRobin,
                v1::Balance::RingHash => Balance::RingHash,
                v1::Balance::OrcaWrr => Balance::OrcaWrr,
            },
            max_ejected_percent: outlier
                .max_ejected_percent
                .unwrap_or(default.outlier.max_ejected_percent)
                .min(100),
            choices: tuning
                .choices
                .map_or(default.balance.choices, |choices| choices as usize)
                .clamp(2, LOOKS),
            explore_permille: tuning.explore_permille.unwrap_or(default.balance.explore_permille).min(1_000),
            hot_quantile: share(tuning.hot_permille, default.balance.hot_quantile).min(1.0),
            bound: share(tuning.bound_permille, default.balance.bound).max(1.0),
        },
        connect_timeout: said.connect.unwrap_or(default.connect_timeout),
        timeouts: Timeouts {
            connect: None,
            request: said.request.or(default.timeouts.request),
            per_try: said.per_try.or(default.timeouts.per_try),
            idle: said.idle.or(default.timeouts.idle),
        },
        retry: from.retry.as_ref().map_or_else(|| default.retry.clone(), |from| retry(from, &default.retry)),
        budget_percent: from
            .retry
            .as_ref()
            .and_then(|retry| retry.budget_percent)
            .unwrap_or(default.budget_percent)
            .min(100),
        outlier: penstock_balance::OutlierPolicy {
            consecutive_failures: outlier
                .consecutive_failures
                .unwrap_or(default.outlier.consecutive_failures),
            base: or(outlier.base_ejection_ms, default.outlier.base),
            max: or(outlier.max_ejection_ms, default.outlier.max),
            max_ejected_percent: outlier
                .max_ejected_percent
                .unwrap_or(default.outlier.max_ejected_percent)
                .min(100),
        },
        max_connections: limits.max_connections.unwrap_or(default.max_connections),
        max_pending: limits.max_pending.unwrap_or(default.max_pending),
        max_requests: limits.max_requests.unwrap_or(default.max_requests),
        coalesce: coalesced.map(Arc::new),
    }
}

/// How to speak to a server of a declared protocol that is no sidecar.
pub fn speak(protocol: Protocol) -> Speak {
    match protocol {
        Protocol::Http1 => Speak::Http1,
        Protocol::Http2 | Protocol::Grpc => Speak::Http2,
        Protocol::Detect | Protocol::Http | Protocol::Opaque | Protocol::Tls => Speak::Same,
    }
}

/// An endpoint as one port of its service reaches it; `None` when the endpoint does not serve that port.
pub fn endpoint(
    from: &v1::Endpoint,
    service_port: u16,
    protocol: Protocol,
) -> Result<Option<Endpoint>, String> {
    let in_endpoint = |reason: String| format!("endpoint {}: {reason}", from.name);
    let Some(target) = from.ports.iter().find(|target| target.service_port == u32::from(service_port)) else {
        return Ok(None);
    };
    let target = port(target.port).map_err(in_endpoint)?;
    let ip = from.ip.parse().map_err(|_| in_endpoint(format!("{:?} is not an IP address", from.ip)))?;
    let identity = match from.identity.as_str() {
        "" => None,
        id => Some(id.parse::<SpiffeId>().map_err(|error| in_endpoint(error.to_string()))?),
    };
    let dialled = match from.inbound_port {
        0 => target,
        inbound => port(inbound).map_err(in_endpoint)?,
    };
    let address = std::net::SocketAddr::new(ip, dialled);
    let sidecar = identity.is_some();
    let endpoint =
        Endpoint::new(from.name.as_str().into(), address, target, identity, sidecar, speak(protocol));
    endpoint.state.set_draining(from.draining);
    Ok(Some(endpoint))
}

/// The pod's own ports. A port's application is a cluster of one, so that it is reached by the same code as any
/// other server.
pub fn workload(from: &v1::Workload) -> Result<Workload, String> {
    let name: Arc<str> = format!("{}/{}", from.namespace, from.name).into();
    let ports: Vec<WorkloadPort> = from
        .ports
        .iter()
        .map(|port_from| {
            let number = port(port_from.port)?;
            let application = port_from.application.parse().map_err(|_| {
                format!(
                    "port {number} of {name}: {:?} is not an address of the application",
                    port_from.application
                )
            })?;
            let service = match port_from.services.first() {
                Some(service) => {
                    service.parse().map_err(|error| format!("port {number} of {name}: {error}"))?
                }
                None => ServiceName::new(&from.namespace, &from.name)
                    .or_else(|_| ServiceName::new(&from.namespace, "pod"))
                    .map_err(|error| error.to_string())?,
            };
            let protocol = port_from.protocol();
            let cluster = application_cluster(service, number, protocol, &name, application);
            let rule = passing("application", &cluster);
            let batch = port_from.batch.as_ref().map(batch);
            let coalesce = port_from.coalesce.as_ref().map(coalesce).transpose();
            let coalesce = coalesce.map_err(|error| format!("port {number} of {name}: {error}"))?;
            let pipelines = port_from.pipelines.iter().map(pipeline).collect::<Result<_, _>>();
            let pipelines = pipelines.map_err(|error| format!("port {number} of {name}: {error}"))?;
            Ok(WorkloadPort { port: number, protocol, cluster, rule, batch, coalesce, pipelines })
        })
        .collect::<Result<_, String>>()?;
    let admission = from
        .admission
        .map(|from| Admission { limit: (from.limit > 0).then_some(from.limit), queue: from.queue as usize });
    let gets = from.probes.iter().map(|probe| (probe.port, &probe.application, Some(&probe.path), None));
    let calls =
        from.grpc_probes.iter().map(|probe| (probe.port, &probe.application, None, Some(&probe.service)));
    let mut probes: Vec<Probes> = Vec::new();
    for (number, application, path, service) in gets.chain(calls) {
        let number = port(number)?;
        let at = match probes.iter().position(|probes| probes.port.port == number) {
            Some(at) => at,
            None => {
                probes.push(probed(&name, from, number, &ports, application)?);
                probes.len() - 1
            }
        };
        probes[at].paths.extend(path.map(|path| path.as_str().into()));
        probes[at].grpc.extend(service.map(|service| service.as_str().into()));
    }
    let forward_identity = from.forward_identity;
    let gpu = from.gpu.map(|from| Gpu {
        always: from.always,
        bytes: usize::try_from(from.bytes).ok().filter(|bytes| *bytes > 0),
        device: from.device,
        nvjpeg: from.nvjpeg,
    });
    Ok(Workload {
        name,
        ports,
        permissive: from.permissive,
        admission,
        probes,
        forward_identity,
        gpu,
        tenant_regions: from.tenant_regions as usize,
    })
}

/// A port that the kubelet asks for something, which need not be one that the pod declares.
fn probed(
    name: &Arc<str>,
    from: &v1::Workload,
    number: u16,
    ports: &[WorkloadPort],
    application: &str,
) -> Result<Probes, String> {
    let cluster = match ports.iter().find(|port| port.port == number) {
        Some(port) => Arc::clone(&port.cluster),
        None => {
            let application = application.parse().map_err(|_| {
                format!("a probe of {name}: {application:?} is not an address of the application")
            })?;
            let service = ServiceName::new(&from.namespace, "probes").map_err(|error| error.to_string())?;
            application_cluster(service, number, Protocol::Detect, name, application)
        }
    };
    let rule = passing("application", &cluster);
    let port = WorkloadPort {
        port: number,
        protocol: Protocol::Http,
        cluster,
        rule,
        batch: None,
        coalesce: None,
        pipelines: Vec::new(),
    };
    Ok(Probes { port, paths: Vec::new(), grpc: Vec::new() })
}

fn batch(from: &v1::Batch) -> Batch {
    Batch {
        rows: (from.rows > 0).then_some(from.rows),
        bytes: (from.bytes > 0).then_some(from.bytes),
        elements: (from.elements > 0).then_some(from.elements),
        delay: from.delay_ms.map(Duration::from_millis),
        concurrent: (from.concurrent > 0).then_some(from.concurrent),
        target: from.target_ms.map(Duration::from_millis),
    }
}

fn pipeline(from: &v1::Pipeline) -> Result<Arc<Prepare>, String> {
    let of =
        |error: String| format!("the pipeline of input {:?} of model {:?}: {error}", from.input, from.model);
    let declaration: penstock_prepare::Declaration =
        serde_json::from_str(&from.declaration).map_err(|error| of(error.to_string()))?;
    let pipeline = penstock_prepare::Pipeline::new(&declaration).map_err(|error| of(error.to_string()))?;
    let model = Some(from.model.clone()).filter(|model| model != "*");
    let own = pipeline.shape().map(|dimension| dimension as u64);
    let shape = if from.shape.is_empty() { own.to_vec() } else { from.shape.clone() };
    if shape.iter().product::<u64>() != own.iter().product::<u64>() {
        return Err(of(format!("{shape:?} has not as many elements as {own:?}")));
    }
    Ok(Arc::new(Prepare { model, input: from.input.clone(), tensor: from.tensor.clone(), pipeline, shape }))
}

fn coalesce(from: &v1::Coalesce) -> Result<Coalesce, String> {
    let header = |name: &String| {
        HeaderName::try_from(name.as_str()).map_err(|_| format!("{name:?} is not the name of a header"))
    };
    Ok(Coalesce {
        single_flight: from.single_flight,
        outbound: from.outbound,
        cache: (from.cache_bytes > 0).then(|| (from.cache_bytes, Duration::from_millis(from.cache_ms))),
        shared: from.shared,
        deterministic: from.deterministic,
        headers: from.headers.iter().map(header).collect::<Result<_, _>>()?,
    })
}

/// The application behind this proxy: never ejected (there is no other), never limited (its clients are).
pub fn application_cluster(
    service: ServiceName,
    number: u16,
    protocol: Protocol,
    name: &Arc<str>,
    application: std::net::SocketAddr,
) -> Arc<Cluster> {
    let policy = Policy {
        balance: Settings { policy: Balance::RoundRobin, ..Settings::default() },
        outlier: penstock_balance::OutlierPolicy { consecutive_failures: 0, ..Default::default() },
        max_connections: u32::MAX,
        max_pending: u32::MAX,
        max_requests: u32::MAX,
        ..Policy::default()
    };
    let cluster = Cluster::new(service, number, protocol, policy);
    let endpoint = Endpoint::new(
        Arc::clone(name),
        application,
        application.port(),
        None,
        false,
        speak_to_application(protocol),
    );
    cluster.set_endpoints(vec![Arc::new(endpoint)]);
    Arc::new(cluster)
}

/// The application hears what its client spoke, unless its port is declared to speak only one version.
fn speak_to_application(protocol: Protocol) -> Speak {
    match protocol {
        Protocol::Http2 | Protocol::Grpc => Speak::Http2,
        Protocol::Http1 | Protocol::Detect | Protocol::Http | Protocol::Opaque | Protocol::Tls => Speak::Same,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_service_says_of_itself_holds_for_its_split() {
        let message = v1::Service {
            namespace: "a".into(),
            name: "svc".into(),
            policy: Some(v1::Policy {
                timeouts: Some(v1::Timeouts {
                    request_ms: Some(1000),
                    per_try_ms: Some(300),
                    ..Default::default()
                }),
                retry: Some(v1::Retry { attempts: Some(3), codes: vec![502], ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let silent = v1::Rule { route: "a/svc".into(), weights: "w".into(), ..Default::default() };
        let own = v1::Rule {
            timeouts: Some(v1::Timeouts { request_ms: Some(50), ..Default::default() }),
            retry: Some(v1::Retry { attempts: Some(0), ..Default::default() }),
            ..silent.clone()
        };
        let routes = v1::Routes { rules: vec![silent, own] };
        let mut clusters = |service: &ServiceName, port: u16| {
            Arc::new(Cluster::new(service.clone(), port, Protocol::Http, Policy::default()))
        };
        let weights = |_: &str| Some(Arc::new(v1::Weights::default()));
        let service = service(&message, Some(&routes), &weights, &mut clusters).unwrap();
        let [silent, own] = service.rules.as_slice() else { panic!("{:?}", service.rules) };
        assert_eq!(silent.retry.as_ref().unwrap().codes, [502]);
        assert_eq!(silent.timeouts.request, Some(Duration::from_secs(1)));
        assert_eq!(own.retry.as_ref().unwrap().attempts, 0);
        assert_eq!(own.timeouts.request, Some(Duration::from_millis(50)));
        assert_eq!(own.timeouts.per_try, Some(Duration::from_millis(300)));
    }

    #[test]
    fn a_policy_is_tuned_within_its_bounds_and_by_its_defaults() {
        let tuned = |tuning| policy(Some(&v1::Policy { tuning, ..v1::Policy::default() })).balance;
        assert_eq!(tuned(None), Settings::default());
        assert_eq!(tuned(Some(v1::Tuning::default())), Settings::default());
        let all = v1::Tuning {
            choices: Some(4),
            explore_permille: Some(0),
            hot_permille: Some(900),
            bound_permille: Some(1_500),
        };
        let expected = Settings {
            choices: 4,
            explore_permille: 0,
            hot_quantile: 0.9,
            bound: 1.5,
            ..Settings::default()
        };
        assert_eq!(tuned(Some(all)), expected);
        let wild = v1::Tuning {
            choices: Some(1_000),
            explore_permille: Some(5_000),
            hot_permille: Some(5_000),
            bound_permille: Some(0),
        };
        let Settings { choices, explore_permille, hot_quantile, bound, .. } = tuned(Some(wild));
        assert_eq!((choices, explore_permille, hot_quantile, bound), (LOOKS, 1_000, 1.0, 1.0));
    }

    #[test]
    fn a_filter_may_not_touch_framing() {
        for name in ["Content-Length", "transfer-encoding", "connection", "Host"] {
            let change = v1::HeaderChange {
                set: vec![v1::Header { name: name.into(), value: "1".into() }],
                ..Default::default()
            };
            let filter = v1::Filter { kind: Some(v1::filter::Kind::RequestHeaders(change)) };
            assert!(filters(&[filter]).unwrap_err().contains("belongs to the connection"), "{name}");
        }
    }

    #[test]
    fn a_mirror_to_which_nothing_can_be_copied_is_left_out_and_one_that_makes_no_sense_is_refused() {
        let mut clusters = |service: &ServiceName, port: u16| {
            Arc::new(Cluster::new(service.clone(), port, Protocol::Http, Policy::default()))
        };
        let mut mirrors = |mirror: v1::Mirror| {
            let weights = v1::Weights { mirrors: vec![mirror], ..Default::default() };
            destinations(&weights, &mut clusters).map(|(_, mirrors)| mirrors)
        };
        let to = v1::Mirror { service: "a/v2".into(), port: 80, share_ppm: 500_000, ..Default::default() };
        let made = mirrors(to.clone()).unwrap();
        assert_eq!((made[0].cluster.service.as_str(), made[0].share_ppm), ("a/v2", 500_000));
        assert!(made[0].compare.is_none());
        let invalid = v1::Mirror { port: 0, invalid: "it does not exist".into(), ..to.clone() };
        assert!(mirrors(invalid).unwrap().is_empty());
        let compare = v1::Compare { absolute: 1e-3, max_bytes: u64::MAX, ..Default::default() };
        let made = mirrors(v1::Mirror { compare: Some(compare), ..to.clone() }).unwrap();
        assert_eq!(made[0].compare.as_ref().unwrap().max_bytes, limits::COPY_BODY);
        let negative = v1::Compare { relative: -1.0, ..Default::default() };
        assert!(mirrors(v1::Mirror { compare: Some(negative), ..to.clone() }).unwrap_err().contains("-1"));
        assert!(mirrors(v1::Mirror { share_ppm: 1_000_001, ..to.clone() }).is_err());
        assert!(mirrors(v1::Mirror { port: 0, ..to }).unwrap_err().contains("0 is not a port"));
    }

    #[test]
    fn a_filter_of_the_future_is_refused() {
        assert!(filters(&[v1::Filter { kind: None }]).unwrap_err().contains("upgrade the proxy"));
    }

    #[test]
    fn a_redirect_must_redirect() {
        let redirect = |status| {
            let redirect = v1::Redirect { status, ..Default::default() };
            filters(&[v1::Filter { kind: Some(v1::filter::Kind::Redirect(redirect)) }])
        };
        assert_eq!(redirect(0).unwrap().redirect.unwrap().status, 302);
        assert_eq!(redirect(301).unwrap().redirect.unwrap().status, 301);
        assert!(redirect(200).unwrap_err().contains("not the status of a redirect"));
    }

    #[test]
    fn an_endpoint_is_dialled_where_its_proxy_listens() {
        let from = v1::Endpoint {
            name: "a/pod".into(),
            ip: "127.0.0.11".into(),
            ports: vec![v1::PortTarget { service_port: 80, port: 8000 }],
            identity: "spiffe://cluster.local/ns/a/sa/m".into(),
            inbound_port: 15006,
            ..Default::default()
        };
        let made = endpoint(&from, 80, Protocol::Http).unwrap().unwrap();
        assert_eq!((made.address.to_string().as_str(), made.target_port), ("127.0.0.11:15006", 8000));
        assert!(made.sidecar);
        assert!(endpoint(&from, 81, Protocol::Http).unwrap().is_none());
        let bad = v1::Endpoint { identity: "root".into(), ..from };
        assert!(endpoint(&bad, 80, Protocol::Http).unwrap_err().contains("endpoint a/pod"));
    }
}
