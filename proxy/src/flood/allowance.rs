//! What a connection may send that brings nothing. Pure: time is an argument.
//!
//! Two accounts. *Idle* frames are all that carry no part of a request: PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty frames, types that
//! nobody knows. A request, what its body holds and above all what an answer holds, for which the client has to make room, pay for some of
//! them. *Resets* end a stream; an answer that has begun pays for one. So a client that works may send
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
/// Idle frames that a piece of an answer pays for: a WINDOW_UPDATE for its stream and one for the connection. Smaller pieces pay nothing: a
/// client that opens a window byte by byte gets what it asks for, at its own cost (CVE-2019-9511).
const PIECE: f64 = 2.0;
/// See above.
const SMALLEST: u32 = 16;
/// Bytes of an answer that pay for one more: clients that read 4 KiB at a time open both windows each time, however large the frame was (Go).
const BYTES: f64 = 1_024.0;

/// What there was too much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    /// Frames that carry nothing.
    Idle,
    /// Streams that are reset before an answer to them has begun.
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
            Self::Idle => f.write_str("too many frames that carry nothing"),
            Self::Resets => f.write_str("too many streams reset before an answer to them had begun"),
        }
    }
}

impl std::error::Error for Flood {}

/// The accounts of one connection.
#[derive(Debug)]
pub struct Allowance {
    idle: f64,
    resets: f64,
    /// So many callers share it, and each may give up as much as one who has a connection for himself.
    callers: f64,
    /// Until when time has been paid.
    paid: Instant,
}

impl Allowance {
    /// Full ones, for so many callers.
    pub fn new(callers: u32, now: Instant) -> Self {
        let callers = f64::from(callers.max(1));
        Self { idle: f64::from(IDLE), resets: callers * f64::from(RESETS), callers, paid: now }
    }

    /// A frame of the client's; `now` is asked only if the frame costs something.
    pub fn comes(&mut self, head: Head, now: impl FnOnce() -> Instant) -> Option<Flood> {
        match head.kind {
            RST_STREAM => {
                self.grow(now());
                self.resets -= 1.0;
            }
            HEADERS => self.earn(1.0),
            DATA if head.length > 0 || head.has(END_STREAM) => self.earn(f64::from(head.length) / BYTES),
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
    pub fn goes(&mut self, head: Head) {
        match head.kind {
            // Trailers too, which does no harm: there is an answer before them.
            HEADERS => {
                self.earn(PIECE);
                self.repay(1.0);
            }
            DATA if head.length >= SMALLEST => self.earn(PIECE + f64::from(head.length) / BYTES),
            // The client has to answer these.
            PING | SETTINGS if !head.has(ACK) => self.earn(1.0),
            _ => {}
        }
    }

    fn earn(&mut self, frames: f64) {
        self.idle = (self.idle + frames).min(f64::from(IDLE));
    }

    fn repay(&mut self, resets: f64) {
        self.resets = (self.resets + resets).min(self.callers * f64::from(RESETS));
    }

    fn grow(&mut self, now: Instant) {
        let brought = now.saturating_duration_since(self.paid).as_secs_f64() * f64::from(EACH_SECOND);
        self.paid = now;
        self.earn(brought);
        self.repay(brought * self.callers);
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
            let mut allowance = Allowance::new(1, start);
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
        let mut allowance = Allowance::new(1, start);
        for _ in 0..RESETS {
            assert_eq!(allowance.comes(head(HEADERS, 30, END_STREAM), || start), None);
            assert_eq!(allowance.comes(head(RST_STREAM, 4, 0), || start), None);
        }
        allowance.comes(head(HEADERS, 30, END_STREAM), || start);
        assert_eq!(allowance.comes(head(RST_STREAM, 4, 0), || start), Some(Flood::Resets));
    }

    #[test]
    fn a_sidecars_connection_is_that_of_many_callers() {
        let start = Instant::now();
        let mut allowance = Allowance::new(64, start);
        for _ in 0..64 * RESETS {
            assert_eq!(allowance.comes(head(RST_STREAM, 4, 0), || start), None);
        }
        assert_eq!(allowance.comes(head(RST_STREAM, 4, 0), || start), Some(Flood::Resets));
    }

    #[test]
    fn who_opens_windows_byte_by_byte_pays_for_it() {
        let start = Instant::now();
        let mut allowance = Allowance::new(1, start);
        let mut dribble = || {
            allowance.goes(head(DATA, 1, 0));
            allowance.comes(head(WINDOW_UPDATE, 4, 0), || start)
        };
        assert_eq!((0..=IDLE).find_map(|_| dribble()), Some(Flood::Idle));
    }

    #[test]
    fn who_works_may_go_on_for_ever() {
        let start = Instant::now();
        let mut allowance = Allowance::new(1, start);
        let comes = |allowance: &mut Allowance, kind| {
            assert_eq!(allowance.comes(head(kind, 4, 0), || start), None);
        };
        for _ in 0..100_000 {
            // A request, its answer in one piece, the windows opened again, a PING; then it is given up.
            comes(&mut allowance, HEADERS);
            allowance.goes(head(HEADERS, 30, 0));
            allowance.goes(head(DATA, 200, END_STREAM));
            for kind in [WINDOW_UPDATE, WINDOW_UPDATE, PING, RST_STREAM] {
                comes(&mut allowance, kind);
            }
            // A large frame that is read 4 KiB at a time.
            allowance.goes(head(DATA, 256 << 10, 0));
            for _ in 0..64 {
                comes(&mut allowance, WINDOW_UPDATE);
                comes(&mut allowance, WINDOW_UPDATE);
            }
        }
    }
}
