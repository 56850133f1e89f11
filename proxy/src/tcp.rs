//! Connections whose bytes are not looked at: declared opaque, the application's own TLS, or unknown.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use penstock_api::v1::Direction;
use penstock_api::{Reason, ServiceName, SpiffeId};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::config::Rule;
use crate::config::static_file::Listener;
use crate::connection::To;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::route;
use crate::send::connect::{Connected, Wire, connect};
use crate::worker::Worker;

/// What one direction of a connection may have under way: large enough that a full TLS record (16 KiB) and several
/// more fit, small enough that thousands of idle connections do not matter.
const BUFFER: usize = 64 << 10;

/// Copies bytes both ways until both sides are done; an end of one side is passed on to the other.
pub async fn copy<A, B>(a: &mut A, b: &mut B) -> io::Result<(u64, u64)>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    tokio::io::copy_bidirectional_with_sizes(a, b, BUFFER, BUFFER).await
}

/// Notes a connection that cannot be served. TCP has no way to tell the client why, so the log does.
pub fn refused(listener: &'static str, failure: &Failure) {
    tracing::info!(listener, %failure, "closed a connection");
}

/// Takes a connection of the application where it was going.
pub async fn outbound(
    worker: &Rc<Worker>,
    stream: TcpStream,
    listener: Option<&Listener>,
    original: Option<SocketAddr>,
) {
    let destination = match (listener, original) {
        (Some(listener), _) => Ok(listener.destination.clone()),
        (None, Some(address)) => route::at_address(worker, address).await,
        (None, None) => Err(Failure::unprocessed(
            Reason::BadRequest,
            "bytes that are not HTTP on the outbound listener, with no destination of their own",
        )),
    };
    let exchange = Exchange::begin(worker, Direction::Outbound);
    let result = async {
        let destination = destination?;
        // Routes match requests; a connection goes to its port's own endpoints.
        let port = destination.service.port(destination.port).ok_or_else(|| {
            let story = format!("{} has no port {}", destination.service.name, destination.port);
            Failure::unprocessed(Reason::UnknownPort, story)
        })?;
        forward(&exchange, &port.itself, &destination.service.name, None, stream).await
    };
    finish(&exchange, result.await, "outbound");
}

/// Takes a connection of the mesh to the application.
pub async fn inbound<T>(worker: &Rc<Worker>, stream: T, to: &To, client: Option<&SpiffeId>)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let exchange = Exchange::begin(worker, Direction::Inbound);
    let result = match to.rule() {
        Ok(rule) => {
            let asked = rule.backends[0].cluster.service.clone();
            let result = forward(&exchange, rule, &asked, client, stream).await;
            exchange.secured(client.is_some());
            result
        }
        Err(failure) => Err(failure),
    };
    finish(&exchange, result, "inbound");
}

fn finish(exchange: &Exchange, result: Result<(), Failure>, listener: &'static str) {
    if let Err(failure) = result {
        exchange.failed(&failure);
        refused(listener, &failure);
    }
    exchange.complete();
}

async fn forward<T>(
    exchange: &Rc<Exchange>,
    rule: &Rule,
    asked: &ServiceName,
    client: Option<&SpiffeId>,
    mut stream: T,
) -> Result<(), Failure>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let worker = &exchange.worker;
    let cluster = &rule.backends[0].cluster;
    let policy = cluster.policy();
    exchange.keep_connection(client);
    let mut tried = Vec::new();
    let server = loop {
        let (index, endpoint) = crate::send::pick(worker, cluster, &policy, &tried)?;
        exchange.goes_to(rule, asked, cluster, &endpoint);
        exchange.secured(endpoint.identity.is_some());
        match connect(worker, &endpoint, Wire::Bytes, policy.connect_timeout).await {
            Ok(server) => {
                endpoint.state.ejection.success();
                break server;
            }
            Err(failure) => {
                endpoint.state.ejection.failure(&policy.outlier, worker.now());
                tried.push(index);
                if tried.len() as u32 > policy.retry.attempts {
                    return Err(failure);
                }
            }
        }
    };
    exchange.answered(200);
    let copied = match server {
        Connected::Plain(mut server) => copy(&mut stream, &mut server).await,
        Connected::Secured(mut server) => copy(&mut stream, &mut *server).await,
    };
    match copied {
        Ok((up, down)) => {
            exchange.sent(up as usize);
            exchange.received(down as usize);
            Ok(())
        }
        // One side reset the connection: the other has been closed, which is all that bytes can be told.
        Err(error) => {
            tracing::debug!(%error, "a connection broke off");
            Ok(())
        }
    }
}
