//! Control's HTTP API, as the commands ask it: JSON pages, a stream of JSON lines, one POST.
//!
//! In: a base URL. Out: values of `penstock_api::view`. Wrong can go: no answer (exit status 3, with what to do
//! about it) and an answer that says no (exit status 1, with control's own words).

use std::time::Duration;

use bytes::BytesMut;
use http::{Method, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response};
use penstock_api::view;
use serde::de::DeserializeOwned;

use crate::connection::{Connection, body};
use crate::failure::Failure;

/// Control asks the proxies before it answers some pages, so an answer may take a moment; not this long.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of control. It holds one connection, so each task that asks has its own.
#[derive(Debug)]
pub(crate) struct Control {
    url: String,
    authority: String,
    connection: Connection,
}

impl Control {
    /// A client of the control at `url`, `http://host:port`.
    pub(crate) fn at(url: &str) -> Result<Self, Failure> {
        let wrong = |why: &str| {
            Failure::Usage(format!(
                "--control {url:?} {why}; write http://HOST:PORT, e.g. http://127.0.0.1:8080"
            ))
        };
        let uri: Uri = url.parse().map_err(|e| wrong(&format!("is no URL ({e})")))?;
        let host = uri.host().ok_or_else(|| wrong("names no host"))?;
        match uri.scheme_str() {
            Some("http") | None => {}
            Some(other) => return Err(wrong(&format!("is {other}, and control's API speaks plain HTTP"))),
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(wrong("has a path"));
        }
        let authority = format!("{host}:{}", uri.port_u16().unwrap_or(80));
        Ok(Self { url: format!("http://{authority}"), connection: Connection::to(&authority), authority })
    }

    /// Where control is.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Reads a page.
    pub(crate) async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Failure> {
        self.page(Method::GET, path).await
    }

    /// Asks control to do something, and reads how it went.
    pub(crate) async fn post<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Failure> {
        self.page(Method::POST, path).await
    }

    /// Reads a page that never ends: one JSON object a line.
    pub(crate) async fn lines(&mut self, path: &str) -> Result<Lines, Failure> {
        let response = self.ask(Method::GET, path).await?;
        Ok(Lines { url: format!("{}{path}", self.url), body: response.into_body(), buffer: BytesMut::new() })
    }

    async fn page<T: DeserializeOwned>(&mut self, method: Method, path: &str) -> Result<T, Failure> {
        let response = self.ask(method, path).await?;
        let bytes = body(response).await.map_err(|e| self.unreachable(e))?;
        serde_json::from_slice(&bytes).map_err(|e| self.not_understood(path, &e))
    }

    async fn ask(&mut self, method: Method, path: &str) -> Result<Response<Incoming>, Failure> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::HOST, &self.authority)
            .header(http::header::ACCEPT, "application/json")
            .body(Full::default())
            .map_err(|e| Failure::Usage(format!("{path:?} cannot be asked for: {e}")))?;
        let response = match tokio::time::timeout(ANSWER_TIMEOUT, self.connection.send(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(self.unreachable(error)),
            Err(_) => {
                return Err(self.unreachable(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())));
            }
        };
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let said = body(response).await.unwrap_or_default();
        Err(Failure::Problem(match (serde_json::from_slice(&said), status) {
            (Ok(view::Failure { error }), _) => error,
            (Err(_), StatusCode::NOT_FOUND) => format!(
                "{}{path} does not exist: something other than Penstock's control listens there, or an older one",
                self.url
            ),
            (Err(_), _) => format!("{}{path} answered {status}", self.url),
        }))
    }

    fn unreachable(&self, cause: impl ToString) -> Failure {
        Failure::Unreachable { url: self.url.clone(), cause: cause.to_string() }
    }

    fn not_understood(&self, path: &str, error: &serde_json::Error) -> Failure {
        Failure::Problem(format!(
            "{}{path} answered something that is no such page ({error}): use a penstock of control's version",
            self.url
        ))
    }
}

/// The lines of a stream.
#[derive(Debug)]
pub(crate) struct Lines {
    url: String,
    body: Incoming,
    buffer: BytesMut,
}

impl Lines {
    /// The next line's object; `None` when control ends the stream.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Failure> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(end + 1);
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return serde_json::from_slice(&line).map(Some).map_err(|e| {
                    Failure::Problem(format!("{} streamed a line that is no such object: {e}", self.url))
                });
            }
            match self.body.frame().await {
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => {
                    return Err(Failure::Unreachable { url: self.url.clone(), cause: error.to_string() });
                }
                None => return Ok(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::exit;

    #[test]
    fn an_address_that_cannot_be_control_is_refused_with_the_form_to_write() {
        for (url, why) in [
            ("https://127.0.0.1:8080", "plain HTTP"),
            ("http://127.0.0.1:8080/x", "has a path"),
            ("not a url", "no URL"),
            ("/status", "no host"),
        ] {
            let failure = Control::at(url).unwrap_err();
            assert!(failure.to_string().contains(why), "{url}: {failure}");
            assert!(failure.to_string().contains("http://HOST:PORT"), "{url}: {failure}");
            assert_eq!(failure.exit_code(), exit::USAGE);
        }
        assert_eq!(Control::at("127.0.0.1:8080").unwrap().url(), "http://127.0.0.1:8080");
        assert_eq!(Control::at("http://control/").unwrap().url(), "http://control:80");
    }

    #[tokio::test]
    async fn an_absent_control_is_exit_status_3_and_says_what_to_do() {
        // Port 1 of loopback: nothing listens there.
        let failure = Control::at("http://127.0.0.1:1").unwrap().get::<()>("/status").await.unwrap_err();
        assert_eq!(failure.exit_code(), exit::UNREACHABLE);
        assert!(failure.to_string().contains("penstock-control run"), "{failure}");
    }
}
