//! Admission: which requests the application gets, in which order, and which it had better not get at all.
//!
//! In: a request with its tenant, priority, expected work and deadline, and what is predicted of the application. Out:
//! a [`Permit`], which is a slot of the application, at once or when its turn has come; or a [`Refusal`] with a reason and
//! the time after which trying again has a chance. One [`Gate`] stands before each model.
//!
//! | | decides | pure |
//! | --- | --- | --- |
//! | [`facts`] | until when, and how urgent: what a request says of itself, and what it may say | yes |
//! | [`limit`] | how many the application gets at once: as declared, or found out by the gradient of its times | yes |
//! | [`fair`] | whose turn it is: virtual token counters | yes |
//! | [`queue`] | who waits, who starts, who is refused | yes |
//! | [`gate`] | nothing: it carries this out for all workers, without a lock | |
//!
//! The queue stands here and not in the application, since here it is known who asks, for whom somebody waits, and what
//! waits for nothing any more. A model server's own queue is first come, first served, and works on for clients that
//! have long gone.

pub mod facts;
pub mod fair;
pub mod gate;
#[cfg(test)]
mod gate_tests;
pub mod limit;
pub mod queue;
#[cfg(test)]
mod queue_tests;

use std::time::Duration;

use penstock_api::Reason;

pub use fair::Work;
pub use gate::{Gate, Owner, Permit, State};
pub use limit::{Adaptive, Limit};
pub use queue::{Ask, Cause, Outlook, Priority, Refusal, Tenant};

impl Refusal {
    /// The reason on the answer.
    pub const fn reason(&self) -> Reason {
        match self.cause {
            Cause::Full => Reason::QueueFull,
            Cause::TooLate => Reason::TooLate,
        }
    }

    /// The value of `retry-after`: whole seconds, at least one, and no more than a minute, since predictions of more
    /// than that are worth nothing.
    pub fn retry_after_seconds(&self) -> u64 {
        self.retry_after.as_secs_f64().ceil().clamp(1.0, 60.0) as u64
    }

    /// What happened, to whom, because of what; what to do.
    pub fn story(&self, model: &str, state: &State) -> String {
        let again = self.retry_after_seconds();
        let waiting = state.waiting;
        match self.cause {
            Cause::Full => format!(
                "the queue of {model} is full: {waiting} requests wait for {} slots, and this caller has its share of them; \
                 try again in {again} s, or elsewhere",
                state.limit
            ),
            Cause::TooLate => format!(
                "{model} cannot answer before this request's deadline: it would begin in {}, with {waiting} waiting for {} \
                 slots; allow it more time, or try again in {again} s",
                in_words(self.wait),
                state.limit
            ),
        }
    }
}

fn in_words(wait: Duration) -> String {
    let milliseconds = wait.as_millis().min(86_400_000) as u64;
    humantime::format_duration(Duration::from_millis(milliseconds)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_to_do_and_when() {
        let state = State { waiting: 64, limit: 8, ..State::default() };
        let refusal = Refusal {
            cause: Cause::TooLate,
            wait: Duration::from_millis(1250),
            retry_after: Duration::from_millis(1001),
        };
        assert_eq!(refusal.retry_after_seconds(), 2);
        assert_eq!(
            refusal.story("demo/digits", &state),
            "demo/digits cannot answer before this request's deadline: it would begin in 1s 250ms, with 64 waiting for 8 \
             slots; allow it more time, or try again in 2 s"
        );
        let full = Refusal { cause: Cause::Full, wait: Duration::MAX, retry_after: Duration::MAX };
        assert_eq!((full.retry_after_seconds(), full.reason().status()), (60, 429));
        assert!(
            full.story("m", &state).contains("64 requests wait for 8 slots"),
            "{}",
            full.story("m", &state)
        );
        let at_once = Refusal { retry_after: Duration::ZERO, ..full };
        assert_eq!(at_once.retry_after_seconds(), 1);
    }
}
