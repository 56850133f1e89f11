//! Whether all parties agree about a case: the client, by what it was answered; the proxy, by its access log; the server,
//! by what it saw.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Deserialize;

use crate::backends::{Saw, Seen};
use crate::client::Told;
use crate::corpus::{Case, Fate, marked};

/// A line of the proxy's access log.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Line {
    pub(crate) method: String,
    pub(crate) authority: String,
    pub(crate) path: String,
    pub(crate) status: u16,
    pub(crate) reason: String,
    pub(crate) request_bytes: usize,
}

/// The lines of what a proxy said that are of its access log.
pub(crate) fn access_log(said: &str) -> Vec<Line> {
    let line = |line: &str| serde_json::from_str(line).ok();
    said.lines().filter(|text| text.starts_with("{\"ts\":")).filter_map(line).collect()
}

/// All that is known of one case over one way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Account {
    pub(crate) told: Told,
    /// What became of another client's request behind it.
    pub(crate) innocent: Option<String>,
    pub(crate) lines: Vec<Line>,
    pub(crate) seen: Vec<Seen>,
}

/// All that a proxy and its server say.
#[derive(Debug, Default)]
pub(crate) struct Said {
    /// By case.
    pub(crate) accounts: BTreeMap<usize, Account>,
    /// What the server saw that is of no case, and of nobody else.
    pub(crate) strays: Vec<Seen>,
    /// Requests of other clients that came to the server over the connection that a case was just seen on.
    pub(crate) followed: usize,
}

/// What stands in request lines that do not say whose they are.
const UNMARKED: [&str; 2] = [" /v2/models/m/infer", "OPTIONS * "];

/// Sorts what was said. What a sidecar asks the server by itself names the server's own address.
pub(crate) fn by_case(lines: Vec<Line>, seen: Vec<Seen>, server: SocketAddr) -> Said {
    let (mut said, mut last) = (Said::default(), BTreeMap::new());
    let own = server.to_string();
    for line in lines {
        if let Some(number) = marked(&line.path).or_else(|| marked(&line.authority)) {
            said.accounts.entry(number).or_default().lines.push(line);
        }
    }
    for seen in seen {
        let target = Saw::read(&seen.saw).map(|saw| saw.target).unwrap_or_default();
        let number = marked(&target).or_else(|| marked(&seen.line)).or_else(|| marked(&seen.host));
        let before = last.insert(seen.connection.clone(), number).flatten();
        match number {
            Some(number) => said.accounts.entry(number).or_default().seen.push(seen),
            None if target.starts_with("/innocent/") => said.followed += usize::from(before.is_some()),
            None if seen.host == own => {}
            // Refused for its first line, of which these bear no mark.
            None if seen.status == 400 && UNMARKED.iter().any(|words| seen.line.contains(words)) => {}
            None => said.strays.push(seen),
        }
    }
    said
}

/// Fields that mean nothing in trailers, and may do harm there (RFC 9110, 6.5.1).
pub(crate) const FORBIDDEN: [&str; 6] =
    ["content-length", "transfer-encoding", "host", "connection", "authorization", "penstock-client-id"];

/// What is wrong, and which of the wanted requests arrived.
pub(crate) fn judge(case: &Case, account: &Account) -> (Vec<String>, Vec<usize>) {
    let mut wrong = Vec::new();
    let taken: Vec<Saw> = account
        .seen
        .iter()
        .filter(|seen| seen.status == 200)
        .filter_map(|seen| Saw::read(&seen.saw))
        .collect();

    // What arrived is what was sent, in its order.
    let (mut arrived, mut next) = (Vec::new(), 0);
    for saw in &taken {
        let same = |want: &crate::corpus::Want| {
            (&want.method, &want.target, &want.host) == (&saw.method, &saw.target, &saw.host)
                && want.body.len() == saw.length
                && want.digest() == saw.digest
        };
        match case.wants[next..].iter().position(same) {
            Some(at) => {
                arrived.push(next + at);
                next += at + 1;
            }
            None => wrong.push(format!("the server took this for a request: {saw:?}")),
        }
    }
    for (number, want) in case.wants.iter().enumerate() {
        let (fate, came) = (want.fate, arrived.contains(&number));
        match fate {
            Fate::Passes if !came => wrong.push(format!("{} {} did not arrive", want.method, want.target)),
            Fate::Refused | Fate::Unfinished if came => {
                wrong.push(format!("{} {} arrived and should not", want.method, want.target));
            }
            Fate::Passes | Fate::MayPass | Fate::Refused | Fate::Unfinished => {}
        }
    }

    // What did not arrive whole, or was refused by the server, may only be what is in doubt.
    let doubtful = case.wants.iter().any(|want| matches!(want.fate, Fate::MayPass | Fate::Unfinished));
    for seen in account.seen.iter().filter(|seen| seen.status != 200 && !doubtful) {
        wrong.push(format!("the server was sent what it refused: {seen:?}"));
    }

    // The client was answered by those, in that order.
    match account.told.answers() {
        Ok(answers) => {
            let answered: Vec<Saw> =
                answers.into_iter().filter(|(status, _)| *status == 200).filter_map(|(_, saw)| saw).collect();
            if answered != taken {
                wrong.push(format!("the client was answered {answered:?}"));
            }
        }
        Err(error) => wrong.push(format!("the client was answered what is no HTTP: {error}")),
    }
    if !account.told.closed && !case.is_unfinished() {
        wrong.push("the connection hangs".to_owned());
    }

    // The proxy says that it passed on the same.
    let passed: Vec<_> = account
        .lines
        .iter()
        .filter(|line| line.status == 200 && line.reason.is_empty())
        .map(|line| (line.method.as_str(), line.authority.as_str(), line.path.as_str(), line.request_bytes))
        .collect();
    let took: Vec<_> = taken
        .iter()
        .map(|saw| (saw.method.as_str(), saw.host.as_str(), path(&saw.target), saw.length))
        .collect();
    if passed != took {
        wrong.push("the proxy's log and the server's differ".to_owned());
    }
    for seen in &account.seen {
        for name in seen.trailers.split(' ').filter(|name| FORBIDDEN.contains(name)) {
            wrong.push(format!("{name} arrived in trailers"));
        }
    }
    wrong.extend(account.innocent.iter().map(|what| format!("another client's request, sent next, {what}")));
    (wrong, arrived)
}

/// What arrived, as far as it says something of the proxy. What a server refused by itself does not; and whether the tail behind a
/// refusal is read depends on how much of the body had come by then.
pub(crate) fn comparable(case: &Case, account: &Account, arrived: Vec<usize>) -> Option<Vec<usize>> {
    if account.lines.iter().any(|line| line.status != 200 && line.reason.is_empty()) {
        return None;
    }
    let tail = case.wants.len() - 1;
    let is_open = case.wants[tail].fate == Fate::MayPass && !arrived.contains(&(tail - 1));
    Some(arrived.into_iter().filter(|at| !(is_open && *at == tail)).collect())
}

/// A target without its query, as the log has it.
fn path(target: &str) -> &str {
    target.split('?').next().unwrap_or_default()
}

/// All of it, for whoever has to find out why.
pub(crate) fn told(case: &Case, way: &str, account: &Account, wrong: &[String]) -> String {
    let cut = |bytes: &[u8]| {
        let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(1500)]).escape_debug().to_string();
        if bytes.len() > 1500 { format!("{shown}… ({} bytes)", bytes.len()) } else { shown }
    };
    let mut text = format!("== {} over {way}\n", case.name);
    for what in wrong {
        text += &format!("  WRONG  {what}\n");
    }
    text += &format!("  sent   {}\n", cut(&case.bytes));
    text += &format!(
        "  got    {}{}\n",
        cut(&account.told.bytes),
        if account.told.closed { " (closed)" } else { "" }
    );
    for line in &account.lines {
        text += &format!("  proxy  {line:?}\n");
    }
    for seen in &account.seen {
        text +=
            &format!("  {way} {} {:?} {:?} {:?}\n", seen.status, seen.line, seen.host, Saw::read(&seen.saw));
    }
    text + &format!(
        "  alone  PENSTOCK_SMUGGLING='{}' cargo test --workspace --test smuggling -- --nocapture\n",
        case.name
    )
}
