//! The load: requests are sent when they are due, whether or not earlier ones were answered, and timed from that moment, so that
//! nobody is spared what waits behind a stall (no coordinated omission).
//!
//! In: the arrivals of a run and the addresses of the clients' proxies. Out: of each request how long its first byte and its end took,
//! or why it failed. Connections are kept and used again; a request that finds none idle opens one. Tokio's timer counts
//! milliseconds: a request may be sent up to one late, and the latency says so.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::workload::Arrival;

/// How a streamed answer ends.
const STREAM_END: &[u8] = b"data: [DONE]\n\n";

/// What became of a request.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// When it was due, from the beginning of the run.
    pub(crate) due: Duration,
    /// From then to the first byte of the answer's body.
    pub(crate) first: Duration,
    /// From then to its end, or to the end of all patience.
    pub(crate) took: Duration,
    /// Why it failed.
    pub(crate) error: Option<String>,
}

/// Where and how requests are sent.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// The proxy of each client; one for all, or one each.
    pub(crate) fronts: Vec<SocketAddr>,
    /// The `Host` header.
    pub(crate) host: String,
    /// Where requests are posted.
    pub(crate) path: &'static str,
    /// Whether answers are streams of events, which must come to their end.
    pub(crate) streamed: bool,
}

type Sender = SendRequest<Full<Bytes>>;

struct Client {
    target: Target,
    /// Of each front, those that are idle; the one that was used last is taken first.
    idle: Vec<RefCell<Vec<Sender>>>,
}

/// Sends all of it, and waits for the last answers until `patience` after the last request.
pub(crate) async fn run(
    target: &Target,
    arrivals: &[Arrival],
    began: Instant,
    patience: Duration,
) -> Vec<Outcome> {
    let idle = target.fronts.iter().map(|_| RefCell::default()).collect();
    let client = Rc::new(Client { target: target.clone(), idle });
    let last = arrivals.last().map_or(Duration::ZERO, |arrival| arrival.at);
    let end = began + last + patience;
    let mut requests = JoinSet::new();
    let mut outcomes = Vec::with_capacity(arrivals.len());
    for arrival in arrivals.iter().cloned() {
        let due = began + arrival.at;
        sleep_until(due).await;
        requests.spawn_local(Rc::clone(&client).one(arrival, due, end));
        while let Some(done) = requests.try_join_next() {
            outcomes.extend(done);
        }
    }
    while let Some(done) = requests.join_next().await {
        outcomes.extend(done);
    }
    outcomes
}

impl Client {
    async fn one(self: Rc<Self>, arrival: Arrival, due: Instant, end: Instant) -> Outcome {
        let exchange = self.exchange(arrival.client % self.target.fronts.len(), arrival.body);
        let done = timeout_at(end, exchange).await;
        let took = due.elapsed();
        let (first, error) = match done {
            Ok(Ok(first)) => (first - due, None),
            Ok(Err(error)) => (took, Some(format!("{error:#}"))),
            Err(_) => (took, Some("no answer by the end of the run".to_owned())),
        };
        Outcome { due: arrival.at, first, took, error }
    }

    /// Returns when the answer's first byte came.
    async fn exchange(&self, front: usize, body: Bytes) -> Result<Instant> {
        let mut sender = self.sender(front).await?;
        let request = Request::builder()
            .method(Method::POST)
            .uri(self.target.path)
            .header(HOST, &self.target.host)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        let mut body = answer.into_body();
        let (mut first, mut tail) = (None, Bytes::new());
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                first.get_or_insert_with(Instant::now);
                tail = data;
            }
        }
        if status != 200 {
            bail!("answered with {status}: {}", String::from_utf8_lossy(&tail[..tail.len().min(200)]));
        }
        if self.target.streamed && !tail.ends_with(STREAM_END) {
            bail!("the stream of events broke off");
        }
        self.idle[front].borrow_mut().push(sender);
        first.context("the answer has no body")
    }

    async fn sender(&self, front: usize) -> Result<Sender> {
        loop {
            let idle = self.idle[front].borrow_mut().pop();
            let Some(mut sender) = idle else { break };
            // One that its proxy has closed meanwhile is dropped.
            if sender.ready().await.is_ok() {
                return Ok(sender);
            }
        }
        connect(self.target.fronts[front]).await
    }
}

async fn connect(address: SocketAddr) -> Result<Sender> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("{address}"))?;
    stream.set_nodelay(true)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    Ok(sender)
}

/// One request over a connection of its own; its status and its body.
pub(crate) async fn ask(
    method: Method,
    address: SocketAddr,
    host: &str,
    path: &str,
    body: Bytes,
    limit: Duration,
) -> Result<(u16, Bytes)> {
    let exchange = async {
        let mut sender = connect(address).await?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, host)
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))?;
        let answer = sender.send_request(request).await?;
        let status = answer.status().as_u16();
        Ok((status, answer.into_body().collect().await?.to_bytes()))
    };
    timeout(limit, exchange).await.with_context(|| format!("{address} did not answer within {limit:?}"))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::task::LocalSet;

    /// Answers each request on a connection after the time that its body says, in milliseconds.
    async fn server(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::task::spawn_local(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::task::spawn_local(async move {
                    let mut request = vec![0; 4096];
                    while let Ok(read @ 1..) = stream.read(&mut request).await {
                        let text = String::from_utf8_lossy(&request[..read]).into_owned();
                        let ms =
                            text.split("\r\n\r\n").nth(1).and_then(|body| body.parse().ok()).unwrap_or(0);
                        tokio::time::sleep(Duration::from_millis(ms)).await;
                        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", answer.len());
                        stream.write_all((head + answer).as_bytes()).await.unwrap();
                    }
                });
            }
        });
        address
    }

    fn arrivals(times: &[(u64, u64)]) -> Vec<Arrival> {
        let arrival = |(at, ms): &(u64, u64)| Arrival {
            at: Duration::from_millis(*at),
            client: 0,
            body: ms.to_string().into(),
        };
        times.iter().map(arrival).collect()
    }

    fn target(front: SocketAddr, streamed: bool) -> Target {
        Target { fronts: vec![front], host: "sim".to_owned(), path: "/", streamed }
    }

    #[tokio::test]
    async fn a_slow_answer_holds_up_no_other_request() {
        let work = async {
            let target = target(server("ok").await, false);
            let began = Instant::now();
            let outcomes =
                run(&target, &arrivals(&[(0, 300), (20, 0), (40, 0)]), began, Duration::from_secs(5)).await;
            assert!(outcomes.iter().all(|outcome| outcome.error.is_none()), "{outcomes:?}");
            let took = |due| {
                let due = Duration::from_millis(due);
                outcomes.iter().find(|outcome| outcome.due == due).unwrap().took
            };
            assert!(took(0) >= Duration::from_millis(300));
            assert!(took(20) < Duration::from_millis(150) && took(40) < Duration::from_millis(150));
        };
        LocalSet::new().run_until(work).await;
    }

    #[tokio::test]
    async fn what_is_not_answered_in_time_or_breaks_off_is_a_failure_that_took_its_time() {
        let work = async {
            let patience = Duration::from_millis(100);
            let late =
                run(&target(server("ok").await, false), &arrivals(&[(0, 5000)]), Instant::now(), patience)
                    .await;
            assert!(late[0].error.as_ref().unwrap().contains("no answer") && late[0].took >= patience);
            let broken = run(
                &target(server("data: x\n\n").await, true),
                &arrivals(&[(0, 0)]),
                Instant::now(),
                patience,
            )
            .await;
            assert!(broken[0].error.as_ref().unwrap().contains("broke off"));
        };
        LocalSet::new().run_until(work).await;
    }
}
