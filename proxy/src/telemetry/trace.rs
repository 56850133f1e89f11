//! Traces: W3C trace context in and out, and a span of the proxy's own for each direction.
//!
//! A caller that sends a valid `traceparent` has decided whether its trace is sampled; that is followed. Without one
//! a new trace begins, sampled by chance. `tracestate` belongs to the caller's trace: it passes untouched with a
//! valid `traceparent`, and is removed with an invalid one, as the standard asks.
//!
//! What is executed for several requests is a span of its own ([`Execution`]), since it belongs to several traces: a child
//! of the first request that is recorded, with links to all that are. Each of them links back to it.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor,
};
use penstock_api::v1::Direction;
use rand::Rng;

use super::{Details, End, Labels, Options, TelemetryError, direction_word, log};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// `00-<32 hex>-<16 hex>-<2 hex>`.
const LENGTH: usize = 55;

/// A caller's span, from its `traceparent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parent {
    /// The trace.
    pub trace: u128,
    /// The caller's span.
    pub span: u64,
    /// Whether the caller records it.
    pub sampled: bool,
}

impl Parent {
    /// Reads a `traceparent` of any version that the standard knows how to read; `None`: it is to be ignored.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let head = value.get(..LENGTH)?;
        let version = hex(&head[..2])?;
        // Later versions may be longer, after another hyphen; version ff is forbidden.
        let length_fits = match version {
            0 => value.len() == LENGTH,
            255 => false,
            _ => value.len() == LENGTH || value[LENGTH] == b'-',
        };
        if !length_fits || [2, 35, 52].iter().any(|&at| head[at] != b'-') {
            return None;
        }
        let parent = Self {
            trace: hex(&head[3..35])?,
            span: u64::try_from(hex(&head[36..52])?).ok()?,
            sampled: hex(&head[53..])? & 1 == 1,
        };
        (parent.trace != 0 && parent.span != 0).then_some(parent)
    }

    /// The one valid `traceparent` among the headers. Several are as good as none: nobody knows which is right.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(TRACEPARENT).iter();
        let first = values.next()?;
        if values.next().is_some() { None } else { Self::parse(first.as_bytes()) }
    }
}

/// Lower-case hexadecimal digits, at most 32 of them, as a number.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |number, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u128::from(digit))
    })
}

/// Our span of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The trace.
    pub trace: u128,
    /// This span.
    pub id: u64,
    /// The caller's span; 0: the trace begins here.
    pub parent: u64,
    /// Whether it is recorded, here and further on.
    pub sampled: bool,
}

impl Span {
    /// A child of what the headers say, else the beginning of a trace that is sampled with the chance `sample`.
    pub fn start(headers: &HeaderMap, sample: f64, rng: &mut impl Rng) -> Self {
        let id = rng.random_range(1..=u64::MAX);
        match Parent::of(headers) {
            Some(Parent { trace, span, sampled }) => Self { trace, id, parent: span, sampled },
            None => Self {
                trace: rng.random_range(1..=u128::MAX),
                id,
                parent: 0,
                sampled: rng.random_bool(sample.clamp(0.0, 1.0)),
            },
        }
    }

    /// Makes this span the parent of what the headers go to.
    pub fn apply(&self, headers: &mut HeaderMap) {
        if self.parent == 0 {
            headers.remove(TRACESTATE);
        }
        // Digits and hyphens are always a header value.
        if let Ok(value) = HeaderValue::from_bytes(&self.traceparent()) {
            headers.insert(TRACEPARENT, value);
        }
    }

    /// A child of this span, in the same trace.
    pub fn child(&self, rng: &mut impl Rng) -> Self {
        Self { id: rng.random_range(1..=u64::MAX), parent: self.id, ..*self }
    }

    fn context(&self) -> SpanContext {
        SpanContext::new(
            TraceId::from_bytes(self.trace.to_be_bytes()),
            SpanId::from_bytes(self.id.to_be_bytes()),
            if self.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() },
            false,
            TraceState::default(),
        )
    }

    /// `00-<trace>-<span>-<flags>`.
    pub fn traceparent(&self) -> [u8; LENGTH] {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        write_hex(&mut text[3..35], self.trace);
        write_hex(&mut text[36..52], u128::from(self.id));
        text[54] = if self.sampled { b'1' } else { b'0' };
        text
    }
}

fn write_hex(digits: &mut [u8], mut number: u128) {
    for digit in digits.iter_mut().rev() {
        *digit = b"0123456789abcdef"[(number & 15) as usize];
        number >>= 4;
    }
}

/// Links of a span at most (OpenTelemetry, "Span Limits").
const MAX_LINKS: usize = 128;

fn links(spans: &[Span]) -> SpanLinks {
    let mut links = SpanLinks::default();
    links.links.extend(spans.iter().take(MAX_LINKS).map(|span| Link::with_context(span.context())));
    links.dropped_count = u32::try_from(spans.len().saturating_sub(MAX_LINKS)).unwrap_or(u32::MAX);
    links
}

/// What a model executed for one or several requests.
#[derive(Clone, Copy, Debug)]
pub struct Execution<'a> {
    /// Its span.
    pub span: Span,
    /// The spans of the requests that it answered, as far as they are recorded.
    pub of: &'a [Span],
    /// The model.
    pub model: &'a str,
    /// Its number, as `penstock-batch` says it.
    pub id: u64,
    /// Its rows.
    pub rows: u32,
    /// The requests that it answered, recorded or not.
    pub members: u32,
    /// How long it took, until now.
    pub took: Duration,
    /// Whether it failed.
    pub failed: bool,
}

/// Sends spans to a collector in batches, from a thread of its own. Spans that find its queue full are dropped.
#[derive(Debug)]
pub struct Exporter {
    /// The share of requests that begin a sampled trace.
    pub sample: f64,
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
}

impl Exporter {
    /// Prepares the connection to the collector; it is made when the first spans go.
    pub fn new(url: &str, options: &Options) -> Result<Self, TelemetryError> {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(url)
            .with_timeout(Duration::from_secs(5))
            .build()
            .map_err(|error| TelemetryError::Otlp { endpoint: url.to_owned(), error: error.to_string() })?;
        let config = BatchConfigBuilder::default().with_scheduled_delay(Duration::from_secs(1)).build();
        let mut processor = BatchSpanProcessor::new(exporter, config);
        let resource = Resource::builder_empty()
            .with_service_name(options.service.clone())
            .with_attribute(KeyValue::new("service.instance.id", options.node.clone()))
            .build();
        processor.set_resource(&resource);
        let scope =
            InstrumentationScope::builder("penstock-proxy").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self { sample: options.trace_sample, processor, scope })
    }

    /// Queues the span of a request that is over.
    pub fn export(&self, span: &Span, labels: &Labels, end: &End, details: &Details) {
        self.processor.on_end(span_data(span, labels, end, details, self.scope.clone()));
    }

    /// Queues the span of an execution that is over.
    pub fn executed(&self, execution: &Execution<'_>) {
        let Execution { span, of, model, id, rows, members, took, failed } = *execution;
        let end_time = SystemTime::now();
        self.processor.on_end(SpanData {
            span_context: span.context(),
            parent_span_id: SpanId::from_bytes(span.parent.to_be_bytes()),
            parent_span_is_remote: false,
            span_kind: SpanKind::Client,
            name: Cow::Owned(format!("execute {model}")),
            start_time: end_time.checked_sub(took).unwrap_or(end_time),
            end_time,
            attributes: vec![
                KeyValue::new("gen_ai.request.model", model.to_owned()),
                KeyValue::new("penstock.batch.id", i64::try_from(id).unwrap_or(i64::MAX)),
                KeyValue::new("penstock.batch.rows", i64::from(rows)),
                KeyValue::new("penstock.batch.requests", i64::from(members)),
            ],
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: links(of),
            status: if failed { Status::error("") } else { Status::Unset },
            instrumentation_scope: self.scope.clone(),
        });
    }

    /// Sends what waits, and stops.
    pub fn shutdown(&self, limit: Duration) {
        if let Err(error) = self.processor.shutdown_with_timeout(limit) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

/// The span as OpenTelemetry has it, with the attribute names of its HTTP conventions.
fn span_data(
    span: &Span,
    labels: &Labels,
    end: &End,
    details: &Details,
    instrumentation_scope: InstrumentationScope,
) -> SpanData {
    let method = details.method.as_ref().map_or("TCP", |method| method.as_str());
    let mut attributes = vec![
        KeyValue::new("penstock.direction", direction_word(labels.direction)),
        KeyValue::new("penstock.service", labels.service.to_string()),
        KeyValue::new("penstock.backend", labels.backend.to_string()),
        KeyValue::new("http.route", labels.route.to_string()),
        KeyValue::new("penstock.endpoint", labels.endpoint.to_string()),
        KeyValue::new("penstock.mtls", end.mtls),
        KeyValue::new("penstock.tries", i64::from(end.tries)),
        KeyValue::new("http.request.method", method.to_owned()),
        KeyValue::new("http.response.status_code", i64::from(end.status)),
        KeyValue::new("network.protocol.name", log::protocol_word(details.version)),
    ];
    let mut add = |name: &'static str, value: Option<String>| {
        attributes.extend(value.map(|value| KeyValue::new(name, value)));
    };
    add("server.address", details.authority.as_ref().map(|authority| authority.host().to_owned()));
    add("url.path", details.path.as_ref().map(|path| path.path().to_owned()));
    add("penstock.client", details.client.as_ref().map(ToString::to_string));
    add("penstock.server", details.server.as_ref().map(ToString::to_string));
    add("error.type", end.reason.map(|reason| reason.to_string()));
    SpanData {
        span_context: span.context(),
        parent_span_id: SpanId::from_bytes(span.parent.to_be_bytes()),
        parent_span_is_remote: true,
        span_kind: match labels.direction {
            Direction::Outbound => SpanKind::Client,
            Direction::Inbound => SpanKind::Server,
        },
        name: Cow::Owned(format!("{method} {}", labels.route)),
        start_time: details.at,
        end_time: details.at + end.total,
        attributes,
        dropped_attributes_count: 0,
        events: SpanEvents::default(),
        links: links(details.executed.as_slice()),
        status: match end.reason {
            Some(reason) if end.failed => Status::error(reason.meaning()),
            None if end.failed => Status::error(""),
            _ => Status::Unset,
        },
        instrumentation_scope,
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::SmallRng;

    use super::*;

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_is_read_as_the_standard_says() {
        let (trace, span) = (0x0af7651916cd43dd8448eb211c80319c, 0xb7ad6b7169203331);
        let sampled = Some(Parent { trace, span, sampled: true });
        let unsampled = Some(Parent { trace, span, sampled: false });
        let table = [
            (VALID, sampled),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00", unsampled),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-02", unsampled),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-ff", sampled),
            // Later versions.
            ("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", sampled),
            ("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-the-future", sampled),
            ("cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01what", None),
            // Not the standard's.
            ("ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", None),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", None),
            ("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", None),
            ("00-00000000000000000000000000000000-b7ad6b7169203331-01", None),
            ("00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01", None),
            ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331", None),
            ("00_0af7651916cd43dd8448eb211c80319c_b7ad6b7169203331_01", None),
            ("00-0af7651916cd43dd8448eb211c80319g-b7ad6b7169203331-01", None),
            ("", None),
        ];
        for (text, expected) in table {
            assert_eq!(Parent::parse(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn a_child_keeps_trace_decision_and_state() {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, HeaderValue::from_static(VALID));
        headers.insert(TRACESTATE, HeaderValue::from_static("vendor=1"));
        let mut rng = SmallRng::seed_from_u64(1);
        let span = Span::start(&headers, 0.0, &mut rng);
        assert_eq!((span.parent, span.sampled), (0xb7ad6b7169203331, true), "the caller has decided");
        span.apply(&mut headers);
        let sent = Parent::parse(headers[TRACEPARENT].as_bytes()).unwrap();
        assert_eq!(sent, Parent { trace: span.trace, span: span.id, sampled: true });
        assert_eq!(headers[TRACESTATE], "vendor=1");
    }

    #[test]
    fn an_invalid_or_doubled_parent_begins_a_new_trace_without_its_state() {
        let mut rng = SmallRng::seed_from_u64(2);
        for values in [vec![], vec!["00-nonsense"], vec![VALID, VALID]] {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(TRACEPARENT, HeaderValue::from_static(value));
            }
            headers.insert(TRACESTATE, HeaderValue::from_static("vendor=1"));
            let span = Span::start(&headers, 1.0, &mut rng);
            assert_eq!((span.parent, span.sampled), (0, true));
            span.apply(&mut headers);
            assert_eq!(headers.get_all(TRACEPARENT).iter().count(), 1);
            assert!(!headers.contains_key(TRACESTATE));
        }
    }

    #[test]
    fn chance_samples_the_share_that_was_asked_for() {
        let mut rng = SmallRng::seed_from_u64(3);
        let sampled = (0..100_000).filter(|_| Span::start(&HeaderMap::new(), 0.01, &mut rng).sampled).count();
        assert!((800..1200).contains(&sampled), "{sampled} of 100000 for 1 %");
    }
}
