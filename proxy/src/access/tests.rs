use bytes::Bytes;
use http::Uri;

use super::*;
use crate::config::compile;
use crate::headers::settle_path;
use penstock_api::v1;

fn workload() -> Workload {
    let port = |port: u32| v1::WorkloadPort {
        port,
        application: format!("127.0.0.1:{port}"),
        ..v1::WorkloadPort::default()
    };
    let probe = |port: u32, path: &str| v1::Probe {
        port,
        path: path.into(),
        application: format!("127.0.0.1:{port}"),
    };
    let grpc = |port: u32, service: &str| v1::GrpcProbe {
        port,
        service: service.into(),
        application: format!("127.0.0.1:{port}"),
    };
    let message = v1::Workload {
        namespace: "a".into(),
        name: "p".into(),
        ports: vec![port(8000)],
        probes: vec![probe(8000, "/ready"), probe(8000, "/live?full=1"), probe(9000, "/")],
        grpc_probes: vec![grpc(9001, "live")],
        ..v1::Workload::default()
    };
    compile::workload(&message).unwrap()
}

#[test]
fn a_probe_is_exactly_what_the_pod_declares() {
    let workload = workload();
    let ports: Vec<_> = workload.probes.iter().map(|probes| probes.port.port).collect();
    assert_eq!(ports, [8000, 9000, 9001]);
    let table = [
        (8000, "GET", "/ready", true),
        (8000, "GET", "/live?full=1", true),
        (9000, "GET", "/", true),
        (9000, "GET", "/ready", false),
        (8000, "GET", "/", false),
        (8000, "GET", "/ready/", false),
        (8000, "GET", "/ready/x", false),
        (8000, "GET", "//ready", false),
        (8000, "GET", "/READY", false),
        (8000, "GET", "/%72eady", false),
        (8000, "GET", "/ready?x", false),
        (8000, "GET", "/live", false),
        (8000, "HEAD", "/ready", false),
        (8000, "POST", "/ready", false),
        (8001, "GET", "/ready", false),
    ];
    for (port, method, uri, expected) in table {
        let request = Request::builder().method(method).uri(uri).body(RequestBody::Empty).unwrap();
        assert_eq!(probed(&workload, port, &request).is_some(), expected, "{port} {method} {uri}");
    }
    for (more, expected) in [
        (("x-any", "1"), true),
        (("upgrade", "websocket"), false),
        (("content-length", "0"), false),
        (("transfer-encoding", "chunked"), false),
    ] {
        let request =
            Request::builder().uri("/ready").header(more.0, more.1).body(RequestBody::Empty).unwrap();
        assert_eq!(probed(&workload, 8000, &request).is_some(), expected, "{more:?}");
    }
    // Over HTTP/2 a body comes without a word of it in the head.
    let body = RequestBody::Parts([Bytes::from_static(b"more")].into());
    let request = Request::builder().uri("/ready").body(body).unwrap();
    assert!(probed(&workload, 8000, &request).is_none());
    let health = "/grpc.health.v1.Health/Check";
    for (port, method, path, content_type, expected) in [
        (9001, "POST", health, "application/grpc", true),
        (9001, "POST", health, "application/json", false),
        (9001, "GET", health, "application/grpc", false),
        (9001, "POST", "/grpc.health.v1.Health/Watch", "application/grpc", false),
        (8000, "POST", health, "application/grpc", false),
    ] {
        let request = Request::builder().method(method).uri(path).header("content-type", content_type);
        let request = request.body(RequestBody::Empty).unwrap();
        assert_eq!(
            probed(&workload, port, &request).is_some(),
            expected,
            "{port} {method} {path} {content_type}"
        );
    }
}

#[test]
fn a_path_is_settled_for_everybody_after() {
    let table = [
        ("/a/b?x=/../", Ok("/a/b?x=/../")),
        ("/a//b/%61?x=%61", Ok("/a/b/a?x=%61")),
        ("http://h:1/a/../b", Ok("http://h:1/b")),
        ("/a%2fb", Err(400)),
    ];
    for (uri, expected) in table {
        let mut uri: Uri = uri.parse().unwrap();
        let settled = settle_path(&mut uri, path::canonical);
        match expected {
            Ok(expected) => assert_eq!((settled.is_ok(), uri.to_string().as_str()), (true, expected)),
            Err(status) => assert_eq!(settled.unwrap_err().reason.status(), status),
        }
    }
}
