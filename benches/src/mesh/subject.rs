//! Who is compared: Penstock by its policies, and the peers by theirs.

use clap::ValueEnum;

/// A balancer with its policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Subject {
    /// Ours, with the policy that is the default.
    Penstock,
    /// Ours, for language models.
    PenstockPrefix,
    /// Ours, as Envoy does it.
    PenstockLeastRequest,
    /// Ours, one after the other.
    PenstockRoundRobin,
    /// Envoy beside each client, least request of two; the baseline.
    Envoy,
    /// Envoy beside each client, weighted by the load reports of our inbound sidecars.
    EnvoyWrr,
    /// HAProxy for all clients, fewest connections.
    Haproxy,
    /// nginx for all clients, fewest connections.
    Nginx,
    /// SGLang's router for all clients, less loaded of two.
    SglangPowerOfTwo,
    /// SGLang's router for all clients, longest known prefix.
    SglangCacheAware,
    /// vLLM's router for all clients, less loaded of two.
    VllmPowerOfTwo,
    /// vLLM's router for all clients, longest known prefix.
    VllmCacheAware,
}

/// The subject that ratios refer to.
pub(crate) const BASELINE: Subject = Subject::Envoy;

/// A router from PyPI: its module, its policy by the name of its command line, and what it calls the log level of warnings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Router {
    pub(crate) module: &'static str,
    pub(crate) policy: &'static str,
    pub(crate) quiet: &'static str,
}

impl Subject {
    /// As rows name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Penstock => "penstock",
            Self::PenstockPrefix => "penstock-prefix",
            Self::PenstockLeastRequest => "penstock-least-request",
            Self::PenstockRoundRobin => "penstock-round-robin",
            Self::Envoy => "envoy",
            Self::EnvoyWrr => "envoy-wrr",
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::SglangPowerOfTwo => "sglang-power-of-two",
            Self::SglangCacheAware => "sglang-cache-aware",
            Self::VllmPowerOfTwo => "vllm-power-of-two",
            Self::VllmCacheAware => "vllm-cache-aware",
        }
    }

    /// The value of `penstock.io/balance` for one of ours.
    pub(crate) fn balance(self) -> Option<&'static str> {
        match self {
            Self::Penstock => Some("gpu"),
            Self::PenstockPrefix => Some("prefix"),
            Self::PenstockLeastRequest => Some("least-request"),
            Self::PenstockRoundRobin => Some("round-robin"),
            _ => None,
        }
    }

    /// The router that it is.
    pub(crate) fn router(self) -> Option<Router> {
        let sglang = |policy| Some(Router { module: "sglang_router", policy, quiet: "warn" });
        let vllm = |policy| Some(Router { module: "vllm_router", policy, quiet: "warning" });
        match self {
            Self::SglangPowerOfTwo => sglang("power_of_two"),
            Self::SglangCacheAware => sglang("cache_aware"),
            Self::VllmPowerOfTwo => vllm("power_of_two"),
            Self::VllmCacheAware => vllm("cache_aware"),
            _ => None,
        }
    }
}
