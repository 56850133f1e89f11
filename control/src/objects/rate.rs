//! `RateLimit` of `penstock.io/v1alpha1`: how much may be asked of which workloads.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

use super::access::{From, Selector, TargetRef, To, When};

/// A set of limits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RateLimit {
    /// `penstock.io/v1alpha1`.
    pub api_version: String,
    /// `RateLimit`.
    pub kind: String,
    /// Name and namespace; it is about workloads of its own namespace only.
    pub metadata: ObjectMeta,
    /// What it asks for.
    pub spec: RateLimitSpec,
}

/// What a set of limits asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RateLimitSpec {
    /// The Services whose workloads, on the ports that the Services lead to, it is about.
    pub target_refs: Option<Vec<TargetRef>>,
    /// The workloads that it is about. Neither `targetRefs` nor this: all of the namespace.
    pub selector: Option<Selector>,
    /// Each of them counts for itself.
    pub limits: Vec<Limit>,
}

/// One limit: what it counts, what it tells apart, and how much of it there is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// For stories and metrics.
    pub name: String,
    /// What it counts; everything unless said.
    pub r#match: Option<Matching>,
    /// What is counted for itself; all together unless said.
    pub by: Option<Vec<By>>,
    /// Requests in a time.
    pub requests: Option<Rate>,
    /// Requests at a time.
    pub concurrent: Option<u32>,
    /// Tokens in a time.
    pub tokens: Option<Rate>,
}

/// From one of these, to one of those, and when all of this is so, as in a rule of an access policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Matching {
    /// Who asks.
    pub from: Option<Vec<From>>,
    /// For what; each entry is a route.
    pub to: Option<Vec<To>>,
    /// Further conditions.
    pub when: Option<When>,
}

/// What a limit tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// Who asks.
    Identity,
    /// Which model is asked for.
    Model,
    /// Which entry of `match.to` it is.
    Route,
}

/// So many in each second, or in each minute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rate {
    /// In each second; either this or `perMinute`.
    pub per_second: Option<u32>,
    /// In each minute.
    pub per_minute: Option<u32>,
    /// At once, after a time without any; those of a second, or of a minute, unless said.
    pub burst: Option<u32>,
}
