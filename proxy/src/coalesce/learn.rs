//! What a model server says of a model: whether it takes batches, how large, how many at once, and in which forms.
//!
//! Asked over REST as Triton and MLServer answer it (`v2`, `v2/models/{m}`, `v2/models/{m}/config`,
//! `v2/repository/index`); what a server does not say is left to the annotation. Learned when a model is first asked for,
//! and again after a while, since a model can be loaded anew; until it is known for the first time, requests pass one by
//! one.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use penstock_api::Reason;
use penstock_inference::oip::{ModelMetadata, ServerMetadata};
use serde::Deserialize;

use super::call::{self, Answer, Outgoing, Way};
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

/// Asks the server.
pub async fn ask(worker: &Rc<Worker>, way: &Way, model: &str, version: &str) -> Result<Known, Failure> {
    let of_model = match version {
        "" => format!("/v2/models/{model}"),
        version => format!("/v2/models/{model}/versions/{version}"),
    };
    let get = Method::GET;
    let server: ServerMetadata = page(worker, way, &get, "/v2").await?.unwrap_or_default();
    let metadata = page(worker, way, &get, &of_model).await?.unwrap_or_default();
    let config: Option<Config> = page(worker, way, &get, &format!("{of_model}/config")).await?;
    let index: Option<Vec<Indexed>> = page(worker, way, &Method::POST, "/v2/repository/index").await?;
    let index = index.unwrap_or_default().into_iter().filter(|entry| entry.name == model).collect();
    let can = |what: &str| server.extensions.iter().any(|extension| extension == what);
    Ok(Known {
        max_rows: config.as_ref().map(|config| config.max_batch_size),
        instances: config.map(|config| {
            let each = |group: &InstanceGroup| group.count.max(1) * (group.gpus.len() as u32).max(1);
            config.instance_group.iter().map(each).sum::<u32>().max(1)
        }),
        binary: can("binary_tensor_data"),
        shared_memory: can("system_shared_memory"),
        metadata,
        index,
    })
}

/// A page as JSON; `None`: the server has no such page. One that does not say so in time may have it.
async fn page<T: for<'a> Deserialize<'a>>(
    worker: &Rc<Worker>,
    way: &Way,
    method: &Method,
    path: &str,
) -> Result<Option<T>, Failure> {
    let way = Way { http2: false, ..way.clone() };
    let parts = match *method {
        Method::POST => VecDeque::from([Bytes::from_static(b"{}")]),
        _ => VecDeque::new(),
    };
    let method = method.clone();
    let outgoing = Outgoing { method, path: path.to_owned(), headers: HeaderMap::new(), parts };
    let asked = tokio::time::timeout(PATIENCE, call::whole(worker, &way, outgoing)).await;
    let late = |_| Failure::new(Reason::RequestTimeout, format!("no answer to {path} within {PATIENCE:?}"));
    let Answer { status, body, .. } = asked.map_err(late)??;
    Ok((status == 200).then(|| serde_json::from_slice(&body).ok()).flatten())
}
