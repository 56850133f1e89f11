//! Sharing changes no answer: ten thousand random requests of many clients at once to each real server, through both
//! sidecars with batching and single flight on, and every answer is the same bits that the request gets alone.
//!
//! What the models compute is exact, so the test knows every answer by itself; and of more than a thousand requests, all
//! that the server refuses among them, it asks the server directly as well and compares everything that a client can see:
//! tensors, datatypes, shapes, names, order, parameters, model, version, id, which outputs came as bytes, and the words of a
//! refusal.
//!
//! The seed is printed; `PENSTOCK_SEED` sets it. What is executed together depends on the moment all the same.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_tests::testkit::ask::{Answer, Client};
use penstock_tests::testkit::cases::{Can, Case, Kind, case};
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::process::{Process, program};
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::servers::{MlServer, Model, TorchServe, Triton};
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, wait_until};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinSet;
use tokio::time::Instant;

const CLIENTS: usize = 64;
const REQUESTS: usize = 10_000;
/// The share of requests that the server is asked directly too.
const COMPARED: f64 = 0.13;
/// Failures that are told; the first say most.
const TOLD: usize = 8;
/// What Triton is asked for: what is wide takes most of the time.
const OFTEN: [Kind; 10] = [
    Kind::Kinds,
    Kind::Kinds,
    Kind::Kinds,
    Kind::Kinds,
    Kind::Kinds,
    Kind::Rowsum,
    Kind::Rowsum,
    Kind::Rowsum,
    Kind::Rowsum,
    Kind::Wide,
];
/// MLServer (uvicorn) closes connections without waiting for what is on its way to it, to us as to any client; such a
/// request may not be repeated by a proxy, and is by this test. No other server does.
const CLOSED: usize = 20;
const EXACT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/exact");

fn mesh() -> Mesh {
    Mesh::default()
        .grpc()
        .pod("client", None)
        .service("model", &[(annotation::BATCH, "max=32"), (annotation::COALESCE, "single-flight")])
        .pod("a", Some("model"))
}

/// SIMULATED: what an execution on a GPU takes.
fn takes(model: Model) -> Model {
    model.takes(Duration::from_millis(2), Duration::from_micros(20))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triton_answers_as_it_does_alone() {
    let mesh = mesh();
    let models = [
        takes(Model::new("rowsum")),
        takes(Model::new("wide").width(4096)),
        takes(Model::kinds("kinds").versions(2)),
    ];
    let triton = Triton::start_at(mesh.application("a").ip(), &models).await;
    let kinds = &OFTEN;
    let can = Can { kinds, grpc: true, binary: true, versions: true, any_bytes: true };
    let bed = Bed { mesh: mesh.start().await, direct: Client::of(triton.http, Some(triton.grpc)) };
    bed.every_answer_is_the_same(can).await;
    // Of the wide ones, some went through shared memory, and nothing is left there.
    assert!(bed.counted("penstock_executions_placed_total").await > 0.0);
    assert_eq!(bed.counted("penstock_arena_bytes").await, 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mlserver_answers_as_it_does_alone() {
    let mesh = mesh();
    let models = [takes(Model::new("rowsum")), takes(Model::kinds("kinds").versions(2))];
    let server = MlServer::start_at(mesh.application("a").ip(), &models).await;
    let kinds = &[Kind::Kinds, Kind::Rowsum];
    // Its codec for BYTES is one for text.
    let can = Can { kinds, grpc: true, binary: false, versions: true, any_bytes: false };
    let bed = Bed { mesh: mesh.start().await, direct: Client::of(server.http, Some(server.grpc)) };
    bed.every_answer_is_the_same(can).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn torchserve_answers_as_it_does_alone() {
    let mesh = mesh();
    let server = TorchServe::start_at(mesh.application("a").ip(), &[takes(Model::new("rowsum"))]).await;
    // Of the protocol it has this one call, in JSON, and no versions.
    let can = Can { kinds: &[Kind::Rowsum], grpc: false, binary: false, versions: false, any_bytes: false };
    let bed = Bed { mesh: mesh.start().await, direct: Client::of(server.http, None) };
    bed.every_answer_is_the_same(can).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_server_answers_as_it_does_alone() {
    let mesh = mesh();
    let (http, grpc) = (mesh.application("a"), mesh.application_grpc("a"));
    let folder = tempfile::tempdir().unwrap();
    let (listen, listen_grpc) = (http.to_string(), grpc.to_string());
    let program = program("penstock-modelserver");
    let args = ["--repository", EXACT, "--listen", &listen, "--grpc", &listen_grpc, "--queue", "1000"];
    let args = [&args[..], &["--delay-model", "fixed=2ms,row=20us"]].concat();
    let _server = Process::start("modelserver", &program, &args, folder.path());
    wait_until("the model server answers", PATIENCE, async || {
        get(http, "/v2/health/ready").await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    let can = Can { kinds: &[Kind::Exact], grpc: true, binary: true, versions: true, any_bytes: false };
    let bed = Bed { mesh: mesh.start().await, direct: Client::of(http, Some(grpc)) };
    bed.every_answer_is_the_same(can).await;
}

/// A client and a server with their sidecars.
struct Bed {
    mesh: Mesh,
    /// A client of the server itself.
    direct: Client,
}

/// What a client saw.
#[derive(Default)]
struct Seen {
    /// Requests under which the server closed the connection.
    closed: usize,
    compared: usize,
    refused: usize,
    largest: u64,
    failures: Vec<String>,
}

impl Bed {
    async fn counted(&self, name: &str) -> f64 {
        metric(self.mesh.admin("a"), name, &[]).await
    }

    async fn every_answer_is_the_same(&self, can: Can) {
        let seed =
            std::env::var("PENSTOCK_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
        println!("PENSTOCK_SEED={seed}");
        let through = Client::through(&self.mesh, "client", "model");
        self.warm(&can, &through, seed).await;
        counts_are_told().await;
        let names = ["penstock_executions_total", "penstock_batches_total", "penstock_batch_members_total"];
        let mut before = [0.0; 3];
        for (at, name) in names.iter().enumerate() {
            before[at] = self.counted(name).await;
        }
        let (begun, left) = (Instant::now(), Arc::new(AtomicUsize::new(REQUESTS)));
        let mut clients = JoinSet::new();
        for number in 0..CLIENTS as u64 {
            let (through, direct) = (through.another(), self.direct.another());
            clients.spawn(client(can, through, direct, seed ^ (number << 32), Arc::clone(&left)));
        }
        let mut seen = Seen::default();
        while let Some(one) = clients.join_next().await {
            let one = one.unwrap();
            seen.closed += one.closed;
            seen.compared += one.compared;
            seen.refused += one.refused;
            seen.largest = seen.largest.max(one.largest);
            seen.failures.extend(one.failures);
        }
        let took = begun.elapsed();
        counts_are_told().await;
        let mut more = [0.0; 3];
        for (at, name) in names.iter().enumerate() {
            more[at] = self.counted(name).await - before[at];
        }
        let [executions, batches, members] = more;
        println!(
            "{REQUESTS} requests in {took:.1?}: {executions} executions, {members} in {batches} batches, at most {} rows; \
             {} compared with the server itself, {} of them refused",
            seen.largest, seen.compared, seen.refused
        );
        let count = seen.failures.len();
        seen.failures.truncate(TOLD);
        assert_eq!(count, 0, "PENSTOCK_SEED={seed}: {:#?}", seen.failures);
        assert!(seen.closed <= CLOSED, "the server closed {} connections under a request", seen.closed);
        assert!(seen.compared >= 1000, "only {} were compared", seen.compared);
        // It was shared indeed.
        assert!(executions < REQUESTS as f64 * 0.8, "{executions} executions");
        assert!(members / batches > 1.3, "{members} requests in {batches} batches");
        assert!(seen.largest > 8, "the largest execution had {} rows", seen.largest);
    }

    /// Each model is asked until the mesh is there and the sidecar has learned what it takes.
    async fn warm(&self, can: &Can, through: &Client, seed: u64) {
        let mut random = SmallRng::seed_from_u64(seed);
        let mut client = through.another();
        for _ in 0..50 {
            let case = case(can, &mut random);
            if case.expected.is_some() {
                wait_until("the model answers through both sidecars", PATIENCE, async || {
                    let answer = client.ask(&case.ask).await;
                    let refused = answer.as_ref().ok().and_then(|answer| answer.said.as_ref().err());
                    refused.into_iter().for_each(|refusal| println!("{refusal:?} to {}", told(&case)));
                    answer.is_ok_and(|answer| answer.said.is_ok())
                })
                .await;
            }
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Asks until all have been asked.
async fn client(
    can: Can,
    mut through: Client,
    mut direct: Client,
    seed: u64,
    left: Arc<AtomicUsize>,
) -> Seen {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut seen = Seen::default();
    while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
        let case = case(&can, &mut random);
        let compares = case.expected.is_none() || random.random_bool(COMPARED);
        let mut answer = through.ask(&case.ask).await;
        // Some servers close what they kept open just when it is asked again, and more than once in a row.
        for _ in 0..3 {
            let reset = |answer: &Answer| {
                answer.shown.get("penstock-error").is_some_and(|why| why == "upstream-reset")
            };
            if !answer.as_ref().is_ok_and(reset) {
                break;
            }
            seen.closed += 1;
            answer = through.ask(&case.ask).await;
        }
        let answer = match answer {
            Ok(answer) => answer,
            Err(error) => {
                seen.failures.push(format!("{error}: {}", told(&case)));
                continue;
            }
        };
        if let Err(wrong) = is_as_computed(&case, &answer) {
            seen.failures.push(wrong);
            continue;
        }
        seen.largest = seen.largest.max(answer.rows().unwrap_or(0));
        if compares {
            seen.compared += 1;
            seen.refused += usize::from(case.expected.is_none());
            let alone = direct.ask(&case.ask).await.unwrap();
            if let Err(wrong) = is_as_alone(&case, &answer, &alone) {
                seen.failures.push(wrong);
            }
        }
    }
    seen
}

/// Whether an answer is what the test computed.
fn is_as_computed(case: &Case, answer: &Answer) -> Result<(), String> {
    let shown = answer.shown.contains_key("penstock-batch");
    if case.alone && shown {
        return Err(format!("wanted to be alone: {:?}: {}", answer.shown, told(case)));
    }
    let (expected, given) = match (&case.expected, &answer.said) {
        (Some(expected), Ok(given)) => (expected, given),
        (None, Err(_)) => return Ok(()),
        (Some(_), Err(refusal)) => {
            return Err(format!("refused, {refusal:?} {:?}: {}", answer.shown, told(case)));
        }
        (None, Ok(given)) => return Err(format!("not refused, {given:?}: {}", told(case))),
    };
    let mut outputs = given.outputs.clone();
    for output in &mut outputs {
        // What is said besides is compared with the server's own.
        output.parameters.clear();
    }
    outputs.sort_by(|a, b| a.name.cmp(&b.name));
    if outputs != *expected {
        return Err(format!("{outputs:?}\nis not {expected:?}\nof {}", told(case)));
    }
    if case.ask.request.id.is_some() && given.id != case.ask.request.id {
        return Err(format!("the id is {:?}: {}", given.id, told(case)));
    }
    Ok(())
}

/// Whether an answer is what the server itself says.
fn is_as_alone(case: &Case, answer: &Answer, alone: &Answer) -> Result<(), String> {
    let (mut shared, mut direct) = (answer.said.clone(), alone.said.clone());
    for said in [&mut shared, &mut direct] {
        if let Ok(said) = said
            && case.ask.request.id.is_none()
        {
            // MLServer makes one up, another each time.
            said.id = None;
        }
    }
    if (&shared, &answer.as_bytes) != (&direct, &alone.as_bytes) {
        return Err(format!(
            "{shared:?}, as bytes {:?}, {:?}\nalone it is {direct:?}, as bytes {:?}\nof {}",
            answer.as_bytes,
            answer.shown,
            alone.as_bytes,
            told(case)
        ));
    }
    Ok(())
}

fn told(case: &Case) -> String {
    let mut ask = case.ask.clone();
    for input in &mut ask.request.inputs {
        input.data.truncate(64);
    }
    format!("{ask:?}")
}
