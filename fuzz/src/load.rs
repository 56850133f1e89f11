//! Load reports and metrics pages.

use std::time::Duration;

use bytes::BytesMut;
use http::{HeaderMap, HeaderValue};
use penstock_inference::orca::{self, Format, Load, LoadReport, pb};
use penstock_inference::page::{self, Kind, Rates, Reading, dcgm};
use prost::Message as _;

use crate::{bounded, choice, sentence};

/// A load report, behind a byte for the header that it stands in; also as a serialised message. What is read is written
/// and read again as the same, protobuf is read as its own library reads it, and what goes out merged with our own can
/// be read.
pub fn orca(data: &[u8]) {
    let (form, value) = choice(data);
    match bounded(value, || LoadReport::from_value(value)) {
        Ok(report) => written_and_read(&report),
        Err(error) => sentence(&error),
    }
    let own = bounded(value, || LoadReport::from_protobuf(value));
    if let (Ok(own), Ok(library)) = (own, pb::OrcaLoadReport::decode(value)) {
        agrees(&own, &library);
        written_and_read(&own);
    }
    Load::from_protobuf(value);

    let Ok(value) = HeaderValue::from_bytes(value) else { return };
    let names = [&orca::TEXT_HEADER, &orca::BIN_HEADER, &orca::JSON_HEADER];
    let mut headers = HeaderMap::from_iter([(names[usize::from(form) % 3].clone(), value)]);
    match bounded(headers[names[usize::from(form) % 3]].as_bytes(), || LoadReport::from_headers(&headers)) {
        Ok(report) => written_and_read(&report.unwrap()),
        Err(error) => sentence(&error),
    }
    let ours = Load { in_flight: Some(3.0), application_utilization: Some(0.5), ..Load::default() };
    match [None, Some(Format::Text), Some(Format::Json)].get(usize::from(form) / 3 % 4) {
        Some(asked) => ours.merge(&mut headers, *asked, &mut BytesMut::new()),
        None => ours.merge_trailers(&mut headers, true, &mut BytesMut::new()),
    }
    let merged = LoadReport::from_headers(&headers).unwrap().unwrap();
    assert_eq!((merged.application_utilization, merged.named_metrics["in_flight"]), (0.5, 3.0));
}

fn written_and_read(report: &LoadReport) {
    let message = report.to_protobuf();
    if message.len() <= orca::MAX_BYTES {
        assert_eq!(LoadReport::from_protobuf(&message).as_ref(), Ok(report));
    }
    let mut text = BytesMut::new();
    report.write_text(&mut text);
    if text.len() <= orca::MAX_BYTES {
        LoadReport::from_value(&text).unwrap();
    }
}

/// Of numbers that can be a load. The old integer rate is ours to understand.
fn agrees(own: &LoadReport, library: &pb::OrcaLoadReport) {
    let load = |value: &f64| value.is_finite() && *value >= 0.0;
    let all = |map: &std::collections::BTreeMap<String, f64>| map.values().all(load);
    let scalars = [
        (own.cpu_utilization, library.cpu_utilization),
        (own.mem_utilization, library.mem_utilization),
        (own.eps, library.eps),
        (own.application_utilization, library.application_utilization),
    ];
    for (own, library) in scalars {
        assert!(!load(&library) || own == library, "{own} is {library}");
    }
    for (own, library) in [
        (&own.named_metrics, &library.named_metrics),
        (&own.utilization, &library.utilization),
        (&own.request_cost, &library.request_cost),
    ] {
        let library = library.iter().map(|(name, value)| (name.clone(), *value)).collect();
        assert!(!all(&library) || *own == library, "{own:?} is {library:?}");
    }
}

/// A metrics page. Numbers that are told are numbers, and it does not matter how its lines end.
pub fn metrics_page(data: &[u8]) {
    let (cut, page) = choice(data);
    let before = &page[..page.len() * usize::from(cut) / 255];
    for line in page::lines(page) {
        assert!(!line.name.is_empty());
        line.labels.iter().count();
    }
    page::names(page).count();
    let crlf = (!page.contains(&b'\r')).then(|| {
        let mut text = Vec::with_capacity(page.len() * 2);
        for &byte in page {
            if byte == b'\n' {
                text.push(b'\r');
            }
            text.push(byte);
        }
        text
    });
    for kind in std::iter::once(None).chain(Kind::ALL.map(Some)) {
        let reading = bounded(page, || Reading::read(page, kind));
        if let Some(crlf) = &crlf {
            assert_eq!(Reading::read(crlf, kind), reading, "as {kind:?}, with other ends of lines");
        }
        let Some(now) = reading else { continue };
        assert!(!format!("{now:?}").contains("NaN"), "{now:?}");
        if let Some(before) = Reading::read(before, kind) {
            for elapsed in [Duration::ZERO, Duration::from_nanos(1), Duration::MAX] {
                let rates = Rates::between(&before, &now, elapsed);
                assert!(!format!("{rates:?}").contains("NaN"), "{rates:?}");
            }
        }
    }
    let gpus = bounded(page, || dcgm::read(page));
    assert!(gpus.len() <= dcgm::MAX_GPUS);
    assert!(!format!("{gpus:?}").contains("NaN"), "{gpus:?}");
}
