//! Rows, as every bed writes them to `target/bench/<bed>.json`, and the same as tables.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::case::{Case, Metric, Target};
use crate::load::Measured;
use crate::subject::Subject;

/// The runs of one figure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) runs: usize,
}

impl Summary {
    /// `None` without runs.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let runs = values.len();
        let median = (values[(runs - 1) / 2] + values[runs / 2]) / 2.0;
        Some(Self { median, min, max, runs })
    }

    /// (max - min) / median.
    pub(crate) fn spread(&self) -> f64 {
        if self.median == 0.0 { 0.0 } else { (self.max - self.min) / self.median.abs() }
    }
}

/// One row. Figures and `error` exclude each other.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) case: String,
    pub(crate) subject: String,
    pub(crate) metric: &'static str,
    pub(crate) unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) median: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max: Option<f64>,
    pub(crate) runs: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) baseline: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio: Option<f64>,
    /// What we want of it, where it is ours.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) target: Option<Target>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// A metric's name and unit, as rows carry them.
pub(crate) type Named = (&'static str, &'static str);

impl Row {
    fn blank(case: &str, subject: &str, (metric, unit): Named) -> Self {
        Self {
            case: case.to_owned(),
            subject: subject.to_owned(),
            metric,
            unit,
            median: None,
            min: None,
            max: None,
            runs: 0,
            baseline: None,
            ratio: None,
            target: None,
            note: None,
            error: None,
        }
    }

    /// A row with figures.
    pub(crate) fn measured(case: &str, subject: &str, metric: Named, figures: &Summary) -> Self {
        Self {
            median: Some(rounded(figures.median)),
            min: Some(rounded(figures.min)),
            max: Some(rounded(figures.max)),
            runs: figures.runs,
            ..Self::blank(case, subject, metric)
        }
    }

    /// A row that says why there are no figures.
    pub(crate) fn failed(case: &str, subject: &str, metric: Named, error: String) -> Self {
        Self { error: Some(error), ..Self::blank(case, subject, metric) }
    }

    /// (max - min) / median, if there is more than one run.
    pub(crate) fn spread(&self) -> Option<f64> {
        let median = self.median.filter(|median| *median != 0.0 && self.runs > 1)?;
        Some((self.max? - self.min?) / median.abs())
    }
}

/// Writes rows, one a line, so that two files can be compared by eye.
pub(crate) fn write(path: &Path, rows: &[Row]) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("{}", parent.display()))?;
    }
    let lines: Vec<String> = rows.iter().map(serde_json::to_string).collect::<Result<_, _>>()?;
    fs::write(path, format!("[\n{}\n]\n", lines.join(",\n"))).with_context(|| format!("{}", path.display()))
}

/// The medians of a case, a line to each subject; ratio and spread are of the main figure.
pub(crate) fn table(case: &Case, rows: &[Row]) -> String {
    let metrics = [&case.metrics(), case.counts()].concat();
    let mut head = vec![case.name.to_owned()];
    head.extend(metrics.iter().map(|metric| heading(*metric).to_owned()));
    head.extend([format!("/ {}", case.baseline().name()), "spread".to_owned()]);
    let mut lines = vec![head];
    let mut notes = Vec::new();

    let mut subjects: Vec<&str> = rows.iter().map(|row| row.subject.as_str()).collect();
    subjects.dedup();
    for subject in subjects {
        let of =
            |metric: Metric| rows.iter().find(|row| row.subject == subject && row.metric == metric.name());
        for row in rows.iter().filter(|row| row.subject == subject) {
            let told = row.error.as_deref().or(row.note.as_deref()).map(|why| format!("{subject}: {why}"));
            notes.extend(told.filter(|told| !notes.contains(told)));
            notes.extend(row.target.map(|target| wanted(row, target)));
        }
        let main = of(case.main).or_else(|| of(case.main_of(Subject::Direct)));
        let mut line = vec![subject.to_owned()];
        line.extend(metrics.iter().map(|metric| {
            of(*metric).and_then(|row| row.median).map_or("-".to_owned(), |median| figure(*metric, median))
        }));
        let ratio = of(case.main).and_then(|row| row.ratio);
        line.push(ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")));
        let spread = main.and_then(Row::spread);
        line.push(spread.map_or("-".to_owned(), |spread| format!("{:.0}%", spread * 100.0)));
        lines.push(line);
    }
    let mut text = aligned(&lines);
    for note in notes {
        let _ = writeln!(text, "  {note}");
    }
    text
}

/// First column to the left, figures to the right.
pub(crate) fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| lines.iter().filter_map(|line| line.get(column)).map(String::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
            let _ =
                if column == 0 { write!(text, "{cell:<width$}") } else { write!(text, "  {cell:>width$}") };
        }
        text.push('\n');
    }
    text
}

/// What is wanted of a row, and whether it is so.
fn wanted(row: &Row, target: Target) -> String {
    let (what, most, is) = match target {
        Target::Median(most) => (format!("{} in {}", row.metric, row.unit), most, row.median),
        Target::Ratio(most) => {
            (format!("{} / {}", row.metric, row.baseline.unwrap_or_default()), most, row.ratio)
        }
    };
    let is = is.map_or("not known".to_owned(), |is| format!("{is:.2}"));
    let met = match target.met(row) {
        Some(true) => ", met",
        Some(false) => ", not met",
        None => ", not decided",
    };
    format!("{}: {what} is to be at most {most}: {is}{met}", row.subject)
}

/// The figures of one run, for the line that says that it is done.
pub(crate) fn progress(case: &Case, run: &Measured, direct: bool) -> String {
    let metrics = case.metrics().into_iter().filter(|metric| !(direct && metric.of_proxy()));
    // What is added to a direct connection is known when all runs are done.
    let left_out = |metric: &Metric| matches!(metric, Metric::P999 | Metric::RssPeak | Metric::GapP99);
    let told = metrics.filter(|metric| !left_out(metric));
    told.map(|metric| format!("  {} {}", figure(metric, metric.of(run)), heading(metric))).collect()
}

/// To six digits: more would only look exact.
pub(crate) fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

fn heading(metric: Metric) -> &'static str {
    match metric {
        Metric::Rps => "rps",
        Metric::P50 => "p50 us",
        Metric::P99 => "p99 us",
        Metric::P999 => "p99.9 us",
        Metric::CpuPer1k => "CPU ms/1k",
        Metric::MachinePer1k => "machine ms/1k",
        Metric::MbPerS => "MB/s",
        Metric::CpuPerGb => "CPU s/GB",
        Metric::Rss => "RSS MiB",
        Metric::RssPeak => "peak MiB",
        Metric::Ready => "ready ms",
        Metric::KibPerConn => "KiB/conn",
        Metric::GapP99 => "gap p99 us",
        Metric::GapWholeP99 => "whole gap us",
        Metric::Syscalls => "syscalls",
        Metric::Allocations => "allocations",
    }
}

fn figure(metric: Metric, value: f64) -> String {
    match metric {
        Metric::Rps
        | Metric::P50
        | Metric::P99
        | Metric::P999
        | Metric::MbPerS
        | Metric::GapP99
        | Metric::GapWholeP99 => {
            format!("{value:.0}")
        }
        Metric::CpuPer1k | Metric::MachinePer1k => format!("{:.1}", value * 1e3),
        Metric::CpuPerGb => format!("{value:.2}"),
        Metric::Rss | Metric::RssPeak | Metric::Ready | Metric::KibPerConn => format!("{value:.1}"),
        Metric::Syscalls | Metric::Allocations => format!("{value:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_of_an_even_count_lies_between() {
        let of = |values: &[f64]| Summary::of(values.to_vec());
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[3.0, 1.0, 2.0]).unwrap().median, 2.0);
        assert_eq!(of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(of(&[2.0, 1.0, 4.0]).unwrap().spread(), 1.5);
    }

    #[test]
    fn a_failed_row_has_a_reason_and_no_figures() {
        let row = Row::failed("h1-small", "nginx", ("rps", "requests/s"), "not installed".to_owned());
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["error"], "not installed");
        assert!(json.get("median").is_none() && json.get("ratio").is_none());
    }

    #[test]
    fn what_is_wanted_is_told_beside_what_is() {
        let row = |median, ratio| Row {
            median: Some(median),
            min: Some(median),
            max: Some(median),
            ratio,
            baseline: Some("envoy"),
            ..Row::blank("h1-small", "penstock", ("cpu_s_per_1k", "s/1000 requests"))
        };
        let told = wanted(&row(0.01, Some(0.40)), Target::Ratio(0.37));
        assert_eq!(told, "penstock: cpu_s_per_1k / envoy is to be at most 0.37: 0.40, not met");
        let told = wanted(&row(0.01, None), Target::Ratio(0.37));
        assert!(told.ends_with("at most 0.37: not known, not decided"), "{told}");
        let told = wanted(&row(5.0, None), Target::Median(6.0));
        assert!(told.contains("in s/1000 requests") && told.ends_with("at most 6: 5.00, met"), "{told}");
    }

    #[test]
    fn a_figure_below_nothing_spreads_as_far_as_one_above() {
        let summary = Summary::of(vec![-4.0, -2.0, -1.0]).unwrap();
        assert_eq!(summary.spread(), 1.5);
    }

    #[test]
    fn figures_keep_six_digits() {
        assert_eq!((rounded(45254.264080141234), rounded(0.020712145249427112)), (45254.3, 0.0207121));
        assert_eq!((rounded(0.0), rounded(280.0)), (0.0, 280.0));
    }

    #[test]
    fn columns_line_up() {
        let lines = [vec!["a".to_owned(), "100".to_owned()], vec!["bcd".to_owned(), "5".to_owned()]];
        assert_eq!(aligned(&lines), "a    100\nbcd    5\n");
    }
}
