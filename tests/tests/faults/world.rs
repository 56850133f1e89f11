//! The mesh that things happen to: `client` asks `web-1` and `web-2`, and as a bystander `web-1` asks `aside`, which nothing of all this
//! concerns.
//!
//! Two Services lead to the same two servers: `reads`, whose retry policy has everything tried again that failed or took too long, is asked
//! with GET, and `writes`, which has none, with POST.

use std::collections::BTreeMap;
use std::time::Duration;

use penstock_api::names::annotation;
use penstock_tests::testkit::mesh::NAMESPACE;
use penstock_tests::testkit::origin::Origin;
use penstock_tests::testkit::pods::{APPLICATION, Pods};
use penstock_tests::testkit::{PATIENCE, wait_until};
use tokio::time::Instant;

use super::steady::{Seen, Steady};
use super::table::{self, Row};

/// Between two requests of one kind: 50 GET and 50 POST each second.
const EVERY: Duration = Duration::from_millis(20);
/// Between two requests of the bystander.
const ASIDE: Duration = Duration::from_millis(50);
/// What an answer takes at the application.
const WORK: Duration = Duration::from_millis(5);
/// How long all is well first.
const BEFORE: Duration = Duration::from_secs(2);
/// How long a fault lasts, unless a test says otherwise.
pub(crate) const FAULT: Duration = Duration::from_secs(5);
/// A fault's last effects are over when of the requests of so long none has failed: longer than one try of either Service takes.
const QUIET: Duration = Duration::from_secs(3);
/// How long nothing may fail any more from then on.
const AFTER: Duration = Duration::from_secs(2);
/// How long it may take until nothing fails any more and both servers answer. The slowest is a connection of which everything was lost
/// for the whole fault: TCP doubles the time between its tries.
const RECOVERY: Duration = Duration::from_secs(20);
/// The longest answer of whom a fault does not concern; on a machine with two cores that runs a dozen programs besides.
const UNDISTURBED: Duration = Duration::from_secs(2);

/// The policies of the two Services.
const READS: [(&str, &str); 2] = [
    (annotation::TIMEOUT, "connect=500ms,per-try=1s,request=5s"),
    (annotation::RETRY, "attempts=2,on=502+503+504"),
];
const WRITES: [(&str, &str); 1] = [(annotation::TIMEOUT, "connect=500ms,per-try=2s,request=5s")];

/// Pods, Services and applications.
pub(crate) struct World {
    /// The applications by their pods.
    pub(crate) applications: BTreeMap<&'static str, Origin>,
    /// The pods. They go after everything that lives in them.
    pub(crate) pods: Pods,
}

impl World {
    /// All of it; `None` where it cannot be. `shape` may change what there is before it starts.
    pub(crate) async fn new(shape: impl FnOnce(Pods) -> Pods) -> Option<Self> {
        let mut pods = Pods::new()?;
        for name in ["client", "web-1", "web-2", "aside"] {
            pods = pods.with(name, &[]);
        }
        for (service, policy) in [("reads", &READS[..]), ("writes", &WRITES)] {
            pods = pods.service(service, "http", &["web-1", "web-2"]);
            for (key, value) in policy {
                pods = pods.annotate(service, key, value);
            }
        }
        let pods = shape(pods.service("aside", "http", &["aside"])).start().await;
        let applications = ["web-1", "web-2", "aside"].map(|name| (name, application(&pods, name)));
        Some(Self { applications: applications.into(), pods })
    }

    /// Begins the load; all is well for a while, and then the fault begins.
    pub(crate) async fn under_load(self) -> Struck {
        let load = |pod: &str, method, service, every| {
            let from = &self.pods.pod(pod).machine.namespace;
            Steady::start(from, self.pods.cluster_ip(service), method, service, every)
        };
        let now = Instant::now();
        let mut struck = Struck {
            get: load("client", "GET", "reads", EVERY),
            post: load("client", "POST", "writes", EVERY),
            aside: load("web-1", "GET", "aside", ASIDE),
            _applications: self.applications,
            memory: 0,
            began: now,
            settled: now,
            back: Duration::ZERO,
            pods: self.pods,
        };
        struck.both_answer(now).await;
        tokio::time::sleep(BEFORE).await;
        for (load, who) in [(&struck.get, "GET"), (&struck.post, "POST"), (&struck.aside, "the bystander")] {
            load.seen(None, now).has_no_failure(&format!("before the fault, {who}"));
        }
        struck.memory = struck.client_memory();
        struck.began = Instant::now();
        struck
    }
}

/// A Service that is made meanwhile.
pub(crate) const LATE: &str = "made-late";

/// A mesh under load, to which something happens.
pub(crate) struct Struck {
    get: Steady,
    post: Steady,
    aside: Steady,
    _applications: BTreeMap<&'static str, Origin>,
    memory: u64,
    began: Instant,
    settled: Instant,
    back: Duration,
    /// The pods. They go after everything that lives in them.
    pub(crate) pods: Pods,
}

/// What was seen of a fault.
pub(crate) struct Outcome {
    /// Of the requests to `reads`.
    pub(crate) get: Seen,
    /// Of those to `writes`.
    pub(crate) post: Seen,
}

impl Outcome {
    /// The longest of both. Which kind of request finds out what is wrong with a server, so that the other goes elsewhere, is chance.
    pub(crate) fn longest(&self) -> Duration {
        self.get.longest.max(self.post.longest)
    }
}

impl Struck {
    async fn both_answer(&self, since: Instant) {
        // A server that has failed gets few requests at first as long as the other one has time.
        wait_until("both servers answer GET and POST", PATIENCE * 2, async || {
            ["web-1", "web-2"]
                .iter()
                .all(|name| [&self.get, &self.post].iter().all(|load| load.is_answered_by(name, since)))
        })
        .await;
    }

    /// How long ago the fault began.
    pub(crate) fn since(&self) -> Duration {
        self.began.elapsed()
    }

    /// Whether a server has answered a request of the last `time`.
    pub(crate) fn is_answered_by(&self, server: &str, time: Duration) -> bool {
        let since = Instant::now().checked_sub(time).unwrap();
        [&self.get, &self.post].iter().any(|load| load.is_answered_by(server, since))
    }

    /// Control takes up what is new, and pushes it.
    pub(crate) async fn control_goes_on(&mut self) {
        let mesh = &mut self.pods.mesh;
        let before = mesh.status().await.snapshot;
        let service = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {LATE}, namespace: {NAMESPACE}}}\nspec:\n  \
             ports:\n  - {{name: main, port: 80, appProtocol: http}}\n"
        );
        mesh.file("late.yaml", &service);
        mesh.write();
        wait_until("control pushes what is new", PATIENCE, async || {
            let status = mesh.status().await;
            status.snapshot != before && status.all_applied()
        })
        .await;
    }

    /// The fault is over: both servers answer again, and after some time nothing fails any more.
    pub(crate) async fn recovers(&mut self) {
        let over = Instant::now();
        self.both_answer(over).await;
        self.back = over.elapsed();
        // From here on nothing that begins may fail; requests of before may still be under way.
        wait_until("nothing fails any more", RECOVERY, async || {
            let since = Instant::now().checked_sub(QUIET).unwrap();
            let quiet = |load: &Steady| load.seen(Some(since), self.began).failed() == 0;
            since >= over && quiet(&self.get) && quiet(&self.post)
        })
        .await;
        self.settled = Instant::now();
        tokio::time::sleep(AFTER).await;
    }

    /// Ends the load, checks what holds for every fault (whom it does not concern has noticed nothing, and what has settled stays so), and
    /// writes the rows of `fault`.
    pub(crate) async fn told(mut self, fault: &'static str) -> Outcome {
        let grown = self.client_memory().saturating_sub(self.memory);
        for load in [&mut self.get, &mut self.post, &mut self.aside] {
            load.stop().await;
        }
        let outcome =
            Outcome { get: self.get.seen(None, self.began), post: self.post.seen(None, self.began) };
        for (method, seen) in [("GET", &outcome.get), ("POST", &outcome.post)] {
            println!("{fault}: {method}: {seen:?}, back after {:?}, {grown} KiB", self.back);
        }
        let aside = self.aside.seen(None, self.began);
        aside.has_no_failure("the bystander");
        assert!(aside.longest < UNDISTURBED, "the bystander was disturbed: {aside:#?}");
        for (load, who) in [(&self.get, "GET"), (&self.post, "POST")] {
            load.seen(Some(self.settled), self.began).has_no_failure(&format!("after the fault, {who}"));
        }
        for (method, seen) in [("GET", &outcome.get), ("POST", &outcome.post)] {
            table::keep(&Row { fault, method, seen, back: self.back, grown });
        }
        outcome
    }

    /// Resident memory of the client's sidecar, KiB.
    fn client_memory(&self) -> u64 {
        self.pods.pod("client").sidecar.as_ref().unwrap().memory_kib()
    }
}

/// Answers with its pod's name, after some work.
fn application(pods: &Pods, name: &'static str) -> Origin {
    let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len());
    Origin::on(pods.pod(name).machine.namespace.listen(APPLICATION), move |mut client| {
        let answer = answer.clone();
        async move {
            while client.request().await.is_ok() {
                tokio::time::sleep(WORK).await;
                if client.send(&answer).await.is_err() {
                    return;
                }
            }
        }
    })
}
