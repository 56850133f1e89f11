//! Where a key is at home: weighted rendezvous hashing down a tree.
//!
//! Every sidecar finds the same home for a key, without talking, from nothing but the names of the endpoints. Plain
//! rendezvous hashing asks every endpoint for its score; here the endpoints are the leaves of a tree of eight branches
//! (three bits of their hashed names to a level), a branch's weight is its number of leaves, and a key walks down by
//! `min -ln(hash) / weight` (Schindelhauer and Schomaker 2005; skeleton tree after Wang et al. 2009). That is three
//! levels for a hundred endpoints and five for ten thousand, and each endpoint gets the same share of the keys. An
//! endpoint that comes or goes moves its share of the keys once at each level: a little more than plain rendezvous
//! hashing, which moves it once, and the price of not asking everybody.

/// A tree of endpoints.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    nodes: Vec<[Branch; 8]>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Branch {
    /// Of the path that leads here.
    salt: u64,
    /// One over the number of leaves; 0 = none.
    lightness: f64,
    leaves: u32,
    /// The endpoint's index if there is one leaf, else the node's.
    to: u32,
}

impl Tree {
    /// The tree over endpoints with these names, hashed; of equal names the first counts.
    pub(crate) fn new(names: impl Iterator<Item = u64>) -> Self {
        let mut leaves: Vec<(u64, u32)> = names.zip(0u32..).map(|(name, i)| (mix(name), i)).collect();
        leaves.sort_unstable();
        leaves.dedup_by_key(|leaf| leaf.0);
        let mut tree = Self::default();
        if !leaves.is_empty() {
            tree.grow(&leaves, 0, 1);
        }
        tree
    }

    fn grow(&mut self, mut leaves: &[(u64, u32)], level: u32, path: u64) -> u32 {
        let node = self.nodes.len();
        self.nodes.push([Branch::default(); 8]);
        while let Some(first) = leaves.first() {
            let bits = branch(first.0, level);
            let (here, rest) = leaves.split_at(leaves.partition_point(|leaf| branch(leaf.0, level) == bits));
            let below = path.wrapping_mul(8).wrapping_add(bits as u64);
            let to = if here.len() == 1 { first.1 } else { self.grow(here, level + 1, below) };
            let lightness = 1.0 / here.len() as f64;
            self.nodes[node][bits] = Branch { salt: mix(below), lightness, leaves: here.len() as u32, to };
            leaves = rest;
        }
        node as u32
    }

    /// The endpoint at which the key is at home.
    pub(crate) fn home(&self, key: u64) -> Option<usize> {
        let mut node = self.nodes.first()?;
        loop {
            let mut best = (f64::INFINITY, &node[0]);
            for branch in node.iter().filter(|branch| branch.leaves > 0) {
                let score = negative_ln(mix(key ^ branch.salt)) * branch.lightness;
                if score < best.0 {
                    best = (score, branch);
                }
            }
            if best.1.leaves <= 1 {
                return Some(best.1.to as usize);
            }
            node = self.nodes.get(best.1.to as usize)?;
        }
    }
}

fn branch(name: u64, level: u32) -> usize {
    (name << (3 * level) >> 61) as usize
}

/// A hash of 64 bits to 64 bits (the finaliser of SplitMix64, Steele et al. 2014).
pub(crate) fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `-ln` of the hash as a number between 0 and 1, from additions and products only, so that every machine gets the
/// same bits; libm promises that to nobody.
fn negative_ln(hash: u64) -> f64 {
    let unit = (hash >> 11) | 1;
    let shift = unit.leading_zeros() - 11;
    // unit = (1 + x) × 2^(52 - shift); the whole stands for unit / 2^53.
    let x = f64::from_bits((1023 << 52) | ((unit << shift) & ((1 << 52) - 1))) - 1.0;
    let ln = LN_1P.iter().rev().fold(0.0, |sum, c| sum * x + c);
    f64::from(shift + 1) * std::f64::consts::LN_2 - ln
}

/// ln(1 + x) between 0 and 1, to within 5e-8: a Chebyshev fit.
const LN_1P: [f64; 9] = [
    3.386965457906e-08,
    9.999942724812e-01,
    -4.998385618343e-01,
    3.315486165205e-01,
    -2.398261605027e-01,
    1.658227526890e-01,
    -9.325203898533e-02,
    3.484971247867e-02,
    -6.151470961925e-03,
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_logarithm_is_one() {
        for x in [1u64, 12345, u64::MAX, u64::MAX / 2, 1 << 62, 987_654_321_987_654_321] {
            let exact = -(((x >> 11) | 1) as f64 / (1u64 << 53) as f64).ln();
            assert!((negative_ln(x) - exact).abs() < 1e-7 * (1.0 + exact), "{x}: {} {exact}", negative_ln(x));
        }
    }

    #[test]
    fn everyone_gets_the_same_share() {
        for n in [1u64, 2, 7, 100] {
            let tree = Tree::new((0..n).map(|i| i * 77));
            let mut keys = vec![0u32; n as usize];
            (0..20_000 * n).for_each(|key| keys[tree.home(mix(key)).unwrap()] += 1);
            let (least, most) = (keys.iter().min().unwrap(), keys.iter().max().unwrap());
            assert!(*least > 19_000 && *most < 21_000, "of {n}: {least} to {most}");
        }
    }

    proptest! {
        /// Who comes gets its share, and few others move.
        #[test]
        fn few_keys_move_for_a_newcomer(n in 1u64..200, seed: u64) {
            let before = Tree::new((0..n).map(|i| seed ^ i));
            let after = Tree::new((0..=n).map(|i| seed ^ i));
            let keys = 4000u64;
            let moved = (0..keys).filter(|key| before.home(mix(*key)) != after.home(mix(*key))).count() as f64;
            let share = 1.0 / (n + 1) as f64;
            let levels = 1.0 + (n as f64).log(8.0);
            prop_assert!(moved / keys as f64 <= share * (levels + 1.0) + 0.03, "{moved} of {keys} moved for 1 of {}", n + 1);
        }
    }
}
