//! Being told to end: Ctrl-C (SIGINT), or SIGTERM as a CI system sends it.
//!
//! Handlers are set before a command begins to work, and stay. So a signal counts even if it comes between two waits,
//! and even if the program was started with SIGINT ignored, as shells start whatever runs in the background.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::Failure;

/// The signals that end a command.
#[derive(Debug)]
pub(crate) struct Interruption {
    interrupt: Signal,
    terminate: Signal,
}

impl Interruption {
    /// Listens from now on.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let listen = |kind: SignalKind, name: &str| {
            signal(kind).map_err(|error| Failure::Problem(format!("{name} cannot be listened for: {error}")))
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt(), "SIGINT")?,
            terminate: listen(SignalKind::terminate(), "SIGTERM")?,
        })
    }

    /// Returns when one comes, or has come since the last time.
    pub(crate) async fn comes(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
