//! `penstock check`: a list of named checks, each with what was found and, if it is not as it should be, what to do.
//!
//! Of a directory, without any server: whether control would accept every object. Of a running control: whether it
//! accepts its objects, the proxies hold what it pushed, endpoints take traffic, and certificates are renewed. Of a cluster: whether
//! Penstock can be installed on it, and whether all that was installed is there and works.

mod before;
mod certificates;
mod facts;
#[cfg(test)]
mod installation;
mod installed;
#[cfg(test)]
mod tables;
#[cfg(test)]
mod tests;
mod workloads;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use penstock_api::view::{Certificate, EndpointRow, Problem, ProxyCertificates, ProxyStatus, Status};
use penstock_control::source::{Source, check, check_dir};
use serde::Serialize;
use tokio::time::timeout;

use self::facts::{Fact, Facts};
use crate::cluster::{Cluster, name};
use crate::control::Control;
use crate::failure::{Failure, exit};
use crate::install::NAMESPACE;
use crate::output::Output;
use crate::status::{place, told};
use crate::terminal::{Terminal, Tone};
use crate::units;

/// An anchor or intermediate with less of its life left should be rotated now: everything below it ends with it. A
/// month of a year.
const ANCHOR_SHARE_LEFT: f64 = 1.0 / 12.0;
/// Sidecars renew at two thirds of the lifetime at the latest; less than a quarter left means that it does not work.
const LEAF_SHARE_LEFT: f64 = 0.25;

/// A cluster that has not told what is in it by then is not going to.
const LISTED: Duration = Duration::from_secs(20);

/// The arguments.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Check the objects of a directory (dir:PATH) or of a cluster (kubernetes, or kubernetes:CONTEXT of the kubeconfig), and
    /// nothing else
    #[arg(long)]
    source: Option<Source>,
    /// Check whether Penstock can be installed on the cluster of the kubeconfig
    #[arg(long, conflicts_with = "source")]
    pre: bool,
    /// The context of the kubeconfig; its current one unless said
    #[arg(long, value_name = "NAME", conflicts_with = "source")]
    context: Option<String>,
}

/// A check of a cluster.
type Rule = fn(&Facts) -> Check;

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// Worth a look; no reason to fail.
    Warning,
    /// Wrong.
    Problem,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Check {
    /// What was looked at.
    name: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// Details, one a line: which object, which proxy.
    details: Vec<String>,
    /// Why it matters; empty where it goes without saying.
    #[serde(skip_serializing_if = "str::is_empty")]
    why: &'static str,
    /// What to do; empty when nothing is.
    fix: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        let found = found.into();
        Self { name, verdict: Verdict::Ok, found, details: Vec::new(), why: "", fix: String::new() }
    }

    fn bad(verdict: Verdict, name: &'static str, found: String, details: Vec<String>, fix: &str) -> Self {
        Self { name, verdict, found, details, why: "", fix: fix.to_owned() }
    }

    /// Says why it matters, where something is wrong.
    fn because(self, why: &'static str) -> Self {
        if self.verdict == Verdict::Ok || !self.why.is_empty() { self } else { Self { why, ..self } }
    }
}

/// Runs the command.
pub(crate) async fn run(args: Args, control: &mut Control, output: Output) -> Result<u8, Failure> {
    let checks = match args.source {
        Some(Source::Directory(path)) => of_directory(&path)?,
        Some(source @ Source::Kubernetes(_)) => of_source(&source).await?,
        None => match Cluster::open(args.context.as_deref()).await {
            Ok(cluster) if args.pre => judged(&Facts::gather(&cluster, false).await, &[&before::ALL]),
            Ok(cluster) => of_cluster(&cluster, control).await?,
            Err(why) if args.pre || args.context.is_some() => return Err(Failure::Usage(why)),
            // No cluster is known, so a control on this machine is meant.
            Err(_) => of_control(control).await?,
        },
    };
    output.page(&checks, |checks, terminal| page(checks, terminal))?;
    let fine = checks.iter().all(|check| check.verdict != Verdict::Problem);
    Ok(if fine { exit::FINE } else { exit::PROBLEM })
}

fn of_directory(path: &Path) -> Result<Vec<Check>, Failure> {
    if !path.is_dir() {
        return Err(Failure::Usage(format!("--source dir:{}: there is no such directory", path.display())));
    }
    Ok(vec![objects(&check_dir(path), "Correct the files and run the check again.")])
}

/// Of a cluster, and of its control where that answers.
async fn of_cluster(cluster: &Cluster, control: &mut Control) -> Result<Vec<Check>, Failure> {
    let facts = Facts::gather(cluster, true).await;
    let there = facts.items(Fact::Namespaces).iter().any(|namespace| name(namespace) == NAMESPACE);
    if !there && let Ok(checks) = of_control(control).await {
        // The one that runs on this machine is meant: `penstock demo`, say.
        return Ok(checks);
    }
    let mut checks = judged(&facts, &[&before::STAYING, &installed::ALL, &workloads::ALL]);
    match of_control(control).await {
        Ok(more) => checks.extend(more),
        Err(Failure::Unreachable { .. }) => {
            let fix = format!(
                "kubectl -n {NAMESPACE} port-forward svc/penstock-control 8080 &  # then run this again"
            );
            let found = format!("not asked: it does not answer at {}", control.url());
            let check =
                Check::bad(Verdict::Warning, "proxies, as control sees them", found, Vec::new(), &fix);
            checks.push(check.because(
                "Which proxies are connected and hold the newest configuration, control alone knows.",
            ));
        }
        Err(other) => return Err(other),
    }
    Ok(checks)
}

/// The verdicts of all rules; of the first alone where the API server does not answer.
fn judged(facts: &Facts, rules: &[&[Rule]]) -> Vec<Check> {
    let answers = facts.get(Fact::Version).found().is_some();
    let rules = rules.iter().flat_map(|rules| rules.iter());
    rules.take(if answers { usize::MAX } else { 1 }).map(|rule| rule(facts)).collect()
}

/// Reads what is in a cluster once; control need not run there.
async fn of_source(source: &Source) -> Result<Vec<Check>, Failure> {
    let opened = timeout(LISTED, source.open(Duration::ZERO)).await.map_err(|_| {
        Failure::Problem(format!(
            "the Kubernetes API has not listed everything within {LISTED:?}: is it there, and may you list pods, services, endpointslices, \
             routes and policies of all namespaces? `kubectl auth can-i list pods -A` tells"
        ))
    })?;
    let opened = opened.map_err(|error| Failure::Problem(format!("{error:#}")))?;
    let problems = check(&opened.objects.borrow());
    Ok(vec![self::objects(&problems, "Correct the objects with kubectl and run the check again.")])
}

async fn of_control(control: &mut Control) -> Result<Vec<Check>, Failure> {
    let status: Status = control.get("/status").await?;
    let endpoints: Vec<EndpointRow> = control.get("/endpoints").await?;
    let certificates: Vec<ProxyCertificates> = control.get("/certs").await?;
    let up = format!("{} answers, up for {}", control.url(), units::age(status.uptime_s));
    let mut checks = vec![
        Check::ok("control", up),
        objects(&status.problems, "Correct the files; control reads them again at once."),
        connected(&status.proxies),
        applied(&status),
        refused(&status.proxies),
        ready(&endpoints),
    ];
    let now =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    checks.extend(certified(&certificates, now));
    Ok(checks)
}

fn objects(problems: &[Problem], fix: &str) -> Check {
    let name = "objects";
    if problems.is_empty() {
        return Check::ok(name, "all are understood and make sense");
    }
    let details = problems.iter().map(|problem| format!("{}: {}", place(problem), told(problem))).collect();
    let found = format!("{} wrong", many(problems.len(), "object is", "objects are"));
    Check::bad(Verdict::Problem, name, found, details, fix)
}

fn connected(proxies: &[ProxyStatus]) -> Check {
    let name = "proxies connected";
    let gone: Vec<String> = nodes(proxies.iter().filter(|proxy| !proxy.connected));
    match (proxies.len() - gone.len(), gone.len()) {
        (0, 0) => Check::bad(
            Verdict::Warning,
            name,
            "no proxy has connected yet".to_owned(),
            Vec::new(),
            "Start one: penstock-proxy run --control ADDRESS --control-ca anchors.pem --token FILE --node NAMESPACE/POD",
        ),
        (connected, 0) => Check::ok(name, format!("all {connected}")),
        (connected, lost) => Check::bad(
            Verdict::Warning,
            name,
            format!("{connected}, and {lost} that were lately and are not now"),
            gone,
            "Nothing to do where the pod is gone. Where it still runs, its proxy goes on with what it has and its log \
             says why it cannot connect.",
        ),
    }
}

fn applied(status: &Status) -> Check {
    let name = "newest snapshot";
    let lagging: Vec<String> = nodes(status.proxies.iter().filter(|proxy| proxy.connected && !proxy.applied));
    if lagging.is_empty() {
        return Check::ok(name, format!("{} is applied by every connected proxy", status.snapshot));
    }
    let found =
        format!("{} not applied {}", many(lagging.len(), "proxy has", "proxies have"), status.snapshot);
    let fix = "Run `penstock status --wait`. A proxy that never applies it has refused a resource or does not read its \
               stream; its log says which.";
    Check::bad(Verdict::Problem, name, found, lagging, fix)
}

fn refused(proxies: &[ProxyStatus]) -> Check {
    let name = "refused resources";
    let details: Vec<String> = proxies
        .iter()
        .flat_map(|proxy| proxy.refused.iter().map(|r| format!("{}: {}: {}", proxy.node, r.kind, r.reason)))
        .collect();
    if details.is_empty() {
        return Check::ok(name, "none");
    }
    let found = many(details.len(), "resource", "resources");
    let fix = "The proxies go on with the version before. Correct the object that the reason names; where it is right, \
               the proxy is older than control.";
    Check::bad(Verdict::Problem, name, found, details, fix)
}

fn ready(endpoints: &[EndpointRow]) -> Check {
    let name = "endpoints";
    let mut services: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for endpoint in endpoints {
        let count = services.entry(&endpoint.service).or_default();
        count.0 += usize::from(endpoint.state == "ready");
        count.1 += 1;
    }
    let dead: Vec<String> = services
        .iter()
        .filter(|(_, (ready, _))| *ready == 0)
        .map(|(service, (_, all))| format!("{service}: 0 of {all} ready"))
        .collect();
    let ejected: Vec<String> = endpoints
        .iter()
        .filter(|endpoint| endpoint.state == "ejected")
        .map(|endpoint| format!("{} of {} is ejected", endpoint.endpoint, endpoint.service))
        .collect();
    if !dead.is_empty() {
        let found = format!("{} no ready endpoint", many(dead.len(), "Service has", "Services have"));
        let fix = "Run `penstock endpoints`: it shows each endpoint's state and load.";
        return Check::bad(Verdict::Problem, name, found, dead, fix);
    }
    if !ejected.is_empty() {
        let found = format!(
            "{} no requests after failures in a row",
            many(ejected.len(), "endpoint gets", "endpoints get")
        );
        let fix = "It is tried again by itself. Run `penstock tap` to see what fails there.";
        return Check::bad(Verdict::Warning, name, found, ejected, fix);
    }
    Check::ok(name, format!("{} ready in {}", endpoints.len(), many(services.len(), "Service", "Services")))
}

/// What the proxies hold: their own certificates, and the anchors that they verify peers against.
fn certified(proxies: &[ProxyCertificates], now: f64) -> Vec<Check> {
    let held = || proxies.iter().flat_map(|p| p.certificates.iter().map(move |c| (p.node.as_str(), c)));
    let mut checks = Vec::new();
    let silent: Vec<String> =
        proxies.iter().filter_map(|p| p.error.as_ref().map(|e| format!("{}: {e}", p.node))).collect();
    if !silent.is_empty() {
        let found = format!("{} not tell", many(silent.len(), "proxy does", "proxies do"));
        let fix = "Run `penstock status`: is the proxy connected?";
        checks.push(Check::bad(Verdict::Warning, "certificates known", found, silent, fix));
    }
    let leaves: Vec<_> = held().filter(|(_, certificate)| certificate.role == "leaf").collect();
    let late: Vec<String> = leaves
        .iter()
        .filter(|(_, leaf)| share_left(leaf, now) < LEAF_SHARE_LEFT)
        .map(|(node, leaf)| format!("{node}: {}", time_left(leaf, now)))
        .collect();
    if !late.is_empty() {
        let found =
            format!("{} not renewed in time", many(late.len(), "certificate was", "certificates were"));
        let fix = "The proxy's log says why control does not sign: an expired token, or no connection.";
        checks.push(Check::bad(Verdict::Problem, "certificates", found, late, fix));
    } else if let Some((node, next)) =
        leaves.iter().min_by(|a, b| share_left(a.1, now).total_cmp(&share_left(b.1, now)))
    {
        let found =
            format!("{} held; the next to end is that of {node}, {}", leaves.len(), time_left(next, now));
        checks.push(Check::ok("certificates", found));
    }
    let mut anchors: Vec<&Certificate> = held().map(|(_, c)| c).filter(|c| c.role != "leaf").collect();
    anchors.sort_by(|a, b| (a.not_after, &a.serial).cmp(&(b.not_after, &b.serial)));
    anchors.dedup_by(|a, b| a.serial == b.serial);
    let ending: Vec<String> = anchors
        .iter()
        .filter(|anchor| share_left(anchor, now) < ANCHOR_SHARE_LEFT)
        .map(|anchor| format!("{} {}: {}", anchor.role, anchor.name, time_left(anchor, now)))
        .collect();
    if !ending.is_empty() {
        let found = format!("{} soon", many(ending.len(), "ends", "end"));
        let fix = "Run `penstock-control rotate-root --state DIR`: the new root is pushed first and used later, without a \
                   restart.";
        checks.push(Check::bad(Verdict::Warning, "trust anchors", found, ending, fix));
    } else if let Some(first) = anchors.first() {
        let found = format!("{} trusted; the first to end: {}", anchors.len(), time_left(first, now));
        checks.push(Check::ok("trust anchors", found));
    }
    checks
}

/// Seconds until a certificate ends.
fn left(certificate: &Certificate, now: f64) -> f64 {
    certificate.not_after as f64 - now
}

/// How long a certificate lives as a whole.
fn lifetime(certificate: &Certificate) -> f64 {
    (certificate.not_after - certificate.not_before).max(1) as f64
}

/// The share of its life that a certificate has left. Seconds are plenty for one that lives for a minute, and none too
/// many hours for one that lives for a year.
fn share_left(certificate: &Certificate, now: f64) -> f64 {
    left(certificate, now) / lifetime(certificate)
}

fn time_left(certificate: &Certificate, now: f64) -> String {
    let left = left(certificate, now);
    if left < 0.0 {
        return format!("ended {} ago", units::age(-left));
    }
    format!("{} of {} left", units::age(left), units::age(lifetime(certificate)))
}

fn nodes<'a>(proxies: impl Iterator<Item = &'a ProxyStatus>) -> Vec<String> {
    proxies.map(|proxy| proxy.node.clone()).collect()
}

fn many(n: usize, one: &str, more: &str) -> String {
    format!("{} {}", units::count(n as u64), if n == 1 { one } else { more })
}

fn page(checks: &[Check], terminal: Terminal) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let (sign, tone) = match check.verdict {
            Verdict::Ok => ("✔", Tone::Good),
            Verdict::Warning => ("!", Tone::Warn),
            Verdict::Problem => ("✖", Tone::Bad),
        };
        let sign = terminal.paint(tone, sign);
        text.push_str(&format!("{sign} {:<width$}  {}\n", check.name, check.found));
        for detail in &check.details {
            text.push_str(&format!("    {detail}\n"));
        }
        if !check.why.is_empty() {
            text.push_str(&format!("    {}\n", terminal.paint(Tone::Faint, check.why)));
        }
        if !check.fix.is_empty() {
            text.push_str(&format!("    {} {}\n", terminal.paint(Tone::Strong, "→"), check.fix));
        }
    }
    text
}
