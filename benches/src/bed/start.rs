//! From the start of the process to ready: certificate signed and first configuration in force, with control beside it.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_api::names::{annotation, port};
use tokio::time::Instant;

use crate::control;
use crate::load::{self, Measured, h1};
use crate::mesh::sidecars::{self, NAMESPACE, Pod};
use crate::process::{self, Process};
use crate::usage;

/// Between two looks at whether it is ready. Short against what is measured; a look at a port where nobody listens yet
/// costs some 20 µs.
const LOOK: Duration = Duration::from_millis(1);
/// Longer than any start that is worth a figure.
const LIMIT: Duration = Duration::from_secs(20);

/// Control, and the pod whose proxy is started again and again.
pub(super) struct Start {
    control: Process,
    program: PathBuf,
    dir: PathBuf,
    args: Vec<OsString>,
    pod: Pod,
}

impl Start {
    /// Starts control, with one pod and its Service.
    pub(super) async fn new(proxy: &Path, dir: &Path) -> Result<Self> {
        let dir = dir.join("start");
        let source = dir.join("source");
        fs::create_dir_all(&source)?;
        let pod = Pod { name: "app-0".to_owned(), ip: Ipv4Addr::new(127, 78, 0, 1), account: "app" };
        fs::write(source.join("pod.yaml"), yaml(&pod))?;
        let program = proxy.with_file_name("penstock-control");
        let (control, push) = control::start(&program, &dir, &source)
            .await
            .context("the case `start` needs penstock-control beside penstock-proxy")?;
        let token = dir.join("token");
        fs::write(&token, control::issue_token(&program, &dir, pod.account).await?)?;
        let args = sidecars::arguments(&pod, push, &dir.join("state/anchors.pem"), &token);
        Ok(Self { control, program: proxy.to_owned(), dir, args, pod })
    }

    /// One start.
    pub(super) async fn run(&mut self, core: usize) -> Result<Measured> {
        self.control.check()?;
        let health = self.pod.at(port::HEALTH);
        let began = Instant::now();
        let mut process = process::spawn(Some(core), "start", &self.program, &self.args, &self.dir, false)?;
        loop {
            if status(health).await.is_ok_and(|status| status == 200) {
                break;
            }
            process.check()?;
            if began.elapsed() > LIMIT {
                return Err(process.story(&format!("was not ready within {LIMIT:?}")));
            }
            tokio::time::sleep(LOOK).await;
        }
        let ready_ms = began.elapsed().as_secs_f64() * 1e3;
        let memory = usage::memory(&usage::tree(process.pid()).into_iter().collect())?;
        process.stop().await;
        Ok(Measured { ready_ms, rss: memory.now, rss_peak: memory.peak, ..Measured::default() })
    }

    /// Ends control.
    pub(super) async fn stop(self) {
        self.control.stop().await;
    }
}

async fn status(health: SocketAddr) -> io::Result<u16> {
    let mut connection = h1::Connection::new(load::connect(health).await?);
    Ok(connection.exchange(&h1::Request::new("/ready", 0)).await?.status)
}

fn yaml(pod: &Pod) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {NAMESPACE}, annotations: {{{inject}: enabled}}}}
spec:
  serviceAccountName: {account}
  containers: [{{name: app, ports: [{{name: http, containerPort: 8000}}]}}]
status: {{phase: Running, podIP: {ip}}}
---
apiVersion: v1
kind: Service
metadata: {{name: app, namespace: {NAMESPACE}}}
spec:
  ports: [{{name: http, port: 80, targetPort: 8000, appProtocol: http}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: app-1, namespace: {NAMESPACE}, labels: {{kubernetes.io/service-name: app}}}}
addressType: IPv4
ports: [{{name: http, port: 8000, protocol: TCP, appProtocol: http}}]
endpoints:
- {{addresses: [{ip}], conditions: {{ready: true}}, targetRef: {{kind: Pod, namespace: {NAMESPACE}, name: {name}}}}}
",
        name = pod.name,
        inject = annotation::INJECT,
        account = pod.account,
        ip = pod.ip,
    )
}
