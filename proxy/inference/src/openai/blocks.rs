//! A text as a chain of hashes, one for each block: two texts have as many hashes in common as leading blocks.

/// Bytes of text in one block: about 64 tokens, four blocks of a vLLM's KV cache. Shorter blocks would find a little
/// more in common and cost more to compare.
pub const BLOCK: usize = 256;

/// The most blocks that are hashed: 64 KiB of text, about 16,000 tokens. Prompts that agree so far are alike.
pub const MAX_BLOCKS: usize = 256;

/// The hashes of a text that is still coming.
#[derive(Debug, Clone)]
pub(super) struct Blocks {
    block: [u8; BLOCK],
    filled: usize,
    hashes: Vec<u64>,
}

impl Default for Blocks {
    fn default() -> Self {
        Self { block: [0; BLOCK], filled: 0, hashes: Vec::new() }
    }
}

impl Blocks {
    /// More text.
    pub(super) fn push(&mut self, mut text: &[u8]) {
        while !text.is_empty() && self.hashes.len() < MAX_BLOCKS {
            let taken = text.len().min(BLOCK - self.filled);
            let (now, later) = text.split_at(taken);
            self.block[self.filled..self.filled + taken].copy_from_slice(now);
            self.filled += taken;
            text = later;
            if self.filled == BLOCK {
                let before = self.hashes.last().copied().unwrap_or_default();
                self.hashes.push(chain(before, &self.block));
                self.filled = 0;
            }
        }
    }

    /// The hashes of all whole blocks. What is left over is not told: it will be another block when the text goes on.
    pub(super) fn finish(self) -> Vec<u64> {
        self.hashes
    }
}

/// BLAKE3 over the hash of what came before and the block: the same on every machine and in every version, and nobody
/// can make two prompts that meet.
fn chain(before: u64, block: &[u8]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&before.to_le_bytes()).update(block);
    first(&hasher.finalize())
}

/// The first eight bytes.
pub(super) fn first(hash: &blake3::Hash) -> u64 {
    let bytes: [u8; 8] = std::array::from_fn(|at| hash.as_bytes()[at]);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hashes(pieces: &[&[u8]]) -> Vec<u64> {
        let mut blocks = Blocks::default();
        pieces.iter().for_each(|piece| blocks.push(piece));
        blocks.finish()
    }

    #[test]
    fn texts_have_their_leading_blocks_in_common() {
        let common = "the same system prompt ".repeat(50);
        let [a, b] = ["first", "other"].map(|end| hashes(&[common.as_bytes(), end.repeat(200).as_bytes()]));
        let shared = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
        assert_eq!(shared, common.len() / BLOCK);
        assert_eq!(a.len(), (common.len() + 1000) / BLOCK);
        assert!(a[shared..].iter().all(|hash| !b.contains(hash)), "a chain does not meet again");
    }

    #[test]
    fn a_hash_is_the_same_on_every_machine_and_in_every_version() {
        // What other sidecars compute; changing it loses all affinity while a fleet is being updated.
        assert_eq!(hashes(&[&[b'a'; BLOCK]]), [2_858_515_049_984_356_953]);
    }

    #[test]
    fn memory_is_bounded() {
        assert_eq!(hashes(&[&[7; BLOCK * (MAX_BLOCKS + 10)]]).len(), MAX_BLOCKS);
    }

    proptest! {
        #[test]
        fn it_does_not_matter_where_it_is_cut(text in prop::collection::vec(any::<u8>(), 0..2000), cut in any::<prop::sample::Index>()) {
            let (a, b) = text.split_at(cut.index(text.len() + 1));
            prop_assert_eq!(hashes(&[a, b]), hashes(&[&text]));
        }
    }
}
