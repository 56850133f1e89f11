//! What a connection may send that brings nothing. Pure: time is an argument.
//!
//! Two accounts. *Idle* frames are all that carry no part of a request: PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty frames, types that
//! nobody knows. A request, a piece of a body and above all each piece of an answer, which the client has to make room for, pay for some of
//! them. *Resets* end a stream before its answer has: an answer that came to its end pays for one. So a client that works may send
//! any number of either, and one that does not gets what time brings.

use std::fmt;

use tokio::time::Instant;

use super::frames::{ACK, DATA, END_STREAM, HEADERS, Head, PING, RST_STREAM, SETTINGS};

/// Idle frames at once. A gRPC client that measures its path sends a PING for each burst of data, one that opens its windows a
/// WINDOW_UPDATE for each piece.
pub const IDLE: u32 = 10_000;
/// Resets at once: four times the streams of a connection (the default of `Limits::streams`), so that a caller may give up all that it
/// waits for, several times over.
pub const RESETS: u32 = 1_024;
/// What time brings to each account, each second.
pub const EACH_SECOND: u32 = 100;
/// Idle frames that a piece of an answer pays for: a WINDOW_UPDATE for its stream, one for the connection, and room.
const ANSWERED: f64 = 4.0;

/// What there was too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    /// Frames that carry nothing.
    Idle,
    /// Streams that are reset before they are answered.
    Resets,
}

impl Flood {
    /// Its name in metrics and logs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle-frames",
            Self::Resets => "resets",
        }
    }
}

impl fmt::Display for Flood {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Idle => {
                write!(f, "more than {IDLE} frames that carry nothing, and {EACH_SECOND} more each second")
            }
            Self::Resets => {
                write!(
                    f,
                    "more than {RESETS} streams reset before they were answered, and {EACH_SECOND} more each second"
                )
            }
        }
    }
}

impl std::error::Error for Flood {}

/// The accounts of one connection.
#[derive(Debug)]
pub struct Allowance {
    idle: f64,
    resets: f64,
    /// Until when time has been paid.
    paid: Instant,
}

impl Allowance {
    /// Full ones.
    pub const fn new(now: Instant) -> Self {
        Self { idle: IDLE as f64, resets: RESETS as f64, paid: now }
    }

    /// A frame of the client's; `now` is asked only if the frame costs something.
    pub fn comes(&mut self, head: Head, now: impl FnOnce() -> Instant) -> Option<Flood> {
        match head.kind {
            RST_STREAM => {
                self.grow(now());
                self.resets -= 1.0;
            }
            HEADERS => self.earn(1.0),
            DATA if head.length > 0 || head.has(END_STREAM) => self.earn(1.0),
            _ => {
                self.grow(now());
                self.idle -= 1.0;
            }
        }
        if self.idle < 0.0 {
            Some(Flood::Idle)
        } else if self.resets < 0.0 {
            Some(Flood::Resets)
        } else {
            None
        }
    }

    /// A frame of ours.
    pub const fn goes(&mut self, head: Head) {
        match head.kind {
            HEADERS | DATA => {
                self.earn(ANSWERED);
                if head.has(END_STREAM) {
                    self.resets = (self.resets + 1.0).min(RESETS as f64);
                }
            }
            // The client has to answer these.
            PING | SETTINGS if !head.has(ACK) => self.earn(1.0),
            _ => {}
        }
    }

    const fn earn(&mut self, frames: f64) {
        self.idle = (self.idle + frames).min(IDLE as f64);
    }

    fn grow(&mut self, now: Instant) {
        let brought = now.saturating_duration_since(self.paid).as_secs_f64() * EACH_SECOND as f64;
        self.paid = now;
        self.earn(brought);
        self.resets = (self.resets + brought).min(RESETS as f64);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn head(kind: u8, length: u32, flags: u8) -> Head {
        Head { length, kind, flags, stream: 1 }
    }

    const WINDOW_UPDATE: u8 = 0x8;
    const CONTINUATION: u8 = 0x9;

    #[test]
    fn what_brings_nothing_has_an_end_and_time_brings_more() {
        for kind in [
            head(PING, 8, 0),
            head(SETTINGS, 0, 0),
            head(DATA, 0, 0),
            head(CONTINUATION, 0, 0),
            head(0xfa, 9, 0),
        ] {
            let start = Instant::now();
            let mut allowance = Allowance::new(start);
            for _ in 0..IDLE {
                assert_eq!(allowance.comes(kind, || start), None);
            }
            let later = start + Duration::from_secs(1);
            for _ in 0..EACH_SECOND {
                assert_eq!(allowance.comes(kind, || later), None);
            }
            assert_eq!(allowance.comes(kind, || later), Some(Flood::Idle));
        }
    }

    #[test]
    fn streams_that_are_begun_only_to_be_reset_have_an_end() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        for _ in 0..RESETS {
            assert_eq!(allowance.comes(head(HEADERS, 30, END_STREAM), || start), None);
            assert_eq!(allowance.comes(head(RST_STREAM, 4, 0), || start), None);
        }
        allowance.comes(head(HEADERS, 30, END_STREAM), || start);
        assert_eq!(allowance.comes(head(RST_STREAM, 4, 0), || start), Some(Flood::Resets));
    }

    #[test]
    fn who_works_may_go_on_for_ever() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        for _ in 0..100_000 {
            // A request, its answer in one piece, the windows opened again, a PING; and one that is given up.
            assert_eq!(allowance.comes(head(HEADERS, 30, END_STREAM), || start), None);
            allowance.goes(head(HEADERS, 30, 0));
            allowance.goes(head(DATA, 200, END_STREAM));
            for kind in [WINDOW_UPDATE, WINDOW_UPDATE, PING, RST_STREAM] {
                assert_eq!(allowance.comes(head(kind, 4, 0), || start), None);
            }
        }
    }
}
