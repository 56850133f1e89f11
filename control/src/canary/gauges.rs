//! Where canaries are, as gauges: what dashboards draw and alerts wait for.
//!
//! In: the canaries as they are shown. Out: lines of a Prometheus page. They are made anew for each look of a Prometheus, by a recorder that lives
//! as long: the process's own keeps a gauge for ever, and that of a Canary has to go with it. Every replica tells the same.

use metrics::gauge;
use metrics_exporter_prometheus::PrometheusBuilder;
use penstock_api::metric::Metric;

use super::desk::Shown;
use super::{Diary, Phase};
use crate::metric;

/// The metrics that are told here.
const ALL: [&Metric; 5] = [
    &metric::CANARY_WEIGHT,
    &metric::CANARY_PHASE,
    &metric::CANARY_SUCCESS,
    &metric::CANARY_APPLIED,
    &metric::CANARY_CONCERNED,
];

/// Each is a series of a Canary, so that an alert on one need not wait until there was one.
const PHASES: [Phase; 8] = [
    Phase::Waiting,
    Phase::Progressing,
    Phase::Paused,
    Phase::Promoting,
    Phase::Succeeded,
    Phase::RollingBack,
    Phase::RolledBack,
    Phase::Invalid,
];

/// The lines of these canaries.
pub fn page(canaries: &[Shown]) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || {
        for metric in ALL {
            metrics::describe_gauge!(metric.name, metric.help);
        }
        canaries.iter().for_each(tell);
    });
    recorder.handle().render()
}

fn tell(canary: &Shown) {
    let of = |field: &str| canary["metadata"][field].as_str().unwrap_or_default().to_owned();
    let (namespace, name) = (of("namespace"), of("name"));
    let labels = [("namespace", namespace), ("name", name)];
    // Of one that has no status yet nothing has begun: it waits.
    let diary: Diary = serde_json::from_value(canary["status"].clone()).unwrap_or_default();
    let weight = diary.course.as_ref().map_or(0, |course| course.weight);
    gauge!(metric::CANARY_WEIGHT.name, &labels).set(f64::from(weight));
    gauge!(metric::CANARY_APPLIED.name, &labels).set(diary.applied as f64);
    gauge!(metric::CANARY_CONCERNED.name, &labels).set(diary.concerned as f64);
    let [namespace, name] = &labels;
    for phase in PHASES {
        let labels = [namespace.clone(), name.clone(), ("phase", format!("{phase:?}"))];
        gauge!(metric::CANARY_PHASE.name, &labels).set(f64::from(u8::from(phase == diary.phase)));
    }
    for (version, seen) in [("stable", &diary.stable), ("candidate", &diary.candidate)] {
        let Some(percent) = seen.as_ref().and_then(|seen| seen.success_rate) else { continue };
        let labels = [namespace.clone(), name.clone(), ("version", version.to_owned())];
        gauge!(metric::CANARY_SUCCESS.name, &labels).set(percent / 100.0);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_canary_has_gauges_as_long_as_it_is_there() {
        let status = json!({
            "phase": "Progressing", "course": {"run": "a", "weight": 25, "shadow": 0, "matching": false}, "applied": 2, "concerned": 3,
            "candidate": {"requests": 200, "successRate": 99.5}, "stable": {"requests": 0},
        });
        let canary = json!({"metadata": {"namespace": "team-a", "name": "resnet"}, "status": status});
        let fresh = json!({"metadata": {"namespace": "team-b", "name": "bert"}});
        let text = page(&[canary, fresh.clone()]);
        for line in [
            "# TYPE penstock_control_canary_weight gauge",
            "penstock_control_canary_weight{namespace=\"team-a\",name=\"resnet\"} 25",
            "penstock_control_canary_phase{namespace=\"team-a\",name=\"resnet\",phase=\"Progressing\"} 1",
            "penstock_control_canary_phase{namespace=\"team-a\",name=\"resnet\",phase=\"RolledBack\"} 0",
            "penstock_control_canary_success_ratio{namespace=\"team-a\",name=\"resnet\",version=\"candidate\"} 0.995",
            "penstock_control_canary_applied_proxies{namespace=\"team-a\",name=\"resnet\"} 2",
            "penstock_control_canary_concerned_proxies{namespace=\"team-a\",name=\"resnet\"} 3",
            "penstock_control_canary_phase{namespace=\"team-b\",name=\"bert\",phase=\"Waiting\"} 1",
            "penstock_control_canary_weight{namespace=\"team-b\",name=\"bert\"} 0",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in:\n{text}");
        }
        assert!(!text.contains("version=\"stable\""), "nothing was seen of it:\n{text}");
        for metric in ALL {
            assert!(text.contains(&format!("# HELP {} ", metric.name)), "{}:\n{text}", metric.name);
        }
        let text = page(&[fresh]);
        assert!(!text.contains("team-a"), "{text}");
        assert_eq!(page(&[]).trim(), "");
    }
}
