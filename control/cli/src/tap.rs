//! `penstock tap`: live requests, one a line, as the proxies see them.

use penstock_api::view::{Decision, RouteRow, Tap};

use crate::control::Control;
use crate::failure::{Failure, exit};
use crate::interruption::Interruption;
use crate::output::{Format, Output};
use crate::service::Selection;
use crate::table::{Cell, Table, cells};
use crate::terminal::{Terminal, Tone};
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
    /// Show beneath each request how the client's proxy chose the endpoint
    #[arg(long)]
    explain: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args, control: &mut Control, output: Output) -> Result<u8, Failure> {
    let mut interruption = Interruption::listen()?;
    let service = match &args.service {
        None => None,
        given => {
            let rows: Vec<RouteRow> = control.get("/routes").await?;
            let known = rows.iter().flat_map(|row| [row.service.as_str(), row.backend.as_str()]);
            Selection::of(given.clone()).resolve(known)?
        }
    };
    let mut lines = control.lines(&path(service.as_deref(), &args)).await?;
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
                if let Some(decision) = &tap.decision {
                    output.text(&explanation(decision, output.terminal))?;
                }
            }
            Format::Json | Format::Yaml => output.object(&tap)?,
        }
        shown += 1;
        if args.limit.is_some_and(|limit| shown >= limit) {
            return Ok(exit::FINE);
        }
    }
}

fn path(service: Option<&str>, args: &Args) -> String {
    let direction = match args.direction {
        Direction::Outbound => "outbound",
        Direction::Inbound => "inbound",
        Direction::Both => "both",
    };
    let mut path = format!("/tap?direction={direction}");
    if let Some(service) = service {
        path.push_str(&format!("&service={service}"));
    }
    if let Some(limit) = args.limit {
        path.push_str(&format!("&limit={limit}"));
    }
    if args.explain {
        path.push_str("&explain=true");
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

/// The choice of an endpoint: a sentence, and a table of those that were looked at, the best first.
fn explanation(decision: &Decision, terminal: Terminal) -> String {
    let looked = decision.candidates.iter().filter(|candidate| candidate.score.is_some()).count();
    let why = decision.why.replace('-', " ");
    let mut text = match looked {
        0 => format!("  {}: {why}, of {} endpoints\n", decision.policy, decision.endpoints),
        _ => format!("  {}: {why}, looked at {looked} of {}\n", decision.policy, decision.endpoints),
    };
    let timed = decision.candidates.iter().any(|candidate| candidate.predicted_ms.is_some());
    let mut table = if timed {
        Table::new(&[
            "",
            "ENDPOINT",
            ">SCORE",
            ">FIRST BYTE",
            ">ITS OWN WORK",
            ">IN FLIGHT",
            ">REPORT",
            ">MATCHED",
            "HEAT",
        ])
    } else {
        Table::new(&["", "ENDPOINT", ">IN FLIGHT"])
    };
    for candidate in &decision.candidates {
        let mark = Cell::toned(Tone::Good, if candidate.picked { "→" } else { "" });
        let endpoint = Cell::from(candidate.endpoint.as_str());
        let in_flight = Cell::from(format!("{:.0}", candidate.in_flight));
        if !timed {
            table.row([mark, endpoint, in_flight]);
            continue;
        }
        let ms = |value| Cell::from(units::or_dash(value, units::milliseconds));
        let matched =
            if candidate.matched > 0.0 { format!("{:.0}", candidate.matched) } else { String::new() };
        let heat = match candidate.heat.as_str() {
            "cold" => Cell::from("cold"),
            heat => Cell::toned(Tone::Warn, heat),
        };
        table.row([
            mark,
            endpoint,
            ms(candidate.score),
            ms(candidate.predicted_ms),
            ms(candidate.own_ms),
            in_flight,
            Cell::from(units::or_dash(candidate.report_age_ms, units::ago)),
            Cell::from(matched),
            heat,
        ]);
    }
    for line in table.render(terminal).lines() {
        text.push_str("  ");
        text.push_str(line);
        text.push('\n');
    }
    text
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
    use penstock_api::view::Candidate;

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
    fn a_choice_is_a_table_of_those_that_were_looked_at() {
        let candidate = |endpoint: &str, score: f64, picked: bool| Candidate {
            endpoint: endpoint.to_owned(),
            picked,
            score: Some(score),
            predicted_ms: Some(score),
            own_ms: Some(3.0),
            in_flight: 2.0,
            report_age_ms: picked.then_some(12.0),
            matched: if picked { 512.0 } else { 0.0 },
            heat: if picked { "cold" } else { "hot" }.to_owned(),
            affine: false,
        };
        let decision = Decision {
            policy: "gpu".to_owned(),
            why: "soonest-served".to_owned(),
            endpoints: 5,
            candidates: vec![candidate("demo/a", 4.2, true), candidate("demo/bb", 31.0, false)],
        };
        assert_eq!(
            explanation(&decision, Terminal::PLAIN),
            "  gpu: soonest served, looked at 2 of 5
\x20    ENDPOINT    SCORE  FIRST BYTE  ITS OWN WORK  IN FLIGHT     REPORT  MATCHED  HEAT
\x20 →  demo/a    4.20 ms     4.20 ms       3.00 ms          2  12 ms ago      512  cold
\x20    demo/bb   31.0 ms     31.0 ms       3.00 ms          2          –           hot
"
        );
    }

    #[test]
    fn a_turn_looks_at_nobody() {
        let winner = Candidate { endpoint: "demo/a".to_owned(), picked: true, ..Candidate::default() };
        let decision = Decision {
            policy: "round-robin".to_owned(),
            why: "turn".to_owned(),
            endpoints: 3,
            candidates: vec![winner],
        };
        assert_eq!(
            explanation(&decision, Terminal::PLAIN),
            "  round-robin: turn, of 3 endpoints
\x20    ENDPOINT  IN FLIGHT
\x20 →  demo/a            0
"
        );
    }

    #[test]
    fn the_question_carries_only_what_was_asked() {
        let args = Args { service: None, direction: Direction::Outbound, limit: None, explain: false };
        assert_eq!(path(None, &args), "/tap?direction=outbound");
        let args = Args { direction: Direction::Both, limit: Some(5), explain: true, ..args };
        assert_eq!(
            path(Some("demo/digits"), &args),
            "/tap?direction=both&service=demo/digits&limit=5&explain=true"
        );
    }
}
