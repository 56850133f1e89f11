//! What moves a canary. Pure: what was seen, what was asked and the time are arguments.
//!
//! In: a [`Plan`], read from the object's `spec` (`read`), the [`Diary`], which is its `status`, and the [`Facts`] of the moment. Out: the diary as it
//! should be ([`walk()`]), whose [`Course`](crate::objects::canary::Course) is all that moves requests. It is level-triggered: whoever reads the object
//! and the facts comes to the same diary, so a replica that dies at any moment is followed by one that goes on from what is written.
//!
//! ```text
//!                        services and endpoints are there
//!     Invalid <-> Waiting ------------------------------+
//!                    |                                  v
//!                    |      +--------------------> Progressing <-----------+  each step: weight applied everywhere,
//!                    |      |  a person lets go         |  |               |  held, analysis passed
//!                    |      |                           |  +---------------+
//!                    |   Paused <-----------------------+
//!                    |    | |   a person is waited for  |
//!                    |    | +------------+--------------+  after the last step
//!                    |    |              v
//!                    |    |          Promoting ---------------> Succeeded      weight 100 applied everywhere, held, analysis passed
//!                    |    |              |                          | abort
//!                    |    |              |  analysis fails, the deadline passes, endpoints are gone, abort
//!                    +----+--------------+--------------------------+---> RollingBack ---> RolledBack     weight 0 applied everywhere
//!                                              (from Progressing too)
//! ```
//!
//! Of a Deployment that has not changed there is nothing to do: it waits, or stays where the last change has left it. Promoting lasts until no pod of the
//! old template is left, and a candidate of which none is left goes back.
//!
//! Another run (another Service, another `run`) begins at Waiting or Progressing, wherever the one before was. Other steps do not: it goes on at the
//! one that is nearest. A canary that is to go back and has nothing to go back to stays in its phase,
//! and goes back from there: from Invalid too, if it has waited to begin and makes no sense in between.

mod bounds;
mod checks;
mod desk;
mod diary;
mod gauges;
mod judge;
mod local;
mod outside;
mod read;
mod task;
pub mod template;
#[cfg(test)]
mod tests;
mod walk;

pub use self::bounds::{Bounds, Check, CheckKind, Latency, Plan, Shadow, Step, Wrong};
pub use self::desk::{Command, Commands, Shown};
pub use self::diary::{Answered, Diary, Entry, Moment, Observed, Phase, ShadowObserved};
pub use self::gauges::page;
pub use self::judge::{Missing, Verdict, judge};
pub use self::local::Local;
pub use self::outside::{Around, Outside, To};
pub use self::task::{Home, Sight, run};
pub use self::walk::{Checked, Facts, Reached, refused, walk, windows};
