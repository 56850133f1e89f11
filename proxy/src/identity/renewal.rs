//! When to renew. Pure.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// However short a certificate lives, it is not renewed more often.
const SHORTEST: Duration = Duration::from_millis(500);

/// How long to wait before a certificate is renewed: until a moment between one half and two thirds of its lifetime,
/// which `random` (0 to 1) picks, so that proxies started together do not ask together. When that is past, because the
/// clocks disagree, still a twentieth of the lifetime: a wrong clock must not make control sign without pause.
pub fn until_renewal(not_before: u64, not_after: u64, now: SystemTime, random: f64) -> Duration {
    let lifetime = Duration::from_secs(not_after.saturating_sub(not_before));
    let share = 0.5 + random.clamp(0.0, 1.0) / 6.0;
    let at = UNIX_EPOCH + Duration::from_secs(not_before) + lifetime.mul_f64(share);
    at.duration_since(now).unwrap_or_default().max(lifetime / 20).max(SHORTEST)
}

/// How long to wait before a renewal that failed is tried again: the backoff, but never so long that fewer than
/// four more tries fit into the life that the certificate has left.
pub fn until_retry(backoff: Duration, not_after: u64, now: SystemTime) -> Duration {
    let end = UNIX_EPOCH + Duration::from_secs(not_after);
    match end.duration_since(now) {
        Ok(left) => backoff.min((left / 4).max(Duration::from_millis(100))),
        Err(_) => backoff,
    }
}

/// Seconds since the epoch.
pub fn unix(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_certificate_is_renewed_between_half_and_two_thirds_of_its_life() {
        // (not before, not after, now, random, seconds to wait)
        let table = [
            (1000, 1600, 1000, 0.0, 300.0),
            (1000, 1600, 1000, 1.0, 400.0),
            (1000, 1600, 1000, 0.5, 350.0),
            (1000, 1600, 1100, 0.0, 200.0),
            (1000, 1600, 1300, 0.0, 30.0),
            (1000, 1600, 2000, 0.5, 30.0),
            // Not valid yet: our clock is late.
            (1000, 1600, 900, 0.0, 400.0),
            // Seconds, as tests have them.
            (1000, 1004, 1000, 0.0, 2.0),
            // Nonsense.
            (1600, 1000, 2000, 0.5, 0.5),
        ];
        for (not_before, not_after, now, random, expected) in table {
            let wait = until_renewal(not_before, not_after, at(now), random).as_secs_f64();
            assert!(
                (wait - expected).abs() < 1e-6,
                "{not_before}..{not_after} at {now}: {wait} for {expected}"
            );
        }
    }

    #[test]
    fn tries_come_closer_as_the_end_comes_near() {
        let backoff = Duration::from_secs(30);
        assert_eq!(until_retry(backoff, 2000, at(1000)), backoff);
        assert_eq!(until_retry(backoff, 1040, at(1000)), Duration::from_secs(10));
        assert_eq!(until_retry(backoff, 1000, at(1000)), Duration::from_millis(100));
        assert_eq!(until_retry(backoff, 900, at(1000)), backoff, "expired: no reason to hurry any more");
    }
}
