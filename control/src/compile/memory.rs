//! What was accepted, kept in a file, so that control may start while a file of the source is broken and still knows
//! the last good version of what is in it.
//!
//! The file is replaced as a whole, so a crash leaves the old one or the new one. One that cannot be read is as good
//! as none: control starts with what the source says.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use super::State;

/// Reads what an earlier life of control accepted.
pub(super) fn load(file: &Path) -> State {
    let bytes = match fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return State::default(),
        Err(error) => return forget(file, &error),
    };
    match serde_json::from_slice::<Vec<super::Accepted>>(&bytes) {
        Ok(accepted) => {
            let accepted = accepted.into_iter().map(|known| (known.current.id.clone(), known));
            State { accepted: accepted.collect() }
        }
        Err(error) => forget(file, &error),
    }
}

fn forget(file: &Path, error: &dyn std::error::Error) -> State {
    tracing::warn!(
        file = %file.display(),
        "the last good versions of an earlier run cannot be read: {error}; going on with what the source has"
    );
    State::default()
}

/// Replaces the file.
pub(super) fn store(state: &State, file: &Path) -> Result<()> {
    let accepted: Vec<_> = state.accepted.values().collect();
    let draft = file.with_extension("tmp");
    let write = || -> Result<()> {
        let mut out = fs::File::create(&draft)?;
        out.write_all(&serde_json::to_vec(&accepted)?)?;
        out.sync_all()?;
        fs::rename(&draft, file)?;
        Ok(())
    };
    write().with_context(|| {
        format!(
            "cannot keep the last good versions in {}; after a restart they would be unknown",
            file.display()
        )
    })
}
