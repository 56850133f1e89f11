//! Trust anchors where injected pods mount them: ConfigMap `penstock-anchors`, key `anchors.pem`.
//!
//! In: the anchors in force, the namespaces and their labels, the pods. Out: the ConfigMap in control's own namespace and in each that asks for
//! sidecars or has some, written by the holder of the Lease through server-side apply, so that what others put beside the key stays.
//! A proxy verifies control with what it mounts and gets the rest pushed, so during a rotation both anchors are in it. A pod that is
//! created before its namespace has the ConfigMap waits for it: the kubelet tries again until it is there.
//!
//! All of them are applied again every minute, whatever others have made of them. Can go wrong: a namespace refuses (it is going away, a quota
//! is used up); it is tried again at the next round, and keeps no other waiting.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, Patch, PatchParams};
use pem::{EncodeConfig, LineEnding, Pem};
use penstock_api::names::{INJECTED_LABEL, annotation};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Place, asked, labels};
use crate::identity::Trust;
use crate::namespaces::{All, Known, Namespaces};
use crate::objects::{Body, ObjectSet};
use crate::trouble::Trouble;

/// The name of the ConfigMap.
const NAME: &str = "penstock-anchors";
/// Its key.
const KEY: &str = "anchors.pem";
/// Who writes it, for server-side apply.
const WRITER: &str = "penstock-control-anchors";
/// How often all of them are put right.
const AGAIN: Duration = Duration::from_secs(60);
/// At most so often one is written: a thousand namespaces take 20 s, and the API server notices nothing.
const PACE: Duration = Duration::from_millis(20);
/// One that could not be written is not tried again before.
const BACKOFF: Duration = Duration::from_secs(2);
/// What turns a namespace's injection on.
const ENABLED: &str = "enabled";

/// Where the anchors are wanted. Pure.
fn wanted(home: &str, namespaces: &All, objects: &ObjectSet) -> BTreeSet<String> {
    let pods = objects.objects.iter().filter(|object| {
        let Body::Pod(pod) = &object.body else { return false };
        let label = |key: &str| pod.metadata.labels.as_ref()?.get(key).map(String::as_str);
        label(INJECTED_LABEL) == Some("true") || label(annotation::INJECT) == Some(ENABLED)
    });
    let asks = |known: &Known| known.said.inject.as_deref() == Some(ENABLED);
    let labelled = namespaces.iter().filter(|(_, known)| asks(known)).map(|(name, _)| name.as_str());
    let all = pods.map(|pod| pod.id.namespace.as_str()).chain(labelled).chain([home]);
    all.filter(|name| namespaces.get(*name).is_some_and(|known| !known.ending)).map(str::to_owned).collect()
}

/// The anchors as PEM.
fn bundle(trust: &Trust) -> String {
    let anchors: Vec<Pem> = trust.anchors.iter().map(|anchor| Pem::new("CERTIFICATE", &**anchor)).collect();
    pem::encode_many_config(&anchors, EncodeConfig::new().set_line_ending(LineEnding::LF))
}

/// What was written where. Pure.
#[derive(Debug, Default)]
struct Written(BTreeMap<String, Entry>);

#[derive(Debug)]
struct Entry {
    /// What, if that succeeded; and the version that it had then.
    done: Option<(String, String)>,
    /// When it is due whatever it says.
    due: Instant,
}

impl Written {
    /// Who is due, and when to look again.
    fn due(&mut self, wanted: &BTreeSet<String>, bundle: &str, now: Instant) -> (Vec<String>, Instant) {
        self.0.retain(|name, _| wanted.contains(name));
        let mut next = now + AGAIN;
        let mut due = Vec::new();
        for name in wanted {
            match self.0.get(name) {
                Some(entry)
                    if entry.due > now && entry.done.as_ref().is_none_or(|(known, _)| known == bundle) =>
                {
                    next = next.min(entry.due);
                }
                _ => due.push(name.clone()),
            }
        }
        (due, next)
    }

    /// It is so now; whether somebody else had changed it.
    fn done(&mut self, name: &str, bundle: &str, version: &str, now: Instant) -> bool {
        let done = Some((bundle.to_owned(), version.to_owned()));
        let before = self.0.insert(name.to_owned(), Entry { done, due: now + AGAIN });
        before.and_then(|entry| entry.done).is_some_and(|(was, known)| was == bundle && known != version)
    }

    fn failed(&mut self, name: &str, now: Instant) {
        self.0.insert(name.to_owned(), Entry { done: None, due: now + BACKOFF });
    }
}

/// Writes while this replica holds the Lease, until told to stop.
pub(super) async fn run(
    place: Place,
    mut trust: watch::Receiver<Arc<Trust>>,
    mut objects: watch::Receiver<Arc<ObjectSet>>,
    mut namespaces: Namespaces,
    mut leads: watch::Receiver<bool>,
    stop: CancellationToken,
) -> Result<()> {
    let mut written = Written::default();
    let mut trouble = Trouble::new("the ConfigMaps penstock-anchors");
    loop {
        let mut next = Instant::now() + AGAIN;
        let lead = *leads.borrow_and_update();
        let wanted = namespaces.whole(|all| wanted(&place.namespace, all, &objects.borrow_and_update()));
        if !lead {
            // Whoever held it meanwhile may have written something else.
            written = Written::default();
        } else if let Some(wanted) = wanted {
            let bundle = bundle(&trust.borrow_and_update());
            let (due, later) = written.due(&wanted, &bundle, Instant::now());
            next = later;
            let mut failure = None;
            // Where nobody is due, what failed has not been tried again.
            let tried = !due.is_empty();
            for name in due {
                if !*leads.borrow() || stop.is_cancelled() {
                    break;
                }
                match apply(&place, &name, &bundle).await {
                    Ok(version) => {
                        if written.done(&name, &bundle, &version, Instant::now()) {
                            tracing::info!(
                                "ConfigMap {name}/{NAME} had been changed, and is as it has to be again"
                            );
                        }
                    }
                    Err(error) => {
                        written.failed(&name, Instant::now());
                        next = next.min(Instant::now() + BACKOFF);
                        failure = Some(error.context(format!("in namespace {name}")));
                    }
                }
                tokio::time::sleep(PACE).await;
            }
            match failure {
                Some(error) => trouble.met(&error),
                None if tried => trouble.over(),
                None => {}
            }
        }
        let changed = tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep_until(next) => Ok(()),
            changed = trust.changed() => changed,
            changed = leads.changed() => changed,
            changed = namespaces.changed() => changed,
            // Pods change all the time in a large cluster; that a namespace is wanted because of one is seldom.
            changed = objects.changed() => changed,
        };
        if changed.is_err() {
            // A part of control has ended, and takes the others with it.
            stop.cancelled().await;
            break;
        }
    }
    Ok(())
}

async fn apply(place: &Place, namespace: &str, bundle: &str) -> Result<String> {
    let api: Api<ConfigMap> = Api::namespaced(place.client.clone(), namespace);
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": NAME, "namespace": namespace, "labels": labels()},
        "data": {KEY: bundle},
    });
    let params = PatchParams::apply(WRITER).force();
    let map = asked(api.patch(NAME, &params, &Patch::Apply(map))).await?;
    Ok(map.metadata.resource_version.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use penstock_api::names::SYSTEM_NAMESPACE;
    use penstock_inject::Namespace;

    use super::*;
    use crate::identity::material::Material;
    use crate::objects::decode;

    fn names(wanted: &[&str]) -> BTreeSet<String> {
        wanted.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn anchors_are_wanted_at_home_and_wherever_sidecars_are_or_may_come() {
        let known = |labelled: bool, ending| Known {
            said: Namespace { inject: labelled.then(|| ENABLED.to_owned()), enforce: None },
            ending,
        };
        let namespaces: All = [
            (SYSTEM_NAMESPACE, known(false, false)),
            ("labelled", known(true, false)),
            ("ending", known(true, true)),
            ("plain", known(false, false)),
            ("injected", known(false, false)),
            ("asking", known(false, false)),
        ]
        .map(|(name, known)| (name.to_owned(), known))
        .into();
        let pod = |namespace: &str, label: &str| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: {namespace}, name: a, labels: {{{label}}}}}\n\
                 spec: {{containers: [{{name: a}}]}}\n"
            )
        };
        let text = [
            pod("injected", "penstock.io/injected: \"true\""),
            pod("asking", "penstock.io/inject: enabled"),
            pod("plain", "penstock.io/inject: disabled"),
            pod("gone", "penstock.io/injected: \"true\""),
        ]
        .join("---\n");
        let objects = decode::file(&"pods.yaml".into(), &text);
        assert_eq!(
            wanted(SYSTEM_NAMESPACE, &namespaces, &objects),
            names(&["asking", "injected", "labelled", SYSTEM_NAMESPACE])
        );
    }

    #[test]
    fn the_bundle_is_what_a_proxy_reads() {
        use rustls_pki_types::CertificateDer;
        use rustls_pki_types::pem::PemObject;
        let trust = Material::fresh(1_800_000_000).unwrap().trust().unwrap();
        let pem = bundle(&trust);
        let read: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes()).map(Result::unwrap).collect();
        assert_eq!(read, trust.anchors);
        assert!(pem.lines().all(|line| line.len() <= 64));
    }

    #[tokio::test(start_paused = true)]
    async fn each_is_written_when_it_is_new_when_anchors_change_and_every_minute() {
        let (mut written, both) = (Written::default(), names(&["a", "b"]));
        let due = |written: &mut Written, bundle: &str| written.due(&both, bundle, Instant::now()).0;
        assert_eq!(due(&mut written, "1"), ["a", "b"]);
        assert!(!written.done("a", "1", "7", Instant::now()));
        written.failed("b", Instant::now());
        assert!(due(&mut written, "1").is_empty());
        tokio::time::advance(BACKOFF).await;
        assert_eq!(due(&mut written, "1"), ["b"]);
        written.done("b", "1", "8", Instant::now());
        assert_eq!(due(&mut written, "2"), ["a", "b"]);
        tokio::time::advance(AGAIN - BACKOFF).await;
        assert_eq!(due(&mut written, "1"), ["a"]);
        assert!(written.done("a", "1", "9", Instant::now()), "somebody had changed it");
        assert!(!written.done("a", "2", "10", Instant::now()), "that was us");
    }
}
