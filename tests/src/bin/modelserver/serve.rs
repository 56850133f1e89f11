//! A port: HTTP/1.1 and HTTP/2 by preface, until told to stop; then what is in flight is finished.

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use std::pin::pin;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A client that has not finished its headers by then is gone or hostile.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Large tensors would wait for window updates with HTTP/2's own 64 KiB.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 4 << 20;

/// Serves until `stop` turns true. Returns how many connections were cut, because they still had requests in flight
/// when `drain_timeout` was over.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    stop: watch::Receiver<bool>,
    drain_timeout: Duration,
) -> usize {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let mut connections = JoinSet::new();
    let mut stopping = stop.clone();
    loop {
        tokio::select! {
            biased;
            () = told(&mut stopping) => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(builder.clone(), stream, router.clone(), stop.clone()));
                }
                // Out of file descriptors, most likely: let some connections end before trying again.
                Err(problem) => {
                    tracing::warn!("cannot accept: {problem}");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
    drop(listener);
    let drained = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(drain_timeout, drained).await;
    connections.len()
}

async fn connection(
    builder: Builder<TokioExecutor>,
    stream: TcpStream,
    router: Router,
    mut stop: watch::Receiver<bool>,
) {
    // Answers are small and complete: waiting for more bytes only delays them.
    let _ = stream.set_nodelay(true);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = told(&mut stop) => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(problem) = ended {
        tracing::debug!("connection ended: {problem}");
    }
}

/// Waits for the end; whoever would tell it being gone is the end too.
async fn told(stop: &mut watch::Receiver<bool>) {
    drop(stop.wait_for(|stop| *stop).await);
}
