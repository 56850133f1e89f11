//! The certificates of a bench: one authority, and a leaf for each of the client and the proxies A and B, all
//! P-256. A leaf carries a SPIFFE id, which Penstock and Envoy check, and the name `localhost`, which the others
//! and the load generator check.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::client::Resumption;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

/// Who gets a leaf.
const LEAVES: [&str; 3] = ["client", "a", "b"];

/// The SPIFFE id of a leaf.
pub(crate) fn spiffe(leaf: &str) -> String {
    format!("spiffe://cluster.local/ns/bench/sa/{leaf}")
}

/// Writes `ca.pem`, and of each leaf `NAME.pem`, `NAME.key` and both in `NAME.both.pem`, which HAProxy wants.
pub(crate) fn make(dir: &Path) -> Result<()> {
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.distinguished_name.push(DnType::CommonName, "penstock bench authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    fs::write(dir.join("ca.pem"), authority.self_signed(&key)?.pem())?;
    let authority = Issuer::new(authority, key);

    for leaf in LEAVES {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()])?;
        params.subject_alt_names.push(SanType::URI(Ia5String::try_from(spiffe(leaf))?));
        params.distinguished_name.push(DnType::CommonName, leaf);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &authority)?.pem();
        fs::write(dir.join(format!("{leaf}.pem")), &certificate)?;
        fs::write(dir.join(format!("{leaf}.key")), key.serialize_pem())?;
        fs::write(dir.join(format!("{leaf}.both.pem")), certificate + &key.serialize_pem())?;
    }
    Ok(())
}

/// What a client offers.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Alpn {
    /// HTTP/1.1.
    H1,
    /// HTTP/2.
    H2,
}

/// A client that trusts the bench's authority and presents `leaf`, if any. TLS 1.3, AES-128-GCM and X25519 only, and no session
/// is resumed, so that every subject does the same arithmetic.
pub(crate) fn connector(dir: &Path, leaf: Option<&str>, alpn: Alpn) -> Result<TlsConnector> {
    let mut provider = aws_lc_rs::default_provider();
    provider.cipher_suites = vec![aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256];
    provider.kx_groups = vec![aws_lc_rs::kx_group::X25519];
    let mut roots = RootCertStore::empty();
    let anchor = dir.join("ca.pem");
    roots.add(CertificateDer::from_pem_file(&anchor).with_context(|| format!("{}", anchor.display()))?)?;
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots);
    let mut config = match leaf {
        None => config.with_no_client_auth(),
        Some(leaf) => config.with_client_auth_cert(
            vec![CertificateDer::from_pem_file(dir.join(format!("{leaf}.pem"))).context("the certificate")?],
            PrivateKeyDer::from_pem_file(dir.join(format!("{leaf}.key"))).context("the key")?,
        )?,
    };
    config.resumption = Resumption::disabled();
    config.alpn_protocols = match alpn {
        Alpn::H1 => vec![b"http/1.1".to_vec()],
        Alpn::H2 => vec![b"h2".to_vec()],
    };
    Ok(TlsConnector::from(Arc::new(config)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_leaf_can_be_presented() {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path()).unwrap();
        for leaf in LEAVES {
            connector(dir.path(), Some(leaf), Alpn::H2).unwrap();
        }
        assert!(connector(dir.path(), Some("stranger"), Alpn::H1).is_err());
    }
}
