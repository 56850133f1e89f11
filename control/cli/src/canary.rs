//! `penstock canary`: where canaries are, and what a person wants done with them.
//!
//! In a cluster the objects say it and take it, by the rights of whoever sits at the keyboard: nothing goes past the API server. On one machine
//! control's own API does. In: a name. Out: tables, the object, or a line for each transition. Can go wrong: nobody has a canary of that name (exit
//! status 2, so that 1 means of `watch` that it went back, and nothing else), or whoever knows is away.

use std::time::Duration;

use penstock_api::names::annotation;
use penstock_control::canary::{Diary, Entry, Observed, Phase, Plan};
use penstock_control::objects::canary::Spec;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

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
/// So long `watch` goes on without an answer: control and API servers are restarted, and a canary goes on.
const AWAY: Duration = Duration::from_secs(60);
/// Within this control knows of a Deployment that it was changed.
const AFRESH: Duration = Duration::from_secs(5);
/// As wide as every time in a history.
const MOMENT: &str = "0000-00-00T00:00:00.000Z";
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
    /// Follow one canary to its end; of another run that takes its place that is said, and it is followed
    #[command(
        after_help = "Exit status: 0 it has succeeded, 1 it went back or makes no sense, 2 there is none or it may not\nbe seen, 3 nobody who knows answers, 130 interrupted\n\nExample:\n  penstock canary watch demo/digits && echo promoted"
    )]
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
            return Cluster::open(context).await.map(Self::Cluster).map_err(Failure::Usage);
        }
        match control.get::<Page>("/canaries").await {
            Ok(page) if page.commands => Ok(Self::Control(control)),
            Ok(_) => Cluster::open(None).await.map(Self::Cluster).map_err(|error| {
                Failure::Usage(format!(
                    "control's canaries are in a cluster, and there is no way to it: {error}"
                ))
            }),
            Err(Failure::Unreachable { url, cause }) => {
                Cluster::open(None).await.map(Self::Cluster).map_err(|error| {
                    let cause = format!("{cause}, nor is there a way to a cluster ({error})");
                    Failure::Unreachable { url, cause }
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
                Answer::Denied(why) => Err(Failure::Problem(format!(
                    "canaries of all namespaces: {why}; write NAMESPACE/NAME of one that you may see"
                ))),
                Answer::Failed(why) => Err(Failure::Problem(format!("canaries: {why}"))),
            },
        }
    }

    /// The one of a name.
    async fn one(&mut self, wanted: &str) -> Result<Value, Failure> {
        if let (Self::Cluster(cluster), Some((space, of))) = (&*self, wanted.split_once('/')) {
            // Whoever may see one need not see all.
            match cluster.get(&format!("{PATH}/namespaces/{space}/canaries/{of}")).await {
                Answer::Found(one) => return Ok(one),
                Answer::Absent => {
                    let what = format!(
                        "there is no canary {wanted}; `penstock canary list` shows those that there are"
                    );
                    return Err(Failure::Usage(what));
                }
                Answer::Denied(why) | Answer::Failed(why) => {
                    return Err(Failure::Problem(format!("canary {wanted}: {why}")));
                }
            }
        }
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
                Err(Failure::Usage(format!(
                    "several namespaces have a canary {wanted}; write one of {}",
                    names.join(", ")
                )))
            }
            (None, _) => {
                let names: Vec<String> = all.iter().map(place).collect();
                let known = if names.is_empty() { "there is none".to_owned() } else { names.join(", ") };
                Err(Failure::Usage(format!("there is no canary {wanted}; known: {known}")))
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
    let deployment = text(&canary, "/spec/deployment");
    let useless = match (verb, phase) {
        ("promote", Phase::Succeeded) | ("promote" | "abort", Phase::RolledBack | Phase::Invalid) => true,
        ("abort", Phase::Succeeded) => !deployment.is_empty(),
        _ => false,
    };
    if useless {
        let next = match deployment {
            "" => "write another text into its spec.run to begin again".to_owned(),
            name => format!(
                "the next change of the Deployment {name} begins again, as `kubectl rollout undo deployment/{name}` does"
            ),
        };
        let why = format!("{} is at its end ({phase:?}); {next}", place(&canary));
        return Err(Failure::Problem(why));
    }
    source.order(&canary, verb).await?;
    output.page(&json!({"canary": place(&canary), "asked": verb}), |_, _| {
        let place = place(&canary);
        format!("{place}: {verb} is asked for; `penstock canary watch {place}` tells what comes of it\n")
    })?;
    Ok(exit::FINE)
}

/// Follows it to its end.
async fn watch(source: &mut Source<'_>, wanted: &str, output: Output) -> Result<u8, Failure> {
    let mut interruption = Interruption::listen()?;
    let mut wanted = wanted.to_owned();
    let mut table = Table::new(&["TIME", "PHASE", "STEP", ">WEIGHT", "WHY"]);
    let mut told = Told::default();
    let began = Instant::now();
    let mut away: Option<Instant> = None;
    loop {
        match source.one(&wanted).await {
            Ok(canary) => {
                if away.take().is_some() {
                    eprintln!("{}: there are answers again", place(&canary));
                }
                wanted = place(&canary);
                told.tell(&canary, &mut table, output)?;
                if let Some(end) = end(&canary)?
                    && (told.moved || began.elapsed() >= patience(&canary))
                {
                    return Ok(end);
                }
            }
            Err(failure @ Failure::Usage(_)) => return Err(failure),
            // Of one that was never seen nothing is known, so it did not go back.
            Err(Failure::Problem(why)) if !told.begun => return Err(Failure::Usage(why)),
            Err(failure) if !told.begun => return Err(failure),
            Err(failure) => {
                let since = *away.get_or_insert_with(|| {
                    eprintln!("{failure}; asking again for {} s", AWAY.as_secs());
                    Instant::now()
                });
                if since.elapsed() >= AWAY {
                    eprintln!("{failure}; what has become of {wanted} is not known");
                    return Ok(exit::UNREACHABLE);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = interruption.comes() => return Ok(exit::INTERRUPTED),
        }
    }
}

/// How long an end may be that of the run before: the first pod of a Deployment that has just been changed is yet to come.
fn patience(canary: &Value) -> Duration {
    if text(canary, "/spec/deployment").is_empty() { Duration::ZERO } else { AFRESH }
}

/// What the end of a canary is to a script, if it has come to one.
fn end(canary: &Value) -> Result<Option<u8>, Failure> {
    let diary = diary(canary);
    let spec = spec(canary)?;
    // What is written of another run than the object asks for is soon over with, unless that is refused. Which run a change of a Deployment is, control
    // alone knows.
    let current = diary.run.is_empty()
        || spec.deployment.is_some()
        || refusal(&diary).is_some()
        || diary.run == spec.run_id();
    Ok(match diary.phase {
        Phase::Succeeded if current => Some(exit::FINE),
        Phase::RolledBack | Phase::Invalid if current => Some(exit::PROBLEM),
        _ => None,
    })
}

/// Why the newest version of a canary is not in force, if it is not.
fn refusal(diary: &Diary) -> Option<&str> {
    let accepted =
        diary.conditions.iter().find(|one| one["type"] == "Accepted" && one["status"] == "False")?;
    accepted["message"].as_str()
}

/// What `watch` has said so far.
#[derive(Default)]
struct Told {
    begun: bool,
    /// Anything has happened since.
    moved: bool,
    run: Option<String>,
    refused: Option<String>,
    last: Option<Entry>,
}

impl Told {
    /// Says what is new: transitions, another run in the place of the one before, and that the newest version is refused.
    fn tell(&mut self, canary: &Value, table: &mut Table, output: Output) -> Result<(), Failure> {
        let diary = diary(canary);
        if output.format == Format::Table && !self.begun {
            // As wide as a line becomes, so that those to come stand below their headings.
            let step = format!("{0} of {0}", diary.steps);
            table.stream(&cells![MOMENT, "Progressing", step, "100 %", ""], output.terminal);
            output.text(&format!("{}\n", table.heading(output.terminal)))?;
        }
        self.moved |= self.begun && diary.history.last() != self.last.as_ref();
        self.begun = true;
        let run = Some(diary.run.clone()).filter(|run| !run.is_empty());
        if let (Some(before), Some(now)) = (&self.run, &run)
            && before != now
        {
            let what = format!("another run of {} has begun: {now} in the place of {before}", place(canary));
            remark(output, &what, &json!({"run": now, "replaces": before}))?;
        }
        self.run = run.or(self.run.take());
        let fresh = diary.history.iter().rev().take_while(|entry| Some(*entry) != self.last.as_ref());
        for entry in fresh.collect::<Vec<_>>().into_iter().rev() {
            match output.format {
                Format::Table => {
                    let line = table.stream(&transition(entry, diary.steps), output.terminal);
                    output.text(&format!("{line}\n"))?;
                }
                _ => output.object(entry)?,
            }
        }
        self.last = diary.history.last().cloned().or(self.last.take());
        let refused = refusal(&diary).map(str::to_owned);
        if let Some(why) =
            refused.as_ref().filter(|_| refused != self.refused && diary.phase != Phase::Invalid)
        {
            let what = format!("the newest version of {} is refused: {why}", place(canary));
            remark(output, &what, &json!({"refused": why}))?;
        }
        self.refused = refused;
        Ok(())
    }
}

/// A line that is no transition.
fn remark(output: Output, what: &str, value: &Value) -> Result<(), Failure> {
    match output.format {
        Format::Table => output.text(&format!("{}\n", output.terminal.paint(Tone::Warn, what))),
        _ => output.object(value),
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
        if unseen(&diary) {
            let [_, candidate] = versions(item, &diary);
            table.row(cells![
                place(item),
                text(item, "/spec/service"),
                candidate,
                "–",
                "–",
                "–",
                "–",
                "–",
                UNSEEN
            ]);
            continue;
        }
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
        Some(course) if course.is_whole() && diary.phase == Phase::Succeeded => {
            ["–".to_owned(), course.candidate.clone()]
        }
        Some(course) if course.is_whole() => [course.stable.clone(), format!("deployment/{deployment}")],
        Some(course) => [course.stable.clone(), course.candidate.clone()],
        None => [String::new(), format!("deployment/{deployment}")],
    }
}

/// What to say of a canary of which nothing is written yet.
const UNSEEN: &str = "control has not looked at it yet";

fn unseen(diary: &Diary) -> bool {
    diary.steps == 0 && diary.conditions.is_empty()
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
    let place = terminal.paint(Tone::Strong, &place(canary));
    let mut page = if unseen(&diary) {
        format!("{place}: {UNSEEN}\n")
    } else {
        format!(
            "{place}: {}, step {}, {} % to {} (applied by {} of {} proxies)\n",
            terminal.paint(tone(diary.phase), &format!("{:?}", diary.phase)),
            step(&diary),
            weight(&diary),
            candidate,
            diary.applied,
            diary.concerned,
        )
    };
    if !diary.message.is_empty() {
        page.push_str(&format!("  {}\n", diary.message));
    }
    if let Some(left) = diary.left {
        let deployment = text(canary, "/spec/deployment");
        page.push_str(&format!("  the Deployment {deployment} has {left} pods of {stable} left\n"));
    }
    if let Some(why) = refusal(&diary).filter(|_| diary.phase != Phase::Invalid) {
        let why = format!("  its newest version is refused: {why}\n");
        page.push_str(&terminal.paint(Tone::Warn, &why));
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
