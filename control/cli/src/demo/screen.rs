//! What a person sees while the demo runs: one live table on a terminal, plain lines elsewhere.
//!
//! All of it goes to standard error; standard output is for the summary.

use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::load::{Counts, Recent, Tally, VERSIONS};
use crate::table::{Cell, Table, cells};
use crate::terminal::{Redraw, Terminal, Tone};
use crate::units;

/// Often enough to look alive, seldom enough to read.
const REDRAW: Duration = Duration::from_millis(250);
/// Without a terminal, how often a line says how it goes.
const REPORT: Duration = Duration::from_secs(2);
/// How many events stay on the screen below the table.
const EVENTS: usize = 7;

/// What the script has to say.
#[derive(Debug, Default)]
struct Board {
    phase: String,
    /// Version 2's share that the weights ask for.
    asked: f64,
    events: Vec<String>,
    load: Option<Counts>,
}

/// The screen.
#[derive(Debug)]
pub(crate) struct Screen {
    terminal: Terminal,
    /// Nothing is shown at all.
    silent: bool,
    start: Instant,
    board: Arc<Mutex<Board>>,
    painter: Option<JoinHandle<()>>,
}

impl Screen {
    /// A screen on standard error. `quiet`: nothing unless a person looks at it.
    pub(crate) fn new(terminal: Terminal, quiet: bool) -> Self {
        let silent = quiet && !terminal.live;
        let (start, board) = (Instant::now(), Arc::new(Mutex::new(Board::default())));
        let painter = (!silent).then(|| tokio::spawn(paint(terminal, start, board.clone())));
        Self { terminal, silent, start, board, painter }
    }

    /// Something happened.
    pub(crate) fn say(&self, what: &str) {
        let line = format!("{:>6.1} s  {what}", self.start.elapsed().as_secs_f64());
        if !self.terminal.live && !self.silent {
            write(&format!("{line}\n"));
        }
        lock(&self.board).events.push(line);
    }

    /// A phase begins, in which the weights ask for this share of version 2.
    pub(crate) fn phase(&self, name: &str, asked: f64) {
        let mut board = lock(&self.board);
        name.clone_into(&mut board.phase);
        board.asked = asked;
    }

    /// From now on there is load to show.
    pub(crate) fn load(&self, load: Counts) {
        lock(&self.board).load = Some(load);
    }

    /// Lets go of the terminal; the last frame stays, and what follows stands below it.
    pub(crate) fn end(&mut self) {
        // The painter gives way only while it sleeps, so the frame on the screen is whole.
        if let Some(painter) = self.painter.take() {
            painter.abort();
            write("\n");
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.end();
    }
}

async fn paint(terminal: Terminal, start: Instant, board: Arc<Mutex<Board>>) {
    let mut redraw = Redraw::default();
    loop {
        if terminal.live {
            write(&redraw.frame(terminal, &frame(&lock(&board), start.elapsed(), terminal)));
            sleep(REDRAW).await;
        } else {
            sleep(REPORT).await;
            if let Some(line) = report(&lock(&board), start.elapsed()) {
                write(&line);
            }
        }
    }
}

/// The live picture.
fn frame(board: &Board, elapsed: Duration, terminal: Terminal) -> String {
    let title = format!("Penstock demo, {:.0} s", elapsed.as_secs_f64());
    let mut text = format!("{}  {}\n", terminal.paint(Tone::Strong, &title), board.phase);
    if let Some(load) = &board.load {
        text.push('\n');
        text.push_str(
            &versions(&load.current(), &load.recent(), &load.total(), board.asked).render(terminal),
        );
    }
    text.push('\n');
    for event in &board.events[board.events.len().saturating_sub(EVENTS)..] {
        text.push_str(event);
        text.push('\n');
    }
    text
}

/// The table of versions: shares and accuracy of this phase, rates and latency of the last two seconds, failures
/// of the whole demo.
fn versions(current: &Tally, recent: &[Recent; 2], total: &Tally, asked: f64) -> Table {
    let mut table =
        Table::new(&["VERSION", ">ASKED", ">SEEN", ">RATE", ">P50", ">P99", ">ACCURACY", ">FAILED"]);
    let seen = current.share_v2();
    let shares = [(1.0 - asked, seen.map(|v2| 1.0 - v2)), (asked, seen)];
    let mut all = Recent::default();
    for (i, version) in VERSIONS.iter().enumerate() {
        let (asked, seen) = shares[i];
        all.rate += recent[i].rate;
        all.latency.merge(&recent[i].latency);
        table.row(cells![
            format!("digits-v{version}"),
            units::percent(asked),
            units::or_dash(seen, units::percent),
            units::per_second(recent[i].rate),
            latency(&recent[i], 0.5),
            latency(&recent[i], 0.99),
            units::or_dash(total.versions[i].accuracy(), units::percent),
            "",
        ]);
    }
    let tone = if total.failed == 0 { Tone::Good } else { Tone::Bad };
    table.row(cells![
        "all",
        "",
        "",
        units::per_second(all.rate),
        latency(&all, 0.5),
        latency(&all, 0.99),
        "",
        Cell::toned(tone, units::count(total.failed)),
    ]);
    table
}

/// How it goes, in one line; nothing before there is load.
fn report(board: &Board, elapsed: Duration) -> Option<String> {
    let load = board.load.as_ref()?;
    let (current, recent, total) = (load.current(), load.recent(), load.total());
    let mut all = Recent::default();
    for version in &recent {
        all.rate += version.rate;
        all.latency.merge(&version.latency);
    }
    Some(format!(
        "{:>6.1} s  {}: v2 asked {}, seen {}; {}, p50 {}, p99 {}, {} failed\n",
        elapsed.as_secs_f64(),
        board.phase,
        units::percent(board.asked),
        units::or_dash(current.share_v2(), units::percent),
        units::per_second(all.rate),
        latency(&all, 0.5),
        latency(&all, 0.99),
        units::count(total.failed)
    ))
}

fn latency(recent: &Recent, quantile: f64) -> String {
    units::or_dash(recent.latency.quantile(quantile), |d| units::milliseconds(d.as_secs_f64() * 1000.0))
}

fn lock(board: &Mutex<Board>) -> MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A screen that cannot be written to is no reason to end the demo.
fn write(text: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

#[cfg(test)]
mod tests {
    use super::super::load::VersionTally;
    use super::*;

    #[test]
    fn the_table_shows_asked_beside_seen() {
        let mut tally = Tally { requests: 1000, ..Tally::default() };
        tally.versions =
            [VersionTally { answers: 900, correct: 790 }, VersionTally { answers: 100, correct: 97 }];
        let mut recent =
            [Recent { rate: 1800.0, ..Recent::default() }, Recent { rate: 200.0, ..Recent::default() }];
        recent[0].latency.record(Duration::from_micros(900));
        assert_eq!(
            versions(&tally, &recent, &tally, 0.1).render(Terminal::PLAIN),
            "VERSION     ASKED    SEEN     RATE      P50      P99  ACCURACY  FAILED\n\
             digits-v1  90.0 %  90.0 %  1,800/s  0.96 ms  0.96 ms    87.8 %\n\
             digits-v2  10.0 %  10.0 %    200/s        –        –    97.0 %\n\
             all                        2,000/s  0.96 ms  0.96 ms                 0\n"
        );
    }

    #[test]
    fn only_the_last_events_stay() {
        let events = (0..20).map(|i| format!("event {i}.")).collect();
        let board = Board { phase: "starting".to_owned(), events, ..Board::default() };
        let frame = frame(&board, Duration::from_secs(3), Terminal::PLAIN);
        assert!(frame.starts_with("Penstock demo, 3 s  starting\n"), "{frame}");
        assert!(frame.contains("event 13.") && !frame.contains("event 12."), "{frame}");
    }
}
