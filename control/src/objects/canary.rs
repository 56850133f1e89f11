//! `Canary`: how the requests of a Service go over from one version to another, and what must hold meanwhile.
//!
//! What the author writes is [`Spec`]. What control has made of it is in the status; of that, [`Course`] alone decides where requests go, and
//! is all that configuration is compiled from, so that numbers that change each second compile nothing anew.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};
use serde_json::json;

/// The object.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "as in every Kubernetes object")]
pub struct Canary {
    pub api_version: String,
    pub kind: String,
    pub metadata: ObjectMeta,
    pub spec: Spec,
    #[serde(default, skip_serializing_if = "Status::is_nothing")]
    pub status: Status,
}

/// What is asked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    /// The Service that clients ask, of the Canary's namespace. What its routes send to `stable` or `candidate`, or to itself where there
    /// are no routes, is divided between the two.
    pub service: String,
    /// The Service of the version that serves now.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub stable: String,
    /// The Service of the version that is to.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub candidate: String,
    /// Instead of these two, the Deployment whose changes are the candidates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deployment: Option<String>,
    /// From the first to the last. The last need not be at 100: after it comes the promotion, which is.
    pub steps: Vec<Step>,
    /// How long all requests go to the candidate at least, and are judged, before it has succeeded: a Gateway API duration; `1m` unless said, `0s`
    /// where the last step is at 100 already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promotion: Option<String>,
    /// What must hold, in every step.
    #[serde(default)]
    pub analysis: Analysis,
    /// How copies of requests are compared, in steps that have a `shadow`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shadow: Option<Shadow>,
    /// Requests that fit one of these go to the candidate from the first step on, whatever the weight.
    #[serde(default, rename = "match", skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<Match>,
    /// One user stays on one version while weights move: `header:<name>` or `cookie:<name>`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sticky: Option<String>,
    /// As long as it is true nothing moves, but back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// A step that has not passed so long after its hold fails, a Gateway API duration; `10m` unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<String>,
    /// Any text. Another one begins again from the first step, as another Service does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
}

/// One step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// Of a hundred requests, how many go to the candidate.
    pub weight: u32,
    /// How long it lasts at least, counted from when every proxy has applied the weight; a Gateway API duration, `1m` unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<String>,
    /// Then it waits for `penstock canary promote`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pause: bool,
    /// Of a hundred requests, how many are copied to the candidate as well.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shadow: u32,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// What must hold. Percentages are from 0 to 100.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Analysis {
    /// Requests to the candidate that a step needs before it may pass; 50 unless said. A step with a weight of 0 needs copies instead, if it
    /// makes any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_requests: Option<u64>,
    /// Of a hundred requests to the candidate, how many must succeed; 99 unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<f64>,
    /// Bounds of the candidate's time to the response's headers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub latency: Vec<Latency>,
    /// How busy the candidate's endpoints may be on average by their load reports, from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<f64>,
    /// Queries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prometheus: Vec<Prometheus>,
    /// Who is asked.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub webhooks: Vec<Webhook>,
}

/// A bound of a percentile. At least one of `max` and `ofStable`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Latency {
    /// Above 0, below 100.
    pub percentile: f64,
    /// At most this, a Gateway API duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<String>,
    /// At most so many times the stable version's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub of_stable: Option<f64>,
}

/// A query that has one number for its result.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Prometheus {
    /// As it is called in messages.
    pub name: String,
    /// `http://prometheus.monitoring:9090`.
    pub server: String,
    /// PromQL.
    pub query: String,
    /// The result is at least, and at most, this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[allow(missing_docs, reason = "see above")]
    pub max: Option<f64>,
    /// How often it is asked, a Gateway API duration; `10s` unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    /// Failures in a row that are one; 3 unless said. No answer is a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failures: Option<u32>,
}

/// Who is asked whether to go on, by a POST of what is known as JSON; 2xx is yes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Webhook {
    /// As it is called in messages.
    pub name: String,
    /// `http://gate.team-a/check`.
    pub url: String,
    /// As for a query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<String>,
    /// As for a query.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failures: Option<u32>,
}

/// How answers are compared, and what must hold of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Shadow {
    /// Two numbers agree if |a - b| <= absolute + relative * |b|, b being stable's; 1e-3 and 1e-2 unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub absolute: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[allow(missing_docs, reason = "see above")]
    pub relative: Option<f64>,
    /// The tensors that are compared; all unless said.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outputs: Vec<String>,
    /// Of a hundred pairs of answers, how many must agree.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// Of a hundred pairs of answers, how many must have the greatest element of each row at the same place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_top: Option<f64>,
    /// Of a hundred copies, how many must be answered well; as `analysis.successRate` unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub success_rate: Option<f64>,
    /// The median of the candidate's time to the response's headers, at most so many times stable's on the same requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency_ratio: Option<f64>,
    /// Bytes of the candidate's answers, at most so many times, and at least one so-many-th of, stable's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_ratio: Option<f64>,
    /// Pairs that a step with a shadow needs before it may pass; 50 unless said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_compared: Option<u64>,
}

/// Headers that must all be there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Match {
    /// Each.
    pub headers: Vec<Header>,
}

/// A header: `value` is the whole of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the fields say it")]
pub struct Header {
    pub name: String,
    pub value: String,
}

/// What the configuration is made of, of what the status says. The rest of it is control's diary (`canary::diary`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Absent: nothing has begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub course: Option<Course>,
}

impl Canary {
    /// This version of what is asked, with what is said and known of the object now.
    pub fn as_of(&self, now: &Self) -> Self {
        Self { spec: self.spec.clone(), ..now.clone() }
    }
}

impl Status {
    fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Where requests go. It names the versions itself: a run that has not begun yet leaves them where the one before has sent them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Course {
    /// Of which run this is told ([`Spec::run_id`]).
    pub run: String,
    /// The Service of the version that serves, of the Canary's namespace, or the template of the Deployment.
    #[serde(default)]
    pub stable: String,
    /// That of the other. Of a Deployment they are one as long as it has no other.
    #[serde(default)]
    pub candidate: String,
    /// Of a hundred requests, how many go to the candidate.
    pub weight: u32,
    /// Of a hundred requests, how many are copied to it.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub shadow: u32,
    /// Whether requests that fit go to it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub matching: bool,
    /// Of two templates of a Deployment: above 0 Kubernetes may take the candidate's pods for ready and go on, and each of them gets what each of so many
    /// pods got before.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub open: u32,
}

impl Course {
    /// Of a Deployment, whether there is one template alone, and nothing to divide.
    pub fn is_whole(&self) -> bool {
        self.stable == self.candidate
    }

    /// Nothing goes to the candidate.
    pub fn stable_alone(run: String, spec: &Spec) -> Self {
        Self { run, stable: spec.stable.clone(), candidate: spec.candidate.clone(), ..Self::default() }
    }
}

impl Spec {
    /// A name for what this asks to be done: another Service or another `run` begins anew; other steps, bounds, a pause or a deadline don't.
    pub fn run_id(&self) -> String {
        let asked = json!([self.service, self.stable, self.candidate, self.run]);
        blake3::hash(asked.to_string().as_bytes()).to_hex().as_str()[..16].to_owned()
    }

    /// The same of a template of its Deployment, which is another run than any other template's.
    pub fn run_of(&self, template: &str) -> String {
        Self { candidate: template.to_owned(), ..self.clone() }.run_id()
    }
}
