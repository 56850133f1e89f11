//! What a run measured, and the rows and the table that come of the runs of a case.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use super::case::{Case, REPLICAS};
use super::client::Outcome;
use super::fleet::State;
use super::subject::{BASELINE, Subject};
use crate::report::{self, Named, Row, Summary};

/// Share of the machine above which the CPU may have been the limit, which it must not be here.
const BUSY: f64 = 0.5;

const SHARES: [Named; REPLICAS] = [
    ("work_share_0", "of work"),
    ("work_share_1", "of work"),
    ("work_share_2", "of work"),
    ("work_share_3", "of work"),
    ("work_share_4", "of work"),
    ("work_share_5", "of work"),
    ("work_share_6", "of work"),
    ("work_share_7", "of work"),
];
const P50: Named = ("p50_ms", "ms");
const P99: Named = ("p99_ms", "ms");
const TTFT_P50: Named = ("ttft_p50_ms", "ms");
const TTFT_P99: Named = ("ttft_p99_ms", "ms");
const GOODPUT: Named = ("goodput", "requests/s within the SLO");
const CACHED: Named = ("cached", "of prompt tokens");
const FAILED: Named = ("failed", "requests");
const CPU: Named = ("machine_busy", "of all cores");
const OWN_CPU: Named = ("bed_busy", "of all cores");
const VS_BEST: Named = ("p99_vs_best_peer", "ratio");
const VS_STEADY: Named = ("p99_vs_steady", "ratio");

/// One run of one subject.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Run {
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// To the first byte of the answer; of conversations, to the first token.
    pub(crate) ttft_p50_ms: f64,
    pub(crate) ttft_p99_ms: f64,
    /// Requests a second that were answered in time.
    pub(crate) goodput: f64,
    /// Requests that were due in the window, and how many of them failed; why the first one did.
    pub(crate) asked: usize,
    pub(crate) failed: usize,
    pub(crate) error: Option<String>,
    /// Share of the prompt tokens that were in a cache.
    pub(crate) cached: f64,
    /// Share of the work that each replica did.
    pub(crate) shares: [f64; REPLICAS],
    /// How busy the machine was.
    pub(crate) busy: Busy,
}

/// How busy the machine was, as shares of all cores.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Busy {
    /// With anything.
    pub(crate) machine: f64,
    /// With this bed: replicas, proxies and load.
    pub(crate) bed: f64,
}

impl Run {
    /// Of the requests that were due in the window that begins at `from` and lasts `window`. A request that failed counts as
    /// long as it took until then, and never as answered in time.
    pub(crate) fn of(
        case: &Case,
        outcomes: &[Outcome],
        from: Duration,
        window: Duration,
        states: (&[State], &[State]),
        busy: Busy,
    ) -> Self {
        let due: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.due >= from).collect();
        let sorted = |of: fn(&Outcome) -> Duration| {
            let mut times: Vec<f64> = due.iter().map(|outcome| of(outcome).as_secs_f64() * 1e3).collect();
            times.sort_by(f64::total_cmp);
            times
        };
        let (took, first) = (sorted(|outcome| outcome.took), sorted(|outcome| outcome.first));
        let in_time = |outcome: &&&Outcome| {
            let time = if case.is_chat() { outcome.first } else { outcome.took };
            outcome.error.is_none() && time <= case.slo
        };
        let done = |of: fn(&State) -> u64| -> Vec<f64> {
            states.1.iter().zip(states.0).map(|(after, before)| (of(after) - of(before)) as f64).collect()
        };
        let units = done(|state| state.units);
        let all: f64 = units.iter().sum();
        let mut shares = [0.0; REPLICAS];
        for (share, units) in shares.iter_mut().zip(&units) {
            *share = units / all.max(1.0);
        }
        let prompts: f64 = done(|state| state.prompt_tokens).iter().sum();
        let cached: f64 = done(|state| state.cached_tokens).iter().sum();
        Self {
            p50_ms: quantile(&took, 0.5),
            p99_ms: quantile(&took, 0.99),
            ttft_p50_ms: quantile(&first, 0.5),
            ttft_p99_ms: quantile(&first, 0.99),
            goodput: due.iter().filter(in_time).count() as f64 / window.as_secs_f64(),
            asked: due.len(),
            failed: due.iter().filter(|outcome| outcome.error.is_some()).count(),
            error: due.iter().find_map(|outcome| outcome.error.clone()),
            cached: cached / prompts.max(1.0),
            shares,
            busy,
        }
    }

    /// For the line that says that it is done.
    pub(crate) fn told(&self, case: &Case) -> String {
        let mut text = format!("  p50 {:>4.0} ms  p99 {:>5.0} ms", self.p50_ms, self.p99_ms);
        if case.is_chat() {
            let _ = write!(
                text,
                "  first token p99 {:>5.0} ms  cached {:>2.0} %",
                self.ttft_p99_ms,
                self.cached * 1e2
            );
        }
        let _ = write!(
            text,
            "  {:>4.0}/s in time  {} of {} failed  {:.0} % of the cores busy, {:.0} % with this bed",
            self.goodput,
            self.failed,
            self.asked,
            self.busy.machine * 1e2,
            self.busy.bed * 1e2
        );
        text
    }
}

/// Of sorted values.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
}

type Of = fn(&Run) -> f64;

/// The figure that decides a case.
fn main_figure(case: &Case) -> (Named, Of) {
    if case.is_chat() { (TTFT_P99, |run| run.ttft_p99_ms) } else { (P99, |run| run.p99_ms) }
}

fn figures(case: &Case) -> Vec<(Named, Of)> {
    let mut figures: Vec<(Named, Of)> = vec![(P50, |run| run.p50_ms), (P99, |run| run.p99_ms)];
    if case.is_chat() {
        figures.extend([
            (TTFT_P50, (|run| run.ttft_p50_ms) as Of),
            (TTFT_P99, |run| run.ttft_p99_ms),
            (CACHED, |run| run.cached),
        ]);
    }
    figures.extend([
        (GOODPUT, (|run| run.goodput) as Of),
        (FAILED, |run| run.failed as f64),
        (CPU, |run| run.busy.machine),
        (OWN_CPU, |run| run.busy.bed),
    ]);
    figures
}

/// The runs of each subject of a case, or why there are none.
pub(crate) type Round = BTreeMap<Subject, Result<Vec<Run>, String>>;

fn summary(round: &Round, subject: Subject, of: impl Fn(&Run) -> f64) -> Option<Summary> {
    Summary::of(round.get(&subject)?.as_ref().ok()?.iter().map(of).collect())
}

/// The rows of a case; `steady` are the runs of the case of that name, for the one that differs from it by a stall.
pub(crate) fn rows(case: &Case, round: &Round, steady: Option<&Round>) -> Vec<Row> {
    let (main, main_of) = main_figure(case);
    let mut rows = Vec::new();
    for (subject, runs) in round {
        let runs = match runs {
            Ok(runs) => runs,
            Err(error) => {
                let row = Row::failed(case.name, subject.name(), main, error.clone());
                rows.push(Row { baseline: Some(BASELINE.name()), ..row });
                continue;
            }
        };
        let note = note(runs);
        let row = |named: Named, figures: &Summary, ratio: Option<f64>| {
            let row = Row::measured(case.name, subject.name(), named, figures);
            Row {
                baseline: Some(BASELINE.name()),
                ratio: ratio.map(report::rounded),
                note: note.clone(),
                ..row
            }
        };
        for (named, of) in figures(case) {
            let Some(figures) = summary(round, *subject, of) else { continue };
            let baseline = summary(round, BASELINE, of).filter(|baseline| baseline.median > 0.0);
            rows.push(row(named, &figures, baseline.map(|baseline| figures.median / baseline.median)));
        }
        for (replica, named) in SHARES.into_iter().enumerate() {
            let figures = summary(round, *subject, |run| run.shares[replica]);
            rows.extend(figures.map(|figures| row(named, &figures, None)));
        }
        // Runs of the same turn were asked the same.
        let against = |others: &[Run]| {
            Summary::of(runs.iter().zip(others).map(|(run, other)| main_of(run) / main_of(other)).collect())
        };
        if subject.balance().is_some()
            && let Some((best, figures)) =
                best_peer(case, round).and_then(|(best, runs)| Some((best, against(runs)?)))
        {
            rows.push(Row { baseline: Some(best.name()), ..row(VS_BEST, &figures, None) });
        }
        let before = steady.and_then(|steady| steady.get(subject)?.as_ref().ok());
        if let Some(figures) = before.and_then(|before| against(before)) {
            rows.push(Row { baseline: None, ..row(VS_STEADY, &figures, None) });
        }
    }
    rows
}

/// The peer with the lowest main figure, and its runs.
fn best_peer<'a>(case: &Case, round: &'a Round) -> Option<(Subject, &'a [Run])> {
    let (_, of) = main_figure(case);
    let peers = round.iter().filter(|(subject, _)| subject.balance().is_none());
    let figures = peers.filter_map(|(subject, runs)| {
        let median = summary(round, *subject, of)?.median;
        Some((*subject, runs.as_ref().ok()?.as_slice(), median))
    });
    figures.min_by(|(.., a), (.., b)| a.total_cmp(b)).map(|(subject, runs, _)| (subject, runs))
}

/// What a reader must know of these runs before trusting them.
fn note(runs: &[Run]) -> Option<String> {
    let mut notes = Vec::new();
    let failed: usize = runs.iter().map(|run| run.failed).sum();
    if failed > 0 {
        let asked: usize = runs.iter().map(|run| run.asked).sum();
        let why = runs.iter().find_map(|run| run.error.as_deref()).unwrap_or("for an unknown reason");
        notes.push(format!("{failed} of {asked} requests failed: {why}"));
    }
    let busiest =
        runs.iter().map(|run| run.busy).max_by(|a, b| a.machine.total_cmp(&b.machine)).unwrap_or_default();
    if busiest.machine > BUSY {
        notes.push(format!(
            "the cores were up to {:.0} % busy, {:.0} % with this bed: CPU may have been what was waited for",
            busiest.machine * 1e2,
            busiest.bed * 1e2
        ));
    }
    (!notes.is_empty()).then(|| notes.join("; "))
}

/// The medians of a case, a line to each subject, and what the targets are about.
pub(crate) fn table(case: &Case, rows: &[Row]) -> String {
    let (main, _) = main_figure(case);
    let mut head = vec![case.name, "p50 ms", "p99 ms"];
    if case.is_chat() {
        head.extend(["TTFT p50", "TTFT p99", "cached %"]);
    }
    let (ratio, share) = (format!("/ {}", BASELINE.name()), "work of each replica, %");
    head.extend(["in time/s", "failed", "busy %", "own %", &ratio, "spread", share]);
    let mut lines = vec![head.into_iter().map(str::to_owned).collect::<Vec<String>>()];
    let mut notes = BTreeSet::new();

    let mut subjects: Vec<&str> = rows.iter().map(|row| row.subject.as_str()).collect();
    subjects.dedup();
    for subject in subjects {
        let of = |named: Named| rows.iter().find(|row| row.subject == subject && row.metric == named.0);
        let median = |named: Named| of(named).and_then(|row| row.median);
        let figure = |named: Named, factor: f64| {
            median(named).map_or("-".to_owned(), |median| format!("{:.0}", median * factor))
        };
        let any = rows.iter().find(|row| row.subject == subject);
        if let Some(why) = any.and_then(|row| row.error.as_deref().or(row.note.as_deref())) {
            notes.insert(format!("{subject}: {why}"));
        }
        let mut line = vec![subject.to_owned(), figure(P50, 1.0), figure(P99, 1.0)];
        if case.is_chat() {
            line.extend([figure(TTFT_P50, 1.0), figure(TTFT_P99, 1.0), figure(CACHED, 1e2)]);
        }
        line.extend([figure(GOODPUT, 1.0), figure(FAILED, 1.0), figure(CPU, 1e2), figure(OWN_CPU, 1e2)]);
        let ratio = of(main).and_then(|row| row.ratio);
        line.push(ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")));
        let spread = of(main).and_then(Row::spread);
        line.push(spread.map_or("-".to_owned(), |spread| format!("{:.0}%", spread * 1e2)));
        line.push(SHARES.map(|named| format!("{:>2}", figure(named, 1e2))).join(" "));
        lines.push(line);
    }
    let mut text = report::aligned(&lines);
    for row in rows.iter().filter(|row| row.metric == VS_BEST.0 || row.metric == VS_STEADY.0) {
        let against = row
            .baseline
            .map_or("its own without the stall".to_owned(), |best| format!("{best}, the best peer"));
        if let Some(median) = row.median {
            let _ = writeln!(text, "  {}: {} is {median:.2} of that of {against}", row.subject, main.0);
        }
    }
    for note in notes {
        let _ = writeln!(text, "  {note}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::case::CASES;

    fn outcome(due: u64, took: u64, error: Option<&str>) -> Outcome {
        let ms = Duration::from_millis;
        Outcome { due: ms(due), first: ms(took), took: ms(took), error: error.map(str::to_owned) }
    }

    fn run(p99_ms: f64) -> Run {
        Run { p99_ms, goodput: 10.0, ..Run::default() }
    }

    #[test]
    fn what_was_due_in_the_warm_up_does_not_count_and_a_failure_is_never_in_time() {
        let case = &CASES[0];
        let outcomes = [
            outcome(10, 5000, None),
            outcome(100, 20, None),
            outcome(200, 300, None),
            outcome(300, 1, Some("503")),
        ];
        let (mut before, mut after) = ([State::default(); REPLICAS], [State::default(); REPLICAS]);
        before[0].units = 100;
        after[0].units = 101;
        after[1].units = 3;
        let window = Duration::from_secs(2);
        let run =
            Run::of(case, &outcomes, Duration::from_millis(100), window, (&before, &after), Busy::default());
        assert_eq!((run.asked, run.failed, run.goodput), (3, 1, 0.5));
        assert_eq!((run.p50_ms, run.p99_ms), (20.0, 300.0));
        assert_eq!(run.shares[..2], [0.25, 0.75]);
        assert_eq!(run.error.as_deref(), Some("503"));
    }

    #[test]
    fn ours_is_compared_with_the_best_peer_and_a_stall_with_its_absence() {
        let case = &CASES[2];
        let round: Round = [
            (Subject::Penstock, Ok(vec![run(50.0), run(60.0), run(70.0)])),
            (Subject::Envoy, Ok(vec![run(200.0); 3])),
            (Subject::Haproxy, Ok(vec![run(100.0), run(90.0), run(110.0)])),
            (Subject::Nginx, Err("not installed".to_owned())),
        ]
        .into();
        let steady: Round = [(Subject::Penstock, Ok(vec![run(48.0); 3]))].into();
        let rows = rows(case, &round, Some(&steady));
        let of = |subject: &str, metric: &str| {
            rows.iter().find(|row| row.subject == subject && row.metric == metric).unwrap()
        };
        assert_eq!(of("penstock", "p99_ms").ratio, Some(0.3));
        let best = of("penstock", "p99_vs_best_peer");
        // 50 / 100, 60 / 90 and 70 / 110.
        assert_eq!((best.median, best.baseline), (Some(0.636364), Some("haproxy")));
        assert_eq!(of("penstock", "p99_vs_steady").median, Some(1.25));
        assert_eq!(of("nginx", "p99_ms").error.as_deref(), Some("not installed"));
        let table = table(case, &rows);
        assert!(
            table.contains("nginx: not installed") && table.contains("0.64 of that of haproxy"),
            "{table}"
        );
    }

    #[test]
    fn a_busy_machine_is_told() {
        let busy = Run { busy: Busy { machine: 0.7, bed: 0.2 }, ..run(1.0) };
        assert!(note(&[run(1.0), busy]).unwrap().contains("70 % busy, 20 % with this bed"));
        assert_eq!(note(&[run(1.0)]), None);
    }
}
