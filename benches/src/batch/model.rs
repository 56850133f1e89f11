//! `penstock-bench model`: a SIMULATED model server that costs next to nothing but the time of its model, which is slept.
//!
//! It serves `rowsum`'s totals in KServe's V1 and in the Open Inference Protocol over REST, with and without the binary
//! extension, so that a batcher of either protocol can stand before the same model. Each instance executes one request at a
//! time; it never batches.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::request::MODEL;

const JSON_LENGTH: &str = "inference-header-content-length";

/// Arguments of `penstock-bench model`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ModelArgs {
    #[arg(long)]
    pub(crate) listen: SocketAddr,
    /// What an execution takes
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
    pub(crate) fixed: Duration,
    /// What each of its rows takes
    #[arg(long, default_value = "0s", value_parser = humantime::parse_duration)]
    pub(crate) row: Duration,
    /// Executions at once
    #[arg(long, default_value_t = 1)]
    pub(crate) instances: u32,
}

struct Model {
    args: ModelArgs,
    instances: Semaphore,
    executions: AtomicU64,
    rows: AtomicU64,
}

/// Serves until it is killed.
pub(crate) async fn run(args: ModelArgs) -> Result<()> {
    let listener = TcpListener::bind(args.listen).await.with_context(|| format!("{}", args.listen))?;
    let model = Arc::new(Model {
        instances: Semaphore::new(args.instances as usize),
        args,
        executions: AtomicU64::new(0),
        rows: AtomicU64::new(0),
    });
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let model = Arc::clone(&model);
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let model = Arc::clone(&model);
                async move { Ok::<_, Infallible>(model.answer(request).await) }
            });
            // A connection that breaks is the client's to report.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

impl Model {
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let (parts, body) = request.into_parts();
        let answer = if parts.method == hyper::Method::POST {
            match body.collect().await {
                Ok(body) => self.work(parts.uri.path(), &parts.headers, &body.to_bytes()).await,
                Err(error) => Err(error.into()),
            }
        } else {
            Ok(self.page(parts.uri.path()))
        };
        let (status, answer) = match answer {
            Ok(answer) => (StatusCode::OK, answer),
            Err(error) => (StatusCode::BAD_REQUEST, json!({"error": format!("{error:#}")})),
        };
        let mut response = Response::new(Full::new(Bytes::from(answer.to_string())));
        *response.status_mut() = status;
        response
            .headers_mut()
            .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static("application/json"));
        response
    }

    async fn work(&self, path: &str, headers: &HeaderMap, body: &[u8]) -> Result<Value> {
        if path.starts_with("/v1/") {
            let asked: Value = serde_json::from_slice(body)?;
            let rows = asked["instances"].as_array().context("there are no instances")?;
            self.execute(rows.len() as u64).await;
            return Ok(json!({"predictions": rows.iter().map(sum).collect::<Vec<_>>()}));
        }
        let length = headers.get(JSON_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let (head, tensor) =
            body.split_at_checked(length.unwrap_or(body.len())).context("the JSON is cut off")?;
        let asked: Value = serde_json::from_slice(head)?;
        let input = &asked["inputs"][0];
        let rows = input["shape"][0].as_u64().filter(|rows| *rows > 0).context("the input has no rows")?;
        let values: Vec<f64> = match input["data"].as_array() {
            Some(data) => data.iter().filter_map(Value::as_f64).collect(),
            None => tensor.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four).into()).collect(),
        };
        let width = (values.len() / rows as usize).max(1);
        let totals: Vec<i64> = values.chunks(width).map(|row| row.iter().sum::<f64>() as i64).collect();
        self.execute(rows).await;
        let output = json!({"name": "total", "datatype": "INT64", "shape": [rows, 1], "data": totals});
        let mut answer = json!({"model_name": MODEL, "model_version": "1", "outputs": [output]});
        if let Some(id) = asked.get("id") {
            answer["id"] = id.clone();
        }
        Ok(answer)
    }

    /// Waits for an instance, and until it is done.
    async fn execute(&self, rows: u64) {
        let Ok(_instance) = self.instances.acquire().await else { return };
        self.executions.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows, Ordering::Relaxed);
        let takes = self.args.fixed + self.args.row.mul_f64(rows as f64);
        if !takes.is_zero() {
            // Tokio's timer counts whole milliseconds; no model here is so short that it matters.
            tokio::time::sleep(takes).await;
        }
    }

    fn page(&self, path: &str) -> Value {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        match path.rsplit('/').next().unwrap_or_default() {
            "v2" => json!({"name": "simulated", "version": "1", "extensions": ["binary_tensor_data"]}),
            "config" => json!({
                "name": MODEL,
                "max_batch_size": 32,
                "instance_group": [{"kind": "KIND_CPU", "count": self.args.instances}]
            }),
            "stats" => json!({"model_stats": [{
                "name": MODEL,
                "version": "1",
                "inference_count": count(&self.rows),
                "execution_count": count(&self.executions)
            }]}),
            _ => json!({
                "name": MODEL,
                "versions": ["1"],
                "platform": "simulated",
                "inputs": [{"name": "values", "datatype": "FP32", "shape": [-1, -1]}],
                "outputs": [{"name": "total", "datatype": "INT64", "shape": [-1, 1]}]
            }),
        }
    }
}

fn sum(row: &Value) -> i64 {
    row.as_array().map_or(0, |values| values.iter().filter_map(Value::as_f64).sum::<f64>() as i64)
}
