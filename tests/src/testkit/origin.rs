//! Origins: the server behind the sidecars, which says what a test wants it to say.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

use super::anywhere;
use super::wire::{Message, Wire};

/// A server; dropping it closes its listener and all its connections.
#[derive(Debug)]
pub struct Origin {
    /// Where it listens.
    pub address: SocketAddr,
    open: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Origin {
    /// Holds `conversation` with each client.
    pub async fn start<C, F>(conversation: C) -> Self
    where
        C: Fn(Wire) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        Self::start_at(anywhere(), conversation).await
    }

    /// Holds `conversation` with each client, at an address.
    pub async fn start_at<C, F>(address: SocketAddr, conversation: C) -> Self
    where
        C: Fn(Wire) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind(address).await.unwrap_or_else(|error| panic!("{address}: {error}"));
        Self::on(listener, conversation)
    }

    /// Holds `conversation` with each client of a listener.
    pub fn on<C, F>(listener: TcpListener, conversation: C) -> Self
    where
        C: Fn(Wire) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let address = listener.local_addr().unwrap();
        let open = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&open);
        let task = tokio::spawn(async move {
            let mut conversations = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                while conversations.try_join_next().is_some() {}
                let _ = stream.set_nodelay(true);
                let talk = conversation(Wire::new(stream));
                let counted = Counted::new(&count);
                conversations.spawn(async move {
                    talk.await;
                    drop(counted);
                });
            }
        });
        Self { address, open, task }
    }

    /// Answers every request with what it saw of it: the request line, the headers, an empty line, the body.
    pub async fn mirror() -> Self {
        Self::start(|mut client| async move {
            while let Ok(request) = client.request().await {
                let body = mirrored(&request);
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                if client.send([answer.as_bytes(), &body].concat()).await.is_err() {
                    return;
                }
            }
        })
        .await
    }

    /// Answers every request with its own name, after `time`.
    pub async fn named(address: SocketAddr, name: &str, time: Duration) -> Self {
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len());
        Self::start_at(address, move |mut client| {
            let answer = answer.clone();
            async move {
                while client.request().await.is_ok() {
                    if !time.is_zero() {
                        tokio::time::sleep(time).await;
                    }
                    if client.send(&answer).await.is_err() {
                        return;
                    }
                }
            }
        })
        .await
    }

    /// Answers the first request with these bytes, and closes.
    pub async fn once(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::start(move |mut client| {
            let answer = answer.clone();
            async move {
                if client.request().await.is_ok() {
                    let _ = client.send(answer).await;
                }
            }
        })
        .await
    }

    /// Connections that are open.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }
}

fn mirrored(request: &Message) -> Vec<u8> {
    let fields = |fields: &[(String, String)]| -> String {
        fields.iter().map(|(name, value)| format!("{name}: {value}\n")).collect()
    };
    let head = format!("{}\n{}\n", request.head.first, fields(&request.head.headers));
    let mut text = head.into_bytes();
    text.extend(&request.body);
    if !request.trailers.is_empty() {
        text.extend(format!("\n{}", fields(&request.trailers)).into_bytes());
    }
    text
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn new(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Answers every call of gRPC with `unimplemented`, which is not what a proxy says.
pub async fn unimplemented(address: SocketAddr) -> JoinHandle<()> {
    let listener = TcpListener::bind(address).await.unwrap_or_else(|error| panic!("{address}: {error}"));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = service_fn(|_request: hyper::Request<hyper::body::Incoming>| async {
                let response = hyper::Response::builder()
                    .header("content-type", "application/grpc")
                    .header("grpc-status", "12")
                    .header("grpc-message", "the application says so")
                    .body(Empty::<Bytes>::new());
                Ok::<_, Infallible>(response.unwrap())
            });
            let serving = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), answer);
            tokio::spawn(serving);
        }
    })
}
