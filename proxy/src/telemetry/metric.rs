//! Every metric of the proxy, once: its name, its labels, its meaning. docs/OPERATIONS.md is made from this list.
//!
//! Labels come from closed sets: directions, classes, reasons, and the names of Services, routes and kinds that
//! control pushes. Nothing that a client sends becomes a label.

pub use penstock_api::metric::{Kind, Metric};

penstock_api::metrics! {
    REQUESTS Counter "penstock_requests_total" ["direction", "service", "backend", "route", "class"]
        "Requests that are over, by the class of their status: 1xx to 5xx, or none.";
    REQUEST_ERRORS Counter "penstock_request_errors_total" ["direction", "service", "backend", "route", "reason"]
        "Answers that the proxy made itself, by reason.";
    REQUEST_FAILURES Counter "penstock_request_failures_total" ["direction", "service", "backend", "route"]
        "Requests that count as the server's failure: 5xx, a failing gRPC status, or an answer of our own that is not the client's fault.";
    REQUEST_DURATION Histogram "penstock_request_duration_seconds" ["direction", "service", "backend", "route"]
        "Time from the request to the response's headers.";
    REQUESTS_IN_FLIGHT Gauge "penstock_requests_in_flight" ["direction", "service", "backend", "route"]
        "Requests whose response has not ended.";
    REQUESTS_MTLS Counter "penstock_requests_mtls_total" ["direction", "service", "backend", "route"]
        "Requests that went over mutual TLS.";
    RETRIES Counter "penstock_retries_total" ["direction", "service", "backend", "route"]
        "Tries after the first.";
    REQUEST_BYTES Counter "penstock_request_bytes_total" ["direction", "service", "backend", "route"]
        "Bytes of request bodies.";
    RESPONSE_BYTES Counter "penstock_response_bytes_total" ["direction", "service", "backend", "route"]
        "Bytes of response bodies.";
    MIRROR_REQUESTS Counter "penstock_mirror_requests_total" ["service", "mirror", "outcome"]
        "Copies of requests by what became of them: answered, failed (by a failure, or not at all), dropped (no room; the request itself went on) or abandoned (the original broke off).";
    MIRROR_COMPARED Counter "penstock_mirror_compared_total" ["service", "mirror", "result"]
        "Answers to copies that were held against those that clients got: agreed or differed.";
    CONNECTIONS_ACCEPTED Counter "penstock_connections_accepted_total" ["listener"]
        "Connections that clients made.";
    CONNECTIONS_REFUSED Counter "penstock_connections_refused_total" ["listener", "limit"]
        "Connections above a limit, which were closed: all, those of one peer (both answered 503), or handshakes of one peer.";
    HANDSHAKE_FAILURES Counter "penstock_handshake_failures_total" ["listener"]
        "TLS handshakes that failed: no certificate, an unknown one, an expired one, or too slow.";
    MALFORMED Counter "penstock_malformed_requests_total" ["listener"]
        "Connections that were closed because what came in was not HTTP, or too large, or too slow.";
    FLOODS Counter "penstock_http2_floods_total" ["listener", "kind"]
        "HTTP/2 connections that were closed (GOAWAY, ENHANCE_YOUR_CALM) for a flood: idle-frames (PING, SETTINGS, PRIORITY, empty and unknown frames) or resets.";
    MEMORY Gauge "penstock_memory_bytes" []
        "Resident memory of the proxy, where it may have no more than so much (--max-memory).";
    EARLY Counter "penstock_early_connections_total" ["listener"]
        "Connections that were held because the proxy was not ready yet.";
    DETECT_TIMEOUTS Counter "penstock_detect_timeouts_total" []
        "Connections whose protocol nobody declared and whose first bytes came too late to tell.";
    ACCESS Counter "penstock_access_refusals_total" ["policy", "verdict"]
        "Requests and connections that access policies denied, or would deny if an Audit were in force; by the policy, the first where none allows it.";
    RATE_LIMITED Counter "penstock_rate_limited_total" ["policy", "limit"]
        "Requests that were refused by a limit of a RateLimit.";
    RATE_TOKENS Counter "penstock_rate_tokens_total" ["policy", "limit"]
        "Tokens that answers used, by each limit of tokens that counted them.";
    CERTIFICATE_EXPIRY Gauge "penstock_certificate_expiry_seconds" []
        "When the certificate in use ends, seconds since the epoch.";
    CERTIFICATE_RENEWALS Counter "penstock_certificate_renewals_total" ["result"]
        "Certificates asked for, by result: ok, failed, or clocks (what came does not come into force now: control's clock and this machine's disagree).";
    CONTROL_CONNECTED Gauge "penstock_control_connected" ["stream"]
        "1 while the stream to control is open: xds (configuration) or fleet (outcomes and questions).";
    CONTROL_CONNECTS Counter "penstock_control_connects_total" ["stream", "result"]
        "Attempts to open a stream to control, by result: ok or failed.";
    RESOURCES Gauge "penstock_resources" ["kind"]
        "Resources of each kind that the proxy holds, as it acknowledged them.";
    RESPONSES Counter "penstock_configuration_responses_total" ["kind", "answer"]
        "Responses from control, by our answer: ack or nack.";
    SIGNAL_SOURCE_UP Gauge "penstock_signal_source_up" ["source"]
        "1 while a source of signals can be read: server (the model server's metrics page), nvml or dcgm.";
    BALANCE_PICKS Counter "penstock_balance_picks_total" ["service"]
        "Endpoints picked.";
    BALANCE_INFORMED Counter "penstock_balance_informed_total" ["service"]
        "Picks with a load report of the winner at hand.";
    BALANCE_AGE Counter "penstock_balance_report_age_seconds_total" ["service"]
        "Staleness: the ages of those reports, added up; divided by the informed picks it is their mean age.";
    BALANCE_EXPLORED Counter "penstock_balance_explored_total" ["service"]
        "Picks of an endpoint only because it had not been asked lately.";
    BALANCE_REGRETTED Counter "penstock_balance_regretted_total" ["service"]
        "Requests that took longer than was predicted for the second best endpoint.";
    BALANCE_REGRET Counter "penstock_balance_regret_seconds_total" ["service"]
        "Regret: by how much those took longer, added up.";
    BALANCE_HERDED Counter "penstock_balance_herded_total" ["service"]
        "Herd: reports by which the requests of others at an endpoint had more than doubled since the one before, on which picks stood.";
    PROBES Counter "penstock_probes_total" ["result"]
        "Questions for the load of an endpoint that a choice knew too little of, by result: ok or failed.";
    REPORT_STREAMS Gauge "penstock_report_streams" []
        "Clients that are told the load out of band (gRFC A51) now.";
    EXECUTIONS Counter "penstock_executions_total" []
        "Executions that the model server was asked for on behalf of requests that may share them; what was answered without is saved.";
    EXECUTIONS_PLACED Counter "penstock_executions_placed_total" []
        "Executions whose tensors were handed over in shared memory.";
    LANE_REQUESTS Counter "penstock_lane_requests_total" []
        "Requests to other sidecars that went over a connection of their own, since their bodies are large.";
    RECEIVED_IN_PLACE Counter "penstock_received_in_place_total" []
        "Requests whose tensors were read from their connection straight into the memory that the model server reads.";
    BATCHES Counter "penstock_batches_total" ["closed"]
        "Batches by why they were sent: idle (the server had room), full, delay or deadline.";
    BATCH_MEMBERS Counter "penstock_batch_members_total" []
        "Requests in them.";
    BATCH_ROWS Counter "penstock_batch_rows_total" []
        "Rows in them.";
    BATCH_WAIT Gauge "penstock_batch_wait_seconds" []
        "How long the first request of each waited, added up since the start; its rate over that of penstock_batches_total is the mean.";
    BATCH_BISECTIONS Counter "penstock_batch_bisections_total" []
        "Batches that were cut in half because the model refused them, to find out whose fault it was.";
    BATCH_CANCELLED Counter "penstock_batch_cancelled_total" []
        "Batches that were stopped because everybody who waited for them had left.";
    COALESCED Counter "penstock_coalesced_total" ["result"]
        "Requests on ports that coalesce: hit (answered from the cache), coalesced (by one in flight that was the same) or miss.";
    COALESCE_PASSED Counter "penstock_coalesce_passed_total" []
        "Requests that could not be shared and passed as they came: not understood, too large, too slow, or too much was held already.";
    COALESCE_HELD Gauge "penstock_coalesce_held_bytes" []
        "Bodies of requests that are held while they share, bytes.";
    COALESCE_FLIGHTS Gauge "penstock_coalesce_flights" []
        "Requests in flight on ports with single flight that others may join.";
    BATCH_WAITING Gauge "penstock_batch_waiting" []
        "Requests that wait for an execution.";
    BATCHES_IN_FLIGHT Gauge "penstock_batches_in_flight" []
        "Batches that are being executed.";
    PREPARED Counter "penstock_prepared_total" ["result"]
        "Rows of inputs that were prepared: done, refused (no such image, or above a limit) or abandoned (nobody waited any more).";
    PREPARE_BUSY Gauge "penstock_prepare_busy_seconds" []
        "How long threads prepared, added up since the start.";
    PREPARE_WAITING Gauge "penstock_prepare_waiting" []
        "Rows that wait for a thread to prepare them.";
    ARENA_BYTES Gauge "penstock_arena_bytes" ["state"]
        "Shared memory for tensors that is not free: used, or quarantined (a server was handed it and never answered).";
    ARENA_REFUSED Counter "penstock_arena_refused_total" []
        "Batches that went as bytes because the arena was full.";
    EXECUTIONS_GPU Counter "penstock_executions_gpu_total" []
        "Executions whose inputs were handed over in memory of the GPU (CUDA IPC).";
    PREPARED_GPU Counter "penstock_prepared_gpu_total" []
        "Rows of inputs that a kernel on the GPU made.";
    DECODED_GPU Counter "penstock_decoded_gpu_total" []
        "Those of them that nvJPEG decoded; the others were decoded on the CPU.";
    REFUSED_GPU Counter "penstock_refused_gpu_total" []
        "JPEGs that were left to nvJPEG and that the CPU decoded, or refused, since nvJPEG did not take them.";
    NVJPEG_STATES Gauge "penstock_nvjpeg_states" []
        "Decoders of nvJPEG that have memory of the GPU and pinned memory: at most 8.";
    NVJPEG_PIXELS Gauge "penstock_nvjpeg_pixels" []
        "Pixels of the largest picture that each of them has seen, added up: its memory grows with them.";
    GPU_ARENA_BYTES Gauge "penstock_gpu_arena_bytes" ["state"]
        "Memory of the GPU for tensors that is not free: used, or quarantined (a server was handed it and never answered).";
    GPU_FAILURES Counter "penstock_gpu_failures_total" []
        "Executions that were to go through memory of the GPU and went another way: the log says why.";
    LOG_DROPPED Counter "penstock_log_dropped_total" []
        "Access log lines that were dropped because standard output was too slow.";
    TAP_DROPPED Counter "penstock_tap_dropped_total" []
        "Tap events that were dropped: above the rate that was asked for, or control was too slow.";
    BUILD_INFO Gauge "penstock_build_info" ["version"]
        "1; the label says which build runs.";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_of_one_family_and_counters_say_total() {
        let mut names: Vec<_> = ALL.iter().map(|metric| metric.name).collect();
        for metric in ALL {
            assert!(metric.name.starts_with("penstock_"), "{}", metric.name);
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"), "{}", metric.name);
            assert!(metric.help.ends_with('.'), "{}", metric.name);
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
