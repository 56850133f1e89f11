//! Answers that are kept for a while, within a bound of bytes.
//!
//! Who is let in when it is full is decided by how often it is asked for (W-TinyLFU, Einziger et al. 2017, as the crate
//! `moka` has it: the field's usual one, with no thread of its own). Ages are told by the caller's clock. Whose answer it is,
//! and which load of the model gave it, is part of the key ([`crate::key`]): nothing has to be looked for and thrown away
//! when a model is loaded anew, it is just not asked for any more.

use std::time::Duration;

use http::header::{CACHE_CONTROL, PRAGMA, SET_COOKIE, VARY};
use http::{HeaderMap, HeaderName, StatusCode};
use moka::sync::Cache as Kept;

use crate::key::{self, Hash};

/// What an entry takes besides its answer, bytes.
const OVERHEAD: u64 = 256;
/// Weights are counted in units of so many bytes, so that large caches fit 32 bits an entry.
const UNIT: u64 = 64;

/// Answers by what was asked.
#[derive(Debug)]
pub struct Cache<V: Clone + Send + Sync + 'static> {
    kept: Kept<Hash, Entry<V>>,
    capacity: u64,
}

#[derive(Clone, Debug)]
struct Entry<V> {
    since: Duration,
    until: Duration,
    weight: u32,
    answer: V,
}

impl<V: Clone + Send + Sync + 'static> Cache<V> {
    /// Keeps answers of up to so many bytes.
    pub fn new(bytes: u64) -> Self {
        let weigher = |_: &Hash, entry: &Entry<V>| entry.weight;
        let kept = Kept::builder().max_capacity(bytes / UNIT).weigher(weigher).build();
        Self { kept, capacity: bytes }
    }

    /// The answer to what was asked, if it is not older than it may be, nor than the client wants.
    pub fn get(&self, key: &Hash, asked: Control, now: Duration) -> Option<V> {
        if asked.no_cache || asked.no_store {
            return None;
        }
        let Entry { since, until, answer, .. } = self.kept.get(key)?;
        if now >= until {
            self.kept.invalidate(key);
            return None;
        }
        let age = now.saturating_sub(since);
        asked.max_age.is_none_or(|max| age < max).then_some(answer)
    }

    /// Keeps an answer of so many bytes for so long, if it is worth it.
    pub fn put(&self, key: Hash, answer: V, bytes: u64, now: Duration, age: Duration) {
        let weight = u32::try_from((bytes + OVERHEAD).div_ceil(UNIT)).unwrap_or(u32::MAX);
        // One answer must not be all that there is.
        if bytes <= self.capacity / 8 {
            self.kept.insert(key, Entry { since: now, until: now.saturating_add(age), weight, answer });
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
    /// Not older than that: the answer that is wanted (request), or kept (response). What is no number is no time at all (4.2.1).
    pub max_age: Option<Duration>,
}

impl Control {
    /// Reads it; what is not known says nothing.
    pub fn of(headers: &HeaderMap) -> Self {
        let mut control = Self::default();
        let mut shared = None;
        for value in headers.get_all(CACHE_CONTROL) {
            for word in value.to_str().unwrap_or_default().split(',') {
                let (name, value) = word.trim().split_once('=').unwrap_or((word.trim(), ""));
                let age = || Duration::from_secs(value.trim().trim_matches('"').parse().unwrap_or_default());
                // Of two the shorter; the one for those who keep for several is above the other (5.2.2.10).
                let least =
                    |before: Option<Duration>| Some(before.map_or_else(age, |before| before.min(age())));
                match name.trim().to_ascii_lowercase().as_str() {
                    "no-store" => control.no_store = true,
                    "no-cache" => control.no_cache = true,
                    "private" => control.private = true,
                    "max-age" => control.max_age = least(control.max_age),
                    "s-maxage" => shared = least(shared),
                    _ => {}
                }
            }
        }
        control.max_age = shared.or(control.max_age);
        // The word of HTTP/1.0 counts where there is no other (5.4).
        if !headers.contains_key(CACHE_CONTROL) {
            let pragma = headers.get(PRAGMA).map(|value| value.as_bytes());
            control.no_cache = pragma.is_some_and(|value| value.eq_ignore_ascii_case(b"no-cache"));
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

/// On what terms a port's answers are kept.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// For how long at most.
    pub age: Duration,
    /// Clients share what is kept.
    pub shared: bool,
    /// Headers of the request that are part of the key.
    pub headers: &'a [HeaderName],
}

/// For how long an answer may be kept, by what its request and itself say; `None`: not at all. Only what is plainly good is:
/// a 200 that is meant for nobody in particular and depends on no header that the key does not know.
pub fn cacheable(
    request: &HeaderMap,
    response: &HeaderMap,
    status: StatusCode,
    terms: Terms<'_>,
) -> Option<Duration> {
    let asked = Control::of(request);
    if status != StatusCode::OK || asked.no_store || response.contains_key(SET_COOKIE) {
        return None;
    }
    let varies = response.get_all(VARY).iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
    let known = |name: &[u8]| {
        let name = HeaderName::from_bytes(name.trim_ascii()).ok();
        name.is_some_and(|name| terms.headers.contains(&name) || key::always_counts(&name))
    };
    if !varies.into_iter().all(known) {
        return None;
    }
    Control::of(response).keep(terms.age, terms.shared)
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
        cache.put([1; 32], "yes", 3, s(10), s(20));
        assert_eq!(cache.get(&[1; 32], Control::default(), s(29)), Some("yes"));
        assert_eq!(cache.get(&[2; 32], Control::default(), s(29)), None);
        assert_eq!(cache.get(&[1; 32], Control::default(), s(30)), None);
        assert_eq!(cache.size().1, 0);
    }

    #[test]
    fn no_client_gets_an_answer_that_is_older_than_it_wants() {
        let cache = Cache::new(1 << 20);
        cache.put([1; 32], "yes", 3, s(10), s(20));
        let asked = |text: &str| Control::of(&headers(&[("cache-control", text)]));
        let got = |text: &str, now| cache.get(&[1; 32], asked(text), now).is_some();
        assert!(got("max-age=5", s(14)) && !got("max-age=5", s(15)));
        for anew in ["max-age=0", "no-cache", "no-store"] {
            assert!(!got(anew, s(10)), "{anew}");
        }
        assert!(got("", s(15)), "it is kept for the others");
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
                if cache.get(&key(often), Control::default(), s(1)).is_none() {
                    cache.put(key(often), vec![0; 1000], 1000, s(0), s(100));
                }
            }
            for once in 0..50 {
                let once = key(1000 + round * 50 + once);
                cache.put(once, vec![0; 1000], 1000, s(0), s(100));
            }
            assert!(cache.size().0 <= 64 << 10, "{:?}", cache.size());
        }
        let stayed =
            (0..8).filter(|often| cache.get(&key(*often), Control::default(), s(1)).is_some()).count();
        assert!(stayed >= 6, "{stayed} of 8");
        cache.put(key(7), vec![0; 60 << 10], 60 << 10, s(0), s(100));
        assert!(
            cache.get(&key(7), Control::default(), s(1)).is_none_or(|answer| answer.len() == 1000),
            "one answer is not all"
        );
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

    #[test]
    fn of_two_ages_the_one_for_those_who_keep_for_several_counts_and_nonsense_is_no_time() {
        let of = |text: &str| Control::of(&headers(&[("cache-control", text)])).keep(s(30), true);
        assert_eq!(of("s-maxage=5, max-age=20"), Some(s(5)));
        assert_eq!(of("max-age=5, s-maxage=20"), Some(s(20)));
        assert_eq!(of("s-maxage=0, max-age=20"), None);
        assert_eq!(of("max-age=20, max-age=10"), Some(s(10)));
        assert_eq!(of("max-age=\"7\""), Some(s(7)));
        for nonsense in ["max-age=x", "max-age", "max-age=-1", "max-age=1.5"] {
            assert_eq!(of(nonsense), None, "{nonsense}");
        }
        let pragma = ("pragma", "no-cache");
        assert!(Control::of(&headers(&[pragma])).no_cache);
        assert!(!Control::of(&headers(&[pragma, ("cache-control", "max-age=5")])).no_cache);
    }

    #[test]
    fn only_what_is_plainly_good_is_kept() {
        let tone = [HeaderName::from_static("x-tone")];
        let terms = Terms { age: s(30), shared: true, headers: &tone };
        let of = |request: &[(&'static str, &str)], response: &[(&'static str, &str)], status: u16| {
            let status = StatusCode::from_u16(status).unwrap();
            cacheable(&headers(request), &headers(response), status, terms)
        };
        assert_eq!(of(&[], &[], 200), Some(s(30)));
        assert_eq!(of(&[("cache-control", "no-cache")], &[], 200), Some(s(30)), "asked anew, and kept");
        assert_eq!(
            of(&[], &[("vary", "X-Tone, accept-encoding"), ("vary", "authorization")], 200),
            Some(s(30))
        );
        for status in [201, 206, 400, 429, 503] {
            assert_eq!(of(&[], &[], status), None, "{status}");
        }
        assert_eq!(of(&[("cache-control", "no-store")], &[], 200), None);
        for not in [("cache-control", "private"), ("set-cookie", "a=b"), ("vary", "*"), ("vary", "x-other")] {
            assert_eq!(of(&[], &[not], 200), None, "{not:?}");
        }
    }

    fn headers(all: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in all {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }
}
