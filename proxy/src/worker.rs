//! One worker: a thread with its own runtime, listeners, connections and pools. Nothing here is shared with other
//! workers but what [`Shared`] holds, so the request path takes no lock and wakes no other thread.

use std::cell::{Cell, RefCell, RefMut};
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::Duration;

use ahash::{AHashMap, AHashSet, RandomState};
use bytes::BytesMut;
use penstock_api::ServiceName;
use penstock_api::v1::Direction;
use penstock_kernels::allocated;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::Instant;

use crate::coalesce::Sharing;
use crate::coalesce::batcher::{self, Order};
use crate::config::{Cluster, Endpoint, Rule, Store, Workload};
use crate::drain::{Drain, Farewells};
use crate::early::Early;
use crate::held::Budget;
use crate::identity::Identity;
use crate::limits::Limits;
use crate::memory::Memory;
use crate::models::{Model, Models};
use crate::oob::Subscriptions;
use crate::outside::Outside;
use crate::prepare::Preparing;
use crate::probe::Probes;
use crate::report::QueueWait;
use crate::send::pool::Pools;
use crate::shadow::Mirroring;
use crate::signals::Signals;
use crate::telemetry::Telemetry;
use crate::telemetry::outcome::{Labels, Outcome};

/// What all workers share: snapshots behind atomic pointers, and counters.
#[derive(Debug)]
pub struct Shared {
    /// What control pushed.
    pub store: Arc<Store>,
    /// Who we are.
    pub identity: Arc<Identity>,
    /// What is recorded.
    pub telemetry: Arc<Telemetry>,
    /// How long requests wait here for the application behind us.
    pub queue_wait: QueueWait,
    /// The models of the application behind us.
    pub models: Models,
    /// What the model server and the GPU say of themselves.
    pub signals: Arc<Signals>,
    /// What requests share.
    pub sharing: Arc<Sharing>,
    /// Bodies that are held whole.
    pub held: Arc<Budget>,
    /// Who prepares inputs.
    pub preparing: Arc<Preparing>,
    /// Whether we are on our way out.
    pub drain: Drain,
    /// Connections that wait until we are ready.
    pub early: Early,
    /// How much memory is used.
    pub memory: Memory,
    /// What is bounded.
    pub limits: Limits,
    /// The namespace that short host names are in.
    pub namespace: String,
    /// `<namespace>/<pod>`.
    pub node: Arc<str>,
    /// The port of our listener for the mesh, if control's pods are served on it.
    pub inbound: Option<u16>,
    /// Our own listeners, to notice loops.
    pub listeners: Vec<SocketAddr>,
    /// Hashes what clients choose, by a seed that they cannot know.
    pub hasher: RandomState,
    /// The epoch of every `now`.
    pub epoch: Instant,
}

/// A worker.
#[derive(Debug)]
pub struct Worker {
    /// What all workers share.
    pub shared: Arc<Shared>,
    /// What is recorded.
    pub telemetry: Arc<Telemetry>,
    /// Connections to endpoints.
    pub pools: Pools,
    /// Questions to other sidecars.
    pub probes: Probes,
    /// Clients that are told our load out of band.
    pub subscriptions: Subscriptions,
    /// Hosts outside the mesh.
    pub outside: Outside,
    /// Copies of requests.
    pub mirroring: Mirroring,
    /// Whom to say farewell to.
    pub farewells: Farewells,
    /// How others have it do what only it can: its connections are its own.
    pub orders: UnboundedSender<Order>,
    random: RefCell<SmallRng>,
    cells: RefCell<AHashMap<(u64, u32), Counted>>,
    unrouted: [Arc<Outcome>; 2],
    models: RefCell<AHashMap<Box<str>, Arc<Model>>>,
    used: RefCell<AHashSet<ServiceName>>,
    used_addresses: RefCell<AHashSet<SocketAddr>>,
    scratch: RefCell<BytesMut>,
    giving_back: Cell<bool>,
}

#[derive(Debug)]
struct Counted {
    outcome: Arc<Outcome>,
    endpoint: Weak<Endpoint>,
}

/// How often a worker tidies: drops connections and cells of endpoints that are gone, and says which destinations
/// are in use.
const TIDY: Duration = Duration::from_secs(10);

/// How soon memory is given back after connections have come to rest: mimalloc keeps what has been free for less than a second.
const GIVE_BACK: Duration = Duration::from_millis(1_200);

impl Worker {
    /// A worker on the current thread; `seed` makes its draws.
    pub fn new(shared: Arc<Shared>, seed: u64) -> Rc<Self> {
        let telemetry = Arc::clone(&shared.telemetry);
        let unrouted = [Direction::Outbound, Direction::Inbound].map(|direction| {
            let service = ServiceName::unrouted();
            telemetry.outcomes.cell(Labels {
                direction,
                service: service.clone(),
                backend: service,
                endpoint: "".into(),
                route: "".into(),
            })
        });
        let (orders, mut given) = unbounded_channel();
        let worker = Rc::new(Self {
            orders,
            pools: Pools::default(),
            farewells: Farewells::default(),
            random: RefCell::new(SmallRng::seed_from_u64(seed)),
            cells: RefCell::default(),
            unrouted,
            probes: Probes::default(),
            subscriptions: Subscriptions::default(),
            outside: Outside::default(),
            mirroring: Mirroring::default(),
            models: RefCell::default(),
            used: RefCell::default(),
            used_addresses: RefCell::default(),
            scratch: RefCell::default(),
            giving_back: Cell::default(),
            telemetry,
            shared,
        });
        let tidy = Rc::downgrade(&worker);
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(TIDY).await;
                let Some(worker) = tidy.upgrade() else { return };
                worker.tidy();
            }
        });
        let obeys = Rc::downgrade(&worker);
        tokio::task::spawn_local(async move {
            while let Some(order) = given.recv().await {
                let Some(worker) = obeys.upgrade() else { return };
                batcher::obey(&worker, order);
            }
        });
        let (leaver, mut leaving) = (Rc::downgrade(&worker), worker.shared.drain.subscribe());
        tokio::task::spawn_local(async move {
            if leaving.wait_for(|leaving| *leaving).await.is_ok()
                && let Some(worker) = leaver.upgrade()
            {
                worker.farewells.set_due();
            }
        });
        worker
    }

    /// The pod that this proxy belongs to, once control has said so.
    pub fn workload(&self) -> Option<Arc<Workload>> {
        self.shared.store.snapshot().workload.clone()
    }

    /// The time, since the epoch that all workers share.
    pub fn now(&self) -> Duration {
        self.shared.epoch.elapsed()
    }

    /// A source of randomness, for the length of a call.
    pub fn with_random<T>(&self, f: impl FnOnce(&mut SmallRng) -> T) -> T {
        f(&mut self.random.borrow_mut())
    }

    /// Room to write header values into; they are split off it, so many share one allocation.
    pub fn scratch(&self) -> RefMut<'_, BytesMut> {
        self.scratch.borrow_mut()
    }

    /// The model of that name behind us.
    pub fn model(&self, name: &str) -> Arc<Model> {
        let mut models = self.models.borrow_mut();
        if let Some(model) = models.get(name) {
            return Arc::clone(model);
        }
        let model = self.shared.models.of(name);
        // Names that are not told apart are not remembered either: clients choose them.
        if *model.name == *name {
            models.insert(name.into(), Arc::clone(&model));
        }
        model
    }

    /// The cell that counts for a rule, the service that was asked for, and an endpoint.
    pub fn outcome(
        &self,
        direction: Direction,
        rule: &Rule,
        asked: &ServiceName,
        cluster: &Cluster,
        endpoint: &Arc<Endpoint>,
    ) -> Arc<Outcome> {
        let mut cells = self.cells.borrow_mut();
        let counted = cells.entry((rule.id, endpoint.id)).or_insert_with(|| {
            let outcome = self.telemetry.outcomes.cell(Labels {
                direction,
                service: asked.clone(),
                backend: cluster.service.clone(),
                endpoint: Arc::clone(&endpoint.name),
                route: Arc::clone(&rule.label),
            });
            Counted { outcome, endpoint: Arc::downgrade(endpoint) }
        });
        Arc::clone(&counted.outcome)
    }

    /// The cell that counts for requests that reached no endpoint.
    pub fn unrouted(&self, direction: Direction) -> Arc<Outcome> {
        Arc::clone(&self.unrouted[direction as usize])
    }

    fn tidy(&self) {
        self.cells.borrow_mut().retain(|_, counted| {
            counted.endpoint.strong_count() > 0
                || counted.outcome.in_flight.load(std::sync::atomic::Ordering::Relaxed) > 0
        });
        self.pools.tidy();
        self.mirroring.tidy();
        self.farewells.tidy();
        let used = std::mem::take(&mut *self.used.borrow_mut());
        let addresses = std::mem::take(&mut *self.used_addresses.borrow_mut());
        self.shared.store.touch(used.into_iter(), addresses.into_iter());
    }

    /// A connection has come to rest, and with it what it freed. Where many do, that is most of a worker's memory, and one at rest itself gives
    /// nothing back.
    pub fn rested(self: &Rc<Self>) {
        if !self.giving_back.replace(true) {
            let worker = Rc::clone(self);
            tokio::task::spawn_local(async move {
                tokio::time::sleep(GIVE_BACK).await;
                worker.giving_back.set(false);
                allocated::give_back();
            });
        }
    }

    /// The same for the original address of redirected connections.
    pub fn uses_address(&self, address: SocketAddr) {
        self.used_addresses.borrow_mut().insert(address);
    }

    /// Notes that a destination is in use, so that it is not forgotten.
    pub fn uses(&self, service: &ServiceName) {
        let mut used = self.used.borrow_mut();
        if !used.contains(service) {
            used.insert(service.clone());
        }
    }
}
