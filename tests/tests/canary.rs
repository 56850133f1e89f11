//! Canaries on one machine: real control, real sidecars, requests at a hundred a second, the command line.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeMap;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use penstock_tests::testkit::load::Load;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::process::program;
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, wait_until};
use serde_json::{Value, json};
use tokio::time::Instant;

const HOST: &str = "shop.test";
/// Of the versions, both with what a server has that answers at once.
const VERSIONS: [&str; 2] = ["shop-v1", "shop-v2"];

/// A mesh of a Service `shop` with two versions, of which the second fails as many of a hundred requests as it is told.
struct Stage {
    mesh: Mesh,
    failing: Arc<AtomicU64>,
    _origins: BTreeMap<String, Origin>,
}

impl Stage {
    async fn set(canary: &str) -> Self {
        let mut mesh = Mesh::default().pod("client", None).service("shop", &[]);
        for version in VERSIONS {
            mesh = mesh.service(version, &[]);
            for letter in ["a", "b"] {
                mesh = mesh.pod(&format!("{version}-{letter}"), Some(version));
            }
        }
        mesh.file("canary.yaml", canary);
        let failing = Arc::new(AtomicU64::new(0));
        let mut origins = BTreeMap::new();
        for version in VERSIONS {
            for letter in ["a", "b"] {
                let name = format!("{version}-{letter}");
                let failing = if version == "shop-v2" { failing.clone() } else { Arc::default() };
                origins.insert(name.clone(), server(&mesh, &name, version, failing).await);
            }
        }
        let mesh = mesh.start().await;
        mesh.reaches("client", "shop").await;
        Self { mesh, failing, _origins: origins }
    }

    /// A hundred requests a second.
    fn load(&self) -> Load {
        Load::start(self.mesh.outbound("client"), HOST, 5, Duration::from_millis(49))
    }

    async fn status(&self) -> Value {
        let page: Value = self.mesh.page("/canaries").await;
        page["items"][0]["status"].clone()
    }

    async fn reaches(&self, what: &str, reached: impl Fn(&Value) -> bool) -> Value {
        let last = std::sync::Mutex::new(Value::Null);
        let seen = async || {
            let status = self.status().await;
            *last.lock().unwrap() = status.clone();
            reached(&status)
        };
        wait_until(&format!("the canary {what}"), PATIENCE * 2, seen).await;
        last.into_inner().unwrap()
    }

    fn command(&self, args: &[&str]) -> Output {
        let api = format!("http://{}", self.mesh.api());
        Command::new(program("penstock")).arg("canary").args(args).args(["--control", &api]).output().unwrap()
    }

    /// Runs a command that must succeed.
    fn orders(&self, verb: &str) {
        let output = self.command(&[verb, "shop"]);
        assert!(output.status.success(), "{verb}: {output:?}");
    }
}

/// Answers with its version, or with a 500 as often as it is told.
async fn server(mesh: &Mesh, name: &str, version: &'static str, failing: Arc<AtomicU64>) -> Origin {
    let asked = Arc::new(AtomicU64::new(0));
    Origin::start_at(mesh.application(name), move |mut client| {
        let (failing, asked) = (failing.clone(), asked.clone());
        async move {
            while client.request().await.is_ok() {
                let turn = asked.fetch_add(1, Ordering::Relaxed) % 100;
                // Spread evenly: 20 of a hundred are each fifth.
                let percent = failing.load(Ordering::Relaxed);
                let fails = (turn + 1) * percent / 100 > turn * percent / 100;
                let line = if fails { "500 Internal Server Error" } else { "200 OK" };
                let answer = format!("HTTP/1.1 {line}\r\ncontent-length: {}\r\n\r\n{version}", version.len());
                if client.send(&answer).await.is_err() {
                    return;
                }
            }
        }
    })
    .await
}

fn canary(steps: &str, rest: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: Canary\nmetadata: {{name: shop, namespace: test}}\nspec:\n  service: shop\n  \
         stable: shop-v1\n  candidate: shop-v2\n  steps: [{steps}]\n{rest}"
    )
}

fn phase(name: &'static str) -> impl Fn(&Value) -> bool {
    move |status| status["phase"] == name
}

fn weights(status: &Value) -> Vec<u64> {
    let mut weights: Vec<u64> =
        status["history"].as_array().unwrap().iter().map(|entry| entry["weight"].as_u64().unwrap()).collect();
    weights.dedup();
    weights
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_that_is_well_takes_over_step_by_step_though_control_is_killed_at_each() {
    let steps = "{weight: 20, hold: 1s}, {weight: 60, hold: 1s}";
    let mut stage = Stage::set(&canary(steps, "  promotion: 1s\n  analysis: {minRequests: 20}\n")).await;
    let load = stage.load();
    for weight in [20, 60] {
        stage.reaches(&format!("is at {weight} %"), |status| status["course"]["weight"] == weight).await;
        stage.mesh.kill_control();
        load.more(20).await;
        stage.mesh.start_control().await;
    }
    let status = stage.reaches("has succeeded", phase("Succeeded")).await;
    assert_eq!(weights(&status), [20, 60, 100], "{status:#}");
    let before = load.so_far();
    load.more(50).await;
    let after = load.so_far();
    assert!(after.share_since(&before, "shop-v2") > 0.999, "{:?}", after.by);
    load.finish().await.has_no_failure();
    let listed = stage.command(&["list"]);
    let text = String::from_utf8(listed.stdout).unwrap();
    assert!(text.contains("test/shop") && text.contains("Succeeded"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_candidate_that_fails_a_fifth_of_its_requests_is_sent_none_within_three_seconds() {
    let stage = Stage::set(&canary("{weight: 50, hold: 1m}", "")).await;
    let load = stage.load();
    stage
        .reaches("was seen for a while", |status| status["candidate"]["requests"].as_u64() > Some(150))
        .await;
    let watching = {
        let api = format!("http://{}", stage.mesh.api());
        std::thread::spawn(move || {
            Command::new(program("penstock"))
                .args(["canary", "watch", "shop", "--control", &api])
                .output()
                .unwrap()
        })
    };
    stage.failing.store(20, Ordering::Relaxed);
    let began = Instant::now();
    let status = stage.reaches("is back", phase("RolledBack")).await;
    let took = began.elapsed();
    println!("from the first failure to a weight of 0 on every proxy: {took:?}");
    assert!(took < Duration::from_secs(3), "{took:?}: {status:#}");
    assert_eq!(status["course"]["weight"], 0);
    assert_eq!(status["applied"], status["concerned"], "every proxy has it");
    let message = status["message"].as_str().unwrap();
    assert!(message.contains("success rate of test/shop-v2"), "{message}");
    let before = load.so_far();
    load.more(50).await;
    let after = load.so_far();
    assert_eq!(after.share_since(&before, "shop-v2"), 0.0, "{:?}", after.by);
    let total = load.finish().await;
    println!("{} of {} requests failed", total.failed, total.requests);
    let watched = watching.join().unwrap();
    assert_eq!(watched.status.code(), Some(1), "{watched:?}");
    assert!(String::from_utf8(watched.stdout).unwrap().contains("RolledBack"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_lets_go_holds_and_sends_back() {
    let stage = Stage::set(&canary(
        "{weight: 0, hold: 0s, pause: true}, {weight: 30, hold: 1h}",
        "  match: [{headers: [{name: x-tester, value: \"yes\"}]}]\n",
    ))
    .await;
    stage.reaches("waits for a person", phase("Paused")).await;
    let mut client = stage.mesh.client("client").await;
    let ask = |more: &str| format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n{more}\r\n");
    for _ in 0..20 {
        assert_eq!(client.ask(ask("x-tester: yes\r\n")).await.unwrap().text(), "shop-v2");
        assert_eq!(client.ask(ask("x-tester: no\r\n")).await.unwrap().text(), "shop-v1");
    }
    let load = stage.load();
    stage.orders("promote");
    stage.reaches("is at its second step", |status| status["course"]["weight"] == 30).await;
    stage.orders("pause");
    let shown = stage.command(&["show", "test/shop"]);
    let text = String::from_utf8(shown.stdout).unwrap();
    assert!(text.contains("30 % to shop-v2") && text.contains("STEP"), "{text}");
    stage.orders("resume");
    stage.orders("abort");
    let status = stage.reaches("is back", phase("RolledBack")).await;
    assert_eq!(status["course"]["weight"], 0);
    load.finish().await.has_no_failure();
    let late = stage.command(&["promote", "shop"]);
    assert_eq!(late.status.code(), Some(1));
    let told = String::from_utf8(late.stderr).unwrap();
    assert!(told.contains("is at its end") && told.contains("spec.run"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_outside_are_asked_and_heard() {
    // A Prometheus that says what it is told, and a webhook that has seen enough after a while.
    let (value, asked) = (Arc::new(AtomicU64::new(1)), Arc::new(AtomicU64::new(0)));
    let prometheus = {
        let value = value.clone();
        Origin::start(move |mut client| {
            let value = value.clone();
            async move {
                while client.request().await.is_ok() {
                    let sample =
                        json!([{"metric": {}, "value": [0, value.load(Ordering::Relaxed).to_string()]}]);
                    let body =
                        json!({"status": "success", "data": {"resultType": "vector", "result": sample}})
                            .to_string();
                    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                    if client.send(&answer).await.is_err() {
                        return;
                    }
                }
            }
        })
        .await
    };
    let webhook = {
        let asked = asked.clone();
        Origin::start(move |mut client| {
            let asked = asked.clone();
            async move {
                while let Ok(request) = client.request().await {
                    let told: Value = serde_json::from_slice(&request.body).unwrap();
                    assert_eq!((&told["name"], &told["candidate"]), (&json!("shop"), &json!("test/shop-v2")));
                    asked.fetch_add(1, Ordering::Relaxed);
                    if client.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.is_err() {
                        return;
                    }
                }
            }
        })
        .await
    };
    let rest = format!(
        "  analysis:\n    minRequests: 10\n    prometheus: [{{name: errors, server: \"http://{}\", query: \"sum(x)\", max: 5, interval: 1s, failures: 2}}]\n    \
         webhooks: [{{name: gate, url: \"http://{}/ask\", interval: 1s}}]\n",
        prometheus.address, webhook.address
    );
    let stage = Stage::set(&canary("{weight: 40, hold: 1h}", &rest)).await;
    let load = stage.load();
    wait_until("the webhook was asked", PATIENCE, async || asked.load(Ordering::Relaxed) > 2).await;
    stage.reaches("is at its step", phase("Progressing")).await;
    value.store(6, Ordering::Relaxed);
    let status = stage.reaches("is back", phase("RolledBack")).await;
    assert!(status["message"].as_str().unwrap().contains("errors"), "{status:#}");
    load.finish().await.has_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_canary_that_makes_no_sense_is_told_and_moves_nothing() {
    let stage = Stage::set(&canary("{weight: 120}", "")).await;
    let status = stage.reaches("is refused", phase("Invalid")).await;
    assert!(status["message"].as_str().unwrap().contains("steps"), "{status:#}");
    let problems = get(stage.mesh.api(), "/problems").await.unwrap().text();
    assert!(problems.contains("120 is more than all"), "{problems}");
    let load = stage.load();
    load.more(20).await;
    assert_eq!(load.so_far().by.get("shop-v2"), None);
    load.finish().await.has_no_failure();
}
