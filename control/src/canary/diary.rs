//! What control has made of a Canary so far: the whole of its `status`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::judge::round;
use crate::fleet::Total;
use crate::fleet::seen::{Backend, Shadow};
use crate::objects::canary::{Course, Spec};

/// Transitions that are kept: what a person scrolls through.
const HISTORY: usize = 20;

/// The status.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Diary {
    /// The version of the object that this is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The run that this is about ([`Spec::run_id`]).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub run: String,
    /// What the author has written last that made sense: it is gone by as long as a newer version is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub in_force: Option<Spec>,
    /// Where requests go. Absent: nothing has begun. Of another run: that of this one has not begun, and leaves them there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub course: Option<Course>,
    /// Where it is.
    pub phase: Phase,
    /// The step that it is at, from 0.
    pub step: usize,
    /// How many there are.
    pub steps: usize,
    /// When the run began: what was seen before is not about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<Moment>,
    /// When the step began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_since: Option<Moment>,
    /// Of a Deployment that goes on, pods of the old template that are left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left: Option<usize>,
    /// When every proxy had acknowledged its course; absent: not yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub applied_since: Option<Moment>,
    /// Since when no endpoint of the candidate is ready; before it has begun, of a Deployment, none of the stable version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unready_since: Option<Moment>,
    /// Since when one of a Deployment's two templates is the only one that is there, or is ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alone_since: Option<Moment>,
    /// Why it should go back, and would if there were anything to go back to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stays: Option<String>,
    /// From when the step's hold and then its deadline count: while a person is waited for they do not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_since: Option<Moment>,
    /// Of the connected proxies that it concerns, how many have acknowledged the course.
    pub applied: usize,
    /// See above.
    pub concerned: usize,
    /// A person has let the step go: it ends when analysis has passed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub promoted: bool,
    /// What it waits for, or why it went back, in one line. No numbers that change by themselves.
    pub message: String,
    /// What was seen of the candidate since the step was applied everywhere, or in the last seconds until then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub candidate: Option<Observed>,
    /// The same of the stable version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable: Option<Observed>,
    /// The same of copies; after the last step that makes any, what was seen in that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shadow: Option<ShadowObserved>,
    /// The commands that were handled last.
    #[serde(skip_serializing_if = "Answered::is_nothing")]
    pub answered: Answered,
    /// The last transitions, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<Entry>,
    /// `Accepted`, `Programmed` and `Succeeded`; those of others stay.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Value>,
}

/// Where a run is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Phase {
    /// Services or endpoints are missing.
    #[default]
    Waiting,
    /// At a step.
    Progressing,
    /// At a step, and a person has to let it go.
    Paused,
    /// All requests are to go to the candidate.
    Promoting,
    /// All requests go to the candidate.
    Succeeded,
    /// No request is to go to the candidate.
    RollingBack,
    /// No request goes to the candidate.
    RolledBack,
    /// The object makes no sense, and nothing of it has begun.
    Invalid,
}

/// The commands that were handled last, word for word.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "each is the command of the name")]
pub struct Answered {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub promote: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub abort: Option<String>,
}

/// A transition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// When.
    pub at: Moment,
    /// To where.
    pub phase: Phase,
    /// At which step.
    pub step: usize,
    /// With which weight.
    pub weight: u32,
    /// Why.
    pub message: String,
}

/// What was seen of a version, rounded.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the fields say it")]
pub struct Observed {
    pub requests: u64,
    /// From 0 to 100.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p50_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99_ms: Option<f64>,
    /// From 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<f64>,
}

/// What was seen of copies, rounded. Percentages are from 0 to 100.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[allow(missing_docs, reason = "the fields say it")]
pub struct ShadowObserved {
    pub sent: u64,
    pub dropped: u64,
    pub compared: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub same_top: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest_difference: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_ratio: Option<f64>,
}

impl Answered {
    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// A time as statuses have it: RFC 3339 in milliseconds, so that what was written and read again is equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(Timestamp);

impl Moment {
    /// The whole millisecond before `at`.
    pub fn of(at: Timestamp) -> Self {
        Self(Timestamp::from_millisecond(at.as_millisecond()).unwrap_or(at))
    }

    /// The time.
    pub fn time(self) -> Timestamp {
        self.0
    }

    /// How long it was ago; nothing if it is yet to come, because another replica's clock is ahead.
    pub fn until(self, now: Timestamp) -> Duration {
        now.duration_since(self.0).try_into().unwrap_or_default()
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.strftime("%Y-%m-%dT%H:%M:%S.%3fZ"))
    }
}

impl Serialize for Moment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Moment {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Timestamp::from_str(&text).map(Self::of).map_err(serde::de::Error::custom)
    }
}

impl Diary {
    /// Whether `other` says the same but for numbers that change by themselves: such a diary may wait before it is written.
    pub fn same_but_for_numbers(&self, other: &Self) -> bool {
        self.without_numbers() == other.without_numbers()
    }

    fn without_numbers(&self) -> Self {
        let conditions = self.conditions.iter().cloned().map(|mut one| {
            if let Some(entries) = one.as_object_mut() {
                entries.remove("message");
            }
            one
        });
        Self {
            applied: 0,
            concerned: 0,
            candidate: None,
            stable: None,
            shadow: None,
            conditions: conditions.collect(),
            ..self.clone()
        }
    }

    /// Writes a transition down.
    pub(super) fn note(&mut self, now: Timestamp) {
        let weight = self.course.as_ref().map_or(0, |course| course.weight);
        let Self { phase, step, .. } = *self;
        self.history.push(Entry { at: Moment::of(now), phase, step, weight, message: self.message.clone() });
        let old = self.history.len().saturating_sub(HISTORY);
        self.history.drain(..old);
    }
}

impl Phase {
    /// Whether a step is being judged.
    pub fn judged(self) -> bool {
        matches!(self, Self::Progressing | Self::Paused | Self::Promoting)
    }
}

impl Observed {
    pub(super) fn of(seen: &Backend) -> Self {
        let Total { requests, failures, latency, .. } = &seen.total;
        let ms = |quantile| Some(round(latency.quantile(quantile)?.as_secs_f64() * 1e3, 2));
        Self {
            requests: *requests,
            success_rate: share(requests.saturating_sub(*failures), *requests),
            p50_ms: ms(0.5),
            p99_ms: ms(0.99),
            load: seen.load().map(|load| round(load, 2)),
        }
    }
}

impl ShadowObserved {
    pub(super) fn of(seen: &Shadow) -> Self {
        let medians = seen.latency.quantile(0.5).zip(seen.client_latency.quantile(0.5));
        let ratio = |mine: f64, theirs: f64| Some(round(mine / theirs, 2)).filter(|ratio| ratio.is_finite());
        // Of a difference the places before its first digit matter as much as that.
        let digits =
            |number: f64| format!("{number:.2e}").parse().ok().filter(|number: &f64| number.is_finite());
        Self {
            sent: seen.sent,
            dropped: seen.dropped,
            compared: seen.compared,
            success_rate: share(seen.sent.saturating_sub(seen.failures), seen.sent),
            agreement: share(seen.agreed, seen.compared),
            same_top: share(seen.same_top, seen.ranked),
            largest_difference: Some(seen.largest_difference).filter(|_| seen.compared > 0).and_then(digits),
            latency_ratio: medians.and_then(|(mine, theirs)| ratio(mine.as_secs_f64(), theirs.as_secs_f64())),
            size_ratio: ratio(seen.bytes as f64, seen.client_bytes as f64),
        }
    }
}

/// In percent; `None` of none.
fn share(good: u64, of: u64) -> Option<f64> {
    (of > 0).then(|| round(100.0 * good as f64 / of as f64, 2))
}
