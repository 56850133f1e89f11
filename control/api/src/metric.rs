//! What a metric is. Control and proxy each have one list of theirs; the documentation is made from both.

/// What a metric does over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Goes up.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// The word of the exposition format.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A metric.
#[derive(Debug)]
pub struct Metric {
    /// Its name; the unit is its last word but for `_total`.
    pub name: &'static str,
    /// What it does over time.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

/// A list of metrics: a constant for each, and `ALL` of them in the order of the documentation.
#[macro_export]
macro_rules! metrics {
    ($($constant:ident $kind:ident $name:literal [$($label:literal),*] $help:literal;)+) => {
        $(#[doc = $help]
        pub const $constant: $crate::metric::Metric = $crate::metric::Metric {
            name: $name, kind: $crate::metric::Kind::$kind, labels: &[$($label),*], help: $help,
        };)+

        /// All metrics, in the order of the documentation.
        pub const ALL: &[&$crate::metric::Metric] = &[$(&$constant,)+];
    };
}
