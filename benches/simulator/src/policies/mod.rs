//! The policies: ours as it is in `penstock_balance`, and those of the peers, written from their descriptions with the
//! defaults they publish. One object serves all clients of a run and keeps a state for each, unless the peer is a central
//! picker: then it has one state, sees every request at once, and pays no network for that here.

mod epp;
mod ewma;
mod oracle;
mod penstock;
mod prequal;
mod sglang;
mod simple;

use penstock_balance::{LoadReport, Policy as Balance};
use rand::rngs::SmallRng;

use crate::server::Nanos;
use crate::workload::Request;
use crate::world::Truth;

/// A request that wants a replica.
pub struct Asked<'a> {
    /// The request.
    pub request: &'a Request,
    /// The replicas that are up.
    pub up: &'a [usize],
    /// For the oracle alone.
    pub truth: &'a Truth,
    /// The time.
    pub now: Nanos,
}

/// What a probe brings back.
#[derive(Clone, Copy, Debug)]
pub struct Probe {
    /// Requests in flight.
    pub rif: u32,
    /// Milliseconds that requests took that found about as many in flight.
    pub latency: f32,
    /// A load report.
    pub report: LoadReport,
}

/// A way to choose a replica.
pub trait Policy {
    /// The replica for a request.
    fn pick(&mut self, client: usize, asked: &Asked<'_>, random: &mut SmallRng) -> usize;

    /// Which replicas are up.
    fn members(&mut self, _up: &[usize], _now: Nanos) {}

    /// The head of the answer has come after so many milliseconds.
    fn head(&mut self, _client: usize, _request: usize, _server: usize, _ms: f64, _now: Nanos) {}

    /// The request is over.
    fn over(
        &mut self,
        _client: usize,
        _request: usize,
        _server: usize,
        _ms: f64,
        _failed: bool,
        _now: Nanos,
    ) {
    }

    /// A load report has come.
    fn report(&mut self, _client: usize, _server: usize, _report: &LoadReport, _now: Nanos) {}

    /// Replicas that should be probed after a pick.
    fn probes(&mut self, _client: usize, _up: &[usize], _random: &mut SmallRng, _to: &mut Vec<usize>) {}

    /// A probe has come back.
    fn probed(&mut self, _client: usize, _server: usize, _probe: &Probe, _now: Nanos) {}

    /// How often it looks at the replicas' metrics.
    fn scrapes_every(&self) -> Option<Nanos> {
        None
    }

    /// It looks at the replicas' metrics: queue lengths and cache use, nothing else of the truth.
    fn scrape(&mut self, _truth: &Truth, _now: Nanos) {}

    /// A second has passed.
    fn tend(&mut self, _now: Nanos) {}
}

/// The subjects by name. `penstock` is the policy for the kind of work: `gpu` for tensors, `prefix` for conversations.
pub const SUBJECTS: [&str; 14] = [
    "penstock",
    "penstock-asking",
    "penstock-gpu",
    "oracle",
    "random",
    "round-robin",
    "least-request",
    "peak-ewma",
    "orca-wrr",
    "ring-hash",
    "prequal",
    "epp",
    "sglang",
    "sglang-library",
];

/// The policy of a subject; none if the subject makes no sense for this work.
pub fn of(subject: &str, clients: usize, servers: usize, chat: bool) -> Option<Box<dyn Policy>> {
    let ours = |policy| penstock::Ours::new(policy, clients, servers);
    Some(match subject {
        "penstock" => Box::new(ours(if chat { Balance::Prefix } else { Balance::Gpu })),
        "penstock-asking" => Box::new(ours(if chat { Balance::Prefix } else { Balance::Gpu }).asking()),
        "penstock-gpu" if chat => Box::new(ours(Balance::Gpu)),
        "ring-hash" if chat => Box::new(ours(Balance::RingHash)),
        "orca-wrr" => Box::new(ours(Balance::OrcaWrr)),
        "oracle" => Box::new(oracle::Oracle),
        "random" => Box::new(simple::Random),
        "round-robin" => Box::new(simple::RoundRobin::new(clients)),
        "least-request" => Box::new(simple::LeastRequest::new(clients, servers)),
        "peak-ewma" => Box::new(ewma::PeakEwma::new(clients, servers)),
        "prequal" => Box::new(prequal::Prequal::new(clients, servers)),
        "epp" => Box::new(epp::Epp::new(servers)),
        "sglang" => Box::new(sglang::CacheAware::new(servers, sglang::COMMAND_LINE)),
        "sglang-library" if chat => Box::new(sglang::CacheAware::new(servers, sglang::LIBRARY)),
        _ => return None,
    })
}
