//! What the proxies of all replicas know of a rotation's anchors. Pure.
//!
//! Each proxy is connected to one replica, so the holder of the Lease sees a part of them. While both anchors are announced every
//! replica says on the Secret how many of its proxies know them; a rotation goes on when all of all replicas do. A replica that has a running pod
//! and has said nothing (it cannot reach the API server, say) is waited for; one that is gone is not.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::identity::rotation::Facts;
use crate::objects::{Body, ObjectSet};

/// How often a replica says so again although nothing has changed.
pub(super) const REPEAT: Duration = Duration::from_secs(10);
/// One without a pod that says nothing new for so long is gone.
const GONE: Duration = Duration::from_secs(35);
/// What a Kubernetes name in an annotation's key may have.
const LONGEST: usize = 63;

/// What a replica says of its proxies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Said {
    /// Of which anchors.
    pub(super) anchors: String,
    pub(super) connected: usize,
    pub(super) acknowledged: usize,
    /// Seconds since the epoch, so that saying it again is something new.
    pub(super) at: i64,
}

/// What the others have said, and when it was heard first.
#[derive(Debug, Default)]
pub(super) struct Peers(BTreeMap<String, (String, Instant)>);

/// The name of a replica in the key of an annotation.
pub(super) fn key(replica: &str) -> String {
    let fits = replica.len() <= LONGEST
        && replica.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
        && replica.starts_with(|c: char| c.is_ascii_alphanumeric())
        && replica.ends_with(|c: char| c.is_ascii_alphanumeric());
    if fits { replica.to_owned() } else { blake3::hash(replica.as_bytes()).to_hex()[..32].to_owned() }
}

/// The replicas that have a running pod, as annotations name them.
pub(super) fn running(objects: &ObjectSet, namespace: &str) -> BTreeSet<String> {
    pods(objects, namespace).map(|(name, _)| key(name)).collect()
}

/// The running pods of control, by name.
pub(super) fn pods<'a>(
    objects: &'a ObjectSet,
    namespace: &'a str,
) -> impl Iterator<Item = (&'a str, &'a Pod)> {
    let pods = objects.objects.iter().filter_map(move |object| match &object.body {
        Body::Pod(pod) if object.id.namespace == namespace => Some((object.id.name.as_str(), &**pod)),
        _ => None,
    });
    pods.filter(|(_, pod)| {
        let label = |key: &str| pod.metadata.labels.as_ref()?.get(key).map(String::as_str);
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        label("app.kubernetes.io/name") == Some("penstock")
            && label("app.kubernetes.io/component") == Some("control")
            && phase == Some("Running")
            && pod.metadata.deletion_timestamp.is_none()
    })
}

impl Peers {
    /// The facts of all replicas, from this one's (`me`, of which `own` speaks) and from what the others have said of `anchors`.
    pub(super) fn all(
        &mut self,
        me: &str,
        own: Facts,
        said: &BTreeMap<String, String>,
        running: &BTreeSet<String>,
        anchors: &str,
        now: Instant,
    ) -> Facts {
        let mut facts = own;
        self.0.retain(|replica, _| said.contains_key(replica));
        for (replica, words) in said.iter().filter(|(replica, _)| *replica != me) {
            let heard = self.0.entry(replica.clone()).or_insert_with(|| (words.clone(), now));
            if heard.0 != *words {
                *heard = (words.clone(), now);
            }
            if now - heard.1 >= GONE && !running.contains(replica) {
                continue;
            }
            match serde_json::from_str::<Said>(words) {
                Ok(said) if said.anchors == anchors => {
                    facts.connected += said.connected;
                    facts.acknowledged += said.acknowledged;
                }
                // It has not even read of them.
                _ => facts.connected += 1,
            }
        }
        facts.connected +=
            running.iter().filter(|replica| *replica != me && !said.contains_key(*replica)).count();
        facts
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::decode;

    fn own() -> Facts {
        Facts {
            announced_for: REPEAT,
            connected: 2,
            acknowledged: 2,
            leaf_lifetime: Duration::from_secs(3_600),
        }
    }

    fn said(anchors: &str, connected: usize, acknowledged: usize) -> String {
        serde_json::to_string(&Said { anchors: anchors.to_owned(), connected, acknowledged, at: 7 }).unwrap()
    }

    fn of(replica: &str, words: String) -> BTreeMap<String, String> {
        [(replica.to_owned(), words)].into()
    }

    #[tokio::test(start_paused = true)]
    async fn the_proxies_of_all_replicas_count_and_whoever_runs_and_says_nothing_is_waited_for() {
        let (none, b) = (BTreeSet::new(), BTreeSet::from(["b".to_owned()]));
        let table = [
            ("alone", BTreeMap::new(), &none, (2, 2)),
            ("this replica's own words", of("a", said("new", 9, 0)), &none, (2, 2)),
            ("another whose proxies all know", of("b", said("new", 3, 3)), &none, (5, 5)),
            ("another one of whose proxies does not", of("b", said("new", 3, 2)), &none, (5, 4)),
            ("another that has not read it", of("b", said("old", 3, 3)), &none, (3, 2)),
            ("another that makes no sense", of("b", "?".to_owned()), &none, (3, 2)),
            ("another that runs and says nothing", BTreeMap::new(), &b, (3, 2)),
            ("another that runs and says it", of("b", said("new", 0, 0)), &b, (2, 2)),
        ];
        for (case, words, running, expected) in table {
            let facts = Peers::default().all("a", own(), &words, running, "new", Instant::now());
            assert_eq!((facts.connected, facts.acknowledged), expected, "{case}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_is_gone_is_not_waited_for_unless_its_pod_runs() {
        let (mut peers, words) = (Peers::default(), of("b", said("old", 1, 0)));
        let running = BTreeSet::from(["b".to_owned()]);
        let mut waits = |running: &BTreeSet<String>| {
            let facts = peers.all("a", own(), &words, running, "new", Instant::now());
            facts.connected > facts.acknowledged
        };
        assert!(waits(&BTreeSet::new()));
        tokio::time::advance(GONE).await;
        assert!(!waits(&BTreeSet::new()));
        assert!(waits(&running));
    }

    #[test]
    fn a_replica_is_a_running_pod_of_control_at_home() {
        let pod = |namespace: &str, name: &str, component: &str, phase: &str| {
            format!(
                "apiVersion: v1\nkind: Pod\nmetadata: {{namespace: {namespace}, name: {name}, labels: \
                 {{app.kubernetes.io/name: penstock, app.kubernetes.io/component: {component}}}}}\n\
                 spec: {{containers: [{{name: control}}]}}\nstatus: {{phase: {phase}}}\n"
            )
        };
        let text = [
            pod("penstock-system", "a", "control", "Running"),
            pod("penstock-system", "b", "control", "Succeeded"),
            pod("penstock-system", "c", "other", "Running"),
            pod("team-a", "d", "control", "Running"),
        ]
        .join("---\n");
        let set = decode::file(&"pods.yaml".into(), &text);
        assert!(set.broken.is_empty(), "{:?}", set.broken);
        assert_eq!(running(&set, "penstock-system"), BTreeSet::from(["a".to_owned()]));
    }

    #[test]
    fn any_name_fits_into_an_annotation() {
        assert_eq!(key("penstock-control-7d9f8b6c5-abcde"), "penstock-control-7d9f8b6c5-abcde");
        assert!([&"x".repeat(200), "a/b", "-"].iter().all(|name| key(name).len() == 32));
    }
}
