//! Which version serves the request: weights, and users that stay where they are.
//!
//! Without a key the choice is a draw. With a key (a user's header or cookie) it is weighted rendezvous hashing:
//! each backend gets the score `weight / -ln(hash(key, backend))`, the highest wins. A key's choice then depends on
//! nothing but the key and the weights, all sidecars agree without talking, and when weights move from one backend
//! to another only keys between those two move, as many as the shares demand (Schindelhauer and Schomaker 2005).

use rand::Rng;

/// Chooses by a draw; `None` when all weights are zero.
pub fn draw(weights: impl Iterator<Item = u32> + Clone, random: &mut impl Rng) -> Option<usize> {
    let total: u64 = weights.clone().map(u64::from).sum();
    if total == 0 {
        return None;
    }
    let mut ticket = random.random_range(0..total);
    for (i, weight) in weights.enumerate() {
        match ticket.checked_sub(u64::from(weight)) {
            Some(rest) => ticket = rest,
            None => return Some(i),
        }
    }
    None
}

/// Chooses by a key; `names` identify the backends, so that the order of backends does not matter.
/// `None` when all weights are zero.
pub fn by_key<'a>(backends: impl Iterator<Item = (u32, &'a str)>, key: &[u8]) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (i, (weight, name)) in backends.enumerate() {
        if weight == 0 {
            continue;
        }
        // 53 bits of hash, never 0 or 1, so that the logarithm is finite and negative.
        let unit = ((hash(key, name) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let score = f64::from(weight) / -unit.ln();
        if best.is_none_or(|(_, highest)| score > highest) {
            best = Some((i, score));
        }
    }
    best.map(|(i, _)| i)
}

/// BLAKE3, since every build on every machine must agree; it costs what one more cache miss would.
fn hash(key: &[u8], name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    // The length keeps (key, name) apart from every other pair that joins to the same bytes.
    hasher.update(&(key.len() as u64).to_le_bytes()).update(key).update(name.as_bytes());
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    fn share_of_second(weights: [u32; 2]) -> f64 {
        let keys = 20_000;
        let second = (0..keys)
            .filter(|user: &u32| {
                by_key([(weights[0], "a/v1"), (weights[1], "a/v2")].into_iter(), &user.to_le_bytes())
                    == Some(1)
            })
            .count();
        second as f64 / f64::from(keys)
    }

    #[test]
    fn shares_follow_weights() {
        for percent in [0, 1, 10, 50, 99, 100] {
            let asked = f64::from(percent) / 100.0;
            let seen = share_of_second([100 - percent, percent]);
            assert!((seen - asked).abs() < 0.012, "asked {asked}, seen {seen} by key");

            let mut random = SmallRng::seed_from_u64(7);
            let hits = (0..20_000)
                .filter(|_| draw([100 - percent, percent].into_iter(), &mut random) == Some(1))
                .count();
            let seen = hits as f64 / 20_000.0;
            assert!((seen - asked).abs() < 0.012, "asked {asked}, seen {seen} by draw");
        }
    }

    #[test]
    fn nothing_to_choose_from_is_none() {
        let mut random = SmallRng::seed_from_u64(7);
        assert_eq!(draw([0, 0].into_iter(), &mut random), None);
        assert_eq!(draw([].into_iter(), &mut random), None);
        assert_eq!(by_key([(0, "a")].into_iter(), b"user"), None);
    }

    #[test]
    fn the_choice_is_the_same_in_every_build() {
        // If this fails, a rolling upgrade of the proxies would move users between versions: see `hash`.
        let choices: String = (0u8..16)
            .filter_map(|user| by_key([(50, "a/v1"), (50, "a/v2")].into_iter(), &[user]))
            .map(|i| char::from(b'0' + i as u8))
            .collect();
        assert_eq!(choices, "1110001011110101");
    }

    proptest! {
        /// A user moves only from a backend whose share shrinks to one whose share grows, and nobody else moves.
        #[test]
        fn only_the_least_possible_share_of_users_moves(from in 0u32..100, step in 0u32..50) {
            let to = (from + step).min(100);
            let (mut moved, keys) = (0, 4000u32);
            for user in 0..keys {
                let at = |percent: u32| {
                    by_key([(100 - percent, "a/v1"), (percent, "a/v2")].into_iter(), &user.to_le_bytes())
                };
                let (before, after) = (at(from), at(to));
                prop_assert!(!(before == Some(1) && after == Some(0)), "user {user} moved back");
                moved += u32::from(before != after);
            }
            let least = f64::from(to - from) / 100.0;
            prop_assert!((f64::from(moved) / f64::from(keys) - least).abs() < 0.03);
        }
    }
}
