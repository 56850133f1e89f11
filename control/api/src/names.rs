//! Ports, headers, annotations: the names that last.

/// The namespace of control.
pub const SYSTEM_NAMESPACE: &str = "penstock-system";

/// Ports that the sidecar and control listen on by default.
pub mod port {
    /// Outbound traffic of the application.
    pub const OUTBOUND: u16 = 15001;
    /// Inbound traffic to the application.
    pub const INBOUND: u16 = 15006;
    /// Admin pages, loopback only.
    pub const ADMIN: u16 = 15000;
    /// Health and metrics, for the kubelet and Prometheus.
    pub const HEALTH: u16 = 15020;
    /// Control: xDS, identity and fleet.
    pub const CONTROL: u16 = 15010;
    /// Control: dashboard and API.
    pub const CONTROL_API: u16 = 8080;
}

/// Header names. All of them are stripped from what strangers send.
pub mod header {
    /// On a response that a proxy made itself: the [`Reason`](crate::Reason).
    pub const ERROR: &str = "penstock-error";
    /// On such a response: the request has provably not reached the application, so it can go to another.
    pub const UNTOUCHED: &str = "penstock-untouched";
    /// Between sidecars, on HTTP/2: the version that the application spoke, `HTTP/1.1` or `HTTP/1.0`, so that
    /// the far sidecar speaks the same to the server.
    pub const PROTOCOL: &str = "penstock-protocol";
    /// Between sidecars, on a response: `draining` when the endpoint wants no new requests.
    pub const ENDPOINT: &str = "penstock-endpoint";
    /// Set by the inbound proxy for the application: the verified SPIFFE id of the caller.
    pub const CLIENT_ID: &str = "penstock-client-id";
    /// Between sidecars: asks for the load of the model of that name; the application does not see it.
    pub const PROBE: &str = "penstock-probe";
    /// Between sidecars, on a response: hashes of the models and adapters that the application has loaded, if it is vLLM.
    pub const MODELS: &str = "penstock-models";
    /// Set by a client: the session (a conversation, a user) whose requests should stay where their state is.
    pub const SESSION: &str = "penstock-session";
    /// Set by a client: how urgent its request is, `high`, `normal` or `low`.
    pub const PRIORITY: &str = "penstock-priority";
    /// Set by a client: how long it goes on waiting, `250ms`, `2s`; a bare number is seconds.
    pub const REQUEST_TIMEOUT: &str = "x-request-timeout";
    /// Set by a client: `off` has its request executed alone, `show` asks for the header on the response, which says in
    /// which execution of how many rows it was answered, `17;rows=32`.
    pub const BATCH: &str = "penstock-batch";
    /// Set by a client: `off` has its request executed even if there is an answer. On a response: `hit`, `miss` or
    /// `coalesced`.
    pub const CACHE: &str = "penstock-cache";
    /// Set by the inbound proxy for the application, where its pod asks for it: who calls, as Envoy says it.
    pub const FORWARDED_CLIENT_CERT: &str = "x-forwarded-client-cert";
    /// The same by its other name, which is taken from nobody.
    pub const FORWARDED_CLIENT_CERT_ALIAS: &str = "forwarded-client-cert";
    /// ORCA load report, text.
    pub const LOAD_REPORT: &str = "endpoint-load-metrics";
    /// ORCA load report, serialised, as a gRPC trailer or an HTTP header.
    pub const LOAD_REPORT_BIN: &str = "endpoint-load-metrics-bin";
    /// A request that carries it wants to see the load report itself.
    pub const LOAD_REPORT_FORMAT: &str = "endpoint-load-metrics-format";
}

/// What all headers of ours begin with.
pub const HEADER_PREFIX: &str = "penstock-";
/// Those of them that a client may set.
pub const ASKED: [&str; 4] = [header::SESSION, header::PRIORITY, header::BATCH, header::CACHE];

/// Labels and annotations on Kubernetes objects.
pub mod annotation {
    /// Pod and namespace: `enabled` or `disabled`.
    pub const INJECT: &str = "penstock.io/inject";
    /// Service: `resnet-v1=90,resnet-v2=10`.
    pub const TRAFFIC_SPLIT: &str = "penstock.io/traffic-split";
    /// Service: `gpu`, `prefix`, `least-request`, `round-robin`, `ring-hash` or `orca-wrr`; further
    /// `gpu,choices=4,explore=2%,hot=90%`, `prefix,choices=4,explore=2%`, `ring-hash,bound=1.5`.
    pub const BALANCE: &str = "penstock.io/balance";
    /// Service: `header:<name>` or `cookie:<name>`; one user stays on one version.
    pub const STICKY: &str = "penstock.io/sticky";
    /// Service: `connect=1s,request=30s,per-try=10s,idle=5m`.
    pub const TIMEOUT: &str = "penstock.io/timeout";
    /// Service: `attempts=2,on=503+429,budget=20%,buffer=64Ki`.
    pub const RETRY: &str = "penstock.io/retry";
    /// Service: `failures=5,base=1s,max=60s,ejected=50%`.
    pub const OUTLIER: &str = "penstock.io/outlier";
    /// Service: `connections=1024,pending=1024,requests=4096`.
    pub const LIMITS: &str = "penstock.io/limits";
    /// Pod: `strict` or `permissive`.
    pub const MTLS: &str = "penstock.io/mtls";
    /// Pod: ports whose bytes are not looked at, `3306,6379`.
    pub const OPAQUE_PORTS: &str = "penstock.io/opaque-ports";
    /// Pod: how many requests of one model the application gets at once and how many wait for it,
    /// `limit=8,queue=256` or `limit=adaptive,queue=256`.
    pub const ADMISSION: &str = "penstock.io/admission";
    /// Pod: `true` has its application told who calls in `x-forwarded-client-cert`.
    pub const FORWARD_IDENTITY: &str = "penstock.io/forward-identity";
    /// Pod, whose containers share a GPU: `ipc` has tensors handed to the model server in memory of that GPU, where this
    /// measures faster; further `ipc,nvjpeg,always,memory=256Mi,device=0`: `nvjpeg` has JPEGs decoded by that library on the
    /// GPU, to pixels that differ a little from the CPU's.
    pub const GPU: &str = "penstock.io/gpu";
    /// Pod: so many callers at most get a region of shared memory of their own, and share no execution with others, `4`.
    pub const TENANT_REGIONS: &str = "penstock.io/tenant-regions";
    /// Pod, where traffic is not redirected: the port its proxy listens on for the mesh.
    pub const INBOUND_PORT: &str = "penstock.io/inbound-port";
    /// Pod: ports of its application that are reached past the proxy, `9090,7000-7100`; `penstock-proxy init
    /// --skip-inbound-ports`.
    pub const SKIP_INBOUND_PORTS: &str = "penstock.io/skip-inbound-ports";
    /// Pod: ports that its application reaches past the proxy, `25,587`; `penstock-proxy init --skip-outbound-ports`.
    pub const SKIP_OUTBOUND_PORTS: &str = "penstock.io/skip-outbound-ports";
    /// Pod: subnets that its application reaches past the proxy, `169.254.0.0/16,fd00::/8`; `penstock-proxy init
    /// --skip-subnets`.
    pub const SKIP_SUBNETS: &str = "penstock.io/skip-subnets";
    /// Pod: the CPU that its injected proxy asks for, without a limit, `250m`.
    pub const PROXY_CPU: &str = "penstock.io/proxy-cpu";
    /// Pod: the memory that its injected proxy asks for and is limited to, `512Mi`.
    pub const PROXY_MEMORY: &str = "penstock.io/proxy-memory";
    /// Canary, written by `penstock canary promote`: `<run>/<anything>` lets the step go that it is at.
    pub const PROMOTE: &str = "penstock.io/promote";
    /// Canary, written by `penstock canary abort`: `<run>/<anything>` has it go back.
    pub const ABORT: &str = "penstock.io/abort";
    /// Pod, written by the injector: the version that injected it.
    pub const INJECTED_BY: &str = "penstock.io/injected-by";
    /// Pod, written by the injector: what `penstock uninject` has to undo besides what it finds by name.
    pub const INJECTED_CHANGES: &str = "penstock.io/injected-changes";
    /// Service: `max=32,delay=2ms`; further `bytes=64Mi,elements=65536,concurrent=2,target=50ms`.
    pub const BATCH: &str = "penstock.io/batch";
    /// Service: `single-flight,cache=256Mi/30s`; further `outbound,shared,deterministic,headers=accept-language+x-tone`.
    pub const COALESCE: &str = "penstock.io/coalesce";
}

/// Label of pods that carry an injected proxy: `"true"`.
pub const INJECTED_LABEL: &str = "penstock.io/injected";

/// The readiness gate of pods of a Deployment that has a Canary: as long as its condition is not true, Kubernetes takes the pod for not ready.
pub const PROMOTED: &str = "penstock.io/promoted";

/// ALPN between sidecars: HTTP/2 that follows Penstock's own rules (upgraded HTTP/1, load reports).
pub const ALPN_MESH_H2: &[u8] = b"penstock-h2";
/// ALPN between sidecars: HTTP/1.1, one exchange, for Upgrade.
pub const ALPN_MESH_H1: &[u8] = b"penstock-h1";
/// ALPN between sidecars: bytes.
pub const ALPN_MESH_TCP: &[u8] = b"penstock-tcp";

/// The name that the outbound proxy sends as SNI: which port of the pod it wants, for an inbound listener that
/// traffic was not redirected to. Never a credential: the port must be one that the workload declares.
pub fn port_sni(port: u16) -> String {
    format!("port-{port}.mesh.penstock.io")
}

/// Reads what [`port_sni`] wrote.
pub fn port_of_sni(sni: &str) -> Option<u16> {
    sni.strip_prefix("port-")?.strip_suffix(".mesh.penstock.io")?.parse().ok()
}

/// The user id that the proxy runs as; redirect rules skip it.
pub const PROXY_UID: u32 = 2102;

/// The trust domain unless told otherwise.
pub const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_survives_the_way_through_sni() {
        assert_eq!(port_of_sni(&port_sni(8000)), Some(8000));
        assert_eq!(port_of_sni("port-70000.mesh.penstock.io"), None);
        assert_eq!(port_of_sni("example.com"), None);
    }
}
