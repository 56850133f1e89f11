//! Accounting under trouble: while requests share executions of a real Triton, one in twenty leaves at a random moment and
//! one in twenty makes the model fail. Everybody who stays gets one answer, his own; who fails, fails alone, in the server's
//! words; afterwards nothing is held, and the proxies have counted what the clients have.
//!
//! The seed is printed; `PENSTOCK_SEED` sets it.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_inference::oip::{InferRequest, Tensor};
use penstock_tests::testkit::ask::{Ask, Client, Form};
use penstock_tests::testkit::cases::{Can, Case, Kind, case};
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::servers::{Model, TorchServe, Triton};
use penstock_tests::testkit::{PATIENCE, wait_until};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinSet;

const CLIENTS: usize = 48;
const REQUESTS: usize = 6_000;
/// No other value is as large.
const POISON: f32 = 4096.0;
const SHARE: f64 = 0.05;
/// As long as two or three executions, with all that comes before them.
const STAY: Duration = Duration::from_millis(40);
const TOLD: usize = 8;

/// What the clients counted.
#[derive(Debug, Default)]
struct Counts {
    /// Answers that were right, over REST and gRPC.
    good: [usize; 2],
    /// Requests that the model, or the server, refused.
    refused: [usize; 2],
    /// Of those the ones with a poisoned row.
    poisoned: usize,
    /// Requests that left, all of which had been sent, over REST; and over gRPC, where nobody knows.
    left: [usize; 2],
    /// Of those the ones that had an answer already.
    late: usize,
    failures: Vec<String>,
}

impl Counts {
    fn add(&mut self, other: Self) {
        for at in 0..2 {
            self.good[at] += other.good[at];
            self.refused[at] += other.refused[at];
            self.left[at] += other.left[at];
        }
        self.poisoned += other.poisoned;
        self.late += other.late;
        self.failures.extend(other.failures);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_who_stays_gets_his_own_answer_and_nothing_is_left_behind() {
    let seed = std::env::var("PENSTOCK_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("PENSTOCK_SEED={seed}");
    let mesh = Mesh::default()
        .grpc()
        .pod("client", None)
        .service("model", &[(annotation::BATCH, "max=32"), (annotation::COALESCE, "single-flight")])
        .pod("a", Some("model"));
    let takes =
        |name| Model::new(name).takes(Duration::from_millis(4), Duration::from_micros(50)).poison(POISON);
    let models = [takes("rowsum"), takes("wide").width(4096)];
    let triton = Triton::start_at(mesh.application("a").ip(), &models).await;
    let mesh = mesh.start().await;
    let can = Can {
        kinds: &[Kind::Rowsum, Kind::Rowsum, Kind::Wide],
        grpc: true,
        binary: true,
        versions: false,
        any_bytes: true,
    };
    let (through, direct) =
        (Client::through(&mesh, "client", "model"), Client::of(triton.http, Some(triton.grpc)));
    let mut random = SmallRng::seed_from_u64(seed);
    for _ in 0..20 {
        let first = case(&can, &mut random);
        if first.expected.is_some() {
            let mut client = through.another();
            wait_until("the model answers through both sidecars", PATIENCE, async || {
                client.ask(&first.ask).await.is_ok_and(|answer| answer.said.is_ok())
            })
            .await;
        }
    }
    mesh.nothing_is_held().await;
    let before = Counted::of(&mesh).await;

    let left = Arc::new(AtomicUsize::new(REQUESTS));
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS as u64 {
        let (through, direct) = (through.another(), direct.another());
        clients.spawn(client(can, through, direct, seed ^ (number << 32), Arc::clone(&left)));
    }
    let mut counts = Counts::default();
    while let Some(one) = clients.join_next().await {
        counts.add(one.unwrap());
    }
    mesh.nothing_is_held().await;
    let more = Counted::of(&mesh).await.since(&before);

    counts.failures.truncate(TOLD);
    println!("PENSTOCK_SEED={seed}: {counts:#?} {more:#?}");
    assert!(counts.failures.is_empty(), "PENSTOCK_SEED={seed}: {:#?}", counts.failures);
    let (stayed, gone) =
        (counts.good.iter().chain(&counts.refused).sum::<usize>(), counts.left.iter().sum::<usize>());
    assert_eq!(stayed + gone, REQUESTS);
    assert!(gone - counts.late > REQUESTS / 50, "{counts:?}");
    assert!(counts.poisoned > REQUESTS / 50, "{counts:?}");
    // The client's sidecar has seen all that was sent. Of gRPC requests that left, some may never have been.
    let sent = stayed + counts.left[0];
    assert!((sent..=sent + counts.left[1]).contains(&more.outbound), "{sent} were sent, {more:?}");
    // The model's has seen all that stayed, and nothing twice.
    assert!((stayed..=stayed + gone).contains(&more.inbound), "{stayed} stayed, {more:?}");
    // Who left was good, so that every failure was seen by the client whose it was. A refusal over gRPC has the status 200. Who
    // left when the answer had begun counts as closed too, with the status of the answer and not as a failure.
    let refused = counts.refused[0];
    assert!((refused.saturating_sub(gone)..=refused).contains(&more.failed), "{counts:?} {more:?}");
    let good = counts.good[0] + counts.good[1] + counts.refused[1];
    assert!((good..=good + gone).contains(&more.good), "{counts:?} {more:?}");
    assert!(more.bisected > 0 && more.executions < REQUESTS, "{more:?}");
    assert!(more.coalesced > 0, "{more:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poisoned_row_fails_alone_on_torchserve_too() {
    let mesh = Mesh::default()
        .pod("client", None)
        .service("model", &[(annotation::BATCH, "max=32")])
        .pod("a", Some("model"));
    let model = Model::new("rowsum").takes(Duration::from_millis(20), Duration::ZERO).poison(POISON);
    let server = TorchServe::start_at(mesh.application("a").ip(), &[model]).await;
    let mesh = mesh.start().await;
    let (through, direct) = (Client::through(&mesh, "client", "model"), Client::of(server.http, None));
    let ask = |number: usize| {
        let values = if number % 10 == 3 { [1.0, POISON, 2.0] } else { [number as f32, 2.0, 3.0] };
        let inputs = vec![Tensor::fp32("values", vec![1, 3], values)];
        Ask {
            model: "rowsum".to_owned(),
            version: String::new(),
            request: InferRequest { id: Some(number.to_string()), inputs, ..InferRequest::default() },
            form: Form::Rest(vec![false]),
            headers: Vec::new(),
        }
    };
    wait_until("the model answers through both sidecars", PATIENCE, async || {
        through.another().ask(&ask(0)).await.is_ok_and(|answer| answer.said.is_ok())
    })
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let asked = (0..20).map(|number| {
        let mut client = through.another();
        async move { client.ask(&ask(number)).await.unwrap() }
    });
    for (number, answer) in futures_util::future::join_all(asked).await.into_iter().enumerate() {
        let alone = direct.another().ask(&ask(number)).await.unwrap();
        assert_eq!(alone.said.is_err(), number % 10 == 3);
        assert_eq!(answer.said, alone.said, "request {number}, {:?}", answer.shown);
    }
    counts_are_told().await;
    assert!(metric(mesh.admin("a"), "penstock_batch_bisections_total", &[]).await >= 1.0);
}

/// The proxy tells so many models apart; what is asked besides shares no execution, but is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_beyond_those_that_are_told_apart_is_asked_for_by_its_name() {
    let mesh = Mesh::default()
        .pod("client", None)
        .service("model", &[(annotation::BATCH, "max=32")])
        .pod("a", Some("model"));
    let triton = Triton::start_at(mesh.application("a").ip(), &[Model::new("rowsum")]).await;
    let mesh = mesh.start().await;
    let (through, mut direct) = (Client::through(&mesh, "client", "model"), Client::of(triton.http, None));
    let ask = |model: &str| Ask {
        model: model.to_owned(),
        version: String::new(),
        request: InferRequest {
            inputs: vec![Tensor::fp32("values", vec![1, 3], [1.0, 2.0, 3.0])],
            ..InferRequest::default()
        },
        form: Form::Rest(vec![true]),
        headers: Vec::new(),
    };
    let mut client = through.another();
    for number in 0..70 {
        let name = format!("nobody-{number}");
        wait_until("Triton says that there is no such model", PATIENCE, async || {
            client
                .ask(&ask(&name))
                .await
                .is_ok_and(|answer| answer.said.is_err_and(|(_, words)| words.contains(&name)))
        })
        .await;
    }
    let alone = direct.ask(&ask("rowsum")).await.unwrap();
    for _ in 0..3 {
        let asked = (0..10).map(|_| {
            let mut client = through.another();
            async move { client.ask(&ask("rowsum")).await.unwrap() }
        });
        for answer in futures_util::future::join_all(asked).await {
            assert_eq!(answer.given(), alone.given());
        }
        // What it takes would have been learned by now.
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// What the proxies counted.
#[derive(Debug)]
struct Counted {
    outbound: usize,
    inbound: usize,
    good: usize,
    failed: usize,
    executions: usize,
    bisected: usize,
    coalesced: usize,
}

impl Counted {
    async fn of(mesh: &Mesh) -> Self {
        let count = async |pod, name, labels: &[&str]| metric(mesh.admin(pod), name, labels).await as usize;
        let requests = "penstock_requests_total";
        Self {
            outbound: count("client", requests, &["direction=\"outbound\""]).await,
            inbound: count("a", requests, &["direction=\"inbound\""]).await,
            good: count("client", requests, &["direction=\"outbound\"", "class=\"2xx\""]).await,
            failed: count("client", requests, &["direction=\"outbound\"", "class=\"5xx\""]).await
                + count("client", requests, &["direction=\"outbound\"", "class=\"4xx\""]).await
                - count("client", "penstock_request_errors_total", &["reason=\"client-closed\""]).await,
            executions: count("a", "penstock_executions_total", &[]).await,
            bisected: count("a", "penstock_batch_bisections_total", &[]).await,
            coalesced: count("a", "penstock_coalesced_total", &["result=\"coalesced\""]).await,
        }
    }

    fn since(self, before: &Self) -> Self {
        Self {
            outbound: self.outbound - before.outbound,
            inbound: self.inbound - before.inbound,
            good: self.good - before.good,
            failed: self.failed - before.failed,
            executions: self.executions - before.executions,
            bisected: self.bisected - before.bisected,
            coalesced: self.coalesced - before.coalesced,
        }
    }
}

/// Asks until all have been asked.
async fn client(
    can: Can,
    mut through: Client,
    mut direct: Client,
    seed: u64,
    left: Arc<AtomicUsize>,
) -> Counts {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut counts = Counts::default();
    while left.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)).is_ok() {
        let mut case = case(&can, &mut random);
        let grpc = usize::from(matches!(case.ask.form, Form::Grpc(_)));
        let dice: f64 = random.random();
        if dice < SHARE && case.expected.is_some() {
            let stay = STAY.mul_f64(random.random());
            counts.left[grpc] += 1;
            counts.late += usize::from(leave(&mut through, &case, stay).await);
            continue;
        }
        if dice > 1.0 - SHARE && case.expected.is_some() {
            poison(&mut case, &mut random);
            counts.poisoned += 1;
        }
        let answer = match through.ask(&case.ask).await {
            Ok(answer) => answer,
            Err(error) => {
                counts.failures.push(format!("{error}: {case:?}"));
                continue;
            }
        };
        match (&case.expected, &answer.said) {
            (Some(expected), Ok(given)) => {
                let mut outputs = given.outputs.clone();
                outputs.sort_by(|a, b| a.name.cmp(&b.name));
                outputs.iter_mut().for_each(|output| output.parameters.clear());
                if outputs != *expected || given.id != case.ask.request.id {
                    counts.failures.push(format!("{given:?} is not the answer to {case:?}"));
                }
                if case.alone && answer.rows().is_some() {
                    counts.failures.push(format!("wanted to be alone: {case:?}"));
                }
                counts.good[grpc] += 1;
            }
            (None, Err(_)) => {
                let alone = direct.ask(&case.ask).await.unwrap();
                if answer.said != alone.said {
                    counts.failures.push(format!("{:?}\nalone: {:?}\nof {case:?}", answer.said, alone.said));
                }
                counts.refused[grpc] += 1;
            }
            (_, said) => {
                counts.failures.push(format!("{said:?} {:?} is no answer to {case:?}", answer.shown))
            }
        }
    }
    if !through.is_silent().await {
        counts.failures.push("more came than was asked for".to_owned());
    }
    counts
}

/// Asks, and leaves after a while. Whether an answer had come by then.
async fn leave(client: &mut Client, case: &Case, stay: Duration) -> bool {
    match &case.ask.form {
        Form::Rest(behind) => client.leave(&case.ask, behind, stay).await.unwrap(),
        Form::Grpc(_) => tokio::time::timeout(stay, client.ask(&case.ask)).await.is_ok(),
    }
}

/// Has one row of it fail the model.
fn poison(case: &mut Case, random: &mut SmallRng) {
    let values = &mut case.ask.request.inputs[0];
    let mut data = values.data.to_vec();
    let at = random.random_range(0..data.len() / 4) * 4;
    data[at..at + 4].copy_from_slice(&POISON.to_le_bytes());
    values.data = data.into();
    case.expected = None;
}
