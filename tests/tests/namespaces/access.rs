//! Who may ask whom, where nobody can go past the proxies: bytes by identity, and what the kubelet asks for.

use std::time::Duration;

use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::pods::{APPLICATION, Pods};
use penstock_tests::testkit::wire::get;
use penstock_tests::testkit::{PATIENCE, wait_until};
use tokio::time::{Instant, timeout};

fn allow(account: &str) -> String {
    format!(
        "apiVersion: penstock.io/v1alpha1\nkind: AccessPolicy\nmetadata: {{name: p, namespace: test}}\nspec:\n  \
         targetRefs: [{{kind: Service, name: db}}]\n  action: Allow\n  rules: [{{from: [{{serviceAccounts: [{account}]}}]}}]\n"
    )
}

#[tokio::test]
async fn bytes_are_for_whom_a_policy_allows_and_end_when_it_no_longer_does() {
    let Some(pods) = Pods::new() else { return };
    let pods =
        pods.with("front", &[]).with("other", &[]).with("server", &[]).service("db", "tcp", &["server"]);
    let mut pods = pods.start().await;
    let _echo =
        Origin::on(pods.pod("server").machine.namespace.listen(APPLICATION), |mut client| async move {
            while let Ok(bytes) = client.bytes(4).await {
                if client.send(bytes).await.is_err() {
                    return;
                }
            }
        });
    let to = pods.cluster_ip("db");
    pods.mesh.file("access.yaml", &allow("front"));
    pods.mesh.write();
    wait_until("the policy is in force", PATIENCE, async || {
        let mut other = pods.pod("other").connect(to).unwrap();
        let _ = other.send("ping").await;
        other.bytes(4).await.is_err()
    })
    .await;

    let mut front = pods.pod("front").connect(to).unwrap();
    front.send("ping").await.unwrap();
    assert_eq!(front.bytes(4).await.unwrap(), b"ping");
    let mut other = pods.pod("other").connect(to).unwrap();
    other.send("ping").await.unwrap();
    assert_eq!(
        timeout(PATIENCE, other.rest()).await.unwrap(),
        b"",
        "closed without a byte of the application's"
    );

    // The policy turns: what is open and no longer allowed ends within a second.
    pods.mesh.file("access.yaml", &allow("other"));
    let begun = Instant::now();
    pods.mesh.write();
    assert_eq!(timeout(PATIENCE, front.rest()).await.unwrap(), b"");
    assert!(begun.elapsed() < Duration::from_secs(1), "only after {:?}", begun.elapsed());
    let mut other = pods.pod("other").connect(to).unwrap();
    other.send("ping").await.unwrap();
    assert_eq!(other.bytes(4).await.unwrap(), b"ping");
}

#[tokio::test]
async fn pain_14_the_kubelet_reaches_what_a_pod_declares_and_nothing_else() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with_stranger("node").with("client", &[]).with("server", &[]);
    let pods = pods.service("db", "http", &["server"]).probe("server", "/healthz?full=1");
    let mut pods = pods.start().await;
    let _server = pods.pod("server").mirror("server");
    // Policies are for those who have an identity; the kubelet has none.
    pods.mesh.file("access.yaml", &allow("nobody"));
    pods.mesh.write();
    wait_until("the policy is in force", PATIENCE, async || {
        let mut client = pods.pod("client").connect(pods.cluster_ip("db")).unwrap();
        let answer = client.ask("GET / HTTP/1.1\r\nhost: db\r\n\r\n").await;
        answer.is_ok_and(|answer| answer.status() == 403)
    })
    .await;
    let machine = &pods.pod("server").machine;
    for to in [machine.at(APPLICATION), machine.at_v6(APPLICATION)] {
        let ask = async |method: &str, path: &str| {
            let mut wire = pods.pod("node").connect(to).unwrap();
            let request = format!("{method} {path} HTTP/1.1\r\nhost: {to}\r\n\r\n");
            timeout(PATIENCE, wire.ask(request)).await.unwrap().unwrap()
        };
        let answer = ask("GET", "/healthz?full=1").await;
        assert_eq!(answer.status(), 200, "{answer:?}");
        assert!(answer.text().contains("GET /healthz?full=1"), "{answer:?}");
        for (method, path) in [
            ("GET", "/healthz"),
            ("GET", "/"),
            ("GET", "/healthz/../?full=1"),
            ("POST", "/healthz?full=1"),
            ("GET", "/healthz?full=1&x"),
        ] {
            let answer = ask(method, path).await;
            assert_eq!(
                (answer.status(), answer.reason()),
                (403, Some("plaintext-refused")),
                "{method} {path}"
            );
        }
    }
    // And of the mesh nobody gets more by asking for the probe.
    let mut client = pods.pod("client").connect(pods.cluster_ip("db")).unwrap();
    let answer = client.ask("GET /healthz?full=1 HTTP/1.1\r\nhost: db\r\n\r\n").await.unwrap();
    assert_eq!((answer.status(), answer.reason()), (403, Some("not-authorized")), "{answer:?}");
    wait_until("the pod's proxy is ready", PATIENCE, async || {
        get(machine.at(penstock_api::names::port::HEALTH), "/ready").await.is_ok_and(|it| it.status() == 200)
    })
    .await;
}
