//! HTTP/1.1: what Triton, vLLM and SGLang would be asked, and two pages for whoever measures: `GET /sim/state` says what was
//! counted, `POST /sim/reset` forgets everything and starts the clock anew.

use std::convert::Infallible;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Either, Full};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue, SERVER};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use super::device::Device;
use super::llm::Engine;
use super::model::Counts;
use super::oip;
use super::openai::{self, Events};
use super::page::{self, Names};
use super::tensor::Batcher;

/// The header of the binary extension: how long the JSON before the tensors is.
const JSON_LENGTH: &str = "inference-header-content-length";

/// What is served.
pub(crate) enum Served {
    /// Tensors.
    Tensor(Rc<Device<Batcher>>),
    /// Conversations.
    Chat {
        /// The GPU.
        device: Rc<Device<Engine>>,
        /// Tokens of an answer on average.
        mean_output: f64,
        /// Tokens of an event.
        stream_interval: u32,
    },
}

/// One replica.
pub(crate) struct Server {
    /// The model's name.
    pub(crate) model: String,
    /// How long it takes to load after a reset.
    pub(crate) load: Duration,
    /// What is served.
    pub(crate) served: Served,
}

type Answer = Response<Either<Full<Bytes>, Events>>;

/// Serves all connections.
pub(crate) async fn accept(listener: TcpListener, server: Rc<Server>) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let server = Rc::clone(&server);
        tokio::task::spawn_local(async move {
            let service = service_fn(move |request| {
                let server = Rc::clone(&server);
                async move { Ok::<_, Infallible>(server.answer(request).await) }
            });
            // A connection that breaks is the client's to report.
            let _ = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

impl Server {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let (parts, body) = request.into_parts();
        let post = parts.method == Method::POST;
        let mut answer = match (post, parts.uri.path()) {
            (true, "/sim/reset") => {
                self.reset();
                json(StatusCode::OK, &json!({}))
            }
            (true, path) => match body.collect().await {
                Ok(body) => self.work(path, &parts.headers, &body.to_bytes()).await,
                Err(error) => refusal(StatusCode::BAD_REQUEST, &error.to_string()),
            },
            (false, path) => self.page(path),
        };
        answer.headers_mut().insert(SERVER, HeaderValue::from_static("penstock-simgpu"));
        answer
    }

    async fn work(&self, path: &str, headers: &hyper::HeaderMap, body: &[u8]) -> Answer {
        if !self.ready() {
            return refusal(StatusCode::SERVICE_UNAVAILABLE, "the model is being loaded");
        }
        match &self.served {
            Served::Chat { device, mean_output, stream_interval } if path == "/v1/chat/completions" => {
                self.chat(device, body, *mean_output, *stream_interval).await
            }
            Served::Chat { .. } if path == "/v1/chat/completions/render" => match openai::render(body) {
                Ok(tokens) => json(StatusCode::OK, &tokens),
                Err(error) => refusal(StatusCode::BAD_REQUEST, &error),
            },
            Served::Tensor(device) if path == "/v1/embeddings" => {
                tensor(device, oip::embeddings(&self.model, body)).await
            }
            Served::Tensor(device) if path == format!("/v2/models/{}/infer", self.model) => {
                let length = headers.get(JSON_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
                tensor(device, oip::infer(&self.model, body, length)).await
            }
            _ => not_served(path),
        }
    }

    async fn chat(&self, device: &Rc<Device<Engine>>, body: &[u8], mean: f64, interval: u32) -> Answer {
        let asked = match openai::chat(body, mean) {
            Ok(asked) => asked,
            Err(error) => return refusal(StatusCode::BAD_REQUEST, &error),
        };
        let prompt = asked.prompt;
        if !device.look(|engine| engine.fits(prompt.tokens + prompt.output)) {
            let why = format!("{} tokens do not fit into the memory for keys and values", prompt.tokens);
            return refusal(StatusCode::BAD_REQUEST, &why);
        }
        let mut ticket = device.submit(prompt.clone());
        if asked.stream {
            let events = Events::new(ticket, &self.model, prompt.tokens, interval, asked.include_usage);
            let mut answer = Response::new(Either::Right(events));
            answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
            return answer;
        }
        loop {
            match ticket.told.recv().await {
                Some(true) => return json(StatusCode::OK, &openai::answer(&self.model, &prompt)),
                Some(false) => {}
                None => return refusal(StatusCode::SERVICE_UNAVAILABLE, "the server was reset"),
            }
        }
    }

    /// Pages that cost no work.
    fn page(&self, path: &str) -> Answer {
        let model = &self.model;
        let ready = if self.ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        match path {
            "/metrics" => {
                let names = match self.served {
                    Served::Tensor(_) => Names::Triton,
                    Served::Chat { .. } => Names::Vllm,
                };
                let mut answer = whole(StatusCode::OK, page::page(names, model, &self.counts()));
                answer
                    .headers_mut()
                    .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4"));
                answer
            }
            "/sim/state" => json(StatusCode::OK, &json!(self.counts())),
            "/v2/health/live" => json(StatusCode::OK, &json!({})),
            "/health" | "/v2/health/ready" => json(ready, &json!({"simulated": true})),
            "/v2" => json(
                StatusCode::OK,
                &json!({"name": "penstock-simgpu", "version": env!("CARGO_PKG_VERSION"), "extensions": ["binary_tensor_data"]}),
            ),
            "/v1/models" => json(
                StatusCode::OK,
                &json!({"object": "list", "data": [{"id": model, "object": "model", "owned_by": "penstock-simgpu"}]}),
            ),
            // What sglang-router and vllm-router ask a worker before they use it.
            "/get_server_info" | "/server_info" | "/get_model_info" | "/model_info" => json(
                StatusCode::OK,
                &json!({"model_path": model, "served_model_name": model, "is_generation": true, "simulated": true}),
            ),
            path if path == format!("/v2/models/{model}/ready") => json(ready, &json!({})),
            _ => not_served(path),
        }
    }

    fn ready(&self) -> bool {
        let since = match &self.served {
            Served::Tensor(device) => device.now(),
            Served::Chat { device, .. } => device.now(),
        };
        since >= self.load
    }

    fn reset(&self) {
        match &self.served {
            Served::Tensor(device) => device.reset(),
            Served::Chat { device, .. } => device.reset(),
        }
    }

    fn counts(&self) -> Counts {
        match &self.served {
            Served::Tensor(device) => device.counts(),
            Served::Chat { device, .. } => device.counts(),
        }
    }
}

async fn tensor(device: &Rc<Device<Batcher>>, asked: Result<oip::Asked, String>) -> Answer {
    let asked = match asked {
        Ok(asked) => asked,
        Err(error) => return refusal(StatusCode::BAD_REQUEST, &error),
    };
    match device.submit(asked.rows).told.recv().await {
        Some(_) => json(StatusCode::OK, &asked.answer),
        None => refusal(StatusCode::SERVICE_UNAVAILABLE, "the server was reset"),
    }
}

fn whole(status: StatusCode, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Either::Left(Full::new(body.into())));
    *answer.status_mut() = status;
    answer
}

fn json(status: StatusCode, value: &Value) -> Answer {
    let mut answer = whole(status, value.to_string());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

fn not_served(path: &str) -> Answer {
    refusal(StatusCode::NOT_FOUND, &format!("{path} is not served here"))
}

fn refusal(status: StatusCode, why: &str) -> Answer {
    json(status, &json!({"error": why}))
}
