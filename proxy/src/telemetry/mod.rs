//! What the proxy tells about the requests that pass: metrics, access log, traces, tap.
//!
//! The request path counts into [`Outcome`] cells and asks [`Telemetry::wants_details`] once a request, one relaxed
//! load. Only when somebody looks (the access log is on, a tap is open, traces are exported) does it keep
//! [`Details`] and hand them to [`Telemetry::finish`], which never waits: what cannot be taken at once is dropped
//! and counted.

pub mod counter;
pub mod decision;
pub mod ledger;
pub mod level;
pub mod log;
pub mod metric;
pub mod outcome;
pub mod page;
pub mod seldom;
pub mod shadow;
pub mod tap;
pub mod trace;

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use http::uri::{Authority, PathAndQuery};
use http::{HeaderMap, Method, Version};
use penstock_api::SpiffeId;
use penstock_api::v1::{Decision, Direction};
use tokio::sync::Notify;
use tokio::time::Instant;

pub use outcome::{End, Labels, Outcome, Outcomes};
pub use shadow::Shadows;

use ledger::{Ledger, Row};

/// Which requests get a line in the access log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLog {
    /// None.
    #[default]
    Off,
    /// Those that failed or that the proxy answered itself.
    Errors,
    /// All.
    All,
}

/// What to tell, and where.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Which requests get a line on standard output.
    pub access_log: AccessLog,
    /// Where spans go, `http://collector:4317`; `None`: no tracing.
    pub otlp: Option<String>,
    /// The share, 0 to 1, of requests that are traced when the caller has not decided.
    pub trace_sample: f64,
    /// `<namespace>/<pod>`, for spans.
    pub node: String,
    /// The service that spans belong to.
    pub service: String,
}

/// What is known of one request, for those who look at single requests.
#[derive(Clone, Debug)]
pub struct Details {
    /// When it began.
    pub at: SystemTime,
    /// Its method; `None` for bytes.
    pub method: Option<Method>,
    /// Whom it asked for.
    pub authority: Option<Authority>,
    /// Its path; the query is never shown.
    pub path: Option<PathAndQuery>,
    /// Its version; `None` for bytes.
    pub version: Option<Version>,
    /// The caller's identity, where it was proven.
    pub client: Option<SpiffeId>,
    /// The server's identity, where it was proven.
    pub server: Option<SpiffeId>,
    /// Our span.
    pub trace: Option<trace::Span>,
    /// The span of what was executed for it and for others, or of the request whose answer it shares.
    pub executed: Option<trace::Span>,
    /// Flags beyond the reason's own, comma-separated; empty: none.
    pub flags: &'static str,
    /// `denied` or `would-deny`, where access policies said so.
    pub verdict: &'static str,
    /// How the endpoint of the last try was chosen, if somebody asked.
    pub decision: Option<Box<Decision>>,
}

impl Details {
    /// Of something that begins now, from a client; the rest is not known, or not there.
    pub fn of(client: Option<&SpiffeId>) -> Self {
        Self {
            at: SystemTime::now(),
            method: None,
            authority: None,
            path: None,
            version: None,
            client: client.cloned(),
            server: None,
            trace: None,
            executed: None,
            flags: "",
            verdict: "",
            decision: None,
        }
    }
}

/// Why telemetry cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The address of the collector is of no use.
    #[error("spans cannot be sent to {endpoint:?}: {error}; write the address as http://host:4317")]
    Otlp {
        /// As given.
        endpoint: String,
        /// Why.
        error: String,
    },
    /// No thread for the access log.
    #[error("the access log cannot start: {0}")]
    Log(std::io::Error),
}

/// The word for a direction.
pub const fn direction_word(direction: Direction) -> &'static str {
    match direction {
        Direction::Outbound => "outbound",
        Direction::Inbound => "inbound",
    }
}

const OUTBOUND: u8 = 1;
const INBOUND: u8 = 2;
/// Somebody wants choices explained.
const EXPLAINED: u8 = 4;

const fn bit(direction: Direction) -> u8 {
    match direction {
        Direction::Outbound => OUTBOUND,
        Direction::Inbound => INBOUND,
    }
}

/// All telemetry of the process.
#[derive(Debug)]
pub struct Telemetry {
    /// The cells that the request path counts into.
    pub outcomes: Outcomes,
    /// The same for copies of requests.
    pub shadows: Shadows,
    /// Directions whose requests somebody looks at, and whether choices are to be explained, as bits.
    wanted: AtomicU8,
    /// Directions that are wanted whether or not a tap is open.
    always: u8,
    access_log: AccessLog,
    log: Option<log::Writer>,
    traces: Option<trace::Exporter>,
    taps: tap::Taps,
    ledger: Mutex<Ledger>,
    page: page::Cache,
    /// A request of the application's own has failed since that was last heard.
    failed: Notify,
}

impl Telemetry {
    /// Starts what the options ask for. With `otlp` it must be called inside the control runtime, which then carries
    /// the connection to the collector.
    pub fn new(options: &Options) -> Result<Self, TelemetryError> {
        page::install_recorder();
        let log = match options.access_log {
            AccessLog::Off => None,
            _ => Some(log::Writer::start(std::io::stdout()).map_err(TelemetryError::Log)?),
        };
        let traces = options.otlp.as_deref().map(|url| trace::Exporter::new(url, options)).transpose()?;
        // A line about an error is of little use without method and path, and nobody knows beforehand who will fail.
        let all = options.access_log != AccessLog::Off || traces.is_some();
        let always = if all { OUTBOUND | INBOUND } else { 0 };
        Ok(Self {
            outcomes: Outcomes::default(),
            shadows: Shadows::default(),
            wanted: AtomicU8::new(always),
            always,
            access_log: options.access_log,
            log,
            traces,
            taps: tap::Taps::default(),
            ledger: Mutex::default(),
            page: page::Cache::default(),
            failed: Notify::new(),
        })
    }

    /// Whether somebody looks at single requests of this direction.
    pub fn wants_details(&self, direction: Direction) -> bool {
        self.wanted.load(Relaxed) & bit(direction) != 0
    }

    /// Whether somebody wants to know how endpoints are chosen.
    pub fn wants_decisions(&self) -> bool {
        self.wanted.load(Relaxed) & EXPLAINED != 0
    }

    /// A span for a request, child of what its headers say; `None` when nothing is traced, and the headers pass as
    /// they are.
    pub fn start_span(&self, headers: &HeaderMap, rng: &mut impl rand::Rng) -> Option<trace::Span> {
        let traces = self.traces.as_ref()?;
        Some(trace::Span::start(headers, traces.sample, rng))
    }

    /// Tells of an execution that is over, if somebody recorded a request that it answered.
    pub fn executed(&self, execution: &trace::Execution<'_>) {
        if let Some(traces) = &self.traces {
            traces.executed(execution);
        }
    }

    /// Tells of a request that is over. Call it after [`Outcome::finish`] for requests whose details were kept, and
    /// for those that failed. Never waits.
    pub fn finish(&self, labels: &Labels, end: &End, details: Option<Details>) {
        if let Some(details) = &details {
            self.taps.offer(labels, end, details);
            if let (Some(traces), Some(span)) = (&self.traces, &details.trace)
                && span.sampled
            {
                traces.export(span, labels, end, details);
            }
        }
        let logged = match self.access_log {
            AccessLog::Off => false,
            AccessLog::Errors => end.failed || end.reason.is_some(),
            AccessLog::All => true,
        };
        if let (true, Some(log)) = (logged, &self.log) {
            let at = details.as_ref().map_or_else(|| SystemTime::now() - end.total, |details| details.at);
            log.offer(log::Line { at, labels: labels.clone(), end: *end, details });
        }
    }

    /// Says that a request of the application's own has failed: whoever waits for it hurries.
    pub fn request_failed(&self) {
        self.failed.notify_one();
    }

    /// Waits until one has failed, at once if one has since the last call.
    pub async fn failure(&self) {
        self.failed.notified().await;
    }

    /// Opens a tap, or replaces the one of the same number.
    pub fn open_tap(&self, tap: tap::Tap) {
        let wanted = self.taps.open(tap);
        self.wanted.store(self.always | wanted, Relaxed);
    }

    /// Closes a tap; all of them with `None`.
    pub fn close_tap(&self, number: Option<u64>) {
        let wanted = self.taps.close(number);
        self.wanted.store(self.always | wanted, Relaxed);
    }

    /// What happened since the last call, one row for each combination that saw traffic or has requests in flight.
    pub fn take_rows(&self) -> Vec<Row> {
        self.ledger().take(&self.outcomes)
    }

    /// The Prometheus page; at most a second old.
    pub fn page(&self, now: Instant) -> bytes::Bytes {
        self.page.get(now, || {
            let mut ledger = self.ledger();
            ledger.read(&self.outcomes);
            let mut page = page::render(&ledger.totals(), &page::process());
            self.shadows.render(&mut page);
            page
        })
    }

    /// Writes out what waits: the access log's lines, the spans. Blocks for at most `limit` each; for the end of the
    /// process, off the workers.
    pub fn flush(&self, limit: Duration) {
        if let Some(log) = &self.log {
            log.flush(limit);
        }
        if let Some(traces) = &self.traces {
            traces.shutdown(limit);
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // A panic while holding it loses a few counts at worst.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
