//! The static file: a proxy without a control plane. It compiles to the same types that pushed configuration does.
//!
//! ```yaml
//! workers: 1
//! admin: 127.0.0.1:15000
//! access_log: errors                 # off (default), errors, all
//! identity:                          # needed where tls is used; PEM files, a SPIFFE URI SAN in the certificate
//!   certificate: leaf.pem
//!   key: key.pem
//!   anchors: anchors.pem
//! listeners:
//!   - name: front
//!     address: 127.0.0.1:9000
//!     protocol: http                 # http (HTTP/1.1, and h2c by its preface) or tcp
//!     upstream: backend
//!   - name: mesh
//!     address: 127.0.0.1:9443
//!     protocol: http
//!     tls:                           # TLS 1.3, a client certificate is required
//!       allow: ["spiffe://cluster.local/ns/default/sa/client"]   # empty: any identity of the trust domain
//!     upstream: backend
//! upstreams:
//!   - name: backend
//!     endpoints: ["127.0.0.1:9001"]
//!     protocol: same                 # same (what the client spoke), http1, h2 or tcp
//!     tls:                           # presents our certificate, and expects this identity
//!       identity: "spiffe://cluster.local/ns/default/sa/server"
//! ```
//!
//! Paths are relative to the file. Between two proxies of static files (`tls` on both sides) the sidecar protocol is
//! spoken, as in the mesh.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use penstock_api::v1::Protocol;
use penstock_api::{ServiceName, SpiffeId};
use serde::Deserialize;

use super::{Cluster, Endpoint, Policy, Speak};
use crate::route::{Destination, alone};
use crate::telemetry::AccessLog;

/// What a static file says.
#[derive(Debug)]
pub struct StaticFile {
    /// Worker threads.
    pub workers: usize,
    /// Where the admin pages are.
    pub admin: Option<SocketAddr>,
    /// Which requests are logged.
    pub access_log: AccessLog,
    /// Certificate, key, anchors.
    pub identity: Option<[PathBuf; 3]>,
    /// What is listened on.
    pub listeners: Vec<Arc<Listener>>,
}

/// A listener and where it leads.
#[derive(Debug)]
pub struct Listener {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: SocketAddr,
    /// [`Protocol::Http`] or [`Protocol::Opaque`].
    pub protocol: Protocol,
    /// Identities that may use it; `None`: plaintext.
    pub tls: Option<Vec<SpiffeId>>,
    /// The upstream.
    pub destination: Destination,
}

impl Listener {
    /// Whether an identity may use it.
    pub fn allows(&self, client: &SpiffeId) -> bool {
        self.tls.as_ref().is_some_and(|allowed| allowed.is_empty() || allowed.contains(client))
    }
}

/// Why a static file is no good.
#[derive(Debug, thiserror::Error)]
pub enum StaticError {
    /// It cannot be read.
    #[error("cannot read {0}: {1}")]
    Read(PathBuf, std::io::Error),
    /// It is no YAML, or has fields that are not known.
    #[error("{0}: {1}")]
    Parse(PathBuf, String),
    /// It makes no sense.
    #[error("{0}: {1}")]
    Sense(PathBuf, String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default = "one")]
    workers: usize,
    admin: Option<SocketAddr>,
    #[serde(default)]
    access_log: AccessLog,
    identity: Option<IdentityFiles>,
    listeners: Vec<ListenerEntry>,
    upstreams: Vec<UpstreamEntry>,
}

fn one() -> usize {
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct IdentityFiles {
    certificate: PathBuf,
    key: PathBuf,
    anchors: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListenerEntry {
    name: String,
    address: SocketAddr,
    protocol: ListenerProtocol,
    tls: Option<Allow>,
    upstream: String,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ListenerProtocol {
    Http,
    Tcp,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Allow {
    #[serde(default)]
    allow: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpstreamEntry {
    name: String,
    endpoints: Vec<SocketAddr>,
    #[serde(default)]
    protocol: UpstreamProtocol,
    tls: Option<Expect>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum UpstreamProtocol {
    #[default]
    Same,
    Http1,
    H2,
    Tcp,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expect {
    identity: String,
}

/// Reads a static file.
pub fn read(path: &Path) -> Result<StaticFile, StaticError> {
    let text = std::fs::read_to_string(path).map_err(|error| StaticError::Read(path.to_owned(), error))?;
    let document: Document = serde_saphyr::from_str(&text)
        .map_err(|error| StaticError::Parse(path.to_owned(), error.to_string()))?;
    let base = path.parent().unwrap_or(Path::new("."));
    compile(document, base).map_err(|reason| StaticError::Sense(path.to_owned(), reason))
}

fn compile(document: Document, base: &Path) -> Result<StaticFile, String> {
    let identity = document
        .identity
        .as_ref()
        .map(|files| [&files.certificate, &files.key, &files.anchors].map(|file| base.join(file)));
    let mut listeners = Vec::new();
    for entry in &document.listeners {
        let upstream =
            document.upstreams.iter().find(|upstream| upstream.name == entry.upstream).ok_or_else(|| {
                let known: Vec<_> =
                    document.upstreams.iter().map(|upstream| upstream.name.as_str()).collect();
                format!(
                    "listener {}: there is no upstream {:?}; there is {}",
                    entry.name,
                    entry.upstream,
                    known.join(", ")
                )
            })?;
        if (entry.tls.is_some() || upstream.tls.is_some()) && identity.is_none() {
            return Err(format!("listener {} uses tls, so the file needs an identity", entry.name));
        }
        listeners.push(Arc::new(listener(entry, upstream)?));
    }
    if document.workers == 0 {
        return Err("workers: 0 serves nobody; write 1 or more".to_owned());
    }
    let Document { workers, admin, access_log, .. } = document;
    Ok(StaticFile { workers, admin, access_log, identity, listeners })
}

fn listener(entry: &ListenerEntry, upstream: &UpstreamEntry) -> Result<Listener, String> {
    let in_listener = |reason: String| format!("listener {}: {reason}", entry.name);
    let id = |text: &String| text.parse::<SpiffeId>().map_err(|error| error.to_string());
    let protocol = match (entry.protocol, upstream.protocol) {
        (ListenerProtocol::Http, UpstreamProtocol::Tcp) => {
            return Err(in_listener(format!("speaks http, but its upstream {} speaks tcp", upstream.name)));
        }
        (ListenerProtocol::Http, _) => Protocol::Http,
        (ListenerProtocol::Tcp, _) => Protocol::Opaque,
    };
    let tls = entry
        .tls
        .as_ref()
        .map(|tls| tls.allow.iter().map(id).collect::<Result<Vec<_>, _>>())
        .transpose()
        .map_err(in_listener)?;
    let expected = upstream.tls.as_ref().map(|tls| id(&tls.identity)).transpose().map_err(in_listener)?;
    let speak = match upstream.protocol {
        UpstreamProtocol::Same | UpstreamProtocol::Tcp => Speak::Same,
        UpstreamProtocol::Http1 => Speak::Http1,
        UpstreamProtocol::H2 => Speak::Http2,
    };
    let name = ServiceName::new("static", &upstream.name.to_ascii_lowercase())
        .map_err(|_| in_listener(format!("the upstream's name {:?} is not a DNS label", upstream.name)))?;
    let port = upstream
        .endpoints
        .first()
        .ok_or_else(|| in_listener(format!("the upstream {} has no endpoints", upstream.name)))?;
    let cluster = Cluster::new(name, port.port(), protocol, Policy::default());
    let endpoints = upstream.endpoints.iter().map(|address| {
        let sidecar = expected.is_some();
        let name = address.to_string().into();
        Arc::new(Endpoint::new(name, *address, address.port(), expected.clone(), sidecar, speak))
    });
    cluster.set_endpoints(endpoints.collect());
    Ok(Listener {
        name: entry.name.clone(),
        address: entry.address,
        protocol,
        tls,
        destination: alone(&Arc::new(cluster)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compiled(yaml: &str) -> Result<StaticFile, String> {
        let document = serde_saphyr::from_str(yaml).map_err(|error| error.to_string())?;
        compile(document, Path::new("/etc/penstock"))
    }

    const GOOD: &str = "
identity: {certificate: leaf.pem, key: key.pem, anchors: anchors.pem}
listeners:
  - {name: front, address: '127.0.0.1:9000', protocol: http, upstream: backend}
  - {name: mesh, address: '127.0.0.1:9443', protocol: http, tls: {}, upstream: backend}
upstreams:
  - {name: backend, endpoints: ['127.0.0.1:9001'], protocol: h2, tls: {identity: 'spiffe://a.b/ns/c/sa/d'}}
";

    #[test]
    fn a_file_compiles_to_what_is_pushed() {
        let file = compiled(GOOD).unwrap();
        assert_eq!(file.workers, 1);
        assert_eq!(file.identity.unwrap()[0], Path::new("/etc/penstock/leaf.pem"));
        let front = &file.listeners[0];
        assert!(front.tls.is_none());
        let endpoints = front.destination.service.ports[0].cluster.endpoints();
        assert_eq!(endpoints[0].identity.as_ref().unwrap().as_str(), "spiffe://a.b/ns/c/sa/d");
        assert!(file.listeners[1].allows(&"spiffe://a.b/ns/x/sa/y".parse().unwrap()));
    }

    #[test]
    fn what_makes_no_sense_says_what_to_do() {
        let bad = |from: &str, to: &str| compiled(&GOOD.replace(from, to)).unwrap_err();
        assert!(
            bad("upstream: backend}", "upstream: other}")
                .contains("there is no upstream \"other\"; there is backend")
        );
        assert!(bad("identity: {c", "unknown: {c").contains("unknown"));
        assert!(bad("protocol: h2", "protocol: tcp").contains("speaks tcp"));
        assert!(bad("['127.0.0.1:9001']", "[]").contains("has no endpoints"));
        assert!(bad("spiffe://a.b/ns/c/sa/d", "root").contains("not an identity"));
        let no_identity =
            GOOD.lines().filter(|line| !line.starts_with("identity")).collect::<Vec<_>>().join("\n");
        assert!(compiled(&no_identity).unwrap_err().contains("needs an identity"));
    }
}
