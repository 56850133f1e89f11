//! `penstock canary`: where canaries are, and what a person wants done with them.
//!
//! In a cluster the objects say it and take it, by the rights of whoever sits at the keyboard: nothing goes past the API server. On one machine
//! control's own API does. In: a name. Out: tables, the object, or a line for each transition.

use std::time::Duration;

use penstock_api::names::annotation;
use penstock_control::canary::{Diary, Entry, Observed, Phase, Plan};
use penstock_control::objects::canary::Spec;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::cluster::{Answer, Cluster, name, namespace, text};
use crate::control::Control;
use crate::failure::{Failure, exit};
use crate::interruption::Interruption;
use crate::output::{Format, Output};
use crate::table::{Cell, Table, cells};
use crate::terminal::{Terminal, Tone};
use crate::units;

/// Where the objects are.
const PATH: &str = "/apis/penstock.io/v1alpha1";
/// Between two looks of `watch`.
const EVERY: Duration = Duration::from_millis(250);
/// Transitions that `show` shows.
const SHOWN: usize = 8;

/// The arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
    /// The cluster, by its context in the kubeconfig; else control where it answers and takes commands, else the current context
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    /// List all canaries and where each is
    #[command(after_help = "Example:\n  penstock canary list")]
    List,
    /// Show one canary: its steps, what was seen of both versions, and what happened
    #[command(after_help = "Example:\n  penstock canary show demo/digits")]
    Show(One),
    /// Follow one canary to its end; exit status 1 if it goes back
    #[command(after_help = "Example:\n  penstock canary watch demo/digits && echo promoted")]
    Watch(One),
    /// Let the step go that it is at, if analysis agrees
    #[command(after_help = "Example:\n  penstock canary promote demo/digits")]
    Promote(One),
    /// Hold it where it is; it still goes back if analysis fails
    #[command(after_help = "Example:\n  penstock canary pause demo/digits")]
    Pause(One),
    /// Go on after a pause
    #[command(after_help = "Example:\n  penstock canary resume demo/digits")]
    Resume(One),
    /// Send all requests back to the stable version, now
    #[command(after_help = "Example:\n  penstock canary abort demo/digits")]
    Abort(One),
}

#[derive(Debug, clap::Args)]
struct One {
    /// NAME, or NAMESPACE/NAME where several namespaces have one
    canary: String,
}

/// Who knows, and who takes commands.
enum Source<'a> {
    Control(&'a mut Control),
    Cluster(Cluster),
}

/// A page of control's API.
#[derive(Deserialize)]
struct Page {
    items: Vec<Value>,
    /// Whether control takes commands, which it does where there is no cluster.
    commands: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args, control: &mut Control, output: Output) -> Result<u8, Failure> {
    let mut source = Source::find(control, args.context.as_deref()).await?;
    match args.verb {
        Verb::List => {
            let items = source.list().await?;
            output.page(&items, |items, terminal| list(items, terminal))?;
            Ok(exit::FINE)
        }
        Verb::Show(one) => {
            let canary = source.one(&one.canary).await?;
            output.page(&canary, show)?;
            Ok(exit::FINE)
        }
        Verb::Watch(one) => watch(&mut source, &one.canary, output).await,
        Verb::Promote(one) => order(&mut source, &one.canary, "promote", output).await,
        Verb::Pause(one) => order(&mut source, &one.canary, "pause", output).await,
        Verb::Resume(one) => order(&mut source, &one.canary, "resume", output).await,
        Verb::Abort(one) => order(&mut source, &one.canary, "abort", output).await,
    }
}

impl<'a> Source<'a> {
    async fn find(control: &'a mut Control, context: Option<&str>) -> Result<Self, Failure> {
        if context.is_some() {
            return Cluster::open(context).await.map(Self::Cluster).map_err(Failure::Problem);
        }
        match control.get::<Page>("/canaries").await {
            Ok(page) if page.commands => Ok(Self::Control(control)),
            Ok(_) => Cluster::open(None).await.map(Self::Cluster).map_err(|error| {
                Failure::Problem(format!(
                    "control's canaries are in a cluster, and there is no way to it: {error}"
                ))
            }),
            Err(away @ Failure::Unreachable { .. }) => {
                Cluster::open(None).await.map(Self::Cluster).map_err(|error| {
                    Failure::Problem(format!("{away}; nor is there a way to a cluster: {error}"))
                })
            }
            Err(other) => Err(other),
        }
    }

    async fn list(&mut self) -> Result<Vec<Value>, Failure> {
        match self {
            Self::Control(control) => Ok(control.get::<Page>("/canaries").await?.items),
            Self::Cluster(cluster) => match cluster.list(&format!("{PATH}/canaries")).await {
                Answer::Found(list) => Ok(list["items"].as_array().cloned().unwrap_or_default()),
                Answer::Absent => Err(Failure::Problem(
                    "the cluster knows no canaries; install their definition: penstock install --crds-only | kubectl apply -f -"
                        .to_owned(),
                )),
                Answer::Denied(why) | Answer::Failed(why) => Err(Failure::Problem(format!("canaries: {why}"))),
            },
        }
    }

    /// The one of a name.
    async fn one(&mut self, wanted: &str) -> Result<Value, Failure> {
        let all = self.list().await?;
        let fits = |one: &&Value| match wanted.split_once('/') {
            Some((space, of)) => namespace(one) == space && name(one) == of,
            None => name(one) == wanted,
        };
        let mut found = all.iter().filter(fits);
        match (found.next(), found.next()) {
            (Some(one), None) => Ok(one.clone()),
            (Some(_), Some(_)) => {
                let names: Vec<String> = all.iter().filter(fits).map(place).collect();
                Err(Failure::Problem(format!(
                    "several namespaces have a canary {wanted}; write one of {}",
                    names.join(", ")
                )))
            }
            (None, _) => {
                let names: Vec<String> = all.iter().map(place).collect();
                let known = if names.is_empty() { "there is none".to_owned() } else { names.join(", ") };
                Err(Failure::Problem(format!("there is no canary {wanted}; known: {known}")))
            }
        }
    }

    /// Has something done.
    async fn order(&mut self, canary: &Value, verb: &str) -> Result<(), Failure> {
        let (space, of) = (namespace(canary), name(canary));
        match self {
            Self::Control(control) => {
                let _: Value = control.post(&format!("/canaries/{space}/{of}/{verb}")).await?;
                Ok(())
            }
            Self::Cluster(cluster) => {
                let run = diary(canary).run;
                let run = if run.is_empty() { spec(canary)?.run_id() } else { run };
                let said = format!("{run}/{:08x}", rand::random::<u32>());
                let change = match verb {
                    "promote" => json!({"metadata": {"annotations": {annotation::PROMOTE: said}}}),
                    "abort" => json!({"metadata": {"annotations": {annotation::ABORT: said}}}),
                    _ => json!({"spec": {"paused": verb == "pause"}}),
                };
                match cluster.merge(&format!("{PATH}/namespaces/{space}/canaries/{of}"), &change).await {
                    Answer::Found(_) => Ok(()),
                    other => Err(Failure::Problem(format!("{space}/{of}: {}", other.trouble()))),
                }
            }
        }
    }
}

fn place(canary: &Value) -> String {
    format!("{}/{}", namespace(canary), name(canary))
}

fn spec(canary: &Value) -> Result<Spec, Failure> {
    serde_json::from_value(canary["spec"].clone())
        .map_err(|error| Failure::Problem(format!("{} cannot be read: {error}", place(canary))))
}

fn diary(canary: &Value) -> Diary {
    serde_json::from_value(canary["status"].clone()).unwrap_or_default()
}

/// Has something done, and says where the canary is.
async fn order(source: &mut Source<'_>, wanted: &str, verb: &str, output: Output) -> Result<u8, Failure> {
    let canary = source.one(wanted).await?;
    let phase = diary(&canary).phase;
    let ended = matches!(phase, Phase::Succeeded | Phase::RolledBack | Phase::Invalid);
    if ended && verb != "pause" && verb != "resume" {
        let next = match text(&canary, "/spec/deployment") {
            "" => "write another text into its spec.run to begin again".to_owned(),
            name => format!("the next change of the Deployment {name} begins again"),
        };
        let why = format!("{} is at its end ({phase:?}); {next}", place(&canary));
        return Err(Failure::Problem(why));
    }
    source.order(&canary, verb).await?;
    output.text(&format!(
        "{}: {verb} is asked for; `penstock canary watch {}` tells what comes of it\n",
        place(&canary),
        place(&canary)
    ))?;
    Ok(exit::FINE)
}

/// Follows it to its end.
async fn watch(source: &mut Source<'_>, wanted: &str, output: Output) -> Result<u8, Failure> {
    let mut interruption = Interruption::listen()?;
    let first = source.one(wanted).await?;
    let wanted = place(&first);
    let mut table = Table::new(&["TIME", "PHASE", "STEP", ">WEIGHT", "WHY"]);
    if output.format == Format::Table {
        output.text(&format!("{}\n", table.heading(output.terminal)))?;
    }
    let mut told: Option<Entry> = None;
    loop {
        let canary = source.one(&wanted).await?;
        let (spec, diary) = (spec(&canary)?, diary(&canary));
        // Which run a change of a Deployment is, control alone knows.
        let current = spec.deployment.is_some() || diary.run.is_empty() || diary.run == spec.run_id();
        let fresh: Vec<&Entry> =
            diary.history.iter().rev().take_while(|entry| Some(*entry) != told.as_ref()).collect();
        for entry in fresh.into_iter().rev() {
            match output.format {
                Format::Table => {
                    let line = table.stream(&transition(entry, diary.steps), output.terminal);
                    output.text(&format!("{line}\n"))?;
                }
                _ => output.object(entry)?,
            }
        }
        told = diary.history.last().cloned().or(told);
        match diary.phase {
            Phase::Succeeded if current => return Ok(exit::FINE),
            Phase::RolledBack | Phase::Invalid if current => return Ok(exit::PROBLEM),
            _ => {}
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = interruption.comes() => return Ok(exit::INTERRUPTED),
        }
    }
}

fn tone(phase: Phase) -> Tone {
    match phase {
        Phase::Succeeded => Tone::Good,
        Phase::Waiting | Phase::Paused => Tone::Warn,
        Phase::RollingBack | Phase::RolledBack | Phase::Invalid => Tone::Bad,
        Phase::Progressing | Phase::Promoting => Tone::Plain,
    }
}

fn transition(entry: &Entry, steps: usize) -> [Cell; 5] {
    [
        entry.at.to_string().into(),
        Cell::toned(tone(entry.phase), format!("{:?}", entry.phase)),
        format!("{} of {steps}", (entry.step + 1).min(steps)).into(),
        format!("{} %", entry.weight).into(),
        entry.message.as_str().into(),
    ]
}

fn list(items: &[Value], terminal: Terminal) -> String {
    if items.is_empty() {
        return "There are no canaries; docs/CANARY.md says how one is written.\n".to_owned();
    }
    let mut table = Table::new(&[
        "CANARY",
        "SERVICE",
        "CANDIDATE",
        "PHASE",
        "STEP",
        ">WEIGHT",
        "APPLIED",
        ">SUCCESS",
        "WHY",
    ]);
    for item in items {
        let diary = diary(item);
        let success = diary.candidate.as_ref().and_then(|seen| seen.success_rate);
        table.row([
            place(item).into(),
            text(item, "/spec/service").into(),
            versions(item, &diary)[1].as_str().into(),
            Cell::toned(tone(diary.phase), format!("{:?}", diary.phase)),
            step(&diary).into(),
            format!("{} %", weight(&diary)).into(),
            format!("{} of {}", diary.applied, diary.concerned).into(),
            units::or_dash(success, |rate| units::percent(rate / 100.0)).into(),
            diary.message.as_str().into(),
        ]);
    }
    table.render(terminal)
}

/// Stable and candidate: Services, or templates of the Deployment, which stands for them while there is none but the one that serves.
fn versions(canary: &Value, diary: &Diary) -> [String; 2] {
    let deployment = text(canary, "/spec/deployment");
    match &diary.course {
        _ if deployment.is_empty() => {
            ["/spec/stable", "/spec/candidate"].map(|field| text(canary, field).to_owned())
        }
        // What served before is gone.
        Some(course) if course.stable == course.candidate && diary.phase == Phase::Succeeded => {
            ["–".to_owned(), course.candidate.clone()]
        }
        Some(course) if course.stable == course.candidate => {
            [course.stable.clone(), format!("deployment/{deployment}")]
        }
        Some(course) => [course.stable.clone(), course.candidate.clone()],
        None => [String::new(), format!("deployment/{deployment}")],
    }
}

fn weight(diary: &Diary) -> u32 {
    diary.course.as_ref().map_or(0, |course| course.weight)
}

fn step(diary: &Diary) -> String {
    match diary.steps {
        0 => "–".to_owned(),
        steps => format!("{} of {steps}", (diary.step + 1).min(steps)),
    }
}

fn show(canary: &Value, terminal: Terminal) -> String {
    let diary = diary(canary);
    let [stable, candidate] = versions(canary, &diary);
    let mut page = format!(
        "{}: {}, step {}, {} % to {} (applied by {} of {} proxies)\n",
        terminal.paint(Tone::Strong, &place(canary)),
        terminal.paint(tone(diary.phase), &format!("{:?}", diary.phase)),
        step(&diary),
        weight(&diary),
        candidate,
        diary.applied,
        diary.concerned,
    );
    if !diary.message.is_empty() {
        page.push_str(&format!("  {}\n", diary.message));
    }
    if let Some(left) = diary.left {
        page.push_str(&format!(
            "  the Deployment {} has {left} pods of {stable} left\n",
            text(canary, "/spec/deployment")
        ));
    }
    let mut seen = Table::new(&["VERSION", "SERVICE", ">REQUESTS", ">SUCCESS", ">P50", ">P99", ">LOAD"]);
    for (version, name, observed) in
        [("stable", &stable, &diary.stable), ("candidate", &candidate, &diary.candidate)]
    {
        let observed = observed.clone().unwrap_or_default();
        let Observed { requests, success_rate, p50_ms, p99_ms, load } = observed;
        seen.row(cells![
            version,
            name.as_str(),
            units::count(requests),
            units::or_dash(success_rate, |rate| units::percent(rate / 100.0)),
            units::or_dash(p50_ms, units::milliseconds),
            units::or_dash(p99_ms, units::milliseconds),
            units::or_dash(load, units::percent),
        ]);
    }
    page.push('\n');
    page.push_str(&seen.render(terminal));
    if let Some(shadow) = &diary.shadow {
        let share = |value: Option<f64>| units::or_dash(value, |rate| units::percent(rate / 100.0));
        page.push_str(&format!(
            "\nCopies: {} sent, {} dropped, {} compared; {} answered well, {} agree, {} have the same top; largest difference {}\n",
            units::count(shadow.sent),
            units::count(shadow.dropped),
            units::count(shadow.compared),
            share(shadow.success_rate),
            share(shadow.agreement),
            share(shadow.same_top),
            units::or_dash(shadow.largest_difference, |value| format!("{value}")),
        ));
    }
    page.push('\n');
    page.push_str(&steps(canary, &diary, terminal));
    if !diary.history.is_empty() {
        let mut history = Table::new(&["TIME", "PHASE", "STEP", ">WEIGHT", "WHY"]);
        let from = diary.history.len().saturating_sub(SHOWN);
        for entry in &diary.history[from..] {
            history.row(transition(entry, diary.steps));
        }
        page.push('\n');
        page.push_str(&history.render(terminal));
    }
    page
}

/// The steps, with the one that it is at.
fn steps(canary: &Value, diary: &Diary, terminal: Terminal) -> String {
    let plan = spec(canary).ok().and_then(|spec| Plan::read(namespace(canary), &spec).ok());
    let Some(plan) = plan else { return String::new() };
    let moves = !matches!(diary.phase, Phase::Succeeded | Phase::RolledBack | Phase::RollingBack);
    let mut table = Table::new(&["", "STEP", ">WEIGHT", ">COPIES", ">HOLD", "THEN"]);
    for (at, step) in plan.steps.iter().enumerate() {
        table.row(cells![
            if moves && at == diary.step { ">" } else { "" },
            (at + 1).to_string(),
            format!("{} %", step.weight),
            if step.shadow > 0 { format!("{} %", step.shadow) } else { "–".to_owned() },
            humantime::format_duration(step.hold).to_string(),
            if step.pause { "a person" } else { "on" },
        ]);
    }
    table.render(terminal)
}
