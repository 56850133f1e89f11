//! Limit: has this client, or have all together, asked for more than they get? Between "authorize" and "admit".
//!
//! In: a request that may be asked, and the limits in force ([`Rates`], compiled from what control pushes). Out: what it holds of
//! them until its exchange ends ([`Held`]); or a [`Failure`] that says which limit it is, who is counted, and when to come again.
//!
//! | | decides | pure |
//! | --- | --- | --- |
//! | [`penstock_api::access::RateLimit`] | which limits count a request, and under which key | yes |
//! | [`bucket`] | whether there is one left, and when there will be | yes |
//! | [`table`] | where a key is counted; there is an end of them | yes |
//! | [`held`] | what the answer used | yes |
//!
//! A request is within all limits that count it, or it takes from none. Other than a queue ([`crate::admission`]) a limit lets nobody
//! wait: it is for who asks for too much, not for what is too busy.

pub mod bucket;
pub mod held;
pub mod table;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use ahash::RandomState;
use http::header::{ACCEPT_ENCODING, HOST};
use http::uri::Authority;
use http::{HeaderValue, Method, Request};
use metrics::Counter;
use penstock_api::access::{Facts, Http, Key, Named, Rate, RateLimit};
use penstock_api::{Reason, SpiffeId, path, v1};
use penstock_inference::openai;

use self::bucket::Pace;
pub use self::held::Held;
use self::table::{At, PLACES, Table};
use crate::access;
use crate::body::RequestBody;
use crate::connection::{Connection, To};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::telemetry::metric;

/// How long is waited where nobody knows when a request ends.
const WHEN_ONE_ENDS: Duration = Duration::from_secs(1);

/// The limits of our pod.
#[derive(Debug, Default)]
pub struct Rates {
    limits: Vec<Arc<Limit>>,
    looks_at_host: bool,
    looks_at_paths: bool,
}

/// One limit, with what is left of it.
#[derive(Debug)]
pub struct Limit {
    rule: RateLimit,
    requests: Option<Pace>,
    tokens: Option<Pace>,
    table: Table,
    /// Requests that it refused, and tokens that it has counted.
    refused: Counter,
    used: Counter,
}

/// Of what there is no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Requests,
    Concurrent,
    Tokens,
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Refusal {
    what: What,
    wait: Duration,
}

impl Refusal {
    /// The value of `retry-after`.
    fn seconds(self) -> u64 {
        self.wait.as_secs() + u64::from(self.wait.subsec_nanos() > 0 || self.wait.is_zero())
    }
}

impl Limit {
    fn new(rule: RateLimit) -> Self {
        let labels = [("policy", rule.policy.to_string()), ("limit", rule.name.to_string())];
        Self {
            refused: metrics::counter!(metric::RATE_LIMITED.name, &labels),
            used: metrics::counter!(metric::RATE_TOKENS.name, &labels),
            requests: rule.requests.map(Pace::new),
            tokens: rule.tokens.map(Pace::new),
            table: Table::new(rule.by.is_said()),
            rule,
        }
    }

    fn find(&self, key: &Key<'_>, hasher: &RandomState, now: Duration) -> At {
        self.table.find(hasher.hash_one(key), now)
    }

    /// Whether a request holds its place until it ends.
    fn is_held(&self) -> bool {
        self.rule.concurrent.is_some() || self.tokens.is_some()
    }

    /// Takes one request; `uses_tokens`: it may use tokens, so there have to be some.
    fn take(&self, at: At, uses_tokens: bool, now: Duration) -> Result<(), Refusal> {
        let place = self.table.get(at);
        if let Some(tokens) = self.tokens.as_ref().filter(|_| uses_tokens) {
            place.tokens.check(tokens, now).map_err(|wait| Refusal { what: What::Tokens, wait })?;
        }
        if self.is_held() && !place.enter(self.rule.concurrent.unwrap_or(u32::MAX)) {
            return Err(Refusal { what: What::Concurrent, wait: WHEN_ONE_ENDS });
        }
        let requests = self.requests.as_ref().map_or(Ok(()), |requests| place.requests.take(requests, now));
        requests.map_err(|wait| {
            if self.is_held() {
                place.leave();
            }
            Refusal { what: What::Requests, wait }
        })
    }

    /// Puts back a request that another limit refused. What it held its place leaves by itself.
    fn give_back(&self, at: At) {
        if let Some(requests) = &self.requests {
            self.table.get(at).requests.give_back(requests);
        }
    }

    /// What it gives, in words.
    fn gives(&self, what: What) -> String {
        let rate = |rate: Option<Rate>, of: &str| {
            let Some(Rate { count, period, burst }) = rate else { return String::new() };
            let unit = if period == Duration::from_secs(1) { "s" } else { "min" };
            format!("{count} {of}/{unit} and {burst} at once")
        };
        match what {
            What::Requests => rate(self.rule.requests, "requests"),
            What::Tokens => rate(self.rule.tokens, "tokens"),
            What::Concurrent => format!("{} requests at a time", self.rule.concurrent.unwrap_or_default()),
        }
    }

    /// What happened, to whom, because of what; what to do.
    fn refuse(&self, refusal: Refusal, whom: &str, at: At) -> Failure {
        let (policy, name) = (&self.rule.policy, &self.rule.name);
        self.refused.increment(1);
        let others = match self.table.is_shared(at) {
            true => format!(" and all others beyond the {PLACES} that it tells apart"),
            false => String::new(),
        };
        let (gives, seconds) = (self.gives(refusal.what), refusal.seconds());
        let story = format!(
            "limit {name} of RateLimit {policy} gives {whom}{others} {gives}, and that is used up here; come again in {seconds} s"
        );
        Failure { retry_after: seconds, ..Failure::unprocessed(Reason::RateLimited, story) }
    }
}

impl Rates {
    /// Compiles what control pushed. A limit that is as it was before goes on with what is left of it. The error says what this proxy
    /// does not understand.
    pub fn compile(from: &v1::Access, before: &Self) -> Result<Self, String> {
        let limit = |from| {
            let rule = RateLimit::compile(from)?;
            let known = before.limits.iter().find(|limit| limit.rule == rule);
            Ok(known.cloned().unwrap_or_else(|| Arc::new(Limit::new(rule))))
        };
        let limits = from.limits.iter().map(limit).collect::<Result<Vec<_>, String>>()?;
        Ok(Self {
            looks_at_host: limits.iter().any(|limit| limit.rule.looks_at_host()),
            looks_at_paths: limits.iter().any(|limit| limit.rule.looks_at_paths()),
            limits,
        })
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.limits.is_empty()
    }

    /// Whether a limit counts a request or not, or somewhere else, depending on which model it asks for.
    fn ask_for_model(&self, facts: &Facts<'_>) -> bool {
        self.limits.iter().any(|limit| limit.rule.looks_at_models() && limit.rule.counts(facts).is_some())
    }

    /// Takes a request from all limits that count it, or from none.
    fn take(
        &self,
        facts: &Facts<'_>,
        uses_tokens: bool,
        hasher: &RandomState,
        now: Duration,
    ) -> Result<Held, Failure> {
        let mut held = Held::default();
        for (index, limit) in self.limits.iter().enumerate() {
            let Some(key) = limit.rule.counts(facts) else { continue };
            let at = limit.find(&key, hasher, now);
            if let Err(refusal) = limit.take(at, uses_tokens, now) {
                for taken in self.limits.iter().take(index).filter(|taken| taken.requests.is_some()) {
                    if let Some(key) = taken.rule.counts(facts) {
                        taken.give_back(taken.find(&key, hasher, now));
                    }
                }
                return Err(limit.refuse(refusal, &key.to_string(), at));
            }
            if limit.is_held() {
                held.push(limit, at);
            }
        }
        if uses_tokens {
            held.counts_tokens();
        }
        Ok(held)
    }
}

/// Counts a request, if it is within its limits.
pub async fn limit(
    connection: &Connection,
    to: &To,
    exchange: &Rc<Exchange>,
    authority: &Authority,
    request: &mut Request<RequestBody>,
) -> Result<(), Failure> {
    // The kubelet's probes are past policies, and so past limits.
    let To::Application(workload, index) = to else { return Ok(()) };
    let shared = &connection.worker.shared;
    let rates = match &shared.store.snapshot().rates {
        rates if rates.is_empty() || !exchange.is_let_in() => return Ok(()),
        rates => Arc::clone(rates),
    };
    if rates.looks_at_host {
        // As for policies: what the application gets is what is judged.
        let host = HeaderValue::from_str(authority.as_str()).ok();
        host.and_then(|host| request.headers_mut().insert(HOST, host));
    }
    // What has no canonical form may be any path, and counts as what has none.
    let copied = match rates.looks_at_paths.then(|| path::canonical(request.uri().path())) {
        None | Some(Ok(Cow::Borrowed(_))) => None,
        Some(Ok(Cow::Owned(path))) => Some(path),
        Some(Err(_)) => Some(String::new()),
    };
    let (client, port) = (connection.client_id(), workload.ports[*index].port);
    let asks = rates.ask_for_model(&facts(request, copied.as_deref(), &Named::Unknown, client, port));
    let named = match asks {
        true => Box::pin(access::model(request, copied.as_deref(), exchange)).await,
        false => Named::Unknown,
    };
    let path = copied.as_deref().unwrap_or_else(|| request.uri().path());
    let uses_tokens =
        *request.method() == Method::POST && (path.is_empty() || openai::Api::of_path(path).is_some());
    let facts = facts(request, copied.as_deref(), &named, client, port);
    let held = rates.take(&facts, uses_tokens, &shared.hasher, connection.worker.now());
    let held = held.map_err(|failure| Failure {
        story: format!(
            "{} to {}: {}",
            client.map_or("a client without an identity", SpiffeId::as_str),
            workload.name,
            failure.story
        )
        .into(),
        ..failure
    })?;
    if held.is_counted() {
        // So that it comes in a form that can be read.
        request.headers_mut().remove(ACCEPT_ENCODING);
    }
    if !held.is_empty() {
        exchange.holds(held);
    }
    Ok(())
}

fn facts<'a>(
    request: &'a Request<RequestBody>,
    copied: Option<&'a str>,
    named: &'a Named,
    client: Option<&'a SpiffeId>,
    port: u16,
) -> Facts<'a> {
    let http = Http {
        method: request.method().as_str(),
        path: copied.unwrap_or_else(|| request.uri().path()),
        model: named.fact(),
        headers: request.headers(),
    };
    Facts { client, port, http: Some(http) }
}
