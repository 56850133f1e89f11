//! The peers: how each is configured and started. All go straight to the replicas, without a sidecar's hop, but for Envoy's
//! weighted round robin, which needs the load reports of our inbound sidecars.
//!
//! Policies have their published defaults, but for one: Envoy's weighted round robin ignores the first ten seconds of an
//! endpoint's reports, and a run lasts four.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};

use super::fleet;
use super::subject::Router;
use crate::process::{self, Process};
use crate::subject::Programs;

const TYPES: &str = "type.googleapis.com/envoy.extensions";
/// Instead of ten seconds.
const BLACKOUT: &str = "1s";

/// A started peer and where it listens.
pub(crate) type Started = (Process, SocketAddr);

/// The port of every peer, and the one after it if it has two; each has an address of its own.
const PORT: u16 = 8080;
/// The last bytes of their addresses.
const HAPROXY: u8 = 51;
const NGINX: u8 = 52;
const FIRST_ROUTER: u8 = 61;
const FIRST_ENVOY: u8 = 71;

fn at(last: u8, port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(fleet::ip(last)), port)
}

/// One Envoy with two listeners: least request straight to `replicas`, and weighted round robin over `reporting`.
pub(crate) fn envoy(
    number: u8,
    replicas: &[SocketAddr],
    reporting: &[SocketAddr],
    programs: &Programs,
    dir: &Path,
) -> Result<(Process, SocketAddr, SocketAddr)> {
    let (least, weighted) = (at(FIRST_ENVOY + number, PORT), at(FIRST_ENVOY + number, PORT + 1));
    let name = format!("envoy-{number}");
    let file = dir.join(format!("{name}.yaml"));
    write(&file, &envoy_config(least, weighted, replicas, reporting))?;
    let mut args: Vec<OsString> =
        ["--concurrency", "1", "--disable-hot-restart", "--log-level", "error", "-c"].map(Into::into).into();
    args.push(file.into());
    Ok((process::spawn(None, &name, &programs.envoy, &args, dir, false)?, least, weighted))
}

fn envoy_config(
    least: SocketAddr,
    weighted: SocketAddr,
    replicas: &[SocketAddr],
    reporting: &[SocketAddr],
) -> String {
    let mut yaml = String::from("static_resources:\n  listeners:\n");
    for (name, address) in [("least", least), ("weighted", weighted)] {
        let _ = write!(
            yaml,
            "  - name: {name}
    address: {{socket_address: {{address: {ip}, port_value: {port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          \"@type\": {TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: {name}
          generate_request_id: false
          route_config:
            virtual_hosts:
            - {{name: all, domains: [\"*\"], routes: [{{match: {{prefix: /}}, route: {{cluster: {name}, timeout: 0s}}}}]}}
          http_filters:
          - name: envoy.filters.http.router
            typed_config: {{\"@type\": {TYPES}.filters.http.router.v3.Router}}
",
            ip = address.ip(),
            port = address.port()
        );
    }
    let policies = [
        ("least", replicas, "least_request", "LeastRequest", String::new()),
        (
            "weighted",
            reporting,
            "client_side_weighted_round_robin",
            "ClientSideWeightedRoundRobin",
            format!("\n          blackout_period: {BLACKOUT}"),
        ),
    ];
    yaml.push_str("  clusters:\n");
    for (name, endpoints, policy, message, settings) in policies {
        let _ = write!(
            yaml,
            "  - name: {name}
    type: STATIC
    load_balancing_policy:
      policies:
      - typed_extension_config:
          name: envoy.load_balancing_policies.{policy}
          typed_config:
            \"@type\": {TYPES}.load_balancing_policies.{policy}.v3.{message}{}
    load_assignment:
      cluster_name: {name}
      endpoints:
      - lb_endpoints:
",
            settings.replace("\n          ", "\n            ")
        );
        for address in endpoints {
            let _ = writeln!(
                yaml,
                "        - endpoint: {{address: {{socket_address: {{address: {}, port_value: {}}}}}}}",
                address.ip(),
                address.port()
            );
        }
    }
    yaml
}

/// One HAProxy for all clients.
pub(crate) fn haproxy(replicas: &[SocketAddr], programs: &Programs, dir: &Path) -> Result<Started> {
    let front = at(HAPROXY, PORT);
    let mut servers = String::new();
    for (at, address) in replicas.iter().enumerate() {
        let _ = writeln!(servers, "    server sim-{at} {address}");
    }
    let file = dir.join("haproxy.cfg");
    let config = format!(
        "global
    nbthread 1
    maxconn 8192
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    http-reuse always
    # Without it HAProxy holds back the first events of a stream for up to 200 ms.
    option http-no-delay
frontend front
    bind {front}
    default_backend replicas
backend replicas
    balance leastconn
{servers}"
    );
    write(&file, &config)?;
    let args = ["-db".into(), "-f".into(), file.into()];
    Ok((process::spawn(None, "haproxy", &programs.haproxy, &args, dir, false)?, front))
}

/// One nginx for all clients; one worker, so that it counts all connections.
pub(crate) fn nginx(replicas: &[SocketAddr], programs: &Programs, dir: &Path) -> Result<Started> {
    let front = at(NGINX, PORT);
    let servers: String = replicas.iter().map(|address| format!("server {address}; ")).collect();
    let spool = dir.join("nginx.spool").display().to_string();
    let pid = dir.join("nginx.pid").display().to_string();
    // The worker must be able to read the folder of the bench, whoever runs it.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    let file = dir.join("nginx.conf");
    let config = format!(
        "{user}
daemon off;
worker_processes 1;
pid {pid};
error_log stderr error;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {spool}.body; proxy_temp_path {spool}.proxy; fastcgi_temp_path {spool}.fastcgi;
    uwsgi_temp_path {spool}.uwsgi; scgi_temp_path {spool}.scgi;
    keepalive_requests 1000000000;
    upstream replicas {{ least_conn; {servers} keepalive 256; keepalive_requests 1000000000; }}
    server {{
        listen {front};
        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1; proxy_set_header Connection \"\";
            proxy_buffering off; proxy_next_upstream off;
        }}
    }}
}}
"
    );
    write(&file, &config)?;
    let args = ["-c".into(), file.into()];
    Ok((process::spawn(None, "nginx", &programs.nginx, &args, dir, false)?, front))
}

/// One router from PyPI for all clients, the `number`th of them.
pub(crate) fn router(
    number: u8,
    router: Router,
    replicas: &[SocketAddr],
    python: &Path,
    dir: &Path,
) -> Result<Started> {
    let (front, metrics) = (at(FIRST_ROUTER + number, PORT), at(FIRST_ROUTER + number, PORT + 1));
    let mut args: Vec<OsString> = vec!["-m".into(), format!("{}.launch_router", router.module).into()];
    for (name, value) in [
        ("--host", front.ip().to_string()),
        ("--port", front.port().to_string()),
        ("--prometheus-host", metrics.ip().to_string()),
        ("--prometheus-port", metrics.port().to_string()),
        ("--policy", router.policy.to_owned()),
        ("--log-level", router.quiet.to_owned()),
    ] {
        args.extend([name.into(), value.into()]);
    }
    args.push("--worker-urls".into());
    args.extend(replicas.iter().map(|address| format!("http://{address}").into()));
    let name = format!("{}-{}", router.module, router.policy);
    Ok((process::spawn(None, &name, python, &args, dir, false)?, front))
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("{}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envoy_sends_the_weighted_to_those_who_report() {
        let (replica, reporting) = ("127.9.9.1:8000".parse().unwrap(), "127.9.9.1:15006".parse().unwrap());
        let yaml = envoy_config(at(71, 1), at(71, 2), &[replica], &[reporting]);
        let (least, weighted) = yaml.split_once("- name: weighted\n    type: STATIC").unwrap();
        assert!(least.contains("LeastRequest") && least.contains("port_value: 8000"), "{yaml}");
        assert!(weighted.contains("blackout_period: 1s") && weighted.contains("port_value: 15006"), "{yaml}");
    }
}
