//! One look at a Canary: from its diary and the facts of the moment to its diary.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

use super::bounds::{Plan, Wrong};
use super::diary::Diary;
use crate::fleet::Seen;
use crate::objects::canary::Course;

/// What is true at the moment.
#[derive(Clone, Debug)]
pub struct Facts {
    /// When.
    pub now: Timestamp,
    /// The version of the object that the plan was read from.
    pub generation: Option<i64>,
    /// Why the newest version of the object is refused, if it is, so that the plan is that of an earlier one; empty otherwise.
    pub refused: Vec<Wrong>,
    /// Services of the plan that do not exist, `<namespace>/<name>`.
    pub missing: Vec<String>,
    /// Ready endpoints of the candidate.
    pub ready: usize,
    /// How far the course has come.
    pub reach: Reached,
    /// What clients' proxies saw of the plan's `service`, over the times that [`windows`] asks for: two seconds, ten, and since the step was
    /// applied everywhere.
    pub windows: [(Duration, Seen); 3],
    /// What those outside said.
    pub checks: Vec<Checked>,
    /// The newest command to go on, `<run>/<anything>`.
    pub promote: Option<String>,
    /// The newest command to go back, likewise.
    pub abort: Option<String>,
}

/// How far a course has come with the proxies of all replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// The course that the snapshot in force was compiled from. Counts about any other than the diary's say nothing.
    pub of: Option<Course>,
    /// Connected proxies that it concerns.
    pub concerned: usize,
    /// Of these, those that have applied it.
    pub applied: usize,
    /// Replicas of control that have not said how far theirs are.
    pub unheard: usize,
    /// One that refused it, and why.
    pub refused: Option<String>,
}

/// What somebody outside said last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The check's name.
    pub name: String,
    /// When it answered.
    pub at: Timestamp,
    /// Yes or no, in words: `0.97; at least 0.99 is wanted`.
    pub answer: Result<String, String>,
    /// How often it was no, one after the other, until now.
    pub failures_in_a_row: u32,
}

/// The windows to look through at `now`.
pub fn windows(diary: &Diary, now: Timestamp) -> [Duration; 3] {
    let _ = (diary, now);
    [Duration::ZERO; 3]
}

/// The diary as it should be. With the same facts, what it answers is what it answers again.
pub fn walk(plan: &Plan, diary: &Diary, facts: &Facts) -> Diary {
    let _ = (plan, facts);
    diary.clone()
}

/// The diary of an object of which no version makes sense: where requests go stays as it is.
pub fn refused(diary: &Diary, generation: Option<i64>, wrong: &[Wrong], now: Timestamp) -> Diary {
    let _ = (generation, wrong, now);
    diary.clone()
}
