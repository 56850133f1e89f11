//! How much may be asked of whom: rate limits through real sidecars, from the YAML of the limit to the answer.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::sync::Arc;
use std::time::Duration;

use penstock_inference::oip::grpc::Contents;
use penstock_inference::oip::{InferRequest, Tensor};
use penstock_tests::testkit::ask::{Ask, Client, Form};
use penstock_tests::testkit::certificates::spiffe;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::{Origin, unimplemented};
use penstock_tests::testkit::proxy::metric;
use penstock_tests::testkit::wire::{Message, Wire};
use penstock_tests::testkit::{PATIENCE, wait_until};
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Limits of the Service `shop`.
fn limits(limits: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: RateLimit\nmetadata: {{name: p, namespace: test}}\nspec:\n  \
         targetRefs: [{{kind: Service, name: shop}}]\n  limits: {limits}\n"
    )
}

/// An application behind a sidecar, and two clients.
struct Shop {
    mesh: Mesh,
    _origin: Origin,
    /// One is added for each request for `/hold` that may be answered.
    released: Arc<Semaphore>,
    /// One is added for each that has come.
    held: Arc<Semaphore>,
}

impl Shop {
    async fn open(mesh: Mesh) -> Self {
        let mesh =
            mesh.service("shop", &[]).pod("front", None).pod("other", None).pod("server", Some("shop"));
        let (released, held) = (Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let (may_answer, has_come) = (Arc::clone(&released), Arc::clone(&held));
        let origin = Origin::start_at(mesh.application("server"), move |mut client| {
            let (may_answer, has_come) = (Arc::clone(&may_answer), Arc::clone(&has_come));
            async move {
                while let Ok(request) = client.request().await {
                    if request.head.first.contains(" /hold ") {
                        has_come.add_permits(1);
                        may_answer.acquire().await.unwrap().forget();
                    }
                    if client.send(answer(&request)).await.is_err() {
                        return;
                    }
                }
            }
        });
        let origin = origin.await;
        let mesh = mesh.start().await;
        for client in ["front", "other"] {
            mesh.reaches(client, "shop").await;
        }
        Self { mesh, _origin: origin, released, held }
    }

    async fn limit(&mut self, text: &str) {
        self.mesh.file("rates.yaml", &limits(text));
        self.mesh.apply().await;
    }

    async fn ask(&self, from: &str, request: &str) -> Message {
        self.mesh.client(from).await.ask(request).await.unwrap()
    }

    async fn counted(&self, name: &str, limit: &str, count: f64) {
        let labels = [r#"policy="test/p""#.to_owned(), format!("limit=\"{limit}\"")];
        let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        wait_until(&format!("{name} is {count}"), PATIENCE, async || {
            metric(self.mesh.admin("server"), name, &labels).await == count
        })
        .await;
    }
}

/// What the application answers: to what OpenAI's API asks, 100 tokens of prompt and 300 of answer.
fn answer(request: &Message) -> String {
    let text = request.text();
    if !request.head.first.contains("/chat/completions") {
        return "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned();
    }
    let usage = r#"{"id":"x","usage":{"prompt_tokens":100,"completion_tokens":300,"total_tokens":400}}"#;
    if !text.contains(r#""stream":true"#) {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length";
        return format!("{head}: {}\r\n\r\n{usage}", usage.len());
    }
    let event = "data: {\"choices\":[{\"delta\":{\"content\":\"a\"}}]}\n\n";
    let events = match text.contains("include_usage") {
        true => format!("{event}data: {usage}\n\ndata: [DONE]\n\n"),
        false => event.repeat(400) + "data: [DONE]\n\n",
    };
    let mut answer =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_owned();
    // Cut anywhere.
    for piece in events.as_bytes().chunks(37) {
        answer += &format!("{:x}\r\n{}\r\n", piece.len(), std::str::from_utf8(piece).unwrap());
    }
    answer + "0\r\n\r\n"
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: shop.test\r\n\r\n")
}

fn chat(body: &str) -> String {
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: shop.test\r\ncontent-type: application/json\r\naccept-encoding: gzip\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Asserts that it was refused by that limit, and returns when to come again.
fn refused(answer: &Message, limit: &str) -> u64 {
    assert_eq!((answer.status(), answer.reason()), (429, Some("rate-limited")), "{answer:?}");
    let story = answer.text();
    assert!(story.contains(&format!("limit {limit} of RateLimit test/p")), "{story}");
    let seconds: u64 = answer.head.get("retry-after").unwrap().parse().unwrap();
    assert!(seconds >= 1 && story.contains(&format!("come again in {seconds} s")), "{story}");
    seconds
}

fn served(answer: &Message) {
    assert_eq!(answer.status(), 200, "{answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_caller_has_its_own_and_an_edited_limit_holds_at_once() {
    let mut shop = Shop::open(Mesh::default()).await;
    shop.limit("[{name: each, by: [identity], requests: {perMinute: 1, burst: 3}}]").await;
    let mut front = shop.mesh.client("front").await;
    let plain = get("/x");
    for _ in 0..3 {
        served(&front.ask(&plain).await.unwrap());
    }
    let answer = front.ask(&plain).await.unwrap();
    assert!(refused(&answer, "each") <= 60, "{answer:?}");
    let story = answer.text();
    assert!(story.contains(&spiffe("front")) && story.contains("1 requests/min and 3 at once"), "{story}");
    shop.counted("penstock_rate_limited_total", "each", 1.0).await;
    for _ in 0..3 {
        served(&shop.ask("other", &plain).await);
    }

    // What does not change the limit leaves what is counted.
    shop.limit(
        "[{name: each, by: [identity], requests: {perMinute: 1, burst: 3}}, {name: many, concurrent: 100}]",
    )
    .await;
    refused(&front.ask(&plain).await.unwrap(), "each");

    shop.mesh.file("rates.yaml", &limits("[{name: each, by: [identity], requests: {perSecond: 1000}}]"));
    let begun = Instant::now();
    shop.mesh.write();
    while front.ask(&plain).await.unwrap().status() != 200 {
        assert!(begun.elapsed() < PATIENCE, "the edited limit is not in force");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("an edited limit is in force after {:?}", begun.elapsed());
    for _ in 0..20 {
        served(&front.ask(&plain).await.unwrap());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_model_and_each_route_has_its_own() {
    let mut shop = Shop::open(Mesh::default()).await;
    shop.limit(
        "[{name: models, match: {to: [{models: [\"llama*\"]}]}, by: [model], requests: {perMinute: 1}}]",
    )
    .await;
    let long = "x".repeat(100_000);
    let of = |model: &str| chat(&format!(r#"{{"messages":["{long}"],"model":"{model}"}}"#));
    for model in ["llama-a", "llama-b"] {
        served(&shop.ask("front", &of(model)).await);
        // All clients together, and where the model stands makes no difference.
        let answer = shop.ask("other", &chat(&format!(r#"{{"model":"{model}"}}"#))).await;
        assert!(refused(&answer, "models") <= 60 && answer.text().contains(model), "{answer:?}");
    }
    for _ in 0..3 {
        served(&shop.ask("front", &of("gpt")).await);
    }
    // Who hides which one it is gets around nothing.
    let hidden = chat(r#"{"model":"gpt","model":"llama-a"}"#);
    served(&shop.ask("front", &hidden).await);
    let answer = shop.ask("front", &hidden).await;
    refused(&answer, "models");
    assert!(answer.text().contains("whose model cannot be told"), "{answer:?}");

    shop.limit(
        "[{name: routes, match: {to: [{paths: [\"/a/*\"]}, {paths: [/b]}]}, by: [route], requests: {perMinute: 1}}]",
    )
    .await;
    for path in ["/a/1", "/b"] {
        served(&shop.ask("front", &get(path)).await);
    }
    for path in ["/a/2", "/b", "/x/../a", "/%62"] {
        refused(&shop.ask("front", &get(path)).await, "routes");
    }
    served(&shop.ask("front", &get("/c")).await);
}

/// Asks for what is held, and returns once the application has it.
async fn hold(shop: &Shop, from: &str) -> Wire {
    let mut wire = shop.mesh.client(from).await;
    wire.send(get("/hold")).await.unwrap();
    shop.held.acquire().await.unwrap().forget();
    wire
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_at_a_time_and_a_place_is_free_however_a_request_ends() {
    let mut shop = Shop::open(Mesh::default()).await;
    shop.limit("[{name: two, by: [identity], concurrent: 2}]").await;
    let mut first = hold(&shop, "front").await;
    let second = hold(&shop, "front").await;
    let answer = shop.ask("front", &get("/x")).await;
    assert_eq!(refused(&answer, "two"), 1);
    assert!(answer.text().contains("2 requests at a time"), "{answer:?}");
    served(&shop.ask("other", &get("/x")).await);

    // One is answered, the other leaves.
    shop.released.add_permits(1);
    let answered = first.response();
    served(&answered.await.unwrap());
    served(&shop.ask("front", &get("/x")).await);
    let third = hold(&shop, "front").await;
    refused(&shop.ask("front", &get("/x")).await, "two");
    drop((second, third));
    let free = async || shop.ask("front", &get("/x")).await.status() == 200;
    wait_until("one has left", PATIENCE, free).await;
    let _fourth = hold(&shop, "front").await;
    wait_until("both have left", PATIENCE, free).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_are_counted_from_answers_whole_and_streamed() {
    let mut shop = Shop::open(Mesh::default()).await;
    shop.limit("[{name: tokens, by: [identity], tokens: {perMinute: 60, burst: 200}}]").await;
    let whole = chat(r#"{"model":"m","messages":[]}"#);
    let streamed =
        chat(r#"{"model":"m","messages":[],"stream":true,"stream_options":{"include_usage":true}}"#);
    let silent = chat(r#"{"model":"m","messages":[],"stream":true}"#);
    // One comes in each second, and 200 were there: what is owed is waited for, and one more.
    let mut counted = 0.0;
    for (from, ask, used) in [("front", &whole, 400), ("other", &streamed, 400)] {
        served(&shop.ask(from, ask).await);
        counted += f64::from(used);
        shop.counted("penstock_rate_tokens_total", "tokens", counted).await;
        let answer = shop.ask(from, ask).await;
        assert!((180..=201).contains(&refused(&answer, "tokens")), "{answer:?}");
        assert!(answer.text().contains("60 tokens/min and 200 at once"), "{answer:?}");
        // What uses no tokens does not wait for them.
        served(&shop.ask(from, &get("/x")).await);
    }

    // A stream that does not say what it used counts by its events, and the prompt by its length.
    shop.limit("[{name: tokens, by: [identity], tokens: {perMinute: 60, burst: 201}}]").await;
    served(&shop.ask("front", &silent).await);
    wait_until("it is counted", PATIENCE, async || shop.ask("front", &silent).await.status() == 429).await;
    let seconds = refused(&shop.ask("front", &silent).await, "tokens");
    assert!((180..=220).contains(&seconds), "{seconds}");
    served(&shop.ask("other", &silent).await);
}

/// How fast a replica refuses says nothing about how fast it works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_refuses_draws_no_more_requests_than_others() {
    let mesh = Mesh::default().pod("front", None).service("shop", &[]).pod("a", Some("shop"));
    let mut mesh = mesh.pod("b", Some("shop"));
    let time = Duration::from_millis(20);
    let _a = Origin::named(mesh.application("a"), "a", time).await;
    let _b = Origin::named(mesh.application("b"), "b", time).await;
    // Another Service leads to one of the two, and the limit is about that.
    let one = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: one, namespace: test}}\nspec: {{ports: [{{name: main, port: 80, targetPort: {1}}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: one-1, namespace: test, labels: \
         {{kubernetes.io/service-name: one}}}}\naddressType: IPv4\nports: [{{name: main, port: {1}}}]\nendpoints: [{{addresses: [{0}], \
         targetRef: {{kind: Pod, namespace: test, name: a}}}}]\n",
        mesh.application("a").ip(),
        mesh.application("a").port()
    );
    mesh.file("one.yaml", &one);
    let few = limits("[{name: few, requests: {perMinute: 1, burst: 5}}]");
    mesh.file("rates.yaml", &few.replace("name: shop}", "name: one}"));
    let mesh = mesh.start().await;
    mesh.reaches("front", "shop").await;
    let mut front = mesh.client("front").await;
    let mut served = 0;
    for _ in 0..100 {
        served += usize::from(front.ask(get("/x")).await.unwrap().status() == 200);
    }
    assert!(served > 25, "{served} of 100 were served, and half of the replicas serve all");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_grpc_it_is_resource_exhausted() {
    let mut shop = Shop::open(Mesh::default().grpc()).await;
    let server = unimplemented(shop.mesh.application_grpc("server")).await;
    shop.limit(
        "[{name: infer, match: {to: [{grpc: [{service: inference.GRPCInferenceService, method: ModelInfer}]}]}, \
         by: [model], requests: {perMinute: 1}}]",
    )
    .await;
    for (who, model, code) in [("front", "digits", 12), ("other", "digits", 8), ("front", "faces", 12)] {
        let asked = Ask {
            model: model.to_owned(),
            version: String::new(),
            request: InferRequest {
                inputs: vec![Tensor::fp32("x".to_owned(), vec![1, 2], vec![0.0, 1.0])],
                ..InferRequest::default()
            },
            form: Form::Grpc(Contents::Raw),
            headers: Vec::new(),
        };
        let answer = Client::through(&shop.mesh, who, "shop").ask(&asked).await.unwrap();
        let (status, words) = answer.said.unwrap_err();
        assert_eq!(status, code, "{who} {model}: {words}");
        assert_eq!(words.contains("limit infer of RateLimit test/p"), code == 8, "{words}");
    }
    server.abort();
}
