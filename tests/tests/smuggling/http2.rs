//! HTTP/2 in front of servers that speak HTTP/1.1: what a frame can say and a line cannot, and lengths that lie.
//!
//! Frames are written by hand, since no client of HTTP/2 sends such. What came of a request is told by the servers and by the
//! proxy's log.

use std::net::SocketAddr;
use std::time::Duration;

use penstock_tests::testkit::PATIENCE;
use penstock_tests::testkit::proxy::Static;
use penstock_tests::testkit::wire::Wire;
use tokio::time::timeout;

use crate::anywhere;
use crate::backends::{Backend, Saw, sha256};
use crate::client::innocent;
use crate::corpus::{Fate, mark};
use crate::verdict::{Account, FORBIDDEN, access_log, by_case};
use Fate::{MayPass, Passes, Refused, Unfinished};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const SMUGGLED: &str = "GET /@mark/smuggled HTTP/1.1\r\nhost: @mark.test\r\n\r\n";

/// A request as fields and a body; `@mark` is filled in.
#[derive(Clone)]
struct Asked {
    name: String,
    fields: Vec<(String, String)>,
    body: String,
    trailers: Vec<(String, String)>,
    fate: Fate,
    method: String,
    target: String,
    host: String,
}

impl Asked {
    /// A good POST, whose body is a request.
    fn new(name: &str, fate: Fate) -> Self {
        let fields = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "@mark.test"),
            (":path", "/@mark/probe"),
        ];
        Self {
            name: name.to_owned(),
            fields: fields.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            body: SMUGGLED.to_owned(),
            trailers: Vec::new(),
            fate,
            method: "POST".to_owned(),
            target: "/@mark/probe".to_owned(),
            host: "@mark.test".to_owned(),
        }
    }

    fn field(mut self, name: &str, value: &str) -> Self {
        self.fields.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Another value, or none, for a field that is there.
    fn instead(mut self, name: &str, value: Option<&str>) -> Self {
        self.fields.retain(|(known, _)| known != name || value.is_some());
        for (_, known) in self.fields.iter_mut().filter(|(known, _)| known == name) {
            value.unwrap_or_default().clone_into(known);
        }
        self
    }

    fn trailer(mut self, name: &str, value: &str) -> Self {
        self.trailers.push((name.to_owned(), value.to_owned()));
        self
    }

    fn filled(mut self, number: usize) -> Self {
        let mark = mark(number);
        let fill = |text: &mut String| {
            *text = text
                .replace("@length", &self.body.replace("@mark", &mark).len().to_string())
                .replace("@mark", &mark)
        };
        self.fields.iter_mut().chain(&mut self.trailers).for_each(|(name, value)| {
            fill(name);
            fill(value);
        });
        fill(&mut self.target);
        fill(&mut self.host);
        self.body = self.body.replace("@mark", &mark);
        self
    }

    fn frames(&self) -> Vec<u8> {
        let end = if self.body.is_empty() && self.trailers.is_empty() { END_STREAM } else { 0 };
        let mut bytes = [
            PREFACE,
            &frame(SETTINGS, 0, 0, &[]),
            &frame(HEADERS, END_HEADERS | end, 1, &block(&self.fields)),
        ]
        .concat();
        if !self.body.is_empty() {
            let end = if self.trailers.is_empty() { END_STREAM } else { 0 };
            bytes.extend(frame(DATA, end, 1, self.body.as_bytes()));
        }
        if !self.trailers.is_empty() {
            bytes.extend(frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&self.trailers)));
        }
        bytes
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = &(payload.len() as u32).to_be_bytes()[1..];
    [length, &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Fields as literals that nobody keeps (RFC 7541, 6.2.2).
fn block(fields: &[(String, String)]) -> Vec<u8> {
    let text = |text: &str| {
        assert!(text.len() < 127, "{text:?} needs a longer length");
        [&[text.len() as u8], text.as_bytes()].concat()
    };
    fields.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

fn requests() -> Vec<Asked> {
    let asked = Asked::new;
    let mut all = vec![
        asked("plain", Passes),
        asked("length", Passes).field("content-length", "@length"),
        asked("length-short", Unfinished).field("content-length", "5"),
        asked("length-long", Unfinished).field("content-length", "999"),
        asked("length-zero", Unfinished).field("content-length", "0"),
        asked("length-twice", MayPass).field("content-length", "@length").field("content-length", "@length"),
        asked("lengths-differ", Unfinished).field("content-length", "@length").field("content-length", "0"),
        asked("lengths-differ-zero-first", Unfinished)
            .field("content-length", "0")
            .field("content-length", "@length"),
        asked("length-list", Unfinished).field("content-length", "@length, 0"),
        asked("length-plus", Unfinished).field("content-length", "+@length"),
        asked("length-minus", Unfinished).field("content-length", "-1"),
        asked("length-empty", Unfinished).field("content-length", ""),
        asked("length-words", Unfinished).field("content-length", "x"),
        asked("length-too-large", Unfinished).field("content-length", "18446744073709551658"),
        asked("coding", Refused).field("transfer-encoding", "chunked"),
        asked("coding-and-length", Refused)
            .field("content-length", "@length")
            .field("transfer-encoding", "chunked"),
        asked("coding-identity", Refused).field("transfer-encoding", "identity"),
        asked("connection", Refused).field("connection", "close"),
        asked("connection-nominates", Refused)
            .field("connection", "content-length")
            .field("content-length", "@length"),
        asked("keep-alive", Refused).field("keep-alive", "1"),
        asked("proxy-connection", Refused).field("proxy-connection", "close"),
        asked("upgrade", Refused).field("upgrade", "h2c"),
        asked("te", Refused).field("te", "gzip"),
        asked("te-trailers", Passes).field("te", "trailers"),
        asked("upper-case", Refused).field("X-Upper", "1"),
        asked("upper-case-length", Refused).field("Content-Length", "0"),
        asked("upper-case-coding", Refused).field("Transfer-Encoding", "chunked"),
        asked("underscore", Passes).field("content_length", "0"),
        asked("empty-name", Refused).field("", "x"),
        asked("value-lines", Refused).field("x", &format!("y\r\n\r\n{SMUGGLED}")),
        asked("value-field", Refused).field("x", "y\r\ntransfer-encoding: chunked"),
        asked("value-line-feed", Refused).field("x", "y\nz: 1"),
        asked("value-carriage-return", Refused).field("x", "y\rz: 1"),
        asked("value-nul", Refused).field("x", "y\0"),
        asked("value-space", MayPass).field("x", " y "),
        asked("authority-and-host", MayPass).field("host", "other.test"),
        asked("authority-and-two-hosts", Refused).field("host", "@mark.test").field("host", "other.test"),
        asked("host-alone", MayPass).instead(":authority", None).field("host", "@mark.test"),
        asked("no-host", Refused).instead(":authority", None),
        asked("no-path", Refused).instead(":path", None),
        asked("no-method", Refused).instead(":method", None),
        asked("no-scheme", Refused).instead(":scheme", None),
        asked("late-pseudo-field", Refused).field("x", "y").field(":path", "/@mark/smuggled"),
        asked("two-paths", Refused).field(":path", "/@mark/smuggled"),
        asked("two-methods", Refused).field(":method", "GET"),
        asked("two-authorities", Refused).field(":authority", "other.test"),
        asked("unknown-pseudo-field", Refused).field(":x", "y"),
        asked("answers-pseudo-field", Refused).field(":status", "200"),
        asked("protocol-without-connect", Refused).field(":protocol", "websocket"),
        asked("trailer", MayPass).trailer("x-sum", "1"),
        asked("trailer-length", MayPass).trailer("content-length", "5"),
        asked("trailer-host", MayPass).trailer("host", "other.test"),
        asked("trailer-authorization", MayPass).trailer("authorization", "x"),
        asked("trailer-announced", MayPass)
            .field("trailer", "x-sum, content-length, host")
            .trailer("x-sum", "1")
            .trailer("host", "b"),
        asked("trailer-coding", Unfinished).trailer("transfer-encoding", "chunked"),
        asked("trailer-connection", Unfinished).trailer("connection", "close"),
        // h2 leaves it out.
        asked("trailer-pseudo-field", MayPass).trailer(":path", "/@mark/smuggled"),
        asked("trailer-upper-case", Unfinished).trailer("X-Sum", "1"),
        asked("trailer-lines", Unfinished).trailer("x", "y\r\nz: 1"),
    ];
    // It is no token, but `http` takes it for one over HTTP/2; it does not go on.
    all.push(asked("name-with-22", Passes).field("x\"y", "z"));
    for byte in "\0\t\n\r (),/:;<=>?@[\\]{}\u{7f}".chars() {
        all.push(asked(&format!("name-with-{:02x}", byte as u32), Refused).field(&format!("x{byte}y"), "z"));
    }
    let more = format!("x HTTP/1.1\r\n\r\n{SMUGGLED}");
    for (name, path) in [
        ("empty", ""),
        ("space", "/@mark/probe x"),
        ("lines", more.as_str()),
        ("absolute", "http://other.test/@mark/smuggled"),
        ("relative", "@mark/probe"),
        ("asterisk", "*"),
        ("authority", "other.test:80"),
        ("nul", "/@mark/probe\0"),
        ("carriage-return", "/@mark/probe\r"),
    ] {
        all.push(asked(&format!("path-{name}"), Refused).instead(":path", Some(path)));
    }
    for (name, authority) in [
        ("empty", ""),
        ("userinfo", "user@@mark.test"),
        ("path", "@mark.test/x"),
        ("space", "@mark.test x"),
        ("lines", "@mark.test\r\nx: y"),
        ("port", "@mark.test:x"),
        ("scheme", "http://@mark.test"),
        ("nul", "@mark.test\0"),
    ] {
        all.push(asked(&format!("authority-{name}"), Refused).instead(":authority", Some(authority)));
    }
    let more = format!("{SMUGGLED}GET");
    for (name, method) in
        [("lines", more.as_str()), ("space", "GET /"), ("empty", ""), ("nul", "GET\0"), ("colon", "GET:")]
    {
        all.push(asked(&format!("method-{name}"), Refused).instead(":method", Some(method)));
    }
    for (name, scheme) in [("lines", "http\r\nx: y"), ("url", "http://other.test/?"), ("space", "ht tp")] {
        all.push(asked(&format!("scheme-{name}"), Refused).instead(":scheme", Some(scheme)));
    }
    for method in ["GET", "HEAD", "DELETE", "PUT"] {
        let mut asked = asked(&format!("{method}-with-body"), Passes).instead(":method", Some(method));
        method.clone_into(&mut asked.method);
        all.push(asked);
    }
    all.into_iter().enumerate().map(|(number, asked)| asked.filled(number)).collect()
}

/// Sends one request over a connection of its own, and waits until it is answered, refused, or the connection ends.
async fn ask(front: SocketAddr, asked: &Asked) {
    let mut wire = Wire::connect(front).await;
    // The proxy may close before it has heard all.
    let _ = wire.send(asked.frames()).await;
    let ends = async {
        while let Ok(head) = wire.bytes(9).await {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let (kind, flags) = (head[3], head[4]);
            if wire.bytes(length).await.is_err() || matches!(kind, RESET | GOAWAY) {
                return;
            }
            if kind == SETTINGS && flags & 1 == 0 && wire.send(frame(SETTINGS, 1, 0, &[])).await.is_err() {
                return;
            }
            if matches!(kind, DATA | HEADERS) && flags & END_STREAM > 0 {
                return;
            }
        }
    };
    timeout(Duration::from_secs(20), ends).await.unwrap_or_else(|_| panic!("{} is not answered", asked.name));
}

/// What is wrong about a request.
fn judge(asked: &Asked, account: &Account) -> Vec<String> {
    let mut wrong = Vec::new();
    let whole = |seen: &&crate::backends::Seen| seen.status == 200;
    let taken: Vec<Saw> = account.seen.iter().filter(whole).filter_map(|seen| Saw::read(&seen.saw)).collect();
    let exactly = Saw {
        method: asked.method.clone(),
        host: asked.host.clone(),
        target: asked.target.clone(),
        length: asked.body.len(),
        digest: sha256(asked.body.as_bytes()),
    };
    let came = taken == [exactly];
    match asked.fate {
        Passes if !came => wrong.push("it did not arrive as it is".to_owned()),
        MayPass if !came && !taken.is_empty() => wrong.push("it arrived as something else".to_owned()),
        Refused if !account.seen.is_empty() => wrong.push("it reached the server".to_owned()),
        Unfinished if !taken.is_empty() => wrong.push("the server took it for whole".to_owned()),
        Passes | MayPass | Refused | Unfinished => {}
    }
    let passed = account.lines.iter().filter(|line| line.status == 200 && line.reason.is_empty()).count();
    if passed != taken.len() {
        wrong.push("the proxy's log and the server's differ".to_owned());
    }
    for name in
        account.seen.iter().flat_map(|seen| seen.trailers.split(' ')).filter(|name| FORBIDDEN.contains(name))
    {
        wrong.push(format!("{name} arrived in trailers"));
    }
    wrong
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_http_2_can_say_and_http_1_cannot_is_no_request_for_nginx_and_for_node() {
    let requests = requests();
    let mut complaints = String::new();
    for backend in [Backend::nginx(anywhere()).await, Backend::node(anywhere()).await] {
        let name = backend.name;
        let proxy = Static::new("proxy").listener("http", None, "server");
        let mut proxy = proxy.upstream("server", &[backend.address], "http1", None).start().await;
        for (number, asked) in requests.iter().enumerate() {
            ask(proxy.front(), asked).await;
            if let Err(what) = innocent(proxy.front(), &format!("/innocent/{number}")).await {
                complaints +=
                    &format!("{}, {name}: another client's request, sent next, {what}\n", asked.name);
            }
        }
        proxy.process.terminate();
        proxy.process.ended(PATIENCE).await;
        let server = backend.address;
        let mut said = by_case(access_log(&proxy.process.said()), backend.end().await, server);
        for stray in said.strays {
            complaints += &format!("{name}, of no request: {stray:?}\n");
        }
        for (number, asked) in requests.iter().enumerate() {
            let account = said.accounts.remove(&number).unwrap_or_default();
            for what in judge(asked, &account) {
                complaints += &format!(
                    "{}, {name}: {what}\n  sent  {:?}\n  proxy {:?}\n  {name} {:?}\n",
                    asked.name, asked.fields, account.lines, account.seen
                );
            }
        }
    }
    println!("{} requests of HTTP/2", requests.len());
    assert!(complaints.is_empty(), "{complaints}");
}
