//! What language models answer, shared: one execution is read by all who ask the same while it comes in, and kept if it
//! came in whole.
//!
//! Only requests that have one answer take part: the configuration says that all do, or the request fixes its own outcome
//! (temperature 0, or a seed). An answer that is an error is shared only if it would be everybody's; otherwise who asked
//! the same asks for himself.

use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ahash::AHashMap;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use penstock_api::v1::Protocol;
use penstock_api::{Reason, names};
use penstock_coalesce::cache::{self, Cache, Control, Terms};
use penstock_coalesce::json::Document;
use penstock_coalesce::key::{self, Hash, Scope};
use penstock_inference::{oip, openai};

use super::call::{self, Outgoing, Way};
use super::record::{Head, Reader, Record};
use super::{How, PATIENCE, Sharing, Stored, counts, wire};
use crate::body::{Replay, RequestBody, ResponseBody, Share};
use crate::config::{Coalesce, WorkloadPort};
use crate::connection::Connection;
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::models::Model;
use crate::work::Work;
use crate::worker::Worker;
use crate::{headers, kept};

/// The largest request that is looked at, bytes: more than any context of text.
const MAX_REQUEST: usize = 4 << 20;
/// Answers that come in at once; above, requests pass.
const MAX_RECORDS: usize = 16_384;

/// A whole answer.
#[derive(Debug)]
pub struct Text {
    head: Head,
    parts: Vec<Bytes>,
}

/// Answers that come in, by what was asked.
#[derive(Debug, Default)]
pub struct Records(Mutex<AHashMap<Hash, Arc<Record>>>);

impl Records {
    fn lock(&self) -> MutexGuard<'_, AHashMap<Hash, Arc<Record>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reader of the answer to that, and whether somebody has to see to it that it comes.
    fn join(&self, key: Hash) -> Option<(Reader, Option<Arc<Record>>)> {
        let mut records = self.lock();
        if let Some(reader) = records.get(&key).and_then(Record::reader) {
            return Some((reader, None));
        }
        if records.len() >= MAX_RECORDS {
            return None;
        }
        let record = Arc::new(Record::default());
        records.insert(key, Arc::clone(&record));
        Some((record.reader()?, Some(record)))
    }

    /// An answer is no more to be joined.
    fn leave(&self, key: &Hash, record: &Arc<Record>) {
        let mut records = self.lock();
        if records.get(key).is_some_and(|known| Arc::ptr_eq(known, record)) {
            records.remove(key);
        }
    }
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
    let passed = || {
        sharing.tally.passed.add(1);
        Ok(None)
    };
    let Some(pieces) = kept::whole(request.body_mut(), exchange, MAX_REQUEST, PATIENCE).await else {
        return passed();
    };
    let body = oip::whole(pieces);
    let Some(document) = Document::read(&body) else { return passed() };
    if !rules.deterministic && !document.is_deterministic() {
        return Ok(None);
    }
    let client = connection.client.as_ref().map_or("", |(id, _)| id.as_str());
    let scope = Scope {
        client: if rules.shared { "" } else { client },
        model: &work.model,
        version: "",
        load: model.batcher().load(),
        headers: &rules.headers,
    };
    let path = request.uri().path();
    let key = key::of_document(path, &document, &scope, request.headers());
    let asked = Control::of(request.headers());
    let cache = rules.cache.map(|(bytes, age)| (sharing.cache(bytes), age));
    let hit = cache.as_ref().filter(|_| !asked.no_cache && !asked.no_store);
    if let Some((cache, _)) = hit
        && let Some(Stored::Text(text)) = cache.get(&key, worker.now())
    {
        sharing.tally.hits.add(1);
        counts(exchange, port, work)?;
        exchange.answered(text.head.0);
        exchange.began();
        exchange.flag("hit");
        let body = ResponseBody::Shared(Share::new(text.parts.clone(), None, exchange));
        return Ok(Some(response(&text.head, How::Hit, body)));
    }
    if !rules.single_flight && cache.is_none() {
        return Ok(None);
    }
    let Some((reader, to_pump)) = sharing.records.join(key) else { return passed() };
    let leads = to_pump.is_some();
    if let Some(record) = to_pump {
        let http2 = matches!(port.protocol, Protocol::Http2 | Protocol::Grpc);
        let way = Way { cluster: Arc::clone(&port.cluster), http2 };
        let outgoing = call::original(request, body);
        let keep = cache.map(|(cache, age)| Keep { cache, age, rules: rules.clone() });
        let pump = Pump { sharing: Arc::clone(sharing), key, record: Arc::clone(&record) };
        let task = tokio::task::spawn_local(pump.run(Rc::clone(worker), way, outgoing, keep));
        record.pumped_by(task.abort_handle());
    }
    let head = match reader.head().await {
        Ok(head) if leads || is_for_all(head.0) => head,
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
    exchange.answered(head.0);
    exchange.flag(if leads { "" } else { "coalesced" });
    let body = ResponseBody::Replay(Replay::new(reader, exchange));
    Ok(Some(response(&head, how, body)))
}

fn response(head: &Head, how: How, body: ResponseBody) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(head.0).unwrap_or(StatusCode::BAD_GATEWAY);
    *response.headers_mut() = head.1.clone();
    response.headers_mut().insert(names::header::CACHE, HeaderValue::from_static(how.as_str()));
    response
}

/// Whether an answer is one that all who ask the same would get: not an error of this one execution.
fn is_for_all(status: u16) -> bool {
    status < 400 || wire::is_unavailable(status)
}

/// Whom an answer is for.
enum For {
    /// Who asks, whenever that is.
    Anybody,
    /// It set a cookie.
    One,
}

/// Brings an answer in.
struct Pump {
    sharing: Arc<Sharing>,
    key: Hash,
    record: Arc<Record>,
}

/// Where and on what terms its answer is kept.
struct Keep {
    cache: Arc<Cache<Stored>>,
    age: Duration,
    rules: Coalesce,
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.sharing.records.leave(&self.key, &self.record);
        let failure =
            Failure::new(Reason::UpstreamIncomplete, "the answer was given up, since nobody read it");
        self.record.end(Err(failure));
    }
}

impl Pump {
    async fn run(self, worker: Rc<Worker>, way: Way, outgoing: Outgoing, keep: Option<Keep>) {
        let ended = self.pump(&worker, &way, &outgoing).await;
        let for_anybody = matches!(ended, Ok(For::Anybody));
        self.record.end(ended.map(drop));
        if let Some(Keep { cache, age, rules }) = keep.filter(|_| for_anybody)
            && let Some((head, parts)) = self.record.whole()
            && let Ok(status) = StatusCode::from_u16(head.0)
            && let terms = (Terms { age, shared: rules.shared, headers: &rules.headers })
            && let Some(age) = cache::cacheable(&outgoing.headers, &head.1, status, terms)
        {
            let bytes: usize = parts.iter().map(Bytes::len).sum();
            let text = Stored::Text(Arc::new(Text { head, parts }));
            cache.put(self.key, text, bytes as u64, worker.now() + age);
        }
    }

    async fn pump(&self, worker: &Rc<Worker>, way: &Way, outgoing: &Outgoing) -> Result<For, Failure> {
        let endpoint = way.endpoint()?;
        let (response, _lease) = call::send(worker, way, &endpoint, outgoing).await?;
        worker.shared.sharing.tally.execution(1, 1);
        let (parts, mut body) = response.into_parts();
        let whom = if parts.headers.contains_key(header::SET_COOKIE) { For::One } else { For::Anybody };
        self.record.head(parts.status.as_u16(), for_all(parts.headers));
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| call::broke_off(&endpoint, &error))?;
            if let Ok(data) = frame.into_data() {
                self.record.push(data).await;
            }
        }
        Ok(whom)
    }
}

/// The headers that every reader gets: not those of the hop, nor what was meant for one alone.
fn for_all(mut all: HeaderMap) -> HeaderMap {
    let found = headers::look(&all);
    headers::strip_hop(&mut all, found, false);
    headers::strip_ours(&mut all, found);
    all.remove(header::SET_COOKIE);
    // Each reader's own load report is put there later; the server's own was about another moment.
    all.remove(headers::LOAD_REPORT);
    all.remove(headers::LOAD_REPORT_BIN);
    all
}
