//! The real model servers, from PyPI, on a CPU: Triton, MLServer and TorchServe, all with the model `rowsum`.
//!
//! In: which models to serve. Out: addresses that answer. `make tools` installs the servers, each into a venv of its own
//! below the cache; a test that finds none fails and says so, it is never left out. Each server has a loopback address to
//! itself, so that its ports are the usual ones. It is asked to end when dropped, killed if it does not, and ends with the
//! test if that is killed. What it says is shown when a test fails.
//!
//! What runs, as installed and measured on two cores (`tests/servers/install.py` has the versions, `launch.py` beside it
//! writes the configurations and executes the servers):
//!
//! | Server | Package | Installed | Ready after | How it is started |
//! |---|---|---|---|---|
//! | Triton 2.51.0 | nvidia-pytriton 0.7.0 | 20 s, 351 MiB | 2 s | `tritonserver --model-repository=DIR/models --backend-directory=DIR/backends …`, Python backend only, its own shared memory and ours on |
//! | MLServer 1.7.1 | mlserver 1.7.1 | 28 s, 295 MiB | 3 s | `mlserver start DIR`, no parallel workers |
//! | TorchServe 0.12.0 | torchserve 0.12.0, Java 17 | 8 s, 159 MiB | 5 s | `java … org.pytorch.serve.ModelServer -f DIR/config.properties -ncs`, tokens off, no snapshots |
//! | onnxruntime 1.32.0 | onnxruntime 1.32.0 | 11 s, 169 MiB | | in Triton's Python backend, for the model `photos` |
//! | perf_analyzer 2.41.1 | tritonclient 2.41.1, and libb64 of Debian | 14 s, 140 MiB | | a program of Triton's, see `tests/perf_analyzer.rs` |
//! | clients | tritonclient 2.73.0, kserve 0.21.0 | 40 to 100 s, 462 MiB | | a process each: their protobuf names collide |
//!
//! What is odd about them, and stays so:
//! - Triton answers errors of a model with status 500, TorchServe with 503 and "Prediction failed", MLServer with a 500 of
//!   its web framework that has no JSON body. TorchServe's first lines complain of a missing `nvidia-smi`.
//! - MLServer speaks JSON only over HTTP, wants `content-type: application/json`, and tells no versions, inputs or
//!   outputs of a custom runtime.
//! - TorchServe's workers import PyTorch only to ask whether an answer is a tensor; its wheel for Linux needs gigabytes of
//!   CUDA, so they find a stand-in of one empty class (`tests/servers/torch`). Its models are handlers without PyTorch.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use tempfile::TempDir;

use super::process::Process;
use super::wire::{Message, Wire, get};
use super::{own_ip, wait_until};

mod mlserver;
mod torchserve;
mod triton;

pub use mlserver::MlServer;
pub use torchserve::TorchServe;
pub use triton::Triton;

const HTTP: u16 = 8000;
const GRPC: u16 = 8001;
const METRICS: u16 = 8002;
const MANAGEMENT: u16 = 8003;

/// Python, Java and their imports on a machine that does ten things at once.
const START: Duration = Duration::from_secs(60);
/// How long a server may take to end in good order.
const END: Duration = Duration::from_secs(8);
/// How often it is asked whether it has.
const LOOK: Duration = Duration::from_millis(20);

/// The model `rowsum` under a name of its own: exact arithmetic on rows (`tests/servers/rowsum.py`).
///
/// A row in: `values` FP32 `[width]`, and optional `factor` INT64 `[1]` and `label` BYTES `[1]`. A row out: `total` INT64
/// `[1]`, `scaled` FP32 `[width]`, `note` BYTES `[1]`.
#[derive(Clone, Debug, Serialize)]
pub struct Model {
    name: String,
    max_batch: u32,
    batches: bool,
    delay_us: u64,
    fixed_us: u64,
    row_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    poison: Option<f32>,
    width: i64,
    instances: u32,
    kind: &'static str,
    versions: u32,
}

impl Model {
    /// Up to 32 rows an execution, one execution at a time, no batching by the server, rows of any width, and no pause.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            max_batch: 32,
            batches: false,
            delay_us: 0,
            fixed_us: 0,
            row_us: 0,
            poison: None,
            width: -1,
            instances: 1,
            kind: "rowsum",
            versions: 1,
        }
    }

    /// The model `kinds` under a name of its own (`tests/servers/kinds.py`): every datatype, turned around. Not on TorchServe.
    pub fn kinds(name: &str) -> Self {
        Self { kind: "kinds", ..Self::new(name) }
    }

    /// The model `pixels`: gives back the bits of each tensor, half-precision numbers of 3 by 224 by 224, and their sum. On
    /// Triton alone.
    pub fn pixels(name: &str) -> Self {
        Self { kind: "pixels", ..Self::new(name) }
    }

    /// The model `photos` (`tests/models/photos.py`), run by onnxruntime in the Python backend: half-precision numbers of 3 by 224
    /// by 224, and the scores of ten photographs. On Triton alone.
    pub fn photos(name: &str) -> Self {
        Self { kind: "photos", ..Self::new(name) }
    }

    /// The same, whose metadata have an input `image` too, which a sidecar makes `pixels` of.
    pub fn images(name: &str) -> Self {
        Self { kind: "images", ..Self::new(name) }
    }

    /// In so many versions. Not on TorchServe.
    pub fn versions(self, count: u32) -> Self {
        Self { versions: count, ..self }
    }

    /// At most so many rows an execution; 0: its tensors have no batch dimension (Triton).
    pub fn max_batch(self, rows: u32) -> Self {
        Self { max_batch: rows, ..self }
    }

    /// The server batches by itself, and waits so long for a batch to be full.
    pub fn batches(self, delay: Duration) -> Self {
        Self { batches: true, delay_us: us(delay), ..self }
    }

    /// SIMULATED: what an execution takes, slept.
    pub fn takes(self, fixed: Duration, row: Duration) -> Self {
        Self { fixed_us: us(fixed), row_us: us(row), ..self }
    }

    /// A row that has this value fails the whole execution.
    pub fn poison(self, value: f32) -> Self {
        Self { poison: Some(value), ..self }
    }

    /// How many values a row has.
    pub fn width(self, values: u32) -> Self {
        Self { width: values.into(), ..self }
    }

    /// How many executions go on at once.
    pub fn instances(self, count: u32) -> Self {
        Self { instances: count, ..self }
    }
}

fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap()
}

/// The models that most tests want: `rowsum`, `rowsum-dynamic` which the server batches, `rowsum-poison` which fails with a
/// row that holds [`POISON`], each 2 ms an execution and 50 µs a row.
pub fn models() -> Vec<Model> {
    let model = |name| Model::new(name).takes(Duration::from_millis(2), Duration::from_micros(50));
    vec![
        model("rowsum"),
        model("rowsum-dynamic").batches(Duration::from_millis(1)),
        model("rowsum-poison").poison(POISON),
    ]
}

/// What `rowsum-poison` fails on.
pub const POISON: f32 = 666.0;

/// A file beside the servers' tests.
pub fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/servers").join(name)
}

/// The Python that has `tritonclient` and `kserve`.
pub fn clients() -> PathBuf {
    venv("clients").join("bin/python")
}

/// A venv of `install.py`, by the first part of its name.
pub fn venv(name: &str) -> PathBuf {
    let find = format!("import install, sys; sys.stdout.write(str(install.venv('{name}') or ''))");
    let output =
        std::process::Command::new("python3").args(["-c", &find]).current_dir(file("")).output().unwrap();
    let venv = String::from_utf8(output.stdout).unwrap();
    assert!(!venv.is_empty(), "the {name} are not installed: run `make tools`");
    venv.into()
}

/// What all servers have in common.
#[derive(Debug)]
struct Server {
    process: Process,
    ip: IpAddr,
    _folder: TempDir,
}

impl Server {
    /// Starts one at an address of its own and waits until `ready` answers.
    async fn start(name: &str, models: &[Model], ready: &str) -> Self {
        Self::start_at(IpAddr::V4(own_ip()), name, models, ready).await
    }

    /// The same at an address.
    async fn start_at(ip: IpAddr, name: &str, models: &[Model], ready: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let launch = file("launch.py");
        let args = [
            launch.to_str().unwrap(),
            name,
            "--dir",
            folder.path().to_str().unwrap(),
            "--ip",
            &ip.to_string(),
            "--models",
            &serde_json::to_string(models).unwrap(),
        ]
        .map(str::to_owned);
        let process = Process::start(name, Path::new("python3"), &args, folder.path());
        let mut server = Self { process, ip, _folder: folder };
        let http = server.at(HTTP);
        let process = &mut server.process;
        wait_until(&format!("{name} is ready"), START, async || {
            assert!(
                process.runs(),
                "{name} ended at once; if it is missing, run `make tools`: {}",
                process.said()
            );
            get(http, ready).await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
        server
    }

    fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, port)
    }
}

impl Drop for Server {
    #[allow(clippy::disallowed_methods, reason = "nothing can be awaited in a destructor")]
    fn drop(&mut self) {
        // A server that is killed leaves its workers to find out by themselves, and their shared memory to the next
        // Triton that starts.
        if self.process.runs() {
            self.process.terminate();
        }
        let mut looks = END.as_millis() / LOOK.as_millis();
        while self.process.runs() && looks > 0 {
            std::thread::sleep(LOOK);
            looks -= 1;
        }
        self.process.kill();
    }
}

/// One POST of JSON over a connection of its own.
pub async fn post(address: SocketAddr, path: &str, json: &serde_json::Value) -> io::Result<Message> {
    let body = json.to_string();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n",
        body.len()
    );
    Wire::connect(address).await.ask(head + &body).await
}
