//! A control that the test plays: real TLS and gRPC, and everything that it says is said by the test.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use penstock_api::discovery::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use penstock_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use penstock_api::v1::fleet_server::{Fleet, FleetServer};
use penstock_api::v1::identity_server::{Identity, IdentityServer};
use penstock_api::v1::{ControlMessage, ProxyMessage, SignRequest, SignResponse};
use penstock_proxy::identity::control::Control;
use penstock_proxy::identity::sign::Signer;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tempfile::{NamedTempFile, TempPath};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

use crate::authority::{Authority, Leaf};

/// A stream that a proxy opened: what it says, and the way to answer. Dropping the way ends the stream in order.
pub(crate) struct Open<In, Out> {
    pub(crate) heard: Streaming<In>,
    pub(crate) say: mpsc::Sender<Result<Out, Status>>,
}

impl<In, Out> Open<In, Out> {
    /// The next message, within five seconds.
    pub(crate) async fn next(&mut self) -> In {
        within(self.heard.message()).await.unwrap().expect("the proxy ended the stream")
    }
}

/// Five seconds are an age between two processes of one machine.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(5), future).await.expect("nothing happened for five seconds")
}

pub(crate) type Push = Open<DeltaDiscoveryRequest, DeltaDiscoveryResponse>;
pub(crate) type Attach = Open<ProxyMessage, ControlMessage>;

struct Services {
    authority: Arc<Authority>,
    lifetime: Duration,
    signed: AtomicU32,
    pushes: mpsc::Sender<Push>,
    attaches: mpsc::Sender<Attach>,
}

/// Control, played.
pub(crate) struct Played {
    pub(crate) control: Control,
    pub(crate) pushes: mpsc::Receiver<Push>,
    pub(crate) attaches: mpsc::Receiver<Attach>,
    services: Arc<Services>,
    token: TempPath,
    task: JoinHandle<()>,
    _ca: TempPath,
}

impl Drop for Played {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn file(text: &str) -> TempPath {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.into_temp_path()
}

impl Played {
    /// Listens as `id`, and signs certificates that live for `lifetime`.
    pub(crate) async fn start(authority: Authority, id: &str, lifetime: Duration) -> Self {
        let authority = Arc::new(authority);
        let (pushes_in, pushes) = mpsc::channel(8);
        let (attaches_in, attaches) = mpsc::channel(8);
        let services = Arc::new(Services {
            authority: Arc::clone(&authority),
            lifetime,
            signed: AtomicU32::new(0),
            pushes: pushes_in,
            attaches: attaches_in,
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (token, ca) = (file("good\n"), file(&authority.pem()));
        let control = Control {
            address: listener.local_addr().unwrap().to_string(),
            ca: ca.to_path_buf(),
            trust_domain: "cluster.local".into(),
        };
        let task = tokio::spawn(serve(listener, tls(&authority, id), Arc::clone(&services)));
        Self { control, pushes, attaches, services, token, task, _ca: ca }
    }

    pub(crate) fn signer(&self, id: &str) -> Signer {
        Signer { control: self.control.clone(), token: self.token.to_path_buf(), id: id.parse().unwrap() }
    }

    pub(crate) fn change_token(&self, text: &str) {
        std::fs::write(&self.token, text).unwrap();
    }

    /// How many certificates it has signed.
    pub(crate) fn signed(&self) -> u32 {
        self.services.signed.load(Relaxed)
    }

    pub(crate) async fn push(&mut self) -> Push {
        within(self.pushes.recv()).await.unwrap()
    }

    pub(crate) async fn attach(&mut self) -> Attach {
        within(self.attaches.recv()).await.unwrap()
    }

    /// The process is gone, and its connections with it.
    pub(crate) fn kill(&self) {
        self.task.abort();
    }
}

fn tls(authority: &Authority, id: &str) -> TlsAcceptor {
    let (certificate, key) = authority.leaf(&Leaf::of(&[id]));
    let mut roots = RootCertStore::empty();
    roots.add(authority.anchor()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .unwrap();
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![certificate], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, services: Arc<Services>) {
    let mut connections = tokio::task::JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        let (tls, services) = (tls.clone(), Arc::clone(&services));
        connections.spawn(async move {
            let Ok(stream) = tls.accept(tcp).await else { return };
            let proven = Proven(stream.get_ref().1.peer_certificates().is_some());
            let routes = Routes::new(IdentityServer::from_arc(Arc::clone(&services)))
                .add_service(AggregatedDiscoveryServiceServer::from_arc(Arc::clone(&services)))
                .add_service(FleetServer::from_arc(services))
                .prepare();
            let routes = tower::ServiceExt::<http::Request<hyper::body::Incoming>>::map_request(
                routes,
                move |mut request: http::Request<hyper::body::Incoming>| {
                    request.extensions_mut().insert(proven);
                    request
                },
            );
            let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(routes))
                .await;
        });
    }
}

/// Whether the caller showed a certificate.
#[derive(Clone, Copy)]
struct Proven(bool);

fn proven<T>(request: &Request<T>) -> Result<(), Status> {
    match request.extensions().get() {
        Some(Proven(true)) => Ok(()),
        _ => Err(Status::unauthenticated("no certificate")),
    }
}

#[tonic::async_trait]
impl Identity for Services {
    async fn sign(&self, request: Request<SignRequest>) -> Result<Response<SignResponse>, Status> {
        if request.metadata().get("authorization").map(|value| value.as_bytes()) != Some(b"Bearer good") {
            return Err(Status::unauthenticated("the token's signature does not match"));
        }
        self.signed.fetch_add(1, Relaxed);
        let (now, csr) = (SystemTime::now(), request.into_inner().csr);
        let leaf = self.authority.sign(&csr, now, now + self.lifetime);
        Ok(Response::new(SignResponse {
            chain: vec![leaf.to_vec()],
            anchors: vec![self.authority.anchor().to_vec()],
            not_before: 0,
            not_after: 0,
        }))
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Services {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        proven(&request)?;
        let (say, said) = mpsc::channel(8);
        let _ = self.pushes.send(Open { heard: request.into_inner(), say }).await;
        Ok(Response::new(ReceiverStream::new(said)))
    }
}

#[tonic::async_trait]
impl Fleet for Services {
    type AttachStream = ReceiverStream<Result<ControlMessage, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<ProxyMessage>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        proven(&request)?;
        let (say, said) = mpsc::channel(8);
        let _ = self.attaches.send(Open { heard: request.into_inner(), say }).await;
        Ok(Response::new(ReceiverStream::new(said)))
    }
}
