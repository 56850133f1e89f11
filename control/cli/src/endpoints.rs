//! `penstock endpoints`: the endpoints of each Service as the clients' proxies see them, with their load.

use penstock_api::view::{EndpointRow, Load, RouteRow};

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
    let routes: Vec<RouteRow> = control.get("/routes").await?;
    let mut rows: Vec<EndpointRow> = control.get("/endpoints").await?;
    let known = routes.iter().map(|route| &route.service).chain(rows.iter().map(|row| &row.service));
    selection.must_exist(known.map(String::as_str))?;
    rows.retain(|row| selection.takes(&row.service) || leads_to(&routes, &selection, &row.service));
    output.page(&rows, |rows, terminal| table(rows, terminal))?;
    Ok(exit::FINE)
}

/// Whether a selected Service's routes lead to `service`: who asks for the endpoints of a Service that is split
/// means those of its versions.
fn leads_to(routes: &[RouteRow], selection: &Selection, service: &str) -> bool {
    routes.iter().any(|route| route.backend == service && selection.takes(&route.service))
}

fn table(rows: &[EndpointRow], terminal: Terminal) -> String {
    if rows.is_empty() {
        return "No endpoint: no EndpointSlice of it is in control's source.\n".to_owned();
    }
    let mut table = Table::new(&[
        "SERVICE",
        "ENDPOINT",
        "ADDRESS",
        "STATE",
        ">IN FLIGHT",
        ">LOAD",
        ">BACKLOG",
        ">BUSY",
        ">QUEUE WAIT",
        ">RATE",
        ">ERRORS",
        ">REPORT",
        "IDENTITY",
    ]);
    for row in rows {
        // What an endpoint said too long ago is no news of it: only how long ago is.
        let load = row.load.as_ref().filter(|load| !load.expired);
        let of = |show: &dyn Fn(&Load) -> String| units::or_dash(load, show);
        let identity = if row.identity.is_empty() {
            Cell::toned(Tone::Warn, "plaintext")
        } else {
            Cell::from(row.identity.as_str())
        };
        table.row(cells![
            row.service.as_str(),
            row.endpoint.as_str(),
            row.address.as_str(),
            Cell::toned(state_tone(&row.state), row.state.as_str()),
            units::count(row.in_flight),
            of(&|load| format!("{:.1}", load.in_flight)),
            of(&|load| units::milliseconds(load.backlog_ms)),
            of(&|load| format!("{:.0} %", load.utilization * 100.0)),
            of(&|load| units::milliseconds(load.queue_wait_ms)),
            of(&|load| units::per_second(load.rps)),
            of(&|load| units::per_second(load.eps)),
            reported(row.load.as_ref()),
            identity,
        ]);
    }
    table.render(terminal)
}

fn reported(load: Option<&Load>) -> Cell {
    match load {
        Some(load) if load.expired => Cell::toned(Tone::Faint, format!("stale, {}", units::ago(load.age_ms))),
        load => Cell::from(units::or_dash(load, |load| units::ago(load.age_ms))),
    }
}

fn state_tone(state: &str) -> Tone {
    match state {
        "ready" => Tone::Good,
        "draining" => Tone::Warn,
        _ => Tone::Bad,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_shows_its_newest_report_or_that_there_is_none() {
        let reporting = EndpointRow {
            service: "demo/digits-v1".to_owned(),
            endpoint: "demo/digits-v1-a".to_owned(),
            address: "127.0.0.11:15006".to_owned(),
            identity: "spiffe://cluster.local/ns/demo/sa/digits-v1".to_owned(),
            state: "ready".to_owned(),
            in_flight: 3,
            load: Some(Load {
                in_flight: 3.0,
                backlog_ms: 3.7,
                utilization: 0.81,
                queue_wait_ms: 0.05,
                rps: 812.0,
                eps: 0.0,
                age_ms: 12.0,
                expired: false,
            }),
        };
        let silent = EndpointRow {
            endpoint: "10.0.0.9:80".to_owned(),
            address: "10.0.0.9:80".to_owned(),
            identity: String::new(),
            state: "ejected".to_owned(),
            in_flight: 0,
            load: None,
            ..reporting.clone()
        };
        assert_eq!(
            table(&[reporting, silent], Terminal::PLAIN),
            "SERVICE         ENDPOINT          ADDRESS           STATE    IN FLIGHT  LOAD  BACKLOG  BUSY  QUEUE WAIT   RATE  ERRORS     \
             REPORT  IDENTITY\n\
             demo/digits-v1  demo/digits-v1-a  127.0.0.11:15006  ready            3   3.0  3.70 ms  81 %     0.05 ms  812/s   0.0/s  \
             12 ms ago  spiffe://cluster.local/ns/demo/sa/digits-v1\n\
             demo/digits-v1  10.0.0.9:80       10.0.0.9:80       ejected          0     –        –     –           –      –       –          \
             –  plaintext\n"
        );
    }

    #[test]
    fn a_report_that_has_expired_is_stale_and_its_figures_are_not_shown() {
        let row = EndpointRow {
            service: "a/s".to_owned(),
            endpoint: "a/p".to_owned(),
            address: "127.0.0.11:15006".to_owned(),
            state: "ready".to_owned(),
            load: Some(Load {
                in_flight: 3.0,
                rps: 88.0,
                age_ms: 77_000.0,
                expired: true,
                ..Load::default()
            }),
            ..EndpointRow::default()
        };
        assert_eq!(
            table(&[row], Terminal::PLAIN),
            "SERVICE  ENDPOINT  ADDRESS           STATE  IN FLIGHT  LOAD  BACKLOG  BUSY  QUEUE WAIT  RATE  ERRORS             REPORT  \
             IDENTITY\n\
             a/s      a/p       127.0.0.11:15006  ready          0     –        –     –           –     –       –  stale, 1m 17s ago  \
             plaintext\n"
        );
    }
}
