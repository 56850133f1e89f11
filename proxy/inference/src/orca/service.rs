//! Reports out of band: `xds.service.orca.v3.OpenRcaService` (gRFC A51), for clients that ask too seldom to learn from
//! the responses.
//!
//! Client and server stubs are the compiler's; [`interval`] is the one decision that a server has to make.

use std::time::Duration;

/// The messages and stubs, as the compiler wrote them.
#[allow(missing_docs, clippy::all, unreachable_pub)]
pub mod pb {
    tonic::include_proto!("xds.service.orca.v3");
}

pub use pb::OrcaLoadReportRequest;
pub use pb::open_rca_service_client::OpenRcaServiceClient as Client;
pub use pb::open_rca_service_server::{OpenRcaService as Service, OpenRcaServiceServer as Server};

/// What gRPC's own servers send when nothing is asked for, and the least that they send unless told otherwise (A51).
pub const GRPC_INTERVAL: Duration = Duration::from_secs(30);

/// How often to send: as asked, but not more often than `least`; [`GRPC_INTERVAL`] when nothing sensible is asked.
pub fn interval(request: &OrcaLoadReportRequest, least: Duration) -> Duration {
    let asked = request.report_interval.and_then(|asked| Duration::try_from(asked).ok());
    asked.filter(|asked| !asked.is_zero()).unwrap_or(GRPC_INTERVAL).max(least)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_the_interval_it_asked_for_within_reason() {
        let ask = |seconds, nanos| {
            let report_interval = Some(prost_types::Duration { seconds, nanos });
            let request = OrcaLoadReportRequest { report_interval, ..Default::default() };
            interval(&request, Duration::from_millis(100))
        };
        assert_eq!(ask(10, 0), Duration::from_secs(10));
        assert_eq!(ask(0, 1), Duration::from_millis(100));
        assert_eq!(ask(0, 0), GRPC_INTERVAL);
        assert_eq!(ask(-5, 0), GRPC_INTERVAL);
        assert_eq!(interval(&OrcaLoadReportRequest::default(), Duration::ZERO), GRPC_INTERVAL);
    }

    #[test]
    fn the_service_has_the_name_that_grpc_clients_call() {
        assert_eq!(pb::open_rca_service_server::SERVICE_NAME, "xds.service.orca.v3.OpenRcaService");
    }
}
