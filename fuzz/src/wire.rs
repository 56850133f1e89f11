//! What is decided of a client before it is known what he asks: his protocol, the port that he means, his path.

use std::borrow::Cow;

use http::Uri;
use http::uri::PathAndQuery;
use penstock_api::names::{port_of_sni, port_sni};
use penstock_api::path::{canonical, routable};
use penstock_proxy::detect::{Detected, LOOK, judge};
use penstock_proxy::headers::settle_path;
use percent_encoding::percent_decode_str;
use rustls::server::Acceptor;

use crate::{bounded, sentence};

/// The first bytes of a connection. Once they have decided, more of them decide nothing else; the most that is looked at
/// decides always, and as the rule says it of all at once. Whatever a TLS server takes for a ClientHello is told for one, and the
/// port in its SNI is read as it is written.
pub fn first_bytes(data: &[u8]) {
    let looked = &data[..data.len().min(LOOK)];
    let verdicts = (0..=looked.len()).map(|length| judge(&looked[..length]));
    let mut decided = None;
    for (length, verdict) in verdicts.enumerate() {
        assert!(length > 0 || verdict.is_none(), "nothing is something");
        assert!(
            decided.is_none() || verdict == decided,
            "{decided:?} became {verdict:?} with {length} bytes"
        );
        decided = decided.or(verdict);
    }
    assert!(decided.is_some() || data.len() < LOOK, "{LOOK} bytes decide nothing");
    assert_eq!(decided, rule(looked), "{looked:?}");

    let mut acceptor = Acceptor::default();
    let mut rest = data;
    let hello = bounded(data, || {
        while acceptor.read_tls(&mut rest).is_ok_and(|read| read > 0) {
            match acceptor.accept() {
                Ok(None) => {}
                Ok(Some(hello)) => return Some(hello),
                Err(_) => return None,
            }
        }
        None
    });
    if let Some(hello) = hello {
        assert_eq!(decided, Some(Detected::Tls), "a ClientHello is told for something else");
        if let Some((sni, port)) =
            hello.client_hello().server_name().and_then(|sni| Some((sni, port_of_sni(sni)?)))
        {
            let written = sni.trim_start_matches("port-").split('.').next().unwrap_or_default();
            assert_eq!(Ok(port), written.parse(), "{sni}");
            assert_eq!(port_of_sni(&port_sni(port)), Some(port));
        }
    }
}

/// The same said of all bytes at once (RFC 8446, 5.1; RFC 9113, 3.4; RFC 9112, 3).
fn rule(bytes: &[u8]) -> Option<Detected> {
    const PREFACE: &str = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let text: String = bytes.iter().copied().map(char::from).collect();
    let (method, rest) = match text.find(|letter: char| !matches!(letter, 'A'..='Z' | '-')) {
        Some(at) => text.split_at(at),
        None => (&text[..], ""),
    };
    match () {
        () if text.is_empty() => None,
        () if text.starts_with('\x16') => Some(Detected::Tls),
        () if text == PREFACE => Some(Detected::Http2),
        () if PREFACE.starts_with(&text) => None,
        () if !method.is_empty() && rest.starts_with(' ') => Some(Detected::Http1),
        () if rest.is_empty() && text.len() < LOOK => None,
        () => Some(Detected::Bytes),
    }
}

/// A path. Its canonical form is its own, has no segment that leads elsewhere and nothing that a second decoding would change, and is
/// what an eager server makes of the path; whoever chooses a way sees the same.
pub fn path(data: &[u8]) {
    let Ok(path) = std::str::from_utf8(data) else { return };
    let way = bounded(data, || routable(path));
    match bounded(data, || canonical(path)) {
        Ok(form) => {
            assert_eq!(canonical(&form).as_deref(), Ok(&*form), "of {path:?}, looked at again");
            assert_eq!(way.as_deref(), Ok(&*form), "of {path:?}, as whoever chooses a way sees it");
            plain(path, &form);
            let decoded = decode(&form);
            assert_eq!(decoded, eager(path), "{path:?} is {form:?}");
            if form.starts_with('/') {
                assert_eq!(
                    canonical(&form.replace('/', "//")).as_deref(),
                    Ok(&*form),
                    "with all slashes twice"
                );
            }
        }
        Err(why) => sentence(&why),
    }
    match &way {
        Ok(form) => {
            assert_eq!(routable(form).as_deref(), Ok(&**form), "of {path:?}, looked at again");
            plain(path, form);
        }
        Err(why) => {
            sentence(why);
            assert!(canonical(path).is_err(), "{path:?} has a form for some and no way");
        }
    }
    let Ok(target) = path.parse::<PathAndQuery>() else { return };
    for form in [canonical, routable] {
        let came = Uri::from(target.clone());
        let mut uri = came.clone();
        if settle_path(&mut uri, form).is_ok() {
            assert_eq!(form(came.path()).as_deref(), Ok(uri.path()), "what travels on");
            assert_eq!(uri.query(), came.query());
        }
    }
}

/// Nothing of a form can be read in two ways.
fn plain(path: &str, form: &str) {
    if form.starts_with('/') {
        assert!(!form.contains("//"), "{path:?} is {form:?}");
        assert!(!form.split('/').any(|segment| matches!(segment, "." | "..")), "{path:?} is {form:?}");
    }
    for (at, _) in form.match_indices('%') {
        let escape = form.get(at + 1..at + 3).unwrap_or_default();
        let value = u8::from_str_radix(escape, 16).unwrap_or(b'a');
        assert!(!escape.contains(|digit: char| digit.is_ascii_lowercase()), "{path:?} is {form:?}");
        assert!(!value.is_ascii_alphanumeric() && !b"-._~;\\".contains(&value), "{path:?} is {form:?}");
        assert!(value >= b' ' && value != 0x7f, "{path:?} is {form:?}");
    }
    assert!(form.bytes().all(|byte| byte.is_ascii_graphic()), "{path:?} is {form:?}");
    let again = decode(form);
    let escapes = again.as_bytes().windows(3).filter(|three| three[0] == b'%');
    for three in escapes {
        assert!(
            !three[1..].iter().all(u8::is_ascii_hexdigit),
            "{path:?} is {form:?}, which decodes to {again:?}"
        );
    }
}

fn decode(path: &str) -> String {
    percent_decode_str(path)
        .decode_utf8()
        .map(Cow::into_owned)
        .unwrap_or_else(|_| panic!("{path:?} is no UTF-8"))
}

/// What a server makes of a path that decodes first, then goes from segment to segment.
fn eager(path: &str) -> String {
    let decoded = decode(path);
    let Some(rest) = decoded.strip_prefix('/') else { return decoded };
    let mut way: Vec<&str> = Vec::new();
    for segment in rest.split('/') {
        match segment {
            "" | "." => {}
            ".." => drop(way.pop()),
            name => way.push(name),
        }
    }
    let folder = way.is_empty() || matches!(rest.rsplit('/').next(), Some("" | "." | ".."));
    format!("/{}{}", way.join("/"), if folder && !way.is_empty() { "/" } else { "" })
}
