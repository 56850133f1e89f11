//! Envoy's bootstrap: one listener, one route, one cluster; SPIFFE ids are checked as Penstock checks them.

use super::{Next, Role};
use crate::certificates::spiffe;
use crate::load::Protocol;

const TYPES: &str = "type.googleapis.com/envoy.extensions";

pub(super) fn config(role: &Role<'_>) -> String {
    let downstream = role.admits.map(|leaf| {
        format!(
            "
      transport_socket:
        name: envoy.transport_sockets.tls
        typed_config:
          \"@type\": {TYPES}.transport_sockets.tls.v3.DownstreamTlsContext
          require_client_certificate: true
          common_tls_context: {}",
            tls(role, leaf, "h2, http/1.1"),
        )
    });
    let upstream = match role.next {
        Next::Upstream { .. } => None,
        Next::Proxy { leaf, .. } => Some(format!(
            "
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        \"@type\": {TYPES}.transport_sockets.tls.v3.UpstreamTlsContext
        sni: localhost
        common_tls_context: {}",
            tls(role, leaf, "h2"),
        )),
    };
    let h1 = matches!(role.next, Next::Upstream { speak: Protocol::H1, .. });
    let speak = if h1 { "http_protocol_options" } else { "http2_protocol_options" };
    format!(
        "static_resources:
  listeners:
  - name: front
    address: {{socket_address: {{address: 127.0.0.1, port_value: {listen}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": {TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: front
          generate_request_id: false
          route_config:
            virtual_hosts:
            - {{name: all, domains: [\"*\"], routes: [{{match: {{prefix: /}}, route: {{cluster: next, timeout: 0s}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{\"@type\": {TYPES}.filters.http.router.v3.Router}}{downstream}
  clusters:
  - name: next
    type: STATIC
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        \"@type\": {TYPES}.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config: {{{speak}: {{}}}}
    load_assignment:
      cluster_name: next
      endpoints:
      - lb_endpoints:
        - endpoint: {{address: {{socket_address: {{address: {ip}, port_value: {next}}}}}}}{upstream}
",
        listen = role.listen.port(),
        ip = role.next().ip(),
        next = role.next().port(),
        downstream = downstream.unwrap_or_default(),
        upstream = upstream.unwrap_or_default(),
    )
}

fn tls(role: &Role<'_>, peer: &str, alpn: &str) -> String {
    format!(
        "{{alpn_protocols: [{alpn}], tls_params: {{tls_minimum_protocol_version: TLSv1_3, \
         tls_maximum_protocol_version: TLSv1_3}}, tls_certificates: [{{certificate_chain: {{filename: {}}}, \
         private_key: {{filename: {}}}}}], validation_context: {{trusted_ca: {{filename: {}}}, \
         match_typed_subject_alt_names: [{{san_type: URI, matcher: {{exact: \"{}\"}}}}]}}}}",
        role.pem(&format!("{}.pem", role.name)),
        role.pem(&format!("{}.key", role.name)),
        role.pem("ca.pem"),
        spiffe(peer),
    )
}
