//! Reads what a Canary asks for.
//!
//! In: its `spec`. Out: a [`Plan`], or all that is wrong with it, each at its field. `sticky` and the names of headers are not looked
//! at: the compiler reads them, as it does those of routes.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::time::Duration;

use penstock_api::service::is_label;

use super::bounds::{Bounds, Check, CheckKind, Latency, Plan, Shadow, Step, Wrong, words};
use crate::objects::canary::{self, Spec};

/// Steps that a Canary may have: as many as a person reads.
const STEPS: usize = 50;
/// Letters of the name of a Deployment: with a hyphen and the ten of a hash it is a label.
const DEPLOYMENT: usize = 52;
/// Of queries and webhooks, and of matches: each is asked, or compared with each request.
const LIST: usize = 16;
/// Any duration. A step that is held for longer than a week is a version that serves.
const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);
/// Unless said.
const HOLD: Duration = Duration::from_secs(60);
/// Unless said.
const DEADLINE: Duration = Duration::from_secs(600);
/// Unless said.
const INTERVAL: Duration = Duration::from_secs(10);
/// What is asked more often than this tells nothing more.
const SHORTEST_INTERVAL: Duration = Duration::from_secs(1);
/// Unless said.
const FAILURES: u32 = 3;
/// Requests, and pairs of answers, unless said.
const ENOUGH: u64 = 50;
/// Of a hundred requests, unless said.
const SUCCESS_RATE: f64 = 99.0;

impl Plan {
    /// Reads the `spec` of a Canary in `namespace`; all that is wrong with it, if anything is.
    pub fn read(namespace: &str, spec: &Spec) -> Result<Self, Vec<Wrong>> {
        let mut reader = Reader::default();
        reader.service("service", &spec.service);
        match &spec.deployment {
            Some(deployment) => reader.deployment(deployment, spec),
            None => reader.services(spec),
        }
        let deadline = reader.duration("/spec/deadline", spec.deadline.as_ref(), DEADLINE);
        if deadline.is_zero() {
            reader.wrong(
                "/spec/deadline".to_owned(),
                "no step passes in no time; write for example 10m".to_owned(),
            );
        }
        let steps = reader.steps(&spec.steps);
        // Where the last step sends everything already, it was held there.
        let unless_said =
            if spec.steps.last().is_some_and(|last| last.weight == 100) { Duration::ZERO } else { HOLD };
        let promotion = reader.duration("/spec/promotion", spec.promotion.as_ref(), unless_said);
        reader.matches(&spec.matches);
        let bounds = reader.bounds(spec);
        if !reader.0.is_empty() {
            return Err(reader.0);
        }
        let qualified = |name: &str| format!("{namespace}/{name}");
        Ok(Self {
            run: spec.run_id(),
            service: qualified(&spec.service),
            stable: qualified(&spec.stable),
            candidate: qualified(&spec.candidate),
            steps,
            promotion,
            matching: !spec.matches.is_empty(),
            paused: spec.paused,
            deadline,
            bounds,
            pair: None,
            spec: spec.clone(),
        })
    }
}

/// What is wrong so far.
#[derive(Default)]
struct Reader(Vec<Wrong>);

impl Reader {
    fn wrong(&mut self, pointer: String, message: String) {
        self.0.push((pointer, message));
    }

    fn service(&mut self, field: &str, name: &str) {
        if !is_label(name) {
            let message = format!("{name:?} is no name of a Service; name one of this namespace");
            self.wrong(format!("/spec/{field}"), message);
        }
    }

    /// The versions are two Services.
    fn services(&mut self, spec: &Spec) {
        let Spec { service, stable, candidate, .. } = spec;
        if stable.is_empty() && candidate.is_empty() {
            let message = "nothing says what the versions are; write a deployment, or stable and candidate";
            return self.wrong("/spec/deployment".to_owned(), message.to_owned());
        }
        self.service("stable", stable);
        self.service("candidate", candidate);
        for (field, other) in [("service", service), ("stable", stable)] {
            if candidate == other {
                let message =
                    format!("{other} is the {field} as well; the candidate is a Service of its own");
                self.wrong("/spec/candidate".to_owned(), message);
            }
        }
    }

    /// The versions are templates of one Deployment.
    fn deployment(&mut self, deployment: &str, spec: &Spec) {
        if !is_label(deployment) || deployment.len() > DEPLOYMENT {
            let message = format!(
                "{deployment:?} is no name of a Deployment that is told apart; name one of this namespace, in at most {DEPLOYMENT} letters, \
                 digits and hyphens"
            );
            self.wrong("/spec/deployment".to_owned(), message);
        }
        for (field, name) in [("stable", &spec.stable), ("candidate", &spec.candidate)] {
            if !name.is_empty() {
                let message =
                    format!("the versions are those of the Deployment {deployment}; remove one of the two");
                self.wrong(format!("/spec/{field}"), message);
            }
        }
    }

    fn duration(&mut self, pointer: &str, text: Option<&String>, default: Duration) -> Duration {
        let Some(text) = text else { return default };
        let message = match text.trim().parse::<gateway_api::Duration>().map(standard) {
            Ok(duration) if duration <= LONGEST => return duration,
            Ok(_) => format!("{text:?} is longer than seven days"),
            Err(_) => format!("{text:?} is not a duration; write whole numbers with h, m, s or ms, as 1m30s"),
        };
        self.wrong(pointer.to_owned(), message);
        default
    }

    /// A number in a range, and in words which.
    fn number(
        &mut self,
        pointer: &str,
        number: Option<f64>,
        range: RangeInclusive<f64>,
        words: &str,
    ) -> Option<f64> {
        let number = number?;
        if !range.contains(&number) {
            self.wrong(pointer.to_owned(), format!("{number} is not {words}"));
        }
        Some(number)
    }

    /// A percentage, as a share.
    fn share(&mut self, pointer: &str, number: Option<f64>) -> Option<f64> {
        self.number(pointer, number, 0.0..=100.0, "from 0 to 100").map(|percent| percent / 100.0)
    }

    /// A factor above 0.
    fn factor(&mut self, pointer: &str, number: Option<f64>) -> Option<f64> {
        self.number(pointer, number, f64::MIN_POSITIVE..=f64::MAX, "above 0")
    }

    fn steps(&mut self, from: &[canary::Step]) -> Vec<Step> {
        if from.is_empty() || from.len() > STEPS {
            let message = format!("there are {} steps; write from 1 to {STEPS}", from.len());
            self.wrong("/spec/steps".to_owned(), message);
        }
        let read = |(index, step): (usize, &canary::Step)| {
            for (field, percent) in [("weight", step.weight), ("shadow", step.shadow)] {
                if percent > 100 {
                    let message = format!("{percent} is more than all; write from 0 to 100");
                    self.wrong(format!("/spec/steps/{index}/{field}"), message);
                }
            }
            let pointer = format!("/spec/steps/{index}/hold");
            let hold = self.duration(&pointer, step.hold.as_ref(), HOLD);
            Step { weight: step.weight, shadow: step.shadow, hold, pause: step.pause }
        };
        from.iter().enumerate().map(read).collect()
    }

    fn matches(&mut self, matches: &[canary::Match]) {
        if matches.len() > LIST {
            let message = format!("there are {} of them; write at most {LIST}", matches.len());
            self.wrong("/spec/match".to_owned(), message);
        }
        for (index, one) in matches.iter().enumerate() {
            if one.headers.is_empty() {
                let pointer = format!("/spec/match/{index}/headers");
                self.wrong(pointer, "without headers all requests match; name one".to_owned());
            }
        }
    }

    fn bounds(&mut self, spec: &Spec) -> Bounds {
        let analysis = &spec.analysis;
        let success_rate =
            self.share("/spec/analysis/successRate", analysis.success_rate).unwrap_or(SUCCESS_RATE / 100.0);
        Bounds {
            min_requests: analysis.min_requests.unwrap_or(ENOUGH),
            success_rate,
            latency: analysis.latency.iter().enumerate().map(|(at, one)| self.latency(at, one)).collect(),
            load: self.number("/spec/analysis/load", analysis.load, 0.0..=1.0, "from 0 to 1"),
            checks: self.checks(analysis),
            shadow: self.shadow(spec, success_rate),
        }
    }

    fn latency(&mut self, index: usize, from: &canary::Latency) -> Latency {
        let pointer = format!("/spec/analysis/latency/{index}");
        let percentile = from.percentile;
        if !(percentile > 0.0 && percentile < 100.0) {
            let message = format!("{percentile} is not above 0 and below 100");
            self.wrong(format!("{pointer}/percentile"), message);
        }
        if from.max.is_none() && from.of_stable.is_none() {
            self.wrong(
                pointer.clone(),
                "nothing bounds the percentile; write max, ofStable, or both".to_owned(),
            );
        }
        let max = from.max.as_ref();
        Latency {
            quantile: percentile / 100.0,
            max: max.map(|max| self.duration(&format!("{pointer}/max"), Some(max), LONGEST)),
            of_stable: self.factor(&format!("{pointer}/ofStable"), from.of_stable),
        }
    }

    fn checks(&mut self, analysis: &canary::Analysis) -> Vec<Check> {
        let queries = analysis.prometheus.iter().enumerate().map(|(index, one)| {
            let kind = CheckKind::Prometheus {
                server: one.server.clone(),
                query: one.query.clone(),
                min: one.min,
                max: one.max,
            };
            (format!("/spec/analysis/prometheus/{index}"), &one.name, kind, &one.interval, one.failures)
        });
        let webhooks = analysis.webhooks.iter().enumerate().map(|(index, one)| {
            let kind = CheckKind::Webhook { url: one.url.clone() };
            (format!("/spec/analysis/webhooks/{index}"), &one.name, kind, &one.interval, one.failures)
        });
        let (mut checks, mut names) = (Vec::new(), BTreeSet::new());
        for (pointer, name, kind, interval, failures) in queries.chain(webhooks) {
            if name.is_empty() || !names.insert(name) {
                let message =
                    format!("{name:?} tells nobody which of them it is; give each a name of its own");
                self.wrong(format!("{pointer}/name"), message);
            }
            self.kind(&pointer, &kind);
            let at = format!("{pointer}/interval");
            let interval = self.duration(&at, interval.as_ref(), INTERVAL);
            if interval < SHORTEST_INTERVAL {
                self.wrong(at, format!("{} is too often; write at least 1s", words(interval)));
            }
            let failures = failures.unwrap_or(FAILURES);
            if failures == 0 {
                self.wrong(format!("{pointer}/failures"), "0 failures are none; write at least 1".to_owned());
            }
            checks.push(Check { name: name.clone(), kind, interval, failures });
        }
        if checks.len() > LIST {
            let message = format!("{} are asked; write at most {LIST} queries and webhooks", checks.len());
            self.wrong("/spec/analysis".to_owned(), message);
        }
        checks
    }

    fn kind(&mut self, pointer: &str, kind: &CheckKind) {
        let (field, url) = match kind {
            CheckKind::Prometheus { server, .. } => ("server", server),
            CheckKind::Webhook { url } => ("url", url),
        };
        let known = url.parse::<http::Uri>().is_ok_and(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.host().is_some_and(|host| !host.is_empty())
        });
        if !known {
            let message = format!(
                "{url:?} is no URL of HTTP or HTTPS; write for example http://prometheus.monitoring:9090"
            );
            self.wrong(format!("{pointer}/{field}"), message);
        }
        let CheckKind::Prometheus { query, min, max, .. } = kind else { return };
        if query.trim().is_empty() {
            self.wrong(format!("{pointer}/query"), "nothing is asked; write PromQL".to_owned());
        }
        match (min, max) {
            (None, None) => {
                self.wrong(
                    pointer.to_owned(),
                    "nothing bounds the result; write min, max, or both".to_owned(),
                );
            }
            (Some(min), Some(max)) if min > max => {
                self.wrong(format!("{pointer}/min"), format!("{min} is above max, which is {max}"));
            }
            _ => {}
        }
    }

    fn shadow(&mut self, spec: &Spec, success_rate: f64) -> Shadow {
        let nothing = canary::Shadow::default();
        let from = spec.shadow.as_ref().unwrap_or(&nothing);
        let gates = [from.agreement, from.same_top, from.success_rate, from.latency_ratio, from.size_ratio];
        // What is never looked at would be taken for something that holds.
        if gates.iter().any(Option::is_some) && spec.steps.iter().all(|step| step.shadow == 0) {
            let message =
                "no step makes copies, so nothing is compared; give a step a shadow, or remove this";
            self.wrong("/spec/shadow".to_owned(), message.to_owned());
        }
        for (field, number) in [("absolute", from.absolute), ("relative", from.relative)] {
            self.number(&format!("/spec/shadow/{field}"), number, 0.0..=f64::MAX, "0 or above");
        }
        Shadow {
            compares: spec.shadow.is_some(),
            min_compared: from.min_compared.unwrap_or(ENOUGH),
            agreement: self.share("/spec/shadow/agreement", from.agreement),
            same_top: self.share("/spec/shadow/sameTop", from.same_top),
            success_rate: self.share("/spec/shadow/successRate", from.success_rate).unwrap_or(success_rate),
            latency_ratio: self.factor("/spec/shadow/latencyRatio", from.latency_ratio),
            size_ratio: self.number("/spec/shadow/sizeRatio", from.size_ratio, 1.0..=f64::MAX, "1 or above"),
        }
    }
}

/// The Gateway API's duration as Rust's, from which it has no way of its own.
fn standard(from: gateway_api::Duration) -> Duration {
    Duration::new(from.as_secs(), from.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(change: Value) -> Spec {
        let mut spec = json!({
            "service": "resnet", "stable": "resnet-v1", "candidate": "resnet-v2", "steps": [{"weight": 10}],
        });
        json_patch::merge(&mut spec, &change);
        serde_json::from_value(spec).unwrap()
    }

    fn wrong(change: Value) -> Vec<String> {
        let all = Plan::read("team-a", &spec(change)).err().unwrap_or_default();
        all.into_iter().map(|(pointer, message)| format!("{pointer}: {message}")).collect()
    }

    #[test]
    fn what_is_left_open_has_its_default() {
        let plan = Plan::read("team-a", &spec(json!({}))).unwrap();
        assert_eq!(
            (plan.service.as_str(), plan.stable.as_str(), plan.candidate.as_str()),
            ("team-a/resnet", "team-a/resnet-v1", "team-a/resnet-v2")
        );
        assert_eq!(plan.steps, [Step { weight: 10, shadow: 0, hold: HOLD, pause: false }]);
        assert_eq!((plan.deadline, plan.matching, plan.paused), (DEADLINE, false, false));
        assert_eq!((plan.bounds.min_requests, plan.bounds.success_rate), (50, 0.99));
        assert_eq!((plan.bounds.shadow.compares, plan.bounds.shadow.success_rate), (false, 0.99));
    }

    #[test]
    fn everything_is_read() {
        let plan = Plan::read(
            "team-a",
            &spec(json!({
                "stable": "resnet",
                "steps": [{"weight": 0, "shadow": 20, "hold": "0s"}, {"weight": 100, "hold": "1h30m", "pause": true}, {"weight": 5}],
                "deadline": "2h",
                "paused": true,
                "match": [{"headers": [{"name": "x-user", "value": "me"}]}],
                "analysis": {
                    "minRequests": 7,
                    "successRate": 95.5,
                    "latency": [{"percentile": 99.9, "max": "250ms", "ofStable": 1.5}],
                    "load": 0.9,
                    "prometheus": [{"name": "errors", "server": "http://p:9090", "query": "up", "max": 1, "interval": "30s", "failures": 1}],
                    "webhooks": [{"name": "gate", "url": "https://gate.team-a/check"}],
                },
                "shadow": {"agreement": 99, "sameTop": 98, "successRate": 90, "latencyRatio": 1.2, "sizeRatio": 2, "minCompared": 9},
            })),
        )
        .unwrap();
        assert!(plan.matching && plan.paused);
        assert_eq!((plan.steps[1].hold, plan.steps[1].pause), (Duration::from_secs(5400), true));
        let bounds = &plan.bounds;
        assert_eq!((bounds.min_requests, bounds.success_rate, bounds.load), (7, 0.955, Some(0.9)));
        let latency = Latency {
            quantile: 0.9990000000000001,
            max: Some(Duration::from_millis(250)),
            of_stable: Some(1.5),
        };
        assert!((bounds.latency[0].quantile - latency.quantile).abs() < 1e-9);
        assert_eq!((bounds.latency[0].max, bounds.latency[0].of_stable), (latency.max, latency.of_stable));
        let checks: Vec<_> = bounds
            .checks
            .iter()
            .map(|one| (one.name.as_str(), one.interval.as_secs(), one.failures))
            .collect();
        assert_eq!(checks, [("errors", 30, 1), ("gate", 10, 3)]);
        let shadow = Shadow {
            compares: true,
            min_compared: 9,
            agreement: Some(0.99),
            same_top: Some(0.98),
            success_rate: 0.9,
            latency_ratio: Some(1.2),
            size_ratio: Some(2.0),
        };
        assert_eq!(bounds.shadow, shadow);
    }

    #[test]
    fn what_is_wrong_is_named_at_its_field() {
        let query = |change: Value| {
            let mut query = json!({"name": "q", "server": "http://p:9090", "query": "up", "min": 1});
            json_patch::merge(&mut query, &change);
            json!({"analysis": {"prometheus": [query]}})
        };
        let table = [
            (json!({"service": "Res net"}), "/spec/service: \"Res net\" is no name of a Service"),
            (json!({"candidate": "resnet"}), "/spec/candidate: resnet is the service as well"),
            (json!({"candidate": "resnet-v1"}), "/spec/candidate: resnet-v1 is the stable as well"),
            (json!({"stable": null}), "/spec/stable: \"\" is no name of a Service"),
            (
                json!({"stable": null, "candidate": null}),
                "/spec/deployment: nothing says what the versions are",
            ),
            (
                json!({"deployment": "resnet", "candidate": null}),
                "/spec/stable: the versions are those of the Deployment resnet",
            ),
            (
                json!({"deployment": "r".repeat(53), "stable": null, "candidate": null}),
                "/spec/deployment: \"rrrr",
            ),
            (
                json!({"deployment": "res.net", "stable": null, "candidate": null}),
                "/spec/deployment: \"res.net\" is no name",
            ),
            (json!({"steps": []}), "/spec/steps: there are 0 steps; write from 1 to 50"),
            (json!({"steps": vec![json!({"weight": 1}); 51]}), "/spec/steps: there are 51 steps"),
            (json!({"steps": [{"weight": 101}]}), "/spec/steps/0/weight: 101 is more than all"),
            (json!({"steps": [{"weight": 1, "shadow": 200}]}), "/spec/steps/0/shadow: 200"),
            (json!({"steps": [{"weight": 1, "hold": "1"}]}), "/spec/steps/0/hold: \"1\" is not a duration"),
            (json!({"deadline": "169h"}), "/spec/deadline: \"169h\" is longer than seven days"),
            (
                json!({"deadline": "0s", "steps": [{"weight": 1, "hold": "0s"}]}),
                "/spec/deadline: no step passes",
            ),
            (json!({"match": [{"headers": []}]}), "/spec/match/0/headers: without headers all"),
            (
                json!({"analysis": {"successRate": 100.5}}),
                "/spec/analysis/successRate: 100.5 is not from 0 to 100",
            ),
            (json!({"analysis": {"load": 2}}), "/spec/analysis/load: 2 is not from 0 to 1"),
            (
                json!({"analysis": {"latency": [{"percentile": 100, "max": "1s"}]}}),
                "/spec/analysis/latency/0/percentile: 100 is not above 0",
            ),
            (
                json!({"analysis": {"latency": [{"percentile": 50}]}}),
                "/spec/analysis/latency/0: nothing bounds",
            ),
            (
                json!({"analysis": {"latency": [{"percentile": 50, "ofStable": 0}]}}),
                "/spec/analysis/latency/0/ofStable: 0 is not above 0",
            ),
            (query(json!({"name": ""})), "/spec/analysis/prometheus/0/name: "),
            (
                query(json!({"server": "prometheus"})),
                "/spec/analysis/prometheus/0/server: \"prometheus\" is no URL",
            ),
            (
                json!({"analysis": {"webhooks": [{"name": "a", "url": "ftp://x"}]}}),
                "/spec/analysis/webhooks/0/url: \"ftp://x\" is no URL of HTTP or HTTPS",
            ),
            (query(json!({"query": " "})), "/spec/analysis/prometheus/0/query: "),
            (query(json!({"min": null})), "/spec/analysis/prometheus/0: nothing bounds the result"),
            (query(json!({"max": 0})), "/spec/analysis/prometheus/0/min: 1 is above max"),
            (query(json!({"interval": "100ms"})), "/spec/analysis/prometheus/0/interval: 100ms is too often"),
            (query(json!({"failures": 0})), "/spec/analysis/prometheus/0/failures: 0 failures"),
            (
                json!({"analysis": {"webhooks": [{"name": "a", "url": "http://x"}, {"name": "a", "url": "http://y"}]}}),
                "/spec/analysis/webhooks/1/name: \"a\" tells nobody",
            ),
            (json!({"shadow": {"agreement": 99}}), "/spec/shadow: no step makes copies"),
            (
                json!({"shadow": {"sizeRatio": 0.5}, "steps": [{"weight": 0, "shadow": 1}]}),
                "/spec/shadow/sizeRatio: 0.5 is not 1 or above",
            ),
        ];
        for (change, expected) in table {
            let found = wrong(change.clone());
            assert!(found.len() == 1 && found[0].starts_with(expected), "{change}: {found:?} for {expected}");
        }
        let both = wrong(json!({"service": "", "steps": []}));
        assert_eq!(both.len(), 2, "all that is wrong is told at once: {both:?}");
    }

    #[test]
    fn a_result_is_within_its_bounds_or_not() {
        let kind = |min, max| CheckKind::Prometheus { server: String::new(), query: String::new(), min, max };
        assert_eq!(kind(Some(0.99), None).holds(0.97), Err("0.97, at least 0.99 is wanted".to_owned()));
        assert_eq!(
            kind(Some(0.0), Some(2.0)).holds(2.0),
            Ok("2, at least 0 and at most 2 is wanted".to_owned())
        );
        assert!(kind(None, Some(1.0)).holds(1.1).is_err());
        assert!(kind(None, Some(1.0)).holds(f64::NAN).is_err());
    }
}
