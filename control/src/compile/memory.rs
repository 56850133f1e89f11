//! What was accepted, kept in a file, so that control may start while a file of the source is broken and still knows
//! the last good version of what is in it.
//!
//! The file is replaced as a whole, so a crash leaves the old one or the new one. One that cannot be read is as good
//! as none: control starts with what the source says.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Accepted, State, access};

/// The file.
#[derive(Deserialize)]
#[serde(untagged)]
enum Kept {
    /// As [`store`] writes it.
    Now { accepted: Vec<Accepted>, protected: access::Memory },
    /// As it was before Services that are gone were kept.
    Before(Vec<Accepted>),
}

#[derive(Serialize)]
struct Keeping<'a> {
    accepted: Vec<&'a Accepted>,
    protected: &'a access::Memory,
}

/// Reads what an earlier life of control accepted.
pub(super) fn load(file: &Path) -> State {
    let bytes = match fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return State::default(),
        Err(error) => return forget(file, &error),
    };
    match serde_json::from_slice::<Kept>(&bytes) {
        Ok(kept) => {
            let (accepted, protected) = match kept {
                Kept::Now { accepted, protected } => (accepted, protected),
                Kept::Before(accepted) => (accepted, access::Memory::new()),
            };
            let accepted = accepted.into_iter().map(|known| (known.current.id.clone(), known));
            State { accepted: accepted.collect(), protected }
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
    let keeping = Keeping { accepted: state.accepted.values().collect(), protected: &state.protected };
    let draft = file.with_extension("tmp");
    let write = || -> Result<()> {
        let mut out = fs::File::create(&draft)?;
        out.write_all(&serde_json::to_vec(&keeping)?)?;
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
