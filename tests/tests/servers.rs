//! The real model servers start, tell what they serve, and compute what `rowsum` promises, in JSON over plain HTTP, and
//! to the clients that their users have.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::process::Command;

use penstock_tests::testkit::servers::{
    MlServer, Model, POISON, TorchServe, Triton, clients, file, models, post,
};
use penstock_tests::testkit::wire::{Message, get};
use penstock_tests::testkit::{PATIENCE, wait_until};
use serde_json::{Value, json};

fn read(answer: &Message) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_else(|error| panic!("{error}: {}", answer.text()))
}

/// Two rows of three values.
fn rows(last: f32) -> Value {
    json!({"id": "7", "inputs": [
        {"name": "values", "datatype": "FP32", "shape": [2, 3], "data": [1, 2, 3, 4, 5, last]},
        {"name": "factor", "datatype": "INT64", "shape": [2, 1], "data": [1, -2]},
        {"name": "label", "datatype": "BYTES", "shape": [2, 1], "data": ["a", "b"]},
    ]})
}

/// What an output of an answer holds.
fn output<'a>(answer: &'a Value, name: &str) -> &'a Value {
    let found = answer["outputs"].as_array().unwrap().iter().find(|output| output["name"] == name);
    &found.unwrap_or_else(|| panic!("no {name} in {answer}"))["data"]
}

fn is_right(answer: &Value) {
    assert_eq!(answer["id"], "7");
    assert_eq!(output(answer, "total"), &json!([6, -30]));
    assert_eq!(output(answer, "scaled"), &json!([2.0, 4.0, 6.0, 8.0, 10.0, 12.0]));
    assert_eq!(output(answer, "note"), &json!(["a:6", "b:-30"]));
}

#[tokio::test]
async fn triton_serves_the_model_in_all_its_forms() {
    let mut all = models();
    all.push(Model::new("rowsum-single").max_batch(0));
    let triton = Triton::start(&all).await;
    let server = read(&get(triton.http, "/v2").await.unwrap());
    assert!(server["extensions"].as_array().unwrap().contains(&json!("system_shared_memory")), "{server}");
    let metadata = read(&get(triton.http, "/v2/models/rowsum").await.unwrap());
    assert_eq!(metadata["inputs"][0]["shape"], json!([-1, -1]));
    let config = read(&get(triton.http, "/v2/models/rowsum-dynamic/config").await.unwrap());
    assert_eq!(config["max_batch_size"], 32);
    assert!(config["dynamic_batching"].is_object(), "{config}");

    for model in ["rowsum", "rowsum-dynamic", "rowsum-poison"] {
        let answer = post(triton.http, &format!("/v2/models/{model}/infer"), &rows(6.0)).await.unwrap();
        is_right(&read(&answer));
        // Triton counts when it has answered.
        let counted = async || triton.executions(model).await == (1, 2);
        wait_until("one execution of two rows is counted", PATIENCE, counted).await;
    }
    let poisoned = post(triton.http, "/v2/models/rowsum-poison/infer", &rows(POISON)).await.unwrap();
    assert_eq!(poisoned.status(), 500);
    assert!(poisoned.text().contains("rows [1] of 2"), "{}", poisoned.text());
    let one = json!({"inputs": [{"name": "values", "datatype": "FP32", "shape": [2], "data": [1, 2]}]});
    let single = post(triton.http, "/v2/models/rowsum-single/infer", &one).await.unwrap();
    assert_eq!(output(&read(&single), "total"), &json!([3]));
}

#[tokio::test]
async fn mlserver_serves_the_model() {
    let server = MlServer::start(&models()).await;
    assert_eq!(read(&get(server.http, "/v2/models/rowsum").await.unwrap())["name"], "rowsum");
    for model in ["rowsum", "rowsum-dynamic"] {
        let answer = post(server.http, &format!("/v2/models/{model}/infer"), &rows(6.0)).await.unwrap();
        is_right(&read(&answer));
    }
    let poisoned = post(server.http, "/v2/models/rowsum-poison/infer", &rows(POISON)).await.unwrap();
    assert_eq!(poisoned.status(), 500);
}

#[tokio::test]
async fn torchserve_serves_the_model() {
    let server = TorchServe::start(&models()).await;
    assert_eq!(server.model("rowsum-dynamic").await["batchSize"], 32);
    assert_eq!(server.model("rowsum").await["batchSize"], 1);
    let row = |last: f32| json!({"values": [4, 5, last], "factor": -2, "label": "b"});
    for model in ["rowsum", "rowsum-dynamic"] {
        let answer = post(server.http, &format!("/predictions/{model}"), &row(6.0)).await.unwrap();
        assert_eq!(read(&answer), json!({"total": -30, "scaled": [8.0, 10.0, 12.0], "note": "b:-30"}));
    }
    let poisoned = post(server.http, "/predictions/rowsum-poison", &row(POISON)).await.unwrap();
    assert_eq!(poisoned.status(), 503);
}

#[tokio::test]
async fn the_users_clients_reach_triton() {
    let triton = Triton::start(&models()).await;
    for client in ["triton-http", "triton-grpc", "triton-shm", "kserve"] {
        let address = if client == "triton-grpc" { triton.grpc } else { triton.http };
        let script = file("client.py");
        let mut command = Command::new(clients());
        let output = command.arg(script).args([client, &address.to_string(), "rowsum"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{client}: {said}");
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "[6, -30]", "{client}: {said}");
    }
}
