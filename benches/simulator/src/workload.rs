//! What the clients want: requests for tensor models, and conversations.
//!
//! Everything is drawn before the run begins, so that all policies get the same requests at the same moments; only the
//! next turn of a conversation waits for the answer before it.

use std::rc::Rc;

use rand::Rng;
use rand::rngs::SmallRng;

use crate::random::{bounded_pareto, exponential, hash, log_normal, stream};
use crate::server::{BLOCK, Job, Nanos, S};

/// Seconds until the full load is there; a little more than the blackout of gRFC A58.
const RISE: f64 = 11.0;
/// The share of it that is there before: what even round robin can bear.
const BEFORE: f64 = 0.4;

/// When requests come.
#[derive(Clone, Copy, Debug)]
pub enum Arrivals {
    /// At a constant rate.
    Poisson,
    /// Two rates that take turns (a Markov-modulated Poisson process): `peak` times the mean for a `share` of the time,
    /// in bursts of this many seconds on average.
    Bursty {
        /// Times the mean rate.
        peak: f64,
        /// Share of the time.
        share: f64,
        /// Mean length of a burst in seconds.
        seconds: f64,
    },
    /// A sine between `low` and `2 - low` times the mean, one period to a run.
    Diurnal {
        /// The lowest rate.
        low: f64,
    },
}

/// How large requests are.
#[derive(Clone, Copy, Debug)]
pub enum Rows {
    /// All alike.
    One,
    /// A bounded Pareto: most are small.
    Heavy {
        /// The largest.
        high: f64,
        /// The shape.
        shape: f64,
    },
}

impl Rows {
    fn draw(self, random: &mut SmallRng) -> f32 {
        match self {
            Self::One => 1.0,
            Self::Heavy { high, shape } => bounded_pareto(random, 1.0, high, shape).round() as f32,
        }
    }

    /// The mean.
    pub fn mean(self) -> f64 {
        let mut random = stream(0, 99);
        let n = 100_000;
        (0..n).map(|_| f64::from(self.draw(&mut random))).sum::<f64>() / f64::from(n)
    }
}

/// Multi-turn conversations.
#[derive(Clone, Copy, Debug)]
pub struct Chat {
    /// System prompts that conversations share, and their tokens.
    pub systems: u64,
    /// Tokens of a system prompt.
    pub system_tokens: u32,
    /// Turns on average.
    pub turns: f64,
    /// Median tokens of what a user says.
    pub user_tokens: f64,
    /// Median tokens of an answer.
    pub answer_tokens: f64,
    /// Mean seconds until a user says something again.
    pub think: f64,
    /// Each turn goes through a sidecar of its own, as behind a stateless front end; otherwise a conversation stays
    /// with one, as an agent does.
    pub scattered: bool,
}

/// A request before it is sent.
#[derive(Clone, Debug)]
pub struct Request {
    /// When; for a later turn how long after the answer before.
    pub at: Nanos,
    /// By which sidecar.
    pub client: usize,
    /// What the server has to do.
    pub job: Job,
    /// The conversation; 0 = none.
    pub key: u64,
    /// The next turn.
    pub next: Option<usize>,
    /// Whether it waits for a turn before it.
    pub follows: bool,
}

/// Requests at `rate` a second for so many seconds.
pub fn tensors(
    seed: u64,
    arrivals: Arrivals,
    rows: Rows,
    rate: f64,
    seconds: f64,
    clients: usize,
) -> Vec<Request> {
    let mut random = stream(seed, 1);
    let empty: Rc<[u64]> = Rc::from([]);
    let mut requests = Vec::with_capacity((rate * seconds) as usize);
    let mut now = 0.0;
    let mut bursting = false;
    let mut until = 0.0;
    while now < seconds {
        let factor = match arrivals {
            Arrivals::Poisson => 1.0,
            Arrivals::Bursty { peak, share, seconds } => {
                while now >= until {
                    bursting = !bursting;
                    let mean = if bursting { seconds } else { seconds * (1.0 - share) / share };
                    until += exponential(&mut random, mean);
                }
                if bursting { peak } else { (1.0 - peak * share) / (1.0 - share) }
            }
            Arrivals::Diurnal { low } => 1.0 - (1.0 - low) * (std::f64::consts::TAU * now / seconds).cos(),
        };
        // The load comes up in two steps, as after a deployment, so that what counts is not how a policy starts.
        let up = if now < RISE { BEFORE } else { 1.0 };
        now += exponential(&mut random, 1.0 / (rate * factor * up));
        let job = Job {
            request: requests.len(),
            rows: rows.draw(&mut random),
            blocks: Rc::clone(&empty),
            prompt: 0,
            output: 0,
        };
        let client = random.random_range(0..clients);
        let at = (now * S as f64) as Nanos;
        requests.push(Request { at, client, job, key: 0, next: None, follows: false });
    }
    requests
}

/// Conversations that begin at `rate` a second. A turn goes through a random sidecar, as behind a web front end.
pub fn conversations(seed: u64, chat: &Chat, rate: f64, seconds: f64, clients: usize) -> Vec<Request> {
    let mut random = stream(seed, 2);
    let mut requests: Vec<Request> = Vec::new();
    let mut now = 0.0;
    let mut conversation = 0u64;
    loop {
        now += exponential(&mut random, 1.0 / rate);
        if now >= seconds {
            return requests;
        }
        conversation += 1;
        // A few system prompts are popular, many are rare: Zipf.
        let system = (chat.systems as f64).powf(random.random::<f64>()) as u64;
        let turns = exponential(&mut random, chat.turns).ceil().clamp(1.0, 20.0) as u32;
        let mut tokens = chat.system_tokens;
        let stays_with = random.random_range(0..clients);
        for turn in 0..turns {
            let prompt = tokens + log_normal(&mut random, chat.user_tokens, 1.0).clamp(4.0, 8000.0) as u32;
            let output = log_normal(&mut random, chat.answer_tokens, 0.7).clamp(8.0, 1500.0) as u32;
            tokens = prompt + output;
            if tokens > 30_000 {
                break;
            }
            let of_system = chat.system_tokens / BLOCK;
            let blocks = (0..tokens / BLOCK)
                .map(|i| {
                    let owner = if i < of_system { system } else { hash(seed, conversation) | 1 << 63 };
                    hash(owner, u64::from(i))
                })
                .collect();
            let request = requests.len();
            if turn > 0
                && let Some(before) = requests.last_mut()
            {
                before.next = Some(request);
            }
            let at = if turn == 0 { now } else { exponential(&mut random, chat.think) };
            requests.push(Request {
                at: (at * S as f64) as Nanos,
                client: if chat.scattered { random.random_range(0..clients) } else { stays_with },
                job: Job { request, rows: f32::from(0u8), blocks, prompt, output },
                key: hash(seed ^ 77, conversation),
                next: None,
                follows: turn > 0,
            });
        }
    }
}
