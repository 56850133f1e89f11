//! Holds what control pushed, and turns each response into the next [`Snapshot`].
//!
//! In: [`Change`]s, one xDS response at a time. Out: refusals with reasons (their siblings apply, and the last good
//! version of what was refused stays in force), and a snapshot that is swapped before [`Store::apply`] returns, so
//! that an acknowledgement always tells the truth.
//!
//! The request path asks for a service by name; what is not known yet is demanded from control and waited for, a
//! bounded time. What nobody has asked for in [`IDLE`] is forgotten, so memory follows what the pod talks to.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;
use arc_swap::ArcSwap;
use penstock_api::ServiceName;
use penstock_api::access::Access;
use penstock_api::resource::{Kind, Payload};
use penstock_api::v1::{self, Protocol, address::Target};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::{Address, Cluster, Endpoint, Known, Service, Snapshot, compile};
use crate::rates::Rates;

/// How long a request waits for control to say what its destination is.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// A destination that nobody has asked for in this time is forgotten.
pub const IDLE: Duration = Duration::from_secs(600);
/// The most destinations that are known or asked for at once; a client that asks for more names than this (a
/// scanner, a forward proxy) is answered `no-config` until others are forgotten.
pub const MAX_DESTINATIONS: usize = 4096;

/// One resource of a response.
#[derive(Clone, Debug)]
pub struct Change {
    /// Its type.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// Its content; `None` when it was removed or does not exist.
    pub payload: Option<Payload>,
}

/// A resource that was refused.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// Its type.
    pub kind: Kind,
    /// Its name.
    pub name: String,
    /// What is wrong with it.
    pub reason: String,
}

/// What the request path wants to know, or no longer.
#[derive(Clone, Debug, PartialEq)]
pub enum Demand {
    /// Subscribe to the service, in each of [`Kind::OF_SERVICE`].
    Service(ServiceName),
    /// Subscribe to the address.
    Address(SocketAddr),
    /// Unsubscribe.
    ForgetService(ServiceName),
    /// Unsubscribe.
    ForgetAddress(SocketAddr),
}

/// Control has not answered.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum Unanswered {
    /// Not within [`ANSWER_TIMEOUT`].
    #[error("control has not answered in {ANSWER_TIMEOUT:?}")]
    Timeout,
    /// Too many destinations.
    #[error("this proxy knows {MAX_DESTINATIONS} destinations already")]
    TooMany,
}

/// The configuration of one proxy.
#[derive(Debug)]
pub struct Store {
    current: ArcSwap<Snapshot>,
    held: Mutex<Held>,
    version: watch::Sender<u64>,
    ready: watch::Sender<bool>,
    demand: mpsc::Sender<Demand>,
    demands: Mutex<Option<mpsc::Receiver<Demand>>>,
    /// Control is there to be asked.
    connected: AtomicBool,
    epoch: Instant,
}

/// In order, so that those of one service lie together.
type Clusters = BTreeMap<(ServiceName, u16), Arc<Cluster>>;

#[derive(Debug, Default)]
struct Held {
    services: BTreeMap<ServiceName, Raw>,
    clusters: Clusters,
    /// What the request path asked for, with the second of its last use.
    asked: AHashMap<ServiceName, Arc<AtomicU64>>,
    asked_addresses: AHashMap<SocketAddr, Arc<AtomicU64>>,
}

/// What control sent of one service.
#[derive(Debug, Default)]
struct Raw {
    service: Option<v1::Service>,
    endpoints: Option<v1::Endpoints>,
    routes: Option<v1::Routes>,
    weights: BTreeMap<String, Arc<v1::Weights>>,
    answered_service: bool,
    answered_endpoints: bool,
    answered_routes: bool,
}

impl Raw {
    fn is_empty(&self) -> bool {
        self.service.is_none() && self.endpoints.is_none() && self.routes.is_none() && self.weights.is_empty()
    }

    /// The services that its requests go to, and copies of them.
    fn leads_to(&self) -> impl Iterator<Item = &str> {
        self.weights.values().flat_map(|weights| {
            let backends = weights.backends.iter().map(|backend| backend.service.as_str());
            backends.chain(weights.mirrors.iter().map(|mirror| mirror.service.as_str()))
        })
    }
}

impl Default for Store {
    fn default() -> Self {
        let (demand, demands) = mpsc::channel(MAX_DESTINATIONS);
        Self {
            current: ArcSwap::default(),
            held: Mutex::default(),
            version: watch::channel(0).0,
            ready: watch::channel(false).0,
            demand,
            demands: Mutex::new(Some(demands)),
            connected: AtomicBool::new(false),
            epoch: Instant::now(),
        }
    }
}

impl Store {
    /// The snapshot in force.
    pub fn snapshot(&self) -> arc_swap::Guard<Arc<Snapshot>> {
        self.current.load()
    }

    /// What the request path asks for; once, for the xDS client.
    pub fn demands(&self) -> Option<mpsc::Receiver<Demand>> {
        self.demands.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The certificate and the first configuration are applied.
    pub fn set_ready(&self) {
        self.ready.send_replace(true);
    }

    /// Whether [`set_ready`](Self::set_ready) was called.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Changes each time a snapshot is swapped.
    pub fn version(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// The clusters of the snapshot, each once.
    pub fn clusters(&self) -> Vec<Arc<Cluster>> {
        let mut clusters: Vec<_> = self.held().clusters.values().cloned().collect();
        for address in self.snapshot().addresses.values() {
            if let Known::Here(address) = address
                && let Address::Pod(cluster) = &**address
            {
                clusters.push(Arc::clone(cluster));
            }
        }
        clusters.sort_by(|a, b| (&a.service, a.port).cmp(&(&b.service, b.port)));
        clusters
    }

    /// A service, as soon as control has said what it is.
    pub async fn service(&self, name: &ServiceName) -> Result<Known<Service>, Unanswered> {
        if let Some(known) = self.snapshot().services.get(name) {
            return Ok(known.clone());
        }
        self.ask_service(name)?;
        self.until(|snapshot| snapshot.services.get(name).cloned()).await
    }

    /// What lies at an address, as soon as control has said it.
    pub async fn address(&self, address: SocketAddr) -> Result<Known<Address>, Unanswered> {
        if let Some(known) = self.snapshot().addresses.get(&address) {
            return Ok(known.clone());
        }
        {
            let mut held = self.held();
            let full = held.asked_addresses.len() >= MAX_DESTINATIONS;
            if !held.asked_addresses.contains_key(&address) {
                if full || self.demand.try_send(Demand::Address(address)).is_err() {
                    return Err(Unanswered::TooMany);
                }
                held.asked_addresses.insert(address, self.used_now());
            }
        }
        self.until(|snapshot| snapshot.addresses.get(&address).cloned()).await
    }

    fn ask_service(&self, name: &ServiceName) -> Result<(), Unanswered> {
        let mut held = self.held();
        if !held.asked.contains_key(name) {
            let full = held.asked.len() >= MAX_DESTINATIONS;
            if full || self.demand.try_send(Demand::Service(name.clone())).is_err() {
                return Err(Unanswered::TooMany);
            }
            held.asked.insert(name.clone(), self.used_now());
            // A service that came along as somebody's backend may be complete already.
            self.publish(&held, std::slice::from_ref(name));
        }
        Ok(())
    }

    async fn until<T>(&self, found: impl Fn(&Snapshot) -> Option<Known<T>>) -> Result<Known<T>, Unanswered> {
        let mut version = self.version.subscribe();
        let wait = async {
            loop {
                version.borrow_and_update();
                if let Some(known) = found(&self.snapshot()) {
                    return known;
                }
                if version.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::time::timeout(ANSWER_TIMEOUT, wait).await.map_err(|_| Unanswered::Timeout)
    }

    /// Notes that a destination is in use. Cheap; workers call it now and then, not on every request.
    pub fn touch(
        &self,
        names: impl Iterator<Item = ServiceName>,
        addresses: impl Iterator<Item = SocketAddr>,
    ) {
        let held = self.held();
        let now = self.epoch.elapsed().as_secs();
        for address in addresses {
            if let Some(used) = held.asked_addresses.get(&address) {
                used.store(now, Relaxed);
            }
        }
        for name in names {
            if let Some(used) = held.asked.get(&name) {
                used.store(now, Relaxed);
            }
        }
    }

    /// Notes whether control is there to be asked.
    pub fn set_connected(&self, connected: bool) {
        self.connected.store(connected, Relaxed);
    }

    /// Forgets destinations that nobody has used for [`IDLE`]; none while control is away, since what is forgotten
    /// then could not be asked for again.
    pub fn forget_idle(&self) {
        if !self.connected.load(Relaxed) {
            return;
        }
        let now = self.epoch.elapsed().as_secs();
        let old = |used: &Arc<AtomicU64>| now.saturating_sub(used.load(Relaxed)) >= IDLE.as_secs();
        let mut held = self.held();
        let services: Vec<_> =
            held.asked.iter().filter(|(_, used)| old(used)).map(|(name, _)| name.clone()).collect();
        let addresses: Vec<_> =
            held.asked_addresses.iter().filter(|(_, used)| old(used)).map(|(address, _)| *address).collect();
        if services.is_empty() && addresses.is_empty() {
            return;
        }
        for name in &services {
            if self.demand.try_send(Demand::ForgetService(name.clone())).is_ok() {
                held.asked.remove(name);
            }
        }
        for address in &addresses {
            if self.demand.try_send(Demand::ForgetAddress(*address)).is_ok() {
                held.asked_addresses.remove(address);
            }
        }
        self.drop_unreferenced(&mut held);
        let asked: Vec<_> = services.clone();
        self.publish_with(&held, &asked, &[], |snapshot| {
            snapshot.addresses.retain(|address, _| held.asked_addresses.contains_key(address));
        });
    }

    /// Keeps the raw state of what was asked for and of its backends, and drops the rest.
    fn drop_unreferenced(&self, held: &mut Held) {
        let mut keep: std::collections::BTreeSet<ServiceName> = held.asked.keys().cloned().collect();
        for name in held.asked.keys() {
            let Some(raw) = held.services.get(name) else { continue };
            keep.extend(raw.leads_to().filter_map(|service| service.parse().ok()));
        }
        held.services.retain(|name, _| keep.contains(name));
        held.clusters.retain(|(name, _), _| keep.contains(name));
    }

    /// Takes in one response.
    pub fn apply(&self, changes: Vec<Change>) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        let mut touched = Vec::new();
        let mut addresses = Vec::new();
        let (mut workload, mut access, mut rates) = (None, None, None);
        let mut held = self.held();
        for Change { kind, name, payload } in changes {
            let result = match payload {
                Some(Payload::Workload(message)) => {
                    compile::workload(&message).map(|compiled| workload = Some(Some(Arc::new(compiled))))
                }
                Some(Payload::Access(message)) => {
                    let limits = Rates::compile(&message, &self.snapshot().rates);
                    Access::compile(&message).and_then(|compiled| {
                        // Policies are in force whatever becomes of limits: those protect from the wrong people.
                        access = Some(Some(Arc::new(compiled)));
                        limits.map(|limits| rates = Some(Arc::new(limits)))
                    })
                }
                // That control no longer knows who may call does not mean that everybody may.
                None if kind == Kind::Access => {
                    access = Some(None);
                    Ok(())
                }
                None if kind == Kind::Workload => {
                    workload = Some(None);
                    Ok(())
                }
                payload @ (Some(Payload::Address(_)) | None) if kind == Kind::Address => {
                    take_address(&name, payload, &mut addresses)
                }
                payload => take_service_part(&mut held, kind, &name, payload, &mut touched),
            };
            if let Err(reason) = result {
                refusals.push(Refusal { kind, name, reason });
            }
        }
        touched.sort();
        touched.dedup();
        self.publish_with(&held, &touched, &addresses, |snapshot| {
            if let Some(workload) = workload {
                snapshot.workload = workload;
            }
            if let Some(access) = access {
                snapshot.access = access;
            }
            if let Some(rates) = rates {
                snapshot.rates = rates;
            }
        });
        refusals
    }

    fn publish(&self, held: &Held, touched: &[ServiceName]) {
        self.publish_with(held, touched, &[], |_| {});
    }

    /// Swaps in the snapshot that follows from `held`, recompiling the services that were touched.
    fn publish_with(
        &self,
        held: &Held,
        touched: &[ServiceName],
        addresses: &[(SocketAddr, Known<Address>)],
        change: impl FnOnce(&mut Snapshot),
    ) {
        let before = self.current.load_full();
        let mut next = Snapshot {
            workload: before.workload.clone(),
            access: before.access.clone(),
            rates: before.rates.clone(),
            services: before.services.clone(),
            addresses: before.addresses.clone(),
        };
        for name in touched {
            if !held.asked.contains_key(name) {
                next.services.remove(name);
                continue;
            }
            match held.services.get(name).map(|raw| compiled(name, raw, &held.clusters)) {
                Some(Compiled::Whole(service)) => {
                    next.services.insert(name.clone(), Known::Here(Arc::new(service)));
                }
                Some(Compiled::Absent) => {
                    next.services.insert(name.clone(), Known::Absent);
                }
                // What was in force stays in force until the rest has arrived.
                Some(Compiled::Incomplete) | None => {}
            }
        }
        for (address, known) in addresses {
            if held.asked_addresses.contains_key(address) {
                next.addresses.insert(*address, known.clone());
            }
        }
        change(&mut next);
        self.current.store(Arc::new(next));
        self.version.send_modify(|version| *version += 1);
    }

    fn used_now(&self) -> Arc<AtomicU64> {
        Arc::new(AtomicU64::new(self.epoch.elapsed().as_secs()))
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take_address(
    name: &str,
    payload: Option<Payload>,
    addresses: &mut Vec<(SocketAddr, Known<Address>)>,
) -> Result<(), String> {
    let address: SocketAddr = name.parse().map_err(|_| format!("{name:?} is not an address"))?;
    let known = match payload {
        Some(Payload::Address(message)) => Known::Here(Arc::new(compile_address(&message)?)),
        _ => Known::Absent,
    };
    addresses.push((address, known));
    Ok(())
}

enum Compiled {
    Whole(Service),
    Absent,
    Incomplete,
}

fn compiled(name: &ServiceName, raw: &Raw, clusters: &Clusters) -> Compiled {
    let Some(message) = &raw.service else {
        return if raw.answered_service { Compiled::Absent } else { Compiled::Incomplete };
    };
    let weights_missing = raw
        .routes
        .iter()
        .flat_map(|routes| &routes.rules)
        .any(|rule| !rule.weights.is_empty() && !raw.weights.contains_key(&rule.weights));
    if !raw.answered_routes || !raw.answered_endpoints || weights_missing {
        return Compiled::Incomplete;
    }
    let mut find = |service: &ServiceName, port: u16| cluster_of(clusters, service, port);
    let weights = |name: &str| raw.weights.get(name).cloned();
    match compile::service(message, raw.routes.as_ref(), &weights, &mut find) {
        Ok(service) => Compiled::Whole(service),
        // Each part was compiled before it was taken in, so this cannot be; if it is, the last good stays.
        Err(reason) => {
            tracing::error!(service = %name, reason, "a service that was accepted does not compile");
            Compiled::Incomplete
        }
    }
}

/// The cluster of a port, or an empty one for a port that nobody has described.
fn cluster_of(clusters: &Clusters, service: &ServiceName, port: u16) -> Arc<Cluster> {
    clusters.get(&(service.clone(), port)).cloned().unwrap_or_else(|| {
        Arc::new(Cluster::new(service.clone(), port, Protocol::Detect, super::Policy::default()))
    })
}

/// The service that a resource belongs to: the first two segments of its name.
fn owner(name: &str) -> Result<ServiceName, String> {
    let end = name.match_indices('/').nth(1).map_or(name.len(), |(at, _)| at);
    name[..end].parse().map_err(|error| format!("{error}"))
}

fn take_service_part(
    held: &mut Held,
    kind: Kind,
    name: &str,
    payload: Option<Payload>,
    touched: &mut Vec<ServiceName>,
) -> Result<(), String> {
    let service = owner(name)?;
    let no_clusters = Clusters::new();
    let mut scratch = |service: &ServiceName, port: u16| cluster_of(&no_clusters, service, port);
    let no_weights = |_: &str| Some(Arc::new(v1::Weights::default()));
    match payload {
        Some(Payload::Service(message)) => {
            compile::service(&message, None, &no_weights, &mut scratch)?;
            let raw = held.services.entry(service.clone()).or_default();
            raw.service = Some(message);
            raw.answered_service = true;
            if set_clusters(held, &service) {
                touched.extend(leading_to(held, &service));
            }
        }
        Some(Payload::Endpoints(message)) => {
            for from in &message.endpoints {
                for target in &from.ports {
                    compile::endpoint(from, compile::port(target.service_port)?, Protocol::Detect)?;
                }
            }
            let raw = held.services.entry(service.clone()).or_default();
            raw.endpoints = Some(message);
            raw.answered_endpoints = true;
            set_endpoints(held, &service);
        }
        Some(Payload::Routes(message)) => {
            let probe = v1::Service {
                namespace: service.namespace().to_owned(),
                name: service.name().to_owned(),
                ..Default::default()
            };
            compile::service(&probe, Some(&message), &no_weights, &mut scratch)?;
            let raw = held.services.entry(service.clone()).or_default();
            raw.routes = Some(message);
            raw.answered_routes = true;
        }
        Some(Payload::Weights(message)) => {
            compile::destinations(&message, &mut scratch)?;
            held.services
                .entry(service.clone())
                .or_default()
                .weights
                .insert(name.to_owned(), Arc::new(message));
        }
        Some(_) => return Err(format!("a {kind:?} resource with another type inside")),
        None => {
            let raw = held.services.entry(service.clone()).or_default();
            match kind {
                Kind::Service => {
                    raw.service = None;
                    raw.answered_service = true;
                }
                Kind::Endpoints => {
                    raw.endpoints = None;
                    raw.answered_endpoints = true;
                    set_endpoints(held, &service);
                }
                Kind::Routes => {
                    raw.routes = None;
                    raw.answered_routes = true;
                }
                _ => {
                    raw.weights.remove(name);
                }
            }
            // What is left of a former backend says nothing of the service, should somebody ask for it later.
            if held.services.get(&service).is_some_and(Raw::is_empty) && !held.asked.contains_key(&service) {
                held.services.remove(&service);
                held.clusters.retain(|(name, _), _| *name != service);
            }
        }
    }
    touched.push(service);
    Ok(())
}

/// The services that were asked for and have routes to this one.
fn leading_to(held: &Held, backend: &ServiceName) -> Vec<ServiceName> {
    let leads = |raw: &Raw| raw.leads_to().any(|to| to == backend.as_str());
    let leading = held.asked.keys().filter(|name| held.services.get(*name).is_some_and(leads));
    leading.cloned().collect()
}

/// Makes the clusters of a service's ports, keeping those whose protocol did not change. True if any was made or
/// dropped: whoever leads to it is to be compiled again.
fn set_clusters(held: &mut Held, name: &ServiceName) -> bool {
    let Some(message) = held.services.get(name).and_then(|raw| raw.service.as_ref()) else { return false };
    let mut changed = false;
    let policy = compile::policy(message.policy.as_ref());
    let ports: Vec<_> = message
        .ports
        .iter()
        .filter_map(|port| Some((compile::port(port.port).ok()?, port.protocol())))
        .collect();
    for (port, protocol) in &ports {
        let key = (name.clone(), *port);
        match held.clusters.get(&key) {
            Some(cluster) if cluster.protocol == *protocol => cluster.set_policy(policy.clone()),
            _ => {
                let cluster = Cluster::new(name.clone(), *port, *protocol, policy.clone());
                held.clusters.insert(key, Arc::new(cluster));
                changed = true;
            }
        }
    }
    let before = held.clusters.len();
    held.clusters.retain(|(service, port), _| service != name || ports.iter().any(|(p, _)| p == port));
    changed |= held.clusters.len() != before;
    set_endpoints(held, name);
    changed
}

/// Gives the clusters of a service their endpoints; one that stays keeps its state.
fn set_endpoints(held: &mut Held, name: &ServiceName) {
    let message = held.services.get(name).and_then(|raw| raw.endpoints.as_ref());
    for ((_, port), cluster) in held.clusters.range((name.clone(), 0)..=(name.clone(), u16::MAX)) {
        let before = cluster.endpoints();
        let by_name: AHashMap<&str, &Arc<Endpoint>> = before.iter().map(|old| (&*old.name, old)).collect();
        let endpoints = message
            .iter()
            .flat_map(|message| &message.endpoints)
            .filter_map(|from| {
                let made = compile::endpoint(from, *port, cluster.protocol).ok()??;
                let same = |old: &&&Arc<Endpoint>| {
                    old.speak == made.speak
                        && old.address == made.address
                        && old.target_port == made.target_port
                        && old.identity == made.identity
                };
                Some(match by_name.get(&*made.name).filter(same) {
                    Some(old) => {
                        old.state.set_draining(from.draining);
                        Arc::clone(*old)
                    }
                    None => Arc::new(made),
                })
            })
            .collect();
        cluster.set_endpoints(endpoints);
    }
}

fn compile_address(message: &v1::Address) -> Result<Address, String> {
    if let (0, Some(Target::Endpoint(pod))) = (message.port, &message.target) {
        return Ok(Address::Undeclared(pod.name.as_str().into()));
    }
    let port = compile::port(message.port)?;
    match &message.target {
        Some(Target::Service(name)) => {
            Ok(Address::Service(name.parse().map_err(|error| format!("{error}"))?, port))
        }
        Some(Target::Endpoint(from)) => {
            let namespace = from.name.split_once('/').map_or("default", |(namespace, _)| namespace);
            let service = ServiceName::new(namespace, "pod").map_err(|error| error.to_string())?;
            let mut from = from.clone();
            if from.ports.is_empty() {
                from.ports.push(v1::PortTarget { service_port: message.port, port: message.port });
            }
            let served = from.ports.iter().find(|target| target.port == message.port).copied();
            let service_port = served.map_or(port, |target| target.service_port as u16);
            let endpoint = compile::endpoint(&from, service_port, message.protocol())?
                .ok_or_else(|| format!("{} does not serve port {port}", from.name))?;
            let cluster = Cluster::new(service, port, message.protocol(), super::Policy::default());
            cluster.set_endpoints(vec![Arc::new(endpoint)]);
            Ok(Address::Pod(Arc::new(cluster)))
        }
        None => {
            Err("an address that leads to something this proxy does not know; upgrade the proxy".to_owned())
        }
    }
}
