//! Everything that runs during a case: the replicas, the mesh and the peers. They run all at once, and those that are not being
//! asked are idle.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use bytes::Bytes;
use hyper::Method;
use tempfile::TempDir;
use tokio::time::Instant;

use super::case::Case;
use super::client::{Target, ask};
use super::fleet::Fleet;
use super::peers;
use super::sidecars::{self, Sidecars};
use super::subject::Subject;
use crate::process::Process;
use crate::subject::Programs;

/// How long a subject may take until it answers.
const START: Duration = Duration::from_secs(30);

/// Where the programs are.
pub(crate) struct Tools {
    /// The folder of ours.
    pub(crate) ours: PathBuf,
    /// The peers'.
    pub(crate) peers: Programs,
    /// A Python that has the routers, or why there is none.
    pub(crate) python: Result<PathBuf, String>,
}

/// A process, and the subject that it belongs to alone.
struct Started {
    process: Process,
    of: Option<Subject>,
}

/// Running processes.
pub(crate) struct Stage {
    /// The replicas.
    pub(crate) fleet: Fleet,
    processes: Vec<Started>,
    targets: BTreeMap<Subject, Result<Target, String>>,
    _dir: TempDir,
}

impl Stage {
    /// Starts what the case needs, and waits until every subject answers, or is known not to.
    pub(crate) async fn start(
        case: &Case,
        subjects: &[Subject],
        clients: u8,
        stall: (Duration, Duration),
        tools: &Tools,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("penstock-bench-").tempdir()?;
        let fleet = Fleet::start(case, stall, &tools.ours.join("penstock-simgpu"), dir.path()).await?;
        let mut stage = Self { fleet, processes: Vec::new(), targets: BTreeMap::new(), _dir: dir };
        let dir = stage._dir.path().to_owned();
        // The routers take longest to start, and do so beside the others.
        stage.start_routers(case, subjects, tools, &dir);
        let inbound = stage.start_mesh(case, subjects, clients, tools, &dir).await;
        stage.start_proxies(case, subjects, clients, inbound, tools, &dir);
        stage.probe(case).await;
        Ok(stage)
    }

    /// Where requests of a subject go, or why it has none.
    pub(crate) fn target(&self, subject: Subject) -> Result<Target, String> {
        self.targets.get(&subject).cloned().unwrap_or_else(|| Err("it was not started".to_owned()))
    }

    /// Fails if a process has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.fleet.check()?;
        self.processes.iter_mut().try_for_each(|started| started.process.check())
    }

    /// Ends everything.
    pub(crate) async fn stop(self) {
        for started in self.processes {
            started.process.stop().await;
        }
        self.fleet.stop().await;
    }

    fn set(&mut self, case: &Case, subject: Subject, fronts: Result<(Vec<SocketAddr>, String)>) {
        let target =
            fronts.map(|(fronts, host)| Target { fronts, host, path: case.path(), streamed: case.is_chat() });
        self.targets.insert(subject, target.map_err(|error| format!("{error:#}")));
    }

    fn start_routers(&mut self, case: &Case, subjects: &[Subject], tools: &Tools, dir: &Path) {
        let routers = subjects.iter().filter_map(|subject| Some((subject, subject.router()?)));
        for (number, (subject, router)) in (0..).zip(routers) {
            let started = match &tools.python {
                Ok(python) => peers::router(number, router, &self.fleet.addresses, python, dir),
                Err(why) => Err(anyhow!("{why}")),
            };
            let fronts = started.map(|(process, front)| {
                self.processes.push(Started { process, of: Some(*subject) });
                (vec![front], front.to_string())
            });
            self.set(case, *subject, fronts);
        }
    }

    /// Returns where the replicas' sidecars listen.
    async fn start_mesh(
        &mut self,
        case: &Case,
        subjects: &[Subject],
        clients: u8,
        tools: &Tools,
        dir: &Path,
    ) -> Result<Vec<SocketAddr>, String> {
        let mesh = Sidecars::start(subjects, &self.fleet.addresses, clients, &tools.ours, dir).await;
        let mesh = mesh.map_err(|error| format!("{error:#}"));
        for subject in subjects {
            let Some(balance) = subject.balance() else { continue };
            let fronts = match &mesh {
                Ok(mesh) => Ok((mesh.outbound.clone(), sidecars::host(balance))),
                Err(why) => Err(anyhow!("{why}")),
            };
            self.set(case, *subject, fronts);
        }
        mesh.map(|mesh| {
            let inbound = mesh.inbound.clone();
            let processes = mesh.into_processes().into_iter();
            self.processes.extend(processes.map(|process| Started { process, of: None }));
            inbound
        })
    }

    fn start_proxies(
        &mut self,
        case: &Case,
        subjects: &[Subject],
        clients: u8,
        inbound: Result<Vec<SocketAddr>, String>,
        tools: &Tools,
        dir: &Path,
    ) {
        let replicas = self.fleet.addresses.clone();
        if subjects.contains(&Subject::Envoy) || subjects.contains(&Subject::EnvoyWrr) {
            let reporting = inbound.as_deref().unwrap_or(&[]);
            let envoys: Result<Vec<_>> = (0..clients)
                .map(|number| peers::envoy(number, &replicas, reporting, &tools.peers, dir))
                .collect();
            let (mut least, mut weighted) = (Vec::new(), Vec::new());
            let envoys = envoys.map(|envoys| {
                for (process, a, b) in envoys {
                    self.processes.push(Started { process, of: None });
                    least.push(a);
                    weighted.push(b);
                }
            });
            let envoys = envoys.map_err(|error| format!("{error:#}"));
            let told = |fronts: Vec<SocketAddr>| match &envoys {
                Ok(()) => Ok((fronts, "sim".to_owned())),
                Err(why) => Err(anyhow!("{why}")),
            };
            let weighted = match inbound {
                Ok(_) => told(weighted),
                Err(why) => Err(anyhow!("there is nobody who reports: {why}")),
            };
            self.set(case, Subject::Envoy, told(least));
            self.set(case, Subject::EnvoyWrr, weighted);
        }
        for (subject, start) in [
            (
                Subject::Haproxy,
                peers::haproxy as fn(&[SocketAddr], &Programs, &Path) -> Result<peers::Started>,
            ),
            (Subject::Nginx, peers::nginx),
        ] {
            if !subjects.contains(&subject) {
                continue;
            }
            let fronts = start(&replicas, &tools.peers, dir).map(|(process, front)| {
                self.processes.push(Started { process, of: Some(subject) });
                (vec![front], "sim".to_owned())
            });
            self.set(case, subject, fronts);
        }
    }

    /// Asks through every front until a replica has answered; who does not get that far has no runs.
    async fn probe(&mut self, case: &Case) {
        let deadline = Instant::now() + START;
        let probe = probe_body(case);
        for (subject, target) in &mut self.targets {
            let Ok(known) = target else { continue };
            let mut own: Vec<&mut Process> = self
                .processes
                .iter_mut()
                .filter(|started| started.of == Some(*subject))
                .map(|started| &mut started.process)
                .collect();
            for front in known.fronts.clone() {
                if let Err(error) = answers(front, known, &probe, &mut own, deadline).await {
                    *target = Err(format!("{error:#}"));
                    break;
                }
            }
        }
        // What has ended must not fail the runs of the others.
        self.processes.retain_mut(|started| started.process.check().is_ok());
    }
}

fn probe_body(case: &Case) -> Bytes {
    let body = if case.is_chat() {
        r#"{"model":"sim","messages":[{"role":"user","content":"?"}],"max_tokens":1}"#
    } else {
        r#"{"model":"sim","input":["?"]}"#
    };
    Bytes::from_static(body.as_bytes())
}

async fn answers(
    front: SocketAddr,
    target: &Target,
    probe: &Bytes,
    own: &mut [&mut Process],
    deadline: Instant,
) -> Result<()> {
    loop {
        own.iter_mut().try_for_each(|process| process.check())?;
        let limit = Duration::from_secs(10);
        let answer = ask(Method::POST, front, &target.host, target.path, probe.clone(), limit).await;
        let told = match answer {
            Ok((200, body)) if body.windows(5).any(|word| word == b"\"sim\"") => return Ok(()),
            Ok((status, body)) => {
                format!("{status} {}", String::from_utf8_lossy(&body[..body.len().min(200)]))
            }
            Err(error) => format!("{error:#}"),
        };
        if Instant::now() > deadline {
            bail!("it does not answer {START:?} after the start: {told}");
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
