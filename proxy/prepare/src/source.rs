//! Bytes as decoders read them, and who wants them no more is asked for now and then.

use std::io::{self, BufRead, Read, Seek, SeekFrom};

/// Bytes between two questions: some tens of microseconds of decoding.
const ASK_EVERY: usize = 16 << 10;

/// A reader of bytes that fails as soon as the caller does not want them any more.
pub(crate) struct Source<'a> {
    bytes: &'a [u8],
    at: usize,
    ask_at: usize,
    cancelled: &'a dyn Fn() -> bool,
}

impl<'a> Source<'a> {
    pub(crate) fn new(bytes: &'a [u8], cancelled: &'a dyn Fn() -> bool) -> Self {
        Self { bytes, at: 0, ask_at: 0, cancelled }
    }

    #[cold]
    fn ask(&mut self) -> io::Result<()> {
        self.ask_at = self.at.saturating_add(ASK_EVERY);
        if (self.cancelled)() { Err(io::Error::other("cancelled")) } else { Ok(()) }
    }
}

impl Read for Source<'_> {
    #[inline]
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.ask_at {
            self.ask()?;
        }
        let rest = &self.bytes[self.at..];
        if let ([to], [byte, ..]) = (&mut *to, rest) {
            *to = *byte;
            self.at += 1;
            return Ok(1);
        }
        let length = rest.len().min(to.len());
        to[..length].copy_from_slice(&rest[..length]);
        self.at += length;
        Ok(length)
    }
}

impl BufRead for Source<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at >= self.ask_at {
            self.ask()?;
        }
        let rest = &self.bytes[self.at..];
        Ok(&rest[..rest.len().min(ASK_EVERY)])
    }

    fn consume(&mut self, amount: usize) {
        self.at = self.bytes.len().min(self.at + amount);
    }
}

impl Seek for Source<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, offset) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::End(offset) => (self.bytes.len() as u64, offset),
            SeekFrom::Current(offset) => (self.at as u64, offset),
        };
        let at = base.checked_add_signed(offset).ok_or(io::ErrorKind::InvalidInput)?;
        // A place behind the end has nothing to read, which is all that anybody can see of it.
        self.at = usize::try_from(at).unwrap_or(usize::MAX).min(self.bytes.len());
        self.ask_at = self.at;
        Ok(at)
    }
}
