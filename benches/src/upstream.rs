//! `penstock-bench upstream`: the server behind every proxy. It reads each request to its end, answers with a
//! short body that nobody else could make up, and counts.
//!
//! It listens on two ports that the kernel picks, one for HTTP/1.1 and one for h2c, and prints both as JSON on
//! standard output. `GET /seen` on either says how many requests have arrived, and is not one of them; `GET /tokens` is answered
//! with a stream of [`tokens`]. It reads bodies whole before it answers: a server that answers early makes proxies abort the upload.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Args;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};

use crate::tokens;

/// Arguments of `penstock-bench upstream`.
#[derive(Args, Clone, Debug)]
pub(crate) struct UpstreamArgs {
    /// The body of every answer
    #[arg(long, default_value = "hello")]
    answer: String,
}

/// Where the upstream listens.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Addresses {
    /// HTTP/1.1.
    pub(crate) h1: SocketAddr,
    /// HTTP/2 by prior knowledge.
    pub(crate) h2: SocketAddr,
}

/// Serves until it is killed.
pub(crate) async fn run(args: UpstreamArgs) -> Result<()> {
    let h1 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("a port on loopback")?;
    let h2 = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("a port on loopback")?;
    let addresses = Addresses { h1: h1.local_addr()?, h2: h2.local_addr()? };
    println!("{}", serde_json::to_string(&addresses)?);

    let server = Arc::new(Server {
        answer: Bytes::from(args.answer),
        seen: AtomicU64::new(0),
        streams: AtomicUsize::new(0),
    });
    tokio::try_join!(accept(h1, server.clone(), serve_h1), accept(h2, server, serve_h2))?;
    Ok(())
}

struct Server {
    answer: Bytes,
    seen: AtomicU64,
    /// Streams of tokens that were asked for.
    streams: AtomicUsize,
}

/// The answer, or tokens.
type Answer = Either<Full<Bytes>, UnsyncBoxBody<Bytes, std::io::Error>>;

impl Server {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Answer>> {
        if request.uri().path() == "/seen" {
            let seen = self.seen.load(Ordering::Relaxed).to_string();
            return Ok(Response::new(Either::Left(Full::from(seen))));
        }
        self.seen.fetch_add(1, Ordering::Relaxed);
        if request.uri().path() == tokens::PATH {
            let stream = tokens::stream(self.streams.fetch_add(1, Ordering::Relaxed))?;
            return Ok(Response::new(Either::Right(stream)));
        }
        let mut body = request.into_body();
        if !body.is_end_stream() {
            while let Some(frame) = body.frame().await {
                frame?;
            }
        }
        Ok(Response::new(Either::Left(Full::new(self.answer.clone()))))
    }
}

async fn accept<F>(
    listener: TcpListener,
    server: Arc<Server>,
    serve: fn(TcpStream, Arc<Server>) -> F,
) -> Result<Infallible>
where
    F: Future<Output = ()> + Send + 'static,
{
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(serve(stream, server.clone()));
    }
}

/// A connection that breaks is the client's to report.
async fn serve_h1(stream: TcpStream, server: Arc<Server>) {
    let service = service_fn(move |request| {
        let server = server.clone();
        async move { server.answer(request).await }
    });
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

async fn serve_h2(stream: TcpStream, server: Arc<Server>) {
    let service = service_fn(move |request| {
        let server = server.clone();
        async move { server.answer(request).await }
    });
    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(None)
        .serve_connection(TokioIo::new(stream), service)
        .await;
}
