//! Configuration, pushed by control over the delta xDS transport.
//!
//! In: where control is, who we are, what the data path demands. Out: changes to a [`Sink`], one response at a time,
//! each acknowledged after it is in force. The protocol is the pure [`state`]; this file keeps a stream open for it.
//! When control is gone, what was pushed stays in force, and control is dialled again with backoff and jitter.

pub mod state;

use std::sync::Arc;
use std::time::Duration;

use penstock_api::discovery::DeltaDiscoveryRequest;
use penstock_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use penstock_api::resource::{Kind, Payload};
use rustls_pki_types::CertificateDer;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::Status;
use tonic::transport::Channel;

use crate::backoff::Backoff;
use crate::config::store::{Change, Demand, Refusal, Store};
use crate::identity::Identity;
use crate::identity::control::{Control, ControlError};
use crate::telemetry::metric;
use state::{Received, State};

/// The largest message either way. Control cuts its responses at 2 MiB; one resource alone may be larger: the
/// endpoints of a Service with ten thousand pods have about as much.
const MAX_MESSAGE: usize = 32 << 20;
/// How long control may take to answer when a stream is opened.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Demands that are taken at once into one request a kind.
const DEMANDS: usize = 1024;
/// A stream that control closes cleanly after this time has come to its age, and is opened again at once.
const GROWN_UP: Duration = Duration::from_secs(1);

/// Takes configuration into force.
pub trait Sink: Send + Sync + 'static {
    /// Applies one response. When it returns, what was not refused is in force.
    fn apply(&self, changes: Vec<Change>) -> Vec<Refusal>;

    /// The first configuration is in force.
    fn set_ready(&self) {}

    /// A stream is open, or no longer.
    fn set_connected(&self, _connected: bool) {}
}

impl Sink for Store {
    fn apply(&self, changes: Vec<Change>) -> Vec<Refusal> {
        Store::apply(self, changes)
    }

    fn set_ready(&self) {
        Store::set_ready(self);
    }

    fn set_connected(&self, connected: bool) {
        Store::set_connected(self, connected);
    }
}

impl<S: Sink> Sink for Arc<S> {
    fn apply(&self, changes: Vec<Change>) -> Vec<Refusal> {
        (**self).apply(changes)
    }

    fn set_ready(&self) {
        (**self).set_ready();
    }

    fn set_connected(&self, connected: bool) {
        (**self).set_connected(connected);
    }
}

/// Who asks, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where control is.
    pub control: Control,
    /// `<namespace>/<pod>`.
    pub node: String,
    /// `<namespace>/<service-account>`.
    pub account: String,
}

/// One proxy's configuration stream.
#[derive(Debug)]
pub struct Client {
    config: Config,
    identity: Arc<Identity>,
    state: State,
    ready: watch::Sender<bool>,
    way: watch::Sender<Option<Channel>>,
}

/// How a stream ended.
#[derive(Debug)]
enum End {
    /// There was none, or it ended before it had shown that it works.
    NeverBegan(String),
    /// Control closed it in order, after that time.
    Closed(Duration),
    /// It broke after it had worked.
    Broke(String),
    /// Nobody demands anything any more: the proxy stops.
    Stopped,
}

impl Client {
    /// A client that proves itself with `identity`. Pushed anchors go into it.
    pub fn new(config: Config, identity: Arc<Identity>) -> Self {
        let state = State::new(&config.node, &config.account, &config.control.trust_domain);
        Self { config, identity, state, ready: watch::Sender::new(false), way: watch::Sender::new(None) }
    }

    /// The connection that has the configuration stream, while there is one. Who else has to speak to control takes the same, and so
    /// meets the same replica: one that knew a proxy by one of its streams alone would say half of it.
    pub fn way(&self) -> watch::Receiver<Option<Channel>> {
        self.way.subscribe()
    }

    /// Turns true when there is a certificate, and anchors and workload are in force.
    pub fn ready(&self) -> watch::Receiver<bool> {
        self.ready.subscribe()
    }

    /// Keeps `sink` configured until `demands` is closed.
    pub async fn run(mut self, sink: impl Sink, mut demands: mpsc::Receiver<Demand>) {
        let mut certificates = self.identity.changed();
        while self.identity.current().is_none() {
            if certificates.changed().await.is_err() {
                return;
            }
        }
        let mut backoff = Backoff::default();
        loop {
            let end = self.stream(&sink, &mut demands).await;
            self.way.send_replace(None);
            metrics::gauge!(metric::CONTROL_CONNECTED.name, "stream" => "xds").set(0.0);
            sink.set_connected(false);
            let wait = pause(&end, &mut backoff, rand::random());
            match &end {
                End::Stopped => return,
                End::Closed(after) => {
                    tracing::info!(?after, again_in = ?wait, "control closed the configuration stream in good order");
                }
                End::NeverBegan(why) | End::Broke(why) => {
                    tracing::warn!(error = %why, again_in = ?wait, "no configuration stream; the last one stays in force");
                }
            }
            if !self.demands_during(wait, &mut demands).await {
                return;
            }
        }
    }

    /// Takes demands in while there is no stream. False: nobody demands any more.
    async fn demands_during(&mut self, wait: Duration, demands: &mut mpsc::Receiver<Demand>) -> bool {
        let until = Instant::now() + wait;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return true,
                demand = demands.recv() => match demand {
                    Some(demand) => drop(self.state.demand([demand])),
                    None => return false,
                },
            }
        }
    }

    /// One stream, from dialling to its end.
    async fn stream(&mut self, sink: &impl Sink, demands: &mut mpsc::Receiver<Demand>) -> End {
        let connects = |result| {
            metrics::counter!(metric::CONTROL_CONNECTS.name, "stream" => "xds", "result" => result)
                .increment(1);
        };
        // Small messages, one for each of control's, which waits for them: they need no bound of their own.
        let (requests, outgoing) = mpsc::unbounded_channel();
        let mut responses = match self.open(outgoing, &requests).await {
            Ok(responses) => responses,
            Err(why) => {
                connects("failed");
                return End::NeverBegan(why);
            }
        };
        connects("ok");
        metrics::gauge!(metric::CONTROL_CONNECTED.name, "stream" => "xds").set(1.0);
        sink.set_connected(true);
        tracing::info!(control = %self.config.control.address, "configuration stream open");
        let begun = Instant::now();
        // A control that has nothing new for a proxy that holds all it wants says nothing, and rightly so.
        let complete = self.state.ready();
        let mut spoken = false;
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                response = responses.message() => match response {
                    Ok(Some(response)) => {
                        spoken = true;
                        let answer = match self.state.receive(response) {
                            Received::Refuse(refusal) => refusal,
                            Received::Apply(incoming, changes) => {
                                let refusals = self.apply(sink, changes);
                                self.state.applied(incoming, refusals)
                            }
                        };
                        self.note(sink, &answer);
                        // A stream that is over shows in the next response.
                        let _ = requests.send(answer);
                    }
                    Ok(None) => return ended(None, spoken, complete, begun.elapsed()),
                    Err(status) => return ended(Some(story(&status)), spoken, complete, begun.elapsed()),
                },
                count = demands.recv_many(&mut batch, DEMANDS) => {
                    if count == 0 {
                        return End::Stopped;
                    }
                    for request in self.state.demand(batch.drain(..)) {
                        let _ = requests.send(request);
                    }
                }
            }
        }
    }

    async fn open(
        &mut self,
        outgoing: mpsc::UnboundedReceiver<DeltaDiscoveryRequest>,
        requests: &mpsc::UnboundedSender<DeltaDiscoveryRequest>,
    ) -> Result<tonic::Streaming<penstock_api::discovery::DeltaDiscoveryResponse>, String> {
        let channel = self
            .config
            .control
            .connect(&self.identity)
            .await
            .map_err(|error: ControlError| error.to_string())?;
        for request in self.state.connect() {
            let _ = requests.send(request);
        }
        let mut client = AggregatedDiscoveryServiceClient::new(channel.clone())
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        let open = client.delta_aggregated_resources(UnboundedReceiverStream::new(outgoing));
        let stream = timeout(OPEN_TIMEOUT, open)
            .await
            .map_err(|_| format!("control did not answer in {OPEN_TIMEOUT:?}"))?
            .map_err(|status| story(&status))?;
        self.way.send_replace(Some(channel));
        Ok(stream.into_inner())
    }

    /// Anchors go to the identity, everything else to the sink. One response is of one kind.
    fn apply(&self, sink: &impl Sink, mut changes: Vec<Change>) -> Vec<Refusal> {
        let mut refusals = Vec::new();
        changes.retain(|change| match (&change.payload, change.kind) {
            (Some(Payload::TrustBundle(bundle)), _) => {
                let anchors = bundle.anchors.iter().map(|der| CertificateDer::from(der.clone())).collect();
                if let Err(error) = self.identity.set_anchors(anchors) {
                    let (kind, name) = (change.kind, change.name.clone());
                    refusals.push(Refusal { kind, name, reason: error.to_string() });
                }
                false
            }
            (None, Kind::TrustBundle) => {
                // Without anchors nobody could be trusted; the ones that are known stay, and control hears of it.
                let reason = "the trust anchors cannot be removed; the last ones stay in force".to_owned();
                refusals.push(Refusal { kind: change.kind, name: change.name.clone(), reason });
                false
            }
            _ => true,
        });
        if !changes.is_empty() {
            refusals.extend(sink.apply(changes));
        }
        refusals
    }

    /// Counts an answer, and finds out whether the proxy is ready by it.
    fn note(&self, sink: &impl Sink, answer: &DeltaDiscoveryRequest) {
        let kind = Kind::from_type_url(&answer.type_url).map_or("unknown", word);
        let verdict = if answer.error_detail.is_none() { "ack" } else { "nack" };
        metrics::counter!(metric::RESPONSES.name, "kind" => kind, "answer" => verdict).increment(1);
        for (kind, held) in self.state.held() {
            metrics::gauge!(metric::RESOURCES.name, "kind" => word(kind)).set(held as f64);
        }
        if let Some(status) = &answer.error_detail {
            tracing::warn!(
                kind,
                reason = status.message,
                "refused configuration; the last good one stays in force"
            );
        }
        if self.state.ready() && !self.ready.send_replace(true) {
            tracing::info!("ready: anchors, workload and access policies are in force");
            sink.set_ready();
        }
    }
}

/// How a stream ended that had been opened: whether control had `spoken`, whether there was nothing to say since the
/// proxy was `complete` when it connected, after how long, and with what error.
fn ended(error: Option<String>, spoken: bool, complete: bool, after: Duration) -> End {
    let worked = spoken || complete && after >= GROWN_UP;
    match (error, worked) {
        (None, true) => End::Closed(after),
        (Some(why), true) => End::Broke(why),
        (None, false) => End::NeverBegan("control closed the stream before it said anything".into()),
        (Some(why), false) => End::NeverBegan(why),
    }
}

/// How long to wait before the next stream.
fn pause(end: &End, backoff: &mut Backoff, random: f64) -> Duration {
    match end {
        End::NeverBegan(_) | End::Stopped => backoff.next(random),
        End::Closed(after) if *after >= GROWN_UP => {
            backoff.reset();
            Duration::ZERO
        }
        // It worked, so no long wait; but everybody lost it at the same moment, so not at once.
        End::Closed(_) | End::Broke(_) => {
            backoff.reset();
            backoff.next(random)
        }
    }
}

fn story(status: &Status) -> String {
    match status.message() {
        "" => status.code().to_string(),
        message => format!("{}: {message}", status.code()),
    }
}

/// A kind as a metric's label.
const fn word(kind: Kind) -> &'static str {
    match kind {
        Kind::TrustBundle => "trust-bundle",
        Kind::Access => "access",
        Kind::Workload => "workload",
        Kind::Address => "address",
        Kind::Service => "service",
        Kind::Endpoints => "endpoints",
        Kind::Routes => "routes",
        Kind::Weights => "weights",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_that_has_nothing_new_to_say_and_leaves_is_no_failure() {
        let (long, short) = (Duration::from_secs(60), Duration::from_millis(5));
        let broke = || Some("reset".to_owned());
        assert!(matches!(ended(None, true, false, short), End::Closed(_)));
        assert!(matches!(ended(None, false, true, long), End::Closed(_)), "a reconnect without news");
        assert!(matches!(ended(broke(), false, true, long), End::Broke(_)));
        // Without a word and at once: something there cannot serve us, and waits have to grow.
        assert!(matches!(ended(None, false, true, short), End::NeverBegan(_)));
        assert!(
            matches!(ended(None, false, false, long), End::NeverBegan(_)),
            "we wait for our first configuration"
        );
        assert!(matches!(ended(broke(), false, false, long), End::NeverBegan(_)));
    }

    #[test]
    fn a_stream_of_age_is_opened_again_at_once_and_failures_wait_longer_each_time() {
        let mut backoff = Backoff::default();
        let mut wait = |end: End| pause(&end, &mut backoff, 1.0).as_millis();
        assert_eq!(wait(End::NeverBegan(String::new())), 100);
        assert_eq!(wait(End::NeverBegan(String::new())), 200);
        assert_eq!(wait(End::NeverBegan(String::new())), 400);
        assert_eq!(wait(End::Closed(Duration::from_secs(1800))), 0);
        assert_eq!(wait(End::NeverBegan(String::new())), 100, "it had worked");
        assert_eq!(wait(End::Broke(String::new())), 100);
        assert_eq!(wait(End::Closed(Duration::from_millis(5))), 100, "closed as soon as it began: no rush");
    }
}
