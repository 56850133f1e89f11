//! What the demo found, as numbers for programs and as a page for people.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::load::Tally;
use super::photos::Photos;
use super::sharing::Sharing;
use crate::table::{Cell, Table, cells};
use crate::terminal::{Terminal, Tone};
use crate::units;

/// The summary, printed by `penstock demo --json`. Shares and accuracies are 0 to 1.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Summary {
    /// Requests that the client sent.
    pub(crate) requests: u64,
    /// Requests that failed, without those counted apart.
    pub(crate) failed: u64,
    /// In flight on the replica that was killed, and not retryable: counted apart.
    pub(crate) failed_on_killed_replica: u64,
    /// Failures of both kinds by reason.
    pub(crate) failures: BTreeMap<String, u64>,
    /// The largest difference between a phase's share of version 2 and what the weights asked for.
    pub(crate) share_error_max: f64,
    /// Weights pushed one by one and waited for.
    pub(crate) pushes: usize,
    /// From the edit of the file to the acknowledgement of the last sidecar.
    pub(crate) push_to_applied_ms_p50: f64,
    /// As above.
    pub(crate) push_to_applied_ms_p99: f64,
    /// Right answers of version 1's answers; absent without answers.
    pub(crate) accuracy_v1: Option<f64>,
    /// As above.
    pub(crate) accuracy_v2: Option<f64>,
    /// Share of the requests between pods that went over mutual TLS, as control counted.
    pub(crate) mtls_share: Option<f64>,
    /// From the client's request to the end of the answer, through both sidecars and the model.
    pub(crate) p50_ms: Option<f64>,
    /// As above.
    pub(crate) p99_ms: Option<f64>,
    /// Certificates that running sidecars exchanged for new ones.
    pub(crate) certificates_rotated: u64,
    /// Replicas restarted in good order.
    pub(crate) replicas_restarted: u64,
    /// Replicas killed without warning.
    pub(crate) replicas_killed: u64,
    /// What the crowd at the end shared.
    pub(crate) sharing: Sharing,
    /// What became of photographs.
    pub(crate) photos: Photos,
    /// How long there was load.
    pub(crate) seconds: f64,
    /// The phases, in order.
    pub(crate) phases: Vec<Phase>,
}

/// A phase in which the weights stood still.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Phase {
    /// `v2 at 10 %`.
    pub(crate) name: String,
    /// What happened meanwhile; empty when nothing did.
    pub(crate) event: String,
    /// The share of version 2 that the weights asked for.
    pub(crate) share_asked: f64,
    /// The share of version 2 among the answers.
    pub(crate) share_seen: Option<f64>,
    /// Requests sent in the phase.
    pub(crate) requests: u64,
    /// Requests a second.
    pub(crate) rps: f64,
    /// From request to the end of the answer.
    pub(crate) p50_ms: Option<f64>,
    /// As above.
    pub(crate) p99_ms: Option<f64>,
    /// Requests that failed, without those counted apart.
    pub(crate) failed: u64,
    /// As in the summary.
    pub(crate) failed_on_killed_replica: u64,
    /// How long it took.
    pub(crate) seconds: f64,
}

impl Phase {
    /// A phase from what was counted in it.
    pub(crate) fn of(name: String, event: &str, asked: f64, tally: &Tally, lasted: Duration) -> Self {
        let seconds = lasted.as_secs_f64();
        Self {
            name,
            event: event.to_owned(),
            share_asked: asked,
            share_seen: tally.share_v2(),
            requests: tally.requests,
            rps: if seconds > 0.0 { tally.requests as f64 / seconds } else { 0.0 },
            p50_ms: quantile(tally, 0.5),
            p99_ms: quantile(tally, 0.99),
            failed: tally.failed,
            failed_on_killed_replica: tally.failed_on_killed_replica,
            seconds,
        }
    }

    /// How far the share was off; a phase without answers is off by all.
    fn share_error(&self) -> f64 {
        self.share_seen.map_or(1.0, |seen| (seen - self.share_asked).abs())
    }
}

/// Requests over mutual TLS of all requests, gathered from control's pages.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct MutualTls {
    requests: f64,
    mutual: f64,
}

impl MutualTls {
    /// Adds `requests` of which the share `mutual` went over mutual TLS.
    pub(crate) fn add(&mut self, requests: u64, mutual: Option<f64>) {
        self.requests += requests as f64;
        self.mutual += requests as f64 * mutual.unwrap_or(0.0);
    }

    fn share(self) -> Option<f64> {
        (self.requests > 0.0).then(|| self.mutual / self.requests)
    }
}

/// What the script gathered besides the load.
#[derive(Clone, Debug, Default)]
pub(crate) struct Findings {
    /// The phases.
    pub(crate) phases: Vec<Phase>,
    /// Milliseconds from edit to applied, one a push.
    pub(crate) pushes: Vec<f64>,
    /// Mutual TLS.
    pub(crate) mutual_tls: MutualTls,
    /// Certificates rotated.
    pub(crate) certificates_rotated: u64,
    /// Replicas restarted in good order.
    pub(crate) replicas_restarted: u64,
    /// Replicas killed.
    pub(crate) replicas_killed: u64,
    /// What the crowd asked, and who sent photographs.
    pub(crate) crowd: Tally,
    /// What the crowd shared.
    pub(crate) sharing: Sharing,
    /// What became of the photographs.
    pub(crate) photos: Photos,
}

impl Summary {
    /// Puts everything together.
    pub(crate) fn of(
        findings: Findings,
        total: &Tally,
        reasons: BTreeMap<String, u64>,
        lasted: Duration,
    ) -> Self {
        let mut pushes = findings.pushes;
        pushes.sort_by(f64::total_cmp);
        Self {
            requests: total.requests + findings.crowd.requests,
            failed: total.failed + findings.crowd.failed,
            failed_on_killed_replica: total.failed_on_killed_replica,
            failures: reasons,
            share_error_max: findings.phases.iter().map(Phase::share_error).fold(0.0, f64::max),
            pushes: pushes.len(),
            push_to_applied_ms_p50: percentile(&pushes, 0.5),
            push_to_applied_ms_p99: percentile(&pushes, 0.99),
            accuracy_v1: total.versions[0].accuracy(),
            accuracy_v2: total.versions[1].accuracy(),
            mtls_share: findings.mutual_tls.share(),
            p50_ms: quantile(total, 0.5),
            p99_ms: quantile(total, 0.99),
            certificates_rotated: findings.certificates_rotated,
            replicas_restarted: findings.replicas_restarted,
            replicas_killed: findings.replicas_killed,
            sharing: findings.sharing,
            photos: findings.photos,
            seconds: lasted.as_secs_f64(),
            phases: findings.phases,
        }
    }

    /// Whether nothing failed other than what is counted apart.
    pub(crate) fn is_fine(&self) -> bool {
        self.failed == 0 && self.requests > 0
    }

    /// The page for people.
    pub(crate) fn page(&self, terminal: Terminal) -> String {
        let verdict = match self.failed {
            0 if self.requests == 0 => terminal.paint(Tone::Bad, "no request was sent"),
            0 => terminal.paint(Tone::Good, "none failed"),
            n => terminal.paint(Tone::Bad, &format!("{} failed", units::count(n))),
        };
        let mut text = format!(
            "{} {verdict}.\n\n",
            terminal.paint(
                Tone::Strong,
                &format!("{} requests in {:.0} s:", units::count(self.requests), self.seconds)
            )
        );
        text.push_str(&self.phase_table().render(terminal));
        text.push('\n');
        let mut facts = Table::new(&["", ""]);
        for (name, fact) in self.facts() {
            facts.row(cells![name, fact]);
        }
        // The facts have no headings, so their first, empty line is left out.
        text.push_str(facts.render(terminal).trim_start_matches('\n'));
        if !self.failures.is_empty() {
            let reasons: Vec<String> =
                self.failures.iter().map(|(reason, n)| format!("{} × {reason}", units::count(*n))).collect();
            let _ = writeln!(text, "\nFailures: {}.", reasons.join(", "));
        }
        text
    }

    fn phase_table(&self) -> Table {
        let mut table = Table::new(&[
            "PHASE",
            ">V2 ASKED",
            ">V2 SEEN",
            ">REQUESTS",
            ">RATE",
            ">P50",
            ">P99",
            ">FAILED",
            "MEANWHILE",
        ]);
        for phase in &self.phases {
            table.row(cells![
                phase.name.as_str(),
                units::percent(phase.share_asked),
                units::or_dash(phase.share_seen, units::percent),
                units::count(phase.requests),
                units::per_second(phase.rps),
                units::or_dash(phase.p50_ms, units::milliseconds),
                units::or_dash(phase.p99_ms, units::milliseconds),
                Cell::toned(
                    if phase.failed == 0 { Tone::Good } else { Tone::Bad },
                    units::count(phase.failed)
                ),
                phase.event.as_str(),
            ]);
        }
        table
    }

    fn facts(&self) -> Vec<(&'static str, String)> {
        let or_dash = |share: Option<f64>| units::or_dash(share, units::percent);
        let cpu = |ms: Option<f64>| units::or_dash(ms, units::milliseconds);
        let (jpegs, own) = (self.photos.jpegs, self.photos.own);
        vec![
            (
                "New weights",
                format!(
                    "{} pushed; from the edit of a file to the last sidecar's acknowledgement: p50 {}, p99 {}",
                    self.pushes,
                    units::milliseconds(self.push_to_applied_ms_p50),
                    units::milliseconds(self.push_to_applied_ms_p99)
                ),
            ),
            (
                "Share",
                format!(
                    "in no phase more than {:.1} percentage points from what was asked",
                    self.share_error_max * 100.0
                ),
            ),
            (
                "Latency",
                format!(
                    "p50 {}, p99 {}: client, its sidecar, mutual TLS, the model's sidecar, the model, and back",
                    units::or_dash(self.p50_ms, units::milliseconds),
                    units::or_dash(self.p99_ms, units::milliseconds)
                ),
            ),
            (
                "Accuracy",
                format!(
                    "version 1 reads {} of the digits right, version 2 {}",
                    or_dash(self.accuracy_v1),
                    or_dash(self.accuracy_v2)
                ),
            ),
            (
                "Encryption",
                format!(
                    "{} of the requests between pods went over mutual TLS; {} certificates rotated under load",
                    or_dash(self.mtls_share),
                    units::count(self.certificates_rotated)
                ),
            ),
            (
                "Replicas",
                format!(
                    "{} restarted in good order, {} killed without warning; lost with the killed one: {}",
                    self.replicas_restarted,
                    self.replicas_killed,
                    units::count(self.failed_on_killed_replica)
                ),
            ),
            (
                "Sharing",
                format!(
                    "a crowd at the end: {} requests, {:.1} digits to a batch, {} in flight already; {} executions saved",
                    units::count(self.sharing.members + self.sharing.coalesced),
                    self.sharing.rows_per_batch(),
                    units::count(self.sharing.coalesced),
                    units::count(self.sharing.saved())
                ),
            ),
            (
                "Photographs",
                format!(
                    "{} as JPEGs of {} at {}, {:.1} to a batch: {} recognised; decoded and resized by the sidecar in {} each",
                    units::count(jpegs.requests),
                    units::bytes(jpegs.bytes as u64),
                    units::per_second(jpegs.rate()),
                    self.photos.rows_per_batch,
                    or_dash(jpegs.accuracy),
                    units::milliseconds(self.photos.prepare_ms)
                ),
            ),
            (
                "",
                format!(
                    "{} as tensors of {} that the client made itself, at {}: {} recognised",
                    units::count(own.requests),
                    units::bytes(own.bytes as u64),
                    units::per_second(own.rate()),
                    or_dash(own.accuracy)
                ),
            ),
            (
                "",
                format!(
                    "a JPEG is {:.1} times smaller; a photograph took {} of the client's CPU time, and {} where it prepared \
                     itself ({} and {} with sidecars and server)",
                    self.photos.bytes_saved(),
                    cpu(jpegs.client_cpu_ms),
                    cpu(own.client_cpu_ms),
                    cpu(jpegs.cpu_ms),
                    cpu(own.cpu_ms)
                ),
            ),
        ]
    }
}

/// The smallest value that at least the share `q` of the values does not exceed; 0 without values.
fn percentile(sorted: &[f64], q: f64) -> f64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
}

/// Whole microseconds, as that is how exact they are.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

fn quantile(tally: &Tally, q: f64) -> Option<f64> {
    tally.latency.quantile(q).map(milliseconds)
}

#[cfg(test)]
mod tests {
    use super::super::load::VersionTally;
    use super::super::photos::Way;
    use super::*;

    fn tally(v1: u64, v2: u64) -> Tally {
        let mut tally = Tally { requests: v1 + v2, ..Tally::default() };
        tally.versions =
            [VersionTally { answers: v1, correct: v1 / 2 }, VersionTally { answers: v2, correct: v2 }];
        for _ in 0..v1 + v2 {
            tally.latency.record(Duration::from_micros(1000));
        }
        tally
    }

    fn summary() -> Summary {
        let second = Duration::from_secs(1);
        let phases = vec![
            Phase::of("v2 at 0 %".to_owned(), "", 0.0, &tally(1000, 0), second),
            Phase::of("v2 at 10 %".to_owned(), "digits-v1-a restarts", 0.1, &tally(885, 115), second),
        ];
        let mut mutual_tls = MutualTls::default();
        mutual_tls.add(1885, Some(1.0));
        mutual_tls.add(115, Some(1.0));
        let findings = Findings {
            phases,
            pushes: (1..=100).rev().map(f64::from).collect(),
            mutual_tls,
            certificates_rotated: 7,
            replicas_restarted: 1,
            replicas_killed: 1,
            crowd: Tally::default(),
            sharing: Sharing {
                members: 100,
                batches: 10,
                rows: 100,
                coalesced: 5,
                executions: 10,
                placed: 0,
            },
            photos: Photos {
                jpegs: Way {
                    requests: 1200,
                    seconds: 3.0,
                    accuracy: Some(0.95),
                    bytes: 33_000.0,
                    client_cpu_ms: Some(0.2),
                    cpu_ms: Some(4.0),
                },
                own: Way {
                    requests: 600,
                    seconds: 2.0,
                    accuracy: Some(0.95),
                    bytes: 301_056.0,
                    client_cpu_ms: Some(3.5),
                    cpu_ms: Some(5.0),
                },
                prepared: 1200,
                prepare_ms: 1.5,
                executions: 300,
                executions_placed: 290,
                rows_per_batch: 4.0,
            },
        };
        let mut total = tally(1885, 115);
        total.failed_on_killed_replica = 1;
        total.requests += 1;
        Summary::of(findings, &total, BTreeMap::from([("upstream-reset".to_owned(), 1)]), 2 * second)
    }

    #[test]
    fn the_worst_phase_gives_the_share_error() {
        let summary = summary();
        assert!((summary.share_error_max - 0.015).abs() < 1e-9, "{}", summary.share_error_max);
        assert_eq!(summary.push_to_applied_ms_p50, 50.0);
        assert_eq!(summary.push_to_applied_ms_p99, 99.0);
        assert_eq!(summary.mtls_share, Some(1.0));
        assert_eq!((summary.accuracy_v1, summary.accuracy_v2), (Some(942.0 / 1885.0), Some(1.0)));
    }

    #[test]
    fn a_phase_without_answers_is_as_wrong_as_can_be() {
        let phase = Phase::of(String::new(), "", 0.5, &Tally::default(), Duration::from_secs(1));
        assert_eq!(phase.share_error(), 1.0);
    }

    #[test]
    fn plaintext_lowers_the_share_of_mutual_tls() {
        let mut mutual_tls = MutualTls::default();
        assert_eq!(mutual_tls.share(), None);
        mutual_tls.add(300, Some(1.0));
        mutual_tls.add(100, Some(0.0));
        assert_eq!(mutual_tls.share(), Some(0.75));
    }

    #[test]
    fn only_failures_that_are_not_counted_apart_spoil_the_demo() {
        let summary = summary();
        assert!(summary.is_fine());
        assert!(!Summary { failed: 1, ..summary.clone() }.is_fine());
        assert!(!Summary { requests: 0, ..summary }.is_fine());
    }

    #[test]
    fn percentiles_take_the_nearest_rank() {
        let values: Vec<f64> = (1..=10).map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.9, 0.99, 1.0].map(|q| percentile(&values, q)), [1.0, 5.0, 9.0, 10.0, 10.0]);
        assert_eq!(percentile(&[], 0.99), 0.0);
    }

    #[test]
    fn the_json_has_the_names_that_scripts_rely_on() {
        let json = serde_json::to_value(summary()).unwrap();
        for name in [
            "requests",
            "failed",
            "failed_on_killed_replica",
            "share_error_max",
            "push_to_applied_ms_p50",
            "push_to_applied_ms_p99",
            "accuracy_v1",
            "accuracy_v2",
            "mtls_share",
            "p50_ms",
            "p99_ms",
            "certificates_rotated",
        ] {
            assert!(json[name].is_number(), "{name}: {}", json[name]);
        }
        let phase = &json["phases"][1];
        assert_eq!(phase["share_asked"], 0.1);
        assert_eq!(phase["share_seen"], 0.115);
        assert_eq!(serde_json::from_value::<Summary>(json).unwrap(), summary());
    }

    #[test]
    fn the_page_reads_from_the_verdict_down() {
        let page = summary().page(Terminal::PLAIN);
        assert!(page.starts_with("2,001 requests in 2 s: none failed.\n\nPHASE "), "{page}");
        assert!(page.contains("v2 at 10 %    10.0 %   11.5 %"), "{page}");
        assert!(page.contains("\nNew weights  100 pushed;"), "{page}");
        assert!(
            page.contains("105 requests, 10.0 digits to a batch, 5 in flight already; 95 executions saved")
        );
        assert!(
            page.contains(
                "Photographs  1,200 as JPEGs of 32.2 KiB at 400/s, 4.0 to a batch: 95.0 % recognised;"
            ),
            "{page}"
        );
        assert!(
            page.contains("a JPEG is 9.1 times smaller; a photograph took 0.20 ms of the client's"),
            "{page}"
        );
        assert!(page.ends_with("\nFailures: 1 × upstream-reset.\n"), "{page}");
        assert!(page.lines().all(|line| !line.ends_with(' ')), "{page}");
    }
}
