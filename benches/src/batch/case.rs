//! The cases of the batching bed: which server, who stands before it, what is sent, what is measured.

use std::time::Duration;

use clap::ValueEnum;

use crate::report::Named;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Subject {
    /// Our sidecar before the server, as the case annotates its Service.
    Penstock,
    /// Nothing before the server.
    Direct,
    /// Envoy before the server.
    Envoy,
    /// KServe's batcher as it is shipped: 32 rows, 5 s.
    Kserve,
    /// KServe's batcher told to wait for 5 ms.
    KserveTuned,
    /// MLServer's own adaptive batching.
    Mlserver,
    /// Our sidecar before the server without any annotation.
    PassThrough,
}

impl Subject {
    /// As rows name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Penstock => "penstock",
            Self::Direct => "direct",
            Self::Envoy => "envoy",
            Self::Kserve => "kserve",
            Self::KserveTuned => "kserve-tuned",
            Self::Mlserver => "mlserver",
            Self::PassThrough => "pass-through",
        }
    }

    /// How long KServe's batcher waits for a batch to be full.
    pub(crate) fn patience(self) -> Option<Duration> {
        match self {
            Self::Kserve => Some(Duration::from_secs(5)),
            Self::KserveTuned => Some(Duration::from_millis(5)),
            _ => None,
        }
    }
}

/// What serves the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The real Triton, with or without dynamic batching.
    Triton { dynamic: bool },
    /// The real MLServer, which batches by itself only for the subject that is about it.
    MlServer,
    /// A simulated server that costs next to nothing but the model's time.
    Simulated { instances: u32 },
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Load {
    /// So many clients, each of which asks again as soon as it is answered.
    Closed(usize),
    /// So many requests a second, timed from the moment each was due.
    Open(u32),
    /// More and more clients; what counts is the most requests a second with this 99th percentile or a better one.
    Ladder(&'static [usize], Duration),
    /// So many equal requests at one moment.
    Burst(usize),
}

/// What a request looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Body {
    /// The Open Inference Protocol with the tensor behind the JSON.
    Binary { values: usize },
    /// The same in JSON; to KServe's batcher its V1.
    Json { values: usize },
    /// A binary request that must not be batched: it belongs to a sequence.
    Sequence { values: usize },
}

impl Body {
    /// Values of its one row.
    pub(crate) fn values(self) -> usize {
        match self {
            Self::Binary { values } | Self::Json { values } | Self::Sequence { values } => values,
        }
    }
}

/// One case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) says: &'static str,
    pub(crate) kind: Kind,
    /// SIMULATED: what an execution takes, and each of its rows.
    pub(crate) fixed: Duration,
    pub(crate) row: Duration,
    pub(crate) body: Body,
    pub(crate) load: Load,
    pub(crate) subjects: &'static [Subject],
    pub(crate) baseline: Subject,
    /// Annotations of our sidecar's Service, `batch` and `coalesce`.
    pub(crate) annotations: &'static [(&'static str, &'static str)],
    pub(crate) metrics: &'static [Named],
}

pub(crate) const RPS: Named = ("rps", "requests/s");
pub(crate) const P99: Named = ("p99_us", "us");
pub(crate) const CPU_PER_GB: Named = ("cpu_s_per_gb", "s/GB");
pub(crate) const CPU_PER_1K: Named = ("cpu_s_per_1k", "s/1000");
pub(crate) const EXECUTIONS: Named = ("executions", "executions");

const BATCH: &str = penstock_api::names::annotation::BATCH;
const COALESCE: &str = penstock_api::names::annotation::COALESCE;

const UNBATCHED: Case = Case {
    name: "triton-unbatched-64",
    says: "Triton, 5 ms an execution and 50 us a row (simulated), no dynamic batching; 64 clients of one row",
    kind: Kind::Triton { dynamic: false },
    fixed: Duration::from_millis(5),
    row: Duration::from_micros(50),
    body: Body::Binary { values: 64 },
    load: Load::Closed(64),
    subjects: &[Subject::Penstock, Subject::Direct],
    baseline: Subject::Direct,
    annotations: &[(BATCH, "max=32,delay=2ms")],
    metrics: &[RPS, P99],
};

/// All cases, in the order in which they are run.
pub(crate) const CASES: [Case; 8] = [
    UNBATCHED,
    Case {
        name: "triton-unbatched-1",
        says: "the same at 40 requests a second: what batching costs who has nobody to share with",
        load: Load::Open(40),
        metrics: &[P99],
        ..UNBATCHED
    },
    Case {
        name: "triton-dynamic-64",
        says: "triton-unbatched-64 with Triton's own dynamic batching on",
        kind: Kind::Triton { dynamic: true },
        ..UNBATCHED
    },
    Case {
        name: "kserve-batcher",
        says: "a simulated server of 8 instances, 40 ms an execution and 500 us a row: most requests/s with a p99 of 150 ms",
        kind: Kind::Simulated { instances: 8 },
        fixed: Duration::from_millis(40),
        row: Duration::from_micros(500),
        body: Body::Json { values: 16 },
        load: Load::Ladder(&[8, 16, 32, 64, 128, 256], Duration::from_millis(150)),
        subjects: &[Subject::Penstock, Subject::Kserve, Subject::KserveTuned],
        baseline: Subject::Kserve,
        annotations: &[(BATCH, "max=32,delay=2ms,concurrent=8")],
        ..UNBATCHED
    },
    Case {
        name: "mlserver",
        says: "MLServer, the same model in JSON, 64 clients: our batching before it against its own",
        kind: Kind::MlServer,
        body: Body::Json { values: 16 },
        subjects: &[Subject::Penstock, Subject::Mlserver, Subject::Direct],
        baseline: Subject::Mlserver,
        ..UNBATCHED
    },
    Case {
        name: "triton-6mib-shm",
        says: "Triton, a tensor of 6 MiB a request over 4 connections, no pause: CPU of server and proxy",
        fixed: Duration::ZERO,
        row: Duration::ZERO,
        body: Body::Binary { values: 6 << 18 },
        load: Load::Closed(4),
        subjects: &[Subject::Penstock, Subject::Direct, Subject::Envoy],
        metrics: &[CPU_PER_GB, RPS, P99],
        ..UNBATCHED
    },
    Case {
        name: "single-flight-200",
        says: "Triton, 100 ms an execution; 200 equal requests at one moment: how often the model ran",
        fixed: Duration::from_millis(100),
        row: Duration::ZERO,
        load: Load::Burst(200),
        annotations: &[(COALESCE, "single-flight,deterministic")],
        metrics: &[EXECUTIONS],
        ..UNBATCHED
    },
    Case {
        name: "pass-through",
        says: "requests that belong to a sequence, so nothing may be shared: CPU of the sidecar with batching on and off",
        kind: Kind::Simulated { instances: 64 },
        fixed: Duration::ZERO,
        row: Duration::ZERO,
        body: Body::Sequence { values: 64 },
        load: Load::Closed(16),
        subjects: &[Subject::Penstock, Subject::PassThrough],
        baseline: Subject::PassThrough,
        metrics: &[CPU_PER_1K, RPS, P99],
        ..UNBATCHED
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_ours_and_its_baseline() {
        for case in CASES {
            assert!(case.subjects.contains(&case.baseline) && case.subjects.contains(&Subject::Penstock));
            assert!(!case.annotations.is_empty() && !case.metrics.is_empty(), "{}", case.name);
        }
    }
}
