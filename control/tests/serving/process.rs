//! The binary itself: what it prints, and what a kill leaves behind.

use std::process::Stdio;
use std::time::Duration;

use crate::mesh::{penstock_control, read};

#[test]
fn help_teaches_with_an_example_that_fits_a_screen() {
    let output = penstock_control().arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("penstock-control token --state") && text.lines().count() <= 24, "{text}");
}

#[test]
fn a_wrong_use_is_told_apart_from_a_failure() {
    assert_eq!(
        penstock_control().args(["run", "--source", "ftp:x"]).output().unwrap().status.code(),
        Some(2)
    );
    let dir = tempfile::tempdir().unwrap();
    let output = penstock_control().args(["rotate-root", "--state"]).arg(dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("holds no root yet"));
}

#[tokio::test]
async fn a_control_that_is_killed_at_any_moment_starts_again_with_what_it_had() {
    let dir = tempfile::tempdir().unwrap();
    let (state, objects) = (dir.path().join("state"), dir.path().join("objects"));
    std::fs::create_dir(&objects).unwrap();
    let mut root = Vec::new();
    let run = || {
        let source = format!("dir:{}", objects.display());
        let mut command = penstock_control();
        command.args([
            "run",
            "--source",
            &source,
            "--listen",
            "127.0.0.1:0",
            "--api",
            "127.0.0.1:0",
            "--state",
        ]);
        command.arg(&state).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    for round in 0..25 {
        let mut child = run();
        tokio::time::sleep(Duration::from_millis(round * 2)).await;
        if round % 5 == 4 {
            // A rotation that is asked for while all this happens.
            drop(penstock_control().args(["rotate-root", "--state"]).arg(&state).output().unwrap());
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let now = read(&state.join("root.pem"));
        assert!(root.is_empty() || now == root, "a root that was in force has changed");
        root = now;
    }
    let mut child = run();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !read(&state.join("anchors.pem")).starts_with(&read(&state.join("root.pem"))) || root.is_empty() {
        assert!(
            tokio::time::Instant::now() < deadline && child.try_wait().unwrap().is_none(),
            "control does not start"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
        root = read(&state.join("root.pem"));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
