//! Streams and events of the STAND-IN: a stream is a thread that does one thing after the other.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::time::{ClockId, Timespec, clock_gettime};

/// Something to do, in its turn.
pub(crate) type Work = Box<dyn FnOnce() + Send>;

/// A stream.
#[derive(Debug)]
pub(crate) struct Stream {
    sender: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Event {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Event").finish_non_exhaustive()
    }
}

impl Stream {
    pub(crate) fn new() -> Option<Self> {
        let (sender, receiver) = channel::<Work>();
        let run = move || receiver.into_iter().for_each(|work| work());
        let thread = std::thread::Builder::new().name("standin-stream".to_owned()).spawn(run).ok()?;
        Some(Self { sender: Some(sender), thread: Some(thread) })
    }

    pub(crate) fn push(&self, delay: Duration, work: impl FnOnce() + Send + 'static) {
        let work = move || {
            pause(delay);
            work();
        };
        if let Some(sender) = &self.sender {
            // The thread ends only when there is no sender.
            let _ = sender.send(Box::new(work));
        }
    }

    /// An event after all that was pushed.
    pub(crate) fn mark(&self) -> Arc<Event> {
        let event = Arc::new(Event::default());
        event.record(self);
        event
    }
}

impl Drop for Stream {
    /// What was pushed is still done, as by a real driver; here it is waited for.
    fn drop(&mut self) {
        self.sender = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug, Default)]
struct Marks {
    recorded: u64,
    reached: u64,
    at: Duration,
}

/// An event, which may be recorded again and again.
#[derive(Default)]
pub(crate) struct Event {
    marks: Mutex<Marks>,
    reached: Condvar,
}

impl Event {
    fn marks(&self) -> MutexGuard<'_, Marks> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(self: &Arc<Self>, stream: &Stream) {
        let number = {
            let mut marks = self.marks();
            marks.recorded += 1;
            marks.recorded
        };
        let event = Arc::clone(self);
        stream.push(Duration::ZERO, move || {
            let mut marks = event.marks();
            marks.reached = marks.reached.max(number);
            marks.at = now();
            event.reached.notify_all();
        });
    }

    /// Whether the last that was recorded has come; true of one that never was recorded.
    pub(crate) fn is_reached(&self) -> bool {
        let marks = self.marks();
        marks.reached >= marks.recorded
    }

    pub(crate) fn recorded(&self) -> u64 {
        self.marks().recorded
    }

    /// Until this recording has come.
    pub(crate) fn wait(&self, recorded: u64) {
        let waiting = |marks: &mut Marks| marks.reached < recorded;
        drop(self.reached.wait_while(self.marks(), waiting).unwrap_or_else(PoisonError::into_inner));
    }

    /// When it was reached.
    pub(crate) fn at(&self) -> Duration {
        self.marks().at
    }
}

/// Since some time in the past.
pub(crate) fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or_default())
}

pub(crate) fn pause(duration: Duration) {
    if !duration.is_zero() {
        let (seconds, nanoseconds) = (duration.as_secs() as i64, i64::from(duration.subsec_nanos()));
        let _ = rustix::thread::nanosleep(&Timespec { tv_sec: seconds, tv_nsec: nanoseconds });
    }
}
