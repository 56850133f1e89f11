//! The few numbers that Penstock balances by, on the path of every response.

use super::read::{self, Metric};
use super::{BIN_HEADER, TEXT_HEADER};
use base64::Engine as _;
use bytes::{BufMut, BytesMut};
use http::{HeaderMap, HeaderValue};

/// What an inbound proxy reports of its workload. `None` is "not told", which is not the same as idle.
///
/// Reading allocates nothing; writing grows only the buffer that it was given.
///
/// ```
/// # use penstock_inference::orca::Load;
/// let load = Load { in_flight: Some(3.0), queue_wait_ms: Some(0.25), ..Load::default() };
/// let mut out = bytes::BytesMut::new();
/// load.write_text(&mut out);
/// assert_eq!(&out[..], b"TEXT named_metrics.in_flight=3, named_metrics.queue_wait_ms=0.250");
/// assert_eq!(Load::from_value(&out), Some(load));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// How full the workload is. 1 is its limit, and more is possible.
    pub application_utilization: Option<f64>,
    /// Requests a second.
    pub rps: Option<f64>,
    /// Errors a second.
    pub eps: Option<f64>,
    /// Requests in flight, from all clients.
    pub in_flight: Option<f64>,
    /// Milliseconds that requests wait before they reach the application.
    pub queue_wait_ms: Option<f64>,
}

/// The named metric of [`Load::in_flight`].
pub(super) const IN_FLIGHT: &str = "in_flight";
/// The named metric of [`Load::queue_wait_ms`].
pub(super) const QUEUE_WAIT_MS: &str = "queue_wait_ms";

/// Room for the serialised message: five numbers, and two names with their lengths.
const PROTOBUF_BYTES: usize = 3 * 9 + 2 * (4 + 9) + IN_FLIGHT.len() + QUEUE_WAIT_MS.len();
/// Four characters of base64 for each three bytes.
const BASE64_BYTES: usize = PROTOBUF_BYTES.div_ceil(3) * 4;

impl Load {
    /// Reads the report that a response carries. `None`: no report, one that cannot be read, or one that tells
    /// nothing of these numbers.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let mut load = Self::default();
        read::headers(headers, |metric, value| load.put(metric, value)).ok()?;
        load.some()
    }

    /// Reads the value of `endpoint-load-metrics`.
    pub fn from_value(value: &[u8]) -> Option<Self> {
        let mut load = Self::default();
        read::value(value, |metric, value| load.put(metric, value)).ok()?;
        load.some()
    }

    fn put(&mut self, metric: Metric<'_>, value: f64) {
        match metric {
            Metric::Application => self.application_utilization = Some(value),
            Metric::Rps => self.rps = Some(value),
            Metric::Eps => self.eps = Some(value),
            Metric::Named(IN_FLIGHT) => self.in_flight = Some(value),
            Metric::Named(QUEUE_WAIT_MS) => self.queue_wait_ms = Some(value),
            _ => {}
        }
    }

    fn some(self) -> Option<Self> {
        (self != Self::default()).then_some(self)
    }

    /// Writes `TEXT name=value, …` with three decimals, or none for a whole number.
    pub fn write_text(&self, out: &mut impl BufMut) {
        let metrics: [(&[u8], Option<f64>); 5] = [
            (b"application_utilization=", self.application_utilization),
            (b"rps_fractional=", self.rps),
            (b"eps=", self.eps),
            (b"named_metrics.in_flight=", self.in_flight),
            (b"named_metrics.queue_wait_ms=", self.queue_wait_ms),
        ];
        let mut before: &[u8] = b"TEXT ";
        for (name, value) in metrics {
            let Some(value) = value else { continue };
            out.put_slice(before);
            out.put_slice(name);
            write_number(value, out);
            before = b", ";
        }
    }

    /// Writes the value of the `-bin` trailer: base64, without padding, of the serialised message.
    pub fn write_bin(&self, out: &mut impl BufMut) {
        let mut message = [0; PROTOBUF_BYTES];
        let mut rest = &mut message[..];
        for (field, value) in [(6, self.rps), (7, self.eps), (9, self.application_utilization)] {
            if let Some(value) = value {
                rest.put_u8(field << 3 | 1);
                rest.put_f64_le(sound(value));
            }
        }
        for (name, value) in [(IN_FLIGHT, self.in_flight), (QUEUE_WAIT_MS, self.queue_wait_ms)] {
            if let Some(value) = value {
                rest.put_slice(&[8 << 3 | 2, name.len() as u8 + 11, 1 << 3 | 2, name.len() as u8]);
                rest.put_slice(name.as_bytes());
                rest.put_u8(2 << 3 | 1);
                rest.put_f64_le(sound(value));
            }
        }
        let unused = rest.len();
        let message = &message[..PROTOBUF_BYTES - unused];
        let mut encoded = [0; BASE64_BYTES];
        // The buffer is sized for the longest message above.
        if let Ok(length) =
            base64::engine::general_purpose::STANDARD_NO_PAD.encode_slice(message, &mut encoded)
        {
            out.put_slice(&encoded[..length]);
        }
    }

    /// Puts the text report on a response. `scratch` is the worker's own buffer: values are split off it, so an
    /// allocation is shared by many responses.
    pub fn stamp(&self, headers: &mut HeaderMap, scratch: &mut BytesMut) {
        self.write_text(scratch);
        if scratch.is_empty() {
            return;
        }
        if let Ok(value) = HeaderValue::from_maybe_shared(scratch.split().freeze()) {
            headers.insert(&TEXT_HEADER, value);
        }
    }

    /// Puts the binary report on the trailers of a gRPC response.
    pub fn stamp_trailers(&self, trailers: &mut HeaderMap, scratch: &mut BytesMut) {
        self.write_bin(scratch);
        if scratch.is_empty() {
            return;
        }
        if let Ok(value) = HeaderValue::from_maybe_shared(scratch.split().freeze()) {
            trailers.insert(&BIN_HEADER, value);
        }
    }
}

/// A load is finite and not negative; what is not is told as zero, or as the most that is worth telling.
fn sound(value: f64) -> f64 {
    if value.is_nan() { 0.0 } else { value.clamp(0.0, 1e12) }
}

/// Writes thousandths as an integer would be: no rounding surprises, no allocation.
pub(super) fn write_number(value: f64, out: &mut impl BufMut) {
    let thousandths = (sound(value) * 1000.0).round() as u64;
    let (whole, part) = (thousandths / 1000, thousandths % 1000);
    let mut digits = [0; 20];
    let mut at = digits.len();
    let mut rest = whole;
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.put_slice(&digits[at..]);
    if part != 0 {
        let digit = |n: u64| b'0' + (n % 10) as u8;
        out.put_slice(&[b'.', digit(part / 100), digit(part / 10), digit(part)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orca::LoadReport;
    use proptest::prelude::*;

    fn text(load: &Load) -> String {
        let mut out = Vec::new();
        load.write_text(&mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn numbers_have_three_decimals_or_none() {
        for (value, written) in [
            (0.0, "0"),
            (1.0, "1"),
            (0.0004, "0"),
            (0.9996, "1"),
            (12.05, "12.050"),
            (98765.4321, "98765.432"),
            (f64::NAN, "0"),
            (f64::INFINITY, "1000000000000"),
            (-3.0, "0"),
        ] {
            let mut out = Vec::new();
            write_number(value, &mut out);
            assert_eq!(String::from_utf8(out).unwrap(), written);
        }
    }

    #[test]
    fn others_read_it_whole() {
        let load = Load {
            application_utilization: Some(0.5),
            rps: Some(10.0),
            eps: Some(0.0),
            in_flight: Some(4.0),
            queue_wait_ms: Some(1.5),
        };
        let report = LoadReport::from_value(text(&load).as_bytes()).unwrap();
        assert_eq!((report.rps_fractional, report.named_metrics["in_flight"]), (10.0, 4.0));
        assert_eq!(report.named_metrics["queue_wait_ms"], 1.5);
        let mut bin = b"BIN ".to_vec();
        load.write_bin(&mut bin);
        assert_eq!(LoadReport::from_value(&bin), Ok(report));
    }

    #[test]
    fn silence_is_not_idleness() {
        assert_eq!(Load::from_value(b"TEXT cpu_utilization=0.5"), None);
        assert_eq!(Load::from_value(b"TEXT named_metrics.in_flight=0").unwrap().in_flight, Some(0.0));
        assert_eq!(Load::from_headers(&HeaderMap::new()), None);
        assert_eq!(text(&Load::default()), "");
    }

    #[test]
    fn a_stamp_is_read_from_headers_and_trailers() {
        let load = Load { in_flight: Some(2.0), rps: Some(7.5), ..Load::default() };
        let (mut scratch, mut map) = (BytesMut::with_capacity(4096), HeaderMap::new());
        load.stamp(&mut map, &mut scratch);
        assert_eq!(Load::from_headers(&map), Some(load));
        map.clear();
        load.stamp_trailers(&mut map, &mut scratch);
        assert_eq!(Load::from_headers(&map), Some(load));
    }

    proptest! {
        #[test]
        fn text_and_binary_survive_the_way(thousandths in prop::array::uniform5(prop::option::of(0u64..1_000_000_000))) {
            let [a, b, c, d, e] = thousandths.map(|n| n.map(|n| n as f64 / 1000.0));
            let load = Load { application_utilization: a, rps: b, eps: c, in_flight: d, queue_wait_ms: e };
            prop_assert_eq!(Load::from_value(text(&load).as_bytes()), load.some());
            let mut bin = b"BIN ".to_vec();
            load.write_bin(&mut bin);
            prop_assert_eq!(Load::from_value(&bin), load.some());
        }

        #[test]
        fn any_number_is_written_as_a_load(value in any::<f64>()) {
            let load = Load { in_flight: Some(value), ..Load::default() };
            let read = Load::from_value(text(&load).as_bytes()).unwrap().in_flight.unwrap();
            prop_assert!(read.is_finite() && read >= 0.0);
        }
    }
}
