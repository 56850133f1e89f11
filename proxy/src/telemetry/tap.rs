//! Taps: live requests for whoever runs `penstock tap`.
//!
//! Control opens a tap over the fleet stream; requests that match go back over it, at most so many a second. No tap
//! open costs the request path nothing but the look at one flag.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::UNIX_EPOCH;

use arc_swap::ArcSwap;
use penstock_api::ServiceName;
use penstock_api::v1::{Direction, TapEvent};
use tokio::sync::mpsc::Sender;

use super::{Details, EXPLAINED, End, Labels, bit, log, metric};

/// Events a second unless control says otherwise.
const DEFAULT_RATE: u32 = 100;

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    number: u64,
    service: Option<ServiceName>,
    /// `None`: both.
    direction: Option<Direction>,
    rate: u32,
    /// It shows how endpoints were chosen.
    explain: bool,
    /// The second that is running, and the events in it.
    window: AtomicU64,
    events: Sender<TapEvent>,
}

impl Tap {
    /// A tap that sends to `events`. `service`: only requests to it, or that a split sends to it; `rate` 0 stands
    /// for the default.
    pub fn new(
        number: u64,
        service: Option<ServiceName>,
        direction: Option<Direction>,
        rate: u32,
        events: Sender<TapEvent>,
    ) -> Self {
        let rate = if rate == 0 { DEFAULT_RATE } else { rate };
        Self { number, service, direction, rate, explain: false, window: AtomicU64::new(0), events }
    }

    /// The same tap, which also shows how endpoints were chosen, if `explain`.
    pub fn explained(self, explain: bool) -> Self {
        Self { explain, ..self }
    }

    /// What it wants to be kept of requests, as bits.
    fn wants(&self) -> u8 {
        let directions = self.direction.map_or(bit(Direction::Outbound) | bit(Direction::Inbound), bit);
        directions | if self.explain { EXPLAINED } else { 0 }
    }

    fn matches(&self, labels: &Labels) -> bool {
        self.direction.is_none_or(|direction| direction == labels.direction)
            && self
                .service
                .as_ref()
                .is_none_or(|service| *service == labels.service || *service == labels.backend)
    }

    /// Whether one more event is allowed in this second.
    fn allows(&self, second: u64) -> bool {
        const COUNT: u64 = u32::MAX as u64;
        let second = second << 32;
        let taken = self.window.fetch_update(Relaxed, Relaxed, |window| {
            // An event of a second that is over counts into the one that runs.
            if window < second {
                Some(second | 1)
            } else if window & COUNT < u64::from(self.rate) {
                Some(window + 1)
            } else {
                None
            }
        });
        taken.is_ok()
    }
}

/// The open taps.
#[derive(Debug, Default)]
pub struct Taps {
    open: ArcSwap<Vec<Arc<Tap>>>,
}

impl Taps {
    /// Opens a tap; returns what is wanted now, as bits.
    pub(super) fn open(&self, tap: Tap) -> u8 {
        let tap = Arc::new(tap);
        self.change(|taps| {
            taps.retain(|other| other.number != tap.number);
            taps.push(Arc::clone(&tap));
        })
    }

    /// Closes one or all; returns what is wanted now, as bits.
    pub(super) fn close(&self, number: Option<u64>) -> u8 {
        self.change(|taps| taps.retain(|tap| number.is_some_and(|number| tap.number != number)))
    }

    fn change(&self, change: impl Fn(&mut Vec<Arc<Tap>>)) -> u8 {
        self.open.rcu(|taps| {
            let mut taps = Vec::clone(taps);
            change(&mut taps);
            taps
        });
        self.open.load().iter().fold(0, |bits, tap| bits | tap.wants())
    }

    /// Shows a request to every tap that it matches.
    pub(super) fn offer(&self, labels: &Labels, end: &End, details: &Details) {
        for tap in self.open.load().iter().filter(|tap| tap.matches(labels)) {
            let ended = (details.at + end.total).duration_since(UNIX_EPOCH).unwrap_or_default();
            if !tap.allows(ended.as_secs()) || tap.events.try_send(event(tap, labels, end, details)).is_err()
            {
                metrics::counter!(metric::TAP_DROPPED.name).increment(1);
            }
        }
    }
}

fn event(tap: &Tap, labels: &Labels, end: &End, details: &Details) -> TapEvent {
    fn text(part: Option<impl ToString>) -> String {
        part.map(|part| part.to_string()).unwrap_or_default()
    }
    TapEvent {
        tap: tap.number,
        at_us: details.at.duration_since(UNIX_EPOCH).map_or(0, log::micros),
        direction: labels.direction.into(),
        client: text(details.client.as_ref()),
        server: text(details.server.as_ref()),
        service: labels.service.to_string(),
        backend: labels.backend.to_string(),
        route: labels.route.to_string(),
        endpoint: labels.endpoint.to_string(),
        method: text(details.method.as_ref()),
        authority: text(details.authority.as_ref()),
        path: text(details.path.as_ref().map(|path| path.path())),
        status: end.status.into(),
        reason: text(end.reason),
        headers_us: log::micros(end.headers),
        total_us: log::micros(end.total),
        tries: end.tries,
        mtls: end.mtls,
        request_bytes: end.request_bytes,
        response_bytes: end.response_bytes,
        flags: log::flags(end, Some(details)),
        // Inbound there is nothing to choose from.
        decision: details
            .decision
            .as_deref()
            .filter(|_| tap.explain && labels.direction == Direction::Outbound)
            .cloned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use penstock_api::v1::Decision;
    use tokio::sync::mpsc;

    use super::*;

    fn request(direction: Direction, service: &str, backend: &str, at: SystemTime) -> (Labels, End, Details) {
        let labels = Labels {
            direction,
            service: service.parse().unwrap(),
            backend: backend.parse().unwrap(),
            endpoint: "a/pod".into(),
            route: "a/route#0".into(),
        };
        let end = End {
            status: 200,
            reason: None,
            failed: false,
            mtls: true,
            tries: 1,
            headers: Duration::from_millis(1),
            total: Duration::from_millis(2),
            request_bytes: 0,
            response_bytes: 0,
        };
        let details = Details {
            at,
            method: Some(http::Method::GET),
            authority: None,
            path: Some("/x?token=1".parse().unwrap()),
            version: Some(http::Version::HTTP_11),
            client: None,
            server: None,
            trace: None,
            executed: None,
            flags: "",
            verdict: "",
            decision: Some(Box::new(Decision { why: "turn".to_owned(), ..Decision::default() })),
        };
        (labels, end, details)
    }

    fn offer(taps: &Taps, direction: Direction, service: &str, backend: &str, second: u64) {
        let at = UNIX_EPOCH + Duration::from_secs(second);
        let (labels, end, details) = request(direction, service, backend, at);
        taps.offer(&labels, &end, &details);
    }

    #[test]
    fn a_tap_sees_its_service_and_direction_only() {
        let (taps, (tx, mut rx)) = (Taps::default(), mpsc::channel(16));
        let service = "a/digits".parse().ok();
        let wanted = taps.open(Tap::new(7, service, Some(Direction::Outbound), 0, tx));
        assert_eq!(wanted, bit(Direction::Outbound));
        offer(&taps, Direction::Outbound, "a/digits", "a/digits-v1", 1);
        offer(&taps, Direction::Outbound, "a/other", "a/digits", 1);
        offer(&taps, Direction::Inbound, "a/digits", "a/digits", 1);
        offer(&taps, Direction::Outbound, "a/other", "a/other", 1);
        let event = rx.try_recv().unwrap();
        assert_eq!((event.tap, event.path.as_str(), event.backend.as_str()), (7, "/x", "a/digits-v1"));
        assert_eq!(rx.try_recv().unwrap().service, "a/other", "a split led to it");
        assert!(rx.try_recv().is_err());
        assert_eq!(taps.close(Some(7)), 0);
    }

    #[test]
    fn choices_are_explained_to_those_who_asked_and_for_the_side_that_chooses() {
        let (taps, (tx, mut rx), (plain, mut others)) =
            (Taps::default(), mpsc::channel(16), mpsc::channel(16));
        assert_eq!(taps.open(Tap::new(1, None, None, 0, plain)) & EXPLAINED, 0);
        assert_ne!(taps.open(Tap::new(2, None, None, 0, tx).explained(true)) & EXPLAINED, 0);
        offer(&taps, Direction::Outbound, "a/x", "a/x", 1);
        offer(&taps, Direction::Inbound, "a/x", "a/x", 1);
        assert_eq!(rx.try_recv().unwrap().decision.unwrap().why, "turn");
        assert_eq!(rx.try_recv().unwrap().decision, None, "inbound");
        assert_eq!(others.try_recv().unwrap().decision, None, "not asked for");
        assert_eq!(taps.close(Some(2)) & EXPLAINED, 0, "nobody asks any more");
    }

    #[test]
    fn a_tap_gives_no_more_than_its_rate_and_never_waits() {
        let (taps, (tx, mut rx)) = (Taps::default(), mpsc::channel(4));
        taps.open(Tap::new(1, None, None, 2, tx));
        for second in [10, 10, 10, 11, 11, 11, 12, 12] {
            offer(&taps, Direction::Inbound, "a/x", "a/x", second);
        }
        let mut seen = Vec::new();
        while let Ok(event) = rx.try_recv() {
            seen.push(event.at_us / 1_000_000);
        }
        assert_eq!(seen, [10, 10, 11, 11], "two a second, and no more than the channel holds");
    }
}
