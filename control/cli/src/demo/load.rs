//! The client application: sends digits, or photographs, through its sidecar at a steady rate and checks every answer.
//!
//! Real requests of the Open Inference Protocol with binary tensors, over plain HTTP/1.1 keep-alive connections to
//! the sidecar's outbound listener, as an application in a pod would send them. Each exchange counts towards the
//! segment (a phase, or the ramp between two) in which it was sent.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::net::SocketAddrV4;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http_body_util::Full;
use hyper::Request;
use penstock_api::Reason;
use penstock_api::latency::Histogram;
use penstock_api::names::header;
use penstock_inference::oip::rest::HEADER_LENGTH;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::digits::{self, Answer, Form, Question};
use crate::connection::{Connection, body};

/// Above the timeout that the mesh is told (10 s), so that it is the mesh that gives up first and says why.
const PATIENCE: Duration = Duration::from_secs(15);
/// After a connection that could not be made, so that a dead sidecar is not hammered.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(50);
/// How far the schedule may lag before it is moved: what the machine cannot send is not sent later in a burst.
const SLACK: Duration = Duration::from_millis(100);
/// What the live table looks back on.
const WINDOW: Duration = Duration::from_secs(2);
/// How long after a SIGKILL a request that was in flight then can still fail of it.
const AFTERMATH: Duration = Duration::from_secs(5);

/// The model versions that the demo knows.
pub(crate) const VERSIONS: [u8; 2] = [1, 2];

/// Results of one version.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct VersionTally {
    /// Answers.
    pub(crate) answers: u64,
    /// Answers that name the right class.
    pub(crate) correct: u64,
}

impl VersionTally {
    /// Right answers of all answers; `None` without answers.
    pub(crate) fn accuracy(&self) -> Option<f64> {
        (self.answers > 0).then(|| self.correct as f64 / self.answers as f64)
    }
}

/// Results of one segment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Tally {
    /// Requests that got an answer or an error.
    pub(crate) requests: u64,
    /// Requests that failed, without those counted apart.
    pub(crate) failed: u64,
    /// Requests that failed because they were in flight on the replica that was killed, and could not be retried.
    pub(crate) failed_on_killed_replica: u64,
    /// By version, in the order of [`VERSIONS`].
    pub(crate) versions: [VersionTally; 2],
    /// Time to the whole answer.
    pub(crate) latency: Histogram,
}

impl Tally {
    /// The share of version 2 among the answers; `None` without answers.
    pub(crate) fn share_v2(&self) -> Option<f64> {
        let answers = self.versions[0].answers + self.versions[1].answers;
        (answers > 0).then(|| self.versions[1].answers as f64 / answers as f64)
    }

    /// Adds another tally.
    pub(crate) fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.failed += other.failed;
        self.failed_on_killed_replica += other.failed_on_killed_replica;
        for (mine, theirs) in self.versions.iter_mut().zip(&other.versions) {
            mine.answers += theirs.answers;
            mine.correct += theirs.correct;
        }
        self.latency.merge(&other.latency);
    }
}

/// One version in the last two seconds.
#[derive(Clone, Debug, Default)]
pub(crate) struct Recent {
    /// Answers a second.
    pub(crate) rate: f64,
    /// Time to the whole answer.
    pub(crate) latency: Histogram,
}

/// Why a request failed: the reason of the mesh, or what the client saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The sidecar answered by itself.
    Mesh(Reason),
    /// Anything else, in words.
    Other(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mesh(reason) => reason.fmt(f),
            Self::Other(text) => f.write_str(text),
        }
    }
}

impl Trouble {
    /// Whether the endpoint broke off after it had the request.
    fn is_broken_off(&self) -> bool {
        matches!(self, Self::Mesh(Reason::UpstreamReset | Reason::UpstreamIncomplete))
    }
}

/// Everything that was measured.
#[derive(Debug, Default)]
struct Record {
    segments: Vec<Tally>,
    reasons: BTreeMap<String, u64>,
    recent: VecDeque<(Instant, usize, Duration)>,
    killed_at: Option<Instant>,
}

impl Record {
    fn add(&mut self, segment: usize, sent: Instant, now: Instant, outcome: Result<(Answer, bool), Trouble>) {
        let in_flight_at_kill = self.killed_at.is_some_and(|at| sent <= at && now <= at + AFTERMATH);
        let Some(tally) = self.segments.get_mut(segment) else { return };
        tally.requests += 1;
        let trouble = match outcome {
            Ok((answer, correct)) => match VERSIONS.iter().position(|version| *version == answer.version) {
                Some(version) => {
                    tally.versions[version].answers += 1;
                    tally.versions[version].correct += u64::from(correct);
                    tally.latency.record(now - sent);
                    self.recent.push_back((now, version, now - sent));
                    self.forget(now);
                    return;
                }
                None => Trouble::Other(format!("version {} answered, which does not exist", answer.version)),
            },
            Err(trouble) => trouble,
        };
        if in_flight_at_kill && trouble.is_broken_off() {
            tally.failed_on_killed_replica += 1;
        } else {
            tally.failed += 1;
        }
        *self.reasons.entry(trouble.to_string()).or_default() += 1;
    }

    fn forget(&mut self, now: Instant) {
        while self.recent.front().is_some_and(|(at, ..)| now - *at > WINDOW) {
            self.recent.pop_front();
        }
    }
}

/// When the next request is due.
#[derive(Debug)]
struct Pace {
    next: Instant,
    interval: Duration,
}

impl Pace {
    /// The time of the next request, given the time now.
    fn take(&mut self, now: Instant) -> Instant {
        if self.next + SLACK < now {
            self.next = now;
        }
        let due = self.next;
        self.next += self.interval;
        due
    }
}

#[derive(Debug)]
struct Shared {
    questions: Vec<Question>,
    asked: AtomicU64,
    stop: AtomicBool,
    pace: Mutex<Pace>,
    record: Mutex<Record>,
}

/// The client. Dropped, it stops at once.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Arc<Shared>,
    connections: JoinSet<()>,
}

/// What was counted so far.
#[derive(Clone, Debug)]
pub(crate) struct Counts(Arc<Shared>);

impl Load {
    /// Starts `connections` connections to the sidecar at `outbound`, together `rate` requests a second, counted
    /// towards a first segment.
    pub(crate) fn start(
        outbound: SocketAddrV4,
        host: &'static str,
        connections: usize,
        rate: u32,
        questions: Vec<Question>,
    ) -> Self {
        let shared = Arc::new(Shared {
            questions,
            asked: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            pace: Mutex::new(Pace { next: Instant::now(), interval: interval(rate) }),
            record: Mutex::new(Record { segments: vec![Tally::default()], ..Record::default() }),
        });
        let mut tasks = JoinSet::new();
        for _ in 0..connections {
            tasks.spawn(ask(shared.clone(), Connection::to(outbound.to_string()), host));
        }
        Self { shared, connections: tasks }
    }

    /// Counts what is sent from now on towards a new segment, and returns its number.
    pub(crate) fn begin_segment(&self) -> usize {
        let segments = &mut lock(&self.shared.record).segments;
        segments.push(Tally::default());
        segments.len() - 1
    }

    /// Notes that a replica is being killed now.
    pub(crate) fn killing(&self) {
        lock(&self.shared.record).killed_at = Some(Instant::now());
    }

    /// What is counted.
    pub(crate) fn counts(&self) -> Counts {
        Counts(self.shared.clone())
    }

    /// Stops sending and waits for the answers that are still to come.
    pub(crate) async fn finish(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        while self.connections.join_next().await.is_some() {}
    }
}

impl Counts {
    /// One segment so far.
    pub(crate) fn segment(&self, number: usize) -> Tally {
        lock(&self.0.record).segments.get(number).cloned().unwrap_or_default()
    }

    /// The segment that is being counted.
    pub(crate) fn current(&self) -> Tally {
        lock(&self.0.record).segments.last().cloned().unwrap_or_default()
    }

    /// All segments together.
    pub(crate) fn total(&self) -> Tally {
        let mut total = Tally::default();
        lock(&self.0.record).segments.iter().for_each(|tally| total.add(tally));
        total
    }

    /// How often each reason occurred.
    pub(crate) fn reasons(&self) -> BTreeMap<String, u64> {
        lock(&self.0.record).reasons.clone()
    }

    /// The last two seconds, by version.
    pub(crate) fn recent(&self) -> [Recent; 2] {
        let mut record = lock(&self.0.record);
        record.forget(Instant::now());
        let mut versions = [Recent::default(), Recent::default()];
        for (_, version, latency) in &record.recent {
            versions[*version].latency.record(*latency);
        }
        versions.map(|mut version| {
            version.rate = version.latency.total() as f64 / WINDOW.as_secs_f64();
            version
        })
    }
}

fn interval(rate: u32) -> Duration {
    Duration::from_secs(1) / rate.max(1)
}

/// A panic while the lock was held cannot leave a count half-made, so the data is good.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One connection: waits for its turn, asks, checks, counts.
async fn ask(shared: Arc<Shared>, mut connection: Connection, host: &'static str) {
    loop {
        let due = lock(&shared.pace).take(Instant::now());
        sleep_until(due).await;
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let number = shared.asked.fetch_add(1, Ordering::Relaxed) as usize;
        let question = &shared.questions[number % shared.questions.len()];
        let segment = lock(&shared.record).segments.len() - 1;
        let sent = Instant::now();
        let outcome = match timeout(PATIENCE, exchange(&mut connection, host, question)).await {
            Ok(outcome) => outcome.map(|answer| (answer, answer.class == question.class)),
            Err(_) => Err(Trouble::Other(format!("no answer within {} s", PATIENCE.as_secs()))),
        };
        let unreachable = matches!(&outcome, Err(Trouble::Other(_)));
        lock(&shared.record).add(segment, sent, Instant::now(), outcome);
        if unreachable {
            sleep(PAUSE_AFTER_FAILURE).await;
        }
    }
}

/// Asks one question.
pub(crate) async fn exchange(
    connection: &mut Connection,
    host: &str,
    question: &Question,
) -> Result<Answer, Trouble> {
    let other = |text: &dyn std::fmt::Display| Trouble::Other(text.to_string());
    let typed = |kind| Request::post(question.path).header("host", host).header("content-type", kind);
    let tensor = |length: Option<usize>| {
        let request = typed("application/octet-stream");
        length.into_iter().fold(request, |request, length| request.header(&HEADER_LENGTH, length))
    };
    let (request, sent) = match &question.form {
        Form::Tensor { json } => (tensor(*json), question.body.clone()),
        Form::Jpeg => (typed("image/jpeg"), question.body.clone()),
        Form::Own(maker) => {
            let (maker, jpeg) = (maker.clone(), question.body.clone());
            // It takes milliseconds, for which no other connection shall wait.
            let made = tokio::task::spawn_blocking(move || maker.request(&jpeg)).await;
            let (body, length) = made.map_err(|e| other(&e))?.map_err(Trouble::Other)?;
            (tensor(length), body)
        }
    };
    let request = request.body(Full::new(sent)).map_err(|e| other(&e))?;
    let response = connection.send(request).await.map_err(|e| other(&e))?;
    let (status, headers) = (response.status(), response.headers().clone());
    let made_by_mesh = headers.get(header::ERROR).and_then(|word| word.to_str().ok());
    if let Some(reason) = made_by_mesh.and_then(|word| Reason::ALL.iter().find(|r| r.as_str() == word)) {
        let reason = *reason;
        // Read to its end, so that the connection can go on.
        let _ = body(response).await;
        return Err(Trouble::Mesh(reason));
    }
    // The head came and the body did not: the sidecar can only break off, without a word.
    let body = body(response).await.map_err(|_| Trouble::Mesh(Reason::UpstreamIncomplete))?;
    if !status.is_success() {
        return Err(other(&format!("the model server answered {status}")));
    }
    digits::answer(&headers, &body).map_err(Trouble::Other)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OK: Result<(Answer, bool), Trouble> = Ok((Answer { version: 2, class: 7 }, true));

    fn record() -> Record {
        Record { segments: vec![Tally::default()], ..Record::default() }
    }

    #[test]
    fn answers_count_by_version_and_wrong_digits_against_accuracy() {
        let (mut record, sent) = (record(), Instant::now());
        let now = sent + Duration::from_millis(2);
        for _ in 0..3 {
            record.add(0, sent, now, OK);
        }
        record.add(0, sent, now, Ok((Answer { version: 1, class: 3 }, false)));
        let tally = &record.segments[0];
        assert_eq!((tally.requests, tally.failed), (4, 0));
        assert_eq!(tally.share_v2(), Some(0.75));
        assert_eq!(tally.versions[0].accuracy(), Some(0.0));
        assert_eq!(tally.versions[1].accuracy(), Some(1.0));
    }

    #[test]
    fn only_what_was_in_flight_on_the_killed_replica_is_counted_apart() {
        let (mut record, start) = (record(), Instant::now());
        let ms = |ms| start + Duration::from_millis(ms);
        record.killed_at = Some(ms(100));
        let reset = || Err(Trouble::Mesh(Reason::UpstreamReset));
        record.add(0, ms(99), ms(101), reset());
        assert_eq!(record.segments[0].failed_on_killed_replica, 1);
        // Sent after the kill; another reason; long after.
        record.add(0, ms(101), ms(102), reset());
        record.add(0, ms(99), ms(101), Err(Trouble::Mesh(Reason::NoEndpoint)));
        record.add(0, ms(99), ms(9_000), reset());
        assert_eq!(record.segments[0].failed_on_killed_replica, 1);
        assert_eq!(record.segments[0].failed, 3);
        assert_eq!(record.reasons["upstream-reset"], 3);
        assert_eq!(record.reasons["no-endpoint"], 1);
    }

    #[test]
    fn a_version_that_does_not_exist_is_a_failure() {
        let (mut record, now) = (record(), Instant::now());
        record.add(0, now, now, Ok((Answer { version: 3, class: 7 }, true)));
        assert_eq!(record.segments[0].failed, 1);
    }

    #[test]
    fn the_schedule_is_even_and_forgives_what_could_not_be_sent() {
        let start = Instant::now();
        let mut pace = Pace { next: start, interval: interval(1000) };
        let dues: Vec<Duration> = (0..3).map(|_| pace.take(start) - start).collect();
        assert_eq!(dues, [0, 1, 2].map(Duration::from_millis));
        let late = start + Duration::from_secs(1);
        assert_eq!(pace.take(late), late);
        assert_eq!(pace.take(late), late + Duration::from_millis(1));
    }
}
