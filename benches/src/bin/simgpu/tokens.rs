//! Text as tokens: four bytes each, which is about what English has; no tokenizer is needed to spend time.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::kv::Name;
use super::llm::BLOCK;

/// Bytes of a token.
const TOKEN_BYTES: usize = 4;

/// Tokens of a text.
pub(crate) fn count(text: &str) -> u32 {
    u32::try_from(text.len().div_ceil(TOKEN_BYTES)).unwrap_or(u32::MAX)
}

/// A number for each token.
pub(crate) fn ids(text: &str) -> Vec<u32> {
    let id = |token: &[u8]| token.iter().fold(0, |id, byte| (id << 7) | u32::from(byte & 0x7f));
    text.as_bytes().chunks(TOKEN_BYTES).map(id).collect()
}

/// The names of its full blocks, each chained to those before it.
pub(crate) fn blocks(text: &str) -> Vec<Name> {
    let mut chain = DefaultHasher::new();
    text.as_bytes()
        .chunks_exact(BLOCK as usize * TOKEN_BYTES)
        .map(|block| {
            block.hash(&mut chain);
            chain.finish()
        })
        .collect()
}

/// How long the answer to a text is: always the same for the same text, exponentially distributed over texts. Whoever routes
/// the request cannot know it, since it is not what `max_tokens` says.
pub(crate) fn output(text: &str, mean: f64, max: u32) -> u32 {
    let mut hash = DefaultHasher::new();
    text.hash(&mut hash);
    // The upper 53 bits are a number in (0, 1].
    let uniform = ((hash.finish() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
    let length = (-uniform.ln() * mean).ceil();
    (length as u32).clamp(1, max.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_begin_alike_share_their_first_blocks() {
        let system = "s".repeat(200);
        let (a, b) = (format!("{system}{}", "a".repeat(100)), format!("{system}{}", "b".repeat(100)));
        let (a, b) = (blocks(&a), blocks(&b));
        assert_eq!((a.len(), &a[..3]), (4, &b[..3]));
        assert_ne!(a[3], b[3]);
        assert_eq!((count("abcde"), ids("abcde").len()), (2, 2));
        assert_ne!(ids("abcd"), ids("abdc"));
    }

    #[test]
    fn lengths_are_distributed_and_bounded() {
        let lengths: Vec<u32> = (0..4000).map(|n| output(&format!("conversation {n}"), 50.0, 200)).collect();
        let mean = lengths.iter().sum::<u32>() as f64 / 4000.0;
        assert!((46.0..52.0).contains(&mean), "{mean}: the longest are cut, so a little below 50");
        assert!(lengths.iter().all(|length| (1..=200).contains(length)));
        assert_eq!(output("x", 50.0, 200), output("x", 50.0, 200));
    }
}
