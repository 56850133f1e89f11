//! The queue at work: requests of all workers wait here for one application.
//!
//! In: [`Gate::admit`], from any worker. Out: a [`Permit`], which is a slot of the application until it is dropped, or a
//! refusal. While there are free slots and nobody waits, a slot is taken and given back by one atomic word, and no
//! other thread is woken. Otherwise the request goes, as a message, to the one [`Owner`] of the queue, which answers
//! when its turn has come. A slot that becomes free while somebody waits goes to the owner as well, not back into the
//! word: so nobody overtakes those that wait.
//!
//! Whatever becomes of a waiting request, its place and its slot are given back: dropping the future leaves the queue,
//! dropping a permit frees the slot, and an answer that finds nobody is a permit that is dropped.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, WeakUnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::fair::Work;
use super::limit::{Limit, SAMPLES, WINDOW, Window};
use super::queue::{Ask, Cause, Outlook, Place, Queue, Refusal, Ticket, Turn, too_late};

/// The way to an application.
#[derive(Clone, Debug)]
pub struct Gate {
    shared: Arc<Shared>,
    owner: UnboundedSender<Message>,
}

#[derive(Debug)]
struct Shared {
    /// Requests that wait, above; slots that are taken, below.
    room: AtomicU64,
    limit: AtomicU32,
    bound: AtomicU32,
    adaptive: std::sync::atomic::AtomicBool,
    issued: AtomicU64,
    epoch: Instant,
    tally: Tally,
    admitted: AtomicU64,
    refused_full: AtomicU64,
    refused_late: AtomicU64,
}

/// What is going on, for the metrics and for load reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Requests that wait.
    pub waiting: u32,
    /// Slots that are taken.
    pub in_flight: u32,
    /// Slots there are.
    pub limit: u32,
    /// Requests that got a slot.
    pub admitted: u64,
    /// Requests that were refused because too many waited.
    pub refused_full: u64,
    /// Requests that were refused because of their deadline.
    pub refused_late: u64,
}

#[derive(Debug)]
enum Message {
    Enqueue { id: u64, ask: Ask, outlook: Outlook, answer: oneshot::Sender<Result<Permit, Refusal>> },
    Left(u64),
    Freed,
    Window,
    Settle { ask: Ask, real: Work },
    Set(Limit, usize),
}

/// A room word, taken apart.
#[derive(Clone, Copy)]
struct Room {
    waiting: u32,
    taken: u32,
}

impl Room {
    const fn of(word: u64) -> Self {
        Self { waiting: (word >> 32) as u32, taken: word as u32 }
    }

    const fn word(self) -> u64 {
        (self.waiting as u64) << 32 | self.taken as u64
    }
}

impl Shared {
    fn room(&self) -> Room {
        Room::of(self.room.load(Acquire))
    }

    /// Changes the word; `None` from `change` leaves it. Answers what it was, and whether it was changed.
    fn change(&self, change: impl Fn(Room) -> Option<Room>) -> (Room, bool) {
        match self.room.fetch_update(AcqRel, Acquire, |word| change(Room::of(word)).map(Room::word)) {
            Ok(word) => (Room::of(word), true),
            Err(word) => (Room::of(word), false),
        }
    }

    fn now(&self) -> Duration {
        Instant::now().saturating_duration_since(self.epoch)
    }

    fn count(&self, refusal: Refusal) -> Refusal {
        let counter = match refusal.cause {
            Cause::Full => &self.refused_full,
            Cause::TooLate => &self.refused_late,
        };
        counter.fetch_add(1, Relaxed);
        refusal
    }
}

impl Gate {
    /// A gate, and its queue, which somebody must [`run`](Owner::run). `bound`: how many may wait. `epoch`: what the
    /// deadlines of requests count from.
    pub fn new(limit: Limit, bound: usize, epoch: Instant) -> (Self, Owner) {
        let (sender, messages) = unbounded_channel();
        let shared = Arc::new(Shared {
            room: AtomicU64::new(0),
            limit: AtomicU32::new(limit.now()),
            bound: AtomicU32::new(u32::try_from(bound).unwrap_or(u32::MAX)),
            adaptive: limit.is_adaptive().into(),
            issued: AtomicU64::new(0),
            epoch,
            tally: Tally::default(),
            admitted: AtomicU64::new(0),
            refused_full: AtomicU64::new(0),
            refused_late: AtomicU64::new(0),
        });
        let owner = Owner {
            shared: Arc::clone(&shared),
            gate: sender.downgrade(),
            messages,
            queue: Queue::new(bound),
            limit,
            stepped: Duration::ZERO,
            window_due: None,
            waiting: HashMap::new(),
            tickets: HashMap::new(),
            latest: BTreeSet::new(),
            spare: 0,
        };
        (Self { shared, owner: sender }, owner)
    }

    /// A slot of the application, or why there is none. Waits for its turn; dropping the future leaves the queue.
    pub async fn admit(&self, ask: Ask, outlook: Outlook) -> Result<Permit, Refusal> {
        let shared = &self.shared;
        let began = shared.now();
        if let Some(refusal) = too_late(ask.deadline, outlook.service, outlook.backlog, began) {
            return Err(shared.count(refusal));
        }
        let limit = shared.limit.load(Relaxed);
        let bound = shared.bound.load(Relaxed);
        let free = |room: Room| room.waiting == 0 && room.taken < limit;
        // Messages that the owner has not read yet need a bound, too. It refuses by shares; this is a wall behind it.
        let wall = bound.saturating_mul(2).saturating_add(64);
        let (room, changed) = shared.change(|room| {
            if free(room) {
                Some(Room { taken: room.taken + 1, ..room })
            } else if bound > 0 && room.waiting < wall {
                Some(Room { waiting: room.waiting + 1, ..room })
            } else {
                None
            }
        });
        if !changed {
            let wait = outlook.backlog;
            return Err(shared.count(Refusal { cause: Cause::Full, wait, retry_after: wait }));
        }
        if free(room) {
            return Ok(self.permit(room.taken + 1, None));
        }
        let id = shared.issued.fetch_add(1, Relaxed);
        let (answer, answered) = oneshot::channel();
        let message = Message::Enqueue { id, ask, outlook, answer };
        if self.owner.send(message).is_err() {
            // The queue has ended, as the process does: nobody is held up any more.
            shared.change(|room| Some(Room { waiting: room.waiting - 1, taken: room.taken + 1 }));
            return Ok(self.permit(room.taken + 1, None));
        }
        let mut place = PlaceInQueue { gate: self, id, left: false };
        let answer = answered.await;
        place.left = true;
        match answer {
            Ok(Ok(mut permit)) => {
                permit.waited = shared.now().saturating_sub(began);
                Ok(permit)
            }
            Ok(Err(refusal)) => Err(shared.count(refusal)),
            // As above, with the owner ending while this one waits.
            Err(_) => {
                shared.change(|room| Some(Room { waiting: room.waiting - 1, taken: room.taken + 1 }));
                Ok(self.permit(room.taken + 1, None))
            }
        }
    }

    /// Another limit, and another bound of the queue.
    pub fn set(&self, limit: Limit, bound: usize) {
        let _ = self.owner.send(Message::Set(limit, bound));
    }

    /// What is going on.
    pub fn state(&self) -> State {
        let shared = &self.shared;
        let room = shared.room();
        State {
            waiting: room.waiting,
            in_flight: room.taken,
            limit: shared.limit.load(Relaxed),
            admitted: shared.admitted.load(Relaxed),
            refused_full: shared.refused_full.load(Relaxed),
            refused_late: shared.refused_late.load(Relaxed),
        }
    }

    fn permit(&self, in_flight: u32, charged: Option<Ask>) -> Permit {
        self.shared.admitted.fetch_add(1, Relaxed);
        Permit { gate: self.clone(), in_flight, charged, waited: Duration::ZERO }
    }

    /// Gives a slot back.
    fn free(&self) {
        let (_, freed) = self.shared.change(|room| {
            // Somebody waits: the slot is his, and the owner says whose.
            (room.waiting == 0).then(|| Room { taken: room.taken - 1, ..room })
        });
        if !freed && self.owner.send(Message::Freed).is_err() {
            self.shared.change(|room| Some(Room { taken: room.taken - 1, ..room }));
        }
    }
}

/// Leaves the queue when the future that waits is dropped.
struct PlaceInQueue<'a> {
    gate: &'a Gate,
    id: u64,
    left: bool,
}

impl Drop for PlaceInQueue<'_> {
    fn drop(&mut self) {
        if !self.left {
            // Without an owner there is no queue to leave.
            let _ = self.gate.owner.send(Message::Left(self.id));
        }
    }
}

/// A slot of the application. Keep it until the last byte of the response has passed; dropping it frees the slot.
#[derive(Debug)]
pub struct Permit {
    gate: Gate,
    in_flight: u32,
    charged: Option<Ask>,
    waited: Duration,
}

impl Permit {
    /// How long it was waited for.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    /// The request was answered well: it took `took` in the application, where one of its size takes `unloaded` when
    /// nothing else runs (`None`: not known). `real`: what it cost, if that is known by now.
    pub fn answered(self, took: Duration, unloaded: Option<Duration>, real: Option<Work>) {
        let shared = &self.gate.shared;
        if shared.adaptive.load(Relaxed) && shared.tally.add(took, unloaded, self.in_flight) == SAMPLES {
            let _ = self.gate.owner.send(Message::Window);
        }
        if let (Some(ask), Some(real)) = (self.charged, real)
            && ask.work != real
        {
            let _ = self.gate.owner.send(Message::Settle { ask, real });
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.gate.free();
    }
}

/// A [`Window`] that all workers add to, in microseconds. Read while it is added to it may miss the latest answer in
/// one of its sums, which is nothing in ten.
#[derive(Debug, Default)]
struct Tally {
    samples: AtomicU32,
    known: AtomicU64,
    unloaded: AtomicU64,
    unknown_count: AtomicU32,
    unknown: AtomicU64,
    /// The complement of the shortest, so that 0 means none.
    shortest: AtomicU64,
    most: AtomicU32,
}

fn micros(time: Duration) -> u64 {
    // A day is as long as a century here, and leaves room for the sum.
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX).min(86_400_000_000)
}

impl Tally {
    /// Adds an answer, and says how many there are now.
    fn add(&self, took: Duration, unloaded: Option<Duration>, in_flight: u32) -> u32 {
        let took = micros(took);
        self.shortest.fetch_max(!took, Relaxed);
        self.most.fetch_max(in_flight, Relaxed);
        match unloaded.map(micros).filter(|unloaded| *unloaded > 0) {
            Some(unloaded) => {
                self.known.fetch_add(took, Relaxed);
                self.unloaded.fetch_add(unloaded, Relaxed);
            }
            None => {
                self.unknown_count.fetch_add(1, Relaxed);
                self.unknown.fetch_add(took, Relaxed);
            }
        }
        self.samples.fetch_add(1, Relaxed) + 1
    }

    fn take(&self) -> Window {
        self.samples.store(0, Relaxed);
        Window {
            known: Duration::from_micros(self.known.swap(0, Relaxed)),
            unloaded: Duration::from_micros(self.unloaded.swap(0, Relaxed)),
            unknown_count: self.unknown_count.swap(0, Relaxed),
            unknown: Duration::from_micros(self.unknown.swap(0, Relaxed)),
            shortest: Duration::from_micros(!self.shortest.swap(0, Relaxed)),
            most: self.most.swap(0, Relaxed),
        }
    }
}

struct Waiting {
    id: u64,
    ask: Ask,
    latest: Option<Duration>,
    answer: oneshot::Sender<Result<Permit, Refusal>>,
}

/// The one that owns the queue.
pub struct Owner {
    shared: Arc<Shared>,
    /// To make permits with; not to live for.
    gate: WeakUnboundedSender<Message>,
    messages: UnboundedReceiver<Message>,
    queue: Queue,
    limit: Limit,
    /// When the limit was last stepped, and when it may be next.
    stepped: Duration,
    window_due: Option<Duration>,
    waiting: HashMap<Ticket, Waiting>,
    tickets: HashMap<u64, Ticket>,
    /// When each must begin at the latest.
    latest: BTreeSet<(Duration, Ticket)>,
    /// Slots that are taken, but by nobody.
    spare: u32,
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").field("waiting", &self.queue.len()).finish_non_exhaustive()
    }
}

impl Owner {
    /// Runs until the last gate and the last permit are gone.
    pub async fn run(mut self) {
        loop {
            let due = self.latest.first().map(|(latest, _)| *latest).into_iter().chain(self.window_due).min();
            let due = due.map(|due| self.shared.epoch + due);
            tokio::select! {
                biased;
                message = self.messages.recv() => match message {
                    Some(message) => self.obey(message),
                    None => return,
                },
                () = until(due) => {}
            }
            // What has come meanwhile is looked at together: one round for many messages.
            while let Ok(message) = self.messages.try_recv() {
                self.obey(message);
            }
            self.time_passed();
            self.serve();
        }
    }

    fn obey(&mut self, message: Message) {
        match message {
            Message::Enqueue { id, ask, outlook, answer } => self.enqueue(id, ask, &outlook, answer),
            Message::Left(id) => {
                if let Some(ticket) = self.tickets.get(&id).copied() {
                    self.queue.leave(ticket);
                    self.forget(ticket);
                }
            }
            Message::Freed => self.spare += 1,
            Message::Window => self.window_due = Some(self.stepped + WINDOW),
            Message::Settle { ask, real } => {
                self.queue.settle(ask.priority, ask.tenant, ask.work, real);
            }
            Message::Set(limit, bound) => {
                self.queue.set_bound(bound);
                self.shared.bound.store(u32::try_from(bound).unwrap_or(u32::MAX), Relaxed);
                self.shared.adaptive.store(limit.is_adaptive(), Relaxed);
                self.limit = limit;
                self.shared.limit.store(self.limit.now(), Relaxed);
            }
        }
    }

    fn enqueue(
        &mut self,
        id: u64,
        ask: Ask,
        outlook: &Outlook,
        answer: oneshot::Sender<Result<Permit, Refusal>>,
    ) {
        match self.queue.arrive(&ask, outlook, self.shared.now()) {
            Place::Refused(refusal) => {
                self.one_less();
                let _ = answer.send(Err(refusal));
            }
            Place::Waits(ticket, displaced) => {
                if let Some((ticket, refusal)) = displaced {
                    self.refuse(ticket, refusal);
                }
                let latest = ask.deadline.map(|deadline| deadline.saturating_sub(outlook.service));
                self.latest.extend(latest.map(|latest| (latest, ticket)));
                self.tickets.insert(id, ticket);
                self.waiting.insert(ticket, Waiting { id, ask, latest, answer });
            }
        }
    }

    fn time_passed(&mut self) {
        let now = self.shared.now();
        if self.window_due.is_some_and(|due| due <= now) {
            self.window_due = None;
            self.stepped = now;
            self.limit.step(&self.shared.tally.take(), now);
            self.shared.limit.store(self.limit.now(), Relaxed);
        }
        while let Some((latest, ticket)) = self.latest.first().copied().filter(|(latest, _)| *latest <= now) {
            self.queue.leave(ticket);
            let wait = now.saturating_sub(latest);
            self.refuse(ticket, Refusal { cause: Cause::TooLate, wait, retry_after: wait });
        }
    }

    /// Gives slots to those whose turn it is, and gives back what nobody needs.
    fn serve(&mut self) {
        let limit = self.shared.limit.load(Relaxed);
        while self.spare > 0 && self.shared.change(|room| less(room, room.taken > limit)).1 {
            self.spare -= 1;
        }
        while !self.queue.is_empty() && (self.spare > 0 || self.take_slot(limit)) {
            match self.queue.turn(self.shared.now()) {
                Some(Turn::Starts(ticket)) => self.start(ticket),
                Some(Turn::Refused(ticket, refusal)) => self.refuse(ticket, refusal),
                None => break,
            }
        }
        // Somebody may wait whose message has not come yet: it will find the spare slot.
        while self.spare > 0 && self.shared.change(|room| less(room, room.waiting == 0)).1 {
            self.spare -= 1;
        }
    }

    /// Takes a slot for somebody who waits.
    fn take_slot(&mut self, limit: u32) -> bool {
        let more = |room: Room| (room.taken < limit).then(|| Room { taken: room.taken + 1, ..room });
        let taken = self.shared.change(more).1;
        self.spare += u32::from(taken);
        taken
    }

    fn start(&mut self, ticket: Ticket) {
        // While somebody waits, his future holds a gate.
        let (Some(waiting), Some(owner)) = (self.forget(ticket), self.gate.upgrade()) else { return };
        self.spare -= 1;
        let gate = Gate { shared: Arc::clone(&self.shared), owner };
        let permit = gate.permit(self.shared.room().taken, Some(waiting.ask));
        // If he is gone, the permit is dropped, and the slot comes back as a message.
        let _ = waiting.answer.send(Ok(permit));
    }

    fn refuse(&mut self, ticket: Ticket, refusal: Refusal) {
        if let Some(waiting) = self.forget(ticket) {
            let _ = waiting.answer.send(Err(refusal));
        }
    }

    fn forget(&mut self, ticket: Ticket) -> Option<Waiting> {
        let waiting = self.waiting.remove(&ticket)?;
        self.tickets.remove(&waiting.id);
        if let Some(latest) = waiting.latest {
            self.latest.remove(&(latest, ticket));
        }
        self.one_less();
        Some(waiting)
    }

    fn one_less(&self) {
        self.shared.change(|room| Some(Room { waiting: room.waiting - 1, ..room }));
    }
}

/// One slot less, if `so`.
fn less(room: Room, so: bool) -> Option<Room> {
    so.then(|| Room { taken: room.taken - 1, ..room })
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}
