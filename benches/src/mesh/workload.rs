//! What is asked when. All of a run is decided before it begins, from a seed, so that every subject is asked the same at the
//! same moments.

use std::time::Duration;

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use super::case::{Bursts, Case, Load};

/// Rows of a request and how often they come, in per cent.
const ROWS: [(u32, u32); 3] = [(1, 70), (2, 20), (4, 10)];
/// Bytes of a row's text.
const ROW_TEXT: usize = 64;

/// System prompts, and the bytes of each; a token is about four bytes.
const SYSTEM_PROMPTS: usize = 4;
const SYSTEM_BYTES: usize = 2_000;
/// Bytes of the document that a conversation is about, in its first turn, and of each further question.
const DOCUMENT_BYTES: usize = 2_800;
const QUESTION_BYTES: usize = 200;
/// Bytes of an answer in the history. It is not what the server said, which cannot be known before the run.
const ANSWER_BYTES: usize = 128;
/// Turns of a conversation at most, each as likely as the others.
const TURNS: u32 = 6;
/// From one turn to the next.
const BETWEEN_TURNS: Duration = Duration::from_millis(800);
/// Answers are cut here; how long they become is up to the server.
const MAX_TOKENS: u32 = 256;

/// A request.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Arrival {
    /// When it is due, from the beginning of the run.
    pub(crate) at: Duration,
    /// Which client sends it, to be taken modulo their number. A conversation stays with its client.
    pub(crate) client: usize,
    /// The body.
    pub(crate) body: Bytes,
}

/// All requests of a run that lasts so long, in their order; `factor` times as many as the case says.
pub(crate) fn arrivals(case: &Case, factor: f64, lasts: Duration, seed: u64) -> Vec<Arrival> {
    let mut rng = SmallRng::seed_from_u64(seed);
    match case.load {
        Load::Tensors { share, bursts } => {
            let mean_rows = ROWS.iter().map(|(rows, percent)| f64::from(rows * percent) / 100.0).sum::<f64>();
            let rate = factor * share * case.rows_per_second() / mean_rows;
            let moments = moments(&mut rng, rate, bursts, lasts);
            moments.into_iter().map(|at| embeddings(&mut rng, at)).collect()
        }
        Load::Chat { rate } => conversations(&mut rng, factor * rate, lasts),
    }
}

/// An exponentially distributed time.
fn exponential(rng: &mut SmallRng, mean: f64) -> f64 {
    -(1.0 - rng.random::<f64>()).ln() * mean
}

/// A Poisson process, in bursts or not.
fn moments(rng: &mut SmallRng, rate: f64, bursts: Option<Bursts>, lasts: Duration) -> Vec<Duration> {
    let (end, mut at) = (lasts.as_secs_f64(), 0.0);
    let mut moments = Vec::new();
    let mut high = false;
    while at < end {
        let (factor, length) = match bursts {
            None => (1.0, end),
            Some(bursts) => {
                let (factor, mean) =
                    if high { (bursts.high, bursts.lasts) } else { (bursts.low, bursts.apart) };
                (factor, exponential(rng, mean.as_secs_f64()))
            }
        };
        let until = (at + length).min(end);
        let mut next = at + exponential(rng, 1.0 / (rate * factor));
        while next < until {
            moments.push(Duration::from_secs_f64(next));
            next += exponential(rng, 1.0 / (rate * factor));
        }
        (at, high) = (until, !high);
    }
    moments
}

fn embeddings(rng: &mut SmallRng, at: Duration) -> Arrival {
    let mut percent = rng.random_range(0..100);
    let mut rows = ROWS[0].0;
    for (these, share) in ROWS {
        rows = these;
        if percent < share {
            break;
        }
        percent -= share;
    }
    let input: Vec<String> = (0..rows).map(|_| text(rng, ROW_TEXT)).collect();
    let body = json!({"model": "sim", "input": input}).to_string();
    Arrival { at, client: rng.random_range(0..usize::MAX), body: body.into() }
}

/// Conversations that began before the run and during it; what lies before it is not sent.
fn conversations(rng: &mut SmallRng, rate: f64, lasts: Duration) -> Vec<Arrival> {
    let systems: Vec<String> = (0..SYSTEM_PROMPTS).map(|_| text(rng, SYSTEM_BYTES)).collect();
    let before = BETWEEN_TURNS * (TURNS - 1);
    let begins = rate / (f64::from(TURNS + 1) / 2.0);
    let mut arrivals = Vec::new();
    for begin in moments(rng, begins, None, before + lasts) {
        let client = rng.random_range(0..usize::MAX);
        let system = &systems[rng.random_range(0..SYSTEM_PROMPTS)];
        let mut messages = vec![said("system", system), said("user", &text(rng, DOCUMENT_BYTES))];
        for turn in 0..rng.random_range(1..=TURNS) {
            if turn > 0 {
                messages.push(said("assistant", &text(rng, ANSWER_BYTES)));
                messages.push(said("user", &text(rng, QUESTION_BYTES)));
            }
            let at = begin + BETWEEN_TURNS * turn;
            if let Some(at) = at.checked_sub(before).filter(|at| *at < lasts) {
                let body =
                    json!({"model": "sim", "messages": messages, "stream": true, "max_tokens": MAX_TOKENS});
                arrivals.push(Arrival { at, client, body: body.to_string().into() });
            }
        }
    }
    arrivals.sort_by_key(|arrival| arrival.at);
    arrivals
}

fn said(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// Words that no other text has.
fn text(rng: &mut SmallRng, bytes: usize) -> String {
    let mut text = String::with_capacity(bytes + 8);
    while text.len() < bytes {
        text += &format!("{:07x} ", rng.random::<u32>() >> 4);
    }
    text.truncate(bytes);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::case::CASES;

    #[test]
    fn the_same_seed_asks_the_same_and_another_one_does_not() {
        for case in CASES {
            let of = |seed| arrivals(&case, 1.0, Duration::from_secs(2), seed);
            assert_eq!(of(7), of(7), "{}", case.name);
            assert_ne!(of(7), of(8), "{}", case.name);
        }
    }

    #[test]
    fn a_run_asks_as_much_as_the_case_says() {
        let lasts = Duration::from_secs(60);
        for case in CASES {
            let arrivals = arrivals(&case, 1.0, lasts, 1);
            assert!(arrivals.is_sorted_by_key(|arrival| arrival.at) && arrivals.last().unwrap().at < lasts);
            match case.load {
                Load::Tensors { share, .. } => {
                    let rows: usize = arrivals
                        .iter()
                        .map(|arrival| {
                            let body: Value = serde_json::from_slice(&arrival.body).unwrap();
                            body["input"].as_array().unwrap().len()
                        })
                        .sum();
                    let asked = rows as f64 / 60.0 / case.rows_per_second();
                    assert!((asked / share - 1.0).abs() < 0.1, "{}: {asked}", case.name);
                }
                Load::Chat { rate } => {
                    let asked = arrivals.len() as f64 / 60.0;
                    assert!((asked / rate - 1.0).abs() < 0.1, "{asked}");
                }
            }
        }
    }

    #[test]
    fn a_further_turn_begins_as_the_one_before_and_comes_from_the_same_client() {
        let chat = CASES.iter().find(|case| case.is_chat()).unwrap();
        let arrivals = arrivals(chat, 1.0, Duration::from_secs(5), 3);
        let messages = |arrival: &Arrival| {
            let body: Value = serde_json::from_slice(&arrival.body).unwrap();
            body["messages"].as_array().unwrap().clone()
        };
        let long = arrivals.iter().rfind(|arrival| messages(arrival).len() == 6).unwrap();
        let before = arrivals.iter().find(|other| {
            let (short, long) = (messages(other), messages(long));
            short.len() == 4 && long.starts_with(&short)
        });
        let before = before.unwrap();
        assert_eq!((before.client, before.at + BETWEEN_TURNS), (long.client, long.at));
    }
}
