//! Rows as every bed writes them (DESIGN: `case`, `subject`, `metric`, `unit`, `median`, `min`, `max`, `runs`, `baseline`, `ratio`,
//! or `error`), and the same as a table.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

/// The rounds of one figure.
pub(crate) struct Summary {
    pub(crate) median: f64,
    min: f64,
    max: f64,
    runs: usize,
}

impl Summary {
    /// `None` without rounds.
    pub(crate) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let runs = values.len();
        let median = (values[(runs - 1) / 2] + values[runs / 2]) / 2.0;
        Some(Self { median, min, max, runs })
    }
}

/// One row. Figures and `error` exclude each other.
#[derive(Serialize)]
pub(crate) struct Row {
    case: String,
    subject: String,
    metric: &'static str,
    unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    median: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max: Option<f64>,
    runs: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    baseline: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Row {
    pub(crate) fn measured(
        case: &str,
        subject: &str,
        (metric, unit): (&'static str, &'static str),
        figures: &Summary,
    ) -> Self {
        Self {
            case: case.to_owned(),
            subject: subject.to_owned(),
            metric,
            unit,
            median: Some(rounded(figures.median)),
            min: Some(rounded(figures.min)),
            max: Some(rounded(figures.max)),
            runs: figures.runs,
            baseline: None,
            ratio: None,
            note: None,
            error: None,
        }
    }

    pub(crate) fn failed(
        case: &str,
        subject: &str,
        metric: (&'static str, &'static str),
        error: &str,
    ) -> Self {
        let nothing = Summary { median: 0.0, min: 0.0, max: 0.0, runs: 0 };
        let row = Self::measured(case, subject, metric, &nothing);
        Self { median: None, min: None, max: None, error: Some(error.to_owned()), ..row }
    }

    /// With its ratio to the median of another subject of the same run.
    pub(crate) fn against(self, baseline: &str, median: Option<f64>) -> Self {
        let ratio = median.zip(self.median).map(|(base, own)| rounded(own / base));
        Self { ratio, ..self.named(baseline) }
    }

    /// With the subject it is against, where the figure is a ratio already.
    pub(crate) fn named(self, baseline: &str) -> Self {
        Self { baseline: Some(baseline.to_owned()), ..self }
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

/// The rows of a case.
pub(crate) fn table(case: &str, rows: &[Row]) -> String {
    let mut text = format!("{case:<18} {:<22} {:>10} {:>10} {:>10}  ratio\n", "", "median", "min", "max");
    for row in rows {
        let figure = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.4}"));
        let ratio = row.ratio.zip(row.baseline.as_deref());
        let ratio = ratio.map_or(String::new(), |(ratio, base)| format!("{ratio:.3} of {base}"));
        let more = row.error.as_deref().or(row.note.as_deref()).unwrap_or_default();
        let (median, min, max) = (figure(row.median), figure(row.min), figure(row.max));
        let _ = writeln!(
            text,
            "{:<18} {:<22} {median:>10} {min:>10} {max:>10}  {ratio}  {more}",
            row.subject, row.metric
        );
    }
    text
}

/// To six digits: more would only look exact.
fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_figures_or_an_error() {
        let figures = Summary::of(vec![3.0, 1.0, 2.0, 4.0]).unwrap();
        let row = Row::measured("c", "s", ("cpu_ms", "ms"), &figures).against("pillow", Some(5.0));
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!((&json["median"], &json["ratio"], &json["runs"]), (&2.5.into(), &0.5.into(), &4.into()));
        let json = serde_json::to_value(Row::failed("c", "s", ("cpu_ms", "ms"), "not there")).unwrap();
        assert_eq!(json["error"], "not there");
        assert!(json.get("median").is_none());
        assert!(Summary::of(Vec::new()).is_none());
    }
}
