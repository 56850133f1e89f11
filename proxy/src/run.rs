//! Starting, and leaving: listeners, worker threads, the drain.
//!
//! The main thread's runtime carries everything that is not a request (control's streams, certificates, admin pages);
//! each worker thread has a runtime of its own. Listeners are bound before anything is served, so a port that is
//! taken is an error at start and not a silence later.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::runtime::LocalOptions;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::accept::{self, Bounds, OpenConnections};
use crate::coalesce::Sharing;
use crate::config::static_file::{Listener, StaticFile};
use crate::config::{Cluster, Store};
use crate::drain::Drain;
use crate::early::Early;
use crate::identity::Identity;
use crate::limits::Limits;
use crate::memory::Memory;
use crate::models::Models;
use crate::prepare::Preparing;
use crate::report::QueueWait;
use crate::signals;
use crate::telemetry::Telemetry;
use crate::telemetry::metric::{self, Metric};
use crate::worker::{Shared, Worker};
use crate::{files, inbound, outbound};

/// What is listened on.
#[derive(Clone, Debug)]
pub struct Listen {
    /// Its name in logs and metrics.
    pub name: &'static str,
    /// Its address; port 0 lets the kernel choose.
    pub address: SocketAddr,
    /// What it serves.
    pub serves: Serves,
}

/// What a listener serves.
#[derive(Clone, Debug)]
pub enum Serves {
    /// The application's connections; `Some`: to one upstream.
    Outbound(Option<Arc<Listener>>),
    /// The mesh's connections; `Some`: to one upstream.
    Inbound(Option<Arc<Listener>>),
}

/// The listeners of a static file.
pub fn static_listeners(file: &StaticFile) -> Vec<Listen> {
    file.listeners
        .iter()
        .map(|listener| {
            let to = Some(Arc::clone(listener));
            let (name, serves) = match &listener.tls {
                Some(_) => ("inbound", Serves::Inbound(to)),
                None => ("outbound", Serves::Outbound(to)),
            };
            Listen { name, address: listener.address, serves }
        })
        .collect()
}

/// What a proxy is started with.
#[derive(Debug)]
pub struct Setup {
    /// What it listens on.
    pub listen: Vec<Listen>,
    /// Worker threads.
    pub workers: usize,
    /// `<namespace>/<pod>`.
    pub node: String,
    /// What is bounded.
    pub limits: Limits,
    /// What it knows.
    pub store: Arc<Store>,
    /// Who it is.
    pub identity: Arc<Identity>,
    /// What it tells.
    pub telemetry: Arc<Telemetry>,
    /// Where the model server and the GPU are looked at.
    pub signals: signals::Config,
    /// The library of the GPU's driver.
    pub cuda_driver: PathBuf,
    /// nvJPEG; `None`: the one that the machine has.
    pub nvjpeg: Option<PathBuf>,
}

/// A proxy whose workers run.
#[derive(Debug)]
pub struct Proxy {
    /// What the workers share.
    pub shared: Arc<Shared>,
    /// The addresses listened on, in the order of [`Setup::listen`].
    pub addresses: Vec<SocketAddr>,
    stop: watch::Sender<bool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Proxy {
    /// Binds the listeners and starts the workers. Must be called inside the control runtime.
    pub fn start(setup: Setup) -> anyhow::Result<Self> {
        files::allow_all();
        let bound = bind(&setup)?;
        let addresses: Vec<SocketAddr> = bound.iter().map(|(_, address, _)| *address).collect();
        let inbound = bound.iter().find(|(listen, ..)| matches!(listen.serves, Serves::Inbound(None)));
        let inbound = inbound.map(|(_, address, _)| address.port());
        let namespace = setup.node.split_once('/').map_or("default", |(namespace, _)| namespace).to_owned();
        let epoch = Instant::now();
        let shared = Arc::new(Shared {
            store: setup.store,
            identity: setup.identity,
            telemetry: setup.telemetry,
            queue_wait: QueueWait::default(),
            models: Models::new(epoch),
            signals: Arc::default(),
            sharing: Arc::new(Sharing::new(setup.cuda_driver, setup.nvjpeg)),
            held: Arc::default(),
            preparing: Arc::new(Preparing::new(setup.limits.prepare_threads, epoch)),
            drain: Drain::default(),
            early: Early::default(),
            memory: Memory::new(setup.limits.memory_bytes),
            limits: setup.limits,
            namespace,
            node: setup.node.into(),
            inbound,
            listeners: addresses.clone(),
            hasher: ahash::RandomState::new(),
            epoch,
        });
        tokio::spawn(tick(Arc::clone(&shared)));
        let watched = Arc::clone(&shared);
        tokio::spawn(async move { watched.memory.watch().await });
        let (store, signals) = (Arc::clone(&shared.store), Arc::clone(&shared.signals));
        tokio::spawn(signals::run(setup.signals, signals, move || signals::ports(&store), shared.epoch));
        let (stop, stopped) = watch::channel(false);
        let open: Vec<_> = bound.iter().map(|_| Arc::new(OpenConnections::default())).collect();
        let mut per_worker: Vec<Vec<(Listen, std::net::TcpListener, Arc<OpenConnections>)>> =
            (0..setup.workers).map(|_| Vec::new()).collect();
        for ((listen, _, sockets), open) in bound.into_iter().zip(&open) {
            for (worker, socket) in sockets.into_iter().enumerate() {
                per_worker[worker].push((listen.clone(), socket, Arc::clone(open)));
            }
        }
        let mut threads = Vec::new();
        for (number, listeners) in per_worker.into_iter().enumerate() {
            let (shared, stopped) = (Arc::clone(&shared), stopped.clone());
            let thread = std::thread::Builder::new()
                .name(format!("worker-{number}"))
                .spawn(move || {
                    if let Err(error) = work(shared, listeners, stopped) {
                        tracing::error!(worker = number, %error, "a worker could not start");
                        std::process::exit(1);
                    }
                })
                .context("cannot start a worker thread")?;
            threads.push(thread);
        }
        Ok(Self { shared, addresses, stop, threads })
    }

    /// Lets peers know that we are leaving, serves until both sides are quiet, at most for `limit`, and stops. Shortly
    /// before that, streams that know how are told to end.
    pub async fn drain(self, limit: Duration) {
        let drain = &self.shared.drain;
        drain.end_soon();
        let grace = GRACE.min(limit / 4);
        let quiet = tokio::time::timeout(limit.saturating_sub(grace), drain.quiet()).await.is_ok() || {
            drain.call_last();
            tokio::time::timeout(grace, drain.quiet()).await.is_ok()
        };
        if !quiet {
            tracing::warn!(
                busy = self.shared.drain.busy(),
                "still busy after {limit:?}, the drain timeout; leaving with requests or connections open"
            );
        }
        self.stop().await;
    }

    /// Stops at once.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        let threads = self.threads;
        // Joining blocks; a worker that does not see the signal within a second is left to the end of the process.
        let joined =
            tokio::task::spawn_blocking(move || threads.into_iter().for_each(|thread| drop(thread.join())));
        let _ = tokio::time::timeout(Duration::from_secs(1), joined).await;
    }
}

/// Of the drain's time, what streams have for their farewell.
const GRACE: Duration = Duration::from_secs(2);

type Bound = (Listen, SocketAddr, Vec<std::net::TcpListener>);

fn bind(setup: &Setup) -> anyhow::Result<Vec<Bound>> {
    let mut bound = Vec::new();
    for listen in &setup.listen {
        let cannot = || format!("cannot listen on {} ({}); is it taken?", listen.address, listen.name);
        let first = accept::listen(listen.address).with_context(cannot)?;
        let address = first.local_addr().with_context(cannot)?;
        let mut sockets = vec![first];
        for _ in 1..setup.workers {
            sockets.push(accept::listen(address).with_context(cannot)?);
        }
        bound.push((listen.clone(), address, sockets));
    }
    Ok(bound)
}

/// A worker's thread.
fn work(
    shared: Arc<Shared>,
    listeners: Vec<(Listen, std::net::TcpListener, Arc<OpenConnections>)>,
    mut stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(async move {
        let watched = Arc::clone(&shared);
        tokio::task::spawn_local(async move { watched.memory.give_back().await });
        let worker = Worker::new(shared, rand::random());
        for (listen, socket, open) in listeners {
            let listener = tokio::net::TcpListener::from_std(socket)?;
            let Limits { connections, connections_per_peer, .. } = worker.shared.limits;
            let bounds = |per_peer| Bounds { connections, per_peer };
            let worker = std::rc::Rc::clone(&worker);
            match listen.serves {
                Serves::Outbound(to) => {
                    let serve = move |stream, counted| {
                        outbound::connection(std::rc::Rc::clone(&worker), stream, counted, to.clone())
                    };
                    // The application is one peer, and has its sidecar for itself.
                    tokio::task::spawn_local(accept::accept(listen.name, listener, open, bounds(0), serve));
                }
                Serves::Inbound(to) => {
                    let serve = move |stream, counted| {
                        inbound::connection(std::rc::Rc::clone(&worker), stream, counted, to.clone())
                    };
                    tokio::task::spawn_local(accept::accept(
                        listen.name,
                        listener,
                        open,
                        bounds(connections_per_peer),
                        serve,
                    ));
                }
            }
        }
        // An error means that the sender is gone, which is as good as a stop.
        let _ = stopped.wait_for(|stopped| *stopped).await;
        Ok(())
    })
}

/// How good the choices in a cluster have been.
fn tell(cluster: &Cluster) {
    let quality = cluster.pool.quality();
    if quality.picks == 0 {
        return;
    }
    let count = |metric: &Metric, value: u64| {
        metrics::counter!(metric.name, "service" => cluster.service.to_string()).absolute(value);
    };
    count(&metric::BALANCE_PICKS, quality.picks);
    count(&metric::BALANCE_INFORMED, quality.informed);
    count(&metric::BALANCE_AGE, quality.age.as_secs());
    count(&metric::BALANCE_EXPLORED, quality.explored);
    count(&metric::BALANCE_REGRETTED, quality.regretted);
    count(&metric::BALANCE_REGRET, quality.regret.as_secs());
    count(&metric::BALANCE_HERDED, quality.herded);
}

/// What happens once a second, or seldom, away from the workers.
async fn tick(shared: Arc<Shared>) {
    const FORGET_EVERY: u32 = 60;
    let mut interval = tokio::time::interval(Duration::from_secs(1));
    let mut ticks = 0u32;
    loop {
        interval.tick().await;
        let now = shared.epoch.elapsed();
        for cluster in shared.store.clusters() {
            cluster.endpoints().tend(now);
            tell(&cluster);
        }
        shared.sharing.tell(&shared.models);
        shared.held.tell();
        shared.preparing.tell();
        let workload = shared.store.snapshot().workload.clone();
        shared.sharing.gpu.follow(workload.as_ref().and_then(|workload| workload.gpu));
        shared.models.follow(workload.and_then(|workload| workload.admission));
        ticks = ticks.wrapping_add(1);
        if ticks.is_multiple_of(FORGET_EVERY) {
            shared.store.forget_idle();
        }
    }
}
