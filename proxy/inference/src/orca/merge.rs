//! An application's own report and the inbound proxy's, as one.
//!
//! vLLM and Triton put a report on their responses when the request asks for one. The proxy knows more, but not what
//! the server knows of itself, so both go out together:
//!
//! - What the proxy measured wins: it means the same for every replica, whatever serves there.
//! - What only the server can know (requests waiting inside it, KV cache) is the server's: its word on this response
//!   is newer than the last look at its metrics.
//! - Everything else that the server told is for the client that asked, under the server's own names and in the form
//!   that was asked for. Nobody asked: it is left out.

use super::load::Load;
use super::number::{self, Digits};
use super::read::{self, Metric};
use super::{BIN_HEADER, JSON_HEADER, MAX_BYTES, TEXT_HEADER, write};
use bytes::{BufMut, BytesMut};
use http::{HeaderMap, HeaderValue};

/// The form of report that a request asks for with `endpoint-load-metrics-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `TEXT name=value, …`.
    Text,
    /// `JSON {…}`.
    Json,
}

impl Format {
    /// Reads the request header; a word that is not known asks for text, which every consumer reads.
    pub fn of(value: &HeaderValue) -> Self {
        if value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"json") { Self::Json } else { Self::Text }
    }
}

impl Load {
    /// Puts this report on a response, merged with the application's own (see the module). `asked`: what the client
    /// asked to see, if it did.
    pub fn merge(&self, headers: &mut HeaderMap, asked: Option<Format>, scratch: &mut BytesMut) {
        let merged = self.merged(headers);
        match asked {
            None => merged.write_text(scratch),
            Some(Format::Text) => text(&merged, headers, scratch),
            Some(Format::Json) => json(&merged, headers, scratch),
        }
        put(headers, &TEXT_HEADER, scratch);
    }

    /// The same for the trailers of a gRPC response, where the form is always binary.
    pub fn merge_trailers(&self, trailers: &mut HeaderMap, asked: bool, scratch: &mut BytesMut) {
        let merged = self.merged(trailers);
        if asked {
            let mut message = [0; MAX_MESSAGE];
            let mut rest = &mut message[..];
            write::protobuf(&merged, &mut rest);
            others(&merged, trailers, |metric, value| {
                // The longest field, so that none is cut.
                if rest.len() >= write::LONGEST_NAME + 13 {
                    write::field(metric, value, &mut rest);
                }
            });
            let unused = rest.len();
            write::base64(&message[..MAX_MESSAGE - unused], scratch);
        } else {
            merged.write_bin(scratch);
        }
        put(trailers, &BIN_HEADER, scratch);
    }

    fn merged(&self, headers: &HeaderMap) -> Self {
        let Some(told) = Self::from_headers(headers) else { return *self };
        let merged = self.or(told);
        Self {
            waiting: told.waiting.or(self.waiting),
            kv_usage: told.kv_usage.or(self.kv_usage).map(|share| share.min(1.0)),
            // A server cannot say which GPU is whose; a wrong word would tie its fate to a stranger's.
            gpu: self.gpu,
            gpu_health: self.gpu_health,
            ..merged
        }
    }
}

/// What base64 turns into no more than [`MAX_BYTES`].
const MAX_MESSAGE: usize = MAX_BYTES / 4 * 3;

/// Replaces whatever reports there are by the one in `scratch`.
fn put(headers: &mut HeaderMap, name: &http::HeaderName, scratch: &mut BytesMut) {
    for name in [&TEXT_HEADER, &BIN_HEADER, &JSON_HEADER] {
        headers.remove(name);
    }
    if scratch.is_empty() {
        return;
    }
    if let Ok(value) = HeaderValue::from_maybe_shared(scratch.split().freeze()) {
        headers.insert(name, value);
    }
}

/// Visits what the application told beyond `load`, with names that can stand in any form. A report that breaks off in
/// the middle has been visited up to there.
fn others(load: &Load, headers: &HeaderMap, mut each: impl FnMut(Metric<'_>, f64)) {
    // What cannot be read to its end was told nevertheless; the response is none the worse.
    let _ = read::headers(headers, |metric, value| {
        let name = metric.name().1;
        let plain = name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b',' | b'"' | b'\\'));
        let ours = matches!(metric, Metric::Named("gpu" | "gpu_health")) || load.tells(metric);
        if plain && !name.is_empty() && name.len() <= write::LONGEST_NAME && !ours {
            each(metric, value);
        }
    });
}

/// The longest `request_cost.name=value, ` in either form.
const LONGEST_PAIR: usize = write::LONGEST_NAME + 48;

fn text(load: &Load, headers: &HeaderMap, out: &mut BytesMut) {
    let start = out.len();
    load.write_text(out);
    others(load, headers, |metric, value| {
        let written = out.len() - start;
        if written + LONGEST_PAIR > MAX_BYTES {
            return;
        }
        out.put_slice(if written == 0 { b"TEXT " } else { b", " });
        write::pair(metric, value, Digits::Six, out);
    });
}

/// The maps of a report, by their names in JSON; `""` is the report itself.
const MAPS: [&str; 4] = ["", "named_metrics", "utilization", "request_cost"];

fn json(load: &Load, headers: &HeaderMap, out: &mut BytesMut) {
    let start = out.len();
    out.put_slice(b"JSON {");
    let mut first = true;
    for map in MAPS {
        let mut empty = true;
        let mut pair = |metric: Metric<'_>, value: f64, digits: Digits| {
            let (prefix, name) = metric.name();
            if prefix.trim_end_matches('.') != map || out.len() - start + LONGEST_PAIR > MAX_BYTES {
                return;
            }
            if !std::mem::take(&mut first) {
                out.put_u8(b',');
            }
            if !map.is_empty() && std::mem::take(&mut empty) {
                out.put_u8(b'"');
                out.put_slice(map.as_bytes());
                out.put_slice(b"\":{");
            }
            out.put_u8(b'"');
            out.put_slice(name.as_bytes());
            out.put_slice(b"\":");
            number::write(value, digits, out);
        };
        for (metric, value, digits) in load.told() {
            if let Some(value) = value {
                pair(metric, value, digits);
            }
        }
        others(load, headers, |metric, value| pair(metric, value, Digits::Six));
        if !map.is_empty() && !empty {
            out.put_u8(b'}');
        }
    }
    out.put_u8(b'}');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orca::{GpuId, LoadReport};
    use proptest::prelude::*;

    fn ours() -> Load {
        Load {
            application_utilization: Some(0.5),
            in_flight: Some(3.0),
            waiting: Some(9.0),
            gpu: Some(GpuId::of_uuid("GPU-1")),
            ..Load::default()
        }
    }

    fn answer(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(TEXT_HEADER.clone(), HeaderValue::from_str(value).unwrap())])
    }

    const VLLM: &str = "TEXT named_metrics.kv_cache_usage_perc=0.25, named_metrics.num_requests_waiting=2, \
        named_metrics.in_flight=77, application_utilization=7, utilization.sm=0.125, request_cost.tokens=512, \
        named_metrics.gpu=1";

    fn merged(value: &str, asked: Option<Format>) -> String {
        let mut headers = answer(value);
        headers.insert(&JSON_HEADER, HeaderValue::from_static("{}"));
        ours().merge(&mut headers, asked, &mut BytesMut::new());
        assert_eq!(headers.len(), 1, "one report goes out");
        headers[&TEXT_HEADER].to_str().unwrap().to_owned()
    }

    #[test]
    fn what_was_measured_wins_and_what_only_the_server_knows_is_its_own() {
        let load = Load::from_value(merged(VLLM, None).as_bytes()).unwrap();
        assert_eq!(load, Load { waiting: Some(2.0), kv_usage: Some(0.25), ..ours() });
    }

    #[test]
    fn the_servers_own_names_are_for_those_who_asked() {
        assert!(!merged(VLLM, None).contains("kv_cache_usage_perc"));
        for format in [Format::Text, Format::Json] {
            let text = merged(VLLM, Some(format));
            let report = LoadReport::from_value(text.as_bytes()).unwrap();
            assert_eq!(report.named_metrics["kv_cache_usage_perc"], 0.25, "{text}");
            assert_eq!(report.named_metrics["num_requests_waiting"], 2.0, "{text}");
            assert_eq!((report.utilization["sm"], report.request_cost["tokens"]), (0.125, 512.0), "{text}");
            assert_eq!(
                (report.named_metrics["in_flight"], report.application_utilization),
                (3.0, 0.5),
                "{text}"
            );
            assert_eq!(report.named_metrics["gpu"], GpuId::of_uuid("GPU-1").number(), "{text}");
        }
    }

    #[test]
    fn the_form_is_the_one_that_was_asked_for() {
        for (asked, form) in [("json", "JSON {"), ("JSON", "JSON {"), ("text", "TEXT "), ("yes", "TEXT ")] {
            let format = Format::of(&HeaderValue::from_static(asked));
            assert!(merged(VLLM, Some(format)).starts_with(form), "{asked}");
        }
    }

    #[test]
    fn trailers_are_merged_too() {
        for asked in [false, true] {
            let mut trailers = HeaderMap::new();
            let told = LoadReport::from_value(VLLM.as_bytes()).unwrap();
            trailers.insert(&BIN_HEADER, HeaderValue::try_from(told.to_bin()).unwrap());
            ours().merge_trailers(&mut trailers, asked, &mut BytesMut::new());
            let report = LoadReport::from_headers(&trailers).unwrap().unwrap();
            assert_eq!((report.named_metrics["waiting"], report.named_metrics["in_flight"]), (2.0, 3.0));
            assert_eq!(report.named_metrics.contains_key("num_requests_waiting"), asked);
            assert_eq!(report.utilization.contains_key("sm"), asked);
        }
    }

    #[test]
    fn a_report_that_cannot_be_read_is_replaced() {
        let text = merged("JSON {broken", Some(Format::Text));
        assert_eq!(Load::from_value(text.as_bytes()), Some(ours()));
    }

    proptest! {
        #[test]
        fn whatever_a_server_tells_the_merged_report_can_be_read(
            pairs in prop::collection::vec(("[ -~]{0,120}", any::<f64>(), 0usize..4), 0..140),
            garbage in prop::collection::vec(32u8..127, 0..200),
            format in 0usize..4,
        ) {
            let prefix = ["", "named_metrics.", "utilization.", "request_cost."];
            let mut told: String = "TEXT ".into();
            for (name, value, map) in pairs {
                told += &format!("{}{name}={value},", prefix[map]);
            }
            told += std::str::from_utf8(&garbage).unwrap();
            told.truncate(MAX_BYTES);
            let mut headers = answer(&told);
            let mut scratch = BytesMut::new();
            match [None, Some(Format::Text), Some(Format::Json)].get(format) {
                Some(asked) => ours().merge(&mut headers, *asked, &mut scratch),
                None => ours().merge_trailers(&mut headers, true, &mut scratch),
            }
            let report = LoadReport::from_headers(&headers).unwrap().unwrap();
            prop_assert_eq!(report.named_metrics["in_flight"], 3.0);
            prop_assert_eq!(report.application_utilization, 0.5);
            prop_assert_eq!(Load::from_headers(&headers).unwrap().gpu, ours().gpu);
        }
    }
}
