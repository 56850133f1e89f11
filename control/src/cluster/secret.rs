//! What the Secrets of control have in common: cert-manager's names of keys, whose they are, and how their text is read.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{CONTROL, MADE_BY};

/// A certificate, and what else has to be shown with it.
pub(super) const CERTIFICATE: &str = "tls.crt";
/// Its key.
pub(super) const KEY: &str = "tls.key";
/// Who signed it.
pub(super) const AUTHORITY: &str = "ca.crt";
/// Before the names of what comes next.
pub(super) const NEXT: &str = "next-";

/// One that control makes, with nothing in it.
pub(super) fn made(name: &str) -> Secret {
    Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some(super::labels()),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".to_owned()),
        ..Secret::default()
    }
}

/// Whether control made it.
pub(super) fn is_own(secret: &Secret) -> bool {
    let labels = secret.metadata.labels.as_ref();
    labels.and_then(|labels| labels.get(MADE_BY)).is_some_and(|by| by == CONTROL)
}

/// What lies under a key, if that is anything.
pub(super) fn text(secret: &Secret, key: &str) -> Result<Option<String>> {
    let Some(value) = secret.data.as_ref().and_then(|data| data.get(key)) else { return Ok(None) };
    if value.0.is_empty() {
        return Ok(None);
    }
    Ok(Some(String::from_utf8(value.0.clone()).with_context(|| format!("{key} is not PEM"))?))
}
