//! What is simulated: replicas, work, and what happens to them.

use crate::server::batch::BatchCost;
use crate::server::llm::StepCost;
use crate::server::{MS, Nanos, S};
use crate::workload::{Arrivals, Chat, Request, Rows, conversations, tensors};

/// A replica.
#[derive(Clone, Copy, Debug)]
pub struct Replica {
    /// Times as fast as declared.
    pub speed: f64,
    /// The physical GPU.
    pub gpu: usize,
    /// What runs on it.
    pub kind: Kind,
}

/// What runs on a replica.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A tensor model.
    Tensor(BatchCost),
    /// An LLM.
    Llm(StepCost),
}

/// Something that happens.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// The replica's GPU stands still until then.
    Stall(usize, Nanos),
    /// It runs at a share of its speed.
    Factor(usize, f64),
    /// It answers everything with an error at once, or stops doing so.
    Fail(usize, bool),
    /// It comes up.
    Join(usize),
}

/// What the clients send.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Requests a second.
    Tensors(Arrivals, Rows, f64),
    /// Conversations a second.
    Chat(Chat, f64),
}

/// A case.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// The replicas.
    pub replicas: Vec<Replica>,
    /// The work.
    pub work: Work,
    /// How long it lasts.
    pub seconds: f64,
    /// What arrives before does not count.
    pub warm_up: Nanos,
    /// Client sidecars.
    pub clients: usize,
    /// One way.
    pub network: Nanos,
    /// How much later than the answer a report is seen.
    pub report_delay: Nanos,
    /// The share of reports that are lost.
    pub report_loss: f64,
    /// What happens when.
    pub changes: Vec<(Nanos, Change)>,
    /// An answer within this is good.
    pub objective_ms: f64,
}

/// A tensor model of the size of a vision backbone: a batch of one takes 12 ms, one of 16 takes 57 ms.
const MODEL: BatchCost = BatchCost { fixed: 9e6, per_row: 3e6, max_rows: 16.0, sigma: 0.1, cold: 1.0 };

/// An LLM of eight billion parameters on a GPU of the A100's size.
const LLM: StepCost = StepCost {
    step: 9e6,
    decode: 0.1e6,
    prefill: 0.08e6,
    read: 80.0,
    budget: 2048,
    sequences: 128,
    blocks: 1500,
    sigma: 0.05,
};

const CLIENTS: usize = 16;

/// Conversations a second: about 80 % of what the eight replicas can answer when nearly all prefixes are cached.
const CONVERSATIONS: f64 = 8.5;

fn tensor_case(name: &'static str, about: &'static str, speeds: &[f64], load: f64) -> Case {
    mixed(name, about, speeds, load, MODEL, Arrivals::Poisson, Rows::One)
}

fn mixed(
    name: &'static str,
    about: &'static str,
    speeds: &[f64],
    load: f64,
    model: BatchCost,
    arrivals: Arrivals,
    rows: Rows,
) -> Case {
    let replicas: Vec<Replica> = speeds
        .iter()
        .enumerate()
        .map(|(gpu, speed)| Replica { speed: *speed, gpu, kind: Kind::Tensor(model) })
        .collect();
    let capacity = speeds.iter().sum::<f64>() * model.capacity() / rows.mean();
    Case {
        name,
        about,
        replicas,
        work: Work::Tensors(arrivals, rows, load * capacity),
        seconds: 45.0,
        warm_up: 15 * S,
        clients: CLIENTS,
        network: MS / 4,
        report_delay: 0,
        report_loss: 0.0,
        changes: Vec::new(),
        objective_ms: 250.0,
    }
}

const HETERO: [f64; 12] = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0, 4.0];

/// All cases.
pub fn all() -> Vec<Case> {
    let serial = BatchCost { fixed: 0.0, per_row: 10e6, max_rows: 1.0, sigma: 0.1, cold: 1.0 };
    let even = [1.0; 12];
    let mut cases = vec![
        tensor_case("homo-80", "twelve equal replicas at 80 % load", &even, 0.8),
        tensor_case("hetero-80", "speeds 1, 2 and 4, four of each, at 80 % load", &HETERO, 0.8),
        tensor_case("not-stalled", "as stalled, without the stall: its yardstick", &even, 0.65),
    ];
    let mut stalled =
        tensor_case("stalled", "65 % load; one of twelve stands still for 8 of 30 s", &even, 0.65);
    stalled.changes = vec![(20 * S, Change::Stall(3, 28 * S))];
    cases.push(stalled);
    let mut throttled = tensor_case(
        "throttled",
        "hetero at 60 %; the fast ones fall to a third one after the other",
        &HETERO,
        0.6,
    );
    throttled.changes = (0..4)
        .flat_map(|i| {
            let from = (17 + 6 * i) as u64 * S;
            [(from, Change::Factor(8 + i, 0.33)), (from + 6 * S, Change::Factor(8 + i, 1.0))]
        })
        .collect();
    cases.push(throttled);
    let bursty = Arrivals::Bursty { peak: 1.8, share: 0.2, seconds: 0.5 };
    cases.push(mixed(
        "bursty",
        "hetero; mean load 60 %, bursts of 0.5 s at 108 %",
        &HETERO,
        0.6,
        MODEL,
        bursty,
        Rows::One,
    ));
    cases.push(mixed(
        "diurnal",
        "hetero; load between 20 and 100 % in a sine",
        &HETERO,
        0.6,
        MODEL,
        Arrivals::Diurnal { low: 0.35 },
        Rows::One,
    ));
    cases.push(mixed(
        "heavy-tailed",
        "hetero; one at a time, sizes from 1 to 50 (Pareto 1.5), at 70 %",
        &HETERO,
        0.7,
        serial,
        Arrivals::Poisson,
        Rows::Heavy { high: 50.0, shape: 1.5 },
    ));
    let mut cold = tensor_case(
        "cold-start",
        "78 % load on ten replicas; two more join cold, forty times slower at first",
        &even,
        0.65,
    );
    for late in [4, 9] {
        cold.replicas[late].kind = Kind::Tensor(BatchCost { cold: 40.0, ..MODEL });
    }
    cold.changes = vec![(18 * S, Change::Join(4)), (26 * S, Change::Join(9))];
    cases.push(cold);
    let mut shared = tensor_case(
        "shared-gpu",
        "twelve replicas on eight GPUs: four of them are time-sliced by two",
        &even,
        0.0,
    );
    for i in 0..4 {
        shared.replicas[8 + i].gpu = i;
    }
    shared.work = Work::Tensors(Arrivals::Poisson, Rows::One, 0.75 * 8.0 * MODEL.capacity());
    cases.push(shared);
    let chat = Chat {
        systems: 24,
        system_tokens: 1024,
        turns: 5.0,
        user_tokens: 150.0,
        answer_tokens: 180.0,
        think: 5.0,
        scattered: false,
    };
    let mut llm =
        tensor_case("chat", "conversations of about five turns on eight LLM replicas", &[1.0; 8], 0.0);
    for replica in &mut llm.replicas {
        replica.kind = Kind::Llm(LLM);
    }
    llm.work = Work::Chat(chat, CONVERSATIONS);
    llm.seconds = 120.0;
    llm.warm_up = 30 * S;
    llm.objective_ms = 1000.0;
    cases.push(llm.clone());
    llm.name = "chat-scattered";
    llm.about = "chat, each turn through a sidecar drawn anew";
    llm.work = Work::Chat(Chat { scattered: true, ..chat }, CONVERSATIONS);
    cases.push(llm);
    let mut failing = tensor_case(
        "sinkhole",
        "hetero at 60 %; one slow replica answers with errors at once for 10 of 30 s",
        &HETERO,
        0.6,
    );
    failing.changes = vec![(20 * S, Change::Fail(1, true)), (30 * S, Change::Fail(1, false))];
    cases.push(failing);
    for (name, about, base, delay, loss) in [
        ("delayed-reports", "hetero-80, every report seen 200 ms late", "hetero-80", 200 * MS, 0.0),
        ("lost-reports", "hetero-80, one report in ten lost", "hetero-80", 0, 0.1),
        ("no-reports", "hetero-80, servers without sidecars: no report at all", "hetero-80", 0, 1.0),
        ("chat-delayed", "chat, every report seen 200 ms late", "chat", 200 * MS, 0.0),
        ("chat-lost", "chat, one report in ten lost", "chat", 0, 0.1),
    ] {
        if let Some(case) = cases.iter().find(|case| case.name == base).cloned() {
            cases.push(Case { name, about, report_delay: delay, report_loss: loss, ..case });
        }
    }
    cases
}

impl Case {
    /// Whether it is about conversations, and time to the first token.
    pub fn is_chat(&self) -> bool {
        matches!(self.work, Work::Chat(..))
    }

    /// When it ends.
    pub fn end(&self) -> Nanos {
        (self.seconds * S as f64) as Nanos
    }

    /// What is sent.
    pub fn requests(&self, seed: u64) -> Vec<Request> {
        match self.work {
            Work::Tensors(arrivals, rows, rate) => {
                tensors(seed, arrivals, rows, rate, self.seconds, self.clients)
            }
            Work::Chat(chat, rate) => conversations(seed, &chat, rate, self.seconds, self.clients),
        }
    }

    /// Whether the replica is not there from the start.
    pub fn joins_later(&self, server: usize) -> bool {
        self.changes.iter().any(|(_, change)| matches!(change, Change::Join(i) if *i == server))
    }
}
