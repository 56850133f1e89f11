//! Certificates of every kind, made on the spot.

use std::time::{Duration, SystemTime};

use penstock_proxy::identity::{Identity, Material};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, DnType, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

pub(crate) const WEB: &str = "spiffe://cluster.local/ns/a/sa/web";
pub(crate) const DIGITS: &str = "spiffe://cluster.local/ns/a/sa/digits";
pub(crate) const CONTROL: &str = "spiffe://cluster.local/ns/penstock-system/sa/penstock-control";

/// A root of trust.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a leaf shall be.
pub(crate) struct Leaf<'a> {
    pub(crate) uris: &'a [&'a str],
    pub(crate) not_before: SystemTime,
    pub(crate) not_after: SystemTime,
}

impl<'a> Leaf<'a> {
    /// In its life, by an hour on both sides.
    pub(crate) fn of(uris: &'a [&'a str]) -> Self {
        let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
        Self { uris, not_before: now - hour, not_after: now + hour }
    }

    fn params(&self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.subject_alt_names =
            self.uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        (params.not_before, params.not_after) = (self.not_before.into(), self.not_after.into());
        params
    }
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    pub(crate) fn anchor(&self) -> CertificateDer<'static> {
        self.issuer.der().clone()
    }

    pub(crate) fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// A leaf and its key.
    pub(crate) fn leaf(&self, leaf: &Leaf<'_>) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
        let key = KeyPair::generate().unwrap();
        let certificate = leaf.params().signed_by(&key, &self.issuer).unwrap();
        (certificate.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into())
    }

    /// Signs a request, with the names that it asks for.
    pub(crate) fn sign(
        &self,
        csr: &[u8],
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> CertificateDer<'static> {
        let mut request = CertificateSigningRequestParams::from_der(&csr.into()).unwrap();
        (request.params.not_before, request.params.not_after) = (not_before.into(), not_after.into());
        request.signed_by(&self.issuer).unwrap().der().clone()
    }

    /// Everything that a proxy of that id needs, trusting this authority.
    pub(crate) fn material(&self, id: &str) -> Material {
        self.material_of(&Leaf::of(&[id]), &[self])
    }

    pub(crate) fn material_of(&self, leaf: &Leaf<'_>, trusted: &[&Self]) -> Material {
        let (certificate, key) = self.leaf(leaf);
        Material::new(vec![certificate], key, trusted.iter().map(|other| other.anchor()).collect()).unwrap()
    }

    /// An identity from files.
    pub(crate) fn identity(&self, id: &str) -> Identity {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: String| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let key = KeyPair::generate().unwrap();
        let certificate = Leaf::of(&[id]).params().signed_by(&key, &self.issuer).unwrap();
        Identity::from_files(
            &file("leaf.pem", certificate.pem()),
            &file("key.pem", key.serialize_pem()),
            &file("anchors.pem", self.pem()),
        )
        .unwrap()
    }
}
