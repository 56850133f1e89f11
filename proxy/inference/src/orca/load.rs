//! The numbers that Penstock balances by, on the path of every response.

use super::gpu::{GpuHealth, GpuId};
use super::number::Digits;
use super::read::{self, Metric};
use super::write;
use bytes::{BufMut, BytesMut};
use http::{HeaderMap, HeaderValue};

use super::{BIN_HEADER, TEXT_HEADER};

/// What an inbound proxy reports of its workload. `None` is "not told", which is not the same as idle.
///
/// Reading allocates nothing; writing grows only the buffer that it was given. Names on the wire are the fields' own
/// in `named_metrics`, but for the five that ORCA has a field for: `application_utilization`, `rps` (as
/// `rps_fractional`), `eps` and `mem_utilization`.
///
/// ```
/// # use penstock_inference::orca::load::Load;
/// let load = Load { in_flight: Some(3.0), queue_wait_ms: Some(0.25), ..Load::default() };
/// let mut out = bytes::BytesMut::new();
/// load.write_text(&mut out);
/// assert_eq!(&out[..], b"TEXT named_metrics.in_flight=3, named_metrics.queue_wait_ms=0.250");
/// assert_eq!(Load::from_value(&out), Some(load));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// Busy share of the server at its present batch: 1 is never idle, more is a queue. Requests a second divided by
    /// it are the server's capacity, as gRFC A58 wants.
    pub application_utilization: Option<f64>,
    /// GPU memory in use, 0 to 1.
    pub mem_utilization: Option<f64>,
    /// Requests a second.
    pub rps: Option<f64>,
    /// Errors a second.
    pub eps: Option<f64>,
    /// Requests in flight, from all clients.
    pub in_flight: Option<f64>,
    /// Milliseconds that requests wait before they reach the application.
    pub queue_wait_ms: Option<f64>,
    /// Predicted milliseconds until work that arrives now begins: the drain time of all work in flight.
    pub backlog_ms: Option<f64>,
    /// What a request for this model costs before its first unit of work, milliseconds.
    pub fixed_ms: Option<f64>,
    /// What each unit of work costs, milliseconds. Units are batch rows, or tokens.
    pub unit_ms: Option<f64>,
    /// How many requests are served at once: what one takes that comes alone over what it costs the server.
    pub at_once: Option<f64>,
    /// Units of work in flight.
    pub units: Option<f64>,
    /// Units that the open batch still takes.
    pub room: Option<f64>,
    /// Milliseconds until the open batch closes.
    pub closes_ms: Option<f64>,
    /// Requests that wait inside the model server.
    pub waiting: Option<f64>,
    /// Share of the KV cache in use, 0 to 1.
    pub kv_usage: Option<f64>,
    /// The physical GPU.
    pub gpu: Option<GpuId>,
    /// How the GPU is.
    pub gpu_health: Option<GpuHealth>,
}

/// How many numbers a [`Load`] has.
pub(super) const NUMBERS: usize = 17;

/// One number of a load: its name, its value, and how finely it is written.
pub(super) type Told = (Metric<'static>, Option<f64>, Digits);

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

    /// Reads a serialised `xds.data.orca.v3.OrcaLoadReport`.
    pub fn from_protobuf(bytes: &[u8]) -> Option<Self> {
        let mut load = Self::default();
        read::protobuf(bytes, |metric, value| load.put(metric, value)).ok()?;
        load.some()
    }

    /// What `self` tells, and for the rest what `other` tells.
    pub fn or(self, other: Self) -> Self {
        Self {
            application_utilization: self.application_utilization.or(other.application_utilization),
            mem_utilization: self.mem_utilization.or(other.mem_utilization),
            rps: self.rps.or(other.rps),
            eps: self.eps.or(other.eps),
            in_flight: self.in_flight.or(other.in_flight),
            queue_wait_ms: self.queue_wait_ms.or(other.queue_wait_ms),
            backlog_ms: self.backlog_ms.or(other.backlog_ms),
            fixed_ms: self.fixed_ms.or(other.fixed_ms),
            unit_ms: self.unit_ms.or(other.unit_ms),
            at_once: self.at_once.or(other.at_once),
            units: self.units.or(other.units),
            room: self.room.or(other.room),
            closes_ms: self.closes_ms.or(other.closes_ms),
            waiting: self.waiting.or(other.waiting),
            kv_usage: self.kv_usage.or(other.kv_usage),
            gpu: self.gpu.or(other.gpu),
            gpu_health: self.gpu_health.or(other.gpu_health),
        }
    }

    fn put(&mut self, metric: Metric<'_>, value: f64) {
        let metric = match metric {
            Metric::Named(name) => Metric::Named(name.strip_prefix("vllm:").unwrap_or(name)),
            other => other,
        };
        let number = match metric {
            Metric::Application => &mut self.application_utilization,
            Metric::Memory => &mut self.mem_utilization,
            Metric::Rps => &mut self.rps,
            Metric::Eps => &mut self.eps,
            Metric::Named(name) => match name {
                "in_flight" => &mut self.in_flight,
                "queue_wait_ms" => &mut self.queue_wait_ms,
                "backlog_ms" => &mut self.backlog_ms,
                "fixed_ms" => &mut self.fixed_ms,
                "unit_ms" => &mut self.unit_ms,
                "at_once" => &mut self.at_once,
                "units" => &mut self.units,
                "room" => &mut self.room,
                "closes_ms" => &mut self.closes_ms,
                "waiting" => &mut self.waiting,
                "kv_usage" => &mut self.kv_usage,
                "gpu" => return self.gpu = GpuId::of_number(value).or(self.gpu),
                "gpu_health" => return self.gpu_health = Some(GpuHealth::of_number(value)),
                // What model servers call it. Our own name, told beside it, wins.
                "kv_cache_usage_perc" | "kv_cache_utilization" | "gpu_cache_usage_perc" => {
                    return self.kv_usage = self.kv_usage.or(Some(value));
                }
                "num_requests_waiting" => return self.waiting = self.waiting.or(Some(value)),
                _ => return,
            },
            Metric::Cpu | Metric::Utilization(_) | Metric::Cost(_) => return,
        };
        *number = Some(value);
    }

    fn some(self) -> Option<Self> {
        (self != Self::default()).then_some(self)
    }

    /// All numbers in the order they are written: those that every gRPC client reads come first.
    pub(super) fn told(&self) -> [Told; NUMBERS] {
        use Digits::{Six, Three};
        let named = |name, value, digits| (Metric::Named(name), value, digits);
        [
            (Metric::Application, self.application_utilization, Three),
            (Metric::Memory, self.mem_utilization, Three),
            (Metric::Rps, self.rps, Three),
            (Metric::Eps, self.eps, Three),
            named("in_flight", self.in_flight, Three),
            named("queue_wait_ms", self.queue_wait_ms, Three),
            named("backlog_ms", self.backlog_ms, Three),
            named("fixed_ms", self.fixed_ms, Six),
            named("unit_ms", self.unit_ms, Six),
            named("at_once", self.at_once, Three),
            named("units", self.units, Three),
            named("room", self.room, Three),
            named("closes_ms", self.closes_ms, Three),
            named("waiting", self.waiting, Three),
            named("kv_usage", self.kv_usage, Three),
            named("gpu", self.gpu.map(GpuId::number), Three),
            named("gpu_health", self.gpu_health.map(GpuHealth::number), Three),
        ]
    }

    /// Whether this number is told here.
    pub(super) fn tells(&self, metric: Metric<'_>) -> bool {
        self.told().iter().any(|(name, value, _)| value.is_some() && *name == metric)
    }

    /// Writes `TEXT name=value, …`; nothing when there is nothing to tell.
    pub fn write_text(&self, out: &mut impl BufMut) {
        write::text(self, out);
    }

    /// Writes the serialised `xds.data.orca.v3.OrcaLoadReport`, at most [`PROTOBUF_BYTES`] bytes.
    pub fn write_protobuf(&self, out: &mut impl BufMut) {
        write::protobuf(self, out);
    }

    /// Writes the value of the `-bin` trailer: base64, without padding, of the serialised message.
    pub fn write_bin(&self, out: &mut impl BufMut) {
        let mut message = [0; PROTOBUF_BYTES];
        let mut rest = &mut message[..];
        write::protobuf(self, &mut rest);
        let unused = rest.len();
        write::base64(&message[..PROTOBUF_BYTES - unused], out);
    }

    /// Puts the text report on a response, in place of any that is there. `scratch` is the worker's own buffer: values
    /// are split off it, so an allocation is shared by many responses.
    pub fn stamp(&self, headers: &mut HeaderMap, scratch: &mut BytesMut) {
        self.write_text(scratch);
        if scratch.is_empty() {
            return;
        }
        if let Ok(value) = HeaderValue::from_maybe_shared(scratch.split().freeze()) {
            headers.insert(&TEXT_HEADER, value);
        }
    }

    /// Puts the binary report on the trailers of a gRPC response, in place of any that is there.
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

/// The most bytes that [`Load::write_protobuf`] writes: a key, a length, a name and a double for each number.
pub const PROTOBUF_BYTES: usize = NUMBERS * (13 + "queue_wait_ms".len());

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

    fn full() -> Load {
        Load {
            application_utilization: Some(1.25),
            mem_utilization: Some(0.5),
            rps: Some(10.0),
            eps: Some(0.0),
            in_flight: Some(4.0),
            queue_wait_ms: Some(1.5),
            backlog_ms: Some(12.0),
            fixed_ms: Some(3.5),
            unit_ms: Some(0.000_125),
            at_once: Some(1.5),
            units: Some(64.0),
            room: Some(16.0),
            closes_ms: Some(1.75),
            waiting: Some(2.0),
            kv_usage: Some(0.875),
            gpu: Some(GpuId::of_uuid("GPU-1")),
            gpu_health: Some(GpuHealth::Throttled),
        }
    }

    #[test]
    fn every_number_has_its_name_on_the_wire() {
        let gpu = GpuId::of_uuid("GPU-1").number();
        assert_eq!(
            text(&full()),
            format!(
                "TEXT application_utilization=1.250, mem_utilization=0.500, rps_fractional=10, eps=0, \
                 named_metrics.in_flight=4, named_metrics.queue_wait_ms=1.500, named_metrics.backlog_ms=12, \
                 named_metrics.fixed_ms=3.500000, named_metrics.unit_ms=0.000125, named_metrics.at_once=1.500, \
                 named_metrics.units=64, named_metrics.room=16, named_metrics.closes_ms=1.750, named_metrics.waiting=2, \
                 named_metrics.kv_usage=0.875, named_metrics.gpu={gpu}, named_metrics.gpu_health=1"
            )
        );
    }

    #[test]
    fn others_read_it_whole() {
        let report = LoadReport::from_value(text(&full()).as_bytes()).unwrap();
        assert_eq!((report.rps_fractional, report.named_metrics["in_flight"]), (10.0, 4.0));
        assert_eq!((report.mem_utilization, report.named_metrics["unit_ms"]), (0.5, 0.000_125));
        let mut bin = b"BIN ".to_vec();
        full().write_bin(&mut bin);
        assert_eq!(LoadReport::from_value(&bin), Ok(report));
    }

    #[test]
    fn silence_is_not_idleness() {
        assert_eq!(Load::from_value(b"TEXT cpu_utilization=0.5"), None);
        assert_eq!(Load::from_value(b"TEXT named_metrics.in_flight=0").unwrap().in_flight, Some(0.0));
        assert_eq!(Load::from_headers(&HeaderMap::new()), None);
        assert_eq!(text(&Load::default()), "");
        let mut nothing = Vec::new();
        Load::default().write_bin(&mut nothing);
        assert_eq!(nothing, b"");
    }

    #[test]
    fn model_servers_have_their_own_names_and_ours_win() {
        for (text, kv_usage, waiting) in [
            (
                "TEXT named_metrics.kv_cache_usage_perc=0.5, named_metrics.num_requests_waiting=3",
                0.5,
                Some(3.0),
            ),
            ("TEXT named_metrics.kv_cache_utilization=0.25, named_metrics.max_token_capacity=9", 0.25, None),
            (
                "JSON {\"named_metrics\":{\"vllm:num_requests_waiting\":3,\"vllm:gpu_cache_usage_perc\":1}}",
                1.0,
                Some(3.0),
            ),
            ("TEXT named_metrics.kv_usage=0.75, named_metrics.kv_cache_usage_perc=0.5", 0.75, None),
            ("TEXT named_metrics.kv_cache_usage_perc=0.5, named_metrics.kv_usage=0.75", 0.75, None),
        ] {
            let load = Load::from_value(text.as_bytes()).unwrap();
            assert_eq!(load, Load { kv_usage: Some(kv_usage), waiting, ..Load::default() }, "{text}");
        }
    }

    #[test]
    fn a_stamp_is_read_from_headers_and_trailers() {
        let load = Load { in_flight: Some(2.0), rps: Some(7.5), ..full() };
        let (mut scratch, mut map) = (BytesMut::with_capacity(4096), HeaderMap::new());
        load.stamp(&mut map, &mut scratch);
        assert_eq!(Load::from_headers(&map), Some(load));
        map.clear();
        load.stamp_trailers(&mut map, &mut scratch);
        assert_eq!(Load::from_headers(&map), Some(load));
    }

    #[test]
    fn what_one_does_not_tell_the_other_may() {
        let ours = Load { in_flight: Some(1.0), ..Load::default() };
        assert_eq!(ours.or(full()), Load { in_flight: Some(1.0), ..full() });
        assert_eq!(full().or(ours), full());
    }

    fn loads() -> impl Strategy<Value = Load> {
        let number = || prop::option::of((0u64..1_000_000_000).prop_map(|n| n as f64 / 1000.0));
        (prop::array::uniform15(number()), prop::option::of("[A-Z]{4}"), prop::option::of(0u8..3)).prop_map(
            |(n, uuid, health)| Load {
                application_utilization: n[0],
                mem_utilization: n[1],
                rps: n[2],
                eps: n[3],
                in_flight: n[4],
                queue_wait_ms: n[5],
                backlog_ms: n[6],
                fixed_ms: n[7],
                unit_ms: n[8],
                at_once: n[9],
                units: n[10],
                room: n[11],
                closes_ms: n[12],
                waiting: n[13],
                kv_usage: n[14],
                gpu: uuid.as_deref().map(GpuId::of_uuid),
                gpu_health: health.map(|health| GpuHealth::of_number(f64::from(health))),
            },
        )
    }

    proptest! {
        #[test]
        fn text_and_binary_survive_the_way(load in loads()) {
            prop_assert_eq!(Load::from_value(text(&load).as_bytes()), load.some());
            let mut bin = b"BIN ".to_vec();
            load.write_bin(&mut bin);
            prop_assert_eq!(Load::from_value(&bin), load.some());
            let mut message = Vec::new();
            load.write_protobuf(&mut message);
            prop_assert!(message.len() <= PROTOBUF_BYTES);
            prop_assert_eq!(Load::from_protobuf(&message), load.some());
        }
    }
}
