//! A server that is as fast as a GPU would be: SIMULATED, it lets time pass. One request at a time, the others wait in line.
//!
//! It speaks HTTP/1.1 and h2c, and answers with its name: as a body, or as the message of a unary gRPC call.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::task::{JoinHandle, JoinSet};

use super::anywhere;

/// A running server; dropping it closes its listener and all its connections.
#[derive(Debug)]
pub struct SimulatedGpu {
    /// Where it listens.
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl SimulatedGpu {
    /// A server of that name, which needs `time` for each request.
    pub async fn start(name: &'static str, time: Duration) -> Self {
        let listener = TcpListener::bind(anywhere()).await.unwrap();
        let address = listener.local_addr().unwrap();
        // Tokio's lock is fair: who came first is served first.
        let gpu = Arc::new(Mutex::new(()));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                let _ = stream.set_nodelay(true);
                let gpu = Arc::clone(&gpu);
                let service = hyper::service::service_fn(move |request| {
                    let gpu = Arc::clone(&gpu);
                    async move { Ok::<_, Infallible>(serve(request, name, time, &gpu).await) }
                });
                connections.spawn(async move {
                    // A connection that breaks is the client's to report.
                    let server = auto::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, task }
    }
}

impl Drop for SimulatedGpu {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn serve(
    request: Request<Incoming>,
    name: &'static str,
    time: Duration,
    gpu: &Mutex<()>,
) -> Response<BoxBody<Bytes, Infallible>> {
    let (parts, body) = request.into_parts();
    // What the client sends is of no interest, but must have been sent.
    let _ = body.collect().await;
    let turn = gpu.lock().await;
    tokio::time::sleep(time).await;
    drop(turn);
    let grpc =
        parts.headers.get(CONTENT_TYPE).filter(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    let Some(kind) = grpc else { return Response::new(Full::from(name).boxed()) };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let body = Full::new(message(name)).with_trailers(async { Some(Ok(trailers)) });
    let mut answer = Response::new(body.boxed());
    answer.headers_mut().insert(CONTENT_TYPE, kind.clone());
    answer
}

/// A gRPC message: uncompressed, its length, its bytes.
fn message(text: &str) -> Bytes {
    let mut bytes = BytesMut::with_capacity(5 + text.len());
    bytes.put_u8(0);
    bytes.put_u32(text.len().try_into().unwrap());
    bytes.put_slice(text.as_bytes());
    bytes.freeze()
}
