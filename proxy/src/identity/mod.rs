//! Who this proxy is, and how it proves who others are.
//!
//! In: a certificate from control ([`sign`]) or from files, and trust anchors, pushed or from files. Out:
//! [`Material`], the TLS configurations of the moment, behind an atomic pointer that the data path reads without a
//! lock. A new certificate or new anchors replace the material as a whole; connections that are open keep what they
//! were opened with. Keys live in memory only.
//!
//! What can go wrong is an [`IdentityError`]; each names the peer, the cause and the way out.

pub mod control;
pub mod material;
pub mod renewal;
pub mod sign;
pub mod verify;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use penstock_api::{SpiffeId, view};
use rustls_pki_types::CertificateDer;
use tokio::sync::{Notify, watch};

pub use material::Material;
pub use verify::{Verified, explain, verified_peer};

/// The SHA-256 of a certificate, in hex; `None`: this build's TLS has none.
pub fn sha256(certificate: &CertificateDer<'_>) -> Option<String> {
    use std::fmt::Write;
    let suite = rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13()?;
    let digest = suite.common.hash_provider.hash(certificate);
    let mut text = String::with_capacity(2 * digest.as_ref().len());
    for byte in digest.as_ref() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Some(text)
}

/// What is wrong with a certificate, a key, an anchor, or the way to get them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The peer's certificate is over.
    #[error(
        "the certificate of {id} expired at {at}; look at why its proxy does not renew it (is control reachable \
         from there, is its token valid?), and at the clocks of both machines"
    )]
    Expired {
        /// The identity it names.
        id: String,
        /// RFC 3339.
        at: String,
    },
    /// The peer's certificate has not begun.
    #[error("the certificate of {id} is valid only from {at}; the clocks of the two machines disagree")]
    NotYetValid {
        /// The identity it names.
        id: String,
        /// RFC 3339.
        at: String,
    },
    /// No anchor that we hold signed it.
    #[error(
        "the certificate of {id} was issued by {issuer:?}, which leads to none of the {anchors} trust anchors held \
         here; if the root was rotated, both roots must be in force until every certificate is renewed"
    )]
    UnknownAnchor {
        /// The identity it names.
        id: String,
        /// Its issuer.
        issuer: String,
        /// How many anchors we hold.
        anchors: usize,
    },
    /// It has another name than a SPIFFE id of the mesh, or several.
    #[error(
        "the peer's certificate names {found}; a certificate of the mesh has exactly one URI, a SPIFFE id of the \
         trust domain {trust_domain:?}"
    )]
    NoIdentity {
        /// What it names, in words.
        found: String,
        /// Ours.
        trust_domain: String,
    },
    /// It is somebody else.
    #[error(
        "the peer proved to be {actual} where {expected} was expected; if the pod was just replaced, the next push \
         corrects it, otherwise something else answers at that address"
    )]
    WrongIdentity {
        /// Who was to answer.
        expected: SpiffeId,
        /// Who did.
        actual: SpiffeId,
    },
    /// It showed no certificate.
    #[error("the peer showed no certificate")]
    NoCertificate,
    /// The certificate is broken in another way.
    #[error("the peer's certificate was refused: {0}")]
    Unacceptable(String),
    /// The peer does not accept us.
    #[error("the peer refused the handshake ({0}); its log says what it has against our certificate")]
    Refused(String),
    /// Our own key, certificate or anchors are of no use.
    #[error("{0}")]
    Own(String),
    /// Control did not sign.
    #[error("control did not sign a certificate for {id}: {why}")]
    NotSigned {
        /// Whose certificate.
        id: SpiffeId,
        /// Why, and what to do.
        why: String,
    },
    /// Control signed, but by a clock that is not ours.
    #[error(
        "{how}: the certificate that it signed for {id} is valid from {from} until {until}; compare both clocks with a \
         third one (does NTP run on both machines?)"
    )]
    Untimely {
        /// Whose certificate.
        id: SpiffeId,
        /// How the clocks disagree.
        how: renewal::Untimely,
        /// RFC 3339.
        from: String,
        /// RFC 3339.
        until: String,
    },
}

/// The identity of this proxy, and the anchors that it trusts.
#[derive(Debug)]
pub struct Identity {
    current: ArcSwapOption<Material>,
    /// Why there was no new certificate when control was last asked.
    wanting: ArcSwapOption<IdentityError>,
    changed: watch::Sender<u64>,
    renew: Notify,
    /// Anchors that control pushed. They win over those that come with a certificate, which may be older.
    pushed: Mutex<Option<Vec<CertificateDer<'static>>>>,
}

impl Default for Identity {
    fn default() -> Self {
        Self::new()
    }
}

impl Identity {
    /// No identity yet.
    pub fn new() -> Self {
        Self {
            current: ArcSwapOption::empty(),
            wanting: ArcSwapOption::empty(),
            changed: watch::Sender::new(0),
            renew: Notify::new(),
            pushed: Mutex::new(None),
        }
    }

    /// An identity from PEM files: the leaf with its intermediates, its key, and the anchors. The trust domain is the
    /// one that the leaf names.
    pub fn from_files(certificate: &Path, key: &Path, anchors: &Path) -> Result<Self, IdentityError> {
        let material = Material::new(
            material::certificates(certificate)?,
            material::private_key(key)?,
            material::certificates(anchors)?,
        )?;
        let identity = Self::new();
        identity.set(material, SystemTime::now());
        Ok(identity)
    }

    /// What to use now; `None` before the first certificate. Reads an atomic pointer.
    pub fn current(&self) -> Option<Arc<Material>> {
        self.current.load_full()
    }

    /// Why there is no certificate, or no newer one, if control was asked in vain.
    pub fn wanting(&self) -> Option<Arc<IdentityError>> {
        self.wanting.load_full()
    }

    /// Counts the replacements of [`current`](Self::current).
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Takes pushed anchors into use for new connections. Refuses an empty or broken set: the old one stays.
    pub fn set_anchors(&self, anchors: Vec<CertificateDer<'static>>) -> Result<(), IdentityError> {
        let mut pushed = self.pushed();
        if pushed.as_ref() == Some(&anchors) {
            return Ok(());
        }
        verify::roots(&anchors)?;
        if let Some(material) = self.current() {
            self.publish(material.with_anchors(anchors.clone())?);
        }
        tracing::info!(anchors = anchors.len(), "trust anchors were replaced by control's");
        *pushed = Some(anchors);
        Ok(())
    }

    /// The anchors in force: the pushed ones, else those that came with the certificate.
    pub fn anchors(&self) -> Vec<CertificateDer<'static>> {
        match &*self.pushed() {
            Some(anchors) => anchors.clone(),
            None => self.current().map(|material| material.anchors.clone()).unwrap_or_default(),
        }
    }

    /// Asks for a new certificate now; [`sign::keep_signed`] obeys.
    pub fn renew_now(&self) {
        self.renew.notify_one();
    }

    async fn renew_asked(&self) {
        self.renew.notified().await;
    }

    /// Takes a newly signed certificate into use.
    fn set(&self, material: Material, now: SystemTime) {
        let pushed = self.pushed();
        let material = match &*pushed {
            Some(anchors) if *anchors != material.anchors => {
                // Pushed anchors have been checked when they came.
                material.with_anchors(anchors.clone()).unwrap_or(material)
            }
            _ => material,
        };
        let lifetime = Duration::from_secs(material.not_after.saturating_sub(renewal::unix(now)));
        tracing::info!(
            id = %material.id,
            valid_for = %humantime::format_duration(lifetime),
            "certificate in use"
        );
        metrics::gauge!(crate::telemetry::metric::CERTIFICATE_EXPIRY.name).set(material.not_after as f64);
        self.wanting.store(None);
        self.publish(material);
    }

    fn publish(&self, material: Material) {
        self.current.store(Some(Arc::new(material)));
        self.changed.send_modify(|count| *count += 1);
    }

    /// The certificates as `/certs` shows them: the chain, then the anchors. Never keys.
    pub fn certificates(&self) -> Vec<view::Certificate> {
        let chain = self.current().map(|material| material.chain.clone()).unwrap_or_default();
        let role = |i| if i == 0 { "leaf" } else { "intermediate" };
        let chain = chain.iter().enumerate().map(|(i, der)| verify::view(der, role(i)));
        chain.chain(self.anchors().iter().map(|der| verify::view(der, "anchor"))).collect()
    }

    fn pushed(&self) -> MutexGuard<'_, Option<Vec<CertificateDer<'static>>>> {
        // A panic while holding it cannot leave the list half-written.
        self.pushed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
