//! When to renew, and whether what was signed is of use. Pure.
//!
//! Control's clock and this machine's may disagree. A certificate comes into force when it is valid by ours, which is what we judge others
//! by, and never in the place of one that is the better of the two.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// However short a certificate lives, it is not renewed more often.
const SHORTEST: Duration = Duration::from_millis(500);
/// What control's replicas may disagree by without a word: what control has a certificate begin before the moment of signing.
const TOLERANCE: Duration = Duration::from_secs(30);

/// When a certificate is valid, seconds since the epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Its first second.
    pub not_before: u64,
    /// Its last.
    pub not_after: u64,
}

/// Why a certificate that was signed just now does not come into force just now, and by how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Untimely {
    /// It has not begun.
    Early(Duration),
    /// It has ended: it began so long ago.
    Over(Duration),
    /// It is older than the one in force, by so much, and ends before that.
    Older(Duration),
}

impl std::fmt::Display for Untimely {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let by = |by| humantime::format_duration(by);
        match *self {
            Self::Early(ahead) => write!(f, "control's clock is {} ahead of this machine's", by(ahead)),
            Self::Over(behind) => write!(f, "control's clock is {} behind this machine's", by(behind)),
            Self::Older(back) => write!(f, "control's clock has gone back by {}", by(back)),
        }
    }
}

/// Whether a certificate that was signed comes into force now, in the place of another or of none.
pub fn judge(signed: Validity, in_force: Option<Validity>, now: SystemTime) -> Result<(), Untimely> {
    let (now, by) = (unix(now), |later: u64, earlier| Duration::from_secs(later.saturating_sub(earlier)));
    if signed.not_before > now {
        return Err(Untimely::Early(by(signed.not_before, now)));
    }
    if signed.not_after <= now {
        return Err(Untimely::Over(by(now, signed.not_before)));
    }
    let Some(old) = in_force.filter(|old| (old.not_before..old.not_after).contains(&now)) else {
        return Ok(());
    };
    // One that was made to live for less may end earlier; it is not older.
    let back = by(old.not_before, signed.not_before);
    if back > TOLERANCE && signed.not_after < old.not_after { Err(Untimely::Older(back)) } else { Ok(()) }
}

/// How long to wait before a certificate is renewed: until a moment between one half and two thirds of its lifetime,
/// which `random` (0 to 1) picks, so that proxies started together do not ask together. When that is past, because the
/// clocks disagree, still a twentieth of the lifetime, or half of what is left of it: a wrong clock must not make control sign without
/// pause, and must not make a certificate end before the next one is there. `signed` is when it came: what begins later than that is followed
/// by what begins as much later, and so is renewed as much earlier.
pub fn until_renewal(valid: Validity, signed: SystemTime, now: SystemTime, random: f64) -> Duration {
    let lifetime = Duration::from_secs(valid.not_after.saturating_sub(valid.not_before));
    let share = 0.5 + random.clamp(0.0, 1.0) / 6.0;
    let at = moment(valid.not_before).min(signed) + lifetime.mul_f64(share);
    let left = moment(valid.not_after).duration_since(now).unwrap_or_default();
    at.duration_since(now).unwrap_or_default().max((lifetime / 20).min(left / 2)).max(SHORTEST)
}

/// How long to wait before a renewal that failed is tried again: the backoff, but never so long that fewer than
/// four more tries fit into the life that the certificate has left.
pub fn until_retry(backoff: Duration, not_after: u64, now: SystemTime) -> Duration {
    match moment(not_after).duration_since(now) {
        Ok(left) => backoff.min((left / 4).max(Duration::from_millis(100))),
        Err(_) => backoff,
    }
}

/// A moment in seconds since the epoch.
pub fn moment(unix: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(unix)
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
        // (not before, not after, now, random, seconds to wait), all signed at 1000
        let table = [
            (1000, 1600, 1000, 0.0, 300.0),
            (1000, 1600, 1000, 1.0, 400.0),
            (1000, 1600, 1000, 0.5, 350.0),
            (1000, 1600, 1100, 0.0, 200.0),
            (1000, 1600, 1300, 0.0, 30.0),
            // Control's clock is late: little is left from the start.
            (1000, 1600, 1580, 0.5, 10.0),
            (1000, 1600, 2000, 0.5, 0.5),
            // It began later than it came.
            (1250, 1850, 1250, 0.0, 50.0),
            // Seconds, as tests have them.
            (1000, 1004, 1000, 0.0, 2.0),
            // Nonsense.
            (1600, 1000, 2000, 0.5, 0.5),
        ];
        for (not_before, not_after, now, random, expected) in table {
            let valid = Validity { not_before, not_after };
            let wait = until_renewal(valid, at(1000), at(now), random).as_secs_f64();
            assert!(
                (wait - expected).abs() < 1e-6,
                "{not_before}..{not_after} at {now}: {wait} for {expected}"
            );
        }
    }

    #[test]
    fn what_is_signed_by_a_wrong_clock_does_not_come_into_force() {
        let valid = |(not_before, not_after)| Validity { not_before, not_after };
        let seconds = Duration::from_secs;
        // (signed, in force, what of it at 10,000)
        let table = [
            ((9970, 12_000), None, Ok(())),
            ((9970, 12_000), Some((8000, 10_500)), Ok(())),
            ((10_001, 12_000), None, Err(Untimely::Early(seconds(1)))),
            ((13_570, 17_000), Some((8000, 10_500)), Err(Untimely::Early(seconds(3570)))),
            ((6370, 9000), None, Err(Untimely::Over(seconds(3630)))),
            ((6370, 10_000), Some((8000, 10_500)), Err(Untimely::Over(seconds(3630)))),
            ((6370, 10_400), Some((8000, 10_500)), Err(Untimely::Older(seconds(1630)))),
            // It outlives the one in force, or that is none any more, or not yet.
            ((6370, 10_600), Some((8000, 10_500)), Ok(())),
            ((6370, 10_400), Some((8000, 9999)), Ok(())),
            ((6370, 10_400), Some((11_000, 15_000)), Ok(())),
            // Certificates live for less from now on.
            ((9970, 10_400), Some((8000, 15_000)), Ok(())),
            // Two replicas of control.
            ((9970, 12_000), Some((9985, 12_015)), Ok(())),
        ];
        for (signed, in_force, expected) in table {
            let judged = judge(valid(signed), in_force.map(valid), at(10_000));
            assert_eq!(judged, expected, "{signed:?} for {in_force:?}");
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
