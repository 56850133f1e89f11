//! Numbers as a load report writes them.

use bytes::BufMut;

/// The largest number that is written: whole numbers are exact in a double up to here.
const MOST: f64 = (1u64 << 53) as f64;

/// Above this a number is written without a fraction, so that its digits fit 64 bits.
const WHOLE: f64 = 1e12;

/// How many digits follow the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Digits {
    /// Shares, rates and milliseconds.
    Three,
    /// What is multiplied by thousands of tokens, and what others told.
    Six,
}

/// A load is finite and not negative; what is not is told as zero, or as the most that is worth telling.
pub(super) fn sound(value: f64) -> f64 {
    if value.is_nan() { 0.0 } else { value.clamp(0.0, MOST) }
}

/// Writes fractions as an integer would be: no rounding surprises, no allocation.
pub(super) fn write(value: f64, digits: Digits, out: &mut impl BufMut) {
    let value = sound(value);
    let places = match digits {
        Digits::Three => 3,
        Digits::Six => 6,
    };
    let unit = 10u64.pow(places);
    let (whole, mut part) = if value >= WHOLE {
        (value as u64, 0)
    } else {
        let parts = (value * unit as f64).round() as u64;
        (parts / unit, parts % unit)
    };
    let mut text = [b'0'; 20];
    let mut at = text.len();
    let mut rest = whole;
    loop {
        at -= 1;
        text[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.put_slice(&text[at..]);
    if part == 0 {
        return;
    }
    let mut fraction = [b'.'; 7];
    let length = places as usize + 1;
    for digit in fraction[1..length].iter_mut().rev() {
        *digit = b'0' + (part % 10) as u8;
        part /= 10;
    }
    out.put_slice(&fraction[..length]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(value: f64, digits: Digits) -> String {
        let mut out = Vec::new();
        write(value, digits, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn numbers_have_their_digits_or_none() {
        for (value, three, six) in [
            (0.0, "0", "0"),
            (1.0, "1", "1"),
            (0.0004, "0", "0.000400"),
            (0.9996, "1", "0.999600"),
            (12.05, "12.050", "12.050000"),
            (98765.4321, "98765.432", "98765.432100"),
            (281_474_976_710_655.0, "281474976710655", "281474976710655"),
            (f64::NAN, "0", "0"),
            (f64::INFINITY, "9007199254740992", "9007199254740992"),
            (-3.0, "0", "0"),
        ] {
            assert_eq!((&*text(value, Digits::Three), &*text(value, Digits::Six)), (three, six), "{value}");
        }
    }

    proptest! {
        #[test]
        fn any_number_is_written_as_a_load(value in any::<f64>()) {
            for digits in [Digits::Three, Digits::Six] {
                let read: f64 = text(value, digits).parse().unwrap();
                prop_assert!(read.is_finite() && read >= 0.0);
                if (0.0..1e9).contains(&value) {
                    prop_assert!((read - value).abs() <= 0.0006);
                }
            }
        }
    }
}
