//! The report as it was before it told of work and GPUs: five numbers. It goes when nobody builds one any more.

use super::load;
use bytes::BytesMut;
use http::HeaderMap;

/// The first five numbers of [`load::Load`], which replaces this.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// How full the workload is. 1 is its limit, and more is possible.
    pub application_utilization: Option<f64>,
    /// Requests a second.
    pub rps: Option<f64>,
    /// Errors a second.
    pub eps: Option<f64>,
    /// Requests in flight, from all clients.
    pub in_flight: Option<f64>,
    /// Milliseconds that requests wait before they reach the application.
    pub queue_wait_ms: Option<f64>,
}

impl Load {
    /// Reads the report that a response carries. `None`: no report, or one that cannot be read.
    pub fn from_headers(headers: &HeaderMap) -> Option<Self> {
        let load = load::Load::from_headers(headers)?;
        Some(Self {
            application_utilization: load.application_utilization,
            rps: load.rps,
            eps: load.eps,
            in_flight: load.in_flight,
            queue_wait_ms: load.queue_wait_ms,
        })
    }

    /// Puts the text report on a response.
    pub fn stamp(&self, headers: &mut HeaderMap, scratch: &mut BytesMut) {
        self.now().stamp(headers, scratch);
    }

    /// Puts the binary report on the trailers of a gRPC response.
    pub fn stamp_trailers(&self, trailers: &mut HeaderMap, scratch: &mut BytesMut) {
        self.now().stamp_trailers(trailers, scratch);
    }

    fn now(&self) -> load::Load {
        load::Load {
            application_utilization: self.application_utilization,
            rps: self.rps,
            eps: self.eps,
            in_flight: self.in_flight,
            queue_wait_ms: self.queue_wait_ms,
            ..load::Load::default()
        }
    }
}
