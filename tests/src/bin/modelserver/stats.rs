//! What happened to each model's requests, under Triton's metric names where the meaning is Triton's.

use crate::model::Repository;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Counters of one model version.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) success: AtomicU64,
    pub(crate) rejected: AtomicU64,
    pub(crate) canceled: AtomicU64,
    pub(crate) backend: AtomicU64,
    pub(crate) other: AtomicU64,
    pub(crate) rows: AtomicU64,
    pub(crate) executions: AtomicU64,
    pub(crate) request_us: AtomicU64,
    pub(crate) queue_us: AtomicU64,
    pub(crate) input_us: AtomicU64,
    pub(crate) infer_us: AtomicU64,
    pub(crate) output_us: AtomicU64,
    pub(crate) pending: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Relaxed);
}

pub(crate) fn add_time(counter: &AtomicU64, time: Duration) {
    add(counter, time.as_micros() as u64);
}

/// One metric: name, type, further labels, help, where it is kept.
type Metric = (&'static str, &'static str, &'static str, &'static str, fn(&Stats) -> &AtomicU64);

const METRICS: [Metric; 13] = [
    ("nv_inference_request_success", "counter", "", "Requests that succeeded", |s| &s.success),
    ("nv_inference_request_failure", "counter", ",reason=\"REJECTED\"", "Requests that failed", |s| {
        &s.rejected
    }),
    ("nv_inference_request_failure", "counter", ",reason=\"CANCELED\"", "Requests that failed", |s| {
        &s.canceled
    }),
    ("nv_inference_request_failure", "counter", ",reason=\"BACKEND\"", "Requests that failed", |s| {
        &s.backend
    }),
    ("nv_inference_request_failure", "counter", ",reason=\"OTHER\"", "Requests that failed", |s| &s.other),
    ("nv_inference_count", "counter", "", "Rows that were inferred", |s| &s.rows),
    ("nv_inference_exec_count", "counter", "", "Executions of the model", |s| &s.executions),
    ("nv_inference_request_duration_us", "counter", "", "Time of requests, all in all", |s| &s.request_us),
    ("nv_inference_queue_duration_us", "counter", "", "Time that requests waited", |s| &s.queue_us),
    ("nv_inference_compute_input_duration_us", "counter", "", "Time of making inputs", |s| &s.input_us),
    ("nv_inference_compute_infer_duration_us", "counter", "", "Time of executing", |s| &s.infer_us),
    ("nv_inference_compute_output_duration_us", "counter", "", "Time of taking outputs", |s| &s.output_us),
    ("nv_inference_pending_request_count", "gauge", "", "Requests that wait for a thread", |s| &s.pending),
];

/// The Prometheus page.
pub(crate) fn page(models: &Repository, simulated: bool) -> String {
    let mut page = String::new();
    let mut last = "";
    for (name, kind, label, help, read) in METRICS {
        if name != last {
            let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
            last = name;
        }
        for model in models.all() {
            let (model, stats) = (&model.identity, &model.stats);
            let value = read(stats).load(Relaxed);
            let _ = writeln!(
                page,
                "{name}{{model=\"{}\",version=\"{}\"{label}}} {value}",
                model.name, model.version
            );
        }
    }
    let _ = writeln!(
        page,
        "# HELP penstock_modelserver_simulated Whether service times are simulated\n\
         # TYPE penstock_modelserver_simulated gauge\n\
         penstock_modelserver_simulated {}",
        u8::from(simulated)
    );
    page
}
