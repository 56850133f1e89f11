//! Endpoints, load reports and balancing policies.
//!
//! Pure: no sockets, no clocks, no global randomness. `now` is a [`Duration`] since an epoch of the caller's choice
//! (the same for all calls), randomness is a generator that the caller passes in, and shared facts are atomics, so
//! the same code runs in the proxy's workers, in the simulator and under a paused clock.
//!
//! A request meets the modules in this order: [`split`] chooses the version, [`pool`] the endpoint out of the
//! [`members`] by one of the policies of [`pick`]; [`load`] keeps what the choice is made from, which is told by a
//! [`report`] or remembered by a [`memory`]; [`outlier`] takes failing endpoints out, [`budget`] says whether to try again.
//! At the other end [`estimate`] finds out what the reports tell.

pub mod budget;
mod cell;
pub mod estimate;
mod heard;
pub mod load;
pub mod members;
pub mod memory;
pub mod outlier;
pub mod pick;
pub mod pool;
mod rendezvous;
pub mod report;
pub mod split;
pub mod wrr;

use std::time::Duration;

pub use budget::RetryBudget;
pub use estimate::{Cost, Estimator};
pub use load::{EndpointState, Outcome, Sent};
pub use members::Members;
pub use outlier::OutlierPolicy;
pub use pick::{Candidate, NonePicked, Policy};
pub use pool::{Ask, Explained, Heat, Look, Picked, Pool, Quality, Settings, Why};
pub use report::{GpuHealth, LoadReport};

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
