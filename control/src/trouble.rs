//! What keeps something from being kept up: told when it begins, when it becomes another, and when it is over.

/// What is tried until it works.
#[derive(Debug)]
pub(crate) struct Trouble {
    what: String,
    known: Option<String>,
}

impl Trouble {
    /// None yet. `what`: what it is about, as a line of the log begins.
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self { what: what.into(), known: None }
    }

    /// It went wrong: told, if that is news.
    pub(crate) fn met(&mut self, error: &anyhow::Error) {
        let why = format!("{error:#}");
        if self.known.as_ref() != Some(&why) {
            tracing::warn!("{}: {why}; what is in force stays, and it is tried again", self.what);
            self.known = Some(why);
        }
    }

    /// It worked.
    pub(crate) fn over(&mut self) {
        if self.known.take().is_some() {
            tracing::info!("{}: all is well again", self.what);
        }
    }
}
