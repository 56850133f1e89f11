//! Which GPU, and how it is: what a load report says of the hardware behind a replica.

/// The identity of a physical GPU. Replicas with the same one share its capacity and its faults (time slicing, MPS,
/// MIG).
///
/// The first 48 bits of BLAKE3 over the UUID's text, as a whole number: it fits a double exactly, which is all that a
/// load report can carry. Two of 10,000 GPUs collide with a probability of 2 in 10 million.
///
/// ```
/// # use penstock_inference::orca::GpuId;
/// let gpu = GpuId::of_uuid("GPU-5b1e3a4c-0f4e-11ee-be56-0242ac120002");
/// assert_eq!(GpuId::of_number(gpu.number()), Some(gpu));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GpuId(u64);

/// One above the largest identity.
const END: u64 = 1 << 48;

impl GpuId {
    /// Of the GPU with this UUID, as NVML and DCGM print it (`GPU-…`). White space around it does not count.
    pub fn of_uuid(uuid: &str) -> Self {
        let hash = blake3::hash(uuid.trim_ascii().as_bytes());
        let first: [u8; 6] = std::array::from_fn(|at| hash.as_bytes()[at]);
        Self(first.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    /// Reads what a report says; `None`: not a whole number of 48 bits.
    pub fn of_number(number: f64) -> Option<Self> {
        let whole = number.fract() == 0.0 && (0.0..END as f64).contains(&number);
        whole.then_some(Self(number as u64))
    }

    /// As a report says it.
    pub fn number(self) -> f64 {
        self.0 as f64
    }
}

/// How a GPU is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum GpuHealth {
    /// Well.
    #[default]
    Well,
    /// Slowed down by heat, power or the hardware's own protection.
    Throttled,
    /// Not to be trusted: an Xid that ends work, or memory errors that were not corrected.
    Failed,
}

impl GpuHealth {
    /// Reads what a report says: 0, 1, 2. What is between counts as the worse, what is above as failed.
    pub fn of_number(number: f64) -> Self {
        match number {
            _ if number > 1.0 => Self::Failed,
            _ if number > 0.0 => Self::Throttled,
            _ => Self::Well,
        }
    }

    /// As a report says it.
    pub fn number(self) -> f64 {
        match self {
            Self::Well => 0.0,
            Self::Throttled => 1.0,
            Self::Failed => 2.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_48_bits_of_the_hash() {
        let uuid = "GPU-5b1e3a4c-0f4e-11ee-be56-0242ac120002";
        let gpu = GpuId::of_uuid(uuid);
        let hex = blake3::hash(uuid.as_bytes()).to_hex();
        assert_eq!(format!("{:012x}", gpu.number() as u64), hex[..12]);
        assert_eq!(GpuId::of_uuid(&format!(" {uuid}\n")), gpu);
        assert_ne!(GpuId::of_uuid("GPU-5b1e3a4c-0f4e-11ee-be56-0242ac120003"), gpu);
    }

    #[test]
    fn what_is_no_identity_is_not_taken_for_one() {
        for number in [-1.0, 0.5, 281_474_976_710_656.0, f64::NAN, f64::INFINITY] {
            assert_eq!(GpuId::of_number(number), None, "{number}");
        }
        assert!(GpuId::of_number(281_474_976_710_655.0).is_some());
    }

    #[test]
    fn health_survives_the_way_and_doubt_is_the_worse() {
        for health in [GpuHealth::Well, GpuHealth::Throttled, GpuHealth::Failed] {
            assert_eq!(GpuHealth::of_number(health.number()), health);
        }
        assert_eq!(GpuHealth::of_number(1.5), GpuHealth::Failed);
        assert_eq!(GpuHealth::of_number(0.1), GpuHealth::Throttled);
    }
}
