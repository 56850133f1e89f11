//! The corpus: each probe alone and behind other requests, cut into segments in several ways.
//!
//! A [`Probe`] is bytes with what a right reader makes of them. The body of nearly all of them is itself a request (`@body`
//! begins with [`SMUGGLED`]), so that whoever misreads where one ends executes it. Everything of a case bears its [`mark`].

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

use crate::backends::sha256;
use crate::{framing, heads};

/// All cases come of this.
pub(crate) const SEED: u64 = 0x009_112;
/// What must never be seen by a server as a request, unless a probe says that it is one.
const SMUGGLED: &str = "GET @smuggled HTTP/1.1\r\nhost: @host\r\nx: y\r\n\r\n";

/// What may become of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is valid: it arrives as it is.
    Passes,
    /// RFC 9110 and 9112 leave it open, or servers differ: it arrives exactly so, or not at all.
    MayPass,
    /// It reaches nobody, not even in part.
    Refused,
    /// Its head may be passed on; nobody takes it for whole.
    Unfinished,
}

/// A request in the bytes of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Want {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) host: String,
    pub(crate) body: Vec<u8>,
    pub(crate) fate: Fate,
}

/// What becomes of the request behind a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Behind {
    /// It is served.
    Served,
    /// It may be served: the probe is refused, and where it ends is beyond doubt.
    MayBe,
    /// It is not read: nobody can know where the probe ends, or the probe was the last.
    Unread,
    /// It belongs to the probe, whose end does not come.
    Swallowed,
}

/// A template: `@target`, `@host`, `@body`, `@length` (of the body), `@hex` (the same, as a chunk's size), `@smuggled` (a
/// target) and `@tensors` (a field of an inference, or nothing) are filled in.
#[derive(Clone, Debug)]
pub(crate) struct Probe {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) wants: Vec<Want>,
    pub(crate) behind: Behind,
}

impl Probe {
    /// One request, by default a POST with the body.
    pub(crate) fn new(name: impl Into<String>, bytes: impl Into<Vec<u8>>, fate: Fate) -> Self {
        let behind = match fate {
            Fate::Passes => Behind::Served,
            Fate::MayPass => Behind::MayBe,
            Fate::Refused | Fate::Unfinished => Behind::Unread,
        };
        let want = Want {
            method: "POST".to_owned(),
            target: "@target".to_owned(),
            host: "@host".to_owned(),
            body: b"@body".to_vec(),
            fate,
        };
        Self { name: name.into(), bytes: bytes.into(), wants: vec![want], behind }
    }

    pub(crate) fn method(mut self, method: &str) -> Self {
        self.wants[0].method = method.to_owned();
        self
    }

    pub(crate) fn target(mut self, target: &str) -> Self {
        self.wants[0].target = target.to_owned();
        self
    }

    pub(crate) fn host(mut self, host: &str) -> Self {
        self.wants[0].host = host.to_owned();
        self
    }

    pub(crate) fn body(mut self, body: &str) -> Self {
        self.wants[0].body = body.as_bytes().to_vec();
        self
    }

    pub(crate) fn behind(mut self, behind: Behind) -> Self {
        self.behind = behind;
        self
    }

    /// What stands in the place of the body is a request of its own.
    pub(crate) fn then(mut self, fate: Fate) -> Self {
        let target = "@smuggled".to_owned();
        let host = "@host".to_owned();
        self.wants.push(Want { method: "GET".to_owned(), target, host, body: Vec::new(), fate });
        self
    }
}

/// Whether bodies are small, or so large and of such requests that the tensor path takes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    Small,
    /// Bytes of a body.
    Tensors(usize),
}

/// One conversation.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) number: usize,
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) wants: Vec<Want>,
    cuts: Vec<usize>,
}

/// What all of a case bears.
pub(crate) fn mark(number: usize) -> String {
    format!("c{number:05}")
}

/// The case that a text bears the mark of.
pub(crate) fn marked(text: &str) -> Option<usize> {
    text.as_bytes().windows(6).find_map(|six| {
        let digits = std::str::from_utf8(six.strip_prefix(b"c")?).ok()?;
        digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok())?
    })
}

impl Case {
    /// The bytes, in the pieces that they are sent in.
    pub(crate) fn segments(&self) -> impl Iterator<Item = &[u8]> {
        let ends = self.cuts.iter().copied().chain([self.bytes.len()]);
        let starts = [0].into_iter().chain(self.cuts.iter().copied());
        starts.zip(ends).map(|(start, end)| &self.bytes[start..end])
    }

    /// Whether some of it waits for bytes that do not come.
    pub(crate) fn is_unfinished(&self) -> bool {
        self.wants.iter().any(|want| want.fate == Fate::Unfinished)
    }

    /// Answers that must come.
    pub(crate) fn answers_due(&self) -> usize {
        self.wants.iter().take_while(|want| want.fate == Fate::Passes).count()
    }
}

/// All cases, of which each comes in both sizes with the same number and name.
pub(crate) fn cases(size: Size) -> Vec<Case> {
    let mut cases = Vec::new();
    let probes: Vec<Probe> = framing::probes().into_iter().chain(heads::probes()).collect();
    for (context, before) in [("alone", 0), ("after-get", 1), ("after-post", 2), ("after-both", 3)] {
        for probe in &probes {
            // What may pass, and is no HTTP for whoever finds out by the first bytes what a connection speaks.
            let word = probe.bytes.split(|byte| *byte == b' ').next().unwrap_or_default();
            let is_clear = word.iter().all(|byte| byte.is_ascii_uppercase() || *byte == b'-');
            if before == 0 && probe.wants[0].fate == Fate::MayPass && !is_clear {
                continue;
            }
            let number = cases.len();
            let mut random = SmallRng::seed_from_u64(SEED ^ number as u64);
            let how = *["whole", "ends", "random", "bytes", "last"].choose(&mut random).unwrap();
            let name = format!("{}/{context}/{how}", probe.name);
            cases.push(case(number, name, probe, before, how, size, &mut random));
        }
    }
    cases
}

fn case(
    number: usize,
    name: String,
    probe: &Probe,
    before: usize,
    how: &str,
    size: Size,
    random: &mut SmallRng,
) -> Case {
    let filling = Filling::new(number, size);
    let (mut bytes, mut wants) = (Vec::new(), Vec::new());
    if before & 1 > 0 {
        bytes.extend_from_slice(b"GET @before HTTP/1.1\r\nhost: @host\r\n\r\n");
        wants.push(want("GET", "@before", "", Fate::Passes));
    }
    if before & 2 > 0 {
        bytes.extend_from_slice(
            b"POST @before HTTP/1.1\r\nhost: @host\r\ncontent-length: @length\r\n\r\n@body",
        );
        wants.push(want("POST", "@before", "@body", Fate::Passes));
    }
    let begins = filling.fill(&bytes).len();
    bytes.extend_from_slice(&probe.bytes);
    wants.extend(probe.wants.iter().cloned());
    let ends = filling.fill(&bytes).len();
    bytes.extend_from_slice(b"GET @tail HTTP/1.1\r\nhost: @host\r\nconnection: close\r\n\r\n");
    let fate = match probe.behind {
        Behind::Served => Fate::Passes,
        Behind::MayBe => Fate::MayPass,
        Behind::Unread => Fate::Refused,
        Behind::Swallowed => Fate::Unfinished,
    };
    wants.push(want("GET", "@tail", "", fate));
    for want in &mut wants {
        want.target = filling.text(&want.target);
        want.host = filling.text(&want.host);
        want.body = filling.fill(&want.body);
    }
    let bytes = filling.fill(&bytes);
    let cuts = cuts(&bytes, begins..ends, how, random);
    Case { number, name, bytes, wants, cuts }
}

fn want(method: &str, target: &str, body: &str, fate: Fate) -> Want {
    let (method, target, host) = (method.to_owned(), target.to_owned(), "@host".to_owned());
    Want { method, target, host, body: body.as_bytes().to_vec(), fate }
}

/// Where the bytes are cut. Cuts lie in the probe's own head and at its end: what matters is there.
fn cuts(bytes: &[u8], probe: std::ops::Range<usize>, how: &str, random: &mut SmallRng) -> Vec<usize> {
    let near = probe.start..probe.end.min(probe.start + 400);
    let mut cuts: Vec<usize> = match how {
        // In the middle of and behind each end of a line.
        "ends" => {
            near.clone().filter(|at| matches!(bytes[*at], b'\r' | b'\n')).map(|at| at + 1).take(24).collect()
        }
        "random" => (0..4).map(|_| random.random_range(near.clone())).collect(),
        "bytes" => {
            let first = random.random_range(near.clone());
            (first..near.end).take(24).collect()
        }
        "last" => vec![probe.end - 1, probe.end],
        _ => Vec::new(),
    };
    cuts.sort_unstable();
    cuts.dedup();
    cuts.retain(|cut| (1..bytes.len()).contains(cut));
    cuts
}

/// What stands for the words of a template.
struct Filling {
    words: Vec<(&'static str, Vec<u8>)>,
}

impl Filling {
    fn new(number: usize, size: Size) -> Self {
        let mark = mark(number);
        let host = format!("{mark}.test");
        let smuggled = format!("/{mark}/smuggled");
        let mut body = SMUGGLED.replace("@smuggled", &smuggled).replace("@host", &host).into_bytes();
        let (mut target, mut tensors) = (format!("/{mark}/probe"), "");
        if let Size::Tensors(length) = size {
            // As many requests as have room, so that one begins wherever a reader loses its way.
            body = body.repeat(length / body.len());
            "/v2/models/m/infer".clone_into(&mut target);
            tensors = "inference-header-content-length: 2\r\n";
        }
        let (length, hex) = (body.len().to_string(), format!("{:x}", body.len()));
        let words = vec![
            ("@before", format!("/{mark}/before").into_bytes()),
            ("@tail", format!("/{mark}/tail").into_bytes()),
            ("@smuggled", smuggled.into_bytes()),
            ("@target", target.into_bytes()),
            ("@tensors", tensors.as_bytes().to_vec()),
            ("@host", host.into_bytes()),
            ("@length", length.into_bytes()),
            ("@hex", hex.into_bytes()),
            ("@body", body),
        ];
        Self { words }
    }

    fn fill(&self, template: &[u8]) -> Vec<u8> {
        let (mut rest, mut filled) = (template, Vec::new());
        while let Some(at) = rest.iter().position(|byte| *byte == b'@') {
            filled.extend_from_slice(&rest[..at]);
            rest = &rest[at..];
            let word = self.words.iter().find(|(word, _)| rest.starts_with(word.as_bytes()));
            let (word, value) =
                word.map_or((&rest[..1], &rest[..1]), |(word, value)| (word.as_bytes(), &value[..]));
            filled.extend_from_slice(value);
            rest = &rest[word.len()..];
        }
        filled.extend_from_slice(rest);
        filled
    }

    fn text(&self, template: &str) -> String {
        String::from_utf8(self.fill(template.as_bytes())).unwrap()
    }
}

impl Want {
    /// The digest of its body.
    pub(crate) fn digest(&self) -> String {
        sha256(&self.body)
    }
}
