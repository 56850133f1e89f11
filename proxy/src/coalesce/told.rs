//! Which servers know a region of memory, and how they come to know it.
//!
//! In: a region, and a server that is to read it. Out: whether it knows it. One that has not been told is told once, by
//! whoever asks first; nobody waits for that. Can go wrong: the server does not want it, and then it is asked again after
//! a minute, because it may have been given other flags since; or it is away, or busy with the region, and is asked soon.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use tokio::time::Instant;

use super::call::{self, Answer, Outgoing, Way};
use crate::failure::Failure;
use crate::worker::Worker;

/// After a server refused the region it is asked again.
const REFUSED_FOR: Duration = Duration::from_secs(60);
/// After a server could not be asked, or was using the region: one that starts anew is soon there, and has refused nothing.
const AWAY_FOR: Duration = Duration::from_secs(1);
/// How long a server may take to answer that it has been told.
const PATIENCE: Duration = Duration::from_secs(5);

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
    /// It does not want it, was not there, or was busy with it: it is not asked before then.
    Not(Instant),
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
    pub fn next(&self, server: SocketAddr, now: Instant) -> Next {
        let mut told = self.all();
        match told.get(&server) {
            Some(Standing::Knows) => Next::Use,
            Some(Standing::Asked) => Next::Wait,
            Some(Standing::Not(until)) if now < *until => Next::Wait,
            Some(Standing::Not(_)) | None => {
                told.insert(server, Standing::Asked);
                Next::Tell
            }
        }
    }

    /// What came of telling it.
    pub fn is_told(&self, server: SocketAddr, said: &Said, now: Instant) {
        let standing = match said {
            Said::Anew => Standing::Knows,
            // What was handed to it and never came back is free only when it has let go of the region, and it cannot while
            // more and more is placed there: so for a while nothing is.
            Said::InUse | Said::Away(_) => Standing::Not(now + AWAY_FOR),
            Said::Refused(_) => Standing::Not(now + REFUSED_FOR),
        };
        self.all().insert(server, standing);
    }

    /// The server may have been replaced by another. `false`: it had not known the region. One that is being told is not told
    /// twice at once: of two who unregister and register the second would be refused.
    pub fn forget(&self, server: SocketAddr) -> bool {
        let mut told = self.all();
        let knew = matches!(told.get(&server), Some(Standing::Knows));
        if knew {
            told.remove(&server);
        }
        knew
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

/// What came of telling a server of a region.
#[derive(Clone, Debug)]
pub enum Said {
    /// It knows it now. What lay there before it has forgotten.
    Anew,
    /// It knew it, and was using it, so that it would not forget it.
    InUse,
    /// It was asked, and does not want it.
    Refused(String),
    /// It could not be asked.
    Away(Failure),
}

impl Said {
    /// Logs it; `memory`: what the server was told of, and `otherwise`: how tensors go without it.
    pub fn log(&self, server: SocketAddr, memory: &str, otherwise: &str) {
        match self {
            Self::Anew => tracing::debug!(%server, "the model server has been told of {memory}"),
            Self::InUse => {
                tracing::debug!(%server, "the model server is using the {memory} that it was told of before");
            }
            Self::Refused(why) => {
                tracing::info!(%server, why, "the model server takes no {memory}; tensors go {otherwise}");
            }
            Self::Away(failure) => {
                tracing::debug!(%server, %failure, "the model server could not be told of {memory}");
            }
        }
    }
}

/// Tells a server of a region: the path that takes it back, and path and body of the call that registers it.
pub async fn register(
    worker: &Rc<Worker>,
    way: &Way,
    unregister: String,
    (path, body): (String, Bytes),
) -> Said {
    // A connection that broke looks like a server that was started anew, and need not be one.
    let forgotten = post(worker, way, unregister, Bytes::from_static(b"{}")).await;
    if forgotten.is_ok_and(|answer| answer.status >= 500) {
        return Said::InUse;
    }
    let answer = match post(worker, way, path, body).await {
        Ok(answer) => answer,
        Err(failure) => return Said::Away(failure),
    };
    let words = String::from_utf8_lossy(&answer.body);
    match answer.status {
        200 => Said::Anew,
        // Triton's word of a region that it has, which it just would not let go of.
        _ if words.contains("already in manager") => Said::InUse,
        status => Said::Refused(format!("{status}: {words}")),
    }
}

async fn post(worker: &Rc<Worker>, way: &Way, path: String, body: Bytes) -> Result<Answer, Failure> {
    let outgoing = Outgoing { method: Method::POST, path, headers: HeaderMap::new(), parts: [body].into() };
    call::within(PATIENCE, worker, way, outgoing).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::Reason;

    #[test]
    fn a_server_is_told_once_and_again_when_it_is_another() {
        let told = Told::default();
        let server = SocketAddr::from(([127, 0, 0, 1], 8000));
        let now = Instant::now();
        assert_eq!([told.next(server, now), told.next(server, now)], [Next::Tell, Next::Wait]);
        assert!(!told.forget(server));
        assert_eq!(told.next(server, now), Next::Wait, "it is being told");
        told.is_told(server, &Said::Anew, now);
        assert_eq!(told.next(server, now), Next::Use);
        assert!(told.forget(server) && !told.forget(server));
        assert_eq!(told.next(server, now), Next::Tell);
    }

    #[test]
    fn who_refuses_is_left_alone_and_who_is_away_or_busy_is_asked_soon() {
        let told = Told::default();
        let server = SocketAddr::from(([127, 0, 0, 1], 8000));
        let now = Instant::now();
        let soon = now + AWAY_FOR;
        for said in [Said::InUse, Said::Away(Failure::new(Reason::ConnectFailed, ""))] {
            assert_eq!(told.next(server, now), Next::Tell);
            told.is_told(server, &said, now);
            assert_eq!(told.next(server, now), Next::Wait, "{said:?}");
            assert_eq!(told.next(server, soon), Next::Tell, "{said:?}");
            told.is_told(server, &Said::Anew, soon);
            told.forget(server);
        }
        told.is_told(server, &Said::Refused(String::new()), now);
        assert_eq!(told.next(server, soon), Next::Wait, "it has just refused");
        assert_eq!(told.next(server, now + REFUSED_FOR), Next::Tell);
    }
}
