//! One page over HTTP/1.1: bounded in bytes and in time, over a connection that is kept.
//!
//! A page is whole or it is an error: a number that was cut off would be another number.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// The largest page that is read. A busy vLLM's has 100 KiB, a Triton's with hundreds of models 2 MiB.
pub const MAX_PAGE: usize = 4 << 20;

/// Why there is no page.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Nobody listens, or the name is not known.
    #[error("{0} cannot be connected to: {1}")]
    Connect(String, std::io::Error),
    /// It broke off, or is no HTTP.
    #[error("{0} does not answer in HTTP: {1}")]
    Http(String, hyper::Error),
    /// What was to be asked is no path.
    #[error("{0} has no page {1:?}: that is not a path")]
    Path(String, String),
    /// It answers something else.
    #[error("{0} answers {1}")]
    Status(String, StatusCode),
    /// More than [`MAX_PAGE`].
    #[error("the page of {0} has more than {MAX_PAGE} bytes")]
    TooLarge(String),
    /// It took too long.
    #[error("{0} has not answered within {1:?}")]
    Late(String, Duration),
}

impl FetchError {
    /// Whether somebody was there and had something else to say.
    pub fn answered(&self) -> bool {
        matches!(self, Self::Status(..) | Self::TooLarge(_) | Self::Http(..))
    }
}

/// Asks one server for pages.
#[derive(Debug)]
pub struct Fetcher {
    /// `host:port`.
    server: String,
    connection: Option<SendRequest<Empty<Bytes>>>,
    page: Vec<u8>,
}

impl Fetcher {
    /// For the server at `host:port`.
    pub fn new(server: impl Into<String>) -> Self {
        Self { server: server.into(), connection: None, page: Vec::new() }
    }

    /// The page at `path`, within `limit`. A redirect to another path of the same server is followed once.
    pub async fn get(&mut self, path: &str, limit: Duration) -> Result<&[u8], FetchError> {
        let fetched = tokio::time::timeout(limit, self.read(path)).await;
        let fetched = fetched.unwrap_or_else(|_| Err(FetchError::Late(self.server.clone(), limit)));
        if let Err(error) = fetched {
            // Whatever is under way on it would answer the next question.
            self.connection = None;
            return Err(error);
        }
        Ok(&self.page)
    }

    async fn read(&mut self, path: &str) -> Result<(), FetchError> {
        let mut response = self.ask(path).await?;
        if response.status().is_redirection()
            && let Some(path) = redirect(&response)
        {
            self.connection = None;
            response = self.ask(&path).await?;
        }
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status(self.server.clone(), response.status()));
        }
        self.page.clear();
        let mut body = response.into_body();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| FetchError::Http(self.server.clone(), error))?;
            let Ok(data) = frame.into_data() else { continue };
            if self.page.len() + data.len() > MAX_PAGE {
                return Err(FetchError::TooLarge(self.server.clone()));
            }
            self.page.extend_from_slice(&data);
        }
        Ok(())
    }

    async fn ask(&mut self, path: &str) -> Result<Response<Incoming>, FetchError> {
        let request = self.request(path)?;
        let kept = match self.connection.take() {
            // The server may have closed it in the meantime.
            Some(mut kept) => kept.ready().await.is_ok().then_some(kept),
            None => None,
        };
        let mut connection = match kept {
            Some(kept) => kept,
            None => self.connect().await?,
        };
        let response = connection
            .send_request(request)
            .await
            .map_err(|error| FetchError::Http(self.server.clone(), error))?;
        self.connection = Some(connection);
        Ok(response)
    }

    async fn connect(&self) -> Result<SendRequest<Empty<Bytes>>, FetchError> {
        let stream = TcpStream::connect(&self.server)
            .await
            .map_err(|error| FetchError::Connect(self.server.clone(), error))?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| FetchError::Http(self.server.clone(), error))?;
        // It ends with the sender; what goes wrong on it is told to whoever asks over it.
        tokio::spawn(connection);
        Ok(sender)
    }

    fn request(&self, path: &str) -> Result<Request<Empty<Bytes>>, FetchError> {
        Request::get(path)
            .header(header::HOST, &self.server)
            .header(header::ACCEPT, "text/plain;version=0.0.4")
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::USER_AGENT, concat!("penstock-proxy/", env!("CARGO_PKG_VERSION")))
            .body(Empty::new())
            .map_err(|_| FetchError::Path(self.server.clone(), path.to_owned()))
    }
}

/// The path that a redirect leads to; its host is not looked at, the page is here or nowhere.
fn redirect(response: &Response<Incoming>) -> Option<String> {
    let to: http::Uri = response.headers().get(header::LOCATION)?.to_str().ok()?.parse().ok()?;
    Some(to.path_and_query()?.as_str().to_owned())
}
