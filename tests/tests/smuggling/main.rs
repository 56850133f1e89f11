//! Request smuggling, tested differentially: the same bytes go through the real proxy into a real nginx and into a real Node
//! server, and all must have understood the same requests: the same number of them, with the same method, target, Host and
//! body, in the same order. What was refused reached nobody, and bytes behind it are nobody's request.
//!
//! The corpus ([`corpus`]) is made of probes of framing and of heads, alone and behind other requests, cut into segments at
//! odd places. The bodies are requests themselves, so that a reader who loses his way shows it. All of it goes over five ways:
//! hyper alone and the tensor path's own reader, each before both servers, and two proxies before nginx. Behind each case goes another client's request over
//! the same connection to the server. `PENSTOCK_SMUGGLING` names the cases to run, by the beginning of their name.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod backends;
mod client;
mod corpus;
mod framing;
mod heads;
mod http2;
mod misbehaviour;
mod verdict;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use penstock_api::names::annotation;
use penstock_tests::testkit::mesh::Mesh;
use penstock_tests::testkit::own_ip;
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::proxy::{Proxy, Static, TwoHops};
use tokio::task::JoinSet;
use tokio::time::Instant;

use backends::Backend;
use client::{converse, innocent};
use corpus::{Case, Size, cases};
use verdict::{Account, Said, access_log, by_case, comparable, judge};

/// Cases on their way at once, each over a listener and connections of its own.
const LANES: usize = 8;
/// A body that the tensor path takes, with room for the requests in it to be cut to whole ones.
const TENSORS: Size = Size::Tensors(penstock_proxy::limits::DIRECT as usize + 200);

/// The proxy of a way.
enum Between {
    Alone(Proxy),
    Hops(TwoHops),
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
    async fn plain(backend: Backend) -> Self {
        let server = [backend.address];
        let lanes = (0..LANES).map(|lane| format!("lane-{lane}"));
        let proxy = lanes.fold(Static::new("proxy"), |proxy, lane| {
            proxy.listener("http", None, &lane).upstream(&lane, &server, "http1", None)
        });
        let proxy = proxy.start().await;
        let (name, fronts) = (format!("hyper, {}", backend.name), proxy.listeners.clone());
        Self { name, fronts, size: Size::Small, between: Between::Alone(proxy), backend }
    }

    /// Two proxies with HTTP/2 between them.
    async fn hops(backend: Backend) -> Self {
        let hops = TwoHops::start(backend.address, "http").await;
        let (name, fronts) = (format!("two hops, {}", backend.name), vec![hops.outbound.front(); LANES]);
        Self { name, fronts, size: Size::Small, between: Between::Hops(hops), backend }
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
            Between::Hops(hops) => &mut hops.outbound.process,
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
        Way::plain(Backend::nginx(anywhere()).await).await,
        Way::plain(Backend::node(anywhere()).await).await,
        Way::hops(Backend::nginx(anywhere()).await).await,
        Way::gate(|address| Box::pin(Backend::nginx(address))).await,
        Way::gate(|address| Box::pin(Backend::node(address))).await,
    ];
    // Two at a time: more only wait for each other.
    let cases = |way: &Way| Arc::clone(if way.size == Size::Small { &small } else { &large });
    let ran = futures_util::stream::iter(ways).map(|way| {
        let cases = cases(&way);
        way.run(cases)
    });
    let all: Vec<_> = ran.buffered(2).collect().await;
    let mut complaints = Vec::new();
    for (name, said) in &all {
        complaints.extend(said.strays.iter().map(|stray| format!("== over {name}, of no case: {stray:?}\n")));
        println!("{name}: {} requests of others came over a connection behind a case's", said.followed);
        // Each lane of these has one connection to the server, and its next request goes over it.
        let all_ran = std::env::var_os("PENSTOCK_SMUGGLING").is_none();
        if all_ran && name.starts_with("hyper") && said.followed < small.len() / 2 {
            complaints.push(format!("== over {name}: only {} connections were used again\n", said.followed));
        }
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
            // h2 refuses a length of forty zeros, which is a length.
            let arrived = comparable(case, account, arrived).filter(|_| !name.starts_with("two hops"));
            verdicts.extend(arrived.map(|arrived| (name, arrived)));
        }
        if verdicts.windows(2).any(|two| two[0].1 != two[1].1) {
            complaints.push(format!(
                "== {}: they disagree about which requests there are: {verdicts:?}\n",
                small.name
            ));
        }
    }
    println!("{} cases over {} ways in {:?}", small.len(), all.len(), begun.elapsed());
    let shown = complaints.iter().take(40).map(String::as_str).collect::<String>();
    assert!(complaints.is_empty(), "{} of {}:\n{shown}", complaints.len(), small.len() * all.len());
}
