//! Requests that turn their connection into something else: Upgrade (WebSocket) and CONNECT.

use std::rc::Rc;

use http::{Method, Response, StatusCode, request, response};
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use crate::accept::Counted;
use crate::access;
use crate::body::ResponseBody;
use crate::exchange::Exchange;
use crate::send::Lease;
use crate::tcp;

/// Whether it asks for a tunnel.
pub fn is_connect(request: &request::Parts) -> bool {
    request.method == Method::CONNECT
}

/// Takes the client's half out of its request.
pub fn client_side(request: &mut request::Parts) -> Option<OnUpgrade> {
    request.extensions.remove::<OnUpgrade>()
}

/// Whether the server agreed: 101, or any 2xx to CONNECT (which is the only kind of 2xx that carries an upgrade).
pub fn accepted(response: &response::Parts) -> bool {
    let agreed = response.status == StatusCode::SWITCHING_PROTOCOLS || response.status.is_success();
    agreed && response.extensions.get::<OnUpgrade>().is_some()
}

/// Answers the client with the server's agreement, and lets bytes pass between the two until both are done, or until
/// `watched` says that the request would no longer be allowed. The exchange lives as long as they do, and the connection counts as open.
pub fn join(
    client: Option<OnUpgrade>,
    mut parts: response::Parts,
    body: Incoming,
    lease: Lease,
    exchange: &Rc<Exchange>,
    watched: Option<access::Watched>,
    counted: &Rc<Counted>,
) -> Response<ResponseBody> {
    let server = parts.extensions.remove::<OnUpgrade>();
    let (exchange, counted) = (Rc::clone(exchange), Rc::clone(counted));
    tokio::task::spawn_local(async move {
        // The body is empty; it keeps an HTTP/2 stream open. And hyper's part of the connection is over, but the connection is not.
        let _held = (body, lease, counted);
        let (Some(client), Some(server)) = (client, server) else { return };
        let (client, server) = match tokio::try_join!(client, server) {
            Ok(both) => both,
            Err(error) => return tracing::debug!(%error, "an upgrade was agreed on and did not happen"),
        };
        let joined = tcp::join(&exchange, TokioIo::new(client), TokioIo::new(server));
        let Some(watched) = watched else { return joined.await };
        tokio::select! {
            biased;
            failure = watched.revoked(&exchange) => {
                exchange.failed(&failure);
                exchange.complete();
                tcp::refused("inbound", &failure);
            }
            () = joined => {}
        }
    });
    Response::from_parts(parts, ResponseBody::empty())
}
