//! Hosts outside the mesh: resolved as the application would have, once for all who ask, and reached in plaintext.
//!
//! In: a host and a port. Out: a destination of one cluster, whose endpoints keep their connections as long as their
//! addresses stay. While a name server is slow or gone, the last addresses go on being used.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use penstock_api::v1::Protocol;
use penstock_api::{Reason, ServiceName};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::config::{Cluster, Endpoint, Policy, Service, Speak};
use crate::failure::Failure;
use crate::route::{Destination, alone};
use crate::worker::Worker;

/// How long the addresses of a host are believed. Resolvers do not tell the lifetime of what they found; this is
/// short enough for a failover and long enough that a name server does not notice us.
const BELIEVED: Duration = Duration::from_secs(10);
/// How long after a name server's failure it is not asked again.
const FAILED: Duration = Duration::from_secs(1);
/// How long a name server may take.
const RESOLVE: Duration = Duration::from_secs(5);
/// Hosts that a worker knows at once; above, the one used longest ago is forgotten.
const MAX_HOSTS: usize = 256;

/// What a worker knows of hosts outside the mesh.
#[derive(Debug, Default)]
pub struct Outside {
    hosts: RefCell<AHashMap<String, Rc<Host>>>,
}

#[derive(Debug)]
struct Host {
    service: RefCell<Option<Arc<Service>>>,
    failure: RefCell<Option<Failure>>,
    /// Until then, one of the two above is the answer.
    until: Cell<Instant>,
    used: Cell<Instant>,
    resolving: Mutex<()>,
}

impl Host {
    fn new(now: Instant) -> Self {
        Self {
            service: RefCell::default(),
            failure: RefCell::default(),
            until: Cell::new(now),
            used: Cell::new(now),
            resolving: Mutex::default(),
        }
    }

    /// What is known, `None` if nothing is or it is too old.
    fn fresh(&self, now: Instant) -> Option<Result<Arc<Service>, Failure>> {
        (now < self.until.get()).then(|| self.last()).flatten()
    }

    /// What is known, however old.
    fn last(&self) -> Option<Result<Arc<Service>, Failure>> {
        let service = self.service.borrow().clone().map(Ok);
        service.or_else(|| self.failure.borrow().clone().map(Err))
    }

    fn settle(&self, result: Result<Arc<Service>, Failure>, now: Instant) {
        match result {
            Ok(service) => {
                self.service.replace(Some(service));
                self.failure.replace(None);
                self.until.set(now + BELIEVED);
            }
            Err(failure) => {
                self.failure.replace(Some(failure));
                self.until.set(now + FAILED);
            }
        }
    }
}

impl Outside {
    fn host(&self, key: String, now: Instant) -> Rc<Host> {
        let mut hosts = self.hosts.borrow_mut();
        if hosts.len() >= MAX_HOSTS && !hosts.contains_key(&key) {
            let oldest = hosts.iter().min_by_key(|(_, host)| host.used.get()).map(|(key, _)| key.clone());
            oldest.map(|key| hosts.remove(&key));
        }
        let host = hosts.entry(key).or_insert_with(|| Rc::new(Host::new(now)));
        host.used.set(now);
        Rc::clone(host)
    }
}

/// The destination that a host is.
pub async fn destination(worker: &Rc<Worker>, host: &str, port: u16) -> Result<Destination, Failure> {
    let found = |service| Destination { service, port };
    let entry = worker.outside.host(format!("{host}:{port}"), Instant::now());
    if let Some(known) = entry.fresh(Instant::now()) {
        return known.map(found);
    }
    // The old addresses do until the new ones are there: nobody waits for a name server that has answered before.
    let old = entry.service.borrow().clone();
    if let Some(service) = old {
        let (worker, host) = (Rc::clone(worker), host.to_owned());
        tokio::task::spawn_local(async move { settled(&worker, &entry, &host, port).await });
        return Ok(found(service));
    }
    settled(worker, &entry, host, port).await;
    entry.last().unwrap_or_else(|| Err(unresolved(host, &"nothing was found"))).map(found)
}

/// Sees to it that what is known of a host is fresh; one of those who ask at once does it for all.
async fn settled(worker: &Worker, entry: &Host, host: &str, port: u16) {
    let _resolving = entry.resolving.lock().await;
    if entry.fresh(Instant::now()).is_some() {
        return;
    }
    let before = entry.service.borrow().clone();
    let result = resolve(worker, host, port, before.as_ref()).await;
    if let (Err(failure), Some(_), None) = (&result, before, &*entry.failure.borrow()) {
        tracing::warn!(host, %failure, "going on with the addresses found before");
    }
    entry.settle(result, Instant::now());
}

fn unresolved(host: &str, why: &dyn std::fmt::Display) -> Failure {
    let story = format!("{host} is no Service that control knows, and it does not resolve: {why}");
    Failure::unprocessed(Reason::NoService, story)
}

async fn resolve(
    worker: &Worker,
    host: &str,
    port: u16,
    before: Option<&Arc<Service>>,
) -> Result<Arc<Service>, Failure> {
    let lookup = tokio::net::lookup_host((host.trim_matches(['[', ']']), port));
    let addresses: Vec<SocketAddr> = match timeout(RESOLVE, lookup).await {
        Ok(Ok(addresses)) => addresses.collect(),
        Ok(Err(error)) => return Err(unresolved(host, &error)),
        Err(_) => return Err(unresolved(host, &format_args!("no answer in {RESOLVE:?}"))),
    };
    if let Some(own) = addresses.iter().find(|address| is_own(worker, address)) {
        return Err(Failure::unprocessed(Reason::Loop, format!("{host} is {own}, where this proxy listens")));
    }
    let known = before.map(|service| service.ports[0].cluster.endpoints());
    let endpoint = |address: SocketAddr| {
        let same = |known: &&Arc<Endpoint>| known.address == address;
        let known = known.as_ref().and_then(|known| known.iter().find(same)).map(Arc::clone);
        known.unwrap_or_else(|| {
            let name = address.to_string().into();
            Arc::new(Endpoint::new(name, address, address.port(), None, false, Speak::Same))
        })
    };
    let endpoints = addresses.into_iter().map(endpoint).collect();
    // The cluster stays: its limits and its budget count on.
    if let Some(before) = before {
        before.ports[0].cluster.set_endpoints(endpoints);
        return Ok(Arc::clone(before));
    }
    let cluster = Cluster::new(ServiceName::outside(), port, Protocol::Detect, Policy::default());
    cluster.set_endpoints(endpoints);
    Ok(alone(&Arc::new(cluster)).service)
}

fn is_own(worker: &Worker, address: &SocketAddr) -> bool {
    worker.shared.listeners.iter().any(|own| {
        own.port() == address.port()
            && (own.ip() == address.ip() || (own.ip().is_unspecified() && address.ip().is_loopback()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> Arc<Service> {
        let cluster = Cluster::new(ServiceName::outside(), 80, Protocol::Detect, Policy::default());
        alone(&Arc::new(cluster)).service
    }

    #[tokio::test(start_paused = true)]
    async fn old_addresses_outlive_a_name_server() {
        let host = Host::new(Instant::now());
        assert!(host.fresh(Instant::now()).is_none());
        host.settle(Ok(service()), Instant::now());
        assert!(matches!(host.fresh(Instant::now()), Some(Ok(_))));
        tokio::time::advance(BELIEVED).await;
        assert!(host.fresh(Instant::now()).is_none());
        host.settle(Err(unresolved("x", &"gone")), Instant::now());
        assert!(matches!(host.fresh(Instant::now()), Some(Ok(_))), "the addresses found before");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_shared_for_a_while() {
        let host = Host::new(Instant::now());
        host.settle(Err(unresolved("x", &"gone")), Instant::now());
        assert!(matches!(host.fresh(Instant::now()), Some(Err(_))));
        tokio::time::advance(FAILED).await;
        assert!(host.fresh(Instant::now()).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn the_host_used_longest_ago_makes_room() {
        let outside = Outside::default();
        for i in 0..MAX_HOSTS {
            outside.host(i.to_string(), Instant::now());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        outside.host("0".to_owned(), Instant::now());
        outside.host("one more".to_owned(), Instant::now());
        let hosts = outside.hosts.borrow();
        assert_eq!(hosts.len(), MAX_HOSTS);
        assert!(hosts.contains_key("0") && !hosts.contains_key("1"));
    }
}
