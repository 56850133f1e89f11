//! What the data path knows: one immutable [`Snapshot`] behind an atomic pointer.
//!
//! In: resources from control ([`store`]) or a static file ([`static_file`]). Out: compiled services, routes and
//! clusters, which the request path reads without locks. What must outlive a snapshot (load, ejections, budgets)
//! hangs on [`Cluster`] and [`Endpoint`], which successive snapshots share.

pub mod compile;
pub mod matcher;
pub mod static_file;
pub mod store;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use ahash::AHashMap;
use arc_swap::{ArcSwap, ArcSwapOption};
use http::{HeaderName, HeaderValue, StatusCode};
use penstock_api::access::Access;
use penstock_api::v1::Protocol;
use penstock_api::{ServiceName, SpiffeId};
use penstock_balance::{Ask, EndpointState, Members, Pool, RetryBudget, Settings};

use crate::loaded::{self, Loaded};
use crate::prepare::Prepare;
use crate::rates::Rates;
pub use store::Store;

/// Everything the data path needs, at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// The pod's own ports.
    pub workload: Option<Arc<Workload>>,
    /// Who may ask the pod for what; `None`: control has not said so.
    pub access: Option<Arc<Access>>,
    /// How much of it, with what is left.
    pub rates: Arc<Rates>,
    /// What control said of each service name that was asked for.
    pub services: AHashMap<ServiceName, Known<Service>>,
    /// What control said of each address that was asked for.
    pub addresses: AHashMap<SocketAddr, Known<Address>>,
}

/// An answer from control.
#[derive(Debug)]
pub enum Known<T> {
    /// It is in the mesh.
    Here(Arc<T>),
    /// Control knows nothing of that name.
    Absent,
}

impl<T> Clone for Known<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Here(value) => Self::Here(Arc::clone(value)),
            Self::Absent => Self::Absent,
        }
    }
}

/// A Service, compiled.
#[derive(Debug)]
pub struct Service {
    /// Its name.
    pub name: ServiceName,
    /// Its ports, in the order of the Service.
    pub ports: Vec<ServicePort>,
    /// The rules of its routes, in order of precedence. Empty: requests go to the Service itself.
    pub rules: Vec<Arc<Rule>>,
    /// One user stays on one version, unless a rule says otherwise.
    pub sticky: Option<Sticky>,
}

impl Service {
    /// The port of that number, or the only one there is.
    pub fn port(&self, number: u16) -> Option<&ServicePort> {
        self.ports.iter().find(|port| port.port == number)
    }
}

/// A port of a Service.
#[derive(Debug)]
pub struct ServicePort {
    /// Its number.
    pub port: u16,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// The endpoints behind it.
    pub cluster: Arc<Cluster>,
    /// The rule that applies where no route does: everything to the Service itself.
    pub itself: Arc<Rule>,
}

/// One rule of a route.
#[derive(Debug)]
pub struct Rule {
    /// Hash of the service that was asked for and the label: the same as long as both are.
    pub id: u64,
    /// `<namespace>/<route>#<index>`; for metrics, logs and tap.
    pub label: Arc<str>,
    /// The parent's port; `None` = all.
    pub port: Option<u16>,
    /// Host names it applies to; empty = all.
    pub hostnames: Vec<matcher::Hostname>,
    /// Any of them; empty = every request.
    pub matches: Vec<matcher::Match>,
    /// Changes to request and response.
    pub filters: Filters,
    /// Its timeouts; fields that are `None` are the cluster's.
    pub timeouts: Timeouts,
    /// Its retries; `None` = the cluster's.
    pub retry: Option<RetryPolicy>,
    /// One user stays on one version.
    pub sticky: Option<Sticky>,
    /// Where requests go, by weight.
    pub backends: Vec<Backend>,
    /// Where copies of them go.
    pub mirrors: Vec<Mirror>,
}

/// Where copies of a rule's requests go. One to which nothing can be copied is not kept.
#[derive(Debug)]
pub struct Mirror {
    /// The endpoints.
    pub cluster: Arc<Cluster>,
    /// Of a million requests, how many are copied.
    pub share_ppm: u32,
    /// How its answers are held against those that clients get; `None`: they are thrown away.
    pub compare: Option<Arc<Compare>>,
}

/// How two answers are held against each other.
#[derive(Clone, Debug, PartialEq)]
pub struct Compare {
    /// What counts as the same number.
    pub tolerance: Tolerance,
    /// The tensors that are compared; empty: all.
    pub outputs: Vec<String>,
    /// Answers above so many bytes are not compared.
    pub max_bytes: u64,
}

/// Two numbers agree if `|a - b| <= absolute + relative * |b|`, `b` being the client's.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs, reason = "see penstock_api::v1::Compare")]
pub struct Tolerance {
    pub absolute: f64,
    pub relative: f64,
}

/// A destination of a rule.
#[derive(Debug)]
pub struct Backend {
    /// The endpoints.
    pub cluster: Arc<Cluster>,
    /// Its share of the rule is its weight over the sum of weights.
    pub weight: u32,
    /// Changes for requests that go here.
    pub filters: Filters,
    /// Why requests are answered with 500 instead.
    pub invalid: Option<Arc<str>>,
}

/// Changes to a request and its response.
#[derive(Debug, Default)]
pub struct Filters {
    /// Applied to the request, in order.
    pub request: Vec<HeaderChange>,
    /// Applied to the response, in order.
    pub response: Vec<HeaderChange>,
    /// The proxy answers with a redirect.
    pub redirect: Option<Redirect>,
    /// Host and path are rewritten.
    pub rewrite: Option<Rewrite>,
}

/// A change to one header.
#[derive(Clone, Debug, PartialEq)]
pub enum HeaderChange {
    /// Replaces every value.
    Set(HeaderName, HeaderValue),
    /// Adds a value.
    Add(HeaderName, HeaderValue),
    /// Removes every value.
    Remove(HeaderName),
}

/// A redirect; parts that are `None` stay as they were.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names are those of HTTPRoute's RequestRedirect")]
pub struct Redirect {
    pub scheme: Option<String>,
    pub hostname: Option<String>,
    pub port: Option<u16>,
    pub path: Option<PathChange>,
    pub status: StatusCode,
}

/// A rewrite; parts that are `None` stay as they were.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names are those of HTTPRoute's URLRewrite")]
pub struct Rewrite {
    pub hostname: Option<HeaderValue>,
    pub path: Option<PathChange>,
}

/// A change of path.
#[derive(Clone, Debug, PartialEq)]
pub enum PathChange {
    /// The whole path.
    Full(String),
    /// The prefix that matched.
    Prefix(String),
}

/// What keeps a user on one version.
#[derive(Clone, Debug, PartialEq)]
pub enum Sticky {
    /// The value of a header.
    Header(HeaderName),
    /// The value of a cookie.
    Cookie(String),
}

/// Timeouts; `None` = not said here. Zero = none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs, reason = "see penstock_api::v1::Timeouts")]
pub struct Timeouts {
    pub connect: Option<Duration>,
    pub request: Option<Duration>,
    pub per_try: Option<Duration>,
    pub idle: Option<Duration>,
}

/// What may be tried again, and how often.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Tries after the first.
    pub attempts: u32,
    /// Status codes worth a retry; needs the body kept.
    pub codes: Vec<u16>,
    /// The largest body that is kept, bytes.
    pub buffer: usize,
}

/// How a cluster behaves. Defaults are in [`Policy::default`], and nowhere else.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "see penstock_api::v1::Policy")]
pub struct Policy {
    pub balance: Settings,
    pub connect_timeout: Duration,
    pub timeouts: Timeouts,
    pub retry: RetryPolicy,
    pub budget_percent: u32,
    pub outlier: penstock_balance::OutlierPolicy,
    pub max_connections: u32,
    pub max_pending: u32,
    pub max_requests: u32,
    /// What clients' sidecars ask for once.
    pub coalesce: Option<Arc<Coalesce>>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            balance: Settings::default(),
            // A SYN that is lost is sent again after 1 s; two of them fit.
            connect_timeout: Duration::from_secs(4),
            timeouts: Timeouts {
                connect: None,
                request: None,
                per_try: None,
                idle: Some(Duration::from_secs(300)),
            },
            retry: RetryPolicy { attempts: 2, codes: Vec::new(), buffer: 64 << 10 },
            budget_percent: 20,
            outlier: penstock_balance::OutlierPolicy::default(),
            max_connections: 1024,
            max_pending: 1024,
            max_requests: 16_384,
            coalesce: None,
        }
    }
}

/// The endpoints of one port of one Service, and what is known of them as a whole.
#[derive(Debug)]
pub struct Cluster {
    /// The Service.
    pub service: ServiceName,
    /// Its port.
    pub port: u16,
    /// What is spoken on the port.
    pub protocol: Protocol,
    endpoints: ArcSwap<Members<Arc<Endpoint>>>,
    policy: ArcSwap<Policy>,
    /// Requests in flight, all workers.
    pub in_flight: AtomicU32,
    /// Requests waiting for a connection, all workers.
    pub pending: AtomicU32,
    /// What may still be retried.
    pub budget: RetryBudget,
    /// What the choices of an endpoint share.
    pub pool: Pool,
    /// Some endpoint has said what it has loaded.
    lists: AtomicBool,
}

impl Cluster {
    /// A cluster without endpoints.
    pub fn new(service: ServiceName, port: u16, protocol: Protocol, policy: Policy) -> Self {
        Self {
            service,
            port,
            protocol,
            endpoints: ArcSwap::default(),
            policy: ArcSwap::from_pointee(policy),
            in_flight: AtomicU32::new(0),
            pending: AtomicU32::new(0),
            budget: RetryBudget::default(),
            pool: Pool::default(),
            lists: AtomicBool::new(false),
        }
    }

    /// An endpoint has said what it has loaded.
    pub fn told_models(&self, endpoint: &Endpoint, models: Loaded, now: Duration) {
        let same = endpoint.loaded.load().as_ref().is_some_and(|told| told.0 == models && told.is_new(now));
        if !same {
            endpoint.loaded.store(Some(Arc::new(Told(models, now))));
        }
        self.lists.store(true, Ordering::Relaxed);
    }

    /// Whether any endpoint has said what it has loaded; if not, names need not be compared.
    pub fn lists_models(&self) -> bool {
        self.lists.load(Ordering::Relaxed)
    }

    /// The endpoints now.
    pub fn endpoints(&self) -> arc_swap::Guard<Arc<Members<Arc<Endpoint>>>> {
        self.endpoints.load()
    }

    /// How it behaves now.
    pub fn policy(&self) -> arc_swap::Guard<Arc<Policy>> {
        self.policy.load()
    }

    /// Replaces the endpoints; one that stays keeps its load, its ejection and its connections.
    pub fn set_endpoints(&self, endpoints: Vec<Arc<Endpoint>>) {
        self.endpoints.store(Arc::new(Members::new(endpoints)));
    }

    /// Replaces the policy.
    pub fn set_policy(&self, policy: Policy) {
        if **self.policy.load() != policy {
            self.policy.store(Arc::new(policy));
        }
    }
}

/// One replica.
#[derive(Debug)]
pub struct Endpoint {
    /// Unique in this process; keys pools and outcome cells.
    pub id: u32,
    /// `<namespace>/<pod>`, or the address.
    pub name: Arc<str>,
    /// What is dialled.
    pub address: SocketAddr,
    /// The port that is meant, where `address` is the far proxy's listener.
    pub target_port: u16,
    /// The identity it must prove; `None`: plaintext.
    pub identity: Option<SpiffeId>,
    /// Whether a sidecar of ours answers there (its ALPN and upgraded HTTP/1 are spoken), rather than a server.
    pub sidecar: bool,
    /// How to speak to it in plaintext, or to a server that is no sidecar.
    pub speak: Speak,
    /// A hash of the name and the port, the same in every sidecar.
    number: u64,
    /// Load, ejection, drain.
    pub state: EndpointState,
    loaded: ArcSwapOption<Told>,
}

/// What an endpoint has loaded, and when it said so.
#[derive(Debug)]
struct Told(Loaded, Duration);

impl Told {
    fn is_new(&self, now: Duration) -> bool {
        now.saturating_sub(self.1) < loaded::BELIEVED / 4
    }

    fn is_believed(&self, now: Duration) -> bool {
        now.saturating_sub(self.1) < loaded::BELIEVED
    }
}

/// The HTTP version to speak to a server that is no sidecar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Speak {
    /// What the client spoke.
    #[default]
    Same,
    /// HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge.
    Http2,
}

static NEXT_ENDPOINT: AtomicU32 = AtomicU32::new(1);

impl Endpoint {
    /// An endpoint, ready.
    pub fn new(
        name: Arc<str>,
        address: SocketAddr,
        target_port: u16,
        identity: Option<SpiffeId>,
        sidecar: bool,
        speak: Speak,
    ) -> Self {
        let id = NEXT_ENDPOINT.fetch_add(1, Ordering::Relaxed);
        let state = EndpointState::default();
        let mut hasher = blake3::Hasher::new();
        hasher.update(name.as_bytes()).update(&target_port.to_le_bytes());
        let number = hasher.finalize().as_bytes().first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
        let loaded = ArcSwapOption::empty();
        Self { number, id, name, address, target_port, identity, sidecar, speak, state, loaded }
    }
}

impl penstock_balance::Candidate for Endpoint {
    fn state(&self) -> &EndpointState {
        &self.state
    }

    fn name(&self) -> u64 {
        self.number
    }

    fn serves(&self, ask: &Ask<'_>) -> bool {
        // Who has not said what it has may have everything.
        let has = |told: &Arc<Told>| !told.is_believed(ask.now) || told.0.has(ask.model);
        ask.model == 0 || self.loaded.load().as_ref().is_none_or(has)
    }
}

/// What lies at an address.
#[derive(Debug)]
pub enum Address {
    /// A Service's port.
    Service(ServiceName, u16),
    /// A pod's own address: a cluster of one.
    Pod(Arc<Cluster>),
    /// What port 0 stands for: all ports that this pod of the mesh does not declare.
    Undeclared(Arc<str>),
}

/// The pod's own ports.
#[derive(Debug)]
pub struct Workload {
    /// `<namespace>/<pod>`.
    pub name: Arc<str>,
    /// Its ports.
    pub ports: Vec<WorkloadPort>,
    /// Plaintext is accepted.
    pub permissive: bool,
    /// How the application's requests are queued; `None`: it gets all at once.
    pub admission: Option<Admission>,
    /// What the kubelet asks for, by port.
    pub probes: Vec<Probes>,
    /// The application is told who calls.
    pub forward_identity: bool,
    /// Tensors are handed to the application in memory of a GPU that both see.
    pub gpu: Option<Gpu>,
    /// Callers that get a region of shared memory of their own; 0: all share one.
    pub tenant_regions: usize,
}

/// How a GPU's memory is shared with the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Also where it measures slower.
    pub always: bool,
    /// Bytes of it; `None`: not said.
    pub bytes: Option<usize>,
    /// The device's number.
    pub device: u32,
    /// JPEGs are decoded by nvJPEG, where it is there and measures faster.
    pub nvjpeg: bool,
}

/// What the kubelet asks one port for, in plaintext and without a certificate.
#[derive(Debug)]
pub struct Probes {
    /// The port, which need not be one that the pod declares for others.
    pub port: WorkloadPort,
    /// The paths, with their queries.
    pub paths: Vec<Box<str>>,
    /// The services that gRPC's health service is asked about there.
    pub grpc: Vec<Box<str>>,
}

/// How many requests of one model the application gets at once, and how many wait for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Requests at once; `None`: found out from how long they take.
    pub limit: Option<u32>,
    /// Requests that may wait.
    pub queue: usize,
}

/// A port of the pod.
#[derive(Debug)]
pub struct WorkloadPort {
    /// Its number.
    pub port: u16,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// The application, as a cluster of one endpoint.
    pub cluster: Arc<Cluster>,
    /// The rule that leads to it.
    pub rule: Rule,
    /// Its requests are executed together.
    pub batch: Option<Batch>,
    /// Its requests that are the same are executed once.
    pub coalesce: Option<Coalesce>,
    /// How inputs are prepared.
    pub pipelines: Vec<Arc<Prepare>>,
}

/// Bounds on what is executed together; `None`: not bounded by it, or as the model server says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Rows.
    pub rows: Option<u32>,
    /// Bytes of the inputs.
    pub bytes: Option<u64>,
    /// Elements of the inputs.
    pub elements: Option<u64>,
    /// How long the first waits while the server is busy.
    pub delay: Option<Duration>,
    /// Batches in flight.
    pub concurrent: Option<u32>,
    /// The latency that the number of rows is adapted to.
    pub target: Option<Duration>,
}

/// What is executed once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Coalesce {
    /// Requests that are the same, while one of them is in flight.
    pub single_flight: bool,
    /// Already in the clients' sidecars.
    pub outbound: bool,
    /// Answers that are kept: how many bytes of them, and for how long.
    pub cache: Option<(u64, Duration)>,
    /// Requests of different clients may share.
    pub shared: bool,
    /// Every request has one answer.
    pub deterministic: bool,
    /// Headers that make a difference.
    pub headers: Vec<HeaderName>,
}
