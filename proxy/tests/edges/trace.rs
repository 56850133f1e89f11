//! Spans arrive at a collector.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper_util::rt::{TokioExecutor, TokioIo};
use penstock_api::Reason;
use penstock_api::v1::Direction;
use penstock_proxy::telemetry::trace::{Execution, Span};
use penstock_proxy::telemetry::{Details, End, Labels, Options, Telemetry};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use crate::played::within;

/// A collector that hands each request's path and body to the test.
async fn collector() -> (String, mpsc::Receiver<(String, Bytes)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (heard, requests) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let heard = heard.clone();
            let answer = hyper::service::service_fn(move |request: http::Request<Incoming>| {
                let heard = heard.clone();
                async move {
                    let path = request.uri().path().to_owned();
                    let body = request.into_body().collect().await?.to_bytes();
                    let _ = heard.send((path, body)).await;
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", "0".parse().unwrap());
                    // An empty message, then the trailers.
                    let frames = [Frame::data(Bytes::from_static(&[0; 5])), Frame::trailers(trailers)];
                    let body = StreamBody::new(tokio_stream::iter(frames.map(Ok::<_, hyper::Error>)));
                    let response = http::Response::builder().header("content-type", "application/grpc");
                    Ok::<_, hyper::Error>(response.body(body).unwrap())
                }
            });
            tokio::spawn(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(tcp), answer),
            );
        }
    });
    (url, requests)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sampled_request_becomes_a_span_with_its_ids_and_reason() {
    let (url, mut requests) = collector().await;
    let options = Options {
        otlp: Some(url),
        trace_sample: 0.0,
        node: "a/web-1".into(),
        service: "a/web".into(),
        ..Options::default()
    };
    let telemetry = Telemetry::new(&options).unwrap();
    assert!(telemetry.wants_details(Direction::Inbound));
    let mut rng = SmallRng::seed_from_u64(7);
    let labels = Labels {
        direction: Direction::Outbound,
        service: "a/digits".parse().unwrap(),
        backend: "a/digits-v2".parse().unwrap(),
        endpoint: "a/digits-v2-1".into(),
        route: "a/canary#0".into(),
    };
    let end = End {
        status: 503,
        reason: Some(Reason::NoEndpoint),
        failed: true,
        mtls: true,
        tries: 1,
        headers: Duration::from_millis(3),
        total: Duration::from_millis(5),
        request_bytes: 0,
        response_bytes: 0,
    };
    let mut headers = HeaderMap::new();
    let mut finish = |headers: &HeaderMap| {
        let trace = telemetry.start_span(headers, &mut rng);
        let details = Details {
            at: SystemTime::now(),
            method: Some(http::Method::POST),
            authority: None,
            path: Some("/v2/infer?secret=1".parse().unwrap()),
            version: Some(http::Version::HTTP_2),
            client: None,
            server: None,
            trace,
            executed: None,
            flags: "",
            verdict: "",
            decision: None,
        };
        telemetry.finish(&labels, &end, Some(details));
        trace.unwrap()
    };
    let unsampled = finish(&headers);
    headers.insert("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap());
    let sampled = finish(&headers);

    let (path, body) = within(requests.recv()).await.unwrap();
    assert_eq!(path, "/opentelemetry.proto.collector.trace.v1.TraceService/Export");
    let holds = |bytes: &[u8]| body.windows(bytes.len()).any(|window| window == bytes);
    assert!(holds(&sampled.trace.to_be_bytes()) && holds(&sampled.id.to_be_bytes()));
    assert!(holds(&0xb7ad6b7169203331_u64.to_be_bytes()), "the caller's span is the parent");
    for text in ["a/web", "a/web-1", "POST a/canary#0", "a/digits-v2-1", "no-endpoint", "/v2/infer"] {
        assert!(holds(text.as_bytes()), "{text}");
    }
    assert!(!holds(b"secret"), "queries stay here");
    assert!(!holds(&unsampled.trace.to_be_bytes()), "what is not sampled is not sent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_execution_for_several_links_to_all_who_are_recorded() {
    let (url, mut requests) = collector().await;
    let options = Options { otlp: Some(url), node: "a/web-1".into(), ..Options::default() };
    let telemetry = Telemetry::new(&options).unwrap();
    let mut rng = SmallRng::seed_from_u64(8);
    let span = |trace, id| Span { trace, id, parent: 0, sampled: true };
    let members = [span(0xaa11, 0xa1), span(0xbb22, 0xb2), span(0xcc33, 0xc3)];
    let execution = Execution {
        span: members[0].child(&mut rng),
        of: &members,
        model: "digits/1",
        id: 17,
        rows: 5,
        members: 4,
        took: Duration::from_millis(7),
        failed: false,
    };
    assert_eq!((execution.span.trace, execution.span.parent), (0xaa11, 0xa1));
    telemetry.executed(&execution);
    let (_, body) = within(requests.recv()).await.unwrap();
    let holds = |bytes: &[u8]| body.windows(bytes.len()).any(|window| window == bytes);
    for member in members {
        assert!(holds(&member.trace.to_be_bytes()) && holds(&member.id.to_be_bytes()), "{member:?}");
    }
    for text in ["execute digits/1", "penstock.batch.id", "penstock.batch.rows", "penstock.batch.requests"] {
        assert!(holds(text.as_bytes()), "{text}");
    }
}
