//! What people write: annotations, and YAML.

use penstock_api::annotation::{Ports, Subnet, grammar, pod};
use penstock_api::yaml::{self, Content, Node};
use serde_json::Value;

use crate::{bounded, sentence, within};

/// Annotations of a pod, a line each: the name behind `penstock.io/`, a colon, the value. What is refused is refused in the name of
/// its annotation; ports and subnets that are read are the same when they are written and read again; a value that means something
/// means the same between blanks where it is made of words.
pub fn annotations(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for line in text.lines() {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        let name = format!("penstock.io/{name}");
        if let Some(Err(error)) = bounded(data, || pod::check(&name, value)) {
            sentence(&error);
            assert!(error.to_string().starts_with(&format!("annotation {name}: ")), "{error}");
        }
        if let Ok(permissive) = pod::PERMISSIVE.read(value) {
            assert_eq!(pod::PERMISSIVE.read(&format!(" {value}\t")), Ok(permissive));
        }
        if let Ok(admission) = pod::ADMISSION.read(value) {
            assert!(admission.limit <= 65_536 && admission.queue <= 1_048_576, "{admission:?}");
            assert_eq!(pod::ADMISSION.read(&value.replace(',', " , ").replace('=', " = ")), Ok(admission));
        }
        if let Ok(ports) = value.parse::<Ports>() {
            assert_eq!(ports.to_string().parse(), Ok(ports.clone()), "written and read again");
            let ranges = ports.ranges();
            assert!(ranges.iter().all(|range| *range.start() > 0 && !range.is_empty()), "{ports}");
            assert!(ranges.windows(2).all(|two| two[0].end() + 1 < *two[1].start()), "{ports}");
        }
        for subnet in value.split(',').filter_map(|part| part.parse::<Subnet>().ok()) {
            assert_eq!(subnet.to_string().parse(), Ok(subnet), "written and read again");
            assert!(subnet.contains(subnet.address()));
        }
        if let Ok(bytes) = grammar::bytes(value) {
            assert_eq!(grammar::bytes(&bytes.to_string()), Ok(bytes));
        }
        if let Ok(quantity) = grammar::quantity(value) {
            assert_eq!(quantity, value, "Kubernetes is told what was written");
        }
    }
}

/// What YAML takes at most besides what its text does: aliases say a thing again without saying it, a bounded number of times.
const ALIASES: usize = 64 << 20;

/// A file of a directory. What is read says the same when it is written as JSON, which is YAML, and read again; every value stands
/// on a line that there is; what is refused is refused with a line that there is, or with none.
pub fn yaml(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    // YAML ends a line with either (1.2.2, 5.4).
    let lines = text.matches(['\n', '\r']).count() + 1;
    let nodes = match within(data.len() * crate::LARGEST + ALIASES, data, || yaml::parse(text)) {
        Ok(nodes) => nodes,
        Err(error) => {
            sentence(&error);
            assert!(error.line <= lines, "line {} of {lines}: {error}", error.line);
            return;
        }
    };
    for node in nodes {
        let (mut values, mut longest) = (0, 0);
        look(&node, lines, &mut values, &mut longest);
        let json = node.to_json();
        assert!(node.line_of("/metadata/annotations/penstock.io~1retry") <= lines);
        // An alias bomb is not worth a second reading, and a document that is nothing is none.
        if values > 10_000 || json.is_null() {
            continue;
        }
        // Before a colon YAML allows 1,024 characters (1.2.2, 7.4.2), while a key without one may have more. JSON may write six for one.
        if longest > 1_024 / 6 {
            continue;
        }
        let written = json.to_string();
        // What JSON need not escape, and the reader takes only escaped.
        if written.contains(|c: char| c.is_control() || matches!(c, '\u{feff}' | '\u{fffe}' | '\u{ffff}')) {
            continue;
        }
        let again = match yaml::parse(&written) {
            Ok(nodes) => nodes,
            Err(error) => panic!("{written} is refused: {error}"),
        };
        let [again] = &again[..] else { panic!("{written} has {} documents", again.len()) };
        assert_eq!(again.to_json(), json, "written and read again");
    }
}

fn look(node: &Node, lines: usize, values: &mut usize, longest: &mut usize) {
    *values += 1;
    assert!(node.line <= lines, "line {} of {lines}", node.line);
    match &node.content {
        Content::Scalar(value) => {
            assert!(!matches!(value, Value::Array(_) | Value::Object(_)), "{value} is no scalar");
        }
        Content::List(items) => items.iter().for_each(|item| look(item, lines, values, longest)),
        Content::Map(entries) => {
            for (at, (key, value)) in entries.iter().enumerate() {
                assert!(!key.is_empty(), "a key is empty");
                assert!(
                    at > 50 || !entries[..at].iter().any(|(other, _)| other == key),
                    "{key:?} stands twice"
                );
                *longest = key.len().max(*longest);
                look(value, lines, values, longest);
            }
        }
    }
}
