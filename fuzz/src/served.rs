//! Connections that are served as the sidecar serves them, over memory in place of a socket, under a clock that goes on only when nobody
//! has anything to do.

use std::time::Duration;

use http::uri::Authority;
use http::{header, request};
use penstock_proxy::connection::check_host;
use penstock_proxy::headers;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};

use crate::sentence;

/// Runs what is served, and all tasks that come of it.
pub(crate) fn run<T>(served: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, served)
}

/// Sends pieces, and lets the server have each before the next, with a pause behind it, until it hears no more.
pub(crate) async fn send<'a>(
    to: &mut (impl AsyncWrite + Unpin),
    pieces: impl Iterator<Item = &'a [u8]>,
    pause: Duration,
) {
    for piece in pieces {
        if to.write_all(piece).await.is_err() {
            break;
        }
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }
}

/// Whether a request is let past the entry; who is not hears why.
pub(crate) fn passes(head: &request::Parts) -> bool {
    if let Err(failure) = headers::check_request(head, headers::look(&head.headers)) {
        sentence(&failure);
        return false;
    }
    let named = match head.uri.authority() {
        Some(authority) => Some(authority.clone()),
        None => head.headers.get(header::HOST).and_then(|host| Authority::try_from(host.as_bytes()).ok()),
    };
    match named.map(|authority| check_host(&authority)) {
        Some(Ok(())) => true,
        Some(Err(failure)) => {
            sentence(&failure);
            false
        }
        None => false,
    }
}
