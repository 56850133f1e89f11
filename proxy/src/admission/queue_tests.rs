//! The promises of the queue, tried with random histories.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::fair::Work;
use super::queue::{Ask, Cause, Outlook, Place, Priority, Queue, Tenant, Ticket, Turn};

const MS: Duration = Duration::from_millis(1);

fn ask(tenant: Tenant, priority: Priority, units: f64) -> Ask {
    Ask { tenant, priority, work: Work::units(units), deadline: None }
}

/// One unit of work takes a millisecond.
fn outlook() -> Outlook {
    Outlook { unit: MS, ..Outlook::default() }
}

fn waits(queue: &mut Queue, ask: &Ask) -> Ticket {
    match queue.arrive(ask, &outlook(), Duration::ZERO) {
        Place::Waits(ticket, None) => ticket,
        other => panic!("{other:?}"),
    }
}

fn starts(queue: &mut Queue) -> Ticket {
    match queue.turn(Duration::ZERO) {
        Some(Turn::Starts(ticket)) => ticket,
        other => panic!("{other:?}"),
    }
}

fn priority() -> impl Strategy<Value = Priority> {
    prop::sample::select(Priority::ALL.to_vec())
}

#[derive(Clone, Debug)]
enum Step {
    Arrive { tenant: Tenant, priority: Priority, units: f64, deadline_ms: Option<u64> },
    Turn,
    Leave(usize),
    Settle { tenant: Tenant, priority: Priority, expected: f64, real: f64 },
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let arrive = (0..5_u64, priority(), 0.0..50.0, prop::option::of(0..200_u64));
    prop_oneof![
        6 => arrive.prop_map(|(tenant, priority, units, deadline_ms)| Step::Arrive { tenant, priority, units, deadline_ms }),
        5 => Just(Step::Turn),
        1 => any::<usize>().prop_map(Step::Leave),
        1 => (0..5_u64, priority(), 0.0..50.0, 0.0..50.0)
            .prop_map(|(tenant, priority, expected, real)| Step::Settle { tenant, priority, expected, real }),
        1 => (0..20_u64).prop_map(Step::Pass),
    ]
}

proptest! {
    /// Bounds are kept, a free slot is never left empty while somebody waits, and whoever came ends once: he starts, is
    /// refused, or leaves. Nobody starts too late.
    #[test]
    fn whoever_comes_ends_once_and_nobody_waits_for_a_free_slot(
        bound in 0..12_usize,
        steps in prop::collection::vec(step(), 1..300),
    ) {
        let mut queue = Queue::new(bound);
        let mut now = Duration::from_secs(1);
        let mut waiting: BTreeMap<Ticket, Option<Duration>> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Arrive { tenant, priority, units, deadline_ms } => {
                    let deadline = deadline_ms.map(|ms| now + ms as u32 * MS);
                    let ask = Ask { deadline, ..ask(tenant, priority, units) };
                    match queue.arrive(&ask, &outlook(), now) {
                        Place::Waits(ticket, displaced) => {
                            if let Some((gone, refusal)) = displaced {
                                prop_assert_eq!(refusal.cause, Cause::Full);
                                prop_assert!(waiting.remove(&gone).is_some());
                            }
                            prop_assert!(waiting.insert(ticket, deadline).is_none());
                        }
                        Place::Refused(refusal) => {
                            prop_assert!(refusal.cause == Cause::TooLate || waiting.len() == bound);
                            prop_assert!(refusal.cause == Cause::Full || deadline.is_some());
                        }
                    }
                }
                Step::Turn => match queue.turn(now) {
                    Some(Turn::Starts(ticket)) => {
                        let deadline = waiting.remove(&ticket);
                        prop_assert!(deadline.is_some_and(|deadline| deadline.is_none_or(|deadline| now < deadline)));
                    }
                    Some(Turn::Refused(ticket, _)) => {
                        let deadline = waiting.remove(&ticket);
                        prop_assert!(deadline.flatten().is_some_and(|deadline| now >= deadline));
                    }
                    None => prop_assert!(waiting.is_empty()),
                },
                Step::Leave(index) => {
                    if let Some(ticket) = waiting.keys().nth(index % waiting.len().max(1)).copied() {
                        prop_assert!(queue.leave(ticket));
                        prop_assert!(!queue.leave(ticket));
                        waiting.remove(&ticket);
                    }
                }
                Step::Settle { tenant, priority, expected, real } => {
                    queue.settle(priority, tenant, Work::units(expected), Work::units(real));
                }
                Step::Pass(ms) => now += ms as u32 * MS,
            }
            prop_assert_eq!(queue.len(), waiting.len());
            prop_assert!(queue.len() <= bound);
        }
        while let Some(turn) = queue.turn(now) {
            let (Turn::Starts(ticket) | Turn::Refused(ticket, _)) = turn;
            prop_assert!(waiting.remove(&ticket).is_some());
        }
        prop_assert!(waiting.is_empty());
    }

    /// Between two tenants that both have something waiting all the time, the work that they were given differs by at
    /// most two of the largest requests, over any interval (Sheng et al., theorem 4.4).
    #[test]
    fn tenants_that_always_wait_are_given_the_same_work(
        sizes in prop::collection::vec((1.0..64.0_f64, 1.0..64.0_f64, 1.0..64.0_f64), 200),
    ) {
        let mut queue = Queue::new(1_000);
        let mut of = BTreeMap::new();
        for (a, b, c) in &sizes {
            for (tenant, units) in [(1, *a), (2, *b), (3, *c)] {
                of.insert(waits(&mut queue, &ask(tenant, Priority::Normal, units)), (tenant, units));
            }
        }
        let mut given = [0.0_f64; 4];
        let mut left = [200; 4];
        // What a tenant is ahead of another, at its least and most so far: their difference is that of an interval.
        let mut ahead = BTreeMap::new();
        while left[1..].iter().all(|left| *left > 0) {
            let (tenant, units) = of[&starts(&mut queue)];
            given[tenant as usize] += units;
            left[tenant as usize] -= 1;
            for (one, other) in [(1, 2), (2, 3), (1, 3)] {
                let now = given[one] - given[other];
                let (least, most) = ahead.entry((one, other)).or_insert((now, now));
                (*least, *most) = (least.min(now), most.max(now));
                prop_assert!(*most - *least <= 2.0 * 64.0 + 0.1, "{one} and {other}: {least} to {most}");
            }
        }
    }

    /// Every priority that has something waiting gets its share of the work, however much of the others waits.
    #[test]
    fn no_priority_starves(sizes in prop::collection::vec(1.0..32.0_f64, 600)) {
        let mut queue = Queue::new(10_000);
        let mut of = BTreeMap::new();
        for (index, units) in sizes.iter().enumerate() {
            for priority in Priority::ALL {
                // Ever more tenants in a priority give it no more of the whole.
                let tenant = index as u64 % if priority == Priority::High { 100 } else { 2 };
                of.insert(waits(&mut queue, &ask(tenant, priority, *units)), (priority, *units));
            }
        }
        let mut given: BTreeMap<Priority, f64> = BTreeMap::new();
        let all: f64 = sizes.iter().sum();
        while given.get(&Priority::High).copied().unwrap_or(0.0) < all - 32.0 {
            let (priority, units) = of[&starts(&mut queue)];
            *given.entry(priority).or_default() += units;
            let total: f64 = given.values().sum();
            for priority in Priority::ALL {
                let share = total * f64::from(priority.weight()) / 21.0;
                let got = given.get(&priority).copied().unwrap_or(0.0);
                // One request of each priority may be in the way, the largest one.
                prop_assert!(got >= share - 3.0 * 32.0, "{priority:?} got {got} of {share}");
            }
        }
    }

    /// When nobody else comes, a request waits as long as was predicted, but for one request of each of the others, and
    /// what is served beside those of its own priority.
    #[test]
    fn a_wait_is_predicted(
        before in prop::collection::vec((0..4_u64, priority(), 1.0..16.0_f64), 0..300),
        served in 0..30_usize,
        tenant in 0..6_u64,
        urgency in priority(),
    ) {
        let mut queue = Queue::new(1_000);
        let mut units_of = BTreeMap::new();
        for (tenant, priority, units) in before {
            units_of.insert(waits(&mut queue, &ask(tenant, priority, units)), units);
        }
        for _ in 0..served.min(queue.len()) {
            starts(&mut queue);
        }
        let last = ask(tenant, urgency, 8.0);
        let predicted = queue.predicted_wait(&last, &outlook()).as_secs_f64() * 1e3;
        let ticket = waits(&mut queue, &last);
        let mut waited = 0.0;
        loop {
            match starts(&mut queue) {
                own if own == ticket => break,
                other => waited += units_of[&other],
            }
        }
        // Six tenants and three priorities, the largest request of each; and while a request of another tenant of its
        // priority goes first, the other priorities get what is theirs by weight.
        let slack = 9.0 * 16.0 + 5.0 * 16.0 * 21.0 / f64::from(urgency.weight());
        prop_assert!((waited - predicted).abs() <= slack, "{waited} ms for {predicted} ms");
    }

    /// Whoever floods the queue pushes out himself: one who has less waiting than his share always finds a place.
    #[test]
    fn a_flood_pushes_out_itself(flood in prop::collection::vec((0..2_u64, priority()), 1..200), bound in 12..40_usize) {
        let mut queue = Queue::new(bound);
        let mut modest = BTreeSet::new();
        for (tenant, priority) in flood {
            if let Place::Waits(_, Some((gone, _))) = queue.arrive(&ask(tenant, priority, 1.0), &outlook(), Duration::ZERO) {
                prop_assert!(!modest.contains(&gone), "a modest one was pushed out");
            }
            if modest.is_empty() {
                match queue.arrive(&ask(9, Priority::High, 1.0), &outlook(), Duration::ZERO) {
                    Place::Waits(ticket, _) => { modest.insert(ticket); }
                    Place::Refused(refusal) => prop_assert!(false, "a modest one was refused: {refusal:?}"),
                }
            }
        }
    }
}

#[test]
fn the_urgent_go_first_while_they_are_few() {
    let mut queue = Queue::new(100);
    let low: Vec<_> = (0..10).map(|_| waits(&mut queue, &ask(1, Priority::Low, 1.0))).collect();
    assert_eq!(starts(&mut queue), low[0]);
    let high = waits(&mut queue, &ask(2, Priority::High, 1.0));
    let normal = waits(&mut queue, &ask(3, Priority::Normal, 1.0));
    assert_eq!([starts(&mut queue), starts(&mut queue), starts(&mut queue)], [high, normal, low[1]]);
}

#[test]
fn what_cannot_be_answered_in_time_is_refused_when_it_comes_with_a_time_to_come_back() {
    let mut queue = Queue::new(100);
    for _ in 0..30 {
        waits(&mut queue, &ask(1, Priority::Normal, 1.0));
    }
    let outlook = Outlook { backlog: 10 * MS, unit: MS, service: 5 * MS };
    let now = Duration::from_secs(7);
    let until = |ms: u32| Ask { deadline: Some(now + ms * MS), ..ask(1, Priority::Normal, 1.0) };
    // 10 ms in the application, 30 ms in the queue, 5 ms of its own.
    match queue.arrive(&until(40), &outlook, now) {
        Place::Refused(refusal) => {
            assert_eq!((refusal.cause, refusal.wait, refusal.retry_after), (Cause::TooLate, 40 * MS, 5 * MS));
        }
        other => panic!("{other:?}"),
    }
    // Another tenant shares by turns, and has to wait for no more than one of the first's.
    assert!(matches!(queue.arrive(&Ask { tenant: 2, ..until(20) }, &outlook, now), Place::Waits(..)));
    assert!(matches!(queue.arrive(&until(50), &outlook, now), Place::Waits(..)));
    // Nothing is predicted where nothing is known, but what is over is over.
    let unknown = Outlook::default();
    assert!(matches!(queue.arrive(&until(1), &unknown, now), Place::Waits(..)));
    assert!(matches!(queue.arrive(&until(0), &unknown, now), Place::Refused(_)));
}

#[test]
fn a_full_queue_takes_the_place_of_the_longest_line() {
    let mut queue = Queue::new(3);
    let mut line: Vec<_> = (0..3).map(|_| waits(&mut queue, &ask(1, Priority::Normal, 1.0))).collect();
    let full = |place: Place| match place {
        Place::Refused(refusal) => refusal.cause == Cause::Full,
        Place::Waits(..) => false,
    };
    assert!(
        full(queue.arrive(&ask(1, Priority::Normal, 1.0), &outlook(), Duration::ZERO)),
        "his line is the longest"
    );
    match queue.arrive(&ask(2, Priority::Normal, 1.0), &outlook(), Duration::ZERO) {
        Place::Waits(_, Some((gone, refusal))) => {
            assert_eq!(
                (Some(gone), refusal.cause),
                (line.pop(), Cause::Full),
                "the newest of the longest line"
            );
        }
        other => panic!("{other:?}"),
    }
    // One place for 1, over his two; then all hold one, and a fourth finds none.
    assert!(matches!(
        queue.arrive(&ask(3, Priority::Normal, 1.0), &outlook(), Duration::ZERO),
        Place::Waits(_, Some(_))
    ));
    assert!(full(queue.arrive(&ask(4, Priority::Normal, 1.0), &outlook(), Duration::ZERO)));
    // The urgent hold nothing for their weight.
    assert!(matches!(
        queue.arrive(&ask(4, Priority::High, 1.0), &outlook(), Duration::ZERO),
        Place::Waits(_, Some(_))
    ));
    assert!(full(Queue::new(0).arrive(&ask(1, Priority::High, 1.0), &outlook(), Duration::ZERO)));
}

#[test]
fn work_that_turned_out_larger_is_charged() {
    let mut queue = Queue::new(100);
    let mut of = BTreeMap::new();
    for _ in 0..20 {
        for tenant in [1, 2] {
            of.insert(waits(&mut queue, &ask(tenant, Priority::Normal, 1.0)), tenant);
        }
    }
    let first = of[&starts(&mut queue)];
    queue.settle(Priority::Normal, first, Work::units(1.0), Work::units(6.0));
    let next: Vec<_> = (0..6).map(|_| of[&starts(&mut queue)]).collect();
    assert!(next[..5].iter().all(|tenant| *tenant != first), "{next:?}");
}
