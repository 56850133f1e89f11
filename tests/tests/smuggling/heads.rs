//! Probes of what stands in a head: ends of lines, names, values, versions, targets, hosts, and what a request may become.

use crate::corpus::{Behind, Fate, Probe};
use crate::framing::post;
use Behind::{MayBe, Served, Unread};
use Fate::{MayPass, Passes, Refused, Unfinished};

/// All of them.
pub(crate) fn probes() -> Vec<Probe> {
    [lines(), controls(), names(), versions(), methods(), targets(), hosts(), expectations(), others()]
        .concat()
}

/// A POST with more fields and a body of plain length.
fn with(fields: impl AsRef<[u8]>) -> Vec<u8> {
    let head = b"POST @target HTTP/1.1\r\nhost: @host\r\n@tensors";
    [head, fields.as_ref(), b"content-length: @length\r\n\r\n@body"].concat()
}

fn of(family: &str, table: &[(&str, &str, Fate)], probe: impl Fn(&str) -> Vec<u8>) -> Vec<Probe> {
    let each =
        |(name, text, fate): &(&str, &str, Fate)| Probe::new(format!("{family}-{name}"), probe(text), *fate);
    table.iter().map(each).collect()
}

/// Ends of lines, folds, and what stands before a request.
fn lines() -> Vec<Probe> {
    let table = [
        ("fold", "x: y\r\n z\r\n", Refused),
        ("fold-tab", "x: y\r\n\tz\r\n", Refused),
        ("fold-empty", "x:\r\n z\r\n", Refused),
        ("fold-blank", "x: y\r\n \r\n", Refused),
        ("fold-hides-a-length", "x: y\r\n content-length: 0\r\n", Refused),
        ("fold-line-feed", "x: y\n z\r\n", Refused),
        ("carriage-return", "x: y\rz: 1\r\n", Refused),
        ("carriage-return-line", "x: y\r\r\n", Refused),
        ("carriage-return-alone", "\r", Refused),
        ("line-feed", "x: y\n", MayPass),
        ("no-colon", "x\r\n", Refused),
        ("no-colon-space", "x y\r\n", Refused),
        ("only-space", " \r\n", Refused),
        ("colon", ":\r\n", Refused),
        ("empty-name", ": y\r\n", Refused),
        ("empty-value", "x:\r\n", Passes),
        ("request-line", "GET @smuggled HTTP/1.1\r\n", Refused),
    ];
    let mut probes = of("line", &table, |fields| with(fields));
    let raw = [
        (
            "only-line-feeds",
            "POST @target HTTP/1.1\nhost: @host\n@tensorscontent-length: @length\n\n@body",
            MayPass,
        ),
        (
            "last-line-feed",
            "POST @target HTTP/1.1\r\nhost: @host\r\n@tensorscontent-length: @length\r\n\n@body",
            MayPass,
        ),
        (
            "last-carriage-return",
            "POST @target HTTP/1.1\r\nhost: @host\r\ncontent-length: @length\r\n\r@body",
            Refused,
        ),
        (
            "only-carriage-returns",
            "POST @target HTTP/1.1\rhost: @host\rcontent-length: @length\r\r@body",
            Refused,
        ),
        (
            "empty-line-before",
            "\r\nPOST @target HTTP/1.1\r\nhost: @host\r\n@tensorscontent-length: @length\r\n\r\n@body",
            MayPass,
        ),
        (
            "empty-lines-before",
            "\r\n\r\n\r\nPOST @target HTTP/1.1\r\nhost: @host\r\n@tensorscontent-length: @length\r\n\r\n@body",
            MayPass,
        ),
        (
            "line-feed-before",
            "\nPOST @target HTTP/1.1\r\nhost: @host\r\n@tensorscontent-length: @length\r\n\r\n@body",
            MayPass,
        ),
        (
            "carriage-return-before",
            "\rPOST @target HTTP/1.1\r\nhost: @host\r\ncontent-length: @length\r\n\r\n@body",
            Refused,
        ),
        (
            "space-before",
            " POST @target HTTP/1.1\r\nhost: @host\r\ncontent-length: @length\r\n\r\n@body",
            Refused,
        ),
        (
            "nul-before",
            "\0POST @target HTTP/1.1\r\nhost: @host\r\ncontent-length: @length\r\n\r\n@body",
            Refused,
        ),
        (
            "first-folded",
            "POST @target HTTP/1.1\r\n host: @host\r\ncontent-length: @length\r\n\r\n@body",
            Refused,
        ),
        (
            "junk-before",
            "x\r\nPOST @target HTTP/1.1\r\nhost: @host\r\ncontent-length: @length\r\n\r\n@body",
            Refused,
        ),
    ];
    probes.extend(of("ends", &raw, |text| text.as_bytes().to_vec()));
    probes
}

/// Each control byte, and some of the bytes above ASCII, in a name, in a value, in a target and in a Host.
fn controls() -> Vec<Probe> {
    let mut probes = Vec::new();
    for byte in (0..0x20).chain([0x7f, 0x80, 0xa0, 0xad, 0xff]) {
        let line = |before: &[u8], after: &[u8]| [before, &[byte], after].concat();
        probes.push(Probe::new(format!("byte-{byte:02x}-in-name"), with(line(b"x", b"y: z\r\n")), Refused));
        let fate = match byte {
            b'\t' => Passes,
            // The first ends a line, and what is behind it is none.
            b'\n' => Refused,
            0x80.. => MayPass,
            _ => Refused,
        };
        probes.push(Probe::new(format!("byte-{byte:02x}-in-value"), with(line(b"x: y", b"z\r\n")), fate));
        let target = [
            b"POST @target".as_slice(),
            &[byte],
            b"x HTTP/1.1\r\nhost: @host\r\ncontent-length: @length\r\n\r\n@body",
        ];
        probes.push(Probe::new(format!("byte-{byte:02x}-in-target"), target.concat(), Refused));
        let host = [
            b"POST @target HTTP/1.1\r\nhost: @host".as_slice(),
            &[byte],
            b"x\r\ncontent-length: @length\r\n\r\n@body",
        ];
        let probe = Probe::new(format!("byte-{byte:02x}-in-host"), host.concat(), Refused);
        // A Host that is no host is refused by who reads it; elsewhere the byte is.
        probes.push(if byte == b'\t' || byte >= 0x80 { probe.behind(MayBe) } else { probe });
    }
    probes
}

/// Names of fields that are no tokens, and tokens that are odd.
fn names() -> Vec<Probe> {
    let mut probes = Vec::new();
    for byte in "\"(),/;<=>?@[\\]{} ".bytes() {
        let line = [b"x".as_slice(), &[byte], b"y: z\r\n"].concat();
        probes.push(Probe::new(format!("name-with-{byte:02x}"), with(line), Refused));
    }
    for byte in "!#$%&'*+-.^_`|~09AZ".bytes() {
        let line = [b"x".as_slice(), &[byte], b"y: z\r\n"].concat();
        probes.push(Probe::new(format!("name-with-{byte:02x}"), with(line), Passes));
    }
    let table = [
        ("space", "x : y\r\n", Refused),
        ("tab", "x\t: y\r\n", Refused),
        ("colon", "x:: y\r\n", Passes),
        ("content-length-space", "content-length : 0\r\n", Refused),
        ("host-space", "host : other.test\r\n", Refused),
    ];
    probes.extend(of("before-colon", &table, |fields| with(fields)));
    probes
}

/// Versions, in the request line and by what they mean.
fn versions() -> Vec<Probe> {
    let wrong = [
        ("none", ""),
        ("blank", " "),
        ("0.9", " HTTP/0.9"),
        ("1.2", " HTTP/1.2"),
        ("2", " HTTP/2"),
        ("2.0", " HTTP/2.0"),
        ("3", " HTTP/3"),
        ("1", " HTTP/1"),
        ("1.", " HTTP/1."),
        ("1.1.1", " HTTP/1.1.1"),
        ("01.1", " HTTP/01.1"),
        ("1.01", " HTTP/1.01"),
        ("1.10", " HTTP/1.10"),
        ("lower", " http/1.1"),
        ("mixed", " Http/1.1"),
        ("https", " HTTPS/1.1"),
        ("other", " ICAP/1.1"),
        ("space-inside", " HTTP /1.1"),
        ("comma", " HTTP/1,1"),
        ("minus", " HTTP/1.-1"),
        ("word-behind", " HTTP/1.1 x"),
        ("tab-before", "\tHTTP/1.1"),
        ("twice", " HTTP/1.1 HTTP/1.1"),
    ];
    let raw = |version: &str| {
        format!("POST @target{version}\r\nhost: @host\r\ncontent-length: @length\r\n\r\n@body").into_bytes()
    };
    let mut probes: Vec<Probe> =
        wrong.iter().map(|(name, text)| Probe::new(format!("version-{name}"), raw(text), Refused)).collect();
    let lax =
        [("spaces-before", "  HTTP/1.1"), ("space-behind", " HTTP/1.1 "), ("tab-behind", " HTTP/1.1\t")];
    probes.extend(lax.iter().map(|(name, text)| Probe::new(format!("version-{name}"), raw(text), MayPass)));
    probes.push(Probe::new("version-simple-request", "GET @target\r\n\r\n", Refused));
    probes.push(Probe::new("version-simple-request-line-feed", "GET @target\n", Refused));

    let old = |fields: &str, behind: &str| {
        format!("POST @target HTTP/1.0\r\nhost: @host\r\n@tensors{fields}\r\n{behind}").into_bytes()
    };
    let length = "content-length: @length\r\n";
    let closing = [
        ("plain", String::new()),
        ("close", "connection: close\r\n".to_owned()),
        ("odd", "connection: keep-alive, close\r\n".to_owned()),
        ("two-lines", "connection: close\r\nconnection: keep-alive\r\n".to_owned()),
    ];
    for (name, fields) in closing {
        let bytes = old(&format!("{fields}{length}"), "@body");
        probes.push(Probe::new(format!("http10-{name}"), bytes, Passes).behind(Unread));
    }
    probes.push(Probe::new(
        "http10-keep-alive",
        old(&format!("connection: keep-alive\r\n{length}"), "@body"),
        Passes,
    ));
    // Without a length there is no body, whatever comes until the connection ends.
    let probe =
        Probe::new("http10-no-length", old("", "GET @smuggled HTTP/1.1\r\nhost: @host\r\n\r\n"), Passes);
    probes.push(probe.body("").then(Refused).behind(Unread));
    let probe = Probe::new(
        "http10-no-length-keep-alive",
        old("connection: keep-alive\r\n", "GET @smuggled HTTP/1.1\r\nhost: @host\r\n\r\n"),
        Passes,
    );
    probes.push(probe.body("").then(Passes));
    probes
}

/// Methods that are valid, and some that are none.
fn methods() -> Vec<Probe> {
    let raw = |method: &str| {
        format!("{method} @target HTTP/1.1\r\nhost: @host\r\n@tensorscontent-length: @length\r\n\r\n@body")
            .into_bytes()
    };
    let mut probes = Vec::new();
    for method in ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"] {
        probes.push(Probe::new(format!("method-{method}-with-body"), raw(method), Passes).method(method));
    }
    for method in ["PROPFIND", "TRACE", "FOO", "M-SEARCH", "get", "Post", "X", "POST_", "P0ST", "PRI", "GET!"]
    {
        probes.push(Probe::new(format!("method-{method}"), raw(method), MayPass).method(method));
    }
    for method in ["G@T", "(GET)", "GET\t", "G\0ET", "\"GET\"", "GET:", "", "G\u{c9}T", "<GET>"] {
        probes.push(Probe::new(format!("method-{:?}", method), raw(method), Refused));
    }
    for (name, method) in [("head", "HEAD"), ("get", "GET"), ("delete", "DELETE")] {
        let bytes = format!(
            "{method} @target HTTP/1.1\r\nhost: @host\r\n\r\nGET @smuggled HTTP/1.1\r\nhost: @host\r\n\r\n"
        );
        probes.push(
            Probe::new(format!("pipelined-{name}"), bytes, Passes).method(method).body("").then(Passes),
        );
        let bytes = format!(
            "{method} @target HTTP/1.1\r\nhost: @host\r\n@tensorstransfer-encoding: chunked\r\n\r\n@hex\r\n@body\r\n0\r\n\r\n"
        );
        probes.push(Probe::new(format!("chunked-{name}"), bytes, Passes).method(method));
    }
    probes
}

/// Targets in their four forms, and what is none.
fn targets() -> Vec<Probe> {
    let raw = |target: &str| {
        format!("POST {target} HTTP/1.1\r\nhost: @host\r\n@tensorscontent-length: @length\r\n\r\n@body")
            .into_bytes()
    };
    let same = ["http://@host@target", "HTTP://@host@target"];
    let mut probes: Vec<Probe> = Vec::new();
    for (number, target) in same.into_iter().enumerate() {
        probes.push(Probe::new(format!("target-absolute-{number}"), raw(target), Passes));
    }
    // The target counts, and not the Host beside it (RFC 9112, 3.2.2).
    let absolute =
        "POST http://@host@target HTTP/1.1\r\nhost: other.test\r\ncontent-length: @length\r\n\r\n@body";
    probes.push(Probe::new("target-absolute-other-host", absolute, Passes));
    let absolute =
        "POST http://@host:81@target HTTP/1.1\r\nhost: @host\r\ncontent-length: @length\r\n\r\n@body";
    probes.push(Probe::new("target-absolute-port", absolute, Passes).host("@host:81"));
    let open = [
        ("https", "https://@host@target", "@target"),
        ("ftp", "ftp://@host@target", "@target"),
        ("absolute-query", "http://@host@target?x=http://y/", "@target?x=http://y/"),
        ("query", "@target?a=b&c=%0d%0a", "@target?a=b&c=%0d%0a"),
        ("two-slashes", "/@target", "/@target"),
        ("dots", "/x/..@target", "/x/..@target"),
        ("escaped-end", "@target%0d%0ax:%20y", "@target%0d%0ax:%20y"),
        ("escaped-nul", "@target%00", "@target%00"),
        ("bad-escape", "@target%zz", "@target%zz"),
        ("fragment", "@target#x", "@target"),
        ("backslash", "@target\\x", "@target\\x"),
        ("quotes", "@target\"x\"", "@target\"x\""),
        ("braces", "@target{x}|^`", "@target{x}|^`"),
        ("angles", "@target<x>", "@target<x>"),
        ("above-ascii", "@target\u{e4}", "@target\u{e4}"),
        ("semicolon", "@target;x=y", "@target;x=y"),
        ("long", &format!("@target?{}", "x".repeat(6000)), &format!("@target?{}", "x".repeat(6000))),
    ]
    .map(|(name, raw, seen)| (name.to_owned(), raw.to_owned(), seen.to_owned()));
    for (name, target, seen) in open {
        probes.push(Probe::new(format!("target-{name}"), raw(&target), MayPass).target(&seen));
    }
    let none = [
        ("relative", "x@target"),
        ("empty", ""),
        ("space", "@target x"),
        ("question", "?x"),
        ("scheme", "http:@target"),
        ("no-host", "http://@target"),
        ("no-host-port", "http://:80@target"),
        ("userinfo", "http://user:secret@@host@target"),
        ("only-user", "http://x@@host@target"),
        ("two-at", "http://x@y@@host@target"),
        ("authority", "@host:80"),
        ("word", "@host"),
        ("asterisk", "*"),
        ("asterisk-more", "*@host"),
        ("space-in-host", "http://a b@target"),
        ("backslash-host", "http:\\\\@host@target"),
        ("port-letters", "http://@host:x@target"),
        ("two-ports", "http://@host:80:80@target"),
    ];
    for (name, target) in none {
        probes.push(Probe::new(format!("target-{name}"), raw(target), Refused).behind(MayBe));
    }
    let options = "OPTIONS * HTTP/1.1\r\nhost: @host\r\n\r\n";
    probes
        .push(Probe::new("target-options-asterisk", options, MayPass).method("OPTIONS").target("*").body(""));
    probes
}

/// Hosts: none, two, and what is none.
fn hosts() -> Vec<Probe> {
    let raw = |fields: &str| {
        format!("POST @target HTTP/1.1\r\n{fields}@tensorscontent-length: @length\r\n\r\n@body").into_bytes()
    };
    let refused = [
        ("none", ""),
        ("two", "host: @host\r\nhost: other.test\r\n"),
        ("two-equal", "host: @host\r\nhost: @host\r\n"),
        ("two-case", "host: @host\r\nHOST: other.test\r\n"),
        ("two-apart", "host: @host\r\nx: y\r\nhost: other.test\r\n"),
        ("empty", "host:\r\n"),
        ("list", "host: @host, other.test\r\n"),
        ("space", "host: @host other.test\r\n"),
        ("path", "host: @host/x\r\n"),
        ("query", "host: @host?x\r\n"),
        ("fragment", "host: @host#x\r\n"),
        ("userinfo", "host: user@@host\r\n"),
        ("userinfo-password", "host: user:secret@@host\r\n"),
        ("at", "host: @host@other.test\r\n"),
        ("scheme", "host: http://@host\r\n"),
        ("backslash", "host: @host\\x\r\n"),
        ("port-letters", "host: @host:x\r\n"),
        ("port-too-large", "host: @host:99999\r\n"),
        ("port-minus", "host: @host:-1\r\n"),
        ("port-plus", "host: @host:+80\r\n"),
        ("two-ports", "host: @host:80:80\r\n"),
        ("brackets", "host: [@host]\r\n"),
        ("open-bracket", "host: [::1\r\n"),
        ("quotes", "host: \"@host\"\r\n"),
        ("angles", "host: <@host>\r\n"),
        ("semicolon-space", "host: @host; x\r\n"),
        ("caret", "host: @host^\r\n"),
        ("braces", "host: {@host}\r\n"),
        ("pipe", "host: @host|x\r\n"),
        ("above-ascii", "host: @host\u{e4}\r\n"),
        ("absolute-two", "host: @host\r\nhost: @host\r\nx: y\r\n"),
    ];
    let mut probes = Vec::new();
    for (name, fields) in refused {
        probes.push(Probe::new(format!("host-{name}"), raw(fields), Refused).behind(MayBe));
    }
    let folded = [("folded", "host: @host\r\n other.test\r\n"), ("folded-empty", "host:\r\n @host\r\n")];
    for (name, fields) in folded {
        probes.push(Probe::new(format!("host-{name}"), raw(fields), Refused));
    }
    let open = [
        ("port", "host: @host:8080\r\n", "@host:8080"),
        ("upper", "host: @host.TEST\r\n", "@host.TEST"),
        ("dot", "host: @host.\r\n", "@host."),
        ("underscore", "host: _@host\r\n", "_@host"),
        ("empty-port", "host: @host:\r\n", "@host:"),
        ("escape", "host: @host%41\r\n", "@host%41"),
        ("sub-delims", "host: @host!$&'()*+;=\r\n", "@host!$&'()*+;="),
        ("spaces-around", "host:   @host  \r\n", "@host"),
    ];
    for (name, fields, seen) in open {
        let probe = Probe::new(format!("host-{name}"), raw(fields), MayPass).host(seen);
        probes.push(probe);
    }
    probes
}

/// `Expect`, with a body and without.
fn expectations() -> Vec<Probe> {
    let mut probes = vec![
        Probe::new("expect-length", with("expect: 100-continue\r\n"), Passes),
        Probe::new("expect-case", with("Expect: 100-Continue\r\n"), Passes),
        Probe::new("expect-other", with("expect: x\r\n"), MayPass),
        Probe::new("expect-two", with("expect: 100-continue, x\r\n"), MayPass),
        Probe::new("expect-twice", with("expect: 100-continue\r\nexpect: 100-continue\r\n"), MayPass),
        Probe::new("expect-obfuscated", with("expect: y 100-continue\r\n"), MayPass),
    ];
    let chunked =
        post("expect: 100-continue\r\ntransfer-encoding: chunked\r\n", "@hex\r\n@body\r\n0\r\n\r\n");
    probes.push(Probe::new("expect-chunked", chunked, Passes));
    let get = "GET @target HTTP/1.1\r\nhost: @host\r\nexpect: 100-continue\r\n\r\nGET @smuggled HTTP/1.1\r\nhost: @host\r\n\r\n";
    probes.push(Probe::new("expect-nothing", get, MayPass).method("GET").body("").then(MayPass));
    let none = post(
        "expect: 100-continue\r\ncontent-length: 0\r\n",
        "GET @smuggled HTTP/1.1\r\nhost: @host\r\n\r\n",
    );
    probes.push(Probe::new("expect-zero", none, Passes).body("").then(Passes));
    let old = "POST @target HTTP/1.0\r\nhost: @host\r\nexpect: 100-continue\r\n@tensorscontent-length: @length\r\n\r\n@body";
    probes.push(Probe::new("expect-http10", old, Passes).behind(Unread));
    let short = post("expect: 100-continue\r\ncontent-length: 9@length\r\n", "@body");
    probes.push(Probe::new("expect-too-long", short, Unfinished));
    probes
}

/// What asks to become something else, with more behind it; and what ends a connection.
fn others() -> Vec<Probe> {
    let upgrades = [
        (
            "websocket",
            "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: eHh4eHh4eHh4eHh4eHh4eA==\r\n",
        ),
        ("foo", "connection: upgrade\r\nupgrade: foo\r\n"),
        (
            "h2c",
            "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n",
        ),
        ("h2c-hidden", "connection: upgrade\r\nupgrade: foo, h2c\r\n"),
        ("not-nominated", "upgrade: websocket\r\n"),
        ("case", "Connection: UPGRADE\r\nUPGRADE: WebSocket\r\n"),
    ];
    let behind = "GET @smuggled HTTP/1.1\r\nhost: @host\r\n\r\n";
    let mut probes = Vec::new();
    for (name, fields) in upgrades {
        // Nobody agrees, so what is behind is the next request, and was for nobody before that was clear.
        let bytes = format!("GET @target HTTP/1.1\r\nhost: @host\r\n{fields}\r\n{behind}");
        probes.push(Probe::new(format!("upgrade-{name}"), bytes, Passes).method("GET").body("").then(Passes));
        probes.push(Probe::new(format!("upgrade-{name}-with-body"), with(fields), Passes));
        let bytes = format!("GET @target HTTP/1.0\r\nhost: @host\r\n{fields}\r\n{behind}");
        let probe = Probe::new(format!("upgrade-{name}-http10"), bytes, Passes).method("GET").body("");
        probes.push(probe.then(Refused).behind(Unread));
    }
    for (name, target) in [("authority", "@host:80"), ("no-port", "@host"), ("path", "@target")] {
        let bytes = format!("CONNECT {target} HTTP/1.1\r\nhost: @host\r\n\r\n{behind}");
        let probe =
            Probe::new(format!("connect-{name}"), bytes, MayPass).method("CONNECT").target(target).body("");
        probes.push(probe.then(MayPass).behind(MayBe));
        let bytes =
            format!("CONNECT {target} HTTP/1.1\r\nhost: @host\r\ncontent-length: @length\r\n\r\n@body");
        let probe = Probe::new(format!("connect-{name}-with-length"), bytes, MayPass)
            .method("CONNECT")
            .target(target);
        probes.push(probe.body("").then(MayPass).behind(MayBe));
    }
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    probes.push(
        Probe::new(
            "preface-behind-a-request",
            format!("GET @before HTTP/1.1\r\nhost: @host\r\n\r\n{preface}"),
            Passes,
        )
        .method("GET")
        .target("@before")
        .body("")
        .behind(Unread),
    );
    let close = "GET @target HTTP/1.1\r\nhost: @host\r\nconnection: close\r\n\r\n";
    probes.push(
        Probe::new("close-with-more-behind", format!("{close}{behind}"), Passes)
            .method("GET")
            .body("")
            .then(Refused)
            .behind(Unread),
    );
    let mix = format!(
        "GET @target HTTP/1.1\r\nhost: @host\r\n\r\n{behind}POST @before HTTP/1.1\r\nhost: @host\r\ncontent-length: 3\r\n\r\nabc"
    );
    let mut probe = Probe::new("pipelined-mix", mix, Passes).method("GET").body("").then(Passes);
    let mut third = probe.wants[1].clone();
    (third.method, third.target, third.body) = ("POST".to_owned(), "@before".to_owned(), b"abc".to_vec());
    probe.wants.push(third);
    probes.push(probe.behind(Served));
    probes
}
