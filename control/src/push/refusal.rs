//! Which resources a client means when it refuses a response.
//!
//! A NACK refuses a whole response, but a good client applies what is sound and names what is not, so the siblings
//! count as acknowledged. In: the names that were sent and the client's words. Out: the names that it refused: those that its
//! words contain, or all of them when they contain none.

use std::collections::BTreeSet;

/// The names that `reason` speaks of; all of them when it names none.
pub(super) fn refused_of<'a>(names: &[&'a str], reason: &str) -> BTreeSet<&'a str> {
    let named: BTreeSet<&str> =
        names.iter().copied().filter(|name| position(reason, name).is_some()).collect();
    if named.is_empty() { names.iter().copied().collect() } else { named }
}

/// The client's words, with the resource named in front if they do not name it themselves.
pub(super) fn reason_for(name: &str, reason: &str) -> String {
    match position(reason, name) {
        Some(_) => reason.to_owned(),
        None => format!("{name}: {reason}"),
    }
}

/// Where `name` stands in `text` as a whole: `team-a/resnet` is not in `team-a/resnet-v2`.
fn position(text: &str, name: &str) -> Option<usize> {
    let inner = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '/');
    text.match_indices(name).map(|(at, _)| at).find(|at| {
        let before = text[..*at].chars().next_back();
        let mut after = text[at + name.len()..].chars();
        // A dot or colon ends a name, unless the name goes on behind it.
        let goes_on = match after.next() {
            Some('.' | ':') => after.next().is_some_and(inner),
            Some(c) => inner(c),
            None => false,
        };
        !goes_on && !before.is_some_and(|c| inner(c) || c == '.' || c == ':')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_means_the_names_that_it_contains() {
        let names = ["team-a/resnet", "team-a/resnet-v2", "10.0.0.1:80", "team-a/resnet/team-a/canary/0"];
        let table: [(&str, &[&str]); 7] = [
            ("team-a/resnet: no port", &["team-a/resnet"]),
            ("team-a/resnet-v2: no port", &["team-a/resnet-v2"]),
            ("Weights team-a/resnet/team-a/canary/0 name nothing.", &["team-a/resnet/team-a/canary/0"]),
            ("'10.0.0.1:80' is odd", &["10.0.0.1:80"]),
            ("10.0.0.1:8080 is odd", &names),
            ("team-a/resnet, team-a/resnet-v2", &["team-a/resnet", "team-a/resnet-v2"]),
            ("out of memory", &names),
        ];
        for (reason, expected) in table {
            assert_eq!(refused_of(&names, reason), expected.iter().copied().collect(), "{reason}");
        }
    }

    #[test]
    fn a_reason_always_names_its_resource() {
        assert_eq!(reason_for("a/b", "a/b: bad"), "a/b: bad");
        assert_eq!(reason_for("a/b", "bad"), "a/b: bad");
    }
}
