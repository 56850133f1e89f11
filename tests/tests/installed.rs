//! What `penstock install` prints, on a real API server: all of it is accepted, its schemas refuse what control would refuse and take what
//! control takes, and `penstock check` says what is there and what is missing.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Output};

use k8s_openapi::api::core::v1::Secret;
use kube::Client;
use kube::api::{Api, DeleteParams, ListParams};
use penstock_control::compile::{State, TrustAnchors, compile};
use penstock_control::objects::decode;
use penstock_tests::testkit::kubernetes::{ApiServer, CONTEXT, ISSUER, account, apply, place, token};
use penstock_tests::testkit::process::{Process, program};
use penstock_tests::testkit::{PATIENCE, own_ip, wait_until};
use serde_json::{Value, json};

fn penstock(kubeconfig: &Path, args: &[&str]) -> Output {
    Command::new(program("penstock"))
        .args(args)
        // Port 1 of loopback: no control answers.
        .args(["--control", "http://127.0.0.1:1"])
        .env("KUBECONFIG", kubeconfig)
        .output()
        .unwrap()
}

fn documents(text: &str) -> Vec<Value> {
    text.split("---\n").map(|document| serde_saphyr::from_str(document).unwrap()).collect()
}

/// The verdicts of `penstock check`, by name.
fn checks(output: &Output) -> Vec<Value> {
    let said = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"))
}

fn verdict<'a>(checks: &'a [Value], name: &str) -> &'a str {
    let found = checks.iter().find(|check| check["name"] == name);
    found.unwrap_or_else(|| panic!("no check {name}: {checks:#?}"))["verdict"].as_str().unwrap()
}

#[tokio::test]
async fn what_install_prints_is_accepted_and_checked_by_a_real_api_server() {
    let Some(api) = ApiServer::start().await else { return };
    let client = api.client().await;
    let folder = tempfile::tempdir().unwrap();
    let kubeconfig = folder.path().join("config");
    std::fs::copy(api.kubeconfig(), &kubeconfig).unwrap();

    // Nothing is there, and there are no nodes: everything else is as it has to be.
    let before = penstock(&kubeconfig, &["check", "--pre", "--output", "json"]);
    let found = checks(&before);
    assert!(found.len() >= 20, "{}", found.len());
    for name in [
        "Kubernetes",
        "clocks",
        "admission",
        "token reviews",
        "rights to install",
        "priority class",
        "leftovers",
    ] {
        assert_eq!(verdict(&found, name), "ok", "{name}: {found:#?}");
    }
    assert_eq!((verdict(&found, "nodes"), before.status.code()), ("problem", Some(1)));
    // A namespace that asks for sidecars and forbids them.
    let strict = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "strict", "labels": {
            "penstock.io/inject": "enabled", "pod-security.kubernetes.io/enforce": "restricted",
        }},
    });
    apply(&client, &strict, false).await.unwrap();
    let found = checks(&penstock(&kubeconfig, &["check", "--pre", "--context", CONTEXT, "--output", "json"]));
    assert_eq!(verdict(&found, "pod security"), "problem");

    // Two that ask for a sidecar while there is no webhook, and one that does not.
    for (space, labels) in [("early", json!({"penstock.io/inject": "enabled"})), ("elsewhere", json!({}))] {
        let object =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": space, "labels": labels}});
        apply(&client, &object, false).await.unwrap();
        apply(&client, &account(space, "default"), false).await.unwrap();
    }
    let asks = json!({"penstock.io/inject": "enabled"});
    for (space, name, annotations) in [
        ("early", "older", &json!({})),
        ("elsewhere", "annotated", &asks),
        ("elsewhere", "plain", &json!({})),
    ] {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": space, "annotations": annotations},
            "spec": {"containers": [{"name": "main", "image": "none"}]},
        });
        apply(&client, &pod, false).await.unwrap();
    }

    let installed = penstock(&kubeconfig, &["install"]);
    let objects = documents(&String::from_utf8(installed.stdout).unwrap());
    for object in &objects {
        apply(&client, object, false).await.unwrap_or_else(|error| panic!("{object:#}: {error}"));
    }
    // Twice is as good as once.
    for object in &objects {
        apply(&client, object, false).await.unwrap();
    }
    // A definition that is accepted is served some time later.
    for kind in ["AccessPolicy", "Canary", "InferencePolicy", "RateLimit"] {
        let (api, _) = place(&client, &policy(kind, json!({})));
        wait_until(&format!("{kind} is served"), PATIENCE, async || {
            api.list(&ListParams::default()).await.is_ok()
        })
        .await;
    }

    // No controllers and no control run here, so what they make is missing, and what is installed is found as it should be.
    let mut found = Vec::new();
    wait_until("the definitions are served", PATIENCE, async || {
        found = checks(&penstock(&kubeconfig, &["check", "--output", "json"]));
        verdict(&found, "definitions") == "ok"
    })
    .await;
    assert!(found.len() >= 40, "{}", found.len());
    let slipped = found.iter().find(|check| check["name"] == "pods without sidecars").unwrap();
    let told = slipped["details"].as_array().unwrap();
    assert!(told.len() == 2 && slipped["verdict"] == "problem", "{slipped:#}");
    for (told, of) in
        told.iter().zip(["early/older: its namespace asks", "elsewhere/annotated: it asks by its annotation"])
    {
        assert!(told.as_str().unwrap().starts_with(of), "{slipped:#}");
    }
    for name in [
        "penstock-system",
        "definitions",
        "schemas",
        "control's account",
        "rights in the cluster",
        "rights at home",
        "bindings",
        "control",
        "version",
        "probes of control",
        "disruption budget",
        "Services",
        "network policy",
        "webhook",
    ] {
        assert_eq!(verdict(&found, name), "ok", "{name}: {found:#?}");
    }
    for name in [
        "replicas",
        "Lease",
        "root",
        "trust anchors",
        "webhook's certificate",
        "endpoints of control",
        "injection",
    ] {
        assert_eq!(verdict(&found, name), "problem", "{name}: {found:#?}");
    }
    // Whatever is wrong is told with why it matters and a command.
    for check in found.iter().filter(|check| check["verdict"] != "ok") {
        assert!(
            check["fix"].as_str().is_some_and(|fix| fix.contains("kubectl") || fix.contains("penstock")),
            "{check:#}"
        );
        assert!(check["why"].as_str().is_some_and(|why| !why.is_empty()), "{check:#}");
    }

    schemas(&client).await;

    // Everything goes again, in the order in which it is printed.
    let removal = penstock(&kubeconfig, &["uninstall", "--crds"]);
    assert!(String::from_utf8_lossy(&removal.stderr).contains("No pod has a sidecar"));
    let gone = documents(&String::from_utf8(removal.stdout).unwrap());
    assert_eq!(gone.len(), objects.len());
}

/// What control says of an object: nothing where it is accepted.
fn control(object: &Value) -> Vec<String> {
    let trust = TrustAnchors { trust_domain: "cluster.local".into(), anchors: Vec::new() };
    // Settings of a policy for no Service are not even read.
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "digits", "namespace": "default"},
        "spec": {"ports": [{"port": 80}]},
    });
    let set = decode::file(&"policy.yaml".into(), &format!("{object}\n---\n{service}\n"));
    let problems = compile(&set, &State::default(), &trust).0.problems;
    // Nothing else is in the cluster, so what a policy is about is missing, which refuses none.
    let missing =
        ["there is no Service", "no workload of the mesh", "does not exist; create it", "has no pod"];
    problems
        .into_iter()
        .map(|problem| problem.message)
        .filter(|message| !missing.iter().any(|known| message.contains(known)))
        .collect()
}

fn policy(kind: &str, spec: Value) -> Value {
    json!({
        "apiVersion": "penstock.io/v1alpha1", "kind": kind,
        "metadata": {"name": "p", "namespace": "default"}, "spec": spec,
    })
}

/// A Canary that makes sense, but for `more`.
fn canary(more: Value) -> Value {
    let mut spec = json!({"service": "s", "stable": "v1", "candidate": "v2", "steps": [{"weight": 5}]});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    policy("Canary", spec)
}

async fn schemas(client: &Client) {
    let access = |spec: Value| policy("AccessPolicy", spec);
    let rule = |rule: Value| access(json!({"action": "Allow", "rules": [rule]}));
    let limit = |more: Value| {
        let mut limit = json!({"name": "l"});
        limit.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        policy("RateLimit", json!({"limits": [limit]}))
    };
    let inference = |more: Value| {
        let mut spec = json!({"targetRef": {"kind": "Service", "name": "digits"}});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        policy("InferencePolicy", spec)
    };
    let pipeline = |pipeline: Value| {
        inference(json!({"models": [{"name": "m", "prepare": [{"input": "x", "pipeline": pipeline}]}]}))
    };

    let mut good = vec![
        access(json!({"action": "Allow"})),
        access(json!({"action": "Deny", "rules": [{}]})),
        access(json!({"action": "Audit", "rehearse": "Deny", "rules": [{"name": "x"}]})),
        access(json!({"action": "Audit"})),
        access(json!({"action": "Allow", "selector": {"matchLabels": {"app": "x"}}, "targetRefs": []})),
        access(json!({"action": "Allow", "targetRefs": [{"group": "", "kind": "Service", "name": "x"}]})),
        rule(json!({"when": {}})),
        rule(
            json!({"from": [{"identities": ["*"]}, {"identities": ["spiffe://a.b/ns/x/*", "spiffe://a.b/ns/x/sa/y.z"]}]}),
        ),
        rule(
            json!({"from": [{"namespaces": ["team-*", "*", "a-b"], "notServiceAccounts": ["x", "ns/y*", "*"]}]}),
        ),
        rule(
            json!({"to": [{"paths": ["/", "/*", "/a/b", "/a/*"], "notMethods": ["GET", "M-SEARCH"], "ports": [1, 65535]}]}),
        ),
        rule(
            json!({"to": [{"models": ["llama*", "*", "a/b"], "grpc": [{"service": "a.B"}, {"service": "a.B", "method": "C"}]}]}),
        ),
        rule(json!({"when": {"headers": [{"name": "X-Tenant", "values": ["a", "b*"]}, {"name": "x"}]}})),
        inference(json!({})),
        inference(
            json!({"balance": "ring-hash,bound=1.5", "sticky": "cookie:x", "timeout": "request=1s", "retry": {"attempts": 2}}),
        ),
        inference(
            json!({"batch": {"max": 32, "delay": "2ms"}, "coalesce": {"single-flight": true, "headers": ["a", "b"]}}),
        ),
        inference(
            json!({"batch": "max=server", "limits": "connections=1,pending=2", "outlier": "failures=5,base=1s"}),
        ),
        inference(json!({"models": [{"name": "*"}, {"name": "m"}]})),
        pipeline(json!({"preset": "imagenet"})),
        pipeline(
            json!({"preset": "clip", "dtype": "f16", "layout": "nhwc", "normalise": {"mean": [0.5], "std": [0.5]}}),
        ),
        pipeline(
            json!({"resize": {"mode": "letterbox", "width": 64, "height": 64, "pad": 0}, "jpeg-scaling": "off"}),
        ),
        pipeline(
            json!({"input": {"format": "nv12", "width": 64, "height": 64, "matrix": "bt709", "range": "full"}}),
        ),
    ];
    good.extend([
        limit(json!({"concurrent": 1})),
        limit(json!({"requests": {"perSecond": 1, "burst": 5}, "tokens": {"perMinute": 100_000}, "by": ["identity", "model"]})),
        limit(json!({"requests": {"perMinute": 1}, "by": ["route"], "match": {"to": [{"paths": ["/a/*"]}, {"models": ["m"]}]}})),
        limit(json!({"concurrent": 1, "match": {"from": [{"notNamespaces": ["a"]}], "when": {"headers": [{"name": "x"}]}}})),
        canary(json!({})),
        canary(json!({"stable": "s", "steps": [{"weight": 0, "shadow": 100, "pause": true}], "shadow": {}})),
        policy("Canary", json!({"service": "s", "deployment": "s", "steps": [{"weight": 5}]})),
        canary(json!({
            "steps": [{"weight": 0, "pause": true}, {"weight": 100, "hold": "1h30m"}], "paused": true, "run": "2", "promotion": "0s",
            "match": [{"headers": [{"name": "x-tester", "value": "yes"}]}], "sticky": "cookie:session",
            "analysis": {
                "minRequests": 10, "successRate": 99.5, "load": 0.9, "latency": [{"percentile": 99.9, "ofStable": 1.5}],
                "prometheus": [{"name": "errors", "server": "http://p:9090", "query": "sum(x)", "max": 5}],
                "webhooks": [{"name": "gate", "url": "https://gate/check?a=b", "interval": "5s"}],
            },
        })),
    ]);

    // The examples that people copy, in the namespace that is there.
    for example in ["access/policies.yaml", "access/rates.yaml", "canary/canary.yaml", "gpu/service.yaml"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/examples").join(example);
        let all = documents(&std::fs::read_to_string(path).unwrap());
        good.extend(all.into_iter().filter(|object| object["apiVersion"] == "penstock.io/v1alpha1").map(
            |mut object| {
                object["metadata"]["namespace"] = json!("default");
                object
            },
        ));
    }
    for object in &good {
        assert_eq!(control(object), Vec::<String>::new(), "{object}");
        apply(client, object, true).await.unwrap_or_else(|error| panic!("{object}: {error}"));
    }

    // Refused by both: by the schema, before anybody has waited for control.
    let both = [
        access(json!({})),
        access(json!({"action": "Refuse"})),
        access(json!({"action": "Allow", "rule": []})),
        access(json!({"action": "Deny"})),
        access(json!({"action": "Deny", "rules": []})),
        access(json!({"action": "Audit", "rehearse": "Deny"})),
        access(json!({"action": "Allow", "rehearse": "Deny"})),
        access(
            json!({"action": "Allow", "selector": {"matchLabels": {}}, "targetRefs": [{"kind": "Service", "name": "x"}]}),
        ),
        access(json!({"action": "Allow", "targetRefs": [{"kind": "Deployment", "name": "x"}]})),
        access(json!({"action": "Allow", "targetRefs": [{"group": "apps", "kind": "Service", "name": "x"}]})),
        rule(json!({"from": []})),
        rule(json!({"from": [{}]})),
        rule(json!({"to": []})),
        rule(json!({"to": [{}]})),
        rule(json!({"when": {"headers": []}})),
        rule(json!({"when": {"headers": [{"name": "a b"}]}})),
        rule(json!({"when": {"headers": [{"name": "a", "values": []}]}})),
        rule(json!({"from": [{"identities": ["web"]}]})),
        rule(json!({"from": [{"identities": ["spiffe://*/ns/a/sa/b"]}]})),
        rule(json!({"from": [{"namespaces": ["Team"]}]})),
        rule(json!({"from": [{"namespaces": []}]})),
        rule(json!({"from": [{"serviceAccounts": ["*/x"]}]})),
        rule(json!({"from": [{"serviceAccounts": ["a/b/c"]}]})),
        rule(json!({"to": [{"methods": ["get"]}]})),
        rule(json!({"to": [{"paths": ["a"]}]})),
        rule(json!({"to": [{"paths": ["/a/*/b"]}]})),
        rule(json!({"to": [{"paths": ["/a?b"]}]})),
        rule(json!({"to": [{"ports": [0]}]})),
        rule(json!({"to": [{"ports": [65536]}]})),
        rule(json!({"to": [{"models": ["a*b"]}]})),
        rule(json!({"to": [{"grpc": [{"service": "/a.B", "method": "C"}]}]})),
        rule(json!({"to": [{"grpc": [{"service": "a.B", "method": "C*"}]}]})),
        policy("RateLimit", json!({"limits": []})),
        policy(
            "RateLimit",
            json!({"limits": [{"name": "a", "concurrent": 1}, {"name": "a", "concurrent": 2}]}),
        ),
        limit(json!({})),
        limit(json!({"name": "A b", "concurrent": 1})),
        limit(json!({"concurrent": 0})),
        limit(json!({"requests": {"burst": 1}})),
        limit(json!({"requests": {"perSecond": 1, "perMinute": 1}})),
        limit(json!({"tokens": {"perMinute": 0}})),
        limit(json!({"concurrent": 1, "by": ["caller"]})),
        limit(json!({"concurrent": 1, "by": ["route"]})),
        limit(json!({"concurrent": 1, "match": {"to": []}})),
        limit(json!({"concurrent": 1, "match": {"from": [{}]}})),
        limit(json!({"concurrent": 1, "matches": {}})),
        policy("InferencePolicy", json!({"targetRef": {"kind": "Deployment", "name": "x"}})),
        inference(json!({"batches": {"max": 1}})),
        inference(json!({"balance": "fastest"})),
        inference(json!({"sticky": "x"})),
        inference(json!({"batch": "32"})),
        inference(json!({"models": [{"name": ""}]})),
        inference(
            json!({"models": [{"name": "m", "prepare": [{"input": "", "pipeline": {"preset": "clip"}}]}]}),
        ),
        inference(json!({"models": [{"name": "m", "prepare": [
            {"input": "x", "pipeline": {"preset": "clip"}}, {"input": "x", "tensor": "t", "pipeline": {"preset": "clip"}},
        ]}]})),
        canary(json!({"candidate": "v1"})),
        canary(json!({"candidate": "s"})),
        canary(json!({"deployment": "d"})),
        policy("Canary", json!({"service": "s", "steps": [{"weight": 5}]})),
        policy("Canary", json!({"service": "s", "stable": "v1", "steps": [{"weight": 5}]})),
        policy("Canary", json!({"service": "s", "deployment": "d.d", "steps": [{"weight": 5}]})),
        policy("Canary", json!({"service": "s", "deployment": "d".repeat(53), "steps": [{"weight": 5}]})),
        canary(json!({"steps": []})),
        canary(json!({"steps": [{"weight": 101}]})),
        canary(json!({"promotion": "soon"})),
        canary(json!({"steps": [{"weight": 1, "hold": "soon"}]})),
        canary(json!({"stepps": []})),
        canary(json!({"match": [{"headers": []}]})),
        canary(json!({"sticky": "user"})),
        canary(json!({"analysis": {"successRate": 101}})),
        canary(json!({"analysis": {"latency": [{"percentile": 99}]}})),
        canary(json!({"analysis": {"load": 2}})),
        canary(json!({"analysis": {"webhooks": [{"name": "a", "url": "ftp://x"}]}})),
        pipeline(json!({"preset": "imagnet"})),
        pipeline(json!({"preset": "imagenet", "cropp": {}})),
        pipeline(json!({"resize": {"mode": "shortest-side", "size": 256}})),
        pipeline(
            json!({"resize": {"mode": "shortest-side", "width": 2, "height": 2}, "crop": {"width": 1, "height": 1}}),
        ),
        pipeline(json!({"resize": {"mode": "exact", "size": 256}})),
        pipeline(json!({"resize": {"mode": "exact", "width": 8193, "height": 1}})),
        pipeline(json!({"resize": {"mode": "exact", "width": 8, "height": 8, "pad": 1}})),
    ];
    for object in &both {
        assert_ne!(control(object), Vec::<String>::new(), "control takes {object}");
        assert!(apply(client, object, true).await.is_err(), "the schema takes {object}");
    }

    // What no schema can know: control says it in the status and in `penstock check`.
    let by_control_alone = [
        canary(
            json!({"analysis": {"webhooks": [{"name": "a", "url": "http://a"}, {"name": "a", "url": "http://b"}]}}),
        ),
        canary(json!({"analysis": {"prometheus": [{"name": "a", "server": "http://a", "query": "x"}]}})),
        canary(json!({"deadline": "0s"})),
        rule(json!({"to": [{"paths": ["/a//b"]}]})),
        rule(json!({"to": [{"paths": ["/a/../b"]}]})),
        inference(json!({"batch": {"max": 0}})),
        inference(json!({"batch": "max=0"})),
        inference(json!({"timeout": "request=1s,per-try=2s"})),
        pipeline(json!({"colour": "rgb"})),
        pipeline(json!({"resize": {"mode": "exact", "width": 8192, "height": 8192}})),
    ];
    for object in &by_control_alone {
        assert_ne!(control(object), Vec::<String>::new(), "control takes {object}");
        apply(client, object, true)
            .await
            .unwrap_or_else(|error| panic!("move it up, the schema refuses {object}: {error}"));
    }

    // A CEL rule says what to do.
    let said = apply(client, &access(json!({"action": "Deny"})), true).await.unwrap_err();
    assert!(said.to_string().contains("it denies nothing; write a rule, or `- {}`"), "{said}");
}

#[test]
fn control_knows_every_option_that_it_is_installed_with() {
    let output = Command::new(program("penstock")).args(["install"]).output().unwrap();
    let objects = documents(&String::from_utf8(output.stdout).unwrap());
    let deployment = objects.iter().find(|object| object["kind"] == "Deployment").unwrap();
    let args = deployment["spec"]["template"]["spec"]["containers"][0]["args"].as_array().unwrap();
    let args: Vec<&str> = args.iter().map(|arg| arg.as_str().unwrap()).collect();
    // Options are read in their order, so `--help` is reached by those alone that are known.
    let output =
        Command::new(program("penstock-control")).arg("run").args(&args).arg("--help").output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The container of control, as it is installed.
fn container(objects: &[Value]) -> &Value {
    let deployment = objects.iter().find(|object| object["kind"] == "Deployment").unwrap();
    &deployment["spec"]["template"]["spec"]["containers"][0]
}

/// What a probe of control's container finds there, as the kubelet does it: a certificate is not verified.
fn probed(container: &Value, name: &str, ip: Ipv4Addr) -> bool {
    let number = |name: &Value| {
        let ports = container["ports"].as_array().unwrap();
        let port =
            ports.iter().find(|port| port["name"] == *name).unwrap_or_else(|| panic!("no port {name}"));
        u16::try_from(port["containerPort"].as_u64().unwrap()).unwrap()
    };
    let probe = &container[name];
    if let Some(port) = probe.pointer("/tcpSocket/port") {
        return std::net::TcpStream::connect(SocketAddr::new(ip.into(), number(port))).is_ok();
    }
    let get = &probe["httpGet"];
    let scheme = get["scheme"].as_str().unwrap_or("HTTP").to_lowercase();
    let url = format!("{scheme}://{ip}:{}{}", number(&get["port"]), get["path"].as_str().unwrap());
    let curl =
        Command::new("curl").args(["--insecure", "--silent", "--fail", "--max-time", "2", &url]).output();
    curl.unwrap().status.success()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_cannot_serve_the_webhook_lives_and_is_not_ready() {
    let Some(server) = ApiServer::start().await else { return };
    let client = server.client().await;
    let (folder, ip) = (tempfile::tempdir().unwrap(), own_ip());
    let printed = Command::new(program("penstock")).args(["install"]).output().unwrap();
    let objects = documents(&String::from_utf8(printed.stdout).unwrap());
    for object in &objects {
        apply(&client, object, false).await.unwrap_or_else(|error| panic!("{object:#}: {error}"));
    }
    // Somebody else's, and of no use.
    let broken = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
        "metadata": {"name": "penstock-webhook-tls", "namespace": "penstock-system"},
        "stringData": {"tls.crt": "none", "tls.key": "none"},
    });
    apply(&client, &broken, false).await.unwrap();

    // As it is installed, but for where it listens and what it reads.
    let control = container(&objects);
    let kubeconfig = folder.path().join("control.yaml");
    let bearer = token(&client, "penstock-system", "penstock-control", ISSUER, None).await;
    std::fs::write(&kubeconfig, server.config(&bearer)).unwrap();
    let mut args: Vec<String> =
        control["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap().to_owned()).collect();
    for arg in &mut args {
        *arg = arg
            .replace("0.0.0.0", &ip.to_string())
            .replace("--source=kubernetes", &format!("--source=kubernetes:{CONTEXT}"))
            .replace("/var/lib/penstock", &folder.path().join("state").display().to_string());
    }
    args.insert(0, "run".to_owned());
    args.push(format!("--api={ip}:8080"));
    let variables = [("KUBECONFIG", kubeconfig.display().to_string()), ("POD_NAME", "control-a".to_owned())];
    let mut process =
        Process::start_with("control", &program("penstock-control"), &args, &variables, folder.path());
    wait_until("control has started", PATIENCE, async || {
        assert!(process.runs(), "control ended at once: {}", process.said());
        probed(control, "startupProbe", ip)
    })
    .await;
    wait_until("it says why", PATIENCE, async || {
        process.said().contains("penstock-webhook-tls cannot be used")
    })
    .await;
    assert!(!probed(control, "readinessProbe", ip), "{}", process.said());
    assert!(probed(control, "livenessProbe", ip), "{}", process.said());

    let secrets: Api<Secret> = Api::namespaced(client.clone(), "penstock-system");
    secrets.delete("penstock-webhook-tls", &DeleteParams::default()).await.unwrap();
    wait_until("it is ready", PATIENCE, async || probed(control, "readinessProbe", ip)).await;
    assert!(process.runs());
}
