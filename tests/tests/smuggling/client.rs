//! A client that sends exactly the bytes of a case, cut where the case says, and keeps all that comes back.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use penstock_tests::testkit::wire::Wire;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::backends::Saw;
use crate::corpus::Case;

/// How long anything may take that normally takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);
/// After so much silence nothing more comes to a request that was not sent whole.
const SILENCE: Duration = Duration::from_millis(200);
/// Between two segments, so that they are read apart.
const PAUSE: Duration = Duration::from_millis(1);

/// All that came back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told {
    pub(crate) bytes: Vec<u8>,
    /// The connection was closed.
    pub(crate) closed: bool,
}

impl Told {
    /// The status of each answer, with what the server says that it saw.
    pub(crate) fn answers(&self) -> Result<Vec<(u16, Option<Saw>)>, String> {
        let (mut rest, mut answers) = (self.bytes.as_slice(), Vec::new());
        while !rest.is_empty() {
            let end = rest.windows(4).position(|four| four == b"\r\n\r\n").ok_or("half a head came back")?;
            let head = String::from_utf8_lossy(&rest[..end]).into_owned();
            rest = &rest[end + 4..];
            let status = head.strip_prefix("HTTP/1.").and_then(|line| line.get(2..5)?.parse::<u16>().ok());
            let status = status.ok_or_else(|| format!("{head:?} is no answer"))?;
            let field = |name: &str| {
                let line =
                    head.lines().find_map(|line| line.split_once(": ").filter(|(known, _)| *known == name));
                line.map(|(_, value)| value)
            };
            if (100..200).contains(&status) {
                continue;
            }
            let saw = field("x-saw").and_then(Saw::read);
            let is_head = saw.as_ref().is_some_and(|saw| saw.method == "HEAD");
            let length = if is_head {
                0
            } else {
                field("content-length").and_then(|length| length.parse().ok()).unwrap_or(0)
            };
            if field("transfer-encoding").is_some() {
                return Err(format!("{head:?} has a framing that no server of this test uses"));
            }
            if rest.len() < length {
                // An answer of the proxy's own that was cut off by its own reset.
                return if status == 200 { Err("half a body came back".to_owned()) } else { Ok(answers) };
            }
            rest = &rest[length..];
            answers.push((status, saw));
        }
        Ok(answers)
    }

    fn answered(&self) -> usize {
        self.bytes.windows(7).filter(|seven| seven == b"x-saw: ").count()
    }
}

/// Sends a case, and keeps what comes back until the connection is closed, or nothing more can come.
pub(crate) async fn converse(front: SocketAddr, case: &Case) -> Told {
    let stream = timeout(PATIENCE, TcpStream::connect(front)).await.unwrap().unwrap();
    stream.set_nodelay(true).unwrap();
    let (mut read, mut write) = stream.into_split();
    let written = AtomicBool::new(false);
    let writes = async {
        for (number, segment) in case.segments().enumerate() {
            if number > 0 {
                tokio::time::sleep(PAUSE).await;
            }
            // The proxy may have closed before it has heard all.
            if write.write_all(segment).await.is_err() {
                break;
            }
        }
        written.store(true, Ordering::Relaxed);
    };
    let reads = async {
        let mut told = Told::default();
        let mut waited = Duration::ZERO;
        loop {
            match timeout(SILENCE, read.read_buf(&mut told.bytes)).await {
                Ok(Ok(0) | Err(_)) => {
                    told.closed = true;
                    return told;
                }
                Ok(Ok(_)) => waited = Duration::ZERO,
                Err(_) => waited += SILENCE,
            }
            let over = case.is_unfinished()
                && written.load(Ordering::Relaxed)
                && told.answered() >= case.answers_due()
                && !waited.is_zero();
            if over || waited >= PATIENCE {
                return told;
            }
        }
    };
    tokio::join!(writes, reads).1
}

/// Whether another client's request, sent next, is answered with what it asked for and nothing else.
pub(crate) async fn innocent(front: SocketAddr, target: &str) -> Result<(), String> {
    let mut client = Wire::connect(front).await;
    let request = format!("GET {target} HTTP/1.1\r\nhost: innocent.test\r\nconnection: close\r\n\r\n");
    client.send(request).await.map_err(|error| error.to_string())?;
    let told = Told { bytes: client.rest().await, closed: true };
    match told.answers()?.as_slice() {
        [(200, Some(saw))] if saw.target == target && saw.host == "innocent.test" => Ok(()),
        _ => Err(format!("was answered {:?}", String::from_utf8_lossy(&told.bytes))),
    }
}
