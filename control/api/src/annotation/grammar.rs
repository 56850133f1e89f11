//! What the small languages of the annotations are made of: words between commas, `key=value`, numbers, sizes.
//!
//! In: text. Out: a value. Can go wrong: the text does not parse; the error says which word is wrong and what would be right.

use crate::shown;

/// A value, or what is wrong with the text and what would be right.
pub type Parsed<T> = Result<T, String>;

/// One of two words: whether it is the first.
pub fn either(text: &str, yes: &str, no: &str) -> Parsed<bool> {
    match text.trim() {
        word if word == yes => Ok(true),
        word if word == no => Ok(false),
        other => Err(format!("{} is not known; write {yes} or {no}", shown(other))),
    }
}

/// The words between commas.
pub fn words(text: &str) -> Parsed<Vec<&str>> {
    let words: Vec<_> = text.split(',').map(str::trim).collect();
    match words.iter().any(|word| word.is_empty()) {
        true => Err(format!("{} has an empty part; write a list with single commas between", shown(text))),
        false => Ok(words),
    }
}

/// Reads `key=value,…`; every key at most once and one of `known`.
pub fn settings(text: &str, known: &[&str], mut set: impl FnMut(&str, &str) -> Parsed<()>) -> Parsed<()> {
    let mut seen = Vec::new();
    for word in words(text)? {
        let (key, value) = word.split_once('=').map_or((word, ""), |(key, value)| (key.trim(), value.trim()));
        if !known.contains(&key) {
            return Err(format!("{} is not a setting; the settings are {}", shown(key), known.join(", ")));
        }
        if value.is_empty() {
            return Err(format!("{key} has no value; write {key}=<value>"));
        }
        if seen.contains(&key) {
            return Err(format!("{key} is set twice; set it once"));
        }
        seen.push(key);
        set(key, value).map_err(|error| format!("{key}: {error}"))?;
    }
    Ok(())
}

/// A whole number from `least` to `most`.
pub fn number(text: &str, least: u32, most: u32) -> Parsed<u32> {
    match text.trim().parse() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ if most == u32::MAX => Err(format!("{} is not a whole number of at least {least}", shown(text))),
        _ => Err(format!("{} is not a whole number from {least} to {most}", shown(text))),
    }
}

/// A port number.
pub fn port(text: &str) -> Parsed<u16> {
    match text.trim().parse() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{} is not a port; write a number from 1 to 65535", shown(text))),
    }
}

/// A size in the form of a Kubernetes quantity without fractions.
pub fn bytes(text: &str) -> Parsed<u64> {
    let units = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("", 1),
    ];
    let (digits, unit) = units
        .iter()
        .find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|digits| (digits, *unit)))
        .unwrap_or((text, 1));
    digits
        .parse::<u64>()
        .ok()
        .and_then(|count| count.checked_mul(unit))
        .ok_or_else(|| format!("{} is not a size; write for example 64Ki or 256Mi", shown(text)))
}

/// A positive quantity as Kubernetes writes it, without exponents.
pub fn quantity(text: &str) -> Parsed<String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let sound = ["", "m", "k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"].contains(&unit)
        && digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        && digits.parse::<f64>().is_ok_and(|number| number > 0.0);
    match sound {
        true => Ok(text.to_owned()),
        false => {
            Err(format!("{} is no quantity above zero; write 250m of CPU, 512Mi of memory", shown(text)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_those_of_kubernetes() {
        for text in ["250m", "1", "0.5", "512Mi", "2Gi", "1G"] {
            assert_eq!(quantity(text).as_deref(), Ok(text));
        }
        for text in ["", "0", "-1", "1 Gi", "Mi", "1GiB", "inf", "1e3", "1.2.3"] {
            assert!(quantity(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_setting_is_known_has_a_value_and_is_set_once() {
        let read = |text: &str| {
            let mut all = Vec::new();
            settings(text, &["a", "b"], |key, value| {
                all.push(format!("{key}:{}", number(value, 1, 9)?));
                Ok(())
            })
            .map(|()| all)
        };
        assert_eq!(read("b=2, a = 1"), Ok(vec!["b:2".to_owned(), "a:1".to_owned()]));
        for (text, told) in [
            ("c=1", "\"c\" is not a setting; the settings are a, b"),
            ("a", "a has no value; write a=<value>"),
            ("a=1,a=2", "a is set twice"),
            ("a=1,,b=2", "empty part"),
            ("a=10", "a: \"10\" is not a whole number from 1 to 9"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
