//! The script: what happens to the mesh while the client goes on asking.

use std::net::SocketAddrV4;
use std::time::Duration;

use penstock_api::view::Stat;
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::certificates::Watch;
use super::digits::{self, Question};
use super::load::{Counts, Load, exchange};
use super::photos::{self, Photos, Prepared, Way};
use super::screen::Screen;
use super::sharing::Sharing;
use super::stage::Stage;
use super::summary::{Findings, Phase, Summary, milliseconds};
use super::topology::{BETTER, HOST, KILLED, NAMESPACE, Presence, RESTARTED, SERVICE, WHOLE};
use crate::connection::Connection;
use crate::failure::Failure;
use crate::units;

/// Keep-alive connections of the client: enough that a slow answer holds up no other.
const CONNECTIONS: usize = 16;
/// Of the crowd at the end, which asks as fast as it is answered, for so long.
const CROWD: usize = 64;
const CROWD_RATE: u32 = 1_000_000;
const CROWD_STAYS: Duration = Duration::from_secs(2);
/// Who sends photographs, as fast as they are answered, for so long: as JPEGs, and then as tensors that the client made.
const PHOTOGRAPHERS: usize = 16;
const JPEGS_COME: Duration = Duration::from_secs(3);
const TENSORS_COME: Duration = Duration::from_secs(2);
/// A page of metrics is a second old at most, and so is what it is made of.
const PAGES: Duration = Duration::from_millis(2200);
/// Weights between two phases, so that the demo's percentiles of a push rest on three times as many.
const RAMP_STEPS: u32 = 34;
/// How long a ramp may take; on a slow machine it takes fewer steps.
const RAMP_LIMIT: Duration = Duration::from_secs(3);
/// Even then it takes as many.
const RAMP_STEPS_AT_LEAST: u32 = 8;
/// Between two steps, so that pushes are single.
const RAMP_PAUSE: Duration = Duration::from_millis(20);
/// How long a node controller takes to notice that a pod died without a word.
const NOTICE: Duration = Duration::from_secs(2);
/// How long the kubelet takes to start a pod again.
const RESCHEDULE: Duration = Duration::from_millis(500);
/// The first request through the mesh may wait for the first configuration.
const FIRST_ANSWER: Duration = Duration::from_secs(20);

/// The windows that control looks back over.
const WINDOWS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(300));

/// A phase that is over.
struct Mark {
    segment: usize,
    name: String,
    event: &'static str,
    asked: f64,
    lasted: Duration,
}

/// What the script works with.
struct Play<'a> {
    stage: &'a mut Stage,
    screen: &'a Screen,
    load: Load,
    /// How long a phase takes.
    length: Duration,
    marks: Vec<Mark>,
    findings: Findings,
}

/// Plays the whole script. The mesh goes on running afterwards, the client has stopped.
pub(super) async fn play(
    stage: &mut Stage,
    screen: &Screen,
    rate: u32,
    length: Duration,
) -> Result<Summary, Failure> {
    start(stage, screen).await?;
    let admins: Vec<_> = (0..stage.topology.pods.len()).map(|pod| stage.sidecar(pod).admin).collect();
    let certificates = Watch::start(admins.iter().copied());
    let load = client(stage, CONNECTIONS, rate)?;
    screen.load(load.counts());
    let began = Instant::now();

    let mut play =
        Play { stage, screen, load, length: length / 4, marks: Vec::new(), findings: Findings::default() };
    play.phase(0, "", async |_| Ok(())).await?;
    play.phase(10, "digits-v1-a restarts", Play::restart).await?;
    play.phase(50, "digits-v1-b is killed, certificates rotate", Play::kill).await?;
    play.phase(100, "", async |_| Ok(())).await?;

    let Play { mut load, mut findings, marks, .. } = play;
    load.finish().await;
    let lasted = began.elapsed();
    let counts = load.counts();
    findings.phases = marks
        .into_iter()
        .map(|mark| Phase::of(mark.name, mark.event, mark.asked, &counts.segment(mark.segment), mark.lasted))
        .collect();
    findings.certificates_rotated = certificates.rotated();
    screen.phase("a crowd", 1.0);
    let (crowd, sharing) = crowd(stage, &admins).await?;
    screen.say(&format!(
        "a crowd of {CROWD} asked {} times in {} s; the model ran {} times, {:.1} digits at once",
        units::count(crowd.total().requests),
        CROWD_STAYS.as_secs(),
        units::count(sharing.executions),
        sharing.rows_per_batch()
    ));
    findings.sharing = sharing;
    findings.crowd = crowd.total();
    screen.phase("photographs", 1.0);
    let (sent, photos) = photographs(stage, screen, &admins).await?;
    findings.photos = photos;
    // The crowd's table is about digits; these count among the requests all the same.
    let mut reasons = counts.reasons();
    for sent in &sent {
        findings.crowd.add(&sent.total());
    }
    for (reason, failures) in [crowd].iter().chain(&sent).flat_map(Counts::reasons) {
        *reasons.entry(reason).or_default() += failures;
    }
    Ok(Summary::of(findings, &counts.total(), reasons, lasted))
}

/// Many clients at once, all asking the same version: their requests share executions.
async fn crowd(stage: &Stage, admins: &[SocketAddrV4]) -> Result<(Counts, Sharing), Failure> {
    let before = Sharing::read(admins).await;
    let mut load = client(stage, CROWD, CROWD_RATE)?;
    sleep(CROWD_STAYS).await;
    load.finish().await;
    sleep(PAGES).await;
    Ok((load.counts(), Sharing::read(admins).await.since(before)))
}

/// Photographs, sent as JPEGs of which a policy has the model's sidecar make what the model takes; then the same from a client
/// that makes it itself.
async fn photographs(
    stage: &mut Stage,
    screen: &Screen,
    admins: &[SocketAddrV4],
) -> Result<([Counts; 2], Photos), Failure> {
    let took = stage.prepare_photos("digits-v2").await?;
    screen.say(&format!(
        "a policy says how JPEGs become tensors; it was in force everywhere after {}",
        units::milliseconds(milliseconds(took))
    ));
    let before = (Sharing::read(admins).await, Prepared::read(admins).await);
    let (sent, jpegs) = photograph(stage, screen, JPEGS_COME, photos::jpegs()).await;
    sleep(PAGES).await;
    let prepared = [before.1, Prepared::read(admins).await];
    let sharing = Sharing::read(admins).await.since(before.0);
    let questions = photos::own().map_err(Failure::Problem)?;
    let (sent_too, own) = photograph(stage, screen, TENSORS_COME, questions).await;
    let photos = Photos::of(jpegs, own, prepared, sharing);
    screen.say(&format!(
        "{} photographs as JPEGs of {}: {} right, {} of CPU time of the client each",
        units::count(jpegs.requests),
        units::bytes(jpegs.bytes as u64),
        units::or_dash(jpegs.accuracy, units::percent),
        units::or_dash(jpegs.client_cpu_ms, units::milliseconds)
    ));
    screen.say(&format!(
        "{} as tensors of {}, made by the client: {} right, {}",
        units::count(own.requests),
        units::bytes(own.bytes as u64),
        units::or_dash(own.accuracy, units::percent),
        units::or_dash(own.client_cpu_ms, units::milliseconds)
    ));
    Ok(([sent, sent_too], photos))
}

/// Sends photographs one way for a while.
async fn photograph(
    stage: &Stage,
    screen: &Screen,
    lasts: Duration,
    questions: Vec<Question>,
) -> (Counts, Way) {
    let bytes = photos::mean_bytes(&questions);
    let (began, before) = (Instant::now(), stage.cpu(BETTER));
    let mut load = ask(stage, PHOTOGRAPHERS, CROWD_RATE, questions);
    screen.load(load.counts());
    sleep(lasts).await;
    load.finish().await;
    let (lasted, cpu) = (began.elapsed(), [before, stage.cpu(BETTER)]);
    let counts = load.counts();
    let way = Way::of(&counts.total(), lasted, bytes, cpu);
    (counts, way)
}

/// The client application: so many connections to its sidecar, together so many requests a second.
pub(super) fn client(stage: &Stage, connections: usize, rate: u32) -> Result<Load, Failure> {
    let questions = digits::questions().map_err(Failure::Problem)?;
    Ok(ask(stage, connections, rate, questions))
}

fn ask(stage: &Stage, connections: usize, rate: u32, questions: Vec<Question>) -> Load {
    Load::start(stage.client().outbound, HOST, connections, rate, questions)
}

/// From nothing to the first answer through the mesh.
async fn start(stage: &mut Stage, screen: &Screen) -> Result<(), Failure> {
    screen.phase("starting", 0.0);
    stage.start_control().await?;
    screen.say(&format!("control runs; its API is {}", stage.control_url()));
    stage.start_pods().await?;
    screen.say("three model servers and four sidecars run; every sidecar has proved its identity and has a certificate");
    let questions = digits::questions().map_err(Failure::Problem)?;
    let mut connection = Connection::to(stage.client().outbound.to_string());
    let deadline = Instant::now() + FIRST_ANSWER;
    loop {
        match exchange(&mut connection, HOST, &questions[0]).await {
            Ok(answer) => {
                screen.say(&format!(
                    "the first digit went through the mesh: version {} answered",
                    answer.version
                ));
                return Ok(());
            }
            Err(trouble) if Instant::now() >= deadline => {
                return Err(Failure::Problem(format!(
                    "no request gets through the mesh {} s after everything is ready; the last try: {trouble}",
                    FIRST_ANSWER.as_secs()
                )));
            }
            Err(_) => {}
        }
        stage.pause(Duration::from_millis(100)).await?;
    }
}

impl Play<'_> {
    /// Moves version 2 to `percent` step by step, then lets the weights stand still while `meanwhile` happens.
    async fn phase(
        &mut self,
        percent: u32,
        event: &'static str,
        meanwhile: impl AsyncFnOnce(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.ramp(percent * WHOLE / 100).await?;
        let (name, asked) = (format!("v2 at {percent} %"), f64::from(percent) / 100.0);
        self.screen.phase(&name, asked);
        let (segment, began) = (self.load.begin_segment(), Instant::now());
        meanwhile(self).await?;
        self.stage.pause(self.length.saturating_sub(began.elapsed())).await?;
        let lasted = began.elapsed();
        self.marks.push(Mark { segment, name, event, asked, lasted });
        self.mutual_tls(lasted).await
    }

    /// A canary's way up: many small pushes, each waited for.
    async fn ramp(&mut self, to: u32) -> Result<(), Failure> {
        let (from, began) = (self.stage.topology.v2, Instant::now());
        if from == to {
            return Ok(());
        }
        self.load.begin_segment();
        let mut took = Vec::new();
        for step in 1..=RAMP_STEPS {
            let hurry = step > RAMP_STEPS_AT_LEAST && began.elapsed() > RAMP_LIMIT;
            let v2 = if hurry { to } else { from + (to - from) * step / RAMP_STEPS };
            let asked = f64::from(v2) / f64::from(WHOLE);
            self.screen
                .phase(&format!("moving v2 to {}", units::percent(f64::from(to) / f64::from(WHOLE))), asked);
            took.push(milliseconds(self.stage.weigh(v2).await?));
            if v2 == to {
                break;
            }
            sleep(RAMP_PAUSE).await;
        }
        let worst = took.iter().copied().fold(0.0, f64::max);
        self.screen.say(&format!(
            "v2 moved to {} in {} pushes; the slowest was applied everywhere after {}",
            units::percent(f64::from(to) / f64::from(WHOLE)),
            took.len(),
            units::milliseconds(worst)
        ));
        self.findings.pushes.extend(took);
        Ok(())
    }

    /// One replica of version 1 is restarted as a rolling update does it.
    async fn restart(&mut self) -> Result<(), Failure> {
        self.stage.pause(self.length / 8).await?;
        // The kubelet's signal and the EndpointSlice's change race in a cluster, and so they do here.
        self.stage.signal(RESTARTED, Signal::TERM);
        self.stage.list(RESTARTED, Presence::Terminating).await?;
        self.screen.say("digits-v1-a: SIGTERM; it finishes what it has");
        self.stage.gone(RESTARTED).await?;
        self.stage.list(RESTARTED, Presence::Absent).await?;
        self.stage.pause(RESCHEDULE).await?;
        self.stage.bring_back(RESTARTED).await?;
        self.findings.replicas_restarted += 1;
        self.screen.say("digits-v1-a is back");
        Ok(())
    }

    /// The other replica of version 1 dies without a word, and all certificates are exchanged.
    async fn kill(&mut self) -> Result<(), Failure> {
        self.stage.pause(self.length / 8).await?;
        self.stage.signal(KILLED, Signal::KILL);
        // No await lies between: nothing can be counted before this note.
        self.load.killing();
        self.screen.say("digits-v1-b: SIGKILL; nobody tells the mesh");
        self.stage.gone(KILLED).await?;
        self.findings.replicas_killed += 1;
        self.stage.pause(NOTICE).await?;
        self.stage.list(KILLED, Presence::Absent).await?;
        self.screen.say("digits-v1-b is taken off the EndpointSlice, 2 s late as in a cluster");
        let renewed = self.stage.renew().await?;
        self.screen.say(&format!("{renewed} sidecars exchanged their certificates on request"));
        self.stage.pause(RESCHEDULE).await?;
        self.stage.bring_back(KILLED).await?;
        self.screen.say("digits-v1-b is back");
        Ok(())
    }

    /// Asks control how much of a phase's traffic went over mutual TLS.
    async fn mutual_tls(&mut self, lasted: Duration) -> Result<(), Failure> {
        let window = lasted.clamp(WINDOWS.0, WINDOWS.1).as_millis();
        let stat: Stat = self.stage.control.get(&format!("/stat?window={window}ms")).await?;
        let service = format!("{NAMESPACE}/{SERVICE}");
        for row in stat.rows.iter().filter(|row| row.direction == "outbound" && row.service == service) {
            self.findings.mutual_tls.add(row.requests, row.mtls);
        }
        Ok(())
    }
}
