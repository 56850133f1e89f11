//! MLServer 1.7: the Open Inference Protocol in JSON over HTTP, and over gRPC.

use std::net::{IpAddr, SocketAddr};

use super::{GRPC, HTTP, METRICS, Model, Server};
use crate::testkit::process::Process;

/// A running MLServer.
#[derive(Debug)]
pub struct MlServer {
    server: Server,
    /// The Open Inference Protocol over HTTP, in JSON.
    pub http: SocketAddr,
    /// The same over gRPC.
    pub grpc: SocketAddr,
    /// Prometheus.
    pub metrics: SocketAddr,
}

impl MlServer {
    /// Starts it with these models and waits until all of them are ready.
    pub async fn start(models: &[Model]) -> Self {
        Self::of(Server::start("mlserver", models, "/v2/health/ready").await)
    }

    /// The same at an address, a pod's say.
    pub async fn start_at(ip: IpAddr, models: &[Model]) -> Self {
        Self::of(Server::start_at(ip, "mlserver", models, "/v2/health/ready").await)
    }

    fn of(server: Server) -> Self {
        let (http, grpc, metrics) = (server.at(HTTP), server.at(GRPC), server.at(METRICS));
        Self { server, http, grpc, metrics }
    }

    /// Its process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.server.process
    }
}
