//! A connection to an endpoint: TCP, and TLS where the endpoint has an identity, which it must prove.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use penstock_api::{Reason, SpiffeId, names};
use rustls_pki_types::ServerName;
use tokio::io::AsyncBufReadExt as _;
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
    let address = dialled(endpoint, &worker.shared.node, worker.shared.inbound);
    let stream = TcpStream::connect(address).await.map_err(|error| {
        Failure::unprocessed(
            Reason::ConnectFailed,
            format!("no connection to {} at {address}: {error}", endpoint.name),
        )
    })?;
    accept::tune(&stream);
    match &endpoint.identity {
        None => Ok(Connected::Plain(stream)),
        Some(expected) => secure(worker, endpoint, expected, wire, stream).await,
    }
}

/// Where an endpoint is dialled: at its own port, which the redirect of its pod takes to its proxy. What a proxy begins
/// is not redirected inside its own pod, though; if the choice is that pod, its own inbound listener is dialled.
fn dialled(endpoint: &Endpoint, own: &str, inbound: Option<u16>) -> SocketAddr {
    let mut address = endpoint.address;
    if let Some(inbound) = inbound
        && endpoint.sidecar
        && &*endpoint.name == own
    {
        address.set_port(inbound);
    }
    address
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
    let failed = |error: io::Error| {
        let who = format!("{} at {}", endpoint.name, endpoint.address);
        match identity::explain(&error) {
            Some(why) => Failure::unprocessed(Reason::WrongIdentity, format!("{who}: {why}")),
            None => Failure::unprocessed(Reason::ConnectFailed, format!("no TLS with {who}: {error}")),
        }
    };
    let connector = TlsConnector::from(Arc::clone(config));
    let mut tls = connector.connect(sni, ReadAhead::new(stream)).await.map_err(failed)?;
    let proven = identity::verified_peer(tls.get_ref().1).and_then(|peer| peer.expect(expected));
    proven.map_err(|error| {
        Failure::unprocessed(
            Reason::WrongIdentity,
            format!("{} at {}: {error}", endpoint.name, endpoint.address),
        )
    })?;
    if wire == Wire::Http2 && endpoint.sidecar {
        takes_us(&mut tls).await.map_err(failed)?;
    }
    Ok(Connected::Secured(Box::new(tls)))
}

/// A client's handshake is over before the server has looked at its certificate (TLS 1.3), so a request that follows at once may
/// meet a refusal, and what became of it would be unknown. A sidecar that takes us says so with its SETTINGS, unasked (RFC 9113, 3.4): until
/// something of those is here, nothing is sent.
async fn takes_us(tls: &mut TlsStream<ReadAhead>) -> io::Result<()> {
    match tls.fill_buf().await? {
        [] => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended the connection before it took us")),
        _ => Ok(()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Speak;

    #[test]
    fn a_proxy_reaches_its_own_pod_through_its_own_inbound_listener() {
        let address: SocketAddr = "10.0.0.2:8000".parse().unwrap();
        let dialled = |sidecar, own: &str, inbound| {
            let endpoint = Endpoint::new("a/pod".into(), address, 8000, None, sidecar, Speak::Same);
            dialled(&endpoint, own, inbound).to_string()
        };
        assert_eq!(dialled(true, "a/pod", Some(15006)), "10.0.0.2:15006");
        assert_eq!(dialled(true, "a/other", Some(15006)), "10.0.0.2:8000");
        assert_eq!(dialled(true, "a/pod", None), "10.0.0.2:8000");
        assert_eq!(dialled(false, "a/pod", Some(15006)), "10.0.0.2:8000", "the application itself");
    }
}
