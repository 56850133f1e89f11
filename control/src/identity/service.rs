//! The CSR service: a bearer token and a CSR in, a certificate chain and the trust anchors out.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use metrics::counter;
use penstock_api::SpiffeId;
use penstock_api::v1::identity_server::Identity;
use penstock_api::v1::{SignRequest, SignResponse};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status};

use super::token::{TokenError, TokenReview};
use super::{Authority, csr, epoch};
use crate::metric;

/// Requests checked and signed at once: a signature costs well under a millisecond, but a token may have to be
/// reviewed elsewhere, and a mesh that starts at once must not take control down.
const AT_ONCE: usize = 64;
/// A request that could not begin by then is better tried again.
const PATIENCE: Duration = Duration::from_secs(5);

/// Signs certificates for workloads.
#[derive(Clone)]
pub struct IdentityService {
    authority: Arc<Authority>,
    review: Arc<dyn TokenReview>,
    room: Arc<Semaphore>,
}

impl std::fmt::Debug for IdentityService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IdentityService")
    }
}

impl IdentityService {
    /// Signs by `authority` for those whom `review` knows.
    pub fn new(authority: Arc<Authority>, review: Arc<dyn TokenReview>) -> Self {
        Self { authority, review, room: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

fn refused(word: &'static str) {
    counter!(metric::SIGN_REFUSED.name, "reason" => word).increment(1);
}

#[tonic::async_trait]
impl Identity for IdentityService {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        let Ok(Ok(_room)) = tokio::time::timeout(PATIENCE, self.room.acquire()).await else {
            refused("busy");
            return Err(Status::unavailable(format!(
                "{AT_ONCE} certificates are being signed and none was done within {PATIENCE:?}; try again with backoff"
            )));
        };
        let now = epoch(SystemTime::now());
        let header = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
        let Some(token) = header.and_then(|value| value.strip_prefix("Bearer ")) else {
            refused("no-token");
            return Err(Status::unauthenticated(
                "a certificate needs a bearer token in the `authorization` metadata; make one with `penstock-control token`",
            ));
        };
        let workload = self.review.check(token.trim(), now).await.map_err(|error| {
            refused(error.word());
            tracing::warn!("a certificate was refused: {error}");
            match error {
                TokenError::Unavailable(_) => Status::unavailable(error.to_string()),
                _ => Status::unauthenticated(error.to_string()),
            }
        })?;
        let id = SpiffeId::new(self.authority.trust_domain(), &workload.namespace, &workload.account)
            .map_err(|error| Status::invalid_argument(error.to_string()))?;
        let key = csr::check(&request.get_ref().csr, &id).map_err(|error| {
            refused(error.word());
            tracing::warn!(%id, "a certificate was refused: {error}");
            match error {
                csr::CsrError::Name { .. } => Status::permission_denied(error.to_string()),
                _ => Status::invalid_argument(error.to_string()),
            }
        })?;
        let leaf = self.authority.sign(&id, &key, now).map_err(|error| {
            refused("authority");
            tracing::error!(%id, "a certificate could not be signed: {error:#}");
            Status::unavailable(format!("{error:#}"))
        })?;
        counter!(metric::SIGNED.name).increment(1);
        tracing::debug!(%id, pod = workload.pod.as_deref().unwrap_or_default(), until = leaf.not_after, "certificate signed");
        let trust = self.authority.trust().borrow().clone();
        Ok(Response::new(SignResponse {
            chain: leaf.chain.iter().map(|der| der.to_vec()).collect(),
            anchors: trust.anchors.iter().map(|der| der.to_vec()).collect(),
            not_before: leaf.not_before,
            not_after: leaf.not_after,
        }))
    }
}
