//! `/canaries`: where each canary is, and on one machine the commands that a cluster has in its objects.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde_json::{Value, json};

use super::{ApiError, Facts};
use crate::canary::Command;
use crate::objects::{ObjectId, ObjectKind};

/// The canaries, as a list of objects.
pub(super) async fn page(State(facts): State<Facts>) -> Json<Value> {
    Json(json!({"items": *facts.canaries.borrow().clone(), "commands": facts.commands.is_some()}))
}

/// Takes a command for one of them.
pub(super) async fn command(
    State(facts): State<Facts>,
    Path((namespace, name, verb)): Path<(String, String, String)>,
) -> Result<Json<Value>, ApiError> {
    let Some(commands) = &facts.commands else {
        let error = "in a cluster the object takes commands, from whoever may change it: \
                     leave out --control, so that `penstock canary` goes to the cluster of the kubeconfig";
        return Err(ApiError(StatusCode::CONFLICT, error.to_owned()));
    };
    let known = facts.canaries.borrow().clone();
    let found = known
        .iter()
        .find(|one| one["metadata"]["namespace"] == *namespace && one["metadata"]["name"] == *name)
        .ok_or_else(|| {
            ApiError(
                StatusCode::NOT_FOUND,
                format!(
                    "there is no Canary {namespace}/{name}; `penstock canary list` shows those that there are"
                ),
            )
        })?;
    let run = found["run"].as_str().unwrap_or_default();
    // No two commands are the same, so that each is handled once.
    let said = format!("{run}/{:08x}", rand::random::<u32>());
    let change: fn(&mut Command, String) = match verb.as_str() {
        "promote" => |command, said| command.promote = Some(said),
        "abort" => |command, said| command.abort = Some(said),
        "pause" => |command, _| command.paused = Some(true),
        "resume" => |command, _| command.paused = Some(false),
        other => {
            let error = format!("{other:?} is no command; write promote, pause, resume or abort");
            return Err(ApiError(StatusCode::NOT_FOUND, error));
        }
    };
    let id = ObjectId { kind: ObjectKind::Canary, namespace, name };
    commands.change(&id, |command| change(command, said.clone()));
    Ok(Json(json!({"said": said})))
}
