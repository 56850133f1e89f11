//! What may pass to a port of a pod: the one table of it.
//!
//! In: what is declared for the port, what came, and from whom. Out: as what it is served, or why it is not. Pure. Everybody
//! who has to know asks here: in the pod's proxy who waits for first bytes, who serves a connection, who authorizes its bytes, and
//! who looks at the requests of one that was opened when the pod was configured otherwise; and control, which says what it would do.
//!
//! | declared | looks like HTTP, or says so | anything else |
//! | --- | --- | --- |
//! | `opaque`, `tls` | bytes | bytes |
//! | `http`, `http1`, `h2`, `grpc` | requests | nothing: bytes would get around whatever is asked of a request |
//! | nothing | requests | bytes, unless something is denied by what only HTTP says |
//!
//! That is for who has proven an identity, and in plaintext for everybody where the pod is permissive. Elsewhere plaintext
//! gets what the kubelet may ask the port for, which is requests, or nothing.

use crate::v1::Protocol;

/// The call of gRPC's health service (grpc/health/v1/health.proto) that a `grpc` probe makes.
pub const HEALTH: &str = "/grpc.health.v1.Health/Check";

/// What came over a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Came {
    /// What looks like HTTP, or what a handshake says is.
    Http,
    /// Anything else.
    Bytes,
}

/// What decides about a connection.
#[derive(Clone, Copy, Debug)]
pub struct Arrival {
    /// What is declared for the port; `None`: the port is not declared.
    pub protocol: Option<Protocol>,
    /// What came.
    pub came: Came,
    /// The client has proven an identity.
    pub proven: bool,
    /// The pod takes plaintext.
    pub permissive: bool,
    /// The kubelet asks this port for something.
    pub probed: bool,
    /// An access policy denies something by what only HTTP says.
    pub denies_by_http: bool,
}

/// What may pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Requests, each of which is judged.
    Requests,
    /// Bytes that are not looked at, judged once and watched.
    Bytes,
    /// What the kubelet asks for, and nothing else.
    Probes,
    /// Nothing: it had to be HTTP.
    NotHttp,
    /// Nothing: it had to be mutual TLS.
    NotSecured,
    /// Nothing: there is no such port.
    NoPort,
}

impl Arrival {
    /// Decides.
    pub fn entry(&self) -> Entry {
        let open = self.proven || self.permissive;
        let Some(protocol) = self.protocol.filter(|_| open) else {
            return match (self.came, self.proven, self.probed) {
                (Came::Http, false, true) => Entry::Probes,
                _ if open => Entry::NoPort,
                _ => Entry::NotSecured,
            };
        };
        match (protocol, self.came) {
            (Protocol::Opaque | Protocol::Tls, _) => Entry::Bytes,
            (_, Came::Http) => Entry::Requests,
            (Protocol::Detect, Came::Bytes) if !self.denies_by_http => Entry::Bytes,
            (_, Came::Bytes) => Entry::NotHttp,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HTTP: [Protocol; 4] = [Protocol::Http, Protocol::Http1, Protocol::Http2, Protocol::Grpc];
    const BYTES: [Protocol; 2] = [Protocol::Opaque, Protocol::Tls];

    /// Every arrival there is.
    fn all() -> Vec<Arrival> {
        let declared = HTTP.into_iter().chain(BYTES).chain([Protocol::Detect]).map(Some).chain([None]);
        let mut all = Vec::new();
        for protocol in declared {
            for bits in 0..32u8 {
                let bit = |at: u8| bits & (1 << at) != 0;
                all.push(Arrival {
                    protocol,
                    came: if bit(0) { Came::Http } else { Came::Bytes },
                    proven: bit(1),
                    permissive: bit(2),
                    probed: bit(3),
                    denies_by_http: bit(4),
                });
            }
        }
        all
    }

    #[test]
    fn a_strict_pod_takes_of_plaintext_what_the_kubelet_may_ask_and_no_byte_besides() {
        for arrival in all().into_iter().filter(|arrival| !arrival.proven && !arrival.permissive) {
            let expected = match (arrival.came, arrival.probed) {
                (Came::Http, true) => Entry::Probes,
                _ => Entry::NotSecured,
            };
            assert_eq!(arrival.entry(), expected, "{arrival:?}");
        }
    }

    #[test]
    fn whoever_may_come_gets_requests_where_http_is_declared_and_bytes_where_they_are() {
        for arrival in all().into_iter().filter(|arrival| arrival.proven || arrival.permissive) {
            let entry = arrival.entry();
            let expected = match (arrival.protocol, arrival.came) {
                (None, Came::Http) if arrival.probed && !arrival.proven => Entry::Probes,
                (None, _) => Entry::NoPort,
                (Some(protocol), _) if BYTES.contains(&protocol) => Entry::Bytes,
                (Some(_), Came::Http) => Entry::Requests,
                (Some(protocol), Came::Bytes) if HTTP.contains(&protocol) => Entry::NotHttp,
                (Some(_), Came::Bytes) if arrival.denies_by_http => Entry::NotHttp,
                (Some(_), Came::Bytes) => Entry::Bytes,
            };
            assert_eq!(entry, expected, "{arrival:?}");
        }
    }
}
