//! A connection from one replica of control to another: TLS 1.3, each with a certificate of its own under the root that both have.
//!
//! In: an address and the trust in force. Out: a stream whose other end has proved that it is control. Can go wrong: nobody is there, it
//! has another root (it has not read the Secret yet), or it is something else.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use penstock_api::SpiffeId;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::{Trust, tls};

/// Verifies the chain; whose it is, is asked afterwards, by a name that TLS has no word for.
#[derive(Debug)]
struct Anchored {
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Anchored {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("only TLS 1.3 is spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, leaf, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Connects to the replica at `address` as `own`, which the other end has to be too.
pub async fn connect(
    address: SocketAddr,
    trust: &Trust,
    own: &SpiffeId,
    lifetime: Duration,
    now: i64,
) -> Result<TlsStream<TcpStream>> {
    let key = rcgen::KeyPair::generate()?;
    let leaf =
        trust.serving.sign(own, &key, lifetime, now, rand::random()).context("control's own certificate")?;
    let mut roots = RootCertStore::empty();
    for anchor in &trust.anchors {
        roots.add(anchor.clone()).context("a trust anchor cannot be used")?;
    }
    let provider = tls::provider();
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anchored { roots, provider }))
        .with_client_auth_cert(leaf.chain, PrivateKeyDer::from(key))
        .context("control's own certificate")?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would bring back a certificate without looking at its expiry again.
    config.resumption = Resumption::disabled();
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from("penstock-control")?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, tcp).await?;
    let certificates = stream.get_ref().1.peer_certificates();
    let leaf = certificates.and_then(|all| all.first()).context("it has shown no certificate")?;
    let (trust_domain, ..) = own.parts();
    let other = tls::identity(leaf, trust_domain).map_err(io::Error::other)?;
    ensure!(other == *own, "it is {other}, and not control");
    Ok(stream)
}
