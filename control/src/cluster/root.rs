//! The root in the Secret `penstock-ca`: read by every replica, made by whoever finds none, moved on by the holder of the Lease.
//!
//! In: the Secret, what proxies have acknowledged, whether this replica holds the Lease. Out: an [`Authority`] that announces and signs with
//! what the Secret has, never with what it does not have yet: a step is written first, and in force once it is written. So a
//! holder may die at any moment; whoever comes next finds either the step before or the step after.
//!
//! The Secret is asked for every 2 s by `get`, which needs no right to list or watch secrets. While the API server is away, what was read last
//! stays in force, for however long. A Secret that was deleted while control runs is written back from memory: the
//! identities of a mesh are worth more than the wish that a deletion may have expressed (to have another root, rotate it; to be rid of
//! this one, stop control first).

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::peers::{self, Peers, Said};
use super::root_secret::{self, ASK, Found, Lives, NAME, REPLICA_PREFIX, ROTATION};
use super::{Acknowledged, Outcome, Place, asked, written};
use crate::identity::material::{Material, fingerprint};
use crate::identity::rotation::{Facts, Phase};
use crate::identity::{Authority, Trust, epoch};
use crate::objects::ObjectSet;
use crate::trouble::Trouble;

/// How often the Secret is looked at. What an operator sees of a rotation that he asked for, and what another replica
/// signs after a step, is at most so old.
const EVERY: Duration = Duration::from_secs(2);
/// For how long, beyond the life of the last certificate, an old root stays trusted because another replica may have signed
/// with it meanwhile: it reads every [`EVERY`], and signs nothing without the API server, which has to review the token.
/// (Short-lived certificates, as in tests, shorten it.)
const MARGIN: Duration = Duration::from_secs(60);

/// The root.
#[derive(Debug)]
pub(super) struct Root {
    place: Place,
    authority: Arc<Authority>,
    material: Material,
    /// Whether control has made the Secret.
    own: bool,
    /// What was said of this replica's proxies, and when.
    said: Option<(Said, Instant)>,
    peers: Peers,
    trouble: Trouble,
}

fn lives(leaf: Duration) -> Lives {
    let seconds = |time: Duration| i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    Lives { leaf: seconds(leaf).max(1), margin: seconds(MARGIN.min(leaf / 4)) }
}

fn anchors(trust: &Trust) -> String {
    fingerprint(trust.anchors.iter().map(|anchor| &**anchor))
}

fn unusable(place: &Place) -> String {
    format!(
        "Secret {}/{NAME} cannot be used; supply one in the shape of cert-manager (tls.crt, tls.key, ca.crt), or delete it and \
         have control make one",
        place.namespace
    )
}

impl Root {
    /// Reads the Secret, or makes it where there is none. Waits for an API server that is away; a Secret that makes no sense, or one that
    /// may not be read, is an error.
    pub(super) async fn open(place: Place, trust_domain: &str, leaf_lifetime: Duration) -> Result<Self> {
        let api: Api<Secret> = Api::namespaced(place.client.clone(), &place.namespace);
        let mut trouble = Trouble::new("the Secret penstock-ca");
        let found = loop {
            match first(&api).await {
                Ok(secret) => break root_secret::read(&secret).with_context(|| unusable(&place))?,
                Err(error) if refused(&error) => {
                    return Err(error.context(format!(
                        "control may not keep its root in Secret {}/{NAME}; `penstock install` has the rights that it needs",
                        place.namespace
                    )));
                }
                Err(error) => trouble.met(&error),
            }
            tokio::time::sleep(EVERY).await;
        };
        trouble.over();
        let now = epoch(SystemTime::now());
        let material = root_secret::follow(&found, None, lives(leaf_lifetime), now);
        let trust = material.trust().with_context(|| unusable(&place))?;
        tracing::info!(
            anchors = anchors(&trust),
            "the root is that of Secret {}/{NAME}, {}",
            place.namespace,
            if found.own { "made by control" } else { "supplied: whoever supplies it rotates it" }
        );
        let authority = Arc::new(Authority::kept(trust, trust_domain, leaf_lifetime));
        Ok(Self { place, authority, material, own: found.own, said: None, peers: Peers::default(), trouble })
    }

    pub(super) fn authority(&self) -> Arc<Authority> {
        self.authority.clone()
    }

    /// Follows the Secret until told to stop, and moves it on while this replica holds the Lease.
    pub(super) async fn run(
        mut self,
        acknowledged: watch::Receiver<Acknowledged>,
        objects: watch::Receiver<Arc<ObjectSet>>,
        leads: watch::Receiver<bool>,
        stop: CancellationToken,
    ) -> Result<()> {
        let api: Api<Secret> = Api::namespaced(self.place.client.clone(), &self.place.namespace);
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                _ = tick.tick() => {}
            }
            let known = acknowledged.borrow().clone();
            let running = peers::running(&objects.borrow().clone(), &self.place.namespace);
            let lead = *leads.borrow();
            match self.keep(&api, known, &running, lead).await {
                Ok(()) => self.trouble.over(),
                Err(error) => self.trouble.met(&error),
            }
        }
    }

    async fn keep(
        &mut self,
        api: &Api<Secret>,
        acknowledged: Acknowledged,
        running: &std::collections::BTreeSet<String>,
        lead: bool,
    ) -> Result<()> {
        let now = epoch(SystemTime::now());
        let Some(secret) = asked(api.get_opt(NAME)).await? else {
            return self.restore(api, lead).await;
        };
        let found = root_secret::read(&secret).with_context(|| unusable(&self.place))?;
        let lives = lives(self.authority.leaf_lifetime());
        let material = root_secret::follow(&found, Some(&self.material), lives, now);
        self.own = found.own;
        self.adopt(material)?;

        // What proxies know of other anchors than those that are in force says nothing.
        let trust = self.authority.trust().borrow().clone();
        let Some((_, facts)) = acknowledged.filter(|(of, _)| Arc::ptr_eq(of, &trust)) else { return Ok(()) };
        let anchors = anchors(&trust);
        if self.material.phase == Phase::Announced {
            self.report(api, &anchors, facts, now).await?;
        }
        if !lead {
            return Ok(());
        }
        let me = peers::key(&self.place.replica);
        let facts = self.peers.all(&me, facts, &found.replicas, running, &anchors, Instant::now());
        let after = self.material.advance(facts, found.asked, lives.margin, now)?;
        self.step(api, secret, &found, after).await
    }

    /// Puts into force what the Secret has.
    fn adopt(&mut self, material: Material) -> Result<()> {
        if material == self.material {
            return Ok(());
        }
        let trust = material.trust().with_context(|| unusable(&self.place))?;
        if material.current.root != self.material.current.root && self.material.next.is_none() {
            tracing::warn!(
                "somebody has put another root into Secret {}/{NAME}; certificates of the old one are accepted until they expire",
                self.place.namespace
            );
        }
        self.material = material;
        self.authority.adopt(trust);
        Ok(())
    }

    /// Writes what comes next, and puts it into force once it is written.
    async fn step(
        &mut self,
        api: &Api<Secret>,
        secret: Secret,
        found: &Found,
        after: Option<Material>,
    ) -> Result<()> {
        let params = PostParams::default();
        if found.own {
            // Asked for while it cannot be: the wish does not wait for years.
            let vain = found.asked && !self.material.can_rotate();
            if after.is_none() && !vain {
                return Ok(());
            }
            let after = after.unwrap_or_else(|| self.material.clone());
            let secret = root_secret::write(&after, Some(secret))?;
            if let Outcome::Done(_) = written(api.replace(NAME, &params, &secret)).await? {
                self.adopt(after)?;
            }
            return Ok(());
        }
        let after = after.unwrap_or_else(|| self.material.clone());
        let noted = root_secret::noted(&after, false);
        if noted != found.noted || found.asked {
            let mut annotations = serde_json::Map::new();
            let text = noted.as_ref().map(serde_json::to_string).transpose()?;
            annotations.insert(ROTATION.to_owned(), text.map_or(Value::Null, Value::String));
            if found.asked {
                tracing::warn!(
                    "a rotation was asked for, and Secret {}/{NAME} was not made by control: whoever made it rotates it",
                    self.place.namespace
                );
                annotations.insert(ASK.to_owned(), Value::Null);
            }
            if after.phase != Phase::Announced {
                for replica in found.replicas.keys() {
                    annotations.insert(format!("{REPLICA_PREFIX}{replica}"), Value::Null);
                }
            }
            // Only what is written about it. Its data is of whoever made it.
            let patch = json!({"metadata": {"annotations": annotations, "resourceVersion": found.version}});
            let patch = Patch::Merge(patch);
            let params = PatchParams::default();
            let Outcome::Done(_) = written(api.patch(NAME, &params, &patch)).await? else { return Ok(()) };
        }
        self.adopt(after)
    }

    /// Says how many of this replica's proxies know the anchors.
    async fn report(&mut self, api: &Api<Secret>, anchors: &str, facts: Facts, now: i64) -> Result<()> {
        let said = Said {
            anchors: anchors.to_owned(),
            connected: facts.connected,
            acknowledged: facts.acknowledged,
            at: now,
        };
        let fresh = self.said.as_ref().is_some_and(|(known, at)| {
            at.elapsed() < peers::REPEAT && *known == Said { at: known.at, ..said.clone() }
        });
        if fresh {
            return Ok(());
        }
        let key = format!("{REPLICA_PREFIX}{}", peers::key(&self.place.replica));
        let patch = json!({"metadata": {"annotations": {key: serde_json::to_string(&said)?}}});
        asked(api.patch(NAME, &PatchParams::default(), &Patch::Merge(patch))).await?;
        self.said = Some((said, Instant::now()));
        Ok(())
    }

    /// The Secret was deleted.
    async fn restore(&self, api: &Api<Secret>, lead: bool) -> Result<()> {
        if !self.own {
            anyhow::bail!(
                "there is no Secret {}/{NAME} any more, and it was not made by control; whoever supplies it has to supply it again",
                self.place.namespace
            );
        }
        if lead {
            let secret = root_secret::write(&self.material, None)?;
            if let Outcome::Done(_) = written(api.create(&PostParams::default(), &secret)).await? {
                tracing::warn!(
                    "Secret {}/{NAME} was deleted, and is written back: it is the root of every identity. To have another root, run \
                     `penstock rotate-root`",
                    self.place.namespace
                );
            }
        }
        Ok(())
    }
}

/// Reads the Secret, or makes it; of two who make it at the same time one wins, and both go on with his.
async fn first(api: &Api<Secret>) -> Result<Secret> {
    if let Some(secret) = asked(api.get_opt(NAME)).await? {
        return Ok(secret);
    }
    let fresh = root_secret::write(&Material::fresh(epoch(SystemTime::now()))?, None)?;
    match written(api.create(&PostParams::default(), &fresh)).await? {
        Outcome::Done(secret) => Ok(secret),
        Outcome::Overtaken => Ok(asked(api.get(NAME)).await?),
    }
}

/// Whether asking again is of no use.
fn refused(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref::<kube::Error>(), Some(kube::Error::Api(status)) if matches!(status.code, 401 | 403))
}
