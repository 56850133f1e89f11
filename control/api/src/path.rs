//! One form of a path for everybody who decides by it.
//!
//! In: a request's path, without its query. Out: the same path in its canonical form, borrowed where it has it already.
//! Can go wrong: two readers may take the path for different ones, so nobody may decide by it ([`Ambiguous`]).
//!
//! The canonical form (RFC 3986, 6.2.2, and what proxies and servers were fooled by):
//! - what may stand in a path as it is does so, and everything else is escaped, in capitals: `%7e` is `~`, `%3A` is `:`,
//!   `é` is `%C3%A9`; so paths that become the same when a server decodes them have the same form;
//! - segments `.` and `..` are resolved, and never lead above the root;
//! - slashes in a row are one.
//!
//! Ambiguous is what one server decodes and another does not: an escaped slash (`%2F`), an escaped dot that makes a dot
//! segment (`%2e%2e`), an escaped semicolon (a plain one begins parameters), an escaped percent sign before two hex digits (`%252e`), a backslash in either form, control
//! characters, and escapes that are no UTF-8 (`%c0%af` is a slash to some).

use std::borrow::Cow;
use std::fmt;

/// Why nobody may decide by a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ambiguous {
    /// `%2F`.
    Slash,
    /// `%2e` in a dot segment.
    Dots,
    /// `\` or `%5C`.
    Backslash,
    /// `%3B`.
    Semicolon,
    /// `%00` and its like.
    Control,
    /// `%252e`, or `%25%32%65`: what it is depends on how often it is decoded.
    Twice,
    /// Escapes that are no UTF-8, overlong ones among them.
    Utf8,
    /// A `%` without two hex digits.
    Escape,
}

impl fmt::Display for Ambiguous {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Slash => "it has an escaped slash (%2F)",
            Self::Dots => "it has an escaped dot in a segment of dots (%2e)",
            Self::Backslash => "it has a backslash",
            Self::Semicolon => "it has an escaped semicolon (%3B)",
            Self::Control => "it has a control character",
            Self::Twice => "it is escaped twice (%25 before two hex digits)",
            Self::Utf8 => "its escapes are not UTF-8",
            Self::Escape => "it has a % without two hex digits behind it",
        })
    }
}

impl std::error::Error for Ambiguous {}

/// The canonical form of a path, for whoever allows or denies by it.
pub fn canonical(path: &str) -> Result<Cow<'_, str>, Ambiguous> {
    formed(path, false)
}

/// The same, for whoever chooses a way by it: an escaped slash stays what it is, part of a segment's name. Whatever
/// has a canonical form has the same here.
pub fn routable(path: &str) -> Result<Cow<'_, str>, Ambiguous> {
    formed(path, true)
}

fn formed(path: &str, slashes: bool) -> Result<Cow<'_, str>, Ambiguous> {
    if is_plain(path.as_bytes()) {
        return Ok(Cow::Borrowed(path));
    }
    let decoded = decode(path.as_bytes(), slashes)?;
    let Some(rest) = decoded.strip_prefix('/') else {
        // `*`, or no path at all: there are no segments to resolve.
        return Ok(Cow::Owned(decoded));
    };
    let mut segments: Vec<&str> = Vec::new();
    let mut last_is_dots = false;
    for segment in rest.split('/') {
        last_is_dots = matches!(segment, "." | "..");
        match segment {
            "" | "." => {}
            ".." => drop(segments.pop()),
            segment => segments.push(segment),
        }
    }
    let mut out = String::with_capacity(decoded.len());
    for segment in &segments {
        out.push('/');
        out.push_str(segment);
    }
    // `/a/` and `/a/b/..` are directories, and say so.
    if out.is_empty() || decoded.ends_with('/') || last_is_dots {
        out.push('/');
    }
    Ok(Cow::Owned(out))
}

/// Whether nothing of the path could be written differently. One pass: this is all that most requests cost.
fn is_plain(path: &[u8]) -> bool {
    let mut before = 0;
    for &byte in path {
        let dots_or_empty = before == b'/' && matches!(byte, b'/' | b'.');
        if dots_or_empty || !(byte == b'/' || stands(byte)) {
            return false;
        }
        before = byte;
    }
    true
}

/// Whether a byte may stand in a segment as it is (RFC 3986, `pchar`).
const fn stands(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'-' | b'.'
                | b'_'
                | b'~'
                | b'!'
                | b'$'
                | b'&'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b','
                | b';'
                | b'='
                | b':'
                | b'@'
        )
}

/// Decodes what may stand as it is, and escapes the rest.
fn decode(path: &[u8], slashes: bool) -> Result<String, Ambiguous> {
    let mut out = String::with_capacity(path.len());
    // As the most eager of servers reads it, to see whether that is UTF-8.
    let mut eager = Vec::with_capacity(path.len());
    // Where the segment begins, and whether any of its dots was escaped.
    let (mut segment, mut escaped_dot) = (0, false);
    let mut at = 0;
    while let Some(&byte) = path.get(at) {
        at += 1;
        let (value, escaped) = match byte {
            b'%' => {
                let value = hex(path.get(at..at + 2)).ok_or(Ambiguous::Escape)?;
                at += 2;
                (value, true)
            }
            _ => (byte, false),
        };
        match value {
            b'\\' => return Err(Ambiguous::Backslash),
            0..b' ' | 0x7f => return Err(Ambiguous::Control),
            b'/' if escaped && !slashes => return Err(Ambiguous::Slash),
            b';' if escaped => return Err(Ambiguous::Semicolon),
            _ => {}
        }
        eager.push(value);
        if value == b'/' && !escaped {
            check_dots(&out[segment..], escaped_dot)?;
            out.push('/');
            (segment, escaped_dot) = (out.len(), false);
        } else if stands(value) {
            escaped_dot |= escaped && value == b'.';
            out.push(char::from(value));
        } else {
            let digit = |nibble: u8| char::from(b"0123456789ABCDEF"[usize::from(nibble & 15)]);
            out.extend(['%', digit(value >> 4), digit(value)]);
        }
    }
    check_dots(&out[segment..], escaped_dot)?;
    // The digits may be escaped themselves, as in `%25%32%65`.
    if eager.windows(3).any(|three| three[0] == b'%' && hex(three.get(1..)).is_some()) {
        return Err(Ambiguous::Twice);
    }
    std::str::from_utf8(&eager).map_err(|_| Ambiguous::Utf8)?;
    Ok(out)
}

fn check_dots(segment: &str, escaped: bool) -> Result<(), Ambiguous> {
    // `..;x` is a segment of dots to servers that cut parameters off.
    let name = segment.split(';').next().unwrap_or_default();
    let parameters = name.len() < segment.len();
    if matches!(name, "." | "..") && (escaped || parameters) { Err(Ambiguous::Dots) } else { Ok(()) }
}

fn hex(two: Option<&[u8]>) -> Option<u8> {
    let [high, low] = two? else { return None };
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some(digit(*high)? << 4 | digit(*low)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_path_has_one_form() {
        let table = [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a//b", "/a/b"),
            ("//a", "/a"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/../../a", "/a"),
            ("/a/..", "/"),
            ("/a/b/..", "/a/"),
            ("/a/b/.", "/a/b/"),
            ("/a/", "/a/"),
            ("/%61dmin", "/admin"),
            ("/a%7eb", "/a~b"),
            ("/a%3ab", "/a:b"),
            ("/a%22%7b", "/a%22%7B"),
            ("/a\"{", "/a%22%7B"),
            ("/\u{e9}", "/%C3%A9"),
            ("/a%20b", "/a%20b"),
            ("/100%25", "/100%25"),
            ("/.hidden", "/.hidden"),
            ("/a...", "/a..."),
            ("/...", "/..."),
            ("/v1%2e5", "/v1.5"),
            ("/%C3%A9", "/%C3%A9"),
            ("/%c3%a9", "/%C3%A9"),
            ("*", "*"),
            ("", ""),
        ];
        for (path, expected) in table {
            assert_eq!(canonical(path).as_deref(), Ok(expected), "{path}");
        }
    }

    #[test]
    fn what_servers_read_differently_is_nobodys_to_decide_by() {
        let table = [
            ("/a%2fb", Ambiguous::Slash),
            ("/a%2Fb", Ambiguous::Slash),
            ("/a/%2e%2e/b", Ambiguous::Dots),
            ("/a/.%2E/b", Ambiguous::Dots),
            ("/a/%2e", Ambiguous::Dots),
            ("/a/..;/b", Ambiguous::Dots),
            ("/a/..;x=1/b", Ambiguous::Dots),
            ("/a\\b", Ambiguous::Backslash),
            ("/a%5cb", Ambiguous::Backslash),
            ("/a%3Bb", Ambiguous::Semicolon),
            ("/a%00", Ambiguous::Control),
            ("/a%0d%0ab", Ambiguous::Control),
            ("/%252e%252e/a", Ambiguous::Twice),
            ("/%25%32%65%252e/a", Ambiguous::Twice),
            ("/%25%34%31", Ambiguous::Twice),
            ("/a%c0%afb", Ambiguous::Utf8),
            ("/a%e0%80%afb", Ambiguous::Utf8),
            ("/a%ff", Ambiguous::Utf8),
            ("/a%", Ambiguous::Escape),
            ("/a%2", Ambiguous::Escape),
            ("/a%zz", Ambiguous::Escape),
        ];
        for (path, expected) in table {
            assert_eq!(canonical(path), Err(expected), "{path}");
        }
    }

    #[test]
    fn on_the_way_an_escaped_slash_is_part_of_a_name() {
        assert_eq!(routable("/v2/models/org%2fmodel/infer").as_deref(), Ok("/v2/models/org%2Fmodel/infer"));
        assert_eq!(routable("/a/..%2f"), Ok("/a/..%2F".into()), "no segment of dots");
        assert_eq!(routable("/a/%2e%2e"), Err(Ambiguous::Dots));
    }

    proptest! {
        /// Whoever looks at the canonical form again sees the same.
        #[test]
        fn the_canonical_form_is_its_own(path in "(/|/[a-z.%2fFeE5cC0~;]{0,6}){0,8}") {
            if let Ok(once) = canonical(&path) {
                let once = once.into_owned();
                let again = canonical(&once);
                prop_assert_eq!(again.as_deref(), Ok(&*once), "{}", path);
                let segments: Vec<_> = once.split('/').collect();
                prop_assert!(!segments.contains(&"..") && !segments.contains(&"."), "{} -> {}", path, once);
                prop_assert!(!once.contains("//"), "{} -> {}", path, once);
            }
        }

        /// However a plain path is escaped and detoured, it is the same path, or nobody decides by it.
        #[test]
        fn no_disguise_leads_around(plain in "(/[a-z0-9]{1,5}){1,4}", disguises in prop::collection::vec(0..5u8, 32)) {
            let mut path = String::new();
            for (byte, disguise) in plain.bytes().zip(disguises.iter().cycle()) {
                match (byte, disguise) {
                    (b'/', 1) => path.push_str("//"),
                    (b'/', 2) => path.push_str("/./"),
                    (b'/', 3) => path.push_str("/x/../"),
                    (byte, 4) if byte != b'/' => path.push_str(&format!("%{byte:02x}")),
                    (byte, _) => path.push(char::from(byte)),
                }
            }
            let seen = canonical(&path);
            prop_assert_eq!(seen.as_deref(), Ok(&*plain), "{}", path);
        }

        #[test]
        fn any_text_is_borne(path in any::<String>()) {
            let _ = canonical(&path);
        }
    }
}
