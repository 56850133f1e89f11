//! Probes of where a request ends: lengths, codings, chunks, trailers.

use crate::corpus::{Behind, Fate, Probe};
use Fate::{MayPass, Passes, Refused, Unfinished};

/// All of them.
pub(crate) fn probes() -> Vec<Probe> {
    [lengths(), codings(), both(), sizes(), chunks(), trailers(), nominated()].concat()
}

/// A POST with these fields, and these bytes behind its head.
pub(crate) fn post(fields: &str, behind: &str) -> Vec<u8> {
    format!("POST @target HTTP/1.1\r\nhost: @host\r\n@tensors{fields}\r\n{behind}").into_bytes()
}

fn of(family: &str, table: &[(&str, &str, Fate)], probe: impl Fn(&str) -> Vec<u8>) -> Vec<Probe> {
    let each =
        |(name, text, fate): &(&str, &str, Fate)| Probe::new(format!("{family}-{name}"), probe(text), *fate);
    table.iter().map(each).collect()
}

/// `Content-Length` in every form, before a body that it describes.
fn lengths() -> Vec<Probe> {
    let table = [
        ("plain", "content-length: @length", Passes),
        ("no-space", "Content-Length:@length", Passes),
        ("spaces", "CONTENT-LENGTH:   @length  ", Passes),
        ("tabs", "content-length:\t@length\t", Passes),
        ("leading-zeros", "content-length: 000@length", Passes),
        ("forty-zeros", "content-length: 0000000000000000000000000000000000000000@length", MayPass),
        ("twice-equal", "content-length: @length\r\ncontent-length: @length", MayPass),
        ("twice-equal-otherwise-written", "content-length: @length\r\ncontent-length: 0@length", MayPass),
        ("list-equal", "content-length: @length, @length", MayPass),
        ("list-comma", "content-length: @length,", MayPass),
        ("comma-list", "content-length: ,@length", MayPass),
        ("then-zero", "content-length: @length\r\ncontent-length: 0", Refused),
        ("zero-then", "content-length: 0\r\ncontent-length: @length", Refused),
        ("then-more", "content-length: @length\r\ncontent-length: @length1", Refused),
        ("then-empty", "content-length: @length\r\ncontent-length:", Refused),
        ("then-negative", "content-length: @length\r\ncontent-length: -1", Refused),
        ("apart", "content-length: @length\r\nx: y\r\ncontent-length: 0", Refused),
        ("case", "content-length: @length\r\nCONTENT-LENGTH: 0", Refused),
        ("list-zero", "content-length: @length, 0", Refused),
        ("zero-list", "content-length: 0, @length", Refused),
        ("list-empty", "content-length: ,", Refused),
        ("plus", "content-length: +@length", Refused),
        ("minus", "content-length: -@length", Refused),
        ("minus-zero", "content-length: -0", Refused),
        ("hex", "content-length: 0x@hex", Refused),
        ("octal", "content-length: 0o@length", Refused),
        ("letters", "content-length: @lengthabc", Refused),
        ("point", "content-length: @length.0", Refused),
        ("exponent", "content-length: @lengthe0", Refused),
        ("semicolon", "content-length: @length;", Refused),
        ("underscore", "content-length: 0_@length", Refused),
        ("quotes", "content-length: \"@length\"", Refused),
        ("arabic", "content-length: \u{664}\u{662}", Refused),
        ("wide-digits", "content-length: \u{ff14}\u{ff12}", Refused),
        ("empty", "content-length:", Refused),
        ("blank", "content-length: \t ", Refused),
        ("two-numbers", "content-length: 0 @length", Refused),
        ("two-numbers-tab", "content-length: @length\t0", Refused),
        ("vertical-tab", "content-length: \u{b}@length", Refused),
        ("form-feed", "content-length: @length\u{c}", Refused),
        ("nul", "content-length: @length\0", Refused),
        ("above-u32", "content-length: 4294967338", Unfinished),
        ("above-i64", "content-length: 9223372036854775808", Unfinished),
        ("u64-max", "content-length: 18446744073709551615", Refused),
        ("above-u64", "content-length: 18446744073709551658", Refused),
        ("forty-digits", "content-length: 1000000000000000000000000000000000000000", Refused),
        ("folded", "content-length:\r\n @length", Refused),
        ("folded-behind", "content-length: @length\r\n 0", Refused),
        ("folded-tab", "content-length: 0\r\n\t@length", Refused),
        ("space-before-colon", "content-length : @length", Refused),
        ("tab-before-colon", "content-length\t: @length", Refused),
        ("space-before-name", "x: y\r\n content-length: @length", Refused),
        ("nul-in-name", "content-length\0: @length", Refused),
        ("vertical-tab-in-name", "content-length\u{b}: @length", Refused),
        ("carriage-return-in-name", "content-length\r: @length", Refused),
        ("no-break-space-in-name", "content-length\u{a0}: @length", Refused),
        ("space-in-name", "content length: @length", Refused),
        ("carriage-return-before", "x: y\rcontent-length: @length", Refused),
        ("hidden-by-carriage-return", "content-length: @length\rcontent-length: 0", Refused),
        ("line-feed-before", "x: y\ncontent-length: @length", MayPass),
    ];
    let mut probes = of("length", &table, |field| post(&format!("{field}\r\n"), "@body"));
    // Short of the body by far: the tail belongs to it, and more does not come.
    probes.push(Probe::new("length-too-long", post("content-length: 9@length\r\n", "@body"), Unfinished));
    // None of these is a length, and what follows is a request.
    let none = [
        ("none", "x: y"),
        ("zero", "content-length: 0"),
        ("zeros", "content-length: 0000"),
        ("with-underscore", "content_length: @length"),
        ("with-prefix", "x-content-length: @length"),
        ("with-suffix", "content-length2: @length"),
        ("in-a-value", "x: content-length: @length"),
    ];
    for (name, field) in none {
        let bytes = post(&format!("{field}\r\n"), "GET @smuggled HTTP/1.1\r\nhost: @host\r\n\r\n");
        probes.push(Probe::new(format!("no-length-{name}"), bytes, Passes).body("").then(Passes));
    }
    probes
}

const CHUNKED: &str = "@hex\r\n@body\r\n0\r\n\r\n";

/// `Transfer-Encoding` in every form, before a body in chunks.
fn codings() -> Vec<Probe> {
    let table = [
        ("plain", "transfer-encoding: chunked", Passes),
        ("no-space", "Transfer-Encoding:chunked", Passes),
        ("upper", "TRANSFER-ENCODING: CHUNKED", Passes),
        ("odd-case", "tRANSFER-eNCODING: cHuNkEd", Passes),
        ("spaces", "transfer-encoding:    chunked   ", Passes),
        ("tabs", "transfer-encoding:\tchunked\t", Passes),
        ("comma-behind", "transfer-encoding: chunked,", MayPass),
        ("comma-before", "transfer-encoding: ,chunked", MayPass),
        ("commas", "transfer-encoding: , , chunked , ,", MayPass),
        ("line-feed-before", "x: y\ntransfer-encoding: chunked", MayPass),
        ("vertical-tab", "transfer-encoding: \u{b}chunked", Refused),
        ("vertical-tab-behind", "transfer-encoding: chunked\u{b}", Refused),
        ("form-feed", "transfer-encoding: \u{c}chunked", Refused),
        ("nul", "transfer-encoding: chunked\0", Refused),
        ("no-break-space", "transfer-encoding: \u{a0}chunked", Refused),
        ("byte-behind", "transfer-encoding: chunked\u{ff}", Refused),
        ("kelvin", "transfer-encoding: chun\u{212a}ed", Refused),
        ("quotes", "transfer-encoding: \"chunked\"", Refused),
        ("single-quotes", "transfer-encoding: 'chunked'", Refused),
        ("parameter", "transfer-encoding: chunked;q=1", Refused),
        ("semicolon", "transfer-encoding: chunked;", Refused),
        ("short", "transfer-encoding: chunk", Refused),
        ("long", "transfer-encoding: chunkedx", Refused),
        ("x", "transfer-encoding: xchunked", Refused),
        ("x-hyphen", "transfer-encoding: x-chunked", Refused),
        ("cow", "transfer-encoding: cow", Refused),
        ("empty", "transfer-encoding:", Refused),
        ("comma", "transfer-encoding: ,", Refused),
        ("identity", "transfer-encoding: identity", Refused),
        ("gzip", "transfer-encoding: gzip", Refused),
        ("space-between", "transfer-encoding: chunked chunked", Refused),
        ("twice", "transfer-encoding: chunked, chunked", Refused),
        ("gzip-chunked", "transfer-encoding: gzip, chunked", Refused),
        ("identity-chunked", "transfer-encoding: identity, chunked", Refused),
        ("cow-chunked", "transfer-encoding: cow, chunked", Refused),
        ("quoted-chunked", "transfer-encoding: \"a, chunked", Refused),
        ("chunked-identity", "transfer-encoding: chunked, identity", Refused),
        ("chunked-gzip", "transfer-encoding: chunked, gzip", Refused),
        ("chunked-cow", "transfer-encoding: chunked, cow", Refused),
        ("two-lines", "transfer-encoding: chunked\r\ntransfer-encoding: chunked", Refused),
        ("two-lines-gzip", "transfer-encoding: gzip\r\ntransfer-encoding: chunked", Refused),
        ("two-lines-cow", "transfer-encoding: cow\r\ntransfer-encoding: chunked", Refused),
        ("two-lines-identity", "transfer-encoding: identity\r\ntransfer-encoding: chunked", Refused),
        ("two-lines-last-cow", "transfer-encoding: chunked\r\ntransfer-encoding: cow", Refused),
        ("two-lines-last-identity", "transfer-encoding: chunked\r\ntransfer-encoding: identity", Refused),
        ("two-lines-last-empty", "transfer-encoding: chunked\r\ntransfer-encoding:", Refused),
        ("two-lines-apart", "transfer-encoding: cow\r\nx: y\r\nTransfer-encoding: chunked", Refused),
        ("folded", "transfer-encoding:\r\n chunked", Refused),
        ("folded-tab", "transfer-encoding:\n\tchunked", Refused),
        ("folded-behind", "transfer-encoding: chunked\r\n , identity", Refused),
        ("space-before-colon", "transfer-encoding : chunked", Refused),
        ("tab-before-colon", "transfer-encoding\t: chunked", Refused),
        ("space-before-name", "x: y\r\n transfer-encoding: chunked", Refused),
        ("carriage-return-before", "x: y\rtransfer-encoding: chunked", Refused),
        ("carriage-return-behind", "transfer-encoding: chunked\rx: y", Refused),
        ("nul-in-name", "transfer\0-encoding: chunked", Refused),
        ("space-in-name", "transfer encoding: chunked", Refused),
        ("vertical-tab-in-name", "\u{b}transfer-encoding: chunked", Refused),
    ];
    let mut probes = of("coding", &table, |field| post(&format!("{field}\r\n"), CHUNKED));
    for probe in &mut probes {
        // Refused when the head has been read, whose end is beyond doubt; what is behind may be read past the body.
        let read_past = ["twice", "gzip-chunked", "identity-chunked", "cow-chunked", "quoted-chunked"];
        let name = probe.name.trim_start_matches("coding-");
        if read_past.contains(&name) || (name.starts_with("two-lines") && !name.contains("last")) {
            probe.behind = Behind::MayBe;
        }
    }
    // HTTP/1.0 has no chunks (RFC 9112, 6.1).
    let old = [
        ("plain", "transfer-encoding: chunked"),
        ("keep-alive", "connection: keep-alive\r\ntransfer-encoding: chunked"),
        ("with-length", "content-length: 5\r\ntransfer-encoding: chunked"),
        ("before-length", "transfer-encoding: chunked\r\ncontent-length: 5"),
        ("identity", "transfer-encoding: identity\r\ncontent-length: @length"),
    ];
    for (name, fields) in old {
        let bytes = format!("POST @target HTTP/1.0\r\nhost: @host\r\n@tensors{fields}\r\n\r\n{CHUNKED}");
        probes.push(Probe::new(format!("coding-http10-{name}"), bytes, Refused));
    }
    probes
}

/// A length and a coding: the coding counts and the connection ends (RFC 9112, 6.1), or nothing is served.
fn both() -> Vec<Probe> {
    let good = [
        ("length-first", "content-length: 5\r\ntransfer-encoding: chunked"),
        ("coding-first", "transfer-encoding: chunked\r\ncontent-length: 5"),
        ("zero", "content-length: 0\r\ntransfer-encoding: chunked"),
        ("right", "content-length: @length\r\ntransfer-encoding: chunked"),
        ("long", "transfer-encoding: chunked\r\ncontent-length: 99999"),
        ("between", "content-length: 5\r\ntransfer-encoding: chunked\r\ncontent-length: 5"),
        ("case", "Content-LENGTH: 5\r\nTransfer-ENCODING: Chunked"),
        ("keep-alive", "connection: keep-alive\r\ncontent-length: 5\r\ntransfer-encoding: chunked"),
        ("nominated", "connection: content-length\r\ncontent-length: 5\r\ntransfer-encoding: chunked"),
        ("bad-length-behind", "transfer-encoding: chunked\r\ncontent-length: -1"),
        ("lengths-differ-behind", "transfer-encoding: chunked\r\ncontent-length: 5\r\ncontent-length: 6"),
    ];
    let bad = [
        ("bad-length", "content-length: -1\r\ntransfer-encoding: chunked"),
        ("lengths-differ", "content-length: 5\r\ncontent-length: 6\r\ntransfer-encoding: chunked"),
        ("bad-coding", "content-length: @length\r\ntransfer-encoding: cow"),
        ("bad-coding-first", "transfer-encoding: xchunked\r\ncontent-length: @length"),
        ("identity", "content-length: @length\r\ntransfer-encoding: identity"),
        ("vertical-tab", "content-length: @length\r\ntransfer-encoding:\u{b}chunked"),
        ("empty", "content-length: @length\r\ntransfer-encoding:"),
        ("space-before-colon", "content-length: 5\r\ntransfer-encoding : chunked"),
        ("folded", "content-length: 5\r\ntransfer-encoding:\r\n chunked"),
        ("hidden", "content-length: 5\r\nx: y\rtransfer-encoding: chunked"),
        ("two-codings", "content-length: 5\r\ntransfer-encoding: gzip, chunked"),
        ("coding-nominated", "connection: transfer-encoding\r\ncontent-length: 5\r\ntransfer-encoding: cow"),
    ];
    let mut probes = Vec::new();
    for (name, fields) in good {
        let probe = Probe::new(format!("both-{name}"), post(&format!("{fields}\r\n"), CHUNKED), MayPass);
        probes.push(probe.behind(Behind::Unread));
    }
    for (name, fields) in bad {
        probes.push(Probe::new(format!("both-{name}"), post(&format!("{fields}\r\n"), CHUNKED), Refused));
    }
    probes.push(Probe::new(
        "both-underscore",
        post("content-length: @length\r\ntransfer_encoding: chunked\r\n", "@body"),
        Passes,
    ));
    probes
}

/// The size of a chunk in every form.
fn sizes() -> Vec<Probe> {
    let table = [
        ("plain", "@hex\r\n", Passes),
        ("leading-zeros", "000@hex\r\n", Passes),
        ("extension", "@hex;a=b\r\n", MayPass),
        ("extension-quoted", "@hex;a=\"q\\\"x;y\"\r\n", MayPass),
        ("extension-spaces", "@hex ; a = b\r\n", MayPass),
        ("extension-empty", "@hex;\r\n", MayPass),
        ("extensions", "@hex;a;b=c;d=\"e\"\r\n", MayPass),
        ("extension-like-a-size", "@hex;0\r\n", MayPass),
        ("extension-odd-bytes", "@hex;\u{e4}\r\n", MayPass),
        ("space-behind", "@hex \r\n", MayPass),
        ("tab-behind", "@hex\t\r\n", MayPass),
        ("many-zeros", "0000000000000000000000000000000@hex\r\n", MayPass),
        ("extension-line-feed", "@hex;a\nb\r\n", Unfinished),
        ("extension-carriage-return", "@hex;a\rb\r\n", Unfinished),
        ("extension-quoted-end", "@hex;a=\"\r\nb\"\r\n", Unfinished),
        ("extension-nul", "@hex;a\0\r\n", MayPass),
        ("line-feed", "@hex\n", Unfinished),
        ("carriage-return", "@hex\r", Unfinished),
        ("two-carriage-returns", "@hex\r\r\n", Unfinished),
        ("space-before", " @hex\r\n", Unfinished),
        ("tab-before", "\t@hex\r\n", Unfinished),
        ("plus", "+@hex\r\n", Unfinished),
        ("minus", "-@hex\r\n", Unfinished),
        ("prefix", "0x@hex\r\n", Unfinished),
        ("two", "@hex @hex\r\n", Unfinished),
        ("underscore", "0_@hex\r\n", Unfinished),
        ("letters", "g\r\n", Unfinished),
        ("empty", "\r\n", Unfinished),
        ("only-extension", ";a=b\r\n", Unfinished),
        ("vertical-tab", "@hex\u{b}\r\n", Unfinished),
        ("nul", "@hex\0\r\n", Unfinished),
        ("quotes", "\"@hex\"\r\n", Unfinished),
        ("comma", "@hex,\r\n", Unfinished),
        ("overflow-64", "10000000000000000@hex\r\n", Unfinished),
        ("overflow-32", "1000000@hex\r\n", Unfinished),
        ("all-ones", "ffffffffffffffff\r\n", Unfinished),
        ("above-i64", "8000000000000000\r\n", Unfinished),
        ("forty-digits", "1111111111111111111111111111111111111111\r\n", Unfinished),
        ("unicode", "\u{ff14}\r\n", Unfinished),
    ];
    of("size", &table, |size| post("transfer-encoding: chunked\r\n", &format!("{size}@body\r\n0\r\n\r\n")))
}

/// What stands around chunks, and behind the last.
fn chunks() -> Vec<Probe> {
    let table = [
        ("two", "1\r\n@\r\n@hex\r\n@body\r\n0\r\n\r\n", MayPass),
        ("last-zeros", "@hex\r\n@body\r\n000\r\n\r\n", Passes),
        ("last-many-zeros", "@hex\r\n@body\r\n00000000000000000000000000000\r\n\r\n", MayPass),
        ("last-extension", "@hex\r\n@body\r\n0;a=b\r\n\r\n", MayPass),
        ("last-quoted-extension", "@hex\r\n@body\r\n0;a=\"b\"\r\n\r\n", MayPass),
        ("line-feed-behind", "@hex\r\n@body\n0\r\n\r\n", Unfinished),
        ("carriage-return-behind", "@hex\r\n@body\r0\r\n\r\n", Unfinished),
        ("nothing-behind", "@hex\r\n@body0\r\n\r\n", Unfinished),
        ("space-behind", "@hex\r\n@body \r\n0\r\n\r\n", Unfinished),
        ("two-ends-behind", "@hex\r\n@body\r\n\r\n0\r\n\r\n", Unfinished),
        ("too-long", "@hex\r\n@bodyxx\r\n0\r\n\r\n", Unfinished),
        ("last-minus", "@hex\r\n@body\r\n-0\r\n\r\n", Unfinished),
        ("last-line-feed", "@hex\r\n@body\r\n0\n\r\n", Unfinished),
        ("last-letter", "@hex\r\n@body\r\no\r\n\r\n", Unfinished),
        ("last-space-before", "@hex\r\n@body\r\n 0\r\n\r\n", Unfinished),
        ("no-last-end", "@hex\r\n@body\r\n0\r\n", Unfinished),
        ("last-end-carriage-return", "@hex\r\n@body\r\n0\r\n\r", Unfinished),
        ("no-last", "@hex\r\n@body\r\n", Unfinished),
        ("none", "", Unfinished),
    ];
    let mut probes = of("chunk", &table, |body| post("transfer-encoding: chunked\r\n", body));
    probes[0].wants[0].body = b"@@body".to_vec();
    probes.push(
        Probe::new("chunk-only-last", post("transfer-encoding: chunked\r\n", "0\r\n\r\n"), Passes).body(""),
    );
    // hyper reads on for trailers, and takes the tail for some.
    let bytes = post("transfer-encoding: chunked\r\n", "@hex\r\n@body\r\n0\r\n\n");
    probes.push(Probe::new("chunk-last-end-line-feed", bytes, MayPass).behind(Behind::Swallowed));
    let follows = "0\r\n\r\nGET @smuggled HTTP/1.1\r\nhost: @host\r\n\r\n";
    let probe = Probe::new("chunk-request-behind", post("transfer-encoding: chunked\r\n", follows), Passes);
    probes.push(probe.body("").then(Passes));
    probes
}

/// Fields behind a body; what is forbidden there changes nothing.
fn trailers() -> Vec<Probe> {
    let table = [
        ("plain", "x-sum: 1", MayPass),
        ("length", "content-length: 5", MayPass),
        ("coding", "transfer-encoding: chunked", MayPass),
        ("host", "host: other.test", MayPass),
        ("connection", "connection: close", MayPass),
        ("authorization", "authorization: basic x", MayPass),
        ("identity", "penstock-client-id: spiffe://cluster.local/ns/test/sa/other", MayPass),
        ("many", "a: 1\r\nb: 2\r\nc: 3\r\ncontent-length: 7\r\nhost: x", MayPass),
        ("space-before-colon", "content-length : 5", Unfinished),
        ("space-before-name", " content-length: 5", Unfinished),
        ("no-colon", "x-sum", Unfinished),
        ("nul", "x-sum: \0", Unfinished),
        ("carriage-return", "x-sum: 1\rhost: x", Unfinished),
        ("folded", "x-sum: 1\r\n 2", Unfinished),
        ("empty-name", ": 1", Unfinished),
    ];
    let mut probes = of("trailer", &table, |field| {
        post(
            "te: trailers\r\ntransfer-encoding: chunked\r\n",
            &format!("@hex\r\n@body\r\n0\r\n{field}\r\n\r\n"),
        )
    });
    probes.extend(of("announced-trailer", &table, |field| {
        let name = field.split(':').next().unwrap_or_default().trim();
        let head = format!("trailer: {name}\r\ntransfer-encoding: chunked\r\n");
        post(&head, &format!("@hex\r\n@body\r\n0\r\n{field}\r\n\r\n"))
    }));
    probes
}

/// `Connection` names what is not the client's to remove.
fn nominated() -> Vec<Probe> {
    let table = [
        ("length", "content-length", Passes),
        ("coding", "transfer-encoding", Passes),
        ("host", "host", Passes),
        ("authorization", "authorization", Passes),
        ("all", "close-not, content-length, transfer-encoding, host, authorization", Passes),
        ("case", "Content-Length, HOST", Passes),
        ("identity", "penstock-client-id", Passes),
        ("odd", "content-length;, \"host\", x y", Passes),
    ];
    let fields = "authorization: basic x\r\ncontent-length: @length\r\n";
    let mut probes =
        of("nominated", &table, |names| post(&format!("connection: {names}\r\n{fields}"), "@body"));
    probes.extend(of("nominated-chunked", &table, |names| {
        post(&format!("transfer-encoding: chunked\r\nconnection: {names}\r\n"), CHUNKED)
    }));
    let closes =
        [("then-close", "content-length\r\nconnection: close"), ("close", "close, content-length, host")];
    for (name, names) in closes {
        let probe = Probe::new(
            format!("nominated-{name}"),
            post(&format!("connection: {names}\r\n{fields}"), "@body"),
            Passes,
        );
        probes.push(probe.behind(Behind::Unread));
    }
    probes
}
