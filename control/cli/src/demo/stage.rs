//! The running mesh, and what the script can do with it: start it, push a change and wait until it is applied,
//! take a pod away and bring it back.

use std::fs::{OpenOptions, Permissions};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use penstock_api::names::port;
use penstock_api::view::{Renewal, Status};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::digits::{self, MODEL};
use super::photos::{self, Cpu};
use super::processes::{self, Processes, Programs};
use super::topology::{CLIENT, Mesh, NAMESPACE, Pod, Presence, Topology, free_port};
use crate::control::Control;
use crate::failure::Failure;

/// The name of control's process.
const CONTROL: &str = "control";
/// Certificates live this long, so that they rotate within the demo on their own.
const LEAF_LIFETIME: &str = "60s";
/// How long a sidecar may take to finish what it has.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long anything may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a push may take before something is wrong.
const PUSH_TIMEOUT: Duration = Duration::from_secs(15);
/// Memory in /dev/shm that a sidecar and its model server share: some batches of photographs, and few enough bytes that those of all
/// pods fit into the 64 MiB that a container has there.
const ARENA: usize = 8 << 20;
/// How often a push is looked after: what it adds to the time measured is half of it.
const PUSH_POLL: Duration = Duration::from_millis(2);
/// How often a start is looked after.
const START_POLL: Duration = Duration::from_millis(20);
/// How often the processes are looked after while nothing else happens.
const LOOK: Duration = Duration::from_millis(100);

/// Where the sidecar of a pod listens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sidecar {
    /// For its application.
    pub(super) outbound: SocketAddrV4,
    /// For the mesh.
    inbound: SocketAddrV4,
    /// Its admin pages.
    pub(super) admin: SocketAddrV4,
    /// Its health.
    health: SocketAddrV4,
}

/// Everything that runs.
#[derive(Debug)]
pub(super) struct Stage {
    /// The processes.
    pub(super) processes: Processes,
    /// What exists.
    pub(super) topology: Topology,
    /// Control's API.
    pub(super) control: Control,
    mesh: Mesh,
    directory: PathBuf,
    api: SocketAddrV4,
    push: SocketAddrV4,
    /// The snapshot that was applied last.
    snapshot: String,
}

impl Stage {
    /// Lays out the directory and chooses ports; starts nothing.
    pub(super) fn new(programs: Programs, directory: &Path) -> Result<Self, Failure> {
        let topology = Topology::on_free_ports()?;
        let local = |preferred| {
            Ok(SocketAddrV4::new(Ipv4Addr::LOCALHOST, free_port(&[Ipv4Addr::LOCALHOST], preferred)?))
        };
        let (api, push) = (local(port::CONTROL_API)?, local(port::CONTROL)?);
        let logs = directory.join("logs");
        let written = std::fs::create_dir(&logs)
            .and_then(|()| std::fs::create_dir(directory.join("tokens")))
            .and_then(|()| digits::write_models(&directory.join("models")))
            .and_then(|()| photos::write_model(&directory.join("models")))
            .and_then(|()| Mesh::create(directory.join("mesh"), &topology));
        Ok(Self {
            processes: Processes::new(programs, logs),
            topology,
            control: Control::at(&format!("http://{api}"))?,
            mesh: written.map_err(|e| unwritable(directory, &e))?,
            directory: directory.to_path_buf(),
            api,
            push,
            snapshot: String::new(),
        })
    }

    /// Where control's API is.
    pub(super) fn control_url(&self) -> &str {
        self.control.url()
    }

    /// The file that holds the split.
    pub(super) fn split_file(&self) -> PathBuf {
        self.mesh.services_file()
    }

    /// The client's sidecar.
    pub(super) fn client(&self) -> Sidecar {
        self.sidecar(CLIENT)
    }

    /// A pod's sidecar.
    pub(super) fn sidecar(&self, pod: usize) -> Sidecar {
        let (ip, ports) = (self.topology.pods[pod].ip, self.topology.ports);
        let at = |port| SocketAddrV4::new(ip, port);
        Sidecar {
            outbound: at(ports.outbound),
            inbound: at(ports.inbound),
            admin: at(ports.admin),
            health: at(ports.health),
        }
    }

    /// Starts control and waits until it answers.
    pub(super) async fn start_control(&mut self) -> Result<(), Failure> {
        let program = self.processes.programs().control.clone();
        let source = format!("--source=dir:{}", self.mesh.directory().display());
        let state = format!("--state={}", self.state().display());
        let (push, api) = (format!("--listen={}", self.push), format!("--api={}", self.api));
        let lifetime = format!("--leaf-lifetime={LEAF_LIFETIME}");
        self.processes.start(CONTROL, &program, ["run", &source, &state, &push, &api, &lifetime])?;
        let url = format!("http://{}/healthz", self.api);
        self.until(CONTROL, "control does not answer", START_TIMEOUT, START_POLL, async |_| {
            Ok(answers(&url).await)
        })
        .await
    }

    /// Starts every pod and waits until the mesh knows all of them.
    pub(super) async fn start_pods(&mut self) -> Result<(), Failure> {
        for pod in 0..self.topology.pods.len() {
            self.issue_token(pod).await?;
            self.start_pod(pod)?;
        }
        for pod in 0..self.topology.pods.len() {
            self.pod_is_ready(pod).await?;
        }
        self.snapshot = self.status().await?.snapshot;
        Ok(())
    }

    /// Restarts a pod that is gone, and has it listed again when it is ready.
    pub(super) async fn bring_back(&mut self, pod: usize) -> Result<(), Failure> {
        self.start_pod(pod)?;
        self.pod_is_ready(pod).await?;
        self.list(pod, Presence::Ready).await
    }

    /// Sends a signal to a pod's server and sidecar, both at once, as the kubelet does.
    pub(super) fn signal(&mut self, pod: usize, signal: Signal) {
        let (server, sidecar) = names(&self.topology.pods[pod]);
        self.processes.signal(&server, signal);
        self.processes.signal(&sidecar, signal);
    }

    /// Waits until a pod's processes are gone.
    pub(super) async fn gone(&mut self, pod: usize) -> Result<(), Failure> {
        let (server, sidecar) = names(&self.topology.pods[pod]);
        let limit = DRAIN_TIMEOUT + Duration::from_secs(5);
        self.processes.ended(&server, limit).await?;
        self.processes.ended(&sidecar, limit).await?;
        Ok(())
    }

    /// Has the EndpointSlice say this of a pod, and waits until all sidecars know.
    pub(super) async fn list(&mut self, pod: usize, presence: Presence) -> Result<(), Failure> {
        self.topology.pods[pod].presence = presence;
        self.apply(|mesh, topology| mesh.slices(topology)).await?;
        Ok(())
    }

    /// Changes version 2's weight, waits until all sidecars have it, and returns how long that took.
    pub(super) async fn weigh(&mut self, v2: u32) -> Result<Duration, Failure> {
        self.topology.v2 = v2;
        self.apply(|mesh, topology| mesh.services(topology)).await
    }

    /// Has the sidecars of a Service prepare photographs, and waits until all sidecars know.
    pub(super) async fn prepare_photos(&mut self, service: &str) -> Result<Duration, Failure> {
        self.apply(|mesh, _| mesh.photos(service)).await
    }

    /// The CPU time so far of the client and of all others on the way to a pod; `None` where it is not known.
    pub(super) fn cpu(&self, pod: usize) -> Option<Cpu> {
        let (server, sidecar) = names(&self.topology.pods[pod]);
        let (_, client) = names(&self.topology.pods[CLIENT]);
        let others =
            [server, sidecar, client].iter().map(|name| self.processes.cpu(name)).sum::<Option<_>>()?;
        Some(Cpu { client: processes::own_cpu()?, others })
    }

    /// Has all sidecars exchange their certificates now, and returns how many did.
    pub(super) async fn renew(&mut self) -> Result<usize, Failure> {
        let renewals: Vec<Renewal> = self.control.post("/renew").await?;
        for Renewal { node, error } in &renewals {
            if let Some(error) = error {
                return Err(Failure::Problem(format!(
                    "the sidecar of {node} gets no new certificate: {error}"
                )));
            }
        }
        Ok(renewals.len())
    }

    /// Lets time pass, with an eye on the processes.
    pub(super) async fn pause(&mut self, duration: Duration) -> Result<(), Failure> {
        let end = Instant::now() + duration;
        loop {
            self.processes.must_live()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            sleep(left.min(LOOK)).await;
        }
    }

    /// Ends everything; control last, so that the sidecars do not miss it.
    pub(super) async fn end(&mut self) {
        self.processes.end(CONTROL).await;
    }

    /// Asks `ready` again and again until it is. `name` is the process whose log tells why it is not.
    pub(super) async fn until(
        &mut self,
        name: &str,
        otherwise: &str,
        limit: Duration,
        poll: Duration,
        mut ready: impl AsyncFnMut(&mut Self) -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        let deadline = Instant::now() + limit;
        while !ready(self).await? {
            self.processes.must_live()?;
            if Instant::now() >= deadline {
                let said = self.processes.said(name);
                return Err(Failure::Problem(format!("{otherwise} after {} s{said}", limit.as_secs())));
            }
            sleep(poll).await;
        }
        Ok(())
    }

    /// Changes files, waits until all sidecars have applied the new snapshot, and returns how long that took from
    /// before the change.
    async fn apply(
        &mut self,
        change: impl FnOnce(&Mesh, &Topology) -> io::Result<()>,
    ) -> Result<Duration, Failure> {
        let start = Instant::now();
        change(&self.mesh, &self.topology).map_err(|e| unwritable(self.mesh.directory(), &e))?;
        let before = std::mem::take(&mut self.snapshot);
        let late = "a change of the YAML is not applied by all sidecars";
        self.until(CONTROL, late, PUSH_TIMEOUT, PUSH_POLL, async |stage| {
            let status = stage.status().await?;
            if let Some(problem) = status.problems.first() {
                return Err(Failure::Problem(format!(
                    "control does not accept the demo's YAML: {}:{}: {}: {}",
                    problem.file, problem.line, problem.object, problem.message
                )));
            }
            let applied = status.snapshot != before && status.all_applied();
            stage.snapshot = status.snapshot;
            Ok(applied)
        })
        .await?;
        Ok(start.elapsed())
    }

    async fn status(&mut self) -> Result<Status, Failure> {
        self.control.get("/status").await
    }

    fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    fn token_file(&self, pod: &Pod) -> PathBuf {
        self.directory.join("tokens").join(pod.name)
    }

    /// Has control issue the token with which the pod's sidecar proves its service account, once.
    async fn issue_token(&self, pod: usize) -> Result<(), Failure> {
        let pod = &self.topology.pods[pod];
        let output = tokio::process::Command::new(&self.processes.programs().control)
            .arg("token")
            .arg(format!("--state={}", self.state().display()))
            .args(["--namespace", NAMESPACE, "--service-account", pod.account, "--pod", pod.name])
            .stdin(std::process::Stdio::null())
            .kill_on_drop(true)
            .output()
            .await
            .map_err(|e| Failure::Problem(format!("penstock-control token does not run: {e}")))?;
        if !output.status.success() {
            return Err(Failure::Problem(format!(
                "penstock-control issues no token for {}: {}",
                pod.node(),
                String::from_utf8_lossy(&output.stderr).trim()
            )));
        }
        let file = self.token_file(pod);
        // A token is a secret: nobody else may read it.
        OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&file)
            .and_then(|mut opened| {
                opened.set_permissions(Permissions::from_mode(0o600))?;
                opened.write_all(output.stdout.trim_ascii())
            })
            .map_err(|e| unwritable(&file, &e))
    }

    /// Starts a pod's server, if it has one, and its sidecar.
    fn start_pod(&mut self, pod: usize) -> Result<(), Failure> {
        let sidecar_addresses = self.sidecar(pod);
        let pod = self.topology.pods[pod].clone();
        let (server, sidecar) = names(&pod);
        if let Some(version) = pod.version {
            let program = self.processes.programs().server.clone();
            let models = self.directory.join("models");
            self.processes.start(
                &server,
                &program,
                [
                    format!("--repository={}", models.display()),
                    format!("--listen={}:{}", pod.ip, self.topology.ports.server),
                    format!("--only={MODEL}:{version}"),
                    // Every server has it, whichever digits it reads.
                    format!("--only={}", photos::MODEL),
                    "--shared-memory".to_owned(),
                ],
            )?;
        }
        let program = self.processes.programs().proxy.clone();
        let Sidecar { outbound, inbound, admin, health } = sidecar_addresses;
        self.processes.start(
            &sidecar,
            &program,
            [
                "run".to_owned(),
                format!("--control={}", self.push),
                format!("--control-ca={}", self.state().join("anchors.pem").display()),
                format!("--token={}", self.token_file(&pod).display()),
                format!("--node={}", pod.node()),
                format!("--service-account={}", pod.account),
                format!("--outbound={outbound}"),
                format!("--inbound={inbound}"),
                format!("--admin={admin}"),
                format!("--health={health}"),
                "--workers=1".to_owned(),
                format!("--arena={ARENA}"),
                "--access-log=errors".to_owned(),
                format!("--drain-timeout={}s", DRAIN_TIMEOUT.as_secs()),
            ],
        )
    }

    /// Waits until a pod's server and sidecar are ready and control has heard so.
    async fn pod_is_ready(&mut self, pod: usize) -> Result<(), Failure> {
        let health = self.sidecar(pod).health;
        let pod = self.topology.pods[pod].clone();
        let (server, sidecar) = names(&pod);
        if pod.version.is_some() {
            let url = format!("http://{}:{}/v2/health/ready", pod.ip, self.topology.ports.server);
            let late = format!("the model server of {} is not ready", pod.node());
            self.until(&server, &late, START_TIMEOUT, START_POLL, async |_| Ok(answers(&url).await)).await?;
        }
        let url = format!("http://{health}/ready");
        let late = format!("the sidecar of {} is not ready", pod.node());
        self.until(&sidecar, &late, START_TIMEOUT, START_POLL, async |_| Ok(answers(&url).await)).await?;
        let late = format!("the sidecar of {} has not applied its configuration", pod.node());
        let node = pod.node();
        self.until(&sidecar, &late, START_TIMEOUT, START_POLL, async |stage| {
            let proxies = stage.status().await?.proxies;
            Ok(proxies.iter().any(|proxy| proxy.node == node && proxy.connected && proxy.applied))
        })
        .await
    }
}

/// The names of a pod's processes.
fn names(pod: &Pod) -> (String, String) {
    (format!("{}-server", pod.name), format!("{}-sidecar", pod.name))
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::Problem(format!("{} cannot be written: {error}", path.display()))
}

/// Whether a page answers with success.
async fn answers(url: &str) -> bool {
    let Some((authority, path)) = url.strip_prefix("http://").and_then(|rest| rest.split_once('/')) else {
        return false;
    };
    let request = Request::get(format!("/{path}")).header("host", authority).body(Full::<Bytes>::default());
    let Ok(request) = request else { return false };
    let mut connection = crate::connection::Connection::to(authority);
    matches!(connection.send(request).await, Ok(response) if response.status().is_success())
}
