//! `penstock tap`: live requests, one a line, as the proxies see them.

use penstock_api::view::{RouteRow, Tap};

use crate::control::Control;
use crate::failure::{Failure, exit};
use crate::interruption::Interruption;
use crate::output::{Format, Output};
use crate::service::Selection;
use crate::table::{Cell, Table, cells};
use crate::terminal::Tone;
use crate::units;

/// Whose view of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
enum Direction {
    /// The client's proxy
    #[default]
    Outbound,
    /// The server's proxy
    Inbound,
    /// Each request twice
    Both,
}

/// The arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only requests to this Service, NAME or NAMESPACE/NAME
    service: Option<String>,
    /// Whose view: outbound (the client's proxy), inbound (the server's) or both (each request twice)
    #[arg(long, value_enum, hide_possible_values = true, default_value_t)]
    direction: Direction,
    /// End after so many requests [default: never]
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
}

/// Runs the command.
pub(crate) async fn run(args: Args, control: &mut Control, output: Output) -> Result<u8, Failure> {
    let mut interruption = Interruption::listen()?;
    let service = match args.service {
        None => None,
        given => {
            let rows: Vec<RouteRow> = control.get("/routes").await?;
            let known = rows.iter().flat_map(|row| [row.service.as_str(), row.backend.as_str()]);
            Selection::of(given).resolve(known)?
        }
    };
    let mut lines = control.lines(&path(service.as_deref(), args.direction, args.limit)).await?;
    let mut table = Table::new(&[
        "TIME",
        "PROXY",
        "PEER",
        "SERVICE",
        "ENDPOINT",
        "REQUEST",
        ">STATUS",
        ">HEADERS",
        ">TOTAL",
        ">TRIES",
        ">SENT",
        ">RECEIVED",
        "TLS",
        "REASON",
    ]);
    let mut shown = 0;
    loop {
        let next = tokio::select! {
            next = lines.next::<Tap>() => next?,
            () = interruption.comes() => None,
        };
        let Some(tap) = next else { return Ok(exit::FINE) };
        match output.format {
            Format::Table => {
                if shown == 0 {
                    // Wide enough for the first row, so that the heading stands over it.
                    table.stream(&row(&tap), output.terminal);
                    output.text(&format!("{}\n", table.heading(output.terminal)))?;
                }
                output.text(&format!("{}\n", table.stream(&row(&tap), output.terminal)))?;
            }
            Format::Json | Format::Yaml => output.object(&tap)?,
        }
        shown += 1;
        if args.limit.is_some_and(|limit| shown >= limit) {
            return Ok(exit::FINE);
        }
    }
}

fn path(service: Option<&str>, direction: Direction, limit: Option<u64>) -> String {
    let direction = match direction {
        Direction::Outbound => "outbound",
        Direction::Inbound => "inbound",
        Direction::Both => "both",
    };
    let mut path = format!("/tap?direction={direction}");
    if let Some(service) = service {
        path.push_str(&format!("&service={service}"));
    }
    if let Some(limit) = limit {
        path.push_str(&format!("&limit={limit}"));
    }
    path
}

fn row(tap: &Tap) -> [Cell; 14] {
    let service = if tap.backend.is_empty() || tap.backend == tap.service {
        tap.service.clone()
    } else {
        format!("{} → {}", tap.service, tap.backend.rsplit('/').next().unwrap_or(&tap.backend))
    };
    // The proxy's own application needs no proof; the other side is who had to show a certificate.
    let inbound = tap.direction == "inbound";
    let reason = match (tap.reason.as_str(), tap.flags.as_str()) {
        (reason, "" | "-") => reason.to_owned(),
        (reason, flags) => format!("{reason} ({flags})"),
    };
    let status = if tap.status < 400 { Tone::Good } else { Tone::Bad };
    cells![
        time_of_day(&tap.at),
        format!("{} {}", tap.proxy, if inbound { "in" } else { "out" }),
        account(if inbound { &tap.client } else { &tap.server }),
        service,
        tap.endpoint.as_str(),
        format!("{} {}", tap.method, tap.path),
        Cell::toned(status, tap.status.to_string()),
        units::milliseconds(tap.headers_ms),
        units::milliseconds(tap.total_ms),
        tap.tries.to_string(),
        units::bytes(tap.request_bytes),
        units::bytes(tap.response_bytes),
        if tap.mtls { Cell::from("mutual") } else { Cell::toned(Tone::Warn, "none") },
        Cell::toned(Tone::Bad, reason),
    ]
}

/// `12:03:10.123456` of an RFC 3339 time; the day is today.
fn time_of_day(at: &str) -> &str {
    at.split_once('T').map_or(at, |(_, time)| time.trim_end_matches('Z'))
}

/// `demo/client` of a SPIFFE id; `–` when nothing was proven.
fn account(identity: &str) -> String {
    match identity.parse::<penstock_api::SpiffeId>() {
        Ok(id) => {
            let (_, namespace, account) = id.parts();
            format!("{namespace}/{account}")
        }
        Err(_) if identity.is_empty() => "–".to_owned(),
        Err(_) => identity.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terminal::Terminal;

    fn tap() -> Tap {
        Tap {
            proxy: "demo/client".to_owned(),
            direction: "outbound".to_owned(),
            at: "2026-11-24T12:03:10.123456Z".to_owned(),
            server: "spiffe://cluster.local/ns/demo/sa/digits-v2".to_owned(),
            service: "demo/digits".to_owned(),
            backend: "demo/digits-v2".to_owned(),
            endpoint: "demo/digits-v2-a".to_owned(),
            method: "POST".to_owned(),
            path: "/v2/models/digits/infer".to_owned(),
            status: 200,
            headers_ms: 1.25,
            total_ms: 1.5,
            tries: 1,
            mtls: true,
            request_bytes: 400,
            response_bytes: 180,
            ..Tap::default()
        }
    }

    #[test]
    fn a_request_is_one_line_that_says_who_asked_what_and_how_it_went() {
        let mut table = Table::new(&["", "", "", "", "", "", ">", ">", ">", ">", ">", ">", "", ""]);
        assert_eq!(
            table.stream(&row(&tap()), Terminal::PLAIN),
            "12:03:10.123456  demo/client out  demo/digits-v2  demo/digits → digits-v2  demo/digits-v2-a  \
             POST /v2/models/digits/infer  200  1.25 ms  1.50 ms  1  400 B  180 B  mutual"
        );
        let failed = Tap { status: 503, reason: "no-endpoint".to_owned(), flags: "UH".to_owned(), ..tap() };
        assert!(table.stream(&row(&failed), Terminal::PLAIN).ends_with("mutual  no-endpoint (UH)"));
    }

    #[test]
    fn the_question_carries_only_what_was_asked() {
        assert_eq!(path(None, Direction::Outbound, None), "/tap?direction=outbound");
        assert_eq!(
            path(Some("demo/digits"), Direction::Both, Some(5)),
            "/tap?direction=both&service=demo/digits&limit=5"
        );
    }
}
