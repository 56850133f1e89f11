//! Having certificates signed, and signed again before they are over.
//!
//! In: where control is, the file of the token, our id. Out: a new key and certificate in the [`Identity`], time and
//! again. The key is made here, for each certificate anew, and never leaves the process. When control is gone, the
//! certificate in force stays in use until it really expires, and control is asked again and again, with backoff.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use penstock_api::SpiffeId;
use penstock_api::v1::SignRequest;
use penstock_api::v1::identity_client::IdentityClient;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tonic::{Code, Request, Status};

use super::control::Control;
use super::material::Material;
use super::{Identity, IdentityError, renewal};
use crate::backoff::Backoff;
use crate::telemetry::metric;

/// Signing is one small question.
const SIGN_TIMEOUT: Duration = Duration::from_secs(10);
/// Timers stand still while a machine sleeps; the wall clock, which certificates follow, does not.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// What it takes to have a certificate signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer {
    /// Where control is.
    pub control: Control,
    /// The file of the bearer token, read anew each time: the kubelet replaces it.
    pub token: PathBuf,
    /// The identity that the token proves.
    pub id: SpiffeId,
}

impl Signer {
    /// Makes a key and has it certified.
    pub async fn sign(&self, identity: &Identity) -> Result<Material, IdentityError> {
        let not_signed = |why: String| IdentityError::NotSigned { id: self.id.clone(), why };
        let (key, csr) = request(&self.id).map_err(|error| not_signed(error.to_string()))?;
        let token = std::fs::read_to_string(&self.token).map_err(|error| {
            not_signed(format!("the token {} cannot be read: {error}", self.token.display()))
        })?;
        let bearer = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| not_signed(format!("{} holds something that is no token", self.token.display())))?;
        let channel =
            self.control.connect_unproven(identity).await.map_err(|error| not_signed(error.to_string()))?;
        let mut request = Request::new(SignRequest { csr });
        request.metadata_mut().insert("authorization", bearer);
        request.set_timeout(SIGN_TIMEOUT);
        let call =
            tokio::time::timeout(SIGN_TIMEOUT, async { IdentityClient::new(channel).sign(request).await });
        let answer = match call.await {
            Ok(answer) => answer.map_err(|status| not_signed(self.refusal(&status)))?.into_inner(),
            Err(_) => return Err(not_signed(format!("no answer for {SIGN_TIMEOUT:?}"))),
        };
        let der = |certificates: Vec<Vec<u8>>| certificates.into_iter().map(CertificateDer::from).collect();
        let material = Material::new(der(answer.chain), key, der(answer.anchors))?;
        if material.id != self.id {
            return Err(not_signed(format!("the certificate that came is for {}", material.id)));
        }
        Ok(material)
    }

    fn refusal(&self, status: &Status) -> String {
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => format!(
                "the token {} was refused: {}; make a new one with `penstock-control token`, or look at the pod's \
                 projected token",
                self.token.display(),
                status.message()
            ),
            _ => format!("{}: {}", status.code().description(), status.message()),
        }
    }
}

/// Keeps the identity signed. Runs until it is dropped.
pub async fn keep_signed(identity: Arc<Identity>, signer: Signer) {
    let mut backoff = Backoff::default();
    loop {
        let signed = signer.sign(&identity).await;
        let now = SystemTime::now();
        let wait = match signed {
            Ok(material) => {
                metrics::counter!(metric::CERTIFICATE_RENEWALS.name, "result" => "ok").increment(1);
                backoff.reset();
                let (not_before, not_after) = (material.not_before, material.not_after);
                identity.set(material, now);
                renewal::until_renewal(not_before, not_after, now, rand::random())
            }
            Err(error) => {
                metrics::counter!(metric::CERTIFICATE_RENEWALS.name, "result" => "failed").increment(1);
                let backoff = backoff.next(rand::random());
                let (wait, state) = match identity.current() {
                    Some(material) => (
                        renewal::until_retry(backoff, material.not_after, now),
                        if material.not_after > renewal::unix(now) { "in force" } else { "expired" },
                    ),
                    None => (backoff, "none yet"),
                };
                tracing::warn!(%error, certificate = state, again_in = ?wait, "no new certificate");
                wait
            }
        };
        tokio::select! {
            () = sleep(wait) => {}
            () = identity.renew_asked() => {}
        }
    }
}

async fn sleep(wait: Duration) {
    let due = SystemTime::now() + wait;
    while let Ok(left) = due.duration_since(SystemTime::now()) {
        tokio::time::sleep(left.min(LONGEST_SLEEP)).await;
    }
}

/// A new P-256 key, and the request for a certificate that names nothing but `id`.
fn request(id: &SpiffeId) -> Result<(PrivateKeyDer<'static>, Vec<u8>), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    let csr = params.serialize_request(&key)?.der().to_vec();
    Ok((PrivatePkcs8KeyDer::from(key.serialize_der()).into(), csr))
}
