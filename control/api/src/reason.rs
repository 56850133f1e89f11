//! Why a proxy answered by itself.
//!
//! The closed list behind the header `penstock-error`, the `reason` of the access log, of `tap` and of the
//! metric `penstock_request_errors_total`. Nobody should have to guess where a 503 came from.

use std::fmt;

/// Whose fault it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The client's: sending it again, at once or elsewhere, changes nothing.
    Client,
    /// The server's, or the way to it.
    Upstream,
    /// The mesh's own: configuration, limits, drain.
    Mesh,
}

macro_rules! reasons {
    ($($name:ident $word:literal $status:literal $grpc:literal $flag:literal $blame:ident $doc:literal;)+) => {
        /// A reason of the closed list.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Reason {
            $(#[doc = $doc] $name,)+
        }

        impl Reason {
            /// All reasons, in the order of the documentation.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The word on the wire, in logs and on metrics.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $word,)+ }
            }

            /// The HTTP status of the answer.
            pub const fn status(self) -> u16 {
                match self { $(Self::$name => $status,)+ }
            }

            /// The gRPC status code, when the request was gRPC.
            pub const fn grpc_status(self) -> u8 {
                match self { $(Self::$name => $grpc,)+ }
            }

            /// The response flag of the access log (Envoy's letters where Envoy has the case).
            pub const fn flag(self) -> &'static str {
                match self { $(Self::$name => $flag,)+ }
            }

            /// Whose fault it was.
            pub const fn blame(self) -> Blame {
                match self { $(Self::$name => Blame::$blame,)+ }
            }

            /// What it means, one sentence.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$name => $doc,)+ }
            }
        }
    };
}

// gRPC codes: 3 invalid argument, 4 deadline exceeded, 7 permission denied, 8 resource exhausted,
// 12 unimplemented, 13 internal, 14 unavailable, 1 cancelled.
reasons! {
    BadRequest        "bad-request"         400  3 "DPE" Client   "The request could not be understood: malformed, or no host.";
    HeadersTooLarge   "headers-too-large"   431  8 "DPE" Client   "The header section is above its limit.";
    HeaderTimeout     "header-timeout"      408  4 "SI"  Client   "The request's headers did not arrive in time.";
    BodyTooLarge      "body-too-large"      413  8 "DPE" Client   "The request's body is above its limit.";
    BodyTimeout       "body-timeout"        408  4 "SI"  Client   "The request's body, or the next piece of it, did not arrive in time.";
    BodyEncoded       "body-encoded"        415 12 "DPE" Client   "The request's body has to be prepared for the model, and is compressed.";
    NoRoom            "no-room"             503  8 "UO"  Mesh     "There is no room now for the bodies, or the tensors, of requests that have to be prepared.";
    BadInput          "bad-input"           400  3 "DPE" Client   "An input could not be prepared for the model: not what its pipeline takes, damaged, or above a limit.";
    PlaintextRefused  "plaintext-refused"   403  7 "RBAC" Client  "The port takes only mutual TLS (strict), and the connection was plaintext.";
    NotAuthorized     "not-authorized"      403  7 "RBAC" Client  "The caller's identity may not do this.";
    UnknownPort       "unknown-port"        404 12 "NR"  Client   "The pod declares no such port.";
    NoRoute           "no-route"            404 12 "NR"  Client   "No rule of the Service's routes matches the request.";
    NoService         "no-service"          502 14 "NC"  Client   "The host is neither a Service of the mesh nor a name that resolves.";
    Loop              "loop"                508 13 "DPE" Mesh     "The request would come back to the proxy that sends it.";
    BadBackend        "bad-backend"         500 13 "NC"  Mesh     "The route leads to a backend that does not exist or is not permitted.";
    NoEndpoint        "no-endpoint"         503 14 "UH"  Mesh     "No endpoint of the Service is ready.";
    NoConfig          "no-config"           503 14 "NC"  Mesh     "Control has not said yet what the destination is.";
    Draining          "draining"            503 14 "UD"  Mesh     "The proxy is shutting down and takes no new work.";
    ConnectFailed     "connect-failed"      503 14 "UF"  Upstream "No connection to the endpoint could be made.";
    ConnectTimeout    "connect-timeout"     503 14 "UF"  Upstream "The endpoint did not accept a connection in time.";
    WrongIdentity     "wrong-identity"      503 14 "UF"  Upstream "The endpoint could not prove the identity that control says it has.";
    TooManyPending    "too-many-pending"    503 14 "UO"  Mesh     "Too many requests wait for a connection to the Service.";
    TooManyRequests   "too-many-requests"   503 14 "UO"  Mesh     "Too many requests to the Service are in flight.";
    TooManyConnections "too-many-connections" 503 14 "UO" Mesh    "The listener is at its connection limit.";
    OutOfMemory       "out-of-memory"       503 14 "OM" Mesh     "The proxy uses as much memory as it may; requests under way go on.";
    QueueFull         "queue-full"          429  8 "UO"  Mesh     "Too many requests wait for the model, and the caller has its share of them.";
    RateLimited       "rate-limited"        429  8 "RL"  Client   "The caller, or all who are counted with it, have used up what a RateLimit gives them.";
    TooLate           "too-late"            503  4 "UO"  Mesh     "The model could not have answered before the request's deadline, so it was not begun.";
    UpstreamReset     "upstream-reset"      502 14 "UR"  Upstream "The endpoint closed or reset before it answered.";
    UpstreamProtocol  "upstream-protocol"   502 13 "UPE" Upstream "The endpoint answered with something that is not HTTP.";
    UpstreamIncomplete "upstream-incomplete" 502 13 "UC" Upstream "The endpoint closed in the middle of its response.";
    RequestTimeout    "request-timeout"     504  4 "UT"  Upstream "The endpoint did not answer within the route's timeout.";
    IdleTimeout       "idle-timeout"        504  4 "SI"  Upstream "No byte moved for the idle timeout.";
    StreamOver        "stream-over"         503 14 "SO"  Mesh     "The gRPC stream has reached its greatest age, or the proxy leaves: open it again.";
    ClientClosed      "client-closed"       499  1 "DC"  Client   "The client went away before the response was finished.";
    Internal          "internal"            500 13 "IE"  Mesh     "A fault of the proxy itself; please report it.";
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_unique_and_kebab_case() {
        let mut words: Vec<_> = Reason::ALL.iter().map(|r| r.as_str()).collect();
        assert!(words.iter().all(|w| w.bytes().all(|b| b.is_ascii_lowercase() || b == b'-')));
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), Reason::ALL.len());
    }
}
