//! Counts the certificates that running sidecars exchange for new ones, by looking at their admin pages.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::Request;
use penstock_api::view::Certificate;
use tokio::task::JoinHandle;

use crate::connection::{Connection, body};

/// Short against the time that a restart takes, so that a restarted sidecar is noticed as one that did not answer.
const LOOK: Duration = Duration::from_millis(200);

/// Watches until it is dropped.
#[derive(Debug)]
pub(super) struct Watch {
    rotated: Arc<AtomicU64>,
    watchers: Vec<JoinHandle<()>>,
}

impl Watch {
    /// Watches the sidecars with these admin addresses.
    pub(super) fn start(admins: impl IntoIterator<Item = SocketAddrV4>) -> Self {
        let rotated = Arc::new(AtomicU64::new(0));
        let watchers = admins.into_iter().map(|admin| tokio::spawn(watch(admin, rotated.clone()))).collect();
        Self { rotated, watchers }
    }

    /// How many were exchanged so far.
    pub(super) fn rotated(&self) -> u64 {
        self.rotated.load(Ordering::Relaxed)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.watchers.iter().for_each(JoinHandle::abort);
    }
}

async fn watch(admin: SocketAddrV4, rotated: Arc<AtomicU64>) {
    let mut connection = Connection::to(admin.to_string());
    let mut known = None;
    loop {
        let seen = serial(&mut connection, admin).await;
        rotated.fetch_add(u64::from(is_rotation(known.as_deref(), seen.as_deref())), Ordering::Relaxed);
        known = seen;
        tokio::time::sleep(LOOK).await;
    }
}

/// A sidecar that did not answer was restarted, and its next certificate is its first.
fn is_rotation(known: Option<&str>, seen: Option<&str>) -> bool {
    matches!((known, seen), (Some(known), Some(seen)) if known != seen)
}

/// The serial number of the sidecar's certificate; `None` when it does not answer.
async fn serial(connection: &mut Connection, admin: SocketAddrV4) -> Option<String> {
    let request =
        Request::get("/certs").header("host", admin.to_string()).body(Full::<Bytes>::default()).ok()?;
    let page = body(connection.send(request).await.ok()?).await.ok()?;
    let certificates: Vec<Certificate> = serde_json::from_slice(&page).ok()?;
    certificates.into_iter().find(|certificate| certificate.role == "leaf").map(|leaf| leaf.serial)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_no_rotation() {
        assert!(is_rotation(Some("a"), Some("b")));
        assert!(!is_rotation(Some("a"), Some("a")));
        assert!(!is_rotation(None, Some("b")));
        assert!(!is_rotation(Some("a"), None));
    }
}
