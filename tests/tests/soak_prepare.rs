//! Photographs by the thousand through both sidecars to the real Triton, some of whom leave and some of whom are damaged: every
//! answer belongs to its own photograph, and nothing stays behind. Some thousands with every run of the tests; 100,000 with `make soak`.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use penstock_inference::oip::{InferRequest, Parameter, RequestedOutput, Tensor, rest};
use penstock_prepare::form::{Colour, Resize, ResizeMode};
use penstock_prepare::{Declaration, Limits, Pipeline, Scratch};
use penstock_tests::testkit::mesh::{Mesh, NAMESPACE};
use penstock_tests::testkit::proxy::metric;
use penstock_tests::testkit::servers::{Model, Triton};
use penstock_tests::testkit::wire::{Message, Wire};
use penstock_tests::testkit::{PATIENCE, wait_until};
use rand::rngs::SmallRng;
use rand::{Rng as _, RngCore as _, SeedableRng as _};
use tokio::time::Instant;

/// Small ones of every format that is read.
const PHOTOS: [&str; 8] = [
    "baseline-420.jpg",
    "progressive.jpg",
    "exif-6.jpg",
    "gray.jpg",
    "rgba.png",
    "palette.png",
    "lossy.webp",
    "lossless.webp",
];
/// Made up besides, so that hardly two in flight are equal.
const DRAWN: usize = 504;
const SIDE: u32 = 24;
/// The tensor: large enough to be handed over in shared memory, which begins at 16 KiB.
const WIDE: u32 = 64;
const VALUES: u32 = WIDE * WIDE;
const CLIENTS: u64 = 16;
/// Of a hundred requests.
const CANCELLED: u32 = 5;
const DAMAGED: u32 = 5;
/// How much a sidecar may have grown from the first fifth to the end, percent.
const GROWTH: u64 = 15;
const SEED: u64 = 5;

/// A photograph as a request, and what the model must answer.
struct Question {
    bytes: Vec<u8>,
    /// Cut in the middle of the image.
    damaged: Vec<u8>,
    scaled: Vec<f32>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_photographs_leave_nothing_behind() {
    soak(4_000).await;
}

#[ignore = "takes minutes; make soak"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_photographs_leave_nothing_behind() {
    soak(100_000).await;
}

async fn soak(requests: u64) {
    let mut mesh = Mesh::default().pod("client", None).service("photos", &[]).pod("a", Some("photos"));
    mesh.file(
        "policy.yaml",
        &format!(
            "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: photos, namespace: {NAMESPACE}}}\n\
             spec:\n  targetRef: {{kind: Service, name: photos}}\n  batch: {{max: 32}}\n  models:\n  - name: photos\n    prepare:\n    \
             - {{input: image, tensor: values, shape: [{VALUES}], pipeline: {{resize: {{mode: exact, width: {WIDE}, height: {WIDE}}}, colour: gray}}}}\n"
        ),
    );
    let mut mesh = mesh.start().await;
    let models = [Model::new("photos").width(VALUES)];
    let triton = Triton::start_at(mesh.application("a").ip(), &models).await;
    let questions = Arc::new(questions());
    let (outbound, admin) = (mesh.outbound("client"), mesh.admin("a"));
    wait_until("a photograph is answered through both sidecars", PATIENCE, async || {
        let mut wire = Wire::connect(outbound).await;
        wire.ask(&questions[0].bytes).await.is_ok_and(|answer| answer.head.status() == 200)
    })
    .await;

    let started = Instant::now();
    let asked = Arc::new(AtomicU64::new(0));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|client| tokio::spawn(ask(outbound, questions.clone(), asked.clone(), requests, SEED + client)))
        .collect();
    let mut early = None;
    while !clients.iter().all(tokio::task::JoinHandle::is_finished) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if early.is_none() && asked.load(Relaxed) >= requests / 5 {
            early = Some([mesh.sidecar("a").memory_kib(), mesh.sidecar("client").memory_kib()]);
        }
    }
    let mut total = Tally::default();
    for client in clients {
        let tally = client.await.unwrap();
        total.right += tally.right;
        total.refused += tally.refused;
        total.left += tally.left;
    }
    let took = started.elapsed();

    // Whoever left may still be on its way; pages of metrics are a second old at most.
    wait_until("the arena is empty", PATIENCE, async || {
        metric(admin, "penstock_arena_bytes", &[]).await == 0.0
            && metric(admin, "penstock_prepare_waiting", &[]).await == 0.0
    })
    .await;
    let early = early.unwrap();
    let late = [mesh.sidecar("a").memory_kib(), mesh.sidecar("client").memory_kib()];
    let counted = async |name: &str, label: &str| metric(admin, name, &[label]).await;
    let (batches, rows) =
        (counted("penstock_batches_total", "").await, counted("penstock_batch_rows_total", "").await);
    let (placed, executions) = (
        counted("penstock_executions_placed_total", "").await,
        counted("penstock_executions_total", "").await,
    );
    println!(
        "soak: {requests} photographs in {:.0} s: {} answered rightly, {} damaged and refused, {} left; {executions} executions, \
         {placed} of them in shared memory, {:.1} rows a batch; memory of the server's sidecar {} KiB at a fifth and {} at the end, \
         of the client's {} and {}; {} tensors prepared, {} refused, {} abandoned; seed {SEED}",
        took.as_secs_f64(),
        total.right,
        total.refused,
        total.left,
        rows / batches,
        early[0],
        late[0],
        early[1],
        late[1],
        counted("penstock_prepared_total", "done").await,
        counted("penstock_prepared_total", "refused").await,
        counted("penstock_prepared_total", "abandoned").await,
    );
    assert_eq!(total.right + total.refused + total.left, requests);
    assert!(total.left * 30 > requests && total.refused * 30 > requests, "too few left, or were damaged");
    assert!(placed > 0.0, "nothing went through shared memory");
    for (early, late) in early.into_iter().zip(late) {
        assert!(late * 100 <= early * (100 + GROWTH), "memory grew from {early} to {late} KiB");
    }
    drop(triton);
}

/// What became of requests.
#[derive(Default)]
struct Tally {
    right: u64,
    refused: u64,
    left: u64,
}

/// A client: asks again as soon as it is answered, until all have asked enough.
async fn ask(
    outbound: SocketAddr,
    questions: Arc<Vec<Question>>,
    asked: Arc<AtomicU64>,
    requests: u64,
    seed: u64,
) -> Tally {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut wire = Wire::connect(outbound).await;
    let mut tally = Tally::default();
    while asked.fetch_add(1, Relaxed) < requests {
        let question = &questions[random.random_range(0..questions.len())];
        let dice = random.random_range(0..100);
        if dice < CANCELLED {
            // Before all of it is sent, while it waits, is decoded or executed, or when the answer is on its way.
            let part = if dice % 2 == 0 {
                question.bytes.len()
            } else {
                random.random_range(1..question.bytes.len())
            };
            wire.send(&question.bytes[..part]).await.unwrap();
            tokio::time::sleep(Duration::from_micros(random.random_range(0..20_000))).await;
            wire = Wire::connect(outbound).await;
            tally.left += 1;
        } else if dice < CANCELLED + DAMAGED {
            let answer = wire.ask(&question.damaged).await.unwrap();
            assert_eq!(
                (answer.head.status(), answer.reason()),
                (400, Some("bad-input")),
                "{}",
                answer.text()
            );
            tally.refused += 1;
        } else {
            let answer = wire.ask(&question.bytes).await.unwrap();
            assert_eq!(scaled(&answer), question.scaled, "somebody else's answer; seed {seed}");
            tally.right += 1;
        }
    }
    tally
}

/// The model's answer: every value of the tensor, twice.
fn scaled(answer: &Message) -> Vec<f32> {
    assert_eq!(answer.head.status(), 200, "{}", answer.text());
    let length = answer.head.get("inference-header-content-length").map(|length| length.parse().unwrap());
    let answer = rest::decode_response(&answer.body.clone().into(), length).unwrap();
    answer.outputs[0].as_fp32().unwrap().collect()
}

fn questions() -> Vec<Question> {
    let declaration = Declaration {
        resize: Some(Resize {
            mode: ResizeMode::Exact,
            size: None,
            width: Some(WIDE),
            height: Some(WIDE),
            filter: Default::default(),
            antialias: true,
            pad: None,
        }),
        colour: Some(Colour::Gray),
        ..Declaration::default()
    };
    let pipeline = Pipeline::new(&declaration).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxy/prepare/tests/images");
    let mut random = SmallRng::seed_from_u64(SEED);
    let photos = PHOTOS.iter().map(|name| std::fs::read(folder.join(name)).unwrap());
    let photos = photos.chain((0..DRAWN).map(|_| drawn(&mut random)));
    photos
        .map(|photo| {
            let mut tensor = vec![0; pipeline.bytes()];
            let limits = Limits::default();
            pipeline.run(&photo, &mut tensor, &mut Scratch::default(), &limits, &|| false).unwrap();
            let values = tensor.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value) * 2.0);
            let (bytes, damaged) = (request(&photo), request(&photo[..photo.len() / 2]));
            Question { bytes, damaged, scaled: values.collect() }
        })
        .collect()
}

/// A PNG of noise.
fn drawn(random: &mut SmallRng) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, SIDE, SIDE);
    encoder.set_color(png::ColorType::Grayscale);
    encoder.set_depth(png::BitDepth::Eight);
    let mut grays = vec![0; (SIDE * SIDE) as usize];
    random.fill_bytes(&mut grays);
    encoder.write_header().unwrap().write_image_data(&grays).unwrap();
    bytes
}

/// A whole HTTP request for one photograph.
fn request(photo: &[u8]) -> Vec<u8> {
    let request = InferRequest {
        inputs: vec![Tensor::bytes("image", vec![1], [photo])],
        outputs: vec![RequestedOutput {
            name: "scaled".to_owned(),
            parameters: [("binary_data".to_owned(), Parameter::Bool(true))].into(),
        }],
        ..InferRequest::default()
    };
    let body = rest::encode_request(&request, true).unwrap();
    let header = body.header_length.unwrap();
    let body = body.into_bytes();
    let head = format!(
        "POST /v2/models/photos/infer HTTP/1.1\r\nhost: photos.{NAMESPACE}\r\ninference-header-content-length: {header}\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head.as_bytes(), &body].concat()
}
