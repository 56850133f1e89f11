//! Triton 2.51 from the wheel of PyTriton: HTTP with binary tensors, gRPC, system shared memory, metrics.

use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use super::{GRPC, HTTP, METRICS, Model, Server};
use crate::testkit::process::Process;
use crate::testkit::wire::get;

/// A running Triton.
#[derive(Debug)]
pub struct Triton {
    server: Server,
    /// The Open Inference Protocol over HTTP.
    pub http: SocketAddr,
    /// The same over gRPC.
    pub grpc: SocketAddr,
    /// Prometheus.
    pub metrics: SocketAddr,
}

impl Triton {
    /// Starts it with these models and waits until all of them are ready.
    pub async fn start(models: &[Model]) -> Self {
        Self::of(Server::start("triton", models, "/v2/health/ready").await)
    }

    /// The same at an address, a pod's say.
    pub async fn start_at(ip: IpAddr, models: &[Model]) -> Self {
        Self::of(Server::start_at(ip, "triton", models, "/v2/health/ready").await)
    }

    fn of(server: Server) -> Self {
        let (http, grpc, metrics) = (server.at(HTTP), server.at(GRPC), server.at(METRICS));
        Self { server, http, grpc, metrics }
    }

    /// How often a model was executed, and how many rows that were.
    pub async fn executions(&self, model: &str) -> (u64, u64) {
        let page = get(self.http, &format!("/v2/models/{model}/stats")).await.unwrap();
        let page: Value = serde_json::from_slice(&page.body).unwrap();
        let count = |field: &str| page["model_stats"][0][field].as_u64().unwrap();
        (count("execution_count"), count("inference_count"))
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.server.process
    }
}
