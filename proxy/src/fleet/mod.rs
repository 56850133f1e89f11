//! What the proxy tells control while it lives: outcomes each second (sooner when
//! requests fail), tapped requests, answers to questions.
//!
//! In: the connection to control that has the configuration stream, the pages, the telemetry. Out: one more stream on it, so that no
//! port of the pod is opened for it and one replica of control knows all of this proxy; opened again with backoff and jitter when
//! it ends, and with the connection that takes the other's place. While there is none, outcomes add up and taps are closed; the
//! data path notices nothing.

use std::sync::Arc;
use std::time::Duration;

use ahash::AHashMap;
use penstock_api::ServiceName;
use penstock_api::latency::Histogram;
use penstock_api::v1::fleet_client::FleetClient;
use penstock_api::v1::{
    Answer, Ask, Bucket, ControlMessage, Direction, Hello, Outcome, Outcomes, ProxyMessage, Shadow, TapEvent,
    TapStart, ask, control_message, proxy_message,
};
use serde::Serialize;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use crate::admin::Pages;
use crate::backoff::Backoff;
use crate::telemetry::ledger::Row;
use crate::telemetry::metric;
use crate::telemetry::shadow::{Count, Counts, Parties};
use crate::telemetry::tap::Tap;

/// How often outcomes are told.
const INTERVAL: Duration = Duration::from_secs(1);
/// The same once a request has failed: a canary that fails must not get a second's requests more for it.
const HURRY: Duration = Duration::from_millis(250);
/// Messages on their way out. When control reads too slowly, outcomes wait in their cells and add up.
const OUTGOING: usize = 64;
/// Tapped requests on their way out; more are dropped and counted.
const TAPPED: usize = 256;
/// How long control may take to answer when a stream is opened.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a renewal that control asked for may take before it is told so.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last outcomes get when the proxy stops.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// As large as a proxy's whole configuration may get in JSON.
const MAX_MESSAGE: usize = 32 << 20;

/// Keeps the proxy `node` (`<namespace>/<pod>`) attached to control until `stop`; then tells the last outcomes.
pub async fn keep_attached(
    mut way: watch::Receiver<Option<Channel>>,
    node: String,
    pages: Arc<Pages>,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::default();
    let mut told = Instant::now();
    while !stop.is_cancelled() {
        let channel = tokio::select! {
            there = way.wait_for(Option::is_some) => there.ok().and_then(|there| there.clone()),
            () = stop.cancelled() => return,
        };
        // Nobody dials any more.
        let Some(channel) = channel else { return };
        let result = match open(channel, &node).await {
            Ok((outgoing, incoming)) => {
                backoff.reset();
                connects("ok");
                metrics::gauge!(metric::CONTROL_CONNECTED.name, "stream" => "fleet").set(1.0);
                tracing::debug!("fleet stream open");
                let mut attached = Attached { pages: &pages, outgoing, told: &mut told, was_empty: false };
                attached.run(incoming, &mut way, &stop).await
            }
            Err(why) => {
                connects("failed");
                Err(why)
            }
        };
        metrics::gauge!(metric::CONTROL_CONNECTED.name, "stream" => "fleet").set(0.0);
        pages.telemetry.close_tap(None);
        if stop.is_cancelled() {
            return;
        }
        let wait = backoff.next(rand::random());
        match result {
            Ok(()) => tracing::debug!(again_in = ?wait, "control closed the fleet stream"),
            Err(error) => {
                tracing::warn!(error, again_in = ?wait, "no fleet stream; outcomes add up until there is one")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => {}
        }
    }
}

fn connects(result: &'static str) {
    metrics::counter!(metric::CONTROL_CONNECTS.name, "stream" => "fleet", "result" => result).increment(1);
}

type Opened = (mpsc::Sender<ProxyMessage>, Streaming<ControlMessage>);

async fn open(channel: Channel, node: &str) -> Result<Opened, String> {
    let (outgoing, messages) = mpsc::channel(OUTGOING);
    let hello = Hello { node: node.to_owned(), version: env!("CARGO_PKG_VERSION").to_owned() };
    // The queue is new and has room.
    let _ = outgoing.try_send(message(proxy_message::Kind::Hello(hello)));
    let mut client = FleetClient::new(channel).max_encoding_message_size(MAX_MESSAGE);
    let opened = timeout(OPEN_TIMEOUT, client.attach(ReceiverStream::new(messages))).await;
    let stream = opened
        .map_err(|_| format!("control did not answer in {OPEN_TIMEOUT:?}"))?
        .map_err(|status| story(&status))?;
    Ok((outgoing, stream.into_inner()))
}

/// An open stream.
struct Attached<'a> {
    pages: &'a Arc<Pages>,
    outgoing: mpsc::Sender<ProxyMessage>,
    /// When outcomes were told last, on this stream or an earlier one.
    told: &'a mut Instant,
    was_empty: bool,
}

impl Attached<'_> {
    async fn run(
        &mut self,
        mut incoming: Streaming<ControlMessage>,
        way: &mut watch::Receiver<Option<Channel>>,
        stop: &CancellationToken,
    ) -> Result<(), String> {
        let (events, mut tapped) = mpsc::channel(TAPPED);
        let mut tick = interval(INTERVAL);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // When the last tick was, and whether the next comes early: once, however many fail.
        let (mut last, mut hurries) = (Instant::now(), false);
        loop {
            tokio::select! {
                at = tick.tick() => {
                    self.tell();
                    (last, hurries) = (at, false);
                }
                () = self.pages.telemetry.failure(), if !hurries => {
                    tick.reset_at(last + HURRY);
                    hurries = true;
                }
                Some(event) = tapped.recv() => self.forward(event),
                message = incoming.message() => match message {
                    Ok(Some(message)) => self.obey(message, &events),
                    Ok(None) => return Ok(()),
                    Err(status) => return Err(story(&status)),
                },
                // The configuration goes another way, or nobody dials any more.
                _ = way.changed() => break,
                () = stop.cancelled() => break,
            }
        }
        self.tell();
        // Closing our side lets control read to the end and close its own.
        let (closed, _) = mpsc::channel(1);
        self.outgoing = closed;
        let _ = timeout(LAST_WORDS, async { while let Ok(Some(_)) = incoming.message().await {} }).await;
        Ok(())
    }

    /// Tells what happened since the last time, unless there is no room: then it waits for the next.
    fn tell(&mut self) {
        let Ok(permit) = self.outgoing.try_reserve() else { return };
        let now = Instant::now();
        let rows = self.pages.telemetry.take_rows();
        let calls = rows.iter().any(|row| row.labels.direction == Direction::Outbound);
        let loads = if calls { self.pages.loads(now) } else { AHashMap::new() };
        let rows: Vec<_> = rows.iter().map(|row| outcome(row, &loads)).collect();
        let shadows: Vec<_> = self.pages.telemetry.shadows.take_rows().iter().map(shadow).collect();
        let interval_ms = now.saturating_duration_since(*self.told).as_millis() as u64;
        *self.told = now;
        // The first empty message says that nothing is in flight any more; further ones would say nothing.
        let empty = rows.is_empty() && shadows.is_empty();
        if !(empty && self.was_empty) {
            permit.send(message(proxy_message::Kind::Outcomes(Outcomes { interval_ms, rows, shadows })));
        }
        self.was_empty = empty;
    }

    fn forward(&self, event: TapEvent) {
        if self.outgoing.try_send(message(proxy_message::Kind::Tap(event))).is_err() {
            metrics::counter!(metric::TAP_DROPPED.name).increment(1);
        }
    }

    fn obey(&self, message: ControlMessage, events: &mpsc::Sender<TapEvent>) {
        match message.kind {
            Some(control_message::Kind::TapStart(start)) => match tap(&start, events.clone()) {
                Ok(tap) => self.pages.telemetry.open_tap(tap),
                Err(error) => {
                    tracing::warn!(error, tap = start.tap, "control asked for a tap that makes no sense")
                }
            },
            Some(control_message::Kind::TapStop(stop)) => self.pages.telemetry.close_tap(Some(stop.tap)),
            Some(control_message::Kind::Ask(ask)) => {
                let (pages, outgoing) = (Arc::clone(self.pages), self.outgoing.clone());
                // Some questions take a while, and none may hold up the outcomes.
                tokio::spawn(async move {
                    let request = ask.request;
                    let answer = match answer(&pages, &ask).await {
                        Ok(json) => Answer { request, json, error: String::new() },
                        Err(error) => Answer { request, json: String::new(), error },
                    };
                    // A stream that is gone has taken its questions with it.
                    let _ = outgoing.send(self::message(proxy_message::Kind::Answer(answer))).await;
                });
            }
            // Something newer than this proxy.
            None => {}
        }
    }
}

/// The answer to a question, as the admin page of that name prints it.
async fn answer(pages: &Pages, ask: &Ask) -> Result<String, String> {
    fn json(page: impl Serialize) -> Result<String, String> {
        serde_json::to_string(&page).map_err(|error| error.to_string())
    }
    match ask.what {
        Some(ask::What::Config(_)) => json(pages.config()),
        Some(ask::What::Endpoints(_)) => json(pages.endpoints(Instant::now())),
        Some(ask::What::Certificates(_)) => json(pages.certificates()),
        Some(ask::What::Renew(_)) => {
            let mut changed = pages.identity.changed();
            pages.identity.renew_now();
            match timeout(RENEWAL_TIMEOUT, changed.changed()).await {
                Ok(_) => json(pages.certificates()),
                Err(_) => Err(format!("no new certificate in {RENEWAL_TIMEOUT:?}; the proxy's log says why")),
            }
        }
        None => Err("this proxy does not know the question; upgrade the proxy".into()),
    }
}

fn tap(start: &TapStart, events: mpsc::Sender<TapEvent>) -> Result<Tap, String> {
    let service = match start.service.as_str() {
        "" => None,
        name => Some(name.parse().map_err(|error| format!("{error}"))?),
    };
    let direction = if start.both { None } else { Some(start.direction()) };
    let tap = Tap::new(start.tap, service, direction, start.events_per_second, events);
    Ok(tap.explained(start.explain))
}

type Loads = AHashMap<(ServiceName, Arc<str>), u32>;

fn outcome(row: &Row, loads: &Loads) -> Outcome {
    let Row { labels, counts } = row;
    let load_permille = (labels.direction == Direction::Outbound)
        .then(|| loads.get(&(labels.backend.clone(), Arc::clone(&labels.endpoint))).copied())
        .flatten();
    Outcome {
        direction: Direction::into(labels.direction),
        service: labels.service.to_string(),
        backend: labels.backend.to_string(),
        endpoint: labels.endpoint.to_string(),
        route: labels.route.to_string(),
        requests: counts.requests(),
        failures: counts.failures,
        mtls: counts.mtls,
        retries: counts.retries,
        latency: buckets(&counts.latency),
        request_bytes: counts.request_bytes,
        response_bytes: counts.response_bytes,
        in_flight: counts.in_flight,
        load_permille,
    }
}

fn shadow((parties, counts): &(Parties, Counts)) -> Shadow {
    Shadow {
        service: parties.service.to_string(),
        mirror: parties.mirror.to_string(),
        sent: counts.of(Count::Answered) + counts.of(Count::Failed),
        failures: counts.of(Count::Failed),
        dropped: counts.of(Count::Dropped),
        compared: counts.of(Count::Compared),
        agreed: counts.of(Count::Agreed),
        ranked: counts.of(Count::Ranked),
        same_top: counts.of(Count::SameTop),
        largest_difference: counts.largest_difference,
        latency: buckets(&counts.latency),
        client_latency: buckets(&counts.client_latency),
        bytes: counts.of(Count::Bytes),
        client_bytes: counts.of(Count::ClientBytes),
    }
}

fn buckets(latency: &Histogram) -> Vec<Bucket> {
    latency.nonzero().map(|(index, count)| Bucket { index: index as u32, count }).collect()
}

fn message(kind: proxy_message::Kind) -> ProxyMessage {
    ProxyMessage { kind: Some(kind) }
}

fn story(status: &Status) -> String {
    match status.message() {
        "" => status.code().to_string(),
        message => format!("{}: {message}", status.code()),
    }
}
