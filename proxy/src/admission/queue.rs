//! Who waits for the application, and who goes next. Pure: time and predictions are arguments.
//!
//! In: requests that found no free slot, slots that became free. Out: who starts, who waits, who is refused and why.
//! A request waits in the line of its tenant, the tenants of one priority share what the priority gets, and the
//! priorities share the application by weight: the high ones go first as long as they are the few, and the low ones are
//! never starved. Both shares are those of [`Fair`]. What is bounded: how many wait. When the queue is full, whoever holds
//! most of it over his share gives up his newest request, so that one who floods it pushes out himself.
//!
//! A request that cannot be answered before its deadline is refused when it comes, by prediction, and when its turn
//! comes, by the clock: late answers help nobody and delay everybody.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use super::fair::{Fair, Work};

/// How urgent a request is. In the order of urgency, so that the more urgent of two is the smaller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// Somebody waits for it.
    High,
    /// Nothing was said.
    #[default]
    Normal,
    /// Batch work.
    Low,
}

impl Priority {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];

    /// Its share of the application, and of the places in the queue, when all want more than there is.
    pub const fn weight(self) -> u32 {
        match self {
            Self::High => 16,
            Self::Normal => 4,
            Self::Low => 1,
        }
    }

    /// The word on the wire.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::High => "high",
            Self::Normal => "normal",
            Self::Low => "low",
        }
    }

    /// Reads the word on the wire.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|priority| word.trim().eq_ignore_ascii_case(priority.as_str()))
    }
}

/// Whose request it is: a hash of an identity or of a header. One that cannot be told is 0.
pub type Tenant = u64;

/// A request that waits. Never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// A request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ask {
    /// Whose it is.
    pub tenant: Tenant,
    /// How urgent it is.
    pub priority: Priority,
    /// What it is expected to cost.
    pub work: Work,
    /// When its answer must be there, since the epoch; `None`: whenever.
    pub deadline: Option<Duration>,
}

/// What is known of the application now. What is not known is zero, and then nobody is refused by prediction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outlook {
    /// How long until work that reaches the application now begins: its backlog over its rate.
    pub backlog: Duration,
    /// How long a unit of work keeps it busy: one over its rate.
    pub unit: Duration,
    /// How long this request itself takes from its beginning to its answer.
    pub service: Duration,
}

impl Outlook {
    fn busy(&self, work: Work) -> Duration {
        // Saturates; a prediction of centuries is as good as any.
        Duration::try_from_secs_f64(self.unit.as_secs_f64() * work.as_units()).unwrap_or(Duration::MAX)
    }
}

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// As many wait as may, and its tenant or priority has its share of them.
    Full,
    /// It cannot be answered before its deadline.
    TooLate,
}

/// A refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub cause: Cause,
    /// How long it would have had to wait for its turn, by prediction.
    pub wait: Duration,
    /// When trying again has a chance.
    pub retry_after: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    ticket: Ticket,
    work: Work,
    deadline: Option<Duration>,
    service: Duration,
}

#[derive(Debug, Default)]
struct Class {
    fair: Fair<Tenant>,
    lines: BTreeMap<Tenant, VecDeque<Waiter>>,
    waiting: usize,
}

/// What a request that came is told.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// It waits. Another one may have had to give up its place for it.
    Waits(Ticket, Option<(Ticket, Refusal)>),
    /// It does not.
    Refused(Refusal),
}

/// What becomes of one that waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It starts.
    Starts(Ticket),
    /// Its deadline has come too near meanwhile.
    Refused(Ticket, Refusal),
}

/// A bounded queue.
#[derive(Debug)]
pub struct Queue {
    bound: usize,
    priorities: Fair<Priority>,
    classes: [Class; 3],
    where_is: HashMap<Ticket, (Priority, Tenant)>,
    issued: u64,
}

impl Queue {
    /// A queue in which at most `bound` requests wait.
    pub fn new(bound: usize) -> Self {
        Self {
            bound,
            priorities: Fair::default(),
            classes: Default::default(),
            where_is: HashMap::new(),
            issued: 0,
        }
    }

    /// Changes how many may wait. Those that wait already stay.
    pub fn set_bound(&mut self, bound: usize) {
        self.bound = bound;
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.where_is.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.where_is.is_empty()
    }

    /// How long a request would wait for its turn if nobody else came.
    pub fn predicted_wait(&self, ask: &Ask, outlook: &Outlook) -> Duration {
        let class = &self.classes[ask.priority as usize];
        let in_class = class.fair.ahead(ask.tenant, 1, class.fair.waiting(ask.tenant).plus(ask.work));
        let ahead = self.priorities.ahead(ask.priority, ask.priority.weight(), in_class);
        outlook.backlog.saturating_add(outlook.busy(ahead.minus(ask.work)))
    }

    /// Takes a request in, or does not.
    pub fn arrive(&mut self, ask: &Ask, outlook: &Outlook, now: Duration) -> Place {
        let wait = self.predicted_wait(ask, outlook);
        if let Some(refusal) = too_late(ask.deadline, outlook.service, wait, now) {
            return Place::Refused(refusal);
        }
        let mut displaced = None;
        if self.len() >= self.bound {
            let refusal = Refusal { cause: Cause::Full, wait, retry_after: wait };
            match self.longest(ask) {
                Some((priority, tenant)) => {
                    displaced = self.give_up_newest(priority, tenant).map(|ticket| (ticket, refusal));
                }
                None => return Place::Refused(refusal),
            }
        }
        self.issued += 1;
        let ticket = Ticket(self.issued);
        let waiter = Waiter { ticket, work: ask.work, deadline: ask.deadline, service: outlook.service };
        let class = &mut self.classes[ask.priority as usize];
        class.lines.entry(ask.tenant).or_default().push_back(waiter);
        class.waiting += 1;
        class.fair.waits(ask.tenant, 1, ask.work);
        self.priorities.waits(ask.priority, ask.priority.weight(), ask.work);
        self.where_is.insert(ticket, (ask.priority, ask.tenant));
        Place::Waits(ticket, displaced)
    }

    /// A slot is free: whose turn it is. Call again after a refusal, since the slot is still free; `None`: nobody
    /// waits.
    pub fn turn(&mut self, now: Duration) -> Option<Turn> {
        let priority = self.priorities.next()?;
        let tenant = self.classes[priority as usize].fair.next()?;
        let waiter = *self.classes[priority as usize].lines.get(&tenant)?.front()?;
        let late = too_late(waiter.deadline, waiter.service, Duration::ZERO, now);
        self.remove(priority, tenant, 0, late.is_none());
        Some(match late {
            Some(refusal) => Turn::Refused(waiter.ticket, refusal),
            None => Turn::Starts(waiter.ticket),
        })
    }

    /// Takes out one that waits: its client has gone, or its deadline has come. False: it does not wait.
    pub fn leave(&mut self, ticket: Ticket) -> bool {
        let Some(&(priority, tenant)) = self.where_is.get(&ticket) else { return false };
        let line = self.classes[priority as usize].lines.get(&tenant);
        let Some(index) = line.and_then(|line| line.iter().position(|waiter| waiter.ticket == ticket)) else {
            return false;
        };
        self.remove(priority, tenant, index, false);
        true
    }

    /// A request that was served cost `real` instead of `expected`: its tenant is charged the difference.
    pub fn settle(&mut self, priority: Priority, tenant: Tenant, expected: Work, real: Work) {
        let class = &mut self.classes[priority as usize];
        class.fair.charge(tenant, real.minus(expected));
        class.fair.refund(tenant, expected.minus(real));
        self.priorities.charge(priority, real.minus(expected));
        self.priorities.refund(priority, expected.minus(real));
    }

    fn remove(&mut self, priority: Priority, tenant: Tenant, index: usize, served: bool) {
        let class = &mut self.classes[priority as usize];
        let Some(line) = class.lines.get_mut(&tenant) else { return };
        let Some(waiter) = line.remove(index) else { return };
        let last = line.is_empty();
        if last {
            class.lines.remove(&tenant);
        }
        class.waiting -= 1;
        let last_of_class = class.waiting == 0;
        if served {
            class.fair.served(tenant, waiter.work, last);
            self.priorities.served(priority, waiter.work, last_of_class);
        } else {
            class.fair.leaves(tenant, waiter.work, last);
            self.priorities.leaves(priority, waiter.work, last_of_class);
        }
        self.where_is.remove(&waiter.ticket);
    }

    /// Who must give up a place for a newcomer: in the priority that holds most places for its weight, the tenant that
    /// holds most, the newcomer counted. `None`: that is the newcomer's own tenant.
    fn longest(&self, ask: &Ask) -> Option<(Priority, Tenant)> {
        let places = |priority: Priority| {
            let waiting = self.classes[priority as usize].waiting + usize::from(priority == ask.priority);
            // Over the weight, as a fraction: compared crosswise, so that nothing is rounded.
            (waiting as u64, u64::from(priority.weight()))
        };
        let more = |a: &Priority, b: &Priority| {
            let ((held_a, weight_a), (held_b, weight_b)) = (places(*a), places(*b));
            // Of two that hold alike, the less urgent one.
            (held_a * weight_b).cmp(&(held_b * weight_a)).then(a.cmp(b))
        };
        let holding = Priority::ALL.into_iter().filter(|priority| places(*priority).0 > 0);
        let priority = holding.max_by(more)?;
        let class = &self.classes[priority as usize];
        let own = |tenant: Tenant| priority == ask.priority && tenant == ask.tenant;
        let held = |tenant: Tenant, line: usize| line + usize::from(own(tenant));
        let (tenant, most) = class
            .lines
            .iter()
            .map(|(tenant, line)| (*tenant, held(*tenant, line.len())))
            .max_by_key(|(tenant, held)| (*held, own(*tenant)))?;
        // A newcomer without a line of his own holds one place.
        (!own(tenant) && (priority != ask.priority || most > 1)).then_some((priority, tenant))
    }

    fn give_up_newest(&mut self, priority: Priority, tenant: Tenant) -> Option<Ticket> {
        let line = self.classes[priority as usize].lines.get(&tenant)?;
        let (index, ticket) = (line.len().checked_sub(1)?, line.back()?.ticket);
        self.remove(priority, tenant, index, false);
        Some(ticket)
    }
}

/// Whether a request that begins after `wait` and then takes `service` misses its deadline; the refusal says when its
/// like would make it again.
pub fn too_late(
    deadline: Option<Duration>,
    service: Duration,
    wait: Duration,
    now: Duration,
) -> Option<Refusal> {
    let deadline = deadline?;
    let answered = now.saturating_add(wait).saturating_add(service);
    let late = answered.checked_sub(deadline).filter(|_| answered > deadline || now >= deadline)?;
    Some(Refusal { cause: Cause::TooLate, wait, retry_after: late.min(wait) })
}
