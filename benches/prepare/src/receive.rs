//! What it costs to receive a tensor into the arena, beside the least that can do it: `receive-plain` and `receive-mtls`.
//!
//! A thread receives bodies of 6 MiB that another sends over loopback, and answers each. What is measured is the CPU time of the thread
//! that receives, in rounds in which the subjects take turns. `bare` is a blocking `read()` into the arena, with TLS the same by rustls'
//! own stream over a buffered socket; `penstock` is the sidecar's gate and hyper, which parse a head, find room and fill it;
//! `hyper` is what was before: hyper reads, and what it read is copied. `memcpy` copies as many bytes from memory to memory.
//! The sidecar does more for each request (it authorizes, batches, counts), which costs the same whatever the size of the body.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::rc::Rc;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use penstock_kernels::arena::{Arena, Kind};
use penstock_proxy::limits;
use penstock_proxy::readahead::ReadAhead;
use penstock_proxy::receive::{Claims, Direct, Gate};
use rustix::time::{ClockId, clock_gettime};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::report::{Row, Summary};

/// The cases.
pub(crate) const NAMES: [&str; 2] = ["receive-plain", "receive-mtls"];

/// A tensor: 32 images of 3 x 128 x 128 in FP32.
const BYTES: usize = 6 << 20;
const ROWS: u32 = 32;
/// As much at once as the sidecar reads ahead of rustls.
const AHEAD: usize = 64 << 10;
/// Bodies of a round.
const BODIES: usize = 48;
const METRIC: (&str, &str) = ("cpu_s_per_gb", "s/GB");

#[derive(Clone, Copy, PartialEq, Eq)]
enum Subject {
    Bare,
    Penstock,
    Hyper,
    Memcpy,
}

impl Subject {
    const ALL: [Self; 4] = [Self::Bare, Self::Penstock, Self::Hyper, Self::Memcpy];

    fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::Penstock => "penstock",
            Self::Hyper => "hyper",
            Self::Memcpy => "memcpy",
        }
    }
}

/// The rows of a case.
pub(crate) fn rows(case: &'static str, runs: usize) -> Vec<Row> {
    let failed = |error: &str| vec![Row::failed(case, "penstock", METRIC, error)];
    match measure(case, runs) {
        Ok(rows) => rows,
        Err(error) => failed(&format!("{error:#}")),
    }
}

fn measure(case: &'static str, runs: usize) -> Result<Vec<Row>> {
    let tls = if case == "receive-mtls" { Some(Tls::new()?) } else { None };
    let arena = Arena::new(Kind::Heap, 64 << 20, 4096)?;
    let mut found: [Vec<f64>; 4] = Default::default();
    for turn in 0..=runs {
        for at in 0..Subject::ALL.len() {
            let index = (at + turn) % Subject::ALL.len();
            let seconds = round(Subject::ALL[index], tls.as_ref(), &arena)?;
            // The first round warms up.
            if turn > 0 {
                found[index].push(seconds / (BODIES * BYTES) as f64 * 1e9);
            }
        }
        eprintln!("{case} round {turn}/{runs}");
    }
    let bare = Summary::of(found[0].clone()).map(|bare| bare.median);
    let mut rows = Vec::new();
    for (subject, found_of) in Subject::ALL.iter().zip(&found) {
        let Some(figures) = Summary::of(found_of.clone()) else { continue };
        rows.push(Row::measured(case, subject.name(), METRIC, &figures).against("bare", bare));
    }
    for (subject, of) in Subject::ALL.iter().zip(&found).skip(1).take(2) {
        // Of one round each, so that what slowed a round down slowed both.
        let ratios = of.iter().zip(&found[0]).map(|(ours, bare)| ours / bare).collect();
        let row = Summary::of(ratios)
            .map(|ratios| Row::measured(case, subject.name(), ("times_bare", "x"), &ratios).named("bare"));
        rows.extend(row);
    }
    Ok(rows)
}

/// CPU seconds of this thread.
fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// CPU seconds of one round.
fn round(subject: Subject, tls: Option<&Tls>, arena: &Arena) -> Result<f64> {
    if subject == Subject::Memcpy {
        return memcpy(arena);
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let client = tls.map(|tls| (Arc::clone(&tls.client), tls.name.clone()));
    let head = if subject == Subject::Bare { Vec::new() } else { head() };
    let sender = thread::spawn(move || -> Result<()> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        match client {
            None => send(stream, &head),
            Some((config, name)) => {
                send(StreamOwned::new(ClientConnection::new(config, name)?, stream), &head)
            }
        }
    });
    let (stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let seconds = match subject {
        Subject::Bare => match tls {
            None => bare(stream, arena)?,
            Some(tls) => {
                let connection = ServerConnection::new(Arc::clone(&tls.server))?;
                bare(StreamOwned::new(connection, Ahead(BufReader::with_capacity(AHEAD, stream))), arena)?
            }
        },
        _ => served(subject, stream, tls, arena)?,
    };
    sender.join().map_err(|_| anyhow!("the sender panicked"))??;
    Ok(seconds)
}

const JSON: &str = r#"{"inputs":[{"name":"images","datatype":"FP32","shape":[32,3,128,128],"parameters":{"binary_data_size":6291456}}]}"#;

fn head() -> Vec<u8> {
    let head = format!(
        "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ninference-header-content-length: {}\r\ncontent-length: {}\r\n\r\n{JSON}",
        JSON.len(),
        JSON.len() + BYTES
    );
    head.into_bytes()
}

/// Sends all bodies, each once the one before has been answered.
fn send(mut to: impl Read + Write, head: &[u8]) -> Result<()> {
    let body: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
    for _ in 0..BODIES {
        to.write_all(head)?;
        to.write_all(&body)?;
        to.flush()?;
        let (mut answer, mut byte) = (Vec::new(), [0]);
        while !answer.ends_with(b"\r\n\r\n") {
            to.read_exact(&mut byte).context("an answer")?;
            answer.push(byte[0]);
        }
    }
    Ok(())
}

/// A buffered socket.
struct Ahead(BufReader<TcpStream>);

impl Read for Ahead {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(out)
    }
}

impl Write for Ahead {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.get_mut().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.get_mut().flush()
    }
}

fn bare(mut from: impl Read + Write, arena: &Arena) -> Result<f64> {
    let mut begin = None;
    for _ in 0..BODIES {
        let run = arena.run(&[BYTES / ROWS as usize], ROWS).context("no room")?;
        let mut rows = run.rows(0, ROWS).context("no rows")?;
        let slot = rows.input(0).context("no input")?;
        // A handshake is nothing that is compared.
        let first = from.read(&mut slot[..1])?;
        begin.get_or_insert_with(cpu);
        from.read_exact(&mut slot[first..])?;
        from.write_all(b"ok\r\n\r\n")?;
        from.flush()?;
        check(slot)?;
    }
    Ok(cpu() - begin.context("no bodies")?)
}

/// A look at what came: it costs nothing, and a subject that drops bytes is found.
fn check(slot: &[u8]) -> Result<()> {
    let right = [0, 1, BYTES / 2, BYTES - 1].iter().all(|at| slot[*at] == (at % 251) as u8);
    ensure!(right, "other bytes came than were sent");
    Ok(())
}

fn memcpy(arena: &Arena) -> Result<f64> {
    let from: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
    let begin = cpu();
    for _ in 0..BODIES {
        let run = arena.run(&[BYTES / ROWS as usize], ROWS).context("no room")?;
        let mut rows = run.rows(0, ROWS).context("no rows")?;
        rows.write(0, 0, &from)?;
    }
    Ok(cpu() - begin)
}

/// By hyper's server, with a gate before it or not.
fn served(subject: Subject, stream: TcpStream, tls: Option<&Tls>, arena: &Arena) -> Result<f64> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let local = tokio::task::LocalSet::new();
    local.block_on(&runtime, async {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::TcpStream::from_std(stream)?;
        match tls {
            None => http(subject, stream, arena).await,
            Some(tls) => {
                let accepting = tokio_rustls::TlsAcceptor::from(Arc::clone(&tls.server));
                http(subject, accepting.accept(ReadAhead::new(stream)).await?, arena).await
            }
        }
    })
}

async fn http<T: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    subject: Subject,
    stream: T,
    arena: &Arena,
) -> Result<f64> {
    let wrong = Rc::new(RefCell::new(None));
    let (told, arena) = (Rc::clone(&wrong), arena.clone());
    let answer = move |claims: Rc<Claims>| {
        service_fn(move |request: Request<Incoming>| {
            let (mut parts, body) = request.into_parts();
            let held = claims.of(&mut parts.headers);
            let (arena, told) = (arena.clone(), Rc::clone(&told));
            async move {
                let received = match held {
                    Ok(Some(direct)) => fill(direct, &arena).await,
                    Ok(None) => copied(body, &arena).await,
                    Err(error) => Err(error.into()),
                };
                *told.borrow_mut() = received.err();
                Ok::<_, std::convert::Infallible>(Response::new(Empty::<Bytes>::new()))
            }
        })
    };
    let begin = cpu();
    let mut server = http1::Builder::new();
    server.half_close(false);
    // Ends when the sender closes, which is as good as an error of its connection.
    let _ = if subject == Subject::Penstock {
        let (gate, claims) = Gate::new(stream, limits::DIRECT);
        server.serve_connection(TokioIo::new(gate), answer(Rc::new(claims))).await
    } else {
        server.serve_connection(TokioIo::new(stream), answer(Rc::new(Claims::none()))).await
    };
    let seconds = cpu() - begin;
    match wrong.take() {
        Some(error) => Err(error),
        None => Ok(seconds),
    }
}

/// As the sidecar does it.
async fn fill(mut body: Direct, arena: &Arena) -> Result<()> {
    let mut json = vec![0; JSON.len()];
    all(&mut body, &mut json).await?;
    let inputs = penstock_inference::oip::rest::expected(&json).context("the JSON")?;
    let run =
        arena.run(&inputs.iter().map(|input| input.row).collect::<Vec<_>>(), ROWS).context("no room")?;
    let mut rows = run.rows(0, ROWS).context("no rows")?;
    let slot = rows.input(0).context("no input")?;
    all(&mut body, slot).await?;
    check(slot)
}

async fn all(body: &mut Direct, out: &mut [u8]) -> Result<()> {
    let mut at = 0;
    while at < out.len() {
        let read = poll_fn(|cx| body.poll_fill(cx, &mut out[at..])).await?;
        ensure!(read > 0, "the body is too short");
        at += read;
    }
    Ok(())
}

/// As the sidecar did it.
async fn copied(mut body: Incoming, arena: &Arena) -> Result<()> {
    let mut pieces = Vec::new();
    while let Some(frame) = body.frame().await {
        pieces.extend(frame?.into_data().ok());
    }
    let whole = penstock_inference::oip::whole(pieces);
    let run = arena.run(&[BYTES / ROWS as usize], ROWS).context("no room")?;
    let mut rows = run.rows(0, ROWS).context("no rows")?;
    rows.write(0, 0, &whole[JSON.len()..])?;
    check(rows.input(0).context("no input")?)
}

/// What both sides of a TLS connection need. The client proves nothing here: what that costs is the handshake's, which is not compared.
struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    name: ServerName<'static>,
}

impl Tls {
    fn new() -> Result<Self> {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
        let certificate = CertificateDer::from(made.cert.der().to_vec());
        let key =
            PrivateKeyDer::try_from(made.signing_key.serialize_der()).map_err(|error| anyhow!(error))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone())?;
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost")?.to_owned();
        Ok(Self { server: Arc::new(server), client: Arc::new(client), name })
    }
}
