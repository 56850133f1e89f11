//! What each page says. The admin listener prints it, and the fleet stream answers control's questions with it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use ahash::AHashMap;
use penstock_api::{ServiceName, view};
use penstock_balance::load::REPORT_EXPIRY;
use penstock_balance::outlier::Standing;
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::config::{
    Address, Backend, Cluster, Endpoint, Filters, HeaderChange, Known, Mirror, PathChange, Rule, Service,
    Snapshot, Sticky, Store, Timeouts,
};
use crate::identity::Identity;
use crate::telemetry::Telemetry;
use crate::telemetry::level::Level;

/// Everything that the pages look at.
#[derive(Debug)]
pub struct Pages {
    /// What control pushed.
    pub store: Arc<Store>,
    /// Who we are.
    pub identity: Arc<Identity>,
    /// What was recorded.
    pub telemetry: Arc<Telemetry>,
    /// The log's level; `None` where the proxy does not own the log.
    pub level: Option<Arc<Level>>,
    /// Whether the proxy is on its way out, and how to say so.
    pub draining: watch::Sender<bool>,
    /// The epoch of the data path's times.
    pub epoch: Instant,
}

impl Pages {
    /// Whether traffic may come, or why not.
    pub fn ready(&self) -> Result<(), String> {
        if *self.draining.borrow() {
            return Err("draining: the proxy is shutting down".into());
        }
        if *self.store.ready().borrow() {
            return Ok(());
        }
        let wanting = self.identity.wanting().filter(|_| self.identity.current().is_none());
        Err(match wanting {
            Some(error) => format!("not ready: there is no certificate yet: {error}"),
            None => "not ready: control has not given a certificate and the first configuration yet".into(),
        })
    }

    /// The Prometheus page.
    pub fn metrics(&self, now: Instant) -> bytes::Bytes {
        self.telemetry.page(now)
    }

    /// The certificates and anchors in use.
    pub fn certificates(&self) -> Vec<view::Certificate> {
        self.identity.certificates()
    }

    /// Every endpoint of every cluster.
    pub fn endpoints(&self, now: Instant) -> Vec<view::ProxyEndpoint> {
        let now = now.saturating_duration_since(self.epoch);
        let mut rows = Vec::new();
        for cluster in live(&self.store.snapshot()) {
            for endpoint in cluster.endpoints().iter() {
                let state = &endpoint.state;
                let word = if state.draining() {
                    "draining"
                } else if state.ejection.standing(now) != Standing::In {
                    "ejected"
                } else {
                    "ready"
                };
                let number = |value: Option<f32>| f64::from(value.unwrap_or(0.0));
                let load = state.last_told(now).map(|(report, age)| view::Load {
                    in_flight: number(report.in_flight),
                    queue_wait_ms: number(report.queue_wait_ms),
                    backlog_ms: number(report.backlog_ms),
                    utilization: number(report.utilization),
                    rps: number(report.rps),
                    eps: number(report.eps),
                    age_ms: age.as_secs_f64() * 1e3,
                    expired: age >= REPORT_EXPIRY,
                });
                rows.push(view::ProxyEndpoint {
                    service: cluster.service.to_string(),
                    port: cluster.port,
                    endpoint: endpoint.name.to_string(),
                    address: endpoint.address.to_string(),
                    identity: endpoint.identity.as_ref().map(ToString::to_string).unwrap_or_default(),
                    state: word.into(),
                    in_flight: u64::from(state.in_flight()),
                    load,
                });
            }
        }
        rows
    }

    /// How busy endpoints say that they are, in thousandths: by Service and name, the newest report of each that is not old.
    pub fn loads(&self, now: Instant) -> AHashMap<(ServiceName, Arc<str>), u32> {
        let now = now.saturating_duration_since(self.epoch);
        let mut newest: AHashMap<_, (Duration, u32)> = AHashMap::new();
        for cluster in live(&self.store.snapshot()) {
            for endpoint in cluster.endpoints().iter() {
                let told = endpoint.state.last_told(now).filter(|(_, age)| *age < REPORT_EXPIRY);
                let Some((age, share)) = told.and_then(|(report, age)| Some((age, report.utilization?)))
                else {
                    continue;
                };
                let heard = (age, (f64::from(share) * 1e3).round() as u32);
                // Each port of a Service has heard for itself.
                let known =
                    newest.entry((cluster.service.clone(), Arc::clone(&endpoint.name))).or_insert(heard);
                if age < known.0 {
                    *known = heard;
                }
            }
        }
        newest.into_iter().map(|(endpoint, (_, permille))| (endpoint, permille)).collect()
    }

    /// The configuration in force, for people.
    pub fn config(&self) -> Value {
        let snapshot = self.store.snapshot();
        let services: Map<_, _> = sorted(&snapshot.services)
            .map(|(name, known)| (name.to_string(), known_as(known, service)))
            .collect();
        let addresses: Map<_, _> = sorted(&snapshot.addresses)
            .map(|(address, known)| (address.to_string(), known_as(known, target)))
            .collect();
        let workload = snapshot.workload.as_ref().map(|workload| {
            let ports: Vec<_> = workload
                .ports
                .iter()
                .map(|port| {
                    json!({
                        "port": port.port,
                        "protocol": port.protocol.as_str_name(),
                        "application": port.cluster.endpoints().iter().map(|e| e.address.to_string()).collect::<Vec<_>>(),
                    })
                })
                .collect();
            json!({"name": workload.name, "permissive": workload.permissive, "ports": ports})
        });
        let access = snapshot
            .access
            .as_ref()
            .map(|access| access.policies().iter().map(|policy| &*policy.name).collect::<Vec<_>>());
        json!({"workload": workload, "access": access, "services": services, "addresses": addresses})
    }
}

/// The clusters that a request can reach now, each once. Others may still be held, for the requests that are on
/// their way to them.
fn live(snapshot: &Snapshot) -> Vec<Arc<Cluster>> {
    let mut clusters = Vec::new();
    for known in snapshot.services.values() {
        if let Known::Here(service) = known {
            clusters.extend(service.ports.iter().map(|port| &port.cluster));
            let backends = service.rules.iter().flat_map(|rule| &rule.backends);
            // A backend that does not exist is answered with 500.
            clusters
                .extend(backends.filter(|backend| backend.invalid.is_none()).map(|backend| &backend.cluster));
            let mirrors = service.rules.iter().flat_map(|rule| &rule.mirrors);
            clusters.extend(mirrors.map(|mirror| &mirror.cluster));
        }
    }
    for known in snapshot.addresses.values() {
        if let Known::Here(address) = known
            && let Address::Pod(cluster) = &**address
        {
            clusters.push(cluster);
        }
    }
    clusters.sort_by_key(|cluster| (&cluster.service, cluster.port, Arc::as_ptr(cluster)));
    clusters.dedup_by(|a, b| Arc::ptr_eq(a, b));
    clusters.into_iter().cloned().collect()
}

fn sorted<K: Ord, V>(map: &ahash::AHashMap<K, V>) -> impl Iterator<Item = (&K, &V)> {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_by_key(|(key, _)| *key);
    entries.into_iter()
}

fn known_as<T>(known: &Known<T>, show: impl Fn(&T) -> Value) -> Value {
    match known {
        Known::Here(value) => show(value),
        Known::Absent => "not in the mesh".into(),
    }
}

fn service(service: &Service) -> Value {
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|port| {
            json!({
                "port": port.port,
                "protocol": port.protocol.as_str_name(),
                "cluster": cluster(&port.cluster),
            })
        })
        .collect();
    json!({
        "ports": ports,
        "rules": service.rules.iter().map(|from| rule(from)).collect::<Vec<_>>(),
        "sticky": service.sticky.as_ref().map(sticky),
    })
}

fn target(address: &Address) -> Value {
    match address {
        Address::Service(name, port) => json!({"service": name.to_string(), "port": port}),
        Address::Pod(pod) => json!({"pod": cluster(pod)}),
        Address::Undeclared(pod) => json!({"undeclared ports of": &**pod}),
    }
}

fn cluster(cluster: &Cluster) -> Value {
    let policy = cluster.policy();
    json!({
        "service": cluster.service.to_string(),
        "port": cluster.port,
        "balance": format!("{:?}", policy.balance),
        "connect_timeout": span(policy.connect_timeout),
        "timeouts": timeouts(&policy.timeouts),
        "retry": {
            "attempts": policy.retry.attempts,
            "codes": policy.retry.codes,
            "buffer_bytes": policy.retry.buffer,
            "budget_percent": policy.budget_percent,
        },
        "outlier": {
            "consecutive_failures": policy.outlier.consecutive_failures,
            "base": span(policy.outlier.base),
            "max": span(policy.outlier.max),
            "max_ejected_percent": policy.outlier.max_ejected_percent,
        },
        "limits": {
            "connections": policy.max_connections,
            "pending": policy.max_pending,
            "requests": policy.max_requests,
        },
        "in_flight": cluster.in_flight.load(Relaxed),
        "pending": cluster.pending.load(Relaxed),
        "endpoints": cluster.endpoints().iter().map(|e| endpoint(e)).collect::<Vec<_>>(),
    })
}

fn endpoint(endpoint: &Endpoint) -> Value {
    json!({
        "name": endpoint.name,
        "address": endpoint.address.to_string(),
        "target_port": endpoint.target_port,
        "identity": endpoint.identity.as_ref().map(ToString::to_string),
        "sidecar": endpoint.sidecar,
    })
}

fn rule(rule: &Rule) -> Value {
    json!({
        "rule": rule.label,
        "port": rule.port,
        "hostnames": rule.hostnames.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>(),
        "matches": rule.matches.iter().map(|part| format!("{part:?}")).collect::<Vec<_>>(),
        "filters": filters(&rule.filters),
        "timeouts": timeouts(&rule.timeouts),
        "retry": rule.retry.as_ref().map(|retry| {
            json!({"attempts": retry.attempts, "codes": retry.codes, "buffer_bytes": retry.buffer})
        }),
        "sticky": rule.sticky.as_ref().map(sticky),
        "backends": rule.backends.iter().map(backend).collect::<Vec<_>>(),
        "mirrors": rule.mirrors.iter().map(mirror).collect::<Vec<_>>(),
    })
}

fn mirror(mirror: &Mirror) -> Value {
    json!({
        "service": mirror.cluster.service.to_string(),
        "port": mirror.cluster.port,
        "share_ppm": mirror.share_ppm,
        "compare": mirror.compare.as_ref().map(|compare| {
            json!({
                "absolute": compare.tolerance.absolute,
                "relative": compare.tolerance.relative,
                "outputs": compare.outputs,
                "max_bytes": compare.max_bytes,
            })
        }),
    })
}

fn backend(backend: &Backend) -> Value {
    json!({
        "service": backend.cluster.service.to_string(),
        "port": backend.cluster.port,
        "weight": backend.weight,
        "filters": filters(&backend.filters),
        "invalid": backend.invalid,
    })
}

fn filters(filters: &Filters) -> Value {
    let changes = |changes: &[HeaderChange]| changes.iter().map(change).collect::<Vec<_>>();
    let mut shown = Map::new();
    if !filters.request.is_empty() {
        shown.insert("request_headers".into(), changes(&filters.request).into());
    }
    if !filters.response.is_empty() {
        shown.insert("response_headers".into(), changes(&filters.response).into());
    }
    if let Some(redirect) = &filters.redirect {
        let value = json!({
            "scheme": redirect.scheme,
            "hostname": redirect.hostname,
            "port": redirect.port,
            "path": redirect.path.as_ref().map(path),
            "status": redirect.status.as_u16(),
        });
        shown.insert("redirect".into(), value);
    }
    if let Some(rewrite) = &filters.rewrite {
        let hostname =
            rewrite.hostname.as_ref().map(|name| String::from_utf8_lossy(name.as_bytes()).into_owned());
        shown
            .insert("rewrite".into(), json!({"hostname": hostname, "path": rewrite.path.as_ref().map(path)}));
    }
    shown.into()
}

fn change(change: &HeaderChange) -> String {
    match change {
        HeaderChange::Set(name, value) => {
            format!("set {name}: {}", String::from_utf8_lossy(value.as_bytes()))
        }
        HeaderChange::Add(name, value) => {
            format!("add {name}: {}", String::from_utf8_lossy(value.as_bytes()))
        }
        HeaderChange::Remove(name) => format!("remove {name}"),
    }
}

fn path(change: &PathChange) -> String {
    match change {
        PathChange::Full(path) => format!("whole path becomes {path}"),
        PathChange::Prefix(prefix) => format!("matched prefix becomes {prefix}"),
    }
}

fn sticky(sticky: &Sticky) -> String {
    match sticky {
        Sticky::Header(name) => format!("header:{name}"),
        Sticky::Cookie(name) => format!("cookie:{name}"),
    }
}

fn timeouts(timeouts: &Timeouts) -> Value {
    let show = |timeout: Option<std::time::Duration>| timeout.map(span);
    json!({
        "connect": show(timeouts.connect),
        "request": show(timeouts.request),
        "per_try": show(timeouts.per_try),
        "idle": show(timeouts.idle),
    })
}

fn span(time: std::time::Duration) -> String {
    if time.is_zero() { "none".into() } else { humantime::format_duration(time).to_string() }
}
