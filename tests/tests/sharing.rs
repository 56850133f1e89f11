//! Requests share executions: what is in flight is executed once, what was answered lately not again, and what differs in
//! its rows alone is executed together. Clients get exactly what they would have got alone.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_inference::oip::{InferRequest, InferResponse, Tensor, rest};
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::proxy::metric;
use penstock_tests::testkit::wire::{Message, get};
use penstock_tests::testkit::{PATIENCE, wait_until};
use tempfile::TempDir;
use tokio::time::Instant;

const REPOSITORY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/repository");

/// A client, and the digits behind a sidecar; an execution takes some time, as a GPU's would (simulated).
struct Bed {
    mesh: Mesh,
    _server: Process,
    _folder: TempDir,
}

impl Bed {
    async fn start(annotations: &[(&'static str, &str)], delay: &str) -> Self {
        let mesh =
            Mesh::default().pod("client", None).service("digits", annotations).pod("a", Some("digits"));
        let address = mesh.application("a").to_string();
        let folder = tempfile::tempdir().unwrap();
        let server = Process::start(
            "modelserver",
            Path::new(env!("CARGO_BIN_EXE_penstock-modelserver")),
            &[
                "--repository",
                REPOSITORY,
                "--only",
                "digits:1",
                "--listen",
                &address,
                "--delay-model",
                delay,
                "--queue",
                "1000",
                "--threads",
                "4",
            ],
            folder.path(),
        );
        let mesh = mesh.start().await;
        wait_until("the model server answers", PATIENCE, async || {
            get(mesh.application("a"), "/v2/health/ready").await.is_ok_and(|answer| answer.status() == 200)
        })
        .await;
        let bed = Self { mesh, _server: server, _folder: folder };
        // The sidecar learns what the model takes when it is first asked for it.
        wait_until("the digits are served through both sidecars", PATIENCE, async || {
            bed.ask(&image(0, 1), "").await.status() == 200
        })
        .await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        bed
    }

    async fn ask(&self, request: &InferRequest, headers: &str) -> Message {
        let body = rest::encode_request(request, true).unwrap();
        let head = format!(
            "POST /v2/models/digits/versions/1/infer HTTP/1.1\r\nhost: digits.test\r\n{headers}\
             inference-header-content-length: {}\r\ncontent-length: {}\r\n\r\n",
            body.header_length.unwrap(),
            body.length(),
        );
        let mut client = self.mesh.client("client").await;
        client.ask([head.as_bytes(), &body.into_bytes()].concat()).await.unwrap()
    }

    /// The same, and the answer says with how many rows it was executed.
    async fn ask_owned(&self, request: InferRequest) -> Message {
        self.ask(&request, "penstock-batch: show\r\n").await
    }

    async fn executions(&self) -> u64 {
        let page = get(self.mesh.application("a"), "/metrics").await.unwrap().text();
        let line = page.lines().find(|line| line.starts_with("nv_inference_exec_count{")).unwrap();
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }
}

/// So many rows of images that no other seed has.
fn image(seed: u32, rows: u64) -> InferRequest {
    let pixels = (0..rows * 64).map(|at| ((at * 7 + u64::from(seed) * 13) % 17) as f32);
    InferRequest {
        id: Some(format!("id-{seed}")),
        inputs: vec![Tensor::fp32("image", vec![rows, 64], pixels)],
        ..InferRequest::default()
    }
}

fn answer(message: &Message) -> InferResponse {
    assert_eq!(message.status(), 200, "{message:?}");
    let length = message.head.get("inference-header-content-length").map(|length| length.parse().unwrap());
    rest::decode_response(&message.body.clone().into(), length).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_many_are_executed_together_and_each_gets_its_own() {
    let bed = Bed::start(&[(annotation::BATCH, "max=32")], "fixed=50ms,row=1ms").await;
    let mut alone = Vec::new();
    for seed in 0..20 {
        let message = bed.ask(&image(seed, 1 + u64::from(seed % 3)), "penstock-batch: off\r\n").await;
        assert_eq!(message.head.get("penstock-batch"), None);
        alone.push(answer(&message));
    }
    let before = bed.executions().await;
    let together = (0..20).map(|seed| bed.ask_owned(image(seed, 1 + u64::from(seed % 3))));
    let together = futures_util::future::join_all(together).await;
    let executions = bed.executions().await - before;
    assert!(executions <= 5, "{executions} executions of 20 requests");
    let mut largest = 0;
    for (seed, (message, alone)) in together.iter().zip(&alone).enumerate() {
        let got = answer(message);
        assert_eq!(got.id.as_deref(), Some(format!("id-{seed}").as_str()));
        assert_eq!(got.outputs, alone.outputs, "request {seed}");
        let shown = message.head.get("penstock-batch").unwrap();
        let rows: u32 = shown.split_once(";rows=").unwrap().1.parse().unwrap();
        largest = largest.max(rows);
    }
    assert!(largest > 8, "the largest execution had {largest} rows");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_server_is_sent_what_has_waited_long_enough() {
    let bed = Bed::start(&[(annotation::BATCH, "max=32,delay=100ms,concurrent=1")], "fixed=1s,row=0ms").await;
    let begun = Instant::now();
    let first = bed.ask_owned(image(1, 1));
    let second = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let message = bed.ask_owned(image(2, 1)).await;
        (message, begun.elapsed())
    };
    let (first, (second, took)) = tokio::join!(first, second);
    answer(&first);
    answer(&second);
    // It did not wait for the first, which was executing for a second, but no less than it was to.
    assert!(took >= Duration::from_millis(1140) && took < Duration::from_millis(1800), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_is_executed_once_and_remembered() {
    let bed =
        Bed::start(&[(annotation::COALESCE, "single-flight,cache=16Mi/1m")], "fixed=300ms,row=0ms").await;
    let before = bed.executions().await;
    let same = futures_util::future::join_all((0..50).map(|_| bed.ask_owned(image(7, 1)))).await;
    assert_eq!(bed.executions().await - before, 1);
    let first = answer(&same[0]);
    let said =
        |word: &str| same.iter().filter(|message| message.head.get("penstock-cache") == Some(word)).count();
    assert_eq!((said("miss"), said("coalesced")), (1, 49));
    assert!(same.iter().all(|message| answer(message) == first));
    // Later it is remembered, but not for who wants it anew.
    let again = bed.ask(&image(7, 1), "").await;
    assert_eq!(again.head.get("penstock-cache"), Some("hit"));
    assert_eq!(answer(&again), first);
    assert_eq!(bed.executions().await - before, 1);
    let anew = bed.ask(&image(7, 1), "cache-control: no-cache\r\n").await;
    assert_eq!(anew.head.get("penstock-cache"), Some("miss"));
    assert_eq!(bed.executions().await - before, 2);
    // Nor for who wants it no older than now, or executed alone; and it was answered in no execution of now.
    let anew = bed.ask(&image(7, 1), "cache-control: max-age=0\r\n").await;
    assert_eq!(anew.head.get("penstock-cache"), Some("miss"));
    let alone = bed.ask(&image(7, 1), "penstock-batch: off\r\n").await;
    assert_eq!(alone.head.get("penstock-cache"), Some("miss"));
    assert_eq!(bed.executions().await - before, 4);
    let again = bed.ask_owned(image(7, 1)).await;
    assert_eq!((again.head.get("penstock-cache"), again.head.get("penstock-batch")), (Some("hit"), None));
    // Another image is another question.
    assert_eq!(bed.ask(&image(8, 1), "").await.head.get("penstock-cache"), Some("miss"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_is_missed_by_nobody() {
    let annotations = [(annotation::BATCH, "max=32"), (annotation::COALESCE, "single-flight")];
    let bed = Bed::start(&annotations, "fixed=200ms,row=0ms").await;
    for round in 0..3 {
        // The leader of the same question, and half of the members of a batch, leave in the middle.
        let leader = tokio::time::timeout(Duration::from_millis(60), bed.ask_owned(image(100 + round, 1)));
        let followers = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            futures_util::future::join_all((0..5).map(|_| bed.ask_owned(image(100 + round, 1)))).await
        };
        let leavers = futures_util::future::join_all((0..10).map(|seed| {
            tokio::time::timeout(
                Duration::from_millis(40 + 20 * u64::from(seed)),
                bed.ask_owned(image(200 + seed, 1)),
            )
        }));
        let stayers = futures_util::future::join_all((0..10).map(|seed| bed.ask_owned(image(300 + seed, 1))));
        let (left, followed, _, stayed) = tokio::join!(leader, followers, leavers, stayers);
        assert!(left.is_err(), "the leader was to leave");
        for message in followed.iter().chain(&stayed) {
            answer(message);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_bad_row_fails_alone() {
    let bed = Bed::start(&[(annotation::BATCH, "max=32")], "fixed=50ms,row=0ms").await;
    // 63 pixels are no image; the model refuses them with its own words.
    let mut bad = image(1, 1);
    bad.inputs[0] = Tensor::fp32("image", vec![1, 63], (0..63).map(|at| at as f32));
    let refused = bed.ask(&bad, "penstock-batch: off\r\n").await;
    assert_eq!(refused.status(), 400, "{refused:?}");
    let bad = bed.ask_owned(bad);
    let good = futures_util::future::join_all((0..10).map(|seed| bed.ask_owned(image(seed, 1))));
    let (bad, good) = tokio::join!(bad, good);
    assert_eq!((bad.status(), bad.text()), (400, refused.text()));
    good.iter().for_each(|message| drop(answer(message)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_all_are_refused_nobody_waits_for_the_others_refusals() {
    let mesh = Mesh::default()
        .pod("client", None)
        .service("digits", &[(annotation::BATCH, "max=32,concurrent=1")])
        .pod("a", Some("digits"));
    let origin = Origin::start_at(mesh.application("a"), |mut client| async move {
        while let Ok(request) = client.request().await {
            let answer = if request.head.first.contains("/infer ") {
                tokio::time::sleep(Duration::from_millis(200)).await;
                "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\nno"
            } else {
                "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
            };
            if client.send(answer).await.is_err() {
                return;
            }
        }
    });
    let _origin = origin.await;
    let mesh = mesh.start().await;
    mesh.reaches("client", "digits").await;
    let ask = async |seed| {
        let body = rest::encode_request(&image(seed, 1), false).unwrap().into_bytes();
        let head = format!(
            "POST /v2/models/digits/infer HTTP/1.1\r\nhost: digits.test\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        mesh.client("client").await.ask([head.as_bytes(), &body].concat()).await.unwrap().status()
    };
    assert_eq!(ask(0).await, 400);
    // It is learnt what the server takes.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let begun = Instant::now();
    let refused = futures_util::future::join_all((1..33).map(ask)).await;
    assert_eq!(refused, [400; 32]);
    let cuts = metric(mesh.admin("a"), "penstock_batch_bisections_total", &[]);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}: one after the other", begun.elapsed());
    assert!(cuts.await > 0.0);
}

/// A language model that writes ten tokens, and how often it was asked.
async fn llm(annotations: &[(&'static str, &str)]) -> (Mesh, Origin, Arc<AtomicUsize>) {
    let mesh = Mesh::default().pod("client", None).service("llm", annotations).pod("a", Some("llm"));
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let origin = Origin::start_at(mesh.application("a"), move |mut client| {
        let count = Arc::clone(&count);
        async move {
            while let Ok(request) = client.request().await {
                if !request.head.first.starts_with("POST") {
                    client.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                    continue;
                }
                count.fetch_add(1, Relaxed);
                let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
                client.send(head).await.unwrap();
                for token in 0..10 {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    let event = format!("data: {token}\n\n");
                    if client.send(format!("{:x}\r\n{event}\r\n", event.len())).await.is_err() {
                        return;
                    }
                }
                if client.send("0\r\n\r\n").await.is_err() {
                    return;
                }
            }
        }
    });
    let origin = origin.await;
    let mesh = mesh.start().await;
    mesh.reaches("client", "llm").await;
    (mesh, origin, asked)
}

async fn complete(mesh: &Mesh, body: &str) -> Message {
    complete_at(mesh, "/v1/completions", body).await
}

async fn complete_at(mesh: &Mesh, path: &str, body: &str) -> Message {
    let head = format!("POST {path} HTTP/1.1\r\nhost: llm.test\r\ncontent-length: {}\r\n\r\n", body.len());
    mesh.client("client").await.ask(head + body).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_is_read_by_all_who_asked_the_same() {
    let (mesh, _origin, asked) = llm(&[(annotation::COALESCE, "single-flight,cache=1Mi/1m")]).await;
    let body = r#"{"model":"m","prompt":"why?","temperature":0,"stream":true}"#;
    let whole: String = (0..10).map(|token| format!("data: {token}\n\n")).collect();
    let same = futures_util::future::join_all((0..20).map(|nth| {
        let mesh = &mesh;
        async move {
            // Some come when it has begun, and some leave in the middle, the first of them included.
            tokio::time::sleep(Duration::from_millis(10 * nth)).await;
            let asked = complete(mesh, body);
            if nth % 4 == 0 {
                let _ = tokio::time::timeout(Duration::from_millis(100), asked).await;
                return None;
            }
            Some(asked.await)
        }
    }))
    .await;
    assert_eq!(asked.load(Relaxed), 1);
    let stayed: Vec<Message> = same.into_iter().flatten().collect();
    assert_eq!(stayed.len(), 15);
    let mut led = 0;
    for message in &stayed {
        assert_eq!((message.status(), message.text()), (200, whole.clone()));
        match message.head.get("penstock-cache") {
            Some("coalesced") => {}
            // On a busy machine the one that left may not have been the first to arrive.
            Some("miss") => led += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(led <= 1, "{led} were executed");
    // Written in another order it is the same, and remembered.
    let again = complete(&mesh, r#"{ "stream":true, "temperature":0.0, "prompt":"why?", "model":"m"}"#).await;
    assert_eq!(again.head.get("penstock-cache"), Some("miss"), "0 and 0.0 are not the same JSON");
    let again = complete(&mesh, r#"{ "stream":true, "temperature":0, "prompt":"why?", "model":"m"}"#).await;
    assert_eq!((again.head.get("penstock-cache"), again.text()), (Some("hit"), whole));
    assert_eq!(asked.load(Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_may_come_out_otherwise_is_asked_each_time() {
    let (mesh, _origin, asked) = llm(&[(annotation::COALESCE, "single-flight,cache=1Mi/1m")]).await;
    let body = r#"{"model":"m","prompt":"a poem","temperature":0.7}"#;
    let (one, other) = tokio::join!(complete(&mesh, body), complete(&mesh, body));
    assert_eq!((one.status(), other.status()), (200, 200));
    assert_eq!((one.head.get("penstock-cache"), asked.load(Relaxed)), (None, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_query_says_is_asked_too() {
    let (mesh, _origin, asked) = llm(&[(annotation::COALESCE, "single-flight,cache=1Mi/1m")]).await;
    let body = r#"{"model":"m","prompt":"why?","temperature":0}"#;
    let at = |path: &'static str| complete_at(&mesh, path, body);
    let (one, other) = tokio::join!(at("/v1/completions?key=one"), at("/v1/completions?key=other"));
    assert_eq!((one.status(), other.status(), asked.load(Relaxed)), (200, 200, 2));
    assert_eq!(at("/v1/completions?key=one").await.head.get("penstock-cache"), Some("hit"));
    assert_eq!(asked.load(Relaxed), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_leaves_the_client_once() {
    let annotations = [(annotation::COALESCE, "single-flight,outbound")];
    let bed = Bed::start(&annotations, "fixed=300ms,row=0ms").await;
    let shared = async || {
        metric(bed.mesh.admin("client"), "penstock_coalesced_total", &["result=\"coalesced\""]).await
    };
    let (before, executed) = (shared().await, bed.executions().await);
    let same = futures_util::future::join_all((0..50).map(|_| bed.ask_owned(image(7, 1)))).await;
    assert_eq!(bed.executions().await - executed, 1);
    // Its page of metrics is up to a second old.
    wait_until("the client's sidecar has sent it once", PATIENCE, async || shared().await - before == 49.0)
        .await;
    let first = answer(&same[0]);
    assert!(same.iter().all(|message| answer(message) == first));
    // Another id is another request to the byte, and meets the first where the server is.
    let mut other = image(7, 1);
    other.id = Some("other".to_owned());
    let executed = bed.executions().await;
    let (one, two) = tokio::join!(bed.ask_owned(image(7, 1)), bed.ask_owned(other));
    assert_eq!(bed.executions().await - executed, 1);
    assert_eq!((answer(&one).id.as_deref(), answer(&two).id.as_deref()), (Some("id-7"), Some("other")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_leaves_the_client_once_and_goes_on_when_the_first_has_left() {
    let (mesh, _origin, asked) = llm(&[(annotation::COALESCE, "single-flight,outbound")]).await;
    let body = r#"{"model":"m","prompt":"why?","temperature":0,"stream":true}"#;
    let whole: String = (0..10).map(|token| format!("data: {token}\n\n")).collect();
    let first = tokio::time::timeout(Duration::from_millis(100), complete(&mesh, body));
    let others = futures_util::future::join_all((1..10).map(|nth| {
        let mesh = &mesh;
        async move {
            tokio::time::sleep(Duration::from_millis(10 * nth)).await;
            complete(mesh, body).await
        }
    }));
    let (first, others) = tokio::join!(first, others);
    assert!(first.is_err(), "it was to leave");
    assert_eq!(asked.load(Relaxed), 1);
    for message in &others {
        assert_eq!((message.status(), message.text()), (200, whole.clone()));
        assert_eq!(message.head.get("penstock-cache"), Some("coalesced"));
    }
    // All of them leave, and the server learns it: what is asked after that is asked anew.
    let left = tokio::time::timeout(Duration::from_millis(100), complete(&mesh, body)).await;
    assert!(left.is_err());
    wait_until("what nobody waits for is let go", PATIENCE, async || {
        metric(mesh.admin("client"), "penstock_requests_in_flight", &[]).await == 0.0
    })
    .await;
    assert_eq!(complete(&mesh, body).await.text(), whole);
    assert_eq!(asked.load(Relaxed), 3);
}
