//! A client of HTTP/1.1 that costs next to nothing: one request in flight to a connection, keep-alive, the head
//! parsed by `httparse`, bodies by their `content-length`.
//!
//! It can afford to be strict, since both ends of the bed are ours: an answer without a length is an error, for no
//! subject should turn our upstream's short answer into a chunked one.

use std::convert::Infallible;
use std::io::{Error, ErrorKind, Result};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::pace::Schedule;
use super::tally::Tally;

/// Written again and again until a request's body is complete: large enough that the copy into the kernel is
/// what it costs, small enough to stay in the second-level cache.
const CHUNK: usize = 128 * 1024;
const MAX_HEADERS: usize = 64;
/// The answers of this bed are short; anything longer is not our upstream's.
const MAX_ANSWER: usize = 64 * 1024;

/// A request, ready to be written.
pub(crate) struct Request {
    head: Vec<u8>,
    chunk: Vec<u8>,
    body: usize,
}

impl Request {
    /// `GET path`, or `POST path` with `body` bytes when there are any.
    pub(crate) fn new(path: &str, body: usize) -> Self {
        let head = match body {
            0 => format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n"),
            _ => format!("POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {body}\r\n\r\n"),
        };
        Self { head: head.into_bytes(), chunk: vec![b'p'; CHUNK.min(body)], body }
    }

    /// A request whose bytes are given, head and body.
    pub(crate) fn of_bytes(mut bytes: Vec<u8>) -> Self {
        let head = bytes.windows(4).position(|four| four == b"\r\n\r\n").map_or(bytes.len(), |end| end + 4);
        let chunk = bytes.split_off(head);
        Self { head: bytes, body: chunk.len(), chunk }
    }

    /// Bytes of its body.
    pub(crate) fn body(&self) -> usize {
        self.body
    }
}

/// One connection and what was read of it.
pub(crate) struct Connection<S> {
    stream: S,
    input: Vec<u8>,
}

/// What came back.
pub(crate) struct Answer<'a> {
    pub(crate) status: u16,
    pub(crate) body: &'a [u8],
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// A connection over a stream that is ready to carry requests.
    pub(crate) fn new(stream: S) -> Self {
        Self { stream, input: vec![0; 16 * 1024] }
    }

    /// The stream, without the buffer.
    pub(crate) fn into_stream(self) -> S {
        self.stream
    }

    /// Sends the request and reads the whole answer.
    pub(crate) async fn exchange(&mut self, request: &Request) -> Result<Answer<'_>> {
        self.stream.write_all(&request.head).await?;
        let mut left = request.body;
        while left > 0 {
            let now = left.min(request.chunk.len());
            self.stream.write_all(&request.chunk[..now]).await?;
            left -= now;
        }
        self.stream.flush().await?;

        let mut filled = 0;
        let mut head = None;
        loop {
            if filled == self.input.len() {
                if filled >= MAX_ANSWER {
                    return Err(Error::other("the answer is longer than our upstream ever answers"));
                }
                self.input.resize(filled * 2, 0);
            }
            let read = self.stream.read(&mut self.input[filled..]).await?;
            if read == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            filled += read;
            if head.is_none() {
                head = parse(&self.input[..filled])?;
            }
            if let Some((status, from, length)) = head
                && filled >= from + length
            {
                return Ok(Answer { status, body: &self.input[from..from + length] });
            }
        }
    }

    /// One request after the other, as fast as they are answered, until an error ends the connection.
    pub(crate) async fn closed_loop(&mut self, request: &Request, tally: &Tally) -> Result<Infallible> {
        loop {
            let began = Instant::now();
            let status = self.exchange(request).await?.status;
            tally.answered(began, status, request.body);
        }
    }

    /// Requests as the schedule asks for them, each timed from the moment it was due.
    pub(crate) async fn open_loop(
        &mut self,
        request: &Request,
        schedule: &Schedule,
        tally: &Tally,
    ) -> Result<Infallible> {
        loop {
            let due = schedule.next().await;
            match self.exchange(request).await {
                Ok(answer) => tally.answered(due, answer.status, request.body),
                Err(error) => {
                    tally.lost(due);
                    return Err(error);
                }
            }
        }
    }
}

/// Status, where the body begins and how long it is; `None` while the head is incomplete.
fn parse(input: &[u8]) -> Result<Option<(u16, usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let from = match response.parse(input) {
        Ok(httparse::Status::Complete(from)) => from,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(Error::new(ErrorKind::InvalidData, error.to_string())),
    };
    let length = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse().ok())
        .ok_or_else(|| Error::new(ErrorKind::InvalidData, "an answer without content-length"))?;
    Ok(Some((response.code.unwrap_or(0), from, length)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_answer_may_arrive_in_pieces() {
        let (near, mut far) = tokio::io::duplex(64);
        let server = async move {
            let mut seen = vec![0; 256];
            let _ = far.read(&mut seen).await.unwrap();
            for piece in ["HTTP/1.1 200 O", "K\r\nContent-Le", "ngth: 5\r\n\r\nhe", "llo"] {
                far.write_all(piece.as_bytes()).await.unwrap();
                tokio::task::yield_now().await;
            }
            far
        };
        let mut connection = Connection::new(near);
        let request = Request::new("/", 0);
        let (answer, _far) = tokio::join!(connection.exchange(&request), server);
        let answer = answer.unwrap();
        assert_eq!((answer.status, answer.body), (200, b"hello".as_slice()));
    }

    #[tokio::test]
    async fn a_body_is_sent_whole() {
        let (near, mut far) = tokio::io::duplex(1024);
        let body = 3 * CHUNK + 17;
        let request = Request::new("/", body);
        let head = request.head.len();
        let server = async move {
            let mut seen = vec![0; head + body];
            far.read_exact(&mut seen).await.unwrap();
            far.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            far
        };
        let mut connection = Connection::new(near);
        let (answer, _far) = tokio::join!(connection.exchange(&request), server);
        assert_eq!(answer.unwrap().status, 200);
    }

    #[test]
    fn a_request_in_bytes_is_sent_as_it_is() {
        let request = Request::of_bytes(b"POST / HTTP/1.1\r\ncontent-length: 3\r\n\r\nabc".to_vec());
        assert!(request.head.ends_with(b"\r\n\r\n"));
        assert_eq!((request.chunk.as_slice(), request.body), (b"abc".as_slice(), 3));
    }

    #[test]
    fn an_answer_without_a_length_is_refused() {
        assert!(parse(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").is_err());
        assert!(parse(b"HTTP/1.1 200 OK\r\n").unwrap().is_none());
    }
}
