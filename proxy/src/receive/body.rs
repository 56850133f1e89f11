//! A client's body: as hyper gives it, or as the connection does.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::gate::Source;
use crate::rest::Busy;
use crate::tee::Teed;

/// The first piece that is read of a body which is passed on, and what they grow to: what is only looked at should be small,
/// and what is passed on be few.
const FIRST: usize = 4 << 10;
const LARGEST: usize = 256 << 10;

/// A request's body, as it comes in.
#[derive(Debug)]
pub enum ClientBody {
    /// Through hyper. Its connection does not rest as long as it is read.
    Hyper(Incoming, Option<Busy>),
    /// Past it.
    Direct(Box<Direct>),
    /// Copied while it is read.
    Teed(Box<Teed<ClientBody>>),
}

/// Why a client's body broke off.
#[derive(Debug, thiserror::Error)]
pub enum Broken {
    /// As hyper says it.
    #[error(transparent)]
    Hyper(#[from] hyper::Error),
    /// As the connection says it.
    #[error("the connection ended in the middle of the body: {0}")]
    Direct(io::Error),
}

/// A body that its reader takes from the connection itself. Dropping it has what is left of it skipped.
#[derive(Debug)]
pub struct Direct {
    source: Arc<dyn Source>,
    left: u64,
    piece: usize,
    broken: bool,
}

impl Direct {
    pub(super) fn new(source: Arc<dyn Source>, left: u64) -> Self {
        Self { source, left, piece: FIRST, broken: false }
    }

    /// Bytes that have not been read.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Reads some of it into `out`, and says how many bytes; none only if there is no room, or nothing left.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>, out: &mut [u8]) -> Poll<io::Result<usize>> {
        if out.is_empty() || self.is_over() {
            return Poll::Ready(Ok(0));
        }
        let read = ready!(self.source.poll_fill(cx, out));
        Poll::Ready(self.note(read))
    }

    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Broken>>> {
        if self.is_over() {
            return Poll::Ready(None);
        }
        let most = self.piece.min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let mut piece = BytesMut::with_capacity(most);
        let read = ready!(self.source.poll_append(cx, &mut piece, most));
        // As long as the client sends faster than is read, larger pieces are worth it.
        if piece.len() == most {
            self.piece = (self.piece * 2).min(LARGEST);
        }
        Poll::Ready(Some(self.note(read).map(|_| piece.freeze()).map_err(Broken::Direct)))
    }

    fn note(&mut self, read: io::Result<usize>) -> io::Result<usize> {
        match &read {
            Ok(bytes) => self.left -= *bytes as u64,
            Err(_) => self.broken = true,
        }
        read
    }

    fn is_over(&self) -> bool {
        self.left == 0 || self.broken
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        if !self.is_over() {
            self.source.skip();
        }
    }
}

impl Body for ClientBody {
    type Data = Bytes;
    type Error = Broken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Broken>>> {
        match self.get_mut() {
            Self::Hyper(body, _) => Pin::new(body).poll_frame(cx).map_err(Broken::Hyper),
            Self::Direct(body) => body.poll_piece(cx).map_ok(Frame::data),
            Self::Teed(body) => body.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Hyper(body, _) => body.is_end_stream(),
            Self::Direct(body) => body.is_over(),
            Self::Teed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Hyper(body, _) => body.size_hint(),
            Self::Direct(body) => SizeHint::with_exact(body.left),
            Self::Teed(body) => body.size_hint(),
        }
    }
}
