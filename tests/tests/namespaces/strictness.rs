//! Strict means strict: what cannot be secured fails, says why, and is never sent in plaintext instead.

use std::net::SocketAddr;
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_tests::testkit::certificates::spiffe;
use penstock_tests::testkit::namespace::contains;
use penstock_tests::testkit::pods::{APPLICATION, Pods};
use penstock_tests::testkit::wire::Message;
use penstock_tests::testkit::{PATIENCE, wait_until};
use tokio::time::timeout;

const SECRET: &str = "the-secret-of-the-pods";

async fn ask(pods: &Pods, from: &str, to: SocketAddr) -> std::io::Result<Message> {
    let request = format!("POST / HTTP/1.1\r\nhost: web\r\ncontent-length: {}\r\n\r\n{SECRET}", SECRET.len());
    let mut wire = pods.pod(from).connect(to)?;
    timeout(PATIENCE, wire.ask(request)).await.unwrap()
}

#[tokio::test]
async fn strict_refuses_plaintext_and_permissive_takes_it() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with_stranger("stranger").with("client", &[]).with("strict", &[]);
    let pods = pods.with("permissive", &[(annotation::MTLS, "permissive")]);
    // With two ports it matters that the proxy knows which of them was called: plaintext does not say.
    let pods = pods.declares("permissive", 9090);
    let pods =
        pods.service("web", "http", &["strict"]).service("open", "http", &["permissive"]).start().await;
    let strict = pods.pod("strict").mirror("I am strict");
    let _permissive = pods.pod("permissive").mirror("I am permissive");
    for name in ["strict", "permissive"] {
        let machine = &pods.pod(name).machine;
        for to in [machine.at(APPLICATION), machine.at_v6(APPLICATION)] {
            let answer = ask(&pods, "stranger", to).await.unwrap();
            if name == "strict" {
                assert_eq!((answer.status(), answer.reason()), (403, Some("plaintext-refused")), "{to}");
            } else {
                assert_eq!(answer.status(), 200, "{to}: {answer:?}");
                assert!(
                    answer.text().contains("I am permissive")
                        && !answer.text().contains("penstock-client-id")
                );
            }
            // Of the mesh, both take mutual TLS.
            let answer = ask(&pods, "client", to).await.unwrap();
            assert!(answer.text().contains(&spiffe("client")), "{to}: {answer:?}");
        }
    }
    // Bytes that are no HTTP get no answer, and the application does not see them.
    let before = strict.open();
    let mut wire = pods.pod("stranger").connect(pods.pod("strict").machine.at(APPLICATION)).unwrap();
    wire.send(b"\0\0\0\0").await.unwrap();
    assert_eq!(timeout(PATIENCE, wire.rest()).await.unwrap(), b"");
    assert_eq!(strict.open(), before);
}

#[tokio::test]
async fn pain_13_a_pod_that_lost_its_proxy_is_not_reached_in_plaintext() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with("client", &[]).with("server", &[]).service("web", "http", &["server"]);
    let mut pods = pods.start().await;
    let server = pods.pod("server").mirror("I am server");
    let addresses = [
        pods.cluster_ip("web"),
        pods.pod("server").machine.at(APPLICATION),
        pods.pod("server").machine.at_v6(APPLICATION),
    ];
    for to in addresses {
        assert_eq!(ask(&pods, "client", to).await.unwrap().status(), 200, "{to}");
    }
    let tap = pods.network.listen_in();
    pods.pod_mut("server").sidecar = None;
    wait_until("the application's connections are closed", PATIENCE, async || server.open() == 0).await;
    for rules in ["are there", "are gone"] {
        for to in addresses {
            let answer = ask(&pods, "client", to).await.unwrap();
            assert_eq!(answer.status(), 503, "the rules {rules}, {to}: {answer:?}");
            let reason = answer.reason().unwrap_or_default();
            assert!(
                ["connect-failed", "connect-timeout", "no-endpoint"].contains(&reason),
                "the rules {rules}, {to}: {answer:?}"
            );
        }
        // The worst case: nothing stands between the network and the application any more.
        assert!(pods.proxy_command("server", &["init", "--remove"]).status.success());
    }
    let direct = ask(&pods, "server", pods.pod("server").machine.at(APPLICATION)).await.unwrap();
    assert!(direct.text().contains("I am server"), "the application itself was there all the time");
    assert!(!contains(&tap.seen(), SECRET), "it was sent in plaintext instead");
}

#[tokio::test]
async fn a_port_that_a_pod_does_not_declare_is_refused_and_nothing_is_sent() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with("client", &[]).with("server", &[]).service("web", "http", &["server"]).start().await;
    let _hidden = pods.pod("server").machine.namespace.listen(7777);
    let tap = pods.network.listen_in();
    for to in [pods.pod("server").machine.at(7777), pods.pod("server").machine.at_v6(7777)] {
        let answer = ask(&pods, "client", to).await.unwrap();
        assert_eq!((answer.status(), answer.reason()), (404, Some("unknown-port")), "{to}: {answer:?}");
        let mut wire = pods.pod("client").connect(to).unwrap();
        wire.send(format!("\0\0{SECRET}")).await.unwrap();
        assert_eq!(timeout(Duration::from_secs(10), wire.rest()).await.unwrap(), b"", "{to}");
    }
    assert!(!contains(&tap.seen(), SECRET), "a pod of the mesh was called in plaintext");
}
