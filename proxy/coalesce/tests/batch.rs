//! What a former promises: everybody gets exactly one end, batches hold together, nobody waits for a server that is idle,
//! deadlines are kept, and nobody is starved by somebody else.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "what fails here fails the test")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use penstock_coalesce::batch::{
    Ask, Batch, BatchId, Bisection, Closed, Cut, Formed, Former, Full, Left, Limits, MAX_WAITING, Takes,
    Ticket,
};
use proptest::prelude::*;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

const ASK: Ask = Ask { key: 1, rows: 1, bytes: 100, elements: 10, deadline: None, tenant: 0, priority: 1 };

fn takes(takes: Takes, rows: u32) -> Duration {
    takes.fixed + takes.row * rows
}

/// A former, and what is known of everybody who ever joined.
struct Bed {
    former: Former<Ask>,
    limits: Limits,
    takes: Takes,
    now: Duration,
    waiting: BTreeMap<Ticket, (Ask, Duration)>,
    flying: BTreeMap<BatchId, BTreeSet<Ticket>>,
    /// Flying batches whose members have all left.
    deserted: BTreeSet<BatchId>,
    ended: BTreeSet<Ticket>,
    sent: Vec<Batch<Ask>>,
}

impl Bed {
    fn new(limits: Limits) -> Self {
        Self {
            former: Former::new(limits),
            limits,
            takes: Takes::default(),
            now: ms(1000),
            waiting: BTreeMap::new(),
            flying: BTreeMap::new(),
            deserted: BTreeSet::new(),
            ended: BTreeSet::new(),
            sent: Vec::new(),
        }
    }

    fn takes(mut self, takes: Takes) -> Self {
        self.takes = takes;
        self.former.expect(takes);
        self
    }

    fn join(&mut self, ask: Ask) -> Ticket {
        let ticket = self.former.join(ask, ask, self.now).unwrap();
        assert!(self.waiting.insert(ticket, (ask, self.now)).is_none());
        ticket
    }

    /// Joins, and does what is then to be done.
    fn ask(&mut self, ask: Ask) -> Ticket {
        let ticket = self.join(ask);
        self.look();
        ticket
    }

    /// Does all that is to be done, and checks it.
    fn look(&mut self) {
        while let Some(formed) = self.former.next(self.now) {
            match formed {
                Formed::Late(ask) => {
                    let late = self.waiting.iter().find(|(_, (other, _))| {
                        *other == ask && self.now + takes(self.takes, ask.rows) > ask.deadline.unwrap()
                    });
                    let ticket = *late.expect("who is late waits, and cannot be in time").0;
                    self.waiting.remove(&ticket);
                    assert!(self.ended.insert(ticket));
                }
                Formed::Batch(batch) => self.check(batch),
            }
        }
        assert_eq!(self.former.waiting(), self.waiting.len());
        assert_eq!(self.former.flying(), self.flying.len());
        let concurrent = self.limits.concurrent;
        assert!(
            self.waiting.is_empty() || self.flying.len() >= concurrent,
            "{} wait for an idle server",
            self.waiting.len()
        );
        if self.flying.len() < 4 * concurrent {
            for (ticket, (ask, since)) in &self.waiting {
                assert!(
                    self.limits.delay.is_none_or(|delay| *since + delay > self.now),
                    "{ticket:?} is delayed"
                );
                // Of those that are too large for a batch, the first is seen in time and the others in their turn.
                if ask.rows > self.former.rows() {
                    continue;
                }
                let spare = takes(self.takes, self.former.rows());
                assert!(ask.deadline.is_none_or(|end| end.saturating_sub(spare) > self.now), "{ticket:?}");
            }
        }
        for (ticket, (ask, _)) in &self.waiting {
            let helps = ask.deadline.is_none_or(|end| self.now + takes(self.takes, ask.rows) <= end);
            // Who needs more time than those before it is found out in its turn.
            assert!(helps || self.takes.row > Duration::ZERO, "{ticket:?} waits in vain");
        }
    }

    fn check(&mut self, batch: Batch<Ask>) {
        let asks: Vec<Ask> = batch.members.iter().map(|(_, ask)| *ask).collect();
        assert!(!asks.is_empty() && asks.iter().all(|ask| ask.key == asks[0].key), "{asks:?}");
        assert_eq!(batch.rows, asks.iter().map(|ask| ask.rows).sum::<u32>());
        if asks.len() > 1 {
            assert!(batch.rows <= self.former.rows() && batch.rows <= self.limits.rows, "{batch:?}");
            assert!(asks.iter().map(|ask| ask.bytes).sum::<u64>() <= self.limits.bytes, "{batch:?}");
            assert!(asks.iter().map(|ask| ask.elements).sum::<u64>() <= self.limits.elements, "{batch:?}");
        }
        assert!(asks.is_sorted_by_key(|ask| ask.priority), "{asks:?}");
        let over = self.now + takes(self.takes, batch.rows);
        assert!(
            asks.iter().all(|ask| ask.deadline.is_none_or(|end| over <= end)),
            "sent too late: {batch:?}"
        );
        let mut first = self.now;
        for (ticket, ask) in &batch.members {
            let (asked, since) = self.waiting.remove(ticket).expect("who is sent has waited");
            assert_eq!(asked, *ask);
            first = first.min(since);
            assert!(self.ended.insert(*ticket), "{ticket:?} is sent twice");
        }
        assert_eq!(batch.waited, self.now - first);
        assert!(self.flying.len() < 4 * self.limits.concurrent, "the server is flooded");
        let tickets = batch.members.iter().map(|(ticket, _)| *ticket).collect();
        assert!(self.flying.insert(batch.id, tickets).is_none());
        self.sent.push(batch);
    }

    fn leave(&mut self, ticket: Ticket) {
        let left = self.former.leave(ticket);
        if self.waiting.remove(&ticket).is_some() {
            assert_eq!(left, Left::Waiting);
            assert!(self.ended.insert(ticket));
        } else if let Some((id, members)) = self.flying.iter_mut().find(|(_, all)| all.contains(&ticket)) {
            members.remove(&ticket);
            let last = members.is_empty();
            assert_eq!(left, if last { Left::Last(*id) } else { Left::Others });
            if last {
                assert!(self.deserted.insert(*id), "stopped twice");
            }
        } else {
            assert_eq!(left, Left::Others);
        }
        self.look();
    }

    fn done(&mut self, id: BatchId, took: Duration, failed: bool) {
        assert!(self.flying.remove(&id).is_some());
        self.former.done(id, took, failed);
        self.look();
    }

    /// Ends the oldest batch in flight.
    fn end_one(&mut self) -> bool {
        let Some(id) = self.flying.keys().next().copied() else { return false };
        self.done(id, ms(10), false);
        true
    }
}

#[derive(Clone, Debug)]
enum Op {
    Join(Ask, Option<u64>),
    Leave(prop::sample::Index),
    Done(prop::sample::Index, u64, bool),
    Pass(u64),
    Wake,
    Set(Limits),
}

fn limits() -> impl Strategy<Value = Limits> {
    let delay = prop::option::of((0..20_u64).prop_map(ms));
    let target = prop::option::of((1..30_u64).prop_map(ms));
    (1..12_u32, 200..2000_u64, 20..200_u64, delay, 1..4_usize, target).prop_map(
        |(rows, bytes, elements, delay, concurrent, target)| Limits {
            rows,
            bytes,
            elements,
            delay,
            concurrent,
            target,
        },
    )
}

fn op() -> impl Strategy<Value = Op> {
    let ask = (0..3_u128, 1..6_u32, 1..500_u64, 1..60_u64, 0..3_u64, 0..2_u8);
    let ask = ask.prop_map(|(key, rows, bytes, elements, tenant, priority)| Ask {
        key,
        rows,
        bytes,
        elements,
        deadline: None,
        tenant,
        priority,
    });
    prop_oneof![
        8 => (ask, prop::option::of(0..60_u64)).prop_map(|(ask, within)| Op::Join(ask, within)),
        2 => any::<prop::sample::Index>().prop_map(Op::Leave),
        4 => (any::<prop::sample::Index>(), 0..40_u64, prop::bool::weighted(0.1)).prop_map(|(at, took, failed)| Op::Done(at, took, failed)),
        2 => (0..20_u64).prop_map(Op::Pass),
        2 => Just(Op::Wake),
        1 => limits().prop_map(Op::Set),
    ]
}

proptest! {
    #[test]
    fn everybody_gets_one_end_and_every_batch_is_sound(
        first in limits(),
        fixed in 0..10_u64,
        row in 0..3_u64,
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let mut bed = Bed::new(first).takes(Takes { fixed: ms(fixed), row: ms(row) });
        let mut all = Vec::new();
        for op in ops {
            match op {
                Op::Join(ask, within) => {
                    let ask = Ask { deadline: within.map(|within| bed.now + ms(within)), ..ask };
                    all.push(bed.ask(ask));
                }
                Op::Leave(at) if !all.is_empty() => bed.leave(*at.get(&all)),
                Op::Done(at, took, failed) if !bed.flying.is_empty() => {
                    let flying: Vec<_> = bed.flying.keys().copied().collect();
                    bed.done(*at.get(&flying), ms(took), failed);
                }
                Op::Pass(passes) => {
                    bed.now += ms(passes);
                    bed.look();
                }
                Op::Wake => {
                    if let Some(wake) = bed.former.wake() {
                        // Nothing happens before.
                        let before = wake.saturating_sub(Duration::from_nanos(1));
                        prop_assert!(before < bed.now || bed.former.next(before).is_none());
                        bed.now = bed.now.max(wake);
                        let (waiting, sent) = (bed.waiting.len(), bed.sent.len());
                        bed.look();
                        prop_assert!(bed.waiting.len() < waiting || bed.sent.len() > sent, "woken for nothing");
                    }
                }
                Op::Set(limits) => {
                    bed.limits = limits;
                    bed.former.set(limits);
                    bed.look();
                }
                Op::Leave(_) | Op::Done(..) => {}
            }
        }
        while bed.end_one() {}
        prop_assert!(bed.waiting.is_empty());
        prop_assert!(all.iter().all(|ticket| bed.ended.contains(ticket)));
    }

    /// However a batch of which some are guilty is cut, they alone fail, nobody is run twice after an answer, and it costs no
    /// more executions than the search for two and each on its own.
    #[test]
    fn bisecting_ends_within_its_budget(members in 1..200_usize, guilty in prop::collection::btree_set(0..200_usize, 0..60)) {
        let mut bisection = Bisection::of(members);
        let (mut parts, mut served, mut failed, mut runs) = (Vec::new(), 0, 0, 0_u32);
        parts.push(0..members);
        while let Some(part) = parts.pop() {
            runs += 1;
            if !guilty.iter().any(|at| part.contains(at)) {
                served += part.len();
                continue;
            }
            match bisection.cut(part.len()) {
                Some(Cut::Half(at)) => {
                    parts.push(part.start + at..part.end);
                    parts.push(part.start..part.start + at);
                }
                Some(Cut::Each) => parts.extend(part.map(|at| at..at + 1)),
                None => failed += part.len(),
            }
        }
        let here = guilty.iter().filter(|at| **at < members).count();
        prop_assert_eq!(served + failed, members);
        prop_assert_eq!(failed, here, "of {} members", members);
        let search = 1 + 4 * (members.ilog2() + 1);
        let each = if here > 2 { members as u32 } else { 0 };
        prop_assert!(runs <= search + each, "{runs} executions for {members}");
    }
}

#[test]
fn the_first_goes_at_once_and_the_others_go_together_when_it_is_done() {
    let mut bed = Bed::new(Limits { rows: 8, concurrent: 1, ..Limits::default() });
    bed.ask(ASK);
    assert_eq!((bed.sent[0].rows, bed.sent[0].closed), (1, Closed::Idle));
    for _ in 0..5 {
        bed.now += ms(1);
        bed.ask(ASK);
    }
    assert_eq!(bed.sent.len(), 1);
    assert_eq!(bed.former.wake(), None, "with nothing that presses there is nothing to wake for");
    bed.end_one();
    assert_eq!((bed.sent[1].rows, bed.sent[1].closed, bed.sent[1].waited), (5, Closed::Idle, ms(4)));
}

#[test]
fn a_busy_server_is_sent_what_has_waited_long_enough_or_would_be_late() {
    let limits = Limits { rows: 8, concurrent: 1, delay: Some(ms(2)), ..Limits::default() };
    let mut bed = Bed::new(limits).takes(Takes { fixed: ms(5), row: ms(1) });
    bed.ask(ASK);
    bed.ask(ASK);
    assert_eq!(bed.former.wake(), Some(bed.now + ms(2)));
    bed.now += ms(2);
    bed.look();
    assert_eq!(bed.sent[1].closed, Closed::Delay);
    // Eight rows would take 13 ms.
    let urgent = Ask { deadline: Some(bed.now + ms(14)), ..ASK };
    bed.ask(urgent);
    assert_eq!(bed.former.wake(), Some(bed.now + ms(1)));
    bed.now += ms(1);
    bed.look();
    assert_eq!(bed.sent[2].closed, Closed::Deadline);
}

#[test]
fn who_cannot_be_in_time_is_told_and_a_batch_grows_no_further_than_its_members_can_bear() {
    let mut bed = Bed::new(Limits { rows: 8, concurrent: 1, ..Limits::default() })
        .takes(Takes { fixed: ms(5), row: ms(1) });
    bed.ask(ASK);
    let hopeless = bed.ask(Ask { deadline: Some(bed.now + ms(5)), ..ASK });
    assert!(bed.ended.contains(&hopeless), "it was told at once, though the server is busy");
    for _ in 0..12 {
        bed.join(Ask { deadline: Some(bed.now + ms(8)), ..ASK });
    }
    bed.look();
    // Three rows take 8 ms; the rest cannot wait, and goes as it can.
    assert!(bed.sent[1..].iter().all(|batch| batch.rows == 3), "{:?}", bed.sent);
    assert_eq!(bed.flying.len(), 4, "more is not sent to a server that is busy");
}

#[test]
fn one_that_is_larger_than_a_batch_goes_alone() {
    let mut bed = Bed::new(Limits { rows: 4, concurrent: 1, ..Limits::default() });
    bed.ask(ASK);
    for rows in [1, 9, 1, 1] {
        bed.ask(Ask { rows, ..ASK });
    }
    while bed.end_one() {}
    assert_eq!(bed.sent.iter().map(|batch| batch.rows).collect::<Vec<_>>(), [1, 1, 9, 2]);
}

#[test]
fn a_tenant_who_floods_delays_another_by_no_more_than_a_batch() {
    let mut bed = Bed::new(Limits { rows: 8, concurrent: 1, ..Limits::default() });
    for at in 0..500 {
        // In several lines at once.
        bed.ask(Ask { tenant: 7, key: at % 5, ..ASK });
    }
    for _ in 0..3 {
        bed.end_one();
    }
    let before = bed.sent.len();
    let quiet = bed.ask(Ask { tenant: 8, key: 1, ..ASK });
    let alone = bed.ask(Ask { tenant: 9, key: 77, ..ASK });
    for _ in 0..3 {
        bed.end_one();
    }
    let of = |ticket| bed.sent.iter().position(|batch| batch.members.iter().any(|(of, _)| *of == ticket));
    assert!(
        of(quiet).unwrap() <= before + 2 && of(alone).unwrap() <= before + 2,
        "{:?}",
        &bed.sent[before..]
    );
}

#[test]
fn no_line_is_starved_by_another_of_the_same_tenant() {
    let mut bed = Bed::new(Limits { rows: 8, concurrent: 1, ..Limits::default() });
    for _ in 0..20 {
        bed.ask(ASK);
    }
    let other = bed.ask(Ask { key: 2, ..ASK });
    for _ in 0..200 {
        // As many come as are served.
        for _ in 0..8 {
            bed.join(ASK);
        }
        bed.end_one();
        if bed.ended.contains(&other) {
            return;
        }
    }
    panic!("{} batches went before it", bed.sent.len());
}

#[test]
fn tenants_share_what_there_is_by_rows_and_not_by_requests() {
    let mut bed = Bed::new(Limits { rows: 8, concurrent: 1, ..Limits::default() });
    bed.ask(ASK);
    for _ in 0..200 {
        bed.ask(Ask { tenant: 1, rows: 4, ..ASK });
        for _ in 0..4 {
            bed.ask(Ask { tenant: 2, rows: 1, ..ASK });
        }
    }
    for _ in 0..100 {
        bed.end_one();
    }
    let rows = |tenant| -> u32 {
        let members = bed.sent.iter().flat_map(|batch| &batch.members);
        members.filter(|(_, ask)| ask.tenant == tenant).map(|(_, ask)| ask.rows).sum()
    };
    assert!(rows(1).abs_diff(rows(2)) <= 8, "{} and {} rows", rows(1), rows(2));
}

#[test]
fn who_floods_the_queue_leaves_room_for_others_and_leaving_gives_it_back() {
    let mut bed = Bed::new(Limits { rows: 8, concurrent: 1, ..Limits::default() });
    bed.ask(ASK);
    let mut taken = Vec::new();
    while let Ok(ticket) = bed.former.join(ASK, ASK, bed.now) {
        bed.waiting.insert(ticket, (ASK, bed.now));
        taken.push(ticket);
    }
    assert!(taken.len() < MAX_WAITING && taken.len() > MAX_WAITING * 4 / 5, "{}", taken.len());
    bed.ask(Ask { tenant: 5, ..ASK });
    for ticket in taken {
        bed.former.leave(ticket);
        bed.waiting.remove(&ticket);
    }
    bed.look();
    bed.ask(ASK);
    // With enough tenants it fills up to the last place.
    let mut tenant = 100;
    while bed.former.join(Ask { tenant, ..ASK }, ASK, bed.now) != Err(Full) {
        tenant += 1;
    }
    assert_eq!(bed.former.waiting(), MAX_WAITING);
}

#[test]
fn rows_are_adapted_to_the_latency_that_is_asked_for() {
    let limits = Limits { rows: 64, concurrent: 2, target: Some(ms(20)), ..Limits::default() };
    let mut bed = Bed::new(limits);
    // A server that takes 4 ms and 1 ms a row: 16 rows are what it can do in time.
    for _ in 0..4000 {
        while bed.waiting.len() < 80 {
            bed.join(ASK);
        }
        bed.look();
        let (id, rows) = bed
            .sent
            .iter()
            .rev()
            .find(|sent| bed.flying.contains_key(&sent.id))
            .map(|sent| (sent.id, sent.rows))
            .unwrap();
        bed.done(id, ms(4 + u64::from(rows)), false);
    }
    assert!((13..=17).contains(&bed.former.rows()), "{}", bed.former.rows());
    let id = *bed.flying.keys().next().unwrap();
    let before = bed.former.rows();
    bed.done(id, ms(500), true);
    assert_eq!(bed.former.rows(), before, "what failed says nothing");
    bed.former.set(Limits { delay: Some(ms(1)), ..limits });
    assert_eq!(bed.former.rows(), before, "other limits do not forget it");
}
