//! A client of HTTP/2 that costs next to nothing: the request is one constant header block, and of a response
//! only what the bed must know is decoded: the status, the bytes, the end of the stream.
//!
//! That is a fair reading of RFC 9113 and RFC 7541: we announce a header table of size 0, so no encoder may refer
//! to a dynamic entry, and `:status` comes first. Requests have no body. Settings, pings and flow control are
//! answered as they must be.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::{Error, ErrorKind, Result};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::Instant;

use super::tally::Tally;
use crate::tokens;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEADER: usize = 9;
/// What a peer may send in one frame, as we leave the setting alone.
const MAX_FRAME: usize = 16 * 1024;
/// The window that we give the connection, and half of which we give back at a time. A stream has as much, more than any of this bed
/// lasts for.
const WINDOW: u32 = 1 << 30;

mod kind {
    pub(super) const DATA: u8 = 0;
    pub(super) const HEADERS: u8 = 1;
    pub(super) const RESET: u8 = 3;
    pub(super) const SETTINGS: u8 = 4;
    pub(super) const PING: u8 = 6;
    pub(super) const GOAWAY: u8 = 7;
    pub(super) const WINDOW_UPDATE: u8 = 8;
}

mod flag {
    pub(super) const END_STREAM: u8 = 0x1;
    pub(super) const ACK: u8 = 0x1;
    pub(super) const END_HEADERS: u8 = 0x4;
    pub(super) const PADDED: u8 = 0x8;
    pub(super) const PRIORITY: u8 = 0x20;
}

/// What happened on a stream.
pub(crate) struct Event<'a> {
    pub(crate) stream: u32,
    pub(crate) status: Option<u16>,
    pub(crate) data: &'a [u8],
    pub(crate) ended: bool,
    pub(crate) reset: bool,
}

/// One connection.
pub(crate) struct Connection<S> {
    stream: S,
    input: Vec<u8>,
    /// `input[from..to]` has been read and not been looked at.
    from: usize,
    to: usize,
    output: Vec<u8>,
    headers: Vec<u8>,
    next: u32,
    owed: u32,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Says hello; what is queued travels with the first flush.
    pub(crate) fn new(stream: S, secure: bool) -> Self {
        let mut output = PREFACE.to_vec();
        // HEADER_TABLE_SIZE = 0, ENABLE_PUSH = 0, INITIAL_WINDOW_SIZE.
        let mut settings = vec![0, 1, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 4];
        settings.extend_from_slice(&WINDOW.to_be_bytes());
        frame(&mut output, kind::SETTINGS, 0, 0, &settings);
        frame(&mut output, kind::WINDOW_UPDATE, 0, 0, &WINDOW.to_be_bytes());
        let headers = headers(secure, "/");
        Self { stream, input: vec![0; 4 * MAX_FRAME], from: 0, to: 0, output, headers, next: 1, owed: 0 }
    }

    /// Queues a request and says on which stream.
    pub(crate) fn request(&mut self) -> u32 {
        let stream = self.next;
        self.next += 2;
        frame(&mut self.output, kind::HEADERS, flag::END_HEADERS | flag::END_STREAM, stream, &self.headers);
        stream
    }

    /// Sends what is queued, waits for bytes, and tells what they meant.
    pub(crate) async fn turn(&mut self, mut tell: impl FnMut(Event<'_>)) -> Result<()> {
        if !self.output.is_empty() {
            self.stream.write_all(&self.output).await?;
            self.stream.flush().await?;
            self.output.clear();
        }
        if self.from > 0 {
            self.input.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
        }
        let read = self.stream.read(&mut self.input[self.to..]).await?;
        if read == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        self.to += read;
        while let Some(length) = self.frame_length()? {
            let frame = &self.input[self.from..self.from + HEADER + length];
            if let Some(event) = obey(frame, &mut self.output, &mut self.owed)? {
                tell(event);
            }
            self.from += HEADER + length;
        }
        Ok(())
    }

    /// The length of the next frame's payload, if all of it is here.
    fn frame_length(&self) -> Result<Option<usize>> {
        let [a, b, c, ..] = self.input[self.from..self.to] else { return Ok(None) };
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if length > MAX_FRAME {
            return Err(invalid("a frame longer than we allow"));
        }
        Ok((self.to - self.from >= HEADER + length).then_some(length))
    }

    /// `streams` requests in flight, each followed by the next, until an error ends the connection.
    pub(crate) async fn closed_loop(&mut self, streams: usize, tally: &Tally) -> Result<Infallible> {
        let mut flying: Vec<Flight> = Vec::with_capacity(streams);
        loop {
            while flying.len() < streams {
                flying.push(Flight { stream: self.request(), began: Instant::now(), status: 0 });
            }
            self.turn(|event| {
                let Some(at) = flying.iter().position(|flight| flight.stream == event.stream) else { return };
                if let Some(status) = event.status {
                    flying[at].status = status;
                }
                if event.ended || event.reset {
                    let flight = flying.swap_remove(at);
                    tally.answered(flight.began, if event.reset { 0 } else { flight.status }, 0);
                }
            })
            .await?;
        }
    }

    /// `streams` of tokens at once, read until an error ends the connection.
    pub(crate) async fn token_streams(
        mut self,
        streams: usize,
        secure: bool,
        tally: &Tally,
    ) -> Result<Infallible> {
        self.headers = headers(secure, tokens::PATH);
        let mut readers: BTreeMap<u32, tokens::Reader> =
            (0..streams).map(|_| (self.request(), tokens::Reader::default())).collect();
        loop {
            let mut broken = None;
            self.turn(|event| {
                let Some(reader) = readers.get_mut(&event.stream) else { return };
                reader.take(event.data, tokens::now(), |arrived| tally.token(arrived));
                match event.status {
                    Some(status) if status != 200 => {
                        broken = Some(format!("a stream was answered with status {status}"));
                    }
                    _ if event.ended || event.reset => broken = Some("a stream of tokens ended".to_owned()),
                    _ => {}
                }
            })
            .await?;
            if let Some(broken) = broken {
                return Err(Error::other(broken));
            }
        }
    }

    /// One request, its status and its body.
    pub(crate) async fn exchange(&mut self) -> Result<(u16, Vec<u8>)> {
        let stream = self.request();
        let (mut status, mut body, mut ended, mut reset) = (0, Vec::new(), false, false);
        while !ended {
            self.turn(|event| {
                if event.stream == stream {
                    status = event.status.unwrap_or(status);
                    body.extend_from_slice(event.data);
                    reset |= event.reset;
                    ended |= event.ended || event.reset;
                }
            })
            .await?;
        }
        if reset { Err(ErrorKind::ConnectionReset.into()) } else { Ok((status, body)) }
    }
}

/// The header block of a GET: `:method`, `:scheme` and a `:path` of `/` from the static table; other paths and `:authority` as
/// literals, never indexed.
fn headers(secure: bool, path: &str) -> Vec<u8> {
    let mut headers = vec![0x82, if secure { 0x87 } else { 0x86 }];
    match path {
        "/" => headers.push(0x84),
        // A length below 127 is one byte.
        _ => headers.extend([0x14, path.len() as u8].iter().chain(path.as_bytes())),
    }
    headers.extend(b"\x11\x09localhost");
    headers
}

struct Flight {
    stream: u32,
    began: Instant,
    status: u16,
}

/// Does what a frame asks of us, and tells what it means for a stream, if anything.
fn obey<'a>(frame_: &'a [u8], output: &mut Vec<u8>, owed: &mut u32) -> Result<Option<Event<'a>>> {
    let (head, payload) = frame_.split_at(HEADER);
    let (kind, flags) = (head[3], head[4]);
    let stream = u32::from_be_bytes([head[5] & 0x7f, head[6], head[7], head[8]]);
    let ended = flags & flag::END_STREAM != 0;
    match kind {
        kind::DATA => {
            *owed += payload.len() as u32;
            if *owed >= WINDOW / 2 {
                frame(output, kind::WINDOW_UPDATE, 0, 0, &owed.to_be_bytes());
                *owed = 0;
            }
            let data = unpad(payload, flags, false)?;
            Ok(Some(Event { stream, status: None, data, ended, reset: false }))
        }
        kind::HEADERS => {
            let status = status(unpad(payload, flags, true)?);
            Ok(Some(Event { stream, status, data: &[], ended, reset: false }))
        }
        kind::RESET => Ok(Some(Event { stream, status: None, data: &[], ended: false, reset: true })),
        kind::SETTINGS if flags & flag::ACK == 0 => {
            frame(output, kind::SETTINGS, flag::ACK, 0, &[]);
            Ok(None)
        }
        kind::PING if flags & flag::ACK == 0 => {
            frame(output, kind::PING, flag::ACK, 0, payload);
            Ok(None)
        }
        kind::GOAWAY => Err(Error::new(ErrorKind::ConnectionAborted, "the server said goodbye (GOAWAY)")),
        _ => Ok(None),
    }
}

/// The payload without its padding and, of headers, without its priority.
fn unpad(payload: &[u8], flags: u8, headers: bool) -> Result<&[u8]> {
    let padded = flags & flag::PADDED != 0;
    let front = usize::from(padded) + if headers && flags & flag::PRIORITY != 0 { 5 } else { 0 };
    let back = if padded { usize::from(*payload.first().unwrap_or(&0)) } else { 0 };
    payload
        .len()
        .checked_sub(back)
        .and_then(|end| payload.get(front..end))
        .ok_or_else(|| invalid("bad padding"))
}

/// The status at the head of a header block; `None` in trailers.
fn status(block: &[u8]) -> Option<u16> {
    let mut block = block;
    // Table size updates may come first: 001xxxxx, and more bytes if all five bits are set.
    while let Some((first, rest)) = block.split_first()
        && first & 0xe0 == 0x20
    {
        block = rest;
        if first & 0x1f == 0x1f {
            let end = block.iter().position(|byte| byte & 0x80 == 0)?;
            block = &block[end + 1..];
        }
    }
    match block.first()? {
        index @ 0x88..=0x8e => [200, 204, 206, 304, 400, 404, 500].get(usize::from(index - 0x88)).copied(),
        // `:status` as a literal: a status that the static table does not have.
        0x08 | 0x18 | 0x48 => Some(599),
        _ => None,
    }
}

fn frame(output: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = (payload.len() as u32).to_be_bytes();
    output.extend_from_slice(&[length[1], length[2], length[3], kind, flags]);
    output.extend_from_slice(&stream.to_be_bytes());
    output.extend_from_slice(payload);
}

fn invalid(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_read_behind_table_size_updates() {
        assert_eq!(status(&[0x88]), Some(200));
        assert_eq!(status(&[0x20, 0x88, 0xbe]), Some(200));
        assert_eq!(status(&[0x3f, 0xe1, 0x1f, 0x8e]), Some(500));
        assert_eq!(status(&[0x08, 3, b'5', b'0', b'3']), Some(599));
        assert_eq!(status(&[0x40, 1, b'a', 1, b'b']), None, "trailers");
        assert_eq!(status(&[]), None);
    }

    #[test]
    fn padding_and_priority_are_taken_off() {
        let flags = flag::PADDED | flag::PRIORITY;
        assert_eq!(unpad(&[2, 0, 0, 0, 0, 0, 0x88, 0, 0], flags, true).unwrap(), &[0x88]);
        assert_eq!(unpad(&[1, 7, 0], flag::PADDED, false).unwrap(), &[7]);
        assert!(unpad(&[9, 7, 0], flag::PADDED, false).is_err());
    }

    #[test]
    fn a_ping_is_answered_with_its_own_bytes() {
        let mut ping = Vec::new();
        frame(&mut ping, kind::PING, 0, 0, b"12345678");
        let (mut output, mut owed) = (Vec::new(), 0);
        assert!(obey(&ping, &mut output, &mut owed).unwrap().is_none());
        assert_eq!(output[4], flag::ACK);
        assert_eq!(&output[HEADER..], b"12345678");
    }
}
