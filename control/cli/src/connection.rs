//! One keep-alive HTTP/1.1 connection, made when first needed and made anew when the other side closed it.
//!
//! A request that provably never left (the connection had closed before) is sent again on a new connection;
//! everything else that fails is the caller's to judge.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A local connection that takes longer than this is no connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// The largest body that is read into memory: a /status of thousands of proxies is below it.
const BODY_LIMIT: usize = 64 << 20;

/// Why an exchange failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// No connection.
    #[error("{0}")]
    Connect(#[from] io::Error),
    /// The connection broke during the exchange.
    #[error("{}", story(.0))]
    Exchange(#[from] hyper::Error),
    /// The body broke off or is too large.
    #[error("the body could not be read: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
}

/// hyper's message and what lies beneath it.
fn story(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// A connection to `host:port`.
#[derive(Debug)]
pub(crate) struct Connection {
    address: String,
    sender: Option<SendRequest<Full<Bytes>>>,
}

impl Connection {
    /// A connection that will be made at the first request.
    pub(crate) fn to(address: impl Into<String>) -> Self {
        Self { address: address.into(), sender: None }
    }

    /// Sends a request and waits for the response's headers.
    pub(crate) async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Error> {
        let mut request = request;
        if let Some(mut sender) = self.sender.take().filter(|sender| !sender.is_closed())
            && sender.ready().await.is_ok()
        {
            match sender.try_send_request(request).await {
                Ok(response) => {
                    self.sender = Some(sender);
                    return Ok(response);
                }
                Err(mut error) => match error.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(error.into_error().into()),
                },
            }
        }
        let mut sender = self.connect().await?;
        let response = sender.send_request(request).await?;
        self.sender = Some(sender);
        Ok(response)
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, Error> {
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&self.address))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no connection within 3 s"))??;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        // Ends by itself when the sender is dropped or the other side closes; its error reaches the sender.
        tokio::spawn(connection);
        Ok(sender)
    }
}

/// Reads a whole body.
pub(crate) async fn body(response: Response<Incoming>) -> Result<Bytes, Error> {
    let collected = Limited::new(response.into_body(), BODY_LIMIT).collect().await.map_err(Error::Body)?;
    Ok(collected.to_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn get() -> Request<Full<Bytes>> {
        Request::get("/").header("host", "test").body(Full::default()).unwrap()
    }

    #[tokio::test]
    async fn a_connection_that_the_server_closed_is_made_anew() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut connection = Connection::to(listener.local_addr().unwrap().to_string());
        let server = tokio::spawn(async move {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 1024]).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
            }
        });
        for _ in 0..2 {
            let response = connection.send(get()).await.unwrap();
            assert_eq!(body(response).await.unwrap(), "ok");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_response_that_never_comes_is_an_error_not_a_second_try() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut connection = Connection::to(listener.local_addr().unwrap().to_string());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 1024]).await.unwrap();
        });
        assert!(matches!(connection.send(get()).await, Err(Error::Exchange(_))));
        server.await.unwrap();
    }
}
