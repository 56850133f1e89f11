//! Processes that stand still or are gone: an application, and control.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use penstock_tests::testkit::pods::APPLICATION;
use penstock_tests::testkit::process::Process;
use penstock_tests::testkit::{PATIENCE, wait_until};
use rustix::process::Signal;

use super::world::{FAULT, World};

/// An application as a process of its own, which can be stopped.
const APPLICATION_OF_ITS_OWN: &str = r#"
import http.server, sys

class Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16

    def do_GET(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", str(len(sys.argv[2])))
        self.end_headers()
        self.wfile.write(sys.argv[2].encode())

    do_POST = do_GET

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("", int(sys.argv[1])), Answers).serve_forever()
"#;

#[tokio::test]
async fn an_application_that_stands_still_is_left_alone_until_it_goes_on() {
    let Some(mut world) = World::new(|pods| pods).await else { return };
    let machine = world.pods.pod("web-2").machine.namespace.share();
    let own = SocketAddr::from(([127, 0, 0, 1], APPLICATION));
    drop(world.applications.remove("web-2"));
    wait_until("nobody listens", PATIENCE, async || machine.connect(own).is_err()).await;
    let folder = tempfile::tempdir().unwrap();
    let (in_pod, port) = (format!("--net={}", machine.path()), APPLICATION.to_string());
    let args = [
        in_pod.as_str(),
        "--",
        "setpriv",
        "--pdeathsig",
        "KILL",
        "--",
        "python3",
        "-c",
        APPLICATION_OF_ITS_OWN,
    ];
    let args = [&args[..], &[port.as_str(), "web-2"]].concat();
    let application = Process::start("web-2-application", Path::new("nsenter"), &args, folder.path());
    wait_until("the application listens", PATIENCE, async || machine.connect(own).is_ok()).await;

    let mut world = world.under_load().await;
    application.signal(Signal::STOP);
    tokio::time::sleep(FAULT * 2).await;
    assert!(!world.is_answered_by("web-2", FAULT), "it does not stand still");
    application.signal(Signal::CONT);
    world.recovers().await;
    let seen = world.told("application stopped").await;
    seen.get.has_no_failure("GET");
    assert!(seen.get.longest < Duration::from_secs(4), "{:?}", seen.get);
    seen.post.fails_at_most(40, &["request-timeout", "upstream-reset"], "POST");
}

#[tokio::test]
async fn with_control_killed_everything_goes_on() {
    let Some(world) = World::new(|pods| pods).await else { return };
    let mut world = world.under_load().await;
    world.pods.mesh.kill_control();
    tokio::time::sleep(FAULT).await;
    world.pods.mesh.start_control().await;
    wait_until("all sidecars are back at control", PATIENCE, async || {
        let status = world.pods.mesh.status().await;
        status.proxies.iter().filter(|proxy| proxy.connected).count() == 4 && status.all_applied()
    })
    .await;
    world.recovers().await;
    let seen = world.told("control killed").await;
    seen.get.has_no_failure("GET");
    seen.post.has_no_failure("POST");
    for seen in [seen.get, seen.post] {
        assert!(seen.longest < Duration::from_secs(2), "{seen:?}");
    }
}
