//! The protocol's REST paths, `/metrics`, and gRPC beside them on the same router.

use crate::refusal::Refusal;
use crate::{Server, grpc, stats};
use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::{HeaderValue, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use penstock_inference::oip::shm::{REGION, RegisteredCuda};
use penstock_inference::oip::{InferRequest, InferResponse, ModelMetadata, Parameters, ServerMetadata, rest};
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

/// Everything that one port serves.
pub(crate) fn router(server: Arc<Server>) -> Router {
    let model = || get(model_metadata);
    Router::new()
        .route("/v2", get(metadata))
        .route("/v2/health/live", get(async || StatusCode::OK))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{name}", model())
        .route("/v2/models/{name}/versions/{version}", model())
        .route("/v2/models/{name}/ready", get(model_ready))
        .route("/v2/models/{name}/versions/{version}/ready", get(model_ready))
        .route("/v2/models/{name}/infer", post(infer))
        .route("/v2/models/{name}/versions/{version}/infer", post(infer))
        .route("/v2/systemsharedmemory/region/{name}/register", post(register_system))
        .route("/v2/systemsharedmemory/region/{name}/unregister", post(unregister))
        .route("/v2/cudasharedmemory/region/{name}/register", post(register_cuda))
        .route("/v2/cudasharedmemory/region/{name}/unregister", post(unregister))
        .route("/v2/cudasharedmemory/status", get(cuda_status))
        .route("/metrics", get(metrics))
        .route_service("/inference.GRPCInferenceService/{method}", grpc::service(server.clone()))
        .fallback(unknown)
        .with_state(server)
}

#[derive(serde::Deserialize)]
struct ModelPath {
    name: String,
    version: Option<String>,
}

async fn metadata(State(server): State<Arc<Server>>) -> Json<ServerMetadata> {
    Json(server.metadata())
}

async fn ready(State(server): State<Arc<Server>>) -> StatusCode {
    if server.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }
}

async fn model_metadata(
    State(server): State<Arc<Server>>,
    Path(path): Path<ModelPath>,
) -> Result<Json<ModelMetadata>, Refusal> {
    let model = server.models.find(&path.name, path.version.as_deref())?;
    Ok(Json(server.models.metadata(model, server.delay.is_some())))
}

async fn model_ready(
    State(server): State<Arc<Server>>,
    Path(path): Path<ModelPath>,
) -> Result<StatusCode, Refusal> {
    server.models.find(&path.name, path.version.as_deref())?;
    Ok(ready(State(server)).await)
}

async fn metrics(State(server): State<Arc<Server>>) -> impl IntoResponse {
    let page = stats::page(&server.models, server.delay.is_some());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page)
}

async fn unknown(uri: Uri) -> Refusal {
    Refusal::NotFound(format!("there is nothing at {}; the protocol's paths start with /v2", uri.path()))
}

async fn infer(
    State(server): State<Arc<Server>>,
    Path(path): Path<ModelPath>,
    request: Request,
) -> Result<Response, Refusal> {
    let model = server.models.find(&path.name, path.version.as_deref())?;
    let header_length = rest::header_length(request.headers())?;
    let body = read(request.into_body(), server.max_body).await?;
    let asked = match header_length {
        Some(0) => rest::raw_request(&body, &model.inputs)?,
        length => {
            let mut refusal = None;
            let read = RefCell::new(&mut refusal);
            let lies = |parameters: &Parameters| {
                // A copy from a GPU is waited for.
                let read_there = || tokio::task::block_in_place(|| server.memory.read(parameters));
                let there = parameters.contains_key(REGION).then(read_there)?;
                there.map_err(|why| **read.borrow_mut() = Some(why)).ok()
            };
            let asked = rest::decode_request_over_shm(&body, length, lies);
            match refusal {
                Some(refusal) => return Err(refusal),
                None => asked?,
            }
        }
    };
    // The answer's form is in the question, which the engine keeps.
    let form = InferRequest {
        inputs: Vec::new(),
        parameters: asked.parameters.clone(),
        outputs: asked.outputs.clone(),
        id: None,
    };
    let mut response = server.engine.infer(model, asked).await?;
    server.memory.write(&form.outputs, &mut response)?;
    answer(&form, &response)
}

async fn register_system(
    State(server): State<Arc<Server>>,
    Path(name): Path<String>,
    body: bytes::Bytes,
) -> Result<StatusCode, Refusal> {
    server.memory.add_system(name, &json(&body)?).map(|()| StatusCode::OK)
}

async fn register_cuda(
    State(server): State<Arc<Server>>,
    Path(name): Path<String>,
    body: bytes::Bytes,
) -> Result<StatusCode, Refusal> {
    server.memory.add_cuda(name, &json(&body)?).map(|()| StatusCode::OK)
}

async fn unregister(State(server): State<Arc<Server>>, Path(name): Path<String>) -> StatusCode {
    server.memory.remove(&name);
    StatusCode::OK
}

async fn cuda_status(State(server): State<Arc<Server>>) -> Json<Vec<RegisteredCuda>> {
    Json(server.memory.list_cuda())
}

fn json<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal::Invalid(error.to_string()))
}

fn answer(form: &InferRequest, response: &InferResponse) -> Result<Response, Refusal> {
    // An answer that JSON cannot hold (NaN) is not the client's fault, but the client can ask for binary data.
    let body = rest::encode_response(response, |output| form.wants_binary(&output.name))?;
    let (kind, length) = (body.content_type(), body.header_length);
    let mut answer = Response::new(Body::from(body.into_bytes()));
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    if let Some(length) = length {
        answer.headers_mut().insert(&rest::HEADER_LENGTH, length.into());
    }
    Ok(answer)
}

async fn read(body: Body, limit: usize) -> Result<bytes::Bytes, Refusal> {
    match Limited::new(body, limit).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(problem) if problem.is::<LengthLimitError>() => Err(Refusal::TooLarge(format!(
            "the body has more than {limit} bytes, which is the most that is read"
        ))),
        Err(problem) => Err(Refusal::Invalid(format!("the body did not arrive whole: {problem}"))),
    }
}

impl Server {
    pub(crate) fn is_ready(&self) -> bool {
        !self.draining.load(Relaxed)
    }

    pub(crate) fn metadata(&self) -> ServerMetadata {
        let mut extensions = vec!["binary_tensor_data".to_owned()];
        extensions.extend(self.memory.extensions());
        extensions.extend(self.delay.map(|delay| format!("simulated_delay({delay})")));
        ServerMetadata {
            name: "penstock-modelserver".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions,
        }
    }
}
