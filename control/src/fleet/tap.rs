//! Taps: live requests, fanned out from all proxies to whoever watches.
//!
//! In: events of proxies. Out: one bounded channel a watcher. A watcher that reads too slowly loses events, which are
//! counted; it never slows a proxy down.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use metrics::counter;
use penstock_api::v1::{ControlMessage, Direction, TapEvent, TapStart, TapStop, control_message};
use penstock_api::view;
use tokio::sync::mpsc;

use super::{Fleet, lock, tap_view};
use crate::metric;

/// Events that wait for a watcher: a few seconds of what a terminal can show.
const QUEUE: usize = 1_024;
/// What each proxy may send a second.
const EVENTS_PER_SECOND: u32 = 200;

/// Which requests are of interest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TapFilter {
    /// `<namespace>/<name>`; empty = all.
    pub service: String,
    /// `None` = both.
    pub direction: Option<Direction>,
    /// Say how endpoints are chosen.
    pub explain: bool,
}

/// Open taps.
#[derive(Debug, Default)]
pub(super) struct Taps {
    next: AtomicU64,
    open: Mutex<BTreeMap<u64, Watcher>>,
}

#[derive(Debug)]
struct Watcher {
    filter: TapFilter,
    sender: mpsc::Sender<view::Tap>,
}

/// An open tap. Proxies stop when it is dropped.
#[derive(Debug)]
pub struct Tap {
    id: u64,
    fleet: Weak<Fleet>,
    events: mpsc::Receiver<view::Tap>,
}

impl Tap {
    /// The next request that fits.
    pub async fn next(&mut self) -> Option<view::Tap> {
        self.events.recv().await
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        if let Some(fleet) = self.fleet.upgrade() {
            lock(&fleet.taps.open).remove(&self.id);
            let stop = control_message::Kind::TapStop(TapStop { tap: self.id });
            fleet.broadcast(&ControlMessage { kind: Some(stop) });
        }
    }
}

fn start(id: u64, filter: &TapFilter) -> ControlMessage {
    let start = TapStart {
        tap: id,
        service: filter.service.clone(),
        direction: filter.direction.unwrap_or_default().into(),
        both: filter.direction.is_none(),
        events_per_second: EVENTS_PER_SECOND,
        explain: filter.explain,
    };
    ControlMessage { kind: Some(control_message::Kind::TapStart(start)) }
}

impl Taps {
    pub(super) fn open(&self, fleet: &Arc<Fleet>, filter: TapFilter) -> (Tap, ControlMessage) {
        let id = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let message = start(id, &filter);
        let (sender, events) = mpsc::channel(QUEUE);
        lock(&self.open).insert(id, Watcher { filter, sender });
        (Tap { id, fleet: Arc::downgrade(fleet), events }, message)
    }

    /// What a proxy that has just attached is told.
    pub(super) fn starts(&self) -> Vec<ControlMessage> {
        lock(&self.open).iter().map(|(id, watcher)| start(*id, &watcher.filter)).collect()
    }

    pub(super) fn deliver(&self, node: &str, event: TapEvent) {
        let open = lock(&self.open);
        let Some(watcher) = open.get(&event.tap) else { return };
        if watcher.sender.try_send(tap_view(node, event)).is_err() {
            counter!(metric::TAP_DROPPED.name).increment(1);
        }
    }
}

/// Microseconds since the epoch as RFC 3339, in UTC.
pub(super) fn rfc3339(us: u64) -> String {
    // The end of the year 9999.
    let us = us.min(253_402_300_799_999_999);
    let at = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_micros(us);
    humantime::format_rfc3339_micros(at).to_string()
}
