//! `penstock rotate-root`: asks control for another root, and tells how far it is.
//!
//! In: the Secret `penstock-ca`, as whoever sits at the keyboard may read it. Out: one annotation on it, and a line for each step. Everything
//! else is done by control, so ending this command ends no rotation, and running it again follows the one that is under way.

use std::time::Duration;

use penstock_control::cluster::{ASK, REPLICA_PREFIX, ROOT_SECRET, ROTATION};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::cluster::{Answer, Cluster, text};
use crate::failure::{Failure, exit};
use crate::install::NAMESPACE;
use crate::interruption::Interruption;
use crate::output::Output;

/// How often the Secret is looked at.
const EVERY: Duration = Duration::from_secs(1);
/// Control looks every 2 s, and a Lease whose holder died takes 15 s to go over.
const TAKEN_UP: Duration = Duration::from_secs(60);

/// The arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The context of the kubeconfig; its current one unless said
    #[arg(long, value_name = "NAME")]
    context: Option<String>,
    /// Ask for it and end
    #[arg(long)]
    no_wait: bool,
}

/// How far a rotation is.
#[derive(Clone, Debug, PartialEq)]
enum Stage {
    /// There is none.
    Steady,
    /// Nobody has begun yet.
    Asked,
    /// Both roots are pushed; so many proxies know both, of so many.
    Announced(u64, u64),
    /// Everything is signed by the new one.
    Switched,
}

fn annotation<'a>(secret: &'a Value, key: &str) -> Option<&'a str> {
    secret["metadata"]["annotations"][key].as_str()
}

fn stage(secret: &Value) -> Stage {
    let phase = annotation(secret, ROTATION).and_then(|noted| serde_json::from_str::<Value>(noted).ok());
    match phase.as_ref().map(|noted| text(noted, "/phase")) {
        Some("switched") => Stage::Switched,
        Some(_) => {
            let all = secret["metadata"]["annotations"].as_object().into_iter().flatten();
            let said = all
                .filter(|(key, _)| key.starts_with(REPLICA_PREFIX))
                .filter_map(|(_, said)| serde_json::from_str::<Value>(said.as_str()?).ok());
            said.fold(Stage::Announced(0, 0), |sum, said| {
                let of = |key: &str| said[key].as_u64().unwrap_or_default();
                match sum {
                    Stage::Announced(known, all) => {
                        Stage::Announced(known + of("acknowledged"), all + of("connected"))
                    }
                    other => other,
                }
            })
        }
        None if annotation(secret, ASK).is_some() => Stage::Asked,
        None => Stage::Steady,
    }
}

fn told(stage: &Stage) -> Option<String> {
    match stage {
        Stage::Steady => None,
        Stage::Asked => Some("Asked for; the replica that holds the Lease makes it.".to_owned()),
        Stage::Announced(known, all) => {
            Some(format!("Both roots are announced; {known} of {all} connected proxies have both."))
        }
        Stage::Switched => Some(
            "The new root signs. The old one is forgotten when its last certificate has expired.".to_owned(),
        ),
    }
}

fn path() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/secrets/{ROOT_SECRET}")
}

fn found(answer: Answer) -> Result<Value, Failure> {
    let of = format!("Secret {NAMESPACE}/{ROOT_SECRET}");
    Err(Failure::Problem(match answer {
        Answer::Found(secret) => return Ok(secret),
        Answer::Absent => format!(
            "{of} is not there: control makes it when it starts; `penstock check` tells why it has not"
        ),
        Answer::Denied(why) => format!("{of}: {why}. Whoever rotates the root needs `get` and `patch` on it"),
        Answer::Failed(why) => format!("{of}: {why}"),
    }))
}

/// Whether control can make another root in the place of this one.
fn can_rotate(secret: &Value) -> Result<(), Failure> {
    if secret["metadata"]["labels"]["penstock.io/made-by"] == "control" {
        return Ok(());
    }
    Err(Failure::Problem(format!(
        "Secret {NAMESPACE}/{ROOT_SECRET} was not made by control, so whoever made it rotates it (of cert-manager: the Certificate of the \
         issuer). Control announces the new root by itself, and trusts the old one until its last certificate has expired"
    )))
}

/// Runs it: steps to standard error, the end to standard output.
pub(crate) async fn run(args: &Args, output: Output) -> Result<u8, Failure> {
    let mut interruption = Interruption::listen()?;
    let cluster = Cluster::open(args.context.as_deref()).await.map_err(Failure::Problem)?;
    let before = found(cluster.get(&path()).await)?;
    can_rotate(&before)?;
    if stage(&before) == Stage::Steady {
        let ask = json!({"metadata": {"annotations": {ASK: "now"}}});
        found(cluster.merge(&path(), &ask).await)?;
    } else {
        eprintln!("A rotation is under way already.");
    }
    if args.no_wait {
        output.text("Control does the rest; run this again to follow it.\n")?;
        return Ok(exit::FINE);
    }
    let (began, mut last, mut trouble) = (Instant::now(), Stage::Steady, false);
    loop {
        match found(cluster.get(&path()).await) {
            Ok(secret) => {
                trouble = false;
                let now = stage(&secret);
                if now != last {
                    told(&now).iter().for_each(|line| eprintln!("{line}"));
                }
                match now {
                    Stage::Steady if secret["data"]["ca.crt"] != before["data"]["ca.crt"] => break,
                    Stage::Steady => {
                        return Err(Failure::Problem(
                            "the rotation was given up: somebody has taken its annotations or the new root from the Secret".to_owned(),
                        ));
                    }
                    Stage::Asked if began.elapsed() > TAKEN_UP => {
                        return Err(Failure::Problem(
                            "no replica takes it up: `penstock check` tells who holds the Lease, if anybody does".to_owned(),
                        ));
                    }
                    _ => last = now,
                }
            }
            // It goes on without us; an API server comes back.
            Err(failure) if !trouble => {
                trouble = true;
                eprintln!("{failure}; asking again");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = interruption.comes() => {
                eprintln!("The rotation goes on without this command; run it again to follow it.");
                return Err(Failure::Interrupted);
            }
            () = tokio::time::sleep(EVERY) => {}
        }
    }
    output.text("The root is another one, and the old one is trusted by nobody any more.\n")?;
    Ok(exit::FINE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(annotations: Value) -> Value {
        json!({"metadata": {"annotations": annotations}})
    }

    #[test]
    fn the_stage_is_what_the_annotations_say() {
        let said = |known: u64, all: u64| json!({"acknowledged": known, "connected": all}).to_string();
        let announced = json!({"phase": "announced"}).to_string();
        let switched = json!({"phase": "switched", "old_leaves_until": 7}).to_string();
        let (a, b) = (format!("{REPLICA_PREFIX}a"), format!("{REPLICA_PREFIX}b"));
        let table = [
            (json!({}), Stage::Steady),
            (json!({ASK: "now"}), Stage::Asked),
            (json!({ROTATION: announced}), Stage::Announced(0, 0)),
            (
                json!({ROTATION: announced, &a: said(2, 3), &b: said(4, 4), "other": said(9, 9)}),
                Stage::Announced(6, 7),
            ),
            (json!({ROTATION: switched, &a: said(2, 3)}), Stage::Switched),
        ];
        for (annotations, expected) in table {
            assert_eq!(stage(&secret(annotations.clone())), expected, "{annotations}");
        }
        assert_eq!(stage(&json!({})), Stage::Steady);
    }

    #[test]
    fn a_root_of_somebody_elses_is_not_asked_for() {
        let told = can_rotate(&secret(json!({}))).unwrap_err().to_string();
        assert!(told.contains("whoever made it rotates it"), "{told}");
        assert!(can_rotate(&json!({"metadata": {"labels": {"penstock.io/made-by": "control"}}})).is_ok());
    }
}
