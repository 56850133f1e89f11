//! A whole load report: every metric that a server told.

use super::number::{self, Digits};
use super::read::{self, Metric};
use super::{Error, MAX_METRICS, pb};
use base64::Engine as _;
use bytes::BufMut;
use http::HeaderMap;
use prost::Message as _;
use std::collections::BTreeMap;

/// Everything that a load report can say. Absent and zero are the same, as they are on the wire.
///
/// Values are finite and not negative when they were read; what is not is left out when they are written.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LoadReport {
    /// How full the application is, by its own measure. 1 is its limit, and more is possible.
    pub application_utilization: f64,
    /// Share of the CPU that it may use.
    pub cpu_utilization: f64,
    /// Share of the memory.
    pub mem_utilization: f64,
    /// Requests a second.
    pub rps_fractional: f64,
    /// Errors a second.
    pub eps: f64,
    /// Anything else, by the server's own names.
    pub named_metrics: BTreeMap<String, f64>,
    /// Shares of further resources.
    pub utilization: BTreeMap<String, f64>,
    /// What this very request cost.
    pub request_cost: BTreeMap<String, f64>,
}

impl LoadReport {
    /// Reads the report that a response carries, in whichever form it has.
    pub fn from_headers(headers: &HeaderMap) -> Result<Option<Self>, Error> {
        let mut report = Self::default();
        Ok(read::headers(headers, |metric, value| report.put(metric, value))?.then_some(report))
    }

    /// Reads the value of `endpoint-load-metrics`.
    pub fn from_value(value: &[u8]) -> Result<Self, Error> {
        let mut report = Self::default();
        read::value(value, |metric, value| report.put(metric, value))?;
        Ok(report)
    }

    /// Reads a serialised `xds.data.orca.v3.OrcaLoadReport`.
    pub fn from_protobuf(bytes: &[u8]) -> Result<Self, Error> {
        let mut report = Self::default();
        read::protobuf(bytes, |metric, value| report.put(metric, value))?;
        Ok(report)
    }

    fn put(&mut self, metric: Metric<'_>, value: f64) {
        match metric {
            Metric::Application => self.application_utilization = value,
            Metric::Cpu => self.cpu_utilization = value,
            Metric::Memory => self.mem_utilization = value,
            Metric::Rps => self.rps_fractional = value,
            Metric::Eps => self.eps = value,
            Metric::Named(name) => drop(self.named_metrics.insert(name.to_owned(), value)),
            Metric::Utilization(name) => drop(self.utilization.insert(name.to_owned(), value)),
            Metric::Cost(name) => drop(self.request_cost.insert(name.to_owned(), value)),
        }
    }

    /// Writes `TEXT name=value, …` with three decimals, the value of `endpoint-load-metrics`. Zero is left out, and
    /// so is a metric whose name would break the header: empty, or not visible ASCII, or with a comma.
    pub fn write_text(&self, out: &mut impl BufMut) {
        out.put_slice(b"TEXT ");
        let mut first = true;
        for (map, name, value) in self.metrics().take(MAX_METRICS) {
            let visible = name.bytes().all(|b| b.is_ascii_graphic() && b != b',');
            if name.is_empty() || !visible {
                continue;
            }
            if !std::mem::take(&mut first) {
                out.put_slice(b", ");
            }
            out.put_slice(map.as_bytes());
            out.put_slice(name.as_bytes());
            out.put_u8(b'=');
            number::write(value, Digits::Three, out);
        }
    }

    /// Writes the value of `endpoint-load-metrics-bin`: base64, without padding, of the serialised message.
    pub fn to_bin(&self) -> String {
        base64::engine::general_purpose::STANDARD_NO_PAD.encode(self.to_protobuf())
    }

    /// Serialises to `xds.data.orca.v3.OrcaLoadReport`.
    pub fn to_protobuf(&self) -> Vec<u8> {
        let sound = |value: f64| if is_load(value) { value } else { 0.0 };
        let map = |map: &BTreeMap<String, f64>| {
            map.iter().filter(|(_, v)| is_load(**v)).map(|(k, v)| (k.clone(), *v)).collect()
        };
        pb::OrcaLoadReport {
            cpu_utilization: sound(self.cpu_utilization),
            mem_utilization: sound(self.mem_utilization),
            rps_fractional: sound(self.rps_fractional),
            eps: sound(self.eps),
            application_utilization: sound(self.application_utilization),
            request_cost: map(&self.request_cost),
            utilization: map(&self.utilization),
            named_metrics: map(&self.named_metrics),
            ..Default::default()
        }
        .encode_to_vec()
    }

    /// Everything worth writing: prefix of the map, name, value.
    fn metrics(&self) -> impl Iterator<Item = (&'static str, &str, f64)> {
        let own = [
            ("application_utilization", self.application_utilization),
            ("cpu_utilization", self.cpu_utilization),
            ("mem_utilization", self.mem_utilization),
            ("rps_fractional", self.rps_fractional),
            ("eps", self.eps),
        ];
        let maps = [
            ("named_metrics.", &self.named_metrics),
            ("utilization.", &self.utilization),
            ("request_cost.", &self.request_cost),
        ];
        let own = own.into_iter().filter(|(_, value)| *value != 0.0).map(|(name, value)| ("", name, value));
        let mapped = maps
            .into_iter()
            .flat_map(|(prefix, map)| map.iter().map(move |(name, value)| (prefix, name.as_str(), *value)));
        own.chain(mapped).filter(|(_, _, value)| is_load(*value))
    }
}

fn is_load(value: f64) -> bool {
    value.is_finite() && value >= 0.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orca::{BIN_HEADER, JSON_HEADER, MAX_BYTES, TEXT_HEADER};
    use http::HeaderValue;
    use proptest::prelude::*;

    fn example() -> LoadReport {
        LoadReport {
            application_utilization: 1.25,
            cpu_utilization: 0.5,
            mem_utilization: 0.25,
            rps_fractional: 120.5,
            eps: 2.0,
            named_metrics: [("in_flight".to_owned(), 3.0), ("vllm:num_requests_waiting".to_owned(), 7.0)]
                .into(),
            utilization: [("gpu".to_owned(), 0.875)].into(),
            request_cost: [("tokens".to_owned(), 512.0)].into(),
        }
    }

    fn headers(name: &http::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name.clone(), HeaderValue::from_str(value).unwrap())])
    }

    #[test]
    fn all_three_generations_say_the_same() {
        let pairs = [
            "application_utilization=1.25, cpu_utilization=0.5, mem_utilization=0.25, rps_fractional=120.5, eps=2",
            "named_metrics.in_flight=3, named_metrics.vllm:num_requests_waiting=7",
            "utilization.gpu=0.875, request_cost.tokens=512",
        ]
        .join(",");
        let colons = pairs.replace('=', ":");
        let json = r#"{"application_utilization":1.25,"cpuUtilization":0.5,"mem_utilization":0.25,"rps":"7",
            "rps_fractional":120.5,"eps":2,"named_metrics":{"in_flight":3,"vllm:num_requests_waiting":"7"},
            "utilization":{"gpu":0.875},"requestCost":{"tokens":512},"unheard_of":{"a":[1]}}"#
            .replace('\n', " ");
        let bin = example().to_bin();
        let padded = base64::engine::general_purpose::STANDARD.encode(example().to_protobuf());
        for (name, value) in [
            (&TEXT_HEADER, format!("TEXT {pairs}")),
            (&TEXT_HEADER, format!("TEXT {colons}")),
            (&TEXT_HEADER, pairs.clone()),
            (&TEXT_HEADER, colons.clone()),
            (&TEXT_HEADER, format!("JSON {json}")),
            (&TEXT_HEADER, json.clone()),
            (&TEXT_HEADER, format!("BIN {bin}")),
            (&TEXT_HEADER, format!("BIN {padded}")),
            (&JSON_HEADER, json.clone()),
            (&BIN_HEADER, bin.clone()),
            (&BIN_HEADER, padded.clone()),
        ] {
            let read = LoadReport::from_headers(&headers(name, &value));
            assert_eq!(read, Ok(Some(example())), "{name}: {value}");
        }
        assert_eq!(LoadReport::from_headers(&HeaderMap::new()), Ok(None));
    }

    #[test]
    fn protobuf_is_what_the_field_reads() {
        let message = pb::OrcaLoadReport::decode(&*example().to_protobuf()).unwrap();
        assert_eq!(message.named_metrics["in_flight"], 3.0);
        assert_eq!(message.application_utilization, 1.25);
        #[allow(deprecated)]
        let old = pb::OrcaLoadReport { rps: 42, ..Default::default() };
        assert_eq!(LoadReport::from_protobuf(&old.encode_to_vec()).unwrap().rps_fractional, 42.0);
    }

    #[test]
    fn what_cannot_be_a_load_is_skipped_and_costs_nothing_else() {
        let text = b"TEXT eps=-1, cpu_utilization=NaN, mem_utilization=inf, what, =, a=b, rps_fractional=3";
        let read = LoadReport::from_value(text).unwrap();
        assert_eq!(read, LoadReport { rps_fractional: 3.0, ..Default::default() });
        let unsound = LoadReport { eps: f64::NAN, cpu_utilization: -1.0, ..Default::default() };
        let mut out = Vec::new();
        unsound.write_text(&mut out);
        assert_eq!(out, b"TEXT ");
        assert_eq!(LoadReport::from_protobuf(&unsound.to_protobuf()), Ok(LoadReport::default()));
    }

    #[test]
    fn what_fails_as_a_whole_says_why() {
        let value = |text: &str| LoadReport::from_value(text.as_bytes());
        assert_eq!(value(&"a".repeat(MAX_BYTES + 1)), Err(Error::TooLong(MAX_BYTES + 1)));
        let many: Vec<_> = (0..200).map(|i| format!("named_metrics.m{i}=1")).collect();
        assert_eq!(value(&many.join(",")), Err(Error::TooMany));
        let many: Vec<_> = (0..200).map(|i| format!("\"m{i}\":1")).collect();
        assert_eq!(value(&format!("JSON {{\"named_metrics\":{{{}}}}}", many.join(","))), Err(Error::TooMany));
        assert_eq!(value("BIN !"), Err(Error::NotBase64));
        assert_eq!(value("BIN AAAA"), Err(Error::NotProtobuf));
        assert!(matches!(value("JSON {\"eps\":[]}"), Err(Error::NotJson(_))));
        assert!(matches!(value("JSON {} x"), Err(Error::NotJson(_))));
        assert_eq!(LoadReport::from_value(b"TEXT \xff"), Err(Error::NotText));
        assert_eq!(value("TEXT"), Ok(LoadReport::default()));
    }

    fn reports() -> impl Strategy<Value = LoadReport> {
        // Thousandths, because that is what text keeps.
        let number = || (0u32..10_000_000).prop_map(|n| f64::from(n) / 1000.0);
        let map = move || prop::collection::btree_map("[a-zA-Z_:./][a-zA-Z0-9_:./=]{0,12}", number(), 0..6);
        (prop::array::uniform5(number()), map(), map(), map()).prop_map(|(own, named, utilization, cost)| {
            LoadReport {
                application_utilization: own[0],
                cpu_utilization: own[1],
                mem_utilization: own[2],
                rps_fractional: own[3],
                eps: own[4],
                named_metrics: named,
                utilization,
                request_cost: cost,
            }
        })
    }

    proptest! {
        #[test]
        fn text_and_binary_survive_the_way(report in reports()) {
            let mut text = Vec::new();
            report.write_text(&mut text);
            prop_assert_eq!(LoadReport::from_value(&text), Ok(report.clone()));
            let bin = format!("BIN {}", report.to_bin());
            prop_assert_eq!(LoadReport::from_value(bin.as_bytes()), Ok(report));
        }

        #[test]
        fn garbage_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..300), form in 0usize..5) {
            let prefix: &[u8] = [&b""[..], b"TEXT ", b"JSON ", b"BIN ", b"TEXT eps=1,"][form];
            let _ = LoadReport::from_protobuf(&bytes);
            let bin = base64::engine::general_purpose::STANDARD.encode(&bytes);
            let _ = LoadReport::from_value(format!("BIN {bin}").as_bytes());
            bytes.splice(0..0, prefix.iter().copied());
            if let Ok(report) = LoadReport::from_value(&bytes) {
                prop_assert!(report.metrics().all(|(_, _, value)| value.is_finite() && value >= 0.0));
            }
        }
    }
}
