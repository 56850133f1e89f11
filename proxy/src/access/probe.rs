//! What the kubelet asks a pod's containers for: exactly what the pod declares, with nothing that it could become.

use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TRANSFER_ENCODING, UPGRADE};
use http::uri::{PathAndQuery, Uri};
use http::{HeaderMap, Method};
use penstock_api::access::HEALTH;
use prost::Message as _;

use crate::config::Probes;

/// The longest question that is read: the name of a service, which Kubernetes bounds by nothing but sense.
pub(super) const QUESTION: usize = 1 << 10;

/// A kind of probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// `httpGet`.
    Get,
    /// `grpc`, as far as the head says; the message has to be read.
    Health,
}

#[derive(prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// The service that a health check asks about: one message, uncompressed, and nothing behind it.
pub(super) fn service(body: &[u8]) -> Option<String> {
    let (&[compressed, a, b, c, d], message) = body.split_first_chunk::<5>()?;
    let whole = usize::try_from(u32::from_be_bytes([a, b, c, d])).ok()? == message.len();
    let request = (compressed == 0 && whole).then(|| HealthCheckRequest::decode(message).ok())?;
    request.map(|request| request.service)
}

impl Probes {
    /// The kind of probe that a request is, by its head.
    pub fn kind(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Option<Probe> {
        if headers.contains_key(UPGRADE) || headers.contains_key(TRANSFER_ENCODING) {
            return None;
        }
        let asked = uri.path_and_query().map_or("/", PathAndQuery::as_str);
        if *method == Method::GET && !headers.contains_key(CONTENT_LENGTH) {
            return self.paths.iter().any(|path| **path == *asked).then_some(Probe::Get);
        }
        let is_grpc = headers.get(CONTENT_TYPE).is_some_and(|value| value == "application/grpc");
        let health = *method == Method::POST && asked == HEALTH && is_grpc && !self.grpc.is_empty();
        health.then_some(Probe::Health)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_health_check_is_one_message_that_names_a_service() {
        let frame = |flag: u8, length: u8, message: &[u8]| [&[flag, 0, 0, 0, length], message].concat();
        let table: [(Vec<u8>, Option<&str>); 6] = [
            (frame(0, 0, b""), Some("")),
            (frame(0, 5, b"\x0a\x03abc"), Some("abc")),
            (frame(1, 5, b"\x0a\x03abc"), None),
            (frame(0, 4, b"\x0a\x03abc"), None),
            (frame(0, 5, b"\x0a\x04abc"), None),
            (b"\0\0".to_vec(), None),
        ];
        for (body, expected) in table {
            assert_eq!(service(&body).as_deref(), expected, "{body:?}");
        }
    }
}
