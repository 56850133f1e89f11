//! Control as a whole: the authority, the push, the fleet and the API, started and stopped together.
//!
//! In: options, and a function that turns trust anchors into snapshots. Out: two listening sockets, until told to
//! stop. Tests, benches and the binary all start control here.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use metrics_exporter_prometheus::PrometheusHandle;
use penstock_api::SpiffeId;
use penstock_api::discovery::aggregated_discovery_service_server::AggregatedDiscoveryServiceServer;
use penstock_api::names::SYSTEM_NAMESPACE;
use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_api::v1::fleet_server::FleetServer;
use penstock_api::v1::identity_server::IdentityServer;
use penstock_api::v1::replicas_server::ReplicasServer;
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::api;
use crate::canary::{self, Around, Local, Outside, Sight, To};
use crate::cluster::{Acknowledged, Cluster, Pushed, ReplicasService, State, Told};
use crate::compile::TrustAnchors;
use crate::fleet::{Fleet, FleetService};
use crate::identity::rotation::{Facts, Phase};
use crate::identity::state::StateDir;
use crate::identity::tls::{self, Serving};
use crate::identity::token::{TokenKey, TokenReview};
use crate::identity::{Authority, IdentityService, Trust, epoch};
use crate::push::{AdsService, Published, publish};
use crate::snapshot::Snapshot;

/// How often rotation, renewal and forgetting are looked at. Certificates of seconds, as in tests, need no less.
const TICK: Duration = Duration::from_millis(250);
/// Streams end at once when control stops; a connection that does not end with them is not waited for.
const GRACE: Duration = Duration::from_secs(5);
/// A restarted proxy states all it holds in its first request.
const MAX_REQUEST: usize = 16 << 20;
/// A CSR is a few hundred bytes.
const MAX_SIGN: usize = 64 << 10;

/// How control is started.
#[derive(Clone, Debug)]
pub struct Options {
    /// The state directory.
    pub state: PathBuf,
    /// Where proxies connect.
    pub listen: SocketAddr,
    /// Where the command line and Prometheus connect.
    pub api: SocketAddr,
    /// The trust domain.
    pub trust_domain: String,
    /// How long workload certificates live at most.
    pub leaf_lifetime: Duration,
    /// Who says whom a bearer token speaks for; `None`: the key of the state directory, with which `penstock-control token` signs.
    pub review: Option<Arc<dyn TokenReview>>,
    /// The cluster that has the root, in a Secret; `None`: it lies in the state directory.
    pub cluster: Option<Cluster>,
    /// What is known of canaries where no cluster has it.
    pub canaries: Option<Local>,
    /// Whom the checks of canaries may ask; nobody named: all but those that are never asked.
    pub analysis_to: Vec<To>,
}

/// A control that is running.
#[derive(Debug)]
pub struct Control {
    /// Where proxies connect.
    pub address: SocketAddr,
    /// Where the API is.
    pub api: SocketAddr,
    /// Signs certificates.
    pub authority: Arc<Authority>,
    /// The proxies.
    pub fleet: Arc<Fleet>,
    /// What is told of the cluster, if there is one.
    pub told: Option<Told>,
    tasks: JoinSet<Result<()>>,
    stop: CancellationToken,
}

impl Control {
    /// Has another part run with it: all end together.
    pub fn with(&mut self, part: impl Future<Output = Result<()>> + Send + 'static) {
        self.tasks.spawn(part);
    }

    /// Runs until it is stopped or a part of it fails, then ends the streams.
    pub async fn finished(mut self) -> Result<()> {
        let first = match self.tasks.join_next().await {
            Some(ended) => ended.context("a part of control ended unexpectedly")?,
            None => Ok(()),
        };
        self.stop.cancel();
        let rest = async { while self.tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, rest).await.is_err() {
            tracing::warn!("connections are still open {GRACE:?} after the streams ended; leaving anyway");
        }
        first
    }
}

/// Starts control. `snapshots` is given the trust anchors in force and answers the snapshots to push.
pub async fn start(
    options: Options,
    snapshots: impl FnOnce(watch::Receiver<Arc<TrustAnchors>>) -> watch::Receiver<Arc<Snapshot>>,
    metrics: Option<PrometheusHandle>,
    stop: CancellationToken,
) -> Result<Control> {
    let Options { state, listen, api, trust_domain, leaf_lifetime, review, cluster, analysis_to, canaries } =
        options;
    let state = StateDir::open(state)?;
    let own = SpiffeId::new(&trust_domain, SYSTEM_NAMESPACE, "penstock-control")?;
    let tokens: Arc<dyn TokenReview> = match review {
        Some(review) => review,
        None => Arc::new(TokenKey::open(&state)?),
    };
    let around = cluster
        .as_ref()
        .map(|cluster| Around { objects: cluster.objects.clone(), api_server: cluster.api_server.clone() });
    let kept = match cluster {
        Some(cluster) => Some(State::open(cluster, &trust_domain, leaf_lifetime).await?),
        None => None,
    };
    let authority = match &kept {
        Some(kept) => kept.authority(),
        None => Arc::new(Authority::open(state, &trust_domain, leaf_lifetime, SystemTime::now())?),
    };
    let trust = authority.trust().borrow().clone();
    let (anchors, anchors_in_force) = watch::channel(Arc::new(anchors(&trust_domain, &trust)));
    let published = publish(snapshots(anchors_in_force));

    let listener = TcpListener::bind(listen).await.with_context(|| busy(listen, "--listen"))?;
    let api_listener = TcpListener::bind(api).await.with_context(|| busy(api, "--api"))?;
    let (address, api) = (listener.local_addr()?, api_listener.local_addr()?);

    let fresh = tls::fresh(&trust, &own, leaf_lifetime, epoch(SystemTime::now()))?;
    let serving = Arc::new(Serving::new(&fresh));
    let fleet = Arc::new(Fleet::default());
    let mut tasks = JoinSet::new();

    let ads = AdsService::new(published.clone(), fleet.clone(), stop.clone());
    let router = Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(AggregatedDiscoveryServiceServer::new(ads).max_decoding_message_size(MAX_REQUEST))
        .add_service(FleetServer::new(FleetService::new(fleet.clone(), published.clone(), stop.clone())))
        .add_service(ReplicasServer::new(ReplicasService::new(published.clone(), fleet.clone(), own.clone())))
        .add_service(
            IdentityServer::new(IdentityService::new(authority.clone(), tokens))
                .max_decoding_message_size(MAX_SIGN),
        );
    let incoming = ReceiverStream::new(serving.clone().accept(listener, trust_domain.clone()));
    let stopped = stop.clone().cancelled_owned();
    tasks.spawn(async move { Ok(router.serve_with_incoming_shutdown(incoming, stopped).await?) });

    let outside = Outside::new(analysis_to, &[address, api], around);
    let (shown, known) = watch::channel(Arc::default());
    let commands = canaries.as_ref().map(Local::commands);
    if let Some(local) = canaries {
        let (published, fleet, shown) = (published.clone(), fleet.clone(), shown.clone());
        let sight = Sight { published, fleet, outside: outside.clone(), shown };
        tasks.spawn(canary::run(sight, local, stop.clone()));
    }
    let facts = api::Facts {
        published: published.clone(),
        fleet: fleet.clone(),
        canaries: known,
        commands,
        metrics: metrics.clone(),
        started: Instant::now(),
        stop: stop.clone(),
    };
    let stopped = stop.clone().cancelled_owned();
    let pages = axum::serve(api_listener, api::router(facts)).with_graceful_shutdown(stopped);
    tasks.spawn(async move { Ok(pages.await?) });

    let (acknowledged, known) = watch::channel(None);
    let told = kept.map(|kept| {
        let pushed = Pushed {
            published: published.clone(),
            fleet: fleet.clone(),
            acknowledged: known,
            own: own.clone(),
            port: address.port(),
            outside,
            canaries: shown,
        };
        kept.keep(pushed, &mut tasks, &stop)
    });
    let keeper = Keeper {
        authority: authority.clone(),
        trust,
        acknowledged,
        fleet: fleet.clone(),
        published,
        anchors,
        serving,
        own,
        metrics,
        renew_at: fresh.renew_at,
        since: Instant::now(),
    };
    tasks.spawn(keeper.run(stop.clone()));
    Ok(Control { address, api, authority, fleet, told, tasks, stop })
}

fn busy(address: SocketAddr, option: &str) -> String {
    format!("cannot listen on {address}; is another control running? Choose another address with {option}")
}

fn anchors(trust_domain: &str, trust: &Trust) -> TrustAnchors {
    let anchors = trust.anchors.iter().map(|der| der.to_vec()).collect();
    TrustAnchors { trust_domain: trust_domain.to_owned(), anchors }
}

/// Keeps up what changes with time: the rotation of roots, control's own certificate, the memory of proxies.
struct Keeper {
    authority: Arc<Authority>,
    /// What was in force when it was looked last.
    trust: Arc<Trust>,
    /// For whoever moves the rotation, where that is not the authority itself.
    acknowledged: watch::Sender<Acknowledged>,
    fleet: Arc<Fleet>,
    published: watch::Receiver<Published>,
    anchors: watch::Sender<Arc<TrustAnchors>>,
    serving: Arc<Serving>,
    own: SpiffeId,
    metrics: Option<PrometheusHandle>,
    /// When control's own certificate is due.
    renew_at: i64,
    /// Since when the anchors in force are.
    since: Instant,
}

impl Keeper {
    async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                _ = tick.tick() => {}
            }
            let now = epoch(SystemTime::now());
            if let Err(error) = self.keep(now) {
                // The authority in force goes on; what could not be done is tried again.
                tracing::error!("the certificate authority could not be kept up: {error:#}");
                tokio::time::sleep(GRACE).await;
            }
            self.fleet.forget(Instant::now());
            if let Some(metrics) = &self.metrics {
                metrics.run_upkeep();
            }
        }
    }

    fn keep(&mut self, now: i64) -> Result<()> {
        self.authority.advance(self.facts(), now)?;
        let trust = self.authority.trust().borrow().clone();
        let changed = !Arc::ptr_eq(&trust, &self.trust);
        if changed {
            self.trust = trust.clone();
            self.since = Instant::now();
            let anchors = anchors(self.authority.trust_domain(), &trust);
            self.anchors.send_replace(Arc::new(anchors));
            tracing::info!("{}", told(trust.phase));
        }
        if changed || now >= self.renew_at {
            let fresh = tls::fresh(&trust, &self.own, self.authority.leaf_lifetime(), now)?;
            self.serving.replace(&fresh);
            self.renew_at = fresh.renew_at;
        }
        self.acknowledged.send_replace(Some((trust, self.facts())));
        Ok(())
    }

    /// What a rotation's next step rests on. As long as the anchors in force are not in the snapshot, nobody can
    /// have acknowledged them.
    fn facts(&self) -> Facts {
        let trust = &self.trust;
        let domain = self.authority.trust_domain();
        let snapshot = self.published.borrow().snapshot.clone();
        let pushed = snapshot.get(Kind::TrustBundle, domain).filter(|entry| {
            v1::TrustBundle::decode(&*entry.any.value).is_ok_and(|bundle| {
                bundle.anchors.iter().map(Vec::as_slice).eq(trust.anchors.iter().map(|a| &**a))
            })
        });
        let (connected, acknowledged) = match pushed {
            Some(entry) => self.fleet.acknowledged(Kind::TrustBundle, domain, &entry.version),
            None => (1, 0),
        };
        Facts {
            announced_for: self.since.elapsed(),
            connected,
            acknowledged,
            leaf_lifetime: self.authority.leaf_lifetime(),
        }
    }
}

fn told(phase: Phase) -> &'static str {
    match phase {
        Phase::Steady | Phase::Promoting => "one root is in force, and signs",
        Phase::Announced => {
            "root rotation: both roots are announced, the old one signs until every proxy knows both"
        }
        Phase::Switched { .. } => {
            "root rotation: the new root signs, the old one is trusted until its last certificate has expired"
        }
    }
}
