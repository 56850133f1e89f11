//! How a peer proves who it is.
//!
//! [`MeshVerifier`] checks in the handshake that the certificate leads to an anchor, is valid now, and names exactly
//! one SPIFFE id of our trust domain. Which id was expected is a matter for after the handshake: [`verified_peer`]
//! makes a [`Verified`], which nothing else can make, and [`Verified::expect`] compares. Host names play no part.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use penstock_api::{SpiffeId, view};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, CommonState, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    RootCertStore, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::{IdentityError, material};

/// An identity that a handshake has proven.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Verified(SpiffeId);

impl Verified {
    /// Who it is.
    pub fn id(&self) -> &SpiffeId {
        &self.0
    }

    /// The id alone.
    pub fn into_id(self) -> SpiffeId {
        self.0
    }

    /// Whether it is who was expected.
    pub fn expect(&self, expected: &SpiffeId) -> Result<(), IdentityError> {
        if self.0 == *expected {
            return Ok(());
        }
        Err(IdentityError::WrongIdentity { expected: expected.clone(), actual: self.0.clone() })
    }
}

/// Who is at the other end of a connection whose handshake is over. The configurations of [`Material`] let no
/// handshake end without the proof.
///
/// [`Material`]: super::Material
pub fn verified_peer(connection: &CommonState) -> Result<Verified, IdentityError> {
    match connection.peer_certificates() {
        Some([leaf, ..]) if !connection.is_handshaking() => Ok(Verified(leaf_facts(leaf)?.id)),
        _ => Err(IdentityError::NoCertificate),
    }
}

/// The story behind a failed handshake or a broken connection; `None`: it was not about identity.
pub fn explain(error: &std::io::Error) -> Option<IdentityError> {
    let tls = error.get_ref()?.downcast_ref::<Error>()?;
    Some(match tls {
        Error::InvalidCertificate(CertificateError::Other(other)) => {
            match other.0.downcast_ref::<IdentityError>() {
                Some(error) => error.clone(),
                None => IdentityError::Unacceptable(other.to_string()),
            }
        }
        Error::InvalidCertificate(error) => IdentityError::Unacceptable(error.to_string()),
        Error::NoCertificatesPresented => IdentityError::NoCertificate,
        Error::AlertReceived(alert) => {
            // `CertificateUnknown` rather than rustls' `the_alert: CertificateUnknown`.
            IdentityError::Refused(format!("{alert:?}"))
        }
        _ => return None,
    })
}

/// Verifies both sides of the mesh: servers as a client, and clients as a server.
#[derive(Debug)]
pub struct MeshVerifier {
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    trust_domain: String,
    provider: Arc<CryptoProvider>,
}

impl MeshVerifier {
    /// Trusts what leads to `anchors` and lies in `trust_domain`.
    pub fn new(anchors: &[CertificateDer<'static>], trust_domain: &str) -> Result<Self, IdentityError> {
        let roots = Arc::new(roots(anchors)?);
        let provider = material::provider();
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| IdentityError::Own(format!("the trust anchors are of no use: {error}")))?;
        Ok(Self { roots, clients, trust_domain: trust_domain.to_owned(), provider })
    }

    /// Checks the name, once the chain is known to be good.
    fn check_name(&self, leaf: &CertificateDer<'_>) -> Result<(), IdentityError> {
        let no_identity =
            |found| IdentityError::NoIdentity { found, trust_domain: self.trust_domain.clone() };
        let id = spiffe_id(leaf).map_err(no_identity)?;
        if id.parts().0 == self.trust_domain { Ok(()) } else { Err(no_identity(id.to_string())) }
    }

    /// Turns what webpki found into a story.
    fn tell(&self, leaf: &CertificateDer<'_>, error: Error) -> Error {
        let Ok((_, parsed)) = X509Certificate::from_der(leaf) else { return error };
        let id = spiffe_id(leaf).map_or_else(|found| found, |id| id.to_string());
        let Error::InvalidCertificate(cause) = &error else { return error };
        let validity = parsed.validity();
        refuse(match cause {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                // An intermediate may be the one that expired; then the leaf's own date says nothing.
                IdentityError::Expired { id, at: rfc3339(expiry_of(cause, validity.not_after.timestamp())) }
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                IdentityError::NotYetValid { id, at: rfc3339(validity.not_before.timestamp()) }
            }
            CertificateError::UnknownIssuer => IdentityError::UnknownAnchor {
                id,
                issuer: parsed.issuer().to_string(),
                anchors: self.roots.len(),
            },
            _ => return error,
        })
    }
}

fn expiry_of(cause: &CertificateError, leaf: i64) -> i64 {
    match cause {
        CertificateError::ExpiredContext { not_after, .. } => not_after.as_secs() as i64,
        _ => leaf,
    }
}

fn refuse(error: IdentityError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}

fn only_tls13() -> Error {
    Error::General("only TLS 1.3 is spoken".into())
}

impl ServerCertVerifier for MeshVerifier {
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
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)
            .map_err(|error| self.tell(leaf, error))?;
        self.check_name(leaf).map_err(refuse)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
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

impl ClientCertVerifier for MeshVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A client has one certificate; hints would only make the handshake longer.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let proof = self
            .clients
            .verify_client_cert(leaf, intermediates, now)
            .map_err(|error| self.tell(leaf, error))?;
        self.check_name(leaf).map_err(refuse)?;
        Ok(proof)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _leaf: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
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

/// What a leaf says.
pub(super) struct Facts {
    pub(super) id: SpiffeId,
    pub(super) not_before: u64,
    pub(super) not_after: u64,
}

/// Reads a leaf that is known to be good, or is our own.
pub(super) fn leaf_facts(leaf: &CertificateDer<'_>) -> Result<Facts, IdentityError> {
    let unreadable = |why: String| IdentityError::Unacceptable(why);
    let (_, parsed) = X509Certificate::from_der(leaf).map_err(|error| unreadable(error.to_string()))?;
    let id = spiffe_id(leaf).map_err(|found| unreadable(format!("it names {found}, not one SPIFFE id")))?;
    let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
    let validity = parsed.validity();
    let not_before = seconds(validity.not_before.timestamp());
    Ok(Facts { id, not_before, not_after: seconds(validity.not_after.timestamp()) })
}

/// The one SPIFFE id of a leaf, or what it names instead, in words.
fn spiffe_id(leaf: &CertificateDer<'_>) -> Result<SpiffeId, String> {
    let Ok((_, parsed)) = X509Certificate::from_der(leaf) else {
        return Err("nothing that can be read".into());
    };
    let names = match parsed.subject_alternative_name() {
        Ok(Some(extension)) => extension.value.general_names.as_slice(),
        Ok(None) => &[],
        Err(_) => return Err("alternative names that cannot be read".into()),
    };
    let mut uris = names.iter().filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    });
    match (uris.next(), uris.count()) {
        (None, _) => Err("no URI".into()),
        (Some(uri), 0) => uri.parse().map_err(|_| format!("{uri:?}")),
        (Some(_), more) => Err(format!("{} URIs", more + 1)),
    }
}

/// The anchors as webpki wants them; refuses an empty set and anything that is no certificate.
pub(super) fn roots(anchors: &[CertificateDer<'static>]) -> Result<RootCertStore, IdentityError> {
    if anchors.is_empty() {
        return Err(IdentityError::Own("there are no trust anchors; nobody could be trusted".into()));
    }
    let mut roots = RootCertStore::empty();
    for (i, anchor) in anchors.iter().enumerate() {
        roots.add(anchor.clone()).map_err(|error| {
            IdentityError::Own(format!("trust anchor {i} of {} is no certificate: {error}", anchors.len()))
        })?;
    }
    Ok(roots)
}

/// A certificate as `/certs` shows it.
pub(super) fn view(der: &CertificateDer<'_>, role: &str) -> view::Certificate {
    let Ok((_, parsed)) = X509Certificate::from_der(der) else {
        return view::Certificate { name: "unreadable".into(), role: role.into(), ..Default::default() };
    };
    let subject = || parsed.subject().to_string();
    view::Certificate {
        name: spiffe_id(der).map_or_else(|_| subject(), |id| id.to_string()),
        serial: parsed.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
        not_before: parsed.validity().not_before.timestamp(),
        not_after: parsed.validity().not_after.timestamp(),
        role: role.into(),
    }
}

/// Seconds since the epoch as text.
pub(super) fn rfc3339(seconds: i64) -> String {
    let time = UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    humantime::format_rfc3339_seconds(time).to_string()
}
