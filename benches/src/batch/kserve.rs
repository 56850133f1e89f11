//! `penstock-bench kserve-batcher`: what KServe's batcher does, REIMPLEMENTED from its documented behaviour, since the
//! module `github.com/kserve/kserve` cannot be had from the Go module proxy here (it answers 403, "not available").
//!
//! Kept of it: only `POST …:predict` with JSON `instances` is batched; one queue for the whole process, and the path of the
//! last request wins; one batch at a time is formed *and executed* by one task, and nothing is taken from the queue
//! meanwhile; a batch is sent when it has 32 rows or more, or when its first request has waited for `--patience` (5 s as
//! shipped); all headers are dropped; an error of the server becomes a 200 with a `message`. Left out, in its favour: the
//! timer that wakes every 100 µs, and the cost of Go.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

/// As shipped.
const MAX_ROWS: usize = 32;

/// Arguments of `penstock-bench kserve-batcher`.
#[derive(Args, Clone, Debug)]
pub(crate) struct BatcherArgs {
    #[arg(long)]
    listen: SocketAddr,
    /// The model server
    #[arg(long)]
    upstream: SocketAddr,
    /// How long a batch may wait to be full
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration)]
    patience: Duration,
}

/// A request that waits for its part of an answer.
struct Waiting {
    path: String,
    instances: Vec<Value>,
    answer: oneshot::Sender<Value>,
}

/// Serves until it is killed.
pub(crate) async fn run(args: BatcherArgs) -> Result<()> {
    let listener = TcpListener::bind(args.listen).await.with_context(|| format!("{}", args.listen))?;
    // Go's unbuffered channel: a request waits in it until the one task takes it.
    let (queue, waiting) = mpsc::channel(1);
    tokio::spawn(form(args.clone(), waiting));
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let queue = queue.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let queue = queue.clone();
                async move { Ok::<_, Infallible>(answer(request, queue).await) }
            });
            // A connection that breaks is the client's to report.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn answer(request: Request<Incoming>, queue: mpsc::Sender<Waiting>) -> Response<Full<Bytes>> {
    let (status, value) = match share(request, queue).await {
        Ok(value) => (StatusCode::OK, value),
        Err(error) => (StatusCode::BAD_REQUEST, json!({"error": format!("{error:#}")})),
    };
    let mut response = Response::new(Full::new(Bytes::from(value.to_string())));
    *response.status_mut() = status;
    response
}

async fn share(request: Request<Incoming>, queue: mpsc::Sender<Waiting>) -> Result<Value> {
    let path = request.uri().path().to_owned();
    if !path.ends_with(":predict") {
        bail!("only :predict is batched, and the bench asks for nothing else");
    }
    let mut asked: Value = serde_json::from_slice(&request.into_body().collect().await?.to_bytes())?;
    let Value::Array(instances) = asked["instances"].take() else { bail!("no instances in the request") };
    let (answer, told) = oneshot::channel();
    queue.send(Waiting { path, instances, answer }).await?;
    Ok(told.await?)
}

/// The one task: forms a batch, executes it, and begins anew.
async fn form(args: BatcherArgs, mut queue: mpsc::Receiver<Waiting>) {
    let mut server = None;
    while let Some(first) = queue.recv().await {
        let deadline = Instant::now() + args.patience;
        let mut rows = first.instances.len();
        let mut batch = vec![first];
        while rows < MAX_ROWS
            && let Ok(Some(next)) = timeout_at(deadline, queue.recv()).await
        {
            rows += next.instances.len();
            batch.push(next);
        }
        let predictions = execute(&args, &mut server, &batch).await;
        let mut first = 0;
        for member in batch {
            let count = member.instances.len();
            let told = match &predictions {
                Ok(all) => json!({"message": "", "predictions": all.get(first..first + count)}),
                Err(error) => json!({"message": format!("{error:#}"), "predictions": null}),
            };
            first += count;
            // Who has left wants no answer.
            let _ = member.answer.send(told);
        }
    }
}

async fn execute(
    args: &BatcherArgs,
    server: &mut Option<SendRequest<Full<Bytes>>>,
    batch: &[Waiting],
) -> Result<Vec<Value>> {
    let path = batch.last().map(|member| member.path.as_str()).context("an empty batch")?;
    let instances: Vec<&Value> = batch.iter().flat_map(|member| &member.instances).collect();
    let body = Bytes::from(json!({"instances": instances}).to_string());
    let mut sender = match server.take() {
        Some(sender) if !sender.is_closed() => sender,
        _ => {
            let stream = TcpStream::connect(args.upstream).await?;
            stream.set_nodelay(true)?;
            let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            tokio::spawn(connection);
            sender
        }
    };
    sender.ready().await?;
    let request = Request::post(path)
        .header("host", args.upstream.to_string())
        .header("content-type", "application/json")
        .body(Full::new(body))?;
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = answer.into_body().collect().await?.to_bytes();
    *server = Some(sender);
    if status != 200 {
        bail!("the server answered with {status}: {}", String::from_utf8_lossy(&body));
    }
    let mut answer: Value = serde_json::from_slice(&body)?;
    match answer["predictions"].take() {
        Value::Array(predictions) if predictions.len() == instances.len() => Ok(predictions),
        _ => bail!("the server did not answer each instance"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::case::Body;
    use crate::batch::model::{self, ModelArgs};
    use crate::batch::request;
    use crate::load::h1;
    use crate::mesh::client::ask;
    use crate::subject::free_port;

    fn somewhere() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], free_port().unwrap()))
    }

    /// A connection, once somebody listens.
    async fn connect(address: SocketAddr) -> TcpStream {
        loop {
            match TcpStream::connect(address).await {
                Ok(stream) => return stream,
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    #[tokio::test]
    async fn those_who_wait_together_are_executed_together() {
        let (upstream, listen) = (somewhere(), somewhere());
        let model = ModelArgs { listen: upstream, fixed: Duration::ZERO, row: Duration::ZERO, instances: 1 };
        tokio::spawn(model::run(model));
        tokio::spawn(run(BatcherArgs { listen, upstream, patience: Duration::from_millis(200) }));
        drop(connect(upstream).await);
        let one = async || {
            let mut connection = h1::Connection::new(connect(listen).await);
            let request = h1::Request::of_bytes(request::bytes("kserve", Body::Json { values: 9 }, true));
            let answer = connection.exchange(&request).await.unwrap();
            String::from_utf8(answer.body.to_vec()).unwrap()
        };
        let answers = tokio::join!(one(), one(), one());
        for answer in [answers.0, answers.1, answers.2] {
            assert_eq!(answer, r#"{"message":"","predictions":[22]}"#);
        }
        let limit = Duration::from_secs(5);
        let stats = tokio::task::LocalSet::new()
            .run_until(ask(
                hyper::Method::GET,
                upstream,
                "model",
                "/v2/models/rowsum/stats",
                Bytes::new(),
                limit,
            ))
            .await;
        let stats: Value = serde_json::from_slice(&stats.unwrap().1).unwrap();
        assert_eq!(stats["model_stats"][0]["execution_count"], 1);
        assert_eq!(stats["model_stats"][0]["inference_count"], 3);
    }
}
