//! The cases of the mesh bed: which replicas there are, what they are asked, and who takes part.

use std::time::Duration;

use super::subject::Subject;

/// Replicas of every case.
pub(crate) const REPLICAS: usize = 8;

/// What a batch of tensors costs on a GPU of speed 1, in milliseconds, and how many rows fit into it.
pub(crate) const FIXED_MS: f64 = 40.0;
pub(crate) const ROW_MS: f64 = 10.0;
pub(crate) const MAX_BATCH: u32 = 8;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Load {
    /// Embeddings, at this share of what all replicas can do together in full batches.
    Tensors {
        /// On average.
        share: f64,
        /// Steady, or in bursts.
        bursts: Option<Bursts>,
    },
    /// Conversations of several turns with shared system prompts, this many requests a second.
    Chat {
        /// On average.
        rate: f64,
    },
}

/// A Poisson process whose rate changes between two values, each for an exponentially distributed time (Markov-modulated).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Bursts {
    /// In a burst, over the average.
    pub(crate) high: f64,
    /// Between bursts, over the average.
    pub(crate) low: f64,
    /// How long a burst lasts on average, and the time between two.
    pub(crate) lasts: Duration,
    pub(crate) apart: Duration,
}

/// One case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) says: &'static str,
    pub(crate) speeds: [f64; REPLICAS],
    pub(crate) load: Load,
    /// The replica that stands still in the middle of the measured window.
    pub(crate) stalled: Option<usize>,
    /// A request that is answered later than this is of no use; of a conversation, whose first token comes later.
    pub(crate) slo: Duration,
    pub(crate) subjects: &'static [Subject],
    /// Warm-up and measured time over those of the command line: conversations need longer.
    pub(crate) longer: f64,
}

const TENSORS: &[Subject] = &[
    Subject::Penstock,
    Subject::PenstockLeastRequest,
    Subject::Envoy,
    Subject::EnvoyWrr,
    Subject::Haproxy,
    Subject::Nginx,
    Subject::SglangPowerOfTwo,
    Subject::VllmPowerOfTwo,
];

const UNEQUAL: [f64; REPLICAS] = [1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0];

/// All cases, in the order in which they are run.
pub(crate) const CASES: [Case; 5] = [
    Case {
        name: "hetero-80",
        says: "embeddings at 80 % of capacity; four replicas of speed 1, two of 2, two of 4",
        speeds: UNEQUAL,
        load: Load::Tensors { share: 0.8, bursts: None },
        stalled: None,
        slo: Duration::from_millis(250),
        subjects: &[
            Subject::Penstock,
            Subject::PenstockLeastRequest,
            Subject::PenstockRoundRobin,
            Subject::Envoy,
            Subject::EnvoyWrr,
            Subject::Haproxy,
            Subject::Nginx,
            Subject::SglangPowerOfTwo,
            Subject::VllmPowerOfTwo,
        ],
        longer: 1.0,
    },
    Case {
        name: "steady",
        says: "embeddings at 60 % of capacity, all replicas alike: what `stalled` is without the stall",
        speeds: [2.0; REPLICAS],
        load: Load::Tensors { share: 0.6, bursts: None },
        stalled: None,
        slo: Duration::from_millis(250),
        subjects: &[Subject::Penstock, Subject::Envoy, Subject::Haproxy],
        longer: 1.0,
    },
    Case {
        name: "stalled",
        says: "`steady`, and one replica stands still for half of the time",
        speeds: [2.0; REPLICAS],
        load: Load::Tensors { share: 0.6, bursts: None },
        stalled: Some(3),
        slo: Duration::from_millis(250),
        subjects: TENSORS,
        longer: 1.0,
    },
    Case {
        name: "bursty",
        says: "the replicas of hetero-80 at 65 % on average: bursts of 120 % for 250 ms, 500 ms apart",
        speeds: UNEQUAL,
        load: Load::Tensors {
            share: 0.65,
            bursts: Some(Bursts {
                high: 1.846,
                low: 0.577,
                lasts: Duration::from_millis(250),
                apart: Duration::from_millis(500),
            }),
        },
        stalled: None,
        slo: Duration::from_millis(250),
        subjects: TENSORS,
        longer: 1.0,
    },
    Case {
        name: "chat",
        says: "conversations of up to six turns over four system prompts, streamed; all replicas alike",
        speeds: [1.0; REPLICAS],
        load: Load::Chat { rate: 120.0 },
        stalled: None,
        slo: Duration::from_millis(400),
        subjects: &[
            Subject::Penstock,
            Subject::PenstockPrefix,
            Subject::PenstockLeastRequest,
            Subject::Envoy,
            Subject::EnvoyWrr,
            Subject::Haproxy,
            Subject::Nginx,
            Subject::SglangPowerOfTwo,
            Subject::SglangCacheAware,
            Subject::VllmPowerOfTwo,
            Subject::VllmCacheAware,
        ],
        longer: 2.0,
    },
];

impl Case {
    /// Whether it is about conversations.
    pub(crate) fn is_chat(&self) -> bool {
        matches!(self.load, Load::Chat { .. })
    }

    /// Where requests are posted.
    pub(crate) fn path(&self) -> &'static str {
        if self.is_chat() { "/v1/chat/completions" } else { "/v1/embeddings" }
    }

    /// Rows a second that all replicas can do together in full batches.
    pub(crate) fn rows_per_second(&self) -> f64 {
        let batch_s = (FIXED_MS + ROW_MS * f64::from(MAX_BATCH)) / 1e3;
        self.speeds.iter().sum::<f64>() * f64::from(MAX_BATCH) / batch_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_the_baseline_and_ours() {
        for case in CASES {
            for subject in [Subject::Penstock, super::super::subject::BASELINE] {
                assert!(case.subjects.contains(&subject), "{}", case.name);
            }
            assert!(case.stalled.is_none_or(|replica| replica < REPLICAS));
        }
    }

    #[test]
    fn bursts_keep_the_average() {
        for case in CASES {
            let Load::Tensors { bursts: Some(bursts), .. } = case.load else { continue };
            let (lasts, apart) = (bursts.lasts.as_secs_f64(), bursts.apart.as_secs_f64());
            let mean = (bursts.high * lasts + bursts.low * apart) / (lasts + apart);
            assert!((mean - 1.0).abs() < 0.01, "{mean}");
        }
    }
}
