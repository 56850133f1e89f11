//! What proxies tell, and how they are asked.

use std::time::Duration;

use penstock_api::v1::fleet_client::FleetClient;
use penstock_api::v1::replicas_client::ReplicasClient;
use penstock_api::v1::{
    self, Answer, Bucket, ControlMessage, Hello, Outcome, Outcomes, ProxyMessage, ReachRequest, TapEvent,
    ask, control_message, proxy_message,
};
use penstock_api::view;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::mesh::{Mesh, eventually};

const HOUR: Duration = Duration::from_secs(3_600);

struct Attached {
    sender: mpsc::Sender<ProxyMessage>,
    messages: Streaming<ControlMessage>,
}

async fn attach(mesh: &Mesh, node: &str) -> Result<Attached, Status> {
    let (sender, receiver) = mpsc::channel(16);
    let hello = Hello { node: node.into(), version: "test".into() };
    sender.send(ProxyMessage { kind: Some(proxy_message::Kind::Hello(hello)) }).await.unwrap();
    let mut client = FleetClient::new(mesh.proxy_channel("team-a").await);
    let messages = client.attach(ReceiverStream::new(receiver)).await?.into_inner();
    Ok(Attached { sender, messages })
}

impl Attached {
    async fn say(&self, kind: proxy_message::Kind) {
        self.sender.send(ProxyMessage { kind: Some(kind) }).await.unwrap();
    }

    async fn next(&mut self) -> control_message::Kind {
        let next = tokio::time::timeout(Duration::from_secs(10), self.messages.message()).await;
        next.expect("no message").unwrap().expect("the stream ended").kind.unwrap()
    }

    /// Answers the next question.
    async fn answer(&mut self, json: &str, error: &str) -> ask::What {
        loop {
            if let control_message::Kind::Ask(ask) = self.next().await {
                let answer = Answer { request: ask.request, json: json.into(), error: error.into() };
                self.say(proxy_message::Kind::Answer(answer)).await;
                return ask.what.unwrap();
            }
        }
    }
}

/// What replicas of control tell each other is for nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_is_not_told_what_replicas_tell_each_other() {
    let mesh = Mesh::start(HOUR).await;
    let mut client = ReplicasClient::new(mesh.proxy_channel("team-a").await);
    let refused = client.reach(ReachRequest {}).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("to control alone"), "{}", refused.message());
}

#[tokio::test(flavor = "multi_thread")]
async fn outcomes_of_all_proxies_add_up() {
    let mesh = Mesh::start(HOUR).await;
    let proxies = [attach(&mesh, "team-a/p").await.unwrap(), attach(&mesh, "team-a/q").await.unwrap()];
    let row = |backend: &str, requests| Outcome {
        service: "a/s".into(),
        backend: backend.into(),
        requests,
        failures: 1,
        mtls: requests,
        latency: vec![Bucket { index: 64, count: requests }],
        ..Outcome::default()
    };
    for proxy in &proxies {
        let outcomes = Outcomes {
            interval_ms: 1_000,
            rows: vec![row("a/v1", 30), row("a/v2", 10)],
            ..Default::default()
        };
        proxy.say(proxy_message::Kind::Outcomes(outcomes)).await;
    }
    let stat = || async { mesh.json::<view::Stat>("/stat?window=10s").await };
    eventually("both proxies' outcomes", || async {
        stat().await.rows.iter().map(|r| r.requests).sum::<u64>() == 80
    })
    .await;
    let stat = stat().await;
    let v1 = &stat.rows[0];
    assert_eq!((&*v1.backend, v1.requests, v1.share, v1.mtls), ("a/v1", 60, Some(0.75), Some(1.0)));
    assert!(v1.p50_ms.unwrap() > 0.0 && (v1.success.unwrap() - 58.0 / 60.0).abs() < 1e-9);
    let (status, body) = mesh.page("/stat?window=yesterday").await;
    assert_eq!(status, 400);
    let failure: view::Failure = serde_json::from_str(&body).unwrap();
    assert!(failure.error.contains("write for example window=10s"), "{}", failure.error);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_is_answered_refused_or_given_up() {
    let mesh = Mesh::start(HOUR).await;
    let mut proxy = attach(&mesh, "team-a/p").await.unwrap();
    eventually("the proxy", || async { mesh.control.fleet.attached_nodes() == ["team-a/p"] }).await;
    let endpoint = view::ProxyEndpoint {
        service: "a/s".into(),
        endpoint: "a/p0".into(),
        address: "127.0.0.11:15006".into(),
        state: "ejected".into(),
        in_flight: 3,
        ..view::ProxyEndpoint::default()
    };
    let json = serde_json::to_string(&[endpoint]).unwrap();
    let (rows, what) =
        tokio::join!(mesh.json::<Vec<view::EndpointRow>>("/endpoints"), proxy.answer(&json, ""));
    assert_eq!(what, ask::What::Endpoints(true));
    assert_eq!((&*rows[0].state, rows[0].in_flight), ("ejected", 3));

    let (renewed, what) =
        tokio::join!(mesh.json::<Vec<view::Renewal>>("POST /renew"), proxy.answer("{}", ""));
    assert_eq!(what, ask::What::Renew(true));
    assert_eq!(renewed, [view::Renewal { node: "team-a/p".into(), error: None }]);
    let (refused, _) = tokio::join!(
        mesh.json::<Vec<view::Renewal>>("POST /renew?node=team-a/p"),
        proxy.answer("", "the token has expired")
    );
    assert_eq!(refused[0].error.as_deref(), Some("team-a/p could not answer: the token has expired"));
    assert_eq!(mesh.page("POST /renew?node=team-a/none").await.0, 404);
    assert_eq!(mesh.page("/renew").await.0, 405);
    // Nobody answers: the page comes nevertheless.
    assert!(mesh.json::<Vec<view::EndpointRow>>("/endpoints").await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tap_shows_requests_until_its_limit_and_then_stops_the_proxies() {
    let mesh = Mesh::start(HOUR).await;
    let mut proxy = attach(&mesh, "team-a/p").await.unwrap();
    eventually("the proxy", || async { mesh.control.fleet.attached_nodes().len() == 1 }).await;
    let mut tcp = TcpStream::connect(mesh.control.api).await.unwrap();
    let request = "GET /tap?service=a/s&direction=outbound&limit=2 HTTP/1.1\r\nhost: control\r\n\r\n";
    tcp.write_all(request.as_bytes()).await.unwrap();
    let control_message::Kind::TapStart(start) = proxy.next().await else { panic!("no tap was started") };
    assert_eq!((&*start.service, start.direction(), start.both), ("a/s", v1::Direction::Outbound, false));
    for status in [200, 503] {
        let event =
            TapEvent { tap: start.tap, at_us: 1_000_000, status, headers_us: 1_500, ..TapEvent::default() };
        proxy.say(proxy_message::Kind::Tap(event)).await;
    }
    let mut lines = BufReader::new(tcp).lines();
    let mut taps: Vec<view::Tap> = Vec::new();
    while taps.len() < 2 {
        let line = lines.next_line().await.unwrap().unwrap();
        if line.starts_with('{') {
            taps.push(serde_json::from_str(&line).unwrap());
        }
    }
    assert_eq!((taps[0].status, &*taps[0].at, taps[0].headers_ms), (200, "1970-01-01T00:00:01.000000Z", 1.5));
    assert!(matches!(proxy.next().await, control_message::Kind::TapStop(stop) if stop.tap == start.tap));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_attaches_under_its_own_namespace_only() {
    let mesh = Mesh::start(HOUR).await;
    let mut attached = attach(&mesh, "team-b/p").await.unwrap();
    assert_eq!(attached.messages.message().await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_that_does_not_exist_names_those_that_do() {
    let mesh = Mesh::start(HOUR).await;
    let (status, body) = mesh.page("/stats").await;
    assert!(status == 404 && body.contains("/stat?window=10s"), "{body}");
    assert_eq!(mesh.page("/healthz").await, (200, "ok\n".to_owned()));
}
