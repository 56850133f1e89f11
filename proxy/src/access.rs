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
#[cfg(test)]
mod tests;

use std::rc::Rc;
use std::sync::Arc;

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, Method, Request, uri};
use penstock_api::access::{Access, Facts, Http, Named, Why};
use penstock_api::v1::Protocol;
use penstock_api::{Reason, SpiffeId, path};

use crate::body::RequestBody;
use crate::config::{Rule, Workload};
use crate::connection::{Connection, To, plaintext_refused};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers;
use crate::telemetry::metric;
use crate::worker::Worker;

/// The way to the application for a request. Over a connection that is open for probes only, there is one for these.
pub fn way<'a>(connection: &'a Connection, request: &http::request::Parts) -> Result<&'a Rule, Failure> {
    let To::Probes(workload, index) = &connection.to else { return connection.to.rule() };
    let probes = &workload.probes[*index];
    if probes.is_one(&request.method, &request.uri, &request.headers) {
        return Ok(&probes.port.rule);
    }
    Err(plaintext_refused(&workload.name))
}

/// Whether the request may go on.
pub async fn authorize(
    connection: &Connection,
    exchange: &Rc<Exchange>,
    request: &mut Request<RequestBody>,
) -> Result<(), Failure> {
    let To::Application(workload, index) = &connection.to else { return Ok(()) };
    let port = workload.ports[*index].port;
    let access = {
        let snapshot = connection.worker.shared.store.snapshot();
        let Some(access) = &snapshot.access else { return Err(untold(&workload.name)) };
        if connection.client.is_none() {
            if is_probe(workload, port, request) {
                return Ok(());
            }
            // The pod may have become strict since the connection was opened.
            if snapshot.workload.as_ref().is_some_and(|now| !now.permissive) {
                return Err(plaintext_refused(&workload.name));
            }
        }
        if access.is_open() {
            return Ok(());
        }
        Arc::clone(access)
    };
    if access.looks_at_paths() {
        headers::settle_path(request.uri_mut(), path::canonical)?;
    }
    let client = connection.client.as_ref().map(|(id, _)| id);
    let named = if access.looks_at_models() {
        // What is allowed whatever the model need not wait for it.
        let facts = Facts { client, port, http: Some(http(request, &Named::Unknown)) };
        let decision = access.decide(&facts);
        if decision.denied.is_none() && decision.would_deny.is_none() {
            return Ok(());
        }
        Box::pin(model::of(request, exchange)).await
    } else {
        Named::No
    };
    let facts = Facts { client, port, http: Some(http(request, &named)) };
    judge(&access, &facts, exchange, &workload.name)
}

fn http<'a, B>(request: &'a Request<B>, named: &'a Named) -> Http<'a> {
    Http {
        method: request.method().as_str(),
        path: request.uri().path(),
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
    // What is declared HTTP is judged as such: bytes would get around whatever is asked of a request, and its headers.
    let (port, protocol) = (of.port, of.protocol);
    let looked_at = matches!(protocol, Protocol::Http | Protocol::Http1 | Protocol::Http2 | Protocol::Grpc);
    if looked_at || (protocol == Protocol::Detect && access.denies_by_http()) {
        let story = format!(
            "port {port} of {} takes HTTP, and this is none; declare the port opaque (appProtocol: tcp) if it is to take bytes",
            workload.name
        );
        return Err(Failure::unprocessed(Reason::NotAuthorized, story));
    }
    judge(&access, &Facts { client, port, http: None }, exchange, &workload.name)
}

/// Waits until such a connection is no longer allowed.
pub async fn revoked(worker: &Worker, to: &To, client: Option<&SpiffeId>) -> Failure {
    let To::Application(workload, index) = to else { return std::future::pending().await };
    let facts = Facts { client, port: workload.ports[*index].port, http: None };
    denied_later(worker, &facts, &workload.name).await
}

/// A request that has become a connection of bytes, as it was judged.
#[derive(Debug)]
pub struct Watched {
    client: Option<SpiffeId>,
    pod: Arc<str>,
    port: u16,
    method: Method,
    path: String,
    headers: HeaderMap,
}

impl Watched {
    /// One that goes to a port of the pod.
    pub fn of<B>(connection: &Connection, request: &Request<B>) -> Option<Self> {
        let To::Application(workload, index) = &connection.to else { return None };
        Some(Self {
            client: connection.client.as_ref().map(|(id, _)| id.clone()),
            pod: Arc::clone(&workload.name),
            port: workload.ports[*index].port,
            method: request.method().clone(),
            path: request.uri().path().to_owned(),
            headers: request.headers().clone(),
        })
    }

    /// Waits until it is no longer allowed.
    pub async fn revoked(&self, exchange: &Exchange) -> Failure {
        // As when it began: what becomes another protocol can say anything of models.
        let model = Named::Unknown;
        let http = Http {
            method: self.method.as_str(),
            path: &self.path,
            model: model.fact(),
            headers: &self.headers,
        };
        let facts = Facts { client: self.client.as_ref(), port: self.port, http: Some(http) };
        let failure = denied_later(&exchange.worker, &facts, &self.pod).await;
        exchange.judged("denied");
        failure
    }
}

async fn denied_later(worker: &Worker, facts: &Facts<'_>, pod: &str) -> Failure {
    let store = &worker.shared.store;
    let mut version = store.version();
    loop {
        version.borrow_and_update();
        // What was withdrawn altogether is not known to forbid anything: control may be about to start anew.
        let access = store.snapshot().access.clone();
        if let Some(why) = access.as_ref().and_then(|access| access.decide(facts).denied) {
            count(&why, "denied");
            return refusal(&why, facts, pod);
        }
        if version.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

fn judge(access: &Access, facts: &Facts<'_>, exchange: &Exchange, pod: &str) -> Result<(), Failure> {
    let decision = access.decide(facts);
    if let Some(why) = decision.denied {
        exchange.judged("denied");
        count(&why, "denied");
        return Err(refusal(&why, facts, pod));
    }
    if let Some(why) = decision.would_deny {
        exchange.judged("would-deny");
        count(&why, "would-deny");
        tracing::debug!(pod, story = %why, client = facts.client.map(SpiffeId::as_str), "would be denied");
    }
    Ok(())
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

fn is_probe<B>(workload: &Workload, port: u16, request: &Request<B>) -> bool {
    let mut of_port = workload.probes.iter().filter(|probes| probes.port.port == port);
    of_port.any(|probes| probes.is_one(request.method(), request.uri(), request.headers()))
}

impl crate::config::Probes {
    /// Whether the kubelet asks so: exactly what the pod declares, with no body, and nothing that it could become.
    pub fn is_one(&self, method: &Method, uri: &uri::Uri, headers: &HeaderMap) -> bool {
        let asked = uri.path_and_query().map_or("/", uri::PathAndQuery::as_str);
        let more = [UPGRADE, CONTENT_LENGTH, TRANSFER_ENCODING];
        !more.iter().any(|name| headers.contains_key(name))
            && *method == Method::GET
            && self.paths.iter().any(|path| **path == *asked)
    }
}
