//! HAProxy's configuration: one thread, its defaults for buffers and windows, connections to the next hop shared.

use super::{Next, Role};
use crate::load::Protocol;

const TLS: &str = "ssl-min-ver TLSv1.3 ciphersuites TLS_AES_128_GCM_SHA256";

pub(super) fn config(role: &Role<'_>) -> String {
    let own = role.pem(&format!("{}.both.pem", role.name));
    let anchors = role.pem("ca.pem");
    let bind = match role.admits {
        None => String::new(),
        Some(_) => format!(" ssl crt {own} ca-file {anchors} verify required alpn h2,http/1.1 {TLS}"),
    };
    let server = match role.next {
        Next::Upstream { speak: Protocol::H1, .. } => String::new(),
        Next::Upstream { speak: Protocol::H2, .. } => " proto h2".to_owned(),
        Next::Proxy { .. } => format!(
            " ssl crt {own} ca-file {anchors} verify required verifyhost localhost sni str(localhost) alpn h2 {TLS}"
        ),
    };
    // splice-auto splices where HAProxy's own heuristics expect it to pay.
    let (mode, more) = match (role.bytes, role.trickles) {
        (true, _) => ("tcp", "option splice-auto"),
        (false, false) => ("http", "http-reuse always"),
        // Without it a stream's first pieces are held back for 200 ms.
        (false, true) => ("http", "http-reuse always\n    option http-no-delay"),
    };
    format!(
        "global
    nbthread 1
    maxconn {clients}
defaults
    mode {mode}
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    {more}
frontend front
    bind 127.0.0.1:{}{bind}
    default_backend next
backend next
    server next {}{server}
",
        role.listen.port(),
        role.next(),
        clients = role.clients,
    )
}
