use http::header::{CONTENT_ENCODING, CONTENT_TYPE};
use http::{HeaderMap, StatusCode};
use penstock_api::access::Model;

use super::*;

const FRONT: &str = "spiffe://cluster.local/ns/web/sa/front";
const BATCH: &str = "spiffe://cluster.local/ns/jobs/sa/batch";
const NOW: Duration = Duration::from_secs(100);

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn limit(name: &str) -> v1::RateLimit {
    v1::RateLimit { policy: "test/p".to_owned(), name: name.to_owned(), ..v1::RateLimit::default() }
}

fn rate(count: u64, period: Duration, burst: u64) -> Option<v1::Rate> {
    Some(v1::Rate { count, period_ms: period.as_millis() as u64, burst })
}

fn rates(limits: Vec<v1::RateLimit>, before: &Rates) -> Rates {
    Rates::compile(&v1::Access { limits, ..v1::Access::default() }, before).unwrap()
}

struct Ask<'a> {
    rates: &'a Rates,
    hasher: RandomState,
    now: Duration,
}

impl<'a> Ask<'a> {
    fn of(rates: &'a Rates) -> Self {
        Self { rates, hasher: RandomState::with_seeds(1, 2, 3, 4), now: NOW }
    }

    /// A request to OpenAI's API for a model.
    fn of_model(&self, client: &str, model: Model<'_>) -> Result<Held, Failure> {
        let (client, headers): (SpiffeId, _) = (client.parse().unwrap(), HeaderMap::new());
        let http = Http { method: "POST", path: "/v1/completions", model, headers: &headers };
        let facts = Facts { client: Some(&client), port: 8000, http: Some(http) };
        self.rates.take(&facts, true, &self.hasher, self.now)
    }

    fn once(&self, client: &str) -> Result<Held, Failure> {
        self.of_model(client, Model::None)
    }
}

fn after(result: Result<Held, Failure>) -> Option<u64> {
    result.err().map(|failure| failure.retry_after)
}

#[test]
fn each_identity_has_its_own_and_the_story_names_it() {
    let one = v1::RateLimit { by_identity: true, requests: rate(6, seconds(60), 2), ..limit("each") };
    let rates = rates(vec![one], &Rates::default());
    let mut ask = Ask::of(&rates);
    assert!(ask.once(FRONT).is_ok() && ask.once(FRONT).is_ok() && ask.once(BATCH).is_ok());
    let failure = ask.once(FRONT).unwrap_err();
    assert_eq!((failure.reason, failure.retry_after, failure.unprocessed), (Reason::RateLimited, 10, true));
    assert_eq!(
        failure.story,
        "limit each of RateLimit test/p gives spiffe://cluster.local/ns/web/sa/front 6 requests/min and 2 at once, and that \
         is used up here; come again in 10 s"
    );
    assert!(ask.once(BATCH).is_ok(), "others do not feel it");
    ask.now += Duration::from_millis(9_001);
    assert_eq!(after(ask.once(FRONT)), Some(1), "whole seconds, at least one");
    ask.now += seconds(1);
    assert_eq!(after(ask.once(FRONT)), None);
}

#[test]
fn each_model_has_its_own() {
    let one = v1::RateLimit { by_model: true, requests: rate(1, seconds(1), 1), ..limit("each") };
    let rates = rates(vec![one], &Rates::default());
    let ask = Ask::of(&rates);
    for model in [Model::Named("a"), Model::Named("b"), Model::Unknown, Model::None] {
        assert!(ask.of_model(FRONT, model).is_ok(), "{model:?}");
        assert!(ask.of_model(BATCH, model).is_err(), "{model:?}");
    }
}

#[test]
fn who_is_refused_by_one_limit_takes_nothing_of_the_others() {
    let all = v1::RateLimit { requests: rate(1, seconds(1), 2), ..limit("all") };
    let most = v1::RateLimit { concurrent: 10, ..limit("most") };
    let each = v1::RateLimit { by_identity: true, requests: rate(1, seconds(1), 1), ..limit("each") };
    let rates = rates(vec![all, most, each], &Rates::default());
    let ask = Ask::of(&rates);
    assert!(ask.once(FRONT).is_ok());
    for _ in 0..20 {
        assert!(ask.once(FRONT).unwrap_err().story.starts_with("limit each "));
    }
    assert!(ask.once(BATCH).is_ok(), "what was refused is not counted");
    assert!(ask.once(BATCH).unwrap_err().story.starts_with("limit all "));
}

#[test]
fn a_place_is_free_when_its_request_ends_and_is_kept_over_a_push() {
    let limits = || vec![v1::RateLimit { concurrent: 1, ..limit("one") }];
    let before = rates(limits(), &Rates::default());
    let held = Ask::of(&before).once(FRONT).unwrap();
    assert_eq!(after(Ask::of(&before).once(BATCH)), Some(1));
    // The same again, with another beside it.
    let more = v1::RateLimit { concurrent: 5, ..limit("five") };
    let now = rates([limits(), vec![more]].concat(), &before);
    assert!(Ask::of(&now).once(BATCH).unwrap_err().story.contains("1 requests at a time"));
    drop(held);
    assert!(Ask::of(&now).once(BATCH).is_ok());
    // Another limit begins anew.
    let _held = Ask::of(&now).once(BATCH).unwrap();
    let edited = rates(vec![v1::RateLimit { concurrent: 2, ..limit("one") }], &now);
    assert!(Ask::of(&edited).once(FRONT).is_ok());
}

fn tokens() -> Rates {
    let one = v1::RateLimit { by_identity: true, tokens: rate(60, seconds(60), 100), ..limit("tokens") };
    rates(vec![one], &Rates::default())
}

fn headers(kind: &'static str) -> HeaderMap {
    [(CONTENT_TYPE, HeaderValue::from_static(kind))].into_iter().collect()
}

/// An exchange whose prompt is thought to be of 40 tokens, with that answer.
fn answered(rates: &Rates, status: StatusCode, headers: &HeaderMap, pieces: &[&str]) {
    let mut held = Ask::of(rates).once(FRONT).unwrap();
    held.asks(40.0);
    held.answered(status, headers);
    pieces.iter().for_each(|piece| held.passes(piece.as_bytes()));
    held.settle(NOW);
}

#[test]
fn what_an_answer_used_is_taken_when_it_has_ended() {
    let rates = tokens();
    let usage = r#""usage":{"prompt_tokens":50,"completion_tokens":250}}"#;
    answered(&rates, StatusCode::OK, &headers("application/json"), &[r#"{"id":"x","#, usage]);
    // A hundred were there and three hundred were used; one comes in each second.
    assert_eq!(after(Ask::of(&rates).once(FRONT)), Some(201));
    assert!(Ask::of(&rates).once(BATCH).is_ok(), "others do not feel it");
    let later = Ask { now: NOW + seconds(201), ..Ask::of(&rates) };
    assert_eq!(after(later.once(FRONT)), None);
}

#[test]
fn what_an_answer_does_not_say_is_estimated() {
    let (json, events) = (headers("application/json"), headers("text/event-stream; charset=utf-8"));
    let mut packed = headers("application/json");
    packed.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    let event = "data: {}\n\n";
    let usage = "data: {\"usage\":{\"total_tokens\":170}}\n\n";
    // What was used, and what is left of a hundred therefore; 0: nothing.
    let table: [(&str, StatusCode, &HeaderMap, Vec<&str>, u64); 7] = [
        ("a stream that says it", StatusCode::OK, &events, vec![event, usage], 170),
        ("a stream that does not", StatusCode::OK, &events, vec![event; 80], 40 + 80),
        ("a document that does not", StatusCode::OK, &json, vec!["{}"], 40),
        ("one that cannot be read", StatusCode::OK, &packed, vec!["0123456789"; 40], 40 + 100),
        ("a refusal of the application", StatusCode::BAD_REQUEST, &json, vec![usage], 0),
        ("one of its failures", StatusCode::BAD_GATEWAY, &json, vec!["{}"], 0),
        ("no answer was read", StatusCode::OK, &json, vec![], 40),
    ];
    for (what, status, headers, pieces, used) in table {
        let rates = tokens();
        answered(&rates, status, headers, &pieces);
        // One has to be there.
        let wait = (used + 1).saturating_sub(100);
        assert_eq!(after(Ask::of(&rates).once(FRONT)).unwrap_or(0), wait, "{what}");
        assert_eq!(Ask::of(&rates).once(FRONT).is_ok(), wait == 0, "{what}");
    }
    // Who leaves before there is an answer.
    let rates = tokens();
    for _ in 0..3 {
        let mut held = Ask::of(&rates).once(FRONT).unwrap();
        held.asks(40.0);
        held.settle(NOW);
    }
    assert_eq!(after(Ask::of(&rates).once(FRONT)), Some(21));
}

#[test]
fn requests_that_use_no_tokens_are_not_held_up_by_them() {
    let rates = tokens();
    answered(&rates, StatusCode::OK, &headers("text/event-stream"), &["data: {}\n\n"; 500]);
    assert!(Ask::of(&rates).once(FRONT).is_err());
    let (client, headers): (SpiffeId, _) = (FRONT.parse().unwrap(), HeaderMap::new());
    let http = Http { method: "GET", path: "/health", model: Model::None, headers: &headers };
    let facts = Facts { client: Some(&client), port: 8000, http: Some(http) };
    let ask = Ask::of(&rates);
    assert!(rates.take(&facts, false, &ask.hasher, NOW).is_ok());
}

#[test]
fn clients_cannot_make_more_buckets_than_there_are() {
    let one = v1::RateLimit { by_model: true, concurrent: 1, ..limit("each") };
    let rates = rates(vec![one], &Rates::default());
    let ask = Ask::of(&rates);
    let names: Vec<_> = (0..PLACES + 100).map(|number| format!("model-{number}")).collect();
    let mut held = Vec::new();
    let mut refused = 0;
    for name in &names {
        match ask.of_model(FRONT, Model::Named(name)) {
            Ok(place) => held.push(place),
            Err(failure) => {
                let words = "and all others beyond the 1024 that it tells apart";
                assert!(failure.story.contains(words), "{}", failure.story);
                refused += 1;
            }
        }
    }
    assert_eq!((held.len(), refused), (PLACES + 1, 99), "further ones share one");
}
