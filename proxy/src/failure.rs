//! What went wrong with a request, as data: the reason (with its blame, status and words), the story for people, and
//! whether another try can help.

use std::borrow::Cow;

use penstock_api::Reason;

/// A request that could not be served.
#[derive(Clone, Debug)]
pub struct Failure {
    /// From the closed list.
    pub reason: Reason,
    /// What happened, to whom, because of what; what to do.
    pub story: Cow<'static, str>,
    /// Another try cannot do harm: the server has provably not begun to work on it, or it is one that may be asked twice.
    pub unprocessed: bool,
    /// After how many seconds trying again has a chance; 0 = not known.
    pub retry_after: u64,
}

impl Failure {
    /// A failure that may have had effects at the server.
    pub fn new(reason: Reason, story: impl Into<Cow<'static, str>>) -> Self {
        Self { reason, story: story.into(), unprocessed: false, retry_after: 0 }
    }

    /// A failure before anything reached the server.
    pub fn unprocessed(reason: Reason, story: impl Into<Cow<'static, str>>) -> Self {
        Self { reason, story: story.into(), unprocessed: true, retry_after: 0 }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.reason, self.story)
    }
}

impl std::error::Error for Failure {}
