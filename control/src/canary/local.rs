//! Diaries on one machine: in a file of the state directory, and joined to the objects that the directory has.
//!
//! The file is written before anybody acts on what it says, so that control that was killed goes on from where it was.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_api::v1::SeenReply;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::desk::{Command, Commands};
use super::task::Home;
use super::{Diary, Entry};
use crate::conditions::Reach;
use crate::fleet::Tally;
use crate::objects::{Object, ObjectId, ObjectSet};

/// What the file has of one Canary.
#[derive(Debug, Serialize, Deserialize)]
struct Row {
    id: ObjectId,
    diary: Diary,
    #[serde(default)]
    command: Command,
}

type Diaries = BTreeMap<ObjectId, Diary>;

/// One machine's diaries.
#[derive(Clone, Debug)]
pub struct Local {
    file: PathBuf,
    commands: Commands,
    diaries: watch::Sender<Diaries>,
}

impl Local {
    /// Reads the file, if there is one. Answers the objects of `source` with where their requests go.
    pub fn open(
        file: PathBuf,
        source: watch::Receiver<Arc<ObjectSet>>,
    ) -> Result<(Self, watch::Receiver<Arc<ObjectSet>>)> {
        let (diaries, commands) = (read(&file)?, Commands::default());
        let mut known = Diaries::new();
        for row in diaries {
            commands.change(&row.id, |command| *command = row.command);
            known.insert(row.id, row.diary);
        }
        let (diaries, told) = watch::channel(known);
        Ok((Self { file, commands, diaries }, joined(source, told)))
    }

    /// Takes commands.
    pub fn commands(&self) -> Commands {
        self.commands.clone()
    }
}

fn read(file: &Path) -> Result<Vec<Row>> {
    let text = match std::fs::read(file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("reading {}", file.display())),
    };
    serde_json::from_slice(&text).with_context(|| {
        format!(
            "{} says where canaries are, and cannot be read; restore it, or remove it to begin them anew",
            file.display()
        )
    })
}

/// The objects with where their requests go, whenever either changes.
fn joined(
    mut source: watch::Receiver<Arc<ObjectSet>>,
    mut diaries: watch::Receiver<Diaries>,
) -> watch::Receiver<Arc<ObjectSet>> {
    let first = join(&source.borrow_and_update(), &diaries.borrow_and_update());
    let (sender, receiver) = watch::channel(first);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => return,
                changed = source.changed() => if changed.is_err() { return },
                // Diaries that can no longer change are still where requests go.
                Ok(()) = diaries.changed() => {}
            }
            let next = join(&source.borrow_and_update(), &diaries.borrow_and_update());
            sender.send_if_modified(|known| {
                let modified = *known != next;
                if modified {
                    *known = next;
                }
                modified
            });
        }
    });
    receiver
}

fn join(objects: &Arc<ObjectSet>, diaries: &Diaries) -> Arc<ObjectSet> {
    let courses = diaries.iter().filter_map(|(id, diary)| Some((id.clone(), diary.course.clone()?)));
    Arc::new(ObjectSet { courses: courses.collect(), ..(**objects).clone() })
}

impl Home for Local {
    fn leads(&self) -> bool {
        true
    }

    fn diary(&self, id: &ObjectId) -> Option<Diary> {
        Some(self.diaries.borrow().get(id).cloned().unwrap_or_default())
    }

    async fn only(&mut self, keep: &(dyn Fn(&ObjectId) -> bool + Sync)) -> Result<()> {
        let mut all = self.diaries.borrow().clone();
        let known = all.len();
        all.retain(|id, _| keep(id));
        self.commands.only(keep);
        if all.len() < known { self.keep(all).await } else { Ok(()) }
    }

    fn command(&self, object: &Object) -> Command {
        self.commands.of(&object.id)
    }

    async fn reach(&mut self) {}

    fn joined(&self, _id: &ObjectId, own: Tally, _version: &str) -> Reach {
        Reach { tally: own, unheard: 0 }
    }

    async fn seen(&self, _service: &str, _windows: &[Duration]) -> Vec<SeenReply> {
        Vec::new()
    }

    async fn write(&mut self, id: &ObjectId, diary: &Diary) -> Result<bool> {
        let mut all = self.diaries.borrow().clone();
        all.insert(id.clone(), diary.clone());
        self.keep(all).await?;
        Ok(true)
    }

    fn tell(&self, _object: &Object, _entry: &Entry) {}
}

impl Local {
    /// Writes all of them down; then they are in force.
    async fn keep(&self, all: Diaries) -> Result<()> {
        let row = |(id, diary): (&ObjectId, &Diary)| Row {
            id: id.clone(),
            diary: diary.clone(),
            command: self.commands.of(id),
        };
        let text = serde_json::to_vec_pretty(&all.iter().map(row).collect::<Vec<_>>())?;
        let file = self.file.clone();
        tokio::task::spawn_blocking(move || write(&file, &text)).await??;
        self.diaries.send_replace(all);
        Ok(())
    }
}

/// Beside its place first, so that whoever reads it sees the one or the other.
fn write(file: &Path, text: &[u8]) -> Result<()> {
    let draft = file.with_extension("json.new");
    std::fs::write(&draft, text).with_context(|| format!("writing {}", draft.display()))?;
    std::fs::rename(&draft, file).with_context(|| format!("writing {}", file.display()))
}
