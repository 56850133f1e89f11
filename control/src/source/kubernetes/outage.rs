//! What is told of an API server that does not answer: one line when it begins and one when it is over, however many watches suffer.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// What keeps which watch from going on.
#[derive(Debug, Default)]
pub(super) struct Outage(Mutex<BTreeMap<&'static str, String>>);

impl Outage {
    /// A watch could not go on; whether nobody has said so yet.
    pub(super) fn begins(&self, watch: &'static str, why: &str) -> bool {
        let mut troubles = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let new = !troubles.values().any(|known| known == why);
        troubles.insert(watch, why.to_owned());
        new
    }

    /// A watch goes on; whether it was the last that did not.
    pub(super) fn ends(&self, watch: &'static str) -> bool {
        let mut troubles = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        troubles.remove(watch).is_some() && troubles.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_told_once_when_it_begins_and_once_when_it_is_over() {
        let outage = Outage::default();
        assert!(!outage.ends("pods"));
        assert!(outage.begins("pods", "connection refused"));
        assert!(!outage.begins("services", "connection refused"));
        assert!(!outage.begins("pods", "connection refused"));
        assert!(outage.begins("services", "forbidden"));
        assert!(!outage.ends("pods"));
        assert!(!outage.ends("pods"));
        assert!(outage.ends("services"));
    }
}
