//! Single flight where requests leave: while a request of the application's is on its way, others that are the same to
//! the byte are not sent but read the same answer as it comes in.
//!
//! In: a request whose backend is chosen, where the Service asks for it (`single-flight,outbound`). Out: its answer, which
//! may be another's; or the request, which goes its own way. What is the same is decided by the bytes alone, ids included:
//! nothing is written anew here. What means the same but is written otherwise meets in front of the server.
//!
//! The request that came first is sent, as any other would be, by a task: its leaving stops nobody else's answer, and when
//! the last has left, the task is stopped and the server learns it. It counts as one request to the endpoint, and those
//! that share its answer as none.

use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use http::{Request, Response};
use http_body_util::BodyExt as _;
use penstock_api::ServiceName;
use penstock_coalesce::json::Document;
use penstock_coalesce::key::{self, Scope};

use super::record::{Head, Pen};
use super::wire::{self, Form};
use super::{How, Wish, text};
use crate::body::{Replay, RequestBody, ResponseBody, Upstream};
use crate::config::{Backend, Coalesce, Rule};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::send::{self, Outgoing};
use crate::work::Work;
use crate::{headers, report};

/// The largest request that is held to be shared, bytes; a larger one would wait longer to be whole than it gains.
const MAX_REQUEST: usize = 4 << 20;

/// Where a request goes.
#[derive(Clone, Copy, Debug)]
pub struct Way<'a> {
    /// The rule that it matched.
    pub rule: &'a Arc<Rule>,
    /// The Service that was asked for.
    pub service: &'a ServiceName,
    /// The version that was chosen; one of the rule's.
    pub backend: &'a Backend,
    /// What it asks for.
    pub work: &'a Work,
}

/// What becomes of a request.
#[derive(Debug)]
pub enum Shared {
    /// It is answered.
    Answer(Box<Response<ResponseBody>>),
    /// It goes its own way.
    Apart(Box<Outgoing>),
}

/// Answers a request by one that is on its way, if that can be; sees to it that others can share this one's answer.
pub async fn serve(
    exchange: &Rc<Exchange>,
    way: Way<'_>,
    rules: &Coalesce,
    mut outgoing: Box<Outgoing>,
) -> Result<Shared, Failure> {
    let sharing = &exchange.worker.shared.sharing;
    let request = &mut outgoing.request;
    let form = Form::of(request.method(), request.uri(), request.headers());
    // A report of the load is for who asked for it.
    let alone = !Wish::of(request.headers()).coalesced || exchange.shows_reports().is_some();
    if alone || (form.is_none() && !text::is_text(request)) {
        return Ok(Shared::Apart(outgoing));
    }
    let Some((body, _held)) = sharing.take_in(exchange, request.body_mut(), MAX_REQUEST).await else {
        return Ok(Shared::Apart(outgoing));
    };
    if !is_repeatable(form, request, &body, rules) {
        return Ok(Shared::Apart(outgoing));
    }
    let Some(backend) = way.rule.backends.iter().position(|backend| std::ptr::eq(backend, way.backend))
    else {
        return Ok(Shared::Apart(outgoing));
    };
    let cluster = &way.backend.cluster;
    let to = format!("{}:{}", cluster.service, cluster.port);
    let scope = Scope { client: "", model: &to, version: "", load: 0, headers: &rules.headers };
    let path = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    let key = key::of_bytes(path, &body, &scope, request.headers());

    let Some((reader, pen)) = sharing.records.join(key) else {
        sharing.tally.passed.add(1);
        return Ok(Shared::Apart(outgoing));
    };
    let Some(pen) = pen else {
        let head = match reader.head().await {
            Ok(head) if head.is_for_all() => head,
            // Nobody could have been served: to ask again at once would be the same.
            Err(failure) if failure.unprocessed => return Err(failure),
            // That was the other's own trouble.
            Ok(_) | Err(_) => return Ok(Shared::Apart(outgoing)),
        };
        sharing.tally.coalesced.add(1);
        exchange.shares(way.rule, way.service, cluster, &head.endpoint);
        exchange.secured(head.endpoint.identity.is_some());
        exchange.answered(head.status);
        exchange.flag("coalesced");
        exchange.executed_in(head.span);
        let body = ResponseBody::Replay(Replay::new(reader, Some(exchange)));
        return Ok(Shared::Answer(Box::new(head.response(How::Coalesced, body))));
    };
    sharing.tally.misses.add(1);
    let record = Arc::clone(&pen.record);
    let sending = Sending {
        exchange: Rc::clone(exchange),
        rule: Arc::clone(way.rule),
        service: way.service.clone(),
        backend,
        work: way.work.clone(),
    };
    let task = tokio::task::spawn_local(sending.run(pen, outgoing));
    record.pumped_by(task.abort_handle());
    let head = reader.head().await?;
    let body = ResponseBody::Replay(Replay::new(reader, None));
    Ok(Shared::Answer(Box::new(head.response(How::Miss, body))))
}

/// Whether an answer to the request is good for another that is the same.
fn is_repeatable(
    form: Option<Form>,
    request: &Request<RequestBody>,
    body: &bytes::Bytes,
    rules: &Coalesce,
) -> bool {
    match form {
        Some(form) => wire::read(form, request.uri().path(), request.headers(), body)
            .is_some_and(|asked| key::is_repeatable(&asked.request)),
        None => {
            Document::read(body).is_some_and(|document| rules.deterministic || document.is_deterministic())
        }
    }
}

/// A request that is sent for all who ask the same; it counts for the one that came first.
struct Sending {
    exchange: Rc<Exchange>,
    rule: Arc<Rule>,
    service: ServiceName,
    /// The place of its backend in the rule.
    backend: usize,
    work: Work,
}

impl Sending {
    async fn run(self, pen: Pen, outgoing: Box<Outgoing>) {
        let ended = self.send(&pen, outgoing).await;
        pen.record.end(ended);
    }

    async fn send(self, pen: &Pen, outgoing: Box<Outgoing>) -> Result<(), Failure> {
        let Self { exchange, rule, service, backend, work } = self;
        let backend = &rule.backends[backend];
        let answered = send::send(&exchange, &rule, &service, backend, &work, outgoing).await?;
        let endpoint = exchange.endpoint();
        let (mut parts, body) = answered.response.into_parts();
        let status = parts.status.as_u16();
        exchange.answered_with(status, &body);
        let found = headers::look(&parts.headers);
        report::take(&exchange, &mut parts.headers, found);
        if let Some(endpoint) = endpoint {
            pen.record.head(Head::for_all(status, parts.headers, endpoint, exchange.span()));
        }
        let upstream = Upstream::new(body, exchange, answered.lease, answered.idle, report::take_trailers);
        let mut body = Box::pin(ResponseBody::Upstream(upstream));
        while let Some(frame) = Pin::new(&mut body).frame().await {
            match frame.map_err(|broken| broken.0)?.into_data() {
                Ok(data) => pen.record.push(data).await,
                Err(frame) => {
                    frame.into_trailers().into_iter().for_each(|trailers| pen.record.trailers(trailers))
                }
            }
        }
        Ok(())
    }
}
