//! When a root is replaced by another without anyone losing trust: a pure decision.
//!
//! In: the phase, what proxies have acknowledged, the time. Out: the step to take now, or what is waited for.
//!
//! 1. *Announced*: both anchors are pushed, the old intermediate signs. A peer that shows a certificate of the new
//!    root before everyone knows that root would be refused, so nothing is signed with it yet.
//! 2. *Switched*, once every connected proxy has acknowledged both anchors: the new intermediate signs.
//!    Control itself still shows a certificate of the old root, for proxies that come back after a while.
//! 3. Back to *steady*, once the last certificate of the old root has expired: its anchor is dropped.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// At least so long both anchors are announced before anyone counts acknowledgements: proxies that lost their
/// stream for a moment, or because control was restarted, are back by then. (Short-lived certificates, as in
/// tests, shorten it.)
const SETTLE: Duration = Duration::from_secs(30);

/// Where a rotation stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all = "kebab-case")]
pub enum Phase {
    /// One root.
    Steady,
    /// Two anchors; the old root's intermediate signs.
    Announced,
    /// Two anchors; the new root's intermediate signs.
    Switched {
        /// When the last certificate of the old root expires, seconds since the epoch.
        old_leaves_until: i64,
    },
    /// The new root's files are taking the old ones' place.
    Promoting,
}

/// What a decision rests on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// For how long this control process has pushed the anchors of the phase.
    pub announced_for: Duration,
    /// Proxies with an open configuration stream.
    pub connected: usize,
    /// Of these, how many acknowledged the anchors that are in force.
    pub acknowledged: usize,
    /// The longest that a certificate signed now lives.
    pub leaf_lifetime: Duration,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do.
    Stay,
    /// Sign with the new intermediate from now on.
    Switch {
        /// When the last certificate of the old root expires.
        old_leaves_until: i64,
    },
    /// Drop the old root.
    Drop,
}

/// The next step at `now`, seconds since the epoch.
pub fn next(phase: Phase, facts: Facts, now: i64) -> Step {
    match phase {
        Phase::Steady => Step::Stay,
        Phase::Announced => {
            let settled = facts.announced_for >= SETTLE.min(facts.leaf_lifetime / 4);
            if settled && facts.acknowledged >= facts.connected {
                Step::Switch { old_leaves_until: now.saturating_add(seconds(facts.leaf_lifetime)) }
            } else {
                Step::Stay
            }
        }
        Phase::Switched { old_leaves_until } if now > old_leaves_until => Step::Drop,
        Phase::Switched { .. } => Step::Stay,
        Phase::Promoting => Step::Drop,
    }
}

/// Whole seconds, rounded up.
fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs())
        .unwrap_or(i64::MAX)
        .saturating_add(i64::from(duration.subsec_nanos() > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEAF: Duration = Duration::from_secs(3_600);

    fn facts(announced_s: u64, connected: usize, acknowledged: usize) -> Facts {
        Facts {
            announced_for: Duration::from_secs(announced_s),
            connected,
            acknowledged,
            leaf_lifetime: LEAF,
        }
    }

    #[test]
    fn a_rotation_goes_on_when_everyone_who_is_there_knows_both_anchors() {
        let table = [
            (Phase::Steady, facts(100, 3, 3), Step::Stay),
            (Phase::Announced, facts(100, 3, 2), Step::Stay),
            (Phase::Announced, facts(10, 3, 3), Step::Stay),
            (Phase::Announced, facts(10, 0, 0), Step::Stay),
            (Phase::Announced, facts(31, 3, 3), Step::Switch { old_leaves_until: 4_600 }),
            (Phase::Announced, facts(31, 0, 0), Step::Switch { old_leaves_until: 4_600 }),
            (Phase::Switched { old_leaves_until: 1_000 }, facts(31, 3, 3), Step::Stay),
            (Phase::Switched { old_leaves_until: 999 }, facts(31, 3, 0), Step::Drop),
            (Phase::Promoting, facts(0, 0, 0), Step::Drop),
        ];
        for (phase, facts, expected) in table {
            assert_eq!(next(phase, facts, 1_000), expected, "{phase:?} {facts:?}");
        }
    }

    #[test]
    fn certificates_of_seconds_settle_in_seconds() {
        let facts = Facts { leaf_lifetime: Duration::from_secs(8), ..facts(2, 1, 1) };
        assert_eq!(next(Phase::Announced, facts, 0), Step::Switch { old_leaves_until: 8 });
    }
}
