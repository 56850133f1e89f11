//! HTTP/1.1 by hand, for both ends: it sends exactly the bytes it is told and shows exactly the bytes that came, so
//! that a test sees what a proxy changed.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::PATIENCE;

/// One side of a connection.
#[derive(Debug)]
pub struct Wire<S = TcpStream> {
    /// The connection.
    pub io: S,
    buffer: Vec<u8>,
}

/// The first line and the headers of a message, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// The request or status line.
    pub first: String,
    /// The headers as they came.
    pub headers: Vec<(String, String)>,
}

/// A message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Message {
    /// First line and headers.
    pub head: Head,
    /// The body, decoded.
    pub body: Vec<u8>,
    /// The trailers.
    pub trailers: Vec<(String, String)>,
}

impl Head {
    /// The status of a response; 0 for anything else.
    pub fn status(&self) -> u16 {
        self.first.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    /// The first header of that name.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }

    /// All headers of that name, in their order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let same = |known: &&(String, String)| known.0.eq_ignore_ascii_case(name);
        self.headers.iter().filter(same).map(|(_, value)| value.as_str()).collect()
    }

    fn is_chunked(&self) -> bool {
        self.get("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"))
    }

    fn length(&self) -> Option<usize> {
        self.get("content-length")?.parse().ok()
    }
}

impl Message {
    /// The status of a response.
    pub fn status(&self) -> u16 {
        self.head.status()
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// Why the proxy answered by itself.
    pub fn reason(&self) -> Option<&str> {
        self.head.get("penstock-error")
    }
}

impl Wire {
    /// Connects.
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = timeout(PATIENCE, TcpStream::connect(address)).await.unwrap().unwrap();
        stream.set_nodelay(true).unwrap();
        Self::new(stream)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// Speaks over an open connection.
    pub fn new(io: S) -> Self {
        Self { io, buffer: Vec::new() }
    }

    /// Sends bytes as they are.
    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.io.write_all(bytes.as_ref()).await?;
        self.io.flush().await
    }

    /// Ends our direction.
    pub async fn finish(&mut self) {
        self.io.shutdown().await.unwrap();
    }

    async fn fill(&mut self) -> io::Result<()> {
        let read = timeout(PATIENCE, self.io.read_buf(&mut self.buffer));
        match read.await.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "nothing came"))?? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    /// The next `length` bytes.
    pub async fn bytes(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < length {
            self.fill().await?;
        }
        Ok(self.buffer.drain(..length).collect())
    }

    /// Bytes that have come and were not asked for yet.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }

    /// Everything until the other side is done.
    pub async fn rest(&mut self) -> Vec<u8> {
        while self.fill().await.is_ok() {}
        std::mem::take(&mut self.buffer)
    }

    /// Whether nothing comes for a while.
    pub async fn is_silent(&mut self, time: Duration) -> bool {
        self.buffer.is_empty() && timeout(time, self.io.read_buf(&mut self.buffer)).await.is_err()
    }

    async fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                let line = self.bytes(end + 2).await?;
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            self.fill().await?;
        }
    }

    async fn fields(&mut self) -> io::Result<Vec<(String, String)>> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await?;
            match line.split_once(':') {
                Some((name, value)) => fields.push((name.to_owned(), value.trim().to_owned())),
                None => return Ok(fields),
            }
        }
    }

    /// The next first line with its headers.
    pub async fn head(&mut self) -> io::Result<Head> {
        let first = self.line().await?;
        Ok(Head { first, headers: self.fields().await? })
    }

    /// One chunk of a chunked body; `None` at its end.
    pub async fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = self.line().await?;
        let size = usize::from_str_radix(line.split(';').next().unwrap_or_default().trim(), 16)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, format!("{line:?}: {error}")))?;
        if size == 0 {
            return Ok(None);
        }
        let data = self.bytes(size).await?;
        self.bytes(2).await?;
        Ok(Some(data))
    }

    async fn body(&mut self, head: Head, until_close: bool) -> io::Result<Message> {
        let mut message = Message { head, ..Message::default() };
        if message.head.is_chunked() {
            while let Some(chunk) = self.chunk().await? {
                message.body.extend(chunk);
            }
            message.trailers = self.fields().await?;
        } else if let Some(length) = message.head.length() {
            message.body = self.bytes(length).await?;
        } else if until_close {
            message.body = self.rest().await;
        }
        Ok(message)
    }

    /// A whole request.
    pub async fn request(&mut self) -> io::Result<Message> {
        let head = self.head().await?;
        self.body(head, false).await
    }

    /// A whole response to a request other than HEAD; 1xx are skipped.
    pub async fn response(&mut self) -> io::Result<Message> {
        loop {
            let head = self.head().await?;
            match head.status() {
                101 | 204 | 304 => return Ok(Message { head, ..Message::default() }),
                100..200 => {}
                _ => return self.body(head, true).await,
            }
        }
    }

    /// Sends a request and reads its response.
    pub async fn ask(&mut self, request: impl AsRef<[u8]>) -> io::Result<Message> {
        self.send(request).await?;
        self.response().await
    }
}

/// One GET over a connection of its own.
pub async fn get(address: SocketAddr, path: &str) -> io::Result<Message> {
    let stream = timeout(PATIENCE, TcpStream::connect(address)).await??;
    Wire::new(stream)
        .ask(format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"))
        .await
}
