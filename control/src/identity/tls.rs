//! The TLS that control serves: TLS 1.3 with a certificate of its own, client certificates welcome but not required.
//!
//! In: TCP connections and the trust in force. Out: connections whose [`Peer`] says which identity was verified, if
//! any. A handshake with an expired, unknown or otherwise wrong client certificate fails; one without a certificate
//! succeeds, and each service decides what that is good for.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::time::Duration;

use anyhow::{Context, Result};
use arc_swap::ArcSwap;
use metrics::counter;
use penstock_api::SpiffeId;
use rustls::crypto::aws_lc_rs;
use rustls::server::{NoServerSessionStorage, ServerConfig, WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;
use x509_parser::extensions::GeneralName;

use super::Trust;
use crate::metric;

/// Handshakes in progress at once. A handshake is two asymmetric operations; more of them in parallel would only
/// make all of them late.
const HANDSHAKES: usize = 256;
/// A client that has not finished its handshake by then is not going to.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The identity that its certificate proved.
    pub identity: Option<SpiffeId>,
    /// Where it connected from.
    pub address: SocketAddr,
}

/// A connection whose handshake is done.
#[derive(Debug)]
pub struct Connection {
    stream: TlsStream<TcpStream>,
    peer: Peer,
}

/// Control's own TLS configuration, replaced when trust changes or the certificate is due.
#[derive(Debug)]
pub struct Serving {
    config: ArcSwap<ServerConfig>,
}

/// A configuration and when it has to be replaced.
#[derive(Debug)]
pub struct Fresh {
    config: Arc<ServerConfig>,
    /// Seconds since the epoch: two thirds into the certificate's life.
    pub renew_at: i64,
}

/// Makes a configuration: a fresh key and certificate for `own`, and the anchors that clients are verified with.
pub fn fresh(trust: &Trust, own: &SpiffeId, lifetime: Duration, now: i64) -> Result<Fresh> {
    let key = rcgen::KeyPair::generate()?;
    let leaf =
        trust.serving.sign(own, &key, lifetime, now, rand::random()).context("control's own certificate")?;
    let mut roots = rustls::RootCertStore::empty();
    for anchor in &trust.anchors {
        roots.add(anchor.clone()).context("a trust anchor cannot be used")?;
    }
    let provider = provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .context("the trust anchors cannot be used")?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(leaf.chain, PrivateKeyDer::from(key))
        .context("control's own certificate")?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would bring back a client certificate without looking at its expiry again.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    let renew_at = now + (leaf.not_after - now) * 2 / 3;
    Ok(Fresh { config: Arc::new(config), renew_at })
}

/// Post-quantum key agreement first, for whoever can.
pub(super) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    provider.kx_groups = vec![
        aws_lc_rs::kx_group::X25519MLKEM768,
        aws_lc_rs::kx_group::X25519,
        aws_lc_rs::kx_group::SECP256R1,
        aws_lc_rs::kx_group::SECP384R1,
    ];
    Arc::new(provider)
}

impl Serving {
    /// Serves with `fresh`.
    pub fn new(fresh: &Fresh) -> Self {
        Self { config: ArcSwap::new(fresh.config.clone()) }
    }

    /// Serves new connections with `fresh`; those that are open stay as they are.
    pub fn replace(&self, fresh: &Fresh) {
        self.config.store(fresh.config.clone());
    }

    /// Accepts connections and does their handshakes beside each other, until the receiver is gone.
    pub fn accept(
        self: Arc<Self>,
        listener: TcpListener,
        trust_domain: String,
    ) -> mpsc::Receiver<io::Result<Connection>> {
        let (sender, receiver) = mpsc::channel(HANDSHAKES);
        let room = Arc::new(Semaphore::new(HANDSHAKES));
        tokio::spawn(async move {
            loop {
                let Ok(permit) = room.clone().acquire_owned().await else { return };
                let accepted = tokio::select! {
                    () = sender.closed() => return,
                    accepted = listener.accept() => accepted,
                };
                let (tcp, address) = match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        // Out of file descriptors, most likely: an immediate retry would only spin.
                        tracing::warn!("accepting a connection failed: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                };
                let (acceptor, sender) = (TlsAcceptor::from(self.config.load_full()), sender.clone());
                let trust_domain = trust_domain.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    match handshake(tcp, address, acceptor, &trust_domain).await {
                        // Nobody left to serve it: control is shutting down.
                        Ok(connection) => drop(sender.send(Ok(connection)).await),
                        Err(error) => {
                            counter!(metric::HANDSHAKE_FAILURES.name).increment(1);
                            tracing::debug!(%address, "a TLS handshake failed: {error}");
                        }
                    }
                });
            }
        });
        receiver
    }
}

async fn handshake(
    tcp: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
    trust_domain: &str,
) -> io::Result<Connection> {
    // A weight is one small frame: it must not wait for more to come.
    tcp.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(tcp))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client did not finish it in time"))??;
    let identity = match stream.get_ref().1.peer_certificates() {
        Some([leaf, ..]) => Some(
            identity(leaf, trust_domain).map_err(|why| io::Error::new(io::ErrorKind::InvalidData, why))?,
        ),
        _ => None,
    };
    Ok(Connection { stream, peer: Peer { identity, address } })
}

/// The identity in a certificate that has been verified: its only name.
pub(super) fn identity(leaf: &CertificateDer<'_>, trust_domain: &str) -> Result<SpiffeId, String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(leaf).map_err(|error| error.to_string())?;
    let names = parsed.subject_alternative_name().map_err(|error| error.to_string())?;
    match names.map(|names| &*names.value.general_names) {
        Some([GeneralName::URI(uri)]) => {
            let id: SpiffeId = uri.parse().map_err(|error| format!("{error}"))?;
            match id.parts() {
                (domain, _, _) if domain == trust_domain => Ok(id),
                (domain, _, _) => Err(format!("{id} is of the trust domain {domain}, not {trust_domain}")),
            }
        }
        _ => Err("the certificate's names are not one SPIFFE id".to_owned()),
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, buffers)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
