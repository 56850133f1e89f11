//! The HTTP API that the command line, scripts and Prometheus read.
//!
//! In: requests on loopback. Out: JSON of [`penstock_api::view`], one type a page; `/tap` streams one object a line.
//! Everything is read from the snapshot in force and from what proxies tell. What can go wrong is answered as
//! `{"error": "<what happened and what to do>"}`.

mod authz;
mod canaries;
mod endpoints;
mod routes;
mod stat;

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Query, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use metrics_exporter_prometheus::PrometheusHandle;
use penstock_api::view::{
    Authz, EndpointRow, Failure, Problem, ProxyCertificates, Renewal, RouteRow, Stat, Status,
};
use penstock_api::{ServiceName, v1};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::canary::{self, Commands, Shown};
use crate::fleet::{AskError, Fleet, Question, TapFilter};
use crate::push::Published;

/// A proxy answers from memory; one that takes longer is left out.
const PATIENCE: Duration = Duration::from_secs(2);
/// A renewed certificate takes a way to control and back.
const RENEWAL_PATIENCE: Duration = Duration::from_secs(15);
/// How far back proxies' outcomes are kept.
const MAX_WINDOW: Duration = Duration::from_secs(300);

const PAGES: &str = "/status, /stat?window=10s, /routes, /endpoints, /authz?pod=, /certs, /problems, /canaries, /tap, /renew (POST), /canaries/NAMESPACE/NAME/{promote,pause,resume,abort} (POST), /healthz and /metrics";

/// What the pages are made of.
#[derive(Clone)]
pub struct Facts {
    /// The snapshot in force.
    pub published: watch::Receiver<Published>,
    /// The proxies.
    pub fleet: Arc<Fleet>,
    /// Renders `/metrics`; `None` when this process records none.
    pub metrics: Option<PrometheusHandle>,
    /// Where canaries are.
    pub canaries: watch::Receiver<Arc<Vec<Shown>>>,
    /// Takes commands for them; `None` in a cluster, where their objects do.
    pub commands: Option<Commands>,
    /// When control started.
    pub started: Instant,
    /// Ends streams.
    pub stop: CancellationToken,
}

/// An answer that is no success.
#[derive(Debug)]
struct ApiError(StatusCode, String);

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, Json(Failure { error: self.1 })).into_response()
    }
}

/// The pages.
pub fn router(facts: Facts) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/stat", get(stat_page))
        .route("/routes", get(routes_page))
        .route("/endpoints", get(endpoints_page))
        .route("/authz", get(authz_page))
        .route("/certs", get(certificates))
        .route("/problems", get(problems))
        .route("/canaries", get(canaries::page))
        .route("/canaries/{namespace}/{name}/{verb}", post(canaries::command))
        .route("/tap", get(tap))
        .route("/renew", post(renew))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/metrics", get(metrics_page))
        .fallback(|| async {
            ApiError(StatusCode::NOT_FOUND, format!("there is no such page; the pages are {PAGES}"))
        })
        .method_not_allowed_fallback(|| async {
            let error =
                "pages are read with GET; only /renew and commands to canaries are asked for with POST"
                    .to_owned();
            ApiError(StatusCode::METHOD_NOT_ALLOWED, error)
        })
        .with_state(facts)
}

async fn status(State(facts): State<Facts>) -> Json<Status> {
    let published = facts.published.borrow().clone();
    Json(Status {
        snapshot: published.snapshot.version.clone(),
        proxies: facts.fleet.status(&published),
        problems: published.snapshot.problems.clone(),
        uptime_s: facts.started.elapsed().as_secs_f64(),
    })
}

#[derive(Deserialize)]
struct StatQuery {
    window: Option<String>,
}

async fn stat_page(
    State(facts): State<Facts>,
    Query(query): Query<StatQuery>,
) -> Result<Json<Stat>, ApiError> {
    let text = query.window.as_deref().unwrap_or("10s");
    let window =
        humantime::parse_duration(text).ok().filter(|w| *w >= Duration::from_secs(1) && *w <= MAX_WINDOW);
    let window = window.ok_or_else(|| {
        let error =
            format!("window={text:?} is not a duration from 1s to 300s; write for example window=10s");
        ApiError(StatusCode::BAD_REQUEST, error)
    })?;
    let (totals, covered) = facts.fleet.totals(window, Instant::now());
    let snapshot = facts.published.borrow().snapshot.clone();
    Ok(Json(stat::page(&totals, covered, &snapshot)))
}

async fn routes_page(State(facts): State<Facts>) -> Json<Vec<RouteRow>> {
    let snapshot = facts.published.borrow().snapshot.clone();
    let holders = |kind| facts.fleet.holders(kind, &snapshot);
    Json(routes::rows(
        &snapshot,
        &holders(penstock_api::resource::Kind::Routes),
        &holders(penstock_api::resource::Kind::Weights),
    ))
}

async fn endpoints_page(State(facts): State<Facts>) -> Json<Vec<EndpointRow>> {
    let snapshot = facts.published.borrow().snapshot.clone();
    let answers = facts.fleet.ask_all(Question::Endpoints, PATIENCE).await;
    let seen = answers.into_iter().filter_map(|(node, answer)| {
        let answer = answer.map_err(|error| error.to_string());
        let rows = answer.and_then(|json| serde_json::from_str(&json).map_err(|error| error.to_string()));
        // A proxy that does not answer is missing from the sums, which is no reason to answer nothing.
        rows.map_err(|error| tracing::debug!(%node, "its endpoints are left out: {error}")).ok()
    });
    Json(endpoints::join(&snapshot, seen.collect()))
}

async fn authz_page(
    State(facts): State<Facts>,
    Query(question): Query<authz::Question>,
) -> Result<Json<Authz>, ApiError> {
    let snapshot = facts.published.borrow().snapshot.clone();
    let holders = facts.fleet.holders(penstock_api::resource::Kind::Access, &snapshot);
    let applied = |pod: &str| holders.get(pod).map(|(applied, subscribed)| applied == subscribed);
    let answer = authz::answer(&snapshot, &question, applied);
    answer.map(Json).map_err(|error| ApiError(StatusCode::BAD_REQUEST, error))
}

async fn certificates(State(facts): State<Facts>) -> Json<Vec<ProxyCertificates>> {
    let answers = facts.fleet.ask_all(Question::Certificates, PATIENCE).await;
    let row = |(node, answer): (String, Result<String, AskError>)| {
        let answer = answer.map_err(|error| error.to_string());
        let read = |json: String| serde_json::from_str(&json).map_err(|error| format!("{node}: {error}"));
        match answer.and_then(read) {
            Ok(certificates) => ProxyCertificates { node, certificates, error: None },
            Err(error) => ProxyCertificates { node, certificates: Vec::new(), error: Some(error) },
        }
    };
    Json(answers.into_iter().map(row).collect())
}

async fn problems(State(facts): State<Facts>) -> Json<Vec<Problem>> {
    Json(facts.published.borrow().snapshot.problems.clone())
}

#[derive(Deserialize)]
struct TapQuery {
    service: Option<String>,
    direction: Option<String>,
    limit: Option<u64>,
    #[serde(default)]
    explain: bool,
}

async fn tap(State(facts): State<Facts>, Query(query): Query<TapQuery>) -> Result<Response, ApiError> {
    let bad = |error: String| ApiError(StatusCode::BAD_REQUEST, error);
    let service = query.service.unwrap_or_default();
    if !service.is_empty() {
        service.parse::<ServiceName>().map_err(|error| bad(error.to_string()))?;
    }
    let direction = match query.direction.as_deref() {
        None | Some("both") => None,
        Some("outbound") => Some(v1::Direction::Outbound),
        Some("inbound") => Some(v1::Direction::Inbound),
        Some(other) => {
            return Err(bad(format!("direction={other:?} is none; write outbound, inbound or both")));
        }
    };
    let tap = facts.fleet.tap(TapFilter { service, direction, explain: query.explain });
    let left = query.limit.unwrap_or(u64::MAX);
    let lines = futures_util::stream::unfold((tap, left, facts.stop), |(mut tap, left, stop)| async move {
        if left == 0 {
            return None;
        }
        let event = tokio::select! {
            () = stop.cancelled() => return None,
            event = tap.next() => event?,
        };
        let line = serde_json::to_string(&event).map(|json| json + "\n");
        Some((line, (tap, left - 1, stop)))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], axum::body::Body::from_stream(lines))
        .into_response())
}

#[derive(Deserialize)]
struct RenewQuery {
    node: Option<String>,
}

async fn renew(
    State(facts): State<Facts>,
    Query(query): Query<RenewQuery>,
) -> Result<Json<Vec<Renewal>>, ApiError> {
    let answers = match query.node.filter(|node| !node.is_empty()) {
        None => facts.fleet.ask_all(Question::Renew, RENEWAL_PATIENCE).await,
        Some(node) => {
            let answer = facts.fleet.ask(&node, Question::Renew, RENEWAL_PATIENCE).await;
            if let Err(error @ AskError::Gone(_)) = &answer {
                return Err(ApiError(StatusCode::NOT_FOUND, error.to_string()));
            }
            vec![(node, answer)]
        }
    };
    let row = |(node, answer): (String, Result<String, AskError>)| Renewal {
        node,
        error: answer.err().map(|error| error.to_string()),
    };
    Ok(Json(answers.into_iter().map(row).collect()))
}

async fn metrics_page(State(facts): State<Facts>) -> Result<Response, ApiError> {
    match facts.metrics {
        Some(handle) => {
            let page = handle.render() + &canary::page(&facts.canaries.borrow());
            Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response())
        }
        None => Err(ApiError(StatusCode::NOT_FOUND, "this control was started without metrics".to_owned())),
    }
}
