//! One reader for all forms: it visits every metric of a report as (name, value), and allocates nothing except for
//! JSON strings with escapes.

use super::{BIN_HEADER, Error, JSON_HEADER, MAX_BYTES, MAX_METRICS, TEXT_HEADER};
use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::borrow::Cow;

/// gRPC leaves the padding out, HTTP senders put it in; both are read.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The name of a metric, inside the map that it belongs to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Metric<'a> {
    Application,
    Cpu,
    Memory,
    Rps,
    Eps,
    Named(&'a str),
    Utilization(&'a str),
    Cost(&'a str),
}

impl<'a> Metric<'a> {
    /// By its dotted name, as text writes it.
    fn of(name: &'a str) -> Option<Self> {
        if let Some((map, key)) = name.split_once('.') {
            return Map::of(map).map(|map| map.metric(key));
        }
        Some(match name {
            "application_utilization" => Self::Application,
            "cpu_utilization" => Self::Cpu,
            "mem_utilization" => Self::Memory,
            "rps_fractional" | "rps" => Self::Rps,
            "eps" => Self::Eps,
            _ => return None,
        })
    }

    /// Its dotted name, as the prefix of its map and its own name.
    pub(super) fn name(self) -> (&'static str, &'a str) {
        match self {
            Self::Application => ("", "application_utilization"),
            Self::Cpu => ("", "cpu_utilization"),
            Self::Memory => ("", "mem_utilization"),
            Self::Rps => ("", "rps_fractional"),
            Self::Eps => ("", "eps"),
            Self::Named(name) => ("named_metrics.", name),
            Self::Utilization(name) => ("utilization.", name),
            Self::Cost(name) => ("request_cost.", name),
        }
    }

    /// Its field number, and its key where the field is a map.
    pub(super) fn number(self) -> (u8, Option<&'a str>) {
        match self {
            Self::Cpu => (1, None),
            Self::Memory => (2, None),
            Self::Cost(name) => (4, Some(name)),
            Self::Utilization(name) => (5, Some(name)),
            Self::Rps => (6, None),
            Self::Eps => (7, None),
            Self::Named(name) => (8, Some(name)),
            Self::Application => (9, None),
        }
    }

    /// By its field number, where the field is a number.
    fn field(number: u64) -> Option<Self> {
        Some(match number {
            1 => Self::Cpu,
            2 => Self::Memory,
            6 => Self::Rps,
            7 => Self::Eps,
            9 => Self::Application,
            _ => return None,
        })
    }
}

#[derive(Clone, Copy)]
enum Map {
    Named,
    Utilization,
    Cost,
}

impl Map {
    fn of(name: &str) -> Option<Self> {
        Some(match name {
            "named_metrics" | "namedMetrics" => Self::Named,
            "utilization" => Self::Utilization,
            "request_cost" | "requestCost" => Self::Cost,
            _ => return None,
        })
    }

    fn field(number: u64) -> Option<Self> {
        Some(match number {
            4 => Self::Cost,
            5 => Self::Utilization,
            8 => Self::Named,
            _ => return None,
        })
    }

    fn metric(self, key: &str) -> Metric<'_> {
        match self {
            Self::Named => Metric::Named(key),
            Self::Utilization => Metric::Utilization(key),
            Self::Cost => Metric::Cost(key),
        }
    }
}

/// Counts the metrics and hands on those that can be a load.
struct Sink<F> {
    seen: usize,
    each: F,
}

impl<F: FnMut(Metric<'_>, f64)> Sink<F> {
    fn put(&mut self, metric: Option<Metric<'_>>, value: f64) -> Result<(), Error> {
        self.seen += 1;
        if self.seen > MAX_METRICS {
            return Err(Error::TooMany);
        }
        if let Some(metric) = metric
            && value.is_finite()
            && value >= 0.0
        {
            // `-0.0` passes the test above, and adding zero makes it `0.0`.
            (self.each)(metric, value + 0.0);
        }
        Ok(())
    }
}

/// Visits the report of a response; `false` when there is none. The prefixed header wins over the older ones.
pub(super) fn headers(headers: &http::HeaderMap, each: impl FnMut(Metric<'_>, f64)) -> Result<bool, Error> {
    if let Some(found) = headers.get(&TEXT_HEADER) {
        value(found.as_bytes(), each)?;
    } else if let Some(found) = headers.get(&BIN_HEADER) {
        binary(found.as_bytes(), each)?;
    } else if let Some(found) = headers.get(&JSON_HEADER) {
        json(found.as_bytes(), each)?;
    } else {
        return Ok(false);
    }
    Ok(true)
}

/// Visits the value of `endpoint-load-metrics`, whichever of its forms it has.
pub(super) fn value(bytes: &[u8], each: impl FnMut(Metric<'_>, f64)) -> Result<(), Error> {
    let bytes = bytes.trim_ascii();
    match bytes.split_at_checked(4) {
        Some((b"TEXT", rest)) if starts_with_space(rest) => text(rest, each),
        Some((b"JSON", rest)) if starts_with_space(rest) => json(rest, each),
        _ if bytes.starts_with(b"BIN ") => binary(&bytes[4..], each),
        _ if bytes.starts_with(b"{") => json(bytes, each),
        _ => text(bytes, each),
    }
}

/// `TEXT` and nothing else is an empty report.
fn starts_with_space(rest: &[u8]) -> bool {
    rest.first().is_none_or(u8::is_ascii_whitespace)
}

fn bounded(bytes: &[u8]) -> Result<&[u8], Error> {
    if bytes.len() > MAX_BYTES { Err(Error::TooLong(bytes.len())) } else { Ok(bytes) }
}

fn text(bytes: &[u8], each: impl FnMut(Metric<'_>, f64)) -> Result<(), Error> {
    let text = std::str::from_utf8(bounded(bytes)?).map_err(|_| Error::NotText)?;
    let mut sink = Sink { seen: 0, each };
    for pair in text.split(',') {
        // From the right: a value never has `=` or `:`, but the name of a metric may (`vllm:num_requests_waiting`).
        let Some((name, number)) = pair.rsplit_once(['=', ':']) else { continue };
        let number = number.trim().parse().unwrap_or(f64::NAN);
        sink.put(Metric::of(name.trim()), number)?;
    }
    Ok(())
}

fn binary(bytes: &[u8], each: impl FnMut(Metric<'_>, f64)) -> Result<(), Error> {
    let bytes = bounded(bytes.trim_ascii())?;
    let mut decoded = [0; MAX_BYTES];
    let length = BASE64.decode_slice(bytes, &mut decoded).map_err(|_| Error::NotBase64)?;
    protobuf(&decoded[..length], each)
}

/// Visits a serialised OrcaLoadReport.
pub(super) fn protobuf(bytes: &[u8], each: impl FnMut(Metric<'_>, f64)) -> Result<(), Error> {
    let mut sink = Sink { seen: 0, each };
    let mut rest = bounded(bytes)?;
    while !rest.is_empty() {
        match Field::take(&mut rest)? {
            Field { number, value: Value::Double(value) } => sink.put(Metric::field(number), value)?,
            // The old integer field, for senders that know no other.
            Field { number: 3, value: Value::Varint(value) } => sink.put(Some(Metric::Rps), value as f64)?,
            Field { number, value: Value::Bytes(entry) } => {
                if let Some(map) = Map::field(number) {
                    let (key, value) = map_entry(entry)?;
                    sink.put(Some(map.metric(key)), value)?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Key and value of a `map<string, double>`; either may be left out when it is empty or zero.
fn map_entry(mut entry: &[u8]) -> Result<(&str, f64), Error> {
    let (mut key, mut number) = ("", 0.0);
    while !entry.is_empty() {
        match Field::take(&mut entry)? {
            Field { number: 1, value: Value::Bytes(bytes) } => {
                key = std::str::from_utf8(bytes).map_err(|_| Error::NotProtobuf)?;
            }
            Field { number: 2, value: Value::Double(value) } => number = value,
            _ => {}
        }
    }
    Ok((key, number))
}

/// One field of a protobuf message.
struct Field<'a> {
    number: u64,
    value: Value<'a>,
}

enum Value<'a> {
    Varint(u64),
    Double(f64),
    Bytes(&'a [u8]),
    Skipped,
}

impl<'a> Field<'a> {
    fn take(rest: &mut &'a [u8]) -> Result<Self, Error> {
        let key = varint(rest)?;
        let value = match key & 7 {
            0 => Value::Varint(varint(rest)?),
            1 => {
                let (bytes, after) = rest.split_first_chunk::<8>().ok_or(Error::NotProtobuf)?;
                *rest = after;
                Value::Double(f64::from_le_bytes(*bytes))
            }
            2 => {
                let length = usize::try_from(varint(rest)?).map_err(|_| Error::NotProtobuf)?;
                let (bytes, after) = rest.split_at_checked(length).ok_or(Error::NotProtobuf)?;
                *rest = after;
                Value::Bytes(bytes)
            }
            5 => {
                *rest = rest.get(4..).ok_or(Error::NotProtobuf)?;
                Value::Skipped
            }
            _ => return Err(Error::NotProtobuf),
        };
        Ok(Self { number: key >> 3, value })
    }
}

fn varint(rest: &mut &[u8]) -> Result<u64, Error> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first().ok_or(Error::NotProtobuf)?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Error::NotProtobuf)
}

fn json(bytes: &[u8], each: impl FnMut(Metric<'_>, f64)) -> Result<(), Error> {
    let mut sink = Sink { seen: 0, each };
    let mut too_many = false;
    let mut source = serde_json::Deserializer::from_slice(bounded(bytes.trim_ascii())?);
    let visit = Object { map: None, sink: &mut sink, too_many: &mut too_many };
    let read = visit.deserialize(&mut source).and_then(|()| source.end());
    match read {
        Ok(()) => Ok(()),
        Err(_) if too_many => Err(Error::TooMany),
        Err(problem) => Err(Error::NotJson(problem.to_string())),
    }
}

/// The report itself (`map: None`) or one of its maps.
struct Object<'s, F> {
    map: Option<Map>,
    sink: &'s mut Sink<F>,
    too_many: &'s mut bool,
}

impl<'de, F: FnMut(Metric<'_>, f64)> DeserializeSeed<'de> for Object<'_, F> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, source: D) -> Result<(), D::Error> {
        source.deserialize_map(self)
    }
}

impl<'de, F: FnMut(Metric<'_>, f64)> Visitor<'de> for Object<'_, F> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object of metrics")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        while let Some(Key(key)) = entries.next_key()? {
            let metric = match (self.map, Map::of(&key)) {
                (Some(map), _) => Some(map.metric(&key)),
                (None, Some(map)) => {
                    let inner = Object { map: Some(map), sink: self.sink, too_many: self.too_many };
                    entries.next_value_seed(inner)?;
                    continue;
                }
                (None, None) => Metric::of(snake(&key)),
            };
            if metric.is_none() {
                entries.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = entries.next_value::<Number>()?.0;
            if self.sink.put(metric, value).is_err() {
                *self.too_many = true;
                return Err(serde::de::Error::custom("too many metrics"));
            }
        }
        Ok(())
    }
}

/// protobuf's JSON may write its names in camel case.
fn snake(name: &str) -> &str {
    match name {
        "applicationUtilization" => "application_utilization",
        "cpuUtilization" => "cpu_utilization",
        "memUtilization" => "mem_utilization",
        "rpsFractional" => "rps_fractional",
        other => other,
    }
}

#[derive(serde::Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// A JSON number, or a string that holds one: protobuf's JSON writes 64-bit integers, NaN and infinities that way.
struct Number(f64);

impl<'de> serde::Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        struct Visit;
        impl Visitor<'_> for Visit {
            type Value = Number;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number")
            }
            fn visit_f64<E>(self, value: f64) -> Result<Number, E> {
                Ok(Number(value))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }
            fn visit_str<E>(self, value: &str) -> Result<Number, E> {
                Ok(Number(value.parse().unwrap_or(f64::NAN)))
            }
        }
        source.deserialize_any(Visit)
    }
}
