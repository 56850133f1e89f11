//! Which servers know a region of memory, and how they come to know it.
//!
//! In: a region, and a server that is to read it. Out: whether it knows it. One that has not been told is told once, by
//! whoever asks first; nobody waits for that. Can go wrong: the server does not want it, and then it is asked again after
//! a minute, because it may have been given other flags since.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use tokio::time::Instant;

use super::call::{self, Outgoing, Way};
use crate::worker::Worker;

/// After a server refused the region it is asked again.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// Who has been told of a region.
#[derive(Debug, Default)]
pub struct Told(Mutex<HashMap<SocketAddr, Standing>>);

/// How a server stands to the region.
#[derive(Clone, Copy, Debug)]
enum Standing {
    /// It is being told.
    Asked,
    /// It knows it.
    Knows,
    /// It does not want it.
    Refused(Instant),
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It knows it.
    Use,
    /// It does not know it, or not yet.
    Wait,
    /// Whoever gets this tells it now.
    Tell,
}

impl Told {
    fn all(&self) -> MutexGuard<'_, HashMap<SocketAddr, Standing>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How it stands with that server.
    pub fn next(&self, server: SocketAddr) -> Next {
        let mut told = self.all();
        match told.get(&server) {
            Some(Standing::Knows) => Next::Use,
            Some(Standing::Asked) => Next::Wait,
            Some(Standing::Refused(at)) if at.elapsed() < REFUSED_FOR => Next::Wait,
            Some(Standing::Refused(_)) | None => {
                told.insert(server, Standing::Asked);
                Next::Tell
            }
        }
    }

    /// It knows it, or does not want it.
    pub fn is_told(&self, server: SocketAddr, knows: bool) {
        let standing = if knows { Standing::Knows } else { Standing::Refused(Instant::now()) };
        self.all().insert(server, standing);
    }

    /// The server may have been replaced by another. `false`: it had not known the region.
    pub fn forget(&self, server: SocketAddr) -> bool {
        matches!(self.all().remove(&server), Some(Standing::Knows))
    }
}

/// What arenas know a server by.
pub fn number(server: SocketAddr) -> u64 {
    let ip = match server.ip() {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits() as u64,
    };
    (ip << 16) | u64::from(server.port())
}

/// How a server has come to know a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Registered {
    /// It has just been told.
    Anew,
    /// It knew it, and was using it, so that it would not forget it.
    Still,
}

/// Tells a server of a region: the path that takes it back, and path and body of the call that registers it.
pub async fn register(
    worker: &Rc<Worker>,
    way: &Way,
    unregister: String,
    (path, body): (String, Bytes),
) -> Result<Registered, String> {
    let post = |path: String, body: Bytes| {
        let outgoing =
            Outgoing { method: Method::POST, path, headers: HeaderMap::new(), parts: [body].into() };
        call::whole(worker, way, outgoing)
    };
    // A connection that broke looks like a server that was started anew, and need not be one.
    let forgotten = post(unregister, Bytes::from_static(b"{}")).await;
    if forgotten.is_ok_and(|answer| answer.status >= 500) {
        return Ok(Registered::Still);
    }
    let answer = post(path, body).await.map_err(|failure| failure.to_string())?;
    match answer.status {
        200 => Ok(Registered::Anew),
        status => Err(format!("{status}: {}", String::from_utf8_lossy(&answer.body))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_told_once_and_again_when_it_is_another() {
        let told = Told::default();
        let server = SocketAddr::from(([127, 0, 0, 1], 8000));
        assert_eq!([told.next(server), told.next(server)], [Next::Tell, Next::Wait]);
        told.is_told(server, true);
        assert_eq!(told.next(server), Next::Use);
        assert!(told.forget(server) && !told.forget(server));
        assert_eq!(told.next(server), Next::Tell);
        told.is_told(server, false);
        assert_eq!(told.next(server), Next::Wait, "it has just refused");
    }
}
