//! How fast the simulated GPU works at which time: its speed, and windows in which it is slower or stands still.
//!
//! In: a moment and an amount of work, in seconds of a GPU of speed 1. Out: the moment when it is done. Moments are
//! counted from the last reset, so that a window comes at the same time in every run.

use std::str::FromStr;
use std::time::Duration;

/// From when, for how long, at which part of the usual speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Window {
    from: f64,
    to: f64,
    factor: f64,
}

impl FromStr for Window {
    type Err = String;

    /// `2s+1500ms` stands still, `2s+1500ms*0.3` goes on at 30 %.
    fn from_str(text: &str) -> Result<Self, String> {
        let (span, factor) = text.split_once('*').unwrap_or((text, "0"));
        let factor: f64 = factor.parse().map_err(|error| format!("{factor:?} is no factor: {error}"))?;
        if !(0.0..=1.0).contains(&factor) {
            return Err(format!("a factor of {factor} is not between 0 and 1"));
        }
        let (from, length) =
            span.split_once('+').ok_or_else(|| format!("{span:?} is not START+LENGTH, e.g. 2s+1500ms"))?;
        let time = |text: &str| {
            humantime::parse_duration(text).map_err(|error| format!("{text:?} is no time: {error}"))
        };
        let (from, length) = (time(from)?.as_secs_f64(), time(length)?.as_secs_f64());
        Ok(Self { from, to: from + length, factor })
    }
}

/// The speed over time.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    speed: f64,
    windows: Vec<Window>,
}

impl Pace {
    /// `speed` times that of a GPU of speed 1, less what `windows` take from it; where they overlap, both take.
    pub(crate) fn new(speed: f64, windows: Vec<Window>) -> Self {
        Self { speed, windows }
    }

    /// When `work` that begins at `start` is done.
    pub(crate) fn finish(&self, start: Duration, work: f64) -> Duration {
        let (mut at, mut left) = (start.as_secs_f64(), work);
        loop {
            let rate = self.rate(at);
            let Some(change) = self.next_change(at) else {
                return Duration::from_secs_f64(at + left / rate);
            };
            let possible = (change - at) * rate;
            if possible >= left && rate > 0.0 {
                return Duration::from_secs_f64(at + left / rate);
            }
            left -= possible;
            at = change;
        }
    }

    fn rate(&self, at: f64) -> f64 {
        let inside = self.windows.iter().filter(|window| (window.from..window.to).contains(&at));
        inside.fold(self.speed, |rate, window| rate * window.factor)
    }

    fn next_change(&self, at: f64) -> Option<f64> {
        let edges = self.windows.iter().flat_map(|window| [window.from, window.to]);
        edges.filter(|edge| *edge > at).min_by(f64::total_cmp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn pace(speed: f64, windows: &[&str]) -> Pace {
        Pace::new(speed, windows.iter().map(|window| window.parse().unwrap()).collect())
    }

    #[test]
    fn twice_the_speed_is_half_the_time() {
        assert_eq!(pace(1.0, &[]).finish(ms(10), 0.06), ms(70));
        assert_eq!(pace(2.0, &[]).finish(ms(10), 0.06), ms(40));
    }

    #[test]
    fn work_waits_for_the_end_of_a_stall_and_goes_on_where_it_was() {
        let pace = pace(1.0, &["1s+500ms"]);
        assert_eq!(pace.finish(ms(900), 0.05), ms(950), "done before");
        assert_eq!(pace.finish(ms(980), 0.05), ms(1530), "20 ms before and 30 ms after");
        assert_eq!(pace.finish(ms(1200), 0.05), ms(1550));
        assert_eq!(pace.finish(ms(1500), 0.05), ms(1550), "the end is no part of it");
    }

    #[test]
    fn throttled_work_is_slower_while_it_lasts() {
        let pace = pace(1.0, &["0s+1s*0.5"]);
        assert_eq!(pace.finish(ms(0), 0.1), ms(200));
        assert_eq!(pace.finish(ms(900), 0.1), ms(1050), "50 ms of work before the end, 50 ms after");
    }

    #[test]
    fn what_is_no_window_is_told_so() {
        for wrong in ["2s", "2s+x", "2s+1s*1.5", "2s+1s*x", ""] {
            assert!(wrong.parse::<Window>().is_err(), "{wrong:?}");
        }
    }
}
