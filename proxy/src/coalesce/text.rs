//! What language models answer, shared: one execution is read by all who ask the same while it comes in, and kept if it
//! came in whole.
//!
//! Only requests that have one answer take part: the configuration says that all do, or the request fixes its own outcome
//! (temperature 0, or a seed). An answer that is an error is shared only if it would be everybody's; otherwise who asked
//! the same asks for himself.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use penstock_api::SpiffeId;
use penstock_api::v1::Protocol;
use penstock_coalesce::cache::{self, Cache, Control, Terms};
use penstock_coalesce::json::Document;
use penstock_coalesce::key::{self, Hash, Scope};
use penstock_inference::openai;

use super::call::{self, Outgoing, Way};
use super::record::{Head, Pen};
use super::{How, Stored, counts};
use crate::body::{Replay, RequestBody, ResponseBody, Share};
use crate::config::{Coalesce, WorkloadPort};
use crate::connection::Connection;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers;
use crate::models::Model;
use crate::telemetry::trace::Span;
use crate::work::Work;
use crate::worker::Worker;

/// The largest request that is looked at, bytes: more than any context of text.
const MAX_REQUEST: usize = 4 << 20;
/// A whole answer.
#[derive(Debug)]
pub struct Text {
    head: Head,
    parts: Vec<Bytes>,
}

/// Whether a request is for a language model's text.
pub fn is_text<B>(request: &Request<B>) -> bool {
    *request.method() == Method::POST
        && !request.headers().contains_key(header::CONTENT_ENCODING)
        && openai::Api::of_path(request.uri().path()).is_some()
}

/// Answers a request by sharing, if that can be.
pub(super) async fn serve(
    connection: &Connection,
    exchange: &Rc<Exchange>,
    port: &WorkloadPort,
    rules: &Coalesce,
    model: &Arc<Model>,
    work: &Work,
    request: &mut Request<RequestBody>,
) -> Result<Option<Response<ResponseBody>>, Failure> {
    let worker = &exchange.worker;
    let sharing = &worker.shared.sharing;
    let Some((body, held)) = sharing.take_in(exchange, request.body_mut(), MAX_REQUEST).await else {
        return Ok(None);
    };
    let passed = || {
        sharing.tally.passed.add(1);
        Ok(None)
    };
    let Some(document) = Document::read(&body) else { return passed() };
    if !rules.deterministic && !document.is_deterministic() {
        return Ok(None);
    }
    let client = connection.client_id().map_or("", SpiffeId::as_str);
    let scope = Scope {
        client: if rules.shared { "" } else { client },
        model: &work.model,
        version: "",
        load: model.batcher().load(),
        headers: &rules.headers,
    };
    // With the query, which some servers read (an API's version, a key).
    let path = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let key = key::of_document(path, &document, &scope, request.headers());
    let asked = Control::of(request.headers());
    let cache = rules.cache.map(|(bytes, age)| (sharing.cache(bytes, worker.now()), age));
    if let Some((cache, _)) = &cache
        && let Some(Stored::Text(text)) = cache.get(&key, asked, worker.now())
    {
        sharing.tally.hits.add(1);
        counts(exchange, port, work)?;
        exchange.answered(text.head.status);
        exchange.began();
        exchange.flag("hit");
        let body = ResponseBody::Shared(Share::new(text.parts.clone(), None, exchange));
        return Ok(Some(text.head.response(How::Hit, body)));
    }
    if !rules.single_flight && cache.is_none() {
        return Ok(None);
    }
    let joined = match rules.single_flight {
        true => sharing.records.join(key),
        false => sharing.records.apart(key).map(|(reader, pen)| (reader, Some(pen))),
    };
    let Some((reader, pen)) = joined else { return passed() };
    let leads = pen.is_some();
    if let Some(pen) = pen {
        let http2 = matches!(port.protocol, Protocol::Http2 | Protocol::Grpc);
        let way = Way { cluster: Arc::clone(&port.cluster), http2 };
        let outgoing = call::original(request, [body]);
        let keep = cache.map(|(cache, age)| Keep { key, cache, age, rules: rules.clone() });
        let record = Arc::clone(&pen.record);
        let bringing =
            bring_in(pen, Rc::clone(worker), Arc::clone(model), way, outgoing, exchange.span(), keep);
        let task = tokio::task::spawn_local(async move {
            bringing.await;
            // Its body could have been sent anew until now.
            drop(held);
        });
        record.pumped_by(task.abort_handle());
    }
    let head = match reader.head().await {
        Ok(head) if leads || head.is_for_all() => head,
        // The leader's own trouble: this one asks for himself.
        Ok(_) => return Ok(None),
        Err(_) if !leads => return Ok(None),
        Err(failure) => return Err(failure),
    };
    let how = if leads { How::Miss } else { How::Coalesced };
    match how {
        How::Coalesced => sharing.tally.coalesced.add(1),
        How::Miss | How::Hit => sharing.tally.misses.add(1),
    };
    counts(exchange, port, work)?;
    exchange.answered(head.status);
    exchange.flag(if leads { "" } else { "coalesced" });
    exchange.executed_in(head.span.filter(|_| !leads));
    let body = ResponseBody::Replay(Replay::new(reader, Some(exchange)));
    Ok(Some(head.response(how, body)))
}

/// Where and on what terms an answer is kept.
struct Keep {
    key: Hash,
    cache: Arc<Cache<Stored>>,
    age: Duration,
    rules: Coalesce,
}

/// Brings an answer in.
async fn bring_in(
    pen: Pen,
    worker: Rc<Worker>,
    model: Arc<Model>,
    way: Way,
    outgoing: Outgoing,
    span: Option<Span>,
    keep: Option<Keep>,
) {
    let ended = pump(&pen, &worker, &way, &outgoing, span).await;
    if let Err(failure) = &ended {
        model.batcher().failed(failure);
    }
    pen.record.end(ended);
    if let Some(Keep { key, cache, age, rules }) = keep
        && let Some((head, parts)) = pen.record.whole()
        && let Ok(status) = StatusCode::from_u16(head.status)
        && let terms = (Terms { age, shared: rules.shared, headers: &rules.headers })
        && let Some(age) = cache::cacheable(&outgoing.headers, &head.headers, status, terms)
    {
        let bytes: usize = parts.iter().map(Bytes::len).sum();
        let text = Stored::Text(Arc::new(Text { head, parts }));
        cache.put(key, text, bytes as u64, worker.now(), age);
    }
}

async fn pump(
    pen: &Pen,
    worker: &Rc<Worker>,
    way: &Way,
    outgoing: &Outgoing,
    span: Option<Span>,
) -> Result<(), Failure> {
    let endpoint = way.endpoint()?;
    let (response, _lease) = call::send(worker, way, &endpoint, outgoing).await?;
    worker.shared.sharing.tally.execution(1, 1);
    let (mut parts, mut body) = response.into_parts();
    let found = headers::look(&parts.headers);
    headers::strip_ours(&mut parts.headers, found);
    pen.record.head(Head::for_all(parts.status.as_u16(), parts.headers, Arc::clone(&endpoint), span));
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| call::broke_off(&endpoint, &error))?;
        if let Ok(data) = frame.into_data() {
            pen.record.push(data).await;
        }
    }
    Ok(())
}
