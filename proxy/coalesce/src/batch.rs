//! Which requests are executed together, and when.
//!
//! Comes in: requests ([`Former::join`]) that leave again ([`Former::leave`]), executions that end ([`Former::done`]), the
//! time. Goes out: [`Formed`] batches, and members for whom it is too late. Requests of one [`Key`] can share an execution;
//! they wait in one line, the most urgent first, and among equals as start-time fair queueing orders them (Goyal et al.,
//! SIGCOMM '96), so that a tenant who asks much delays nobody but himself by more than a batch. That holds between lines
//! as well: virtual time is the turn of the first member of the batch that was sent last.
//!
//! The server is never left idle to wait for more: with fewer batches in flight than [`Limits::concurrent`] whatever waits
//! is sent at once. While it is busy lines grow, and a batch is as large as the limits, and the deadlines of its members,
//! allow when its turn comes. It is sent to a busy server all the same when its first member has waited for
//! [`Limits::delay`], or when a deadline would be missed. Who is served is decided when a batch is sent and not before, so
//! that who leaves leaves no hole.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ahash::AHashMap;

/// Requests that may share an execution have the same.
pub type Key = u128;

/// Requests that may wait, all of them together.
pub const MAX_WAITING: usize = 16_384;
/// A tenant may have as many waiting as this times the places that are free, so that one who floods leaves some to the
/// others (dynamic thresholds: Choudhury and Hahne, IEEE/ACM ToN 1998); alone it gets 8/9 of [`MAX_WAITING`].
const SHARE: usize = 8;
/// For delays and deadlines a busy server is sent more than its share, but not more than this many times.
const OVERCOMMIT: usize = 4;
/// Tenants that are remembered though nothing of theirs waits.
const REMEMBERED: usize = 1024;

/// How large batches may be, and how many at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows of a batch, at least 1.
    pub rows: u32,
    /// Bytes of its inputs.
    pub bytes: u64,
    /// Elements of its inputs: tokens, pixels.
    pub elements: u64,
    /// How long its first member waits at most while the server is busy.
    pub delay: Option<Duration>,
    /// Batches in flight, at least 1.
    pub concurrent: usize,
    /// The latency of an execution that the number of rows is adapted to.
    pub target: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { rows: 1, bytes: u64::MAX, elements: u64::MAX, delay: None, concurrent: 2, target: None }
    }
}

/// What an execution takes: `fixed` and `row` for each row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Takes {
    /// However many rows.
    pub fixed: Duration,
    /// Each row.
    pub row: Duration,
}

impl Takes {
    fn of(self, rows: u32) -> Duration {
        self.fixed.saturating_add(self.row.saturating_mul(rows))
    }
}

/// A request that wants to share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    /// With whom it can.
    pub key: Key,
    /// Its rows, at least 1.
    pub rows: u32,
    /// Bytes of its inputs.
    pub bytes: u64,
    /// Elements of its inputs.
    pub elements: u64,
    /// When it must have been answered.
    pub deadline: Option<Duration>,
    /// Whose it is.
    pub tenant: u64,
    /// 0 is the most urgent.
    pub priority: u8,
}

/// A member's place. Later ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// A batch in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId(pub u64);

/// Too many wait already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// Why a batch was sent when it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closed {
    /// The server had room.
    Idle,
    /// It was as large as it may be.
    Full,
    /// Its first member had waited long enough.
    Delay,
    /// A member's deadline would have been missed.
    Deadline,
}

impl Closed {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Idle, Self::Full, Self::Delay, Self::Deadline];

    /// The word on metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Full => "full",
            Self::Delay => "delay",
            Self::Deadline => "deadline",
        }
    }
}

/// What has been decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Formed<M> {
    /// Send these together, rows in this order.
    Batch(Batch<M>),
    /// Tell this one that it cannot be answered in time.
    Late(M),
}

/// A batch to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch<M> {
    /// To be given back when it is done.
    pub id: BatchId,
    /// The members, in the order of their rows.
    pub members: Vec<(Ticket, M)>,
    /// Rows of all of them.
    pub rows: u32,
    /// Why now.
    pub closed: Closed,
    /// How long the first of them waited.
    pub waited: Duration,
}

/// Where somebody was who left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// In line; nobody notices.
    Waiting,
    /// In a batch that others wait for too, or nowhere any more.
    Others,
    /// In a batch that nobody waits for now: stop it.
    Last(BatchId),
}

/// Who goes first: the most urgent, then whose turn it is in virtual time, then who came first.
type Order = (u8, u64, Ticket);

#[derive(Debug)]
struct Waiting<M> {
    ask: Ask,
    member: M,
    since: Duration,
}

/// Where one that waits is found.
#[derive(Clone, Copy, Debug)]
struct Place {
    key: Key,
    order: Order,
    rows: u32,
    since: Duration,
}

/// A tenant.
#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    /// When its last row is done, in virtual time.
    done: u64,
    waiting: usize,
}

/// Virtual time, in which a row of any tenant is one.
#[derive(Debug)]
struct Turns {
    now: u64,
    flows: AHashMap<u64, Flow>,
    /// How many may be remembered before the next look at whom to forget.
    forget_at: usize,
}

impl Default for Turns {
    fn default() -> Self {
        Self { now: 0, flows: AHashMap::new(), forget_at: REMEMBERED }
    }
}

impl Turns {
    /// The turn of another request of a tenant.
    fn take(&mut self, tenant: u64, rows: u32) -> u64 {
        let flow = self.flows.entry(tenant).or_default();
        let begins = flow.done.max(self.now);
        flow.done = begins + u64::from(rows);
        flow.waiting += 1;
        begins
    }

    /// It is the turn of a batch whose first member has this one. What the batch takes of later turns out of its own line
    /// must not put off the other lines' tenants, and those who come now.
    fn pass(&mut self, turn: u64) {
        self.now = self.now.max(turn);
    }

    /// One of a tenant's does not wait any more: it is served, or gives its turn back.
    fn over(&mut self, tenant: u64, given_back: u32) {
        let Some(flow) = self.flows.get_mut(&tenant) else { return };
        flow.waiting = flow.waiting.saturating_sub(1);
        flow.done = flow.done.saturating_sub(given_back.into());
        if self.flows.len() > self.forget_at {
            let now = self.now;
            self.flows.retain(|_, flow| flow.waiting > 0 || flow.done > now);
            // Looking costs as much as there are, so it is done the more rarely.
            self.forget_at = REMEMBERED.max(2 * self.flows.len());
        }
    }
}

/// Forms the batches of one model. Each call costs the logarithm of what waits; a batch, that for each of its members.
#[derive(Debug)]
pub struct Former<M> {
    limits: Limits,
    /// Rows of a batch, as adapted, and the last batch that was sent before it was made smaller.
    rows: f32,
    shrunk: BatchId,
    takes: Takes,
    /// Those that wait, by key.
    lines: AHashMap<Key, BTreeMap<Order, Waiting<M>>>,
    /// The first of each line.
    fronts: BTreeSet<(Order, Key)>,
    /// Those that wait, the oldest first.
    places: BTreeMap<Ticket, Place>,
    /// Those of them that have one.
    deadlines: BTreeSet<(Duration, Ticket)>,
    turns: Turns,
    flying: AHashMap<BatchId, Flying>,
    aboard: AHashMap<Ticket, BatchId>,
    next: u64,
}

#[derive(Debug)]
struct Flying {
    rows: u32,
    tickets: Vec<Ticket>,
    /// How many of them still wait for it.
    members: usize,
}

impl<M> Former<M> {
    /// Nothing waits yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            rows: limits.rows as f32,
            limits,
            shrunk: BatchId(0),
            takes: Takes::default(),
            lines: AHashMap::new(),
            fronts: BTreeSet::new(),
            places: BTreeMap::new(),
            deadlines: BTreeSet::new(),
            turns: Turns::default(),
            flying: AHashMap::new(),
            aboard: AHashMap::new(),
            next: 0,
        }
    }

    /// Follows other limits from now on. What was found out of the best number of rows holds while it is for the same
    /// aim.
    pub fn set(&mut self, limits: Limits) {
        if (limits.rows, limits.target) != (self.limits.rows, self.limits.target) {
            self.rows = limits.rows as f32;
        }
        self.limits = limits;
    }

    /// What executions are expected to take from now on.
    pub fn expect(&mut self, takes: Takes) {
        self.takes = takes;
    }

    /// Rows of a batch at most, now.
    pub fn rows(&self) -> u32 {
        (self.rows as u32).clamp(1, self.limits.rows.max(1))
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.places.len()
    }

    /// Batches in flight.
    pub fn flying(&self) -> usize {
        self.flying.len()
    }

    /// Another request. Ask [`Former::next`] afterwards. One that has more rows than a batch may have goes alone.
    pub fn join(&mut self, ask: Ask, member: M, now: Duration) -> Result<Ticket, Full> {
        let free = MAX_WAITING.saturating_sub(self.places.len());
        let own = self.turns.flows.get(&ask.tenant).map_or(0, |flow| flow.waiting);
        if free == 0 || own >= SHARE * free {
            return Err(Full);
        }
        let ticket = Ticket(self.serial());
        let order = (ask.priority, self.turns.take(ask.tenant, ask.rows), ticket);
        let line = self.lines.entry(ask.key).or_default();
        let front = line.first_key_value().map(|(front, _)| *front);
        if front.is_none_or(|front| order < front) {
            if let Some(front) = front {
                self.fronts.remove(&(front, ask.key));
            }
            self.fronts.insert((order, ask.key));
        }
        line.insert(order, Waiting { ask, member, since: now });
        self.places.insert(ticket, Place { key: ask.key, order, rows: ask.rows, since: now });
        if let Some(deadline) = ask.deadline {
            self.deadlines.insert((deadline, ticket));
        }
        Ok(ticket)
    }

    /// A member does not wait any more.
    pub fn leave(&mut self, ticket: Ticket) -> Left {
        if let Some(batch) = self.aboard.remove(&ticket) {
            let Some(flying) = self.flying.get_mut(&batch) else { return Left::Others };
            flying.members -= 1;
            return if flying.members == 0 { Left::Last(batch) } else { Left::Others };
        }
        match self.take(ticket, false) {
            Some(_) => Left::Waiting,
            None => Left::Others,
        }
    }

    /// A batch is over and took so long; `failed` says nothing about what the server can do.
    pub fn done(&mut self, batch: BatchId, took: Duration, failed: bool) {
        let Some(flying) = self.flying.remove(&batch) else { return };
        for ticket in &flying.tickets {
            self.aboard.remove(ticket);
        }
        // Additive increase, multiplicative decrease (Clipper, NSDI '17, 4.3.1). Batches that were in flight together
        // are slow together, and that is one reason and not several.
        if let Some(target) = self.limits.target.filter(|_| !failed) {
            if took <= target && flying.rows >= self.rows() {
                self.rows = (self.rows + 1.0).min(self.limits.rows as f32);
            } else if took > target && batch > self.shrunk {
                self.rows = (self.rows * 0.9).max(1.0);
                self.shrunk = BatchId(self.next);
            }
        }
    }

    /// What is to be done now. Ask until there is nothing more.
    pub fn next(&mut self, now: Duration) -> Option<Formed<M>> {
        if let Some((deadline, ticket)) = self.deadlines.first().copied()
            && self.places.get(&ticket).is_some_and(|place| self.is_late(now, place.rows, deadline))
        {
            return self.take(ticket, false).map(|gone| Formed::Late(gone.member));
        }
        let (key, closed) = self.due(now)?;
        let (mut taken, mut bytes, mut elements) = (0_u32, 0_u64, 0_u64);
        let (mut since, mut end, mut full) = (now, Duration::MAX, false);
        let mut members = Vec::new();
        while let Some((front, turn, ask)) = self.front(key) {
            let deadline = ask.deadline.unwrap_or(Duration::MAX);
            // Nobody is sent whom it does not help.
            if self.is_late(now, ask.rows, deadline) {
                if !members.is_empty() {
                    break;
                }
                return self.take(front, false).map(|gone| Formed::Late(gone.member));
            }
            let rows = taken.saturating_add(ask.rows);
            let fits = rows <= self.rows()
                && bytes.saturating_add(ask.bytes) <= self.limits.bytes
                && elements.saturating_add(ask.elements) <= self.limits.elements;
            // A batch that became larger would be too late for one of its members.
            let in_time = !self.is_late(now, rows, end.min(deadline));
            full = !fits || in_time && rows == self.rows();
            // Who is too large for any batch goes alone.
            if (!fits || !in_time) && !members.is_empty() {
                break;
            }
            if members.is_empty() {
                self.turns.pass(turn);
            }
            let Some(waiting) = self.take(front, true) else { break };
            (taken, end) = (rows, end.min(deadline));
            bytes = bytes.saturating_add(ask.bytes);
            elements = elements.saturating_add(ask.elements);
            since = since.min(waiting.since);
            members.push((front, waiting.member));
            if full {
                break;
            }
        }
        let id = BatchId(self.serial());
        let tickets: Vec<Ticket> = members.iter().map(|(ticket, _)| *ticket).collect();
        self.aboard.extend(tickets.iter().map(|ticket| (*ticket, id)));
        self.flying.insert(id, Flying { rows: taken, members: tickets.len(), tickets });
        let closed = if full && closed == Closed::Idle { Closed::Full } else { closed };
        Some(Formed::Batch(Batch { id, members, rows: taken, closed, waited: now.saturating_sub(since) }))
    }

    /// When to ask again, if nothing happens before.
    pub fn wake(&self) -> Option<Duration> {
        if !self.is_at_most() {
            return self.pressing().map(|(by, ..)| by);
        }
        // Nothing is sent; but who is too late can be told so.
        let (deadline, ticket) = self.deadlines.first()?;
        let place = self.places.get(ticket)?;
        Some(deadline.saturating_sub(self.takes.of(place.rows)).saturating_add(Duration::from_nanos(1)))
    }

    /// The line whose turn it is.
    fn due(&self, now: Duration) -> Option<(Key, Closed)> {
        if self.flying.len() < self.limits.concurrent.max(1) {
            return self.fronts.first().map(|(_, key)| (*key, Closed::Idle));
        }
        let (by, ticket, closed) = self.pressing().filter(|_| !self.is_at_most())?;
        let place = self.places.get(&ticket).filter(|_| by <= now)?;
        Some((place.key, closed))
    }

    /// Whether nothing more is sent, whatever presses.
    fn is_at_most(&self) -> bool {
        self.flying.len() >= self.limits.concurrent.max(1).saturating_mul(OVERCOMMIT)
    }

    /// Who must be sent first however busy the server is, by when, and why.
    fn pressing(&self) -> Option<(Duration, Ticket, Closed)> {
        let oldest = self.places.first_key_value();
        let delayed = self
            .limits
            .delay
            .zip(oldest)
            .map(|(delay, (ticket, place))| (place.since.saturating_add(delay), *ticket, Closed::Delay));
        let deadline = self.deadlines.first().and_then(|(deadline, ticket)| {
            let rows = self.places.get(ticket)?.rows;
            Some((self.sent_for(*deadline, rows), *ticket, Closed::Deadline))
        });
        delayed.into_iter().chain(deadline).min_by_key(|(by, ..)| *by)
    }

    /// When a batch must be sent for a deadline of one of its members, whatever its size will be.
    fn sent_for(&self, deadline: Duration, rows: u32) -> Duration {
        deadline.saturating_sub(self.takes.of(self.rows().max(rows)))
    }

    fn is_late(&self, now: Duration, rows: u32, deadline: Duration) -> bool {
        now.saturating_add(self.takes.of(rows)) > deadline
    }

    /// The first of a line.
    fn front(&self, key: Key) -> Option<(Ticket, u64, Ask)> {
        let ((_, turn, ticket), waiting) = self.lines.get(&key)?.first_key_value()?;
        Some((*ticket, *turn, waiting.ask))
    }

    /// Takes one out of its line: to be served, or else it gives its turn back.
    fn take(&mut self, ticket: Ticket, served: bool) -> Option<Waiting<M>> {
        let Place { key, order, .. } = self.places.remove(&ticket)?;
        let line = self.lines.get_mut(&key)?;
        let waiting = line.remove(&order)?;
        let front = line.first_key_value().map(|(front, _)| *front);
        if self.fronts.remove(&(order, key)) {
            match front {
                Some(front) => drop(self.fronts.insert((front, key))),
                None => drop(self.lines.remove(&key)),
            }
        }
        if let Some(deadline) = waiting.ask.deadline {
            self.deadlines.remove(&(deadline, ticket));
        }
        self.turns.over(waiting.ask.tenant, if served { 0 } else { waiting.ask.rows });
        if self.places.is_empty() {
            self.turns = Turns::default();
        }
        Some(waiting)
    }

    fn serial(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

/// How a batch that failed is tried again: in halves, until the guilty are alone; and when that has cost more than a few
/// guilty ones explain, one by one, so that however many they are nobody gets another's error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bisection {
    left: u32,
}

/// How members that failed together are parted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Into those before this place, and the others.
    Half(usize),
    /// Each on its own.
    Each,
}

impl Bisection {
    /// For a batch of so many members: halves for long enough to find two guilty ones, whatever the batch's size.
    pub fn of(members: usize) -> Self {
        let depth = members.max(1).ilog2() + 1;
        Self { left: 4 * depth }
    }

    /// How to part `members` that failed together; `None`: there is only one, and it gets the error.
    pub fn cut(&mut self, members: usize) -> Option<Cut> {
        if members < 2 {
            return None;
        }
        if self.left < 2 {
            return Some(Cut::Each);
        }
        self.left -= 2;
        Some(Cut::Half(members / 2))
    }
}
