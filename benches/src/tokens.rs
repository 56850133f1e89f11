//! Streams of tokens: what the upstream sends at a steady pace, and what whoever reads it can tell of the way.
//!
//! A token is [`SIZE`] bytes that begin with the moment at which it was sent, by the clock of the machine that both ends are
//! on. So what a gap between two tokens became on the way does not depend on how exactly the upstream kept its pace. All streams
//! have the same pace and another moment: together they are a steady flow, not a burst every [`PACE`].

use std::time::Duration;

use anyhow::Result;
use bytes::Bytes;
use futures_util::stream;
use http_body_util::StreamBody;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Frame;
use rustix::time::{ClockId, clock_gettime};

use crate::load::pace::Ticks;

/// Where the upstream answers with a stream that ends when nobody reads it.
pub(crate) const PATH: &str = "/tokens";
/// Bytes of a token, as an event of a streamed chat completion has them.
pub(crate) const SIZE: usize = 200;
/// Between two tokens of a stream: 50 a second, what large models do for one of many readers.
pub(crate) const PACE: Duration = Duration::from_millis(20);
/// Streams whose moments are spread over a [`PACE`]; the next one begins again where the first one is.
pub(crate) const STREAMS: usize = 100;

/// The bytes of a moment.
const STAMP: usize = size_of::<u64>();

/// Nanoseconds of the machine's clock, the same in all its processes.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // Neither is ever negative.
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// How long the `nth` stream waits at `now` for its first token.
fn wait(nth: usize, now: u64) -> Duration {
    let pace = PACE.as_nanos() as u64;
    let moment = pace * (nth % STREAMS) as u64 / STREAMS as u64;
    Duration::from_nanos(pace - (now + pace - moment) % pace)
}

/// The `nth` stream, from now on.
pub(crate) fn stream(nth: usize) -> Result<UnsyncBoxBody<Bytes, std::io::Error>> {
    let ticks = Ticks::new(wait(nth, now()), PACE)?;
    // What is late is sent at once, with the moment at which it is.
    let tokens = stream::unfold((ticks, 0), async |(mut ticks, mut due)| {
        while due == 0 {
            match ticks.next().await {
                Ok(count) => due = count,
                Err(error) => return Some((Err(error), (ticks, 0))),
            }
        }
        Some((Ok(Frame::data(token(now()))), (ticks, due - 1)))
    });
    Ok(UnsyncBoxBody::new(StreamBody::new(tokens)))
}

/// A token that is sent at `now`.
fn token(now: u64) -> Bytes {
    let mut token = vec![b't'; SIZE];
    token[..STAMP].copy_from_slice(&now.to_be_bytes());
    token.into()
}

/// A token that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrived {
    /// How long it was on its way.
    pub(crate) way: Duration,
    /// How much longer the gap before it was at its arrival than when it was sent; nothing where it was shorter, or
    /// where it is the first one.
    pub(crate) stretch: Duration,
}

/// Reads a stream, in whatever pieces it comes.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    stamp: [u8; STAMP],
    /// Bytes of the token that is not all here.
    read: usize,
    /// When the one before was sent, and when it arrived.
    before: Option<(u64, u64)>,
}

impl Reader {
    /// Takes what arrived at `now`, and tells of each token that it completes.
    pub(crate) fn take(&mut self, mut bytes: &[u8], now: u64, mut tell: impl FnMut(Arrived)) {
        while let Some((first, rest)) = bytes.split_at_checked((SIZE - self.read).min(bytes.len()))
            && !first.is_empty()
        {
            let stamp = self.stamp.get_mut(self.read..).unwrap_or_default();
            stamp.iter_mut().zip(first).for_each(|(to, from)| *to = *from);
            self.read += first.len();
            bytes = rest;
            if self.read == SIZE {
                self.read = 0;
                tell(self.complete(now));
            }
        }
    }

    fn complete(&mut self, now: u64) -> Arrived {
        let sent = u64::from_be_bytes(self.stamp);
        let stretch = self.before.map_or(0, |(sent_before, before)| {
            now.saturating_sub(before).saturating_sub(sent.saturating_sub(sent_before))
        });
        self.before = Some((sent, now));
        Arrived {
            way: Duration::from_nanos(now.saturating_sub(sent)),
            stretch: Duration::from_nanos(stretch),
        }
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    const US: u64 = 1000;

    #[test]
    fn moments_are_spread_over_a_pace() {
        let pace = PACE.as_nanos() as u64;
        for now in [0, 1, 7 * US, pace - 1, pace, 123_456_789_012] {
            let mut moments: Vec<u64> =
                (0..STREAMS).map(|nth| (now + wait(nth, now).as_nanos() as u64) % pace).collect();
            assert!((0..STREAMS).all(|nth| wait(nth, now) <= PACE && !wait(nth, now).is_zero()));
            moments.sort_unstable();
            assert!(moments.windows(2).all(|two| two[1] - two[0] == pace / STREAMS as u64), "at {now}");
        }
        assert_eq!(wait(STREAMS + 3, 5), wait(3, 5));
    }

    #[test]
    fn what_the_way_does_to_a_gap_is_told_apart_from_the_pace() {
        // Sent, and arrived: 20 ms apart after 30 us each; the third held up for 500 us more; the fourth as before.
        let ms = 1_000_000;
        let tokens = [(0, 30), (20 * ms, 30), (41 * ms, 530), (60 * ms, 30)];
        let mut reader = Reader::default();
        let mut told = Vec::new();
        for (sent, way) in tokens {
            reader.take(&token(sent), sent + way * US, |arrived| told.push(arrived));
        }
        let ways: Vec<u128> = told.iter().map(|arrived| arrived.way.as_micros()).collect();
        let stretches: Vec<u128> = told.iter().map(|arrived| arrived.stretch.as_micros()).collect();
        assert_eq!(ways, [30, 30, 530, 30]);
        assert_eq!(stretches, [0, 0, 500, 0]);
    }

    #[test]
    fn tokens_may_be_cut_and_joined_anywhere() {
        let all: Vec<u8> = (1..=5).flat_map(|at| token(at * US)).collect();
        for piece in [1, 3, STAMP, SIZE - 1, SIZE, SIZE + 1, all.len()] {
            let mut reader = Reader::default();
            let mut ways = Vec::new();
            for bytes in all.chunks(piece) {
                reader.take(bytes, 10 * US, |arrived| ways.push(arrived.way.as_micros()));
            }
            assert_eq!(ways, [9, 8, 7, 6, 5], "in pieces of {piece}");
        }
    }

    #[tokio::test]
    async fn a_stream_keeps_its_pace() {
        let mut body = stream(0).unwrap();
        let mut reader = Reader::default();
        let mut arrived = 0;
        let (began, mut first) = (now(), None);
        for _ in 0..5 {
            let data = body.frame().await.unwrap().unwrap().into_data().unwrap();
            first.get_or_insert_with(now);
            reader.take(&data, now(), |_| arrived += 1);
        }
        assert_eq!(arrived, 5);
        assert!(Duration::from_nanos(now() - first.unwrap_or(began)) > 3 * PACE);
    }
}
