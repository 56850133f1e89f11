//! The gate, under a paused clock; and under real threads, where its one word has to hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use tokio::task::{JoinHandle, yield_now};
use tokio::time::{Instant, advance, sleep};

use super::fair::Work;
use super::gate::{Gate, Permit};
use super::limit::{Adaptive, Limit};
use super::queue::{Ask, Cause, Outlook, Priority, Refusal, Tenant};

const MS: Duration = Duration::from_millis(1);

fn ask(tenant: Tenant) -> Ask {
    Ask { tenant, priority: Priority::Normal, work: Work::units(1.0), deadline: None }
}

fn gate(limit: u32, bound: usize) -> (Gate, JoinHandle<()>) {
    let (gate, owner) = Gate::new(Limit::Fixed(limit), bound, Instant::now());
    (gate, tokio::spawn(owner.run()))
}

/// Asks in a task of its own.
fn asks(gate: &Gate, ask: Ask) -> JoinHandle<Result<Permit, Refusal>> {
    let gate = gate.clone();
    tokio::spawn(async move { gate.admit(ask, Outlook { unit: MS, ..Outlook::default() }).await })
}

/// Lets everything happen that can happen without time.
async fn settle() {
    for _ in 0..50 {
        yield_now().await;
    }
}

fn numbers(gate: &Gate) -> (u32, u32) {
    let state = gate.state();
    (state.in_flight, state.waiting)
}

#[tokio::test(start_paused = true)]
async fn slots_are_taken_at_once_and_then_in_turn() {
    let (gate, _owner) = gate(2, 10);
    let (a, b) =
        (gate.admit(ask(1), Outlook::default()).await.unwrap(), asks(&gate, ask(1)).await.unwrap().unwrap());
    assert_eq!(a.waited(), Duration::ZERO);
    let (third, fourth) = (asks(&gate, ask(1)), asks(&gate, ask(1)));
    settle().await;
    assert_eq!(numbers(&gate), (2, 2));
    advance(30 * MS).await;
    drop(a);
    let third = third.await.unwrap().unwrap();
    assert_eq!(third.waited(), 30 * MS);
    assert_eq!(numbers(&gate), (2, 1));
    drop((b, third));
    let fourth = fourth.await.unwrap().unwrap();
    settle().await;
    assert_eq!(numbers(&gate), (1, 0));
    drop(fourth);
    assert_eq!(numbers(&gate), (0, 0));
    assert_eq!(gate.state().admitted, 4);
}

#[tokio::test(start_paused = true)]
async fn who_goes_away_leaves_no_place_and_no_slot_behind() {
    let (gate, _owner) = gate(1, 10);
    let first = gate.admit(ask(1), Outlook::default()).await.unwrap();
    let (gone, stays) = (asks(&gate, ask(1)), asks(&gate, ask(1)));
    settle().await;
    gone.abort();
    settle().await;
    assert_eq!(numbers(&gate), (1, 1));
    // One goes in the moment in which his slot has come.
    drop(first);
    stays.abort();
    settle().await;
    assert_eq!(numbers(&gate), (0, 0));
    assert!(gate.admit(ask(1), Outlook::default()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_wait_and_none_that_cannot_be_met_begins_one() {
    let (gate, _owner) = gate(1, 10);
    let _first = gate.admit(ask(1), Outlook::default()).await.unwrap();
    let began = Instant::now();
    let until = |ms: u32| Ask { deadline: Some(ms * MS), ..ask(1) };
    // It takes 20 ms itself, so 80 ms are all that it can wait.
    let outlook = Outlook { service: 20 * MS, ..Outlook::default() };
    let refusal = gate.admit(until(100), outlook).await.unwrap_err();
    assert_eq!((refusal.cause, began.elapsed()), (Cause::TooLate, 80 * MS));
    let busy = Outlook { backlog: 50 * MS, service: 20 * MS, ..Outlook::default() };
    let refusal = gate.admit(until(140), busy).await.unwrap_err();
    assert_eq!((refusal.cause, refusal.retry_after, began.elapsed()), (Cause::TooLate, 10 * MS, 80 * MS));
    assert_eq!((numbers(&gate), gate.state().refused_late), ((1, 0), 2));
}

#[tokio::test(start_paused = true)]
async fn the_bound_is_kept_by_shares() {
    let (gate, _owner) = gate(1, 3);
    let first = gate.admit(ask(1), Outlook::default()).await.unwrap();
    let passes = |tenant| {
        let asked = asks(&gate, ask(tenant));
        tokio::spawn(async move { asked.await.unwrap().map(drop) })
    };
    let flood: Vec<_> = (0..20).map(|_| passes(1)).collect();
    settle().await;
    assert_eq!(numbers(&gate), (1, 3));
    let modest = passes(2);
    settle().await;
    assert_eq!((numbers(&gate), gate.state().refused_full), ((1, 3), 18));
    drop(first);
    let mut admitted = 0;
    for one in flood {
        match one.await.unwrap() {
            Ok(()) => admitted += 1,
            Err(refusal) => assert_eq!(refusal.cause, Cause::Full),
        }
    }
    assert_eq!(admitted, 2);
    assert!(modest.await.unwrap().is_ok());
    settle().await;
    assert_eq!(numbers(&gate), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_new_limit_holds_at_once_for_more_and_as_slots_come_back_for_less() {
    let (gate, _owner) = gate(1, 10);
    let first = gate.admit(ask(1), Outlook::default()).await.unwrap();
    let others: Vec<_> = (0..4).map(|_| asks(&gate, ask(1))).collect();
    settle().await;
    gate.set(Limit::Fixed(3), 10);
    settle().await;
    assert_eq!(numbers(&gate), (3, 2));
    gate.set(Limit::Fixed(1), 10);
    settle().await;
    drop(first);
    settle().await;
    assert_eq!(numbers(&gate), (2, 2), "nobody starts while there are too many");
    for other in others {
        drop(other.await.unwrap().unwrap());
        settle().await;
        assert!(gate.state().in_flight <= 2);
    }
    assert_eq!(numbers(&gate), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_adaptive_limit_finds_what_the_application_does_at_once() {
    let limit = Limit::Adaptive(Adaptive::new(2, 1, 100));
    let (gate, owner) = Gate::new(limit, 1000, Instant::now());
    let _owner = tokio::spawn(owner.run());
    // An application that does 4 at once, 20 ms each, and lets the others wait.
    let application = Arc::new(tokio::sync::Semaphore::new(4));
    let clients: Vec<_> = (0..40)
        .map(|_| {
            let (gate, application) = (gate.clone(), Arc::clone(&application));
            tokio::spawn(async move {
                for _ in 0..200 {
                    let permit = gate.admit(ask(1), Outlook::default()).await.unwrap();
                    let began = Instant::now();
                    let _place = application.acquire().await.unwrap();
                    sleep(20 * MS).await;
                    permit.answered(began.elapsed(), Some(20 * MS), None);
                }
            })
        })
        .collect();
    sleep(Duration::from_secs(20)).await;
    let limit = gate.state().limit;
    assert!((8..=18).contains(&limit), "{limit}");
    for client in clients {
        client.await.unwrap();
    }
    settle().await;
    assert_eq!(numbers(&gate), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn the_owner_ends_with_the_last_gate_and_without_an_owner_nobody_is_held_up() {
    let (gate, owner) = gate(1, 10);
    let permit = gate.admit(ask(1), Outlook::default()).await.unwrap();
    drop(gate);
    settle().await;
    assert!(!owner.is_finished(), "a permit may still free a slot");
    drop(permit);
    owner.await.unwrap();

    let (gate, owner) = self::gate(1, 10);
    let _first = gate.admit(ask(1), Outlook::default()).await.unwrap();
    let waits = asks(&gate, ask(1));
    settle().await;
    owner.abort();
    assert!(waits.await.unwrap().is_ok());
    assert!(gate.admit(ask(1), Outlook::default()).await.is_ok());
}

/// Four threads, as workers are, and clients that give up: the limit holds, and in the end everything is given back.
#[test]
fn many_threads_never_hold_more_than_the_limit_and_give_everything_back() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
    runtime.block_on(async {
        let (gate, _owner) = gate(3, 1000);
        let inside = Arc::new(AtomicU32::new(0));
        let clients: Vec<_> = (0..64_u64)
            .map(|client| {
                let (gate, inside) = (gate.clone(), Arc::clone(&inside));
                tokio::spawn(async move {
                    for turn in 0..300_u64 {
                        let admit = gate.admit(ask(client % 5), Outlook::default());
                        // Some give up, at all kinds of moments.
                        let patience = match (client + turn) % 7 {
                            0 => Duration::from_micros(turn),
                            _ => Duration::from_secs(60),
                        };
                        let Ok(permit) = tokio::time::timeout(patience, admit).await else { continue };
                        let permit = permit.unwrap();
                        assert!(inside.fetch_add(1, SeqCst) < 3);
                        if turn % 3 == 0 {
                            yield_now().await;
                        }
                        inside.fetch_sub(1, SeqCst);
                        drop(permit);
                    }
                })
            })
            .collect();
        for client in clients {
            client.await.unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(5);
        while numbers(&gate) != (0, 0) {
            assert!(Instant::now() < deadline, "{:?}", gate.state());
            sleep(MS).await;
        }
    });
}
