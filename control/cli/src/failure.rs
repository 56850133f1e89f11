//! Why a command ended badly, and the exit status that says so to a script.

/// The exit statuses, as `penstock --help` lists them.
pub(crate) mod exit {
    /// Everything is as it should be.
    pub(crate) const FINE: u8 = 0;
    /// The command worked and found a problem, or could not finish.
    pub(crate) const PROBLEM: u8 = 1;
    /// The command line is wrong; clap exits with the same number.
    pub(crate) const USAGE: u8 = 2;
    /// Control does not answer.
    pub(crate) const UNREACHABLE: u8 = 3;
    /// Ctrl-C, as shells count it: 128 + SIGINT.
    pub(crate) const INTERRUPTED: u8 = 130;
}

/// What went wrong, told to the person at the keyboard.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Anything that is neither of the others.
    #[error("{0}")]
    Problem(String),
    /// Arguments that parse one by one and make no sense together.
    #[error("{0}")]
    Usage(String),
    /// No connection to control, or no answer in time.
    #[error(
        "control at {url} does not answer: {cause}. Start it (penstock-control run --source dir:PATH --state DIR), \
         or say where its API is with --control URL or PENSTOCK_CONTROL_API"
    )]
    Unreachable {
        /// Where it was expected.
        url: String,
        /// What the connection said.
        cause: String,
    },
    /// The person at the keyboard wants it to end.
    #[error("interrupted")]
    Interrupted,
    /// Whoever read standard output (`head`, a pager) has read enough.
    #[error("the reader of the output is gone")]
    ReaderGone,
}

impl Failure {
    /// The exit status.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Problem(_) => exit::PROBLEM,
            Self::Usage(_) => exit::USAGE,
            Self::Unreachable { .. } => exit::UNREACHABLE,
            Self::Interrupted => exit::INTERRUPTED,
            Self::ReaderGone => exit::FINE,
        }
    }
}
