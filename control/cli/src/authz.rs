//! `penstock authz`: which access policies and rate limits are in force for a pod, and what would become of a request.

use penstock_api::view::Authz;
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use crate::control::Control;
use crate::failure::{Failure, exit};
use crate::output::Output;
use crate::table::{Table, cells};
use crate::terminal::{Terminal, Tone};

/// The arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The pod, NAME or NAMESPACE/NAME
    pod: String,
    /// Who would ask: a SPIFFE id; empty for a client that proves none
    #[arg(long, value_name = "ID")]
    from: Option<String>,
    /// With which method
    #[arg(long, requires = "path")]
    method: Option<String>,
    /// For which path; without it, over a connection of bytes
    #[arg(long, requires = "from")]
    path: Option<String>,
    /// For which model, where the body says it
    #[arg(long, requires = "path")]
    model: Option<String>,
    /// With which header, NAME:VALUE
    #[arg(long, requires = "path", hide_long_help = true)]
    header: Option<String>,
    /// On which port of the pod
    #[arg(long, requires = "from", hide_long_help = true)]
    port: Option<u16>,
}

impl Args {
    fn query(&self) -> String {
        let mut query = format!("/authz?pod={}", escaped(&self.pod));
        let port = self.port.map(|port| port.to_string());
        let said = [
            ("from", &self.from),
            ("method", &self.method),
            ("path", &self.path),
            ("model", &self.model),
            ("header", &self.header),
            ("port", &port),
        ];
        for (name, value) in said {
            if let Some(value) = value {
                query.push_str(&format!("&{name}={}", escaped(value)));
            }
        }
        query
    }
}

fn escaped(text: &str) -> impl std::fmt::Display + '_ {
    utf8_percent_encode(text, NON_ALPHANUMERIC)
}

/// Runs the command. The exit status says whether the request would be allowed.
pub(crate) async fn run(args: Args, control: &mut Control, output: Output) -> Result<u8, Failure> {
    let answer: Authz = control.get(&args.query()).await?;
    output.page(&answer, page)?;
    let denied = answer.verdict.is_some_and(|verdict| !verdict.allowed);
    Ok(if denied { exit::PROBLEM } else { exit::FINE })
}

fn page(answer: &Authz, terminal: Terminal) -> String {
    let mut text = String::new();
    if answer.policies.is_empty() {
        text.push_str(&format!(
            "No AccessPolicy is about {}: every identity may ask it for everything.\n",
            answer.pod
        ));
    } else {
        let mut table = Table::new(&["POLICY", "ACTION", "PORTS", "RULE", "FROM", "TO", "WHEN"]);
        for row in &answer.policies {
            table.row(cells![
                row.policy.as_str(),
                row.action.as_str(),
                row.ports.as_str(),
                row.rule.as_str(),
                row.from.as_str(),
                row.to.as_str(),
                row.when.as_str(),
            ]);
        }
        text.push_str(&table.render(terminal));
    }
    if !answer.limits.is_empty() {
        let mut table = Table::new(&["RATELIMIT", "LIMIT", "PORTS", "GIVES", "TO", "OF"]);
        for row in &answer.limits {
            table.row(cells![
                row.policy.as_str(),
                row.limit.as_str(),
                row.ports.as_str(),
                row.gives.as_str(),
                row.each.as_str(),
                row.of.as_str(),
            ]);
        }
        text.push_str(&table.render(terminal));
    }
    match answer.applied {
        Some(true) => {}
        Some(false) => text.push_str(&format!("The proxy of {} has not applied them yet.\n", answer.pod)),
        None => text.push_str(&format!("The proxy of {} is not connected.\n", answer.pod)),
    }
    if let Some(verdict) = &answer.verdict {
        let (tone, word) = if verdict.allowed { (Tone::Good, "allowed") } else { (Tone::Bad, "denied") };
        text.push_str(&format!("{}: {}\n", terminal.paint(tone, word), verdict.story));
        if let Some(why) = &verdict.would_deny {
            text.push_str(&format!("{}: {why}\n", terminal.paint(Tone::Warn, "would be denied by an Audit")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::view::{AuthzRow, LimitRow, Verdict};

    #[test]
    fn a_verdict_says_why() {
        let row = AuthzRow {
            policy: "demo/p".into(),
            action: "Allow".into(),
            ports: "8000".into(),
            rule: "1".into(),
            from: "namespace web".into(),
            to: "POST".into(),
            when: String::new(),
        };
        let verdict =
            Verdict { allowed: false, story: "not-authorized: no policy allows it".into(), would_deny: None };
        let answer = Authz {
            pod: "demo/digits-0".into(),
            applied: Some(false),
            policies: vec![row],
            limits: Vec::new(),
            verdict: Some(verdict),
        };
        assert_eq!(
            page(&answer, Terminal::PLAIN),
            "POLICY  ACTION  PORTS  RULE  FROM           TO    WHEN\n\
             demo/p  Allow   8000   1     namespace web  POST\n\
             The proxy of demo/digits-0 has not applied them yet.\n\
             denied: not-authorized: no policy allows it\n"
        );
        let limit = LimitRow {
            policy: "demo/fair".into(),
            limit: "each".into(),
            ports: "all".into(),
            gives: "100 requests/min (20 at once)".into(),
            each: "each identity".into(),
            of: "everything".into(),
        };
        let open =
            Authz { pod: "demo/x".into(), applied: Some(true), limits: vec![limit], ..Authz::default() };
        assert_eq!(
            page(&open, Terminal::PLAIN),
            "No AccessPolicy is about demo/x: every identity may ask it for everything.\n\
             RATELIMIT  LIMIT  PORTS  GIVES                          TO             OF\n\
             demo/fair  each   all    100 requests/min (20 at once)  each identity  everything\n"
        );
    }

    #[test]
    fn what_is_asked_survives_the_way() {
        let args = Args {
            pod: "demo/x".into(),
            from: Some("spiffe://a/ns/b/sa/c".into()),
            method: None,
            path: Some("/a?b&c=%20".into()),
            model: None,
            header: None,
            port: Some(80),
        };
        assert_eq!(
            args.query(),
            "/authz?pod=demo%2Fx&from=spiffe%3A%2F%2Fa%2Fns%2Fb%2Fsa%2Fc&path=%2Fa%3Fb%26c%3D%2520&port=80"
        );
    }
}
