//! The demo itself, end to end and in short: what a newcomer runs, run by a test.

#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::process::Command;

use serde_json::Value;

/// Needs the other programs beside this one, which cargo does not build for a test of this crate:
/// `cargo build --bins && cargo test -p penstock -- --ignored`.
#[test]
#[ignore = "takes 15 s and needs penstock-control, penstock-proxy and penstock-modelserver built"]
fn a_canary_goes_to_100_percent_while_replicas_die_and_nothing_fails() {
    let output = Command::new(env!("CARGO_BIN_EXE_penstock"))
        .args(["demo", "--json", "--seconds", "8", "--rate", "500"])
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {told}", output.status);
    let summary: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["failed"], 0, "{summary}");
    assert_eq!(summary["mtls_share"], 1.0, "{summary}");
    assert_eq!(summary["replicas_restarted"], 1, "{summary}");
    assert_eq!(summary["replicas_killed"], 1, "{summary}");
    assert!(summary["certificates_rotated"].as_u64().unwrap() >= 3, "{summary}");
    // A thousand draws a phase: three standard deviations at 50 % are 0.047.
    assert!(summary["share_error_max"].as_f64().unwrap() < 0.05, "{summary}");
    assert!(summary["accuracy_v2"].as_f64() > summary["accuracy_v1"].as_f64(), "{summary}");
}
