//! Answers that are kept for a while, within a bound of bytes.
//!
//! Who is let in when it is full is decided by how often it is asked for (W-TinyLFU, Einziger et al. 2017, as the crate
//! `moka` has it: the field's usual one, with no thread of its own). Ages are told by the caller's clock. Whose answer it is,
//! and which load of the model gave it, is part of the key ([`crate::key`]): nothing has to be looked for and thrown away
//! when a model is loaded anew, it is just not asked for any more.

use std::time::Duration;

use http::HeaderMap;
use http::header::CACHE_CONTROL;
use moka::sync::Cache as Kept;

use crate::key::Hash;

/// What an entry takes besides its answer, bytes.
const OVERHEAD: u64 = 256;
/// Weights are counted in units of so many bytes, so that large caches fit 32 bits an entry.
const UNIT: u64 = 64;

/// Answers by what was asked.
#[derive(Debug)]
pub struct Cache<V: Clone + Send + Sync + 'static> {
    kept: Kept<Hash, (Duration, u32, V)>,
    capacity: u64,
}

impl<V: Clone + Send + Sync + 'static> Cache<V> {
    /// Keeps answers of up to so many bytes.
    pub fn new(bytes: u64) -> Self {
        let weigher = |_: &Hash, (_, weight, _): &(Duration, u32, V)| *weight;
        let kept = Kept::builder().max_capacity(bytes / UNIT).weigher(weigher).build();
        Self { kept, capacity: bytes }
    }

    /// The answer to what was asked, with its age, if it is not older than it may be.
    pub fn get(&self, key: &Hash, now: Duration) -> Option<V> {
        let (until, _, answer) = self.kept.get(key)?;
        if now >= until {
            self.kept.invalidate(key);
            return None;
        }
        Some(answer)
    }

    /// Keeps an answer of so many bytes until then, if it is worth it.
    pub fn put(&self, key: Hash, answer: V, bytes: u64, until: Duration) {
        let weight = (bytes + OVERHEAD).div_ceil(UNIT);
        // One answer must not be all that there is.
        if bytes <= self.capacity / 8 {
            self.kept.insert(key, (until, u32::try_from(weight).unwrap_or(u32::MAX), answer));
        }
    }

    /// Bytes that are kept, about, and how many answers they are.
    pub fn size(&self) -> (u64, u64) {
        self.kept.run_pending_tasks();
        (self.kept.weighted_size() * UNIT, self.kept.entry_count())
    }
}

/// What a `Cache-Control` says to one that keeps answers for several clients (RFC 9111, 5.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// Not to be kept.
    pub no_store: bool,
    /// Not to be answered from what is kept (request), or only after asking again (response), which we do not do.
    pub no_cache: bool,
    /// For one client alone.
    pub private: bool,
    /// Not older than that.
    pub max_age: Option<Duration>,
}

impl Control {
    /// Reads it; what is not known says nothing.
    pub fn of(headers: &HeaderMap) -> Self {
        let mut control = Self::default();
        for value in headers.get_all(CACHE_CONTROL) {
            for word in value.to_str().unwrap_or_default().split(',') {
                let (name, value) = word.trim().split_once('=').unwrap_or((word.trim(), ""));
                match name.to_ascii_lowercase().as_str() {
                    "no-store" => control.no_store = true,
                    "no-cache" => control.no_cache = true,
                    "private" => control.private = true,
                    "max-age" | "s-maxage" => {
                        control.max_age = value.trim_matches('"').parse().ok().map(Duration::from_secs);
                    }
                    _ => {}
                }
            }
        }
        control
    }

    /// For how long an answer may be kept, of the time that is configured. `shared`: clients share what is kept.
    pub fn keep(self, configured: Duration, shared: bool) -> Option<Duration> {
        let not = self.no_store || self.no_cache || self.private && shared;
        let age = self.max_age.map_or(configured, |age| age.min(configured));
        (!not && !age.is_zero()).then_some(age)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn an_answer_is_kept_until_its_time() {
        let cache = Cache::new(1 << 20);
        cache.put([1; 32], "yes", 3, s(30));
        assert_eq!(cache.get(&[1; 32], s(29)), Some("yes"));
        assert_eq!(cache.get(&[2; 32], s(29)), None);
        assert_eq!(cache.get(&[1; 32], s(30)), None);
        assert_eq!(cache.size().1, 0);
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_often_asked_stay() {
        let cache = Cache::new(64 << 10);
        let key = |n: u32| {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&n.to_le_bytes());
            key
        };
        for round in 0..20 {
            for often in 0..8 {
                if cache.get(&key(often), s(1)).is_none() {
                    cache.put(key(often), vec![0; 1000], 1000, s(100));
                }
            }
            for once in 0..50 {
                let once = key(1000 + round * 50 + once);
                cache.put(once, vec![0; 1000], 1000, s(100));
            }
            assert!(cache.size().0 <= 64 << 10, "{:?}", cache.size());
        }
        let stayed = (0..8).filter(|often| cache.get(&key(*often), s(1)).is_some()).count();
        assert!(stayed >= 6, "{stayed} of 8");
        cache.put(key(7), vec![0; 60 << 10], 60 << 10, s(100));
        assert!(cache.get(&key(7), s(1)).is_none_or(|answer| answer.len() == 1000), "one answer is not all");
    }

    #[test]
    fn cache_control_is_followed() {
        let of = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CACHE_CONTROL, text.parse().unwrap());
            Control::of(&headers)
        };
        assert_eq!(of("").keep(s(30), true), Some(s(30)));
        assert_eq!(of("max-age=10").keep(s(30), true), Some(s(10)));
        assert_eq!(of("public, max-age=100").keep(s(30), true), Some(s(30)));
        for not in ["no-store", "max-age=0", "No-Cache", "private"] {
            assert_eq!(of(not).keep(s(30), true), None, "{not}");
        }
        assert_eq!(of("private").keep(s(30), false), Some(s(30)));
    }
}
