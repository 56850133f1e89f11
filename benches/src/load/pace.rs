//! The schedule of an open loop: requests are due at a fixed rate, whether or not the answers keep up, and each
//! is timed from the moment it was due. So a proxy that stalls for 100 ms is charged for all that should have
//! been sent meanwhile (no coordinated omission).
//!
//! Tokio's timer counts milliseconds, too coarse for 2000 requests a second; the kernel's timer does not.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::Result;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Requests that are due and that no connection has taken yet.
#[derive(Default)]
pub(crate) struct Schedule {
    due: RefCell<VecDeque<Instant>>,
    wake: Notify,
}

impl Schedule {
    /// The next request that is due, as soon as there is one.
    pub(crate) async fn next(&self) -> Instant {
        loop {
            if let Some(due) = self.due.borrow_mut().pop_front() {
                return due;
            }
            self.wake.notified().await;
        }
    }

    /// What is due and still waits.
    pub(crate) fn waiting(&self) -> Vec<Instant> {
        self.due.borrow().iter().copied().collect()
    }

    /// Puts `rate` requests a second on the schedule until it is dropped.
    pub(crate) async fn keep(&self, rate: u32) -> Result<()> {
        let period = Duration::from_secs(1) / rate.max(1);
        let mut ticks = Ticks::new(period, period)?;
        let start = Instant::now();
        let mut sent: u32 = 0;
        loop {
            ticks.next().await?;
            while start + period * sent <= Instant::now() {
                self.due.borrow_mut().push_back(start + period * sent);
                self.wake.notify_one();
                sent += 1;
            }
        }
    }
}

/// A timer of the kernel.
pub(crate) struct Ticks(Receiver);

impl Ticks {
    /// Fires after `first`, which is not zero, and then every `period`.
    pub(crate) fn new(first: Duration, period: Duration) -> Result<Self> {
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        let spec = Itimerspec { it_interval: timespec(period), it_value: timespec(first) };
        rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &spec)?;
        // Tokio has no type for a timer; that of a pipe does what is needed: wait until readable, then read.
        Ok(Self(Receiver::from_owned_fd_unchecked(timer)?))
    }

    /// Waits until it fires, and says how often it has done so since it was last looked at.
    pub(crate) async fn next(&mut self) -> Result<u64> {
        let mut count = [0; size_of::<u64>()];
        self.0.read_exact(&mut count).await?;
        Ok(u64::from_ne_bytes(count))
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ticks_that_nobody_waited_for_are_not_lost() {
        let start = Instant::now();
        let mut ticks = Ticks::new(Duration::from_millis(1), Duration::from_millis(10)).unwrap();
        assert_eq!(ticks.next().await.unwrap(), 1);
        tokio::time::sleep_until(start + Duration::from_millis(35)).await;
        let missed = ticks.next().await.unwrap();
        assert!((3..=20).contains(&missed), "{missed} in 35 ms or somewhat more, at one each 10 ms");
    }

    #[tokio::test]
    async fn what_nobody_takes_stays_due_from_its_own_moment() {
        let schedule = Schedule::default();
        let start = Instant::now();
        let kept = tokio::time::timeout(Duration::from_millis(100), schedule.keep(1000)).await;
        assert!(kept.is_err(), "it keeps on until dropped");
        // A busy machine may end the wait late.
        let most = start.elapsed().as_millis() as usize + 1;
        let waiting = schedule.waiting();
        assert!((90..=most).contains(&waiting.len()), "{} in {most} ms at 1000/s", waiting.len());
        assert!(waiting[0] - start < Duration::from_millis(50));
        assert!(waiting.windows(2).all(|pair| pair[1] - pair[0] == Duration::from_millis(1)));
        assert_eq!(schedule.next().await, waiting[0]);
    }
}
