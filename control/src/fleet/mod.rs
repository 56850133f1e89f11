//! Every proxy that is or was lately connected: its configuration stream, what it saw, and how to ask it.
//!
//! In: streams that open and close, outcomes, answers. Out: what `/status`, `/stat`, `/tap` and the rotation of
//! roots want to know. A proxy has at most one stream of each kind; a newer one takes the older one's place, because
//! the older belongs to a connection that died unnoticed. A proxy that has been gone for ten minutes is forgotten.

mod attach;
pub mod seen;
mod tally;
mod tap;
mod window;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use penstock_api::resource::Kind;
use penstock_api::v1::{self, ControlMessage, ask, control_message};
use penstock_api::view::ProxyStatus;
use penstock_api::{SpiffeId, view};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::push::{Published, Stream};
use crate::snapshot::Snapshot;

pub use attach::FleetService;
pub use seen::{Pair, Seen};
pub use tally::{Tallies, Tally};
use tap::Taps;
pub use tap::{Tap, TapFilter};
use window::Window;
pub use window::{Total, Totals};

/// A proxy that has been gone for so long will not come back under its name.
const FORGET: Duration = Duration::from_secs(600);

/// All proxies.
#[derive(Debug, Default)]
pub struct Fleet {
    proxies: Mutex<BTreeMap<String, Proxy>>,
    taps: Taps,
    sessions: AtomicU64,
    questions: AtomicU64,
}

/// One proxy.
#[derive(Debug)]
struct Proxy {
    identity: SpiffeId,
    config: Option<Session<Arc<Mutex<Stream>>>>,
    attached: Option<Session<mpsc::Sender<ControlMessage>>>,
    pending: BTreeMap<u64, oneshot::Sender<Result<String, String>>>,
    window: Window,
    last_seen: Instant,
}

/// A stream, told apart from the one that takes its place.
#[derive(Debug)]
struct Session<T> {
    id: u64,
    stream: T,
}

/// What a proxy can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// Its endpoints.
    Endpoints,
    /// Its configuration.
    Config,
    /// Its certificates.
    Certificates,
    /// To renew its certificate now.
    Renew,
}

/// A proxy that could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// Not there.
    #[error("{0} is not attached; `penstock status` lists the proxies that are")]
    Gone(String),
    /// Too busy to listen or to answer.
    #[error("{node} did not answer within {after:?}; its log may say why")]
    Late {
        /// The proxy.
        node: String,
        /// How long it had.
        after: Duration,
    },
    /// It answered that it cannot.
    #[error("{node} could not answer: {reason}")]
    Refused {
        /// The proxy.
        node: String,
        /// In its words.
        reason: String,
    },
}

/// Locks what no panic can leave half-changed: every critical section here is a few assignments.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Fleet {
    fn session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    fn with<R>(&self, node: &str, identity: &SpiffeId, now: Instant, f: impl FnOnce(&mut Proxy) -> R) -> R {
        let mut proxies = lock(&self.proxies);
        let proxy = proxies.entry(node.to_owned()).or_insert_with(|| Proxy {
            identity: identity.clone(),
            config: None,
            attached: None,
            pending: BTreeMap::new(),
            window: Window::default(),
            last_seen: now,
        });
        proxy.identity = identity.clone();
        proxy.last_seen = now;
        f(proxy)
    }

    /// A configuration stream has opened; the number tells it apart when it closes.
    pub fn configured(
        &self,
        node: &str,
        identity: &SpiffeId,
        stream: Arc<Mutex<Stream>>,
        now: Instant,
    ) -> u64 {
        let id = self.session();
        self.with(node, identity, now, |proxy| proxy.config = Some(Session { id, stream }));
        id
    }

    /// A configuration stream has closed.
    pub fn unconfigured(&self, node: &str, session: u64, now: Instant) {
        if let Some(proxy) = lock(&self.proxies).get_mut(node) {
            proxy.last_seen = now;
            proxy.config.take_if(|config| config.id == session);
        }
    }

    fn attached(
        &self,
        node: &str,
        identity: &SpiffeId,
        sender: mpsc::Sender<ControlMessage>,
        now: Instant,
    ) -> u64 {
        let id = self.session();
        for start in self.taps.starts() {
            // A fresh channel has room for the few taps that are open.
            if sender.try_send(start).is_err() {
                break;
            }
        }
        self.with(node, identity, now, |proxy| {
            proxy.attached = Some(Session { id, stream: sender });
            proxy.pending.clear();
        });
        id
    }

    fn detached(&self, node: &str, session: u64, now: Instant) {
        if let Some(proxy) = lock(&self.proxies).get_mut(node) {
            proxy.last_seen = now;
            if proxy.attached.take_if(|attached| attached.id == session).is_some() {
                proxy.pending.clear();
            }
        }
    }

    fn outcomes(&self, node: &str, outcomes: v1::Outcomes, now: Instant) {
        if let Some(proxy) = lock(&self.proxies).get_mut(node) {
            proxy.window.add(outcomes, now);
        }
    }

    fn answered(&self, node: &str, answer: v1::Answer) {
        let waiting =
            lock(&self.proxies).get_mut(node).and_then(|proxy| proxy.pending.remove(&answer.request));
        if let Some(waiting) = waiting {
            let result = if answer.error.is_empty() { Ok(answer.json) } else { Err(answer.error) };
            // Whoever asked may have given up.
            drop(waiting.send(result));
        }
    }

    /// Asks a proxy, and waits for its answer at most `patience`.
    pub async fn ask(&self, node: &str, question: Question, patience: Duration) -> Result<String, AskError> {
        let request = self.questions.fetch_add(1, Ordering::Relaxed);
        let what = match question {
            Question::Endpoints => ask::What::Endpoints(true),
            Question::Config => ask::What::Config(true),
            Question::Certificates => ask::What::Certificates(true),
            Question::Renew => ask::What::Renew(true),
        };
        let message =
            ControlMessage { kind: Some(control_message::Kind::Ask(v1::Ask { request, what: Some(what) })) };
        let gone = || AskError::Gone(node.to_owned());
        let late = || AskError::Late { node: node.to_owned(), after: patience };
        let answer = {
            let mut proxies = lock(&self.proxies);
            let proxy = proxies.get_mut(node).ok_or_else(gone)?;
            let attached = proxy.attached.as_ref().ok_or_else(gone)?;
            attached.stream.try_send(message).map_err(|_| late())?;
            let (sender, answer) = oneshot::channel();
            proxy.pending.insert(request, sender);
            answer
        };
        let result = tokio::time::timeout(patience, answer).await;
        if let Some(proxy) = lock(&self.proxies).get_mut(node) {
            proxy.pending.remove(&request);
        }
        match result {
            Ok(Ok(Ok(json))) => Ok(json),
            Ok(Ok(Err(reason))) => Err(AskError::Refused { node: node.to_owned(), reason }),
            Ok(Err(_)) => Err(gone()),
            Err(_) => Err(late()),
        }
    }

    /// Asks every attached proxy at once.
    pub async fn ask_all(
        &self,
        question: Question,
        patience: Duration,
    ) -> Vec<(String, Result<String, AskError>)> {
        let nodes = self.attached_nodes();
        let asked = nodes.iter().map(|node| self.ask(node, question, patience));
        let answers = futures_util::future::join_all(asked).await;
        nodes.into_iter().zip(answers).collect()
    }

    /// The proxies that can be asked.
    pub fn attached_nodes(&self) -> Vec<String> {
        let proxies = lock(&self.proxies);
        proxies.iter().filter(|(_, proxy)| proxy.attached.is_some()).map(|(node, _)| node.clone()).collect()
    }

    /// Opens a tap: proxies begin to tell of requests that fit the filter, until it is dropped.
    pub fn tap(self: &Arc<Self>, filter: TapFilter) -> Tap {
        let (tap, start) = self.taps.open(self, filter);
        self.broadcast(&start);
        tap
    }

    fn broadcast(&self, message: &ControlMessage) {
        for proxy in lock(&self.proxies).values() {
            if let Some(attached) = &proxy.attached {
                // A proxy that does not read its messages misses a tap; it will be cut soon.
                drop(attached.stream.try_send(message.clone()));
            }
        }
    }

    /// Forgets proxies that have been gone for ten minutes.
    pub fn forget(&self, now: Instant) {
        lock(&self.proxies).retain(|_, proxy| {
            proxy.config.is_some()
                || proxy.attached.is_some()
                || now.saturating_duration_since(proxy.last_seen) < FORGET
        });
    }

    /// How many configuration streams are open.
    pub fn connected(&self) -> usize {
        lock(&self.proxies).values().filter(|proxy| proxy.config.is_some()).count()
    }

    /// Every proxy as `/status` shows it.
    pub fn status(&self, published: &Published) -> Vec<ProxyStatus> {
        let proxies = lock(&self.proxies);
        let row = |(node, proxy): (&String, &Proxy)| {
            let mut row = ProxyStatus {
                node: node.clone(),
                identity: proxy.identity.to_string(),
                ..ProxyStatus::default()
            };
            if let Some(config) = &proxy.config {
                let stream = lock(&config.stream);
                row.connected = true;
                row.applied = stream.applied(&published.snapshot);
                row.resources = stream.resources();
                row.applied_after_ms =
                    stream.applied_after(published.sequence).map(|after| after.as_secs_f64() * 1e3);
                row.refused = stream.refused();
            }
            row
        };
        proxies.iter().map(row).collect()
    }

    /// For each resource of a kind that any connected proxy wants: how many hold it as it is in `snapshot`, and
    /// how many want it.
    pub fn holders(&self, kind: Kind, snapshot: &Snapshot) -> BTreeMap<String, (usize, usize)> {
        let mut holders: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for config in lock(&self.proxies).values().filter_map(|proxy| proxy.config.as_ref()) {
            for (name, held) in lock(&config.stream).held(kind, snapshot) {
                let count = holders.entry(name.to_owned()).or_default();
                count.0 += usize::from(held);
                count.1 += 1;
            }
        }
        holders
    }

    /// Of the connected proxies: how many there are, and how many acknowledged `version` of a resource.
    pub fn acknowledged(&self, kind: Kind, name: &str, version: &str) -> (usize, usize) {
        let proxies = lock(&self.proxies);
        let streams = proxies.values().filter_map(|proxy| proxy.config.as_ref());
        streams.fold((0, 0), |(connected, acknowledged), config| {
            let held = lock(&config.stream).acknowledged(kind, name) == Some(version);
            (connected + 1, acknowledged + usize::from(held))
        })
    }

    /// What all proxies saw in the last `window`, and over how long that really is.
    pub fn totals(&self, window: Duration, now: Instant) -> (Totals, Duration) {
        let mut totals = Totals::default();
        let mut covered = Duration::from_secs(1);
        for proxy in lock(&self.proxies).values() {
            covered = covered.max(proxy.window.sum_into(&mut totals, window, now));
        }
        (totals, covered.min(window))
    }

    /// What clients' proxies saw of some Services in the last `window`, of which five minutes are known.
    pub fn seen(&self, services: &[String], window: Duration, now: Instant) -> Seen {
        let mut seen = Seen::default();
        for proxy in lock(&self.proxies).values() {
            proxy.window.see_into(&mut seen, services, window, now);
        }
        seen
    }

    fn tapped(&self, node: &str, event: v1::TapEvent) {
        self.taps.deliver(node, event);
    }
}

/// The word of a direction in views.
pub fn direction_word(direction: v1::Direction) -> &'static str {
    match direction {
        v1::Direction::Outbound => "outbound",
        v1::Direction::Inbound => "inbound",
    }
}

/// What a proxy saw of one request, as `/tap` shows it.
fn tap_view(node: &str, event: v1::TapEvent) -> view::Tap {
    let direction = direction_word(event.direction());
    let ms = |us: u64| us as f64 / 1e3;
    view::Tap {
        proxy: node.to_owned(),
        direction: direction.to_owned(),
        at: tap::rfc3339(event.at_us),
        client: event.client,
        server: event.server,
        service: event.service,
        backend: event.backend,
        route: event.route,
        endpoint: event.endpoint,
        method: event.method,
        authority: event.authority,
        path: event.path,
        status: u16::try_from(event.status).unwrap_or_default(),
        reason: event.reason,
        flags: event.flags,
        headers_ms: ms(event.headers_us),
        total_ms: ms(event.total_us),
        tries: event.tries,
        mtls: event.mtls,
        request_bytes: event.request_bytes,
        response_bytes: event.response_bytes,
        decision: event.decision.map(decision_view),
    }
}

fn decision_view(decision: v1::Decision) -> view::Decision {
    let mut candidates: Vec<_> = decision.candidates.into_iter().map(candidate_view).collect();
    let score = |candidate: &view::Candidate| candidate.score.unwrap_or(f64::INFINITY);
    candidates.sort_by(|a, b| score(a).total_cmp(&score(b)));
    view::Decision { policy: decision.policy, why: decision.why, endpoints: decision.endpoints, candidates }
}

fn candidate_view(candidate: v1::Candidate) -> view::Candidate {
    view::Candidate {
        endpoint: candidate.endpoint,
        picked: candidate.picked,
        score: candidate.score.map(f64::from),
        predicted_ms: candidate.predicted_ms.map(f64::from),
        own_ms: candidate.own_ms.map(f64::from),
        in_flight: candidate.in_flight.into(),
        report_age_ms: candidate.report_age_ms.map(f64::from),
        matched: candidate.matched.into(),
        heat: candidate.heat,
        affine: candidate.affine,
    }
}
