//! Asks those outside: Prometheus, and webhooks. One task for each check of each Canary that moves, at its interval.
//!
//! What they answer is a yes or a no in words, and how often it was no without a yes in between. No answer is a no. Can go wrong: whoever is
//! asked is slow or away, which holds nobody else up.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::jiff::Timestamp;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{Check, CheckKind, Checked, Diary, Plan};
use crate::objects::ObjectId;

/// Who has not answered by then says no.
const PATIENCE: Duration = Duration::from_secs(5);
/// An answer that is read.
const MAX_ANSWER: usize = 1 << 20;

type Http = Client<HttpConnector, Full<Bytes>>;

/// All checks that are asked.
#[derive(Debug, Default)]
pub(super) struct Checks(BTreeMap<(ObjectId, String), Asking>);

/// One that is asked until this is dropped.
#[derive(Debug)]
struct Asking {
    check: Check,
    run: String,
    answer: Arc<Mutex<Option<Checked>>>,
    /// What webhooks are told.
    told: watch::Sender<Value>,
    task: JoinHandle<()>,
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Checks {
    /// Asks no longer about what is not kept.
    pub(super) fn only(&mut self, keep: impl Fn(&ObjectId) -> bool) {
        self.0.retain(|(id, _), _| keep(id));
    }

    /// What those outside said of a Canary last; those that were not asked yet are, if it `moves`.
    pub(super) fn of(&mut self, id: &ObjectId, plan: &Plan, moves: bool, diary: &Diary) -> Vec<Checked> {
        let asked = |name: &str| plan.bounds.checks.iter().find(|check| check.name == name);
        // Another run is judged by answers of its own.
        self.0.retain(|(of, name), asking| {
            of != id || (moves && asking.run == plan.run && asked(name) == Some(&asking.check))
        });
        if !moves {
            return Vec::new();
        }
        let told = story(id, plan, diary);
        for check in &plan.bounds.checks {
            let key = (id.clone(), check.name.clone());
            let asking =
                self.0.entry(key).or_insert_with(|| ask(check.clone(), plan.run.clone(), told.clone()));
            asking.told.send_if_modified(|known| {
                let modified = *known != told;
                known.clone_from(&told);
                modified
            });
        }
        let answer = |asking: &Asking| asking.answer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.0.iter().filter(|((of, _), _)| of == id).filter_map(|(_, asking)| answer(asking)).collect()
    }
}

/// What a webhook is told.
fn story(id: &ObjectId, plan: &Plan, diary: &Diary) -> Value {
    json!({
        "namespace": id.namespace, "name": id.name,
        "service": plan.service, "stable": plan.stable, "candidate": plan.candidate,
        "run": plan.run, "phase": diary.phase, "step": diary.step, "steps": diary.steps,
        "weight": diary.course.as_ref().map_or(0, |course| course.weight),
    })
}

fn ask(check: Check, run: String, told: Value) -> Asking {
    let answer = Arc::new(Mutex::new(None));
    let (told, story) = watch::channel(told);
    let (kept, asked) = (answer.clone(), check.clone());
    let task = tokio::spawn(async move {
        let http: Http = Client::builder(TokioExecutor::new()).build_http();
        let mut failures_in_a_row = 0;
        loop {
            let story = story.borrow().clone();
            let one = tokio::time::timeout(PATIENCE, once(&http, &asked, &story));
            let answer =
                one.await.unwrap_or_else(|_| Err(format!("no answer within {} s", PATIENCE.as_secs())));
            failures_in_a_row = if answer.is_ok() { 0 } else { failures_in_a_row + 1 };
            let checked =
                Checked { name: asked.name.clone(), at: Timestamp::now(), answer, failures_in_a_row };
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(checked);
            tokio::time::sleep(asked.interval).await;
        }
    });
    Asking { check, run, answer, told, task }
}

/// Yes or no, in words.
async fn once(http: &Http, check: &Check, story: &Value) -> Result<String, String> {
    match &check.kind {
        CheckKind::Prometheus { server, query, .. } => {
            let query = utf8_percent_encode(query, NON_ALPHANUMERIC);
            let uri = format!("{}/api/v1/query?query={query}", server.trim_end_matches('/'));
            let (status, body) = exchange(http, "GET", &uri, Bytes::new()).await?;
            let value = result(&body).map_err(|why| format!("{why} (status {status})"))?;
            check.kind.holds(value)
        }
        CheckKind::Webhook { url } => {
            let (status, body) = exchange(http, "POST", url, story.to_string().into()).await?;
            let said: String = String::from_utf8_lossy(&body).trim().chars().take(200).collect();
            match status {
                200..=299 => Ok(format!("status {status}")),
                _ if said.is_empty() => Err(format!("status {status}")),
                _ => Err(format!("status {status}: {said}")),
            }
        }
    }
}

async fn exchange(http: &Http, method: &str, uri: &str, body: Bytes) -> Result<(u16, Bytes), String> {
    let request = Request::builder()
        .method(method)
        .uri(uri)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|error| error.to_string())?;
    let response = http.request(request).await.map_err(|error| {
        let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
        format!("{error}{}", cause.unwrap_or_default())
    })?;
    let status = response.status().as_u16();
    let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
    Ok((status, body.map_err(|error| format!("the answer broke off: {error}"))?.to_bytes()))
}

/// The number that a query has for its result (Prometheus' HTTP API, `/api/v1/query`).
fn result(body: &[u8]) -> Result<f64, String> {
    let answer: Value = serde_json::from_slice(body).map_err(|_| "the answer is no JSON".to_owned())?;
    if answer["status"] != "success" {
        return Err(answer["error"].as_str().unwrap_or("the query failed").to_owned());
    }
    let data = &answer["data"];
    let sample = match (data["resultType"].as_str(), data["result"].as_array().map(Vec::as_slice)) {
        (Some("scalar"), _) => &data["result"],
        (Some("vector"), Some([one])) => &one["value"],
        (Some("vector"), Some([])) => return Err("the query has no result".to_owned()),
        (Some("vector"), Some(many)) => {
            return Err(format!("the query has {} results; aggregate them to one, as by sum(…)", many.len()));
        }
        (other, _) => {
            return Err(format!("the query's result is a {}, not a number", other.unwrap_or("nothing")));
        }
    };
    let text = sample[1].as_str().unwrap_or_default();
    text.parse().map_err(|_| format!("the query's result is {text:?}, not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_one_number() {
        let of = |result_type: &str, result: Value| {
            let body = json!({"status": "success", "data": {"resultType": result_type, "result": result}});
            result_of(&body)
        };
        fn result_of(body: &Value) -> Result<f64, String> {
            super::result(body.to_string().as_bytes())
        }
        assert_eq!(of("scalar", json!([1.5, "0.25"])), Ok(0.25));
        assert_eq!(of("vector", json!([{"metric": {}, "value": [1.5, "7"]}])), Ok(7.0));
        assert!(of("vector", json!([])).unwrap_err().contains("no result"));
        let two = json!([{"value": [1, "1"]}, {"value": [1, "2"]}]);
        assert!(of("vector", two).unwrap_err().contains("2 results; aggregate"));
        assert!(of("matrix", json!([])).unwrap_err().contains("matrix"));
        let failed = json!({"status": "error", "error": "parse error"});
        assert_eq!(result_of(&failed), Err("parse error".to_owned()));
        assert!(super::result(b"<html>").is_err());
    }
}
