//! Request smuggling, tested differentially: the same bytes go through the real proxy into a real nginx and into a real Node
//! server, and all must have understood the same requests: the same number of them, with the same method, target, Host and
//! body, in the same order. What was refused reached nobody, and bytes behind it are nobody's request.
//!
//! The corpus ([`corpus`]) is made of probes of framing and of heads, alone and behind other requests, cut into segments at
//! odd places. The bodies are requests themselves, so that a reader who loses his way shows it. All of it goes over four ways:
//! hyper alone and the tensor path's own reader, each before both servers. Behind each case goes another client's request over
//! the same connection to the server. `PENSTOCK_SMUGGLING` names the cases to run, by the beginning of their name.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod backends;
mod client;
mod corpus;
mod framing;
mod heads;
mod verdict;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::own_ip;
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::proxy::{Proxy, Static};
use tokio::task::JoinSet;
use tokio::time::Instant;

use backends::Backend;
use client::{converse, innocent};
use corpus::{Case, Size, cases};
use verdict::{Account, Said, access_log, by_case, judge};

/// Cases on their way at once, each over a listener and connections of its own.
const LANES: usize = 8;
/// A body that the tensor path takes, with room for the requests in it to be cut to whole ones.
const TENSORS: Size = Size::Tensors(penstock_proxy::limits::DIRECT as usize + 200);

/// The proxy of a way.
enum Between {
    Alone(Proxy),
    Mesh(Box<Mesh>),
}

/// From clients to a server.
struct Way {
    name: String,
    fronts: Vec<SocketAddr>,
    size: Size,
    between: Between,
    backend: Backend,
}

impl Way {
    /// hyper's reader: a listener and an upstream for each lane, which share nothing.
    async fn plain(name: &'static str, backend: Backend, size: Size) -> Self {
        let mut proxy = Static::new("proxy");
        for lane in 0..LANES {
            let upstream = format!("lane-{lane}");
            proxy = proxy.listener("http", None, &upstream).upstream(
                &upstream,
                &[backend.address],
                "http1",
                None,
            );
        }
        let proxy = proxy.start().await;
        let fronts = proxy.listeners.clone();
        Self {
            name: format!("{name}, {}", backend.name),
            fronts,
            size,
            between: Between::Alone(proxy),
            backend,
        }
    }

    /// The tensor path's reader: the sidecar of a server whose requests may share executions.
    async fn gate(backend: fn(SocketAddr) -> std::pin::Pin<Box<dyn Future<Output = Backend>>>) -> Self {
        let mesh = Mesh::default().service("model", &[(annotation::BATCH, "max=8")]).pod("a", Some("model"));
        let mesh = mesh.annotate_pod("a", annotation::MTLS, "permissive").option("a", "--access-log=all");
        let backend = backend(mesh.application("a")).await;
        let mesh = mesh.start().await;
        let fronts = vec![mesh.inbound("a"); LANES];
        Self {
            name: format!("gate, {}", backend.name),
            fronts,
            size: TENSORS,
            between: Between::Mesh(Box::new(mesh)),
            backend,
        }
    }

    /// Has all cases sent, each lane one after the other, and tells what is known of each.
    async fn run(mut self, cases: Arc<Vec<Case>>) -> (String, Said) {
        let next = Arc::new(AtomicUsize::new(0));
        let mut lanes = JoinSet::new();
        for front in self.fronts.clone() {
            let (cases, next) = (Arc::clone(&cases), Arc::clone(&next));
            lanes.spawn(async move {
                let mut told = Vec::new();
                while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let answered = converse(front, case).await;
                    let innocent = innocent(front, &format!("/innocent/{}", case.number)).await.err();
                    told.push((case.number, answered, innocent));
                }
                told
            });
        }
        let told = lanes.join_all().await;
        let proxy: &mut Process = match &mut self.between {
            Between::Alone(proxy) => &mut proxy.process,
            Between::Mesh(mesh) => mesh.sidecar("a"),
        };
        // Whoever ends in good order has written all of its log.
        proxy.terminate();
        proxy.ended(Duration::from_secs(20)).await;
        let lines = access_log(&proxy.said());
        let server = self.backend.address;
        let mut said = by_case(lines, self.backend.end().await, server);
        for (number, answered, innocent) in told.into_iter().flatten() {
            let account = said.accounts.entry(number).or_default();
            (account.told, account.innocent) = (answered, innocent);
        }
        (self.name, said)
    }
}

fn anywhere() -> SocketAddr {
    SocketAddr::new(IpAddr::V4(own_ip()), 8_000)
}

/// The cases of a size that are asked for.
fn chosen(size: Size) -> Arc<Vec<Case>> {
    let wanted = std::env::var("PENSTOCK_SMUGGLING").unwrap_or_default();
    Arc::new(cases(size).into_iter().filter(|case| case.name.starts_with(&wanted)).collect())
}

#[test]
fn the_corpus_has_two_thousand_cases_with_names_of_their_own() {
    let (small, large) = (cases(Size::Small), cases(TENSORS));
    let names: BTreeSet<_> = small.iter().map(|case| case.name.as_str()).collect();
    assert!(names.len() >= 2_000, "{} cases", names.len());
    assert_eq!(names.len(), small.len(), "two cases have one name");
    assert!(small.iter().zip(&large).all(|(small, large)| small.name == large.name));
    for case in small.iter().chain(&large) {
        assert_eq!(case.segments().collect::<Vec<_>>().concat(), case.bytes, "{}", case.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_bytes_are_the_same_requests_for_hyper_for_the_tensor_path_for_nginx_and_for_node() {
    let begun = Instant::now();
    let (small, large) = (chosen(Size::Small), chosen(TENSORS));
    assert!(!small.is_empty(), "no case has a name that begins so");
    let ways = [
        Way::plain("hyper", Backend::nginx(anywhere()).await, Size::Small).await,
        Way::plain("hyper", Backend::node(anywhere()).await, Size::Small).await,
        Way::gate(|address| Box::pin(Backend::nginx(address))).await,
        Way::gate(|address| Box::pin(Backend::node(address))).await,
    ];
    let mut all = Vec::new();
    // Two at a time: more only wait for each other.
    let mut ways = ways.into_iter();
    while let (Some(one), Some(two)) = (ways.next(), ways.next()) {
        let cases = |way: &Way| Arc::clone(if way.size == Size::Small { &small } else { &large });
        let (of_one, of_two) = (cases(&one), cases(&two));
        let (one, two) = tokio::join!(one.run(of_one), two.run(of_two));
        all.extend([one, two]);
    }
    let mut complaints = Vec::new();
    for (name, said) in &all {
        complaints.extend(said.strays.iter().map(|stray| format!("== over {name}, of no case: {stray:?}\n")));
        println!("{name}: {} requests came over a connection behind a case's", said.followed);
    }
    let nothing = Account::default();
    for (small, large) in small.iter().zip(large.iter()) {
        let mut verdicts = Vec::new();
        for (name, said) in &all {
            let case = if name.starts_with("gate") { large } else { small };
            let account = said.accounts.get(&case.number).unwrap_or(&nothing);
            let (wrong, arrived) = judge(case, account);
            if !wrong.is_empty() {
                complaints.push(verdict::told(case, name, account, &wrong));
            }
            // What a server refused by itself says nothing of the proxy.
            if account.lines.iter().all(|line| line.status == 200 || !line.reason.is_empty()) {
                verdicts.push((name, arrived));
            }
        }
        if verdicts.windows(2).any(|two| two[0].1 != two[1].1) {
            complaints.push(format!(
                "== {}: they disagree about which requests there are: {verdicts:?}\n",
                small.name
            ));
        }
    }
    println!("{} cases over {} ways in {:?}", small.len(), all.len(), begun.elapsed());
    let shown = complaints.iter().take(9999).map(String::as_str).collect::<String>();
    assert!(complaints.is_empty(), "{} of {}:\n{shown}", complaints.len(), small.len() * all.len());
}
