//! perf_analyzer, with which people measure Triton, through both sidecars to the real one: photographs as BYTES, of which the
//! model's sidecar makes tensors, and tensors with and without its shared memory, over HTTP. (Over gRPC it cannot be told which host to ask
//! for at the sidecar's address; a pod, where addresses are redirected, needs no such thing.) What it sends is answered, all of
//! it; what it says of rates is not looked at, since the machine does ten things at once.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::Path;

use base64::Engine as _;
use penstock_tests::testkit::mesh::{Mesh, NAMESPACE};
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::servers::{Model, Triton, venv};
use penstock_tests::testkit::{PATIENCE, wait_until};
use tokio::process::Command;

/// Requests of a window, of which it takes three to see whether they are alike.
const WINDOW: &str = "20";
/// Clients at once.
const AT_ONCE: &str = "4";

/// The program with the libraries that it is linked with, told to ask `model` this way.
fn perf_analyzer(model: &str, args: &[&str]) -> Command {
    let venv = venv("perf");
    let site = std::fs::read_dir(venv.join("lib")).unwrap().map(|entry| entry.unwrap().path());
    let site = site.map(|python| python.join("site-packages")).find(|site| site.exists()).unwrap();
    let debian = venv.join("lib/debian/usr/lib/x86_64-linux-gnu");
    let libraries = [debian, site.join("nvidia/cuda_runtime/lib")];
    let mut command = Command::new(venv.join("bin/perf_analyzer"));
    command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries).unwrap());
    command.args(["-m", model, "--concurrency-range", AT_ONCE, "--measurement-mode", "count_windows"]);
    // Three windows are enough, however much they differ.
    command.args(["--measurement-request-count", WINDOW, "-r", "3", "-s", "999"]).args(args);
    command
}

/// Runs it to its end; how many requests were answered, as it counts.
async fn answered(mut command: Command) -> u64 {
    let output =
        tokio::time::timeout(2 * PATIENCE, command.kill_on_drop(true).output()).await.unwrap().unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said} {complained}");
    let count = said.lines().find_map(|line| line.trim().strip_prefix("Request count: "));
    let count = count.unwrap_or_else(|| panic!("it counted nothing: {said} {complained}")).parse().unwrap();
    println!(
        "{}",
        said.lines().filter(|line| line.contains("count:") || line.contains("Avg ")).collect::<String>()
    );
    count
}

/// What it is to send, in the form that it reads.
fn photographs(folder: &Path) -> String {
    let photos = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/photos");
    let photo = |name| {
        let photo = std::fs::read(photos.join(name)).unwrap();
        // What is in base64 is sent as it is: a tensor of BYTES, of which the length is a part.
        let bytes = [&(photo.len() as u32).to_le_bytes()[..], &photo].concat();
        serde_json::json!({"image": {"b64": base64::engine::general_purpose::STANDARD.encode(bytes)}})
    };
    let data: Vec<_> = ["cat-1.jpg", "rocket-2.jpg", "coffee-1.jpg", "bricks-1.jpg"].map(photo).into();
    let file = folder.join("photographs.json");
    std::fs::write(&file, serde_json::json!({ "data": data }).to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

/// Tensors of which the bits do not matter; it makes up values itself only for inputs that a model needs.
fn pixels(folder: &Path) -> String {
    let bytes: Vec<u8> = (0..3 * 224 * 224_u32).flat_map(|at| [at as u8, 0x3c]).collect();
    let text = base64::engine::general_purpose::STANDARD.encode(bytes);
    let file = folder.join("pixels.json");
    std::fs::write(&file, serde_json::json!({ "data": [{"pixels": {"b64": text}}] }).to_string()).unwrap();
    file.to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn perf_analyzer_measures_through_the_mesh() {
    let mut mesh = Mesh::default().grpc().pod("client", None).service("photos", &[]).pod("a", Some("photos"));
    mesh.file(
        "policy.yaml",
        &format!(
            "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: photos, namespace: {NAMESPACE}}}\n\
             spec:\n  targetRef: {{kind: Service, name: photos}}\n  batch: {{max: 16}}\n  models:\n  - name: images\n    \
             prepare:\n    - {{input: image, tensor: pixels, pipeline: {{preset: imagenet, dtype: f16}}}}\n"
        ),
    );
    let mesh = mesh.start().await;
    let triton =
        Triton::start_at(mesh.application("a").ip(), &[Model::photos("photos"), Model::images("images")])
            .await;
    let (outbound, host) = (mesh.outbound("client").to_string(), format!("Host:photos.{NAMESPACE}"));
    wait_until("Triton is reached through both sidecars", PATIENCE, async || {
        let head = format!("GET /v2/health/ready HTTP/1.1\r\nhost: photos.{NAMESPACE}\r\n\r\n");
        mesh.client("client").await.ask(head).await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    let folder = tempfile::tempdir().unwrap();
    let photographs = photographs(folder.path());

    let pixels = pixels(folder.path());
    let http = ["-i", "http", "-u", &outbound, "-H", &host];
    let mut total = 0;
    for memory in ["none", "system"] {
        let args = [&http[..], &["--shared-memory", memory, "--input-data", &pixels]].concat();
        total += answered(perf_analyzer("photos", &args)).await;
    }
    let images = ["--input-data", &photographs];
    let photographed = answered(perf_analyzer("images", &[&http[..], &images].concat())).await;
    total += photographed;
    // Counts are told once a second.
    counts_are_told().await;
    let counted = async |pod, name, labels: &[&str]| metric(mesh.admin(pod), name, labels).await as u64;
    let prepared = counted("a", "penstock_prepared_total", &["result=\"done\""]).await;
    let good =
        counted("client", "penstock_requests_total", &["direction=\"outbound\"", "class=\"2xx\""]).await;
    println!("{total} requests, {prepared} tensors made");
    assert!(prepared >= photographed, "{prepared} tensors of {photographed} photographs");
    assert!(good >= total, "{good} of {total}");
    assert_eq!(counted("a", "penstock_arena_bytes", &[]).await, 0, "the arena is not empty");
    drop(triton);
}
