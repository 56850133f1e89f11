//! Writing a [`Load`] into somebody's buffer, with what else is to be told. No allocation.

use super::load::Load;
use super::number::{self, Digits};
use super::read::Metric;
use base64::Engine as _;
use bytes::BufMut;

/// The whole text report; nothing when there is nothing to tell.
pub(super) fn text(load: &Load, out: &mut impl BufMut) {
    let mut before: &[u8] = b"TEXT ";
    for (metric, value, digits) in load.told() {
        let Some(value) = value else { continue };
        out.put_slice(before);
        pair(metric, value, digits, out);
        before = b", ";
    }
}

/// `name=value`.
pub(super) fn pair(metric: Metric<'_>, value: f64, digits: Digits, out: &mut impl BufMut) {
    let (prefix, name) = metric.name();
    out.put_slice(prefix.as_bytes());
    out.put_slice(name.as_bytes());
    out.put_u8(b'=');
    number::write(value, digits, out);
}

/// The serialised message.
pub(super) fn protobuf(load: &Load, out: &mut impl BufMut) {
    for (metric, value, _) in load.told() {
        if let Some(value) = value {
            field(metric, value, out);
        }
    }
}

/// One field, or one entry of a map. A name above 100 bytes is left out: lengths are written as one byte.
pub(super) fn field(metric: Metric<'_>, value: f64, out: &mut impl BufMut) {
    const DOUBLE: u8 = 1;
    const BYTES: u8 = 2;
    let (number, name) = metric.number();
    let Some(name) = name else {
        out.put_u8(number << 3 | DOUBLE);
        return out.put_f64_le(number::sound(value));
    };
    if name.len() > LONGEST_NAME {
        return;
    }
    out.put_slice(&[number << 3 | BYTES, name.len() as u8 + 11, 1 << 3 | BYTES, name.len() as u8]);
    out.put_slice(name.as_bytes());
    out.put_u8(2 << 3 | DOUBLE);
    out.put_f64_le(number::sound(value));
}

/// The longest name of a metric that is passed on.
pub(super) const LONGEST_NAME: usize = 100;

/// Base64 without padding.
pub(super) fn base64(message: &[u8], out: &mut impl BufMut) {
    // A whole number of threes, so that no piece but the last would need padding.
    for piece in message.chunks(48) {
        let mut encoded = [0; 64];
        // 48 bytes are 64 letters.
        if let Ok(length) = base64::engine::general_purpose::STANDARD_NO_PAD.encode_slice(piece, &mut encoded)
        {
            out.put_slice(&encoded[..length]);
        }
    }
}
