//! Endpoints, load reports and balancing policies.
//!
//! Pure: no sockets, no clocks, no global randomness. `now` is a [`Duration`] since an epoch of the caller's choice
//! (the same for all calls), randomness is a generator that the caller passes in, and shared facts are atomics, so
//! the same code runs in the proxy's workers, in the simulator and under a paused clock.
//!
//! A request meets the modules in this order: [`split`] chooses the version, [`mod@pick`] the endpoint, [`load`] keeps
//! what the choice is made from, [`outlier`] takes failing endpoints out, [`budget`] says whether to try again.

pub mod budget;
pub mod load;
pub mod outlier;
pub mod pick;
pub mod split;

use std::time::Duration;

pub use budget::RetryBudget;
pub use load::{EndpointState, Report};
pub use outlier::OutlierPolicy;
pub use pick::{Candidate, NonePicked, Policy, pick};

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
