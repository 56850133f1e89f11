//! What one client has asked for of one type, what it was sent, and what it acknowledged.
//!
//! In: its requests, and what is committed to be sent. Out: what differs between what it wants and what it was
//! sent. Nothing here knows of other types: what has to wait for what is decided in [`super::stream`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use penstock_api::discovery::DeltaDiscoveryRequest;
use penstock_api::resource::Kind;
use tokio::time::Instant;

use super::refusal;
use crate::snapshot::{Entry, Snapshot};

/// Every resource of the type.
pub(super) const WILDCARD: &str = "*";

/// Responses of one type that may be unacknowledged at once. Content waits for the acknowledgement of what went
/// before it, and merges meanwhile; only answers to new subscriptions may overtake, so that the first request to
/// a service never waits for another service's acknowledgement.
const WINDOW: usize = 8;

/// One resource, as far as this client knows it.
#[derive(Debug, Default)]
pub(super) struct Holding {
    /// The subscribed names that lead to it; `None` until it is known (the client brought it from an earlier stream).
    pub(super) through: Option<Vec<Arc<str>>>,
    /// The version last sent; `None` when the client has to be sent it again.
    pub(super) sent: Option<String>,
    /// The client was told that it is gone, and has not acknowledged that yet.
    pub(super) leaving: bool,
    /// What the client acknowledged last, and in which snapshot that was current.
    pub(super) acked: Option<Acked>,
    /// The version that it refused last.
    pub(super) refused: Option<Refused>,
}

/// A version that the client acknowledged.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Acked {
    pub(super) version: String,
    pub(super) sequence: u64,
}

/// A version that the client refused.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Refused {
    pub(super) version: String,
    pub(super) reason: String,
}

/// A response that is not acknowledged yet.
#[derive(Debug)]
struct InFlight {
    nonce: String,
    resources: Vec<(String, String)>,
    removed: Vec<String>,
    sequence: u64,
    at: Instant,
}

/// A resource that the client wants, and the names it wants it by.
#[derive(Debug)]
pub(super) struct Wanted<'s> {
    pub(super) entry: &'s Entry,
    pub(super) through: Vec<Arc<str>>,
}

/// Everything of one type that the client wants of one snapshot.
#[derive(Debug, Default)]
pub(super) struct Want<'s> {
    pub(super) resources: BTreeMap<&'s str, Wanted<'s>>,
    /// Subscribed names under which there is nothing.
    pub(super) empty: Vec<Arc<str>>,
}

/// One type's part of a stream.
#[derive(Debug, Default)]
pub(super) struct Subscription {
    seen: bool,
    /// The client never named anything: the old way to say [`WILDCARD`].
    legacy: bool,
    names: BTreeSet<Arc<str>>,
    pub(super) holdings: BTreeMap<String, Holding>,
    in_flight: VecDeque<InFlight>,
    /// A subscription waits for its answer.
    urgent: bool,
    /// A wildcard subscription is owed a response even when there is nothing to say.
    owed: bool,
    /// Names that the client was told nothing exists under.
    absent: BTreeSet<Arc<str>>,
    /// Names that were unsubscribed beside a wildcard: the client cannot know whether it keeps them, so it is told.
    reanswer: BTreeSet<Arc<str>>,
}

impl Subscription {
    /// Takes a request: its acknowledgement first, then its changes, which count even when the nonce is stale.
    pub(super) fn request(&mut self, request: &DeltaDiscoveryRequest) {
        let first = !std::mem::replace(&mut self.seen, true);
        if !request.response_nonce.is_empty() {
            let refused = request.error_detail.as_ref().map(|status| status.message.as_str());
            self.acknowledge(&request.response_nonce, refused);
        }
        if first {
            for (name, version) in &request.initial_resource_versions {
                let acked = Some(Acked { version: version.clone(), sequence: 0 });
                let holding = Holding { sent: Some(version.clone()), acked, ..Holding::default() };
                self.holdings.insert(name.clone(), holding);
            }
            if request.resource_names_subscribe.is_empty() && request.resource_names_unsubscribe.is_empty() {
                self.legacy = true;
                self.names.insert(WILDCARD.into());
                self.urgent = true;
                self.owed = request.initial_resource_versions.is_empty();
            }
        }
        for name in &request.resource_names_subscribe {
            self.subscribe(name, first);
        }
        for name in &request.resource_names_unsubscribe {
            self.unsubscribe(name);
        }
    }

    fn subscribe(&mut self, name: &str, first: bool) {
        if std::mem::take(&mut self.legacy) {
            self.names.remove(WILDCARD);
            self.release(WILDCARD);
            self.owed = false;
        }
        self.urgent = true;
        self.absent.remove(name);
        self.reanswer.remove(name);
        self.owed |= name == WILDCARD && self.holdings.is_empty();
        let known = !self.names.insert(name.into());
        // The client may have forgotten what it names again, so everything under the name goes out once more.
        // On a first request nothing was sent on this stream, and what the client lists it has not forgotten.
        if known || !first {
            for (resource, holding) in &mut self.holdings {
                let under = match &holding.through {
                    Some(through) => through.iter().any(|other| **other == *name),
                    None => resource == name || name == WILDCARD,
                };
                if under {
                    holding.sent = None;
                }
            }
        }
    }

    fn unsubscribe(&mut self, name: &str) {
        if !self.names.remove(name) {
            return;
        }
        self.absent.remove(name);
        if name == WILDCARD {
            self.owed = false;
        } else if self.names.contains(WILDCARD) {
            self.reanswer.insert(name.into());
            self.urgent = true;
        }
        self.release(name);
    }

    /// Forgets what the client drops by itself when it unsubscribes from `name`.
    fn release(&mut self, name: &str) {
        self.holdings.retain(|_, holding| match &mut holding.through {
            None => true,
            Some(through) => {
                through.retain(|other| **other != *name);
                !through.is_empty()
            }
        });
    }

    fn acknowledge(&mut self, nonce: &str, refused: Option<&str>) {
        let Some(position) = self.in_flight.iter().position(|response| response.nonce == nonce) else {
            return;
        };
        let Some(response) = self.in_flight.remove(position) else { return };
        let names: Vec<&str> = response.resources.iter().map(|(name, _)| name.as_str()).collect();
        let bad = refused.map(|reason| refusal::refused_of(&names, reason)).unwrap_or_default();
        for (name, version) in &response.resources {
            let Some(holding) = self.holdings.get_mut(name) else { continue };
            match (bad.contains(name.as_str()), refused) {
                (true, Some(reason)) => {
                    holding.refused = Some(Refused {
                        version: version.clone(),
                        reason: refusal::reason_for(name, &names, reason),
                    });
                }
                _ => {
                    holding.acked = Some(Acked { version: version.clone(), sequence: response.sequence });
                    holding.refused = None;
                }
            }
        }
        // A removal cannot be refused: the client has nothing to check it against.
        for name in &response.removed {
            if let Some(holding) = self.holdings.get_mut(name) {
                if holding.leaving {
                    self.holdings.remove(name);
                } else {
                    holding.acked = None;
                }
            }
        }
    }

    /// What the client wants of `snapshot`.
    pub(super) fn want<'s>(&self, kind: Kind, node: &str, snapshot: &'s Snapshot) -> Want<'s> {
        let mut want = Want::default();
        let namespace = node.split_once('/').map_or("", |(namespace, _)| namespace);
        for name in &self.names {
            let found = match (&**name, kind) {
                // A proxy sees what is its own pod's only, whatever it asks for.
                (WILDCARD, Kind::Access | Kind::Workload) => snapshot.expand(kind, node),
                (WILDCARD, _) => snapshot.all_seen(namespace, kind),
                _ => snapshot.seen(namespace, kind, name),
            };
            if found.is_empty() && &**name != WILDCARD {
                want.empty.push(name.clone());
            }
            for (resource, entry) in found {
                let wanted = want
                    .resources
                    .entry(resource)
                    .or_insert_with(|| Wanted { entry, through: Vec::with_capacity(1) });
                wanted.through.push(name.clone());
            }
        }
        want
    }

    /// Learns why the client wants what it brought along from an earlier stream.
    pub(super) fn adopt(&mut self, want: &Want<'_>) {
        for (name, holding) in self.holdings.iter_mut().filter(|(_, holding)| holding.through.is_none()) {
            if let Some(wanted) = want.resources.get(name.as_str()) {
                holding.through = Some(wanted.through.clone());
            }
        }
    }

    /// Whether the client has to be sent `name`.
    pub(super) fn differs(&self, name: &str, wanted: &Wanted<'_>) -> bool {
        if self.reanswer.contains(name) {
            return true;
        }
        let Some(holding) = self.holdings.get(name) else { return true };
        let new_alias = |through: &Vec<Arc<str>>| wanted.through.iter().any(|name| !through.contains(name));
        holding.sent.as_ref() != Some(&wanted.entry.version)
            || holding.through.as_ref().is_some_and(new_alias)
    }

    /// What the client holds and no longer wants.
    pub(super) fn gone<'a>(&'a self, want: &'a Want<'_>) -> impl Iterator<Item = &'a str> {
        self.holdings
            .iter()
            .filter(|(name, holding)| !holding.leaving && !want.resources.contains_key(name.as_str()))
            .map(|(name, _)| name.as_str())
    }

    /// Names under which there is nothing and of which the client has not been told; `removing` says whether what
    /// it still holds under them goes now.
    pub(super) fn absent<'a>(
        &'a self,
        want: &'a Want<'_>,
        removing: bool,
    ) -> impl Iterator<Item = &'a Arc<str>> {
        let holds = |name: &Arc<str>| {
            self.holdings
                .values()
                .any(|holding| !holding.leaving && holding.through.as_ref().is_some_and(|t| t.contains(name)))
        };
        let unknown = want.empty.iter().filter(move |name| {
            !self.absent.contains(&**name)
                && (removing || !(holds(name) || self.holdings.contains_key(&***name)))
        });
        let unsubscribed =
            self.reanswer.iter().filter(|name| !want.resources.contains_key::<str>(name.as_ref()));
        unknown.chain(unsubscribed)
    }

    /// Whether a response may go out now.
    pub(super) fn open(&self) -> bool {
        self.in_flight.is_empty() || (self.urgent && self.in_flight.len() < WINDOW)
    }

    /// Whether a response is due although it says nothing.
    pub(super) fn owed(&self) -> bool {
        self.owed
    }

    /// Records a response as sent.
    pub(super) fn commit(&mut self, commit: Commit<'_, '_>, want: &Want<'_>) {
        let Commit { nonce, send, removed, sequence, now } = commit;
        let mut resources = Vec::with_capacity(send.len());
        for name in send {
            let Some(wanted) = want.resources.get(name) else { continue };
            let holding = self.holdings.entry((*name).to_owned()).or_default();
            holding.sent = Some(wanted.entry.version.clone());
            holding.leaving = false;
            holding.through = Some(wanted.through.clone());
            holding.refused = None;
            resources.push(((*name).to_owned(), wanted.entry.version.clone()));
        }
        for name in removed {
            if let Some(holding) = self.holdings.get_mut(name.as_str()) {
                holding.sent = None;
                holding.leaving = true;
                holding.refused = None;
            }
        }
        for name in &want.empty {
            if removed.contains(&**name) {
                self.absent.insert(name.clone());
            }
        }
        self.absent.retain(|name| want.empty.contains(name));
        self.reanswer.clear();
        self.urgent = false;
        self.owed = false;
        let removed = removed.iter().cloned().collect();
        self.in_flight.push_back(InFlight { nonce: nonce.to_owned(), resources, removed, sequence, at: now });
    }

    /// Whether the client has acknowledged everything that it wants, and dropped the rest.
    pub(super) fn applied(&self, want: &Want<'_>) -> bool {
        self.in_flight.is_empty()
            && self.holdings.keys().all(|name| want.resources.contains_key(name.as_str()))
            && want.resources.iter().all(|(name, wanted)| self.acked(name) == Some(&wanted.entry.version))
    }

    /// The version of `name` that the client acknowledged last.
    pub(super) fn acked(&self, name: &str) -> Option<&String> {
        self.holdings.get(name)?.acked.as_ref().map(|acked| &acked.version)
    }

    /// Since when the oldest response waits for its acknowledgement.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.in_flight.front().map(|response| response.at)
    }

    /// How many names are subscribed.
    pub(super) fn len(&self) -> usize {
        self.names.len()
    }
}

/// A response about to be sent.
#[derive(Debug)]
pub(super) struct Commit<'a, 's> {
    pub(super) nonce: &'a str,
    pub(super) send: &'a [&'s str],
    pub(super) removed: &'a BTreeSet<String>,
    pub(super) sequence: u64,
    pub(super) now: Instant,
}
