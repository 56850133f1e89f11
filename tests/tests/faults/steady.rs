//! A steady load: a request each so many milliseconds, whether the others were answered or not, as from many users who know nothing of each
//! other. What hangs does not make the load any less.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use penstock_tests::testkit::namespace::Namespace;
use penstock_tests::testkit::wire::Wire;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// A request that is over.
#[derive(Clone, Debug)]
struct Asked {
    begun: Instant,
    over: Instant,
    /// Who answered, or why nobody did.
    answer: Result<String, Failed>,
}

/// Why nobody answered.
#[derive(Clone, Debug)]
struct Failed {
    /// The proxy's reason, a status without one, or the kind of an error of the connection.
    reason: String,
    /// What was said of it.
    said: String,
}

/// What became of requests.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Requests that are over.
    pub(crate) requests: usize,
    /// How many failed, by reason.
    pub(crate) reasons: BTreeMap<String, usize>,
    /// What was said of those.
    pub(crate) said: BTreeSet<String>,
    /// The longest, answered or not.
    pub(crate) longest: Duration,
    /// How long after the fault began a request was answered that began after it.
    pub(crate) first_answer: Option<Duration>,
    /// How long after the fault began the last request failed.
    pub(crate) last_failure: Option<Duration>,
}

impl Seen {
    /// How many failed.
    pub(crate) fn failed(&self) -> usize {
        self.reasons.values().sum()
    }

    /// Panics if any failed.
    pub(crate) fn has_no_failure(&self, who: &str) {
        assert!(self.requests > 0, "{who}: nothing was asked");
        assert_eq!(self.failed(), 0, "{who}: {self:#?}");
    }

    /// Panics if more failed than `most`, or for another reason than these.
    pub(crate) fn fails_at_most(&self, most: usize, reasons: &[&str], who: &str) {
        assert!(self.failed() <= most, "{who}: more than {most} failed: {self:#?}");
        let other = self.reasons.keys().find(|reason| !reasons.contains(&reason.as_str()));
        assert_eq!(other, None, "{who}: {self:#?}");
    }
}

/// A load that goes on.
#[derive(Debug)]
pub(crate) struct Steady {
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Steady {
    /// Starts asking `/` of a Service, by its name and address, from a machine.
    pub(crate) fn start(
        from: &Namespace,
        to: SocketAddr,
        method: &'static str,
        service: &str,
        every: Duration,
    ) -> Self {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (stop, mut stopped) = watch::channel(false);
        let client = Arc::new(Client {
            from: from.share(),
            to,
            request: format!("{method} / HTTP/1.1\r\nhost: {service}\r\ncontent-length: 0\r\n\r\n"),
            idle: Mutex::default(),
            asked: Arc::clone(&asked),
        });
        let task = tokio::spawn(async move {
            let mut requests = JoinSet::new();
            let mut ticks = tokio::time::interval(every);
            loop {
                tokio::select! {
                    _ = ticks.tick() => requests.spawn(Arc::clone(&client).ask()),
                    _ = stopped.wait_for(|stop| *stop) => break,
                };
                while requests.try_join_next().is_some() {}
            }
            while requests.join_next().await.is_some() {}
        });
        Self { asked, stop, task }
    }

    /// What became of the requests that began at `since` or later; times count from `fault`.
    pub(crate) fn seen(&self, since: Option<Instant>, fault: Instant) -> Seen {
        let asked = self.asked.lock().unwrap();
        let mut seen = Seen::default();
        for one in asked.iter().filter(|one| since.is_none_or(|since| one.begun >= since)) {
            seen.requests += 1;
            seen.longest = seen.longest.max(one.over - one.begun);
            let after = one.over.saturating_duration_since(fault);
            match &one.answer {
                Ok(_) if one.begun >= fault => {
                    seen.first_answer = Some(seen.first_answer.map_or(after, |first| first.min(after)));
                }
                Ok(_) => {}
                Err(Failed { reason, said }) => {
                    *seen.reasons.entry(reason.clone()).or_default() += 1;
                    seen.said.insert(said.clone());
                    seen.last_failure = seen.last_failure.max(Some(after));
                }
            }
        }
        seen
    }

    /// Whether somebody has answered a request that began at `since` or later.
    pub(crate) fn is_answered_by(&self, name: &str, since: Instant) -> bool {
        let asked = self.asked.lock().unwrap();
        asked.iter().rev().any(|one| one.begun >= since && one.answer.as_deref().is_ok_and(|who| who == name))
    }

    /// Stops asking, and waits for what is under way.
    pub(crate) async fn stop(&mut self) {
        self.stop.send_replace(true);
        (&mut self.task).await.unwrap();
    }
}

/// Who asks, over as many connections as it takes; each is kept for the next.
struct Client {
    from: Namespace,
    to: SocketAddr,
    request: String,
    idle: Mutex<Vec<Wire>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Client {
    async fn ask(self: Arc<Self>) {
        let begun = Instant::now();
        let kept = self.idle.lock().unwrap().pop();
        let answer = async {
            let mut wire = match kept {
                Some(wire) => wire,
                None => self.from.connect(self.to).map(Wire::new)?,
            };
            let answer = wire.ask(&self.request).await?;
            self.idle.lock().unwrap().push(wire);
            Ok::<_, std::io::Error>(answer)
        };
        let answer = match answer.await {
            Ok(answer) if answer.status() == 200 => Ok(answer.text()),
            Ok(answer) => {
                let reason = answer.reason().map_or_else(|| answer.status().to_string(), str::to_owned);
                Err(Failed { reason, said: answer.text() })
            }
            Err(error) => Err(Failed { reason: format!("{:?}", error.kind()), said: error.to_string() }),
        };
        self.asked.lock().unwrap().push(Asked { begun, over: Instant::now(), answer });
    }
}
