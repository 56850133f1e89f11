//! Pains of today's meshes that need no pods to be shown (docs/RELIABILITY.md has all of them), and whether the pages of pains and of
//! attacks name tests that exist.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::proxy::{counts_are_told, metric};
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, wait_until};
use tokio::io::AsyncWriteExt as _;
use tokio::time::timeout;

/// The pains that are decided here.
const PAINS: [u32; 15] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// Where tests of the whole system are, and where those of its parts.
const SYSTEM: [&str; 1] = ["tests/tests"];
const ALL: [&str; 3] = ["tests/tests", "proxy", "control"];

/// The names of all tests below some folders of the repository.
fn tests(folders: &[&str]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut folders: Vec<_> = folders.iter().map(|folder| root.join(folder)).collect();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.is_dir() {
                folders.push(entry);
            } else if entry.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(entry).unwrap();
                let lines: Vec<&str> = text.lines().map(str::trim).collect();
                let each = lines
                    .windows(2)
                    .filter(|pair| pair[0].starts_with("#[test]") || pair[0].starts_with("#[tokio::test"));
                let names = each.filter_map(|pair| pair[1].split_once("fn ")?.1.split('(').next());
                found.extend(names.map(str::to_owned));
            }
        }
    }
    found
}

/// What stands in backticks.
fn names(cell: &str) -> BTreeSet<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// How the rows of the attack classes begin.
const ATTACKS: [&str; 16] = [
    "HTTP/1 smuggling",
    "cache and coalescing keys",
    "HTTP/2 rapid reset",
    "CONTINUATION flood",
    "floods of empty frames",
    "memory of HTTP/2",
    "memory of headers",
    "authorization led around",
    "control and proxies of different versions",
    "headers of clients",
    "injection into logs",
    "decompression bombs",
    "X.509",
    "TLS that loops",
    "Slowloris",
    "an external processor",
];

#[test]
fn every_attack_class_has_tests_that_exist_or_says_that_it_is_open_or_why_it_cannot_occur() {
    let page = include_str!("../../docs/SECURITY.md");
    let (_, section) = page.split_once("## Attack classes\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows: Vec<&str> = section.lines().filter(|line| line.starts_with("| ")).skip(2).collect();
    assert_eq!(rows.len(), ATTACKS.len(), "{rows:#?}");
    let tests = tests(&ALL);
    for (attack, row) in ATTACKS.iter().zip(rows) {
        let cells: Vec<&str> = row.trim_matches(['|', ' ']).split(" | ").collect();
        let [class, prevents, shown] = cells[..] else { panic!("{row:?} has other than three cells") };
        assert!(class.starts_with(attack), "{class:?} is not {attack:?}");
        let named = names(shown);
        for name in &named {
            assert!(tests.contains(name), "{attack}: there is no test {name}");
        }
        match shown {
            "open" => assert!(prevents.contains("open"), "{attack}: what is open?"),
            "none" => assert!(prevents.contains("cannot occur"), "{attack}: why is there no test?"),
            _ => assert!(!named.is_empty(), "{attack} names no test"),
        }
    }
}

#[test]
fn every_target_that_is_fuzzed_is_on_the_page_and_every_one_of_the_page_is_fuzzed() {
    let page = include_str!("../../docs/SECURITY.md");
    let (_, section) = page.split_once("## What is fuzzed\n").unwrap();
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    let told: BTreeSet<String> = rows.flat_map(|row| names(row.split(" | ").next().unwrap())).collect();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("fuzz/fuzz_targets");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let targets: BTreeSet<String> =
        files.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect();
    assert_eq!(told, targets);
}

#[test]
fn every_pain_has_a_test_that_exists_and_every_test_of_a_pain_is_on_the_page() {
    let page = include_str!("../../docs/RELIABILITY.md");
    let tests = tests(&SYSTEM);
    let mut on_page = BTreeSet::new();
    for pain in PAINS {
        let row = page
            .lines()
            .find(|line| line.starts_with(&format!("| {pain} | ")))
            .unwrap_or_else(|| panic!("no row {pain}"));
        let cell = row.split(" | ").last().unwrap();
        let named = names(cell);
        for name in &named {
            assert!(tests.contains(name), "pain {pain}: there is no test {name}");
        }
        let own = format!("pain_{pain}_");
        assert!(named.iter().any(|name| name.starts_with(&own)), "pain {pain} has no test with its number");
        on_page.extend(named);
    }
    let all: BTreeSet<_> = tests.into_iter().filter(|name| name.starts_with("pain_")).collect();
    let forgotten: Vec<_> = all.difference(&on_page).collect();
    assert!(forgotten.is_empty(), "not in docs/RELIABILITY.md: {forgotten:?}");
}

/// Services that the pod does not talk to.
const STRANGERS: usize = 3_000;
/// What they may cost a proxy, KiB. One Service in full is about 2 KiB; all of them would be 6 MiB.
const GROWTH: u64 = 2 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pain_5_a_proxys_memory_follows_what_its_pod_talks_to_and_not_the_cluster() {
    let mut mesh = Mesh::default().pod("client", None).service("web", &[]).pod("web-1", Some("web"));
    let _web = Origin::named(mesh.application("web-1"), "web-1", Duration::ZERO).await;
    mesh = mesh.start().await;
    mesh.reaches("client", "web").await;
    let held = async |mesh: &Mesh| metric(mesh.admin("client"), "penstock_resources", &[]).await;
    let (resources, memory) = (held(&mesh).await, mesh.sidecar("client").memory_kib());
    let mut yaml = String::new();
    for number in 0..STRANGERS {
        let _ = write!(
            yaml,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: other-{number}, namespace: elsewhere}}\nspec:\n  \
             clusterIP: 10.200.{}.{}\n  ports:\n  - {{name: main, port: 80, targetPort: 8000, appProtocol: http}}\n",
            number / 250,
            number % 250 + 1
        );
    }
    let snapshot = mesh.status().await.snapshot;
    mesh.file("others.yaml", &yaml);
    mesh.write();
    wait_until("control knows them all", PATIENCE, async || mesh.status().await.snapshot != snapshot).await;
    mesh.reaches("client", "web").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (resources_now, memory_now) = (held(&mesh).await, mesh.sidecar("client").memory_kib());
    println!(
        "{resources} resources and {memory} KiB before, {resources_now} and {memory_now} KiB with {STRANGERS} more Services"
    );
    assert_eq!(resources, resources_now, "it holds what it was asked about");
    assert!(memory_now < memory + GROWTH, "{memory} KiB grew to {memory_now}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pain_15_what_clients_say_makes_no_metrics() {
    let mut mesh = Mesh::default().pod("client", None).service("web", &[]).pod("web-1", Some("web"));
    let _web = Origin::named(mesh.application("web-1"), "web-1", Duration::ZERO).await;
    mesh = mesh.start().await;
    mesh.reaches("client", "web").await;
    let mut client = mesh.client("client").await;
    // Each of these is the client's to choose: method, host, path, model, session, priority, and an address outside of the mesh.
    let mut say = async |number: usize| {
        for host in ["web.test".to_owned(), format!("no-{number}.test"), format!("127.1.2.{number}:9")] {
            // What is asked of a model is a POST.
            let method = if number.is_multiple_of(2) { "POST".to_owned() } else { format!("X-{number}") };
            let body = format!("{{\"model\":\"m-{number}\",\"messages\":[]}}");
            let request = format!(
                "{method} /v1/chat/completions/{number} HTTP/1.1\r\nhost: {host}\r\npenstock-session: {number}\r\n\
                 penstock-priority: {number}\r\nuser-agent: {number}\r\ncontent-type: application/json\r\n\
                 content-length: {}\r\n\r\n{body}",
                body.len()
            );
            client.ask(request).await.unwrap();
        }
    };
    let rows = async |mesh: &Mesh| {
        counts_are_told().await;
        let mut rows = Vec::new();
        for pod in ["client", "web-1"] {
            rows.push(get(mesh.admin(pod), "/metrics").await.unwrap().text().lines().count());
        }
        rows
    };
    for number in 1..=3 {
        say(number).await;
    }
    let few = rows(&mesh).await;
    for number in 4..=80 {
        say(number).await;
    }
    let many = rows(&mesh).await;
    println!("{few:?} rows became {many:?}");
    assert!(many.iter().zip(&few).all(|(many, few)| *many <= few + 10), "{few:?} rows became {many:?}");
}

/// What tunnels whose readers stop may hold, KiB, with both directions of each blocked: kernel buffers are not the
/// proxy's, and its own are an HTTP/2 stream's at most.
const TUNNELS: usize = 20;
const EACH_KIB: u64 = 4 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pain_7_a_tunnel_whose_reader_stops_stops_its_writer() {
    let mut mesh = Mesh::default().pod("client", None).service("web", &[]).pod("web-1", Some("web"));
    // It agrees to an upgrade, and never reads again.
    let _web = Origin::start_at(mesh.application("web-1"), |mut client| async move {
        while let Ok(request) = client.request().await {
            let upgrade = request.head.get("upgrade").is_some();
            let answer = match upgrade {
                true => "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: test\r\n\r\n",
                false => "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            };
            let _ = client.send(answer).await;
            if upgrade {
                std::future::pending::<()>().await;
            }
        }
    })
    .await;
    mesh = mesh.start().await;
    mesh.reaches("client", "web").await;
    let before = [mesh.sidecar("client").memory_kib(), mesh.sidecar("web-1").memory_kib()];
    let mut tunnels = Vec::new();
    for _ in 0..TUNNELS {
        let mut wire = mesh.client("client").await;
        let ask = "GET / HTTP/1.1\r\nhost: web.test\r\nconnection: upgrade\r\nupgrade: test\r\n\r\n";
        assert_eq!(wire.ask(ask).await.unwrap().status(), 101);
        tunnels.push(wire);
    }
    let block = vec![7; 1 << 20];
    let mut written = 0;
    for wire in &mut tunnels {
        // Until nothing more is taken for a while.
        while let Ok(Ok(count)) = timeout(Duration::from_millis(300), wire.io.write(&block)).await {
            written += count;
            assert!(written < 1 << 30, "the tunnel has no bottom");
        }
    }
    let after = [mesh.sidecar("client").memory_kib(), mesh.sidecar("web-1").memory_kib()];
    println!("{TUNNELS} tunnels took {} MiB; KiB before {before:?}, after {after:?}", written >> 20);
    for (before, after) in before.into_iter().zip(after) {
        assert!(after < before + TUNNELS as u64 * EACH_KIB, "{before} KiB grew to {after}");
    }
    // And the proxy serves others as before.
    mesh.reaches("client", "web").await;
}
