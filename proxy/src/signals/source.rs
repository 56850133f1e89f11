//! Whether a source can be read: a gauge, and a line in the log when that changes.

use crate::telemetry::metric::SIGNAL_SOURCE_UP;

/// One source.
#[derive(Debug)]
pub(super) struct Source {
    name: &'static str,
    up: Option<bool>,
}

impl Source {
    /// A source that nothing is known of yet.
    pub(super) fn new(name: &'static str) -> Self {
        Self { name, up: None }
    }

    /// It can be read; `story` says what it is, if that is news.
    pub(super) fn up(&mut self, story: impl FnOnce() -> String) {
        if self.changes(true) {
            tracing::info!(source = self.name, "{}", story());
        }
    }

    /// It cannot; `story` says why and what follows, if that is news. Returns whether it was.
    pub(super) fn down(&mut self, story: impl FnOnce() -> String) -> bool {
        let had = self.up == Some(true);
        let news = self.changes(false);
        match (news, had) {
            (true, true) => tracing::warn!(source = self.name, "{}", story()),
            (true, false) => tracing::info!(source = self.name, "{}", story()),
            (false, _) => {}
        }
        news
    }

    fn changes(&mut self, up: bool) -> bool {
        let news = self.up.replace(up) != Some(up);
        if news {
            metrics::gauge!(SIGNAL_SOURCE_UP.name, "source" => self.name).set(if up { 1.0 } else { 0.0 });
        }
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_change_is_news() {
        let mut source = Source::new("server");
        assert!(source.down(String::new), "the first word is news");
        assert!(!source.down(|| unreachable!("told already")));
        source.up(String::new);
        source.up(|| unreachable!("told already"));
        assert!(source.down(String::new));
    }

    #[test]
    fn the_gauge_says_what_is_up() {
        let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
        let page = recorder.handle();
        metrics::with_local_recorder(&recorder, || {
            let mut source = Source::new("nvml");
            assert!(!page.render().contains("nvml"), "nothing is known yet");
            source.down(String::new);
            assert!(
                page.render().contains("penstock_signal_source_up{source=\"nvml\"} 0"),
                "{}",
                page.render()
            );
            source.up(String::new);
            assert!(
                page.render().contains("penstock_signal_source_up{source=\"nvml\"} 1"),
                "{}",
                page.render()
            );
        });
    }
}
