//! The clients that people have notice nothing of it: `tritonclient` over HTTP, one by one and many at a time, over gRPC and
//! through its own shared memory, `kserve`, and plain curl, all at once through both sidecars of a real Triton, while many
//! others share its executions.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::time::Duration;

use penstock_api::names::annotation;
use penstock_tests::testkit::ask::Client;
use penstock_tests::testkit::cases::{Can, Kind, case};
use penstock_tests::testkit::mesh::{GRPC, Mesh, NAMESPACE};
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::servers::{Model, Triton, clients, file};
use penstock_tests::testkit::{PATIENCE, wait_until};
use rand::SeedableRng as _;
use rand::rngs::SmallRng;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::task::JoinSet;

const CAN: Can = Can { kinds: &[Kind::Rowsum], grpc: true, binary: true, versions: false, any_bytes: true };
/// Those who share executions meanwhile.
const OTHERS: u64 = 16;
/// How often each client asks.
const TIMES: usize = 20;
const ROWS: &str = r#"{"id": "7", "inputs": [
    {"name": "values", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, 6]},
    {"name": "factor", "datatype": "INT64", "shape": [2, 1], "data": [1, -2]}], "outputs": [{"name": "total"}]}"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_users_clients_share_executions_with_many() {
    let mesh = Mesh::default()
        .grpc()
        .pod("client", None)
        .service("model", &[(annotation::BATCH, "max=32"), (annotation::COALESCE, "single-flight")])
        .pod("a", Some("model"));
    let model = Model::new("rowsum").takes(Duration::from_millis(4), Duration::from_micros(50));
    let _triton = Triton::start_at(mesh.application("a").ip(), &[model]).await;
    let mesh = mesh.start().await;
    let through = Client::through(&mesh, "client", "model");
    for seed in 0..10 {
        let mut client = through.another();
        let case = case(&CAN, &mut SmallRng::seed_from_u64(seed));
        wait_until("the model answers through both sidecars", PATIENCE, async || {
            let answer = client.ask(&case.ask).await;
            answer.is_ok_and(|answer| answer.said.is_ok() == case.expected.is_some())
        })
        .await;
    }

    let (stop, stopped) = watch::channel(false);
    let mut others = JoinSet::new();
    for seed in 0..OTHERS {
        let (mut client, stopped) = (through.another(), stopped.clone());
        others.spawn(async move {
            let mut random = SmallRng::seed_from_u64(1000 + seed);
            let mut count = 0;
            while !*stopped.borrow() {
                let case = case(&CAN, &mut random);
                let answer = client.ask(&case.ask).await.unwrap();
                assert_eq!(answer.said.is_ok(), case.expected.is_some(), "{answer:?} to {case:?}");
                count += 1;
            }
            count
        });
    }

    let (outbound, host) = (mesh.outbound("client").to_string(), format!("model.{NAMESPACE}"));
    let grpc_host = format!("{host}:{GRPC}");
    let mut users = JoinSet::new();
    for user in ["triton-http", "triton-http-async", "triton-grpc", "triton-shm", "kserve"] {
        let host = if user == "triton-grpc" { &grpc_host } else { &host };
        let mut command = Command::new(clients());
        command.arg(file("client.py")).args([user, &outbound, "rowsum", host, &TIMES.to_string()]);
        users.spawn(said(user, command));
    }
    let mut curl = Command::new("curl");
    let url = format!("http://{outbound}/v2/models/rowsum/infer?nth=[1-{TIMES}]");
    curl.args([
        "--silent",
        "--show-error",
        "--fail-with-body",
        "--header",
        &format!("host: {host}"),
        "--data",
        ROWS,
        &url,
    ]);
    users.spawn(said("curl", curl));
    while let Some(one) = users.join_next().await {
        let (user, said) = one.unwrap();
        if user == "curl" {
            let answers = serde_json::Deserializer::from_str(&said).into_iter::<serde_json::Value>();
            let answers: Vec<_> = answers.map(Result::unwrap).collect();
            assert_eq!(answers.len(), TIMES, "{said}");
            for answer in answers {
                let outputs = &answer["outputs"];
                assert_eq!((&answer["id"], outputs.as_array().unwrap().len()), (&"7".into(), 1), "{answer}");
                assert_eq!(outputs[0]["data"], serde_json::json!([6, -30]), "{answer}");
            }
        } else {
            assert_eq!(said.trim(), "[6, -30]", "{user}");
        }
    }
    stop.send_replace(true);
    let mut count = 0;
    while let Some(one) = others.join_next().await {
        count += one.unwrap();
    }
    counts_are_told().await;
    let counted = async |name| metric(mesh.admin("a"), name, &[]).await;
    let (members, batches) =
        (counted("penstock_batch_members_total").await, counted("penstock_batches_total").await);
    println!("{count} requests of others; {members} in {batches} batches");
    assert!(members / batches > 1.3, "{members} requests in {batches} batches");
}

/// Runs it to its end, and returns what it printed.
async fn said(user: &'static str, mut command: Command) -> (&'static str, String) {
    let output = command.kill_on_drop(true).output();
    let output = tokio::time::timeout(2 * PATIENCE, output).await.unwrap().unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{user}: {said} {complained}");
    (user, said.into_owned())
}
