//! Authorize: may this client ask that of the application? Between "authenticate" and "admit".
//!
//! In: a request or a connection, with whom its client proved to be. Out: nothing, if it may go on; or a [`Failure`] that
//! names the policy and the rule. What is decided is [`penstock_api::access`]; here the facts are gathered: the path in
//! its canonical form, which from here on is what everybody sees, and the model, which may stand in the body. That is
//! read only where a rule asks for it, since a client must not be able to hide it behind more than was looked at.
//!
//! Policies are those in force at that moment, so a change holds for the next request of every connection. Connections
//! whose bytes are not looked at are watched by [`revoked`], and end when they are no longer allowed.

mod model;
pub mod own;
mod probe;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;

use http::header::HOST;
use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Method, Request};
use http_body::Body;
use penstock_api::access::{Access, Arrival, Came, Decision, Entry, Facts, Http, Named, Why};
use penstock_api::v1::Protocol;
use penstock_api::{Reason, SpiffeId, path};

use crate::body::RequestBody;
use crate::config::{Probes, Rule, Workload};
use crate::connection::{Connection, To, plaintext_refused};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::telemetry::metric;
use crate::worker::Worker;
use crate::{headers, held};
use probe::Probe;

/// The way to the application for a request. Over a connection that is open for probes only, there is one for these.
pub fn way<'a>(to: &'a To, request: &http::request::Parts) -> Result<&'a Rule, Failure> {
    let To::Probes(workload, index) = to else { return to.rule() };
    let probes = &workload.probes[*index];
    if probes.kind(&request.method, &request.uri, &request.headers).is_some() {
        return Ok(&probes.port.rule);
    }
    Err(plaintext_refused(&workload.name))
}

/// What may pass to a port of our own pod as things are now: [`Arrival`] with the facts of this moment.
pub fn entry(worker: &Worker, to: &To, probed: bool, came: Came, proven: bool) -> Entry {
    let snapshot = worker.shared.store.snapshot();
    let arrival = Arrival {
        protocol: to.port().map(|port| port.protocol),
        came,
        proven,
        permissive: snapshot.workload.as_ref().is_some_and(|workload| workload.permissive),
        probed,
        denies_by_http: to
            .port()
            .zip(snapshot.access.as_ref())
            .is_some_and(|(port, access)| access.denies_by_http(port.port).is_some()),
    };
    arrival.entry()
}

/// Whether some request of this client might be allowed. Others are told nothing of the application's load.
pub fn may_ask_something(connection: &Connection) -> bool {
    let to = own::now(connection);
    let To::Application(workload, index) = &to else { return matches!(to, To::Static(_)) };
    let client = connection.client_id();
    let port = workload.ports[*index].port;
    let entry = entry(&connection.worker, &to, false, Came::Http, client.is_some());
    let snapshot = connection.worker.shared.store.snapshot();
    entry == Entry::Requests
        && snapshot.access.as_ref().is_some_and(|access| access.may_ask_something(client, port))
}

/// Whether the request may go on.
pub async fn authorize(
    connection: &Connection,
    to: &To,
    exchange: &Rc<Exchange>,
    authority: &Authority,
    request: &mut Request<RequestBody>,
) -> Result<(), Failure> {
    let (workload, index) = match to {
        To::Application(workload, index) => (workload, index),
        To::Probes(workload, index) => {
            return only_probe(&workload.probes[*index], &workload.name, request, exchange).await;
        }
        _ => {
            exchange.let_in();
            return Ok(());
        }
    };
    let port = workload.ports[*index].port;
    let access = {
        let snapshot = connection.worker.shared.store.snapshot();
        let Some(access) = &snapshot.access else { return Err(untold(&workload.name)) };
        Arc::clone(access)
    };
    if connection.client.is_none()
        && let Some(probes) = probed(workload, port, request)
    {
        return only_probe(probes, &workload.name, request, exchange).await;
    }
    if access.is_open() {
        exchange.let_in();
        return Ok(());
    }
    if access.looks_at_host() {
        // Between sidecars it stands in the target, and what the application gets is this, whatever else was said.
        let host = HeaderValue::from_str(authority.as_str()).ok();
        host.and_then(|host| request.headers_mut().insert(HOST, host));
    }
    let client = connection.client_id();
    if access.looks_at_paths() {
        headers::settle_path(request.uri_mut(), path::canonical)?;
    }
    // What only reports sees the same form, and lets the path pass as it came.
    let copied = match access.audits_paths() && !access.looks_at_paths() {
        true => match path::canonical(request.uri().path()) {
            Ok(Cow::Borrowed(_)) => None,
            Ok(Cow::Owned(path)) => Some(path),
            Err(_) => {
                // It has no canonical form, and only policies that report decide by paths.
                let facts = Facts { client, port, http: Some(http(request, None, &Named::Unknown)) };
                let decision =
                    Decision { would_deny: access.would_refuse_unclear(), ..access.decide(&facts) };
                judge(decision, &facts, exchange, &workload.name)?;
                exchange.let_in();
                return Ok(());
            }
        },
        false => None,
    };
    let named = if access.looks_at_models() || access.audits_models() {
        // What is allowed whatever the model need not wait for it.
        let facts = Facts { client, port, http: Some(http(request, copied.as_deref(), &Named::Unknown)) };
        let decision = access.decide(&facts);
        if decision.denied.is_none() && decision.would_deny.is_none() {
            exchange.let_in();
            return Ok(());
        }
        let patience = match decision.denied {
            Some(_) if access.looks_at_models() => Some(held::PATIENCE),
            // It is denied whatever the model.
            Some(_) => None,
            None => Some(model::GLANCE),
        };
        match patience {
            Some(patience) => Box::pin(model::of(request, copied.as_deref(), exchange, patience)).await,
            None => Named::Unknown,
        }
    } else {
        Named::No
    };
    let facts = Facts { client, port, http: Some(http(request, copied.as_deref(), &named)) };
    judge(access.decide(&facts), &facts, exchange, &workload.name)?;
    exchange.let_in();
    Ok(())
}

/// A request by whose head the kubelet may have sent it. A call of gRPC's health service names in its message what is asked
/// for, so that is read too.
async fn only_probe(
    probes: &Probes,
    pod: &str,
    request: &mut Request<RequestBody>,
    exchange: &Rc<Exchange>,
) -> Result<(), Failure> {
    match probes.kind(request.method(), request.uri(), request.headers()) {
        // The head of an HTTP/2 request need not say that a body follows.
        Some(Probe::Get) if request.body().is_end_stream() => Ok(()),
        Some(Probe::Health) => {
            let body = Box::pin(held::whole(exchange, request.body_mut(), probe::QUESTION)).await;
            let service = body.as_ref().and_then(|(body, _held)| probe::service(body));
            match service.is_some_and(|service| probes.grpc.iter().any(|known| **known == *service)) {
                true => Ok(()),
                false => Err(plaintext_refused(pod)),
            }
        }
        Some(Probe::Get) | None => Err(plaintext_refused(pod)),
    }
}

/// The model that a request asks for, with the whole of its body if it stands there; `copied`: its path in canonical form, if it has
/// another itself.
pub async fn model(
    request: &mut Request<RequestBody>,
    copied: Option<&str>,
    exchange: &Rc<Exchange>,
) -> Named {
    model::of(request, copied, exchange, held::PATIENCE).await
}

/// What is known of a request; `copied`: its path in canonical form, if it has another itself.
fn http<'a, B>(request: &'a Request<B>, copied: Option<&'a str>, named: &'a Named) -> Http<'a> {
    Http {
        method: request.method().as_str(),
        path: copied.unwrap_or_else(|| request.uri().path()),
        model: named.fact(),
        headers: request.headers(),
    }
}

/// Whether a connection whose bytes are not looked at may go on.
pub fn authorize_bytes(exchange: &Exchange, to: &To, client: Option<&SpiffeId>) -> Result<(), Failure> {
    let (workload, of) = match to {
        To::Application(workload, index) => (workload, &workload.ports[*index]),
        To::Probes(workload, _) => return Err(plaintext_refused(&workload.name)),
        _ => return Ok(()),
    };
    let access = exchange.worker.shared.store.snapshot().access.clone();
    let Some(access) = access else { return Err(untold(&workload.name)) };
    if let Some(failure) = bytes_refused(&exchange.worker, &access, to, client) {
        exchange.judged("denied");
        return Err(failure);
    }
    let would_deny = access.decide(&Facts { client, port: of.port, http: None }).would_deny;
    // Of a port that is declared opaque, a Deny that asks for HTTP keeps nobody out either.
    let found_out =
        || (of.protocol == Protocol::Detect).then(|| access.would_deny_by_http(of.port)).flatten();
    if let Some(why) = would_deny.or_else(found_out) {
        would_be_denied(&why, client, exchange, &workload.name);
    }
    Ok(())
}

/// Why bytes to a port of our own pod go no further, as things are now.
fn bytes_refused(worker: &Worker, access: &Access, to: &To, client: Option<&SpiffeId>) -> Option<Failure> {
    let To::Application(workload, index) = to else { return None };
    let port = workload.ports[*index].port;
    let facts = Facts { client, port, http: None };
    let why = match entry(worker, to, false, Came::Bytes, client.is_some()) {
        Entry::Bytes => access.decide(&facts).denied?,
        Entry::NotSecured => return Some(plaintext_refused(&workload.name)),
        _ => match access.denies_by_http(port) {
            Some(why) if workload.ports[*index].protocol == Protocol::Detect => why,
            _ => {
                let story = format!(
                    "port {port} of {} takes HTTP, and this is none; declare the port opaque (appProtocol: tcp) if it is to \
                     take bytes",
                    workload.name
                );
                return Some(Failure::unprocessed(Reason::NotAuthorized, story));
            }
        },
    };
    count(&why, "denied");
    Some(refusal(&why, &facts, &workload.name))
}

/// Waits until such a connection is no longer allowed: until a new one like it would be refused.
pub async fn revoked(worker: &Worker, to: &To, client: Option<&SpiffeId>) -> Failure {
    let To::Application(..) = to else { return std::future::pending().await };
    once_refused(worker, |access| {
        let renewed = to.renewed(worker);
        bytes_refused(worker, access, renewed.as_ref().unwrap_or(to), client)
    })
    .await
}

/// A request that has become a connection of bytes, as it was judged.
#[derive(Debug)]
pub struct Watched {
    client: Option<SpiffeId>,
    /// A port of our own pod.
    to: To,
    method: Method,
    /// In its canonical form, which nobody may have asked for when it was judged; `None`: it has none.
    path: Option<String>,
    headers: HeaderMap,
}

impl Watched {
    /// One that goes to a port of the pod.
    pub fn of<B>(
        connection: &Connection,
        to: &To,
        authority: &Authority,
        request: &Request<B>,
    ) -> Option<Self> {
        let To::Application(..) = to else { return None };
        let mut headers = request.headers().clone();
        let host = HeaderValue::from_str(authority.as_str()).ok();
        host.and_then(|host| headers.insert(HOST, host));
        Some(Self {
            client: connection.client_id().cloned(),
            to: to.clone(),
            method: request.method().clone(),
            path: path::canonical(request.uri().path()).ok().map(Cow::into_owned),
            headers,
        })
    }

    /// Waits until it is no longer allowed.
    pub async fn revoked(&self, exchange: &Exchange) -> Failure {
        let failure = once_refused(&exchange.worker, |access| self.refused(&exchange.worker, access)).await;
        exchange.judged("denied");
        failure
    }

    fn refused(&self, worker: &Worker, access: &Access) -> Option<Failure> {
        let renewed = self.to.renewed(worker);
        let to = renewed.as_ref().unwrap_or(&self.to);
        let (pod, port) = (&to.workload()?.name, to.port()?.port);
        if entry(worker, to, false, Came::Http, self.client.is_some()) == Entry::NotSecured {
            return Some(plaintext_refused(pod));
        }
        let Some(path) = self.path.as_deref().or((!access.looks_at_paths()).then_some("/")) else {
            let story = "servers read this path differently, and now a policy decides by it";
            return Some(Failure::unprocessed(Reason::NotAuthorized, story));
        };
        // As when it began: what becomes another protocol can say anything of models.
        let model = Named::Unknown;
        let http = Http { method: self.method.as_str(), path, model: model.fact(), headers: &self.headers };
        let facts = Facts { client: self.client.as_ref(), port, http: Some(http) };
        let why = access.decide(&facts).denied?;
        count(&why, "denied");
        Some(refusal(&why, &facts, pod))
    }
}

/// Waits until that is refused, which is asked again with each change of what is in force.
async fn once_refused(worker: &Worker, refused: impl Fn(&Access) -> Option<Failure>) -> Failure {
    let store = &worker.shared.store;
    let mut version = store.version();
    loop {
        version.borrow_and_update();
        // What was withdrawn altogether is not known to forbid anything: control may be about to start anew.
        let (access, told) = {
            let snapshot = store.snapshot();
            (snapshot.access.clone(), snapshot.workload.is_some())
        };
        if let Some(failure) = access.filter(|_| told).and_then(|access| refused(&access)) {
            return failure;
        }
        if version.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// What a decision means for the request.
fn judge(decision: Decision<'_>, facts: &Facts<'_>, exchange: &Exchange, pod: &str) -> Result<(), Failure> {
    if let Some(why) = decision.denied {
        exchange.judged("denied");
        count(&why, "denied");
        return Err(refusal(&why, facts, pod));
    }
    if let Some(why) = decision.would_deny {
        would_be_denied(&why, facts.client, exchange, pod);
    }
    Ok(())
}

fn would_be_denied(why: &Why<'_>, client: Option<&SpiffeId>, exchange: &Exchange, pod: &str) {
    exchange.judged("would-deny");
    count(why, "would-deny");
    tracing::debug!(pod, story = %why, client = client.map(SpiffeId::as_str), "would be denied");
}

fn count(why: &Why<'_>, verdict: &'static str) {
    metrics::counter!(metric::ACCESS.name, "policy" => why.policy().to_owned(), "verdict" => verdict)
        .increment(1);
}

fn refusal(why: &Why<'_>, facts: &Facts<'_>, pod: &str) -> Failure {
    let client = facts.client.map_or("a client without an identity", SpiffeId::as_str);
    Failure::unprocessed(Reason::NotAuthorized, format!("{client} to {pod}: {why}"))
}

fn untold(pod: &str) -> Failure {
    Failure::unprocessed(Reason::NoConfig, format!("control has not told {pod} yet who may call it"))
}

fn probed<'a, B: Body>(workload: &'a Workload, port: u16, request: &Request<B>) -> Option<&'a Probes> {
    let mut of_port = workload.probes.iter().filter(|probes| probes.port.port == port);
    of_port.find(|probes| match probes.kind(request.method(), request.uri(), request.headers()) {
        Some(Probe::Get) => request.body().is_end_stream(),
        Some(Probe::Health) => true,
        None => false,
    })
}
