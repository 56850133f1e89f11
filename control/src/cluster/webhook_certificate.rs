//! The webhook's certificate: served by every replica, made and replaced by the holder of the Lease, and known to API servers through the caBundle of
//! MutatingWebhookConfiguration `penstock-injector`.
//!
//! In: the Secret `penstock-webhook-tls` and that configuration, looked at every 3 s. Out: the newest certificate. The caBundle is put
//! back when it is gone, which happens each time somebody applies the manifests anew. Can go wrong: the Secret makes no
//! sense, then the certificate that was served before is served on, and one that control made is made again; the configuration is not
//! installed, then there is nobody to tell.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::MutatingWebhookConfiguration;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Api, Patch, PatchParams, PostParams};
use rustls::sign::CertifiedKey;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::secret::is_own;
use super::webhook_secret::{self, NAME, Seen, Webhook};
use super::{Outcome, Place, asked, written};
use crate::identity::epoch;
use crate::trouble::Trouble;

/// The configuration of the webhook.
const CONFIGURATION: &str = "penstock-injector";
/// How often both are looked at: for so long a caBundle that somebody stripped keeps pods of the mesh from being created.
const EVERY: Duration = Duration::from_secs(3);

/// As long as nothing can be served: another replica is making the first certificate.
const SOON: Duration = Duration::from_millis(200);

/// What is served, and what this replica has seen.
struct Keeper {
    place: Place,
    secrets: Api<Secret>,
    configurations: Api<MutatingWebhookConfiguration>,
    serving: watch::Sender<Option<Arc<CertifiedKey>>>,
    served: Option<Webhook>,
    /// Since when the Secret has been as it is.
    current_since: Instant,
    /// The caBundle that was found, and since when.
    bundle: Option<(String, Instant)>,
}

/// Serves and replaces until told to stop.
pub(super) async fn run(
    place: Place,
    serving: watch::Sender<Option<Arc<CertifiedKey>>>,
    mut leads: watch::Receiver<bool>,
    stop: CancellationToken,
) -> Result<()> {
    let mut keeper = Keeper {
        secrets: Api::namespaced(place.client.clone(), &place.namespace),
        configurations: Api::all(place.client.clone()),
        place,
        serving,
        served: None,
        current_since: Instant::now(),
        bundle: None,
    };
    let mut trouble = Trouble::new("the webhook's certificate");
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            _ = tick.tick() => {}
            () = tokio::time::sleep(SOON), if keeper.served.is_none() => {}
            // A new installation has no certificate before somebody leads.
            Ok(()) = leads.changed() => {}
        }
        let lead = *leads.borrow_and_update();
        match keeper.keep(lead).await {
            Ok(()) => trouble.over(),
            Err(error) => trouble.met(&error),
        }
    }
}

impl Keeper {
    async fn keep(&mut self, lead: bool) -> Result<()> {
        let secret = asked(self.secrets.get_opt(NAME)).await?;
        let read = match &secret {
            None => None,
            Some(secret) => match webhook_secret::read(secret) {
                Ok(webhook) => Some(webhook),
                Err(error) if lead && is_own(secret) => {
                    tracing::warn!("Secret {}/{NAME} is made anew: {error:#}", self.place.namespace);
                    None
                }
                Err(error) => {
                    return Err(error.context(format!(
                        "Secret {}/{NAME} cannot be used; delete it to have control make one",
                        self.place.namespace
                    )));
                }
            },
        };
        let Some(webhook) = read else {
            if lead {
                // What was served before is as good as new, if it was deleted by mistake.
                let fresh = match self.served.clone().filter(|known| secret.is_none() && known.own) {
                    Some(known) => known,
                    None => Webhook::fresh(&self.place.namespace, epoch(SystemTime::now()))?,
                };
                self.write(fresh, secret).await?;
            }
            return Ok(());
        };
        self.serve(&webhook)?;
        if !lead {
            self.bundle = None;
            return Ok(());
        }
        let seen = Seen { bundle: self.announce(&webhook).await?, current: self.current_since.elapsed() };
        if let Some(after) = webhook.advance(&self.place.namespace, seen, epoch(SystemTime::now()))? {
            self.write(after, secret).await?;
        }
        Ok(())
    }

    /// Serves it from the next handshake on.
    fn serve(&mut self, webhook: &Webhook) -> Result<()> {
        if self.served.as_ref() == Some(webhook) {
            return Ok(());
        }
        if self.served.as_ref().is_none_or(|served| served.current != webhook.current) {
            self.serving.send_replace(Some(Arc::new(webhook.current.certified()?)));
            self.current_since = Instant::now();
            tracing::info!("the webhook's certificate is that of Secret {}/{NAME}", self.place.namespace);
        }
        self.served = Some(webhook.clone());
        Ok(())
    }

    /// Writes the Secret, and serves what is in it once it is written.
    async fn write(&mut self, webhook: Webhook, found: Option<Secret>) -> Result<()> {
        let params = PostParams::default();
        let exists = found.is_some();
        let secret = webhook_secret::write(&webhook, found);
        let outcome = match exists {
            true => written(self.secrets.replace(NAME, &params, &secret)).await?,
            false => written(self.secrets.create(&params, &secret)).await?,
        };
        if let Outcome::Done(_) = outcome {
            self.serve(&webhook)?;
            self.announce(&webhook).await?;
        }
        Ok(())
    }

    /// Puts the authorities into the caBundle of every entry; for how long they have been there.
    async fn announce(&mut self, webhook: &Webhook) -> Result<Duration> {
        let wanted = webhook.bundle();
        let Some(configuration) = asked(self.configurations.get_opt(CONFIGURATION)).await? else {
            self.bundle = None;
            return Ok(Duration::ZERO);
        };
        if let Some(patch) = patch(&configuration, &wanted) {
            let (params, patch) = (PatchParams::default(), Patch::Strategic(patch));
            let patched = self.configurations.patch(CONFIGURATION, &params, &patch);
            self.bundle = None;
            if let Outcome::Done(_) = written(patched).await.context("the caBundle of penstock-injector")? {
                tracing::info!("the caBundle of {CONFIGURATION} is written");
                self.bundle = Some((wanted, Instant::now()));
            }
            return Ok(Duration::ZERO);
        }
        match &self.bundle {
            Some((known, since)) if *known == wanted => Ok(since.elapsed()),
            _ => {
                self.bundle = Some((wanted, Instant::now()));
                Ok(Duration::ZERO)
            }
        }
    }
}

/// What has to change of a configuration: the API server merges entries by their names. It rests on the version that was read, so that an
/// entry which somebody takes away meanwhile does not come back as a torso.
fn patch(configuration: &MutatingWebhookConfiguration, bundle: &str) -> Option<Value> {
    let wanted = ByteString(bundle.as_bytes().to_vec());
    let other = |ca: &Option<ByteString>| ca.as_ref() != Some(&wanted);
    let entries: Vec<Value> = configuration
        .webhooks
        .iter()
        .flatten()
        .filter(|entry| other(&entry.client_config.ca_bundle))
        .map(|entry| json!({"name": entry.name, "clientConfig": {"caBundle": wanted}}))
        .collect();
    let version = &configuration.metadata.resource_version;
    (!entries.is_empty()).then(|| json!({"metadata": {"resourceVersion": version}, "webhooks": entries}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_entry_that_has_another_bundle_gets_it() {
        let configuration: MutatingWebhookConfiguration = serde_json::from_value(json!({
            "metadata": {"name": CONFIGURATION, "resourceVersion": "7"},
            "webhooks": [
                {"name": "a.penstock.io", "clientConfig": {"caBundle": "bmV3"}, "admissionReviewVersions": [], "sideEffects": "None"},
                {"name": "b.penstock.io", "clientConfig": {"caBundle": "b2xk"}, "admissionReviewVersions": [], "sideEffects": "None"},
                {"name": "c.penstock.io", "clientConfig": {}, "admissionReviewVersions": [], "sideEffects": "None"},
            ],
        }))
        .unwrap();
        assert_eq!(
            patch(&configuration, "new").unwrap(),
            json!({"metadata": {"resourceVersion": "7"}, "webhooks": [
                {"name": "b.penstock.io", "clientConfig": {"caBundle": "bmV3"}},
                {"name": "c.penstock.io", "clientConfig": {"caBundle": "bmV3"}},
            ]})
        );
    }
}
