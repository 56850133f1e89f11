//! A connection to an endpoint: TCP, and TLS where the endpoint has an identity, which it must prove.

use std::sync::Arc;
use std::time::Duration;

use penstock_api::{Reason, SpiffeId, names};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::accept;
use crate::config::Endpoint;
use crate::failure::Failure;
use crate::identity::{self, Material};
use crate::readahead::ReadAhead;
use crate::worker::Worker;

/// What will be spoken over a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// Bytes.
    Bytes,
}

/// A connection, ready to speak.
#[derive(Debug)]
pub enum Connected {
    /// To an endpoint outside the mesh, or the application.
    Plain(TcpStream),
    /// To an endpoint that has proven its identity.
    Secured(Box<TlsStream<ReadAhead>>),
}

/// Connects, within `limit`, TLS included.
pub async fn connect(
    worker: &Worker,
    endpoint: &Endpoint,
    wire: Wire,
    limit: Duration,
) -> Result<Connected, Failure> {
    match tokio::time::timeout(limit, attempt(worker, endpoint, wire)).await {
        Ok(result) => result,
        Err(_) => Err(Failure::unprocessed(
            Reason::ConnectTimeout,
            format!("{} did not accept a connection at {} within {limit:?}", endpoint.name, endpoint.address),
        )),
    }
}

async fn attempt(worker: &Worker, endpoint: &Endpoint, wire: Wire) -> Result<Connected, Failure> {
    let stream = TcpStream::connect(endpoint.address).await.map_err(|error| {
        Failure::unprocessed(
            Reason::ConnectFailed,
            format!("no connection to {} at {}: {error}", endpoint.name, endpoint.address),
        )
    })?;
    accept::tune(&stream);
    match &endpoint.identity {
        None => Ok(Connected::Plain(stream)),
        Some(expected) => secure(worker, endpoint, expected, wire, stream).await,
    }
}

async fn secure(
    worker: &Worker,
    endpoint: &Endpoint,
    expected: &SpiffeId,
    wire: Wire,
    stream: TcpStream,
) -> Result<Connected, Failure> {
    let material = worker.shared.identity.current().ok_or_else(|| {
        Failure::unprocessed(
            Reason::NoConfig,
            format!(
                "{} wants mutual TLS, and this proxy has no certificate yet; is control reachable?",
                endpoint.name
            ),
        )
    })?;
    let config = client_config(&material, wire, endpoint.sidecar);
    let sni = ServerName::try_from(names::port_sni(endpoint.target_port))
        .map_err(|error| Failure::unprocessed(Reason::Internal, error.to_string()))?;
    let tls = TlsConnector::from(Arc::clone(config)).connect(sni, ReadAhead::new(stream)).await.map_err(
        |error| {
            let who = format!("{} at {}", endpoint.name, endpoint.address);
            match identity::explain(&error) {
                Some(why) => Failure::unprocessed(Reason::WrongIdentity, format!("{who}: {why}")),
                None => Failure::unprocessed(Reason::ConnectFailed, format!("no TLS with {who}: {error}")),
            }
        },
    )?;
    let proven = identity::verified_peer(tls.get_ref().1).and_then(|peer| peer.expect(expected));
    proven.map_err(|error| {
        Failure::unprocessed(
            Reason::WrongIdentity,
            format!("{} at {}: {error}", endpoint.name, endpoint.address),
        )
    })?;
    Ok(Connected::Secured(Box::new(tls)))
}

fn client_config(material: &Material, wire: Wire, sidecar: bool) -> &Arc<rustls::ClientConfig> {
    match (wire, sidecar) {
        (Wire::Http2, true) => &material.client_h2,
        (Wire::Http1, true) => &material.client_h1,
        (Wire::Bytes, _) => &material.client_tcp,
        (Wire::Http2, false) => &material.client_plain_h2,
        (Wire::Http1, false) => &material.client_plain_h1,
    }
}
