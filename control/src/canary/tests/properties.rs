//! What holds whatever happens, in any order.

use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use penstock_api::latency::bucket_of;
use proptest::prelude::*;
use serde_json::json;

use super::world::{pair, spec};
use crate::canary::walk::UNREADY;
use crate::canary::{Checked, Diary, Facts, Phase, Plan, Reached, Verdict, judge, refused, walk, windows};
use crate::fleet::Seen;
use crate::objects::canary::Course;

/// What is true at one look, and what was told since the one before.
#[derive(Clone, Debug)]
struct Moment {
    ms: i64,
    requests: u64,
    failures: u64,
    slow: bool,
    ready: usize,
    stable_ready: usize,
    missing: bool,
    /// Of three proxies, those that have it; and whether it is this course that they have.
    applied: usize,
    compiled: bool,
    unheard: usize,
    /// `None`: nobody has told anything; the number makes commands differ.
    promote: Option<u8>,
    abort: Option<u8>,
    paused: bool,
    /// Which run.
    run: u8,
    no: u32,
    broken: bool,
    /// Of the same, the compiler alone has found out.
    refused: bool,
}

fn moment() -> impl Strategy<Value = Moment> {
    let seen =
        (0..15_000i64, 0..300u64, prop_oneof![4 => Just(0u64), 1 => 0..100u64], prop::bool::weighted(0.1));
    let endpoints = || prop_oneof![8 => Just(1usize), 1 => Just(0)];
    let place = (endpoints(), endpoints(), prop::bool::weighted(0.05));
    let reach = (
        prop_oneof![3 => Just(3usize), 1 => 0..3usize],
        prop::bool::weighted(0.9),
        prop_oneof![5 => Just(0usize), 1 => Just(1)],
    );
    let told = (
        prop::option::weighted(0.3, 0..3u8),
        prop::option::weighted(0.04, 0..3u8),
        prop::bool::weighted(0.1),
        prop_oneof![12 => Just(0u8), 1 => 1..3u8],
        prop_oneof![6 => Just(0u32), 1 => 0..3u32],
        (prop::bool::weighted(0.05), prop::bool::weighted(0.05)),
    );
    (seen, place, reach, told).prop_map(
        |(
            (ms, requests, failures, slow),
            (ready, stable_ready, missing),
            (applied, compiled, unheard),
            told,
        )| {
            let (promote, abort, paused, run, no, (broken, refused)) = told;
            Moment {
                ms,
                requests,
                failures,
                slow,
                ready,
                stable_ready,
                missing,
                applied,
                compiled,
                unheard,
                promote,
                abort,
                paused,
                run,
                no,
                broken,
                refused,
            }
        },
    )
}

/// Every step that there may be: with a pause, with copies, with the same course as the one before.
fn plan(moment: &Moment, shape: u8) -> Plan {
    let steps = match shape {
        0 => {
            json!([{"weight": 10, "hold": "5s"}, {"weight": 50, "hold": "5s", "pause": true}, {"weight": 50, "hold": "0s"}])
        }
        1 => json!([{"weight": 0, "shadow": 20, "hold": "5s"}, {"weight": 100, "hold": "0s", "pause": true}]),
        2 => {
            json!([{"weight": 0, "hold": "0s"}, {"weight": 0, "hold": "0s", "pause": true}, {"weight": 0, "hold": "0s"}])
        }
        _ => json!([{"weight": 60, "hold": "0s"}, {"weight": 5, "hold": "1s"}]),
    };
    let change = json!({
        "steps": steps,
        "deadline": "40s",
        "run": moment.run.to_string(),
        "paused": moment.paused,
        "analysis": {
            "minRequests": if shape == 2 { 0 } else { 20 },
            "latency": [{"percentile": 50, "max": "100ms"}],
            "webhooks": if shape == 3 { json!([{"name": "gate", "url": "http://gate/", "failures": 2}]) } else { json!([]) },
        },
    });
    Plan::read("team-a", &spec(change)).unwrap()
}

fn facts(moment: &Moment, plan: &Plan, diary: &Diary, now: Timestamp) -> Facts {
    let mut seen = Seen::default();
    let backend = seen.backends.entry(pair("resnet-v2")).or_default();
    (backend.total.requests, backend.total.failures) =
        (moment.requests, moment.failures.min(moment.requests));
    let latency = Duration::from_millis(if moment.slow { 300 } else { 20 });
    backend.total.latency.add(bucket_of(latency), moment.requests);
    let shadow = seen.shadows.entry(pair("resnet-v2")).or_default();
    (shadow.sent, shadow.failures) = (moment.requests, moment.failures.min(moment.requests));
    let other = Course { run: "other".into(), weight: 100, ..Course::default() };
    let command = |number: Option<u8>| number.map(|number| format!("{}/{number}", plan.run));
    let answer = if moment.no > 0 { Err("503".to_owned()) } else { Ok("200".to_owned()) };
    Facts {
        now,
        generation: Some(1),
        refused: if moment.refused { vec![(String::new(), "no".into())] } else { Vec::new() },
        missing: if moment.missing { vec![plan.stable.clone()] } else { Vec::new() },
        ready: moment.ready,
        stable_ready: moment.stable_ready,
        pods: None,
        reach: Reached {
            of: if moment.compiled { diary.course.clone() } else { Some(other) },
            concerned: 3,
            applied: moment.applied,
            unheard: moment.unheard,
            refused: None,
        },
        windows: windows(diary, now).map(|window| (window, seen.clone())),
        checks: vec![Checked { name: "gate".into(), at: now, answer, failures_in_a_row: moment.no }],
        promote: command(moment.promote),
        abort: command(moment.abort),
    }
}

/// The edges that are drawn at the module's head; a step after a step is one too.
fn drawn(from: Phase, to: Phase) -> bool {
    use Phase::*;
    matches!(
        (from, to),
        // Back: what was to go back before it made no sense, and could not.
        (Invalid, Waiting | RollingBack)
            | (Waiting, Invalid | Progressing | RollingBack)
            | (Progressing, Progressing | Paused | Promoting | RollingBack)
            | (Paused, Progressing | Promoting | RollingBack)
            | (Promoting, Succeeded | RollingBack)
            | (Succeeded, RollingBack)
            | (RollingBack, RolledBack)
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_in_any_order(shape in 0..4u8, moments in prop::collection::vec(moment(), 1..60)) {
        let mut now = Timestamp::from_second(1_800_000_000).unwrap();
        let mut diary = Diary::default();
        // The run that is on, and whether it has gone back.
        let (mut run, mut gone_back) = (String::new(), false);
        for moment in &moments {
            now += SignedDuration::from_millis(moment.ms);
            let plan = plan(moment, shape);
            if moment.broken {
                let next = refused(&diary, Some(2), &[(String::new(), "no".into())], now);
                prop_assert_eq!(&refused(&next, Some(2), &[(String::new(), "no".into())], now), &next);
                prop_assert_eq!(&next.course, &diary.course);
                diary = next;
            }
            let facts = facts(moment, &plan, &diary, now);
            // A replica that has been started this moment knows what is written, and nothing else.
            let read: Diary = serde_json::from_str(&serde_json::to_string(&diary).unwrap()).unwrap();
            prop_assert_eq!(&read, &diary);
            let next = walk(&plan, &read, &facts);
            prop_assert_eq!(&walk(&plan, &next, &facts), &next, "the second look at {:#?}", facts);

            let fresh = run != plan.run;
            if fresh && moment.refused {
                prop_assert_eq!(&next.course, &diary.course, "no run begins with what is not in force");
                diary = next;
                continue;
            }
            prop_assert_eq!(&next.run, &plan.run);
            let ours = next.course.as_ref().is_some_and(|course| course.run == plan.run);
            if !ours {
                // Nothing is sent to a stable version that is not there: what was in force is.
                prop_assert_eq!((facts.stable_ready, next.phase, &next.course), (0, Phase::Waiting, &diary.course));
            }
            let course = next.course.clone().unwrap_or_default();
            if fresh {
                (run, gone_back) = (plan.run.clone(), false);
                // Nobody can have a course that was not there a moment ago.
                prop_assert!(!matches!(next.phase, Phase::Promoting | Phase::Succeeded), "{:?}", next);
            } else if diary.phase.judged() {
                let gone = diary.unready_since.is_some_and(|since| since.until(now) >= UNREADY) && facts.ready == 0;
                let fails = matches!(judge(&plan, &diary, &facts), Verdict::Fails(_)) || gone || diary.stays.is_some();
                gone_back |= fails && facts.stable_ready > 0;
                if fails && facts.stable_ready == 0 {
                    prop_assert!(next.stays.is_some() && next.phase == diary.phase, "{:?}", next);
                } else if fails {
                    prop_assert!(matches!(next.phase, Phase::RollingBack | Phase::RolledBack), "{:?}", next);
                }
            }
            if gone_back {
                let Course { weight, shadow, matching, .. } = course;
                prop_assert_eq!((weight, shadow, matching), (0, 0, false));
            }
            if ours && next.phase == Phase::Waiting {
                // Of a run that was left and is asked for again the course may still be in force, while there is nothing to go back to.
                prop_assert!(course.weight == 0 || facts.stable_ready == 0, "{:?}", next);
            }
            if next.phase == Phase::RollingBack && diary.phase != next.phase {
                prop_assert!(facts.stable_ready > 0, "to nothing: {:?}", next);
            }
            gone_back |= matches!(next.phase, Phase::RollingBack | Phase::RolledBack);

            // What this look has added to the history, which is no part of what it decides by.
            let without = Diary { history: Vec::new(), ..read };
            let told = walk(&plan, &without, &facts);
            prop_assert_eq!(&Diary { history: next.history.clone(), ..told.clone() }, &next);
            let mut from = (if fresh { Phase::Waiting } else { diary.phase }, diary.step);
            for entry in &told.history {
                let first = fresh && entry.phase == Phase::Waiting;
                // It is to go back and cannot: told once.
                let stays = next.stays.is_some() && entry.phase == from.0;
                prop_assert!(first || stays || drawn(from.0, entry.phase), "{:?} to {:?}", from.0, entry.phase);
                if stays {
                    continue;
                }
                let another = entry.phase == Phase::Progressing && (fresh || from.0 == Phase::Waiting || entry.step > from.1);
                let forward = another || matches!(entry.phase, Phase::Promoting | Phase::Succeeded | Phase::RolledBack);
                if forward && !(fresh || from.0 == Phase::Waiting) {
                    let whole = moment.compiled && moment.applied == 3 && moment.unheard == 0;
                    prop_assert!(whole, "{:?} although not every proxy has said so", entry.phase);
                }
                if forward && matches!(entry.phase, Phase::Progressing | Phase::Promoting) {
                    prop_assert!(!moment.paused && !moment.missing && !moment.refused);
                }
                from = (entry.phase, entry.step);
            }
            prop_assert_eq!(from.0, next.phase);
            prop_assert!(next.history.len() <= 20 && next.step < plan.steps.len());
            diary = next;
        }
    }
}

/// The property would hold of a walk that never moves: it has to have been everywhere.
#[test]
fn what_comes_leads_everywhere() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut phases = std::collections::HashSet::new();
    for case in 0..400u32 {
        let moments = prop::collection::vec(moment(), 1..60).new_tree(&mut runner).unwrap().current();
        let (mut now, mut diary) = (Timestamp::from_second(1_800_000_000).unwrap(), Diary::default());
        for moment in &moments {
            now += SignedDuration::from_millis(moment.ms);
            let plan = plan(moment, (case % 4) as u8);
            if moment.broken {
                diary = refused(&diary, Some(2), &[], now);
            }
            phases.insert(diary.phase);
            diary = walk(&plan, &diary, &facts(moment, &plan, &diary, now));
            phases.insert(diary.phase);
        }
    }
    assert_eq!(phases.len(), 8, "{phases:?}");
}
