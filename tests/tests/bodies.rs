//! Large bodies, many at a time and at different speeds: whoever reads slowly is waited for with little memory, and holds up nobody else.
//!
//! 8 MiB each, or a whole GiB with `PENSTOCK_THOROUGH=1` (some minutes, and only sensible with release builds).

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use penstock_api::names::annotation;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::{Static, one_hop};
use penstock_tests::testkit::wire::Wire;
use penstock_tests::testkit::{PATIENCE, wait_until};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Bodies at a time.
const BODIES: usize = 64;
/// Of these, slow ones: they stop at once, and go on when all others are through.
const SLOW: usize = 24;
/// What a sidecar may need for all of it beyond what it has at rest, KiB: 16 MiB in a release build, so 96 in all.
const MEMORY: u64 = 80 << 10;
/// How much is written or read at once.
const PIECE: usize = 256 << 10;

fn size() -> u64 {
    if std::env::var_os("PENSTOCK_THOROUGH").is_some() { 1 << 30 } else { 8 << 20 }
}

/// Sends `/down` a body of the size that stands in its path, and says of any other request how many bytes it had. Those to `/slow` are not read
/// until `reads` says so, and counted in `waiting`.
async fn serve(mut client: Wire, reads: Arc<AtomicBool>, waiting: Arc<AtomicUsize>) {
    while let Ok(head) = client.head().await {
        let path = head.first.split(' ').nth(1).unwrap_or_default().to_owned();
        if let Some(bytes) = path.strip_prefix("/down/") {
            let mut left: u64 = bytes.parse().unwrap();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {left}\r\n\r\n");
            client.send(head).await.unwrap();
            let piece = vec![b'd'; PIECE];
            while left > 0 {
                let now = left.min(PIECE as u64);
                if client.io.write_all(&piece[..now as usize]).await.is_err() {
                    return;
                }
                left -= now;
            }
            continue;
        }
        let mut left: u64 = head.get("content-length").map_or(0, |length| length.parse().unwrap());
        let all = left;
        waiting.fetch_add(usize::from(path == "/slow"), Relaxed);
        while path == "/slow" && !reads.load(Relaxed) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        while left > 0 {
            let Ok(piece) = client.bytes(left.min(PIECE as u64) as usize).await else { return };
            left -= piece.len() as u64;
        }
        let text = all.to_string();
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
        if client.send(answer).await.is_err() {
            return;
        }
    }
}

struct Stage {
    mesh: Mesh,
    /// Whether the server reads what is slow.
    reads: Arc<AtomicBool>,
    /// What the sidecars need at rest, KiB.
    rest: [u64; 2],
    _origin: Origin,
}

async fn stage() -> Stage {
    let mut mesh = Mesh::default()
        .service("shop", &[(annotation::TIMEOUT, "request=10m,per-try=10m,idle=5m")])
        .pod("client", None)
        .pod("server", Some("shop"))
        .start()
        .await;
    let reads = Arc::new(AtomicBool::new(false));
    let slowly = Arc::clone(&reads);
    let origin = Origin::start_at(mesh.application("server"), move |client| {
        serve(client, Arc::clone(&slowly), Arc::default())
    })
    .await;
    mesh.reaches("client", "shop").await;
    let rest = ["client", "server"].map(|pod| mesh.sidecar(pod).memory_kib());
    Stage { mesh, reads, rest, _origin: origin }
}

/// Reads a body of `left` bytes, and throws it away.
async fn read(wire: &mut Wire, mut left: u64) {
    let mut piece = vec![0; PIECE];
    while left > 0 {
        let wanted = left.min(PIECE as u64) as usize;
        let read = wire.io.read(&mut piece[..wanted]).await.unwrap();
        assert_ne!(read, 0, "{left} bytes are missing");
        left -= read as u64;
    }
}

/// The most memory that both sidecars are seen to need until `work` is done, KiB.
async fn watched(mesh: &mut Mesh, mut work: JoinSet<()>) -> [u64; 2] {
    let mut most = [0; 2];
    while !work.is_empty() {
        let step = tokio::time::timeout(Duration::from_millis(20), work.join_next()).await;
        if let Ok(Some(done)) = step {
            done.unwrap();
        }
        for (most, pod) in most.iter_mut().zip(["client", "server"]) {
            *most = (*most).max(mesh.sidecar(pod).memory_kib());
        }
    }
    most
}

fn is_small(rest: [u64; 2], most: [u64; 2]) {
    println!("the sidecars needed {most:?} KiB, and {rest:?} at rest");
    let grown = [0, 1].map(|pod| most[pod].saturating_sub(rest[pod]));
    assert!(grown.iter().all(|grown| *grown < MEMORY), "grown by {grown:?} KiB, {MEMORY} are allowed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pain_6_downloads_of_any_size_need_little_memory_and_slow_readers_hold_up_nobody() {
    let Stage { mut mesh, rest: resting, _origin, .. } = stage().await;
    let size = size();
    let mut slow = Vec::new();
    for _ in 0..SLOW {
        let mut wire = mesh.client("client").await;
        wire.send(format!("GET /down/{size} HTTP/1.1\r\nhost: shop.test\r\n\r\n")).await.unwrap();
        assert_eq!(wire.head().await.unwrap().status(), 200);
        slow.push(wire);
    }
    // All that can be under way to those that do not read is under way.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let began = Instant::now();
    let mut fast = JoinSet::new();
    for _ in SLOW..BODIES {
        let mut wire = mesh.client("client").await;
        fast.spawn(async move {
            wire.send(format!("GET /down/{size} HTTP/1.1\r\nhost: shop.test\r\nconnection: close\r\n\r\n"))
                .await
                .unwrap();
            let head = wire.head().await.unwrap();
            assert_eq!(head.status(), 200);
            let known = wire.buffered() as u64;
            read(&mut wire, size - known).await;
        });
    }
    let most = tokio::time::timeout(Duration::from_secs(300), watched(&mut mesh, fast)).await;
    let most = most.expect("those who read wait for those who do not");
    println!(
        "{} bodies of {size} bytes beside {SLOW} that nobody read: {:?}",
        BODIES - SLOW,
        began.elapsed()
    );
    is_small(resting, most);
    let mut rest = JoinSet::new();
    for mut wire in slow {
        rest.spawn(async move {
            let known = wire.buffered() as u64;
            read(&mut wire, size - known).await;
        });
    }
    is_small(resting, watched(&mut mesh, rest).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pain_6_uploads_of_any_size_need_little_memory_and_slow_servers_hold_up_nobody() {
    let Stage { mut mesh, reads, rest: resting, _origin } = stage().await;
    let size = size();
    let upload = |path: &'static str, mut wire: Wire| async move {
        let head = format!("POST {path} HTTP/1.1\r\nhost: shop.test\r\ncontent-length: {size}\r\n\r\n");
        wire.send(head).await.unwrap();
        let piece = vec![b'u'; PIECE];
        let mut left = size;
        while left > 0 {
            let now = left.min(PIECE as u64);
            wire.io.write_all(&piece[..now as usize]).await.unwrap();
            left -= now;
        }
        let answer = tokio::time::timeout(Duration::from_secs(300), wire.response()).await.unwrap().unwrap();
        assert_eq!((answer.status(), answer.text()), (200, size.to_string()));
    };
    let mut slow = JoinSet::new();
    for _ in 0..SLOW {
        slow.spawn(upload("/slow", mesh.client("client").await));
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let began = Instant::now();
    let mut fast = JoinSet::new();
    for _ in SLOW..BODIES {
        fast.spawn(upload("/up", mesh.client("client").await));
    }
    let most = tokio::time::timeout(Duration::from_secs(300), watched(&mut mesh, fast)).await;
    let most = most.expect("those that are read wait for those that are not");
    println!(
        "{} bodies of {size} bytes beside {SLOW} that nobody read: {:?}",
        BODIES - SLOW,
        began.elapsed()
    );
    is_small(resting, most);
    reads.store(true, Relaxed);
    is_small(resting, watched(&mut mesh, slow).await);
}

/// What a proxy of the next test may have, beyond what it has at rest, bytes.
const MORE: u64 = 24 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_without_memory_refuses_what_is_new_and_goes_on_with_what_it_has() {
    let (reads, waiting) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (slowly, waits) = (Arc::clone(&reads), Arc::clone(&waiting));
    let origin = Origin::start(move |client| serve(client, Arc::clone(&slowly), Arc::clone(&waits))).await;
    let rest = one_hop(origin.address, "http").await.process.memory_kib() << 10;
    let proxy = Static::new("proxy")
        .listener("http", None, "application")
        .upstream("application", &[origin.address], "http1", None)
        .args(&["--max-memory", &(rest + MORE).to_string()])
        .start()
        .await;
    let get = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut known = proxy.client().await;
    assert_eq!(known.ask(get).await.unwrap().status(), 200);

    // More than there is room for: of each stream its window is full, since what sockets hold of it is full too.
    let stream = TcpStream::connect(proxy.front()).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut begun = Vec::new();
    let upload = Bytes::from(vec![b'u'; 8 << 20]);
    for _ in 0..2 * (MORE >> 20) {
        let mut sender = sender.clone().ready().await.unwrap();
        let request =
            http::Request::post("http://a/slow").header("content-length", upload.len()).body(()).unwrap();
        begun.push(sender.send_request(request, false).unwrap());
    }
    wait_until("all have begun", PATIENCE, async || waiting.load(Relaxed) == begun.len()).await;
    let mut uploads = JoinSet::new();
    for (answer, mut body) in begun {
        body.send_data(upload.clone(), true).unwrap();
        uploads.spawn(async move { answer.await.unwrap().status() });
    }
    let refused = "503 out-of-memory";
    wait_until("what is new is refused", PATIENCE, async || {
        let answer = known.ask(get).await.unwrap();
        format!("{} {}", answer.status(), answer.reason().unwrap_or_default()) == refused
    })
    .await;
    proxy.logs("refusing new requests").await;

    // What was there before is served, and then so is what is new.
    reads.store(true, Relaxed);
    assert!(uploads.join_all().await.iter().all(|status| *status == 200));
    drop(sender);
    connection.await.unwrap().unwrap();
    wait_until("there is memory again", PATIENCE, async || known.ask(get).await.unwrap().status() == 200)
        .await;
}
