//! Applications outside of the mesh, which beds here put behind Services: objects in a directory, and the shortest answers.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use penstock_api::names::annotation;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::mesh::sidecars::{NAMESPACE, Pod};

/// Answers whatever is asked without a body by `ok`, and by the status that `status` says.
pub(super) async fn answer(server: TcpListener, status: impl Fn() -> &'static str + Send + Sync + 'static) {
    let mut connections = JoinSet::new();
    let status = Arc::new(status);
    while let Ok((stream, _)) = server.accept().await {
        connections.spawn(converse(stream, status.clone()));
    }
}

async fn converse(
    mut stream: TcpStream,
    status: Arc<impl Fn() -> &'static str + Send + Sync>,
) -> std::io::Result<()> {
    let (mut buffer, mut filled) = ([0; 4096], 0);
    loop {
        if filled == buffer.len() {
            return Err(std::io::Error::other("a head of that size is none of ours"));
        }
        let read = stream.read(&mut buffer[filled..]).await?;
        if read == 0 {
            return Ok(());
        }
        filled += read;
        if buffer[..filled].ends_with(b"\r\n\r\n") {
            filled = 0;
            let answer = format!("HTTP/1.1 {}\r\ncontent-length: 2\r\n\r\nok", status());
            stream.write_all(answer.as_bytes()).await?;
        }
    }
}

/// A client's pod, which has a sidecar.
pub(super) fn client(pod: &Pod) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {}, namespace: {NAMESPACE}, annotations: {{{}: enabled}}}}
spec: {{serviceAccountName: {}, containers: [{{name: app}}]}}
status: {{phase: Running, podIP: {}}}
",
        pod.name,
        annotation::INJECT,
        pod.account,
        pod.ip
    )
}

/// A Service, whose port 80 leads to `port` of its pods.
pub(super) fn service(name: &str, port: u16) -> String {
    format!(
        "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec: {{ports: [{{name: http, port: 80, targetPort: {port}, appProtocol: http}}]}}
"
    )
}

/// A Service and its only pod, which has no sidecar.
pub(super) fn served(name: &str, at: SocketAddr) -> String {
    let (ip, port) = (at.ip(), at.port());
    let mut yaml = service(name, port);
    // A String takes whatever is written.
    let _ = write!(
        yaml,
        "---
apiVersion: v1
kind: Pod
metadata: {{name: {name}-0, namespace: {NAMESPACE}}}
spec: {{serviceAccountName: server, containers: [{{name: app, ports: [{{name: http, containerPort: {port}}}]}}]}}
status: {{phase: Running, podIP: {ip}}}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-a, namespace: {NAMESPACE}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{name: http, port: {port}, protocol: TCP}}]
endpoints:
- {{addresses: [{ip}], conditions: {{ready: true}}, targetRef: {{kind: Pod, name: {name}-0, namespace: {NAMESPACE}}}}}
"
    );
    yaml
}
