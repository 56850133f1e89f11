//! TorchServe 0.12: its own protocol, `POST /predictions/MODEL` with one row of JSON, and the management API. Of the Open
//! Inference Protocol it has `POST /v2/models/MODEL/infer`, whose body the model's handler reads and answers; it tells
//! nothing of its models there, and knows no versions and no binary tensors.

use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use super::{GRPC, HTTP, MANAGEMENT, METRICS, Model, START, Server};
use crate::testkit::process::Process;
use crate::testkit::wait_until;
use crate::testkit::wire::get;

/// A running TorchServe.
#[derive(Debug)]
pub struct TorchServe {
    server: Server,
    /// Predictions.
    pub http: SocketAddr,
    /// Predictions over gRPC.
    pub grpc: SocketAddr,
    /// The management API: `GET /models/MODEL` tells `batchSize` and `maxBatchDelay`.
    pub management: SocketAddr,
    /// Prometheus.
    pub metrics: SocketAddr,
}

impl TorchServe {
    /// Starts it with these models and waits until each has a worker.
    pub async fn start(models: &[Model]) -> Self {
        Self::of(Server::start("torchserve", models, "/ping").await, models).await
    }

    /// The same at an address, a pod's say.
    pub async fn start_at(ip: IpAddr, models: &[Model]) -> Self {
        Self::of(Server::start_at(ip, "torchserve", models, "/ping").await, models).await
    }

    async fn of(server: Server, models: &[Model]) -> Self {
        let at = |port| server.at(port);
        let (http, grpc, management, metrics) = (at(HTTP), at(GRPC), at(MANAGEMENT), at(METRICS));
        let server = Self { server, http, grpc, management, metrics };
        for model in models {
            wait_until(&format!("{} has a worker", model.name), START, async || {
                server.model(&model.name).await["workers"][0]["status"] == "READY"
            })
            .await;
        }
        server
    }

    /// What the management API says of a model.
    pub async fn model(&self, name: &str) -> Value {
        let page = get(self.management, &format!("/models/{name}")).await.unwrap();
        let versions: Value = serde_json::from_slice(&page.body).unwrap();
        versions[0].clone()
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.server.process
    }
}
