//! Every metric of control, once: its name, its labels, its meaning. docs/OPERATIONS.md is made from this list.
//!
//! Labels come from closed sets, but for the names of objects of the source. Nothing that a proxy sends becomes a label.

use penstock_api::metric::Kind;

penstock_api::metrics! {
    CONNECTED_PROXIES Gauge "penstock_control_connected_proxies" []
        "Configuration streams that are open.";
    SNAPSHOTS Counter "penstock_control_snapshots_total" []
        "Snapshots published after the first.";
    PUSH Histogram "penstock_control_push_seconds" []
        "Time from a snapshot to each response that carries it.";
    RESPONSES Counter "penstock_control_responses_total" ["type"]
        "Responses sent to proxies, by type.";
    NACKS Counter "penstock_control_nacks_total" ["type"]
        "Responses that proxies refused, by type.";
    UNKNOWN_TYPES Counter "penstock_control_unknown_types_total" []
        "Requests for types that do not exist.";
    STREAMS_CUT Counter "penstock_control_streams_cut_total" []
        "Configuration streams that control ended with an error.";
    SIGNED Counter "penstock_control_signed_total" []
        "Certificates signed.";
    SIGN_REFUSED Counter "penstock_control_sign_refused_total" ["reason"]
        "Certificates refused, by reason.";
    HANDSHAKE_FAILURES Counter "penstock_control_handshake_failures_total" []
        "TLS handshakes with control that failed.";
    LEADS Gauge "penstock_control_leads" []
        "1 where this replica holds the Lease, and so writes.";
    TAP_DROPPED Counter "penstock_control_tap_dropped_total" []
        "Tap events dropped because a watcher was too slow.";
    WEBHOOK Histogram "penstock_control_webhook_seconds" []
        "Time from an admission review's first byte to its answer.";
    WEBHOOK_REVIEWS Counter "penstock_control_webhook_reviews_total" ["outcome"]
        "Admission reviews: injected, gated (injected by hand, and held by a Canary), unchanged, refused, failed (control could not decide), bad-request.";
    PODS_NOT_INJECTED Gauge "penstock_control_pods_not_injected" []
        "Pods that ask for a sidecar and have none.";
    STATUSES Counter "penstock_control_statuses_total" ["outcome"]
        "Statuses of objects: written, overtaken (somebody else wrote in between, looked at again), failed (tried again).";
    CANARIES Counter "penstock_control_canary_transitions_total" ["phase"]
        "Canaries that came to a phase: Waiting, Progressing, Paused, Promoting, Succeeded, RollingBack, RolledBack, Invalid.";
    CANARY_WEIGHT Gauge "penstock_control_canary_weight" ["namespace", "name"]
        "Of a hundred requests, how many are to go to the candidate. The gauges of a Canary are there as long as it is, and every replica tells the same.";
    CANARY_PHASE Gauge "penstock_control_canary_phase" ["namespace", "name", "phase"]
        "1 for the phase that a Canary is in, 0 for the others.";
    CANARY_SUCCESS Gauge "penstock_control_canary_success_ratio" ["namespace", "name", "version"]
        "From 0 to 1: the share of requests to the candidate or the stable version that succeeded at this step. Absent while none was seen.";
    CANARY_APPLIED Gauge "penstock_control_canary_applied_proxies" ["namespace", "name"]
        "Of the connected proxies that a Canary concerns, how many have applied its weight.";
    CANARY_CONCERNED Gauge "penstock_control_canary_concerned_proxies" ["namespace", "name"]
        "Connected proxies that a Canary concerns.";
    EVENTS Counter "penstock_control_events_total" ["outcome"]
        "Events on objects of the cluster: sent, known (told before), refused, failed (tried again), full (too many waited).";
}

/// Tells the recorder what each means. A dashboard that begins before the first proxy sees a zero, not a hole.
pub fn describe() {
    for metric in ALL {
        match metric.kind {
            Kind::Counter => {
                metrics::describe_counter!(metric.name, metric.help);
                if metric.labels.is_empty() {
                    metrics::counter!(metric.name).increment(0);
                }
            }
            Kind::Gauge => {
                metrics::describe_gauge!(metric.name, metric.help);
                if metric.labels.is_empty() {
                    metrics::gauge!(metric.name).set(0.0);
                }
            }
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_one_family_and_counters_say_total() {
        let mut names: Vec<_> = ALL.iter().map(|metric| metric.name).collect();
        for metric in ALL {
            assert!(metric.name.starts_with("penstock_control_"), "{}", metric.name);
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"), "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
