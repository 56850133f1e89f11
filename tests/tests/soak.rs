//! The equivalent of an hour, compressed: certificates that live for seconds, a hundred weight steps and fifty endpoint
//! changes under constant load. Takes about four minutes: `cargo test -p penstock-tests --test soak -- --ignored`.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeMap;
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_tests::testkit::load::Load;
use penstock_tests::testkit::mesh::{Listed, Mesh};
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::metric;
use tokio::time::Instant;

const STEPS: u32 = 100;
const STEP: Duration = Duration::from_millis(2_200);
/// How much the client's sidecar may have grown from the first fifth to the end, percent.
const GROWTH: u64 = 15;

#[ignore = "takes four minutes; make soak"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_hour_of_changes_fails_no_request_and_memory_stays_flat() {
    let mut mesh = Mesh::default()
        .leaf_lifetime("4s")
        .pod("client", None)
        .service("shop", &[(annotation::TRAFFIC_SPLIT, "v1=100,v2=0")])
        .service("v1", &[])
        .service("v2", &[]);
    for (pod, service) in [("v1-a", "v1"), ("v1-b", "v1"), ("v2-a", "v2"), ("v2-b", "v2")] {
        mesh = mesh.pod(pod, Some(service));
    }
    let mut origins = BTreeMap::new();
    for (pod, service) in [("v1-a", "v1"), ("v1-b", "v1"), ("v2-a", "v2"), ("v2-b", "v2")] {
        let origin = Origin::named(mesh.application(pod), service, Duration::from_millis(1)).await;
        origins.insert(pod, origin);
    }
    let mut mesh = mesh.start().await;
    mesh.reaches("client", "shop").await;
    let first_serial = mesh.serial("client").await;
    let load = Load::start(mesh.outbound("client"), "shop.test", 8, Duration::from_millis(5));

    let started = Instant::now();
    let mut flat_from = None;
    let mut endpoint_changes = 0;
    for step in 1..=STEPS {
        mesh.split("shop", &format!("v1={},v2={step}", STEPS - step));
        if step.is_multiple_of(2) {
            // One of four replicas leaves, and comes back the next time.
            let pod = ["v1-b", "v2-b"][usize::from(step % 8 >= 4)];
            mesh.list(pod, if step % 4 == 2 { Listed::Not } else { Listed::Ready });
            endpoint_changes += 1;
        }
        if step == STEPS / 2 {
            mesh.control_command("rotate-root", &[]);
        }
        mesh.apply().await;
        tokio::time::sleep_until(started + STEP * step).await;
        if step == STEPS / 5 {
            flat_from = Some((mesh.sidecar("client").memory_kib(), mesh.sidecar("client").files()));
        }
        let so_far = load.so_far();
        assert_eq!(so_far.failed, 0, "at step {step}: {:#?}", so_far.failures);
    }
    let took = started.elapsed();
    let tally = load.finish().await;
    let (before, files_before) = flat_from.unwrap();
    let (after, files_after) = (mesh.sidecar("client").memory_kib(), mesh.sidecar("client").files());
    let renewals = metric(mesh.admin("client"), "penstock_certificate_renewals_total", &["ok"]).await;
    let retries = metric(mesh.admin("client"), "penstock_retries_total", &[]).await;
    println!(
        "soak: {:.0} s, {} requests, {} failed, {retries} retries; {STEPS} weight steps, {endpoint_changes} endpoint \
         changes, {renewals} certificates of the client, one new root; client's sidecar {before} KiB at a fifth, {after} \
         KiB at the end, {files_before} and {files_after} files",
        took.as_secs_f64(),
        tally.requests,
        tally.failed
    );
    tally.has_no_failure();
    assert_ne!(mesh.serial("client").await, first_serial);
    assert!(after * 100 <= before * (100 + GROWTH), "memory grew from {before} to {after} KiB");
    assert!(files_after <= files_before + 10, "open files grew from {files_before} to {files_after}");
}
