//! What a Canary asks for, checked: durations are durations, shares are shares, and what was left open has its default. `read` makes it.

use std::time::Duration;

use super::template::Pair;
use crate::objects::canary::Spec;

/// A Canary that makes sense.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// Which run it is ([`run_id`](crate::objects::canary::Spec::run_id)).
    pub run: String,
    /// `<namespace>/<name>` of the Service that clients ask.
    pub service: String,
    /// The same of the version that serves now.
    pub stable: String,
    /// The same of the version that is to.
    pub candidate: String,
    /// At least one.
    pub steps: Vec<Step>,
    /// How long all requests go to the candidate before it has succeeded.
    pub promotion: Duration,
    /// Whether some requests go to the candidate because they match.
    pub matching: bool,
    /// Nothing moves but back.
    pub paused: bool,
    /// For each step.
    pub deadline: Duration,
    /// What must hold.
    pub bounds: Bounds,
    /// Of a Canary of a Deployment, which of its templates the two are. They are one while there is nothing to do.
    pub pair: Option<Pair>,
    /// What all of this was read from.
    pub spec: Spec,
}

impl Plan {
    /// Whether it is about a Deployment that has not changed.
    pub fn idles(&self) -> bool {
        self.pair.as_ref().is_some_and(|pair| pair.stable == pair.candidate)
    }
}

/// One step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// In percent.
    pub weight: u32,
    /// In percent.
    pub shadow: u32,
    /// At least, since every proxy has it.
    pub hold: Duration,
    /// Whether a person is waited for then.
    pub pause: bool,
}

/// What must hold in every step.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds {
    /// Requests that a step needs.
    pub min_requests: u64,
    /// From 0 to 1.
    pub success_rate: f64,
    /// Each.
    pub latency: Vec<Latency>,
    /// From 0 to 1.
    pub load: Option<f64>,
    /// Queries and webhooks.
    pub checks: Vec<Check>,
    /// Of copies.
    pub shadow: Shadow,
}

/// A bound of a percentile.
#[derive(Clone, Debug, PartialEq)]
pub struct Latency {
    /// Between 0 and 1.
    pub quantile: f64,
    /// At most this.
    pub max: Option<Duration>,
    /// At most so many times stable's.
    pub of_stable: Option<f64>,
}

/// Somebody outside who is asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Check {
    /// No two have the same.
    pub name: String,
    /// How.
    pub kind: CheckKind,
    /// Between two questions.
    pub interval: Duration,
    /// So many failures in a row are one.
    pub failures: u32,
}

/// How somebody is asked.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the fields are those of the object")]
pub enum CheckKind {
    /// By a query.
    Prometheus { server: String, query: String, min: Option<f64>, max: Option<f64> },
    /// By a POST.
    Webhook { url: String },
}

/// What must hold of copies. Shares are from 0 to 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Shadow {
    /// Whether answers are compared: the object has a `shadow`.
    pub compares: bool,
    /// Pairs that a step with copies needs, if answers are compared.
    pub min_compared: u64,
    /// Of pairs.
    pub agreement: Option<f64>,
    /// Of pairs with a greatest element.
    pub same_top: Option<f64>,
    /// Of copies.
    pub success_rate: f64,
    /// Of medians.
    pub latency_ratio: Option<f64>,
    /// Of bytes, and its inverse.
    pub size_ratio: Option<f64>,
}

/// Something that is wrong: a JSON pointer, and what and what to do.
pub type Wrong = (String, String);

impl CheckKind {
    /// Whether a query's result is within its bounds, in words either way. A webhook has no result: its status decides.
    pub fn holds(&self, value: f64) -> Result<String, String> {
        let Self::Prometheus { min, max, .. } = self else { return Ok(value.to_string()) };
        // What is not a number is within nothing.
        let holds =
            min.is_none_or(|min| value >= min) && max.is_none_or(|max| value <= max) && !value.is_nan();
        let bounds = [min.map(|min| format!("at least {min}")), max.map(|max| format!("at most {max}"))];
        let bounds: Vec<String> = bounds.into_iter().flatten().collect();
        let told = format!("{value}, {} is wanted", bounds.join(" and "));
        if holds { Ok(told) } else { Err(told) }
    }
}

/// A duration as people write it.
pub(super) fn words(duration: Duration) -> String {
    humantime::format_duration(duration).to_string().replace(' ', "")
}
