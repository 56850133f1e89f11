//! Asks those outside: Prometheus, and webhooks. One task for each check of each Canary that moves, at its interval.
//!
//! What they answer is a yes or a no in words, and how often it was no without a yes in between. No answer is a no. A query that has no result yet is
//! neither: of a candidate that got no request Prometheus knows nothing, and a step waits for it. Who may be asked is `outside`'s business. Can go
//! wrong: whoever is asked is slow or away, which holds nobody else up.
//!
//! What is told of an answer stands in a status, for whoever may read that: some words of a webhook's, and of Prometheus' its error or its number.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use k8s_openapi::jiff::Timestamp;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::outside::Http;
use super::{Check, CheckKind, Checked, Diary, Plan};
use crate::objects::ObjectId;

/// Who has not answered by then says no.
const PATIENCE: Duration = Duration::from_secs(5);
/// Of a query's result that much is read: it is one number.
const MAX_RESULT: usize = 1 << 20;
/// Of a webhook's refusal that much is read, and so many characters of it are told.
const MAX_REFUSAL: usize = 4 << 10;
const TOLD: usize = 200;

/// All checks that are asked.
#[derive(Debug)]
pub(super) struct Checks {
    http: Http,
    asked: BTreeMap<(ObjectId, String), Asking>,
}

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

/// What was answered, in words.
#[derive(Debug, PartialEq)]
enum Said {
    Yes(String),
    No(String),
    /// There is nothing yet to say yes or no to.
    Nothing(String),
}

impl Checks {
    /// Asks nobody yet.
    pub(super) fn over(http: Http) -> Self {
        Self { http, asked: BTreeMap::new() }
    }

    /// Asks no longer about what is not kept.
    pub(super) fn only(&mut self, keep: impl Fn(&ObjectId) -> bool) {
        self.asked.retain(|(id, _), _| keep(id));
    }

    /// What those outside said of a Canary last; those that were not asked yet are, if it `moves`.
    pub(super) fn of(&mut self, id: &ObjectId, plan: &Plan, moves: bool, diary: &Diary) -> Vec<Checked> {
        let asked = |name: &str| plan.bounds.checks.iter().find(|check| check.name == name);
        // Another run is judged by answers of its own.
        self.asked.retain(|(of, name), asking| {
            of != id || (moves && asking.run == plan.run && asked(name) == Some(&asking.check))
        });
        if !moves {
            return Vec::new();
        }
        let told = story(id, plan, diary);
        for check in &plan.bounds.checks {
            let key = (id.clone(), check.name.clone());
            let asking = self
                .asked
                .entry(key)
                .or_insert_with(|| ask(self.http.clone(), check.clone(), plan.run.clone(), told.clone()));
            asking.told.send_if_modified(|known| {
                let modified = *known != told;
                known.clone_from(&told);
                modified
            });
        }
        let answer = |asking: &Asking| asking.answer.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.asked.iter().filter(|((of, _), _)| of == id).filter_map(|(_, asking)| answer(asking)).collect()
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

fn ask(http: Http, check: Check, run: String, told: Value) -> Asking {
    let answer = Arc::new(Mutex::new(None));
    let (told, story) = watch::channel(told);
    let (kept, asked) = (answer.clone(), check.clone());
    let task = tokio::spawn(async move {
        let mut refusals = 0;
        loop {
            let story = story.borrow().clone();
            let (answer, failures_in_a_row) = match said(&http, &asked, &story).await {
                Said::Yes(words) => {
                    refusals = 0;
                    (Ok(words), 0)
                }
                Said::No(words) => {
                    refusals += 1;
                    (Err(words), refusals)
                }
                // What was no before counts on once there is something to say no to.
                Said::Nothing(words) => (Err(words), 0),
            };
            let checked =
                Checked { name: asked.name.clone(), at: Timestamp::now(), answer, failures_in_a_row };
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(checked);
            tokio::time::sleep(asked.interval).await;
        }
    });
    Asking { check, run, answer, told, task }
}

/// Asks once.
async fn said(http: &Http, check: &Check, story: &Value) -> Said {
    match tokio::time::timeout(PATIENCE, once(http, check, story)).await {
        Ok(answer) => answer.unwrap_or_else(Said::No),
        Err(_) => Said::No(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

async fn once(http: &Http, check: &Check, story: &Value) -> Result<Said, String> {
    match &check.kind {
        CheckKind::Prometheus { server, query, .. } => {
            let query = utf8_percent_encode(query, NON_ALPHANUMERIC);
            let uri = format!("{}/api/v1/query?query={query}", server.trim_end_matches('/'));
            let response = exchange(http, Method::GET, &uri, Bytes::new()).await?;
            let status = response.status();
            let body = beginning(response, MAX_RESULT).await?;
            let Some(value) = result(&body).map_err(|why| format!("{why} (status {})", status.as_u16()))?
            else {
                return Ok(Said::Nothing("the query has no result yet".to_owned()));
            };
            check.kind.holds(value).map(Said::Yes)
        }
        CheckKind::Webhook { url } => {
            let response = exchange(http, Method::POST, url, story.to_string().into()).await?;
            let status = response.status();
            let told = format!("status {}", status.as_u16());
            if status.is_success() {
                return Ok(Said::Yes(told));
            }
            // The status has decided: a reason that breaks off is none.
            let reason = beginning(response, MAX_REFUSAL).await.unwrap_or_default();
            match excerpt(&String::from_utf8_lossy(&reason)).as_str() {
                "" => Err(told),
                reason => Err(format!("{told}: {reason}")),
            }
        }
    }
}

async fn exchange(http: &Http, method: Method, uri: &str, body: Bytes) -> Result<Response<Incoming>, String> {
    let request = Request::builder()
        .method(method)
        .uri(uri)
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .map_err(|error| error.to_string())?;
    http.request(request).await.map_err(|error| {
        // Who lies beneath knows best: the name was not found, the address is not let, the certificate is nobody's.
        let mut cause: &dyn std::error::Error = &error;
        while let Some(beneath) = cause.source() {
            cause = beneath;
        }
        excerpt(&cause.to_string())
    })
}

/// What a body begins with: all of it, or one byte more than `most`.
async fn beginning(response: Response<Incoming>, most: usize) -> Result<Vec<u8>, String> {
    let (mut body, mut read) = (response.into_body(), Vec::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| format!("the answer broke off: {error}"))?;
        let Ok(data) = frame.into_data() else { continue };
        read.extend_from_slice(&data[..data.len().min(most + 1 - read.len())]);
        if read.len() > most {
            break;
        }
    }
    Ok(read)
}

/// Some words of somebody else's, on one line.
fn excerpt(text: &str) -> String {
    let words = text.split(|sign: char| sign.is_whitespace() || sign.is_control());
    let line = words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ");
    line.chars().take(TOLD).collect()
}

/// The number that a query has for its result (Prometheus' HTTP API, `/api/v1/query`); `None`: there is none yet, as where 0 is divided by 0.
fn result(body: &[u8]) -> Result<Option<f64>, String> {
    if body.len() > MAX_RESULT {
        return Err(
            "the answer is larger than 1 MiB; aggregate the result to one number, as by sum(…)".to_owned()
        );
    }
    let answer: Value = serde_json::from_slice(body).map_err(|_| "the answer is no JSON".to_owned())?;
    if answer["status"] != "success" {
        return Err(excerpt(answer["error"].as_str().unwrap_or("the query failed")));
    }
    let data = &answer["data"];
    let sample = match (data["resultType"].as_str(), data["result"].as_array().map(Vec::as_slice)) {
        (Some("scalar"), _) => &data["result"],
        (Some("vector"), Some([one])) => &one["value"],
        (Some("vector"), Some([])) => return Ok(None),
        (Some("vector"), Some(many)) => {
            return Err(format!("the query has {} results; aggregate them to one, as by sum(…)", many.len()));
        }
        (Some("matrix"), _) => {
            return Err(
                "the query's result is a range; ask for one moment, without [5m] at its end".to_owned()
            );
        }
        _ => return Err("the query's result is not a number".to_owned()),
    };
    let value: Option<f64> = sample[1].as_str().and_then(|text| text.parse().ok());
    let value = value.ok_or_else(|| "the query's result is not a number".to_owned())?;
    Ok(Some(value).filter(|value| !value.is_nan()))
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::net::SocketAddr;

    use rustls::crypto::aws_lc_rs;
    use rustls::{ClientConfig, RootCertStore, ServerConfig};
    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    use super::*;
    use crate::canary::Outside;

    /// What a server was asked, and by whom nobody waits any more.
    #[derive(Clone, Default)]
    struct Server {
        address: Option<SocketAddr>,
        asked: Arc<Mutex<Vec<String>>>,
    }

    impl Server {
        /// Answers with one after the other, then with the last. An empty one is no answer: the connection stays as it is.
        async fn of(answers: &[String]) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let server = Self { address: Some(listener.local_addr().unwrap()), ..Self::default() };
            let answers = Arc::new(Mutex::new(VecDeque::from(answers.to_vec())));
            let asked = server.asked.clone();
            tokio::spawn(async move {
                while let Ok((client, _)) = listener.accept().await {
                    tokio::spawn(Self::serve(client, answers.clone(), asked.clone()));
                }
            });
            server
        }

        async fn serve<S: AsyncRead + AsyncWrite + Unpin>(
            mut client: S,
            answers: Arc<Mutex<VecDeque<String>>>,
            asked: Arc<Mutex<Vec<String>>>,
        ) {
            let (mut read, mut chunk) = (String::new(), [0; 4096]);
            while let Ok(n @ 1..) = client.read(&mut chunk).await {
                read.push_str(std::str::from_utf8(&chunk[..n]).unwrap());
                let Some((head, body)) = read.split_once("\r\n\r\n") else { continue };
                let length =
                    head.split_once("content-length: ").map_or("0", |(_, rest)| rest.lines().next().unwrap());
                if body.len() < length.parse().unwrap() {
                    continue;
                }
                asked.lock().unwrap().push(std::mem::take(&mut read));
                let answer = {
                    let mut answers = answers.lock().unwrap();
                    if answers.len() > 1 { answers.pop_front().unwrap() } else { answers[0].clone() }
                };
                // Who asked may have heard enough.
                let _ = client.write_all(answer.as_bytes()).await;
            }
        }

        fn url(&self) -> String {
            format!("http://{}", self.address.unwrap())
        }

        fn asked(&self) -> Vec<String> {
            self.asked.lock().unwrap().clone()
        }
    }

    fn http(status: &str, body: &str) -> String {
        format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    }

    fn sample(value: &str) -> String {
        let result = json!([{"metric": {}, "value": [1.5, value]}]);
        http(
            "200 OK",
            &json!({"status": "success", "data": {"resultType": "vector", "result": result}}).to_string(),
        )
    }

    fn nothing() -> String {
        http("200 OK", r#"{"status":"success","data":{"resultType":"vector","result":[]}}"#)
    }

    fn client() -> Http {
        Outside::new(Vec::new(), &[], None).client().unwrap()
    }

    fn check(kind: CheckKind) -> Check {
        Check { name: "gate".to_owned(), kind, interval: Duration::from_millis(5), failures: 2 }
    }

    fn query(server: &str) -> Check {
        let query = "sum(rate(x{a=\"b\"}[1m]))".to_owned();
        check(CheckKind::Prometheus { server: server.to_owned(), query, min: None, max: Some(5.0) })
    }

    fn webhook(url: &str) -> Check {
        check(CheckKind::Webhook { url: url.to_owned() })
    }

    async fn asked(check: Check) -> Said {
        said(&client(), &check, &json!({"name": "resnet"})).await
    }

    /// What is said of an answer to a query, and to a webhook.
    async fn queried(answer: &str) -> Said {
        asked(query(&Server::of(&[answer.to_owned()]).await.url())).await
    }

    async fn called(answer: &str) -> Said {
        asked(webhook(&Server::of(&[answer.to_owned()]).await.url())).await
    }

    fn no(words: &str) -> Said {
        Said::No(words.to_owned())
    }

    #[tokio::test]
    async fn a_query_is_answered_by_yes_and_no_and_nothing() {
        let server = Server::of(&[sample("2")]).await;
        assert_eq!(
            asked(query(&format!("{}/", server.url()))).await,
            Said::Yes("2, at most 5 is wanted".to_owned())
        );
        let request = &server.asked()[0];
        let line = "GET /api/v1/query?query=sum%28rate%28x%7Ba%3D%22b%22%7D%5B1m%5D%29%29 HTTP/1.1\r\n";
        assert!(request.starts_with(line), "{request}");
        assert_eq!(queried(&sample("7")).await, no("7, at most 5 is wanted"));
        assert_eq!(queried(&sample("+Inf")).await, no("inf, at most 5 is wanted"));
        for nothing in [nothing(), sample("NaN")] {
            assert_eq!(queried(&nothing).await, Said::Nothing("the query has no result yet".to_owned()));
        }
    }

    #[tokio::test]
    async fn what_is_no_answer_to_a_query_is_a_no_that_tells_no_more_than_its_error() {
        let error = json!({"status": "error", "error": "parse error: unexpected \"}\"\n at 7"}).to_string();
        assert_eq!(
            queried(&http("400 Bad Request", &error)).await,
            no("parse error: unexpected \"}\" at 7 (status 400)")
        );
        let secret = json!({"token": "hunter2", "status": "success", "data": {"resultType": "hunter2", "result": [1, "hunter2"]}});
        for body in ["hunter2".to_owned(), secret.to_string(), json!({"hunter2": 1}).to_string()] {
            let Said::No(words) = queried(&http("200 OK", &body)).await else { panic!("{body}") };
            assert!(words.ends_with("(status 200)") && !words.contains("hunter2"), "{words}");
        }
        let long = json!({"status": "error", "error": "x".repeat(10_000)}).to_string();
        let Said::No(words) = queried(&http("422 Unprocessable Entity", &long)).await else { panic!() };
        assert!(words.len() < 250, "{words}");
        assert_eq!(
            queried(&http("503 Service Unavailable", "")).await,
            no("the answer is no JSON (status 503)")
        );
    }

    #[tokio::test]
    async fn a_webhook_says_yes_by_its_status_and_no_in_some_words() {
        let server = Server::of(&[http("204 No Content", "")]).await;
        assert_eq!(
            asked(webhook(&format!("{}/ask?a=b", server.url()))).await,
            Said::Yes("status 204".to_owned())
        );
        let request = &server.asked()[0];
        assert!(
            request.starts_with("POST /ask?a=b HTTP/1.1\r\n") && request.ends_with(r#"{"name":"resnet"}"#),
            "{request}"
        );
        assert_eq!(
            called(&http("403 Forbidden", "  not on\r\n\u{1b}[31mFriday ")).await,
            no("status 403: not on [31mFriday")
        );
        assert_eq!(called(&http("500 Internal Server Error", "")).await, no("status 500"));
        let Said::No(words) = called(&http("500 Internal Server Error", &"é".repeat(100_000))).await else {
            panic!()
        };
        assert_eq!(words.chars().count(), "status 500: ".len() + TOLD);
    }

    #[tokio::test]
    async fn nobody_is_sent_elsewhere() {
        let elsewhere = Server::of(&[sample("1")]).await;
        for status in
            ["301 Moved Permanently", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"]
        {
            let answer =
                format!("HTTP/1.1 {status}\r\nlocation: {}\r\ncontent-length: 0\r\n\r\n", elsewhere.url());
            let told = &status[..3];
            assert_eq!(queried(&answer).await, no(&format!("the answer is no JSON (status {told})")));
            assert_eq!(called(&answer).await, no(&format!("status {told}")));
        }
        assert_eq!(elsewhere.asked(), Vec::<String>::new());
    }

    #[tokio::test]
    async fn whoever_answers_without_end_is_not_read_to_it() {
        // Each says that it has more than it will ever send.
        let endless = |status: &str, size| {
            format!("HTTP/1.1 {status}\r\ncontent-length: 9999999999\r\n\r\n{}", " ".repeat(size))
        };
        let Said::No(words) = queried(&endless("200 OK", MAX_RESULT + 1)).await else { panic!() };
        assert!(words.contains("larger than 1 MiB; aggregate"), "{words}");
        assert_eq!(called(&endless("200 OK", 0)).await, Said::Yes("status 200".to_owned()));
        assert_eq!(called(&endless("500 Internal Server Error", MAX_REFUSAL + 1)).await, no("status 500"));
    }

    #[tokio::test]
    async fn whoever_is_away_or_speaks_something_else_says_no() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let Said::No(words) = asked(webhook(&format!("http://{address}/"))).await else { panic!() };
        assert!(words.contains("refused"), "{words}");
        let Said::No(words) = called("220 mail.test ESMTP\r\n").await else { panic!() };
        assert!(!words.contains("mail.test"), "{words}");
    }

    #[tokio::test]
    async fn https_is_asked_of_whom_an_authority_vouches_for() {
        let own = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let key = rustls_pki_types::PrivateKeyDer::try_from(own.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(aws_lc_rs::default_provider());
        let tls = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![own.cert.der().clone()], key)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}/", listener.local_addr().unwrap().port());
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let accepting = acceptor.accept(client);
                tokio::spawn(async move {
                    // Who trusts nobody ends the handshake.
                    let Ok(client) = accepting.await else { return };
                    Server::serve(client, Arc::new(Mutex::new([http("200 OK", "")].into())), Arc::default())
                        .await;
                });
            }
        });
        let Said::No(words) = asked(webhook(&url)).await else { panic!("nobody vouches for it") };
        assert!(words.contains("certificate"), "{words}");
        let mut authorities = RootCertStore::empty();
        authorities.add(own.cert.der().clone()).unwrap();
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(authorities)
            .with_no_client_auth();
        let client = Outside::new(Vec::new(), &[], None).client_with(tls);
        assert_eq!(said(&client, &webhook(&url), &Value::Null).await, Said::Yes("status 200".to_owned()));
        let spoken = said(&client, &webhook(&url.replace("https:", "http:")), &Value::Null).await;
        assert!(matches!(spoken, Said::No(_)), "HTTP to a port of HTTPS");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_is_slow_says_no() {
        assert_eq!(queried("").await, no("no answer within 5 s"));
        assert_eq!(
            queried("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{").await,
            no("no answer within 5 s")
        );
    }

    #[tokio::test]
    async fn no_result_is_no_failure_in_a_row_and_no_yes() {
        let server =
            Server::of(&[nothing(), sample("7"), nothing(), sample("8"), sample("1"), sample("9")]).await;
        let asking = ask(client(), query(&server.url()), "run".to_owned(), Value::Null);
        let mut known: Vec<(bool, u32)> = Vec::new();
        let mut last = None;
        while known.len() < 6 {
            let checked = asking.answer.lock().unwrap().clone();
            if let Some(checked) = checked.filter(|checked| Some(checked.at) != last) {
                last = Some(checked.at);
                known.push((checked.answer.is_ok(), checked.failures_in_a_row));
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(known, [(false, 0), (false, 1), (false, 0), (false, 2), (true, 0), (false, 1)]);
    }

    #[test]
    fn a_result_is_one_number() {
        let of = |result_type: &str, result: Value| {
            let body = json!({"status": "success", "data": {"resultType": result_type, "result": result}});
            result_of(&body)
        };
        fn result_of(body: &Value) -> Result<Option<f64>, String> {
            super::result(body.to_string().as_bytes())
        }
        assert_eq!(of("scalar", json!([1.5, "0.25"])), Ok(Some(0.25)));
        assert_eq!(of("scalar", json!([1.5, "NaN"])), Ok(None));
        assert_eq!(of("vector", json!([{"metric": {}, "value": [1.5, "7"]}])), Ok(Some(7.0)));
        assert_eq!(of("vector", json!([])), Ok(None));
        let two = json!([{"value": [1, "1"]}, {"value": [1, "2"]}]);
        assert!(of("vector", two).unwrap_err().contains("2 results; aggregate"));
        assert!(of("matrix", json!([])).unwrap_err().contains("range"));
        assert!(of("string", json!([1.5, "7"])).unwrap_err().contains("not a number"));
        let failed = json!({"status": "error", "error": "parse error"});
        assert_eq!(result_of(&failed), Err("parse error".to_owned()));
        assert!(super::result(b"<html>").is_err());
    }
}
