//! `penstock stat`: success rate, requests a second and latency of each Service and version.

use std::time::Duration;

use penstock_api::view::{RouteRow, Stat, StatRow};

use crate::control::Control;
use crate::failure::{Failure, exit};
use crate::interruption::Interruption;
use crate::output::{Format, Output};
use crate::service::Selection;
use crate::table::{Cell, Table, cells};
use crate::terminal::{Redraw, Terminal, Tone};
use crate::units;

/// How often `--watch` asks: proxies report once a second.
const WATCH: Duration = Duration::from_secs(1);
/// A success rate below this is worth a look.
const GOOD_SUCCESS: f64 = 0.999;

/// The arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this Service, NAME or NAMESPACE/NAME
    service: Option<String>,
    /// How far back to look
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = humantime::parse_duration)]
    window: Duration,
    /// Look again every second until Ctrl-C
    #[arg(long)]
    watch: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args, control: &mut Control, output: Output) -> Result<u8, Failure> {
    let mut interruption = Interruption::listen()?;
    let selection = Selection::of(args.service);
    if selection.is_one() {
        must_exist(control, args.window, &selection).await?;
    }
    let mut redraw = Redraw::default();
    loop {
        let stat = ask(control, args.window, &selection).await?;
        match (args.watch, output.format) {
            (false, _) => {
                output.page(&stat, table)?;
                return Ok(exit::FINE);
            }
            (true, Format::Table) => {
                let page = table(&stat, output.terminal);
                let live = output.terminal.live;
                output.text(&if live {
                    redraw.frame(output.terminal, &page)
                } else {
                    format!("{page}\n")
                })?;
            }
            (true, _) => output.object(&stat)?,
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH) => {}
            () = interruption.comes() => return Ok(exit::FINE),
        }
    }
}

/// Reads the rows of a selection: who names a version means the requests that came to it.
pub(crate) async fn ask(
    control: &mut Control,
    window: Duration,
    selection: &Selection,
) -> Result<Stat, Failure> {
    let mut stat: Stat = control.get(&format!("/stat?window={}ms", window.as_millis())).await?;
    stat.rows.retain(|row| selection.takes(&row.service) || selection.takes(&row.backend));
    Ok(stat)
}

/// A Service without requests has no row, so its name is looked for among the routes as well. One that is gone may
/// still have rows.
async fn must_exist(control: &mut Control, window: Duration, selection: &Selection) -> Result<(), Failure> {
    let rows = ask(control, window, &Selection::default()).await?.rows;
    let routes: Vec<RouteRow> = control.get("/routes").await?;
    let seen = rows.iter().flat_map(|row| [row.service.as_str(), row.backend.as_str()]);
    let known = routes.iter().flat_map(|row| [row.service.as_str(), row.backend.as_str()]);
    selection.must_exist(known.chain(seen))
}

fn table(stat: &Stat, terminal: Terminal) -> String {
    if stat.rows.is_empty() {
        return format!("No requests in the last {}.\n", seconds(stat.window_s));
    }
    let mut table = Table::new(&[
        "SERVICE",
        "VERSION",
        "SEEN BY",
        ">SHARE",
        ">ASKED",
        ">REQUESTS",
        ">RATE",
        ">SUCCESS",
        ">P50",
        ">P95",
        ">P99",
        ">MTLS",
        ">RETRIES",
    ]);
    for row in &stat.rows {
        table.row(cells![
            row.service.as_str(),
            row.backend.as_str(),
            seen_by(row),
            units::or_dash(row.share, units::percent),
            units::or_dash(row.share_asked, units::percent),
            units::count(row.requests),
            units::per_second(row.rps),
            success(row.success),
            units::or_dash(row.p50_ms, units::milliseconds),
            units::or_dash(row.p95_ms, units::milliseconds),
            units::or_dash(row.p99_ms, units::milliseconds),
            units::or_dash(row.mtls, units::percent),
            units::count(row.retries),
        ]);
    }
    format!("{}{}", table.render(terminal), terminal.paint(Tone::Faint, &legend(stat)))
}

fn legend(stat: &Stat) -> String {
    format!("Last {}; latency until the response's headers.\n", seconds(stat.window_s))
}

fn seen_by(row: &StatRow) -> &'static str {
    if row.direction == "inbound" { "server" } else { "client" }
}

fn success(rate: Option<f64>) -> Cell {
    let tone = match rate {
        Some(rate) if rate >= GOOD_SUCCESS => Tone::Good,
        Some(_) => Tone::Bad,
        None => Tone::Faint,
    };
    Cell::toned(tone, units::or_dash(rate, units::percent))
}

fn seconds(window: f64) -> String {
    format!("{window:.0} s")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_show_share_asked_beside_share_seen() {
        let row = StatRow {
            direction: "outbound".to_owned(),
            service: "demo/digits".to_owned(),
            backend: "demo/digits-v2".to_owned(),
            requests: 12_345,
            rps: 1234.5,
            success: Some(1.0),
            mtls: Some(1.0),
            retries: 2,
            p50_ms: Some(1.25),
            p95_ms: Some(3.0),
            p99_ms: None,
            share: Some(0.101),
            share_asked: Some(0.1),
        };
        assert_eq!(
            table(&Stat { window_s: 10.0, rows: vec![row] }, Terminal::PLAIN),
            "SERVICE      VERSION         SEEN BY   SHARE   ASKED  REQUESTS     RATE  SUCCESS      P50      P95  P99     \
             MTLS  RETRIES\n\
             demo/digits  demo/digits-v2  client   10.1 %  10.0 %    12,345  1,235/s  100.0 %  1.25 ms  3.00 ms    –  \
             100.0 %        2\n\
             Last 10 s; latency until the response's headers.\n"
        );
    }

    #[test]
    fn silence_is_a_sentence() {
        assert_eq!(
            table(&Stat { window_s: 10.0, rows: vec![] }, Terminal::PLAIN),
            "No requests in the last 10 s.\n"
        );
    }
}
