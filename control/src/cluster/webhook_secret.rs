//! The webhook's certificate as it lies in the Secret `penstock-webhook-tls`, and when which step of its replacement is taken. Pure, but for
//! the keys that it draws.
//!
//! A leaf of 90 days, replaced after 60, under an authority of its own that signs this one leaf and whose key is forgotten at once: nobody can make
//! another certificate that API servers would take for the webhook's. So a new leaf has a new authority, and API servers have to know that before
//! they see the leaf:
//!
//! 1. the new pair is written beside the one in force (`next-…`); all that are known go into the caBundle;
//! 2. once the caBundle has been so for 30 s, the new pair takes the old one's place; replicas serve it within seconds;
//! 3. once that has been so for a minute, the old authority leaves the caBundle.
//!
//! Whoever holds the Lease counts these times itself, from nought, so that a holder's death costs a minute and never an admission.

use std::time::Duration;

use anyhow::{Context, Result};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
};
use rustls::sign::CertifiedKey;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::secret::{self, AUTHORITY, CERTIFICATE, KEY, NEXT, is_own, text};
use crate::webhook::certificate;

/// The name of the Secret.
pub(super) const NAME: &str = "penstock-webhook-tls";
/// The Service that API servers reach the webhook by.
const SERVICE: &str = "penstock-webhook";
/// The authority that is on its way out.
const PREVIOUS: &str = "previous-ca.crt";

/// How long a leaf lives. Long enough that a cluster which was switched off for a month or two comes back; short enough that replacing
/// it is nothing that happens for the first time after years.
const LIFETIME: i64 = 90 * 86_400;
/// API servers hear of a changed webhook configuration by a watch, within a second or so; a busy one is given more.
const HEARD: Duration = Duration::from_secs(30);
/// Replicas read the Secret every few seconds; and connections of API servers, which were made under the old one, are no trouble.
const SERVED: Duration = Duration::from_secs(60);

/// A leaf, its key and who signed it, as PEM.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Pair {
    certificate: String,
    key: String,
    authority: String,
}

/// What the Secret has.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Webhook {
    pub(super) own: bool,
    pub(super) current: Pair,
    pub(super) next: Option<Pair>,
    pub(super) previous: Option<String>,
}

impl std::fmt::Debug for Webhook {
    /// Without the keys.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Webhook(own: {}, next: {})", self.own, self.next.is_some())
    }
}

/// What a holder of the Lease has seen for how long.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    /// The caBundle as it should be.
    pub(super) bundle: Duration,
    /// The certificate that is in force.
    pub(super) current: Duration,
}

fn params(name: &str, now: i64) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    // Clocks differ.
    crate::identity::set_validity(&mut params, now - 300, now.saturating_add(LIFETIME));
    params
}

impl Pair {
    /// A new leaf under a new authority, for the webhook's Service in that namespace.
    pub(super) fn fresh(namespace: &str, now: i64) -> Result<Self> {
        // API servers of every version and build know this one.
        let key = || KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256);
        let (above, below) = (key()?, key()?);
        let mut authority = params(&format!("penstock webhook {:08x}", rand::random::<u32>()), now);
        authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let signed = authority.self_signed(&above)?;
        let host = format!("{SERVICE}.{namespace}.svc");
        let mut leaf = params(&host, now);
        leaf.subject_alt_names = vec![host.as_str().try_into().map(rcgen::SanType::DnsName)?];
        leaf.is_ca = IsCa::ExplicitNoCa;
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        leaf.use_authority_key_identifier_extension = true;
        let certificate = leaf.signed_by(&below, &Issuer::from_ca_cert_der(signed.der(), &above)?)?;
        Ok(Self { certificate: certificate.pem(), key: below.serialize_pem(), authority: signed.pem() })
    }

    /// As rustls serves it.
    pub(super) fn certified(&self) -> Result<CertifiedKey> {
        certificate::of_pem(self.certificate.as_bytes(), self.key.as_bytes())
            .context("tls.key does not belong to tls.crt, or one of them cannot be used")
    }

    /// Whether two thirds of its life are over.
    fn is_due(&self, now: i64) -> bool {
        let life = CertificateDer::from_pem_slice(self.certificate.as_bytes())
            .ok()
            .and_then(|der| crate::identity::validity(&der).ok());
        life.is_none_or(|(from, until)| until - now < (until - from) / 3)
    }
}

impl Webhook {
    /// The first one.
    pub(super) fn fresh(namespace: &str, now: i64) -> Result<Self> {
        Ok(Self { own: true, current: Pair::fresh(namespace, now)?, next: None, previous: None })
    }

    /// All authorities that API servers should know, in a fixed order.
    pub(super) fn bundle(&self) -> String {
        let next = self.next.as_ref().map(|next| &next.authority);
        let all = std::iter::once(&self.current.authority).chain(next).chain(&self.previous);
        all.map(|pem| format!("{}\n", pem.trim())).collect()
    }

    /// The state after this one, if it is time for it.
    pub(super) fn advance(&self, namespace: &str, seen: Seen, now: i64) -> Result<Option<Self>> {
        if !self.own {
            return Ok(None);
        }
        let mut after = self.clone();
        if let Some(next) = &self.next {
            if seen.bundle < HEARD {
                return Ok(None);
            }
            after.previous = Some(std::mem::replace(&mut after.current, next.clone()).authority);
            after.next = None;
        } else if self.previous.is_some() {
            if seen.current < SERVED {
                return Ok(None);
            }
            after.previous = None;
        } else if self.current.is_due(now) {
            after.next = Some(Pair::fresh(namespace, now)?);
        } else {
            return Ok(None);
        }
        Ok(Some(after))
    }
}

/// Reads a Secret; what is wrong is told by its key.
pub(super) fn read(secret: &Secret) -> Result<Webhook> {
    let own = is_own(secret);
    let pair = |prefix: &str| -> Result<Option<Pair>> {
        let needed = |key: &str| text(secret, &format!("{prefix}{key}"));
        match (needed(CERTIFICATE)?, needed(KEY)?, needed(AUTHORITY)?) {
            (Some(certificate), Some(key), Some(authority)) => {
                CertificateDer::from_pem_slice(authority.as_bytes())
                    .with_context(|| format!("{prefix}{AUTHORITY} is not a PEM certificate"))?;
                let pair = Pair { certificate, key, authority };
                pair.certified()?;
                Ok(Some(pair))
            }
            _ => Ok(None),
        }
    };
    let current = pair("")?.with_context(|| format!("{CERTIFICATE}, {KEY} or {AUTHORITY} is missing"))?;
    let (next, previous) = if own { (pair(NEXT)?, text(secret, PREVIOUS)?) } else { (None, None) };
    Ok(Webhook { own, current, next, previous })
}

/// The Secret that has it, on the ground of the one that was found.
pub(super) fn write(webhook: &Webhook, found: Option<Secret>) -> Secret {
    let mut secret = found.unwrap_or_else(|| secret::made(NAME));
    let data = secret.data.get_or_insert_default();
    data.retain(|key, _| !key.starts_with(NEXT) && key != PREVIOUS);
    let mut put = |key: String, pem: &String| data.insert(key, ByteString(pem.clone().into_bytes()));
    for (prefix, pair) in
        std::iter::once(("", &webhook.current)).chain(webhook.next.as_ref().map(|next| (NEXT, next)))
    {
        put(format!("{prefix}{CERTIFICATE}"), &pair.certificate);
        put(format!("{prefix}{KEY}"), &pair.key);
        put(format!("{prefix}{AUTHORITY}"), &pair.authority);
    }
    if let Some(previous) = &webhook.previous {
        put(PREVIOUS.to_owned(), previous);
    }
    secret
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;
    const HOME: &str = "penstock-system";

    fn seen(bundle: u64, current: u64) -> Seen {
        Seen { bundle: Duration::from_secs(bundle), current: Duration::from_secs(current) }
    }

    fn step(webhook: &Webhook, seen: Seen, now: i64) -> Option<Webhook> {
        webhook.advance(HOME, seen, now).unwrap()
    }

    #[test]
    fn api_servers_know_an_authority_before_they_see_its_leaf_and_until_nobody_shows_it() {
        let first = Webhook::fresh(HOME, NOW).unwrap();
        let late = NOW + 61 * 86_400;
        assert_eq!(step(&first, seen(9_999, 9_999), NOW + 59 * 86_400), None);
        let both = step(&first, seen(9_999, 9_999), late).unwrap();
        assert!(both.current == first.current && both.bundle().matches("BEGIN").count() == 2);
        assert_eq!(step(&both, seen(29, 9_999), late), None);
        let replaced = step(&both, seen(30, 9_999), late).unwrap();
        assert!(Some(&replaced.current) == both.next.as_ref() && replaced.next.is_none());
        assert_eq!(replaced.bundle().matches("BEGIN").count(), 2);
        assert!(replaced.bundle().contains(first.current.authority.trim()));
        assert_eq!(step(&replaced, seen(9_999, 59), late), None);
        let last = step(&replaced, seen(9_999, 60), late).unwrap();
        assert_eq!(last.bundle().trim(), replaced.current.authority.trim());
        assert_eq!(step(&last, seen(9_999, 9_999), late), None);
        for webhook in [first, both, replaced, last] {
            assert!(read(&write(&webhook, None)).unwrap() == webhook);
        }
    }

    #[test]
    fn a_leaf_is_for_the_service_and_verified_by_its_authority_alone() {
        use rustls::RootCertStore;
        use rustls::client::WebPkiServerVerifier;
        use rustls::client::danger::ServerCertVerifier as _;
        use rustls_pki_types::{ServerName, UnixTime};
        let verified = |pair: &Pair, authority: &str, name: &str| {
            let mut roots = RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(authority.as_bytes()).unwrap()).unwrap();
            let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let verifier =
                WebPkiServerVerifier::builder_with_provider(roots.into(), provider).build().unwrap();
            let certified = pair.certified().unwrap();
            let now = UnixTime::since_unix_epoch(Duration::from_secs(NOW as u64 + 5));
            let name = ServerName::try_from(name.to_owned()).unwrap();
            verifier.verify_server_cert(&certified.cert[0], &certified.cert[1..], &name, &[], now).is_ok()
        };
        let (pair, other) = (Pair::fresh(HOME, NOW).unwrap(), Pair::fresh(HOME, NOW).unwrap());
        let name = "penstock-webhook.penstock-system.svc";
        assert!(verified(&pair, &pair.authority, name));
        assert!(!verified(&pair, &other.authority, name));
        assert!(!verified(&pair, &pair.authority, "kubernetes.default.svc"));
    }

    #[test]
    fn one_that_was_supplied_is_served_and_not_replaced() {
        let mut secret = write(&Webhook::fresh(HOME, NOW).unwrap(), None);
        secret.metadata.labels = None;
        let webhook = read(&secret).unwrap();
        assert_eq!(step(&webhook, seen(9_999, 9_999), NOW + LIFETIME), None);
    }

    #[test]
    fn what_makes_no_sense_is_told_by_its_key() {
        let (good, other) = (Webhook::fresh(HOME, NOW).unwrap(), Webhook::fresh(HOME, NOW).unwrap());
        let mixed =
            Webhook { current: Pair { key: other.current.key, ..good.current.clone() }, ..good.clone() };
        let mut missing = write(&good, None);
        missing.data.as_mut().unwrap().remove(AUTHORITY);
        for (secret, words) in [(write(&mixed, None), "does not belong"), (missing, "is missing")] {
            let told = format!("{:#}", read(&secret).unwrap_err());
            assert!(told.contains(words) && !told.contains("PRIVATE"), "{told}");
        }
    }
}
