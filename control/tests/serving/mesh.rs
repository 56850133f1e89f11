//! A control in this process, and clients that speak to it over real TLS.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use penstock_api::SpiffeId;
use penstock_api::discovery::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
use penstock_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node};
use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_api::v1::identity_client::IdentityClient;
use penstock_control::compile::TrustAnchors;
use penstock_control::identity::state::StateDir;
use penstock_control::identity::token::{TokenKey, Workload};
use penstock_control::identity::{Leaf, epoch};
use penstock_control::serve::{Control, Options, start};
use penstock_control::snapshot::{Builder, Snapshot};
use rcgen::{CertificateParams, KeyPair, SanType};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};

pub(crate) const DOMAIN: &str = "cluster.local";

/// What makes a snapshot's content.
type Content = Arc<dyn Fn(&mut Builder) + Send + Sync>;

/// A control and its state.
pub(crate) struct Mesh {
    pub(crate) state: tempfile::TempDir,
    pub(crate) control: Control,
    pub(crate) stop: CancellationToken,
    content: watch::Sender<Content>,
}

pub(crate) fn now() -> i64 {
    epoch(SystemTime::now())
}

pub(crate) fn id(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new(DOMAIN, namespace, account).unwrap()
}

fn build(content: &Content, trust: &TrustAnchors) -> Arc<Snapshot> {
    let mut builder = Builder::default();
    content(&mut builder);
    builder.add(Kind::TrustBundle, DOMAIN, &v1::TrustBundle { anchors: trust.anchors.clone() });
    Arc::new(builder.build(Vec::new()))
}

impl Mesh {
    pub(crate) async fn start(leaf_lifetime: Duration) -> Self {
        let state = tempfile::tempdir().unwrap();
        let (content, mut contents) = watch::channel::<Content>(Arc::new(|_| {}));
        let snapshots = move |mut trust: watch::Receiver<Arc<TrustAnchors>>| {
            let (sender, receiver) =
                watch::channel(build(&contents.borrow().clone(), &trust.borrow().clone()));
            tokio::spawn(async move {
                while tokio::select! { ok = contents.changed() => ok, ok = trust.changed() => ok }.is_ok() {
                    let (content, trust) =
                        (contents.borrow_and_update().clone(), trust.borrow_and_update().clone());
                    sender.send_replace(build(&content, &trust));
                }
            });
            receiver
        };
        let options = Options {
            state: state.path().to_owned(),
            listen: "127.0.0.1:0".parse().unwrap(),
            api: "127.0.0.1:0".parse().unwrap(),
            trust_domain: DOMAIN.into(),
            leaf_lifetime,
            review: None,
            cluster: None,
            analysis_to: Vec::new(),
            canaries: None,
        };
        let stop = CancellationToken::new();
        let control = start(options, snapshots, None, stop.clone()).await.unwrap();
        Self { state, control, stop, content }
    }

    pub(crate) fn publish(&self, content: impl Fn(&mut Builder) + Send + Sync + 'static) {
        self.content.send_replace(Arc::new(content));
    }

    pub(crate) fn token(&self, namespace: &str, account: &str, expires: i64) -> String {
        let key = TokenKey::open(&StateDir::open(self.state.path()).unwrap()).unwrap();
        let workload = Workload { namespace: namespace.into(), account: account.into(), pod: None };
        key.issue(workload, expires).unwrap()
    }

    /// A channel that shows `certificate`, if any.
    pub(crate) async fn channel(
        &self,
        certificate: Option<(Vec<CertificateDer<'static>>, KeyPair)>,
    ) -> Channel {
        let anchors = penstock_control::identity::state::StateDir::open(self.state.path())
            .unwrap()
            .read("anchors.pem")
            .unwrap()
            .unwrap();
        let config = client_config(&anchors, certificate);
        let address = self.control.address;
        let connector = tower::service_fn(move |_| {
            let config = config.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                tcp.set_nodelay(true)?;
                let name = ServerName::try_from("penstock-control").unwrap();
                let tls = tokio_rustls::TlsConnector::from(config).connect(name, tcp).await?;
                Ok::<_, std::io::Error>(TokioIo::new(tls))
            }
        });
        Endpoint::from_static("http://penstock-control").connect_with_connector_lazy(connector)
    }

    pub(crate) async fn sign(&self, token: Option<&str>, csr: Vec<u8>) -> Result<v1::SignResponse, Status> {
        let mut request = Request::new(v1::SignRequest { csr });
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
        }
        let mut client = IdentityClient::new(self.channel(None).await);
        client.sign(request).await.map(tonic::Response::into_inner)
    }

    /// A certificate for `id`, as a proxy gets it.
    pub(crate) async fn certificate(
        &self,
        namespace: &str,
        account: &str,
    ) -> (Vec<CertificateDer<'static>>, KeyPair, v1::SignResponse) {
        let key = KeyPair::generate().unwrap();
        let token = self.token(namespace, account, now() + 60);
        let signed = self.sign(Some(&token), csr(&key, &id(namespace, account))).await.unwrap();
        (signed.chain.iter().map(|der| der.clone().into()).collect(), key, signed)
    }

    /// A channel of a proxy of the namespace.
    pub(crate) async fn proxy_channel(&self, namespace: &str) -> Channel {
        let (chain, key, _) = self.certificate(namespace, "client").await;
        self.channel(Some((chain, key))).await
    }

    /// A certificate made behind control's back.
    pub(crate) fn forge(&self, id: &SpiffeId, lifetime: Duration, at: i64) -> (Leaf, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let signer = self.control.authority.trust().borrow().signer.clone();
        (signer.sign(id, &key, lifetime, at, [9; 16]).unwrap(), key)
    }

    /// `GET` of the API, or `POST` if the path begins with it.
    pub(crate) async fn page(&self, path: &str) -> (u16, String) {
        let (method, path) = path.strip_prefix("POST ").map_or(("GET", path), |path| ("POST", path));
        let mut tcp = TcpStream::connect(self.control.api).await.unwrap();
        let head = format!("{method} {path} HTTP/1.1\r\nhost: control\r\nconnection: close\r\n\r\n");
        tcp.write_all(head.as_bytes()).await.unwrap();
        let mut all = String::new();
        tcp.read_to_string(&mut all).await.unwrap();
        let (head, body) = all.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    pub(crate) async fn json<T: serde::de::DeserializeOwned>(&self, path: &str) -> T {
        let (status, body) = self.page(path).await;
        assert_eq!(status, 200, "{path}: {body}");
        serde_json::from_str(&body).unwrap()
    }
}

pub(crate) fn csr(key: &KeyPair, id: &SpiffeId) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
    params.serialize_request(key).unwrap().der().to_vec()
}

/// A configuration stream.
pub(crate) struct Ads {
    pub(crate) requests: mpsc::Sender<DeltaDiscoveryRequest>,
    pub(crate) responses: Streaming<DeltaDiscoveryResponse>,
}

impl Ads {
    /// Opens a stream as `node` with a first subscription.
    pub(crate) async fn open(
        channel: Channel,
        node: &str,
        kind: Kind,
        names: &[&str],
    ) -> Result<Self, Status> {
        let (requests, receiver) = mpsc::channel(16);
        let mut first = subscription(kind, names);
        first.node = Some(Node { id: node.into(), ..Node::default() });
        requests.send(first).await.unwrap();
        let mut client = AggregatedDiscoveryServiceClient::new(channel);
        let responses = client.delta_aggregated_resources(ReceiverStream::new(receiver)).await?.into_inner();
        Ok(Self { requests, responses })
    }

    pub(crate) async fn send(&self, request: DeltaDiscoveryRequest) {
        self.requests.send(request).await.unwrap();
    }

    pub(crate) async fn next(&mut self) -> DeltaDiscoveryResponse {
        let next = tokio::time::timeout(Duration::from_secs(20), self.responses.message()).await;
        next.expect("no response").unwrap().expect("the stream ended")
    }

    /// The next response, acknowledged.
    pub(crate) async fn take(&mut self) -> DeltaDiscoveryResponse {
        let response = self.next().await;
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        })
        .await;
        response
    }
}

pub(crate) fn subscription(kind: Kind, names: &[&str]) -> DeltaDiscoveryRequest {
    DeltaDiscoveryRequest {
        type_url: kind.type_url().into(),
        resource_names_subscribe: names.iter().map(|name| (*name).to_owned()).collect(),
        ..DeltaDiscoveryRequest::default()
    }
}

pub(crate) async fn eventually<F: std::future::Future<Output = bool>>(
    what: &str,
    mut check: impl FnMut() -> F,
) {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    while !check().await {
        assert!(tokio::time::Instant::now() < deadline, "{what} did not come");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn client_config(
    anchors: &[u8],
    certificate: Option<(Vec<CertificateDer<'static>>, KeyPair)>,
) -> Arc<rustls::ClientConfig> {
    use rustls_pki_types::pem::PemObject;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    for anchor in CertificateDer::pem_slice_iter(anchors) {
        roots.add(anchor.unwrap()).unwrap();
    }
    let verifier = Arc::new(AnyName { roots, provider: provider.clone() });
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match certificate {
        Some((chain, key)) => builder.with_client_auth_cert(chain, PrivateKeyDer::from(key)).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

/// Verifies the chain; the only name is control's SPIFFE id, which the proxy's own tests look at.
#[derive(Debug)]
struct AnyName {
    roots: RootCertStore,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let leaf = rustls::server::ParsedCertificate::try_from(leaf)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        rustls::client::verify_server_cert_signed_by_trust_anchor(
            &leaf,
            &self.roots,
            intermediates,
            now,
            algorithms,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// The binary.
pub(crate) fn penstock_control() -> std::process::Command {
    std::process::Command::new(env!("CARGO_BIN_EXE_penstock-control"))
}

pub(crate) fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_default()
}
