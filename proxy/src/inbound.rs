//! From the mesh to the application: one connection, and then each request, in the order of the stages.

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Request, Response, Version};
use penstock_api::access::{Came, Entry};
use penstock_api::v1::Direction;
use penstock_api::{Reason, SpiffeId, names};
use rustls::CommonState;
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::accept::{self, Counted};
use crate::access::{self, own};
use crate::admission::{self, Permit, facts};
use crate::answer;
use crate::body::{RequestBody, ResponseBody, Upstream};
use crate::config::Rule;
use crate::config::static_file::Listener;
use crate::connection::{Connection, To, plaintext_refused};
use crate::detect::{self, Detected};
use crate::exchange::Exchange;
use crate::failure::Failure;
use crate::headers;
use crate::models::Model;
use crate::readahead::ReadAhead;
use crate::receive::ClientBody;
use crate::report;
use crate::send::connect::Wire;
use crate::send::{self, Outgoing};
use crate::telemetry::metric;
use crate::work::Work;
use crate::worker::Worker;
use crate::{coalesce, early, identity, oob, probe, rates, serve, tcp, upgrade, work};

const LISTENER: &str = "inbound";

/// Serves one connection to the application.
pub async fn connection(
    worker: Rc<Worker>,
    stream: TcpStream,
    counted: Counted,
    listener: Option<Arc<Listener>>,
) {
    let original = if listener.is_some() { None } else { accept::original_destination(&stream) };
    early::hold(&worker.shared, LISTENER).await;
    let limits = &worker.shared.limits;
    let patience = if may_wait(&worker, original) { limits.detect_time } else { limits.header_time };
    match detect::detect(&stream, patience).await {
        Detected::Tls => secured(worker, stream, counted, listener, original).await,
        spoken => plaintext(worker, stream, counted, listener, original, spoken).await,
    }
}

/// Whether the client may be one without a sidecar that waits for the server to speak first.
fn may_wait(worker: &Worker, original: Option<std::net::SocketAddr>) -> bool {
    let Some(original) = original else { return false };
    own::at(worker, Some(original.port()), Came::Bytes, false).0 == Entry::Bytes
}

/// Authenticates the client, and serves what it speaks.
async fn secured(
    worker: Rc<Worker>,
    stream: TcpStream,
    counted: Counted,
    listener: Option<Arc<Listener>>,
    original: Option<std::net::SocketAddr>,
) {
    let tls = match Box::pin(handshake(&worker, stream, &counted)).await {
        Ok(tls) => tls,
        Err(failure) => {
            if failure.reason == Reason::TooManyConnections {
                let labels = [("listener", LISTENER), ("limit", "handshakes")];
                metrics::counter!(metric::CONNECTIONS_REFUSED.name, &labels).increment(1);
            } else {
                metrics::counter!(metric::HANDSHAKE_FAILURES.name, "listener" => LISTENER).increment(1);
            }
            tracing::info!(listener = LISTENER, %failure, "refused a connection");
            return;
        }
    };
    let session = tls.get_ref().1;
    let client = match identity::verified_peer(session) {
        Ok(peer) => peer.into_id(),
        Err(error) => {
            return tracing::info!(listener = LISTENER, %error, "a handshake without a client's identity");
        }
    };
    let (sidecar, wire) = match session.alpn_protocol() {
        Some(alpn) if alpn == names::ALPN_MESH_TCP => (true, Wire::Bytes),
        Some(alpn) if alpn == names::ALPN_MESH_H2 => (true, Wire::Http2),
        Some(alpn) if alpn == names::ALPN_MESH_H1 => (true, Wire::Http1),
        Some(b"h2") => (false, Wire::Http2),
        _ => (false, Wire::Http1),
    };
    let port = original.map(|address| address.port()).or_else(|| names::port_of_sni(session.server_name()?));
    let came = if wire == Wire::Bytes { Came::Bytes } else { Came::Http };
    let to = match listener {
        Some(listener) => match listener.allows(&client) {
            true => To::Static(listener),
            false => To::Refusal(Failure::unprocessed(
                Reason::NotAuthorized,
                format!("{client} may not use the listener {}", listener.name),
            )),
        },
        None => own::at(&worker, port, came, true).1,
    };
    if came == Came::Bytes || access::entry(&worker, &to, false, came, true) == Entry::Bytes {
        return Box::pin(tcp::inbound(&worker, *tls, &to, Some(&client))).await;
    }
    let header = HeaderValue::try_from(client.as_str());
    let forwarded = forwarded(&worker, &client, tls.get_ref().1);
    let farewell = Some(worker.farewells.add());
    let connection = Rc::new(Connection {
        worker,
        original,
        client: header.ok().map(|header| (client, header)),
        forwarded,
        sidecar,
        to,
        last_host: Default::default(),
        last_told: Default::default(),
        counted: Rc::new(counted),
    });
    serve::http(LISTENER, tls, wire == Wire::Http2, connection, farewell, request).await;
}

async fn handshake(
    worker: &Worker,
    stream: TcpStream,
    counted: &Counted,
) -> Result<Box<TlsStream<ReadAhead>>, Failure> {
    let peer =
        stream.peer_addr().map_or_else(|_| "a client that is gone".to_owned(), |peer| peer.to_string());
    let material = worker.shared.identity.current().ok_or_else(|| {
        Failure::unprocessed(
            Reason::NoConfig,
            format!("{peer} wants mutual TLS, and this proxy has no certificate yet"),
        )
    })?;
    let limit = worker.shared.limits.handshakes_per_peer;
    let Some(_shaking) = counted.shakes(limit) else {
        return Err(Failure::unprocessed(
            Reason::TooManyConnections,
            format!("{peer}: {limit} handshakes with its address are going on already"),
        ));
    };
    let accepting = TlsAcceptor::from(Arc::clone(&material.server)).accept(ReadAhead::new(stream));
    match tokio::time::timeout(worker.shared.limits.handshake_time, accepting).await {
        // Boxed: each future that it goes through is as large as what it holds.
        Ok(Ok(tls)) => Ok(Box::new(tls)),
        Ok(Err(error)) => Err(Failure::unprocessed(
            Reason::WrongIdentity,
            match identity::explain(&error) {
                Some(why) => format!("{peer}: {why}"),
                None => format!("{peer}: the handshake failed: {error}"),
            },
        )),
        Err(_) => Err(Failure::unprocessed(
            Reason::HeaderTimeout,
            format!("{peer} did not finish its handshake within {:?}", worker.shared.limits.handshake_time),
        )),
    }
}

/// `x-forwarded-client-cert`, as Envoy documents it. Whether the application is told is for each request to say.
fn forwarded(worker: &Worker, client: &SpiffeId, session: &CommonState) -> Option<HeaderValue> {
    let [certificate, ..] = session.peer_certificates()? else { return None };
    let ours = worker.shared.identity.current()?;
    let hash = identity::sha256(certificate)?;
    let text = format!("By={};Hash={hash};URI={client}", ours.id);
    HeaderValue::try_from(text).ok()
}

/// Serves a client that speaks no TLS, where that is allowed; elsewhere says so and closes.
async fn plaintext(
    worker: Rc<Worker>,
    stream: TcpStream,
    counted: Counted,
    listener: Option<Arc<Listener>>,
    original: Option<std::net::SocketAddr>,
    spoken: Detected,
) {
    let (http2, came) = match spoken {
        Detected::Http1 => (false, Came::Http),
        Detected::Http2 => (true, Came::Http),
        Detected::Bytes | Detected::Tls | Detected::Nothing => (false, Came::Bytes),
    };
    let port = original.map(|address| address.port());
    let (entry, to) = match listener {
        Some(_) => (Entry::NotSecured, To::Refusal(plaintext_refused(&worker.shared.node))),
        None => own::at(&worker, port, came, false),
    };
    if spoken == Detected::Nothing && entry != Entry::Bytes {
        // Load balancers and kubelets ask so, every few seconds. It is no failure of anybody's.
        return tracing::debug!(listener = LISTENER, "a client came and went without a word");
    }
    if came == Came::Bytes || entry == Entry::Bytes {
        return Box::pin(tcp::inbound(&worker, stream, &to, None)).await;
    }
    let farewell = Some(worker.farewells.add());
    let connection = Rc::new(Connection {
        worker,
        original,
        client: None,
        forwarded: None,
        sidecar: false,
        to,
        last_host: Default::default(),
        last_told: Default::default(),
        counted: Rc::new(counted),
    });
    serve::http(LISTENER, stream, http2, connection, farewell, request).await;
}

/// Serves one request to the application.
pub async fn request(
    connection: Rc<Connection>,
    request: Request<ClientBody>,
) -> Result<Response<ResponseBody>, Infallible> {
    if connection.sidecar
        && let Some(model) = probe::asked(request.headers())
        && access::may_ask_something(&connection)
    {
        return Ok(probe::answer(&connection.worker, model));
    }
    if oob::asked(&connection, &request) {
        return Ok(Box::pin(oob::answer(&connection.worker, request)).await);
    }
    let exchange = Exchange::begin(&connection.worker, Direction::Inbound);
    let grpc = answer::is_grpc(request.headers());
    exchange.speaks_grpc(grpc);
    let mut response = answer::settle(&exchange, stages(&connection, &exchange, request).await, grpc);
    exchange.answers(&response);
    exchange.set_reports(!connection.sidecar || connection.last_told.is_due(Instant::now()));
    report::stamp(&exchange, response.headers_mut());
    if connection.sidecar && exchange.is_let_in() {
        report::list_models(&connection.worker, &connection.last_told, response.headers_mut());
    }
    Ok(response)
}

async fn stages(
    connection: &Connection,
    exchange: &Rc<Exchange>,
    request: Request<ClientBody>,
) -> Result<Response<ResponseBody>, Failure> {
    let worker = &connection.worker;
    let (mut parts, body) = request.into_parts();
    let found = headers::look(&parts.headers);
    headers::check_request(&parts, found)?;
    let authority = connection.authority(&parts)?;
    let client = connection.client_id();
    exchange.keep_request(&mut parts, &authority, client);

    // Which port of ours, or which upstream of a static listener.
    let to = own::now(connection);
    let rule = access::way(&to, &parts)?;
    limit_body(worker, &parts)?;

    // A sidecar says what its application spoke; a stranger's word about it is dropped with all that is ours.
    let spoken = match parts.headers.get(headers::PROTOCOL) {
        Some(version) if connection.sidecar => {
            if version == "HTTP/1.0" {
                Version::HTTP_10
            } else {
                Version::HTTP_11
            }
        }
        _ => parts.version,
    };
    let upgrading = headers::asks_upgrade(&parts.headers, found) || upgrade::is_connect(&parts);
    let client_upgrade = upgrading.then(|| upgrade::client_side(&mut parts));
    headers::strip_hop(&mut parts.headers, found, upgrading);
    headers::strip_ours(&mut parts.headers, found);
    if let Some((_, id)) = &connection.client {
        parts.headers.insert(headers::CLIENT_ID, id.clone());
    }
    if let Some(forwarded) = &connection.forwarded
        && to.workload().is_some_and(|workload| workload.forward_identity)
    {
        parts.headers.insert(headers::FORWARDED, forwarded.clone());
    }
    if found.wants_report {
        exchange.show_reports(&parts.headers);
    }
    let mut request = Request::from_parts(parts, RequestBody::Client(body, Rc::clone(exchange)));

    // Authorize: whether this client may ask that.
    access::authorize(connection, &to, exchange, &authority, &mut request).await?;

    // What is answered without being let in is a probe of the kubelet's, and if it were refused, the application would be restarted.
    if exchange.is_let_in() {
        worker.shared.memory.admit()?;
    }

    // Limit: whether this client, or all together, have asked for too much.
    rates::limit(connection, &to, exchange, &authority, &mut request).await?;

    // What the application is asked for: which model, how much work.
    let work = work::read(&mut request, exchange).await;
    let model = worker.model(&work.model);

    // Admit: now, when its turn has come, or not at all.
    let permit = admit(connection, &to, exchange, rule, &model, &work, request.headers()).await?;
    exchange.asks(Arc::clone(&model), &work, permit);

    // Coalesce: what is in flight, or was answered lately, is not executed again; what can share an execution does.
    if let Some(port) = coalesce::applies(to.port())
        && let Some(answer) =
            Box::pin(coalesce::serve(connection, exchange, port, &model, &work, &mut request)).await?
    {
        return Ok(answer);
    }
    // Rare, and large.
    let watched =
        upgrading.then(|| access::Watched::of(connection, &to, &authority, &request).map(Box::new)).flatten();
    let upgrade = upgrading && spoken != Version::HTTP_2;
    let outgoing = Box::new(Outgoing { request, authority, spoken, upgrade });

    // Forward to the application.
    let backend = &rule.backends[0];
    let answered = send::send(exchange, rule, &backend.cluster.service, backend, &work, outgoing).await?;
    exchange.secured(connection.client.is_some());
    let (mut parts, body) = answered.response.into_parts();
    exchange.answered_with(parts.status.as_u16(), &body);
    if let Some(client) = client_upgrade
        && upgrade::accepted(&parts)
    {
        return Ok(upgrade::join(
            client,
            parts,
            body,
            answered.lease,
            exchange,
            watched.map(|watched| *watched),
            &connection.counted,
        ));
    }
    let found = headers::look(&parts.headers);
    headers::check_answer(&parts.headers, found)?;
    headers::strip_hop(&mut parts.headers, found, false);
    headers::strip_ours(&mut parts.headers, found);
    parts.version = Version::HTTP_11;
    let body =
        Upstream::new(body, Rc::clone(exchange), answered.lease, answered.idle, report::stamp_trailers);
    let body = if answer::is_grpc(&parts.headers) { body.ages() } else { body };
    Ok(Response::from_parts(parts, ResponseBody::Upstream(body)))
}

/// A slot of the application, where their number is limited.
async fn admit(
    connection: &Connection,
    to: &To,
    exchange: &Exchange,
    rule: &Rule,
    model: &Model,
    work: &Work,
    headers: &HeaderMap,
) -> Result<Option<Permit>, Failure> {
    let worker = &connection.worker;
    let rules = worker.shared.store.snapshot().workload.as_ref().and_then(|workload| workload.admission);
    // The kubelet asks whether the application lives, not for its turn.
    let rules = rules.filter(|_| !matches!(to, To::Probes(..)));
    let Some(rules) = rules else { return Ok(None) };
    let gate = worker.shared.models.gate_of(model, rules);
    let identity = connection.client_id().map_or("", SpiffeId::as_str);
    let timeout = facts::timeout(headers, rule.timeouts.request);
    let began = exchange.started().saturating_duration_since(worker.shared.epoch);
    let ask = admission::Ask {
        tenant: facts::tenant(identity, &worker.shared.hasher),
        priority: facts::Priorities::default().of(identity, headers),
        work: admission::Work::units(f64::from(work.units)),
        deadline: timeout.map(|timeout| began + timeout),
    };
    match gate.admit(ask, model.outlook(work.units, worker.now())).await {
        Ok(permit) => Ok(Some(permit)),
        Err(refusal) => {
            let name = if model.name.is_empty() { "the application" } else { &model.name };
            let story = refusal.story(name, &gate.state());
            let retry_after = refusal.retry_after_seconds();
            Err(Failure { retry_after, ..Failure::unprocessed(refusal.reason(), story) })
        }
    }
}

/// Refuses a body that says it is above the limit.
fn limit_body(worker: &Worker, parts: &http::request::Parts) -> Result<(), Failure> {
    let limit = worker.shared.limits.body_bytes;
    let length = parts
        .headers
        .get(http::header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    match length {
        Some(length) if limit > 0 && length > limit => Err(Failure::unprocessed(
            Reason::BodyTooLarge,
            format!("the body has {length} bytes, the limit is {limit} (--max-body)"),
        )),
        _ => Ok(()),
    }
}
