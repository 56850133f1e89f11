//! Each way to bring a version to users, well and badly.

use std::time::Duration;

use serde_json::{Value, json};

use super::world::{World, spec};
use crate::canary::{Checked, Phase, refused};

fn one_step(change: Value) -> World {
    let mut all = json!({"steps": [{"weight": 50, "hold": "5m"}], "deadline": "1h"});
    json_patch::merge(&mut all, &change);
    World::of(all)
}

#[test]
fn a_good_candidate_gets_all_requests_step_by_step() {
    let mut world = World::of(json!({}));
    world.look();
    assert_eq!((world.diary.phase, world.weight()), (Phase::Progressing, 10), "{:#?}", world.diary);
    let took = world.until(Phase::Succeeded, 60);
    assert_eq!(world.told(), ["Progressing 0 10", "Progressing 1 50", "Promoting 1 100", "Succeeded 1 100"]);
    // Two holds of 10 s, and a look or two for each weight to arrive.
    assert!(took >= Duration::from_secs(20) && took <= Duration::from_secs(24), "{took:?}");
    let course = world.diary.course.clone();
    (world.failing, world.ready) = (1.0, 0);
    world.run(60);
    assert_eq!(
        (world.diary.phase, &world.diary.course),
        (Phase::Succeeded, &course),
        "it is no canary any more"
    );
    let succeeded = world.diary.conditions.iter().find(|one| one["type"] == "Succeeded").unwrap();
    assert_eq!(
        (succeeded["status"].as_str(), &world.diary.message),
        (Some("True"), &"all requests go to team-a/resnet-v2".to_owned())
    );
}

#[test]
fn a_step_lasts_as_long_as_too_little_was_seen() {
    let mut world = World::of(json!({}));
    world.rate = 10.0;
    world.run(30);
    assert_eq!((world.diary.phase, world.diary.step), (Phase::Progressing, 0));
    assert_eq!(world.diary.message, "step 1 of 2: waits for 50 requests to team-a/resnet-v2");
    let entries = world.diary.history.len();
    world.until(Phase::Succeeded, 60);
    assert_eq!(world.diary.history.len(), entries + 3);
}

#[test]
fn twenty_failures_of_a_hundred_are_noticed_within_three_seconds_also_after_a_long_time_without() {
    for healthy in [4, 280] {
        let mut world = one_step(json!({}));
        world.run(healthy);
        assert_eq!(world.diary.phase, Phase::Progressing);
        world.failing = 0.2;
        let took = world.until(Phase::RollingBack, 10);
        assert!(took <= Duration::from_secs(3), "{took:?} after {healthy} s");
        assert_eq!(world.weight(), 0);
        let why = world.diary.message.clone();
        assert!(why.starts_with("success rate of team-a/resnet-v2: "), "{why}");
        assert!(why.ends_with(" requests in 2 s, at least 99 % are wanted"), "{why}");
        world.until(Phase::RolledBack, 5);
        assert_eq!(world.diary.message, why);
        world.failing = 0.0;
        world.run(600);
        assert_eq!((world.diary.phase, world.weight(), &world.diary.message), (Phase::RolledBack, 0, &why));
        assert!(world.diary.candidate.as_ref().unwrap().requests > 0, "the last that was seen stays");
    }
}

#[test]
fn as_many_failures_as_are_allowed_are_no_reason() {
    let mut world = one_step(json!({"steps": [{"weight": 50, "hold": "10m"}]}));
    world.failing = 0.005;
    world.run(590);
    assert_eq!(world.diary.phase, Phase::Progressing, "{}", world.diary.message);
    world.until(Phase::Succeeded, 30);
}

#[test]
fn a_slow_candidate_goes_back_and_one_that_is_as_slow_as_stable_does_not() {
    let absolute = json!({"analysis": {"latency": [{"percentile": 99, "max": "50ms"}]}});
    let relative = json!({"analysis": {"latency": [{"percentile": 99, "ofStable": 1.2}]}});
    for (analysis, wanted) in [
        (absolute, "at most 50 ms are wanted"),
        (relative, "at most 1.2 times the 41 ms of team-a/resnet-v1 are wanted"),
    ] {
        let mut world = one_step(analysis.clone());
        world.run(30);
        assert_eq!(world.diary.phase, Phase::Progressing, "{}", world.diary.message);
        world.latency = Duration::from_millis(80);
        let took = world.until(Phase::RollingBack, 60);
        assert!(took <= Duration::from_secs(3), "all are slow: {took:?}");
        let why = &world.diary.message;
        assert!(why.starts_with("p99 latency of team-a/resnet-v2: ") && why.ends_with(wanted), "{why}");

        let mut world = World::of(analysis);
        world.until(Phase::Succeeded, 60);
    }
}

#[test]
fn at_weight_100_there_is_no_stable_to_hold_the_candidate_against() {
    let mut world = World::of(json!({
        "steps": [{"weight": 100, "hold": "5s"}],
        "analysis": {"latency": [{"percentile": 50, "ofStable": 1.0}]},
    }));
    world.until(Phase::Succeeded, 20);
}

#[test]
fn a_busy_candidate_goes_back() {
    let mut world = one_step(json!({"analysis": {"load": 0.8}}));
    world.run(30);
    world.load = 0.95;
    world.until(Phase::RollingBack, 20);
    let why = &world.diary.message;
    assert!(
        why.starts_with("load of team-a/resnet-v2: 0.") && why.ends_with("at most 0.8 is wanted"),
        "{why}"
    );
}

#[test]
fn a_check_that_says_no_for_too_long_sends_it_back_and_one_that_says_nothing_holds_it() {
    let analysis =
        json!({"analysis": {"webhooks": [{"name": "gate", "url": "http://gate/check", "failures": 2}]}});
    let mut world = World::of(analysis);
    let said = |world: &World, answer: Result<&str, &str>, failures_in_a_row| {
        let answer = answer.map(str::to_owned).map_err(str::to_owned);
        vec![Checked { name: "gate".into(), at: world.now, answer, failures_in_a_row }]
    };
    world.run(30);
    assert_eq!(world.diary.message, "step 1 of 2: waits for a yes of check gate");
    world.checks = said(&world, Ok("200"), 0);
    world.look();
    assert_eq!(world.diary.step, 1);
    world.run(30);
    assert_eq!(world.diary.step, 1, "it has said yes to the step before alone");
    world.checks = said(&world, Err("503"), 1);
    world.run(1);
    assert_eq!(world.diary.phase, Phase::Progressing);
    world.checks = said(&world, Err("503"), 2);
    world.look();
    assert_eq!(
        (world.diary.phase, world.diary.message.as_str()),
        (Phase::RollingBack, "check gate: 503, 2 times in a row")
    );
}

#[test]
fn a_query_that_has_no_result_holds_a_step_and_the_deadline_says_so() {
    let query = json!({"name": "errors", "server": "http://p:9090", "query": "up", "max": 1, "failures": 1});
    let mut world = World::of(json!({"deadline": "60s", "analysis": {"prometheus": [query]}}));
    // For longer than the deadline.
    for _ in 0..90 {
        assert_eq!(world.diary.step, 0, "nothing is no yes");
        let answer = Err("the query has no result yet".to_owned());
        world.checks = vec![Checked { name: "errors".into(), at: world.now, answer, failures_in_a_row: 0 }];
        world.run(1);
    }
    assert_eq!(
        world.diary.message,
        "step 1 of 2 has not passed within 1m10s; it waited for a yes of check errors (the query has no result yet)"
    );
}

#[test]
fn a_step_with_a_pause_waits_for_a_person_however_long_he_sleeps() {
    let mut world = World::of(
        json!({"steps": [{"weight": 10, "hold": "5s", "pause": true}, {"weight": 50, "hold": "5s"}]}),
    );
    world.until(Phase::Paused, 20);
    assert_eq!(world.diary.message, "step 1 of 2: waits for `penstock canary promote`");
    // A quiet night.
    world.rate = 0.0;
    world.run(1200);
    assert_eq!(world.told(), ["Progressing 0 10", "Paused 0 10"]);
    world.promote = world.command("alice");
    world.run(60);
    // He let it go, but nobody knows how the candidate is.
    assert_eq!((world.diary.phase, world.diary.step, world.diary.promoted), (Phase::Progressing, 0, true));
    world.rate = 100.0;
    world.until(Phase::Succeeded, 60);
    assert_eq!(world.diary.answered.promote, world.promote);

    let mut world =
        World::of(json!({"steps": [{"weight": 10, "pause": true}, {"weight": 50, "pause": true}]}));
    world.run(10);
    world.promote = world.command("bob");
    world.run(1);
    assert_eq!(world.diary.step, 1, "it skips what is left of the hold");
    world.until(Phase::Paused, 80);
    world.run(60);
    assert_eq!((world.diary.step, world.diary.phase), (1, Phase::Paused), "and is handled once");
}

#[test]
fn nobody_promotes_a_candidate_that_fails() {
    let mut world = World::of(json!({"steps": [{"weight": 10, "hold": "5s", "pause": true}]}));
    world.until(Phase::Paused, 20);
    world.failing = 0.5;
    world.promote = world.command("alice");
    world.until(Phase::RolledBack, 10);
    world.promote = world.command("alice-again");
    world.run(10);
    assert_eq!((world.diary.phase, world.weight()), (Phase::RolledBack, 0));
    assert_eq!(world.diary.answered.promote, world.promote);
}

#[test]
fn a_person_aborts_at_any_time_before_the_end() {
    for phase in [Phase::Waiting, Phase::Progressing, Phase::Paused, Phase::Promoting] {
        let mut world =
            World::of(json!({"steps": [{"weight": 10, "hold": "1s", "pause": phase == Phase::Paused}]}));
        match phase {
            Phase::Waiting => {
                world.ready = 0;
                world.look();
            }
            Phase::Promoting => {
                world.until(Phase::Progressing, 1);
                world.run(5);
                world.hung = 1;
                world.until(Phase::Promoting, 10);
                world.hung = 0;
            }
            _ => {
                world.until(phase, 20);
            }
        }
        assert_eq!(world.diary.phase, phase);
        world.abort = world.command("x");
        world.look();
        // Where every proxy has no weight already, there is nothing to wait for.
        let expected = if phase == Phase::Waiting { Phase::RolledBack } else { Phase::RollingBack };
        assert_eq!((world.diary.phase, world.weight()), (expected, 0), "{phase:?}");
        world.run(2);
        assert_eq!(world.diary.phase, Phase::RolledBack);
        assert_eq!(world.diary.message, "aborted by a person");
    }
    // One for another run is not for this.
    let mut world = World::of(json!({}));
    world.look();
    world.abort = Some("0123456789abcdef/x".to_owned());
    world.run(1);
    assert_eq!(world.diary.phase, Phase::Progressing);
}

#[test]
fn a_pause_holds_what_goes_on_and_nothing_else() {
    let mut world = World::of(json!({"paused": true}));
    world.run(5);
    assert_eq!((world.diary.phase, world.weight()), (Phase::Waiting, 0));
    world.spec.paused = false;
    world.run(2);
    assert_eq!(world.weight(), 10);
    world.spec.paused = true;
    // Longer than the deadline.
    world.run(1200);
    assert_eq!(
        (world.diary.phase, world.weight(), world.diary.message.as_str()),
        (Phase::Paused, 10, "step 1 of 2: paused by spec.paused")
    );
    world.spec.paused = false;
    world.run(1);
    assert_eq!((world.diary.phase, world.weight()), (Phase::Progressing, 50));
    world.spec.paused = true;
    world.run(1);
    world.failing = 0.5;
    world.until(Phase::RolledBack, 5);
}

#[test]
fn a_step_that_does_not_pass_in_time_goes_back_and_says_what_it_lacked() {
    let mut world = World::of(json!({"deadline": "1m"}));
    world.rate = 1.0;
    let took = world.until(Phase::RollingBack, 80);
    // It is held for ten seconds, which are no lateness.
    assert!(took >= Duration::from_secs(70), "{took:?}");
    let why = &world.diary.message;
    assert!(
        why.starts_with(
            "step 1 of 2 has not passed within 1m10s; it waited for 50 requests to team-a/resnet-v2 ("
        ) && why.ends_with(" so far)"),
        "{why}"
    );

    let mut world = World::of(json!({"deadline": "1m"}));
    world.hung = 1;
    world.until(Phase::RollingBack, 80);
    let why = &world.diary.message;
    assert!(why.ends_with("it waited for every proxy to have it (2 of 3 so far)"), "{why}");
    world.run(60);
    assert_eq!(world.diary.phase, Phase::RollingBack, "one of them may still send requests there");
    world.hung = 0;
    world.until(Phase::RolledBack, 2);
}

#[test]
fn a_hold_counts_from_when_the_last_replica_has_said_that_its_proxies_have_it() {
    let mut world = World::of(json!({}));
    world.unheard = 1;
    world.run(30);
    assert_eq!((world.diary.step, world.diary.applied_since), (0, None));
    assert_eq!(world.diary.message, "step 1 of 2: waits for every proxy to have it");
    let programmed = world.diary.conditions.iter().find(|one| one["type"] == "Programmed").unwrap();
    assert_eq!(programmed["status"], "Unknown");
    world.unheard = 0;
    world.run(9);
    assert_eq!(world.diary.step, 0);
    world.run(2);
    assert_eq!(world.diary.step, 1);
}

#[test]
fn without_proxies_there_is_nothing_to_wait_for_but_requests() {
    let mut world = World::of(json!({"analysis": {"minRequests": 0}}));
    (world.proxies, world.rate) = (0, 0.0);
    world.until(Phase::Succeeded, 40);
}

#[test]
fn nothing_is_sent_to_where_nobody_is() {
    let mut world = World::of(json!({}));
    world.ready = 0;
    world.run(1200);
    assert_eq!((world.diary.phase, world.weight()), (Phase::Waiting, 0));
    assert_eq!(world.diary.message, "waits for a ready endpoint of team-a/resnet-v2");
    world.missing = vec!["team-a/resnet-v2".into()];
    world.look();
    assert_eq!(world.diary.message, "there is no Service team-a/resnet-v2");
    (world.ready, world.missing) = (1, Vec::new());
    world.look();
    assert_eq!(world.weight(), 10);
    world.run(3);
    world.ready = 0;
    let took = world.until(Phase::RollingBack, 20);
    assert_eq!((took.as_secs(), world.weight()), (10, 0));
    assert_eq!(world.diary.message, "no endpoint of team-a/resnet-v2 was ready for 10s");
}

#[test]
fn a_pod_that_is_replaced_is_no_candidate_that_is_gone() {
    let mut world = World::of(json!({}));
    world.look();
    for _ in 0..10 {
        world.ready = 0;
        world.run(9);
        assert_eq!((world.diary.phase, world.diary.step), (Phase::Progressing, 0), "{}", world.diary.message);
        world.ready = 1;
        world.look();
        if world.diary.step > 0 {
            return;
        }
    }
    panic!("{}", world.diary.message);
}

#[test]
fn where_there_is_nothing_to_go_back_to_it_stays_and_goes_back_as_soon_as_there_is() {
    let mut world = one_step(json!({}));
    world.run(20);
    (world.stable_ready, world.failing) = (0, 0.5);
    world.run(30);
    assert_eq!((world.diary.phase, world.weight()), (Phase::Progressing, 50));
    let why = &world.diary.message;
    assert!(why.starts_with("success rate of team-a/resnet-v2: "), "{why}");
    assert!(
        why.ends_with("; it stays until an endpoint of team-a/resnet-v1 is ready to go back to"),
        "{why}"
    );
    // What was seen then is why, also when it is well again.
    world.failing = 0.0;
    world.run(600);
    world.stable_ready = 1;
    world.look();
    assert_eq!((world.diary.phase, world.weight()), (Phase::RollingBack, 0));
    world.until(Phase::RolledBack, 3);
}

#[test]
fn a_run_that_cannot_begin_leaves_requests_where_they_are() {
    let mut world = World::of(json!({}));
    world.until(Phase::Succeeded, 60);
    let course = world.diary.course.clone();
    // Of the version that is to be stable there is nothing, by a slip of the pen.
    (world.spec.stable, world.spec.candidate) = ("resnet-v0".into(), "resnet-v3".into());
    world.stable_ready = 0;
    world.run(60);
    assert_eq!((world.diary.phase, &world.diary.course), (Phase::Waiting, &course));
    assert_eq!(world.diary.message, "waits for a ready endpoint of team-a/resnet-v0");
    world.stable_ready = 1;
    world.look();
    let course = world.diary.course.clone().unwrap();
    assert_eq!(
        (course.stable.as_str(), course.candidate.as_str(), course.weight),
        ("resnet-v0", "resnet-v3", 10)
    );
}

#[test]
fn the_promotion_is_held_and_judged_too() {
    let change = json!({"promotion": "30s"});
    let mut world = World::of(change.clone());
    world.until(Phase::Promoting, 60);
    let took = world.until(Phase::Succeeded, 60);
    assert!((30..33).contains(&took.as_secs()), "{took:?}");

    let mut world = World::of(change);
    world.until(Phase::Promoting, 60);
    world.run(10);
    assert_eq!(world.diary.message, "promotion: waits for 30s to pass");
    world.failing = 0.5;
    let took = world.until(Phase::RollingBack, 10);
    assert!(took <= Duration::from_secs(3), "{took:?}");

    // Unless said, where the last step was not at 100 already.
    let of = |steps| World::of(json!({"promotion": null, "steps": steps})).plan().promotion.as_secs();
    assert_eq!((of(json!([{"weight": 50}])), of(json!([{"weight": 100}]))), (60, 0));
}

#[test]
fn after_a_success_a_person_still_goes_back() {
    let mut world = World::of(json!({}));
    world.until(Phase::Succeeded, 60);
    world.abort = world.command("x");
    world.until(Phase::RolledBack, 3);
    assert_eq!((world.weight(), world.diary.message.as_str()), (0, "aborted by a person"));
}

#[test]
fn what_an_older_control_has_written_is_gone_on_with() {
    let mut world = World::of(json!({}));
    world.until(Phase::Succeeded, 60);
    let mut written = serde_json::to_value(&world.diary).unwrap();
    for field in ["run", "inForce"] {
        written.as_object_mut().unwrap().remove(field);
    }
    written["course"] = json!({"run": "0123456789abcdef", "weight": 100});
    world.diary = serde_json::from_value(written).unwrap();
    world.run(5);
    let course = world.diary.course.clone().unwrap();
    assert_eq!(
        (world.diary.phase, course.weight, course.candidate.as_str()),
        (Phase::Succeeded, 100, "resnet-v2")
    );
}

#[test]
fn other_steps_are_gone_on_with_from_where_it_is() {
    let step = |weight: u32| json!({"weight": weight, "hold": "10s"});
    let mut world = World::of(json!({"steps": [step(10), step(30), step(60)]}));
    world.run(15);
    assert_eq!((world.diary.step, world.weight()), (1, 30));
    // A step that comes later is another: nothing happens.
    let (since, entries) = (world.diary.step_since, world.diary.history.len());
    world.spec = spec(json!({"steps": [step(10), step(30), step(40), step(70)]}));
    world.look();
    assert_eq!((world.diary.step, world.diary.step_since, world.diary.history.len()), (1, since, entries));
    // The one that it is at is gone: never to more than there was.
    world.spec = spec(json!({"steps": [step(5), step(20), step(40)]}));
    world.look();
    assert_eq!((world.diary.step, world.weight()), (1, 20));
    world.spec = spec(json!({"steps": [step(90)]}));
    world.look();
    assert_eq!((world.diary.step, world.weight()), (0, 90), "there is none below");
    world.until(Phase::Succeeded, 60);
    world.spec = spec(json!({"steps": [step(1), step(2)]}));
    world.run(5);
    assert_eq!((world.diary.phase, world.weight()), (Phase::Succeeded, 100));
}

#[test]
fn nobody_goes_back_to_a_stable_version_that_is_gone_because_of_time() {
    let mut world = World::of(json!({}));
    world.run(3);
    world.missing = vec!["team-a/resnet-v1".into()];
    world.run(1200);
    assert_eq!((world.diary.phase, world.weight()), (Phase::Paused, 10));
    world.missing = Vec::new();
    world.until(Phase::Succeeded, 60);
}

#[test]
fn blue_green_compares_first_and_moves_all_at_once_when_a_person_says_so() {
    let mut world = World::of(json!({
        "steps": [{"weight": 0, "shadow": 20, "hold": "10s"}, {"weight": 100, "hold": "10s", "pause": true}],
        "shadow": {"agreement": 99},
    }));
    world.look();
    assert_eq!((world.weight(), world.diary.course.as_ref().unwrap().shadow), (0, 20));
    world.until(Phase::Paused, 60);
    assert_eq!((world.weight(), world.diary.course.as_ref().unwrap().shadow), (100, 0));
    // What the step before rested on is still told to whoever has to decide, and afterwards.
    let compared = world.diary.shadow.clone();
    assert!(compared.as_ref().is_some_and(|shadow| shadow.compared >= 50), "{compared:?}");
    world.promote = world.command("x");
    world.until(Phase::Succeeded, 10);
    assert_eq!(world.diary.shadow, compared);
    assert_eq!(
        world.told(),
        ["Progressing 0 0", "Progressing 1 100", "Paused 1 100", "Promoting 1 100", "Succeeded 1 100"]
    );
}

#[test]
fn an_a_b_test_sends_those_that_match_and_is_judged_by_them() {
    let spec = json!({
        "steps": [{"weight": 0, "hold": "5s", "pause": true}],
        "match": [{"headers": [{"name": "x-group", "value": "b"}]}],
    });
    let mut world = World::of(spec.clone());
    world.matching = 5.0;
    world.until(Phase::Paused, 20);
    world.run(1200);
    assert_eq!((world.diary.phase, world.weight()), (Phase::Paused, 0));
    assert!(
        world.diary.course.as_ref().unwrap().matching && world.diary.candidate.as_ref().unwrap().requests > 0
    );
    world.failing = 0.5;
    world.until(Phase::RollingBack, 10);
    assert!(!world.diary.course.as_ref().unwrap().matching);

    let mut world = World::of(spec);
    world.until(Phase::Paused, 20);
    world.promote = world.command("x");
    world.until(Phase::Succeeded, 5);
}

#[test]
fn a_candidate_that_answers_otherwise_never_gets_a_request() {
    let spec = json!({
        "steps": [{"weight": 0, "shadow": 20, "hold": "30s"}, {"weight": 100}],
        "shadow": {"agreement": 99, "sameTop": 99.5, "latencyRatio": 1.5, "sizeRatio": 2},
    });
    let mut world = World::of(spec.clone());
    world.differing = 0.1;
    world.until(Phase::RollingBack, 29);
    assert!(world.told().iter().all(|told| told.ends_with(" 0")), "{:?}", world.told());
    assert!(
        world.diary.message.starts_with("agreement of team-a/resnet-v2's answers: "),
        "{}",
        world.diary.message
    );
    let shadow = world.diary.shadow.as_ref().unwrap();
    assert!(shadow.agreement.unwrap() < 95.0 && shadow.same_top.unwrap() < 95.0, "{shadow:?}");

    let mut world = World::of(spec.clone());
    world.failing = 0.3;
    world.until(Phase::RollingBack, 29);
    assert!(world.diary.message.starts_with("success rate of copies to "), "{}", world.diary.message);

    let mut world = World::of(spec.clone());
    world.latency = Duration::from_millis(100);
    world.until(Phase::RollingBack, 29);
    assert!(world.diary.message.starts_with("median latency of copies to "), "{}", world.diary.message);

    let mut world = World::of(spec);
    world.run(40);
    assert_eq!((world.diary.step, world.weight()), (1, 100));
}

#[test]
fn another_run_begins_anew_and_takes_nothing_along() {
    let mut world = World::of(json!({}));
    world.run(3);
    world.failing = 0.5;
    world.until(Phase::RolledBack, 20);
    world.failing = 0.0;
    world.abort = world.command("never-seen");
    let before = world.plan().run;
    world.spec.run = Some("again".into());
    // Told before the run was there: a leftover.
    world.abort = world.command("early");
    world.look();
    assert_ne!(world.plan().run, before);
    assert_eq!((world.diary.phase, world.weight(), world.diary.step), (Phase::Progressing, 10, 0));
    assert_eq!(world.diary.answered.abort, world.abort);
    world.until(Phase::Succeeded, 60);
    // The next version: what was the candidate is stable now.
    (world.spec.stable, world.spec.candidate) = ("resnet-v2".into(), "resnet-v3".into());
    world.ready = 0;
    world.look();
    let course = world.diary.course.clone().unwrap();
    assert_eq!((world.diary.phase, course.weight, course.run), (Phase::Waiting, 0, world.plan().run));
}

#[test]
fn a_failure_of_the_run_before_is_none_of_this_one() {
    let mut world = one_step(json!({}));
    world.run(20);
    world.failing = 1.0;
    world.until(Phase::RollingBack, 5);
    // At once another image behind the same Service, and another run.
    (world.failing, world.spec.run) = (0.0, Some("fixed".into()));
    world.run(20);
    assert_eq!(world.diary.phase, Phase::Progressing, "{}", world.diary.message);
}

#[test]
fn an_object_that_makes_no_sense_moves_nothing() {
    let wrong = [("/spec/steps/0/weight".to_owned(), "101 is more than all; write from 0 to 100".to_owned())];
    let mut world = World::of(json!({}));
    let fresh = refused(&world.diary, Some(4), &wrong, world.now);
    assert_eq!((fresh.phase, &fresh.course, fresh.observed_generation), (Phase::Invalid, &None, Some(4)));
    assert_eq!(fresh.message, "spec.steps[0].weight: 101 is more than all; write from 0 to 100");
    assert_eq!(fresh.conditions[0]["status"], "False");
    assert_eq!(refused(&fresh, Some(4), &wrong, world.now), fresh);
    world.diary = fresh;
    world.run(15);
    assert_eq!((world.diary.phase, world.weight()), (Phase::Progressing, 50));
    let held = refused(&world.diary, Some(5), &wrong, world.now);
    assert_eq!((held.phase, &held.course), (Phase::Progressing, &world.diary.course));
    world.diary = held;
    world.until(Phase::Succeeded, 60);
    assert_eq!(world.diary.conditions[0]["status"], "True");
}

#[test]
fn numbers_alone_are_no_news() {
    let mut world = one_step(json!({}));
    world.run(20);
    let before = world.diary.clone();
    world.run(20);
    assert_ne!(world.diary, before);
    assert!(world.diary.same_but_for_numbers(&before));
    world.failing = 0.5;
    world.until(Phase::RollingBack, 5);
    assert!(!world.diary.same_but_for_numbers(&before));
}
