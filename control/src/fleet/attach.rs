//! The fleet stream: a proxy attaches, tells what it sees, and is asked.

use std::sync::Arc;
use std::time::Duration;

use penstock_api::v1::fleet_server::Fleet as FleetRpc;
use penstock_api::v1::{ControlMessage, ProxyMessage, proxy_message};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::Fleet;
use crate::push::{Published, caller};

/// Messages to a proxy that it has not read yet: questions and taps, a handful at a time.
const QUEUE: usize = 64;
/// A stream whose first message has not come by then is no proxy's.
const HELLO: Duration = Duration::from_secs(10);

/// Takes the streams of proxies.
#[derive(Clone, Debug)]
pub struct FleetService {
    fleet: Arc<Fleet>,
    published: watch::Receiver<Published>,
    stop: CancellationToken,
}

impl FleetService {
    /// Keeps what proxies tell in `fleet`, until `stop`; whose pods they are is known from what is `published`.
    pub fn new(fleet: Arc<Fleet>, published: watch::Receiver<Published>, stop: CancellationToken) -> Self {
        Self { fleet, published, stop }
    }
}

#[tonic::async_trait]
impl FleetRpc for FleetService {
    type AttachStream = std::pin::Pin<Box<dyn Stream<Item = Result<ControlMessage, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<ProxyMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let identity = caller::identity(request.extensions())?;
        let mut messages = request.into_inner();
        let (fleet, stop) = (self.fleet.clone(), self.stop.clone());
        let published = self.published.clone();
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (ended, end) = tokio::sync::oneshot::channel();
        tokio::spawn(async move {
            let node = match tokio::time::timeout(HELLO, messages.message()).await {
                Ok(Ok(Some(ProxyMessage { kind: Some(proxy_message::Kind::Hello(hello)) }))) => {
                    match caller::authorize(&hello.node, &identity, &published.borrow().snapshot) {
                        Ok(()) => hello.node,
                        Err(status) => return drop(ended.send(status)),
                    }
                }
                _ => return drop(ended.send(Status::invalid_argument("the first message must be Hello"))),
            };
            let session = fleet.attached(&node, &identity, sender, Instant::now());
            loop {
                let message = tokio::select! {
                    () = stop.cancelled() => break,
                    message = messages.message() => message,
                };
                // An error is the connection's end, however it came.
                let Ok(Some(ProxyMessage { kind })) = message else { break };
                match kind {
                    Some(proxy_message::Kind::Outcomes(outcomes)) => {
                        fleet.outcomes(&node, outcomes, Instant::now())
                    }
                    Some(proxy_message::Kind::Tap(event)) => fleet.tapped(&node, event),
                    Some(proxy_message::Kind::Answer(answer)) => fleet.answered(&node, answer),
                    // Something newer than this control.
                    Some(proxy_message::Kind::Hello(_)) | None => {}
                }
            }
            fleet.detached(&node, session, Instant::now());
        });
        let failed = futures_util::FutureExt::into_stream(end).filter_map(|end| end.ok().map(Err));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver).map(Ok).merge(failed))))
    }
}
