//! One client's configuration stream, as a pure state machine.
//!
//! In: the client's requests and the newest snapshot. Out: the responses that are due now. No input or output
//! happens here, and time is an argument.
//!
//! The machine never queues content. It remembers what the client was sent and acknowledged, and whenever it is
//! asked, it compares that with what the client wants of the newest snapshot. So snapshots merge by themselves
//! while an acknowledgement is outstanding, and a response holds only what differs.
//!
//! Order is make-before-break. What is referred to goes first ([`Kind::PUSH_ORDER`]), and where a reference that
//! traffic already follows would lead into nothing, the resource that refers waits for an acknowledgement:
//! weights for the service and endpoints of their backends, changed routes for the weights they name, and
//! removals for everything that might still refer to what is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use penstock_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_api::view::Refused;
use prost::Message;
use tokio::time::Instant;

use super::subscription::{Commit, Subscription, WILDCARD, Want};
use crate::snapshot::{Entry, Snapshot};

/// Names that one stream may subscribe to: far above what a pod talks to, and a bound on what a client can make
/// control remember.
const MAX_NAMES: usize = 50_000;
/// No resource has a longer name: five labels or subdomains of Kubernetes.
const MAX_NAME: usize = 1_024;
/// A response is cut above this, and the rest follows after its acknowledgement.
const MAX_RESPONSE: usize = 2 << 20;

/// A snapshot in force.
#[derive(Clone, Debug)]
pub struct Published {
    /// The snapshot.
    pub snapshot: Arc<Snapshot>,
    /// Its place in the order of this process, from 1.
    pub sequence: u64,
    /// When it was published.
    pub at: Instant,
}

/// Why a stream has to end.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The client asked for what it may not see.
    #[error("{0}")]
    Forbidden(String),
    /// The request goes against the protocol's limits.
    #[error("{0}")]
    Malformed(String),
}

/// The state of one client's stream.
#[derive(Debug)]
pub struct Stream {
    node: String,
    started: Instant,
    nonces: u64,
    subscriptions: BTreeMap<Kind, Subscription>,
    /// Weights that wait for endpoints: their version, and the snapshot in which they were first seen.
    waiting: BTreeMap<String, (String, u64)>,
    /// Answers to types that control does not know.
    unknown: Vec<DeltaDiscoveryResponse>,
    /// The last snapshot that the client applied whole, and how long that took.
    applied: Option<(u64, Duration)>,
}

/// What goes into one response.
#[derive(Debug, Default)]
struct Plan<'s> {
    send: Vec<&'s str>,
    removed: BTreeSet<String>,
    owed: bool,
    waiting: Vec<(&'s str, String)>,
}

type Wants<'s> = BTreeMap<Kind, Want<'s>>;

impl Stream {
    /// A stream of the proxy `node`, `<namespace>/<pod>`.
    pub fn new(node: &str, now: Instant) -> Self {
        Self {
            node: node.to_owned(),
            started: now,
            nonces: 0,
            subscriptions: BTreeMap::new(),
            waiting: BTreeMap::new(),
            unknown: Vec::new(),
            applied: None,
        }
    }

    /// Takes a request. An error ends the stream.
    pub fn request(&mut self, request: &DeltaDiscoveryRequest) -> Result<(), Fault> {
        let names =
            || request.resource_names_subscribe.iter().chain(request.initial_resource_versions.keys());
        if let Some(name) = names().find(|name| name.len() > MAX_NAME) {
            let start: String = name.chars().take(40).collect();
            return Err(Fault::Malformed(format!(
                "the name {start:?}… has {} bytes; no resource has more than {MAX_NAME}",
                name.len()
            )));
        }
        let Some(kind) = Kind::from_type_url(&request.type_url) else {
            self.answer_unknown(request);
            return Ok(());
        };
        if Kind::OF_POD.contains(&kind) {
            let others = |name: &&String| **name != self.node && *name != WILDCARD;
            if let Some(name) = request.resource_names_subscribe.iter().find(others) {
                return Err(Fault::Forbidden(format!(
                    "{} may see what is its own pod's only, not {name}; check the node id of the proxy",
                    self.node
                )));
            }
        }
        let subscription = self.subscriptions.entry(kind).or_default();
        subscription.request(request);
        if subscription.len() + request.initial_resource_versions.len() > MAX_NAMES {
            return Err(Fault::Malformed(format!(
                "more than {MAX_NAMES} names of {kind:?} are subscribed; subscribe to what the pod talks to"
            )));
        }
        Ok(())
    }

    /// Nothing of an unknown type exists, and the client is told so for each name: an error status would end the
    /// stream and with it the types that are fine, and silence would leave the client waiting.
    fn answer_unknown(&mut self, request: &DeltaDiscoveryRequest) {
        if request.resource_names_subscribe.is_empty() {
            return;
        }
        let nonce = self.nonce();
        self.unknown.push(DeltaDiscoveryResponse {
            type_url: request.type_url.clone(),
            nonce,
            removed_resources: request.resource_names_subscribe.clone(),
            ..DeltaDiscoveryResponse::default()
        });
    }

    fn nonce(&mut self) -> String {
        self.nonces += 1;
        self.nonces.to_string()
    }

    /// The responses that are due. What is returned counts as sent.
    pub fn responses(&mut self, published: &Published, now: Instant) -> Vec<DeltaDiscoveryResponse> {
        let snapshot = &*published.snapshot;
        let wants: Wants<'_> = self
            .subscriptions
            .iter_mut()
            .map(|(kind, subscription)| {
                let want = subscription.want(*kind, &self.node, snapshot);
                subscription.adopt(&want);
                (*kind, want)
            })
            .collect();
        let mut responses = std::mem::take(&mut self.unknown);
        for kind in Kind::PUSH_ORDER {
            let Some(want) = wants.get(&kind) else { continue };
            let plan = self.plan(kind, want, &wants, published.sequence);
            for (name, version) in &plan.waiting {
                if self.waiting.get(*name).is_none_or(|(known, _)| known != version) {
                    self.waiting.insert((*name).to_owned(), (version.clone(), published.sequence));
                }
            }
            if plan.send.is_empty() && plan.removed.is_empty() && !plan.owed {
                continue;
            }
            let nonce = self.nonce();
            if kind == Kind::Weights {
                self.waiting.retain(|name, _| !plan.send.contains(&name.as_str()));
            }
            let commit = Commit {
                nonce: &nonce,
                send: &plan.send,
                removed: &plan.removed,
                sequence: published.sequence,
                now,
            };
            if let Some(subscription) = self.subscriptions.get_mut(&kind) {
                subscription.commit(commit, want);
            }
            responses.push(DeltaDiscoveryResponse {
                system_version_info: snapshot.version.clone(),
                resources: plan.send.iter().filter_map(|name| resource(name, want)).collect(),
                type_url: kind.type_url().to_owned(),
                nonce,
                removed_resources: plan.removed.into_iter().collect(),
            });
        }
        if self.applied_all(&wants) && self.applied.is_none_or(|(sequence, _)| sequence < published.sequence)
        {
            let since = published.at.max(self.started);
            self.applied = Some((published.sequence, now.saturating_duration_since(since)));
        }
        responses
    }

    /// Decides what of one type goes out now.
    fn plan<'s>(&self, kind: Kind, want: &Want<'s>, wants: &Wants<'s>, sequence: u64) -> Plan<'s> {
        let mut plan = Plan::default();
        let Some(subscription) = self.subscriptions.get(&kind) else { return plan };
        if !subscription.open() {
            return plan;
        }
        let mut bytes = 0;
        for (name, wanted) in &want.resources {
            if !subscription.differs(name, wanted) {
                continue;
            }
            if !self.may_send(kind, name, wanted.entry, wants, sequence) {
                plan.waiting.push((name, wanted.entry.version.clone()));
                continue;
            }
            bytes += wanted.entry.any.value.len() + name.len();
            if bytes > MAX_RESPONSE && !plan.send.is_empty() {
                break;
            }
            plan.send.push(name);
        }
        let removing = referrers(kind).iter().all(|referrer| {
            match (self.subscriptions.get(referrer), wants.get(referrer)) {
                (Some(subscription), Some(want)) => subscription.applied(want),
                _ => true,
            }
        });
        if removing {
            plan.removed.extend(subscription.gone(want).map(str::to_owned));
        }
        plan.removed.extend(subscription.absent(want, removing).map(|name| name.as_ref().to_owned()));
        plan.owed = subscription.owed();
        plan
    }

    /// Whether what `entry` refers to has arrived, so that traffic can follow it.
    fn may_send(&self, kind: Kind, name: &str, entry: &Entry, wants: &Wants<'_>, sequence: u64) -> bool {
        let acked = self.subscriptions.get(&kind).and_then(|subscription| subscription.acked(name));
        match kind {
            // Sent again because it was asked for: the client knows it already.
            _ if acked == Some(&entry.version) => true,
            Kind::Weights => {
                let Ok(weights) = v1::Weights::decode(&*entry.any.value) else { return true };
                let since = match self.waiting.get(name) {
                    Some((version, since)) if *version == entry.version => *since,
                    _ => sequence,
                };
                weights.backends.iter().all(|backend| {
                    [Kind::Service, Kind::Endpoints]
                        .into_iter()
                        .all(|kind| self.arrived(kind, &backend.service, wants, since))
                })
            }
            // Routes that the client does not have yet complete its picture of a service; only a change to
            // routes in use could lead traffic to weights that are still on their way.
            Kind::Routes if acked.is_some() => {
                let Ok(routes) = v1::Routes::decode(&*entry.any.value) else { return true };
                routes.rules.iter().filter(|rule| !rule.weights.is_empty()).all(|rule| {
                    let wanted =
                        wants.get(&Kind::Weights).is_some_and(|w| w.resources.contains_key(&*rule.weights));
                    let weights = self.subscriptions.get(&Kind::Weights);
                    !wanted || weights.is_some_and(|weights| weights.acked(&rule.weights).is_some())
                })
            }
            _ => true,
        }
    }

    /// Whether the client acknowledged `name` as it was in the snapshot `since`, or as it is now. A resource that
    /// changes faster than it is acknowledged must not hold up what refers to it for ever, so any version that
    /// was current at `since` or later will do; and so will an older one if the client refuses the newest.
    fn arrived(&self, kind: Kind, name: &str, wants: &Wants<'_>, since: u64) -> bool {
        let Some(wanted) = wants.get(&kind).and_then(|want| want.resources.get(name)) else { return true };
        let Some(holding) = self.subscriptions.get(&kind).and_then(|s| s.holdings.get(name)) else {
            return false;
        };
        let Some(acked) = &holding.acked else { return false };
        let refused = holding.refused.as_ref().is_some_and(|r| r.version == wanted.entry.version);
        acked.version == wanted.entry.version || acked.sequence >= since || refused
    }

    fn applied_all(&self, wants: &Wants<'_>) -> bool {
        !wants.is_empty()
            && wants.iter().all(|(kind, want)| {
                self.subscriptions.get(kind).is_some_and(|subscription| subscription.applied(want))
            })
    }

    /// Since when the oldest response waits for its acknowledgement.
    pub fn waiting_since(&self) -> Option<Instant> {
        self.subscriptions.values().filter_map(Subscription::waiting_since).min()
    }

    /// Whether the client has acknowledged everything that it subscribes to, as it is in `snapshot`. False before
    /// its first subscription.
    pub fn applied(&self, snapshot: &Snapshot) -> bool {
        !self.subscriptions.is_empty()
            && self.subscriptions.iter().all(|(kind, subscription)| {
                subscription.applied(&subscription.want(*kind, &self.node, snapshot))
            })
    }

    /// How long the client took to apply the snapshot of that sequence, once it has.
    pub fn applied_after(&self, sequence: u64) -> Option<Duration> {
        self.applied.filter(|(applied, _)| *applied == sequence).map(|(_, after)| after)
    }

    /// The resources that the client acknowledged.
    pub fn resources(&self) -> usize {
        self.subscriptions.values().map(|s| s.holdings.values().filter(|h| h.acked.is_some()).count()).sum()
    }

    /// What the client refused and has not been sent anew.
    pub fn refused(&self) -> Vec<Refused> {
        let mut all = Vec::new();
        for (kind, subscription) in &self.subscriptions {
            for refused in subscription.holdings.values().filter_map(|holding| holding.refused.as_ref()) {
                all.push(Refused { kind: format!("{kind:?}"), reason: refused.reason.clone() });
            }
        }
        all
    }

    /// Why the client refused that version of a resource, if it did.
    pub fn refused_version(&self, kind: Kind, name: &str, version: &str) -> Option<&str> {
        let refused = self.subscriptions.get(&kind)?.holdings.get(name)?.refused.as_ref()?;
        (refused.version == version).then_some(refused.reason.as_str())
    }

    /// The version of a resource that the client acknowledged last.
    pub fn acknowledged(&self, kind: Kind, name: &str) -> Option<&str> {
        self.subscriptions.get(&kind)?.acked(name).map(String::as_str)
    }

    /// The resources of a kind that the client wants of `snapshot`, each with whether it has acknowledged it.
    pub fn held<'s>(&self, kind: Kind, snapshot: &'s Snapshot) -> Vec<(&'s str, bool)> {
        let Some(subscription) = self.subscriptions.get(&kind) else { return Vec::new() };
        let want = subscription.want(kind, &self.node, snapshot);
        want.resources
            .iter()
            .map(|(name, wanted)| (*name, subscription.acked(name) == Some(&wanted.entry.version)))
            .collect()
    }
}

/// What may refer to a resource of the kind: it is removed only after these have been applied.
fn referrers(kind: Kind) -> &'static [Kind] {
    match kind {
        Kind::Service => &[Kind::Address, Kind::Routes, Kind::Weights],
        Kind::Endpoints => &[Kind::Routes, Kind::Weights],
        Kind::Weights => &[Kind::Routes],
        Kind::TrustBundle | Kind::Access | Kind::Workload | Kind::Address | Kind::Routes => &[],
    }
}

fn resource(name: &str, want: &Want<'_>) -> Option<Resource> {
    let wanted = want.resources.get(name)?;
    let aliases = wanted.through.iter().filter(|through| ***through != *name && &***through != WILDCARD);
    Some(Resource {
        version: wanted.entry.version.clone(),
        resource: Some(wanted.entry.any.clone()),
        name: name.to_owned(),
        aliases: aliases.map(|alias| alias.as_ref().to_owned()).collect(),
    })
}
