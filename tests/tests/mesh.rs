//! The mesh with its control plane, under load: what a client sees while weights move, replicas die, certificates
//! change and control itself is gone.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_api::view::{Decision, EndpointRow, Problem, Stat, Tap};
use penstock_tests::testkit::load::Load;
use penstock_tests::testkit::mesh::{Listed, Mesh};
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::wire::Wire;
use penstock_tests::testkit::{PATIENCE, wait_until};

/// What a careful owner asks of every client.
const CARE: [(&str, &str); 3] = [
    (annotation::RETRY, "attempts=2,on=502+503+504,budget=50%,buffer=64Ki"),
    (annotation::TIMEOUT, "connect=1s,request=10s,per-try=3s,idle=5m"),
    (annotation::OUTLIER, "failures=3,base=1s,max=5s,ejected=50%"),
];
const HOST: &str = "shop.test";

/// A client, and a Service `shop` that is split over `shop-v1` and `shop-v2`, with `replicas` each.
async fn split_over_two(mesh: Mesh, weights: &str, replicas: usize) -> (Mesh, BTreeMap<String, Origin>) {
    let mut mesh = mesh.pod("client", None).service("shop", &[(annotation::TRAFFIC_SPLIT, weights)]);
    let mut names = Vec::new();
    for version in ["shop-v1", "shop-v2"] {
        mesh = mesh.service(version, &CARE);
        for letter in ["a", "b", "c"].iter().take(replicas) {
            let name = format!("{version}-{letter}");
            mesh = mesh.pod(&name, Some(version));
            names.push((name, version));
        }
    }
    let mut origins = BTreeMap::new();
    for (name, version) in names {
        origins.insert(name.clone(), Origin::named(mesh.application(&name), version, Duration::ZERO).await);
    }
    let mesh = mesh.start().await;
    mesh.reaches("client", "shop").await;
    (mesh, origins)
}

/// A client, and a Service `shop` of `replicas` that say their own names after `time`.
async fn replicas(mesh: Mesh, replicas: &[&str], time: Duration) -> (Mesh, BTreeMap<String, Origin>) {
    let mut mesh = mesh.pod("client", None).service("shop", &CARE);
    for name in replicas {
        mesh = mesh.pod(name, Some("shop"));
    }
    let mut origins = BTreeMap::new();
    for name in replicas {
        origins.insert((*name).to_owned(), Origin::named(mesh.application(name), name, time).await);
    }
    let mesh = mesh.start().await;
    mesh.reaches("client", "shop").await;
    (mesh, origins)
}

fn load(mesh: &Mesh) -> Load {
    Load::start(mesh.outbound("client"), HOST, 4, Duration::from_millis(4))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_request_to_a_service_is_answered_and_an_unknown_host_is_named() {
    let (mesh, _origins) = replicas(Mesh::default(), &["a"], Duration::ZERO).await;
    // `reaches` has asked once with success; a second name of the Service is asked for the first time here.
    let mut client = mesh.client("client").await;
    let ask = |host: &str| format!("GET / HTTP/1.1\r\nhost: {host}\r\n\r\n");
    let answer = client.ask(ask("shop.test.svc.cluster.local:80")).await.unwrap();
    assert_eq!((answer.status(), answer.text().as_str()), (200, "a"));
    let answer = client.ask(ask("nothing.test.svc.cluster.local")).await.unwrap();
    assert!(answer.status() >= 500 && answer.reason() == Some("no-service"), "{answer:?}");
    let answer = client.ask(ask("shop.test.svc.cluster.local:81")).await.unwrap();
    assert!(answer.status() >= 400 && answer.reason().is_some(), "{answer:?}");
    let stranger = Wire::connect(mesh.outbound("a")).await.ask(ask("shop.test")).await.unwrap();
    assert_eq!(stranger.status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shares_follow_the_annotation_and_then_an_httproute() {
    // Each request draws: of 4,000, shares of 40 % are 0.008 off on average, and more than this once in 200,000 runs.
    const NEAR: f64 = 0.035;
    let (mut mesh, _origins) = split_over_two(Mesh::default(), "shop-v1=90,shop-v2=10", 1).await;
    let load = Load::start(mesh.outbound("client"), HOST, 8, Duration::ZERO);
    let share = async |load: &Load| {
        let before = load.so_far();
        load.more(4_000).await;
        load.so_far().share_since(&before, "shop-v2")
    };
    let seen = share(&load).await;
    assert!((seen - 0.1).abs() < NEAR, "10 % asked, {seen} seen");
    mesh.split("shop", "shop-v1=1,shop-v2=3");
    mesh.apply().await;
    let seen = share(&load).await;
    assert!((seen - 0.75).abs() < NEAR, "75 % asked, {seen} seen");
    mesh.file(
        "route.yaml",
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: shop, namespace: test}\nspec:\n  \
         parentRefs: [{group: \"\", kind: Service, name: shop, port: 80}]\n  rules:\n  - backendRefs:\n    \
         - {name: shop-v1, port: 80, weight: 60}\n    - {name: shop-v2, port: 80, weight: 40}\n",
    );
    mesh.apply().await;
    let seen = share(&load).await;
    assert!((seen - 0.4).abs() < NEAR, "40 % asked, {seen} seen");
    load.finish().await.has_no_failure();
}

/// A pool has no address and no slices: its pods are found by their labels, and reached through a route. In turn, as it asks: shares are
/// then no matter of how fast each was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inference_pool_is_a_backend_whose_pods_share_the_load() {
    let (mut mesh, _origins) =
        replicas(Mesh::default().service("front", &[]), &["a", "b"], Duration::ZERO).await;
    mesh.file(
        "pool.yaml",
        r#"
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata: {name: models, namespace: test, annotations: {penstock.io/balance: round-robin}}
spec:
  selector: {matchLabels: {app: shop}}
  targetPorts: [{number: 8000}]
  endpointPickerRef: {name: picker, port: {number: 9002}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: front, namespace: test}
spec:
  parentRefs: [{group: "", kind: Service, name: front}]
  rules:
  - backendRefs: [{group: inference.networking.k8s.io, kind: InferencePool, name: models}]
"#,
    );
    mesh.apply().await;
    let clients = (0..4).map(|_| async {
        let mut client = mesh.client("client").await;
        let mut names = Vec::new();
        for _ in 0..50 {
            let answer = client.ask("GET / HTTP/1.1\r\nhost: front.test\r\n\r\n").await.unwrap();
            assert_eq!(answer.status(), 200, "{}", answer.text());
            names.push(answer.text());
        }
        names
    });
    let mut seen = BTreeMap::<String, usize>::new();
    for name in futures_util::future::join_all(clients).await.into_iter().flatten() {
        *seen.entry(name).or_default() += 1;
    }
    assert!(seen.len() == 2 && seen.values().all(|share| *share >= 80), "{seen:?}");
    let labels = ["direction=\"inbound\"", "service=\"test/models.pool\""];
    counts_are_told().await;
    let told = metric(mesh.admin("a"), "penstock_requests_total", &labels).await
        + metric(mesh.admin("b"), "penstock_requests_total", &labels).await;
    assert!(told > 0.0, "the pods know which pool they were called for");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_stay_on_their_version_while_weights_move() {
    let (mut mesh, _origins) = split_over_two(Mesh::default(), "shop-v1=80,shop-v2=20", 1).await;
    mesh.annotate("shop", &[(annotation::STICKY, "header:x-user")]);
    mesh.apply().await;
    let ask = async |mesh: &Mesh| {
        let mut client = mesh.client("client").await;
        let mut versions = Vec::new();
        for user in 0..500 {
            let request = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nx-user: user-{user}\r\n\r\n");
            versions.push(client.ask(request).await.unwrap().text());
        }
        versions
    };
    let first = ask(&mesh).await;
    assert_eq!(first, ask(&mesh).await, "a user moved though nothing did");
    mesh.split("shop", "shop-v1=60,shop-v2=40");
    mesh.apply().await;
    let second = ask(&mesh).await;
    let count = |versions: &[String], name: &str| versions.iter().filter(|v| *v == name).count();
    let back = first.iter().zip(&second).filter(|(a, b)| *a == "shop-v2" && *b == "shop-v1").count();
    assert_eq!(back, 0, "users of the growing version were moved away from it");
    assert!(count(&first, "shop-v2").abs_diff(100) < 45, "{}", count(&first, "shop-v2"));
    assert!(count(&second, "shop-v2").abs_diff(200) < 55, "{}", count(&second, "shop-v2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_replica_costs_no_request_that_may_be_retried_and_is_ejected() {
    let (mut mesh, mut origins) = replicas(Mesh::default(), &["a", "b", "c"], Duration::from_millis(5)).await;
    // The default policy turns away from what fails before it has failed often enough to be ejected.
    let mut annotations = CARE.to_vec();
    annotations.push((annotation::BALANCE, "least-request"));
    mesh.annotate("shop", &annotations);
    mesh.apply().await;
    let load = load(&mesh);
    load.more(200).await;
    mesh.sidecar("b").kill();
    origins.remove("b");
    load.more(600).await;
    let rows: Vec<EndpointRow> = mesh.page("/endpoints").await;
    let of_b = rows.iter().find(|row| row.endpoint == "test/b").unwrap();
    assert_eq!(of_b.state, "ejected", "{rows:#?}");
    let before = load.so_far();
    load.more(300).await;
    let tally = load.finish().await;
    tally.has_no_failure();
    assert_eq!(tally.share_since(&before, "b"), 0.0);
    assert!(metric(mesh.admin("client"), "penstock_retries_total", &[]).await > 0.0);
}

/// Of a replica that gets no requests nothing would be heard: its sidecar is asked, and the application does not
/// notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_of_which_little_is_known_is_asked() {
    let (mesh, _origins) = replicas(Mesh::default(), &["a", "b", "c", "d"], Duration::from_millis(2)).await;
    let load = Load::start(mesh.outbound("client"), HOST, 1, Duration::from_millis(20));
    load.more(200).await;
    let tally = load.finish().await;
    tally.has_no_failure();
    let probes = metric(mesh.admin("client"), "penstock_probes_total", &["result=\"ok\""]).await;
    assert!(probes > 0.0);
    assert_eq!(metric(mesh.admin("client"), "penstock_probes_total", &["result=\"failed\""]).await, 0.0);
    let mut served = 0.0;
    for pod in ["a", "b", "c", "d"] {
        served += metric(mesh.admin(pod), "penstock_requests_total", &["direction=\"inbound\""]).await;
    }
    // `reaches` has asked, too; a question is no request.
    assert!(served < tally.requests as f64 + 50.0, "{served} of {}", tally.requests);
}

/// The sidecar answers in its application's place, and says that the application has not seen the request: that is
/// tried elsewhere without being declared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_died_behind_its_sidecar_costs_no_request() {
    let (mut mesh, mut origins) = replicas(Mesh::default(), &["a", "b"], Duration::from_millis(2)).await;
    let mut attempts_alone = CARE;
    attempts_alone[0].1 = "attempts=2";
    mesh.annotate("shop", &attempts_alone);
    mesh.apply().await;
    origins.remove("b");
    let load = load(&mesh);
    load.more(300).await;
    let tally = load.finish().await;
    tally.has_no_failure();
    assert!(metric(mesh.admin("client"), "penstock_retries_total", &[]).await > 0.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_drains_loses_no_request() {
    let (mut mesh, mut origins) = replicas(Mesh::default(), &["a", "b"], Duration::from_millis(20)).await;
    // Nothing is declared worth a retry, so a request that had begun and broke would be seen as failed.
    let mut attempts_alone = CARE;
    attempts_alone[0].1 = "attempts=2";
    mesh.annotate("shop", &attempts_alone);
    mesh.apply().await;
    let load = load(&mesh);
    load.more(100).await;
    // As the kubelet and the endpoint controller do it, at the same time and in no order.
    mesh.sidecar("b").terminate();
    mesh.list("b", Listed::Terminating);
    mesh.write();
    let status = mesh.sidecar("b").ended(PATIENCE).await;
    assert!(status.success(), "{status}");
    origins.remove("b");
    mesh.list("b", Listed::Not);
    mesh.write();
    load.more(200).await;
    load.finish().await.has_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_a_replica_that_is_no_longer_listed_are_closed() {
    let (mut mesh, _origins) = replicas(Mesh::default(), &["a", "b"], Duration::ZERO).await;
    let load = load(&mesh);
    wait_until("b has been called", PATIENCE, async || load.so_far().by.contains_key("b")).await;
    let with_client = mesh.sidecar("b").files();
    mesh.list("b", Listed::Not);
    mesh.apply().await;
    wait_until("the client's sidecar has let go of b", PATIENCE, async || {
        mesh.sidecar("b").files() < with_client
    })
    .await;
    load.finish().await.has_no_failure();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_control_nothing_fails_and_with_it_back_the_new_weight_applies() {
    let time = match std::env::var_os("PENSTOCK_LONG") {
        Some(_) => Duration::from_secs(60),
        None => Duration::from_secs(8),
    };
    let mesh = Mesh::default().leaf_lifetime("5m");
    let (mut mesh, _origins) = split_over_two(mesh, "shop-v1=100,shop-v2=0", 2).await;
    let load = load(&mesh);
    load.more(200).await;
    mesh.kill_control();
    mesh.split("shop", "shop-v1=0,shop-v2=100");
    mesh.write();
    let before = load.so_far();
    tokio::time::sleep(time).await;
    let share = load.so_far().share_since(&before, "shop-v2");
    assert_eq!(share, 0.0, "nobody can have known of the new weight");
    mesh.start_control().await;
    wait_until("the new weight is in force", PATIENCE * 2, async || {
        let before = load.so_far();
        load.more(50).await;
        load.so_far().share_since(&before, "shop-v2") == 1.0
    })
    .await;
    load.finish().await.has_no_failure();
    wait_until("control knows that all have applied", PATIENCE, async || {
        let status = mesh.status().await;
        status.proxies.iter().filter(|proxy| proxy.connected).count() == 5 && status.all_applied()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_control_or_a_sidecar_must_refuse_holds_up_nothing_else() {
    let (mut mesh, _origins) = split_over_two(Mesh::default(), "shop-v1=100,shop-v2=0", 1).await;
    // Weights that sum to 0, a file that does not parse, a backend that is not there; and one good change.
    mesh.file("garbage.yaml", "kind: Service\n  metadata: [what\n");
    mesh.file(
        "route.yaml",
        "apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: regex, namespace: test}\nspec:\n  \
         parentRefs: [{group: \"\", kind: Service, name: shop-v1, port: 80}]\n  rules:\n  - matches:\n    \
         - path: {type: RegularExpression, value: \"/([a-z\"}\n    backendRefs: [{name: shop-v1, port: 80}]\n",
    );
    mesh.split("shop-v2", "shop-v1=0,shop-v2=0");
    mesh.split("shop", "shop-v1=0,shop-v2=100");
    mesh.write();
    wait_until("the good change is in force", PATIENCE, async || {
        let request = format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n");
        mesh.client("client").await.ask(request).await.is_ok_and(|answer| answer.text() == "shop-v2")
    })
    .await;
    // The regular expression is refused by control, or by the sidecar as a NACK; either way it is told.
    wait_until("the three faults are told", PATIENCE, async || {
        let problems: Vec<Problem> = mesh.page("/problems").await;
        let refused = mesh.status().await.proxies.iter().any(|proxy| !proxy.refused.is_empty());
        let told = |word: &str| {
            problems.iter().any(|p| format!("{} {} {}", p.file, p.object, p.message).contains(word))
        };
        told("garbage.yaml") && told("sum to 0") && (told("regex") || refused)
    })
    .await;
    let answer =
        mesh.client("client").await.ask("GET / HTTP/1.1\r\nhost: shop-v1.test\r\n\r\n").await.unwrap();
    assert_eq!(answer.status(), 200, "the last good routes of shop-v1 are gone: {answer:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_that_is_bad_or_of_somebody_else_gives_no_certificate() {
    let mut mesh = Mesh::default().pod("a", None).pod("b", None).pod("c", None).start().await;
    let good = std::fs::read_to_string(mesh.token("a")).unwrap();
    let expired =
        mesh.control_command("token", &["--namespace", "test", "--service-account", "c", "--lifetime", "0s"]);
    for (pod, token) in [("b", good.as_str()), ("a", "nonsense"), ("c", expired.as_str())] {
        mesh.sidecar(pod).kill();
        std::fs::write(mesh.token(pod), token).unwrap();
        mesh.start_sidecar(pod);
    }
    for pod in ["a", "b", "c"] {
        wait_until(&format!("{pod} says why it has no certificate"), PATIENCE, async || {
            let said = mesh.sidecar(pod).said().to_lowercase();
            said.contains("token") && (said.contains("warn") || said.contains("error"))
        })
        .await;
        let ready = penstock_tests::testkit::wire::get(mesh.admin(pod), "/ready").await.unwrap();
        assert_eq!(ready.status(), 503, "{}", ready.text());
    }
    // And with the right token again all is well, without a restart.
    std::fs::write(mesh.token("a"), good).unwrap();
    mesh.sidecar_is_ready("a").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pain_8_certificates_and_then_the_root_change_under_load() {
    let mesh = Mesh::default().leaf_lifetime("4s");
    let (mesh, _origins) = replicas(mesh, &["a", "b"], Duration::from_millis(2)).await;
    let load = load(&mesh);
    let changes = async |times: usize| {
        for _ in 0..times {
            for pod in ["client", "a", "b"] {
                let before = mesh.serial(pod).await;
                wait_until(&format!("{pod} has a new certificate"), PATIENCE, async || {
                    mesh.serial(pod).await != before
                })
                .await;
            }
        }
    };
    changes(2).await;
    let root = std::fs::read_to_string(mesh.state().join("root.pem")).unwrap();
    mesh.control_command("rotate-root", &[]);
    changes(2).await;
    wait_until("the new root is the root", PATIENCE, async || {
        std::fs::read_to_string(mesh.state().join("root.pem")).unwrap() != root
    })
    .await;
    changes(2).await;
    let tally = load.finish().await;
    tally.has_no_failure();
    assert_eq!(tally.by.len(), 2, "{tally:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stat_and_tap_show_what_the_load_does() {
    let (mesh, _origins) = split_over_two(Mesh::default(), "shop-v1=50,shop-v2=50", 1).await;
    let load = load(&mesh);
    load.more(500).await;
    wait_until("stat has both versions", PATIENCE, async || {
        let stat: Stat = mesh.page("/stat?window=10s").await;
        let rows: Vec<_> = stat
            .rows
            .iter()
            .filter(|row| row.direction == "outbound" && row.service == "test/shop")
            .collect();
        rows.len() == 2
            && rows.iter().all(|row| {
                row.requests > 100
                    && row.success == Some(1.0)
                    && row.mtls == Some(1.0)
                    && row.share_asked == Some(0.5)
                    && row.share.is_some_and(|share| (share - 0.5).abs() < 0.1)
            })
    })
    .await;
    let mut tap = Wire::connect(mesh.api()).await;
    tap.send("GET /tap?service=test/shop&direction=outbound&limit=5 HTTP/1.1\r\nhost: c\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let events = tap.response().await.unwrap().text();
    let events: Vec<Tap> = events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(events.len(), 5);
    for event in events {
        assert_eq!((event.status, event.service.as_str(), event.mtls), (200, "test/shop", true), "{event:?}");
        assert!(event.server.ends_with("-a") && event.method == "GET", "{event:?}");
    }
    load.finish().await.has_no_failure();
}

/// Some requests, as taps show them.
async fn tapped(mesh: &Mesh, query: &str) -> Vec<Tap> {
    let mut tap = Wire::connect(mesh.api()).await;
    let request = format!("GET /tap?limit=20{query} HTTP/1.1\r\nhost: c\r\nconnection: close\r\n\r\n");
    tap.send(request).await.unwrap();
    let events = tap.response().await.unwrap().text();
    events.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tap_explains_a_choice_while_somebody_asks() {
    let (mesh, _origins) = split_over_two(Mesh::default(), "shop-v1=50,shop-v2=50", 2).await;
    let load = load(&mesh);
    load.more(100).await;
    for (event, decision) in explained(&mesh, "&service=test/shop").await {
        assert_eq!((decision.policy.as_str(), decision.endpoints), ("gpu", 2), "{event:?}");
        let picked: Vec<_> = decision.candidates.iter().filter(|candidate| candidate.picked).collect();
        assert_eq!(picked.len(), 1, "{event:?}");
        assert_eq!(picked[0].endpoint, event.endpoint, "{event:?}");
        assert_eq!(decision.candidates.len(), 2, "{event:?}");
        assert!(picked[0].predicted_ms.is_some() && picked[0].report_age_ms.is_some(), "{event:?}");
    }
    for query in ["&direction=outbound", "&direction=inbound&explain=true"] {
        for event in tapped(&mesh, query).await {
            assert_eq!(event.decision, None, "{event:?}");
        }
    }
    load.finish().await.has_no_failure();
}

/// The same with how their endpoints were chosen; those that had begun before the tap was opened do not tell.
async fn explained(mesh: &Mesh, query: &str) -> Vec<(Tap, Decision)> {
    let events = tapped(mesh, &format!("{query}&direction=outbound&explain=true")).await;
    let explained: Vec<_> =
        events.into_iter().filter_map(|tap| tap.decision.clone().map(|decision| (tap, decision))).collect();
    assert!(explained.len() >= 10, "{explained:?}");
    explained
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_and_its_parameters_are_changed_under_load_without_a_failure() {
    let (mut mesh, _origins) = replicas(Mesh::default(), &["a", "b", "c"], Duration::from_millis(2)).await;
    let load = load(&mesh);
    for (balance, policy, looked_at) in [
        ("gpu,choices=2,explore=0,hot=90%", "gpu", 2),
        ("least-request", "least-request", 2),
        ("prefix,choices=2,explore=0", "prefix", 2),
        ("ring-hash,bound=1.5", "ring-hash", 1),
        ("orca-wrr", "orca-wrr", 1),
        ("round-robin", "round-robin", 1),
        ("gpu", "gpu", 3),
    ] {
        mesh.annotate("shop", &[(annotation::BALANCE, balance)]);
        mesh.apply().await;
        load.more(50).await;
        for (event, decision) in explained(&mesh, "").await {
            assert_eq!(
                (decision.policy.as_str(), decision.candidates.len()),
                (policy, looked_at),
                "{event:?}"
            );
        }
    }
    // What makes no sense is named, and what was in force stays so.
    mesh.annotate("shop", &[(annotation::BALANCE, "gpu,choices=1")]);
    mesh.write();
    wait_until("control complains", PATIENCE, async || {
        let status = mesh.status().await;
        status.problems.iter().any(|problem| problem.message.contains("choices: \"1\" is not"))
    })
    .await;
    load.more(50).await;
    load.finish().await.has_no_failure();
}

/// A server that plays vLLM with one adapter, and answers with its name.
async fn vllm(address: SocketAddr, name: &'static str, adapter: &'static str) -> Origin {
    let models = format!(r#"{{"object":"list","data":[{{"id":"base"}},{{"id":"{adapter}"}}]}}"#);
    Origin::start_at(address, move |mut client| {
        let models = models.clone();
        async move {
            while let Ok(request) = client.request().await {
                let body = match request.head.first.split(' ').nth(1) {
                    Some("/metrics") => "vllm:num_requests_waiting 0\nvllm:num_requests_running 0\n",
                    Some("/v1/models") => models.as_str(),
                    _ => name,
                };
                let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
                if client.send(answer).await.is_err() {
                    return;
                }
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_goes_where_its_adapter_is_loaded() {
    let mesh =
        Mesh::default().pod("client", None).service("llm", &CARE).pod("a", Some("llm")).pod("b", Some("llm"));
    let _servers =
        [vllm(mesh.application("a"), "a", "sql").await, vllm(mesh.application("b"), "b", "poetry").await];
    let mesh = mesh.start().await;
    mesh.reaches("client", "llm").await;
    let mut client = mesh.client("client").await;
    let mut ask = async |model: &str| {
        let body = format!(r#"{{"model":"{model}","prompt":"x","max_tokens":1}}"#);
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: llm.test\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        client.ask(request).await.unwrap().text()
    };
    // The sidecars find the pages, are asked, and tell.
    let mut right = 0;
    wait_until("ten pairs in a row go to the right ones", PATIENCE, async || {
        right = if ask("sql").await == "a" && ask("poetry").await == "b" { right + 1 } else { 0 };
        right >= 10
    })
    .await;
    for (model, looked_at) in [("sql", 1), ("base", 2), ("nobody-has-this", 2)] {
        // Ten pairs can be right by the one server's list alone; the other's may come later.
        wait_until(&format!("{looked_at} are looked at for {model}"), PATIENCE, async || {
            let seen = Cell::new(false);
            let watch = async {
                let choices = explained(&mesh, "").await;
                seen.set(true);
                choices
            };
            let go_on = async {
                while !seen.get() {
                    ask(model).await;
                }
            };
            let choices = tokio::join!(watch, go_on).0;
            assert!(choices.iter().all(|(event, _)| event.status == 200), "{model}: {choices:?}");
            choices.iter().all(|(_, decision)| decision.candidates.len() == looked_at)
        })
        .await;
    }
}
