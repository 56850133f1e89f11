//! nginx's configuration: one worker, bodies streamed, connections kept. It speaks h2 to an upstream only as gRPC
//! (`grpc_pass`), and its hop between two proxies is therefore mutual TLS with HTTP/1.1.

use super::{Next, Role};
use crate::load::Protocol;

const TLS: &str = "ssl_protocols TLSv1.3; ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;";

pub(super) fn config(role: &Role<'_>) -> String {
    let own = role.pem(&format!("{}.pem", role.name));
    let key = role.pem(&format!("{}.key", role.name));
    let anchors = role.pem("ca.pem");
    let h2 = if role.client == Protocol::H2 { " http2" } else { "" };
    let listen = match role.admits {
        None => format!("listen 127.0.0.1:{}{h2};", role.listen.port()),
        Some(_) => format!(
            "listen 127.0.0.1:{} ssl{h2}; {TLS}
        ssl_certificate {own}; ssl_certificate_key {key};
        ssl_client_certificate {anchors}; ssl_verify_client on;",
            role.listen.port()
        ),
    };
    let pass = match role.next {
        Next::Upstream { speak: Protocol::H1, .. } => "proxy_pass http://next;".to_owned(),
        Next::Upstream { speak: Protocol::H2, .. } => "grpc_pass grpc://next;".to_owned(),
        Next::Proxy { .. } => format!(
            "proxy_pass https://next;
            proxy_ssl_protocols TLSv1.3; proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;
            proxy_ssl_certificate {own}; proxy_ssl_certificate_key {key};
            proxy_ssl_trusted_certificate {anchors}; proxy_ssl_verify on; proxy_ssl_name localhost;
            proxy_ssl_server_name on;"
        ),
    };
    let pid = role.file("nginx.pid").display().to_string();
    let spool = role.file("nginx.spool").display().to_string();
    // The worker must be able to read the folder of the bench, whoever runs it.
    let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
    format!(
        "{user}
daemon off;
worker_processes 1;
pid {pid};
error_log stderr error;
events {{ worker_connections {clients}; }}
http {{
    access_log off;
    client_body_temp_path {spool}.body; proxy_temp_path {spool}.proxy; fastcgi_temp_path {spool}.fastcgi;
    uwsgi_temp_path {spool}.uwsgi; scgi_temp_path {spool}.scgi;
    client_max_body_size 0; client_body_buffer_size 128k;
    keepalive_requests 1000000000;
    upstream next {{ server {next}; keepalive 256; keepalive_requests 1000000000; }}
    server {{
        {listen}
        location / {{
            {pass}
            proxy_http_version 1.1; proxy_set_header Connection \"\";
            proxy_request_buffering off; proxy_buffering off;
        }}
    }}
}}
",
        clients = role.clients,
        next = role.next(),
    )
}
