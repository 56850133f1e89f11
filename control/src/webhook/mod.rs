//! The webhook that injects: an API server asks it about each pod that is being made and may want a sidecar.
//!
//! In: AdmissionReviews over HTTPS, what namespaces say, the Canaries in force, a certificate. Out: patches, warnings, refusals with what to do; and
//! of pods that slipped through, a count and an Event each (`missed.rs`). What becomes of a pod is decided in
//! `penstock_inject` alone, so `penstock inject` makes the same of it. Can go wrong: a request that is none, which is told so; a
//! pod that cannot be injected, which is refused; a namespace that cannot be read, which is refused too and tried again by
//! whoever makes the pod. No review has any effect beside its answer, so a dry run is one like any other.

pub mod certificate;
mod gate;
pub mod missed;
mod review;
mod server;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use http::header::{ALLOW, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body as _, Incoming};
use metrics::{counter, histogram};
use penstock_inject::{Namespace, Settings};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::certificate::Certificate;
use self::review::{Made, Question, Refusal, Verdict};
use crate::metric;
use crate::namespaces::Namespaces;
use crate::push::Published;

/// Where the API server asks.
const INJECT: &str = "/inject";
/// Where the kubelet asks.
const READY: &str = "/ready";
/// The largest body. etcd takes objects of 1.5 MiB, and a review has little beside the object.
const BODY: usize = 3 << 20;
/// Bytes of bodies in memory at once; a pod has ten or twenty thousand.
const BODIES: usize = 24 << 20;
/// A body comes at once or not at all: an API server waits five seconds for the answer.
const ARRIVES: Duration = Duration::from_secs(5);
/// What is said of a panic.
const FAULT: &str = "it could not be worked on; that is a fault of control, please report it";
/// Reviews that are decided at the same time. Each takes far less than a millisecond, and as JSON ten times its bytes.
const DECIDED: usize = 4;

/// The webhook, listening but not serving yet.
#[derive(Debug)]
pub struct Listening {
    /// Where.
    pub address: SocketAddr,
    listener: TcpListener,
}

impl Listening {
    /// Listens there.
    pub async fn on(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen on {address}; choose another address with --webhook"))?;
        Ok(Self { address: listener.local_addr()?, listener })
    }

    /// Serves until told to stop.
    pub async fn serve(
        self,
        certificate: Certificate,
        webhook: Webhook,
        stop: CancellationToken,
    ) -> Result<()> {
        server::serve(self.listener, certificate, Arc::new(webhook), stop).await
    }
}

/// Answers reviews.
#[derive(Clone, Debug)]
pub struct Webhook {
    settings: Arc<Settings>,
    namespaces: Namespaces,
    /// The Canaries in force are in it.
    published: Option<watch::Receiver<Published>>,
    bodies: Arc<Semaphore>,
    decided: Arc<Semaphore>,
}

/// An answer that is no review.
type Bad = (StatusCode, String);

impl Webhook {
    /// Injects with these settings.
    pub fn new(settings: Settings, namespaces: Namespaces) -> Self {
        let settings = Arc::new(settings);
        let (bodies, decided) = (Semaphore::new(BODIES), Semaphore::new(DECIDED));
        Self { settings, namespaces, published: None, bodies: Arc::new(bodies), decided: Arc::new(decided) }
    }

    /// Gives pods of which the Deployment has a Canary their gate.
    pub fn holding(self, published: watch::Receiver<Published>) -> Self {
        Self { published: Some(published), ..self }
    }

    /// What gives a pod its gate.
    fn gate(&self, question: &Question) -> Vec<Value> {
        let Some((pod, published)) = question.pod.as_ref().zip(self.published.as_ref()) else {
            return Vec::new();
        };
        let snapshot = published.borrow().snapshot.clone();
        gate::steps(pod, &question.namespace, &snapshot.canaries)
    }

    /// Answers a request.
    async fn respond(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        let bad = match (request.method(), request.uri().path()) {
            (&Method::POST, INJECT) => {
                let began = Instant::now();
                let answer = self.inject(request).await;
                let outcome = answer.as_ref().map_or("bad-request", |(word, _)| *word);
                counter!(metric::WEBHOOK_REVIEWS.name, "outcome" => outcome).increment(1);
                histogram!(metric::WEBHOOK.name).record(began.elapsed().as_secs_f64());
                match answer {
                    Ok((_, json)) => return said(StatusCode::OK, "application/json", json),
                    Err((status, why)) => {
                        tracing::warn!("the webhook refuses a request that is no review: {}", line(&why));
                        (status, why)
                    }
                }
            }
            // Whoever hears this has done a handshake, so there is a certificate; and nobody is served before all of control listens.
            (&Method::GET, READY) => (StatusCode::OK, "ready".to_owned()),
            (_, path @ (INJECT | READY)) => {
                let method = if path == INJECT { "POST" } else { "GET" };
                let told = format!("{path} is asked with {method}");
                let mut response = said(StatusCode::METHOD_NOT_ALLOWED, "text/plain", told + "\n");
                response.headers_mut().insert(ALLOW, HeaderValue::from_static(method));
                return response;
            }
            _ => (StatusCode::NOT_FOUND, format!("there is {INJECT}, for AdmissionReviews, and {READY}")),
        };
        said(bad.0, "text/plain", bad.1 + "\n")
    }

    /// How a review ended, and the review that says so.
    async fn inject(&self, request: Request<Incoming>) -> Result<(&'static str, Vec<u8>), Bad> {
        let json = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if json.and_then(|value| value.split(';').next()).map(str::trim) != Some("application/json") {
            let told = "a review is sent as content-type: application/json".to_owned();
            return Err((StatusCode::UNSUPPORTED_MEDIA_TYPE, told));
        }
        let (body, held) = self.whole(request.into_body()).await?;
        let (question, verdict) = self.judge(body).await?;
        drop(held);
        if let Verdict::Refused(Refusal { message, code, .. }) = &verdict {
            tracing::warn!("refused, {code}: {}", line(message));
        }
        let answer = serde_json::to_vec(&review::answer(&question.uid, &verdict));
        let answer = answer.map_err(|error| (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()))?;
        Ok((verdict.word(), answer))
    }

    /// The body, and what it takes of the memory for bodies.
    async fn whole(&self, mut body: Incoming) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Bad> {
        let large = || (StatusCode::PAYLOAD_TOO_LARGE, format!("a review is at most {BODY} bytes"));
        if body.size_hint().lower() > BODY as u64 {
            return Err(large());
        }
        let late = |_| (StatusCode::REQUEST_TIMEOUT, format!("the body has not come within {ARRIVES:?}"));
        let read = async {
            let (mut bytes, mut held) = (BytesMut::new(), None::<OwnedSemaphorePermit>);
            while let Some(frame) = body.frame().await {
                let frame =
                    frame.map_err(|error| (StatusCode::BAD_REQUEST, format!("the body ended: {error}")))?;
                let Ok(data) = frame.into_data() else { continue };
                if bytes.len() + data.len() > BODY {
                    return Err(large());
                }
                let size = u32::try_from(data.len()).unwrap_or(u32::MAX);
                let more = self.bodies.clone().acquire_many_owned(size).await.map_err(|_| large())?;
                match &mut held {
                    Some(held) => held.merge(more),
                    None => held = Some(more),
                }
                bytes.extend_from_slice(&data);
            }
            Ok((bytes.freeze(), held))
        };
        timeout(ARRIVES, read).await.map_err(late)?
    }

    async fn judge(&self, body: Bytes) -> Result<(Question, Verdict), Bad> {
        let this = self.clone();
        let read = move || {
            let question = review::read(&body)?;
            let known = this.namespaces.known(&question.namespace);
            let made = question
                .pod
                .as_ref()
                .zip(known.as_ref())
                .map(|(pod, namespace)| review::make(pod, namespace, &this.settings));
            Ok((question, made))
        };
        let read: Result<(Question, Option<Made>), String> = match self.aside(read).await {
            Some(read) => read,
            None => Err(FAULT.to_owned()),
        };
        let (question, made) = read.map_err(|why| (StatusCode::BAD_REQUEST, why))?;
        if question.pod.is_none() {
            let verdict = review::not_ours(&question);
            return Ok((question, verdict));
        }
        if let Some(made) = made
            && !review::rests_on_namespace(&made)
        {
            let verdict = review::verdict(&question, made, self.gate(&question));
            return Ok((question, verdict));
        }
        match self.namespaces.fresh(&question.namespace).await {
            Ok(namespace) => self.again(question, namespace).await,
            Err(why) => {
                // Later it may be known. Until then the pod is not made, since it may have asked for a sidecar.
                let Question { namespace, name, .. } = &question;
                let message = format!("pod {namespace}/{name} cannot have a sidecar yet: {why}");
                Ok((question, Verdict::Refused(Refusal { code: 503, reason: "ServiceUnavailable", message })))
            }
        }
    }

    /// Decides by what the namespace says now.
    async fn again(&self, question: Question, namespace: Namespace) -> Result<(Question, Verdict), Bad> {
        let this = self.clone();
        let decide = move || {
            let pod = question.pod.as_ref()?;
            let made = review::make(pod, &namespace, &this.settings);
            let verdict = review::verdict(&question, made, this.gate(&question));
            Some((question, verdict))
        };
        let decided = self.aside(decide).await.flatten();
        decided.ok_or_else(|| (StatusCode::INTERNAL_SERVER_ERROR, FAULT.to_owned()))
    }

    /// Works on it beside the connections, a few at a time; `None` where it ended in a panic, of which there is to be none.
    async fn aside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let _turn = self.decided.acquire().await.ok()?;
        tokio::task::spawn_blocking(work).await.ok()
    }
}

/// On one line of the log, whatever somebody has called his pod.
fn line(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect()
}

fn said(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
