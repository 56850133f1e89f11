//! Certificates: roots, intermediates and leaves, all ECDSA P-256 where control makes the key.
//!
//! In: keys, names, times and serial numbers. Out: certificates. No files, no clock.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use penstock_api::SpiffeId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

/// A root signs nothing but intermediates; it is replaced by rotation, not by expiry.
const ROOT_LIFETIME: i64 = 10 * 365 * 86_400;
/// An intermediate is signed anew, for the same key, when less than a third of this is left.
const INTERMEDIATE_LIFETIME: i64 = 365 * 86_400;
/// Certificates begin a little in the past, because clocks differ; those that live for seconds only by a tenth of
/// that, because proxies reckon from the beginning when to renew.
const BACKDATE: i64 = 30;

/// How far back a certificate of that lifetime begins.
pub(super) fn backdate(lifetime: i64) -> i64 {
    BACKDATE.min(lifetime / 10)
}

/// A certificate authority's certificate and key.
pub(super) struct Pair {
    pub(super) certificate: CertificateDer<'static>,
    pub(super) pem: String,
    pub(super) key: KeyPair,
}

/// A root and the intermediate that signs under it.
#[derive(Debug)]
pub struct Issuing {
    root: CertificateDer<'static>,
    intermediate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    not_after: i64,
}

/// A signed certificate.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// The leaf, then its intermediate.
    pub chain: Vec<CertificateDer<'static>>,
    /// Seconds since the epoch.
    pub not_before: i64,
    /// Seconds since the epoch.
    pub not_after: i64,
}

/// The end of the year 9999, the last that a certificate can say.
const LAST: i64 = 253_402_300_799;

/// Writes a validity, seconds since the epoch, into `params`.
pub(crate) fn set_validity(params: &mut CertificateParams, from: i64, until: i64) {
    let since = |seconds: i64| Duration::from_secs(seconds.clamp(0, LAST).unsigned_abs());
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since(from);
    params.not_after = epoch + since(until);
}

/// A serial number: positive, as RFC 5280 asks.
fn serial(mut random: [u8; 16]) -> Option<SerialNumber> {
    random[0] &= 0x7f;
    Some(SerialNumber::from_slice(&random))
}

fn authority(name: &str, path: u8, lifetime: i64, now: i64, random: [u8; 16]) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Penstock");
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, now - backdate(lifetime), now.saturating_add(lifetime));
    params.serial_number = serial(random);
    params
}

/// A short name for an authority: two roots of one mesh must not share a name.
fn named(role: &str, random: [u8; 16]) -> String {
    let hex: String = random[8..12].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{role} {hex}")
}

/// A new root.
pub(super) fn root(now: i64, random: [u8; 16]) -> Result<Pair> {
    let key = KeyPair::generate()?;
    let params = authority(&named("root", random), 1, ROOT_LIFETIME, now, random);
    let certificate = params.self_signed(&key)?;
    Ok(Pair { pem: certificate.pem(), certificate: certificate.into(), key })
}

/// An intermediate under `root`, for a new key or for the one it had.
pub(super) fn intermediate(root: &Pair, key: Option<KeyPair>, now: i64, random: [u8; 16]) -> Result<Pair> {
    let key = match key {
        Some(key) => key,
        None => KeyPair::generate()?,
    };
    let issuer = Issuer::from_ca_cert_der(&root.certificate, &root.key)?;
    let (_, until) = validity(&root.certificate)?;
    ensure!(until > now, "the root has expired; rotate it with `penstock-control rotate-root`");
    let lifetime = INTERMEDIATE_LIFETIME.min(until - now);
    let mut params = authority(&named("intermediate", random), 0, lifetime, now, random);
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, &issuer)?;
    Ok(Pair { pem: certificate.pem(), certificate: certificate.into(), key })
}

/// Reads a certificate and its key.
pub(super) fn pair(certificate: &[u8], key: &[u8]) -> Result<Pair> {
    let pem = std::str::from_utf8(certificate).context("the certificate is not PEM")?.to_owned();
    let certificate = CertificateDer::from_pem_slice(certificate).context("the certificate is not PEM")?;
    let key = KeyPair::from_pem(std::str::from_utf8(key).context("the key is not PEM")?)
        .context("the key is not a PEM private key of a kind that can sign")?;
    let (_, parsed) =
        x509_parser::parse_x509_certificate(&certificate).context("the certificate is not X.509")?;
    ensure!(
        parsed.public_key().subject_public_key.data == key.public_key_raw(),
        "the key does not belong to the certificate"
    );
    Ok(Pair { certificate, pem, key })
}

/// Start and end of a certificate's validity, seconds since the epoch.
pub(crate) fn validity(certificate: &CertificateDer<'_>) -> Result<(i64, i64)> {
    let (_, parsed) =
        x509_parser::parse_x509_certificate(certificate).context("the certificate is not X.509")?;
    let validity = parsed.validity();
    Ok((validity.not_before.timestamp(), validity.not_after.timestamp()))
}

/// Whether an intermediate has so little time left that it should be signed anew.
pub(super) fn is_due(certificate: &CertificateDer<'_>, now: i64) -> Result<bool> {
    let (from, until) = validity(certificate)?;
    Ok(until - now < (until - from) / 3)
}

impl Issuing {
    /// Checks that the intermediate stands under the root and may sign.
    pub(super) fn new(root: CertificateDer<'static>, intermediate: Pair) -> Result<Self> {
        let (_, above) = x509_parser::parse_x509_certificate(&root).context("the root is not X.509")?;
        let (_, below) = x509_parser::parse_x509_certificate(&intermediate.certificate)
            .context("the intermediate is not X.509")?;
        if below.verify_signature(Some(above.public_key())).is_err() {
            bail!("the intermediate was not signed by the root");
        }
        ensure!(below.is_ca(), "the intermediate may not sign: it is no CA certificate");
        let (_, not_after) = validity(&intermediate.certificate)?;
        let issuer = Issuer::from_ca_cert_der(&intermediate.certificate, intermediate.key)?;
        let intermediate = intermediate.certificate;
        Ok(Self { root, intermediate, issuer, not_after })
    }

    /// The root.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    /// Signs a certificate for `id`: for clients and servers, never longer than the intermediate lives. Nothing
    /// but the public key comes from whoever asked for it.
    pub fn sign(
        &self,
        id: &SpiffeId,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: i64,
        random: [u8; 16],
    ) -> Result<Leaf> {
        let lifetime = i64::try_from(lifetime.as_secs().max(1)).unwrap_or(i64::MAX);
        let (not_before, not_after) =
            (now - backdate(lifetime), self.not_after.min(now.saturating_add(lifetime)));
        ensure!(
            not_after > now,
            "the intermediate has expired, so nothing can be signed; renew or rotate it"
        );
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, not_before, not_after);
        params.serial_number = serial(random);
        let leaf = params.signed_by(key, &self.issuer)?;
        Ok(Leaf { chain: vec![leaf.into(), self.intermediate.clone()], not_before, not_after })
    }
}
