//! What others wrote, as our sentences show it.

/// Characters that are shown: what is wrong with a text shows in its beginning, and what to do must not be lost behind the rest where a
/// sentence is cut off (conditions, Events, `grpc-message`).
const MOST: usize = 64;

/// A text in quotes, escaped, and no more of it than helps.
pub fn shown(text: &str) -> String {
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_does_not_hide_what_to_do() {
        assert_eq!(shown("a\"\n"), r#""a\"\n""#);
        assert_eq!(shown(&"é".repeat(64)), format!("{:?}", "é".repeat(64)));
        assert_eq!(shown(&"é".repeat(65)), format!("{:?}…", "é".repeat(64)));
    }
}
