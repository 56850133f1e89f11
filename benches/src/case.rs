//! The cases of the proxy bed and the metrics of their rows.

use anyhow::{Context as _, Result};
use serde::Serialize;

use crate::load::{Measured, Protocol, Purpose};
use crate::report::Row;
use crate::subject::{BASELINE, Subject};
use crate::tokens;

/// How many bytes a MiB has.
const MIB: usize = 1 << 20;

/// Of all the cases of a bed those that are named, or all.
pub(crate) fn chosen<C: Copy>(
    all: &[C],
    name_of: fn(&C) -> &'static str,
    names: &[String],
) -> Result<Vec<C>> {
    if names.is_empty() {
        return Ok(all.to_vec());
    }
    let find = |name: &String| {
        all.iter().find(|case| name_of(case) == name).copied().with_context(|| {
            let known: Vec<&str> = all.iter().map(name_of).collect();
            format!("there is no case `{name}`; there are {}", known.join(", "))
        })
    };
    names.iter().map(find).collect()
}

/// What stands between client and upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One proxy, plaintext on both sides.
    Plain,
    /// One proxy that asks its client for a certificate; plaintext behind it.
    Tls,
    /// Two proxies with mutual TLS between them.
    Mesh,
    /// One proxy that does not look at bytes, plaintext on both sides.
    Bytes,
    /// The same two proxies as in `Mesh`, each in a network namespace whose rules bring it connections that were going to
    /// somebody else.
    Redirected,
    /// One proxy that gets certificate and configuration from control; no requests.
    Start,
}

/// One case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) says: &'static str,
    pub(crate) shape: Shape,
    /// What the client's connections are for.
    pub(crate) purpose: Purpose,
    pub(crate) client: Protocol,
    pub(crate) upstream: Protocol,
    pub(crate) connections: usize,
    pub(crate) streams: usize,
    pub(crate) body: usize,
    pub(crate) rate: u32,
    /// The metric whose spread decides whether the case is run again.
    pub(crate) main: Metric,
    /// What we want of it.
    pub(crate) target: Option<Target>,
    /// Whether system calls and allocations are counted, in a run of their own.
    pub(crate) counted: bool,
}

/// At most so much of the main figure is what we want of ourselves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Target {
    /// Of the median itself.
    Median(f64),
    /// Of its ratio to the baseline's.
    Ratio(f64),
}

/// Connections that are there and do nothing.
const IDLE: usize = 5000;
/// Clients that each open a connection, ask, close it, and begin anew.
const NEWCOMERS: usize = 16;

const SMALL: Case = Case {
    name: "h1-small",
    says: "GET over 64 HTTP/1.1 connections, HTTP/1.1 upstream",
    shape: Shape::Plain,
    purpose: Purpose::Requests,
    client: Protocol::H1,
    upstream: Protocol::H1,
    connections: 64,
    streams: 1,
    body: 0,
    rate: 0,
    main: Metric::CpuPer1k,
    target: None,
    counted: false,
};

const IDLERS: Case = Case {
    name: "idle-5000",
    says: "memory for each of 5,000 idle HTTP/1.1 connections, after one request over each",
    purpose: Purpose::Idle,
    connections: IDLE,
    main: Metric::KibPerConn,
    target: Some(Target::Median(6.0)),
    ..SMALL
};

const POST: Case = Case {
    name: "post-1mib",
    says: "POST of 1 MiB over 4 HTTP/1.1 connections, read whole by the upstream",
    connections: 4,
    body: MIB,
    main: Metric::CpuPerGb,
    ..SMALL
};

/// All cases, in the order in which they are run.
pub(crate) const CASES: [Case; 19] = [
    Case { target: Some(Target::Ratio(0.37)), counted: true, ..SMALL },
    Case {
        name: "h2-small",
        says: "GET over 16 h2c connections with 4 streams each, h2c upstream",
        client: Protocol::H2,
        upstream: Protocol::H2,
        connections: 16,
        streams: 4,
        ..SMALL
    },
    Case { name: "tls-h1-small", says: "h1-small with a client certificate", shape: Shape::Tls, ..SMALL },
    Case {
        name: "tls-h2-small",
        says: "GET over 16 h2 connections with 4 streams each and a client certificate, HTTP/1.1 upstream",
        shape: Shape::Tls,
        client: Protocol::H2,
        connections: 16,
        streams: 4,
        ..SMALL
    },
    Case {
        name: "mesh-mtls",
        says: "h1-small over two proxies, mutual TLS between them",
        shape: Shape::Mesh,
        target: Some(Target::Ratio(0.37)),
        counted: true,
        ..SMALL
    },
    Case {
        name: "redirected",
        says: "mesh-mtls between two network namespaces with real nftables rules, beside mesh-mtls as it is",
        shape: Shape::Redirected,
        ..SMALL
    },
    POST,
    Case { name: "post-6mib", says: "the same with 6 MiB", body: 6 * MIB, ..POST },
    Case {
        name: "post-6mib-tls",
        says: "post-6mib with a client certificate",
        shape: Shape::Tls,
        body: 6 * MIB,
        ..POST
    },
    Case {
        name: "post-6mib-mesh",
        says: "post-6mib over two proxies, mutual TLS between them",
        shape: Shape::Mesh,
        body: 6 * MIB,
        ..POST
    },
    Case {
        name: "splice-tcp",
        says: "post-6mib through a proxy that does not look at the bytes",
        shape: Shape::Bytes,
        body: 6 * MIB,
        ..POST
    },
    Case {
        name: "fixed-2000",
        says: "h1-small at 2000 requests a second, timed from the moment each was due",
        rate: 2000,
        main: Metric::P99,
        ..SMALL
    },
    Case {
        name: "fixed-2000-mesh",
        says: "fixed-2000 over two proxies, mutual TLS between them",
        shape: Shape::Mesh,
        rate: 2000,
        main: Metric::P99,
        ..SMALL
    },
    Case {
        name: "handshake",
        says: "GET over a new connection each, with a client certificate and nothing resumed; 16 clients",
        shape: Shape::Tls,
        purpose: Purpose::Handshakes,
        connections: NEWCOMERS,
        target: Some(Target::Ratio(0.85)),
        ..SMALL
    },
    Case {
        name: "token-stream",
        says: "100 streams over one h2c connection, 200 bytes every 20 ms in each, h2c upstream",
        purpose: Purpose::Tokens,
        client: Protocol::H2,
        upstream: Protocol::H2,
        connections: 1,
        streams: tokens::STREAMS,
        main: Metric::GapP99,
        target: Some(Target::Median(200.0)),
        ..SMALL
    },
    IDLERS,
    Case {
        name: "idle-5000-tls",
        says: "the same with a client certificate",
        shape: Shape::Tls,
        target: Some(Target::Median(16.0)),
        ..IDLERS
    },
    Case {
        name: "rest",
        says: "memory at rest, after one request",
        connections: 0,
        main: Metric::Rss,
        ..SMALL
    },
    Case {
        name: "start",
        says: "from the start of the process to ready: certificate and first configuration from control, beside it",
        shape: Shape::Start,
        connections: 0,
        main: Metric::Ready,
        ..SMALL
    },
];

/// Starts of a process are short, and each is another draw of the scheduler's lots.
const STARTS: usize = 20;

impl Case {
    /// Nothing is sent but one request.
    pub(crate) fn at_rest(&self) -> bool {
        self.connections == 0
    }

    /// How many runs of each subject, where so many are asked for.
    pub(crate) fn runs(&self, asked: usize) -> usize {
        if self.shape == Shape::Start { asked.max(STARTS) } else { asked }
    }

    /// Whom ratios refer to: of those that do not look at bytes, the one that is known for splicing them; of redirection,
    /// ourselves without it.
    pub(crate) fn baseline(&self) -> Subject {
        match self.shape {
            Shape::Bytes => Subject::Haproxy,
            Shape::Redirected => Subject::Loopback,
            _ => BASELINE,
        }
    }

    /// Whether the proxy's core is meant to be full.
    pub(crate) fn saturates(&self) -> bool {
        let full = matches!(self.purpose, Purpose::Requests | Purpose::Handshakes);
        full && !self.at_rest() && self.rate == 0
    }

    /// The metric that stands for a subject, which without a proxy is not what it is about.
    pub(crate) fn main_of(&self, subject: Subject) -> Metric {
        match self.main {
            Metric::GapP99 if subject == Subject::Direct => Metric::GapWholeP99,
            main if subject == Subject::Direct && main.of_proxy() => Metric::Rps,
            main => main,
        }
    }

    /// The metrics of its rows, in the order of the table.
    pub(crate) fn metrics(&self) -> Vec<Metric> {
        if self.shape == Shape::Start {
            return vec![Metric::Ready, Metric::Rss];
        }
        if self.at_rest() {
            return vec![Metric::Rss];
        }
        match self.purpose {
            Purpose::Requests | Purpose::Handshakes => {}
            Purpose::Idle => {
                return vec![Metric::KibPerConn, Metric::CpuPer1k, Metric::Rss, Metric::RssPeak];
            }
            Purpose::Tokens => {
                let gaps = [Metric::GapP99, Metric::GapWholeP99];
                let others = [Metric::P50, Metric::P99, Metric::CpuPer1k, Metric::Rss, Metric::RssPeak];
                return [&gaps[..], &others].concat();
            }
        }
        let mut metrics = vec![Metric::Rps, Metric::P50, Metric::P99, Metric::P999, Metric::CpuPer1k];
        if self.body > 0 {
            metrics.extend([Metric::MbPerS, Metric::CpuPerGb]);
        }
        if self.shape == Shape::Redirected {
            metrics.push(Metric::MachinePer1k);
        }
        metrics.extend([Metric::Rss, Metric::RssPeak]);
        metrics
    }

    /// The metrics that are counted in a run of their own.
    pub(crate) fn counts(&self) -> &'static [Metric] {
        if self.counted { &[Metric::Syscalls, Metric::Allocations] } else { &[] }
    }
}

impl Target {
    /// Whether it is met by every run, or by none; of a ratio, by the medians. `None` where runs disagree, or nothing is known.
    pub(crate) fn met(self, row: &Row) -> Option<bool> {
        match self {
            Self::Median(most) if row.max? <= most => Some(true),
            Self::Median(most) if row.min? > most => Some(false),
            Self::Median(_) => None,
            Self::Ratio(most) => row.ratio.map(|ratio| ratio <= most),
        }
    }
}

/// What a row measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Metric {
    Rps,
    P50,
    P99,
    P999,
    CpuPer1k,
    /// All that the two cores did. What the kernel does for packets between machines it charges to whomever it
    /// interrupts, or to a thread of its own.
    MachinePer1k,
    MbPerS,
    CpuPerGb,
    Rss,
    RssPeak,
    Ready,
    KibPerConn,
    /// By how much gaps between tokens grew, above what they do without a proxy.
    GapP99,
    /// By how much they grew on the whole way.
    GapWholeP99,
    Syscalls,
    Allocations,
}

impl Metric {
    /// Its name in the JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rps => "rps",
            Self::P50 => "p50_us",
            Self::P99 => "p99_us",
            Self::P999 => "p999_us",
            Self::CpuPer1k => "cpu_s_per_1k",
            Self::MachinePer1k => "machine_s_per_1k",
            Self::MbPerS => "mb_per_s",
            Self::CpuPerGb => "cpu_s_per_gb",
            Self::Rss => "rss",
            Self::RssPeak => "rss_peak",
            Self::Ready => "ready_ms",
            Self::KibPerConn => "kib_per_conn",
            Self::GapP99 => "gap_p99_us",
            Self::GapWholeP99 => "gap_whole_p99_us",
            Self::Syscalls => "syscalls",
            Self::Allocations => "allocations",
        }
    }

    /// Its name and unit.
    pub(crate) fn named(self) -> (&'static str, &'static str) {
        (self.name(), self.unit())
    }

    /// Its unit in the JSON.
    fn unit(self) -> &'static str {
        match self {
            Self::Rps => "requests/s",
            Self::P50 | Self::P99 | Self::P999 | Self::GapP99 | Self::GapWholeP99 => "us",
            Self::CpuPer1k | Self::MachinePer1k => "s/1000 requests",
            Self::MbPerS => "MB/s",
            Self::CpuPerGb => "s/GB",
            Self::Rss | Self::RssPeak => "MiB",
            Self::Ready => "ms",
            Self::KibPerConn => "KiB",
            Self::Syscalls | Self::Allocations => "per request",
        }
    }

    /// Whether it is about the proxy's processes, which a run without a proxy doesn't have.
    pub(crate) fn of_proxy(self) -> bool {
        matches!(
            self,
            Self::CpuPer1k
                | Self::CpuPerGb
                | Self::Rss
                | Self::RssPeak
                | Self::Ready
                | Self::KibPerConn
                | Self::GapP99
                | Self::Syscalls
                | Self::Allocations
        )
    }

    /// Its value in one run; what is counted is in none. GB and MB are powers of ten, MiB and KiB are not.
    pub(crate) fn of(self, run: &Measured) -> f64 {
        match self {
            Self::Rps => run.requests as f64 / run.seconds,
            Self::P50 => run.p50_us,
            Self::P99 => run.p99_us,
            Self::P999 => run.p999_us,
            Self::CpuPer1k => run.cpu_s / run.requests as f64 * 1e3,
            Self::MachinePer1k => run.cores_busy_s / run.requests as f64 * 1e3,
            Self::MbPerS => run.bytes as f64 / run.seconds / 1e6,
            Self::CpuPerGb => run.cpu_s / run.bytes as f64 * 1e9,
            Self::Rss => run.rss,
            Self::RssPeak => run.rss_peak,
            Self::Ready => run.ready_ms,
            Self::KibPerConn => run.kib_per_conn,
            Self::GapP99 => run.gap_p99_us,
            Self::GapWholeP99 => run.gap_whole_p99_us,
            Self::Syscalls | Self::Allocations => f64::NAN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Summary;

    #[test]
    fn a_case_measures_what_decides_about_it() {
        for case in CASES {
            assert!(case.metrics().contains(&case.main), "{}", case.name);
            let direct = case.main_of(Subject::Direct);
            assert!(
                !Subject::Direct.takes_part(&case) || case.metrics().contains(&direct),
                "{}: {direct:?}",
                case.name
            );
            assert!(!case.counts().iter().any(|count| case.metrics().contains(count)), "{}", case.name);
            let (one, many) = (case.runs(1), case.runs(50));
            assert!(many == 50 && one == if case.name == "start" { STARTS } else { 1 }, "{}", case.name);
        }
    }

    #[test]
    fn a_target_is_met_by_what_it_is_about() {
        let row = |runs: [f64; 3], ratio| {
            let figures = Summary::of(runs.to_vec()).unwrap();
            Row { ratio, ..Row::measured("idle-5000", "penstock", Metric::KibPerConn.named(), &figures) }
        };
        let met = |target: Target, runs, ratio| target.met(&row(runs, ratio));
        assert_eq!(met(Target::Median(6.0), [5.0, 5.5, 6.0], Some(1.0)), Some(true));
        assert_eq!(met(Target::Median(6.0), [6.1, 7.0, 8.0], None), Some(false));
        assert_eq!(met(Target::Median(6.0), [-90.0, 5.0, 7.0], None), None, "runs disagree");
        assert_eq!(met(Target::Ratio(0.37), [9.0; 3], Some(0.37)), Some(true));
        assert_eq!(met(Target::Ratio(0.37), [0.1; 3], None), None, "nobody to compare with");
    }

    #[test]
    fn figures_are_per_what_they_say() {
        let run = Measured {
            seconds: 2.0,
            requests: 4000,
            bytes: 2_000_000_000,
            cpu_s: 1.0,
            ..Measured::default()
        };
        let of = |metric: Metric| metric.of(&run);
        assert_eq!((of(Metric::Rps), of(Metric::CpuPer1k)), (2000.0, 0.25));
        assert_eq!((of(Metric::MbPerS), of(Metric::CpuPerGb)), (1000.0, 0.5));
    }
}
