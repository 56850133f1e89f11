//! From the application to the mesh: one connection, and then each request, in the order of the stages.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use http::uri::Authority;
use http::{HeaderMap, HeaderValue, Request, Response, Version};
use penstock_api::Reason;
use penstock_api::v1::{Direction, Protocol};
use penstock_balance::Policy;
use tokio::net::TcpStream;

use crate::accept::{self, Counted};
use crate::answer;
use crate::body::{RequestBody, ResponseBody, Upstream};
use crate::coalesce::outbound::Shared;
use crate::config::static_file::Listener;
use crate::config::{Backend, Rule};
use crate::connection::{Connection, To};
use crate::detect::{self, Detected};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers;
use crate::receive::ClientBody;
use crate::report;
use crate::route::{self, Destination};
use crate::send::{self, Outgoing};
use crate::worker::Worker;
use crate::{coalesce, early, serve, shadow, tcp, upgrade, work};

/// The listener's name, in metrics and logs.
pub(crate) const LISTENER: &str = "outbound";

/// Serves one connection of the application.
pub async fn connection(
    worker: Rc<Worker>,
    stream: TcpStream,
    counted: Counted,
    listener: Option<Arc<Listener>>,
) {
    let _open = worker.shared.drain.open_outbound();
    let original = if listener.is_some() { None } else { accept::original_destination(&stream) };
    early::hold(&worker.shared, LISTENER).await;
    let declared = match (&listener, original) {
        (Some(listener), _) => listener.protocol,
        // Without a redirect the request names its destination, so it must be HTTP.
        (None, None) => Protocol::Http,
        (None, Some(address)) => match Box::pin(route::declared(&worker, address)).await {
            Ok(protocol) => protocol,
            Err(failure) => return Box::pin(refuse(worker, stream, counted, original, failure)).await,
        },
    };
    let http2 = match declared {
        Protocol::Opaque | Protocol::Tls => {
            return Box::pin(tcp::outbound(&worker, stream, listener.as_deref(), original)).await;
        }
        Protocol::Http2 | Protocol::Grpc => true,
        Protocol::Http1 => false,
        Protocol::Http => detect::detect(&stream, worker.shared.limits.header_time).await == Detected::Http2,
        Protocol::Detect => match detect::detect(&stream, worker.shared.limits.detect_time).await {
            Detected::Http1 => false,
            Detected::Http2 => true,
            Detected::Tls | Detected::Bytes | Detected::Nothing => {
                return Box::pin(tcp::outbound(&worker, stream, listener.as_deref(), original)).await;
            }
        },
    };
    let connection = Rc::new(Connection {
        worker,
        original,
        client: None,
        forwarded: None,
        sidecar: false,
        to: listener.map_or(To::Mesh, To::Static),
        last_host: Default::default(),
        last_told: Default::default(),
        counted: Rc::new(counted),
    });
    // The drain never closes a connection under a live application.
    serve::http(LISTENER, stream, http2, connection, None, request).await;
}

/// Tells an application why its connection leads nowhere, if it speaks what can be answered.
async fn refuse(
    worker: Rc<Worker>,
    stream: TcpStream,
    counted: Counted,
    original: Option<SocketAddr>,
    failure: Failure,
) {
    let http2 = match detect::detect(&stream, worker.shared.limits.detect_time).await {
        Detected::Http1 => false,
        Detected::Http2 => true,
        Detected::Tls | Detected::Bytes | Detected::Nothing => return tcp::refused(LISTENER, &failure),
    };
    let connection = Rc::new(Connection {
        worker,
        original,
        client: None,
        forwarded: None,
        sidecar: false,
        to: To::Refusal(failure),
        last_host: Default::default(),
        last_told: Default::default(),
        counted: Rc::new(counted),
    });
    serve::http(LISTENER, stream, http2, connection, None, request).await;
}

/// Serves one request of the application.
pub async fn request(
    connection: Rc<Connection>,
    request: Request<ClientBody>,
) -> Result<Response<ResponseBody>, Infallible> {
    let exchange = Exchange::begin(&connection.worker, Direction::Outbound);
    let grpc = answer::is_grpc(request.headers());
    exchange.speaks_grpc(grpc);
    Ok(answer::settle(&exchange, stages(&connection, &exchange, request).await, grpc))
}

async fn stages(
    connection: &Connection,
    exchange: &Rc<Exchange>,
    request: Request<ClientBody>,
) -> Result<Response<ResponseBody>, Failure> {
    let worker = &connection.worker;
    let (mut parts, body) = request.into_parts();
    let found = headers::look(&parts.headers);
    let upgrading = headers::asks_upgrade(&parts.headers, found) || upgrade::is_connect(&parts);
    headers::check_request(&parts, found)?;
    let authority = connection.authority(&parts)?;
    exchange.keep_request(&mut parts, &authority, None);
    worker.shared.memory.admit()?;
    if found.wants_report {
        exchange.show_reports(&parts.headers);
    }

    // Route: what the host means, and which rule of it matches.
    let destination = match &connection.to {
        To::Static(listener) => listener.destination.clone(),
        To::Refusal(failure) => return Err(failure.clone()),
        _ => route::destination(worker, &authority, connection.original).await?,
    };
    route::settle_path(&destination, &mut parts.uri)?;
    let (rule, prefix) = route::rule(&destination, authority.host(), &parts)?;
    if let Some(redirect) = &rule.filters.redirect {
        return redirected(exchange, &parts, &authority, redirect, prefix);
    }

    // Split: which version.
    let Destination { service, .. } = &destination;
    let backend = worker.with_random(|random| route::split(rule, service.sticky.as_ref(), &parts, random))?;

    // Prepare what goes out: hop-by-hop headers stay behind, filters change the rest.
    let client_upgrade = upgrading.then(|| upgrade::client_side(&mut parts));
    headers::strip_hop(&mut parts.headers, found, upgrading);
    headers::strip_ours(&mut parts.headers, found);
    let spoken = parts.version;
    let mut authority = authority;
    let mut request = Request::from_parts(parts, RequestBody::Client(body, Rc::clone(exchange)));
    for filters in [&rule.filters, &backend.filters] {
        headers::change(request.headers_mut(), &filters.request);
        if let Some(rewrite) = &filters.rewrite {
            headers::rewrite(&mut request, &mut authority, rewrite, prefix)?;
        }
    }
    let upgrade = upgrading && spoken != Version::HTTP_2;

    // Mirror: copies go beside the request, and nobody waits for them.
    let mut copies = match rule.mirrors.is_empty() || upgrading {
        true => None,
        false => shadow::begin(exchange, rule, &service.name, backend, &mut request, &authority, spoken),
    };
    let work = match backend.cluster.policy().balance.policy {
        Policy::Gpu | Policy::Prefix => work::read(&mut request, exchange).await,
        Policy::LeastRequest | Policy::RoundRobin | Policy::RingHash | Policy::OrcaWrr => {
            work::keyed(&request)
        }
    };
    if let Some(copies) = &mut copies {
        copies.send(&work);
    }
    let mut outgoing = Box::new(Outgoing { request, authority, spoken, upgrade });

    // Coalesce: what is on its way already is not sent again, where the Service asks for it.
    let rules = backend.cluster.policy().coalesce.clone();
    if let Some(rules) = rules.filter(|_| !upgrading) {
        let way = coalesce::outbound::Way { rule, service: &service.name, backend, work: &work };
        let shared = Box::pin(coalesce::outbound::serve(exchange, way, &rules, outgoing)).await;
        let shared = shared.inspect_err(|_| shadow::failed(&copies))?;
        outgoing = match shared {
            Shared::Answer(mut response) => {
                change(response.headers_mut(), backend, rule);
                return Ok(shadow::answered(copies, exchange, *response));
            }
            Shared::Apart(outgoing) => outgoing,
        };
    }

    // Balance and send, and again where that is allowed.
    let answered = send::send(exchange, rule, &service.name, backend, &work, outgoing).await;
    let answered = answered.inspect_err(|_| shadow::failed(&copies))?;

    // Report: what the endpoint says of its load.
    let (mut parts, body) = answered.response.into_parts();
    exchange.answered_with(parts.status.as_u16(), &body);
    let found = headers::look(&parts.headers);
    report::take(exchange, &mut parts.headers, found);
    if let Some(client) = client_upgrade
        && upgrade::accepted(&parts)
    {
        return Ok(upgrade::join(client, parts, body, answered.lease, exchange, None, &connection.counted));
    }
    headers::check_answer(&parts.headers, found).inspect_err(|_| shadow::failed(&copies))?;
    headers::strip_hop(&mut parts.headers, found, false);
    change(&mut parts.headers, backend, rule);
    parts.version = Version::HTTP_11;
    let body = Upstream::new(body, Rc::clone(exchange), answered.lease, answered.idle, report::take_trailers);
    Ok(shadow::answered(copies, exchange, Response::from_parts(parts, ResponseBody::Upstream(body))))
}

/// What the filters change of a response.
fn change(headers: &mut HeaderMap, backend: &Backend, rule: &Rule) {
    for filters in [&backend.filters, &rule.filters] {
        headers::change(headers, &filters.response);
    }
}

fn redirected(
    exchange: &Exchange,
    parts: &http::request::Parts,
    authority: &Authority,
    redirect: &crate::config::Redirect,
    prefix: &str,
) -> Result<Response<ResponseBody>, Failure> {
    let location = headers::location(&parts.uri, authority, redirect, prefix);
    let location = HeaderValue::try_from(location).map_err(|_| {
        Failure::unprocessed(Reason::BadRequest, "the redirect leads to something that is no URL")
    })?;
    exchange.answered(redirect.status.as_u16());
    exchange.complete();
    Ok(answer::redirect(redirect.status, location))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection at rest is little more than this: what is rare in it, and what is large, must be boxed.
    #[test]
    fn the_future_of_a_connection_stays_small() {
        fn size<F, A, B, C, D>(_: fn(A, B, C, D) -> F) -> usize {
            size_of::<F>()
        }
        assert!(size(connection) <= 1536, "outbound: {} bytes", size(connection));
        let inbound = size(crate::inbound::connection);
        assert!(inbound <= 1536, "inbound: {inbound} bytes");
    }

    /// The future of a request is copied when it is handed to hyper; what is rare in it must be boxed. (7,128 bytes
    /// cost a tenth of the CPU of a small request.)
    #[test]
    fn the_future_of_a_request_stays_small() {
        fn size<F, A, B>(_: fn(A, B) -> F) -> usize {
            size_of::<F>()
        }
        assert!(size(request) <= 3072, "outbound: {} bytes", size(request));
        assert!(size(crate::inbound::request) <= 3072, "inbound: {} bytes", size(crate::inbound::request));
    }
}
