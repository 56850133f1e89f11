//! The proxy's own log on standard error, and how its level is changed while it runs.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

/// The level in force.
#[derive(Debug)]
pub struct Level {
    filter: reload::Handle<EnvFilter, Registry>,
    text: Mutex<String>,
}

/// Why a level is not taken.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    /// It cannot be read.
    #[error(
        "{text:?} is no log level: {error}; write error, warn, info, debug or trace, or info,penstock_proxy::xds=debug"
    )]
    Unknown {
        /// As given.
        text: String,
        /// Why.
        error: String,
    },
    /// A log is already installed in this process.
    #[error("the log cannot be started: {0}")]
    Taken(String),
}

impl Level {
    /// Starts the log on standard error: text on a terminal, otherwise a JSON object a line.
    pub fn install(text: &str) -> Result<Self, LevelError> {
        let (level, filter) = Self::prepare(text)?;
        let terminal = std::io::stderr().is_terminal();
        let lines = if terminal {
            fmt::layer().with_writer(std::io::stderr).boxed()
        } else {
            fmt::layer().json().flatten_event(true).with_writer(std::io::stderr).boxed()
        };
        let log = tracing_subscriber::registry().with(filter).with(lines);
        log.try_init().map_err(|error| LevelError::Taken(error.to_string()))?;
        Ok(level)
    }

    /// The level, and the filter that obeys it.
    pub(crate) fn prepare(text: &str) -> Result<(Self, reload::Layer<EnvFilter, Registry>), LevelError> {
        let (layer, filter) = reload::Layer::new(parse(text)?);
        Ok((Self { filter, text: Mutex::new(text.to_owned()) }, layer))
    }

    /// What it is now.
    pub fn get(&self) -> String {
        self.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes it.
    pub fn set(&self, text: &str) -> Result<(), LevelError> {
        let filter = parse(text)?;
        self.filter.reload(filter).map_err(|error| LevelError::Taken(error.to_string()))?;
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = text.to_owned();
        tracing::info!(level = text, "log level changed");
        Ok(())
    }
}

fn parse(text: &str) -> Result<EnvFilter, LevelError> {
    let unknown = |error: String| LevelError::Unknown { text: text.to_owned(), error };
    // A bare word that is no level would be read as the name of a module, and silence everything else.
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    if !text.contains('=') && !levels.contains(&text.to_ascii_lowercase().as_str()) {
        return Err(unknown("there is no such level".into()));
    }
    EnvFilter::builder().parse(text).map_err(|error| unknown(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_changes_while_the_log_runs_and_nonsense_changes_nothing() {
        let (level, filter) = Level::prepare("info").unwrap();
        let _log = tracing_subscriber::registry().with(filter).set_default();
        level.set("warn,penstock_proxy::xds=debug").unwrap();
        assert_eq!(level.get(), "warn,penstock_proxy::xds=debug");
        for bad in ["", "loud", "a=b=c"] {
            assert!(level.set(bad).is_err(), "{bad:?}");
        }
        assert_eq!(level.get(), "warn,penstock_proxy::xds=debug");
    }
}
