//! What a model server says of a model: whether it takes batches, how large, how many at once, and in which forms.
//!
//! Asked as Triton and MLServer answer it, over REST (`v2`, `v2/models/{m}`, `v2/models/{m}/config`,
//! `v2/repository/index`) or, where no client has come over REST yet, by the calls of the same names over gRPC; what a server
//! does not say is left to the annotation. Learned when a model is first asked for, and again after a while, since a model can
//! be loaded anew; until it is known for the first time, requests pass one by one.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode};
use penstock_api::Reason;
use penstock_inference::oip::{ModelMetadata, ServerMetadata, grpc};
use serde::Deserialize;

use super::call::{self, Answer, Outgoing, Trouble, Way};
use super::wire;
use crate::failure::Failure;
use crate::worker::Worker;

/// How long what was learned is believed.
pub const BELIEVED: Duration = Duration::from_secs(30);
/// A server that could not be asked is asked again after so long.
pub const FAILED_FOR: Duration = Duration::from_secs(5);
/// How long a server may take to say it.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is known of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// Rows that an execution takes; 0: it knows no batches. `None`: not told.
    pub max_rows: Option<u32>,
    /// Executions at once. `None`: not told.
    pub instances: Option<u32>,
    /// Tensors may stand behind the JSON.
    pub binary: bool,
    /// Tensors may lie in system shared memory.
    pub shared_memory: bool,
    /// Tensors may lie in memory of a GPU.
    pub gpu_memory: bool,
    /// Its inputs and outputs.
    pub metadata: ModelMetadata,
    /// Its versions and their states, as the server's repository lists them.
    pub index: Vec<Indexed>,
}

/// An entry of the repository's index.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Indexed {
    name: String,
    #[serde(default)]
    version: String,
    #[serde(default)]
    state: String,
}

/// Triton's model configuration, as far as it matters here.
#[derive(Debug, Default, Deserialize)]
struct Config {
    #[serde(default)]
    max_batch_size: u32,
    #[serde(default)]
    instance_group: Vec<InstanceGroup>,
}

#[derive(Debug, Default, Deserialize)]
struct InstanceGroup {
    #[serde(default)]
    count: u32,
    #[serde(default)]
    gpus: Vec<u32>,
}

/// What a server told; `None`: it has nothing of the kind to tell.
struct Told {
    extensions: Option<Vec<String>>,
    metadata: Option<ModelMetadata>,
    config: Option<Config>,
    index: Option<Vec<Indexed>>,
}

/// Asks the server.
pub async fn ask(worker: &Rc<Worker>, way: &Way, model: &str, version: &str) -> Result<Known, Failure> {
    let told = match way.http2 {
        true => over_grpc(worker, way, model, version).await?,
        false => over_rest(worker, way, model, version).await?,
    };
    let extensions = told.extensions.unwrap_or_default();
    let can = |what: &str| extensions.iter().any(|extension| extension == what);
    let index = told.index.unwrap_or_default().into_iter().filter(|entry| entry.name == model).collect();
    Ok(Known {
        max_rows: told.config.as_ref().map(|config| config.max_batch_size),
        instances: told.config.map(|config| {
            let each = |group: &InstanceGroup| group.count.max(1) * (group.gpus.len() as u32).max(1);
            config.instance_group.iter().map(each).sum::<u32>().max(1)
        }),
        binary: can("binary_tensor_data"),
        shared_memory: can("system_shared_memory"),
        gpu_memory: can("cuda_shared_memory"),
        metadata: told.metadata.unwrap_or_default(),
        index,
    })
}

async fn over_rest(worker: &Rc<Worker>, way: &Way, model: &str, version: &str) -> Result<Told, Failure> {
    let of_model = match version {
        "" => format!("/v2/models/{model}"),
        version => format!("/v2/models/{model}/versions/{version}"),
    };
    let get = Method::GET;
    let server: Option<ServerMetadata> = page(worker, way, &get, "/v2").await?;
    Ok(Told {
        extensions: server.map(|server| server.extensions),
        metadata: page(worker, way, &get, &of_model).await?,
        config: page(worker, way, &get, &format!("{of_model}/config")).await?,
        index: page(worker, way, &Method::POST, "/v2/repository/index").await?,
    })
}

async fn over_grpc(worker: &Rc<Worker>, way: &Way, model: &str, version: &str) -> Result<Told, Failure> {
    let (name, version) = (model.to_owned(), version.to_owned());
    let of_model = grpc::ModelMetadataRequest { name: name.clone(), version: version.clone() };
    let server = call(worker, way, grpc::SERVER_METADATA, &grpc::ServerMetadataRequest {}).await?;
    let metadata: Option<grpc::ModelMetadataResponse> =
        call(worker, way, grpc::MODEL_METADATA, &of_model).await?;
    let config = grpc::ModelConfigRequest { name, version };
    let config: Option<grpc::ModelConfigResponse> = call(worker, way, grpc::MODEL_CONFIG, &config).await?;
    let index: Option<grpc::RepositoryIndexResponse> =
        call(worker, way, grpc::REPOSITORY_INDEX, &grpc::RepositoryIndexRequest {}).await?;
    let count = |count: i32| u32::try_from(count).unwrap_or(0);
    Ok(Told {
        extensions: server.map(|server: grpc::ServerMetadataResponse| server.extensions),
        metadata: metadata.and_then(|metadata| metadata.try_into().ok()),
        config: config.and_then(|answer| answer.config).map(|config| Config {
            max_batch_size: count(config.max_batch_size),
            instance_group: (config.instance_group.into_iter())
                .map(|group| InstanceGroup {
                    count: count(group.count),
                    gpus: group.gpus.into_iter().map(count).collect(),
                })
                .collect(),
        }),
        index: index.map(|index| {
            let entries = index.models.into_iter();
            entries
                .map(|entry| Indexed { name: entry.name, version: entry.version, state: entry.state })
                .collect()
        }),
    })
}

/// A page as JSON; `None`: the server has no such page. One that does not say so in time, or not now, may have it.
async fn page<T: for<'a> Deserialize<'a>>(
    worker: &Rc<Worker>,
    way: &Way,
    method: &Method,
    path: &str,
) -> Result<Option<T>, Failure> {
    let parts = match *method {
        Method::POST => VecDeque::from([Bytes::from_static(b"{}")]),
        _ => VecDeque::new(),
    };
    let method = method.clone();
    let outgoing = Outgoing { method, path: path.to_owned(), headers: HeaderMap::new(), parts };
    let Answer { status, body, .. } = call::within(PATIENCE, worker, way, outgoing).await?;
    if not_now(status) {
        return Err(Failure::new(Reason::UpstreamProtocol, format!("{status} to {path}")));
    }
    Ok((status == 200).then(|| serde_json::from_slice(&body).ok()).flatten())
}

/// The answer to a call over gRPC, and `None` as of a page.
async fn call<M: prost::Message + Default>(
    worker: &Rc<Worker>,
    way: &Way,
    path: &str,
    message: &impl prost::Message,
) -> Result<Option<M>, Failure> {
    let outgoing = call::called(path, [wire::framed(message)].into());
    let answer = call::within(PATIENCE, worker, way, outgoing).await?;
    match call::message(way, &answer) {
        Ok(message) => Ok(Some(message)),
        Err(Trouble::Model(error)) if !not_now(error.status) => Ok(None),
        Err(Trouble::Model(error)) => {
            Err(Failure::new(Reason::UpstreamProtocol, format!("{} to {path}", error.message)))
        }
        Err(Trouble::Way(failure)) => Err(failure),
    }
}

/// Whether a status says that the answer may be another soon.
fn not_now(status: u16) -> bool {
    [StatusCode::TOO_MANY_REQUESTS, StatusCode::SERVICE_UNAVAILABLE].iter().any(|later| *later == status)
}
