//! The access log: one JSON object a line on standard output.
//!
//! The request path puts a [`Line`] into a bounded queue and goes on; a thread turns lines into JSON and writes them.
//! When the reader of standard output is slow, lines are dropped and counted. What a client sends can break no line:
//! it is escaped as JSON.

use std::io::Write;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use super::{Details, End, Labels, direction_word, metric};

/// Lines that may wait: about two megabytes, and a tenth of a second at the rates that a pod sees.
const QUEUE: usize = 8192;
/// Written at once, so that a burst costs few system calls.
const BUFFER: usize = 64 << 10;

/// A request that is over.
#[derive(Debug)]
pub struct Line {
    /// When it began.
    pub at: SystemTime,
    /// What it counted for.
    pub labels: Labels,
    /// How it ended.
    pub end: End,
    /// What else is known.
    pub details: Option<Details>,
}

enum Message {
    Line(Box<Line>),
    Flush(SyncSender<()>),
}

/// The way to the writing thread.
#[derive(Debug)]
pub struct Writer {
    queue: SyncSender<Message>,
}

impl Writer {
    /// Starts the thread. It ends with the writer.
    pub fn start(output: impl Write + Send + 'static) -> std::io::Result<Self> {
        Self::with_queue(output, QUEUE)
    }

    fn with_queue(output: impl Write + Send + 'static, size: usize) -> std::io::Result<Self> {
        metrics::counter!(metric::LOG_DROPPED.name).increment(0);
        let (queue, lines) = sync_channel(size);
        std::thread::Builder::new().name("access-log".into()).spawn(move || write_all(&lines, output))?;
        Ok(Self { queue })
    }

    /// Queues a line, or drops and counts it.
    pub fn offer(&self, line: Line) {
        if self.queue.try_send(Message::Line(Box::new(line))).is_err() {
            metrics::counter!(metric::LOG_DROPPED.name).increment(1);
        }
    }

    /// Waits until everything that was offered before is written.
    pub fn flush(&self, limit: Duration) {
        let (done, wait) = sync_channel(1);
        match self.queue.try_send(Message::Flush(done)) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            // Full: the reader of standard output is stuck, and so would be the flush.
            Err(TrySendError::Full(_)) => return,
        }
        // Neither a timeout nor a thread that is gone leaves anything to do.
        let _ = wait.recv_timeout(limit);
    }
}

fn write_all(lines: &Receiver<Message>, mut output: impl Write) {
    let mut buffer = Vec::with_capacity(BUFFER);
    while let Ok(first) = lines.recv() {
        let mut waiting = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                Message::Line(line) => format(&line, &mut buffer),
                Message::Flush(done) => waiting.push(done),
            }
            next = if buffer.len() < BUFFER { lines.try_recv().ok() } else { None };
        }
        // Standard output that is closed leaves nobody to tell.
        let _ = output.write_all(&buffer).and_then(|()| output.flush());
        buffer.clear();
        for done in waiting {
            let _ = done.send(());
        }
    }
}

/// The fields of a line, in the order in which they are read.
#[derive(Serialize)]
struct Fields<'a> {
    ts: String,
    direction: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    client: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    server: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    method: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    authority: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    path: &'a str,
    protocol: &'static str,
    status: u16,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    flags: String,
    route: &'a str,
    service: &'a str,
    backend: &'a str,
    endpoint: &'a str,
    tries: u32,
    mtls: bool,
    request_bytes: u64,
    response_bytes: u64,
    headers_us: u64,
    total_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    trace: Option<String>,
}

/// Appends a line of JSON.
fn format(line: &Line, buffer: &mut Vec<u8>) {
    let Line { at, labels, end, details } = line;
    let details = details.as_ref();
    let fields = Fields {
        ts: humantime::format_rfc3339_micros(*at).to_string(),
        direction: direction_word(labels.direction),
        client: details.and_then(|d| d.client.as_ref()).map_or("", |id| id.as_str()),
        server: details.and_then(|d| d.server.as_ref()).map_or("", |id| id.as_str()),
        method: details.and_then(|d| d.method.as_ref()).map_or("", |method| method.as_str()),
        authority: details.and_then(|d| d.authority.as_ref()).map_or("", |authority| authority.as_str()),
        path: details.and_then(|d| d.path.as_ref()).map_or("", |path| path.path()),
        protocol: details.map_or("", |d| protocol_word(d.version)),
        status: end.status,
        reason: end.reason.map_or("", |reason| reason.as_str()),
        flags: flags(end, details),
        route: &labels.route,
        service: labels.service.as_str(),
        backend: labels.backend.as_str(),
        endpoint: &labels.endpoint,
        tries: end.tries,
        mtls: end.mtls,
        request_bytes: end.request_bytes,
        response_bytes: end.response_bytes,
        headers_us: micros(end.headers),
        total_us: micros(end.total),
        trace: details.and_then(|d| d.trace.as_ref()).map(|span| format!("{:032x}", span.trace)),
    };
    // Writing to memory cannot fail, and the fields have no keys that JSON lacks.
    if serde_json::to_writer(&mut *buffer, &fields).is_ok() {
        buffer.push(b'\n');
    }
}

/// The protocol as people write it.
pub fn protocol_word(version: Option<http::Version>) -> &'static str {
    match version {
        None => "TCP",
        Some(http::Version::HTTP_10) => "HTTP/1.0",
        Some(http::Version::HTTP_11) => "HTTP/1.1",
        Some(http::Version::HTTP_2) => "HTTP/2",
        Some(_) => "HTTP",
    }
}

/// The response flags: the reason's, and what the details add.
pub fn flags(end: &End, details: Option<&Details>) -> String {
    let of_reason = end.reason.map_or("", |reason| reason.flag());
    let more = details.map_or(["", ""], |details| [details.flags, details.verdict]);
    let said: Vec<&str> = [of_reason, more[0], more[1]].into_iter().filter(|flag| !flag.is_empty()).collect();
    said.join(",")
}

pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::UNIX_EPOCH;

    use penstock_api::Reason;
    use penstock_api::v1::Direction;

    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn line(details: Option<Details>) -> Line {
        Line {
            at: UNIX_EPOCH + Duration::from_micros(1_700_000_000_000_001),
            labels: Labels {
                direction: Direction::Inbound,
                service: "a/digits".parse().unwrap(),
                backend: "a/digits".parse().unwrap(),
                endpoint: "a/pod".into(),
                route: "a/digits#0".into(),
            },
            end: End {
                status: 503,
                reason: Some(Reason::NoEndpoint),
                failed: true,
                mtls: true,
                tries: 1,
                headers: Duration::from_micros(1500),
                total: Duration::from_micros(1600),
                request_bytes: 3,
                response_bytes: 4,
            },
            details,
        }
    }

    fn details() -> Details {
        Details {
            at: UNIX_EPOCH,
            method: Some("PO'ST".parse().unwrap()),
            authority: Some("digits.a".parse().unwrap()),
            path: Some("/v2/models/x\"y?secret=1".parse().unwrap()),
            version: Some(http::Version::HTTP_2),
            client: Some("spiffe://cluster.local/ns/a/sa/b".parse().unwrap()),
            server: None,
            trace: None,
            executed: None,
            flags: "URX",
            verdict: "would-deny",
            decision: None,
        }
    }

    #[test]
    fn a_line_is_one_json_object_whatever_the_client_sent() {
        let memory = Memory::default();
        let writer = Writer::start(memory.clone()).unwrap();
        writer.offer(line(Some(details())));
        writer.offer(line(None));
        writer.flush(Duration::from_secs(5));
        let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["ts"], "2023-11-14T22:13:20.000001Z");
        assert_eq!(lines[0]["path"], "/v2/models/x\"y", "escaped, and without its query");
        assert_eq!(lines[0]["flags"], "UH,URX,would-deny");
        assert_eq!(lines[0]["reason"], "no-endpoint");
        assert_eq!(lines[0]["headers_us"], 1500);
        assert_eq!(lines[1]["method"], serde_json::Value::Null);
        assert_eq!(lines[1]["flags"], "UH");
    }

    /// Blocks until it is let go.
    struct Stuck(Receiver<()>);

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_reader_never_holds_a_request_up() {
        let (go, wait) = sync_channel(1);
        let writer = Writer::with_queue(Stuck(wait), 4).unwrap();
        for _ in 0..1000 {
            writer.offer(line(None));
        }
        writer.flush(Duration::from_secs(5));
        drop(go);
    }
}
