//! A directory is followed through everything that editors, `mv` and mounts do to files.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests, which clippy doesn't see as such"
)]

mod common;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use penstock_api::resource::Kind;
use penstock_control::compile::{State, resume, run};
use penstock_control::snapshot::Snapshot;
use penstock_control::source::{Opened, Source, check_dir};
use tokio::sync::watch;

use common::trust;

fn service(name: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{ports: [{{port: 80}}]}}\n")
}

async fn follow(directory: &Path) -> watch::Receiver<Arc<Snapshot>> {
    let source = Source::Directory(directory.to_owned());
    let Opened { objects, review, .. } = source.open(Duration::from_millis(10)).await.unwrap();
    assert!(review.is_none(), "a directory knows of no tokens");
    run(objects, watch::channel(Arc::new(trust())).1, State::default())
}

/// Waits until the snapshot is as it should be.
async fn until(
    snapshots: &mut watch::Receiver<Arc<Snapshot>>,
    wanted: impl Fn(&Snapshot) -> bool,
) -> Arc<Snapshot> {
    let wait = snapshots.wait_for(|snapshot| wanted(snapshot));
    // Less than the periodic look, so that it is the watch that is tested.
    tokio::time::timeout(Duration::from_secs(4), wait).await.expect("not seen in time").unwrap().clone()
}

fn names(snapshot: &Snapshot) -> Vec<&str> {
    snapshot.all(Kind::Service).map(|(name, _)| name).collect()
}

#[tokio::test]
async fn the_first_snapshot_is_complete() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("sub")).unwrap();
    fs::write(directory.path().join("a.yaml"), service("a")).unwrap();
    fs::write(directory.path().join("sub/b.yml"), service("b")).unwrap();
    fs::write(directory.path().join("c.txt"), service("c")).unwrap();
    fs::write(directory.path().join(".d.yaml"), service("d")).unwrap();
    let snapshots = follow(directory.path()).await;
    assert_eq!(names(&snapshots.borrow()), ["default/a", "default/b"]);
}

#[tokio::test]
async fn files_are_written_replaced_and_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let mut snapshots = follow(directory.path()).await;

    fs::write(path("a.yaml"), service("a")).unwrap();
    until(&mut snapshots, |snapshot| names(snapshot) == ["default/a"]).await;

    // As `mv` and most editors do.
    fs::write(path("a.yaml.tmp"), service("b")).unwrap();
    fs::rename(path("a.yaml.tmp"), path("a.yaml")).unwrap();
    until(&mut snapshots, |snapshot| names(snapshot) == ["default/b"]).await;

    // In a directory that was not there.
    fs::create_dir(path("new")).unwrap();
    fs::write(path("new/c.yaml"), service("c")).unwrap();
    until(&mut snapshots, |snapshot| names(snapshot) == ["default/b", "default/c"]).await;

    fs::remove_file(path("a.yaml")).unwrap();
    until(&mut snapshots, |snapshot| names(snapshot) == ["default/c"]).await;
}

#[tokio::test]
async fn a_mounted_config_map_is_followed_through_its_links() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    for (version, name) in [("..1", "a"), ("..2", "b")] {
        fs::create_dir(path(version)).unwrap();
        fs::write(path(version).join("x.yaml"), service(name)).unwrap();
    }
    std::os::unix::fs::symlink("..1", path("..data")).unwrap();
    std::os::unix::fs::symlink("..data/x.yaml", path("x.yaml")).unwrap();
    let mut snapshots = follow(directory.path()).await;
    assert_eq!(names(&snapshots.borrow()), ["default/a"]);

    std::os::unix::fs::symlink("..2", path("..tmp")).unwrap();
    fs::rename(path("..tmp"), path("..data")).unwrap();
    until(&mut snapshots, |snapshot| names(snapshot) == ["default/b"]).await;
}

#[tokio::test]
async fn a_file_that_is_being_rewritten_never_looks_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    fs::write(&file, service("a")).unwrap();
    let mut snapshots = follow(directory.path()).await;

    // Emptied, and written only after the source has been quiet for longer than its debounce.
    fs::write(&file, "").unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert!(!snapshots.has_changed().unwrap(), "{:?}", snapshots.borrow());
    fs::write(&file, service("b")).unwrap();
    let seen = until(&mut snapshots, |snapshot| names(snapshot) != ["default/a"]).await;
    assert_eq!(names(&seen), ["default/b"]);

    // One that stays empty is empty.
    fs::write(&file, "").unwrap();
    until(&mut snapshots, |snapshot| names(snapshot).is_empty()).await;
}

#[tokio::test]
async fn garbage_is_told_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    fs::write(&file, service("a")).unwrap();
    let mut snapshots = follow(directory.path()).await;
    let before = snapshots.borrow().version.clone();

    for garbage in [b"a: [".as_slice(), b"\xff\xfe"] {
        fs::write(&file, garbage).unwrap();
        let seen = until(&mut snapshots, |snapshot| !snapshot.problems.is_empty()).await;
        assert_eq!(seen.version, before);
        assert!(seen.problems[0].last_good_in_force, "{:?}", seen.problems);
        assert_eq!(seen.problems[0].file, file.to_string_lossy());
        fs::write(&file, service("a")).unwrap();
        until(&mut snapshots, |snapshot| snapshot.problems.is_empty()).await;
    }
}

#[tokio::test]
async fn a_restart_remembers_what_was_good() {
    let directory = tempfile::tempdir().unwrap();
    let state = tempfile::tempdir().unwrap();
    let memory = state.path().join("last-good.json");
    let file = directory.path().join("a.yaml");
    let start = async || {
        let opened =
            Source::Directory(directory.path().to_owned()).open(Duration::from_millis(10)).await.unwrap();
        resume(opened.objects, watch::channel(Arc::new(trust())).1, memory.clone())
    };
    fs::write(&file, service("a")).unwrap();
    let first = start().await;
    let version = first.borrow().version.clone();
    while !memory.exists() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(first);

    // Broken while control is down.
    fs::write(&file, "a: [").unwrap();
    let second = start().await;
    assert_eq!(second.borrow().version, version);
    assert!(second.borrow().problems[0].last_good_in_force);
    drop(second);

    // A memory that is lost or damaged is as good as none.
    fs::write(&memory, "{").unwrap();
    assert_eq!(names(&start().await.borrow()), Vec::<&str>::new());
}

#[tokio::test]
async fn a_change_without_meaning_is_not_published() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    fs::write(&file, service("a")).unwrap();
    let mut snapshots = follow(directory.path()).await;
    snapshots.mark_unchanged();
    fs::write(&file, format!("# a comment\n{}", service("a"))).unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!snapshots.has_changed().unwrap());
}

#[tokio::test]
async fn a_directory_that_goes_away_takes_nothing_with_it() {
    let parent = tempfile::tempdir().unwrap();
    let directory = parent.path().join("objects");
    fs::create_dir(&directory).unwrap();
    fs::write(directory.join("a.yaml"), service("a")).unwrap();
    let mut snapshots = follow(&directory).await;
    fs::rename(&directory, parent.path().join("elsewhere")).unwrap();
    let wait = snapshots.wait_for(|snapshot| !snapshot.problems.is_empty());
    let seen = tokio::time::timeout(Duration::from_secs(8), wait).await.unwrap().unwrap().clone();
    assert_eq!(names(&seen), ["default/a"]);
    assert!(seen.problems[0].message.contains("the directory cannot be read"), "{:?}", seen.problems);
}

#[tokio::test]
async fn a_directory_that_does_not_exist_is_named() {
    let source = Source::Directory("/nonexistent/objects".into());
    let error = source.open(Duration::from_millis(10)).await.unwrap_err();
    assert!(error.to_string().contains("there is no directory /nonexistent/objects"), "{error}");
}

#[test]
fn a_directory_is_checked_without_running() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("a.yaml"), service("a")).unwrap();
    assert_eq!(check_dir(directory.path()), []);
    fs::write(directory.path().join("b.yaml"), service("a").replace("80", "0")).unwrap();
    let problems = check_dir(directory.path());
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(!problems[0].last_good_in_force);
    assert_eq!(check_dir(Path::new("/nonexistent")).len(), 1);
}
