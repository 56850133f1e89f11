//! The way to control: TCP, TLS 1.3, HTTP/2.
//!
//! Control is known by its SPIFFE id, under the anchors of a file that the proxy was given joined by those that were
//! pushed since, so that a rotated root is followed without touching the pod. One [`Control::connect`] is one
//! connection: whoever holds the channel sees it end, and decides when to dial again.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use penstock_api::SpiffeId;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};

use super::material::{self, ALPN_H2};
use super::verify::MeshVerifier;
use super::{Identity, IdentityError, explain, verified_peer};

/// To a usable connection, TLS included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A control that is gone without a word is noticed after the interval and the timeout together.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(20);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// The server name that is sent; control has one certificate, and is known by its identity.
const SERVER_NAME: &str = "penstock-control";

/// Where control is and how it is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// `host:port`.
    pub address: String,
    /// PEM file with the anchors that control's certificate leads to.
    pub ca: PathBuf,
    /// The mesh's.
    pub trust_domain: String,
}

/// Why there is no connection to control.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// No way there.
    #[error(
        "control at {address} cannot be reached: {error}; is it running, and does the network let us through?"
    )]
    Unreachable {
        /// Where.
        address: String,
        /// Why.
        error: io::Error,
    },
    /// It did not prove to be control, or does not accept us.
    #[error("control at {address}: {error}")]
    Identity {
        /// Where.
        address: String,
        /// Why.
        error: IdentityError,
    },
    /// It does not speak HTTP/2.
    #[error("control at {address} does not speak gRPC: {error}")]
    Protocol {
        /// Where.
        address: String,
        /// Why.
        error: tonic::transport::Error,
    },
}

impl Control {
    /// The identity that control must prove.
    pub fn id(&self) -> Result<SpiffeId, IdentityError> {
        SpiffeId::new(&self.trust_domain, "penstock-system", "penstock-control").map_err(|error| {
            IdentityError::Own(format!("trust domain {:?} is of no use: {error}", self.trust_domain))
        })
    }

    /// Dials control as nobody: enough to have a certificate signed.
    pub async fn connect_unproven(&self, identity: &Identity) -> Result<Channel, ControlError> {
        self.dial(identity, false).await
    }

    /// Dials control with our certificate of the moment.
    pub async fn connect(&self, identity: &Identity) -> Result<Channel, ControlError> {
        self.dial(identity, true).await
    }

    async fn dial(&self, identity: &Identity, proven: bool) -> Result<Channel, ControlError> {
        let stream = match timeout(CONNECT_TIMEOUT, self.open(identity, proven)).await {
            Ok(stream) => stream?,
            Err(_) => return Err(self.unreachable(io::ErrorKind::TimedOut.into())),
        };
        // The connector hands out the one connection there is; asked again, it says so.
        let mut stream = Some(TokioIo::new(stream));
        let connector = tower::service_fn(move |_| {
            std::future::ready(stream.take().ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)))
        });
        Endpoint::from_static("http://penstock-control")
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            .keep_alive_while_idle(true)
            .connect_with_connector(connector)
            .await
            .map_err(|error| ControlError::Protocol { address: self.address.clone(), error })
    }

    async fn open(&self, identity: &Identity, proven: bool) -> Result<TlsStream<TcpStream>, ControlError> {
        let wrong = |error| ControlError::Identity { address: self.address.clone(), error };
        let verifier =
            MeshVerifier::new(&self.anchors(identity).map_err(wrong)?, &self.trust_domain).map_err(wrong)?;
        let key = if proven { identity.current().map(|material| material.key()) } else { None };
        let mut config = material::client_config(Arc::new(verifier), key).map_err(wrong)?;
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        let unreachable = |error| self.unreachable(error);
        let name = ServerName::try_from(SERVER_NAME).map_err(|error| unreachable(io::Error::other(error)))?;
        let tcp = TcpStream::connect(self.address.as_str()).await.map_err(unreachable)?;
        tcp.set_nodelay(true).map_err(unreachable)?;
        let stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await.map_err(|error| {
            match explain(&error) {
                Some(story) => wrong(story),
                None => unreachable(error),
            }
        })?;
        let peer = verified_peer(stream.get_ref().1).map_err(wrong)?;
        peer.expect(&self.id().map_err(wrong)?).map_err(wrong)?;
        Ok(stream)
    }

    /// The anchors of the file, read anew, and those in force. The file may go missing once there are others.
    fn anchors(&self, identity: &Identity) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
        let mut anchors = identity.anchors();
        match material::certificates(&self.ca) {
            Ok(file) => {
                for anchor in file {
                    if !anchors.contains(&anchor) {
                        anchors.push(anchor);
                    }
                }
            }
            Err(error) if anchors.is_empty() => return Err(error),
            Err(error) => tracing::warn!(%error, "control is verified by the pushed anchors alone"),
        }
        Ok(anchors)
    }

    fn unreachable(&self, error: io::Error) -> ControlError {
        ControlError::Unreachable { address: self.address.clone(), error }
    }
}
