//! An application talks as it always has, and its mesh is not noticed: whatever address it calls, whatever it speaks.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use penstock_api::names::annotation;
use penstock_tests::testkit::PATIENCE;
use penstock_tests::testkit::certificates::{Authority, spiffe};
use penstock_tests::testkit::namespace::{Network, contains};
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::peers::{peers, script};
use penstock_tests::testkit::pods::{APPLICATION, Pods, mirror};
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::wire::Wire;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::timeout;

/// Words that nobody on the wire may read.
const SECRET: &str = "the-secret-of-the-pods";
/// Words that everybody on the wire may read: they show that somebody listened.
const OPEN: &str = "open-to-everybody";

fn request(host: &str, words: &str) -> String {
    format!("GET /hello HTTP/1.1\r\nhost: {host}\r\nx-words: {words}\r\n\r\n")
}

/// Asks as the application of `client`, and returns what the server says it saw.
async fn asked(pods: &Pods, client: &str, to: SocketAddr, host: &str, words: &str) -> String {
    let mut wire = pods.pod(client).connect(to).unwrap_or_else(|error| panic!("{to}: {error}"));
    let answer = timeout(PATIENCE, wire.ask(request(host, words))).await.unwrap().unwrap();
    assert_eq!(answer.status(), 200, "{to}: {answer:?}");
    answer.text()
}

/// The proof that the far proxy has authenticated the near one.
fn authenticated(client: &str) -> String {
    format!("penstock-client-id: {}", spiffe(client))
}

#[tokio::test]
async fn http_1_reaches_a_service_a_pod_and_itself_and_nobody_reads_along() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with("client", &[]).with("server", &[]).with("replica", &[]);
    let pods = pods.service("web", "http", &["server"]).service("crowd", "http", &["server", "replica"]);
    let pods = pods.service("bare", "http", &["replica"]).headless("bare").start().await;
    let _server = pods.pod("server").mirror("I am server");
    let _replica = pods.pod("replica").mirror("I am replica");
    let tap = pods.network.listen_in();

    let server = &pods.pod("server").machine;
    for (to, host) in [
        (pods.cluster_ip("web"), "web"),
        (pods.cluster_ip_v6("web"), "web.test.svc.cluster.local"),
        (server.at(APPLICATION), "anything"),
        (server.at_v6(APPLICATION), "anything"),
    ] {
        let seen = asked(&pods, "client", to, host, SECRET).await;
        assert!(seen.contains("I am server") && seen.contains(&authenticated("client")), "{to}: {seen}");
        assert!(seen.contains(&format!("host: {host}")), "{to}: {seen}");
    }
    // A headless Service's name leads to a pod's address.
    let replica = pods.pod("replica").machine.at(APPLICATION);
    let seen = asked(&pods, "client", replica, "bare", SECRET).await;
    assert!(seen.contains("I am replica") && seen.contains(&authenticated("client")), "{seen}");

    // A pod among the endpoints of what it calls: all of them answer, itself too, as one of the mesh.
    let mut answered = [0, 0];
    for _ in 0..40 {
        let seen = asked(&pods, "replica", pods.cluster_ip("crowd"), "crowd", SECRET).await;
        assert!(seen.contains(&authenticated("replica")), "{seen}");
        answered[usize::from(seen.contains("I am replica"))] += 1;
    }
    assert!(answered[0] > 0 && answered[1] > 0, "{answered:?} of the other and of itself");
    // What stays in the pod is nobody's business: no proxy, no identity.
    let seen = asked(&pods, "replica", replica, "self", SECRET).await;
    assert!(seen.contains("I am replica") && !seen.contains("penstock-client-id"), "{seen}");

    let outside = mirror(tokio::net::TcpListener::bind("0.0.0.0:9000").await.unwrap(), "outside");
    asked(&pods, "client", (Network::HERE, 9000).into(), "outside", OPEN).await;
    drop(outside);
    let wire = tap.seen();
    assert!(contains(&wire, OPEN), "somebody listened");
    assert!(!contains(&wire, SECRET), "what the pods said was read on the wire");
}

#[tokio::test]
async fn what_is_outside_is_reached_as_if_there_were_no_mesh() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with("client", &[]).start().await;
    let listen = async |port: u16| {
        tokio::net::TcpListener::bind(SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, port)))
            .await
            .unwrap()
    };
    let _web = mirror(listen(9000).await, "outside");
    // Speaks first, as a mail server does, and then repeats what it hears.
    let _first = Origin::on(listen(9001).await, |mut client| async move {
        let _ = client.send("220 welcome\r\n").await;
        while let Ok(bytes) = client.bytes(4).await {
            if client.send(bytes).await.is_err() {
                return;
            }
        }
    });
    for ip in [Network::HERE.into(), std::net::IpAddr::V6(Network::HERE_V6)] {
        let seen = asked(&pods, "client", (ip, 9000).into(), "example.com", OPEN).await;
        assert!(seen.contains("outside\nGET /hello") && seen.contains("host: example.com"), "{seen}");
        assert!(!seen.contains("penstock"), "nothing of ours leaves the mesh: {seen}");

        let mut wire = pods.pod("client").connect((ip, 9001).into()).unwrap();
        assert_eq!(timeout(PATIENCE, wire.bytes(13)).await.unwrap().unwrap(), b"220 welcome\r\n");
        wire.send(b"\0\x01\x02\x03").await.unwrap();
        assert_eq!(timeout(PATIENCE, wire.bytes(4)).await.unwrap().unwrap(), b"\0\x01\x02\x03");
    }
}

#[tokio::test]
async fn bytes_pass_and_a_server_may_speak_first_where_that_is_declared() {
    let Some(pods) = Pods::new() else { return };
    let pods =
        pods.with("client", &[]).with("store", &[]).with("mail", &[(annotation::OPAQUE_PORTS, "8000")]);
    let pods = pods.service("store", "tcp", &["store"]).service("mail", "http", &["mail"]).start().await;
    let _store =
        Origin::on(pods.pod("store").machine.namespace.listen(APPLICATION), |mut client| async move {
            while let Ok(bytes) = client.bytes(4).await {
                if client.send(bytes).await.is_err() {
                    return;
                }
            }
        });
    let _mail = Origin::on(pods.pod("mail").machine.namespace.listen(APPLICATION), |mut client| async move {
        let _ = client.send(format!("220 {SECRET}\r\n")).await;
        let _ = client.bytes(4).await;
        let _ = client.send("bye!").await;
    });
    let tap = pods.network.listen_in();
    for to in [
        pods.cluster_ip("store"),
        pods.cluster_ip_v6("store"),
        pods.pod("store").machine.at(APPLICATION),
        pods.pod("store").machine.at_v6(APPLICATION),
    ] {
        let mut wire = pods.pod("client").connect(to).unwrap();
        for _ in 0..3 {
            wire.send(b"\xffab\0").await.unwrap();
            assert_eq!(timeout(PATIENCE, wire.bytes(4)).await.unwrap().unwrap(), b"\xffab\0", "{to}");
        }
    }
    for to in [pods.cluster_ip("mail"), pods.pod("mail").machine.at(APPLICATION)] {
        let mut wire = pods.pod("client").connect(to).unwrap();
        let welcome = format!("220 {SECRET}\r\n");
        let heard = timeout(PATIENCE, wire.bytes(welcome.len())).await.unwrap().unwrap();
        assert_eq!(String::from_utf8_lossy(&heard), welcome, "{to}");
        wire.send(b"quit").await.unwrap();
        assert_eq!(timeout(PATIENCE, wire.bytes(4)).await.unwrap().unwrap(), b"bye!");
    }
    let wire = tap.seen();
    assert!(!contains(&wire, SECRET) && !contains(&wire, "bye!"), "what the pods said was read on the wire");
}

#[tokio::test]
async fn an_applications_own_tls_is_not_touched() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with("client", &[]).with("server", &[]).with("unsaid", &[]);
    let pods =
        pods.service("web", "https", &["server"]).service("unsaid", "unknown", &["unsaid"]).start().await;
    let authority = Authority::default();
    let leaf = authority.leaf("application");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(leaf.certificate.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(leaf.key.as_bytes()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let serve = |listener| {
        let acceptor = acceptor.clone();
        Origin::on(listener, move |client: Wire| {
            let acceptor = acceptor.clone();
            async move {
                let mut tls = acceptor.accept(client.io).await.unwrap();
                let mut four = [0; 4];
                if tls.read_exact(&mut four).await.is_ok() {
                    let _ = tls.write_all(&four).await;
                    let _ = tls.flush().await;
                }
                let _ = tls.read(&mut four).await;
            }
        })
    };
    let _servers =
        ["server", "unsaid"].map(|name| serve(pods.pod(name).machine.namespace.listen(APPLICATION)));
    let _outside = serve(tokio::net::TcpListener::bind("0.0.0.0:9443").await.unwrap());
    for to in [
        pods.cluster_ip("web"),
        pods.cluster_ip("unsaid"),
        pods.pod("server").machine.at(APPLICATION),
        (Network::HERE, 9443).into(),
    ] {
        // The handshake succeeds only with the application's own certificate.
        let wire = pods.pod("client").connect(to).unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let talk = async {
            let mut tls = authority.client(None, &[]).connect(name, wire.io).await.unwrap();
            tls.write_all(b"ping").await.unwrap();
            let mut four = [0; 4];
            tls.read_exact(&mut four).await.unwrap();
            four
        };
        assert_eq!(&timeout(PATIENCE, talk).await.unwrap(), b"ping", "{to}");
    }
}

#[tokio::test]
async fn http_2_is_spoken_end_to_end() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with("client", &[]).with("server", &[]);
    let pods = pods.service("web", "http", &["server"]).service("two", "h2c", &["server"]).start().await;
    let listener = pods.pod("server").machine.namespace.listen(APPLICATION);
    let _server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let answer = hyper::service::service_fn(async |request: http::Request<hyper::body::Incoming>| {
                let id =
                    request.headers().get("penstock-client-id").map(|id| id.to_str().unwrap().to_owned());
                let said = format!("{:?} {}", request.version(), id.unwrap_or_default());
                let body = request.into_body().collect().await.unwrap().to_bytes();
                Ok::<_, std::convert::Infallible>(http::Response::new(Full::new(Bytes::from(format!(
                    "{said} {}",
                    body.len()
                )))))
            });
            tokio::spawn(async move {
                let _ = auto::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), answer)
                    .await;
            });
        }
    });
    let tap = pods.network.listen_in();
    for to in [pods.cluster_ip("two"), pods.cluster_ip_v6("two"), pods.cluster_ip("web")] {
        let wire = pods.pod("client").connect(to).unwrap();
        let io = TokioIo::new(wire.io);
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        let ask = |sender: &mut hyper::client::conn::http2::SendRequest<Full<Bytes>>| {
            let body = Full::new(Bytes::from(SECRET.repeat(1000)));
            sender.send_request(http::Request::post("http://web/").body(body).unwrap())
        };
        let many: Vec<_> = (0..20).map(|_| ask(&mut sender)).collect();
        for answer in many {
            let answer = timeout(PATIENCE, answer).await.unwrap().unwrap();
            assert_eq!(answer.status(), 200, "{to}: {answer:?}");
            let said = answer.into_body().collect().await.unwrap().to_bytes();
            let expected = format!("HTTP/2.0 {} {}", spiffe("client"), SECRET.len() * 1000);
            assert_eq!(String::from_utf8_lossy(&said), expected, "{to}");
        }
    }
    assert!(!contains(&tap.seen(), SECRET), "what the pods said was read on the wire");
}

#[tokio::test]
async fn a_real_grpc_client_and_server_notice_nothing() {
    let Some(bin) = peers() else { return };
    let Some(pods) = Pods::new() else { return };
    let pods =
        pods.with("client", &[]).with("server", &[]).service("bytes", "grpc", &["server"]).start().await;
    let python = bin.join("python").display().to_string();
    let folder = tempfile::tempdir().unwrap();
    let server = &pods.pod("server").machine;
    let in_pod = format!("--net={}", server.namespace.path());
    let address = format!("[::]:{APPLICATION}");
    let args = [in_pod, "--".to_owned(), python, script("grpc_server.py"), address];
    let _server = Process::start("grpc-server", std::path::Path::new("nsenter"), &args, folder.path());
    let own = SocketAddr::from(([127, 0, 0, 1], APPLICATION));
    penstock_tests::testkit::wait_until("the server listens", PATIENCE, async || {
        server.namespace.connect(own).is_ok()
    })
    .await;
    for to in [pods.cluster_ip("bytes"), pods.cluster_ip_v6("bytes")] {
        let mut command = pods.pod("client").machine.namespace.command(bin.join("python"));
        command.args([script("grpc_client.py"), to.to_string(), "bytes.test".to_owned(), spiffe("client")]);
        let output = tokio::process::Command::from(command).kill_on_drop(true).output();
        let output = timeout(PATIENCE * 2, output).await.unwrap().unwrap();
        let kept = String::from_utf8_lossy(&output.stdout).lines().count();
        assert!(output.status.success() && kept == 10, "{to}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[tokio::test]
async fn init_finds_that_the_redirect_works() {
    let Some(pods) = Pods::new() else { return };
    let pods = pods.with("client", &[]).start().await;
    let checked = pods.proxy_command("client", &["init", "--check"]);
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(checked.status.success(), "{said}{}", String::from_utf8_lossy(&checked.stderr));
    assert_eq!(said.matches("at the proxy that listens there").count(), 2, "{said}");
    // The outbound listener takes connections of its own pod only: it speaks with the pod's identity.
    let stranger = tokio::net::TcpStream::connect(pods.pod("client").machine.at(15001));
    assert!(
        timeout(Duration::from_secs(5), stranger).await.unwrap().is_err(),
        "a stranger reached the outbound port"
    );
}
