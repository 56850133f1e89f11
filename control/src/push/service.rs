//! The driver: moves requests into a [`Stream`] and its responses out.

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics::{counter, gauge, histogram};
use penstock_api::discovery::aggregated_discovery_service_server::AggregatedDiscoveryService;
use penstock_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use penstock_api::resource::Kind;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{Fault, Published, Stream, caller};
use crate::fleet::{Fleet, lock};
use crate::metric;
use crate::snapshot::Snapshot;

/// Responses that wait to be written. One type has at most eight unacknowledged, so a client that fills this has
/// stopped reading.
const QUEUE: usize = 64;
/// A response that has not been acknowledged by then never will be: applying takes milliseconds.
const STALLED: Duration = Duration::from_secs(60);
/// A stream whose first request has not come by then is no proxy's.
const FIRST_REQUEST: Duration = Duration::from_secs(10);

/// Numbers snapshots in the order in which they come. Snapshots that differ in their problems only keep their
/// number: there is nothing to push.
pub fn publish(mut snapshots: watch::Receiver<Arc<Snapshot>>) -> watch::Receiver<Published> {
    let first = snapshots.borrow_and_update().clone();
    let (sender, receiver) = watch::channel(Published { snapshot: first, sequence: 1, at: Instant::now() });
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => return,
                changed = snapshots.changed() => if changed.is_err() {
                    // The last snapshot stays in force for those who subscribe to it.
                    return sender.closed().await;
                },
            }
            let snapshot = snapshots.borrow_and_update().clone();
            sender.send_modify(|published| {
                if published.snapshot.version != snapshot.version {
                    published.sequence += 1;
                    published.at = Instant::now();
                    counter!(metric::SNAPSHOTS.name).increment(1);
                }
                published.snapshot = snapshot;
            });
        }
    });
    receiver
}

/// Serves configuration streams.
#[derive(Clone, Debug)]
pub struct AdsService {
    published: watch::Receiver<Published>,
    fleet: Arc<Fleet>,
    stop: CancellationToken,
}

impl AdsService {
    /// Pushes what `published` holds to proxies, which it records in `fleet`, until `stop`.
    pub fn new(published: watch::Receiver<Published>, fleet: Arc<Fleet>, stop: CancellationToken) -> Self {
        Self { published, fleet, stop }
    }
}

/// How a stream ends: cleanly, or with a status that says why.
type End = Result<(), Status>;
type Responses = Pin<Box<dyn tokio_stream::Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for AdsService {
    type DeltaAggregatedResourcesStream = Responses;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let identity = caller::identity(request.extensions())?;
        let requests = request.into_inner();
        let (queue, responses) = mpsc::channel(QUEUE);
        let (ended, end) = oneshot::channel();
        let service = self.clone();
        tokio::spawn(async move {
            let end = service.serve(identity, requests, queue).await;
            if let Err(status) = &end {
                counter!(metric::STREAMS_CUT.name).increment(1);
                tracing::debug!("a configuration stream was cut: {}", status.message());
            }
            // The client may be gone already.
            drop(ended.send(end));
        });
        Ok(Response::new(outgoing(responses, end)))
    }
}

/// What is queued, until the end; a status does not wait behind a queue that nobody reads.
fn outgoing(responses: mpsc::Receiver<DeltaDiscoveryResponse>, end: oneshot::Receiver<End>) -> Responses {
    Box::pin(futures_util::stream::unfold((responses, Some(end)), |(mut responses, end)| async move {
        let mut end = end?;
        tokio::select! {
            biased;
            ended = &mut end => match ended {
                Ok(Err(status)) => Some((Err(status), (responses, None))),
                _ => None,
            },
            Some(response) = responses.recv() => Some((Ok(response), (responses, Some(end)))),
        }
    }))
}

impl AdsService {
    async fn serve(
        mut self,
        identity: penstock_api::SpiffeId,
        mut requests: Streaming<DeltaDiscoveryRequest>,
        queue: mpsc::Sender<DeltaDiscoveryResponse>,
    ) -> End {
        let first = match tokio::time::timeout(FIRST_REQUEST, requests.message()).await {
            Ok(Ok(Some(first))) => first,
            Ok(_) => return Ok(()),
            Err(_) => return Err(Status::deadline_exceeded("the first request did not come")),
        };
        // The node is guaranteed on the first request only.
        let node = first.node.as_ref().map(|node| node.id.clone()).unwrap_or_default();
        caller::authorize(&node, &identity, &self.published.borrow().snapshot)?;
        let now = Instant::now();
        let stream = Arc::new(Mutex::new(Stream::new(&node, now)));
        let session = self.fleet.configured(&node, &identity, stream.clone(), now);
        gauge!(metric::CONNECTED_PROXIES.name).increment(1.0);
        tracing::info!(%node, %identity, "proxy connected");
        let end = self.pump(first, (&node, &identity), &stream, &mut requests, &queue).await;
        gauge!(metric::CONNECTED_PROXIES.name).decrement(1.0);
        self.fleet.unconfigured(&node, session, Instant::now());
        match &end {
            Ok(()) => tracing::info!(%node, "proxy disconnected"),
            Err(status) => tracing::warn!(%node, "proxy cut off: {}", status.message()),
        }
        end
    }

    async fn pump(
        &mut self,
        first: DeltaDiscoveryRequest,
        (node, identity): (&str, &penstock_api::SpiffeId),
        stream: &Mutex<Stream>,
        requests: &mut Streaming<DeltaDiscoveryRequest>,
        queue: &mpsc::Sender<DeltaDiscoveryResponse>,
    ) -> End {
        let mut check = tokio::time::interval(STALLED / 4);
        let mut request = Some(first);
        let mut looked_at = 0;
        loop {
            // Whatever else has arrived already is taken first: a client that subscribes to all types of a
            // Service is answered in the order of the types, not of its requests.
            while let Some(next) = request {
                note(node, &next);
                lock(stream).request(&next).map_err(refusal)?;
                request = match futures_util::FutureExt::now_or_never(requests.message()) {
                    None => None,
                    Some(Ok(Some(next))) => Some(next),
                    Some(_) => return Ok(()),
                };
            }
            let published = self.published.borrow_and_update().clone();
            if looked_at != published.sequence {
                looked_at = published.sequence;
                // The pod may have come only now, or another of its name.
                caller::runs_as(node, identity, &published.snapshot)?;
            }
            for response in lock(stream).responses(&published, Instant::now()) {
                record(&response, &published);
                if queue.try_send(response).is_err() {
                    return Err(Status::resource_exhausted(format!(
                        "{QUEUE} responses wait unread; connect again when the proxy keeps up"
                    )));
                }
            }
            tokio::select! {
                () = self.stop.cancelled() => return Ok(()),
                () = queue.closed() => return Ok(()),
                message = requests.message() => match message {
                    Ok(Some(next)) => request = Some(next),
                    // An error is the connection's end, however it came.
                    _ => return Ok(()),
                },
                Ok(()) = self.published.changed() => {}
                _ = check.tick() => {
                    let waiting = lock(stream).waiting_since();
                    if waiting.is_some_and(|since| since.elapsed() > STALLED) {
                        return Err(Status::deadline_exceeded(format!(
                            "a response was not acknowledged within {STALLED:?}; connect again"
                        )));
                    }
                }
            }
        }
    }
}

fn refusal(fault: Fault) -> Status {
    match fault {
        Fault::Forbidden(reason) => Status::permission_denied(reason),
        Fault::Malformed(reason) => Status::invalid_argument(reason),
    }
}

/// Counts and logs what an operator wants to know about a request.
fn note(node: &str, request: &DeltaDiscoveryRequest) {
    let kind = Kind::from_type_url(&request.type_url);
    if kind.is_none() && !request.resource_names_subscribe.is_empty() {
        let url: String = request.type_url.chars().take(120).collect();
        tracing::warn!(%node, "a type that does not exist was asked for: {url:?}; is the proxy newer than control?");
        counter!(metric::UNKNOWN_TYPES.name).increment(1);
    }
    if let (Some(kind), Some(refused)) = (kind, &request.error_detail) {
        tracing::warn!(%node, ?kind, "configuration refused: {}", refused.message);
        counter!(metric::NACKS.name, "type" => format!("{kind:?}")).increment(1);
    }
}

fn record(response: &DeltaDiscoveryResponse, published: &Published) {
    let kind =
        Kind::from_type_url(&response.type_url).map_or("unknown".to_owned(), |kind| format!("{kind:?}"));
    counter!(metric::RESPONSES.name, "type" => kind).increment(1);
    histogram!(metric::PUSH.name).record(published.at.elapsed().as_secs_f64());
}
