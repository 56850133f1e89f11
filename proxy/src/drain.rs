//! Leaving without losing a request.
//!
//! Draining has two sides. Inbound keeps serving while peers learn, on every response, that this endpoint is leaving;
//! outbound stays open as long as the application uses it. The process may end when both are quiet.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use penstock_api::v1::Direction;
use tokio::sync::watch;
use tokio::time::Sleep;

/// Whether we are on our way out, and what is still going on.
#[derive(Debug)]
pub struct Drain {
    leaving: watch::Sender<bool>,
    ending: watch::Sender<bool>,
    last_call: watch::Sender<bool>,
    in_flight: [AtomicU32; 2],
    /// Open connections of the application to its outbound listener.
    outbound_connections: Arc<AtomicU32>,
}

/// An open connection of the application.
#[derive(Debug)]
pub struct OutboundOpen(Arc<AtomicU32>);

impl Drop for OutboundOpen {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            leaving: watch::channel(false).0,
            ending: watch::channel(false).0,
            last_call: watch::channel(false).0,
            in_flight: Default::default(),
            outbound_connections: Arc::default(),
        }
    }
}

/// After the last request has ended, peers that have not heard yet get this long to send another.
const QUIET: Duration = Duration::from_millis(500);

impl Drain {
    /// From now on every response says that this endpoint is leaving.
    pub fn start(&self) {
        self.leaving.send_replace(true);
    }

    /// Whether [`start`](Self::start) was called.
    pub fn leaving(&self) -> bool {
        *self.leaving.borrow()
    }

    /// To be told when it starts.
    pub fn subscribe(&self) -> watch::Receiver<bool> {
        self.leaving.subscribe()
    }

    /// The same, and this process ends as soon as nobody needs it.
    pub fn end_soon(&self) {
        self.start();
        self.ending.send_replace(true);
    }

    /// To be told of [`end_soon`](Self::end_soon).
    pub fn ending(&self) -> watch::Receiver<bool> {
        self.ending.subscribe()
    }

    /// How others can [`start`](Self::start) it.
    pub fn starter(&self) -> watch::Sender<bool> {
        self.leaving.clone()
    }

    /// What can be ended in good order has to be ended now: little time is left.
    pub fn call_last(&self) {
        self.last_call.send_replace(true);
    }

    /// To be told of [`call_last`](Self::call_last).
    pub fn last_call(&self) -> watch::Receiver<bool> {
        self.last_call.subscribe()
    }

    /// A request begins.
    pub fn begin(&self, direction: Direction) {
        self.in_flight[direction as usize].fetch_add(1, Relaxed);
    }

    /// A request is over.
    pub fn end(&self, direction: Direction) {
        self.in_flight[direction as usize].fetch_sub(1, Relaxed);
    }

    /// The application opens a connection to the outbound listener; it counts until the guard is dropped.
    pub fn open_outbound(&self) -> OutboundOpen {
        self.outbound_connections.fetch_add(1, Relaxed);
        OutboundOpen(Arc::clone(&self.outbound_connections))
    }

    /// Requests in flight, both directions, and open outbound connections.
    pub fn busy(&self) -> u32 {
        self.in_flight.iter().chain([&*self.outbound_connections]).map(|count| count.load(Relaxed)).sum()
    }

    /// Returns once nothing has been going on for a moment.
    pub async fn quiet(&self) {
        const LOOK: Duration = Duration::from_millis(20);
        let mut still = Duration::ZERO;
        while still < QUIET {
            tokio::time::sleep(LOOK).await;
            still = if self.busy() == 0 { still + LOOK } else { Duration::ZERO };
        }
    }
}

/// Tells one connection that it is time to say farewell. A look costs a comparison, since every poll of the
/// connection looks.
#[derive(Debug, Default)]
pub struct Farewell {
    due: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Farewell {
    /// Whether it is time; if not, the task is woken when it is.
    pub fn is_due(&self, cx: &Context<'_>) -> bool {
        if self.due.get() {
            return true;
        }
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        false
    }

    fn set_due(&self) {
        self.due.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

/// The farewells of a worker's connections.
#[derive(Debug, Default)]
pub struct Farewells {
    due: Cell<bool>,
    all: RefCell<Vec<Weak<Farewell>>>,
}

impl Farewells {
    /// For a new connection.
    pub fn add(&self) -> Rc<Farewell> {
        let farewell = Rc::new(Farewell::default());
        farewell.due.set(self.due.get());
        self.all.borrow_mut().push(Rc::downgrade(&farewell));
        farewell
    }

    /// It is time, for those there are and those to come.
    pub fn set_due(&self) {
        self.due.set(true);
        for farewell in self.all.borrow().iter().filter_map(Weak::upgrade) {
            farewell.set_due();
        }
    }

    /// Forgets connections that are gone.
    pub fn tidy(&self) {
        self.all.borrow_mut().retain(|farewell| farewell.strong_count() > 0);
    }
}

/// When a connection is to end.
pub struct Leave {
    farewell: Option<Rc<Farewell>>,
    old: Option<Pin<Box<Sleep>>>,
    /// It is left open for a while before it is closed, and what is answered meanwhile says that it will be.
    pub lingers: Option<Rc<Cell<bool>>>,
    lingering: Option<Pin<Box<Sleep>>>,
    said: bool,
}

/// How long a connection between sidecars that carries one request at a time is left open, so that none is lost that was sent before its
/// client has heard: longer than a client keeps one that rests (`send/pool.rs`).
const LINGER: Duration = Duration::from_secs(5);

impl Leave {
    /// With what applies to the connection.
    pub fn new(
        farewell: Option<Rc<Farewell>>,
        old: Option<Pin<Box<Sleep>>>,
        lingers: Option<Rc<Cell<bool>>>,
    ) -> Self {
        Self { farewell, old, lingers, lingering: None, said: false }
    }

    /// Ready once, when it is time to say farewell: that is due, or the connection is old.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Self { farewell, old, lingers, lingering, said } = self;
        let is_due = !*said
            && (farewell.as_ref().is_some_and(|farewell| farewell.is_due(cx))
                || lingering.is_some()
                || old.as_mut().is_some_and(|old| old.as_mut().poll(cx).is_ready()));
        if !is_due {
            return Poll::Pending;
        }
        if let Some(lingers) = lingers {
            lingers.set(true);
            ready!(lingering.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER))).as_mut().poll(cx));
        }
        *said = true;
        Poll::Ready(())
    }

    /// Whether farewell has been said.
    pub fn has_said(&self) -> bool {
        self.said
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn it_waits_for_both_sides_and_for_stragglers() {
        let drain = Arc::new(Drain::default());
        drain.begin(Direction::Inbound);
        let open = drain.open_outbound();
        drain.start();
        let start = Instant::now();
        let others = Arc::clone(&drain);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            others.end(Direction::Inbound);
            tokio::time::sleep(Duration::from_secs(2)).await;
            drop(open);
        });
        drain.quiet().await;
        assert!(start.elapsed() >= Duration::from_secs(3) + QUIET, "{:?}", start.elapsed());
    }
}
