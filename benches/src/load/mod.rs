//! `penstock-bench load`: sends requests over a fixed set of connections and measures, in a process of its own
//! so that it can be pinned.
//!
//! In: an address, how to speak to it and what for, for how long, and the processes to watch. Out: one [`Measured`] as JSON on
//! standard output. CPU and memory of the watched processes are read here, at the very moments when the measured
//! window opens and closes. Failed requests are counted, not fatal; a run in which nothing succeeds is.

pub(crate) mod h1;
pub(crate) mod h2;
mod idle;
pub(crate) mod pace;
mod tally;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::bed::{LOAD_CORE, PROXY_CORE};
use crate::certificates::{self, Alpn};
use crate::{tokens, usage};
use pace::Schedule;
use tally::Tally;

/// After a connection failed, before the next: a refused port must not become a busy loop.
const AFTER_ERROR: Duration = Duration::from_millis(10);

/// The share of the tokens that were due without which gaps say nothing.
const MOST: f64 = 0.9;

/// The HTTP version that a connection speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Protocol {
    /// HTTP/1.1, one request at a time to a connection.
    H1,
    /// HTTP/2, by prior knowledge in plaintext and by ALPN in TLS.
    H2,
}

impl Protocol {
    /// As on the command line.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Self::H1 => "h1",
            Self::H2 => "h2",
        }
    }

    /// As TLS negotiates it.
    pub(crate) fn alpn(self) -> Alpn {
        match self {
            Self::H1 => Alpn::H1,
            Self::H2 => Alpn::H2,
        }
    }
}

/// What connections are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Purpose {
    /// Requests, one after the other.
    Requests,
    /// One request each; the next goes over a new one.
    Handshakes,
    /// One request each, and then nothing: what is measured is the memory that they take.
    Idle,
    /// Streams of tokens.
    Tokens,
}

impl Purpose {
    /// As on the command line.
    pub(crate) fn flag(self) -> &'static str {
        match self {
            Self::Requests => "requests",
            Self::Handshakes => "handshakes",
            Self::Idle => "idle",
            Self::Tokens => "tokens",
        }
    }

    /// The HTTP version that it is measured with, if not both.
    fn speaks(self) -> Option<Protocol> {
        match self {
            Self::Requests => None,
            Self::Handshakes | Self::Idle => Some(Protocol::H1),
            Self::Tokens => Some(Protocol::H2),
        }
    }
}

/// Arguments of `penstock-bench load`.
#[derive(Args, Clone, Debug)]
pub(crate) struct LoadArgs {
    /// Where to send
    #[arg(long)]
    address: SocketAddr,
    #[arg(long, value_enum, default_value = "h1")]
    protocol: Protocol,
    /// What connections are for
    #[arg(long, value_enum, default_value = "requests")]
    purpose: Purpose,
    #[arg(long, default_value_t = 64)]
    connections: usize,
    /// Requests in flight on one HTTP/2 connection
    #[arg(long, default_value_t = 4)]
    streams: usize,
    /// Bytes of request body; 0 means GET
    #[arg(long, default_value_t = 0)]
    body: usize,
    /// Send the bytes of this file, an HTTP/1.1 request with its head and body
    #[arg(long, value_name = "FILE", conflicts_with = "body")]
    request: Option<PathBuf>,
    /// Requests a second, sent when due whether or not the answers keep up; 0 means as fast as answered
    #[arg(long, default_value_t = 0)]
    rate: u32,
    /// Seconds before the measured window
    #[arg(long, default_value_t = 1.0)]
    warm_up: f64,
    /// Seconds of the measured window
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Speak TLS 1.3 with the certificate of the client in this folder (one that the bed made)
    #[arg(long, value_name = "DIR")]
    tls: Option<PathBuf>,
    /// Report CPU and memory of this process and its descendants
    #[arg(long, value_name = "PID")]
    watch: Vec<u32>,
    /// A process that shares the load core (the upstream), to tell how full that core is
    #[arg(long, value_name = "PID")]
    companion: Vec<u32>,
}

/// What one run measured.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Length of the window.
    pub(crate) seconds: f64,
    /// Requests answered with 200, or tokens that arrived, in the window.
    pub(crate) requests: u64,
    /// Failures in the window.
    pub(crate) errors: u64,
    /// The first failure, if there was any, even before the window.
    pub(crate) first_error: Option<String>,
    /// Bytes of request bodies.
    pub(crate) bytes: u64,
    /// Median latency; of an open loop, from the moment the request was due; of a token, from the moment it was sent.
    pub(crate) p50_us: f64,
    /// 99th percentile.
    pub(crate) p99_us: f64,
    /// 99.9th percentile.
    pub(crate) p999_us: f64,
    /// CPU seconds of the watched processes.
    pub(crate) cpu_s: f64,
    /// Resident memory of the watched processes as the window closes, MiB.
    pub(crate) rss: f64,
    /// Their peaks since they began, MiB.
    pub(crate) rss_peak: f64,
    /// From the start of the process to ready, where that is what was measured.
    #[serde(default)]
    pub(crate) ready_ms: f64,
    /// Memory of the watched processes for each idle connection.
    #[serde(default)]
    pub(crate) kib_per_conn: f64,
    /// By how much the way stretched the gaps between tokens, 99th percentile.
    #[serde(default)]
    pub(crate) gap_whole_p99_us: f64,
    /// The same less what it is without a proxy; the bed knows it, not the load.
    #[serde(default)]
    pub(crate) gap_p99_us: f64,
    /// CPU seconds of this process and its companions.
    pub(crate) load_cpu_s: f64,
    /// CPU seconds that anyone spent on the two cores.
    pub(crate) cores_busy_s: f64,
}

/// Runs the load and prints what it measured.
pub(crate) async fn run(args: LoadArgs) -> Result<()> {
    let measured = LocalSet::new().run_until(measure(args)).await?;
    println!("{}", serde_json::to_string(&measured)?);
    Ok(())
}

async fn measure(args: LoadArgs) -> Result<Measured> {
    ensure!(
        args.protocol == Protocol::H1 || (args.body == 0 && args.request.is_none()),
        "bodies are sent over h1 only, --protocol is h2"
    );
    ensure!(
        args.protocol == Protocol::H1 || args.rate == 0,
        "the open loop speaks h1 only, --protocol is h2"
    );
    if let Some(speaks) = args.purpose.speaks() {
        ensure!(
            args.protocol == speaks && args.rate == 0,
            "--purpose {} is measured with --protocol {} and without --rate",
            args.purpose.flag(),
            speaks.flag()
        );
    }
    if args.purpose == Purpose::Idle {
        return idle::measure(&args, &Target::new(&args)?).await;
    }
    let tally = Rc::new(Tally::new()?);
    let schedule = Rc::new(Schedule::default());
    let target = Rc::new(Target::new(&args)?);

    let mut tasks = JoinSet::new();
    for _ in 0..args.connections {
        tasks.spawn_local(keep_going(target.clone(), schedule.clone(), tally.clone()));
    }
    if args.rate > 0 {
        let (schedule, tally) = (schedule.clone(), tally.clone());
        tasks.spawn_local(async move {
            if let Err(error) = schedule.keep(args.rate).await {
                tally.failed(|| format!("the kernel's timer: {error}"));
            }
        });
    }

    tokio::time::sleep(Duration::from_secs_f64(args.warm_up)).await;
    let before = Reading::take(&args)?;
    tally.measure(true);
    tokio::time::sleep(Duration::from_secs_f64(args.seconds)).await;
    // What is due and was never sent has waited, too.
    schedule.waiting().into_iter().for_each(|due| tally.lost(due));
    tally.measure(false);
    let after = Reading::take(&args)?;
    tasks.abort_all();

    let (errors, first_error) = tally.errors();
    if tally.requests() == 0 {
        let why = first_error.unwrap_or_else(|| "no answer came in time".to_owned());
        bail!("not one request to {} was answered with 200 in {} s: {why}", args.address, args.seconds);
    }
    if args.purpose == Purpose::Tokens {
        let due = (args.connections * args.streams) as f64 * args.seconds / tokens::PACE.as_secs_f64();
        let came = tally.requests() as f64;
        ensure!(came >= due * MOST, "{came} of {due:.0} tokens came while they were measured");
    }
    Ok(Measured {
        requests: tally.requests(),
        errors,
        first_error,
        bytes: tally.bytes(),
        p50_us: tally.quantile_us(0.5),
        p99_us: tally.quantile_us(0.99),
        p999_us: tally.quantile_us(0.999),
        gap_whole_p99_us: tally.stretch_us(0.99),
        ..after.since(&before)
    })
}

/// What was used up to a moment.
struct Reading {
    at: Instant,
    watched: f64,
    memory: usage::Memory,
    load: f64,
    cores: f64,
}

impl Reading {
    fn take(args: &LoadArgs) -> Result<Self> {
        let watched = args.watch.iter().flat_map(|pid| usage::tree(*pid)).collect();
        let load = args.companion.iter().copied().chain([std::process::id()]).collect();
        Ok(Self {
            at: Instant::now(),
            watched: usage::cpu_seconds(&watched)?,
            memory: usage::memory(&watched)?,
            load: usage::cpu_seconds(&load)?,
            cores: usage::cores_busy(&[PROXY_CORE, LOAD_CORE])?,
        })
    }

    /// What was used since another reading, and the memory now.
    fn since(&self, before: &Self) -> Measured {
        Measured {
            seconds: (self.at - before.at).as_secs_f64(),
            cpu_s: self.watched - before.watched,
            rss: self.memory.now,
            rss_peak: self.memory.peak,
            load_cpu_s: self.load - before.load,
            cores_busy_s: self.cores - before.cores,
            ..Measured::default()
        }
    }
}

/// Where and how requests are sent.
struct Target {
    address: SocketAddr,
    protocol: Protocol,
    purpose: Purpose,
    streams: usize,
    open: bool,
    request: h1::Request,
    tls: Option<TlsConnector>,
}

impl Target {
    fn new(args: &LoadArgs) -> Result<Self> {
        let tls = match &args.tls {
            Some(dir) => Some(certificates::connector(dir, Some("client"), args.protocol.alpn())?),
            None => None,
        };
        let request = match &args.request {
            Some(file) => {
                h1::Request::of_bytes(std::fs::read(file).with_context(|| format!("{}", file.display()))?)
            }
            None => h1::Request::new("/", args.body),
        };
        Ok(Self {
            address: args.address,
            protocol: args.protocol,
            purpose: args.purpose,
            streams: args.streams,
            open: args.rate > 0,
            request,
            tls,
        })
    }

    /// One connection, or one after the other, from the first byte to the end, which is always an error.
    async fn connection(&self, schedule: &Schedule, tally: &Tally) -> io::Result<Infallible> {
        if self.purpose == Purpose::Handshakes {
            return self.one_after_the_other(tally).await;
        }
        match &self.tls {
            None => self.speak(connect(self.address).await?, false, schedule, tally).await,
            Some(tls) => self.speak(secure(self.address, tls).await?, true, schedule, tally).await,
        }
    }

    /// A connection for each request.
    async fn one_after_the_other(&self, tally: &Tally) -> io::Result<Infallible> {
        loop {
            let began = Instant::now();
            let status = match &self.tls {
                None => self.once(connect(self.address).await?).await?,
                Some(tls) => self.once(secure(self.address, tls).await?).await?,
            };
            tally.answered(began, status, self.request.body());
        }
    }

    /// One request and its status, and the goodbye that TLS asks for.
    async fn once<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: S) -> io::Result<u16> {
        let mut connection = h1::Connection::new(stream);
        let status = connection.exchange(&self.request).await?.status;
        connection.into_stream().shutdown().await?;
        Ok(status)
    }

    async fn speak<S>(
        &self,
        stream: S,
        secure: bool,
        schedule: &Schedule,
        tally: &Tally,
    ) -> io::Result<Infallible>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        match self.protocol {
            Protocol::H2 if self.purpose == Purpose::Tokens => {
                h2::Connection::new(stream, secure).token_streams(self.streams, secure, tally).await
            }
            Protocol::H2 => h2::Connection::new(stream, secure).closed_loop(self.streams, tally).await,
            Protocol::H1 if self.open => {
                h1::Connection::new(stream).open_loop(&self.request, schedule, tally).await
            }
            Protocol::H1 => h1::Connection::new(stream).closed_loop(&self.request, tally).await,
        }
    }
}

/// Connects anew whenever a connection ends.
async fn keep_going(target: Rc<Target>, schedule: Rc<Schedule>, tally: Rc<Tally>) {
    loop {
        let Err(error) = target.connection(&schedule, &tally).await;
        tally.failed(|| error.to_string());
        tokio::time::sleep(AFTER_ERROR).await;
    }
}

/// A plain connection.
pub(crate) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// A connection in TLS to a server that proves to be `localhost`.
pub(crate) async fn secure(address: SocketAddr, tls: &TlsConnector) -> io::Result<TlsStream<TcpStream>> {
    encrypt(connect(address).await?, tls).await
}

async fn encrypt(stream: TcpStream, tls: &TlsConnector) -> io::Result<TlsStream<TcpStream>> {
    let name = rustls::pki_types::ServerName::try_from("localhost").map_err(io::Error::other)?;
    tls.connect(name, stream).await
}

/// Reads what `penstock-bench load` printed.
pub(crate) fn read(output: &str) -> Result<Measured> {
    serde_json::from_str(output.trim()).with_context(|| format!("the load generator printed {output:?}"))
}
