//! When what was seen is good enough, when it surely isn't, and when neither can be said.

use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use penstock_api::latency::bucket_of;
use serde_json::{Value, json};

use super::world::{pair, spec};
use crate::canary::{Diary, Facts, Moment, Phase, Plan, Reached, Verdict, judge};
use crate::fleet::Seen;
use crate::objects::canary::Course;

/// A minute after the step was applied.
fn at() -> Timestamp {
    Timestamp::from_second(1_800_000_060).unwrap()
}

fn ago(seconds: i64) -> Option<Moment> {
    Some(Moment::of(at() - SignedDuration::from_secs(seconds)))
}

fn diary(plan: &Plan, weight: u32, shadow: u32) -> Diary {
    Diary {
        course: Some(Course { weight, shadow, ..Course::stable_alone(plan.run.clone(), &plan.spec) }),
        phase: Phase::Progressing,
        since: ago(60),
        applied_since: ago(60),
        ..Diary::default()
    }
}

fn facts(windows: [(u64, Seen); 3]) -> Facts {
    Facts {
        now: at(),
        generation: None,
        refused: Vec::new(),
        missing: Vec::new(),
        ready: 1,
        stable_ready: 1,
        pods: None,
        reach: Reached::default(),
        windows: windows.map(|(seconds, seen)| (Duration::from_secs(seconds), seen)),
        checks: Vec::new(),
        promote: None,
        abort: None,
    }
}

/// So many requests to the candidate, of which so many failed, and their times.
fn seen(requests: u64, failures: u64, times: &[(u64, u64)]) -> Seen {
    let mut seen = Seen::default();
    let backend = seen.backends.entry(pair("resnet-v2")).or_default();
    (backend.total.requests, backend.total.failures) = (requests, failures);
    for (ms, count) in times {
        backend.total.latency.add(bucket_of(Duration::from_millis(*ms)), *count);
    }
    seen
}

/// `fails`, `passes`, or what is missing.
fn word(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Fails(why) => format!("fails: {why}"),
        Verdict::Passes => "passes".to_owned(),
        Verdict::Undecided(missing) => {
            missing.iter().map(|one| format!("{} ({})", one.what, one.so_far)).collect::<Vec<_>>().join("; ")
        }
    }
}

fn judged(change: Value, windows: [(u64, Seen); 3]) -> String {
    let plan = Plan::read("team-a", &spec(change)).unwrap();
    word(&judge(&plan, &diary(&plan, 50, 0), &facts(windows)))
}

/// The same through every window.
fn since_applied(change: Value, requests: u64, failures: u64, times: &[(u64, u64)]) -> String {
    judged(change, [2, 10, 60].map(|seconds| (seconds, seen(requests, failures, times))))
}

#[test]
fn a_success_rate_fails_when_it_is_surely_too_low_and_passes_when_it_is_as_wanted() {
    let table = [
        (49, 0, "50 requests to team-a/resnet-v2 (49 so far)"),
        (50, 0, "passes"),
        (100, 1, "passes"),
        (100, 2, "success rate of team-a/resnet-v2 of at least 99 % (98.0 % of 100 requests so far)"),
        // Four of four may be a server that was restarted.
        (
            4,
            4,
            "50 requests to team-a/resnet-v2 (4 so far); success rate of team-a/resnet-v2 of at least 99 % (0.0 % of 4 requests so far)",
        ),
        (
            5,
            5,
            "fails: success rate of team-a/resnet-v2: 0.0 % of 5 requests in 2 s, at least 99 % are wanted",
        ),
        (
            50,
            10,
            "fails: success rate of team-a/resnet-v2: 80.0 % of 50 requests in 2 s, at least 99 % are wanted",
        ),
        (10_000, 100, "passes"),
        // Wilson's lower end of 1.25 % of 10,000 is 0.99 %, and of 1.3 % it is 1.04 %.
        (10_000, 125, "success rate of team-a/resnet-v2 of at least 99 % (98.8 % of 10000 requests so far)"),
        (
            10_000,
            130,
            "fails: success rate of team-a/resnet-v2: 98.7 % of 10000 requests in 2 s, at least 99 % are wanted",
        ),
    ];
    for (requests, failures, expected) in table {
        assert_eq!(since_applied(json!({}), requests, failures, &[]), expected, "{failures} of {requests}");
    }
    let all = json!({"analysis": {"successRate": 100}});
    assert_eq!(since_applied(all.clone(), 100, 0, &[]), "passes");
    assert!(since_applied(all.clone(), 100, 1, &[]).starts_with("success rate"));
    assert!(since_applied(all, 1000, 5, &[]).starts_with("fails"));
    assert_eq!(since_applied(json!({"analysis": {"successRate": 0}}), 100, 100, &[]), "passes");
}

#[test]
fn any_window_tells_that_it_fails_and_only_the_step_that_it_passes() {
    let (good, bad) = (|| seen(1000, 0, &[]), || seen(100, 20, &[]));
    let table = [
        ([(2, bad()), (10, good()), (60, good())], "in 2 s"),
        ([(2, good()), (10, bad()), (60, good())], "in 10 s"),
        ([(2, good()), (10, good()), (60, bad())], "in 60 s"),
    ];
    for (windows, expected) in table {
        let verdict = judged(json!({}), windows);
        assert!(verdict.starts_with("fails") && verdict.contains(expected), "{verdict}");
    }
    let verdict = judged(json!({}), [(2, good()), (10, good()), (60, Seen::default())]);
    assert_eq!(verdict, "50 requests to team-a/resnet-v2 (0 so far)");
}

#[test]
fn a_window_that_reaches_back_too_far_is_not_looked_through() {
    let plan = Plan::read("team-a", &spec(json!({}))).unwrap();
    let windows = || [2, 10, 60].map(|seconds| (seconds, seen(100, 50, &[])));
    let at_run = |since, applied_since| {
        let diary = Diary { since, applied_since, ..diary(&plan, 50, 0) };
        word(&judge(&plan, &diary, &facts(windows())))
    };
    assert!(at_run(ago(1), ago(1)).starts_with("50 requests"), "all of it may be of the run before");
    assert!(at_run(ago(3), ago(1)).contains("in 2 s"));
    assert!(at_run(ago(1), ago(60)).contains("in 60 s"));
    assert!(at_run(ago(1), None).starts_with("50 requests"), "nobody knows whether it is applied");
}

#[test]
fn a_percentile_takes_as_many_requests_as_it_is_far_out_unless_most_are_slow() {
    let bound = json!({"analysis": {"latency": [{"percentile": 99, "max": "100ms"}]}});
    let slow = "p99 latency of team-a/resnet-v2 within its bound";
    let table: [(&[(u64, u64)], &str); 7] = [
        (&[(40, 1000)], "passes"),
        (&[(40, 990), (200, 10)], "passes"),
        (&[(40, 985), (200, 15)], slow),
        (
            &[(40, 970), (200, 30)],
            "fails: p99 latency of team-a/resnet-v2: 213 ms of 1000 requests in 2 s, at most 100 ms are wanted",
        ),
        // The first requests of a server that warms up.
        (&[(40, 40), (200, 30)], slow),
        (
            &[(200, 70)],
            "fails: p99 latency of team-a/resnet-v2: 213 ms of 70 requests in 2 s, at most 100 ms are wanted",
        ),
        // In the bucket of the bound: that may be below it.
        (&[(105, 1000)], "passes"),
    ];
    for (times, expected) in table {
        let verdict = since_applied(bound.clone(), 1000, 0, times);
        assert!(verdict.starts_with(expected), "{times:?}: {verdict}");
    }
}

#[test]
fn stable_is_asked_for_no_more_requests_than_come_along() {
    let bound = json!({"analysis": {"latency": [{"percentile": 50, "ofStable": 1.1}]}});
    let plan = Plan::read("team-a", &spec(bound)).unwrap();
    let look = |weight, stable: u64| {
        let mut all = seen(100, 0, &[(40, 100)]);
        let backend = all.backends.entry(pair("resnet-v1")).or_default();
        backend.total.latency.add(bucket_of(Duration::from_millis(40)), stable);
        let windows = [2, 10, 60].map(|seconds| (seconds, all.clone()));
        word(&judge(&plan, &diary(&plan, weight, 0), &facts(windows)))
    };
    assert_eq!(look(50, 49), "50 requests to team-a/resnet-v1, to hold team-a/resnet-v2 against (49 so far)");
    assert_eq!(look(50, 50), "passes");
    assert_eq!(look(10, 50), "passes");
    assert_eq!(look(90, 4), "5 requests to team-a/resnet-v1, to hold team-a/resnet-v2 against (4 so far)");
    assert_eq!(look(90, 5), "passes");
    assert_eq!(look(100, 0), "passes");
}

#[test]
fn copies_are_judged_by_what_is_asked_of_them() {
    let plan = |shadow: Option<Value>| {
        let change = json!({"steps": [{"weight": 0, "shadow": 10}], "shadow": shadow});
        Plan::read("team-a", &spec(change)).unwrap()
    };
    let look = |plan: &Plan, change: &dyn Fn(&mut crate::fleet::seen::Shadow)| {
        let mut all = Seen::default();
        let shadow = all.shadows.entry(pair("resnet-v2")).or_default();
        (shadow.sent, shadow.compared, shadow.agreed) = (100, 100, 100);
        (shadow.ranked, shadow.same_top, shadow.bytes, shadow.client_bytes) = (100, 100, 1000, 1000);
        for histogram in [&mut shadow.latency, &mut shadow.client_latency] {
            histogram.add(bucket_of(Duration::from_millis(40)), 100);
        }
        change(shadow);
        let windows = [2, 10, 60].map(|seconds| (seconds, all.clone()));
        word(&judge(plan, &diary(plan, 0, 10), &facts(windows)))
    };
    let none = plan(None);
    assert_eq!(look(&none, &|_| ()), "passes");
    assert_eq!(look(&none, &|seen| seen.sent = 49), "50 copies to team-a/resnet-v2 (49 so far)");
    assert_eq!(look(&none, &|seen| (seen.compared, seen.agreed) = (0, 0)), "passes");
    assert!(look(&none, &|seen| seen.failures = 20).starts_with("fails: success rate of copies to "));

    let all = plan(Some(
        json!({"agreement": 99, "sameTop": 99, "latencyRatio": 1.5, "sizeRatio": 2, "minCompared": 30}),
    ));
    assert_eq!(look(&all, &|_| ()), "passes");
    let few = look(&all, &|seen| (seen.compared, seen.agreed) = (29, 29));
    assert_eq!(few, "30 answers of team-a/resnet-v2 that are compared (29 so far)");
    let unranked = look(&all, &|seen| (seen.ranked, seen.same_top) = (0, 0));
    assert_eq!(unranked, "30 compared answers of team-a/resnet-v2 that have a greatest element (0 so far)");
    let differs = look(&all, &|seen| seen.agreed = 90);
    assert_eq!(
        differs,
        "fails: agreement of team-a/resnet-v2's answers: 90.0 % of 100 pairs in 2 s, at least 99 % are wanted"
    );
    assert!(
        look(&all, &|seen| seen.agreed = 98)
            .starts_with("agreement of team-a/resnet-v2's answers of at least")
    );
    assert!(look(&all, &|seen| seen.same_top = 90).starts_with("fails: sameness of the greatest element"));
    assert!(look(&all, &|seen| seen.bytes = 2001).starts_with("fails: size of team-a/resnet-v2's answers: "));
    assert!(look(&all, &|seen| seen.bytes = 499).starts_with("fails: size of team-a/resnet-v2's answers: "));
    assert_eq!(look(&all, &|seen| seen.bytes = 500), "passes");
    let slow = look(&all, &|seen| {
        seen.latency = Default::default();
        seen.latency.add(bucket_of(Duration::from_millis(80)), 100);
    });
    assert!(slow.starts_with("fails: median latency of copies to team-a/resnet-v2: "), "{slow}");
    // A step that makes none is not judged by those that were made before.
    let without = Plan::read("team-a", &spec(json!({}))).unwrap();
    let mut bad = Seen::default();
    let shadow = bad.shadows.entry(pair("resnet-v2")).or_default();
    (shadow.sent, shadow.failures) = (100, 100);
    let windows = [2, 10, 60].map(|seconds| (seconds, bad.clone()));
    assert_eq!(word(&judge(&without, &diary(&without, 0, 0), &facts(windows))), "passes");
}
