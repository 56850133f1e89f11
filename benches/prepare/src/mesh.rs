//! What runs in the case `end-to-end-jpeg`: the real Triton, control, and a sidecar on each side of the mesh.
//!
//! In: where our programs and the launcher of the tests' servers are. Out: the address of the client's sidecar, that of Triton
//! itself, and CPU seconds by part. All of it ends with this value. Pods have addresses of their own on loopback, so that ports
//! are the usual ones; nothing says `permissive`, so between the sidecars there is mutual TLS or nothing.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "the bed has no runtime: it may wait, and its clock is the real one"
)]

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

const CLIENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 81);
const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 82);
const CONTROL: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 83), 15010);
const API: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, 83), 8080);
const HTTP: u16 = 8000;
const OUTBOUND: u16 = 15001;
const INBOUND: u16 = 15006;
const ADMIN: u16 = 15000;
const HEALTH: u16 = 15020;

/// As clients ask for the model through the mesh.
pub(crate) const HOST: &str = "pixels.bench";
/// Triton takes seconds to start its backend.
const START: Duration = Duration::from_secs(60);
/// It removes its files in shared memory when it ends in good order.
const END: Duration = Duration::from_secs(8);
/// Ticks of `/proc` in a second, on every architecture that we run on.
const TICKS_PER_SECOND: f64 = 100.0;
/// How much of a log is told with an error.
const TOLD: usize = 1200;

/// The same model twice: halves for binary tensors, and singles, since Triton reads no halves from JSON. Whatever waits may
/// share an execution, whoever sent it.
const MODELS: &str = r#"[
    {"name": "pixels", "kind": "pixels", "batches": true},
    {"name": "pixels32", "kind": "pixels", "datatype": "FP32", "batches": true}
]"#;

const OBJECTS: &str = r#"apiVersion: v1
kind: Pod
metadata: {name: client, namespace: bench, annotations: {penstock.io/inject: enabled}}
spec: {serviceAccountName: client, containers: [{name: app}]}
status: {phase: Running, podIP: 127.0.0.81}
---
apiVersion: v1
kind: Pod
metadata:
  name: server
  namespace: bench
  labels: {app: pixels}
  annotations: {penstock.io/inject: enabled, penstock.io/inbound-port: "15006"}
spec: {serviceAccountName: server, containers: [{name: app, ports: [{name: http, containerPort: 8000}]}]}
status: {phase: Running, podIP: 127.0.0.82}
---
apiVersion: v1
kind: Service
metadata: {name: pixels, namespace: bench}
spec: {selector: {app: pixels}, ports: [{name: http, port: 80, targetPort: 8000, appProtocol: http}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: pixels-1, namespace: bench, labels: {kubernetes.io/service-name: pixels}}
addressType: IPv4
ports: [{name: http, port: 8000, protocol: TCP, appProtocol: http}]
endpoints:
- {addresses: [127.0.0.82], conditions: {ready: true}, targetRef: {kind: Pod, namespace: bench, name: server}}
---
apiVersion: penstock.io/v1alpha1
kind: InferencePolicy
metadata: {name: pixels, namespace: bench}
spec:
  targetRef: {kind: Service, name: pixels}
  batch: {max: 32}
  models:
  - name: pixels
    prepare:
    - {input: image, tensor: pixels, pipeline: {preset: imagenet, dtype: f16}}
"#;

/// Where programs are.
pub(crate) struct Tools<'a> {
    /// The folder of ours.
    pub(crate) ours: PathBuf,
    /// `launch.py`.
    pub(crate) launch: &'a Path,
}

/// A running process, in a group of its own.
struct Process {
    child: Child,
    log: PathBuf,
}

/// All of them, in the order in which they end.
pub(crate) struct Mesh {
    sidecars: Vec<Process>,
    control: Process,
    triton: Process,
}

impl Mesh {
    /// Starts everything, and waits until Triton and the sidecars are ready.
    pub(crate) fn start(tools: &Tools<'_>, dir: &Path) -> Result<Self> {
        let launch = tools.launch.canonicalize().with_context(|| format!("{}", tools.launch.display()))?;
        let mut command = Command::new("python3");
        command.arg(launch).arg("triton").arg("--dir").arg(dir);
        command.args(["--ip", &SERVER.to_string(), "--models", MODELS]);
        let mut triton = Process::spawn(&mut command, "triton", dir)?;

        let source = dir.join("source");
        fs::create_dir_all(&source)?;
        fs::write(source.join("all.yaml"), OBJECTS)?;
        let program = tools.ours.join("penstock-control");
        let mut command = Command::new(&program);
        command.arg("run").arg(format!("--source=dir:{}", source.display()));
        command.arg(format!("--state={}", dir.join("state").display()));
        command.args([format!("--listen={CONTROL}"), format!("--api={API}")]);
        let mut control = Process::spawn(&mut command, "control", dir)?;
        control.until("did not listen", || TcpStream::connect(CONTROL).is_ok())?;

        let mut sidecars = Vec::new();
        for (name, ip) in [("client", CLIENT), ("server", SERVER)] {
            let output = Command::new(&program)
                .arg("token")
                .arg(format!("--state={}", dir.join("state").display()))
                .args(["--namespace", "bench", "--service-account", name])
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("{}", program.display()))?;
            ensure!(output.status.success(), "no token: {}", String::from_utf8_lossy(&output.stderr).trim());
            let token = dir.join(format!("token-{name}"));
            fs::write(&token, output.stdout.trim_ascii())?;
            let mut command = Command::new(tools.ours.join("penstock-proxy"));
            command.args(["run", "--workers=1", "--access-log=off"]);
            command.arg(format!("--control={CONTROL}"));
            command.arg(format!("--control-ca={}", dir.join("state/anchors.pem").display()));
            command.arg(format!("--token={}", token.display()));
            command.args([format!("--node=bench/{name}"), format!("--service-account={name}")]);
            for (flag, port) in
                [("outbound", OUTBOUND), ("inbound", INBOUND), ("admin", ADMIN), ("health", HEALTH)]
            {
                command.arg(format!("--{flag}={ip}:{port}"));
            }
            let mut sidecar = Process::spawn(&mut command, &format!("sidecar-{name}"), dir)?;
            let health = SocketAddrV4::new(ip, HEALTH);
            sidecar.until("was not ready", || get(health, "/ready"))?;
            sidecars.push(sidecar);
        }
        let at = SocketAddrV4::new(SERVER, HTTP);
        triton.until("was not ready", || {
            ["pixels", "pixels32"].iter().all(|model| get(at, &format!("/v2/models/{model}/ready")))
        })?;
        Ok(Self { sidecars, control, triton })
    }

    /// Where a client's application finds its sidecar.
    pub(crate) fn outbound(&self) -> SocketAddrV4 {
        SocketAddrV4::new(CLIENT, OUTBOUND)
    }

    /// Triton itself.
    pub(crate) fn server(&self) -> SocketAddrV4 {
        SocketAddrV4::new(SERVER, HTTP)
    }

    /// CPU seconds of the sidecars, and of Triton with its backends, since they began. Control does nothing meanwhile.
    pub(crate) fn cpu_s(&mut self) -> Result<[f64; 2]> {
        self.control.check()?;
        let mut seconds = [0.0; 2];
        for (at, process) in
            self.sidecars.iter_mut().map(|process| (0, process)).chain([(1, &mut self.triton)])
        {
            process.check()?;
            seconds[at] += cpu_of_tree(process.child.id())?;
        }
        Ok(seconds)
    }

    /// Of the server's sidecar: tensors that were prepared, and executions through memory that Triton reads too.
    pub(crate) fn counted(&self) -> Result<[f64; 2]> {
        let page = fetch(SocketAddrV4::new(SERVER, ADMIN), "/metrics")?;
        let sum = |name: &str| {
            let lines = page.lines().filter(|line| line.starts_with(name));
            lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
        };
        Ok([sum("penstock_prepared_total{result=\"done\"}"), sum("penstock_executions_placed_total")])
    }
}

impl Process {
    fn spawn(command: &mut Command, name: &str, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let said = File::create(&log)?;
        let program = command.get_program().to_owned();
        command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said).process_group(0);
        let child = command.spawn().with_context(|| format!("could not start {}", program.display()))?;
        Ok(Self { child, log })
    }

    fn until(&mut self, otherwise: &str, is: impl Fn() -> bool) -> Result<()> {
        let deadline = Instant::now() + START;
        while !is() {
            self.check()?;
            if Instant::now() > deadline {
                bail!("{otherwise} within {START:?}: {}", self.said());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}: {}", self.log.display(), self.said()),
        }
    }

    fn said(&self) -> String {
        let said = fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&said[said.len().saturating_sub(TOLD)..]).trim().to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let deadline = Instant::now() + END;
        // Whoever has been waited for is not signalled: its number may be somebody else's.
        let mut signal = Signal::TERM;
        while let (Ok(None), Some(group)) = (self.child.try_wait(), group) {
            if signal == Signal::TERM || Instant::now() > deadline {
                // It has ended if this fails, and the next look finds that.
                let _ = kill_process_group(group, signal);
                signal = Signal::KILL;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Whether a page answers well.
fn get(at: SocketAddrV4, path: &str) -> bool {
    fetch(at, path).is_ok()
}

/// A page, over a connection of its own.
fn fetch(at: SocketAddrV4, path: &str) -> Result<String> {
    use std::io::{Read as _, Write as _};
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {at}\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).unwrap_or_default();
    ensure!(status == "200", "{at}{path} answered {status}");
    Ok(answer)
}

/// CPU seconds, user and system, of a process and of those that it started.
fn cpu_of_tree(root: u32) -> Result<f64> {
    let path = format!("/proc/{root}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("{path}: has the process ended?"))?;
    let mut seconds = ticks(&stat).with_context(|| format!("{path} reads {stat:?}"))? / TICKS_PER_SECOND;
    for task in fs::read_dir(format!("/proc/{root}/task"))?.flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_whitespace().filter_map(|child| child.parse().ok()) {
            // One that ends meanwhile has nothing to add.
            seconds += cpu_of_tree(child).unwrap_or_default();
        }
    }
    Ok(seconds)
}

/// `utime + stime`: fields 14 and 15, counted behind the name, which may itself contain blanks and brackets.
fn ticks(stat: &str) -> Option<f64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<f64>().ok()? + fields.next()?.parse::<f64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_does_not_shift_the_fields() {
        assert_eq!(ticks("42 (a) b) S 1 42 42 0 -1 4194304 100 0 0 0 250 50 0 0 20 0"), Some(300.0));
        assert!(cpu_of_tree(std::process::id()).unwrap() >= 0.0);
    }

    #[test]
    fn addresses_in_the_objects_are_those_of_the_pods() {
        for ip in [CLIENT, SERVER] {
            assert!(OBJECTS.contains(&format!("podIP: {ip}")), "{ip}");
        }
        assert!(OBJECTS.contains(&format!("inbound-port: \"{INBOUND}\"")));
        assert!(!OBJECTS.contains("permissive"), "between the sidecars there must be mutual TLS");
    }
}
