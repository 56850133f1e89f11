//! Requests share executions of a real Triton, in shared memory and as bytes: everybody gets what he would have got alone,
//! a bad row fails alone, and Triton may be killed.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::time::Duration;

use penstock_api::names::annotation;
use penstock_inference::oip::grpc::Contents;
use penstock_inference::oip::{Datatype, InferRequest, InferResponse, Tensor, rest};
use penstock_tests::testkit::ask::{Ask, Client, Form};
use penstock_tests::testkit::mesh::{Mesh, NAMESPACE};
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::servers::{Model, Triton};
use penstock_tests::testkit::wire::{Message, Wire};
use penstock_tests::testkit::{PATIENCE, wait_until};
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// A client, and Triton behind a sidecar.
struct Bed {
    mesh: Mesh,
    triton: Option<Triton>,
    models: Vec<Model>,
}

impl Bed {
    async fn start(model: Model, annotations: &[(&'static str, &str)]) -> Self {
        Self::of(Mesh::default(), model, annotations, &[]).await
    }

    /// With more options for the model's sidecar.
    async fn of(mesh: Mesh, model: Model, annotations: &[(&'static str, &str)], options: &[&str]) -> Self {
        let mesh = mesh.pod("client", None).service("model", annotations).pod("a", Some("model"));
        let mesh = mesh.annotate_pod("a", annotation::MTLS, "permissive");
        let mesh = options.iter().fold(mesh, |mesh, option| mesh.option("a", option));
        let mut bed = Self { mesh: mesh.start().await, triton: None, models: vec![model] };
        bed.restart().await;
        bed
    }

    async fn restart(&mut self) {
        // Without a word, and before its successor takes its ports.
        if let Some(mut triton) = self.triton.take() {
            triton.process().kill();
        }
        self.triton = Some(Triton::start_at(self.mesh.application("a").ip(), &self.models).await);
        wait_until("the model answers through both sidecars", PATIENCE, async || {
            // What it takes is learned at the first request for it.
            let mut client = self.mesh.client("client").await;
            ask(&mut client, "rowsum", &request(0, 1, 4), "").await.status() == 200
        })
        .await;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }

    async fn counted(&self, name: &str) -> f64 {
        self.counted_by("a", name).await
    }

    async fn counted_by(&self, pod: &str, name: &str) -> f64 {
        // Counts are told once a second, and the page is a second old at most.
        counts_are_told().await;
        metric(self.mesh.admin(pod), name, &[]).await
    }
}

/// Rows of whole numbers that no other seed has.
fn request(seed: u64, rows: u64, width: u64) -> InferRequest {
    let mut random = SmallRng::seed_from_u64(seed);
    let values = (0..rows * width).map(|_| f32::from(random.random_range(-1000_i16..1000)));
    let values: Vec<f32> = values.collect();
    let factors: Vec<u8> = (0..rows as i64).flat_map(|row| (row + 1).to_le_bytes()).collect();
    InferRequest {
        id: Some(format!("id-{seed}")),
        inputs: vec![
            Tensor::fp32("values", vec![rows, width], values),
            Tensor {
                name: "factor".into(),
                datatype: Datatype::Int64,
                shape: vec![rows, 1],
                parameters: Default::default(),
                data: factors.into(),
            },
        ],
        ..InferRequest::default()
    }
}

fn written(model: &str, request: &InferRequest, headers: &str) -> Vec<u8> {
    let body = rest::encode_request(request, true).unwrap();
    let head = format!(
        "POST /v2/models/{model}/infer HTTP/1.1\r\nhost: model.test\r\n{headers}\
         inference-header-content-length: {}\r\ncontent-length: {}\r\n\r\n",
        body.header_length.unwrap(),
        body.length(),
    );
    [head.as_bytes(), &body.into_bytes()].concat()
}

async fn ask(client: &mut Wire, model: &str, request: &InferRequest, headers: &str) -> Message {
    client.ask(written(model, request, headers)).await.unwrap()
}

fn answer(message: &Message) -> InferResponse {
    assert_eq!(message.status(), 200, "{}", message.text());
    let length = message.head.get("inference-header-content-length").map(|length| length.parse().unwrap());
    let mut answer = rest::decode_response(&message.body.clone().into(), length).unwrap();
    answer.outputs.sort_by(|a, b| a.name.cmp(&b.name));
    answer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_executions_give_the_same_bits() {
    let model = Model::new("rowsum").takes(Duration::from_millis(3), Duration::from_micros(50));
    let bed = Bed::start(model, &[(annotation::BATCH, "max=32")]).await;
    let clients = (0..16_u64).map(|client| {
        let mesh = &bed.mesh;
        async move {
            let (mut wire, mut rows) = (mesh.client("client").await, Vec::new());
            for nth in 0..12 {
                let seed = client * 1000 + nth;
                // Two widths that can share, one of them large enough for shared memory.
                let width = [4, 8192][(seed % 2) as usize];
                let request = request(seed, 1 + seed % 4, width);
                let message = ask(&mut wire, "rowsum", &request, "penstock-batch: show\r\n").await;
                let alone = ask(&mut wire, "rowsum", &request, "penstock-batch: off\r\n").await;
                let (together, alone) = (answer(&message), answer(&alone));
                assert_eq!(together.id.as_deref(), Some(format!("id-{seed}").as_str()));
                assert_eq!(together, alone, "request {seed}");
                let shown = message.head.get("penstock-batch").unwrap();
                rows.push(shown.split_once(";rows=").unwrap().1.parse::<u32>().unwrap());
            }
            rows
        }
    });
    let rows: Vec<u32> = futures_util::future::join_all(clients).await.concat();
    assert!(rows.iter().any(|rows| *rows > 8), "{rows:?}");
    assert!(rows.iter().all(|rows| *rows <= 32), "{rows:?}");
    // What is large went through shared memory, and nothing of it is left behind.
    assert!(bed.counted("penstock_executions_placed_total").await > 0.0);
    assert!(bed.counted("penstock_arena_bytes").await < 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poisoned_row_fails_alone_with_tritons_own_words() {
    let model = Model::new("rowsum").takes(Duration::from_millis(20), Duration::ZERO).poison(4096.0);
    let bed = Bed::start(model, &[(annotation::BATCH, "max=32")]).await;
    let asked = (0..20_u64).map(|seed| {
        let mesh = &bed.mesh;
        async move {
            let mut request = request(seed, 1, 4);
            if seed % 10 == 3 {
                request.inputs[0] = Tensor::fp32("values", vec![1, 4], [1.0, 4096.0, 2.0, 3.0]);
            }
            ask(&mut mesh.client("client").await, "rowsum", &request, "").await
        }
    });
    for (seed, message) in futures_util::future::join_all(asked).await.iter().enumerate() {
        if seed % 10 == 3 {
            assert_eq!(message.status(), 500, "{}", message.text());
            assert!(message.text().contains("hold the poison value"), "{}", message.text());
        } else {
            answer(message);
        }
    }
    assert!(bed.counted("penstock_batch_bisections_total").await >= 1.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn triton_may_be_killed_and_come_back() {
    let model = Model::new("rowsum").takes(Duration::from_millis(5), Duration::ZERO);
    let mut bed = Bed::start(model, &[(annotation::BATCH, "max=32")]).await;
    for round in 0..2 {
        let asked = (0..8_u64).map(|seed| {
            let mesh = &bed.mesh;
            async move {
                let mut client = mesh.client("client").await;
                for nth in 0..5 {
                    let request = request(seed * 100 + nth, 1, 8192);
                    answer(&ask(&mut client, "rowsum", &request, "").await);
                }
            }
        });
        futures_util::future::join_all(asked).await;
        if round == 0 {
            bed.restart().await;
        }
    }
    assert!(bed.counted("penstock_arena_bytes").await < 1.0);
}

/// Nobody has asked over REST, and the annotation leaves the size of a batch to the server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_over_grpc_alone_is_learned_over_grpc() {
    let mesh = Mesh::default().grpc().pod("client", None);
    let mesh = mesh.service("model", &[(annotation::BATCH, "delay=1ms")]).pod("a", Some("model"));
    let model = Model::new("rowsum").max_batch(6).takes(Duration::from_millis(20), Duration::ZERO);
    let _triton = Triton::start_at(mesh.application("a").ip(), &[model]).await;
    let mesh = mesh.start().await;
    let through = Client::through(&mesh, "client", "model");
    let ask = |seed| Ask {
        model: "rowsum".to_owned(),
        version: String::new(),
        request: request(seed, 1, 4),
        form: Form::Grpc(Contents::Typed),
        headers: vec![("penstock-batch", "show".to_owned())],
    };
    wait_until("Triton has told what its model takes", PATIENCE, async || {
        through
            .another()
            .ask(&ask(0))
            .await
            .is_ok_and(|answer| answer.said.is_ok() && answer.rows().is_some())
    })
    .await;
    let clients = (0..16).map(|client| {
        let mut through = through.another();
        async move {
            let mut rows = Vec::new();
            for nth in 0..8 {
                let answer = through.ask(&ask(client * 100 + nth)).await.unwrap();
                // As Triton writes them, whatever the question looked like.
                assert_eq!(answer.as_bytes.len(), answer.given().outputs.len());
                rows.push(answer.rows().unwrap());
            }
            rows
        }
    });
    let rows: Vec<u64> = futures_util::future::join_all(clients).await.concat();
    assert_eq!(rows.iter().max(), Some(&6), "{rows:?}");
}

/// Values of a row that are 64 KiB; 32 of them are 2 MiB, which is large between sidecars too.
const WIDE: u64 = 16_384;

/// Asks many times over each of these connections, and holds each answer against one for which nothing was shared.
async fn same_bits(bed: &Bed, clients: Vec<Wire>, rows: u64) {
    let asked = clients.into_iter().enumerate().map(async |(client, mut wire)| {
        let mut alone = bed.mesh.client("client").await;
        for nth in 0..6_u64 {
            let request = request(client as u64 * 100 + nth, rows, WIDE);
            let together = answer(&ask(&mut wire, "rowsum", &request, "").await);
            assert_eq!(
                together,
                answer(&ask(&mut alone, "rowsum", &request, "penstock-batch: off\r\n").await)
            );
            assert_eq!(together.id, request.id);
        }
    });
    futures_util::future::join_all(asked).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_tensors_are_received_where_triton_reads_them() {
    let model = Model::new("rowsum").takes(Duration::from_millis(3), Duration::ZERO);
    let bed = Bed::start(model, &[(annotation::BATCH, "max=32")]).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(bed.mesh.client("client").await);
    }
    same_bits(&bed, clients, 30).await;
    let lane = bed.counted_by("client", "penstock_lane_requests_total").await;
    let received = bed.counted("penstock_received_in_place_total").await;
    assert!(lane > 20.0 && received > 10.0, "{lane} over the lane, {received} in place");

    // The same in plaintext, small enough to share executions with others.
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(Wire::connect(bed.mesh.inbound("a")).await);
    }
    same_bits(&bed, clients, 3).await;
    let more = bed.counted("penstock_received_in_place_total").await - received;
    assert!(more >= 24.0, "{more} in place");
    assert_eq!(bed.counted("penstock_arena_bytes").await, 0.0, "nothing is left behind");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_leave_half_way_leave_nothing_behind_and_disturb_nobody() {
    let model = Model::new("rowsum").takes(Duration::from_millis(3), Duration::ZERO);
    let bed = Bed::start(model, &[(annotation::BATCH, "max=32")]).await;
    let mut stays = Wire::connect(bed.mesh.inbound("a")).await;
    for nth in 0..24_u64 {
        let plain = nth % 2 == 0;
        let mut leaves = match plain {
            true => Wire::connect(bed.mesh.inbound("a")).await,
            false => bed.mesh.client("client").await,
        };
        let whole = written("rowsum", &request(nth, 30, WIDE), "");
        let part = whole.len() * (1 + nth as usize % 8) / 8;
        leaves.send(&whole[..part.min(whole.len() - 1)]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(nth % 5)).await;
        drop(leaves);
        let request = request(1000 + nth, 2, WIDE);
        answer(&ask(&mut stays, "rowsum", &request, "").await);
    }
    // A request whose length is a lie is one of which the rest is missing, or another's beginning; here the next is right behind it.
    let (one, other) = (request(1, 3, WIDE), request(2, 3, WIDE));
    let both = [written("rowsum", &one, ""), written("rowsum", &other, "")].concat();
    stays.send(&both).await.unwrap();
    for sent in [one, other] {
        assert_eq!(answer(&stays.response().await.unwrap()).id, sent.id);
    }
    assert!(bed.counted("penstock_received_in_place_total").await >= 26.0);
    wait_until("the arena is empty", PATIENCE, async || bed.counted("penstock_arena_bytes").await == 0.0)
        .await;
}

/// A tenth of the arena and more, of which little ever comes.
fn large() -> Vec<u8> {
    written("rowsum", &request(7, 240, WIDE), "")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stops_in_the_middle_keeps_no_room_and_is_answered_all_the_same() {
    let model = Model::new("rowsum").max_batch(512).takes(Duration::from_millis(3), Duration::ZERO);
    let bed = Bed::start(model, &[(annotation::BATCH, "max=512")]).await;
    let (whole, mut stuck) = (large(), Vec::new());
    for _ in 0..3 {
        let mut wire = Wire::connect(bed.mesh.inbound("a")).await;
        wire.send(&whole[..300_000]).await.unwrap();
        stuck.push(wire);
    }
    // Nobody has sent the rest, and none of them has gone.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(bed.counted("penstock_arena_bytes").await, 0.0);
    // Within ten seconds one goes on, and is shared as it would have been; later than that another, past everything.
    let goes_on = |mut wire: Wire| {
        let rest = &whole[300_000..];
        async move {
            wire.send(rest).await.unwrap();
            answer(&wire.response().await.unwrap())
        }
    };
    let early = goes_on(stuck.pop().unwrap()).await;
    let before = bed.counted("penstock_received_in_place_total").await;
    same_bits(&bed, vec![Wire::connect(bed.mesh.inbound("a")).await], 3).await;
    assert!(bed.counted("penstock_received_in_place_total").await >= before + 6.0);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let late = goes_on(stuck.pop().unwrap()).await;
    let alone = answer(&Wire::connect(bed.mesh.inbound("a")).await.ask(&whole).await.unwrap());
    assert_eq!((&early, &late), (&alone, &alone));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pipeline_of_one_model_takes_nothing_from_another() {
    let mut mesh = Mesh::default();
    let policy = format!(
        "apiVersion: penstock.io/v1alpha1\nkind: InferencePolicy\nmetadata: {{name: photos, namespace: {NAMESPACE}}}\n\
         spec:\n  targetRef: {{kind: Service, name: model}}\n  models:\n  - name: photos\n    prepare:\n    \
         - {{input: image, pipeline: {{preset: imagenet}}}}\n"
    );
    mesh.file("policy.yaml", &policy);
    let model = Model::new("rowsum").takes(Duration::from_millis(3), Duration::ZERO);
    let bed = Bed::of(mesh, model, &[(annotation::BATCH, "max=32")], &[]).await;
    let clients = vec![Wire::connect(bed.mesh.inbound("a")).await];
    same_bits(&bed, clients, 3).await;
    let received = bed.counted("penstock_received_in_place_total").await;
    assert!(received >= 6.0, "{received} in place");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_arena_is_no_reason_to_refuse() {
    let model = Model::new("rowsum").takes(Duration::from_millis(3), Duration::ZERO);
    let options = ["--arena=1048576"];
    let bed = Bed::of(Mesh::default(), model, &[(annotation::BATCH, "max=32")], &options).await;
    let mut clients = vec![bed.mesh.client("client").await];
    clients.push(Wire::connect(bed.mesh.inbound("a")).await);
    same_bits(&bed, clients, 30).await;
    assert_eq!(bed.counted("penstock_received_in_place_total").await, 0.0);
    assert_eq!(bed.counted("penstock_arena_bytes").await, 0.0);
}
