//! Clocks that jump by an hour: control's, or a server's. Certificates are what follows the wall clock; everything else goes by a clock that
//! only ever goes on.
//!
//! libfaketime stands between one process and its wall clock (`apt-get install faketime`). Certificates live for 12 hours, as they do unless
//! somebody says otherwise.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use penstock_tests::testkit::pods::Pods;
use penstock_tests::testkit::{PATIENCE, wait_until};
use rustix::process::Pid;

use super::world::{FAULT, World};

/// Where the library lies, below a folder for each architecture.
const LIBRARY: &str = "faketime/libfaketimeMT.so.1";
/// The file that says how far the clock is off.
const CLOCK: &str = "clock";

/// The library; where it is not, that is said, and in CI it must be.
fn library() -> Option<PathBuf> {
    let folders = std::fs::read_dir("/usr/lib").unwrap().map(|folder| folder.unwrap().path());
    let found = folders.map(|folder| folder.join(LIBRARY)).find(|file| file.exists());
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none(), "clocks cannot jump in CI: apt-get install faketime");
        eprintln!("left out, no clock that jumps: apt-get install faketime");
    }
    found
}

/// What a program is started through whose wall clock is off as the file says.
fn by_the_clock_of(library: &Path, file: &Path) -> Vec<String> {
    vec![
        "env".to_owned(),
        format!("LD_PRELOAD={}", library.display()),
        format!("FAKETIME_TIMESTAMP_FILE={}", file.display()),
        // The file is read anew at each look at the clock, and nothing but the wall clock is another.
        "FAKETIME_NO_CACHE=1".to_owned(),
        "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        "NO_FAKE_STAT=1".to_owned(),
    ]
}

/// What the library has in shared memory for a process, which it does not take away itself from one that is killed.
struct Shared(Pid);

impl Drop for Shared {
    fn drop(&mut self) {
        let pid = self.0.as_raw_nonzero();
        for name in ["sem.faketime_sem", "faketime_shm"] {
            // A process that ended by itself has none.
            let _ = std::fs::remove_file(format!("/dev/shm/{name}_{pid}"));
        }
    }
}

/// Puts the clock forward or back, as a whole: a reader sees the old file or the new one.
fn put(pods: &Pods, offset: &str) {
    let draft = pods.shared_file("clock.draft", offset);
    std::fs::rename(&draft, draft.with_file_name(CLOCK)).unwrap();
}

/// The hour of a moment, as logs write it: `2026-11-27T23`.
fn hour(offset: i64) -> String {
    let by = Duration::from_secs(offset.unsigned_abs());
    let now = SystemTime::now();
    let moment = if offset < 0 { now - by } else { now + by };
    humantime::format_rfc3339_seconds(moment).to_string()[..13].to_owned()
}

/// Whose clock it is.
#[derive(Clone, Copy)]
enum Whose {
    Control,
    Server,
}

async fn a_clock_jumps(fault: &'static str, whose: Whose, offset: i64) {
    let Some(library) = library() else { return };
    let world = World::new(|mut pods| {
        let file = pods.shared_file(CLOCK, "+0");
        let through = by_the_clock_of(&library, &file);
        match whose {
            Whose::Control => pods.mesh.control_through = through,
            Whose::Server => pods.pod_mut("web-2").through = through,
        }
        pods.mesh = pods.mesh.leaf_lifetime("12h");
        pods.with("newcomer", &[])
    });
    let Some(world) = world.await else { return };
    let process = match whose {
        Whose::Control => world.pods.mesh.control.as_ref(),
        Whose::Server => world.pods.pod("web-2").sidecar.as_ref(),
    };
    let _shared = Shared(process.unwrap().pid());
    let mut world = world.under_load().await;
    put(&world.pods, &format!("{offset:+}"));
    // Somebody who has no connection yet: whoever cannot be reached because of its clock is left out, and the other one answers, what may not
    // be asked twice as well.
    for (service, request) in [
        ("writes", "POST / HTTP/1.1\r\nhost: writes\r\ncontent-length: 0\r\n\r\n"),
        ("reads", "GET / HTTP/1.1\r\nhost: reads\r\n\r\n"),
    ]
    .repeat(20)
    {
        let mut wire = world.pods.pod("newcomer").connect(world.pods.cluster_ip(service)).unwrap();
        let answer = wire.ask(request).await.unwrap();
        assert_eq!(answer.status(), 200, "{}", answer.text());
    }
    // It goes by the wrong clock, and goes on.
    world.control_goes_on().await;
    let hours = [hour(offset - 60), hour(offset)];
    wait_until("its log is of another hour", PATIENCE, async || {
        let said = match whose {
            Whose::Control => world.pods.mesh.control.as_ref().unwrap().said(),
            Whose::Server => world.pods.pod("web-2").sidecar.as_ref().unwrap().said(),
        };
        said.lines().rev().take(50).any(|line| hours.iter().any(|hour| line.contains(hour.as_str())))
    })
    .await;
    tokio::time::sleep(FAULT.saturating_sub(world.since())).await;
    put(&world.pods, "+0");
    world.recovers().await;
    let seen = world.told(fault).await;
    seen.get.has_no_failure("GET");
    seen.post.has_no_failure("POST");
}

#[tokio::test]
async fn controls_clock_an_hour_ahead_disturbs_nobody() {
    a_clock_jumps("control's clock + 1 h", Whose::Control, 3600).await;
}

#[tokio::test]
async fn controls_clock_an_hour_behind_disturbs_nobody() {
    a_clock_jumps("control's clock - 1 h", Whose::Control, -3600).await;
}

#[tokio::test]
async fn a_servers_clock_an_hour_ahead_disturbs_nobody() {
    a_clock_jumps("server's clock + 1 h", Whose::Server, 3600).await;
}

#[tokio::test]
async fn a_servers_clock_an_hour_behind_disturbs_nobody() {
    a_clock_jumps("server's clock - 1 h", Whose::Server, -3600).await;
}
