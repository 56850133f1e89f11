//! What we accept as HTTP/2 is HTTP/2: all of h2spec's cases, the strict ones too, against a plaintext listener as outbound has it,
//! and against one with mutual TLS as inbound has it.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::SocketAddr;

use penstock_tests::testkit::PATIENCE;
use penstock_tests::testkit::certificates::Authority;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::peers::h2spec;
use penstock_tests::testkit::proxy::Static;
use tokio::io::{AsyncWriteExt as _, copy, split};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// How many cases the suite has.
const CASES: &str = "146 tests";

/// A case that makes headers one byte longer than a frame may be. They are one letter again and again, which HPACK writes in seven
/// bits, so with frames of 256 KiB, as ours may be, they fit, and are refused as headers that are too large.
const FITS: &str = "3: Sends a large size HEADERS frame that exceeds the SETTINGS_MAX_FRAME_SIZE";
/// A case that sends no preface of HTTP/2. Where HTTP/1.1 is spoken as well that is a request without sense: 400, and closed, where
/// the suite reads frames alone.
const OTHER_PROTOCOL: &str = "2: Sends invalid connection preface";

/// Runs the suite, and says which cases failed.
async fn failed(suite: &std::path::Path, address: SocketAddr) -> Vec<String> {
    let run = tokio::process::Command::new(suite)
        .args(["--strict", "--timeout", "5", "--host", &address.ip().to_string()])
        .args(["--port", &address.port().to_string()])
        .kill_on_drop(true)
        .output();
    let output = timeout(PATIENCE * 4, run).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains(CASES), "{said}");
    // What failed is told twice: where it ran, and again at the end with what was expected.
    let (_, failures) = said.split_once("Failures:").unwrap_or_default();
    failures.lines().filter_map(|line| line.trim().strip_prefix("× ")).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plaintext_http2_is_spoken_to_the_letter() {
    let Some(suite) = h2spec() else { return };
    let origin = Origin::mirror().await;
    let proxy = Static::new("outbound")
        .listener("http", None, "application")
        .upstream("application", &[origin.address], "http1", None)
        .start()
        .await;
    assert_eq!(failed(&suite, proxy.front()).await, [OTHER_PROTOCOL, FITS]);
    proxy.is_quiet().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_within_mutual_tls_is_spoken_to_the_letter() {
    let Some(suite) = h2spec() else { return };
    let origin = Origin::mirror().await;
    let authority = Authority::default();
    let proxy = Static::new("inbound")
        .identity(&authority.leaf("server"), &authority)
        .listener("http", Some(&["client"]), "application")
        .upstream("application", &[origin.address], "http1", None)
        .start()
        .await;
    // The suite has no certificate to show, so somebody shows one for it.
    let tls = authority.client(Some(&authority.leaf("client")), &[b"h2"]);
    let (front, behind) = (TcpListener::bind("127.0.0.1:0").await.unwrap(), proxy.front());
    let address = front.local_addr().unwrap();
    let relay = tokio::spawn(async move {
        loop {
            let (plain, _) = front.accept().await.unwrap();
            let tls = tls.clone();
            tokio::spawn(async move {
                let stream = TcpStream::connect(behind).await.unwrap();
                let secure = tls.connect("localhost".try_into().unwrap(), stream).await.unwrap();
                let ((mut asked, mut answer), (mut answered, mut ask)) = (split(plain), split(secure));
                // Either side may break off: the suite makes mistakes for a living. What the proxy said before it closed arrives
                // all the same, as without a relay, when nothing more can be sent to it.
                let forth = async {
                    let _ = copy(&mut asked, &mut ask).await;
                    let _ = ask.shutdown().await;
                };
                let back = async {
                    let _ = copy(&mut answered, &mut answer).await;
                    let _ = answer.shutdown().await;
                };
                tokio::join!(forth, back);
            });
        }
    });
    // ALPN has said that this is HTTP/2.
    assert_eq!(failed(&suite, address).await, [FITS]);
    proxy.is_quiet().await;
    relay.abort();
}
