//! The manifests that people copy agree with the programs, with what the docs say, and with themselves.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::process::Command;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, PodSpec};
use penstock_api::names::{PROXY_UID, annotation, port};
use penstock_control::compile::{State, TrustAnchors, compile};
use penstock_control::objects::{Body, ObjectSet, decode};
use penstock_tests::testkit::process::program;

const SIDECAR: &str = include_str!("../../manifests/examples/sidecar/pod.yaml");
const GPU: &str = include_str!("../../manifests/examples/gpu/pods.yaml");

fn objects(manifest: &str) -> ObjectSet {
    let set = decode::file(&"pod.yaml".into(), manifest);
    let broken: Vec<_> = set.broken.iter().map(|broken| &broken.message).collect();
    assert!(broken.is_empty(), "{broken:?}");
    set
}

/// The exit status of `penstock-proxy` for a command line, and what it says of it.
fn proxy(args: &[String]) -> (bool, String) {
    let output = Command::new(program("penstock-proxy")).args(args).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn the_native_sidecar_is_started_checked_and_ended_as_the_docs_say() {
    check(SIDECAR);
}

#[test]
fn so_is_the_one_that_shares_a_gpu() {
    let spec = check(GPU);
    // Both see the device, each other's memory, and what they share in /dev/shm.
    assert_eq!(spec.share_process_namespace, Some(true));
    for container in [&spec.init_containers.as_ref().unwrap()[1], &spec.containers[0]] {
        let claims = container.resources.as_ref().unwrap().claims.as_ref().unwrap();
        assert!(claims.iter().any(|claim| claim.name == "gpu"), "{}", container.name);
        let mut mounts = container.volume_mounts.iter().flatten();
        assert!(
            mounts.any(|mount| mount.mount_path == "/dev/shm" && mount.name == "shm"),
            "{}",
            container.name
        );
    }
}

fn check(manifest: &str) -> PodSpec {
    let set = objects(manifest);
    let pod = set
        .objects
        .iter()
        .find_map(|object| match &object.body {
            Body::Pod(pod) => Some(pod),
            _ => None,
        })
        .unwrap();
    let spec = pod.spec.as_ref().unwrap();
    let [init, sidecar] = &spec.init_containers.as_ref().unwrap()[..] else { panic!("two init containers") };
    let line = |container: &str| -> Vec<String> {
        let containers = spec.init_containers.iter().flatten();
        let container = containers.into_iter().find(|found| found.name == container).unwrap();
        let [program, command @ ..] = &container.command.as_ref().unwrap()[..] else { panic!("no command") };
        assert_eq!(program, "penstock-proxy");
        command.iter().chain(container.args.iter().flatten()).cloned().collect()
    };

    // Every option exists and is understood. The help comes last, so that all before it is read.
    let mut init_line = line("penstock-init");
    let mut run_line = line("penstock-proxy");
    for line in [&mut init_line, &mut run_line] {
        let (well, said) = proxy(&[&line[..], &["--help".to_owned()]].concat());
        assert!(well, "{line:?}: {said}");
        let (well, said) =
            proxy(&[&line[..], &["--no-such-option".to_owned(), "--help".to_owned()]].concat());
        assert!(!well && said.contains("no-such-option"), "help hides what is wrong before it");
    }
    init_line.push("--dry-run".to_owned());
    assert!(proxy(&init_line).0, "{init_line:?}");

    // First the rules, by the one who may; then the proxy, as the user whom the rules let pass, and without any right.
    let rights = |container: &Container| {
        let context = container.security_context.clone().unwrap();
        let rights = context.capabilities.unwrap();
        assert_eq!(rights.drop.unwrap(), ["ALL"]);
        (context.run_as_user.unwrap(), rights.add.unwrap_or_default())
    };
    assert_eq!(rights(init), (0, vec!["NET_ADMIN".to_owned()]));
    assert_eq!(rights(sidecar), (i64::from(PROXY_UID), Vec::new()));
    assert_eq!((init.restart_policy.as_deref(), sidecar.restart_policy.as_deref()), (None, Some("Always")));
    assert!(run_line.contains(&"--redirected".to_owned()));

    // Whom the kubelet asks is there, and answers only when certificate and configuration are in force.
    assert!(run_line.contains(&format!("--health=0.0.0.0:{}", port::HEALTH)));
    for probe in [&sidecar.startup_probe, &sidecar.readiness_probe] {
        let get = probe.as_ref().unwrap().http_get.as_ref().unwrap();
        assert_eq!(serde_json::to_value(&get.port).unwrap(), port::HEALTH);
        assert_eq!(get.path.as_deref(), Some("/ready"));
    }
    assert!(
        sidecar.liveness_probe.is_none(),
        "a proxy that drains is not ready, and must not be killed for it"
    );

    // The mesh is told at once; the drain fits into the pod's time.
    let hook = sidecar.lifecycle.as_ref().unwrap().pre_stop.as_ref().unwrap();
    assert_eq!(hook.exec.as_ref().unwrap().command.as_deref().unwrap(), ["penstock-proxy", "drain"]);
    let value = |line: &[String], option: &str| {
        let found = line.iter().find_map(|arg| arg.strip_prefix(option)?.strip_prefix('='));
        found.unwrap_or_else(|| panic!("{option} is not there")).to_owned()
    };
    let drain: Duration = humantime::parse_duration(&value(&run_line, "--drain-timeout")).unwrap();
    let grace = Duration::from_secs(spec.termination_grace_period_seconds.unwrap().try_into().unwrap());
    assert!(grace >= drain + Duration::from_secs(15), "{grace:?} for the application and then {drain:?}");

    // What the rules and the callers are told is the same, and so is the account.
    let annotations = pod.metadata.annotations.as_ref().unwrap();
    assert_eq!(annotations[annotation::INJECT], "enabled");
    assert_eq!(annotations[annotation::SKIP_INBOUND_PORTS], value(&init_line, "--skip-inbound-ports"));
    assert_eq!(spec.service_account_name.as_deref().unwrap(), value(&run_line, "--service-account"));
    assert!(sidecar.env.iter().flatten().any(|env| env.name == "PENSTOCK_NODE"));
    for file in ["--control-ca", "--token"] {
        let file = value(&run_line, file);
        let mounted = sidecar.volume_mounts.iter().flatten();
        let mount = mounted.into_iter().find(|mount| file.starts_with(&mount.mount_path)).unwrap();
        assert!(spec.volumes.iter().flatten().any(|volume| volume.name == mount.name), "{file}");
    }
    spec.clone()
}

#[test]
fn control_finds_nothing_wrong_with_it_but_that_it_does_not_run_yet() {
    let trust = TrustAnchors { trust_domain: "cluster.local".into(), anchors: Vec::new() };
    let (snapshot, _) = compile(&objects(SIDECAR), &State::default(), &trust);
    let told: Vec<_> = snapshot.problems.iter().map(|problem| &problem.message).collect();
    assert!(told.len() == 1 && told[0].contains("it has no status.podIP"), "{told:?}");
}
