//! Questions between sidecars: how much work is at your application?
//!
//! Load reports ride on responses, so of an endpoint that gets no requests nothing is heard. When a choice knew too
//! little of one, that one is asked, beside the request and not before it. The inbound proxy answers by itself, in
//! microseconds, and the application never hears of it.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use penstock_inference::orca::Load;

use crate::body::{RequestBody, ResponseBody};
use crate::config::{Cluster, Endpoint};
use crate::headers::{MODELS, PROBE};
use crate::loaded::Loaded;
use crate::report::{self, LastTold};
use crate::telemetry::metric;
use crate::worker::Worker;

/// Questions of a worker at once; above, none is asked.
const AT_ONCE: usize = 16;
/// An answer that takes longer says enough by that.
const PATIENCE: Duration = Duration::from_secs(1);

/// The questions of a worker that wait for an answer.
#[derive(Debug, Default)]
pub struct Probes {
    /// Ids of the endpoints that were asked.
    asked: RefCell<Vec<u32>>,
}

/// Asks an endpoint for its load, unless it has not answered the last question yet, of whatever model, or enough are asked already.
pub fn ask(worker: &Rc<Worker>, cluster: &Arc<Cluster>, endpoint: Arc<Endpoint>, model: &str) {
    let mut asked = worker.probes.asked.borrow_mut();
    if !endpoint.sidecar || asked.len() >= AT_ONCE || asked.contains(&endpoint.id) {
        return;
    }
    let Ok(model) = HeaderValue::from_str(model) else { return };
    asked.push(endpoint.id);
    let (worker, cluster) = (Rc::clone(worker), Arc::clone(cluster));
    tokio::task::spawn_local(async move {
        let answer = tokio::time::timeout(PATIENCE, send(&worker, &cluster, &endpoint, model)).await;
        let told = matches!(answer, Ok(Some(())));
        metrics::counter!(metric::PROBES.name, "result" => if told { "ok" } else { "failed" }).increment(1);
        worker.probes.asked.borrow_mut().retain(|id| *id != endpoint.id);
    });
}

async fn send(
    worker: &Rc<Worker>,
    cluster: &Arc<Cluster>,
    endpoint: &Arc<Endpoint>,
    model: HeaderValue,
) -> Option<()> {
    let policy = cluster.policy();
    let pool = worker.pools.of(endpoint);
    let (mut sender, _lease) = pool.http2(worker, endpoint, cluster, &policy).await.ok()?;
    let mut request = Request::new(RequestBody::Empty);
    *request.uri_mut() = http::Uri::from_static("http://penstock.probe/");
    request.headers_mut().insert(PROBE, model);
    let response = sender.send_request(request).await.ok()?;
    if let Some(models) = response.headers().get(MODELS).and_then(Loaded::of_header) {
        cluster.told_models(endpoint, models, worker.now());
    }
    let load = Load::from_headers(response.headers())?;
    cluster.pool.told(&endpoint.state, report::told(&load), worker.now());
    Some(())
}

/// The model that a sidecar asks about, if that is all it wants.
pub fn asked(headers: &HeaderMap) -> Option<&str> {
    headers.get(PROBE)?.to_str().ok()
}

/// The answer.
pub fn answer(worker: &Worker, model: &str) -> Response<ResponseBody> {
    let mut response = Response::new(ResponseBody::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    report::load(worker, &worker.model(model)).stamp(response.headers_mut(), &mut worker.scratch());
    report::list_models(worker, &LastTold::default(), response.headers_mut());
    response
}
