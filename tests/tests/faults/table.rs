//! The table of docs/RELIABILITY.md: what was seen, a row for each fault and kind of request.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use super::steady::Seen;

/// Where on the page the table is.
const BEGIN: &str = "<!-- faults: written by `make faults` -->\n";
const END: &str = "<!-- /faults -->\n";
const HEAD: &str = "| fault | request | sent | failed | longest | first answer | last failure | both again | memory |\n\
                    | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |\n";

/// The faults, in the order of the page, which explains each.
const FAULTS: [&str; 14] = [
    "loss of 5 %",
    "loss of 30 %",
    "delay of 100 ms",
    "reset",
    "blackhole",
    "sidecar starved",
    "files used up",
    "application stopped",
    "control killed",
    "control's disk full",
    "control's clock + 1 h",
    "control's clock - 1 h",
    "server's clock + 1 h",
    "server's clock - 1 h",
];

/// What was seen of one kind of request.
pub(crate) struct Row<'a> {
    /// Which of [`FAULTS`].
    pub(crate) fault: &'static str,
    /// GET or POST.
    pub(crate) method: &'static str,
    /// What became of them.
    pub(crate) seen: &'a Seen,
    /// How long after the end of the fault both servers answered again.
    pub(crate) back: Duration,
    /// What the client's sidecar has grown by, KiB.
    pub(crate) grown: u64,
}

/// Writes a row into the table, if that is wanted.
pub(crate) fn keep(row: &Row<'_>) {
    if std::env::var("UPDATE_DOCS").as_deref() != Ok("1") {
        return;
    }
    // Tests may run beside each other.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let text = std::fs::read_to_string(page()).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (table, after) = rest.split_once(END).unwrap();
    let mut rows = rows(table);
    rows.insert(place(row.fault, row.method).unwrap(), row.to_string());
    let rows: String = rows.into_values().map(|row| row + "\n").collect();
    let table = format!("{}\n\n{HEAD}{rows}", machine());
    std::fs::write(page(), format!("{before}{BEGIN}{table}{END}{after}")).unwrap();
}

impl std::fmt::Display for Row<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { fault, method, seen, back, grown } = self;
        let reasons: Vec<_> =
            seen.reasons.iter().map(|(reason, count)| format!("{count} `{reason}`")).collect();
        let failed = if reasons.is_empty() { "0".to_owned() } else { reasons.join(", ") };
        let or_none = |time: Option<Duration>| time.map_or("–".to_owned(), rounded);
        write!(
            f,
            "| {fault} | {method} | {} | {failed} | {} | {} | {} | {} | {} MiB |",
            seen.requests,
            rounded(seen.longest),
            or_none(seen.first_answer),
            or_none(seen.last_failure),
            rounded(*back),
            grown.div_ceil(1 << 10)
        )
    }
}

/// Two digits at most.
fn rounded(time: Duration) -> String {
    match time.as_millis() {
        millis @ 0..100 => format!("{millis} ms"),
        millis @ 100..1_000 => format!("{} ms", (millis + 5) / 10 * 10),
        _ => format!("{:.1} s", time.as_secs_f64()),
    }
}

/// When and on what it was measured.
fn machine() -> String {
    let date = humantime::format_rfc3339_seconds(SystemTime::now()).to_string();
    let cores = std::thread::available_parallelism().unwrap();
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    format!(
        "Measured on {} with a debug build, on {cores} cores ({}, Linux {}).",
        &date[..10],
        cpu.map_or("of an unknown kind", |(_, name)| name),
        kernel.trim().split('-').next().unwrap()
    )
}

fn page() -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "docs", "RELIABILITY.md"].iter().collect()
}

/// Where a row stands; `None`: nowhere any more.
fn place(fault: &str, method: &str) -> Option<(usize, String)> {
    Some((FAULTS.iter().position(|known| *known == fault)?, method.to_owned()))
}

/// The rows of a table by their places.
fn rows(table: &str) -> BTreeMap<(usize, String), String> {
    let each = table.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| ")?.split(" | ");
        Some((place(cells.next()?, cells.next()?)?, line.to_owned()))
    });
    each.collect()
}

#[test]
fn the_page_explains_every_fault_and_has_its_rows() {
    let text = std::fs::read_to_string(page()).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (_, section) = before.split_once("\n## When things break\n").unwrap();
    let bold = section.lines().filter_map(|line| line.strip_prefix("- **")?.split_once("**"));
    let explained: BTreeSet<_> = bold.map(|(fault, _)| fault).collect();
    assert_eq!(explained, FAULTS.into_iter().collect(), "what the page explains, and what there is");
    let rows = rows(rest.split_once(END).unwrap().0);
    for (fault, method) in FAULTS.iter().flat_map(|fault| [(fault, "GET"), (fault, "POST")]) {
        let row = rows.contains_key(&place(fault, method).unwrap());
        assert!(row, "{fault} has no row for {method}: `make faults`");
    }
}

#[test]
fn times_have_two_digits() {
    for (millis, told) in [(0, "0 ms"), (42, "42 ms"), (104, "100 ms"), (996, "1000 ms"), (1_049, "1.0 s")] {
        assert_eq!(rounded(Duration::from_millis(millis)), told);
    }
}
