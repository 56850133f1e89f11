//! Where a request ends that comes over HTTP/1.1, as far as that must be known before hyper reads it.
//!
//! In: bytes that begin where a request begins. Out: how long its head and its body are, and whether the body is held back.
//! Pure. Hyper decides the same for itself from the same bytes, and the two must never differ: a body that one of them takes
//! for the next request is how requests are smuggled. So heads are parsed by hyper's own parser (`httparse`) with hyper's
//! settings; what is framed in any other way than by one plain `Content-Length` ([`Framing::Other`]) ends the looking, for good:
//! of such a connection every further byte is hyper's alone.

use std::ops::Range;

/// A head that is longer is left to hyper, which has a limit of its own. Requests for inference have some hundreds of bytes.
pub const MAX_HEAD: usize = 16 << 10;
/// Header fields, as many as hyper is told to take.
const MAX_FIELDS: usize = 128;
/// Digits of a length: as many as are never too large for a `u64`.
const MAX_DIGITS: usize = 18;
/// The field of the Open Inference Protocol that says where the JSON ends and tensors begin. Without it there are none.
const HEADER_LENGTH: &str = "inference-header-content-length";

/// What a head says of the request's framing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Framing {
    /// The head is not there whole.
    More,
    /// So many bytes of head, and then of body.
    Plain {
        /// Bytes of the head.
        head: usize,
        /// Bytes of the body.
        body: u64,
    },
    /// The same, and the body may be taken past hyper.
    Held {
        /// Bytes of the head.
        head: usize,
        /// Bytes of the body.
        body: u64,
        /// Where in the head the digits of its `Content-Length` are.
        digits: Range<usize>,
    },
    /// Not to be followed from here on.
    Other,
}

/// What these bytes say, which begin where a request begins. Bodies of at least `least` bytes may be held.
pub fn of(bytes: &[u8], least: u64) -> Framing {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let head = match request.parse(bytes) {
        Ok(httparse::Status::Complete(head)) if head <= MAX_HEAD => head,
        Ok(httparse::Status::Partial) if bytes.len() < MAX_HEAD => return Framing::More,
        // Refused by hyper, in its own words.
        _ => return Framing::Other,
    };
    let (mut length, mut tensors, mut waits) = (None, false, false);
    for field in request.headers.iter() {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        if is("content-length") {
            let all_digits = field.value.iter().all(u8::is_ascii_digit);
            if length.is_some() || !all_digits || !(1..=MAX_DIGITS).contains(&field.value.len()) {
                return Framing::Other;
            }
            length = Some(field.value);
        } else if is("transfer-encoding") || is("upgrade") {
            return Framing::Other;
        } else if is("expect") {
            waits = true;
        } else if is(HEADER_LENGTH) {
            tensors = true;
        }
    }
    if request.method == Some("CONNECT") {
        return Framing::Other;
    }
    let Some(digits) = length else { return Framing::Plain { head, body: 0 } };
    let body = digits.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0'));
    // A client that waits to be told to go on is told so by hyper, when the body is asked for.
    let held = body >= least.max(1)
        && tensors
        && !waits
        && request.version == Some(1)
        && request.method == Some("POST")
        && request.path.is_some_and(is_inference);
    if !held {
        return Framing::Plain { head, body };
    }
    // The parser's slices are of `bytes`.
    let start = digits.as_ptr() as usize - bytes.as_ptr() as usize;
    Framing::Held { head, body, digits: start..start + digits.len() }
}

/// Roughly whether a target is that of a request for inference: who gets the body looks at it properly.
fn is_inference(target: &str) -> bool {
    target.ends_with("/infer") && target.contains("/v2/models/")
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFER: &str = "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\n";

    fn with(fields: &str) -> Framing {
        of(format!("{INFER}{fields}\r\n").as_bytes(), 100)
    }

    #[test]
    fn a_large_body_of_tensors_is_held_and_its_length_found() {
        let head = format!("{INFER}Inference-Header-Content-Length: 7\r\nContent-Length:  1000 \r\n\r\n");
        let Framing::Held { head: length, body, digits } = of(head.as_bytes(), 1000) else {
            panic!("{head}")
        };
        assert_eq!((length, body, &head[digits]), (head.len(), 1000, "1000"));
        assert_eq!(of(head.as_bytes(), 1001), Framing::Plain { head: head.len(), body: 1000 });
        for cut in 0..head.len() {
            assert_eq!(of(&head.as_bytes()[..cut], 1000), Framing::More, "{cut} bytes");
        }
    }

    #[test]
    fn what_is_not_tensors_or_waits_is_followed_and_not_held() {
        for fields in [
            "content-length: 1000\r\n",
            "inference-header-content-length: 7\r\n",
            "inference-header-content-length: 7\r\ncontent-length: 0\r\n",
            "inference-header-content-length: 7\r\ncontent-length: 1000\r\nexpect: 100-continue\r\n",
        ] {
            assert!(matches!(with(fields), Framing::Plain { .. }), "{fields}");
        }
        for start in [
            "PUT /v2/models/m/infer HTTP/1.1",
            "POST /v2/models/m HTTP/1.1",
            "POST /v2/models/m/infer HTTP/1.0",
        ] {
            let head =
                format!("{start}\r\ninference-header-content-length: 7\r\ncontent-length: 1000\r\n\r\n");
            assert_eq!(of(head.as_bytes(), 100), Framing::Plain { head: head.len(), body: 1000 }, "{start}");
        }
    }

    #[test]
    fn what_two_readers_could_take_for_different_lengths_is_not_followed() {
        let tensors = "inference-header-content-length: 7\r\n";
        for fields in [
            "content-length: 1000\r\ncontent-length: 1000\r\n",
            "content-length: 1000\r\ncontent-length: 5\r\n",
            "content-length: 1000, 1000\r\n",
            "content-length: +1000\r\n",
            "content-length: 0x10\r\n",
            "content-length:\r\n",
            "content-length : 1000\r\n",
            "content-length: 1000000000000000000000\r\n",
            "transfer-encoding: chunked\r\n",
            "content-length: 1000\r\ntransfer-encoding: chunked\r\n",
            "content-length: 1000\r\nTransfer-Encoding: identity\r\n",
            "content-length: 1000\r\nupgrade: h2c\r\n",
            "content-length: 1000\r\n folded\r\n",
            "content-length\0: 1000\r\n",
        ] {
            assert_eq!(with(&format!("{tensors}{fields}")), Framing::Other, "{fields}");
        }
        assert_eq!(of(b"CONNECT a:1 HTTP/1.1\r\nhost: a\r\n\r\n", 100), Framing::Other);
        assert_eq!(of(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 100), Framing::Other);
        assert_eq!(of(&[b'a'; MAX_HEAD], 100), Framing::Other, "a head without an end");
    }
}
