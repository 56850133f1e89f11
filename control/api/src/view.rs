//! What control's HTTP API answers and the command line prints: JSON, one type a page.
//!
//! `GET /status`, `/stat`, `/routes`, `/endpoints` and `/problems` answer one object; `GET /tap` streams a
//! [`Tap`] object a line.

use serde::{Deserialize, Serialize};

/// `GET /status`: is everything where it should be?
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The version of the newest snapshot.
    pub snapshot: String,
    /// Every proxy that is or was lately connected.
    pub proxies: Vec<ProxyStatus>,
    /// What is wrong with the objects of the source.
    pub problems: Vec<Problem>,
    /// Seconds since control started.
    pub uptime_s: f64,
}

impl Status {
    /// Whether every connected proxy has acknowledged all it was sent of the newest snapshot.
    pub fn all_applied(&self) -> bool {
        self.proxies.iter().filter(|p| p.connected).all(|p| p.applied)
    }
}

/// One proxy, as control sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProxyStatus {
    /// `<namespace>/<pod>`.
    pub node: String,
    /// The SPIFFE id it proved.
    pub identity: String,
    /// Whether its configuration stream is open.
    pub connected: bool,
    /// Whether it has acknowledged everything that it subscribes to, at the newest version.
    pub applied: bool,
    /// Resources it holds, as it acknowledged them.
    pub resources: usize,
    /// Milliseconds from the newest snapshot to its acknowledgement; absent until it has acknowledged.
    pub applied_after_ms: Option<f64>,
    /// Resources it refused.
    pub refused: Vec<Refused>,
}

/// A resource that a proxy refused.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Refused {
    /// The type, without its URL prefix: `Weights`.
    pub kind: String,
    /// The proxy's reason, naming the resource.
    pub reason: String,
}

/// Something wrong in the source.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The file.
    pub file: String,
    /// The line, from 1; 0 when the whole file is meant.
    pub line: usize,
    /// `Service team-a/resnet`; empty when the file did not parse.
    pub object: String,
    /// What is wrong and what to do.
    pub message: String,
    /// Whether an earlier version of the object stays in force.
    pub last_good_in_force: bool,
}

/// `GET /stat?window=10s`: outcomes per Service and version.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stat {
    /// How far back the rows look, seconds.
    pub window_s: f64,
    /// Sorted by service, then backend.
    pub rows: Vec<StatRow>,
}

/// Outcomes of one Service and version, seen by its clients' proxies.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StatRow {
    /// `outbound` or `inbound`.
    pub direction: String,
    /// The Service that was asked for.
    pub service: String,
    /// The Service that the split chose.
    pub backend: String,
    /// Requests in the window.
    pub requests: u64,
    /// Requests a second.
    pub rps: f64,
    /// 0 to 1; absent without requests.
    pub success: Option<f64>,
    /// Share of the requests that went over mutual TLS, 0 to 1.
    pub mtls: Option<f64>,
    /// Retries in the window.
    pub retries: u64,
    /// Milliseconds to the response's headers.
    pub p50_ms: Option<f64>,
    /// As above.
    pub p95_ms: Option<f64>,
    /// As above.
    pub p99_ms: Option<f64>,
    /// The backend's share of the Service's requests, 0 to 1.
    pub share: Option<f64>,
    /// The share that the weights ask for, 0 to 1; absent without a split.
    pub share_asked: Option<f64>,
}

/// `GET /routes`: what matches and where it goes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RouteRow {
    /// The parent Service.
    pub service: String,
    /// The route and rule, `team-a/canary#0`.
    pub route: String,
    /// Its matches, in words.
    pub matches: String,
    /// The backend.
    pub backend: String,
    /// Its weight.
    pub weight: u32,
    /// Its share of the rule, 0 to 1.
    pub share: f64,
    /// How many connected proxies hold the rule at this version, of those that subscribe to it.
    pub applied: usize,
    /// How many connected proxies subscribe to it.
    pub subscribed: usize,
}

/// `GET /authz?pod=&from=&method=&path=&model=&port=&header=`: who may ask a pod for what.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Authz {
    /// `<namespace>/<pod>`.
    pub pod: String,
    /// Whether its proxy has applied them; absent: it is not connected.
    pub applied: Option<bool>,
    /// Rule by rule.
    pub policies: Vec<AuthzRow>,
    /// How much it gives, limit by limit.
    #[serde(default)]
    pub limits: Vec<LimitRow>,
    /// What would become of the request that was asked about.
    pub verdict: Option<Verdict>,
}

/// A rule of an access policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AuthzRow {
    /// `<namespace>/<name>`.
    pub policy: String,
    /// `Allow`, `Deny`, `Audit (Allow)` or `Audit (Deny)`.
    pub action: String,
    /// The ports that the policy is about, or `all`.
    pub ports: String,
    /// Its number and name; `none`: the policy has no rules.
    pub rule: String,
    /// Who, in words.
    pub from: String,
    /// What, in words.
    pub to: String,
    /// Further conditions, in words.
    pub when: String,
}

/// A limit of a RateLimit.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LimitRow {
    /// `<namespace>/<name>` of the RateLimit.
    pub policy: String,
    /// Which of its limits.
    pub limit: String,
    /// The ports that it is about, or `all`.
    pub ports: String,
    /// How much, in words.
    pub gives: String,
    /// To whom: `each identity, each model`, or `all together`.
    pub each: String,
    /// Of what, in words.
    pub of: String,
}

/// What would become of a request.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// It would reach the application.
    pub allowed: bool,
    /// By which rule, or why not.
    pub story: String,
    /// Why an Audit would deny it.
    pub would_deny: Option<String>,
}

/// `GET /endpoints`: the endpoints of each Service, joined by what the clients' proxies see.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EndpointRow {
    /// The Service.
    pub service: String,
    /// `<namespace>/<pod>` or the address.
    pub endpoint: String,
    /// `<ip>:<port>` that is dialled.
    pub address: String,
    /// The identity it must prove; empty: not in the mesh.
    pub identity: String,
    /// `ready`, `draining` or `ejected`, the worst that any proxy sees.
    pub state: String,
    /// Requests in flight to it, over all clients' proxies.
    pub in_flight: u64,
    /// The newest load report, if any.
    pub load: Option<Load>,
}

/// `GET /endpoints` of a proxy's admin, which control asks for over the fleet stream and joins into
/// [`EndpointRow`]: one row for each endpoint of each cluster that the proxy holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProxyEndpoint {
    /// The Service, `<namespace>/<name>`.
    pub service: String,
    /// The service port.
    pub port: u16,
    /// `<namespace>/<pod>` or the address.
    pub endpoint: String,
    /// `<ip>:<port>` that is dialled.
    pub address: String,
    /// The identity it must prove; empty: plaintext.
    pub identity: String,
    /// `ready`, `draining` or `ejected`.
    pub state: String,
    /// This proxy's requests in flight to it.
    pub in_flight: u64,
    /// The newest load report, if any.
    pub load: Option<Load>,
}

/// `POST /renew?node=`: one row for each proxy that was asked to renew its certificate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renewal {
    /// `<namespace>/<pod>`.
    pub node: String,
    /// Why it could not; absent when it did.
    pub error: Option<String>,
}

/// The body of every answer that is no success.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What went wrong and what to do, one sentence.
    pub error: String,
}

/// What an endpoint last reported of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Requests in flight at the endpoint, from all clients.
    pub in_flight: f64,
    /// Milliseconds that requests wait before they reach the application.
    pub queue_wait_ms: f64,
    /// Milliseconds until the work in flight there is done.
    #[serde(default)]
    pub backlog_ms: f64,
    /// The busy share of the server; 1 = never idle.
    #[serde(default)]
    pub utilization: f64,
    /// Requests a second.
    pub rps: f64,
    /// Errors a second.
    pub eps: f64,
    /// Milliseconds since the report.
    pub age_ms: f64,
    /// The report is too old to say anything: nothing is decided by it any more.
    #[serde(default)]
    pub expired: bool,
}

/// A certificate as `/certs` shows it. Times are seconds since the epoch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// The SPIFFE id, or the subject of an anchor.
    pub name: String,
    /// Hex.
    pub serial: String,
    /// Start of validity.
    pub not_before: i64,
    /// End of validity.
    pub not_after: i64,
    /// `leaf`, `intermediate` or `anchor`.
    pub role: String,
}

/// `GET /certs`: one row for each proxy that was asked, in the order of their names.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ProxyCertificates {
    /// `<namespace>/<pod>`.
    pub node: String,
    /// What it holds: its own certificate and the anchors that it verifies peers against.
    pub certificates: Vec<Certificate>,
    /// Why it could not tell; absent when it did.
    pub error: Option<String>,
}

/// `GET /tap?service=&direction=&limit=&explain=`: one live request a line.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tap {
    /// The proxy that saw it.
    pub proxy: String,
    /// `outbound` or `inbound`.
    pub direction: String,
    /// RFC 3339, microseconds.
    pub at: String,
    /// The caller's identity; empty: not proven.
    pub client: String,
    /// The server's identity; empty: not proven.
    pub server: String,
    /// The Service that was asked for.
    pub service: String,
    /// The Service that the split chose.
    pub backend: String,
    /// The route and rule.
    pub route: String,
    /// The endpoint.
    pub endpoint: String,
    /// The method.
    pub method: String,
    /// The authority.
    pub authority: String,
    /// The path, without query.
    pub path: String,
    /// The status.
    pub status: u16,
    /// Why the proxy answered itself; empty otherwise.
    pub reason: String,
    /// Response flags of the access log.
    pub flags: String,
    /// Milliseconds to the response's headers.
    pub headers_ms: f64,
    /// Milliseconds to the end of the response.
    pub total_ms: f64,
    /// Tries it took.
    pub tries: u32,
    /// Whether it went over mutual TLS.
    pub mtls: bool,
    /// Bytes of the request's body.
    pub request_bytes: u64,
    /// Bytes of the response's body.
    pub response_bytes: u64,
    /// How the endpoint of the last try was chosen, if that was asked for; only the client's proxy knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
}

/// How an endpoint was chosen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The policy.
    pub policy: String,
    /// Why the winner, in a word: `soonest-served`.
    pub why: String,
    /// Endpoints that there were.
    pub endpoints: u32,
    /// Those that were looked at, the best score first; if none was, the winner.
    pub candidates: Vec<Candidate>,
}

/// An endpoint that was looked at.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// `<namespace>/<pod>`.
    pub endpoint: String,
    /// It won.
    pub picked: bool,
    /// What decided, the least wins: milliseconds for `gpu` and `prefix`, requests in flight for `least-request`.
    pub score: Option<f64>,
    /// Milliseconds until the first byte, as predicted.
    pub predicted_ms: Option<f64>,
    /// Of that, for the request itself.
    pub own_ms: Option<f64>,
    /// Requests in flight, ours and others'.
    pub in_flight: f64,
    /// The age of the load report that this stands on; absent: only our own requests are known.
    pub report_age_ms: Option<f64>,
    /// Units of the request's work that it has already.
    pub matched: f64,
    /// `cold`, `hot` or `new`.
    pub heat: String,
    /// Looked at for the prompt or the key, not by the draw.
    pub affine: bool,
}
