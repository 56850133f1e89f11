//! What control hears of a living proxy.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use penstock_api::v1::{
    Ask, ControlMessage, Direction, ProxyMessage, TapStart, TapStop, ask, control_message, proxy_message,
};
use penstock_api::view;
use penstock_proxy::admin::Pages;
use penstock_proxy::config::Store;
use penstock_proxy::fleet::keep_attached;
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
