//! What namespaces say of injection: their labels, watched once for all who ask.
//!
//! In: a client. Out: two labels of each namespace and whether it is going away, as far as the watch has told them, or the API
//! server's own word where it has to be the newest. Only metadata is asked for, and of that two words a namespace are kept.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::Api;
use kube::runtime::{WatchStreamExt as _, metadata_watcher, watcher};
use kube::{Client, ResourceExt as _};
use penstock_api::names::annotation;
use penstock_inject::Namespace;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::source::kubernetes::pace;

/// The label with which a namespace chooses one of Kubernetes' standards for its pods.
const ENFORCE: &str = "pod-security.kubernetes.io/enforce";
/// An API server gives its webhooks five seconds; what it asks of itself takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is kept of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) said: Namespace,
    /// It is being deleted, and takes nothing new.
    pub(crate) ending: bool,
}

/// All of them, by name.
pub(crate) type All = HashMap<String, Known>;

/// What namespaces say.
#[derive(Clone)]
pub struct Namespaces {
    known: Arc<RwLock<All>>,
    /// Whether all have been listed once.
    changed: watch::Receiver<bool>,
    client: Option<Client>,
}

impl std::fmt::Debug for Namespaces {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Namespaces")
    }
}

impl Namespaces {
    /// These, and none besides.
    pub fn fixed(known: impl IntoIterator<Item = (String, Namespace)>) -> Self {
        let (_, changed) = watch::channel(true);
        let known = known.into_iter().map(|(name, said)| (name, Known { said, ending: false })).collect();
        Self { known: Arc::new(RwLock::new(known)), changed, client: None }
    }

    /// Those of a cluster, until told to stop.
    pub fn follow(client: Client, stop: CancellationToken) -> Self {
        let known = Arc::new(RwLock::new(All::new()));
        let (sender, changed) = watch::channel(false);
        let watched = follow(client.clone(), known.clone(), sender);
        tokio::spawn(async move { stop.run_until_cancelled(watched).await });
        Self { known, changed, client: Some(client) }
    }

    /// What the watch has told of a namespace.
    pub fn known(&self, name: &str) -> Option<Namespace> {
        self.locked().get(name).map(|known| known.said.clone())
    }

    /// Those that `pick` picks; `None` before all have been listed once.
    pub(crate) fn whole<T>(&mut self, pick: impl FnOnce(&All) -> T) -> Option<T> {
        let whole = *self.changed.borrow_and_update();
        whole.then(|| pick(&self.locked()))
    }

    /// Waits until something has changed since it was asked.
    pub(crate) async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.changed.changed().await
    }

    /// Held for a look, never across an await.
    fn locked(&self) -> RwLockReadGuard<'_, All> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the namespace says at this moment.
    ///
    /// # Errors
    ///
    /// The API server does not say, or there is no such namespace.
    pub async fn fresh(&self, name: &str) -> Result<Namespace, String> {
        let none = || format!("there is no namespace {name:?}");
        let Some(client) = &self.client else { return self.known(name).ok_or_else(none) };
        let api: Api<core::Namespace> = Api::all(client.clone());
        match timeout(PATIENCE, api.get_metadata_opt(name)).await {
            Ok(Ok(Some(found))) => Ok(read(&found.metadata).said),
            Ok(Ok(None)) => Err(none()),
            Ok(Err(error)) => Err(format!("what namespace {name:?} says cannot be read: {error}")),
            Err(_) => Err(format!("what namespace {name:?} says cannot be read within {PATIENCE:?}")),
        }
    }

    /// Whether anything has changed since this was asked.
    pub(crate) fn has_changed(&mut self) -> bool {
        let changed = self.changed.has_changed().unwrap_or(false);
        self.changed.mark_unchanged();
        changed
    }
}

fn read(metadata: &ObjectMeta) -> Known {
    let label = |key: &str| metadata.labels.as_ref().and_then(|all| all.get(key).cloned());
    let said = Namespace { inject: label(annotation::INJECT), enforce: label(ENFORCE) };
    Known { said, ending: metadata.deletion_timestamp.is_some() }
}

async fn follow(client: Client, known: Arc<RwLock<All>>, changed: watch::Sender<bool>) {
    let api: Api<core::Namespace> = Api::all(client);
    let mut events = metadata_watcher(api, watcher::Config::default()).backoff(pace()).boxed();
    let (mut incoming, mut failing, mut whole) = (All::new(), false, false);
    while let Some(event) = events.next().await {
        let known = || known.write().unwrap_or_else(PoisonError::into_inner);
        match event {
            Ok(watcher::Event::Init) => {
                incoming.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(one)) => {
                incoming.insert(one.name_any(), read(&one.metadata));
                continue;
            }
            Ok(watcher::Event::InitDone) => {
                *known() = std::mem::take(&mut incoming);
                whole = true;
            }
            Ok(watcher::Event::Apply(one)) => drop(known().insert(one.name_any(), read(&one.metadata))),
            Ok(watcher::Event::Delete(one)) => drop(known().remove(&one.name_any())),
            // Forgotten where it was: all is listed again.
            Err(watcher::Error::WatchError(status)) if status.code == 410 => continue,
            Err(error) => {
                if !std::mem::replace(&mut failing, true) {
                    let why = format!("{:#}", anyhow::Error::from(error));
                    tracing::warn!(
                        "the Kubernetes API does not tell namespaces: {why}; what is known stays, and it is asked again"
                    );
                }
                continue;
            }
        }
        failing = false;
        changed.send_replace(whole);
    }
}
