//! Changes of a Deployment, with a Kubernetes that replaces its pods as gates let it.

use std::time::Duration;

use k8s_openapi::jiff::SignedDuration;
use serde_json::json;

use super::world::World;
use crate::canary::Phase;
use crate::canary::template::Template;
use crate::objects::canary::Course;

/// A Deployment of four pods that makes one more at first.
const REPLICAS: usize = 4;

/// A mesh with a Deployment, at its first template.
fn deployed() -> World {
    let mut world =
        World::of(json!({"stable": null, "candidate": null, "deployment": "resnet", "promotion": "0s"}));
    world.templates = vec![template(&world, "a", REPLICAS)];
    world.stable_ready = REPLICAS;
    world.look();
    world
}

fn name(hash: &str) -> String {
    format!("resnet-{hash}.template")
}

fn template(world: &World, hash: &str, pods: usize) -> Template {
    Template { name: name(hash), pods, since: Some(world.now) }
}

/// Another template is written into it: one pod of it is made, and waits.
fn change(world: &mut World, hash: &str) {
    world.now += SignedDuration::from_secs(60);
    let made = template(world, hash, 1);
    world.templates.push(made);
}

/// Of the first template there is one pod less, and of the last one more.
fn replace(world: &mut World) {
    if let [old, .., new] = &mut world.templates[..] {
        (old.pods, new.pods) = (old.pods.saturating_sub(1), (new.pods + 1).min(REPLICAS));
    }
    world.stable_ready = world.templates[0].pods;
    world.templates.retain(|one| one.pods > 0);
}

/// Looks until it is promoted, and until Kubernetes has gone on to the end.
fn promoted(world: &mut World) {
    world.until(Phase::Promoting, 60);
    while world.templates.len() > 1 {
        world.run(5);
        assert_eq!(world.diary.phase, Phase::Promoting, "{:?}", world.diary.message);
        replace(world);
    }
    world.until(Phase::Succeeded, 5);
    world.stable_ready = REPLICAS;
}

fn course(world: &World) -> Course {
    world.diary.course.clone().unwrap()
}

/// `stable candidate weight`, and `open`.
fn shown(world: &World) -> String {
    let Course { stable, candidate, weight, open, .. } = course(world);
    let short = |name: String| name.replace("resnet-", "").replace(".template", "");
    format!("{} {} {weight}{}", short(stable), short(candidate), if open > 0 { " open" } else { "" })
}

#[test]
fn it_waits_for_a_change_and_each_change_is_a_run() {
    let mut world = deployed();
    world.run(100);
    assert_eq!((world.diary.phase, shown(&world).as_str()), (Phase::Waiting, "a a 0"));
    assert_eq!(world.diary.message, "waits for a change of the Deployment resnet");
    assert_eq!(world.told(), ["Waiting 0 0"]);

    change(&mut world, "b");
    world.until(Phase::Progressing, 1);
    assert_eq!(shown(&world), "a b 10", "its gate is closed");
    world.until(Phase::Promoting, 60);
    assert_eq!((shown(&world).as_str(), course(&world).open), ("a b 100 open", 4));
    promoted(&mut world);
    assert_eq!(shown(&world), "b b 100");
    assert_eq!(world.diary.message, "all requests go to team-a/resnet-b.template");
    let ended = world.diary.clone();
    world.run(100);
    assert_eq!((world.diary.phase, &world.diary.history), (Phase::Succeeded, &ended.history));

    // Back to the first is a change like any other.
    change(&mut world, "a");
    world.until(Phase::Progressing, 1);
    assert_eq!(shown(&world), "b a 10");
    promoted(&mut world);
    assert_eq!(shown(&world), "a a 100");
}

#[test]
fn a_promotion_is_over_when_no_pod_of_the_old_template_is_left_and_not_late_while_they_go() {
    let mut world = deployed();
    world.spec.deadline = Some("20s".into());
    change(&mut world, "b");
    world.until(Phase::Promoting, 60);
    for left in (1..=REPLICAS).rev() {
        world.run(15);
        assert_eq!((world.diary.phase, world.diary.left), (Phase::Promoting, Some(left)));
        assert_eq!(world.diary.message, "promotion: waits for no pod of team-a/resnet-a.template to be left");
        replace(&mut world);
    }
    world.until(Phase::Succeeded, 5);

    let mut world = deployed();
    world.spec.deadline = Some("20s".into());
    change(&mut world, "b");
    world.until(Phase::Promoting, 60);
    world.run(15);
    replace(&mut world);
    let took = world.until(Phase::RollingBack, 30);
    assert_eq!(took.as_secs(), 20);
    let why = &world.diary.message;
    assert!(why.contains("has not passed within 20s") && why.contains("to be left (3 are)"), "{why}");
}

#[test]
fn what_fails_goes_back_is_held_and_the_next_change_begins() {
    let mut world = deployed();
    change(&mut world, "b");
    world.until(Phase::Progressing, 1);
    world.failing = 0.5;
    let took = world.until(Phase::RolledBack, 10);
    assert!(took <= Duration::from_secs(5), "{took:?}");
    let why = world.diary.message.clone();
    assert!(why.starts_with("success rate of team-a/resnet-b.template: "), "{why}");
    assert!(why.ends_with("`kubectl rollout undo deployment/resnet`, or mend it"), "{why}");
    world.failing = 0.0;
    world.run(100);
    assert_eq!(
        (world.diary.phase, shown(&world).as_str(), &world.diary.message),
        (Phase::RolledBack, "a b 0", &why)
    );

    // A mended one.
    change(&mut world, "c");
    world.templates.remove(1);
    world.until(Phase::Progressing, 1);
    assert_eq!(shown(&world), "a c 10");
}

#[test]
fn what_fails_while_it_is_promoted_is_closed_again() {
    let mut world = deployed();
    change(&mut world, "b");
    world.until(Phase::Promoting, 60);
    replace(&mut world);
    world.run(5);
    world.failing = 0.5;
    let took = world.until(Phase::RolledBack, 10);
    assert!(took <= Duration::from_secs(5), "{took:?}");
    assert_eq!((shown(&world).as_str(), world.diary.left), ("a b 0", None));
}

#[test]
fn nobody_goes_back_to_so_few_pods_that_they_could_not_serve() {
    let mut world = deployed();
    change(&mut world, "b");
    world.until(Phase::Promoting, 60);
    for _ in 0..REPLICAS - 1 {
        replace(&mut world);
    }
    world.run(5);
    (world.failing, world.stable_ready) = (0.5, 1);
    world.run(30);
    assert_eq!((world.diary.phase, shown(&world).as_str()), (Phase::Promoting, "a b 100 open"));
    let why = &world.diary.message;
    assert!(why.ends_with("; it stays until half of the 4 pods of team-a/resnet-a.template are back, as by `kubectl rollout undo deployment/resnet`"), "{why}");
    // It is undone.
    world.stable_ready = 2;
    world.until(Phase::RolledBack, 5);
    assert_eq!(shown(&world), "a b 0");
}

#[test]
fn what_is_the_only_one_there_serves_whatever_became_of_it() {
    for failing in [0.0, 0.5] {
        let mut world = deployed();
        change(&mut world, "b");
        world.until(Phase::Progressing, 1);
        world.failing = failing;
        if failing > 0.0 {
            world.until(Phase::RolledBack, 10);
        }
        world.failing = 0.0;
        // Scaled to nothing, and up again: Kubernetes makes the newest template alone.
        (world.templates[0].pods, world.templates[1].pods, world.stable_ready, world.ready) = (0, 0, 0, 0);
        world.run(5);
        (world.templates[1].pods, world.ready) = (4, 4);
        world.run(12);
        assert_eq!(
            (world.diary.phase, shown(&world).as_str()),
            (Phase::Waiting, "b b 0"),
            "{:#?}",
            world.diary
        );
    }
}

#[test]
fn a_pod_that_is_evicted_is_no_deployment_that_went_back() {
    let mut world = deployed();
    change(&mut world, "b");
    world.until(Phase::Progressing, 1);
    (world.templates[1].pods, world.ready) = (0, 0);
    world.run(5);
    assert_eq!((world.diary.phase, shown(&world).as_str()), (Phase::Progressing, "a b 10"));
    (world.templates[1].pods, world.ready) = (1, 1);
    world.until(Phase::Promoting, 60);
}

#[test]
fn what_went_back_and_is_gone_is_another_run_when_it_is_made_again() {
    let mut world = deployed();
    change(&mut world, "b");
    world.until(Phase::Progressing, 1);
    world.failing = 0.5;
    world.until(Phase::RolledBack, 10);
    // It is undone, and its pods take their time to end.
    (world.templates[1].pods, world.ready, world.failing) = (0, 0, 0.0);
    world.run(15);
    assert_eq!((world.diary.phase, shown(&world).as_str()), (Phase::RolledBack, "a a 0"));
    let entries = world.diary.history.len();
    world.run(60);
    assert_eq!((shown(&world).as_str(), world.diary.history.len()), ("a a 0", entries));
    // The same once more, while some of the first are still there.
    world.now += SignedDuration::from_secs(60);
    (world.templates[1], world.ready) = (template(&world, "b", 1), 1);
    world.until(Phase::Progressing, 3);
    assert_eq!(shown(&world), "a b 10");
}

#[test]
fn another_deployment_is_another_run_and_requests_stay_until_it_has_pods() {
    let mut world = World::of(json!({}));
    world.until(Phase::Succeeded, 60);
    let course = world.diary.course.clone();
    let deployed = deployed();
    world.spec = deployed.spec.clone();
    (world.templates, world.stable_ready, world.ready) = (Vec::new(), 0, 0);
    world.run(5);
    assert_eq!((world.diary.phase, &world.diary.course), (Phase::Waiting, &course));
    (world.templates, world.stable_ready, world.ready) = (deployed.templates.clone(), 4, 4);
    world.run(5);
    assert_eq!((world.diary.phase, shown(&world).as_str()), (Phase::Waiting, "a a 0"));
}

#[test]
fn a_deployment_that_goes_back_takes_its_run_with_it_and_the_same_change_begins_anew() {
    let mut world = deployed();
    change(&mut world, "b");
    world.until(Phase::Progressing, 1);
    world.run(3);
    (world.templates[1].pods, world.ready) = (0, 0);
    world.until(Phase::RollingBack, 15);
    assert_eq!(shown(&world), "a b 0");
    assert_eq!(world.diary.message, "the Deployment went back: no pod of team-a/resnet-b.template is left");
    world.until(Phase::RolledBack, 5);
    world.templates.pop();
    world.run(5);
    assert_eq!((world.diary.phase, shown(&world).as_str()), (Phase::RolledBack, "a a 0"));
    change(&mut world, "b");
    world.ready = 1;
    world.until(Phase::Progressing, 1);
    assert_eq!(shown(&world), "a b 10");
    promoted(&mut world);
}

#[test]
fn a_change_that_overtakes_a_promotion_is_held_against_what_was_promoted() {
    let mut world = deployed();
    change(&mut world, "b");
    world.until(Phase::Promoting, 60);
    replace(&mut world);
    replace(&mut world);
    change(&mut world, "c");
    world.until(Phase::Progressing, 1);
    assert_eq!(shown(&world), "b c 10");
    // The Deployment goes back to b, and takes the last of a away.
    world.templates.pop();
    world.ready = 0;
    world.until(Phase::RolledBack, 15);
    world.run(15);
    assert_eq!(shown(&world), "b b 0");
}

#[test]
fn a_deployment_without_pods_is_waited_for_and_one_that_was_scaled_to_nothing_serves_again() {
    let mut world = deployed();
    world.diary = crate::canary::Diary::default();
    (world.templates, world.stable_ready, world.ready) = (Vec::new(), 0, 0);
    world.run(3);
    assert_eq!(world.diary.message, "waits for a pod of the Deployment resnet");
    assert_eq!((world.diary.phase, &world.diary.course), (Phase::Waiting, &None));
    (world.templates, world.stable_ready, world.ready) = (vec![template(&world, "a", 1)], 1, 1);
    world.run(3);
    assert_eq!(shown(&world), "a a 0");
    // It comes back with another template, and nothing that this could be held against.
    world.now += SignedDuration::from_secs(60);
    (world.templates, world.stable_ready) = (vec![template(&world, "b", 2)], 0);
    world.run(11);
    world.stable_ready = 2;
    world.run(1);
    assert_eq!((world.diary.phase, shown(&world).as_str()), (Phase::Waiting, "b b 0"));
}

#[test]
fn a_template_that_mends_what_is_not_ready_is_not_held_for_it() {
    let mut world = deployed();
    world.stable_ready = 0;
    change(&mut world, "b");
    world.run(9);
    assert_eq!((world.diary.phase, shown(&world).as_str()), (Phase::Waiting, "a a 0"));
    assert_eq!(world.diary.message, "waits for a ready endpoint of team-a/resnet-a.template");
    // One that comes back in time is what it is held against.
    world.stable_ready = 1;
    world.until(Phase::Progressing, 1);

    let mut world = deployed();
    world.stable_ready = 0;
    change(&mut world, "b");
    world.run(59);
    assert_eq!(shown(&world), "a a 0", "a moment is none");
    world.run(3);
    assert_eq!((world.diary.phase, shown(&world).as_str()), (Phase::Waiting, "b b 0"));
    let told = &world.diary.history.last().unwrap().message;
    assert_eq!(told, "no endpoint of resnet-a.template was ready for 1m: resnet-b.template serves");
    world.stable_ready = 1;
    world.run(20);
    assert_eq!(world.diary.message, "waits for a change of the Deployment resnet");
}

#[test]
fn nobody_aborts_what_does_not_go_on() {
    let mut world = deployed();
    world.abort = world.command("1");
    world.run(3);
    assert_eq!((world.diary.phase, &world.diary.answered.abort), (Phase::Waiting, &world.abort));
    change(&mut world, "b");
    world.until(Phase::Progressing, 1);
    world.abort = world.command("2");
    world.until(Phase::RolledBack, 5);
    assert!(world.diary.message.starts_with("aborted by a person; the Deployment still asks for it"));
}
