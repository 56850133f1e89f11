//! Whether what was seen of a candidate is good enough.

use super::bounds::Plan;
use super::diary::Diary;
use super::walk::Facts;

/// What analysis says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is surely worse than it may be: why, in words with numbers.
    Fails(String),
    /// All that must hold holds, and enough was seen.
    Passes,
    /// Neither.
    Undecided(Vec<Missing>),
}

/// Something that is missing before a step may pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What, in words that stay the same as long as it is missing.
    pub what: String,
    /// How far it is, in numbers; may be empty.
    pub so_far: String,
}

/// Judges the candidate by what a step asks for.
pub fn judge(plan: &Plan, diary: &Diary, facts: &Facts) -> Verdict {
    let _ = (plan, diary, facts);
    Verdict::Undecided(Vec::new())
}
