//! What a certificate signing request must be before it is signed: a pure check.
//!
//! In: the request's bytes and the identity that its sender proved. Out: the public key to certify. The request's
//! subject, extensions and wishes are never copied into the certificate; only its key is, after its signature
//! showed that the sender holds the private half.

use penstock_api::SpiffeId;
use rcgen::{CertificateSigningRequestParams, PublicKey, SanType};

/// A request with one name and a P-256 key has under 500 bytes.
pub const MAX_CSR: usize = 8 << 10;

/// Why a request is not signed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CsrError {
    /// Far from what a proxy sends.
    #[error("the CSR has {0} bytes; more than {MAX_CSR} are not read")]
    TooLarge(usize),
    /// It does not parse, or its signature is not that of its key.
    #[error("the CSR cannot be read or its signature does not fit its key: {0}")]
    Invalid(String),
    /// Another kind of key.
    #[error("the CSR's key is of a kind that is not signed; use ECDSA P-256 or Ed25519")]
    Key,
    /// It asks for the right to sign.
    #[error("the CSR asks for a CA certificate; workloads get leaf certificates only")]
    Authority,
    /// It asks for somebody else's name.
    #[error(
        "the CSR asks for {asked}, but the token proves {proven}; ask for that name alone, as the only URI SAN"
    )]
    Name {
        /// The names in the request.
        asked: String,
        /// The identity.
        proven: SpiffeId,
    },
}

impl CsrError {
    /// The word on the metric of refused requests.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::TooLarge(_) => "csr-too-large",
            Self::Invalid(_) => "csr-invalid",
            Self::Key => "csr-key",
            Self::Authority => "csr-authority",
            Self::Name { .. } => "csr-name",
        }
    }
}

/// Checks a request against the identity that its sender proved.
pub fn check(csr: &[u8], proven: &SpiffeId) -> Result<PublicKey, CsrError> {
    if csr.len() > MAX_CSR {
        return Err(CsrError::TooLarge(csr.len()));
    }
    let request = CertificateSigningRequestParams::from_der(&csr.into())
        .map_err(|error| CsrError::Invalid(error.to_string()))?;
    let algorithm = request.public_key.algorithm();
    if *algorithm != rcgen::PKCS_ECDSA_P256_SHA256 && *algorithm != rcgen::PKCS_ED25519 {
        return Err(CsrError::Key);
    }
    if matches!(request.params.is_ca, rcgen::IsCa::Ca(_)) {
        return Err(CsrError::Authority);
    }
    match &*request.params.subject_alt_names {
        [SanType::URI(uri)] if uri.as_str() == proven.as_str() => Ok(request.public_key),
        names => {
            let asked = match names {
                [] => "no name".to_owned(),
                names => names.iter().map(san).collect::<Vec<_>>().join(", "),
            };
            Err(CsrError::Name { asked, proven: proven.clone() })
        }
    }
}

fn san(name: &SanType) -> String {
    match name {
        SanType::URI(uri) => uri.to_string(),
        SanType::DnsName(name) => format!("DNS {name}"),
        SanType::IpAddress(address) => format!("address {address}"),
        SanType::Rfc822Name(name) => format!("mail {name}"),
        _ => "a name of another kind".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};

    use super::*;

    fn id(account: &str) -> SpiffeId {
        SpiffeId::new("cluster.local", "team-a", account).unwrap()
    }

    fn csr(key: &KeyPair, names: &[SanType]) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.to_vec();
        params.serialize_request(key).unwrap().der().to_vec()
    }

    fn uri(account: &str) -> SanType {
        SanType::URI(id(account).as_str().try_into().unwrap())
    }

    #[test]
    fn a_csr_is_signed_for_the_one_name_that_the_token_proves() {
        let key = KeyPair::generate().unwrap();
        assert!(check(&csr(&key, &[uri("resnet")]), &id("resnet")).is_ok());
        let ed = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        assert!(check(&csr(&ed, &[uri("resnet")]), &id("resnet")).is_ok());
    }

    #[test]
    fn a_csr_for_somebody_elses_identity_is_refused() {
        let key = KeyPair::generate().unwrap();
        let dns = SanType::DnsName("resnet.team-a".try_into().unwrap());
        let error = check(&csr(&key, &[uri("admin")]), &id("resnet")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the CSR asks for spiffe://cluster.local/ns/team-a/sa/admin, but the token proves \
             spiffe://cluster.local/ns/team-a/sa/resnet; ask for that name alone, as the only URI SAN"
        );
        for names in [&[][..], &[uri("resnet"), uri("admin")], &[uri("resnet"), dns.clone()], &[dns]] {
            let error = check(&csr(&key, names), &id("resnet")).unwrap_err();
            assert!(matches!(error, CsrError::Name { .. }), "{names:?}");
        }
    }

    #[test]
    fn a_csr_of_another_key_kind_or_without_its_own_signature_is_refused() {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
        assert_eq!(check(&csr(&key, &[uri("resnet")]), &id("resnet")).unwrap_err(), CsrError::Key);
        let mut forged = csr(&KeyPair::generate().unwrap(), &[uri("resnet")]);
        let last = forged.len() - 1;
        forged[last] ^= 1;
        for bad in [forged, b"garbage".to_vec(), Vec::new()] {
            assert!(matches!(check(&bad, &id("resnet")), Err(CsrError::Invalid(_))));
        }
        assert_eq!(check(&[0; MAX_CSR + 1], &id("resnet")).unwrap_err(), CsrError::TooLarge(MAX_CSR + 1));
    }
}
