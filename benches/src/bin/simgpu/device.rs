//! The GPU in time: gives a [`Model`] the clock, sleeps until it has something to tell, and tells it.
//!
//! It sleeps and never spins. Tokio's timer counts milliseconds, so service times below 5 ms would not be what they are said to
//! be; work that follows on other work is not delayed by it (see [`Model::advance`]).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

use super::model::{Counts, Id, Model};

/// One GPU with its model.
pub(crate) struct Device<M> {
    model: RefCell<M>,
    epoch: Cell<Instant>,
    next_id: Cell<Id>,
    clients: RefCell<HashMap<Id, mpsc::UnboundedSender<bool>>>,
    changed: Notify,
}

impl<M: Model + 'static> Device<M> {
    /// Puts it to work on the runtime's own thread.
    pub(crate) fn start(model: M) -> Rc<Self> {
        let device = Rc::new(Self {
            model: RefCell::new(model),
            epoch: Cell::new(Instant::now()),
            next_id: Cell::new(0),
            clients: RefCell::default(),
            changed: Notify::new(),
        });
        tokio::task::spawn_local(Rc::clone(&device).work());
        device
    }

    async fn work(self: Rc<Self>) {
        let mut told = Vec::new();
        loop {
            let next = self.model.borrow().next().map(|next| self.epoch.get() + next);
            let due = async {
                match next {
                    Some(next) => sleep_until(next).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                () = self.changed.notified() => continue,
            }
            self.model.borrow_mut().advance(self.now(), &mut told);
            let mut clients = self.clients.borrow_mut();
            for told in told.drain(..) {
                let client =
                    if told.done { clients.remove(&told.id) } else { clients.get(&told.id).cloned() };
                // A client that has left meanwhile wants to hear nothing.
                let _ = client.map(|client| client.send(told.done));
            }
        }
    }

    /// Time since the last reset.
    pub(crate) fn now(&self) -> Duration {
        self.epoch.get().elapsed()
    }

    /// A request arrives.
    pub(crate) fn submit(self: &Rc<Self>, job: M::Job) -> Ticket<M> {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        let (client, told) = mpsc::unbounded_channel();
        self.clients.borrow_mut().insert(id, client);
        self.model.borrow_mut().arrive(self.now(), id, job);
        self.changed.notify_one();
        Ticket { device: Rc::clone(self), id, told }
    }

    /// Forgets everything; whoever still waits is told that nothing comes.
    pub(crate) fn reset(&self) {
        self.clients.borrow_mut().clear();
        self.model.borrow_mut().reset();
        self.epoch.set(Instant::now());
        self.changed.notify_one();
    }

    /// What was counted.
    pub(crate) fn counts(&self) -> Counts {
        self.model.borrow().counts()
    }

    /// Looks at the model.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&M) -> T) -> T {
        look(&self.model.borrow())
    }
}

/// A request that has been submitted. Dropping it is leaving.
pub(crate) struct Ticket<M: Model + 'static> {
    device: Rc<Device<M>>,
    id: Id,
    /// `false` for a part, `true` for the last; closed when the GPU was reset.
    pub(crate) told: mpsc::UnboundedReceiver<bool>,
}

impl<M: Model + 'static> Drop for Ticket<M> {
    fn drop(&mut self) {
        if self.device.clients.borrow_mut().remove(&self.id).is_some() {
            self.device.model.borrow_mut().abandon(self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pace::Pace;
    use crate::tensor::{Batcher, Cost};
    use tokio::task::LocalSet;

    fn device() -> Rc<Device<Batcher>> {
        let cost = Cost { fixed: 0.010, row: 0.005, max_batch: 4 };
        Device::start(Batcher::new(cost, Pace::new(1.0, Vec::new())))
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_is_told_when_its_batch_is_done() {
        let work = async {
            let device = device();
            let began = Instant::now();
            let (mut first, mut second) = (device.submit(1), device.submit(1));
            assert_eq!(first.told.recv().await, Some(true));
            assert_eq!(began.elapsed(), Duration::from_millis(15));
            assert_eq!(second.told.recv().await, Some(true));
            assert_eq!(began.elapsed(), Duration::from_millis(30));
        };
        LocalSet::new().run_until(work).await;
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_makes_room_and_a_reset_ends_all_waiting() {
        let work = async {
            let device = device();
            let mut running = device.submit(1);
            drop(device.submit(4));
            assert_eq!(device.counts().waiting, 0);
            device.reset();
            assert_eq!(running.told.recv().await, None);
            assert_eq!(device.counts(), Counts::default());
            assert_eq!(device.submit(1).told.recv().await, Some(true));
        };
        LocalSet::new().run_until(work).await;
    }
}
