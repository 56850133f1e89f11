//! What replicas of control tell each other: how far objects have come with the proxies of each.
//!
//! A proxy is connected to one replica, and one replica writes statuses, so it asks the others. Each answers with all objects at once and a hash
//! of what it has in force of each: an answer that is about another version of an object is none. A replica whose pod runs and that does
//! not answer has not been heard: nobody then says that everybody has something. Can go wrong: a replica is starting, ending, or cut off.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use penstock_api::SpiffeId;
use penstock_api::v1::replicas_client::ReplicasClient;
use penstock_api::v1::replicas_server::Replicas;
use penstock_api::v1::{ReachReply, ReachRequest, Reached, SeenReply, SeenRequest};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use super::{Place, peers};
use crate::conditions::Reach;
use crate::fleet::{Fleet, Tally};
use crate::identity::{Authority, epoch, replica};
use crate::objects::{ObjectId, ObjectSet};
use crate::push::{Published, caller};

/// A replica that has not answered by then is asked again at the next look.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// An object is some hundred bytes of an answer, and a hundred thousand of them no mesh.
const MAX_REPLY: usize = 16 << 20;
/// Of one question.
const MAX_WINDOWS: usize = 16;

/// Answers other replicas.
#[derive(Clone, Debug)]
pub struct ReplicasService {
    published: watch::Receiver<Published>,
    fleet: Arc<Fleet>,
    own: SpiffeId,
}

impl ReplicasService {
    /// Tells of the proxies in `fleet` to whoever proves to be `own`.
    pub fn new(published: watch::Receiver<Published>, fleet: Arc<Fleet>, own: SpiffeId) -> Self {
        Self { published, fleet, own }
    }

    fn permits<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let caller = caller::identity(request.extensions())?;
        match caller == self.own {
            true => Ok(()),
            false => {
                Err(Status::permission_denied(format!("this is told to control alone, not to {caller}")))
            }
        }
    }
}

#[tonic::async_trait]
impl Replicas for ReplicasService {
    async fn reach(&self, request: Request<ReachRequest>) -> Result<Response<ReachReply>, Status> {
        self.permits(&request)?;
        let snapshot = self.published.borrow().snapshot.clone();
        let mut tallies = self.fleet.tally(&snapshot);
        let of = snapshot.outcomes.iter().filter(|(id, _)| id.kind.has_status());
        let rows = of.map(|(id, outcome)| {
            let tally = tallies.remove(id).unwrap_or_default();
            Reached {
                kind: format!("{:?}", id.kind),
                namespace: id.namespace.clone(),
                name: id.name.clone(),
                version: snapshot.digest(outcome),
                concerned: tally.concerned as u64,
                applied: tally.applied as u64,
                refused: tally.refused.unwrap_or_default(),
            }
        });
        Ok(Response::new(ReachReply { rows: rows.collect() }))
    }

    async fn seen(&self, request: Request<SeenRequest>) -> Result<Response<SeenReply>, Status> {
        self.permits(&request)?;
        let SeenRequest { services, windows_ms } = request.into_inner();
        let now = Instant::now();
        let of = |ms: &u64| self.fleet.seen(&services, Duration::from_millis(*ms), now).wire(&services);
        Ok(Response::new(SeenReply { windows: windows_ms.iter().take(MAX_WINDOWS).map(of).collect() }))
    }
}

/// What one replica said; `None`: it has not answered.
pub(super) type Answer = Option<HashMap<(String, String, String), Reached>>;

/// The other replicas.
pub(super) struct Others {
    place: Place,
    objects: watch::Receiver<Arc<ObjectSet>>,
    authority: Arc<Authority>,
    own: SpiffeId,
    port: u16,
    patience: Duration,
    /// By address, as long as they answer.
    channels: BTreeMap<SocketAddr, Channel>,
}

impl std::fmt::Debug for Others {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Others").field("place", &self.place).finish_non_exhaustive()
    }
}

impl Others {
    pub(super) fn new(
        place: Place,
        objects: watch::Receiver<Arc<ObjectSet>>,
        authority: Arc<Authority>,
        own: SpiffeId,
        port: u16,
        patience: Duration,
    ) -> Self {
        Self { place, objects, authority, own, port, patience, channels: BTreeMap::new() }
    }

    /// Asks all of them at once.
    pub(super) async fn ask(&mut self) -> Vec<Answer> {
        let objects = self.objects.borrow().clone();
        let others = addresses(&objects, &self.place, self.port);
        let asked = others.iter().map(|address| async {
            let Some(address) = address else { return (None, None) };
            let known = self.channels.get(address).cloned();
            match timeout(self.patience, self.one(*address, known)).await {
                Ok(Ok((channel, reply))) => (Some((*address, channel)), Some(reply)),
                Ok(Err(error)) => {
                    tracing::debug!(%address, "a replica does not say what its proxies have: {error:#}");
                    (None, None)
                }
                Err(_) => (None, None),
            }
        });
        let (channels, answers): (Vec<_>, Vec<_>) =
            futures_util::future::join_all(asked).await.into_iter().unzip();
        self.channels = channels.into_iter().flatten().collect();
        answers.into_iter().map(|reply| reply.map(by_object)).collect()
    }

    /// Asks those that have answered lately what their proxies saw.
    pub(super) async fn seen(&self, request: SeenRequest) -> Vec<SeenReply> {
        let asked = self.channels.values().map(|channel| {
            let mut client = ReplicasClient::new(channel.clone()).max_decoding_message_size(MAX_REPLY);
            let request = request.clone();
            async move { timeout(self.patience, client.seen(request)).await.ok()?.ok() }
        });
        let answers = futures_util::future::join_all(asked).await;
        answers.into_iter().flatten().map(Response::into_inner).collect()
    }

    async fn one(&self, address: SocketAddr, known: Option<Channel>) -> Result<(Channel, ReachReply)> {
        let channel = match known {
            Some(channel) => channel,
            None => self.connect(address).await?,
        };
        let mut client = ReplicasClient::new(channel.clone()).max_decoding_message_size(MAX_REPLY);
        Ok((channel, client.reach(ReachRequest {}).await?.into_inner()))
    }

    async fn connect(&self, address: SocketAddr) -> Result<Channel> {
        let trust = self.authority.trust().borrow().clone();
        let (lifetime, now) = (self.authority.leaf_lifetime(), epoch(SystemTime::now()));
        let stream = replica::connect(address, &trust, &self.own, lifetime, now).await?;
        // The connector hands out the one connection there is; asked again, it says so, and another is made at the next look.
        let mut stream = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_| {
            let gone = || std::io::Error::from(std::io::ErrorKind::NotConnected);
            std::future::ready(stream.take().ok_or_else(gone))
        });
        let endpoint = Endpoint::from_static("http://penstock-control");
        endpoint.connect_with_connector(connector).await.context("it does not speak gRPC")
    }
}

/// Where the other replicas are; `None`: one that has no address yet.
fn addresses(objects: &ObjectSet, place: &Place, port: u16) -> Vec<Option<SocketAddr>> {
    let others = peers::pods(objects, &place.namespace).filter(|(name, _)| *name != place.replica);
    others
        .map(|(_, pod)| {
            let ip = pod.status.as_ref()?.pod_ip.as_ref()?.parse().ok()?;
            Some(SocketAddr::new(ip, port))
        })
        .collect()
}

fn by_object(reply: ReachReply) -> HashMap<(String, String, String), Reached> {
    let key = |row: &Reached| (row.kind.clone(), row.namespace.clone(), row.name.clone());
    reply.rows.into_iter().map(|row| (key(&row), row)).collect()
}

/// How far an object has come with the proxies of all replicas, of which `own` are this one's. Pure.
pub(super) fn joined(id: &ObjectId, own: Tally, version: &str, others: &[Answer]) -> Reach {
    let key = (format!("{:?}", id.kind), id.namespace.clone(), id.name.clone());
    let mut reach = Reach { tally: own, unheard: 0 };
    for answer in others {
        match answer.as_ref().and_then(|rows| rows.get(&key)).filter(|row| row.version == version) {
            Some(row) => {
                reach.tally.concerned += usize::try_from(row.concerned).unwrap_or_default();
                reach.tally.applied += usize::try_from(row.applied).unwrap_or_default();
                if reach.tally.refused.is_none() && !row.refused.is_empty() {
                    reach.tally.refused = Some(row.refused.clone());
                }
            }
            None => reach.unheard += 1,
        }
    }
    reach
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::ObjectKind;

    #[test]
    fn an_answer_about_another_version_is_none_and_whoever_does_not_answer_is_not_heard() {
        let id = ObjectId { kind: ObjectKind::HTTPRoute, namespace: "a".into(), name: "r".into() };
        let answer = |version: &str, applied, refused: &str| {
            let row = Reached {
                kind: "HTTPRoute".into(),
                namespace: "a".into(),
                name: "r".into(),
                version: version.into(),
                concerned: 3,
                applied,
                refused: refused.into(),
            };
            Some(by_object(ReachReply { rows: vec![row] }))
        };
        let nothing = Some(by_object(ReachReply::default()));
        let table = [
            (vec![], (2, 2, None, 0)),
            (vec![answer("now", 3, "")], (5, 5, None, 0)),
            (vec![answer("now", 1, "a/b refused it")], (5, 3, Some("a/b refused it"), 0)),
            (vec![answer("before", 3, "")], (2, 2, None, 1)),
            (vec![nothing, None, answer("now", 3, "")], (5, 5, None, 2)),
        ];
        for (others, expected) in table {
            let own = Tally { concerned: 2, applied: 2, refused: None };
            let Reach { tally, unheard } = joined(&id, own, "now", &others);
            assert_eq!((tally.concerned, tally.applied, tally.refused.as_deref(), unheard), expected);
        }
    }
}
