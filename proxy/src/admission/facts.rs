//! What a request says of itself: until when it must be answered, and how urgent it is. Pure.
//!
//! In: its headers, and what is configured. Out: a timeout, a priority. What cannot be read counts as not said: admission
//! makes service better, and a request that misspells its wish is served like one without.

use std::hash::{BuildHasher, Hasher};
use std::time::Duration;

use http::HeaderMap;
use penstock_api::names::header;

use super::queue::{Priority, Tenant};

/// How long the client goes on waiting, by its own word: `grpc-timeout`, `x-request-timeout` (`250ms`, `2s`; a bare
/// number is seconds), Envoy's `x-envoy-expected-rq-timeout-ms`, and the timeout of the route that led here. The shortest
/// counts. `None`: nobody said.
pub fn timeout(headers: &HeaderMap, route: Option<Duration>) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    let said = [
        text("grpc-timeout").and_then(grpc_timeout),
        text(header::REQUEST_TIMEOUT).and_then(plain_timeout),
        text("x-envoy-expected-rq-timeout-ms")
            .and_then(|ms| ms.trim().parse().ok())
            .map(Duration::from_millis),
        route,
    ];
    // Envoy says 0 for no timeout; a client that says it means the same.
    said.into_iter().flatten().filter(|timeout| !timeout.is_zero()).min()
}

/// `TimeoutValue TimeoutUnit` of gRPC over HTTP/2: at most 8 digits, and one of `H M S m u n`.
fn grpc_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

fn plain_timeout(text: &str) -> Option<Duration> {
    let text = text.trim();
    match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => humantime::parse_duration(text).ok(),
    }
}

/// Who may be how urgent.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Priorities {
    /// Identities, or beginnings of identities that end with `/`, with the most urgent priority that each may have, which
    /// is also what it has when its requests say nothing. The longest that fits counts.
    pub of: Vec<(Box<str>, Priority)>,
}

impl Priorities {
    /// The priority of a request of `identity` (empty: not proven) that says `said` of itself. Without any rule
    /// everybody is believed; with rules, who is not named is at most normal, and everybody can be less urgent than he
    /// may.
    pub fn of(&self, identity: &str, headers: &HeaderMap) -> Priority {
        let said = headers.get(header::PRIORITY).and_then(|value| value.to_str().ok());
        let said = said.and_then(Priority::from_word);
        if self.of.is_empty() {
            return said.unwrap_or_default();
        }
        let fits = |rule: &str| identity == rule || rule.ends_with('/') && identity.starts_with(rule);
        let rules = self.of.iter().filter(|(rule, _)| fits(rule));
        let most =
            rules.max_by_key(|(rule, _)| rule.len()).map_or(Priority::Normal, |(_, priority)| *priority);
        said.map_or(most, |said| said.max(most))
    }
}

/// The tenant of an identity. Nobody who does not know this process can choose an identity that falls together with
/// another's, and one that does shares a fair share with it, no more.
pub fn tenant(identity: &str, hasher: &impl BuildHasher) -> Tenant {
    if identity.is_empty() {
        return 0;
    }
    let mut hash = hasher.build_hasher();
    hash.write(identity.as_bytes());
    hash.finish().max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (http::HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
            .collect()
    }

    #[test]
    fn the_shortest_timeout_that_was_said_counts() {
        // What the headers say, what the route says, and what holds; milliseconds.
        let hours = 99_999_999 * 3_600_000;
        let table = [
            ("", None, None),
            ("", Some(30), Some(30)),
            ("grpc-timeout=250m", None, Some(250)),
            ("grpc-timeout=1S", Some(300), Some(300)),
            ("grpc-timeout=99999999H", None, Some(hours)),
            ("x-request-timeout=250ms", None, Some(250)),
            ("x-request-timeout=1.5", None, Some(1500)),
            ("x-request-timeout=2s&grpc-timeout=1S", None, Some(1000)),
            ("x-envoy-expected-rq-timeout-ms=15", None, Some(15)),
            ("x-envoy-expected-rq-timeout-ms=0", None, None),
            // Not said.
            ("grpc-timeout=123456789S", None, None),
            ("grpc-timeout=S", None, None),
            ("grpc-timeout=-1S", None, None),
            ("grpc-timeout=1é", None, None),
            ("grpc-timeout=", Some(7), Some(7)),
            ("x-request-timeout=soon", Some(7), Some(7)),
            ("x-request-timeout=-3", None, None),
            ("x-request-timeout=NaN", None, None),
            ("x-request-timeout=inf", None, None),
        ];
        for (said, route, expected) in table {
            let pairs = said.split('&').filter_map(|pair| pair.split_once('='));
            let map = pairs.map(|(name, value)| {
                (name.parse().unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap())
            });
            let ms = Duration::from_millis;
            assert_eq!(timeout(&map.collect(), route.map(ms)), expected.map(ms), "{said} {route:?}");
        }
    }

    #[test]
    fn without_rules_everybody_is_believed_and_with_rules_nobody_is_more_than_he_may() {
        let free = Priorities::default();
        let said = |word: &str| headers(&[("penstock-priority", word)]);
        assert_eq!(free.of("", &headers(&[])), Priority::Normal);
        assert_eq!(free.of("", &said("High")), Priority::High);
        assert_eq!(free.of("", &said("urgent!!!")), Priority::Normal);
        let rules = Priorities {
            of: vec![
                ("spiffe://x/ns/web/".into(), Priority::High),
                ("spiffe://x/ns/web/sa/batch".into(), Priority::Low),
            ],
        };
        assert_eq!(rules.of("spiffe://x/ns/web/sa/front", &headers(&[])), Priority::High);
        assert_eq!(rules.of("spiffe://x/ns/web/sa/front", &said("low")), Priority::Low);
        assert_eq!(rules.of("spiffe://x/ns/web/sa/batch", &said("high")), Priority::Low);
        assert_eq!(rules.of("spiffe://x/ns/website/sa/a", &said("high")), Priority::Normal);
        assert_eq!(rules.of("", &said("high")), Priority::Normal);
    }

    #[test]
    fn a_tenant_is_an_identity() {
        let hasher = ahash::RandomState::with_seeds(1, 2, 3, 4);
        assert_eq!(tenant("", &hasher), 0);
        assert_eq!(tenant("spiffe://x/ns/a/sa/b", &hasher), tenant("spiffe://x/ns/a/sa/b", &hasher));
        assert_ne!(tenant("spiffe://x/ns/a/sa/b", &hasher), tenant("spiffe://x/ns/a/sa/c", &hasher));
    }
}
