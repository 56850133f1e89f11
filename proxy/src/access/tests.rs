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
    let message = v1::Workload {
        namespace: "a".into(),
        name: "p".into(),
        ports: vec![port(8000)],
        probes: vec![probe(8000, "/ready"), probe(8000, "/live?full=1"), probe(9000, "/")],
        ..v1::Workload::default()
    };
    compile::workload(&message).unwrap()
}

#[test]
fn a_probe_is_exactly_what_the_pod_declares() {
    let workload = workload();
    let ports: Vec<_> = workload.probes.iter().map(|probes| probes.port.port).collect();
    assert_eq!(ports, [8000, 9000]);
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
        let request = Request::builder().method(method).uri(uri).body(()).unwrap();
        assert_eq!(is_probe(&workload, port, &request), expected, "{port} {method} {uri}");
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
