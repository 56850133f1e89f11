//! Penstock's static file. Everything that a mesh needs stays on; there is no switch for the bench.

use super::{Next, Role};
use crate::certificates::spiffe;
use crate::load::Protocol;

pub(super) fn config(role: &Role<'_>) -> String {
    let identity = format!(
        "identity: {{certificate: \"{}\", key: \"{}\", anchors: \"{}\"}}\n",
        role.pem(&format!("{}.pem", role.name)),
        role.pem(&format!("{}.key", role.name)),
        role.pem("ca.pem"),
    );
    let secure = role.admits.is_some() || matches!(role.next, Next::Proxy { .. });
    let admits =
        role.admits.map(|leaf| format!(", tls: {{allow: [\"{}\"]}}", spiffe(leaf))).unwrap_or_default();
    let listens = if role.bytes { "tcp" } else { "http" };
    let speak = match role.next {
        Next::Upstream { .. } if role.bytes => "tcp".to_owned(),
        Next::Upstream { speak, .. } if speak == role.client => "same".to_owned(),
        Next::Upstream { speak: Protocol::H1, .. } => "http1".to_owned(),
        Next::Upstream { speak: Protocol::H2, .. } => "h2".to_owned(),
        Next::Proxy { leaf, .. } => format!("h2, tls: {{identity: \"{}\"}}", spiffe(leaf)),
    };
    format!(
        "workers: 1
access_log: off
{}listeners:
  - {{name: front, address: \"{}\", protocol: {listens}{admits}, upstream: next}}
upstreams:
  - {{name: next, endpoints: [\"{}\"], protocol: {speak}}}
",
        if secure { identity.as_str() } else { "" },
        role.listen,
        role.next(),
    )
}
