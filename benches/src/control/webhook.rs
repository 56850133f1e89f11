//! The case `webhook`: how long an API server waits for what becomes of a pod.
//!
//! The webhook of `penstock-control` as it is, with its TLS and its bounds, on threads of its own in this process: as a part of
//! `penstock-control` it wants a cluster, which a bed has not. What its namespaces say is known, as it is after the first second of
//! control's life. The clients are two connections, as an API server has them, with a few reviews at once on each; a review
//! is the largest golden pod of `penstock inject` in what an API server sends around it. Time runs from the first byte that is sent to the last
//! that comes back.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_control::namespaces::Namespaces;
use penstock_control::webhook::{Listening, Webhook, certificate};
use penstock_inject::{Namespace, Settings};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::runtime::Builder;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::{START, SUBJECT, quantile};
use crate::certificates::{self, Alpn};
use crate::report::{Named, Row, Summary};

const CASE: &str = "webhook";
const POD: &str = include_str!("../../../control/inject/tests/golden/kserve-predictor.in.yaml");
const NAMESPACE: &str = "bench";

const CONNECTIONS: usize = 2;
/// At once on each of them.
const AT_ONCE: usize = 4;
/// One after the other, of each of those.
const REVIEWS: usize = 500;
/// The webhook's own threads.
const THREADS: usize = 2;

const P50: Named = ("p50_ms", "ms");
const P99: Named = ("p99_ms", "ms");
const MAX: Named = ("max_ms", "ms");

/// All runs.
pub(super) async fn rows(runs: usize) -> Vec<Row> {
    let mut all = Vec::new();
    for turn in 1..=runs {
        match once().await {
            Ok(answered) => {
                let (p50, p99) = (quantile(&answered, 0.5), quantile(&answered, 0.99));
                eprintln!("{CASE}  run {turn}/{runs}  p50 {p50:.2} ms  p99 {p99:.2} ms");
                all.push(answered);
            }
            Err(error) => {
                eprintln!("{CASE}  run {turn}/{runs}  failed: {error:#}");
                return vec![Row::failed(CASE, SUBJECT, P99, format!("{error:#}"))];
            }
        }
    }
    let row = |(named, q)| {
        let summary = Summary::of(all.iter().map(|run| quantile(run, q)).collect())?;
        Some(Row::measured(CASE, SUBJECT, named, &summary))
    };
    [(P50, 0.5), (P99, 0.99), (MAX, 1.0)].into_iter().filter_map(row).collect()
}

/// Milliseconds of each review, sorted.
async fn once() -> Result<Vec<f64>> {
    let dir = tempfile::Builder::new().prefix("penstock-bench-").tempdir()?;
    certificates::make(dir.path())?;
    let own =
        certificate::of_pem(&fs::read(dir.path().join("a.pem"))?, &fs::read(dir.path().join("a.key"))?)?;
    let (_keep, certificate) = watch::channel(Some(Arc::new(own)));
    let asking = Namespace { inject: Some("enabled".to_owned()), enforce: None };
    let webhook = Webhook::new(Settings::default(), Namespaces::fixed([(NAMESPACE.to_owned(), asking)]));
    let stop = CancellationToken::new();
    let threads = Builder::new_multi_thread().worker_threads(THREADS).enable_all().build()?;
    let (listens, address) = oneshot::channel();
    let served = threads.spawn({
        let stop = stop.clone();
        async move {
            let listening = Listening::on((std::net::Ipv4Addr::LOCALHOST, 0).into()).await?;
            // Whoever waits for it has gone only when the bed is interrupted.
            let _ = listens.send(listening.address);
            listening.serve(certificate, webhook, stop).await
        }
    });
    let asked = async {
        let address = timeout(START, address).await.context("the webhook does not listen")??;
        let mut tasks = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let connection = connect(dir.path(), address).await?;
            for _ in 0..AT_ONCE {
                tasks.spawn(ask(connection.clone(), review()?));
            }
        }
        let mut answered = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            answered.extend(ended??);
        }
        answered.sort_by(f64::total_cmp);
        Ok(answered)
    }
    .await;
    stop.cancel();
    let ended = served.await;
    // A runtime cannot be waited for inside of another.
    threads.shutdown_background();
    ended??;
    asked
}

type Connection = SendRequest<Full<Bytes>>;

async fn connect(dir: &Path, address: std::net::SocketAddr) -> Result<Connection> {
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let name = ServerName::try_from("localhost")?;
    let tls = certificates::connector(dir, None, Alpn::H2)?.connect(name, tcp).await?;
    let (sender, connection) = handshake(TokioExecutor::new(), TokioIo::new(tls)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

async fn ask(mut connection: Connection, review: Bytes) -> Result<Vec<f64>> {
    let mut answered = Vec::with_capacity(REVIEWS);
    for _ in 0..REVIEWS {
        let request = Request::post("https://localhost/inject?timeout=5s")
            .header("content-type", "application/json")
            .body(Full::new(review.clone()))?;
        let began = Instant::now();
        let response = connection.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        answered.push(began.elapsed().as_secs_f64() * 1e3);
        // Read as an API server reads it, after the clock has stopped.
        let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
        ensure!(
            status == 200 && answer["response"]["patch"].is_string(),
            "the webhook answers {status} {}",
            String::from_utf8_lossy(&body)
        );
    }
    Ok(answered)
}

/// What an API server sends.
fn review() -> Result<Bytes> {
    let object: Value = serde_saphyr::from_str(POD)?;
    let places = penstock_inject::pods(&object);
    let place = places.first().context("the golden file has no pod")?;
    let pod = object.pointer(&place.pointer).context("the golden file has no pod")?;
    let kind = json!({"group": "", "version": "v1", "kind": "Pod"});
    let resource = json!({"group": "", "version": "v1", "resource": "pods"});
    let review = json!({
        "kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1",
        "request": {
            "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
            "kind": kind, "resource": resource, "requestKind": kind, "requestResource": resource,
            "namespace": NAMESPACE, "operation": "CREATE",
            "userInfo": {
                "username": "system:serviceaccount:kube-system:replicaset-controller",
                "uid": "014fbff9-a07a-11ea-8ad5-000000000000",
                "groups": ["system:serviceaccounts", "system:serviceaccounts:kube-system", "system:authenticated"],
            },
            "object": pod, "oldObject": null, "dryRun": false,
            "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
        },
    });
    Ok(serde_json::to_vec(&review)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_golden_pod_is_larger() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../control/inject/tests/golden");
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name().to_str().unwrap().ends_with(".in.yaml") {
                let size = usize::try_from(entry.metadata().unwrap().len()).unwrap();
                assert!(size <= POD.len(), "{} is larger", entry.path().display());
            }
        }
    }

    #[tokio::test]
    async fn every_review_is_answered_and_counted() {
        assert_eq!(once().await.unwrap().len(), CONNECTIONS * AT_ONCE * REVIEWS);
    }
}
