//! What control hears of a living proxy.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use penstock_api::resource::{Kind, Payload};
use penstock_api::v1::{
    self, Ask, ControlMessage, Direction, ProxyMessage, TapStart, TapStop, ask, control_message,
    proxy_message,
};
use penstock_api::{ServiceName, view};
use penstock_balance::LoadReport;
use penstock_proxy::admin::Pages;
use penstock_proxy::config::store::Change;
use penstock_proxy::config::{Known, Store};
use penstock_proxy::fleet::keep_attached;
use penstock_proxy::telemetry::shadow::{self, Count};
use penstock_proxy::telemetry::{Details, End, Labels, Options, Telemetry};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::authority::{Authority, CONTROL, WEB};
use crate::played::{Attach, Played, within};

fn labels() -> Labels {
    Labels {
        direction: Direction::Outbound,
        service: "a/digits".parse().unwrap(),
        backend: "a/digits-v2".parse().unwrap(),
        endpoint: "a/digits-v2-1".into(),
        route: "a/canary#0".into(),
    }
}

fn end() -> End {
    End {
        status: 200,
        reason: None,
        failed: false,
        mtls: true,
        tries: 1,
        headers: Duration::from_millis(3),
        total: Duration::from_millis(5),
        request_bytes: 10,
        response_bytes: 20,
    }
}

fn details() -> Details {
    Details {
        at: UNIX_EPOCH + Duration::from_secs(1000),
        method: Some(http::Method::POST),
        authority: None,
        path: Some("/v2/infer".parse().unwrap()),
        version: Some(http::Version::HTTP_2),
        client: Some(WEB.parse().unwrap()),
        server: None,
        trace: None,
        executed: None,
        flags: "",
        verdict: "",
        decision: None,
    }
}

async fn say(attach: &Attach, kind: control_message::Kind) {
    attach.say.send(Ok(ControlMessage { kind: Some(kind) })).await.unwrap();
}

/// The next message that `pick` wants; others are passed over.
async fn until<T>(attach: &mut Attach, pick: impl Fn(proxy_message::Kind) -> Option<T>) -> T {
    loop {
        if let ProxyMessage { kind: Some(kind) } = attach.next().await
            && let Some(found) = pick(kind)
        {
            return found;
        }
    }
}

/// Has the endpoint of the [`labels`] known, and a report of its load heard.
async fn is_loaded(pages: &Pages) {
    let name: ServiceName = "a/digits-v2".parse().unwrap();
    let service = v1::Service {
        namespace: "a".into(),
        name: "digits-v2".into(),
        ports: vec![v1::ServicePort { port: 80, ..Default::default() }],
        policy: None,
    };
    let endpoint = v1::Endpoint {
        name: "a/digits-v2-1".into(),
        ip: "127.0.0.1".into(),
        ports: vec![v1::PortTarget { service_port: 80, port: 8000 }],
        ..Default::default()
    };
    let endpoints = v1::Endpoints { endpoints: vec![endpoint] };
    let part = |kind, payload| Change { kind, name: name.to_string(), payload };
    let refused = pages.store.apply(vec![
        part(Kind::Service, Some(Payload::Service(service))),
        part(Kind::Endpoints, Some(Payload::Endpoints(endpoints))),
        part(Kind::Routes, None),
    ]);
    assert_eq!(refused, []);
    let Ok(Known::Here(service)) = pages.store.service(&name).await else { panic!("{name} is not known") };
    let cluster = &service.ports[0].cluster;
    let report = LoadReport { utilization: Some(0.42), ..LoadReport::default() };
    cluster.pool.told(&cluster.endpoints()[0].state, report, pages.epoch.elapsed());
}

#[tokio::test]
async fn control_hears_outcomes_taps_and_answers_and_the_last_words() {
    let authority = Authority::new("root");
    let identity = Arc::new(authority.identity(WEB));
    let mut played = Played::start(authority, CONTROL, Duration::from_secs(3600)).await;
    let telemetry = Arc::new(Telemetry::new(&Options::default()).unwrap());
    let pages = Arc::new(Pages {
        store: Arc::new(Store::default()),
        identity,
        telemetry: Arc::clone(&telemetry),
        level: None,
        draining: watch::Sender::new(false),
        epoch: Instant::now(),
    });
    let stop = CancellationToken::new();
    let dial = || async { Some(played.control.connect(&pages.identity).await.unwrap()) };
    let (dialled, second) = (watch::Sender::new(dial().await), dial().await);
    let attached = keep_attached(dialled.subscribe(), "a/web-1".into(), Arc::clone(&pages), stop.clone());
    let attached = tokio::spawn(attached);
    let mut attach = played.attach().await;
    let proxy_message::Kind::Hello(hello) = attach.next().await.kind.unwrap() else { panic!("no hello") };
    assert_eq!(hello.node, "a/web-1");

    is_loaded(&pages).await;
    let cell = telemetry.outcomes.cell(labels());
    cell.finish(&end());
    let row = until(&mut attach, |kind| match kind {
        proxy_message::Kind::Outcomes(outcomes) => outcomes.rows.into_iter().next(),
        _ => None,
    })
    .await;
    assert_eq!(
        (row.service.as_str(), row.backend.as_str(), row.requests, row.mtls),
        ("a/digits", "a/digits-v2", 1, 1)
    );
    assert_eq!(row.latency.iter().map(|bucket| bucket.count).sum::<u64>(), 1);
    assert_eq!(row.load_permille, Some(420));

    let (service, mirror) = ("a/digits".parse().unwrap(), "a/digits-v2".parse().unwrap());
    let copies = telemetry.shadows.cell(shadow::Parties { service, mirror });
    for what in [Count::Answered, Count::Failed, Count::Compared, Count::Agreed] {
        copies.count(what);
    }
    copies.took(Duration::from_millis(2), Duration::from_millis(1));
    copies.differed(0.5);
    let told = until(&mut attach, |kind| match kind {
        proxy_message::Kind::Outcomes(outcomes) => outcomes.shadows.into_iter().next(),
        _ => None,
    })
    .await;
    assert_eq!((told.service.as_str(), told.mirror.as_str()), ("a/digits", "a/digits-v2"));
    assert_eq!((told.sent, told.failures, told.compared, told.agreed), (2, 1, 1, 1));
    assert_eq!((told.latency.len(), told.client_latency.len(), told.largest_difference), (1, 1, 0.5));

    assert!(!telemetry.wants_details(Direction::Outbound));
    let start = TapStart { tap: 7, service: "a/digits".into(), both: true, ..Default::default() };
    say(&attach, control_message::Kind::TapStart(start)).await;
    within(async {
        while !telemetry.wants_details(Direction::Outbound) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    telemetry.finish(&labels(), &end(), Some(details()));
    let event = until(&mut attach, |kind| match kind {
        proxy_message::Kind::Tap(event) => Some(event),
        _ => None,
    })
    .await;
    assert_eq!(
        (event.tap, event.client.as_str(), event.path.as_str(), event.total_us),
        (7, WEB, "/v2/infer", 5000)
    );
    say(&attach, control_message::Kind::TapStop(TapStop { tap: 7 })).await;

    say(&attach, control_message::Kind::Ask(Ask { request: 3, what: Some(ask::What::Certificates(true)) }))
        .await;
    say(&attach, control_message::Kind::Ask(Ask { request: 4, what: None })).await;
    let answer = |kind| match kind {
        proxy_message::Kind::Answer(answer) => Some(answer),
        _ => None,
    };
    let mut answers = [until(&mut attach, answer).await, until(&mut attach, answer).await];
    answers.sort_by_key(|answer| answer.request);
    let certificates: Vec<view::Certificate> = serde_json::from_str(&answers[0].json).unwrap();
    assert_eq!((answers[0].request, certificates[0].name.as_str()), (3, WEB));
    assert!(answers[1].json.is_empty() && answers[1].error.contains("upgrade"), "{:?}", answers[1]);
    assert!(!telemetry.wants_details(Direction::Outbound), "the tap is closed");

    // The stream breaks, and what happens meanwhile is told on the next one.
    say(&attach, control_message::Kind::TapStart(TapStart { tap: 8, both: true, ..Default::default() }))
        .await;
    drop(attach);
    cell.finish(&end());
    let mut attach = played.attach().await;
    assert!(matches!(attach.next().await.kind, Some(proxy_message::Kind::Hello(_))));
    let requests = |kind| match kind {
        proxy_message::Kind::Outcomes(outcomes) => outcomes.rows.first().map(|row| row.requests),
        _ => None,
    };
    assert_eq!(until(&mut attach, requests).await, 1);
    assert!(!telemetry.wants_details(Direction::Inbound), "taps end with their stream");

    // The configuration goes another way: what happened until then is told on the old one.
    cell.finish(&end());
    dialled.send_replace(None);
    assert_eq!(until(&mut attach, requests).await, 1, "the last words on this way");
    drop(attach);
    dialled.send_replace(second);
    let mut attach = played.attach().await;
    assert!(matches!(attach.next().await.kind, Some(proxy_message::Kind::Hello(_))));

    cell.finish(&end());
    cell.finish(&end());
    stop.cancel();
    assert_eq!(until(&mut attach, requests).await, 2, "the last words");
    drop(attach);
    within(attached).await.unwrap();
}
