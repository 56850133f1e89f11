//! Who may ask whom for what: access policies through real sidecars, from the YAML of the policy to the answer.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::time::Duration;

use penstock_api::names::annotation;
use penstock_api::view::Authz;
use penstock_inference::oip::grpc::Contents;
use penstock_inference::oip::{InferRequest, Tensor};
use penstock_tests::testkit::ask::{Ask, Client, Form};
use penstock_tests::testkit::certificates::spiffe;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::{Origin, unimplemented};
use penstock_tests::testkit::proxy::metric;
use penstock_tests::testkit::wire::{Message, Wire};
use penstock_tests::testkit::{PATIENCE, wait_until};
use tokio::time::{Instant, timeout};

/// A policy about the Service `shop`.
fn policy(name: &str, spec: &str) -> String {
    format!(
        "---\napiVersion: penstock.io/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: {name}, namespace: test}}\nspec:\n  \
         targetRefs: [{{kind: Service, name: shop}}]\n{spec}"
    )
}

fn allow(rules: &str) -> String {
    policy("p", &format!("  action: Allow\n  rules: {rules}\n"))
}

/// An application that shows what it was asked, and two clients.
async fn shop(mesh: Mesh) -> (Mesh, Origin) {
    let mesh = mesh.service("shop", &[]).pod("front", None).pod("other", None).pod("server", Some("shop"));
    let origin = Origin::start_at(mesh.application("server"), |mut client| async move {
        while let Ok(request) = client.request().await {
            let headers = request.head.headers.iter().map(|(name, value)| format!("{name}: {value}\n"));
            let body = format!("{}\n{}", request.head.first, headers.collect::<String>());
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            if client.send(answer).await.is_err() {
                return;
            }
        }
    })
    .await;
    let mesh = mesh.start().await;
    for client in ["front", "other"] {
        mesh.reaches(client, "shop").await;
    }
    (mesh, origin)
}

fn request(method: &str, path: &str, more: &str, body: &str) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: shop.test\r\ncontent-length: {}\r\n{more}\r\n{body}",
        body.len()
    )
}

async fn ask(mesh: &Mesh, from: &str, method: &str, path: &str, body: &str) -> Message {
    mesh.client(from).await.ask(request(method, path, "", body)).await.unwrap()
}

async fn get(mesh: &Mesh, from: &str, path: &str) -> Message {
    ask(mesh, from, "GET", path, "").await
}

fn denied(answer: &Message) -> bool {
    (answer.status(), answer.reason()) == (403, Some("not-authorized"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_holds_for_open_connections_within_a_second_and_says_who_denied() {
    let (mut mesh, _origin) = shop(Mesh::default()).await;
    let (mut front, mut other) = (mesh.client("front").await, mesh.client("other").await);
    let plain = request("GET", "/x", "", "");
    for wire in [&mut front, &mut other] {
        assert_eq!(wire.ask(&plain).await.unwrap().status(), 200, "without a policy everybody may");
    }

    mesh.file("access.yaml", &allow("[{name: front only, from: [{serviceAccounts: [front]}]}]"));
    let begun = Instant::now();
    mesh.write();
    let answer = loop {
        let answer = other.ask(&plain).await.unwrap();
        if answer.status() != 200 {
            break answer;
        }
        assert!(begun.elapsed() < Duration::from_secs(1), "not within a second");
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(denied(&answer), "{answer:?}");
    let story = answer.text();
    assert!(story.contains(&spiffe("other")) && story.contains("AccessPolicy test/p"), "{story}");
    assert_eq!(front.ask(&plain).await.unwrap().status(), 200);
    // The connection is none the worse, and a denial is counted by its policy.
    assert!(denied(&other.ask(&plain).await.unwrap()));
    let labels = [r#"policy="test/p""#, r#"verdict="denied""#];
    wait_until("denials are counted", PATIENCE, async || {
        metric(mesh.admin("server"), "penstock_access_refusals_total", &labels).await >= 2.0
    })
    .await;

    // Control says the same, by the same code.
    let asked = async |who: &str| -> Authz {
        let id = spiffe(who).replace(':', "%3A").replace('/', "%2F");
        mesh.page(&format!("/authz?pod=server&from={id}&method=GET&path=%2Fx")).await
    };
    let verdict = asked("other").await.verdict.unwrap();
    assert!(
        !verdict.allowed && story.contains(verdict.story.strip_prefix("not-authorized: ").unwrap()),
        "{verdict:?}"
    );
    let answer = asked("front").await;
    assert_eq!((answer.applied, answer.verdict.unwrap().allowed), (Some(true), true));

    // It goes, and all is as before.
    mesh.file("access.yaml", "");
    mesh.write();
    wait_until("everybody may again", PATIENCE, async || other.ask(&plain).await.unwrap().status() == 200)
        .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_disguise_of_a_path_leads_past_a_deny() {
    let (mut mesh, _origin) = shop(Mesh::default()).await;
    assert!(
        get(&mesh, "front", "/a//b/../c").await.text().starts_with("GET /a//b/../c "),
        "nobody decides by it"
    );
    let deny = policy("d", "  action: Deny\n  rules: [{to: [{paths: [/admin/*], notMethods: [OPTIONS]}]}]\n");
    mesh.file("access.yaml", &deny);
    mesh.apply().await;
    for path in [
        "/admin",
        "/admin/",
        "/admin/x",
        "/admin?q",
        "//admin",
        "/./admin",
        "/x/../admin",
        "/%61dmin",
        "/x/..//admin/y",
    ] {
        let answer = get(&mesh, "front", path).await;
        assert!(denied(&answer), "{path}: {answer:?}");
        assert!(answer.text().contains("rule 1 of AccessPolicy test/d denies it"), "{answer:?}");
    }
    for path in
        ["/x/%2e%2e/admin", "/x%2f..%2fadmin", "/x\\..\\admin", "/%2561dmin", "/x/..;/admin", "/%c0%afadmin"]
    {
        let answer = get(&mesh, "front", path).await;
        assert_eq!((answer.status(), answer.reason()), (400, Some("bad-request")), "{path}: {answer:?}");
    }
    for (path, seen) in [("/administrator", "/administrator"), ("/a//b/../%7ec?x=/../", "/a/~c?x=/../")] {
        let answer = get(&mesh, "front", path).await;
        assert_eq!(answer.status(), 200, "{path}: {answer:?}");
        assert!(
            answer.text().starts_with(&format!("GET {seen} ")),
            "the application sees what was decided by: {answer:?}"
        );
    }
    assert_eq!(ask(&mesh, "front", "OPTIONS", "/admin", "").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_audit_tells_what_would_be_denied_and_changes_nothing() {
    let (mut mesh, _origin) = shop(Mesh::default()).await;
    let audit = policy("try", "  action: Audit\n  rules: [{from: [{serviceAccounts: [front]}]}]\n");
    mesh.file("access.yaml", &audit);
    mesh.apply().await;
    let mut tap = Wire::connect(mesh.api()).await;
    tap.send("GET /tap?direction=inbound&limit=1 HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert_eq!(tap.head().await.unwrap().status(), 200);
    let told = async { tap.chunk().await.unwrap().unwrap() };
    let asking = async {
        loop {
            assert_eq!(get(&mesh, "other", "/").await.status(), 200);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let told = tokio::select! {
        told = timeout(PATIENCE, told) => told.unwrap(),
        () = asking => Vec::new(),
    };
    let told = String::from_utf8(told).unwrap();
    assert!(told.contains("would-deny"), "{told}");
    let counted = async |verdict| {
        metric(mesh.admin("server"), "penstock_access_refusals_total", &[r#"policy="test/try""#, verdict])
            .await
    };
    wait_until("it is counted", PATIENCE, async || counted(r#"verdict="would-deny""#).await >= 1.0).await;
    assert_eq!(counted(r#"verdict="denied""#).await, 0.0);
    let before = counted(r#"verdict="would-deny""#).await;
    assert_eq!(get(&mesh, "front", "/").await.status(), 200);
    assert_eq!(counted(r#"verdict="would-deny""#).await, before, "the front would be allowed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_an_audit_asks_for_leaves_requests_as_they_are() {
    let mesh = Mesh::default().service("shop", &[]).pod("front", None).pod("server", Some("shop"));
    // It answers as soon as it is asked, whatever is still to come.
    let _origin = Origin::start_at(mesh.application("server"), |mut client| async move {
        while let Ok(head) = client.head().await {
            let length = head.first.len();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{}", head.first);
            if client.send(answer).await.is_err() {
                return;
            }
        }
    })
    .await;
    let mut mesh = mesh.start().await;
    mesh.reaches("front", "shop").await;
    let try_it = |to: &str| {
        policy("try", &format!("  action: Audit\n  rehearse: Deny\n  rules: [{{to: [{{{to}}}]}}]\n"))
    };
    let labels = [r#"policy="test/try""#, r#"verdict="would-deny""#];
    let told = async |mesh: &Mesh, count: f64| {
        wait_until("what would be denied is counted", PATIENCE, async || {
            metric(mesh.admin("server"), "penstock_access_refusals_total", &labels).await == count
        })
        .await;
    };
    mesh.file("access.yaml", &try_it("paths: [/a/c/*]"));
    mesh.apply().await;
    for path in ["/a%2Fb//c", "/a//c/%7e", "/x"] {
        let answer = get(&mesh, "front", path).await;
        assert_eq!(answer.status(), 200, "{path}: {answer:?}");
        assert!(answer.text().starts_with(&format!("GET {path} ")), "{path}: {answer:?}");
    }
    told(&mesh, 2.0).await;

    // A body that comes slowly is passed on as it comes.
    mesh.file("access.yaml", &try_it("models: [gpt]"));
    mesh.apply().await;
    let mut slow = mesh.client("front").await;
    let head = request("POST", "/v1/chat/completions", "", "").replace("length: 0", "length: 100");
    slow.send(head + r#"{"model":"#).await.unwrap();
    let answer = timeout(Duration::from_secs(1), slow.response()).await.unwrap().unwrap();
    assert_eq!(answer.status(), 200, "the application is asked though the body is not whole");
    told(&mesh, 3.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rule_on_the_host_sees_it_behind_a_sidecar_too() {
    let (mut mesh, _origin) = shop(Mesh::default()).await;
    let deny =
        policy("d", "  action: Deny\n  rules: [{when: {headers: [{name: Host, values: [shop.test]}]}}]\n");
    mesh.file("access.yaml", &deny);
    mesh.apply().await;
    assert!(denied(&get(&mesh, "front", "/").await));
    let other = request("GET", "/", "", "").replace("shop.test", "shop.test.svc");
    assert_eq!(mesh.client("front").await.ask(other).await.unwrap().status(), 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_for_whom_a_policy_says_in_every_protocol() {
    let (mut mesh, _origin) = shop(Mesh::default().grpc()).await;
    let server = unimplemented(mesh.application_grpc("server")).await;
    mesh.file(
        "access.yaml",
        &allow("[{from: [{serviceAccounts: [front]}], to: [{models: [digits, \"llama*\"]}]}]"),
    );
    mesh.apply().await;

    // The Open Inference Protocol over REST, and OpenAI's API.
    let infer = |model: &str| format!("/v2/models/{model}/infer");
    let chat = |body: &str| ("/v1/chat/completions".to_owned(), body.to_owned());
    let large = format!(r#"{{"messages":["{}"],"model":"llama-3"}}"#, "x".repeat(200_000));
    let mut table = vec![
        ((infer("digits"), "{}".to_owned()), true),
        ((infer("digits/versions/2"), "{}".to_owned()), true),
        ((infer("%64igits"), "{}".to_owned()), true),
        ((infer("faces"), "{}".to_owned()), false),
        ((infer("x/../faces"), "{}".to_owned()), false),
        (chat(r#"{"model":"llama-3","messages":[]}"#), true),
        (chat(&large), true),
        (chat(r#"{"model":"gpt","messages":[]}"#), false),
        (chat(r#"{"model":"llama-3","model":"gpt"}"#), false),
        (chat(r#"{"model":"llama-3","mod\u0065l":"gpt"}"#), false),
        (chat(r#"{"messages":[]}"#), false),
        (("/upload".to_owned(), "x".to_owned()), false),
    ];
    table.push(((infer("digits"), "x".repeat(300_000)), true));
    for ((path, body), allowed) in &table {
        let answer = ask(&mesh, "front", "POST", path, body).await;
        let short = &body[..body.len().min(80)];
        assert_eq!(answer.status() == 200, *allowed, "{path} {short}: {answer:?}");
        assert!(*allowed || denied(&answer), "{path} {short}: {answer:?}");
        assert!(denied(&ask(&mesh, "other", "POST", path, body).await), "{path} {short}");
    }

    // A body that comes slowly does not hide its model.
    let mut slow = mesh.client("front").await;
    let body = r#"{"messages":[],"model":"gpt"}"#;
    slow.send(
        request("POST", "/v1/chat/completions", "", "")
            .replace("length: 0", &format!("length: {}", body.len())),
    )
    .await
    .unwrap();
    for piece in body.as_bytes().chunks(8) {
        tokio::time::sleep(Duration::from_millis(80)).await;
        slow.send(piece).await.unwrap();
    }
    assert!(denied(&slow.response().await.unwrap()));

    // And over gRPC.
    for (who, model, code) in [("front", "digits", 12), ("front", "faces", 7), ("other", "digits", 7)] {
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
        let answer = Client::through(&mesh, who, "shop").ask(&asked).await.unwrap();
        let (status, words) = answer.said.unwrap_err();
        assert_eq!(status, code, "{who} {model}: {words}");
        let words_of_ours = words.contains("AccessPolicy test/p");
        assert_eq!(words_of_ours, code == 7, "{who} {model}: {words}");
    }
    server.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_calls_is_said_by_proxies_and_by_nobody_else() {
    let mesh = Mesh::default().service("shop", &[]).pod("server", Some("shop"));
    let mesh = mesh.annotate_pod("server", annotation::FORWARD_IDENTITY, "true");
    let mesh = mesh.pod("front", None);
    let origin = Origin::start_at(mesh.application("server"), |mut client| async move {
        while let Ok(request) = client.request().await {
            let headers = request.head.headers.iter().map(|(name, value)| format!("{name}: {value}\n"));
            let body: String = headers.collect();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            if client.send(answer).await.is_err() {
                return;
            }
        }
    })
    .await;
    let mesh = mesh.start().await;
    mesh.reaches("front", "shop").await;
    let forged = "penstock-client-id: spiffe://cluster.local/ns/test/sa/root\r\npenstock-whatever: 1\r\n\
        x-forwarded-client-cert: By=x;Hash=y;URI=spiffe://cluster.local/ns/test/sa/root\r\n\
        forwarded-client-cert: z\r\npenstock-session: mine\r\n";
    let answer = mesh.client("front").await.ask(request("GET", "/", forged, "")).await.unwrap();
    let text = answer.text();
    let line = |name: &str| -> Vec<String> {
        let begin = format!("{name}: ");
        text.lines().filter_map(|line| Some(line.strip_prefix(&begin)?.to_owned())).collect()
    };
    assert_eq!(line("penstock-client-id"), [spiffe("front")], "{text}");
    assert_eq!((line("penstock-whatever"), line("forwarded-client-cert")), (vec![], vec![]), "{text}");
    assert_eq!(line("penstock-session"), ["mine"], "{text}");
    let forwarded = line("x-forwarded-client-cert");
    let [forwarded] = &forwarded[..] else { panic!("{text}") };
    let parts: Vec<&str> = forwarded.split(';').collect();
    let [by, hash, uri] = parts[..] else { panic!("{forwarded}") };
    assert_eq!((by, uri), (&*format!("By={}", spiffe("server")), &*format!("URI={}", spiffe("front"))));
    let hash = hash.strip_prefix("Hash=").unwrap();
    assert!(hash.len() == 64 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()), "{forwarded}");
    drop(origin);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_that_cannot_be_read_closes_what_it_is_about_until_it_can() {
    let (mut mesh, _origin) = shop(Mesh::default()).await;
    mesh.file("access.yaml", &allow("[{to: [{paths: [admin]}]}]"));
    mesh.apply().await;
    let answer = get(&mesh, "front", "/").await;
    assert!(denied(&answer), "{answer:?}");
    assert!(
        answer.text().contains("AccessPolicy test/p cannot be read")
            && answer.text().contains("access.yaml:")
    );
    let good = allow("[{from: [{serviceAccounts: [front]}]}]");
    mesh.file("access.yaml", &good);
    mesh.apply().await;
    assert_eq!(get(&mesh, "front", "/").await.status(), 200);
    // Once it was good, a bad version changes nothing, though control starts anew meanwhile.
    mesh.file("access.yaml", &good.replace("serviceAccounts", "serviceAcounts"));
    // What is accepted is written after it was pushed; a control that is killed in between comes back without it, and closes.
    wait_until("the good version is kept", PATIENCE, async || {
        std::fs::read_to_string(mesh.state().join("accepted.json"))
            .is_ok_and(|kept| kept.contains(r#"["front"]"#))
    })
    .await;
    mesh.write();
    mesh.kill_control();
    mesh.start_control().await;
    wait_until("the new control has told everybody", PATIENCE, async || {
        let status = mesh.status().await;
        status.proxies.iter().filter(|proxy| proxy.connected).count() == 3
            && status.all_applied()
            && status.problems.iter().any(|problem| problem.last_good_in_force)
    })
    .await;
    assert_eq!(get(&mesh, "front", "/").await.status(), 200);
    assert!(denied(&get(&mesh, "other", "/").await));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_proves_nothing_is_nobody_and_a_probe_is_let_through() {
    let mesh = Mesh::default().pod("open", Some("open")).service("open", &[]).probe("open", "/ready");
    let (mut mesh, _origin) = shop(mesh.annotate_pod("open", annotation::MTLS, "permissive")).await;
    let _application = Origin::named(mesh.application("open"), "open", Duration::ZERO).await;
    let plain = async |pod: &str, method: &str, path: &str| {
        let mut wire = Wire::connect(mesh.inbound(pod)).await;
        wire.ask(format!("{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n")).await.unwrap()
    };
    assert_eq!(
        plain("open", "GET", "/").await.status(),
        200,
        "without a policy a permissive pod takes everybody"
    );
    assert_eq!(plain("server", "GET", "/").await.reason(), Some("plaintext-refused"));
    let about_open = |rules: &str| allow(rules).replace("name: shop", "name: open");
    let policy = about_open("[{from: [{identities: [\"*\"]}]}]");
    mesh.file("access.yaml", &policy);
    mesh.apply().await;
    let plain = async |pod: &str, method: &str, path: &str| {
        let mut wire = Wire::connect(mesh.inbound(pod)).await;
        wire.ask(format!("{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n")).await.unwrap()
    };
    let answer = plain("open", "GET", "/").await;
    assert!(denied(&answer) && answer.text().contains("without an identity"), "{answer:?}");
    assert_eq!(plain("open", "GET", "/ready").await.status(), 200);
    assert!(denied(&plain("open", "POST", "/ready").await));
    assert!(denied(&plain("open", "GET", "/ready/").await));
    mesh.reaches("front", "open").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_that_are_no_longer_allowed_end() {
    let mesh = Mesh::default().protocol("tcp").service("shop", &[]).pod("server", Some("shop"));
    let mesh = mesh.annotate_pod("server", annotation::MTLS, "permissive");
    let _origin = Origin::start_at(mesh.application("server"), |mut client| async move {
        while let Ok(bytes) = client.bytes(4).await {
            if client.send(bytes).await.is_err() {
                return;
            }
        }
    })
    .await;
    let mut mesh = mesh.start().await;
    mesh.file("access.yaml", &allow("[{to: [{ports: [8000]}]}]"));
    mesh.apply().await;
    let mut open = Wire::connect(mesh.inbound("server")).await;
    open.send("ping").await.unwrap();
    assert_eq!(open.bytes(4).await.unwrap(), b"ping", "a rule by port matches bytes");

    mesh.file("access.yaml", &allow("[{to: [{methods: [GET]}]}]"));
    let begun = Instant::now();
    mesh.write();
    assert_eq!(timeout(PATIENCE, open.rest()).await.unwrap(), b"");
    assert!(begun.elapsed() < Duration::from_secs(1), "only after {:?}", begun.elapsed());
    let mut again = Wire::connect(mesh.inbound("server")).await;
    again.send("ping").await.unwrap();
    assert_eq!(
        timeout(PATIENCE, again.rest()).await.unwrap(),
        b"",
        "a rule that asks for HTTP never matches bytes"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_refused_over_a_connection_is_asked_anew_with_each_request() {
    let mesh = Mesh::default().pod("server", None).annotate_pod("server", annotation::MTLS, "permissive");
    let mut mesh = mesh.start().await;
    let at = mesh.application("server");
    let _application = Origin::named(at, "server", Duration::ZERO).await;
    // The proxy is called before it has heard that anything leads here.
    let mut wire = Wire::connect(mesh.inbound("server")).await;
    let mut ask = async || {
        let answer = wire.ask("GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        (answer.status(), answer.reason().map(str::to_owned))
    };
    let refused = |reason: &str| Some(reason.to_owned());
    assert_eq!(ask().await, (404, refused("unknown-port")));
    let service = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: shop, namespace: test}}\nspec:\n  ports: [{{name: http, port: 80, \
         targetPort: 8000}}]\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: shop-1\n  namespace: \
         test\n  labels: {{kubernetes.io/service-name: shop}}\naddressType: IPv4\nports: [{{name: http, port: 8000}}]\nendpoints:\n\
         - addresses: [{}]\n  conditions: {{ready: true}}\n  targetRef: {{kind: Pod, namespace: test, name: server}}\n",
        at.ip()
    );
    mesh.file("shop.yaml", &service);
    mesh.apply().await;
    assert_eq!(ask().await, (200, None));
    // HTTP/1.0 names no host, and there is no doubt which port is meant.
    let mut old = Wire::connect(mesh.inbound("server")).await;
    assert_eq!(old.ask("GET / HTTP/1.0\r\n\r\n").await.unwrap().status(), 200);
    let mut new = Wire::connect(mesh.inbound("server")).await;
    assert_eq!(new.ask("GET / HTTP/1.1\r\n\r\n").await.unwrap().status(), 400);
    // And so with what the pod takes.
    for (mode, expected) in [("strict", (403, refused("plaintext-refused"))), ("permissive", (200, None))] {
        mesh = mesh.annotate_pod("server", annotation::MTLS, mode);
        mesh.apply().await;
        assert_eq!(ask().await, expected, "{mode}");
    }
}

/// A permissive pod whose application says everything back, and a connection of bytes to it.
async fn echo(protocol: &'static str) -> (Mesh, Origin, Wire) {
    let mesh = Mesh::default().protocol(protocol).service("shop", &[]).pod("server", Some("shop"));
    let mesh = mesh.annotate_pod("server", annotation::MTLS, "permissive").start().await;
    let origin = Origin::start_at(mesh.application("server"), |mut client| async move {
        while let Ok(bytes) = client.bytes(4).await {
            if client.send(bytes).await.is_err() {
                return;
            }
        }
    })
    .await;
    let mut open = Wire::connect(mesh.inbound("server")).await;
    open.send("\r\n\r\n").await.unwrap();
    assert_eq!(open.bytes(4).await.unwrap(), b"\r\n\r\n");
    (mesh, origin, open)
}

/// That a change ends the connection within a second, and refuses the next one.
async fn ends(mesh: &Mesh, mut open: Wire) {
    let begun = Instant::now();
    mesh.write();
    assert_eq!(timeout(PATIENCE, open.rest()).await.unwrap(), b"");
    assert!(begun.elapsed() < Duration::from_secs(1), "only after {:?}", begun.elapsed());
    let mut again = Wire::connect(mesh.inbound("server")).await;
    again.send("\r\n\r\n").await.unwrap();
    assert_eq!(timeout(PATIENCE, again.rest()).await.unwrap(), b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_end_once_a_deny_asks_for_what_nobody_can_tell_of_them() {
    let (mut mesh, _origin, mut open) = echo("example.com/any").await;
    // One that only reports tells so, and changes nothing.
    let deny = policy("d", "  action: Deny\n  rules: [{to: [{paths: [/admin/*]}]}]\n");
    mesh.file("access.yaml", &deny.replace("action: Deny", "action: Audit\n  rehearse: Deny"));
    mesh.apply().await;
    open.send("ping").await.unwrap();
    assert_eq!(open.bytes(4).await.unwrap(), b"ping");
    let mut again = Wire::connect(mesh.inbound("server")).await;
    again.send("\r\n\r\n").await.unwrap();
    assert_eq!(again.bytes(4).await.unwrap(), b"\r\n\r\n");
    let labels = [r#"policy="test/d""#, r#"verdict="would-deny""#];
    wait_until("what would be denied is counted", PATIENCE, async || {
        metric(mesh.admin("server"), "penstock_access_refusals_total", &labels).await == 1.0
    })
    .await;
    mesh.file("access.yaml", &deny);
    ends(&mesh, open).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_in_plaintext_end_once_the_pod_takes_only_mutual_tls() {
    let (mesh, _origin, open) = echo("tcp").await;
    let mesh = mesh.annotate_pod("server", annotation::MTLS, "strict");
    ends(&mesh, open).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_web_socket_that_is_no_longer_allowed_ends() {
    let mesh = Mesh::default().service("shop", &[]).pod("server", Some("shop")).pod("front", None);
    let _origin = Origin::start_at(mesh.application("server"), |mut client| async move {
        while let Ok(request) = client.request().await {
            if request.head.get("upgrade").is_none() {
                let _ = client.send("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
                continue;
            }
            let agreed = "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";
            client.send(agreed).await.unwrap();
            while let Ok(bytes) = client.bytes(4).await {
                client.send(bytes).await.unwrap();
            }
        }
    })
    .await;
    let mut mesh = mesh.start().await;
    mesh.reaches("front", "shop").await;
    mesh.file("access.yaml", &allow("[{to: [{paths: [\"/socket/*\", /]}]}]"));
    mesh.apply().await;
    let mut socket = mesh.client("front").await;
    let upgrade = "connection: upgrade\r\nupgrade: echo\r\n";
    assert_eq!(socket.ask(request("GET", "/socket//1", upgrade, "")).await.unwrap().status(), 101);
    socket.send("ping").await.unwrap();
    assert_eq!(socket.bytes(4).await.unwrap(), b"ping");
    // Another change leaves it alone.
    mesh.file("access.yaml", &allow("[{to: [{paths: [\"/socket/*\", /, /x]}]}]"));
    mesh.apply().await;
    socket.send("pong").await.unwrap();
    assert_eq!(socket.bytes(4).await.unwrap(), b"pong");
    mesh.file("access.yaml", &allow("[{to: [{paths: [/x]}]}]"));
    let begun = Instant::now();
    mesh.write();
    assert_eq!(timeout(PATIENCE, socket.rest()).await.unwrap(), b"");
    assert!(begun.elapsed() < Duration::from_secs(1), "only after {:?}", begun.elapsed());
}
