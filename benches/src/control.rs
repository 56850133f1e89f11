//! `penstock-bench control`: how long after a weight is written to a file every proxy has it in force.
//!
//! A real `penstock-control` reads a directory; the proxies are the proxy's own configuration client with its own
//! store, each with a key, a certificate and a connection of its own, all in this process. A step rewrites one weight
//! in the YAML; a proxy has applied it when its store has swapped the snapshot in. Time runs from just before the
//! write, so the watch, the debounce, compiling, pushing, TLS and applying are all in it.
//!
//! Beside it, the cases `webhook`, `rollback`, `endpoints-N` and `sidecar-services-N`.

mod apiserver;
mod endpoints;
mod outside;
mod rollback;
mod services;
mod webhook;

use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use hyper::Method;
use penstock_api::resource::Payload;
use penstock_api::view::Status;
use penstock_api::{ServiceName, SpiffeId, names};
use penstock_proxy::config::Store;
use penstock_proxy::config::store::{Change, Refusal};
use penstock_proxy::identity::Identity;
use penstock_proxy::identity::control::Control;
use penstock_proxy::identity::sign::{Signer, keep_signed};
use penstock_proxy::xds::{Client, Config, Sink};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinSet, LocalSet};
use tokio::time::{Instant, timeout};

use crate::mesh::client::ask;
use crate::process::{self, Process};
use crate::report::{self, Named, Row, Summary};
use crate::subject::free_port;
use crate::{bed, usage};

const SUBJECT: &str = "penstock";
const NAMESPACE: &str = "bench";
const ACCOUNT: &str = "client";
/// The Service whose weights are pushed, and the backend whose weight counts the steps.
const SERVICE: &str = "bench/resnet";
const CANARY: &str = "bench/resnet-v2";
/// The file that a step rewrites; the pods lie in another.
const STEPPED: &str = "services.yaml";
/// Weights are per cent, and each step has one of its own.
const MAX_STEPS: u32 = 99;

/// How long control may take to listen, a proxy to be ready, and a step to arrive everywhere.
const START: Duration = Duration::from_secs(15);
const READY: Duration = Duration::from_secs(60);
const ARRIVE: Duration = Duration::from_secs(20);
/// How long control may take to say how its proxies are.
const STATUS: Duration = Duration::from_secs(30);
/// Proxies that get their certificates at the same time; they would not all be born in one moment, either.
const AT_ONCE: usize = 32;
/// Between steps, so that acknowledgements of one do not ride on the next.
const PAUSE: Duration = Duration::from_millis(150);

const P50: Named = ("applied_ms_p50", "ms");
const P99: Named = ("applied_ms_p99", "ms");
const MAX: Named = ("applied_ms_max", "ms");
const CPU: Named = ("control_cpu_ms_per_step", "ms");
const RSS: Named = ("control_rss", "MiB");

/// Arguments of `penstock-bench control`.
#[derive(Args, Clone, Debug)]
pub(crate) struct ControlArgs {
    /// How many proxies; a case each
    #[arg(long, value_delimiter = ',', default_values_t = [10, 200, 1000])]
    proxies: Vec<usize>,
    /// Weights pushed in each run, one after the other
    #[arg(long, default_value_t = 20)]
    steps: u32,
    /// Runs of each case, each with a fresh control plane and fresh proxies
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Endpoints beside a real API server, for the case endpoints-N; 0 leaves it out
    #[arg(long, default_value_t = 10_000)]
    endpoints: usize,
    /// Proxies that are connected meanwhile
    #[arg(long, default_value_t = 1000)]
    sidecars: usize,
    /// Changes of endpoints meanwhile
    #[arg(long, default_value_t = 1000)]
    changes: usize,
    /// Services that a sidecar does not use, for the case sidecar-services-N; 0 leaves it out
    #[arg(long, default_value_t = 10_000)]
    services: usize,
    /// Our control plane; by default the release binary beside this one
    #[arg(long, value_name = "FILE")]
    control: Option<PathBuf>,
    /// Our proxy; by default the release binary beside this one
    #[arg(long, value_name = "FILE")]
    proxy: Option<PathBuf>,
    /// Where the rows go
    #[arg(long, value_name = "FILE", default_value = "target/bench/control.json")]
    out: PathBuf,
}

/// One run.
struct Pushed {
    /// Milliseconds from the write to each proxy, sorted.
    applied_ms: Vec<f64>,
    cpu_ms_per_step: f64,
    rss: f64,
}

/// Runs the bed.
pub(crate) async fn run(args: ControlArgs) -> Result<()> {
    ensure!(
        (1..=MAX_STEPS).contains(&args.steps),
        "--steps must be 1 to {MAX_STEPS}: each is a weight in per cent"
    );
    ensure!(args.runs > 0, "--runs must be above 0");
    let this = std::env::current_exe().context("where this program is")?;
    let program = args.control.clone().unwrap_or_else(|| this.with_file_name("penstock-control"));
    let _lock = bed::alone()?;
    let proxy = args.proxy.clone().unwrap_or_else(|| this.with_file_name("penstock-proxy"));
    let most = args.proxies.iter().copied().chain([args.sidecars]).max().unwrap_or(0);
    allow_files(most)?;

    let mut rows = Vec::new();
    for proxies in &args.proxies {
        let case = format!("push-{proxies}");
        let mut runs = Vec::new();
        let mut failed = None;
        for turn in 1..=args.runs {
            let label = format!("{case}  run {turn}/{}", args.runs);
            match once(&program, *proxies, args.steps).await {
                Ok(run) => {
                    let (p50, p99) = (quantile(&run.applied_ms, 0.5), quantile(&run.applied_ms, 0.99));
                    eprintln!(
                        "{label}  p50 {p50:.1} ms  p99 {p99:.1} ms  {:.1} ms CPU a step  {:.1} MiB",
                        run.cpu_ms_per_step, run.rss
                    );
                    runs.push(run);
                }
                Err(error) => {
                    eprintln!("{label}  failed: {error:#}");
                    failed = Some(format!("{error:#}"));
                    break;
                }
            }
        }
        let told = rows_of(&case, &runs, failed);
        println!("\n{}", table(&told));
        rows.extend(told);
        report::write(&args.out, &rows)?;
    }
    let mut tell = |told: Vec<Row>| {
        println!("\n{}", table(&told));
        rows.extend(told);
        report::write(&args.out, &rows)
    };
    tell(webhook::rows(args.runs).await)?;
    tell(rollback::rows(&program, &proxy, args.runs).await)?;
    if args.services > 0 {
        tell(services::rows(&program, &proxy, args.services, args.runs).await)?;
    }
    if args.endpoints > 0 {
        let (endpoints, sidecars, changes) = (args.endpoints, args.sidecars, args.changes);
        // A proxy for each of them has to be one of the pods.
        let size = endpoints::Size { endpoints, sidecars: sidecars.min(endpoints), changes };
        tell(endpoints::rows(&program, size).await)?;
    }
    eprintln!("{} rows in {}", rows.len(), args.out.display());
    Ok(())
}

fn rows_of(case: &str, runs: &[Pushed], failed: Option<String>) -> Vec<Row> {
    if let Some(error) = failed {
        return vec![Row::failed(case, SUBJECT, P99, error)];
    }
    type Of = fn(&Pushed) -> f64;
    let figures: [(Named, Of); 5] = [
        (P50, |run| quantile(&run.applied_ms, 0.5)),
        (P99, |run| quantile(&run.applied_ms, 0.99)),
        (MAX, |run| quantile(&run.applied_ms, 1.0)),
        (CPU, |run| run.cpu_ms_per_step),
        (RSS, |run| run.rss),
    ];
    let summary = |of: Of| Summary::of(runs.iter().map(of).collect());
    figures
        .iter()
        .filter_map(|(named, of)| Some(Row::measured(case, SUBJECT, *named, &summary(*of)?)))
        .collect()
}

fn table(rows: &[Row]) -> String {
    let mut lines = vec![["case", "metric", "median", "min", "max", "unit"].map(str::to_owned).to_vec()];
    let mut notes = String::new();
    for row in rows {
        let figure = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        lines.push(vec![
            row.case.clone(),
            row.metric.to_owned(),
            figure(row.median),
            figure(row.min),
            figure(row.max),
            row.unit.to_owned(),
        ]);
        if let Some(error) = &row.error {
            notes = format!("  {error}\n");
        }
    }
    report::aligned(&lines) + &notes
}

/// A control plane, its proxies, and all steps.
async fn once(program: &Path, proxies: usize, steps: u32) -> Result<Pushed> {
    let dir = tempfile::Builder::new().prefix("penstock-bench-").tempdir()?;
    let source = dir.path().join("source");
    fs::create_dir(&source)?;
    fs::write(source.join("pods.yaml"), pods(proxies))?;
    write_weight(&source, 0)?;
    let (mut process, address) = start(program, dir.path(), &source).await?;

    let token = dir.path().join("token");
    fs::write(&token, issue_token(program, dir.path(), ACCOUNT).await?)?;
    let control = Control {
        address: address.to_string(),
        ca: dir.path().join("state/anchors.pem"),
        trust_domain: names::DEFAULT_TRUST_DOMAIN.to_owned(),
    };
    let (applied, mut arrivals) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    let result = async {
        let members = (0..proxies)
            .map(|proxy| {
                Ok(Member { node: format!("{NAMESPACE}/client-{proxy}"), service: SERVICE.parse()? })
            })
            .collect::<Result<Vec<_>>>()?;
        let watched = |store| Watched { store, applied: applied.clone() };
        connect_all(&mut tasks, members, &control, &token, READY, watched).await?;
        while arrivals.try_recv().is_ok() {}

        let pids = usage::tree(process.pid());
        let before = usage::cpu_seconds(&pids)?;
        let mut applied_ms = Vec::with_capacity(proxies * steps as usize);
        for step in 1..=steps {
            let began = Instant::now();
            write_weight(&source, step)?;
            let until = began + ARRIVE;
            for arrived in 0..proxies {
                let at = loop {
                    let next = tokio::time::timeout_at(until, arrivals.recv()).await;
                    let Ok(Some(Applied { weight, at })) = next else {
                        process.check()?;
                        bail!("weight {step} reached {arrived} of {proxies} proxies within {ARRIVE:?}");
                    };
                    if weight == step {
                        break at;
                    }
                };
                applied_ms.push((at - began).as_secs_f64() * 1e3);
            }
            tokio::time::sleep(PAUSE).await;
        }
        applied_ms.sort_by(f64::total_cmp);
        let cpu = usage::cpu_seconds(&pids)? - before;
        let rss = usage::memory(&pids)?.now;
        Ok(Pushed { applied_ms, cpu_ms_per_step: cpu * 1e3 / f64::from(steps), rss })
    }
    .await;
    tasks.abort_all();
    process.stop().await;
    result
}

/// Starts control and waits until it listens.
pub(crate) async fn start(program: &Path, dir: &Path, source: &Path) -> Result<(Process, SocketAddr)> {
    let (process, listen, _) = start_with_api(program, dir, source).await?;
    Ok((process, listen))
}

/// The same, with where its API is.
async fn start_with_api(
    program: &Path,
    dir: &Path,
    source: &Path,
) -> Result<(Process, SocketAddr, SocketAddr)> {
    let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let (listen, api) = (local(free_port()?), local(free_port()?));
    let mut from = OsString::from("dir:");
    from.push(source);
    let args: Vec<OsString> = vec![
        "run".into(),
        "--source".into(),
        from,
        "--state".into(),
        dir.join("state").into(),
        "--listen".into(),
        listen.to_string().into(),
        "--api".into(),
        api.to_string().into(),
        "--log-level".into(),
        "warn".into(),
    ];
    let mut process = process::spawn(None, "penstock-control", program, &args, dir, false)?;
    let deadline = Instant::now() + START;
    while TcpStream::connect(listen).await.is_err() {
        process.check()?;
        if Instant::now() > deadline {
            return Err(process.story(&format!("did not listen on {listen} within {START:?}")));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok((process, listen, api))
}

/// What control says of itself and its proxies.
async fn status(api: SocketAddr) -> Result<Status> {
    let page = ask(Method::GET, api, "control", "/status", bytes::Bytes::new(), STATUS);
    // The client's connection is a task of its thread.
    let (_, page) = LocalSet::new().run_until(page).await?;
    serde_json::from_slice(&page).context("control's /status")
}

/// Has control issue a token for a service account of the bench's namespace.
pub(crate) async fn issue_token(program: &Path, dir: &Path, account: &str) -> Result<String> {
    let state = dir.join("state").into_os_string();
    let mut args: Vec<OsString> = vec!["token".into(), "--state".into(), state];
    args.extend(["--namespace", NAMESPACE, "--service-account", account].map(OsString::from));
    process::spawn(None, "penstock-control-token", program, &args, dir, true)?.output(START).await
}

/// A weight is in force in one proxy.
struct Applied {
    weight: u32,
    at: Instant,
}

/// A proxy's store that tells when a weight of the canary is in force.
struct Watched {
    store: Arc<Store>,
    applied: mpsc::UnboundedSender<Applied>,
}

impl Sink for Watched {
    fn apply(&self, changes: Vec<Change>) -> Vec<Refusal> {
        let weight = changes.iter().find_map(canary_weight);
        let refusals = self.store.apply(changes);
        if let Some(weight) = weight.filter(|_| refusals.is_empty()) {
            // Nobody listens any more when the run is over.
            let _ = self.applied.send(Applied { weight, at: Instant::now() });
        }
        refusals
    }

    fn set_ready(&self) {
        self.store.set_ready();
    }
}

fn canary_weight(change: &Change) -> Option<u32> {
    let Some(Payload::Weights(weights)) = &change.payload else { return None };
    weights.backends.iter().find(|backend| backend.service == CANARY).map(|backend| backend.weight)
}

/// A proxy of a case: whose it is, and what it asks for.
pub(crate) struct Member {
    /// `<namespace>/<pod>`.
    node: String,
    service: ServiceName,
}

/// Starts all proxies, each with what `sink` makes of its store, and returns when each knows its Service.
async fn connect_all<S: Sink + Send + Sync + 'static>(
    tasks: &mut JoinSet<()>,
    members: Vec<Member>,
    control: &Control,
    token: &Path,
    within: Duration,
    sink: impl Fn(Arc<Store>) -> S,
) -> Result<()> {
    let id = SpiffeId::new(names::DEFAULT_TRUST_DOMAIN, NAMESPACE, ACCOUNT)?;
    let turn = Arc::new(Semaphore::new(AT_ONCE));
    let mut ready = JoinSet::new();
    let proxies = members.len();
    let all = async {
        for Member { node, service } in members {
            let identity = Arc::new(Identity::new());
            let signer = Signer { control: control.clone(), token: token.to_owned(), id: id.clone() };
            let config = Config { control: control.clone(), node, account: format!("{NAMESPACE}/{ACCOUNT}") };
            let store = Arc::new(Store::default());
            let demands = store.demands().context("the store's demands are taken already")?;
            let sink = sink(store.clone());

            let permit = turn.clone().acquire_owned().await?;
            tasks.spawn(keep_signed(identity.clone(), signer));
            tasks.spawn(Client::new(config, identity).run(sink, demands));
            ready.spawn(async move {
                // Control may need longer for the first proxies than a request would wait.
                while store.service(&service).await.is_err() {}
                drop(permit);
            });
        }
        while ready.join_next().await.is_some() {}
        anyhow::Ok(())
    };
    timeout(within, all)
        .await
        .map_err(|_| anyhow::anyhow!("not all of {proxies} proxies were ready in {within:?}"))?
}

/// One pod of the mesh for each proxy, and two that serve.
fn pods(proxies: usize) -> String {
    let mut yaml = String::new();
    for proxy in 0..proxies {
        let (high, low) = (1 + proxy / 250, 1 + proxy % 250);
        yaml += &pod(&format!("client-{proxy}"), ACCOUNT, &format!("127.1.{high}.{low}"));
    }
    for version in 1..=2 {
        let (name, ip) = (format!("resnet-v{version}-0"), format!("127.2.0.{version}"));
        yaml += &pod(&name, "server", &ip);
        yaml += &format!(
            "---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: resnet-v{version}-a
  namespace: {NAMESPACE}
  labels: {{kubernetes.io/service-name: resnet-v{version}}}
addressType: IPv4
ports: [{{name: http, port: 8000, protocol: TCP}}]
endpoints:
- addresses: [{ip}]
  conditions: {{ready: true}}
  targetRef: {{kind: Pod, name: {name}, namespace: {NAMESPACE}}}
"
        );
    }
    yaml
}

fn pod(name: &str, account: &str, ip: &str) -> String {
    format!(
        "---
apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {NAMESPACE}
  annotations: {{penstock.io/inject: enabled}}
spec:
  serviceAccountName: {account}
  containers: [{{name: app, ports: [{{name: http, containerPort: 8000}}]}}]
status: {{phase: Running, podIP: {ip}}}
"
    )
}

/// The Services, with the canary at `weight` per cent: written beside and moved into place, as an editor does.
fn write_weight(source: &Path, weight: u32) -> Result<()> {
    let service = |name: &str, annotations: &str| {
        format!(
            "---
apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: {NAMESPACE}{annotations}}}
spec:
  ports: [{{name: http, port: 80, targetPort: 8000, appProtocol: http}}]
"
        )
    };
    let split = format!(
        ", annotations: {{{}: \"resnet-v1={},resnet-v2={weight}\"}}",
        names::annotation::TRAFFIC_SPLIT,
        100 - weight
    );
    let yaml = service("resnet", &split) + &service("resnet-v1", "") + &service("resnet-v2", "");
    let beside = source.join(".services.yaml.new");
    fs::write(&beside, yaml)?;
    fs::rename(&beside, source.join(STEPPED)).context("could not move the new weights into place")
}

/// Each proxy holds a connection here, and control holds the other end in a process that inherits the limit.
fn allow_files(proxies: usize) -> Result<()> {
    let needed = proxies as u64 + 512;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= needed) {
        return Ok(());
    }
    ensure!(
        limit.maximum.is_none_or(|maximum| maximum >= needed),
        "{proxies} proxies need {needed} open files; the hard limit of this shell is lower (`ulimit -Hn`)"
    );
    setrlimit(Resource::Nofile, Rlimit { current: Some(needed), ..limit })
        .context("could not allow more open files")
}

/// Of sorted values.
fn quantile(sorted: &[f64], q: f64) -> f64 {
    let rank = (sorted.len() as f64 * q).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_a_value_that_was_measured() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(
            (quantile(&values, 0.5), quantile(&values, 0.99), quantile(&values, 1.0)),
            (100.0, 198.0, 200.0)
        );
        assert_eq!(quantile(&[7.0], 0.5), 7.0);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn a_run_that_failed_is_a_row_that_says_why() {
        let rows = rows_of("push-200", &[], Some("weight 3 reached 199 of 200 proxies".to_owned()));
        assert_eq!(rows.len(), 1);
        assert!(rows[0].error.as_ref().unwrap().contains("199 of 200"));
        assert!(table(&rows).contains("199 of 200"));
    }

    #[test]
    fn weights_are_moved_into_place_whole() {
        let dir = tempfile::tempdir().unwrap();
        write_weight(dir.path(), 3).unwrap();
        let files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
        assert_eq!(files, [STEPPED]);
        assert!(fs::read_to_string(dir.path().join(STEPPED)).unwrap().contains("resnet-v1=97,resnet-v2=3"));
    }
}
