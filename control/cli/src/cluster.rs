//! The Kubernetes API, as the commands ask it: raw paths, and answers that say why there is none.
//!
//! Through `kube` and not through `kubectl`: its errors are codes and not sentences, the server's clock comes with its answers, and one
//! connection carries all questions. The kubeconfig is read as kubectl reads it.

use std::time::{Duration, SystemTime};

use http::Request;
use http_body_util::BodyExt;
use k8s_openapi::jiff;
use kube::Client;
use kube::client::Body;
use penstock_control::source::kubernetes::client;
use serde_json::Value;

/// An API server that takes longer for a page of a list is away.
const PATIENCE: Duration = Duration::from_secs(15);
/// Objects in one answer.
const PAGE: usize = 500;

/// A cluster.
pub(crate) struct Cluster(Client);

/// What the API said.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum Answer {
    /// This.
    Found(Value),
    /// There is no such object, or no such kind.
    #[default]
    Absent,
    /// Whoever asks may not see it.
    Denied(String),
    /// It refused, or did not answer.
    Failed(String),
}

impl Answer {
    /// The items of a list; none where there is no list.
    pub(crate) fn items(&self) -> &[Value] {
        match self {
            Self::Found(list) => list["items"].as_array().map(Vec::as_slice).unwrap_or_default(),
            _ => &[],
        }
    }

    /// The object.
    pub(crate) fn found(&self) -> Option<&Value> {
        match self {
            Self::Found(value) => Some(value),
            _ => None,
        }
    }

    /// Why there is none.
    pub(crate) fn trouble(&self) -> String {
        match self {
            Self::Found(_) => "it was found".to_owned(),
            Self::Absent => "there is none".to_owned(),
            Self::Denied(why) | Self::Failed(why) => why.clone(),
        }
    }
}

/// A text in an object; empty where there is none.
pub(crate) fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// The name of an object.
pub(crate) fn name(object: &Value) -> &str {
    text(object, "/metadata/name")
}

/// The namespace of an object.
pub(crate) fn namespace(object: &Value) -> &str {
    text(object, "/metadata/namespace")
}

impl Cluster {
    /// The cluster that the kubeconfig names, or in which this runs.
    pub(crate) async fn open(context: Option<&str>) -> Result<Self, String> {
        client(context).await.map(Self).map_err(|error| format!("{error:#}"))
    }

    /// One object, or one page.
    pub(crate) async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, None).await.0
    }

    /// What the API makes of an object.
    pub(crate) async fn post(&self, path: &str, object: &Value) -> Answer {
        self.ask("POST", path, Some(object)).await.0
    }

    /// Changes what `change` names of an object (a merge patch), and nothing else of it.
    pub(crate) async fn merge(&self, path: &str, change: &Value) -> Answer {
        self.ask("PATCH", path, Some(change)).await.0
    }

    /// The version, and by how many seconds the server's clock is ahead of ours.
    pub(crate) async fn version(&self) -> (Answer, Option<f64>) {
        self.ask("GET", "/version", None).await
    }

    /// A whole list, page by page.
    pub(crate) async fn list(&self, path: &str) -> Answer {
        let mut all: Vec<Value> = Vec::new();
        let mut next = String::new();
        loop {
            let sign = if path.contains('?') { '&' } else { '?' };
            let token = if next.is_empty() { String::new() } else { format!("&continue={next}") };
            let mut page = match self.get(&format!("{path}{sign}limit={PAGE}{token}")).await {
                Answer::Found(page) => page,
                other => return other,
            };
            if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
                all.extend(items);
            }
            next = text(&page, "/metadata/continue").to_owned();
            if next.is_empty() {
                return Answer::Found(serde_json::json!({ "items": all }));
            }
        }
    }

    async fn ask(&self, method: &str, path: &str, object: Option<&Value>) -> (Answer, Option<f64>) {
        let body = object.map_or_else(Vec::new, |object| object.to_string().into_bytes());
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::ACCEPT, "application/json")
            .header(http::header::CONTENT_TYPE, kind)
            .body(Body::from(body));
        let request = match request {
            Ok(request) => request,
            Err(error) => return (Answer::Failed(format!("{path}: {error}")), None),
        };
        let response = match tokio::time::timeout(PATIENCE, self.0.send(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return (Answer::Failed(story(&error)), None),
            Err(_) => return (Answer::Failed(format!("no answer within {} s", PATIENCE.as_secs())), None),
        };
        let ahead = response.headers().get(http::header::DATE).and_then(|date| ahead(date.to_str().ok()?));
        let status = response.status();
        let body = match tokio::time::timeout(PATIENCE, response.into_body().collect()).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) => return (Answer::Failed(format!("the answer broke off: {error}")), ahead),
            Err(_) => return (Answer::Failed("the answer broke off".to_owned()), ahead),
        };
        let value: Value = serde_json::from_slice(&body).unwrap_or_default();
        let said = || match text(&value, "/message") {
            "" => status.to_string(),
            message => message.to_owned(),
        };
        let answer = match status.as_u16() {
            200..=299 => Answer::Found(value),
            404 => Answer::Absent,
            401 | 403 => Answer::Denied(said()),
            _ => Answer::Failed(said()),
        };
        (answer, ahead)
    }
}

/// An error and what lies beneath it.
fn story(error: &dyn std::error::Error) -> String {
    let mut told = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !told.contains(&more) {
            told = format!("{told}: {more}");
        }
        cause = error.source();
    }
    told
}

/// By how much a `date` header is ahead of our clock.
fn ahead(date: &str) -> Option<f64> {
    let theirs = jiff::fmt::rfc2822::parse(date).ok()?.timestamp().as_second();
    let ours = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs_f64();
    // The header has whole seconds, so half of one is the likeliest.
    Some(theirs as f64 + 0.5 - ours)
}
