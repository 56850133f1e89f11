//! The program as a script sees it: what it prints for a control's answers, and its exit status.
//!
//! Control is a listener that answers fixed pages, so that what the program says depends on nothing else.

#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use penstock_api::view::{
    Candidate, Decision, EndpointRow, Failure, Problem, ProxyCertificates, ProxyStatus, RouteRow, Stat,
    StatRow, Status, Tap,
};
use serde::Serialize;
use serde_json::{Value, json};

/// Answers every connection's requests from `pages` until the test ends. A page that is there several times is another each time, and then stays the last.
fn control(pages: Vec<(&'static str, String)>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, mut pages) = (stream.unwrap(), pages.clone());
            std::thread::spawn(move || {
                let (mut seen, mut chunk) = (Vec::new(), [0; 4096]);
                while let Ok(n @ 1..) = stream.read(&mut chunk) {
                    seen.extend_from_slice(&chunk[..n]);
                    while let Some(end) = seen.windows(4).position(|four| four == b"\r\n\r\n") {
                        let head = String::from_utf8(seen.drain(..end + 4).collect()).unwrap();
                        let target = head.split(' ').nth(1).unwrap();
                        let mut known = (0..pages.len()).filter(|at| pages[*at].0 == target);
                        let (first, more) = (known.next(), known.next().is_some());
                        let (status, body) = match first {
                            Some(at) if more => ("200 OK", pages.remove(at).1),
                            Some(at) => ("200 OK", pages[at].1.clone()),
                            None => {
                                ("400 Bad Request", json(&Failure { error: format!("no page {target}") }))
                            }
                        };
                        let head = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n", body.len());
                        stream.write_all((head + &body).as_bytes()).unwrap();
                    }
                }
            });
        }
    });
    url
}

fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap()
}

fn penstock(control: &str, args: &[&str]) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_penstock"));
    // Whatever cluster somebody at a desk works with, it is not meant here.
    program.env("KUBECONFIG", "/dev/null/none").env_remove("KUBERNETES_SERVICE_HOST");
    program.args(args).args(["--control", control]).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn proxy(applied: bool) -> ProxyStatus {
    ProxyStatus { node: "demo/client".to_owned(), connected: true, applied, ..ProxyStatus::default() }
}

fn status(applied: bool, problems: Vec<Problem>) -> String {
    json(&Status {
        snapshot: "0123456789abcdef".to_owned(),
        proxies: vec![proxy(applied)],
        problems,
        uptime_s: 5.0,
    })
}

fn routes() -> String {
    json(&[RouteRow {
        service: "demo/digits".to_owned(),
        backend: "demo/digits-v2".to_owned(),
        ..RouteRow::default()
    }])
}

#[test]
fn nobody_there_is_3_and_a_wrong_command_line_is_2() {
    let absent = penstock("http://127.0.0.1:1", &["status"]);
    assert_eq!(absent.status.code(), Some(3));
    assert!(text(&absent.stderr).contains("penstock-control run"), "{}", text(&absent.stderr));
    assert_eq!(absent.stdout, b"");
    assert_eq!(penstock("http://127.0.0.1:1", &["stat", "--window", "soon"]).status.code(), Some(2));
    assert_eq!(penstock("https://127.0.0.1:1", &["status"]).status.code(), Some(2));
}

#[test]
fn status_is_0_when_all_is_well_and_1_when_something_is_wrong() {
    let well = penstock(&control(vec![("/status", status(true, vec![]))]), &["status", "--wait"]);
    assert_eq!(well.status.code(), Some(0), "{}", text(&well.stderr));
    assert!(text(&well.stdout).contains("applied by 1 of 1 connected proxies"));

    let problem = Problem { file: "a.yaml".to_owned(), message: "no".to_owned(), ..Problem::default() };
    let ill = penstock(&control(vec![("/status", status(true, vec![problem]))]), &["status"]);
    assert_eq!(ill.status.code(), Some(1));
    assert!(text(&ill.stdout).contains("a.yaml\n  no\n"), "{}", text(&ill.stdout));
}

#[test]
fn waiting_in_vain_names_who_lags() {
    let url = control(vec![("/status", status(false, vec![]))]);
    let vain = penstock(&url, &["status", "--wait", "--timeout", "300ms"]);
    assert_eq!(vain.status.code(), Some(1));
    let told = text(&vain.stderr);
    assert!(told.contains("0123456789abcdef after 300ms: demo/client"), "{told}");
}

#[test]
fn stat_asks_for_its_window_and_prints_every_format() {
    let row = StatRow { service: "demo/digits".to_owned(), requests: 7, ..StatRow::default() };
    let other = StatRow { service: "demo/words".to_owned(), ..StatRow::default() };
    let stat = Stat { window_s: 3.0, rows: vec![row, other] };
    let url = control(vec![("/stat?window=3000ms", json(&stat)), ("/routes", routes())]);
    let table = text(&penstock(&url, &["stat", "--window", "3s", "digits"]).stdout);
    assert!(
        table.starts_with("SERVICE ") && table.contains("demo/digits") && !table.contains("words"),
        "{table}"
    );
    assert!(!table.contains('\x1b'), "colours are for terminals: {table:?}");
    let object = penstock(&url, &["stat", "--window", "3s", "digits", "-o", "json"]).stdout;
    let object: Stat = serde_json::from_slice(&object).unwrap();
    assert_eq!((object.rows.len(), object.rows[0].requests), (1, 7));
    let yaml = text(&penstock(&url, &["stat", "--window", "3s", "digits", "-o", "yaml"]).stdout);
    assert!(yaml.contains("requests: 7"), "{yaml}");
}

#[test]
fn stat_of_a_service_that_does_not_exist_is_1_and_of_one_without_requests_0() {
    let stat = Stat { window_s: 10.0, rows: vec![] };
    let url = control(vec![("/stat?window=10000ms", json(&stat)), ("/routes", routes())]);
    let unknown = penstock(&url, &["stat", "nosuch"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert_eq!(unknown.stdout, b"");
    let told = text(&unknown.stderr);
    assert!(told.contains("no Service nosuch; it knows demo/digits, demo/digits-v2"), "{told}");
    for known in ["digits", "digits-v2"] {
        let quiet = penstock(&url, &["stat", known]);
        assert_eq!(quiet.status.code(), Some(0), "{}", text(&quiet.stderr));
        assert_eq!(text(&quiet.stdout), "No requests in the last 10 s.\n");
    }
}

/// A shell starts what runs in the background with SIGINT ignored.
#[test]
fn a_command_in_the_background_ends_on_either_signal() {
    let stat = Stat { window_s: 10.0, rows: vec![] };
    let url = control(vec![("/stat?window=10000ms", json(&stat))]);
    for signal in ["INT", "TERM"] {
        let program = env!("CARGO_BIN_EXE_penstock");
        let script = format!("trap '' INT; exec {program} stat --watch -o json --control {url}");
        let mut child =
            Command::new("sh").args(["-c", &script]).stdout(std::process::Stdio::piped()).spawn().unwrap();
        // The first answer says that it listens.
        let mut first = [0; 1];
        child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
        Command::new("kill").args([format!("-{signal}"), child.id().to_string()]).status().unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0), "SIG{signal}");
    }
}

#[test]
fn controls_own_words_are_passed_on() {
    let refused = penstock(&control(vec![]), &["stat"]);
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(text(&refused.stderr), "penstock: no page /stat?window=10000ms\n");
}

#[test]
fn endpoints_of_a_split_service_are_those_of_its_versions() {
    let endpoint = |service: &str| EndpointRow {
        service: service.to_owned(),
        endpoint: format!("{service}-a"),
        state: "ready".to_owned(),
        ..EndpointRow::default()
    };
    let rows = json(&[endpoint("demo/digits-v2"), endpoint("demo/words")]);
    let url = control(vec![("/routes", routes()), ("/endpoints", rows)]);
    let digits = penstock(&url, &["endpoints", "digits"]);
    let table = text(&digits.stdout);
    assert!(table.contains("demo/digits-v2-a") && !table.contains("words"), "{table}");
    let unknown = penstock(&url, &["endpoints", "nope"]);
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("no Service nope"));
}

#[test]
fn tap_ends_at_its_limit_with_one_line_a_request() {
    let lines: String = (200..203)
        .map(|status| json(&Tap { status, path: "/x".to_owned(), ..Tap::default() }) + "\n")
        .collect();
    let query = "/tap?direction=outbound&service=demo/digits&limit=2";
    let url = control(vec![("/routes", routes()), (query, lines)]);
    let table = penstock(&url, &["tap", "digits", "--limit", "2"]);
    assert_eq!(text(&table.stdout).lines().count(), 3, "{}", text(&table.stdout));
    let ndjson = text(&penstock(&url, &["tap", "digits", "--limit", "2", "-o", "json"]).stdout);
    let taps: Vec<Tap> = ndjson.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(taps.iter().map(|tap| tap.status).collect::<Vec<_>>(), [200, 201]);
}

#[test]
fn tap_explains_how_an_endpoint_was_chosen() {
    let winner = Candidate { endpoint: "demo/a".to_owned(), picked: true, ..Candidate::default() };
    let (policy, why) = ("round-robin".to_owned(), "turn".to_owned());
    let decision = Some(Decision { policy, why, endpoints: 3, candidates: vec![winner] });
    let line = json(&Tap { status: 200, decision: decision.clone(), ..Tap::default() }) + "\n";
    let url = control(vec![("/tap?direction=outbound&limit=1&explain=true", line)]);
    let table = text(&penstock(&url, &["tap", "--explain", "--limit", "1"]).stdout);
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines[2..].len(), 3, "heading, request, and then the choice: {table}");
    assert_eq!((lines[2], lines[4]), ("  round-robin: turn, of 3 endpoints", "  →  demo/a            0"));
    let object = text(&penstock(&url, &["tap", "--explain", "--limit", "1", "-o", "json"]).stdout);
    let tap: Tap = serde_json::from_str(&object).unwrap();
    assert_eq!(tap.decision, decision);
}

#[test]
fn check_of_a_running_control_lists_what_it_looked_at() {
    let endpoint =
        EndpointRow { service: "a/s".to_owned(), state: "ready".to_owned(), ..EndpointRow::default() };
    let pages = |applied| {
        vec![
            ("/status", status(applied, vec![])),
            ("/endpoints", json(&std::slice::from_ref(&endpoint))),
            ("/certs", json(&Vec::<ProxyCertificates>::new())),
        ]
    };
    let well = penstock(&control(pages(true)), &["check"]);
    assert_eq!(well.status.code(), Some(0), "{}", text(&well.stdout));
    assert!(text(&well.stdout).lines().all(|line| line.starts_with('✔')), "{}", text(&well.stdout));
    let ill = penstock(&control(pages(false)), &["check"]);
    assert_eq!(ill.status.code(), Some(1));
    assert!(text(&ill.stdout).contains("✖ newest snapshot"), "{}", text(&ill.stdout));
}

#[test]
fn check_of_a_directory_needs_no_server() {
    for example in ["digits", "canary"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/examples").join(example);
        let well = penstock("http://127.0.0.1:1", &["check", &format!("--source=dir:{}", path.display())]);
        assert_eq!(well.status.code(), Some(0), "{example}: {}", text(&well.stdout));
    }
    let nowhere = penstock("http://127.0.0.1:1", &["check", "--source", "dir:/nowhere/at/all"]);
    assert_eq!(nowhere.status.code(), Some(2));
    assert_eq!(text(&nowhere.stderr), "penstock: --source dir:/nowhere/at/all: there is no such directory\n");
    let bare = text(&penstock("http://127.0.0.1:1", &["check", "--source", "a/b"]).stderr);
    assert!(bare.contains("a source is written dir:PATH, here dir:a/b"), "{bare}");
    assert!(bare.matches("a/b").count() == 2, "{bare}");
}

/// A page of canaries, as control shows it on one machine.
fn canaries(items: &[Value]) -> (&'static str, String) {
    ("/canaries", json!({"items": items, "commands": true}).to_string())
}

fn spec(candidate: &str) -> Value {
    json!({"service": "digits", "stable": "digits-v1", "candidate": candidate, "steps": [{"weight": 20}]})
}

fn run(spec: &Value) -> String {
    serde_json::from_value::<penstock_control::objects::canary::Spec>(spec.clone()).unwrap().run_id()
}

/// A canary that has come to a phase, of a run of `of`.
fn canary(namespace: &str, spec: &Value, of: &Value, phase: &str, more: &Value) -> Value {
    let entry = |at: &str, phase: &str| json!({"at": format!("2026-11-27T12:00:{at}Z"), "phase": phase, "step": 0, "weight": 20, "message": "because"});
    let mut status = json!({
        "run": run(of), "phase": phase, "step": 0, "steps": 1, "course": {"run": run(of), "weight": 20}, "applied": 1, "concerned": 2, "message": "because",
        "candidate": {"requests": 1000, "successRate": 99.5},
        "history": [entry("00.000", "Progressing"), entry("30.500", phase)],
    });
    json_patch::merge(&mut status, more);
    json!({"metadata": {"namespace": namespace, "name": "digits"}, "spec": spec, "status": status})
}

fn digits(phase: &str) -> Value {
    canary("demo", &spec("digits-v2"), &spec("digits-v2"), phase, &json!({}))
}

#[test]
fn watching_a_canary_ends_with_what_became_of_it() {
    for (phase, status) in [("Succeeded", 0), ("RolledBack", 1), ("Invalid", 1)] {
        let watched = penstock(
            &control(vec![canaries(&[digits("Progressing")]), canaries(&[digits(phase)])]),
            &["canary", "watch", "digits"],
        );
        assert_eq!(watched.status.code(), Some(status), "{phase}: {}", text(&watched.stderr));
        let told = text(&watched.stdout);
        let first = "TIME                      PHASE        STEP    WEIGHT  WHY\n\
                     2026-11-27T12:00:00.000Z  Progressing  1 of 1    20 %  because\n";
        assert!(told.starts_with(first) && told.contains(&format!("{phase}  ")), "{told}");
    }
    for page in [
        canaries(&[]),
        canaries(&[digits("Progressing"), canary("other", &spec("v"), &spec("v"), "Paused", &json!({}))]),
    ] {
        let nobody = penstock(&control(vec![page]), &["canary", "watch", "digits"]);
        assert_eq!(nobody.status.code(), Some(2), "{}", text(&nobody.stderr));
    }
    let gone = penstock(
        &control(vec![canaries(&[digits("Paused")]), canaries(&[digits("Paused")]), canaries(&[])]),
        &["canary", "watch", "digits"],
    );
    assert_eq!(gone.status.code(), Some(2));
    assert_eq!(text(&gone.stderr), "penstock: there is no canary demo/digits; known: there is none\n");
}

#[test]
fn a_run_that_takes_the_place_of_the_one_that_is_watched_is_told_and_followed() {
    let (old, new) = (spec("digits-v2"), spec("digits-v3"));
    let pages = [
        canary("demo", &old, &old, "Progressing", &json!({})),
        // The object asks for another, and control has not looked yet: what it says is of the old one.
        canary("demo", &new, &old, "RolledBack", &json!({})),
        canary("demo", &new, &new, "Progressing", &json!({})),
        canary("demo", &new, &new, "Succeeded", &json!({})),
    ];
    let pages = || pages.iter().map(|page| canaries(std::slice::from_ref(page))).collect();
    let watched = penstock(&control(pages()), &["canary", "watch", "demo/digits"]);
    assert_eq!(watched.status.code(), Some(0), "{}", text(&watched.stderr));
    let line = format!("another run of demo/digits has begun: {} in the place of {}\n", run(&new), run(&old));
    assert!(text(&watched.stdout).contains(&line), "{}", text(&watched.stdout));
    let lines = text(&penstock(&control(pages()), &["canary", "watch", "digits", "-o", "json"]).stdout);
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.contains(&json!({"run": run(&new), "replaces": run(&old)})), "{lines:?}");
}

#[test]
fn a_version_that_is_refused_is_told_and_the_run_in_force_is_followed() {
    let (old, new) = (spec("digits-v2"), spec("digits-v3"));
    let refused = json!({"conditions": [{"type": "Accepted", "status": "False", "message": "spec.steps: 120 is more than all"}]});
    let pages = vec![
        canaries(&[canary("demo", &new, &old, "Progressing", &refused)]),
        canaries(&[canary("demo", &new, &old, "RolledBack", &refused)]),
    ];
    let shown = text(&penstock(&control(pages.clone()), &["canary", "show", "digits"]).stdout);
    assert!(shown.contains("its newest version is refused: spec.steps: 120 is more than all\n"), "{shown}");
    let watched = penstock(&control(pages), &["canary", "watch", "digits"]);
    assert_eq!(watched.status.code(), Some(1), "{}", text(&watched.stderr));
    assert_eq!(text(&watched.stdout).matches("is refused: spec.steps: 120 is more than all").count(), 1);
}

#[test]
fn canaries_are_listed_in_columns_those_without_a_status_too() {
    let fresh = json!({"metadata": {"namespace": "demo", "name": "new"}, "spec": spec("digits-v3")});
    let page = canaries(&[digits("Progressing"), fresh]);
    let listed = penstock(&control(vec![page.clone()]), &["canary", "list"]);
    assert_eq!(
        text(&listed.stdout),
        "CANARY       SERVICE  CANDIDATE  PHASE        STEP    WEIGHT  APPLIED  SUCCESS  WHY\n\
         demo/digits  digits   digits-v2  Progressing  1 of 1    20 %  1 of 2    99.5 %  because\n\
         demo/new     digits   digits-v3  –            –            –  –              –  control has not looked at it yet\n"
    );
    let shown = text(&penstock(&control(vec![page.clone()]), &["canary", "show", "new"]).stdout);
    assert!(shown.starts_with("demo/new: control has not looked at it yet\n"), "{shown}");
    let json: Value =
        serde_json::from_slice(&penstock(&control(vec![page]), &["canary", "list", "-o", "json"]).stdout)
            .unwrap();
    assert_eq!(json[1]["metadata"]["name"], "new");
    let none = penstock(&control(vec![canaries(&[])]), &["canary", "list"]);
    assert_eq!(
        (none.status.code(), text(&none.stdout).starts_with("There are no canaries")),
        (Some(0), true)
    );
}

#[test]
fn a_command_to_a_canary_is_told_in_every_format() {
    let pages = || vec![canaries(&[digits("Paused")]), ("/canaries/demo/digits/promote", "{}".to_owned())];
    let asked = penstock(&control(pages()), &["canary", "promote", "digits"]);
    assert_eq!(asked.status.code(), Some(0), "{}", text(&asked.stderr));
    assert!(text(&asked.stdout).contains("penstock canary watch demo/digits"), "{}", text(&asked.stdout));
    let asked = penstock(&control(pages()), &["canary", "promote", "digits", "-o", "json"]);
    let json: Value = serde_json::from_slice(&asked.stdout).unwrap();
    assert_eq!(json, json!({"canary": "demo/digits", "asked": "promote"}));
    for verb in ["show", "promote", "pause", "resume", "abort"] {
        let wrong = penstock(&control(pages()), &["canary", verb, "demo/digit"]);
        assert_eq!(wrong.status.code(), Some(2), "{verb}");
        assert_eq!(text(&wrong.stderr), "penstock: there is no canary demo/digit; known: demo/digits\n");
    }
    let absent = penstock("http://127.0.0.1:1", &["canary", "list"]);
    assert_eq!(absent.status.code(), Some(3));
    assert!(text(&absent.stderr).contains("nor is there a way to a cluster"), "{}", text(&absent.stderr));
}
