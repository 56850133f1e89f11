//! A client's connection: what is known of it before its first request.

use std::cell::RefCell;
use std::net::{Ipv6Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;

use http::uri::Authority;
use http::{HeaderValue, Version};
use penstock_api::{Reason, SpiffeId, shown};

use crate::accept::Counted;
use crate::config::static_file::Listener;
use crate::config::{Rule, Workload, WorkloadPort};
use crate::failure::Failure;
use crate::report::LastTold;
use crate::worker::Worker;

/// A client's connection.
#[derive(Debug)]
pub struct Connection {
    /// The worker that serves it.
    pub worker: Rc<Worker>,
    /// Where it was going, if it was redirected.
    pub original: Option<SocketAddr>,
    /// Who the client has proven to be, with the header that tells the application.
    pub client: Option<(SpiffeId, HeaderValue)>,
    /// The same as Envoy says it, where the application is to be told so.
    pub forwarded: Option<HeaderValue>,
    /// The client is a sidecar: its word about the application's protocol counts.
    pub sidecar: bool,
    /// What served it when it was opened; for a pod's own port, [`own::now`](crate::access::own::now) says what does.
    pub to: To,
    /// The last Host, read: most connections say the same one in every request.
    pub last_host: RefCell<Option<(HeaderValue, Authority)>>,
    /// When the client, a sidecar, was last told of our load.
    pub last_told: LastTold,
    /// Counts while it is open.
    pub counted: Rc<Counted>,
}

/// What a connection leads to.
#[derive(Clone, Debug)]
pub enum To {
    /// Whatever each request names.
    Mesh,
    /// A listener of the static file.
    Static(Arc<Listener>),
    /// A port of our own pod, by its index.
    Application(Arc<Workload>, usize),
    /// What the kubelet asks a port of our own pod for, by its index, and nothing else.
    Probes(Arc<Workload>, usize),
    /// Nothing: every request is answered with this.
    Refusal(Failure),
    /// Nothing of our own pod as yet, by the port that was asked for. What is declared may come, and a strict pod may open up,
    /// and connections between sidecars live long: each request asks again.
    NotYet(Option<u16>, Failure),
}

/// Why plaintext goes no further.
pub fn plaintext_refused(pod: &str) -> Failure {
    Failure::unprocessed(
        Reason::PlaintextRefused,
        format!(
            "{pod} takes only mutual TLS; call it through a sidecar, or annotate its pod with penstock.io/mtls: permissive"
        ),
    )
}

impl To {
    /// The port of our own pod.
    pub fn application(workload: &Arc<Workload>, port: u16) -> Option<Self> {
        let index = workload.ports.iter().position(|candidate| candidate.port == port)?;
        Some(Self::Application(Arc::clone(workload), index))
    }

    /// What the kubelet may ask a port of our own pod for.
    pub fn probes(workload: &Arc<Workload>, port: u16) -> Option<Self> {
        let index = workload.probes.iter().position(|probes| probes.port.port == port)?;
        Some(Self::Probes(Arc::clone(workload), index))
    }

    /// The port of our own pod as it is configured now, if that is otherwise than when the connection was opened: connections
    /// between sidecars live long, and a policy that was pushed meanwhile is for what comes over them, too.
    pub fn renewed(&self, worker: &Worker) -> Option<Self> {
        let Self::Application(then, index) = self else { return None };
        let snapshot = worker.shared.store.snapshot();
        let now = snapshot.workload.as_ref().filter(|now| !Arc::ptr_eq(now, then))?;
        Self::application(now, then.ports[*index].port)
    }

    /// The rule for everything that comes over it, or the refusal.
    pub fn rule(&self) -> Result<&Rule, Failure> {
        match self {
            Self::Static(listener) => Ok(&listener.destination.service.ports[0].itself),
            Self::Refusal(failure) | Self::NotYet(_, failure) => Err(failure.clone()),
            // Only some requests may pass, and `access` says which.
            Self::Probes(workload, _) => Err(plaintext_refused(&workload.name)),
            Self::Mesh | Self::Application(..) => self
                .port()
                .map(|port| &port.rule)
                .ok_or_else(|| Failure::unprocessed(Reason::UnknownPort, "the connection leads to no port")),
        }
    }

    /// Our own pod, if it leads to a port of it.
    pub fn workload(&self) -> Option<&Workload> {
        match self {
            Self::Application(workload, _) => Some(workload),
            _ => None,
        }
    }

    /// The port of our own pod, if it leads there.
    pub fn port(&self) -> Option<&WorkloadPort> {
        match self {
            Self::Application(workload, index) => workload.ports.get(*index),
            _ => None,
        }
    }
}

impl Connection {
    /// Who the client has proven to be.
    pub fn client_id(&self) -> Option<&SpiffeId> {
        self.client.as_ref().map(|(id, _)| id)
    }

    /// The host and port that a request is for, from its target or its Host header.
    pub fn authority(&self, request: &http::request::Parts) -> Result<Authority, Failure> {
        if let Some(authority) = request.uri.authority() {
            return check_host(authority).map(|()| authority.clone());
        }
        let Some(host) = request.headers.get(http::header::HOST) else {
            // HTTP/1.0 knows no Host, and there is no doubt where the connection leads.
            if request.version == Version::HTTP_10
                && let Some(authority) = self.address()
            {
                return Ok(authority);
            }
            return Err(Failure::unprocessed(Reason::BadRequest, "the request names no host"));
        };
        let mut last = self.last_host.borrow_mut();
        if let Some((value, authority)) = &*last
            && value == host
        {
            return Ok(authority.clone());
        }
        let authority = Authority::try_from(host.as_bytes())
            .map_err(|error| Failure::unprocessed(Reason::BadRequest, format!("the Host header: {error}")))?;
        check_host(&authority)?;
        // A copy: the value as it came holds the whole buffer that it came in, and would for as long as the connection lives.
        let host = HeaderValue::from_bytes(host.as_bytes());
        *last = host.ok().map(|host| (host, authority.clone()));
        Ok(authority)
    }

    /// Where it was going, or the port of our own pod that it leads to.
    fn address(&self) -> Option<Authority> {
        let text = match self.original {
            Some(original) => original.to_string(),
            None => format!("localhost:{}", self.to.port()?.port),
        };
        text.try_into().ok()
    }
}

/// Refuses what is more than a host and a port. A user's name before them is there to deceive (RFC 9110, 4.2.4), and of what is none
/// of these each server makes something else.
pub fn check_host(authority: &Authority) -> Result<(), Failure> {
    let host = authority.host();
    let port = authority.as_str().strip_prefix(host);
    let is_port = |port: &str| match port.strip_prefix(':') {
        Some(digits) => {
            digits.bytes().all(|b| b.is_ascii_digit()) && (digits.is_empty() || digits.parse::<u16>().is_ok())
        }
        None => port.is_empty(),
    };
    let is_host = match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty(),
    };
    if is_host && port.is_some_and(is_port) {
        return Ok(());
    }
    Err(Failure::unprocessed(
        Reason::BadRequest,
        format!(
            "{} is no host, or stands beside more than a port, which servers read differently; name a host, and no user",
            shown(host)
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_with_or_without_a_port() {
        for good in ["a", "a.b:80", "a:", "[::1]", "[::1]:80", "1.2.3.4:5", "_a.b"] {
            assert!(check_host(&good.parse().unwrap()).is_ok(), "{good}");
        }
        for bad in [
            "u@a",
            "u:p@a:80",
            "a@a",
            ":80",
            "a:x",
            "a:+80",
            "a:-1",
            "a:65536",
            "[a]",
            "[::1]x",
            "[::1%25e]:80",
        ] {
            if let Ok(authority) = bad.parse() {
                assert!(check_host(&authority).is_err(), "{bad}");
            }
        }
    }
}
