//! The delta xDS client as a pure state machine.
//!
//! In: what the data path demands, and control's responses. Out: requests to send, and changes to apply. Nothing here
//! knows of sockets or time, so every rule of the protocol is a test below.
//!
//! The machine remembers, for each kind, the names that are subscribed and the version of each resource that was
//! *applied*. A refused resource is never remembered as held: control would not send it again. What was held before
//! a refusal stays held, because it stays in force.

use std::collections::{BTreeMap, BTreeSet};

use penstock_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status};
use penstock_api::resource::{Kind, Payload};

use crate::config::store::{Change, Demand, Refusal};

/// `google.rpc.Code.INVALID_ARGUMENT`: what a refusal says of the response.
const INVALID_ARGUMENT: i32 = 3;

/// A resource that is in force.
#[derive(Debug)]
struct Held {
    version: String,
    /// The subscribed names that lead to it. When the last is unsubscribed, both sides forget the resource.
    through: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Subscription {
    names: BTreeSet<String>,
    held: BTreeMap<String, Held>,
    /// Control has answered, and the answer was applied.
    answered: bool,
}

impl Subscription {
    fn forget(&mut self, name: &str) {
        self.held.retain(|_, held| {
            held.through.remove(name);
            !held.through.is_empty()
        });
    }
}

/// The state of one client, across streams.
#[derive(Debug)]
pub struct State {
    node: Node,
    /// The stream has seen its first request, which alone carries the node.
    greeted: bool,
    subscriptions: BTreeMap<Kind, Subscription>,
}

/// A response on its way into force. [`State::applied`] finishes it.
#[derive(Debug)]
pub struct Incoming {
    kind: Kind,
    nonce: String,
    /// Versions and names of what is about to be held.
    arriving: Vec<(String, Held)>,
    removed: Vec<String>,
    /// What could not even be decoded.
    undecodable: Vec<Refusal>,
}

/// What to do with a response.
#[derive(Debug)]
pub enum Received {
    /// Apply the changes, then tell [`State::applied`].
    Apply(Incoming, Vec<Change>),
    /// Send this refusal.
    Refuse(DeltaDiscoveryRequest),
}

impl State {
    /// A client that wants the anchors of the trust domain, its own workload and who may call it from the start.
    /// `node` is `<namespace>/<pod>`, `account` is `<namespace>/<service-account>`.
    pub fn new(node: &str, account: &str, trust_domain: &str) -> Self {
        let mut subscriptions = BTreeMap::new();
        for (kind, name) in [(Kind::TrustBundle, trust_domain), (Kind::Access, node), (Kind::Workload, node)]
        {
            let names = BTreeSet::from([name.to_owned()]);
            subscriptions.insert(kind, Subscription { names, ..Subscription::default() });
        }
        let node = Node { id: node.to_owned(), cluster: account.to_owned(), metadata: None };
        Self { node, greeted: false, subscriptions }
    }

    /// A new stream: subscribes to everything again, and says what is held so that only what differs is sent.
    pub fn connect(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.greeted = false;
        let requests: Vec<_> = self
            .subscriptions
            .iter()
            .filter(|(_, subscription)| !subscription.names.is_empty())
            .map(|(kind, subscription)| DeltaDiscoveryRequest {
                type_url: kind.type_url().to_owned(),
                resource_names_subscribe: subscription.names.iter().cloned().collect(),
                initial_resource_versions: subscription
                    .held
                    .iter()
                    .map(|(name, held)| (name.clone(), held.version.clone()))
                    .collect(),
                ..DeltaDiscoveryRequest::default()
            })
            .collect();
        requests.into_iter().map(|request| self.signed(request)).collect()
    }

    /// Takes demands in, in their order; returns at most one request a kind. While there is no stream the requests
    /// are of no use: [`connect`](Self::connect) says it all.
    pub fn demand(&mut self, demands: impl IntoIterator<Item = Demand>) -> Vec<DeltaDiscoveryRequest> {
        let mut requests: BTreeMap<Kind, (BTreeSet<String>, BTreeSet<String>)> = BTreeMap::new();
        for demand in demands {
            let (kinds, name, wanted): (&[Kind], _, _) = match demand {
                Demand::Service(name) => (&Kind::OF_SERVICE, name.to_string(), true),
                Demand::ForgetService(name) => (&Kind::OF_SERVICE, name.to_string(), false),
                Demand::Address(address) => (&[Kind::Address], address.to_string(), true),
                Demand::ForgetAddress(address) => (&[Kind::Address], address.to_string(), false),
            };
            for kind in kinds {
                let subscription = self.subscriptions.entry(*kind).or_default();
                let (subscribe, unsubscribe) = requests.entry(*kind).or_default();
                if wanted {
                    subscription.names.insert(name.clone());
                    unsubscribe.remove(&name);
                    subscribe.insert(name.clone());
                } else {
                    subscription.names.remove(&name);
                    subscription.forget(&name);
                    subscribe.remove(&name);
                    unsubscribe.insert(name.clone());
                }
            }
        }
        let requests = requests.into_iter().map(|(kind, (subscribe, unsubscribe))| DeltaDiscoveryRequest {
            type_url: kind.type_url().to_owned(),
            resource_names_subscribe: subscribe.into_iter().collect(),
            resource_names_unsubscribe: unsubscribe.into_iter().collect(),
            ..DeltaDiscoveryRequest::default()
        });
        requests.collect::<Vec<_>>().into_iter().map(|request| self.signed(request)).collect()
    }

    /// Reads a response. Every response is answered once: by the refusal here, or by [`applied`](Self::applied).
    pub fn receive(&mut self, response: DeltaDiscoveryResponse) -> Received {
        let Some(kind) = Kind::from_type_url(&response.type_url) else {
            let reason = format!(
                "this proxy knows no type {:?}; it knows {}",
                response.type_url,
                Kind::PUSH_ORDER.map(Kind::type_url).join(", ")
            );
            return Received::Refuse(self.signed(answer(&response.type_url, response.nonce, Some(reason))));
        };
        let subscription = self.subscriptions.entry(kind).or_default();
        let mut incoming = Incoming {
            kind,
            nonce: response.nonce,
            arriving: Vec::new(),
            removed: Vec::new(),
            undecodable: Vec::new(),
        };
        let mut changes = Vec::new();
        for resource in response.resources {
            let (name, version) = (resource.name, resource.version);
            let mut through: BTreeSet<_> =
                resource.aliases.into_iter().filter(|alias| subscription.names.contains(alias)).collect();
            if subscription.names.contains(&name) {
                through.insert(name.clone());
            }
            if through.is_empty() {
                // It crossed with our unsubscription; control knows by now that we do not hold it.
                tracing::debug!(?kind, name, "ignored a resource that nothing subscribes to");
                continue;
            }
            match decode(kind, resource.resource) {
                Ok(payload) => {
                    changes.push(Change { kind, name: name.clone(), payload: Some(payload) });
                    incoming.arriving.push((name, Held { version, through }));
                }
                Err(reason) => incoming.undecodable.push(Refusal { kind, name, reason }),
            }
        }
        // Removals are passed on even for what is not held here: a resource may serve a name that was subscribed since
        // it came, and to remove what is not there does no harm.
        for name in response.removed_resources {
            changes.push(Change { kind, name: name.clone(), payload: None });
            incoming.removed.push(name);
        }
        Received::Apply(incoming, changes)
    }

    /// The changes of a response are in force, but for the refused ones. Returns the acknowledgement, or the refusal
    /// that says what is wrong with which resource.
    pub fn applied(&mut self, incoming: Incoming, refusals: Vec<Refusal>) -> DeltaDiscoveryRequest {
        let Incoming { kind, nonce, arriving, removed, mut undecodable } = incoming;
        undecodable.extend(refusals);
        let refused: BTreeSet<&str> = undecodable.iter().map(|refusal| &*refusal.name).collect();
        let subscription = self.subscriptions.entry(kind).or_default();
        for (name, held) in arriving {
            if refused.contains(&*name) {
                // The version before stays in force, and may be wanted by more names now.
                if let Some(before) = subscription.held.get_mut(&name) {
                    before.through.extend(held.through);
                }
            } else {
                subscription.held.insert(name, held);
            }
        }
        for name in removed.iter().filter(|name| !refused.contains(&***name)) {
            subscription.held.remove(name);
        }
        subscription.answered |= undecodable.is_empty();
        let reason = (!undecodable.is_empty()).then(|| {
            let each = |Refusal { kind, name, reason }: &Refusal| format!("{kind:?} {name}: {reason}");
            undecodable.iter().map(each).collect::<Vec<_>>().join("; ")
        });
        self.signed(answer(kind.type_url(), nonce, reason))
    }

    /// Whether control has said, and we have applied, what a proxy cannot begin without.
    pub fn ready(&self) -> bool {
        [Kind::TrustBundle, Kind::Access, Kind::Workload]
            .iter()
            .all(|kind| self.subscriptions.get(kind).is_some_and(|subscription| subscription.answered))
    }

    /// How many resources of each kind are in force.
    pub fn held(&self) -> impl Iterator<Item = (Kind, usize)> + '_ {
        self.subscriptions.iter().map(|(kind, subscription)| (*kind, subscription.held.len()))
    }

    /// Puts the node on the first request of a stream.
    fn signed(&mut self, mut request: DeltaDiscoveryRequest) -> DeltaDiscoveryRequest {
        if !std::mem::replace(&mut self.greeted, true) {
            request.node = Some(self.node.clone());
        }
        request
    }
}

fn answer(type_url: &str, nonce: String, refusal: Option<String>) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: type_url.to_owned(),
        response_nonce: nonce,
        error_detail: refusal.map(|message| Status { code: INVALID_ARGUMENT, message, details: Vec::new() }),
        ..DeltaDiscoveryRequest::default()
    }
}

fn decode(kind: Kind, resource: Option<prost_types::Any>) -> Result<Payload, String> {
    let any = resource.ok_or("it has no content")?;
    if any.type_url != kind.type_url() {
        return Err(format!("its content is of type {:?}", any.type_url));
    }
    Payload::decode(kind, &any.value).map_err(|error| format!("its content cannot be decoded: {error}"))
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
