//! The Kubernetes API, watched.
//!
//! In: a client. Out: an [`ObjectSet`] whenever an object has changed in what this control plane reads of it. One watch for each kind
//! of [`WATCHED`]; each object is read once for each of its changes, and keeps only what is used of it (`lean.rs`). The first set is
//! whole: nobody is told of some kinds while others are still being listed. Can go wrong: the API server is away, which changes nothing
//! until it is back; a kind is not installed, which is an empty list until it is; an object makes no sense, which is part of the set.

mod lean;
mod outage;
mod pace;
mod statuses;
mod store;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use futures_util::StreamExt as _;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, Config};
use tokio::sync::{Notify, watch};

use self::outage::Outage;
pub(crate) use self::pace::pace;
pub use self::statuses::{Known, Statuses};
use self::store::{Change, Store};
use crate::objects::{ObjectKind, ObjectSet, pool};

/// Objects in one answer of a list: what is in memory twice while a large kind is read.
const PAGE: u32 = 500;

/// A kind that is watched, as the API names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watched {
    /// The kind.
    pub kind: ObjectKind,
    /// Its API group; empty for Kubernetes' first.
    pub group: &'static str,
    /// The version that is read.
    pub version: &'static str,
    /// The name in URLs and in rules of access.
    pub plural: &'static str,
}

/// All that is read, and so all that control needs `list` and `watch` for.
pub const WATCHED: [Watched; 11] = [
    Watched { kind: ObjectKind::Service, group: "", version: "v1", plural: "services" },
    Watched { kind: ObjectKind::Pod, group: "", version: "v1", plural: "pods" },
    Watched {
        kind: ObjectKind::EndpointSlice,
        group: "discovery.k8s.io",
        version: "v1",
        plural: "endpointslices",
    },
    Watched {
        kind: ObjectKind::HTTPRoute,
        group: "gateway.networking.k8s.io",
        version: "v1",
        plural: "httproutes",
    },
    Watched {
        kind: ObjectKind::GRPCRoute,
        group: "gateway.networking.k8s.io",
        version: "v1",
        plural: "grpcroutes",
    },
    Watched { kind: ObjectKind::InferencePool, group: pool::GROUP, version: "v1", plural: "inferencepools" },
    Watched {
        kind: ObjectKind::ReferenceGrant,
        group: "gateway.networking.k8s.io",
        version: "v1beta1",
        plural: "referencegrants",
    },
    Watched {
        kind: ObjectKind::InferencePolicy,
        group: "penstock.io",
        version: "v1alpha1",
        plural: "inferencepolicies",
    },
    Watched {
        kind: ObjectKind::AccessPolicy,
        group: "penstock.io",
        version: "v1alpha1",
        plural: "accesspolicies",
    },
    Watched { kind: ObjectKind::RateLimit, group: "penstock.io", version: "v1alpha1", plural: "ratelimits" },
    Watched { kind: ObjectKind::Canary, group: "penstock.io", version: "v1alpha1", plural: "canaries" },
];

impl Watched {
    /// How a kind is watched.
    pub fn of(kind: ObjectKind) -> Option<Self> {
        WATCHED.into_iter().find(|watched| watched.kind == kind)
    }

    /// `gateway.networking.k8s.io/v1`
    pub fn api_version(&self) -> String {
        match self.group {
            "" => self.version.to_owned(),
            group => format!("{group}/{}", self.version),
        }
    }

    /// As the client wants it.
    pub fn resource(&self) -> ApiResource {
        let gvk = GroupVersionKind::gvk(self.group, self.version, &format!("{:?}", self.kind));
        ApiResource::from_gvk_with_plural(&gvk, self.plural)
    }
}

/// Connects to the API that a configuration names.
pub async fn client(context: Option<&str>) -> Result<Client> {
    client_of(config(context).await?)
}

/// Connects to an API.
pub(super) fn client_of(config: Config) -> Result<Client> {
    Client::try_from(config).context("no client for the Kubernetes API can be made of this configuration")
}

/// How to reach the API of the cluster that this process runs in, or of a context of the kubeconfig (`KUBECONFIG`, else
/// `~/.kube/config`).
pub(super) async fn config(context: Option<&str>) -> Result<Config> {
    Ok(match context {
        None => Config::infer().await.context(
            "no Kubernetes API is known: run in a pod with a service account, or give a kubeconfig in KUBECONFIG",
        )?,
        Some(context) => {
            let kubeconfig = Kubeconfig::read().context("the kubeconfig cannot be read; correct KUBECONFIG")?;
            let options = KubeConfigOptions { context: Some(context.to_owned()), ..Default::default() };
            Config::from_custom_kubeconfig(kubeconfig, &options).await.with_context(|| {
                format!("the kubeconfig has no usable context {context:?}; `kubectl config get-contexts` lists them")
            })?
        }
    })
}

/// Watches until every receiver is gone. Returns when all kinds have been listed once, however long the API server takes to answer;
/// what keeps it waiting is logged.
pub async fn open(client: Client, debounce: Duration) -> Result<(watch::Receiver<Arc<ObjectSet>>, Statuses)> {
    let statuses = Statuses::default();
    let store = Arc::new(Mutex::new(Store::new(WATCHED.map(|watched| watched.kind))));
    let changed = Arc::new(Notify::new());
    let outage = Arc::new(Outage::default());
    let watches: Vec<_> = WATCHED
        .into_iter()
        .map(|watched| {
            let told = Telling { store: store.clone(), statuses: statuses.clone(), changed: changed.clone() };
            tokio::spawn(follow(watched, client.clone(), told, outage.clone()))
        })
        .collect();
    let set = loop {
        changed.notified().await;
        if let Some(set) = locked(&store).whole() {
            break set;
        }
    };
    let (sender, receiver) = watch::channel(Arc::new(set));
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => break,
                () = changed.notified() => super::quiet(&changed, debounce).await,
            }
            if let Some(set) = locked(&store).whole() {
                sender.send_if_modified(|known| {
                    let modified = **known != set;
                    if modified {
                        *known = Arc::new(set);
                    }
                    modified
                });
            }
        }
        watches.iter().for_each(tokio::task::JoinHandle::abort);
    });
    Ok((receiver, statuses))
}

/// Who is told of what a watch says.
struct Telling {
    store: Arc<Mutex<Store>>,
    statuses: Statuses,
    changed: Arc<Notify>,
}

/// Held for some comparisons and moves, never across an await.
fn locked(store: &Mutex<Store>) -> std::sync::MutexGuard<'_, Store> {
    store.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One kind, for ever. Whatever happens to the connection, the watcher lists again and tells everything anew.
async fn follow(watched: Watched, client: Client, told: Telling, outage: Arc<Outage>) {
    let Watched { kind, group, plural, .. } = watched;
    let Telling { store, statuses, changed } = told;
    let api: Api<DynamicObject> = Api::all_with(client, &watched.resource());
    let mut listed = HashSet::new();
    let mut events = watcher(api, watcher::Config::default().page_size(PAGE)).backoff(pace()).boxed();
    // Looked for in vain is told once, not every half minute.
    let mut absent = false;
    while let Some(event) = events.next().await {
        // That a list is asked for is no answer yet.
        if !matches!(event, Ok(watcher::Event::Init) | Err(_)) && outage.ends(plural) {
            tracing::info!("the Kubernetes API answers again");
        }
        let change = match event {
            Ok(watcher::Event::Init) => {
                listed.clear();
                Change::Begin
            }
            Ok(watcher::Event::InitApply(object)) => {
                if kind.has_status() {
                    listed.insert(store::id_of(kind, &object));
                    statuses.put(kind, &object);
                }
                Change::Listed(Box::new(store::read(watched, object)))
            }
            Ok(watcher::Event::InitDone) => {
                statuses.only(kind, &std::mem::take(&mut listed));
                Change::End
            }
            Ok(watcher::Event::Apply(object)) => {
                statuses.put(kind, &object);
                Change::Put(Box::new(store::read(watched, object)))
            }
            Ok(watcher::Event::Delete(object)) => {
                let id = store::id_of(kind, &object);
                statuses.gone(&id);
                Change::Gone(id)
            }
            Err(watcher::Error::InitialListFailed(kube::Error::Api(status))) if status.code == 404 => {
                outage.ends(plural);
                statuses.only(kind, &HashSet::new());
                if !std::mem::replace(&mut absent, true) {
                    tracing::info!(
                        "{plural}.{group} is not installed in this cluster; looked for now and then"
                    );
                }
                Change::Absent
            }
            // The API server has forgotten where this watch was, as after each of its starts: all is listed again.
            Err(watcher::Error::WatchError(status)) if status.code == 410 => continue,
            Err(error) => {
                // With its causes: which address, refused, forbidden.
                let why = format!("{:#}", anyhow::Error::from(error));
                if outage.begins(plural, &why) {
                    tracing::warn!(
                        "the Kubernetes API does not tell {plural}: {why}; what is known stays in force, and it is asked again"
                    );
                }
                continue;
            }
        };
        if locked(&store).apply(kind, change) {
            changed.notify_one();
        }
    }
}
