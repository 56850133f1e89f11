//! docs/OPERATIONS.md is made from the code, and this is where.
//!
//! In: docs/OPERATIONS.template.md, which has the prose and says `{{metrics}}` where a table belongs; the constants,
//! defaults and doc comments that the tables are made of. Out: the page. The test compares it with what is committed;
//! with `UPDATE_DOCS=1` (`make docs`) it writes it instead.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

use std::fmt::Display;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use penstock_api::reason::{Blame, Reason};
use penstock_balance::Settings;
use penstock_proxy::config::{Policy, RetryPolicy, Timeouts, store};
use penstock_proxy::files;
use penstock_proxy::flood::allowance;
use penstock_proxy::limits::{self, Limits};
use penstock_proxy::oob;
use penstock_proxy::telemetry::metric;

const NAMES: &str = include_str!("../../../control/api/src/names.rs");
const LIMITS: &str = include_str!("../../src/limits.rs");
const ADMIN: &str = include_str!("../../src/admin/mod.rs");
const CONTROL_METRIC: &str = include_str!("../../../control/src/metric.rs");
const LOG: &str = include_str!("../../src/telemetry/log.rs");

const HINT: &str =
    "<!-- Made from docs/OPERATIONS.template.md and the code: change those, then run `make docs`. -->\n\n";

#[test]
fn operations_md_says_what_the_code_does() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs");
    let mut page = HINT.to_owned() + &std::fs::read_to_string(docs.join("OPERATIONS.template.md")).unwrap();
    for (name, part) in [
        ("reasons", reasons()),
        ("metrics", metrics()),
        ("control-metrics", control_metrics()),
        ("log-fields", log_fields()),
        ("annotations", annotations()),
        ("headers", table(&["header", "meaning"], &constants("header"))),
        ("ports", table(&["port", "of"], &constants("port"))),
        ("policy", policy()),
        ("limits", limits()),
        ("pages", pages()),
        ("help", help("run")),
        ("init-help", help("init")),
        ("rules", rules()),
    ] {
        let place = format!("{{{{{name}}}}}");
        assert!(page.contains(&place), "the template has no {place}");
        page = page.replace(&place, part.trim_end());
    }
    assert!(!page.contains("{{"), "the template asks for a part that nobody makes");

    let file = docs.join("OPERATIONS.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(file, page).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(file).unwrap_or_default();
    let differs = page.lines().zip(committed.lines()).find(|(made, committed)| made != committed);
    assert!(
        page == committed,
        "docs/OPERATIONS.md is out of date, run `make docs`; the first line that differs: {differs:?}"
    );
}

/// Somebody else's program asks by these names (manifests/examples/flagger), and a query for what nobody counts is no error.
#[test]
fn what_flagger_asks_for_is_counted() {
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/examples/flagger/metrics.yaml");
    let text = std::fs::read_to_string(example).unwrap();
    let queries: Vec<_> = text
        .split("penstock_")
        .skip(1)
        .map(|rest| rest.split_once('{').unwrap())
        .map(|(name, rest)| (format!("penstock_{name}"), rest.split_once("}[").unwrap().0))
        .collect();
    let names: Vec<_> = queries.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "penstock_request_failures_total",
            "penstock_requests_total",
            "penstock_request_duration_seconds_bucket",
        ]
    );
    for (name, selector) in &queries {
        let metric = metric::ALL.iter().find(|metric| metric.name == name.trim_end_matches("_bucket"));
        let metric = metric.unwrap_or_else(|| panic!("nobody counts {name}"));
        for label in selector.split(',').map(|part| part.split_once('=').unwrap().0.trim()) {
            assert!(metric.labels.contains(&label), "{name} has no label {label}");
        }
    }
}

/// A table of Markdown.
fn table(heads: &[&str], rows: &[Vec<String>]) -> String {
    assert!(!rows.is_empty(), "nothing under {heads:?}: has the form of the source changed?");
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut table = line(heads.iter().map(ToString::to_string).collect());
    table += &line(heads.iter().map(|_| "---".to_owned()).collect());
    for row in rows {
        table += &line(row.iter().map(|cell| cell.replace('|', "\\|")).collect());
    }
    table
}

fn code(text: impl Display) -> String {
    format!("`{text}`")
}

fn reasons() -> String {
    let rows: Vec<_> = Reason::ALL
        .iter()
        .map(|reason| {
            let whose = match reason.blame() {
                Blame::Client => "client",
                Blame::Upstream => "server",
                Blame::Mesh => "mesh",
            };
            vec![
                code(reason),
                reason.status().to_string(),
                reason.grpc_status().to_string(),
                reason.flag().to_owned(),
                whose.to_owned(),
                reason.meaning().to_owned(),
            ]
        })
        .collect();
    table(&["reason", "HTTP", "gRPC", "flag", "whose fault", "meaning"], &rows)
}

fn metrics() -> String {
    let rows: Vec<_> = metric::ALL
        .iter()
        .map(|metric| {
            vec![
                code(metric.name),
                metric.kind.as_str().to_owned(),
                metric.labels.join(", "),
                metric.help.to_owned(),
            ]
        })
        .collect();
    table(&["metric", "kind", "labels", "meaning"], &rows)
}

/// Control's list has the same form as ours; read as text, since the proxy does not depend on control.
fn control_metrics() -> String {
    let list = CONTROL_METRIC.split_once("metrics! {\n").unwrap().1.split_once("\n}").unwrap().0;
    let quoted = |text: &str| text.split('"').nth(1).unwrap().to_owned();
    let rows: Vec<_> = list
        .split(';')
        .filter(|entry| !entry.trim().is_empty())
        .map(|entry| {
            let (head, help) = entry.trim().split_once('\n').unwrap();
            let (name, labels) = head.split_once('[').unwrap();
            let kind = name.split_whitespace().nth(1).unwrap().to_lowercase();
            vec![code(quoted(name)), kind, labels.replace(['"', ']'], ""), quoted(help)]
        })
        .collect();
    table(&["metric", "kind", "labels", "meaning"], &rows)
}

fn log_fields() -> String {
    let fields = LOG.split_once("struct Fields<'a> {\n").unwrap().1.split_once("\n}").unwrap().0;
    let names = fields.lines().filter_map(|line| line.trim().split_once(": "));
    let names: Vec<_> =
        names.filter(|(name, _)| !name.starts_with('#')).map(|(name, _)| code(name)).collect();
    assert!(names.len() > 10, "{names:?}");
    names.join(", ")
}

/// The constants of a module of `penstock_api::names`, with their documentation.
fn constants(module: &str) -> Vec<Vec<String>> {
    let body = NAMES.split_once(&format!("pub mod {module} {{\n")).unwrap().1.split_once("\n}").unwrap().0;
    documented(body, |line| {
        let (_, value) = line.strip_prefix("pub const ")?.split_once(" = ")?;
        Some(value.trim_end_matches(';').trim_matches('"').to_owned())
    })
    .into_iter()
    .map(|(value, meaning)| vec![code(value), meaning])
    .collect()
}

/// What stands under doc comments: what `read` makes of the line below, and the comment.
fn documented(source: &str, read: impl Fn(&str) -> Option<String>) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    for line in source.lines().map(str::trim) {
        match line.strip_prefix("///") {
            Some(words) => comment.push(words.trim()),
            None => {
                if let Some(item) = read(line) {
                    found.push((item, without_links(&comment.join(" "))));
                }
                comment.clear();
            }
        }
    }
    found
}

/// Links of rustdoc lead nowhere in Markdown: their text stays.
fn without_links(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, link)) = rest.split_once("[`") {
        let Some((name, after)) = link.split_once("`]") else { break };
        out += before;
        out += &code(name);
        rest = match after.strip_prefix('(').and_then(|target| target.split_once(')')) {
            Some((_, after)) => after,
            None => after,
        };
    }
    out + rest
}

fn annotations() -> String {
    let rows: Vec<_> = penstock_api::annotation::ALL
        .iter()
        .map(|one| {
            let examples: Vec<_> = one.examples.iter().map(code).collect();
            let (on, without) = (one.on.as_str().to_owned(), one.without.to_owned());
            vec![code(one.name), on, code(one.form), without, one.meaning.to_owned(), examples.join("; ")]
        })
        .collect();
    table(&["annotation", "on", "is written", "without it", "meaning", "examples"], &rows)
}

/// The defaults of a Service's policy. A field that is new does not compile here until it is documented.
fn policy() -> String {
    let Policy {
        balance: Settings { policy, choices, hot_quantile, explore_permille, max_ejected_percent: _, bound },
        connect_timeout,
        timeouts: Timeouts { connect: _, request, per_try, idle },
        retry: RetryPolicy { attempts, codes, buffer },
        budget_percent,
        outlier,
        max_connections,
        max_pending,
        max_requests,
        coalesce,
    } = Policy::default();
    assert_eq!(coalesce, None, "nothing is shared unasked");
    let time = |time: Duration| humantime::format_duration(time).to_string();
    let or_none = |limit: Option<Duration>| limit.map_or("none".to_owned(), time);
    let codes = if codes.is_empty() { "none".to_owned() } else { format!("{codes:?}") };
    let row =
        |setting: &str, default: String, meaning: &str| vec![code(setting), default, meaning.to_owned()];
    let rows = [
        row("balance", policy.as_str().to_owned(), "how an endpoint is chosen (BALANCING.md)"),
        row(
            "balance choices",
            choices.to_string(),
            "`gpu`, `prefix`: endpoints that are drawn at random, 2 to 8",
        ),
        row(
            "balance explore",
            format!("{} %", f64::from(explore_permille) / 10.0),
            "`gpu`, `prefix`: requests that may go to an endpoint only because it was not asked lately",
        ),
        row(
            "balance hot",
            format!("{:.0} %", hot_quantile * 100.0),
            "`gpu`: who has more work in flight than so many of those seen lately is left alone",
        ),
        row("balance bound", bound.to_string(), "`ring-hash`: how much more than the mean may be in flight"),
        row("timeout connect", time(connect_timeout), "to a usable connection, TLS included"),
        row(
            "timeout request",
            or_none(request),
            "the whole request, all tries, until the response's headers",
        ),
        row("timeout per-try", or_none(per_try), "one try, until the response's headers"),
        row("timeout idle", or_none(idle), "no byte in either direction"),
        row("retry attempts", attempts.to_string(), "tries after the first"),
        row(
            "retry on",
            codes,
            "statuses worth a retry; what provably never reached a server is always tried elsewhere",
        ),
        row(
            "retry buffer",
            format!("{} KiB", buffer >> 10),
            "the largest request body that is kept for another try",
        ),
        row(
            "retry budget",
            format!("{budget_percent} %"),
            "retries of all requests, over about ten seconds; ten are always allowed",
        ),
        row(
            "outlier failures",
            outlier.consecutive_failures.to_string(),
            "failures in a row that eject an endpoint; 0: never",
        ),
        row("outlier base", time(outlier.base), "the first ejection; each further one is twice as long"),
        row("outlier max", time(outlier.max), "the longest ejection"),
        row(
            "outlier ejected",
            format!("{} %", outlier.max_ejected_percent),
            "when more endpoints are out, ejections are ignored",
        ),
        row("limits connections", max_connections.to_string(), "to one endpoint, of one worker"),
        row("limits pending", max_pending.to_string(), "requests of one Service that wait for a connection"),
        row("limits requests", max_requests.to_string(), "requests of one Service in flight"),
    ];
    table(&["setting", "default", "meaning"], &rows)
}

fn limits() -> String {
    let values = format!("{:#?}", Limits::default());
    let value = |name: &str| {
        let line = values.lines().find_map(|line| line.trim().strip_prefix(&format!("{name}: ")));
        line.unwrap().trim_end_matches(',').to_owned()
    };
    let body = LIMITS.split_once("pub struct Limits {\n").unwrap().1.split_once("\n}").unwrap().0;
    let field = |line: &str| Some(line.strip_prefix("pub ")?.split_once(':')?.0.to_owned());
    let mut rows: Vec<_> = documented(body, field)
        .into_iter()
        .map(|(name, meaning)| vec![name.replace('_', " "), value(&name), meaning])
        .collect();
    let row = |name: &str, value: String, meaning: &str| vec![name.to_owned(), value, meaning.to_owned()];
    rows.extend([
        row("stream window", limits::STREAM_WINDOW.to_string(), "HTTP/2: bytes of one stream under way, and so what one that nobody reads takes of memory."),
        row(
            "connection window",
            limits::CONNECTION_WINDOW.to_string(),
            "HTTP/2: bytes of one connection under way: all that its streams may have, so that those whose readers have stopped do not stop the \
             others. Inbound, less when many clients are connected (see below).",
        ),
        row("client windows", limits::CLIENT_WINDOWS.to_string(), "HTTP/2: a new connection of a client may have this over the number of those open, between the limits above and below; its streams a sixty-fourth of that, \
             64 KiB at least."),
        row("client window", limits::CLIENT_WINDOW.to_string(), "HTTP/2: the least that each gets."),
        row("streams per connection", limits::STREAMS.to_string(), "HTTP/2: streams on a connection to an endpoint before another is opened."),
        row("frame", limits::FRAME.to_string(), "HTTP/2: the largest frame that is asked for, bytes."),
        row("read", limits::READ.to_string(), "HTTP/1: what is read of a connection at once at most, and the header section of a response."),
        row(
            "send buffer",
            limits::SEND_BUFFER.to_string(),
            "HTTP/2: bytes of one stream that wait to be written.",
        ),
        row(
            "idle frames",
            allowance::IDLE.to_string(),
            "HTTP/2: frames of one connection that carry nothing (PING, SETTINGS, PRIORITY, WINDOW_UPDATE, empty and unknown ones); \
             requests and answers pay for more. Above: GOAWAY with ENHANCE_YOUR_CALM.",
        ),
        row(
            "resets",
            allowance::RESETS.to_string(),
            "HTTP/2: streams of one connection that the client resets, of a sidecar's 64 times as many; each answer that has begun pays for one more. Above: the same.",
        ),
        row(
            "each second",
            allowance::EACH_SECOND.to_string(),
            "HTTP/2: what time adds to each of the two, up to their limit.",
        ),
        row(
            "open files",
            files::SPARED.to_string(),
            "Of what the hard limit of open files (`ulimit -Hn`) allows, so many, or an eighth, are spared for requests that are under way; new \
             connections wait for others.",
        ),
        row(
            "lane",
            limits::LANE.to_string(),
            "Requests between sidecars with a body of at least so many bytes go over a connection of their own (docs/DATAPATH.md).",
        ),
        row(
            "lanes",
            limits::LANES.to_string(),
            "Such connections to one endpoint, of one worker; while all are in use, large bodies share HTTP/2 connections.",
        ),
        row(
            "direct",
            limits::DIRECT.to_string(),
            "Bodies of tensors that are read from their connection straight into the arena, from so many bytes on.",
        ),
        row(
            "copies",
            limits::COPIES.to_string(),
            "Copies of requests (mirrors) on their way at once, of one worker; more are dropped (docs/RELIABILITY.md).",
        ),
        row(
            "copy bytes",
            limits::COPY_BYTES.to_string(),
            "What copies have not read yet of bodies, and answers until they are compared, of one worker; what finds no room is dropped.",
        ),
        row("copy body", limits::COPY_BODY.to_string(), "Of these, for one body or one answer."),
        row(
            "copy time",
            format!("{:?}", limits::COPY_TIME),
            "From a copy's beginning to the end of its answer.",
        ),
        row(
            "compare inline",
            limits::COMPARE_INLINE.to_string(),
            "Two answers that have no more together are compared by the worker; larger ones by a thread, one pair at a time for each worker.",
        ),
        row(
            "destinations",
            store::MAX_DESTINATIONS.to_string(),
            "Services, and addresses, that one proxy knows or asks for at once.",
        ),
        row(
            "answer time",
            format!("{:?}", store::ANSWER_TIMEOUT),
            "How long a request waits for control to say what its destination is.",
        ),
        row(
            "destination idle",
            format!("{:?}", store::IDLE),
            "A destination that nobody used for so long is forgotten.",
        ),
        row(
            "report streams",
            oob::STREAMS.to_string(),
            "Clients that are told the load out of band, of one worker; further ones are answered RESOURCE_EXHAUSTED.",
        ),
        row(
            "report interval",
            format!("{:?}", oob::LEAST_INTERVAL),
            "Who asks for a shorter one is told so often.",
        ),
    ]);
    table(&["limit", "default", "meaning"], &rows)
}

fn pages() -> String {
    let rows: Vec<_> = ADMIN
        .lines()
        .filter_map(|line| line.trim().strip_prefix("(\"/")?.strip_suffix("\"),")?.split_once("\", \""))
        .map(|(path, meaning)| vec![code(format!("/{path}")), meaning.to_owned()])
        .collect();
    table(&["page", "what it says"], &rows)
}

/// The command line's own words.
/// The rules that `penstock-proxy init` lays if it is told nothing.
fn rules() -> String {
    penstock_redirect::Ruleset::new(&penstock_redirect::Options::default()).to_string().replace('\t', "    ")
}

fn help(command: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_penstock-proxy"))
        .args([command, "-h"])
        .env_remove("COLUMNS")
        .env_remove("PENSTOCK_CONTROL")
        .env_remove("PENSTOCK_NODE")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}
