//! `penstock status`: which proxies are connected, and whether each has applied the newest snapshot.

use std::fmt::Write;
use std::time::Duration;

use penstock_api::view::{Problem, ProxyStatus, Status};
use tokio::time::Instant;

use crate::control::Control;
use crate::failure::{Failure, exit};
use crate::output::Output;
use crate::table::{Cell, Table, cells};
use crate::terminal::{Redraw, Terminal, Tone};
use crate::units;

/// How often `--wait` asks: often enough that a script does not notice, seldom enough that control does not either.
const POLL: Duration = Duration::from_millis(50);
/// How long a snapshot must have been the newest before `--wait` believes that it is: an edit made just before the
/// command has to reach control first.
const SETTLED: Duration = Duration::from_millis(200);

/// The arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Return only when every connected proxy has applied the newest snapshot
    #[arg(long)]
    wait: bool,
    /// With --wait: give up after this long
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// Runs the command.
pub(crate) async fn run(args: &Args, control: &mut Control, output: Output) -> Result<u8, Failure> {
    let status = if args.wait { wait(args.timeout, control).await? } else { control.get("/status").await? };
    output.page(&status, table)?;
    let refused = status.proxies.iter().any(|proxy| !proxy.refused.is_empty());
    let fine = status.all_applied() && !refused && status.problems.is_empty();
    if args.wait && !status.all_applied() {
        return Err(Failure::Problem(format!(
            "not all proxies have applied {} after {}: {}",
            status.snapshot,
            humantime::format_duration(args.timeout),
            laggards(&status)
        )));
    }
    Ok(if fine { exit::FINE } else { exit::PROBLEM })
}

/// Asks until all have applied or the time is over; a line on standard error says how far it is.
async fn wait(timeout: Duration, control: &mut Control) -> Result<Status, Failure> {
    let terminal = Terminal::of(&std::io::stderr());
    let mut line = Redraw::default();
    let deadline = Instant::now() + timeout;
    let (mut newest, mut since) = (String::new(), Instant::now());
    loop {
        let status: Status = control.get("/status").await?;
        if newest != status.snapshot {
            (newest, since) = (status.snapshot.clone(), Instant::now());
        }
        if status.all_applied() && since.elapsed() >= SETTLED || Instant::now() >= deadline {
            if terminal.live {
                eprint!("{}", line.erase());
            }
            return Ok(status);
        }
        if terminal.live && !status.all_applied() {
            eprint!("{}", line.frame(terminal, &progress(&status)));
        }
        tokio::time::sleep(POLL).await;
    }
}

/// How far the push is.
fn progress(status: &Status) -> String {
    let connected: Vec<&ProxyStatus> = status.proxies.iter().filter(|proxy| proxy.connected).collect();
    let applied = connected.iter().filter(|proxy| proxy.applied).count();
    format!(
        "{applied} of {} proxies have applied {}; waiting for {}",
        connected.len(),
        status.snapshot,
        laggards(status)
    )
}

/// The connected proxies that have not applied, the first few by name.
fn laggards(status: &Status) -> String {
    let names: Vec<&str> =
        status.proxies.iter().filter(|p| p.connected && !p.applied).map(|p| p.node.as_str()).collect();
    match names.as_slice() {
        [] => "none".to_owned(),
        [first @ .., _] if first.len() >= 5 => {
            format!("{} and {} more", first[..4].join(", "), names.len() - 4)
        }
        all => all.join(", "),
    }
}

fn table(status: &Status, terminal: Terminal) -> String {
    let connected = status.proxies.iter().filter(|proxy| proxy.connected).count();
    let applied = status.proxies.iter().filter(|proxy| proxy.connected && proxy.applied).count();
    let tone = if status.all_applied() { Tone::Good } else { Tone::Warn };
    let mut text = format!(
        "Snapshot {}: {}; control is up for {}.\n",
        terminal.paint(Tone::Strong, &status.snapshot),
        terminal.paint(tone, &format!("applied by {applied} of {connected} connected proxies")),
        units::age(status.uptime_s),
    );
    if !status.proxies.is_empty() {
        let mut table =
            Table::new(&["PROXY", "IDENTITY", "CONNECTED", "APPLIED", ">AFTER", ">RESOURCES", ">REFUSED"]);
        for proxy in &status.proxies {
            table.row(cells![
                proxy.node.as_str(),
                proxy.identity.as_str(),
                yes(proxy.connected, Tone::Bad),
                yes(proxy.applied, if proxy.connected { Tone::Warn } else { Tone::Faint }),
                units::or_dash(proxy.applied_after_ms, units::milliseconds),
                units::count(proxy.resources as u64),
                Cell::toned(
                    if proxy.refused.is_empty() { Tone::Plain } else { Tone::Bad },
                    units::count(proxy.refused.len() as u64)
                ),
            ]);
        }
        text.push('\n');
        text.push_str(&table.render(terminal));
    }
    for proxy in &status.proxies {
        for refused in &proxy.refused {
            let line = format!("{} refused {}: {}", proxy.node, refused.kind, refused.reason);
            let _ = write!(text, "\n{}", terminal.paint(Tone::Bad, &line));
        }
    }
    if status.proxies.iter().any(|proxy| !proxy.refused.is_empty()) {
        text.push('\n');
    }
    text.push_str(&problems(&status.problems, terminal));
    text
}

/// The problems of the source, one a paragraph; empty when there are none.
pub(crate) fn problems(problems: &[Problem], terminal: Terminal) -> String {
    let mut text = String::new();
    for problem in problems {
        let _ = writeln!(text, "\n{}", terminal.paint(Tone::Bad, &place(problem)));
        let _ = writeln!(text, "  {}", told(problem));
    }
    text
}

/// Where a problem is.
pub(crate) fn place(problem: &Problem) -> String {
    let Problem { file, line, object, .. } = problem;
    match (line, object.as_str()) {
        (0, "") => file.clone(),
        (0, object) => format!("{file}: {object}"),
        (line, "") => format!("{file}:{line}"),
        (line, object) => format!("{file}:{line}: {object}"),
    }
}

/// What a problem is, and what holds meanwhile.
pub(crate) fn told(problem: &Problem) -> String {
    if problem.last_good_in_force {
        format!("{} (the last good version stays in force)", problem.message)
    } else {
        problem.message.clone()
    }
}

fn yes(is: bool, otherwise: Tone) -> Cell {
    if is { Cell::from("yes") } else { Cell::toned(otherwise, "no") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::view::Refused;

    fn proxy(node: &str, applied: bool) -> ProxyStatus {
        ProxyStatus {
            node: node.to_owned(),
            identity: "spiffe://cluster.local/ns/demo/sa/client".to_owned(),
            connected: true,
            applied,
            resources: 9,
            applied_after_ms: applied.then_some(12.5),
            refused: Vec::new(),
        }
    }

    #[test]
    fn status_names_who_lags_what_was_refused_and_what_does_not_parse() {
        let mut lagging = proxy("demo/b", false);
        lagging.refused.push(Refused { kind: "Weights".to_owned(), reason: "sum is 0".to_owned() });
        let status = Status {
            snapshot: "0123456789abcdef".to_owned(),
            proxies: vec![proxy("demo/a", true), lagging],
            problems: vec![Problem {
                file: "mesh.yaml".to_owned(),
                line: 7,
                object: "Service demo/digits".to_owned(),
                message: "weights sum to 0".to_owned(),
                last_good_in_force: true,
            }],
            uptime_s: 61.0,
        };
        assert_eq!(
            table(&status, Terminal::PLAIN),
            "Snapshot 0123456789abcdef: applied by 1 of 2 connected proxies; control is up for 1m 1s.\n\
             \n\
             PROXY   IDENTITY                                  CONNECTED  APPLIED    AFTER  RESOURCES  REFUSED\n\
             demo/a  spiffe://cluster.local/ns/demo/sa/client  yes        yes      12.5 ms          9        0\n\
             demo/b  spiffe://cluster.local/ns/demo/sa/client  yes        no             –          9        1\n\
             \n\
             demo/b refused Weights: sum is 0\n\
             \n\
             mesh.yaml:7: Service demo/digits\n  \
             weights sum to 0 (the last good version stays in force)\n"
        );
        assert_eq!(progress(&status), "1 of 2 proxies have applied 0123456789abcdef; waiting for demo/b");
    }

    #[test]
    fn many_laggards_are_counted() {
        let names: Vec<String> = (0..8).map(|i| format!("demo/p{i}")).collect();
        let proxies = names.iter().map(|name| proxy(name, false)).collect();
        let status = Status { proxies, ..Status::default() };
        assert_eq!(laggards(&status), "demo/p0, demo/p1, demo/p2, demo/p3 and 4 more");
    }
}
