//! Which requests are executed together, and when.
//!
//! Comes in: requests ([`Former::join`]) that leave again ([`Former::leave`]), executions that end ([`Former::done`]), the
//! time. Goes out: [`Formed`] batches, and members for whom it is too late. Requests of one [`Key`] can share an execution;
//! they wait in one line, the most urgent first, and among equals as start-time fair queueing orders them (Goyal et al.,
//! SIGCOMM '96), so that a tenant who asks much delays nobody but himself by more than a batch.
//!
//! The server is never left idle to wait for more: with fewer batches in flight than [`Limits::concurrent`] whatever waits
//! is sent at once. While it is busy lines grow, and a batch is as large as the limits allow when its turn comes. It is sent
//! to a busy server all the same when its first member has waited for [`Limits::delay`], or when a deadline would be missed.
//! Who is served is decided when a batch is sent and not before, so that who leaves leaves no hole.

use std::collections::VecDeque;
use std::time::Duration;

use ahash::AHashMap;

/// Requests that may share an execution have the same.
pub type Key = u128;

/// Lines at once; a request that would need another is refused.
pub const MAX_LINES: usize = 1024;
/// Requests that may wait, all lines together.
pub const MAX_WAITING: usize = 16_384;
/// For delays and deadlines a busy server is sent more than its share, but not more than this many times.
const OVERCOMMIT: usize = 4;

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
        self.fixed + self.row * rows
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

/// A member's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(u64);

/// A batch in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

#[derive(Debug)]
struct Waiting<M> {
    ticket: Ticket,
    ask: Ask,
    member: M,
    since: Duration,
    /// When its turn is, in virtual time.
    turn: u64,
}

impl<M> Waiting<M> {
    fn order(&self) -> (u8, u64, u64) {
        (self.ask.priority, self.turn, self.ticket.0)
    }
}

/// Requests with one key.
#[derive(Debug)]
struct Line<M> {
    key: Key,
    waiting: VecDeque<Waiting<M>>,
}

/// Virtual time in which a row of any tenant is one.
#[derive(Debug, Default)]
struct Turns {
    now: u64,
    /// When the last row of each tenant is done.
    done: AHashMap<u64, u64>,
}

/// Forms the batches of one model.
#[derive(Debug)]
pub struct Former<M> {
    limits: Limits,
    /// Rows of a batch, as adapted.
    rows: f32,
    takes: Takes,
    lines: Vec<Line<M>>,
    waiting: usize,
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
            takes: Takes::default(),
            lines: Vec::new(),
            waiting: 0,
            turns: Turns::default(),
            flying: AHashMap::new(),
            aboard: AHashMap::new(),
            next: 0,
        }
    }

    /// Follows other limits from now on.
    pub fn set(&mut self, limits: Limits) {
        if limits != self.limits {
            self.rows = limits.rows as f32;
            self.limits = limits;
        }
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
        self.waiting
    }

    /// Batches in flight.
    pub fn flying(&self) -> usize {
        self.flying.len()
    }

    /// Another request. Ask [`Former::next`] afterwards.
    pub fn join(&mut self, ask: Ask, member: M, now: Duration) -> Result<Ticket, Full> {
        if self.waiting >= MAX_WAITING {
            return Err(Full);
        }
        let at = match self.lines.iter().position(|line| line.key == ask.key) {
            Some(at) => at,
            None if self.lines.len() >= MAX_LINES => return Err(Full),
            None => {
                self.lines.push(Line { key: ask.key, waiting: VecDeque::new() });
                self.lines.len() - 1
            }
        };
        let ticket = Ticket(self.serial());
        let begins =
            self.turns.done.get(&ask.tenant).map_or(self.turns.now, |done| self.turns.now.max(*done));
        self.turns.done.insert(ask.tenant, begins + u64::from(ask.rows));
        let waiting = Waiting { ticket, ask, member, since: now, turn: begins };
        let line = &mut self.lines[at].waiting;
        let place = line.partition_point(|other| other.order() < waiting.order());
        line.insert(place, waiting);
        self.waiting += 1;
        Ok(ticket)
    }

    /// A member does not wait any more.
    pub fn leave(&mut self, ticket: Ticket) -> Left {
        if let Some(batch) = self.aboard.remove(&ticket) {
            let Some(flying) = self.flying.get_mut(&batch) else { return Left::Others };
            flying.members -= 1;
            return if flying.members == 0 { Left::Last(batch) } else { Left::Others };
        }
        for line in &mut self.lines {
            if let Some(at) = line.waiting.iter().position(|waiting| waiting.ticket == ticket) {
                line.waiting.remove(at);
                self.waiting -= 1;
                self.tidy();
                return Left::Waiting;
            }
        }
        Left::Others
    }

    /// A batch is over and took so long; `failed` says nothing about what the server can do.
    pub fn done(&mut self, batch: BatchId, took: Duration, failed: bool) {
        let Some(flying) = self.flying.remove(&batch) else { return };
        for ticket in &flying.tickets {
            self.aboard.remove(ticket);
        }
        // Additive increase, multiplicative decrease (Clipper, NSDI '17, 4.3.1).
        if let Some(target) = self.limits.target.filter(|_| !failed) {
            if took > target {
                self.rows = (self.rows * 0.9).max(1.0);
            } else if flying.rows >= self.rows() {
                self.rows = (self.rows + 1.0).min(self.limits.rows as f32);
            }
        }
    }

    /// What is to be done now. Ask until there is nothing more.
    pub fn next(&mut self, now: Duration) -> Option<Formed<M>> {
        if self.waiting == 0 {
            return None;
        }
        let (at, closed) = self.due(now)?;
        let (rows, limits, takes) = (self.rows(), self.limits, self.takes);
        let late = |ask: &Ask| ask.deadline.is_some_and(|end| now + takes.of(ask.rows) > end);
        let line = &mut self.lines[at].waiting;
        let (mut taken, mut bytes, mut elements, mut since) = (0, 0_u64, 0_u64, now);
        let mut members = Vec::with_capacity(line.len().min(rows as usize));
        while let Some(first) = line.front() {
            let ask = first.ask;
            // Nobody is sent whom it does not help.
            if late(&ask) {
                if taken > 0 {
                    break;
                }
                let gone = line.pop_front()?;
                self.waiting -= 1;
                self.tidy();
                return Some(Formed::Late(gone.member));
            }
            let fits = taken + ask.rows <= rows
                && bytes.saturating_add(ask.bytes) <= limits.bytes
                && elements.saturating_add(ask.elements) <= limits.elements;
            // Who is too large for any batch goes alone.
            if !fits && taken > 0 {
                break;
            }
            let Some(first) = line.pop_front() else { break };
            taken += ask.rows;
            bytes = bytes.saturating_add(ask.bytes);
            elements = elements.saturating_add(ask.elements);
            since = since.min(first.since);
            self.turns.now = self.turns.now.max(first.turn);
            members.push((first.ticket, first.member));
            if !fits {
                break;
            }
        }
        let full = taken >= rows || !line.is_empty();
        self.waiting -= members.len();
        let id = BatchId(self.serial());
        let tickets: Vec<Ticket> = members.iter().map(|(ticket, _)| *ticket).collect();
        self.aboard.extend(tickets.iter().map(|ticket| (*ticket, id)));
        self.flying.insert(id, Flying { rows: taken, members: tickets.len(), tickets });
        self.tidy();
        let closed = if full && closed == Closed::Idle { Closed::Full } else { closed };
        Some(Formed::Batch(Batch { id, members, rows: taken, closed, waited: now.saturating_sub(since) }))
    }

    /// When a request that joins now is sent at the latest: ask again then. [`Former::wake`] says it of all that wait.
    pub fn wake_for(&self, ask: &Ask, now: Duration) -> Option<Duration> {
        self.sent_by(ask, now)
    }

    /// When to ask again, if nothing happens before.
    pub fn wake(&self) -> Option<Duration> {
        if self.flying.len() >= self.limits.concurrent * OVERCOMMIT {
            return None;
        }
        let all = self.lines.iter().flat_map(|line| &line.waiting);
        all.filter_map(|waiting| self.sent_by(&waiting.ask, waiting.since)).min()
    }

    /// The line whose turn it is.
    fn due(&self, now: Duration) -> Option<(usize, Closed)> {
        let flying = self.flying.len();
        let lines = self.lines.iter().enumerate().filter_map(|(at, line)| Some((at, line.waiting.front()?)));
        if flying < self.limits.concurrent.max(1) {
            return lines.min_by_key(|(_, first)| first.order()).map(|(at, _)| (at, Closed::Idle));
        }
        if flying >= self.limits.concurrent.max(1) * OVERCOMMIT {
            return None;
        }
        let mut pressed = lines.filter_map(|(at, _)| {
            let line = self.lines[at].waiting.iter();
            let pressed =
                line.filter(|waiting| self.sent_by(&waiting.ask, waiting.since).is_some_and(|by| by <= now));
            pressed.map(|waiting| (at, waiting)).next()
        });
        pressed.next().map(|(at, waiting)| {
            let delay = self.limits.delay.is_some_and(|delay| waiting.since + delay <= now);
            (at, if delay { Closed::Delay } else { Closed::Deadline })
        })
    }

    /// When a member must be sent, however busy the server is.
    fn sent_by(&self, ask: &Ask, since: Duration) -> Option<Duration> {
        let delay = self.limits.delay.map(|delay| since + delay);
        let takes = self.takes.of(self.rows());
        let deadline = ask.deadline.map(|deadline| deadline.saturating_sub(takes));
        match (delay, deadline) {
            (Some(delay), Some(deadline)) => Some(delay.min(deadline)),
            (one, other) => one.or(other),
        }
    }

    /// Forgets what nobody waits for.
    fn tidy(&mut self) {
        self.lines.retain(|line| !line.waiting.is_empty());
        if self.waiting == 0 {
            self.turns = Turns::default();
        } else if self.turns.done.len() > MAX_LINES {
            let now = self.turns.now;
            self.turns.done.retain(|_, done| *done > now);
        }
    }

    fn serial(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

/// How a batch that failed is tried again: in halves, until the guilty are alone, within a budget of executions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bisection {
    left: u32,
}

impl Bisection {
    /// For a batch of so many members: enough to find two guilty ones, whatever the batch's size.
    pub fn of(members: usize) -> Self {
        let depth = members.max(1).ilog2() + 1;
        Self { left: 4 * depth }
    }

    /// Where to cut `members` that failed together; `None`: they cannot be parted, or have cost enough, and all get the
    /// error.
    pub fn cut(&mut self, members: usize) -> Option<usize> {
        if members < 2 || self.left < 2 {
            return None;
        }
        self.left -= 2;
        Some(members / 2)
    }
}
