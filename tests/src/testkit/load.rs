//! Constant load: clients that ask again and again over kept connections, and count what they are answered.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::namespace::Namespace;
use super::wire::{Message, Wire};

/// Failures that are told in words; more are only counted.
const TOLD: usize = 10;

/// What was answered so far.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Requests that are over.
    pub requests: u64,
    /// Those without a 200.
    pub failed: u64,
    /// The first failures in words.
    pub failures: Vec<String>,
    /// How often each body came: the names of the replicas.
    pub by: BTreeMap<String, u64>,
    /// Why requests failed: the proxy's reason, a status without one, or the kind of an error of the connection.
    pub reasons: BTreeMap<String, u64>,
}

impl Tally {
    /// The share of one replica among the answers since `before`.
    pub fn share_since(&self, before: &Self, name: &str) -> f64 {
        let count = |tally: &Self| tally.by.get(name).copied().unwrap_or(0);
        let answered = |tally: &Self| tally.by.values().sum::<u64>();
        (count(self) - count(before)) as f64 / (answered(self) - answered(before)).max(1) as f64
    }

    /// Panics unless every request was answered with 200.
    pub fn has_no_failure(&self) {
        assert_eq!(self.failed, 0, "of {} requests: {:#?}", self.requests, self.failures);
        assert!(self.requests > 0, "nothing was asked");
    }
}

/// Running clients.
#[derive(Debug)]
pub struct Load {
    tally: Arc<Mutex<Tally>>,
    stop: watch::Sender<bool>,
    clients: JoinSet<()>,
}

impl Load {
    /// Starts `clients` that each ask for `/` of `host` and pause for `pause` after each answer.
    pub fn start(proxy: SocketAddr, host: &str, clients: usize, pause: Duration) -> Self {
        Self::from(Whence::Here(proxy), "GET", host, clients, pause)
    }

    /// The same from a machine, where a connection may fail, too, and by any method.
    pub fn on(machine: &Namespace, to: SocketAddr, method: &str, clients: usize, pause: Duration) -> Self {
        Self::from(Whence::Machine(Arc::new(machine.share()), to), method, "web", clients, pause)
    }

    fn from(whence: Whence, method: &str, host: &str, clients: usize, pause: Duration) -> Self {
        let (stop, stopped) = watch::channel(false);
        let tally = Arc::new(Mutex::new(Tally::default()));
        let request: Arc<str> =
            format!("{method} / HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n").into();
        let mut set = JoinSet::new();
        for _ in 0..clients {
            set.spawn(client(whence.clone(), request.clone(), tally.clone(), stopped.clone(), pause));
        }
        Self { tally, stop, clients: set }
    }

    /// What was answered so far.
    pub fn so_far(&self) -> Tally {
        self.tally.lock().unwrap().clone()
    }

    /// Waits until `count` more requests are over.
    pub async fn more(&self, count: u64) {
        let target = self.so_far().requests + count;
        super::wait_until(&format!("{count} more requests are over"), super::PATIENCE * 2, async || {
            self.so_far().requests >= target
        })
        .await;
    }

    /// Ends the clients after their current request.
    pub async fn finish(mut self) -> Tally {
        self.stop.send_replace(true);
        while self.clients.join_next().await.is_some() {}
        self.so_far()
    }
}

/// Where clients connect from, and to.
#[derive(Clone, Debug)]
enum Whence {
    Here(SocketAddr),
    Machine(Arc<Namespace>, SocketAddr),
}

impl Whence {
    async fn connect(&self) -> std::io::Result<Wire> {
        match self {
            Self::Here(to) => Ok(Wire::connect(*to).await),
            Self::Machine(machine, to) => machine.connect(*to).map(Wire::new),
        }
    }
}

async fn client(
    whence: Whence,
    request: Arc<str>,
    tally: Arc<Mutex<Tally>>,
    stopped: watch::Receiver<bool>,
    pause: Duration,
) {
    let mut connection: Option<Wire> = None;
    while !*stopped.borrow() {
        let answer = async {
            let wire = match &mut connection {
                Some(wire) => wire,
                None => connection.insert(whence.connect().await?),
            };
            wire.ask(request.as_bytes()).await
        };
        let answer = answer.await;
        if answer.is_err() {
            connection = None;
        }
        count(&mut tally.lock().unwrap(), answer);
        tokio::time::sleep(pause).await;
    }
}

fn count(tally: &mut Tally, answer: std::io::Result<Message>) {
    tally.requests += 1;
    let (why, told) = match answer {
        Ok(answer) if answer.status() == 200 => {
            *tally.by.entry(answer.text()).or_default() += 1;
            return;
        }
        Ok(answer) => {
            let why = answer.reason().map_or_else(|| answer.status().to_string(), str::to_owned);
            (why, format!("{}: {}", answer.head.first, answer.text()))
        }
        Err(error) => (format!("{:?}", error.kind()), error.to_string()),
    };
    tally.failed += 1;
    *tally.reasons.entry(why).or_default() += 1;
    if tally.failures.len() < TOLD {
        tally.failures.push(told);
    }
}
