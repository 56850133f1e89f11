//! `penstock routes`: what matches, where it goes with which share, and how many proxies hold it.

use penstock_api::view::RouteRow;

use crate::control::Control;
use crate::failure::{Failure, exit};
use crate::output::Output;
use crate::service::Selection;
use crate::table::{Cell, Table, cells};
use crate::terminal::{Terminal, Tone};
use crate::units;

/// The arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only this Service, NAME or NAMESPACE/NAME
    service: Option<String>,
}

/// Runs the command.
pub(crate) async fn run(args: Args, control: &mut Control, output: Output) -> Result<u8, Failure> {
    let selection = Selection::of(args.service);
    let mut rows: Vec<RouteRow> = control.get("/routes").await?;
    selection.must_exist(rows.iter().map(|row| row.service.as_str()))?;
    rows.retain(|row| selection.takes(&row.service));
    output.page(&rows, |rows, terminal| table(rows, terminal))?;
    Ok(exit::FINE)
}

fn table(rows: &[RouteRow], terminal: Terminal) -> String {
    if rows.is_empty() {
        return "Control knows no route: no Service is in its source yet.\n".to_owned();
    }
    let mut table = Table::new(&["SERVICE", "ROUTE", "MATCHES", "BACKEND", ">WEIGHT", ">SHARE", ">APPLIED"]);
    for row in rows {
        let tone = if row.applied == row.subscribed { Tone::Plain } else { Tone::Warn };
        table.row(cells![
            row.service.as_str(),
            row.route.as_str(),
            row.matches.as_str(),
            row.backend.as_str(),
            row.weight.to_string(),
            units::percent(row.share),
            Cell::toned(tone, format!("{}/{}", row.applied, row.subscribed)),
        ]);
    }
    table.render(terminal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_says_how_many_proxies_hold_it() {
        let row = RouteRow {
            service: "demo/digits".to_owned(),
            route: "demo/digits#0".to_owned(),
            matches: "every request".to_owned(),
            backend: "demo/digits-v1".to_owned(),
            weight: 90,
            share: 0.9,
            applied: 3,
            subscribed: 4,
        };
        assert_eq!(
            table(&[row], Terminal::PLAIN),
            "SERVICE      ROUTE          MATCHES        BACKEND         WEIGHT   SHARE  APPLIED\n\
             demo/digits  demo/digits#0  every request  demo/digits-v1      90  90.0 %      3/4\n"
        );
    }
}
