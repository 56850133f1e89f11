//! What a plaintext connection speaks, where nobody has declared it.
//!
//! A hint with a timeout of milliseconds: a client that waits for the server to speak first is taken for bytes after
//! that, and counted. Nothing is consumed: the bytes are peeked at.

use std::time::Duration;

use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::telemetry::metric;

/// What the first bytes look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detected {
    /// A request line.
    Http1,
    /// The HTTP/2 preface (RFC 9113, 3.4).
    Http2,
    /// A TLS handshake record.
    Tls,
    /// Something else, or nothing within the timeout.
    Bytes,
    /// The client has ended its side without a byte: a probe over TCP, a scanner, or somebody who only listens.
    Nothing,
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The longest method that is looked for: so many bytes always decide.
pub const LOOK: usize = 24;
/// How soon it is looked again after bytes that decide nothing, and how much later at most: whoever sends one byte and
/// no more is nobody yet, and a thousand of these may not cost what requests need. Each pause is as long as all before
/// it, so that nobody waits longer than twice what he took to send.
const SOON: Duration = Duration::from_millis(1);
const LATER: Duration = Duration::from_millis(256);

/// Looks at the first bytes of a connection for at most `limit`.
pub async fn detect(stream: &TcpStream, limit: Duration) -> Detected {
    let start = Instant::now();
    let mut buffer = [0; LOOK];
    let detected = tokio::time::timeout(limit, async {
        let mut pause = SOON;
        loop {
            // Asked before the bytes: what has come before the end is then among them.
            let ended = stream.ready(Interest::READABLE).await.is_ok_and(|ready| ready.is_read_closed());
            let read = stream.peek(&mut buffer).await.unwrap_or(0);
            if read == 0 {
                return Detected::Nothing;
            }
            if let Some(detected) = judge(&buffer[..read]) {
                return detected;
            }
            if ended {
                return Detected::Bytes;
            }
            // More bytes are on their way; peeking does not wait for them.
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LATER);
        }
    })
    .await;
    detected.unwrap_or_else(|_| {
        metrics::counter!(metric::DETECT_TIMEOUTS.name).increment(1);
        tracing::debug!(waited = ?start.elapsed(), "nothing to tell the protocol by; declare it with appProtocol");
        Detected::Bytes
    })
}

/// What the first bytes are, at most [`LOOK`] of them; `None` while those so far could still be several things.
pub fn judge(bytes: &[u8]) -> Option<Detected> {
    if bytes.first() == Some(&0x16) {
        return Some(Detected::Tls);
    }
    let common = bytes.len().min(PREFACE.len());
    if bytes[..common] == PREFACE[..common] {
        return (common == PREFACE.len()).then_some(Detected::Http2);
    }
    // A method is a token (RFC 9110, 9.1), upper case in all that is registered, and then a space.
    match bytes.iter().position(|byte| !byte.is_ascii_uppercase() && *byte != b'-') {
        Some(at) if at > 0 && bytes[at] == b' ' => Some(Detected::Http1),
        Some(_) => Some(Detected::Bytes),
        None if bytes.len() >= LOOK => Some(Detected::Bytes),
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    #[test]
    fn byte_by_byte() {
        let table: &[(&[u8], Detected, usize)] = &[
            (b"GET / HTTP/1.1\r\n", Detected::Http1, 4),
            (b"POST /v2", Detected::Http1, 5),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Detected::Http2, 24),
            (b"PRI /x HTTP/1.1", Detected::Http1, 5),
            (b"\x16\x03\x01", Detected::Tls, 1),
            (b"\0\0\0", Detected::Bytes, 1),
            (b"hello", Detected::Bytes, 1),
            (b"GETTHEMALLBEFORETHEYGETYOU", Detected::Bytes, 24),
        ];
        for (bytes, expected, after) in table {
            for len in 1..*after {
                assert_eq!(judge(&bytes[..len]), None, "{len} bytes of {bytes:?}");
            }
            assert_eq!(judge(&bytes[..*after]), Some(*expected), "{bytes:?}");
        }
    }

    /// A connection, from the client's end and from the server's.
    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn one_byte_and_no_more_costs_no_time() {
        let (mut client, server) = pair().await;
        client.write_all(b"P").await.unwrap();
        let mut looks = 0;
        let mut looking = std::pin::pin!(detect(&server, Duration::from_millis(500)));
        let detected = std::future::poll_fn(|cx| {
            looks += 1;
            looking.as_mut().poll(cx)
        });
        assert_eq!(detected.await, Detected::Bytes);
        assert!((1..20).contains(&looks), "looked {looks} times");
    }

    #[tokio::test]
    async fn what_ends_before_it_is_clear_is_bytes_at_once() {
        let (mut client, mut server) = pair().await;
        client.write_all(b"HELLO").await.unwrap();
        client.shutdown().await.unwrap();
        let detected = tokio::time::timeout(Duration::from_secs(5), detect(&server, Duration::from_secs(60)));
        assert_eq!(detected.await.unwrap(), Detected::Bytes);
        let mut all = String::new();
        server.read_to_string(&mut all).await.unwrap();
        assert_eq!(all, "HELLO", "nothing was taken");
    }

    #[tokio::test]
    async fn a_client_that_says_nothing_is_taken_for_bytes_in_time() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        assert_eq!(detect(&server, Duration::from_millis(20)).await, Detected::Bytes);
        client.write_all(b"G").await.unwrap();
        let more = async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            client.write_all(b"ET / HTTP/1.1\r\n").await.unwrap();
        };
        let (detected, ()) = tokio::join!(detect(&server, Duration::from_secs(5)), more);
        assert_eq!(detected, Detected::Http1);
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (server, _) = listener.accept().await.unwrap();
        drop(client);
        assert_eq!(detect(&server, Duration::from_secs(5)).await, Detected::Nothing);
    }
}
