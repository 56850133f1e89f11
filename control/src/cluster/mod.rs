//! What control keeps in the cluster: who writes (a Lease), the root (a Secret), trust anchors (ConfigMaps), the certificate of the
//! webhook (a Secret, and the caBundle of its configuration), what became of objects (their statuses, and Events), and which pods a Canary lets serve
//! (a condition of each).
//!
//! In: the Kubernetes API. Out: an [`Authority`] that has what the Secret has, whether this replica holds the Lease, and the webhook's
//! certificate. Reads of what the configuration is made of are in `source::kubernetes`; writes are here. Everything is level-triggered:
//! what is there is compared with what should be, whoever wrote it last and whenever. Can go wrong: the API server is away, and then
//! what is known stays in force; a Secret makes no sense, which is an error at the start and a line in the log later.

mod anchors;
mod canaries;
mod gates;
mod lease;
mod peers;
mod replicas;
mod root;
mod root_secret;
mod secret;
mod statuses;
mod webhook_certificate;
mod webhook_secret;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;
use penstock_api::SpiffeId;
use penstock_api::names::SYSTEM_NAMESPACE;
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::canaries::InCluster;
use self::replicas::Others;
pub use self::replicas::ReplicasService;
pub use self::root_secret::{ASK, NAME as ROOT_SECRET, REPLICA_PREFIX, ROTATION};
use crate::canary::{self, Outside, Shown, Sight};
use crate::events::Events;
use crate::fleet::Fleet;
use crate::identity::Authority;
use crate::identity::Trust;
use crate::identity::rotation::Facts;
use crate::namespaces::Namespaces;
use crate::objects::ObjectSet;
use crate::push::Published;
use crate::source::kubernetes::Statuses;

/// The label of what control has made, and so may change.
const MADE_BY: &str = "penstock.io/made-by";
/// Its value.
const CONTROL: &str = "control";
/// An API server that has not answered by then is asked again later.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where control is, and who.
#[derive(Clone)]
pub struct Place {
    /// Speaks to the API.
    pub client: Client,
    /// The namespace of control.
    pub namespace: String,
    /// The name of this replica, which no other has: its pod's.
    pub replica: String,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.replica)
    }
}

impl Place {
    /// In a pod, `POD_NAMESPACE` and `POD_NAME` say it; elsewhere a name is made up that no other process has.
    pub fn new(client: Client, namespace: Option<String>, replica: Option<String>) -> Self {
        let namespace =
            namespace.filter(|name| !name.is_empty()).unwrap_or_else(|| SYSTEM_NAMESPACE.to_owned());
        let replica = replica
            .filter(|name| !name.is_empty())
            .unwrap_or_else(|| format!("control-{:08x}", rand::random::<u32>()));
        Self { client, namespace, replica }
    }
}

/// What the proxies that are connected to this replica know, of which trust.
pub type Acknowledged = Option<(Arc<Trust>, Facts)>;

/// What control needs of the cluster to begin.
#[derive(Clone, Debug)]
pub struct Cluster {
    /// Where it is.
    pub place: Place,
    /// The objects that the source knows.
    pub objects: watch::Receiver<Arc<ObjectSet>>,
    /// The host of the API server, as control finds it.
    pub api_server: Option<String>,
    /// What is in their statuses.
    pub statuses: Statuses,
    /// What namespaces say.
    pub namespaces: Namespaces,
    /// Whether the webhook's certificate is made, and API servers told of it; not where an operator does both.
    pub certifies_webhook: bool,
}

/// The state in the cluster, read and not yet kept up.
#[derive(Debug)]
pub struct State {
    root: root::Root,
    cluster: Cluster,
}

/// What is pushed, and to whom.
#[derive(Debug)]
pub struct Pushed {
    /// The snapshot in force.
    pub published: watch::Receiver<Published>,
    /// The proxies.
    pub fleet: Arc<Fleet>,
    /// What those know of the trust in force.
    pub acknowledged: watch::Receiver<Acknowledged>,
    /// What control proves to be.
    pub own: SpiffeId,
    /// Where each replica listens for proxies.
    pub port: u16,
    /// The way to those whom canaries name.
    pub outside: Outside,
    /// Where canaries are shown.
    pub canaries: watch::Sender<Arc<Vec<Shown>>>,
}

/// What the tasks that keep it up tell.
#[derive(Clone, Debug)]
pub struct Told {
    /// Takes Events, which are sent while this replica writes.
    pub events: Events,
    /// Whether this replica holds the Lease, and so writes.
    pub leads: watch::Receiver<bool>,
    /// The webhook's certificate, as soon as there is one.
    pub webhook: watch::Receiver<Option<Arc<CertifiedKey>>>,
    /// The snapshot in force.
    pub published: watch::Receiver<Published>,
}

impl State {
    /// Reads the root, making it where there is none. Waits for an API server that is away.
    pub async fn open(cluster: Cluster, trust_domain: &str, leaf_lifetime: Duration) -> Result<Self> {
        let root = root::Root::open(cluster.place.clone(), trust_domain, leaf_lifetime).await?;
        Ok(Self { root, cluster })
    }

    /// Signs by what the Secret has.
    pub fn authority(&self) -> Arc<Authority> {
        self.root.authority()
    }

    /// Keeps everything up until told to stop.
    pub fn keep(self, pushed: Pushed, tasks: &mut JoinSet<Result<()>>, stop: &CancellationToken) -> Told {
        let (leader, leads) = watch::channel(false);
        let (serving, webhook) = watch::channel(None);
        let Cluster { place, objects, statuses, namespaces, certifies_webhook, .. } = self.cluster;
        let Pushed { published, fleet, acknowledged, own, port, outside, canaries } = pushed;
        let events = Events::start(place.client.clone(), place.replica.clone(), leads.clone(), stop.clone());
        let trust = self.root.authority().trust();
        tasks.spawn(lease::run(place.clone(), leader, stop.clone()));
        let writing = leads.clone();
        tasks.spawn(anchors::run(place.clone(), trust, objects.clone(), namespaces, writing, stop.clone()));
        let others = |patience| {
            let (own, objects) = (own.clone(), objects.clone());
            Others::new(place.clone(), objects, self.root.authority(), own, port, patience)
        };
        let sight = Sight { published: published.clone(), fleet: fleet.clone(), outside, shown: canaries };
        let in_cluster = InCluster {
            place: place.clone(),
            statuses: statuses.clone(),
            others: others(canaries::PATIENCE),
            events: events.clone(),
            leads: leads.clone(),
            answers: Vec::new(),
            written: BTreeMap::new(),
        };
        tasks.spawn(canary::run(sight, in_cluster, stop.clone()));
        let (gated, holds) = (objects.clone(), published.clone());
        tasks.spawn(gates::run(place.clone(), gated, holds, leads.clone(), stop.clone()));
        let others = others(replicas::PATIENCE);
        let facts = statuses::Facts {
            place: place.clone(),
            others,
            statuses,
            published: published.clone(),
            fleet,
            events: events.clone(),
            leads: leads.clone(),
        };
        tasks.spawn(statuses::run(facts, stop.clone()));
        if certifies_webhook {
            tasks.spawn(webhook_certificate::run(place, serving, leads.clone(), stop.clone()));
        }
        tasks.spawn(self.root.run(acknowledged, objects, leads.clone(), stop.clone()));
        Told { events, leads, webhook, published }
    }
}

/// What became of a write that rests on a version.
enum Outcome<T> {
    /// It is so now.
    Done(T),
    /// Somebody else wrote in between.
    Overtaken,
}

/// A conflict is no failure: what is there now is looked at again.
fn outcome<T>(written: kube::Result<T>) -> Result<Outcome<T>> {
    match written {
        Ok(written) => Ok(Outcome::Done(written)),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(Outcome::Overtaken),
        Err(error) => Err(error.into()),
    }
}

/// Writes, if the API server is not away.
async fn written<T>(write: impl Future<Output = kube::Result<T>>) -> Result<Outcome<T>> {
    outcome(tokio::time::timeout(PATIENCE, write).await.context("the API server has not answered in time")?)
}

/// Asks the API server, who may be away.
async fn asked<T>(question: impl Future<Output = kube::Result<T>>) -> Result<T> {
    Ok(tokio::time::timeout(PATIENCE, question)
        .await
        .context("the API server has not answered in time")??)
}

/// The labels of what control makes.
fn labels() -> std::collections::BTreeMap<String, String> {
    [(MADE_BY, CONTROL), ("app.kubernetes.io/name", "penstock"), ("app.kubernetes.io/part-of", "penstock")]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}
