//! Photographs from the client's sidecar to the right class: an ONNX model, run by onnxruntime in the real Triton, is asked with
//! JPEGs and answers of which photograph each is a view. And in trouble: Triton is killed and comes back under load, the arena is too
//! small, files are cut, regions do not exist, and some leave; all are accounted for, nobody gets another's answer, and nothing stays.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use penstock_inference::oip::{Datatype, InferRequest, Parameter, RequestedOutput, Tensor, rest};
use penstock_prepare::form::Dtype;
use penstock_prepare::{Declaration, Limits, Pipeline, Preset, Scratch};
use penstock_tests::testkit::mesh::{Mesh, NAMESPACE};
use penstock_tests::testkit::proxy::metric;
use penstock_tests::testkit::servers::{Model, Triton};
use penstock_tests::testkit::wire::{Message, Wire};
use penstock_tests::testkit::{PATIENCE, wait_until};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::watch;

/// A view of a photograph.
struct View {
    name: String,
    jpeg: Vec<u8>,
    /// The photograph that it is of, and the one that onnxruntime said when the view was made, from Pillow's pixels.
    class: u64,
    said: u64,
    /// What the pipeline makes of it.
    tensor: Vec<u8>,
}

/// All that are committed (`tests/models/photos.py`).
fn views() -> Vec<View> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/photos");
    let card = std::fs::read(folder.join("photos.json")).unwrap();
    let card: serde_json::Value = serde_json::from_slice(&card).unwrap();
    let declaration =
        Declaration { preset: Some(Preset::Imagenet), dtype: Some(Dtype::F16), ..Declaration::default() };
    let pipeline = Pipeline::new(&declaration).unwrap();
    let views = card["views"].as_object().unwrap().iter().map(|(name, view)| {
        let jpeg = std::fs::read(folder.join(name)).unwrap();
        let mut tensor = vec![0; pipeline.bytes()];
        pipeline.run(&jpeg, &mut tensor, &mut Scratch::default(), &Limits::default(), &|| false).unwrap();
        let of = |field: &str| view[field].as_u64().unwrap();
        View { name: name.clone(), jpeg, class: of("class"), said: of("said"), tensor }
    });
    views.collect()
}

const POLICY: &str = "  models:\n  - name: photos\n    prepare:\n    \
                      - {input: image, tensor: pixels, pipeline: {preset: imagenet, dtype: f16}}\n";

fn mesh(settings: &str) -> Mesh {
    let mut mesh = Mesh::default().pod("client", None).service("photos", &[]).pod("a", Some("photos"));
    mesh.file(
        "policy.yaml",
        &format!(
            "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: photos, namespace: {NAMESPACE}}}\n\
             spec:\n  targetRef: {{kind: Service, name: photos}}\n  {settings}\n{POLICY}"
        ),
    );
    mesh
}

/// A whole HTTP request to the model.
fn request(headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "POST /v2/models/photos/infer HTTP/1.1\r\nhost: photos.{NAMESPACE}\r\n{headers}content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// One of the Open Inference Protocol, of which the answer is to be binary.
fn oip(input: Tensor) -> Vec<u8> {
    let binary = [("binary_data".to_owned(), Parameter::Bool(true))].into();
    let outputs = vec![RequestedOutput { name: "logits".to_owned(), parameters: binary }];
    let asked = InferRequest { inputs: vec![input], outputs, ..InferRequest::default() };
    let body = rest::encode_request(&asked, true).unwrap();
    let length = body.header_length;
    let headers = length.map(|length| format!("inference-header-content-length: {length}\r\n"));
    request(&headers.unwrap_or_default(), &body.into_bytes())
}

fn image(jpegs: &[&[u8]]) -> Vec<u8> {
    oip(Tensor::bytes("image", vec![jpegs.len() as u64], jpegs.iter().copied()))
}

fn pixels(tensor: &[u8], parameters: &[(&str, Parameter)]) -> Tensor {
    Tensor {
        name: "pixels".to_owned(),
        datatype: Datatype::Fp16,
        shape: vec![1, 3, 224, 224],
        parameters: parameters.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(),
        data: tensor.to_vec().into(),
    }
}

/// The scores, ten for each row.
fn logits(answer: &Message) -> Vec<Vec<f32>> {
    assert_eq!(answer.status(), 200, "{}", answer.text());
    let length = answer.head.get("inference-header-content-length").map(|length| length.parse().unwrap());
    let response = rest::decode_response(&answer.body.clone().into(), length).unwrap();
    let output = response.outputs.iter().find(|output| output.name == "logits").unwrap();
    let all: Vec<f32> = output.as_fp32().unwrap().collect();
    all.chunks(10).map(<[f32]>::to_vec).collect()
}

fn best(scores: &[f32]) -> u64 {
    (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap() as u64
}

/// How far two answers are apart. onnxruntime adds up in another order when there are more rows.
fn apart(one: &[f32], other: &[f32]) -> f32 {
    one.iter().zip(other).map(|(one, other)| (one - other).abs()).fold(0.0, f32::max)
}

/// Nearer than this answers are the same. Scores of different views are fifty times as far apart at least, which the test checks.
const SAME: f32 = 1e-3;

async fn answers(outbound: SocketAddr, question: &[u8]) {
    wait_until("a photograph is answered through both sidecars", PATIENCE, async || {
        let mut wire = Wire::connect(outbound).await;
        wire.ask(question).await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_jpeg_at_the_clients_sidecar_gets_its_class_from_onnx_in_triton() {
    let mesh = mesh("batch: {max: 16}").start().await;
    let triton = Triton::start_at(mesh.application("a").ip(), &[Model::photos("photos")]).await;
    let views = views();
    assert_eq!(views.len(), 40);
    let outbound = mesh.outbound("client");
    wait_until("Triton is reached through both sidecars", PATIENCE, async || {
        let head = format!("GET /v2/health/ready HTTP/1.1\r\nhost: photos.{NAMESPACE}\r\n\r\n");
        Wire::connect(outbound).await.ask(head).await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    // The very first has to be answered too: nobody has asked Triton yet what it takes, and JSON has no form for halves.
    let first = Wire::connect(outbound).await.ask(image(&[&views[0].jpeg])).await.unwrap();
    assert_eq!(best(&logits(&first)[0]), views[0].said);

    let (mut wire, mut direct) = (Wire::connect(outbound).await, Wire::connect(triton.http).await);
    let mut right = 0;
    for view in &views {
        let answer = wire.ask(image(&[&view.jpeg])).await.unwrap();
        let scores = &logits(&answer)[0];
        // What Triton says of the tensor that the same pipeline makes, without any sidecar, and what onnxruntime said of
        // Pillow's tensor.
        let alone = direct.ask(oip(pixels(&view.tensor, &[]))).await.unwrap();
        assert!(apart(scores, &logits(&alone)[0]) < SAME, "{}", view.name);
        assert_eq!(best(scores), view.said, "{}: {scores:?}", view.name);
        right += u64::from(best(scores) == view.class);
        // The photograph as it is, of which the answer is JSON.
        let plain = wire.ask(request("content-type: image/jpeg\r\n", &view.jpeg)).await.unwrap();
        assert!(apart(&logits(&plain)[0], scores) < SAME, "{}", view.name);
    }
    assert!(right >= 36, "{right} of 40 right");
    // All photographs as rows of one request, some of them again.
    let rows: Vec<&[u8]> = views.iter().step_by(3).map(|view| &view.jpeg[..]).collect();
    let answer = wire.ask(image(&rows)).await.unwrap();
    let said: Vec<u64> = logits(&answer).iter().map(|scores| best(scores)).collect();
    assert_eq!(said, views.iter().step_by(3).map(|view| view.said).collect::<Vec<_>>());
}

const CLIENTS: u64 = 12;
/// How long Triton lives each time, and how long there is load at least when it is back for good.
const LIVES: Duration = Duration::from_secs(3);
/// Of a hundred requests.
const CANCELLED: u32 = 5;
const CUT: u32 = 5;
const LOST: u32 = 5;
/// Holds three of these tensors, of which one in the half that is for preparing, and not a batch of all clients.
const ARENA: &str = "--arena=1048576";
/// What the server's sidecar says when it tells Triton of its memory, which a test that fails shows.
const LOGS: &str = "--log-level=warn,penstock_proxy::coalesce=debug";
/// What a client may be told while Triton is gone. Anything else would not say what happened.
const GONE: [&str; 4] = ["connect-failed", "upstream-reset", "upstream-incomplete", "no-endpoint"];

/// What became of requests.
#[derive(Debug, Default)]
struct Tally {
    /// Answered rightly.
    right: u64,
    /// Cut files, refused as such.
    cut: u64,
    /// Regions that Triton does not know, refused by it.
    lost: u64,
    /// Left.
    left: u64,
    /// Failed because Triton was gone, by reason.
    gone: BTreeMap<String, u64>,
}

impl Tally {
    fn add(&mut self, other: Self) {
        self.right += other.right;
        self.cut += other.cut;
        self.lost += other.lost;
        self.left += other.left;
        for (reason, count) in other.gone {
            *self.gone.entry(reason).or_default() += count;
        }
    }

    fn all(&self) -> u64 {
        self.right + self.cut + self.lost + self.left + self.gone.values().sum::<u64>()
    }
}

/// A question that is ready to be sent.
struct Question {
    good: Vec<u8>,
    cut: Vec<u8>,
    scores: Vec<f32>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triton_dies_under_load_and_everybody_is_accounted_for() {
    let seed: u64 =
        std::env::var("PENSTOCK_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("PENSTOCK_SEED={seed}");
    let mesh = mesh("batch: {max: 32}\n  coalesce: {single-flight: true}")
        .option("a", ARENA)
        .option("a", LOGS)
        .start()
        .await;
    let models = [Model::photos("photos").takes(Duration::from_millis(5), Duration::ZERO)];
    let ip = mesh.application("a").ip();
    let mut triton = Triton::start_at(ip, &models).await;
    let (outbound_address, admin) = (mesh.outbound("client"), mesh.admin("a"));
    let mut questions = Vec::new();
    let mut direct = Wire::connect(triton.http).await;
    for view in views() {
        let alone = direct.ask(oip(pixels(&view.tensor, &[]))).await.unwrap();
        let (good, cut) = (image(&[&view.jpeg]), image(&[&view.jpeg[..view.jpeg.len() / 2]]));
        questions.push(Question { good, cut, scores: logits(&alone)[0].clone() });
    }
    for (at, one) in questions.iter().enumerate() {
        let nearest =
            questions[..at].iter().map(|other| apart(&one.scores, &other.scores)).fold(f32::MAX, f32::min);
        assert!(nearest > 50.0 * SAME, "views cannot be told apart: {nearest}");
    }
    let lost = oip(pixels(
        &[],
        &[
            ("shared_memory_region", Parameter::String("nobodys".to_owned())),
            ("shared_memory_byte_size", Parameter::Int(301_056)),
        ],
    ));
    let questions = Arc::new((questions, lost));
    answers(outbound_address, &questions.0[0].good).await;
    mesh.nothing_is_held().await;
    let before = Counted::of(&mesh).await;

    let (asked, (stop, stopped)) = (Arc::new(AtomicU64::new(0)), watch::channel(false));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| {
            tokio::spawn(ask(
                outbound_address,
                questions.clone(),
                asked.clone(),
                stopped.clone(),
                seed ^ (client << 32),
            ))
        })
        .collect();
    // Twice without a word, and once in good order.
    for round in 0..3 {
        tokio::time::sleep(LIVES).await;
        if round < 2 {
            triton.process().kill();
        }
        drop(triton);
        tokio::time::sleep(Duration::from_millis(300)).await;
        triton = Triton::start_at(ip, &models).await;
    }
    // With the first requests it is told the memory anew, and what those before it had been handed is free. Counts are told once a
    // second, so what is counted from then on was handed to this one.
    tokio::time::sleep(LIVES).await;
    let placed = metric(admin, "penstock_executions_placed_total", &[]).await;
    wait_until("shared memory is in use again", PATIENCE, async || {
        metric(admin, "penstock_executions_placed_total", &[]).await > placed
    })
    .await;
    stop.send_replace(true);
    let mut total = Tally::default();
    for client in clients {
        total.add(client.await.unwrap());
    }
    mesh.nothing_is_held().await;
    let after = Counted::of(&mesh).await;
    let refused = metric(admin, "penstock_arena_refused_total", &[]).await;
    println!("PENSTOCK_SEED={seed}: {total:?}; {refused} batches found the arena full; {before:?} {after:?}");

    let asked = asked.load(Relaxed);
    assert_eq!(total.all(), asked);
    assert!(total.right > asked / 4, "{total:?}");
    assert!(total.cut > 0 && total.lost > 0 && total.left > 0, "{total:?}");
    assert!(!total.gone.is_empty(), "nobody noticed that Triton was gone");
    for reason in total.gone.keys() {
        assert!(GONE.contains(&reason.as_str()), "{reason} is no reason: {total:?}");
    }
    assert!(refused > 0.0, "the arena was never full");
    // The client's sidecar has seen all who stayed, and of those who left the ones whose head had come. The model's has not seen who
    // could not be sent on.
    let stayed = asked - total.left;
    let outbound = after.outbound - before.outbound;
    assert!((stayed..=asked).contains(&outbound), "{outbound} of {asked}, of whom {} left", total.left);
    let (inbound, again) = (after.inbound - before.inbound, after.retries - before.retries);
    let answered = total.right + total.cut + total.lost;
    assert!((answered..=outbound + again).contains(&inbound), "{inbound} of {outbound}, {again} again");
    drop(triton);
}

/// A client: asks again as soon as it is answered, until it is told to stop.
async fn ask(
    outbound: SocketAddr,
    questions: Arc<(Vec<Question>, Vec<u8>)>,
    asked: Arc<AtomicU64>,
    stopped: watch::Receiver<bool>,
    seed: u64,
) -> Tally {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut wire = Wire::connect(outbound).await;
    let mut tally = Tally::default();
    while !*stopped.borrow() {
        asked.fetch_add(1, Relaxed);
        let question = &questions.0[random.random_range(0..questions.0.len())];
        let dice = random.random_range(0..100);
        if dice < CANCELLED {
            let length = question.good.len();
            let part = if dice % 2 == 0 { length } else { random.random_range(1..length) };
            wire.send(&question.good[..part]).await.unwrap();
            tokio::time::sleep(Duration::from_micros(random.random_range(0..100_000))).await;
            wire = Wire::connect(outbound).await;
            tally.left += 1;
            continue;
        }
        let (is_cut, is_lost) = (dice < CANCELLED + CUT, dice >= 100 - LOST);
        let bytes = match (is_cut, is_lost) {
            (true, _) => &question.cut,
            (_, true) => &questions.1,
            _ => &question.good,
        };
        let answer = wire.ask(bytes).await.unwrap();
        let reason = answer.reason().map(str::to_owned);
        match (answer.status(), reason) {
            (200, None) if !is_cut && !is_lost => {
                let off = apart(&logits(&answer)[0], &question.scores);
                assert!(off < SAME, "somebody else's answer, {off} off; PENSTOCK_SEED={seed}");
                tally.right += 1;
            }
            (400, Some(reason)) if is_cut && reason == "bad-input" => {
                assert!(answer.text().contains("row 0"), "{}", answer.text());
                tally.cut += 1;
            }
            // Triton's own words.
            (400..=404, None) if is_lost => {
                assert!(answer.text().contains("nobodys"), "{}", answer.text());
                tally.lost += 1;
            }
            (502..=504, Some(reason)) => {
                *tally.gone.entry(reason).or_default() += 1;
                // Whoever is refused at once would ask a thousand times a second.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            (status, reason) => {
                panic!(
                    "{status} {reason:?} {} (cut {is_cut}, lost {is_lost}); PENSTOCK_SEED={seed}",
                    answer.text()
                )
            }
        }
        if answer.head.get("connection") == Some("close") {
            wire = Wire::connect(outbound).await;
        }
    }
    tally
}

/// What the sidecars counted.
#[derive(Debug)]
struct Counted {
    outbound: u64,
    inbound: u64,
    retries: u64,
}

impl Counted {
    async fn of(mesh: &Mesh) -> Self {
        let count = async |pod, name, labels: &[&str]| metric(mesh.admin(pod), name, labels).await as u64;
        let requests = "penstock_requests_total";
        Self {
            outbound: count("client", requests, &["direction=\"outbound\""]).await,
            inbound: count("a", requests, &["direction=\"inbound\""]).await,
            retries: count("client", "penstock_retries_total", &[]).await,
        }
    }
}
