//! The proxy's own pages: what it knows, who it is, how it is.
//!
//! Two listeners on the control runtime. The admin listener is for whoever is in the pod, and only there: it listens
//! on loopback or not at all. The health listener is for the kubelet and Prometheus, and has nothing but readiness,
//! liveness and metrics. No page ever shows a key.

pub mod pages;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use pages::Pages;

/// Who may look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// Whoever is in the pod: everything.
    Admin,
    /// The kubelet and Prometheus.
    Health,
}

/// Pages, each with what it says; 404 prints the list.
const ADMIN_PAGES: &[(&str, &str)] = &[
    ("/config", "the configuration in force"),
    ("/endpoints", "every endpoint with its state and load"),
    ("/certs", "certificates and trust anchors in use"),
    ("/drain", "POST: the mesh is told to go elsewhere, nothing is closed; GET: whether it was"),
    ("/log-level", "the log level; PUT changes it: curl -X PUT -d debug"),
];
const HEALTH_PAGES: &[(&str, &str)] = &[
    ("/ready", "200 when traffic may come, 503 with the reason otherwise"),
    ("/live", "200 while the process is well"),
    ("/metrics", "Prometheus metrics"),
];

/// Why a listener cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The admin pages are not for the network.
    #[error(
        "the admin listener must be on loopback, not {0}: its pages show the whole configuration and let the log \
         level be changed; the health listener is the one for the network"
    )]
    NotLoopback(SocketAddr),
    /// The address is of no use.
    #[error("{address} cannot be listened on: {error}; is another proxy running there?")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why.
        error: std::io::Error,
    },
}

/// Opens a listener for the pages.
pub async fn listen(address: SocketAddr, audience: Audience) -> Result<TcpListener, AdminError> {
    if audience == Audience::Admin && !address.ip().is_loopback() {
        return Err(AdminError::NotLoopback(address));
    }
    TcpListener::bind(address).await.map_err(|error| AdminError::Bind { address, error })
}

/// Serves the pages until `stop`.
pub async fn serve(listener: TcpListener, pages: Arc<Pages>, audience: Audience, stop: CancellationToken) {
    let served =
        axum::serve(listener, router(pages, audience)).with_graceful_shutdown(stop.cancelled_owned());
    if let Err(error) = served.await {
        tracing::error!(%error, ?audience, "the pages are gone");
    }
}

fn router(pages: Arc<Pages>, audience: Audience) -> Router {
    let mut router = Router::new()
        .route("/ready", get(ready))
        .route("/live", get(async || "live\n"))
        .route("/metrics", get(metrics));
    if audience == Audience::Admin {
        router = router
            .route("/config", get(async |State(pages): State<Arc<Pages>>| Json(pages.config())))
            .route(
                "/endpoints",
                get(async |State(pages): State<Arc<Pages>>| Json(pages.endpoints(Instant::now()))),
            )
            .route("/certs", get(async |State(pages): State<Arc<Pages>>| Json(pages.certificates())))
            .route("/drain", get(draining).post(drain))
            .route("/log-level", get(log_level).put(set_log_level));
    }
    router.fallback(async move || (StatusCode::NOT_FOUND, listing(audience))).with_state(pages)
}

fn listing(audience: Audience) -> String {
    let pages = match audience {
        Audience::Admin => [ADMIN_PAGES, HEALTH_PAGES].concat(),
        Audience::Health => HEALTH_PAGES.to_vec(),
    };
    let lines = pages.iter().map(|(path, meaning)| format!("  {path:<12}{meaning}\n"));
    format!("There is no such page. There are:\n{}", lines.collect::<String>())
}

async fn ready(State(pages): State<Arc<Pages>>) -> Response {
    match pages.ready() {
        Ok(()) => "ready\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn metrics(State(pages): State<Arc<Pages>>) -> Response {
    let page = pages.metrics(Instant::now());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], page).into_response()
}

async fn draining(State(pages): State<Arc<Pages>>) -> &'static str {
    if *pages.draining.borrow() { "draining\n" } else { "not draining\n" }
}

async fn drain(State(pages): State<Arc<Pages>>) -> &'static str {
    if !pages.draining.send_replace(true) {
        tracing::info!("told to drain: the mesh is asked to go elsewhere; the end comes with SIGTERM");
    }
    "draining\n"
}

async fn log_level(State(pages): State<Arc<Pages>>) -> Response {
    match &pages.level {
        Some(level) => format!("{}\n", level.get()).into_response(),
        None => no_level(),
    }
}

async fn set_log_level(State(pages): State<Arc<Pages>>, body: String) -> Response {
    match &pages.level {
        Some(level) => match level.set(body.trim()) {
            Ok(()) => format!("{}\n", level.get()).into_response(),
            Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
        },
        None => no_level(),
    }
}

fn no_level() -> Response {
    (StatusCode::NOT_FOUND, "the log of this process belongs to somebody else\n").into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request;
    use http_body_util::BodyExt;
    use penstock_api::resource::{Kind, Payload};
    use penstock_api::{ServiceName, v1, view};
    use tokio::sync::watch;
    use tower::ServiceExt;
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;

    use super::*;
    use crate::config::store::Change;
    use crate::config::{Known, Store};
    use crate::identity::Identity;
    use crate::telemetry::level::Level;
    use crate::telemetry::{Options, Telemetry};

    struct Proxy {
        pages: Arc<Pages>,
        store: Arc<Store>,
        draining: watch::Sender<bool>,
    }

    fn proxy(level: Option<Level>) -> Proxy {
        let store = Arc::new(Store::default());
        let draining = watch::Sender::new(false);
        let pages = Arc::new(Pages {
            store: Arc::clone(&store),
            identity: Arc::new(Identity::new()),
            telemetry: Arc::new(Telemetry::new(&Options::default()).unwrap()),
            level: level.map(Arc::new),
            draining: draining.clone(),
            epoch: Instant::now(),
        });
        Proxy { pages, store, draining }
    }

    async fn ask(proxy: &Proxy, audience: Audience, method: &str, path: &str, body: &str) -> (u16, String) {
        let request = Request::builder().method(method).uri(path).body(Body::from(body.to_owned())).unwrap();
        let response = router(Arc::clone(&proxy.pages), audience).oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn readiness_follows_configuration_and_drain_and_says_why_not() {
        let proxy = proxy(None);
        let ready = async |proxy: &Proxy| ask(proxy, Audience::Health, "GET", "/ready", "").await;
        let (status, why) = ready(&proxy).await;
        assert!(status == 503 && why.contains("control has not"), "{status} {why}");
        proxy.store.set_ready();
        assert_eq!(ready(&proxy).await.0, 200);
        // Whoever can reach the health listener must not be able to take the pod out.
        assert_eq!(ask(&proxy, Audience::Health, "POST", "/drain", "").await.0, 404);
        assert_eq!(ask(&proxy, Audience::Admin, "GET", "/drain", "").await.1, "not draining\n");
        assert_eq!(ask(&proxy, Audience::Admin, "POST", "/drain", "").await, (200, "draining\n".to_owned()));
        assert!(*proxy.draining.borrow());
        let (status, why) = ready(&proxy).await;
        assert!(status == 503 && why.contains("draining"), "{status} {why}");
        assert_eq!(ask(&proxy, Audience::Health, "GET", "/live", "").await.0, 200);
    }

    #[tokio::test]
    async fn the_health_listener_shows_no_configuration() {
        let proxy = proxy(None);
        for path in ["/config", "/endpoints", "/certs", "/log-level", "/nonsense"] {
            let (status, text) = ask(&proxy, Audience::Health, "GET", path, "").await;
            assert_eq!(status, 404, "{path}");
            assert!(text.contains("/metrics") && !text.contains("/config"), "{text}");
        }
        for path in ["/config", "/endpoints", "/certs"] {
            let (status, text) = ask(&proxy, Audience::Admin, "GET", path, "").await;
            assert_eq!(status, 200, "{path}");
            serde_json::from_str::<serde_json::Value>(&text).unwrap();
        }
        let (status, text) = ask(&proxy, Audience::Admin, "GET", "/nonsense", "").await;
        assert!(status == 404 && text.contains("/config"), "{text}");
        let (status, text) = ask(&proxy, Audience::Health, "GET", "/metrics", "").await;
        assert!(status == 200 && text.contains("penstock_build_info"), "{text}");
    }

    #[tokio::test]
    async fn pushed_configuration_and_its_endpoints_are_shown() {
        let proxy = proxy(None);
        let name: ServiceName = "a/digits".parse().unwrap();
        let service = v1::Service {
            namespace: "a".into(),
            name: "digits".into(),
            ports: vec![v1::ServicePort { port: 80, ..Default::default() }],
            policy: None,
        };
        let endpoint = v1::Endpoint {
            name: "a/digits-1".into(),
            ip: "127.0.0.11".into(),
            ports: vec![v1::PortTarget { service_port: 80, port: 8000 }],
            identity: "spiffe://cluster.local/ns/a/sa/digits".into(),
            draining: true,
            ..Default::default()
        };
        let endpoints = v1::Endpoints { endpoints: vec![endpoint] };
        let change = |kind, payload| Change { kind, name: name.to_string(), payload };
        let push = async {
            let refused = proxy.store.apply(vec![
                change(Kind::Service, Some(Payload::Service(service))),
                change(Kind::Endpoints, Some(Payload::Endpoints(endpoints))),
                change(Kind::Routes, None),
            ]);
            assert_eq!(refused, []);
        };
        let (known, ()) = tokio::join!(proxy.store.service(&name), push);
        assert!(matches!(known, Ok(Known::Here(_))));
        let (_, text) = ask(&proxy, Audience::Admin, "GET", "/endpoints", "").await;
        let rows: Vec<view::ProxyEndpoint> = serde_json::from_str(&text).unwrap();
        assert_eq!((&*rows[0].service, &*rows[0].state, rows[0].port), ("a/digits", "draining", 80));
        let (_, text) = ask(&proxy, Audience::Admin, "GET", "/config", "").await;
        let config: serde_json::Value = serde_json::from_str(&text).unwrap();
        let shown = &config["services"]["a/digits"]["ports"][0]["cluster"]["endpoints"][0];
        assert_eq!(shown["identity"], "spiffe://cluster.local/ns/a/sa/digits", "{text}");

        // What control takes away is no longer shown, though requests may still be on their way to it.
        assert_eq!(proxy.store.apply(vec![change(Kind::Service, None)]), []);
        let (_, text) = ask(&proxy, Audience::Admin, "GET", "/endpoints", "").await;
        assert_eq!(text, "[]");
    }

    #[tokio::test]
    async fn the_log_level_is_read_and_changed() {
        let (level, filter) = Level::prepare("info").unwrap();
        let _log = tracing_subscriber::registry().with(filter).set_default();
        let proxy = proxy(Some(level));
        let level = async |method, body| ask(&proxy, Audience::Admin, method, "/log-level", body).await;
        assert_eq!(level("GET", "").await, (200, "info\n".into()));
        assert_eq!(level("PUT", "debug\n").await, (200, "debug\n".into()));
        assert_eq!(level("PUT", "loud").await.0, 400);
        assert_eq!(level("GET", "").await.1, "debug\n");
    }

    #[tokio::test]
    async fn the_admin_pages_are_never_for_the_network() {
        let open = listen("0.0.0.0:0".parse().unwrap(), Audience::Admin).await;
        assert!(matches!(open, Err(AdminError::NotLoopback(_))));
        assert!(listen("127.0.0.1:0".parse().unwrap(), Audience::Admin).await.is_ok());
    }
}
