//! What a machine runs short of: CPU time, file descriptors, room on a disk.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use penstock_api::names::PROXY_UID;
use penstock_tests::testkit::{PATIENCE, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use tokio::task::JoinSet;

use super::world::{FAULT, LATE, World};

/// A fiftieth of a CPU, as a quota would give it out: so long in each period.
const SHARE: Duration = Duration::from_millis(4);
const PERIOD: Duration = Duration::from_millis(200);

/// A process that is let run in short pulses, until this is dropped. Wherever tests run they may send signals; few may set quotas.
struct Starved {
    enough: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Starved {
    fn new(pid: Pid) -> Self {
        let enough = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&enough);
        let thread = std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                kill_process(pid, Signal::STOP).unwrap();
                std::thread::park_timeout(PERIOD - SHARE);
                kill_process(pid, Signal::CONT).unwrap();
                std::thread::park_timeout(SHARE);
            }
        });
        Self { enough, thread: Some(thread) }
    }
}

impl Drop for Starved {
    fn drop(&mut self) {
        self.enough.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(matches!(ended, Some(Ok(()))) || std::thread::panicking(), "the sidecar ended");
    }
}

#[tokio::test]
async fn a_servers_sidecar_without_cpu_is_left_alone_until_it_has_some() {
    let Some(world) = World::new(|pods| pods).await else { return };
    let mut world = world.under_load().await;
    let starved = Starved::new(world.pods.pod("web-2").sidecar.as_ref().unwrap().pid());
    tokio::time::sleep(FAULT).await;
    drop(starved);
    world.recovers().await;
    let seen = world.told("sidecar starved").await;
    seen.get.has_no_failure("GET");
    assert!(seen.get.longest < Duration::from_secs(4), "{:?}", seen.get);
    assert!(seen.longest() > PERIOD / 2, "it had time enough: {:?}, {:?}", seen.get, seen.post);
    seen.post.fails_at_most(40, &["request-timeout", "upstream-reset"], "POST");
}

/// Limits the files that a sidecar may have open, as the sidecar's own user, who may without a capability that many machines withhold from
/// root; how many it was allowed before.
fn files(sidecar: Pid, limit: usize) -> usize {
    let user = PROXY_UID.to_string();
    let prlimit = |what: &str| {
        let output = Command::new("setpriv")
            .args([
                "--reuid",
                &user,
                "--regid",
                &user,
                "--clear-groups",
                "--",
                "prlimit",
                "--raw",
                "--noheadings",
            ])
            .args(["--output", "SOFT", "--pid", &sidecar.as_raw_nonzero().to_string(), what])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let before = prlimit("--nofile").trim().parse().unwrap();
    prlimit(&format!("--nofile={limit}:"));
    before
}

/// Who comes while no file is left.
const NEWCOMERS: usize = 20;

#[tokio::test]
async fn without_files_newcomers_wait_and_nobody_else_notices() {
    let Some(world) = World::new(|pods| pods).await else { return };
    let mut world = world.under_load().await;
    let sidecar = world.pods.pod("client").sidecar.as_ref().unwrap();
    let before = files(sidecar.pid(), sidecar.files() + 4);
    let mut newcomers = JoinSet::new();
    for _ in 0..NEWCOMERS {
        let mut wire = world.pods.pod("client").connect(world.pods.cluster_ip("reads")).unwrap();
        newcomers.spawn(async move {
            let answer = wire.ask("GET / HTTP/1.1\r\nhost: reads\r\n\r\n").await.unwrap();
            assert_eq!(answer.status(), 200, "{}", answer.text());
            // It stays connected: nobody is let in because somebody leaves.
            wire
        });
    }
    tokio::time::sleep(FAULT).await;
    let mut answered = Vec::new();
    while let Some(wire) = newcomers.try_join_next() {
        answered.push(wire.unwrap());
    }
    assert!(answered.len() < NEWCOMERS, "there were files for all");
    let sidecar = world.pods.pod("client").sidecar.as_ref().unwrap();
    let said = sidecar.said().matches("raise the limit of open files").count() as u64;
    assert!((1..=FAULT.as_secs() + 2).contains(&said), "it says what it lacks, once a second: {said} times");
    files(sidecar.pid(), before);
    // Who has waited is answered.
    while let Some(wire) = newcomers.join_next().await {
        answered.push(wire.unwrap());
    }
    world.recovers().await;
    let seen = world.told("files used up").await;
    seen.get.has_no_failure("GET");
    seen.post.has_no_failure("POST");
}

/// Lays a small disk under the state directory, which only the program that follows sees.
const SMALL_DISK: &str = r#"
mkdir "$0.small"
mount -t tmpfs -o size=1m,mode=700 tmpfs "$0.small"
cp -a "$0/." "$0.small"
mount --bind "$0.small" "$0"
exec "$@"
"#;

#[tokio::test]
async fn control_goes_on_with_a_full_disk_says_so_and_keeps_everything_when_there_is_room() {
    let Some(mut world) = World::new(|pods| pods.with("newcomer", &[])).await else { return };
    let mesh = &mut world.pods.mesh;
    mesh.kill_control();
    let state = mesh.state().display().to_string();
    let through = ["unshare", "--mount", "--", "sh", "-e", "-c", SMALL_DISK, &state];
    mesh.control_through = through.map(str::to_owned).into();
    mesh.start_control().await;
    let pid = mesh.control.as_ref().unwrap().pid().as_raw_nonzero();
    let seen_by_control = |file: &str| PathBuf::from(format!("/proc/{pid}/root{state}/{file}"));
    let mut world = world.under_load().await;

    let mut filled = std::fs::File::create(seen_by_control("filled")).unwrap();
    let block = [0; 4096];
    let full =
        std::iter::repeat_with(|| filled.write_all(&block)).take(1 << 10).find_map(Result::err).unwrap();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    world.control_goes_on().await;
    // Nor does a certificate need the disk.
    world.pods.pod_mut("newcomer").sidecar.as_mut().unwrap().kill();
    world.pods.start_sidecar("newcomer");
    world.pods.sidecar_is_ready("newcomer").await;
    let control = || world.pods.mesh.control.as_ref().unwrap().said();
    wait_until("control says that its disk is full", PATIENCE, async || {
        control().contains("No space left on device")
    })
    .await;
    tokio::time::sleep(FAULT.saturating_sub(world.since())).await;
    let kept = || std::fs::read_to_string(seen_by_control("accepted.json")).unwrap();
    assert!(!kept().contains(LATE), "the disk was full");
    // A file has its room for as long as somebody has it open.
    drop(filled);
    std::fs::remove_file(seen_by_control("filled")).unwrap();
    wait_until("control keeps what it could not keep", PATIENCE, async || kept().contains(LATE)).await;
    world.recovers().await;
    let seen = world.told("control's disk full").await;
    seen.get.has_no_failure("GET");
    seen.post.has_no_failure("POST");
}
