//! A GPU's memory as the way to the model server, all of it on the STAND-IN driver (`kernels/standin`: the host's memory in
//! files, no GPU), through real sidecars, with a model server that opens what the sidecar exports: the answers are those
//! without, and whatever fails, no request does.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use penstock_api::names::annotation;
use penstock_inference::oip::{InferRequest, Parameter, Tensor, rest};
use penstock_prepare::{Limits, Pipeline, Scratch};
use penstock_tests::testkit::mesh::{Mesh, NAMESPACE};
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::wire::{Message, Wire, get};
use penstock_tests::testkit::{PATIENCE, wait_until};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// The variable by which a process's stand-in is told what to do.
const SCRIPT: &str = "PENSTOCK_STANDIN";
/// A row of the model `pixels`.
const SHAPE: [u64; 3] = [3, 64, 64];
const ROW: usize = 3 * 64 * 64;

fn standin() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name(penstock_standin_driver::FILE)
}

/// A client, a sidecar with the stand-in, and a model server with another.
struct Bed {
    mesh: Mesh,
    server: Option<Process>,
    script: String,
    folder: tempfile::TempDir,
}

/// What is to go wrong: in the sidecar's driver, and in the server's.
#[derive(Default)]
struct Wrong<'a> {
    sidecar: &'a str,
    server: &'a str,
    driver: Option<&'a str>,
}

impl Bed {
    async fn start(gpu: &str, wrong: Wrong<'_>) -> Self {
        Self::with(gpu, wrong, &[(annotation::BATCH, "max=32")], None).await
    }

    async fn with(
        gpu: &str,
        wrong: Wrong<'_>,
        service: &[(&'static str, &str)],
        policy: Option<&str>,
    ) -> Self {
        let driver = wrong.driver.map_or_else(|| standin().display().to_string(), str::to_owned);
        let mut mesh = Mesh::default()
            .pod("client", None)
            .service("pixels", service)
            .pod("a", Some("pixels"))
            .annotate_pod("a", annotation::GPU, gpu)
            .variable("a", "PENSTOCK_CUDA_DRIVER", &driver)
            .variable("a", SCRIPT, wrong.sidecar);
        if let Some(policy) = policy {
            mesh.file("policy.yaml", policy);
        }
        Self::of(mesh, wrong.server).await
    }

    /// Of a mesh with the pods `client` and `a`.
    async fn of(mesh: Mesh, script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut bed = Self { mesh: mesh.start().await, server: None, script: script.to_owned(), folder };
        bed.restart().await;
        bed
    }

    /// Kills the model server without a word, and starts another in its place.
    async fn restart(&mut self) {
        drop(self.server.take());
        let address = self.mesh.application("a").to_string();
        let repository = concat!(env!("CARGO_MANIFEST_DIR"), "/models/shared");
        let driver = standin().display().to_string();
        let args =
            ["--repository", repository, "--listen", &address, "--shared-memory", "--cuda-driver", &driver];
        let program = Path::new(env!("CARGO_BIN_EXE_penstock-modelserver"));
        let variables = [(SCRIPT, self.script.clone())];
        self.server =
            Some(Process::start_with("modelserver", program, &args, &variables, self.folder.path()));
        let application = self.mesh.application("a");
        wait_until("the model server answers", PATIENCE, async || {
            get(application, "/v2/health/ready").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
        wait_until("the model answers through both sidecars", PATIENCE, async || {
            let mut client = self.client().await;
            ask(&mut client, &request(0, 1), "").await.status() == 200
        })
        .await;
    }

    async fn client(&self) -> Wire {
        self.mesh.client("client").await
    }

    /// The same, of now: counts are told once a second, and the page is a second old at most.
    async fn counted(&self, name: &str) -> f64 {
        counts_are_told().await;
        self.metric(name, "").await
    }

    async fn metric(&self, name: &str, label: &str) -> f64 {
        metric(self.mesh.admin("a"), name, &[label]).await
    }

    /// Asks until executions go over the GPU: the sidecar opens the device, tells the server, and tests the model first.
    async fn goes_over_the_gpu(&self) {
        let before = self.counted("penstock_executions_gpu_total").await;
        let mut client = self.client().await;
        wait_until("an execution goes over the GPU", PATIENCE, async || {
            checked(&mut client, 1, 2).await;
            self.metric("penstock_executions_gpu_total", "").await >= before + 3.0
        })
        .await;
    }

    /// Many clients at once, of which each looks at each answer.
    async fn many(&self, clients: u64, requests: u64) {
        let all = (0..clients).map(|client| async move {
            let mut wire = self.client().await;
            for nth in 0..requests {
                checked(&mut wire, client * 1000 + nth, 1 + nth % 4).await;
            }
        });
        futures_util::future::join_all(all).await;
    }

    async fn logs(&mut self, words: &str) {
        let sidecar = self.mesh.sidecar("a");
        wait_until(&format!("the sidecar's log says {words:?}"), PATIENCE, async || {
            sidecar.said().contains(words)
        })
        .await;
    }

    /// Nothing is left in either arena.
    async fn is_empty(&self) {
        wait_until("both arenas are empty", PATIENCE, async || {
            self.metric("penstock_arena_bytes", "").await + self.metric("penstock_gpu_arena_bytes", "").await
                == 0.0
        })
        .await;
    }
}

/// Rows that no other seed has.
fn request(seed: u64, rows: u64) -> InferRequest {
    let mut random = SmallRng::seed_from_u64(seed);
    let values: Vec<f32> = (0..rows as usize * ROW).map(|_| random.random::<f32>()).collect();
    let shape = [&[rows][..], &SHAPE].concat();
    let inputs = vec![Tensor::fp32("pixels", shape, values)];
    let parameters = [("binary_data_output".to_owned(), Parameter::Bool(true))].into();
    InferRequest { inputs, parameters, ..InferRequest::default() }
}

async fn ask(client: &mut Wire, request: &InferRequest, headers: &str) -> Message {
    let body = rest::encode_request(request, true).unwrap();
    let head = format!(
        "POST /v2/models/pixels/infer HTTP/1.1\r\nhost: pixels.test\r\n{headers}\
         inference-header-content-length: {}\r\ncontent-length: {}\r\n\r\n",
        body.header_length.unwrap(),
        body.length(),
    );
    client.ask([head.as_bytes(), &body.into_bytes()].concat()).await.unwrap()
}

fn output(message: &Message) -> Bytes {
    assert_eq!(message.status(), 200, "{}", message.text());
    let length = message.head.get("inference-header-content-length").map(|length| length.parse().unwrap());
    let answer = rest::decode_response(&message.body.clone().into(), length).unwrap();
    answer.outputs[0].data.clone()
}

/// Asks, and looks at every bit of the answer: the signs of all numbers are turned.
async fn checked(client: &mut Wire, seed: u64, rows: u64) {
    let request = request(seed, rows);
    let answer = output(&ask(client, &request, "").await);
    let mut wanted = request.inputs[0].data.to_vec();
    wanted.chunks_exact_mut(4).for_each(|number| number[3] ^= 0x80);
    assert!(answer == wanted, "request {seed} of {rows} rows has another's answer, or none");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tensors_reach_the_server_through_the_gpus_memory_and_a_restart_tells_it_anew() {
    let mut bed = Bed::start("ipc,always", Wrong { sidecar: "delay=500us", ..Wrong::default() }).await;
    bed.logs("tensors may be handed over in the GPU's memory").await;
    bed.goes_over_the_gpu().await;
    bed.many(8, 12).await;
    wait_until("executions went over the GPU", PATIENCE, async || {
        bed.metric("penstock_executions_gpu_total", "").await > 10.0
    })
    .await;
    assert_eq!(bed.metric("penstock_gpu_failures_total", "").await, 0.0);
    bed.is_empty().await;
    for _ in 0..2 {
        bed.restart().await;
        bed.goes_over_the_gpu().await;
    }
    bed.many(4, 6).await;
    bed.is_empty().await;
    assert!(bed.mesh.sidecar("a").said().contains("STAND-IN"), "a stand-in is labelled in the log");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fails_is_told_and_loses_no_request() {
    let always = "ipc,always";
    let table = [
        // The sidecar's device, before anything is handed over.
        (
            "no memory for the region",
            Wrong { sidecar: "fail=cuMemAlloc_v2:2@5+", ..Wrong::default() },
            "CUDA_ERROR_OUT_OF_MEMORY",
        ),
        (
            "no export",
            Wrong { sidecar: "fail=cuIpcGetMemHandle:801@1+", ..Wrong::default() },
            "cuIpcGetMemHandle",
        ),
        ("a copy that is another", Wrong { sidecar: "garble", ..Wrong::default() }, "self-test failed"),
        (
            "no driver",
            Wrong { driver: Some("/nowhere/libcuda.so.1"), ..Wrong::default() },
            "libcuda.so.1\\\" cannot be opened",
        ),
        (
            "no device",
            Wrong { sidecar: "devices=0", ..Wrong::default() },
            "this container is given no device",
        ),
        // The server.
        (
            "the server does not open it",
            Wrong { server: "fail=cuIpcOpenMemHandle_v2:1@1+", ..Wrong::default() },
            "takes no memory of the GPU",
        ),
        (
            "the server reads something else",
            Wrong { server: "garble", ..Wrong::default() },
            "its answer is another",
        ),
    ];
    for (what, wrong, words) in table {
        let mut bed = Bed::start(always, wrong).await;
        let mut client = bed.client().await;
        wait_until(&format!("{what}: the log says so"), PATIENCE, async || {
            checked(&mut client, 7, 2).await;
            let said = bed.mesh.sidecar("a").said();
            said.contains(words)
        })
        .await;
        bed.many(4, 6).await;
        assert_eq!(bed.mesh.sidecar("a").said().matches(words).count(), 1, "{what}: told once");
        // The proof of the last one is handed over; nothing else is.
        assert!(bed.metric("penstock_executions_gpu_total", "").await <= 1.0, "{what}");
        wait_until(&format!("{what}: tensors go through shared memory"), PATIENCE, async || {
            checked(&mut client, 8, 2).await;
            bed.metric("penstock_executions_placed_total", "").await > 2.0
        })
        .await;
        bed.is_empty().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_goes_in_the_middle_loses_no_request() {
    for (what, script, words) in [
        ("lost at a copy", "lose=cuMemcpyHtoDAsync_v2:719@30", "the GPU is not used any more"),
        (
            "lost while a copy is waited for",
            "delay=2ms; lose=cuEventSynchronize:700@60",
            "the GPU is not used any more",
        ),
        ("copies that never end", "delay=1ms; stall=cuMemcpyHtoDAsync_v2@30", "was not done within"),
    ] {
        let mut bed = Bed::start("ipc,always", Wrong { sidecar: script, ..Wrong::default() }).await;
        bed.goes_over_the_gpu().await;
        let mut client = bed.client().await;
        wait_until(&format!("{what}: the device is lost"), PATIENCE, async || {
            bed.many(4, 3).await;
            bed.mesh.sidecar("a").said().contains(words)
        })
        .await;
        let before = bed.counted("penstock_executions_gpu_total").await;
        bed.many(4, 6).await;
        checked(&mut client, 9, 2).await;
        let after = bed.counted("penstock_executions_gpu_total").await;
        assert!(after == before, "{what}: {before} and then {after}");
        assert_eq!(bed.mesh.sidecar("a").said().matches(words).count(), 1, "{what}: told once");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_that_may_pass_is_not_for_ever() {
    // One copy fails and the device is well: the next go another way for some seconds, and then over it again.
    let script = "fail=cuMemcpyHtoDAsync_v2:1@30";
    let mut bed = Bed::start("ipc,always", Wrong { sidecar: script, ..Wrong::default() }).await;
    bed.goes_over_the_gpu().await;
    let mut client = bed.client().await;
    wait_until("a copy fails", PATIENCE, async || {
        checked(&mut client, 1, 1).await;
        bed.mesh.sidecar("a").said().contains("do not go through the GPU's memory for 10s")
    })
    .await;
    bed.goes_over_the_gpu().await;
    bed.logs("cuMemcpyHtoDAsync_v2").await;
    bed.is_empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_it_is_slower_it_is_left_alone() {
    // Every copy and every fill takes 30 ms longer than it has to.
    let bed = Bed::start("ipc", Wrong { sidecar: "delay=30ms", ..Wrong::default() }).await;
    let mut client = bed.client().await;
    // Both ways are measured.
    wait_until("the GPU's way is measured", PATIENCE, async || {
        checked(&mut client, 1, 2).await;
        bed.metric("penstock_executions_gpu_total", "").await >= 8.0
    })
    .await;
    let before = bed.counted("penstock_executions_gpu_total").await;
    for seed in 0..100 {
        checked(&mut client, seed, 2).await;
    }
    let over_gpu = bed.counted("penstock_executions_gpu_total").await - before;
    assert!(over_gpu < 20.0, "{over_gpu} of 100 went the slower way");
}

const PHOTOS: [&str; 6] =
    ["baseline-420.jpg", "progressive.jpg", "exif-6.jpg", "rgba.png", "lossy.webp", "gray.jpg"];
const PIPELINE: &str =
    r#"{"resize":{"mode":"exact","width":64,"height":64},"normalise":{"mean":[0.5],"std":[0.25]}}"#;

fn photo(name: &str) -> Bytes {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proxy/prepare/tests/images");
    std::fs::read(folder.join(name)).unwrap().into()
}

/// What the CPU makes of a photograph, and the model of that.
fn expected(photo: &[u8]) -> Vec<u8> {
    let pipeline = Pipeline::new(&serde_json::from_str(PIPELINE).unwrap()).unwrap();
    let mut tensor = vec![0; pipeline.bytes()];
    pipeline.run(photo, &mut tensor, &mut Scratch::default(), &Limits::default(), &|| false).unwrap();
    tensor.chunks_exact_mut(4).for_each(|number| number[3] ^= 0x80);
    tensor
}

async fn with_pipeline(gpu: &str, wrong: Wrong<'_>) -> Bed {
    let policy = format!(
        "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: pixels, namespace: {NAMESPACE}}}\n\
         spec:\n  targetRef: {{kind: Service, name: pixels}}\n  batch: {{max: 16}}\n  models:\n  - name: pixels\n    \
         prepare:\n    - {{input: image, tensor: pixels, pipeline: {PIPELINE}}}\n"
    );
    Bed::with(gpu, wrong, &[], Some(&policy)).await
}

/// Sends photographs, as rows of a batch.
async fn send(client: &mut Wire, photos: &[Bytes], headers: &str) -> Message {
    let rows = photos.iter().map(|photo| &photo[..]);
    let mut request = InferRequest {
        inputs: vec![Tensor::bytes("image", vec![photos.len() as u64], rows)],
        ..InferRequest::default()
    };
    request.parameters.insert("binary_data_output".to_owned(), Parameter::Bool(true));
    ask(client, &request, headers).await
}

/// Photographs from many clients at once, of which every fifth is damaged: each gets what is its own.
async fn many_photographs(bed: &Bed, clients: usize, requests: usize) {
    let photos: Vec<Bytes> = PHOTOS.iter().map(|name| photo(name)).collect();
    let expected: Vec<Vec<u8>> = photos.iter().map(|photo| expected(photo)).collect();
    let damaged = photos[0].slice(..photos[0].len() / 3);
    let all = (0..clients).map(|client| {
        let (photos, expected, damaged) = (&photos, &expected, &damaged);
        async move {
            let mut wire = bed.client().await;
            for nth in 0..requests {
                let which: Vec<usize> =
                    (0..1 + nth % 3).map(|row| (client + nth + row) % photos.len()).collect();
                if (client + nth) % 5 == 4 {
                    let message = send(&mut wire, &[photos[which[0]].clone(), damaged.clone()], "").await;
                    assert_eq!(
                        (message.status(), message.head.get("penstock-error")),
                        (400, Some("bad-input"))
                    );
                    assert!(message.text().contains("row 1: damaged JPEG"), "{}", message.text());
                    continue;
                }
                let sent: Vec<Bytes> = which.iter().map(|at| photos[*at].clone()).collect();
                let answer = output(&send(&mut wire, &sent, "").await);
                for (row, at) in answer.chunks_exact(4 * ROW).zip(which) {
                    assert!(row == expected[at], "{} is not what the CPU makes of it", PHOTOS[at]);
                }
            }
        }
    });
    futures_util::future::join_all(all).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn photographs_become_tensors_by_a_kernel_to_the_same_bits() {
    let bed = with_pipeline("ipc,always", Wrong { sidecar: "delay=300us", ..Wrong::default() }).await;
    wait_until("a kernel has made rows", PATIENCE, async || {
        many_photographs(&bed, 1, 4).await;
        bed.metric("penstock_prepared_gpu_total", "").await > 4.0
    })
    .await;
    many_photographs(&bed, 8, 10).await;
    wait_until("kernels have made most rows", PATIENCE, async || {
        bed.metric("penstock_prepared_gpu_total", "").await > 60.0
    })
    .await;
    assert_eq!(bed.metric("penstock_gpu_failures_total", "").await, 0.0);
    bed.is_empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn photographs_whose_kernel_fails_are_made_by_the_cpu_after_all() {
    for script in ["lose=cuLaunchKernel:719@24", "fail=cuLaunchKernel:701@24"] {
        let bed = with_pipeline("ipc,always", Wrong { sidecar: script, ..Wrong::default() }).await;
        wait_until("a kernel has made rows", PATIENCE, async || {
            many_photographs(&bed, 1, 4).await;
            bed.metric("penstock_prepared_gpu_total", "").await > 4.0
        })
        .await;
        wait_until("a kernel has failed", PATIENCE, async || {
            many_photographs(&bed, 4, 4).await;
            bed.metric("penstock_gpu_failures_total", "").await > 0.0
        })
        .await;
        many_photographs(&bed, 4, 4).await;
    }
}

/// What the stand-in's nvJPEG makes of a photograph is brighter by one, so that its pixels are told from the CPU's; the pixels
/// are made into numbers from -2 to 2.
const SHADE: f32 = 1.0 / 255.0 / 0.25;

/// A bed whose sidecar has been told where nvJPEG is.
async fn with_nvjpeg(gpu: &str, script: &str, library: Option<&str>) -> Bed {
    let (driver, own) = (standin().display().to_string(), standin().display().to_string());
    let policy = format!(
        "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: pixels, namespace: {NAMESPACE}}}\n\
         spec:\n  targetRef: {{kind: Service, name: pixels}}\n  batch: {{max: 16}}\n  models:\n  - name: pixels\n    \
         prepare:\n    - {{input: image, tensor: pixels, pipeline: {PIPELINE}}}\n"
    );
    let mut mesh = Mesh::default()
        .pod("client", None)
        .service("pixels", &[])
        .pod("a", Some("pixels"))
        .annotate_pod("a", annotation::GPU, gpu)
        .variable("a", "PENSTOCK_CUDA_DRIVER", &driver)
        .variable("a", "PENSTOCK_NVJPEG", library.unwrap_or(&own))
        .variable("a", SCRIPT, script);
    mesh.file("policy.yaml", &policy);
    Bed::of(mesh, "").await
}

/// The largest and the mean difference of an answer from what the CPU makes of a photograph.
fn off(found: &[u8], wanted: &[u8]) -> (f32, f32) {
    let number = |le: &[u8]| f32::from_le_bytes(le.try_into().unwrap());
    let off: Vec<f32> = found
        .chunks_exact(4)
        .zip(wanted.chunks_exact(4))
        .map(|(found, wanted)| (number(found) - number(wanted)).abs())
        .collect();
    (off.iter().copied().fold(0.0, f32::max), off.iter().sum::<f32>() / off.len() as f32)
}

/// Photographs of all forms from several clients; returns how many answers were not the CPU's own, all of them JPEGs.
async fn near_photographs(bed: &Bed, clients: usize, requests: usize) -> usize {
    let photos: Vec<Bytes> = PHOTOS.iter().map(|name| photo(name)).collect();
    let expected: Vec<Vec<u8>> = photos.iter().map(|photo| expected(photo)).collect();
    let all = (0..clients).map(|client| {
        let (photos, expected) = (&photos, &expected);
        async move {
            let (mut wire, mut others) = (bed.client().await, 0);
            for nth in 0..requests {
                let which: Vec<usize> =
                    (0..1 + nth % 3).map(|row| (client + nth + row) % photos.len()).collect();
                let sent: Vec<Bytes> = which.iter().map(|at| photos[*at].clone()).collect();
                let answer = output(&send(&mut wire, &sent, "").await);
                for (row, at) in answer.chunks_exact(4 * ROW).zip(which) {
                    if row == expected[at] {
                        continue;
                    }
                    let (most, mean) = off(row, &expected[at]);
                    assert!(PHOTOS[at].ends_with(".jpg"), "{} is not what the CPU makes of it", PHOTOS[at]);
                    assert!(most < 1.1 * SHADE && mean > 0.5 * SHADE, "{}: {most}, {mean}", PHOTOS[at]);
                    others += 1;
                }
            }
            others
        }
    });
    futures_util::future::join_all(all).await.into_iter().sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jpegs_are_decoded_by_nvjpeg_and_others_by_the_cpu_in_one_batch() {
    let mut bed = with_nvjpeg("ipc,nvjpeg,always", "delay=300us; shade=1", None).await;
    bed.logs("JPEGs may be decoded by nvJPEG").await;
    wait_until("nvJPEG has decoded rows", PATIENCE, async || {
        near_photographs(&bed, 1, 4).await;
        bed.metric("penstock_decoded_gpu_total", "").await > 4.0
    })
    .await;
    let others = near_photographs(&bed, 6, 8).await;
    assert!(others > 20, "{others} answers were nvJPEG's");
    assert_eq!(bed.metric("penstock_gpu_failures_total", "").await, 0.0);
    let (decoded, made) =
        (bed.counted("penstock_decoded_gpu_total").await, bed.counted("penstock_prepared_gpu_total").await);
    assert!(decoded < made, "{decoded} of {made}: PNG and WebP are the CPU's");
    bed.is_empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_word_or_the_library_the_cpu_decodes_to_the_same_bits() {
    let table = [
        ("ipc,always", "", None, "tensors may be handed over"),
        ("ipc,nvjpeg,always", "", Some("/nowhere/libnvjpeg.so.12"), "nvJPEG is not used: "),
        ("ipc,nvjpeg,always", "", Some("libc.so.6"), "it has no nvjpegGetProperty"),
        ("ipc,nvjpeg,always", "nvjpeg=10.2.0", None, "has version 10"),
        ("ipc,nvjpeg,always", "fail=nvjpegCreateEx:6", None, "NVJPEG_STATUS_EXECUTION_FAILED"),
        ("ipc,nvjpeg,always", "fail=nvjpegJpegStateCreate:5", None, "NVJPEG_STATUS_ALLOCATOR_FAILURE"),
        ("ipc,nvjpeg,always", "fail=nvjpegDecode:4", None, "NVJPEG_STATUS_JPEG_NOT_SUPPORTED"),
        ("ipc,nvjpeg,always", "shade=60", None, "nvJPEG gives other pixels than the CPU"),
    ];
    for (gpu, script, library, words) in table {
        let mut bed = with_nvjpeg(gpu, script, library).await;
        bed.logs(words).await;
        wait_until(&format!("{words}: a kernel has made rows"), PATIENCE, async || {
            many_photographs(&bed, 1, 4).await;
            bed.metric("penstock_prepared_gpu_total", "").await > 4.0
        })
        .await;
        many_photographs(&bed, 3, 6).await;
        assert_eq!(bed.counted("penstock_decoded_gpu_total").await, 0.0, "{words}");
        assert_eq!(bed.mesh.sidecar("a").said().matches(words).count(), 1, "{words}: told once");
        bed.is_empty().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nvjpeg_does_not_decode_the_cpu_does_and_no_request_is_lost() {
    // The first decode is the test's.
    for (script, words) in [
        ("fail=nvjpegDecode:4@8", ""),
        ("fail=nvjpegGetImageInfo:3@8", ""),
        ("fail=nvjpegDecode:5@8", "JPEGs are decoded on the CPU for 10s"),
        ("fail=nvjpegDecode:6@8", "JPEGs are decoded on the CPU for 10s"),
        ("fail=nvjpegDecode:7@8+", "JPEGs are decoded on the CPU from now on"),
        ("lose=nvjpegDecode:719@8", "the GPU is not used any more"),
        ("delay=1ms; stall=nvjpegDecode@8", "was not done within"),
    ] {
        let mut bed = with_nvjpeg("ipc,nvjpeg,always", &format!("shade=1; {script}"), None).await;
        bed.logs("JPEGs may be decoded by nvJPEG").await;
        wait_until(&format!("{script}: it has failed"), PATIENCE, async || {
            near_photographs(&bed, 2, 3).await;
            bed.metric("penstock_gpu_failures_total", "").await > 0.0
        })
        .await;
        near_photographs(&bed, 3, 6).await;
        let said = bed.mesh.sidecar("a").said();
        if words.is_empty() {
            assert!(
                !said.contains("JPEGs are decoded on the CPU"),
                "{script}: a file says nothing of the next"
            );
        } else {
            assert_eq!(said.matches(words).count(), 1, "{script}: told once");
        }
        if !script.contains("lose") && !script.contains("stall") {
            bed.is_empty().await;
        }
    }
}

/// Noise where pixels should be: what is damaged is found only when its batch is executed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_jpeg_costs_its_sender_an_answer_and_nobody_else() {
    let mut bed = with_nvjpeg("ipc,nvjpeg,always", "shade=1", None).await;
    bed.logs("JPEGs may be decoded by nvJPEG").await;
    wait_until("nvJPEG has decoded rows", PATIENCE, async || {
        near_photographs(&bed, 1, 4).await;
        bed.metric("penstock_decoded_gpu_total", "").await > 4.0
    })
    .await;
    // Its markers are whole, but no Huffman code is all ones.
    let good = photo("baseline-420.jpg");
    let mut bytes = good.to_vec();
    let scan = bytes.windows(2).position(|two| two == [0xff, 0xda]).unwrap() + 14;
    let end = bytes.len() - 2;
    bytes[scan..end].chunks_exact_mut(2).for_each(|two| two.copy_from_slice(&[0xff, 0]));
    let (bad, damaged) = (Bytes::from(bytes), PATIENCE);
    let both = async {
        let mut wire = bed.client().await;
        for _ in 0..12 {
            let message = send(&mut wire, &[good.clone(), bad.clone()], "").await;
            assert_eq!((message.status(), message.head.get("penstock-error")), (400, Some("bad-input")));
            assert!(message.text().contains("row 1: damaged JPEG"), "{}", message.text());
        }
    };
    let others = near_photographs(&bed, 4, 12);
    tokio::time::timeout(damaged, async { futures_util::future::join(both, others).await }).await.unwrap();
    bed.is_empty().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nvjpeg_is_slower_the_cpu_decodes() {
    let bed = with_nvjpeg("ipc,nvjpeg", "shade=1; unpacked=40ms", None).await;
    let file = [photo("baseline-420.jpg")];
    let mut client = bed.client().await;
    wait_until("nvJPEG's way is measured", 3 * PATIENCE, async || {
        output(&send(&mut client, &file, "").await);
        bed.metric("penstock_decoded_gpu_total", "").await >= 8.0
    })
    .await;
    let before = bed.counted("penstock_decoded_gpu_total").await;
    for _ in 0..60 {
        output(&send(&mut client, &file, "").await);
    }
    let by_nvjpeg = bed.counted("penstock_decoded_gpu_total").await - before;
    assert!(by_nvjpeg < 15.0, "{by_nvjpeg} of 60 went the slower way");
}

/// Callers with regions of their own: neither shares an execution with the other, both are answered, and so is a third, for
/// whom there is no region.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callers_with_regions_of_their_own_share_no_execution() {
    const CLIENTS: [&str; 3] = ["client", "second", "third"];
    let driver = standin().display().to_string();
    let mesh = Mesh::default().pod("second", None).pod("third", None);
    let mut bed = Bed::of(
        mesh.pod("client", None)
            .service("pixels", &[(annotation::BATCH, "max=32,delay=20ms,concurrent=1")])
            .pod("a", Some("pixels"))
            .annotate_pod("a", annotation::GPU, "ipc,always")
            .annotate_pod("a", annotation::TENANT_REGIONS, "2")
            .variable("a", "PENSTOCK_CUDA_DRIVER", &driver),
        "",
    )
    .await;
    bed.logs("tensors may be handed over in the GPU's memory").await;
    // The first two get regions before the third comes.
    for client in &CLIENTS[..2] {
        let mut wire = bed.mesh.client(client).await;
        checked(&mut wire, 1, 2).await;
    }
    wait_until("the server has told what its model takes", PATIENCE, async || {
        let mut wire = bed.mesh.client("client").await;
        let message = ask(&mut wire, &request(1, 2), "penstock-batch: show\r\n").await;
        message.head.get("penstock-batch").is_some()
    })
    .await;
    let mut shared = false;
    for round in 0..30 {
        // An idle server is asked at once, so what is shared is a matter of moments.
        if shared && round >= 3 {
            break;
        }
        let each = CLIENTS.map(|client| {
            let bed = &bed;
            async move {
                let asked = (0..8).map(|nth| async move {
                    let mut wire = bed.mesh.client(client).await;
                    let message = ask(&mut wire, &request(nth, 2), "penstock-batch: show\r\n").await;
                    output(&message);
                    let shown = message.head.get("penstock-batch").unwrap();
                    shown.split_once(";rows=").map(|(id, rows)| (id.to_owned(), rows.to_owned())).unwrap()
                });
                futures_util::future::join_all(asked).await
            }
        });
        let all = futures_util::future::join_all(each).await;
        shared |= all.iter().flatten().any(|(_, rows)| rows.parse::<u32>().unwrap() > 2);
        let executions: Vec<BTreeSet<String>> =
            all.into_iter().map(|one| one.into_iter().map(|(id, _)| id).collect()).collect();
        for (at, one) in executions.iter().enumerate() {
            for other in &executions[at + 1..] {
                assert!(one.is_disjoint(other), "{one:?} and {other:?}");
            }
        }
    }
    assert!(shared, "nothing was shared at all");
    wait_until("tensors are handed over", PATIENCE, async || {
        let mut wire = bed.mesh.client("client").await;
        checked(&mut wire, 5, 2).await;
        bed.metric("penstock_executions_gpu_total", "").await > 1.0
    })
    .await;
    // Two regions at the server, whose names end in their numbers, and none for the third.
    let regions = get(bed.mesh.application("a"), "/v2/cudasharedmemory/status").await.unwrap().text();
    let names: Vec<serde_json::Value> = serde_json::from_str(&regions).unwrap();
    assert_eq!(names.len(), 2, "{regions}");
    bed.is_empty().await;
}
