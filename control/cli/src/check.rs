//! `penstock check`: a list of named checks, each with what was found and, if it is not as it should be, what to do.
//!
//! Of a directory, without any server: whether control would accept every object. Of a running control: whether it
//! accepts its objects, the proxies hold what it pushed, endpoints take traffic, and certificates are renewed.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

use penstock_api::view::{Certificate, EndpointRow, Problem, ProxyCertificates, ProxyStatus, Status};
use penstock_control::source::{Source, check, check_dir};
use serde::Serialize;
use tokio::time::timeout;

use crate::control::Control;
use crate::failure::{Failure, exit};
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
    /// Check the objects of a directory (dir:PATH) or of a cluster (kubernetes, or kubernetes:CONTEXT of the kubeconfig) instead
    /// of a running control
    #[arg(long)]
    source: Option<Source>,
}

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
    /// What to do; empty when nothing is.
    fix: String,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, verdict: Verdict::Ok, found: found.into(), details: Vec::new(), fix: String::new() }
    }

    fn bad(verdict: Verdict, name: &'static str, found: String, details: Vec<String>, fix: &str) -> Self {
        Self { name, verdict, found, details, fix: fix.to_owned() }
    }
}

/// Runs the command.
pub(crate) async fn run(args: Args, control: &mut Control, output: Output) -> Result<u8, Failure> {
    let checks = match args.source {
        Some(Source::Directory(path)) => of_directory(&path)?,
        Some(source @ Source::Kubernetes(_)) => of_cluster(&source).await?,
        None => of_control(control).await?,
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

/// Reads what is in a cluster once; control need not run there.
async fn of_cluster(source: &Source) -> Result<Vec<Check>, Failure> {
    let opened = timeout(LISTED, source.open(Duration::ZERO)).await.map_err(|_| {
        Failure::Problem(format!(
            "the Kubernetes API has not listed everything within {LISTED:?}: is it there, and may you list pods, services, endpointslices, \
             routes and policies of all namespaces? `kubectl auth can-i list pods -A` tells"
        ))
    })?;
    let (objects, _) = opened.map_err(|error| Failure::Problem(format!("{error:#}")))?;
    let problems = check(&objects.borrow());
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
        if !check.fix.is_empty() {
            text.push_str(&format!("    {} {}\n", terminal.paint(Tone::Strong, "→"), check.fix));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn certificate(role: &str, serial: &str, not_before: i64, not_after: i64) -> Certificate {
        Certificate {
            name: "x".to_owned(),
            serial: serial.to_owned(),
            not_before,
            not_after,
            role: role.to_owned(),
        }
    }

    fn holder(node: &str, certificates: Vec<Certificate>) -> ProxyCertificates {
        ProxyCertificates { node: node.to_owned(), certificates, error: None }
    }

    fn verdicts(checks: &[Check]) -> Vec<(&'static str, Verdict)> {
        checks.iter().map(|check| (check.name, check.verdict)).collect()
    }

    #[test]
    fn a_certificate_that_nobody_renewed_is_a_problem_before_it_ends() {
        let anchor = certificate("anchor", "1", 0, 400 * 86_400);
        let fresh = holder("a/one", vec![certificate("leaf", "2", 0, 1000), anchor.clone()]);
        let checks = certified(std::slice::from_ref(&fresh), 500.0);
        assert_eq!(verdicts(&checks), [("certificates", Verdict::Ok), ("trust anchors", Verdict::Ok)]);
        assert_eq!(checks[0].found, "1 held; the next to end is that of a/one, 8m 20s of 16m 40s left");
        assert_eq!(checks[1].found, "1 trusted; the first to end: 399d 23h of 400d 0h left");

        let checks = certified(&[fresh, holder("a/two", vec![anchor])], 800.0);
        assert_eq!(verdicts(&checks), [("certificates", Verdict::Problem), ("trust anchors", Verdict::Ok)]);
        assert_eq!(checks[0].details, ["a/one: 3m 20s of 16m 40s left"]);
    }

    #[test]
    fn an_anchor_that_ends_soon_is_told_once_and_with_the_command() {
        let day = 86_400;
        let anchor = certificate("anchor", "1", -364 * day, day);
        let checks = certified(&[holder("a/one", vec![anchor.clone()]), holder("a/two", vec![anchor])], 0.0);
        assert_eq!(verdicts(&checks), [("trust anchors", Verdict::Warning)]);
        assert_eq!(checks[0].details, ["anchor x: 1d 0h of 365d 0h left"]);
        assert!(checks[0].fix.contains("rotate-root"));
    }

    #[test]
    fn seconds_are_plenty_for_a_certificate_that_lives_for_a_minute() {
        let leaf = certificate("leaf", "2", -4, 40);
        let short_anchor = certificate("anchor", "1", -300, 300);
        let checks = certified(&[holder("a/one", vec![leaf, short_anchor])], 20.0);
        assert_eq!(verdicts(&checks), [("certificates", Verdict::Ok), ("trust anchors", Verdict::Ok)]);
        assert_eq!(checks[0].found, "1 held; the next to end is that of a/one, 20s of 44s left");
    }

    #[test]
    fn a_service_without_ready_endpoints_is_a_problem_and_an_ejection_a_warning() {
        let endpoint = |service: &str, name: &str, state: &str| EndpointRow {
            service: service.to_owned(),
            endpoint: name.to_owned(),
            state: state.to_owned(),
            ..EndpointRow::default()
        };
        let mut rows = vec![endpoint("a/s", "a/1", "ready"), endpoint("a/s", "a/2", "ready")];
        assert_eq!(ready(&rows).found, "2 ready in 1 Service");
        rows[0].state = "ejected".to_owned();
        assert_eq!(ready(&rows).verdict, Verdict::Warning);
        rows[1].state = "draining".to_owned();
        assert_eq!(ready(&rows).details, ["a/s: 0 of 2 ready"]);
        assert_eq!(ready(&rows).verdict, Verdict::Problem);
    }

    #[test]
    fn the_page_is_a_list_with_what_to_do() {
        let problem = Problem {
            file: "a.yaml".to_owned(),
            line: 3,
            object: "Service a/s".to_owned(),
            message: "weights sum to 0".to_owned(),
            last_good_in_force: false,
        };
        let checks = [Check::ok("control", "answers"), objects(&[problem], "Correct it.")];
        assert_eq!(
            page(&checks, Terminal::PLAIN),
            "✔ control  answers\n\
             ✖ objects  1 object is wrong\n    \
             a.yaml:3: Service a/s: weights sum to 0\n    \
             → Correct it.\n"
        );
        let json = serde_json::to_value(&checks).unwrap();
        assert_eq!(json[1]["verdict"], "problem");
    }

    #[test]
    fn the_examples_in_the_repository_pass() {
        for example in ["digits", "gpu"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/examples").join(example);
            let checks = of_directory(&path).unwrap();
            let page = page(&checks, Terminal::PLAIN);
            assert_eq!(verdicts(&checks), [("objects", Verdict::Ok)], "{example}: {page}");
        }
    }

    #[test]
    fn nonsense_in_a_directory_is_named_with_its_place() {
        let directory = tempfile::tempdir().unwrap();
        let yaml = "apiVersion: v1\nkind: Service\nmetadata:\n  name: s\n  namespace: a\n  annotations:\n    \
                    penstock.io/traffic-split: \"nobody=0\"\nspec:\n  ports:\n    - {port: 80}\n";
        std::fs::write(directory.path().join("s.yaml"), yaml).unwrap();
        let checks = of_directory(directory.path()).unwrap();
        assert_eq!(verdicts(&checks), [("objects", Verdict::Problem)]);
        assert!(checks[0].details[0].contains("s.yaml:"), "{:?}", checks[0].details);
        assert!(matches!(of_directory(&directory.path().join("no")), Err(Failure::Usage(_))));
    }
}
