//! The TLS configurations that one certificate, its key and the anchors make.
//!
//! TLS 1.3 only. Key exchange prefers X25519MLKEM768; AES-128-GCM comes first because it is the cheapest that is
//! strong. No session resumption: connections are pooled and live long, and a resumed session would outlive the
//! check of the peer's certificate.

use std::path::Path;
use std::sync::{Arc, LazyLock};

use penstock_api::SpiffeId;
use penstock_api::names::{ALPN_MESH_H1, ALPN_MESH_H2, ALPN_MESH_TCP};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use super::IdentityError;
use super::renewal::Validity;
use super::verify::{self, MeshVerifier};

/// ALPN of HTTP/2.
pub const ALPN_H2: &[u8] = b"h2";
/// ALPN of HTTP/1.1.
pub const ALPN_H1: &[u8] = b"http/1.1";

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_128_GCM_SHA256,
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1, kx_group::SECP384R1],
        ..aws_lc_rs::default_provider()
    })
});

/// The cryptography that all of Penstock's TLS uses.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}

/// Everything that TLS needs, at one moment.
#[derive(Clone, Debug)]
pub struct Material {
    /// Who we are.
    pub id: SpiffeId,
    /// Start of validity, seconds since the epoch.
    pub not_before: u64,
    /// End of validity, seconds since the epoch.
    pub not_after: u64,
    /// The leaf, then its intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Whom we trust.
    pub anchors: Vec<CertificateDer<'static>>,
    /// To another sidecar: HTTP/2.
    pub client_h2: Arc<ClientConfig>,
    /// To another sidecar: HTTP/1.1, one exchange.
    pub client_h1: Arc<ClientConfig>,
    /// To another sidecar: bytes.
    pub client_tcp: Arc<ClientConfig>,
    /// To a server that is no sidecar: HTTP/2.
    pub client_plain_h2: Arc<ClientConfig>,
    /// To a server that is no sidecar: HTTP/1.1.
    pub client_plain_h1: Arc<ClientConfig>,
    /// From sidecars and ordinary clients; their certificate is required.
    pub server: Arc<ServerConfig>,
    key: Arc<SingleCertAndKey>,
}

impl Material {
    /// Builds the configurations. The leaf must name one SPIFFE id and belong to the key.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        anchors: Vec<CertificateDer<'static>>,
    ) -> Result<Self, IdentityError> {
        let leaf = chain.first().ok_or_else(|| {
            IdentityError::Own("our certificate chain is empty; it must begin with the leaf".into())
        })?;
        let facts = verify::leaf_facts(leaf)?;
        let certified = CertifiedKey::from_der(chain.clone(), key, &PROVIDER).map_err(|error| {
            IdentityError::Own(format!("our certificate for {} is of no use with our key: {error}", facts.id))
        })?;
        Self::build(facts, chain, Arc::new(certified.into()), anchors)
    }

    /// The same certificate with other anchors.
    pub fn with_anchors(&self, anchors: Vec<CertificateDer<'static>>) -> Result<Self, IdentityError> {
        let facts =
            verify::Facts { id: self.id.clone(), not_before: self.not_before, not_after: self.not_after };
        Self::build(facts, self.chain.clone(), Arc::clone(&self.key), anchors)
    }

    fn build(
        facts: verify::Facts,
        chain: Vec<CertificateDer<'static>>,
        key: Arc<SingleCertAndKey>,
        anchors: Vec<CertificateDer<'static>>,
    ) -> Result<Self, IdentityError> {
        let verifier = Arc::new(MeshVerifier::new(&anchors, facts.id.parts().0)?);
        let mut client = client_config(Arc::clone(&verifier), Some(Arc::clone(&key)))?;
        let mut client = |alpn: &[u8]| {
            client.alpn_protocols = vec![alpn.to_vec()];
            Arc::new(client.clone())
        };
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(own)?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::<SingleCertAndKey>::clone(&key));
        server.alpn_protocols =
            [ALPN_MESH_H2, ALPN_MESH_H1, ALPN_MESH_TCP, ALPN_H2, ALPN_H1].map(<[u8]>::to_vec).into();
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(Self {
            id: facts.id,
            not_before: facts.not_before,
            not_after: facts.not_after,
            chain,
            anchors,
            client_h2: client(ALPN_MESH_H2),
            client_h1: client(ALPN_MESH_H1),
            client_tcp: client(ALPN_MESH_TCP),
            client_plain_h2: client(ALPN_H2),
            client_plain_h1: client(ALPN_H1),
            server: Arc::new(server),
            key,
        })
    }

    /// When the leaf is valid.
    pub fn validity(&self) -> Validity {
        Validity { not_before: self.not_before, not_after: self.not_after }
    }

    /// Our certificate and key, for a configuration that trusts others than the mesh's.
    pub(super) fn key(&self) -> Arc<SingleCertAndKey> {
        Arc::clone(&self.key)
    }
}

/// A client that trusts `verifier` and presents `key`, if it has one.
pub(super) fn client_config(
    verifier: Arc<MeshVerifier>,
    key: Option<Arc<SingleCertAndKey>>,
) -> Result<ClientConfig, IdentityError> {
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(own)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match key {
        Some(key) => builder.with_client_cert_resolver(key),
        None => builder.with_no_client_auth(),
    };
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

fn own(error: rustls::Error) -> IdentityError {
    IdentityError::Own(format!("TLS cannot be set up: {error}"))
}

/// The certificates of a PEM file.
pub fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let wrong = |why: String| IdentityError::Own(format!("{}: {why}", path.display()));
    let found = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| wrong(format!("no certificates can be read: {error}")))?;
    if found.is_empty() {
        return Err(wrong("holds no certificate; it must be PEM with a CERTIFICATE section".into()));
    }
    Ok(found)
}

/// The private key of a PEM file.
pub fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| {
        IdentityError::Own(format!("{}: no private key can be read: {error}", path.display()))
    })
}
