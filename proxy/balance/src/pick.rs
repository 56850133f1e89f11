//! What there is to choose from and by what rule.

use crate::load::EndpointState;
use crate::pool::Ask;

/// How to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// The least predicted time until it is answered.
    #[default]
    Gpu,
    /// The same, also among those that have a part of the prompt or should have it.
    Prefix,
    /// Of two drawn at random the one with fewer requests.
    LeastRequest,
    /// In turn.
    RoundRobin,
    /// By a key, with bounded load.
    RingHash,
    /// In turn, weighted by load reports (gRFC A58).
    OrcaWrr,
}

impl Policy {
    /// Its name, as the annotation has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Prefix => "prefix",
            Self::LeastRequest => "least-request",
            Self::RoundRobin => "round-robin",
            Self::RingHash => "ring-hash",
            Self::OrcaWrr => "orca-wrr",
        }
    }
}

/// Something that can be picked.
pub trait Candidate {
    /// Its state.
    fn state(&self) -> &EndpointState;

    /// Its name as a number that is the same in every sidecar, a hash of its address say.
    fn name(&self) -> u64 {
        0
    }

    /// Whether it can serve the request at all: the model and the adapter are loaded, its weight is not zero.
    fn serves(&self, _ask: &Ask<'_>) -> bool {
        true
    }

    /// What the way there costs more than the nearest way, in milliseconds: another zone.
    fn distance_ms(&self) -> f32 {
        0.0
    }
}

/// Why nothing was picked; prints well in an error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NonePicked {
    /// Endpoints there are.
    pub total: usize,
    /// Of them, draining.
    pub draining: usize,
    /// Of them, ejected.
    pub ejected: usize,
    /// Of them, tried already by this request.
    pub tried: usize,
    /// Of them, without what the request needs: its model, its adapter.
    pub unfit: usize,
}

impl std::fmt::Display for NonePicked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "0 of {} ready", self.total)?;
        let parts = [
            (self.draining, "draining"),
            (self.ejected, "ejected"),
            (self.tried, "tried already"),
            (self.unfit, "without the model"),
        ];
        let mut separator = ": ";
        for (count, word) in parts.into_iter().filter(|(count, _)| *count > 0) {
            write!(f, "{separator}{count} {word}")?;
            separator = ", ";
        }
        Ok(())
    }
}

impl<C: Candidate> Candidate for std::sync::Arc<C> {
    fn state(&self) -> &EndpointState {
        (**self).state()
    }

    fn name(&self) -> u64 {
        (**self).name()
    }

    fn serves(&self, ask: &Ask<'_>) -> bool {
        (**self).serves(ask)
    }

    fn distance_ms(&self) -> f32 {
        (**self).distance_ms()
    }
}
