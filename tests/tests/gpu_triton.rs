//! A real GPU and the real Triton: tensors and photographs reach it through memory of the GPU, to the bit, also when it is killed; and
//! what each way costs is printed. On a machine without a device every test says so and passes; `make test-gpu-triton` runs them
//! where there is one.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use penstock_api::names::annotation;
use penstock_inference::oip::Parameter;
use penstock_inference::oip::{Datatype, InferRequest, RequestedOutput, Tensor, rest};
use penstock_kernels::cuda::detect;
use penstock_prepare::{Limits, Pipeline, Scratch};
use penstock_tests::testkit::mesh::{Mesh, NAMESPACE};
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::servers::{Model, Triton};
use penstock_tests::testkit::wire::{Message, Wire};
use penstock_tests::testkit::{PATIENCE, wait_until};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::time::Instant;

/// A row of the model `pixels`: half-precision numbers.
const SHAPE: [u64; 3] = [3, 224, 224];
const ROW: usize = 2 * 3 * 224 * 224;
const PIPELINE: &str = "{preset: imagenet, dtype: f16}";
/// Rows of a request that is timed, and how many of them count.
const ROWS: u64 = 16;
const TIMES: usize = 60;

/// Whether there is a device; says so if there is none.
fn device() -> bool {
    let driver = detect(|absent| println!("skipped: {absent}"));
    driver.is_some_and(|driver| driver.devices().is_ok_and(|devices| !devices.is_empty()))
}

struct Bed {
    mesh: Mesh,
    triton: Option<Triton>,
}

impl Bed {
    /// `gpu` is the annotation, if any; `options` are the sidecar's.
    async fn start(gpu: Option<&str>, options: &[&str]) -> Self {
        let mut mesh = Mesh::default().pod("client", None).service("pixels", &[]).pod("a", Some("pixels"));
        if let Some(gpu) = gpu {
            mesh = mesh.annotate_pod("a", annotation::GPU, gpu);
        }
        for option in options {
            mesh = mesh.option("a", option);
        }
        mesh.file(
            "policy.yaml",
            &format!(
                "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\n\
                 metadata: {{name: pixels, namespace: {NAMESPACE}}}\n\
                 spec:\n  targetRef: {{kind: Service, name: pixels}}\n  batch: {{max: 32}}\n  models:\n  - name: pixels\n    \
                 prepare:\n    - {{input: image, tensor: pixels, pipeline: {PIPELINE}}}\n"
            ),
        );
        let mut bed = Self { mesh: mesh.start().await, triton: None };
        bed.restart().await;
        bed
    }

    /// Kills Triton without a word, and starts another in its place.
    async fn restart(&mut self) {
        if let Some(mut triton) = self.triton.take() {
            triton.process().kill();
        }
        let ip = self.mesh.application("a").ip();
        self.triton = Some(Triton::start_at(ip, &[Model::pixels("pixels")]).await);
        wait_until("Triton answers through both sidecars", PATIENCE, async || {
            let mut client = self.client().await;
            ask(&mut client, tensors(0, 1).0).await.status() == 200
        })
        .await;
    }

    async fn client(&self) -> Wire {
        self.mesh.client("client").await
    }

    async fn metric(&self, name: &str) -> f64 {
        metric(self.mesh.admin("a"), name, &[]).await
    }

    async fn goes_over_the_gpu(&self) {
        counts_are_told().await;
        let before = self.metric("penstock_executions_gpu_total").await;
        let mut client = self.client().await;
        wait_until("an execution goes over the GPU", PATIENCE, async || {
            checked(&mut client, 1, 2).await;
            self.metric("penstock_executions_gpu_total").await >= before + 3.0
        })
        .await;
    }

    async fn many(&self, clients: u64, requests: u64) {
        let all = (0..clients).map(|client| async move {
            let mut wire = self.client().await;
            for nth in 0..requests {
                checked(&mut wire, client * 1000 + nth, 1 + nth % 4).await;
            }
        });
        futures_util::future::join_all(all).await;
    }

    async fn is_empty(&self) {
        wait_until("both arenas are empty", PATIENCE, async || {
            self.metric("penstock_arena_bytes").await + self.metric("penstock_gpu_arena_bytes").await == 0.0
        })
        .await;
    }

    /// The median time of a request, after some that do not count.
    async fn takes(&self, request: &[u8]) -> Duration {
        let mut wire = self.client().await;
        let mut times = Vec::new();
        for nth in 0..TIMES + 30 {
            let begin = Instant::now();
            assert_eq!(wire.ask(request).await.unwrap().status(), 200);
            if nth >= 30 {
                times.push(begin.elapsed());
            }
        }
        times.sort();
        times[times.len() / 2]
    }
}

fn asks(input: Tensor, output: &str) -> InferRequest {
    let parameters = [("binary_data".to_owned(), Parameter::Bool(true))].into();
    let outputs = vec![RequestedOutput { name: output.to_owned(), parameters }];
    InferRequest { inputs: vec![input], outputs, ..InferRequest::default() }
}

/// Rows that no other seed has, and their bytes: numbers from 1 to 2, of which each is told from each.
fn tensors(seed: u64, rows: u64) -> (InferRequest, Vec<u8>) {
    let mut random = SmallRng::seed_from_u64(seed);
    let numbers =
        (0..rows as usize * ROW / 2).flat_map(|_| (0x3c00 | (random.random::<u16>() & 0x3ff)).to_le_bytes());
    let data: Vec<u8> = numbers.collect();
    let input = Tensor {
        name: "pixels".to_owned(),
        datatype: Datatype::Fp16,
        shape: [&[rows][..], &SHAPE].concat(),
        parameters: Default::default(),
        data: data.clone().into(),
    };
    (asks(input, "back"), data)
}

/// A request as it goes over the wire.
fn wire(request: &InferRequest) -> Vec<u8> {
    let body = rest::encode_request(request, true).unwrap();
    let head = format!(
        "POST /v2/models/pixels/infer HTTP/1.1\r\nhost: pixels.{NAMESPACE}\r\n\
         inference-header-content-length: {}\r\ncontent-length: {}\r\n\r\n",
        body.header_length.unwrap(),
        body.length(),
    );
    [head.as_bytes(), &body.into_bytes()].concat()
}

async fn ask(client: &mut Wire, request: InferRequest) -> Message {
    client.ask(wire(&request)).await.unwrap()
}

fn output(message: &Message) -> Bytes {
    assert_eq!(message.status(), 200, "{}", message.text());
    let length = message.head.get("inference-header-content-length").map(|length| length.parse().unwrap());
    rest::decode_response(&message.body.clone().into(), length).unwrap().outputs[0].data.clone()
}

/// Asks, and looks at every bit of the answer.
async fn checked(client: &mut Wire, seed: u64, rows: u64) {
    let (request, wanted) = tensors(seed, rows);
    let answer = output(&ask(client, request).await);
    assert!(answer == wanted, "request {seed} of {rows} rows has another's answer, or none");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn tensors_reach_triton_through_the_gpus_memory_and_a_restart_tells_it_anew() {
    if !device() {
        return;
    }
    let mut bed = Bed::start(Some("ipc,always"), &[]).await;
    bed.goes_over_the_gpu().await;
    bed.many(8, 25).await;
    counts_are_told().await;
    let over = bed.metric("penstock_executions_gpu_total").await;
    assert_eq!(bed.metric("penstock_gpu_failures_total").await, 0.0, "{}", bed.mesh.sidecar("a").said());
    println!("{over} executions of Triton over the GPU's memory, every bit right");
    bed.is_empty().await;
    for _ in 0..2 {
        bed.restart().await;
        bed.goes_over_the_gpu().await;
    }
    bed.many(8, 10).await;
    bed.is_empty().await;
    println!("{}", bed.mesh.sidecar("a").said());
}

/// The photographs that are committed, and what the CPU makes of each.
fn photographs() -> Vec<(String, Vec<u8>, Vec<u8>)> {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/photos");
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxy/prepare/tests/images");
    let mut files: Vec<_> = std::fs::read_dir(models).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|ending| ending == "jpg"));
    let more = ["progressive.jpg", "exif-6.jpg", "rgba.png", "lossy.webp", "gray.jpg", "large.jpg"];
    files.extend(more.map(|name| images.join(name)));
    files.sort();
    let pipeline =
        Pipeline::new(&serde_json::from_str(r#"{"preset":"imagenet","dtype":"f16"}"#).unwrap()).unwrap();
    let made = files.into_iter().map(|path| {
        let file = std::fs::read(&path).unwrap();
        let mut tensor = vec![0; pipeline.bytes()];
        pipeline.run(&file, &mut tensor, &mut Scratch::default(), &Limits::default(), &|| false).unwrap();
        (path.file_name().unwrap().to_string_lossy().into_owned(), file, tensor)
    });
    made.collect()
}

fn images<'a>(files: impl ExactSizeIterator<Item = &'a [u8]>) -> InferRequest {
    asks(Tensor::bytes("image", vec![files.len() as u64], files), "back")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn photographs_become_tensors_by_a_kernel_to_the_same_bits() {
    if !device() {
        return;
    }
    let mut bed = Bed::start(Some("ipc,always"), &[]).await;
    let photographs = photographs();
    let mut wire = bed.client().await;
    wait_until("a kernel has made rows", PATIENCE, async || {
        output(&ask(&mut wire, images([&photographs[0].1[..]].into_iter())).await);
        bed.metric("penstock_prepared_gpu_total").await > 4.0
    })
    .await;
    for round in 0..4 {
        for batch in photographs.chunks(1 + 3 * round) {
            let answer = output(&ask(&mut wire, images(batch.iter().map(|(_, file, _)| &file[..]))).await);
            for (row, (name, _, wanted)) in answer.chunks_exact(ROW).zip(batch) {
                assert!(row == wanted, "{name} is not what the CPU makes of it");
            }
        }
    }
    counts_are_told().await;
    let made = bed.metric("penstock_prepared_gpu_total").await;
    assert_eq!(bed.metric("penstock_gpu_failures_total").await, 0.0, "{}", bed.mesh.sidecar("a").said());
    assert!(made > 100.0, "{made}");
    println!("{made} rows made by the kernel, all to the CPU's bits");
    bed.is_empty().await;
}

fn half(le: &[u8]) -> f32 {
    penstock_kernels::normalise::f32_of_f16(u16::from_le_bytes([le[0], le[1]]))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn jpegs_are_decoded_by_nvjpeg_near_to_what_the_cpu_makes() {
    if !device() {
        return;
    }
    let mut bed = Bed::start(Some("ipc,nvjpeg,always"), &[]).await;
    let photographs = photographs();
    let mut wire = bed.client().await;
    let mut tries = 0;
    wait_until("nvJPEG has decoded rows, or is not there", 3 * PATIENCE, async || {
        output(&ask(&mut wire, images([&photographs[0].1[..]].into_iter())).await);
        tries += 1;
        bed.metric("penstock_decoded_gpu_total").await > 4.0
            || bed.mesh.sidecar("a").said().contains("nvJPEG is not used")
    })
    .await;
    if let Some(line) = bed.mesh.sidecar("a").said().lines().find(|line| line.contains("nvJPEG is not used"))
    {
        println!("skipped: {line}");
        return;
    }
    // Of 255: what a pixel's number is divided by is about 0.226.
    let (mut worst, mut all) = ((0f32, String::new()), Vec::new());
    for batch in photographs.chunks(4) {
        let answer = output(&ask(&mut wire, images(batch.iter().map(|(_, file, _)| &file[..]))).await);
        for (row, (name, _, wanted)) in answer.chunks_exact(ROW).zip(batch) {
            let off = row
                .chunks_exact(2)
                .zip(wanted.chunks_exact(2))
                .map(|(found, wanted)| (half(found) - half(wanted)).abs());
            let mean = 255.0 * 0.226 * off.sum::<f32>() / (ROW / 2) as f32;
            all.push(mean);
            if mean > worst.0 {
                worst = (mean, name.clone());
            }
        }
    }
    let mean = all.iter().sum::<f32>() / all.len() as f32;
    println!(
        "nvJPEG: {mean:.2} of 255 from the CPU on average of {} pictures, {:.2} for {}",
        all.len(),
        worst.0,
        worst.1
    );
    assert!(worst.0 < 8.0, "{worst:?}");
    counts_are_told().await;
    println!(
        "{} rows decoded by nvJPEG; {}",
        bed.metric("penstock_decoded_gpu_total").await,
        bed.mesh.sidecar("a").said()
    );
    assert_eq!(bed.metric("penstock_gpu_failures_total").await, 0.0);
    bed.is_empty().await;
}

/// Not a check but a measurement, which is printed: 16 rows of half precision (4.8 MB), and 16 JPEGs, one request after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_each_way_takes() {
    if !device() {
        return;
    }
    // The sums alone are asked for: what is measured is the way there.
    let sums = |mut request: InferRequest| {
        request.outputs[0].name = "sum".to_owned();
        wire(&request)
    };
    let tensors = sums(tensors(5, ROWS).0);
    let photographs = photographs();
    let large = photographs.iter().find(|(name, ..)| name == "large.jpg").unwrap();
    let images = sums(images((0..ROWS).map(|_| &large.1[..]).collect::<Vec<_>>().into_iter()));
    for (name, gpu, options) in [
        ("bytes (P3)", None, &["--arena=0"][..]),
        ("shared memory (P1)", None, &[]),
        ("the GPU's memory (P2)", Some("ipc,always"), &[]),
        ("the same, with nvJPEG", Some("ipc,nvjpeg,always"), &[]),
        ("whichever is faster", Some("ipc,nvjpeg"), &[]),
    ] {
        let mut bed = Bed::start(gpu, options).await;
        let (first, second) = (bed.takes(&tensors).await, bed.takes(&images).await);
        counts_are_told().await;
        let over = bed.metric("penstock_executions_gpu_total").await;
        println!(
            "{name:<24} {ROWS} tensors {first:>8.2?}  {ROWS} JPEGs of 640 x 427 {second:>8.2?}  {over} over the GPU"
        );
        assert!(!bed.mesh.sidecar("a").said().contains("not used any more"));
    }
}
