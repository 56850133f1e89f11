//! Whose turn it is to be prepared.
//!
//! In: rows, each with its caller and what it costs, in pixels by its head. Out: a [`Turn`] each, which is one of the threads
//! until it is dropped. Among callers, whoever has had least is next (start-time fair queuing: who comes back after a rest begins
//! where the others are). Of one caller's rows the cheaper go first, but none waits for more than its own cost in cheaper ones
//! that came later. While others wait a caller has all threads but one, and what is heavy never has the last one, whoever
//! waits: a thread cannot be taken back, and a photograph should not wait for somebody's sixty million pixels.
//! Touches no clock; who leaves the line by dropping its future costs nobody anything.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// Rows that wait at once, over all callers.
pub const MAX_WAITING: usize = 4096;
/// A row of more pixels is heavy: above what photographs have, about a second's work.
const HEAVY: u64 = 24 << 20;

/// The threads, and who waits for them.
#[derive(Debug)]
pub struct Line(Mutex<State>);

#[derive(Debug)]
struct State {
    threads: usize,
    running: usize,
    heavy: usize,
    waiting: usize,
    /// How far service has come: what the caller had had that was served last.
    served: u64,
    callers: HashMap<u64, Caller>,
    next: u64,
}

#[derive(Debug, Default)]
struct Caller {
    running: usize,
    /// What it has had, in the same measure as `served`.
    had: u64,
    /// In the order of their turns.
    waiting: Vec<Waits>,
}

#[derive(Debug)]
struct Waits {
    number: u64,
    rank: u64,
    cost: u64,
    call: oneshot::Sender<Turn>,
}

/// A thread, as long as it is held.
#[derive(Debug)]
pub struct Turn {
    line: Option<Arc<Line>>,
    caller: u64,
    heavy: bool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(line) = self.line.take() {
            let mut state = line.state();
            state.ends(self.caller, self.heavy);
            state.dispatch(&line);
        }
    }
}

/// One that waits; dropping it leaves the line.
struct Place<'a> {
    line: &'a Line,
    caller: u64,
    number: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut state = self.line.state();
        if let Some(caller) = state.callers.get_mut(&self.caller)
            && let Some(at) = caller.waiting.iter().position(|waits| waits.number == self.number)
        {
            caller.waiting.remove(at);
            state.waiting -= 1;
        }
    }
}

impl Line {
    /// With so many threads.
    pub fn new(threads: usize) -> Self {
        Self(Mutex::new(State {
            threads: threads.max(1),
            running: 0,
            heavy: 0,
            waiting: 0,
            served: 0,
            callers: HashMap::new(),
            next: 0,
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many wait.
    pub fn waiting(&self) -> usize {
        self.state().waiting
    }

    /// A turn for something of that cost. `None`: the line is full, or all that is left of it is for others: a caller has at most
    /// as many places as are free.
    pub async fn turn(self: &Arc<Self>, caller: u64, cost: u64) -> Option<Turn> {
        let (call, called) = oneshot::channel();
        let place = {
            let mut state = self.state();
            let own = state.callers.get(&caller).map_or(0, |caller| caller.waiting.len());
            if own + state.waiting >= MAX_WAITING {
                return None;
            }
            let number = state.joins(caller, cost, call);
            state.dispatch(self);
            Place { line: self, caller, number }
        };
        let turn = called.await.ok();
        drop(place);
        turn
    }
}

impl State {
    fn joins(&mut self, caller: u64, cost: u64, call: oneshot::Sender<Turn>) -> u64 {
        self.next += 1;
        let (number, served) = (self.next, self.served);
        let caller = self.callers.entry(caller).or_default();
        if caller.waiting.is_empty() && caller.running == 0 {
            caller.had = caller.had.max(served);
        }
        let rank = caller.had.saturating_add(cost);
        let at = caller.waiting.partition_point(|other| other.rank <= rank);
        caller.waiting.insert(at, Waits { number, rank, cost, call });
        self.waiting += 1;
        number
    }

    fn ends(&mut self, caller: u64, heavy: bool) {
        self.running -= 1;
        self.heavy -= usize::from(heavy);
        if let Some(caller) = self.callers.get_mut(&caller) {
            caller.running -= 1;
        }
        let (served, rests) = (self.served, self.running == 0 && self.waiting == 0);
        // Who has had no more than the others begins as who has never been here.
        self.callers.retain(|_, caller| {
            let idle = caller.running == 0 && caller.waiting.is_empty();
            !idle || (!rests && caller.had > served)
        });
    }

    /// Who is next, if anybody may be.
    fn next(&self) -> Option<u64> {
        let most = (self.threads - 1).max(1);
        let waiting = || self.callers.iter().filter(|(_, caller)| !caller.waiting.is_empty());
        let many = waiting().nth(1).is_some();
        let may = |caller: &Caller| {
            let heavy = caller.waiting.first().is_some_and(|waits| waits.cost > HEAVY);
            let has_enough = many && caller.running >= most;
            let is_too_heavy = heavy && self.heavy >= most;
            !has_enough && !is_too_heavy
        };
        let next = waiting().filter(|(_, caller)| may(caller));
        next.min_by_key(|(name, caller)| (caller.had, **name)).map(|(name, _)| *name)
    }

    fn dispatch(&mut self, line: &Arc<Line>) {
        while self.running < self.threads
            && let Some(name) = self.next()
            && let Some(caller) = self.callers.get_mut(&name)
        {
            let Waits { cost, call, .. } = caller.waiting.remove(0);
            let heavy = cost > HEAVY;
            let turn = Turn { line: Some(Arc::clone(line)), caller: name, heavy };
            self.waiting -= 1;
            self.served = caller.had;
            caller.had = caller.had.saturating_add(cost);
            caller.running += 1;
            self.running += 1;
            self.heavy += usize::from(heavy);
            if let Err(mut turn) = call.send(turn) {
                // It has left just now; the line is locked, so the thread is given back here.
                turn.line = None;
                self.ends(name, heavy);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;
    use std::pin::Pin;

    type Waiting = Pin<Box<dyn Future<Output = Option<Turn>> + Send>>;

    fn asks(line: &Arc<Line>, caller: u64, cost: u64) -> Waiting {
        let line = Arc::clone(line);
        let mut waiting: Waiting = Box::pin(async move { line.turn(caller, cost).await });
        // It takes its place when it is first asked; a turn that it has at once is kept.
        match (&mut waiting).now_or_never() {
            Some(turn) => Box::pin(std::future::ready(turn)),
            None => waiting,
        }
    }

    fn has(waiting: &mut Waiting) -> Option<Turn> {
        waiting.now_or_never().map(|turn| turn.expect("there is room in the line"))
    }

    #[test]
    fn a_photograph_waits_for_nobodys_sixty_million_pixels() {
        for caller in [1, 2] {
            let line = Arc::new(Line::new(2));
            let mut heavy: Vec<_> = (0..12).map(|_| asks(&line, 1, 62 << 20)).collect();
            let running: Vec<_> = heavy.iter_mut().filter_map(has).collect();
            assert_eq!(running.len(), 1);
            assert!(has(&mut asks(&line, caller, 1 << 20)).is_some(), "of caller {caller}");
        }
    }

    #[test]
    fn who_has_had_least_is_next_and_nobody_has_all_threads_while_others_wait() {
        let line = Arc::new(Line::new(2));
        let mut many: Vec<_> = (0..6).map(|_| asks(&line, 1, 10)).collect();
        let first = has(&mut many[0]).unwrap();
        let second = has(&mut many[1]).unwrap();
        let mut other = [asks(&line, 2, 10), asks(&line, 2, 10)];
        drop(first);
        let others = has(&mut other[0]).expect("the other has had nothing");
        assert!(has(&mut many[2]).is_none());
        drop(others);
        // One thread is the first caller's already.
        assert!(has(&mut many[2]).is_none());
        let others = has(&mut other[1]).unwrap();
        drop((others, second));
        assert!(has(&mut many[2]).is_some() && has(&mut many[3]).is_some());
    }

    #[test]
    fn the_cheaper_first_but_nobody_waits_for_ever() {
        let line = Arc::new(Line::new(1));
        let running = has(&mut asks(&line, 1, 1)).unwrap();
        let mut dear = asks(&line, 1, 100);
        let mut cheap = asks(&line, 1, 30);
        drop(running);
        let mut turns = vec![has(&mut cheap).expect("the cheaper is first")];
        assert!(has(&mut dear).is_none());
        for served in 0.. {
            assert!(served < 5, "the dear one is never served");
            let mut next = asks(&line, 1, 30);
            turns.clear();
            match has(&mut next) {
                Some(turn) => turns.push(turn),
                None => break,
            }
        }
        assert!(has(&mut dear).is_some());
    }

    #[test]
    fn who_leaves_is_forgotten_and_a_caller_leaves_room_for_others() {
        let line = Arc::new(Line::new(1));
        let running = has(&mut asks(&line, 1, 1)).unwrap();
        let mut waiting: Vec<_> = (0..MAX_WAITING / 2).map(|_| asks(&line, 1, 1)).collect();
        assert!(asks(&line, 1, 1).now_or_never().is_some_and(|turn| turn.is_none()), "it has half");
        assert!(asks(&line, 2, 1).now_or_never().is_none(), "another has a place");
        waiting.truncate(1);
        assert_eq!(line.waiting(), 1);
        drop(running);
        assert!(has(&mut waiting[0]).is_some());
        drop(waiting);
        let state = line.state();
        assert!((state.running, state.waiting, state.heavy) == (0, 0, 0) && state.callers.is_empty());
    }
}
