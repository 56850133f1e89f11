//! Where results go: standard output, as a table, JSON or YAML.

use std::io::Write;

use serde::Serialize;

use crate::failure::Failure;
use crate::terminal::Terminal;

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs; streams print one object a line.
    Json,
    /// For people who read objects; streams print one document each.
    Yaml,
}

/// Standard output and the format asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// The format asked for.
    pub(crate) format: Format,
    /// What standard output can show.
    pub(crate) terminal: Terminal,
}

impl Output {
    /// Prints a page: the value itself for programs, what `table` makes of it for people.
    pub(crate) fn page<T: Serialize>(
        &self,
        value: &T,
        table: impl FnOnce(&T, Terminal) -> String,
    ) -> Result<(), Failure> {
        match self.format {
            Format::Table => self.text(&table(value, self.terminal)),
            Format::Json => {
                self.text(&format!("{}\n", serde_json::to_string_pretty(value).map_err(unprintable)?))
            }
            Format::Yaml => self.text(&yaml(value)?),
        }
    }

    /// Prints one object of a stream for programs.
    pub(crate) fn object<T: Serialize>(&self, value: &T) -> Result<(), Failure> {
        match self.format {
            Format::Yaml => self.text(&format!("---\n{}", yaml(value)?)),
            Format::Table | Format::Json => {
                self.text(&format!("{}\n", serde_json::to_string(value).map_err(unprintable)?))
            }
        }
    }

    /// Prints text as it is.
    pub(crate) fn text(&self, text: &str) -> Result<(), Failure> {
        let mut stdout = std::io::stdout().lock();
        let printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        printed.map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe => Failure::ReaderGone,
            _ => Failure::Problem(format!("standard output takes no more: {error}")),
        })
    }
}

fn yaml<T: Serialize>(value: &T) -> Result<String, Failure> {
    let mut text = serde_saphyr::to_string(value).map_err(unprintable)?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

fn unprintable(error: impl std::fmt::Display) -> Failure {
    Failure::Problem(format!("the result cannot be written in this format: {error}"))
}
