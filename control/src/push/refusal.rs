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

/// What `reason` says of `name`, one of the `names` that were sent: a client that refuses several resources joins
/// its reasons with semicolons. Words that name nothing speak of everything.
pub(super) fn reason_for(name: &str, names: &[&str], reason: &str) -> String {
    let mut mine = false;
    let parts = reason.split("; ").filter(|part| {
        if position(part, name).is_some() {
            mine = true;
        } else if names.iter().any(|other| position(part, other).is_some()) {
            mine = false;
        }
        mine
    });
    match &*parts.collect::<Vec<_>>() {
        [] => format!("{name}: {reason}"),
        parts => parts.join("; "),
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
    fn a_reason_speaks_of_its_resource() {
        let names = ["a/b", "a/c"];
        let both = "Service a/b: port 0 is none; it must be 1 or more; Service a/c: no name";
        let table = [
            ("a/b", "a/b: bad", "a/b: bad"),
            ("a/b", "out of memory", "a/b: out of memory"),
            ("a/b", both, "Service a/b: port 0 is none; it must be 1 or more"),
            ("a/c", both, "Service a/c: no name"),
        ];
        for (name, reason, expected) in table {
            assert_eq!(reason_for(name, &names, reason), expected);
        }
    }
}
