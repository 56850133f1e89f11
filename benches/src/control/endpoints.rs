//! The case `endpoints-N`: what control costs beside a cluster of N endpoints, all of them injected pods, while some of those pods' proxies are
//! connected and endpoints come and go.
//!
//! API server and etcd are real, and so is `penstock-control`, as it is installed: watches, the Lease, the root in its Secret, TokenReview for each
//! proxy, the webhook. A pod is what the injector makes of KServe's, some five thousand bytes. The proxies are the configuration client and the store
//! of `penstock-proxy`, with a certificate and a stream each, in this process; each asks for one Service of a hundred endpoints. A change is an
//! EndpointSlice in which one endpoint's readiness is another one, as whoever keeps slices writes it: whole.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service, ServiceAccount};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::Client;
use kube::api::{Api, Patch, PatchParams, PostParams};
use penstock_api::resource::Payload;
use penstock_api::{ServiceName, names};
use penstock_proxy::config::Store;
use penstock_proxy::config::store::{Change, Refusal};
use penstock_proxy::identity::control::Control;
use penstock_proxy::xds::Sink;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::apiserver::{ApiServer, CONTEXT};
use super::{ACCOUNT, Member, NAMESPACE, SUBJECT, connect_all, status};
use crate::process::{self, Process};
use crate::report::{Named, Row, Summary};
use crate::subject::free_port;
use crate::usage;

/// What the injector made of it, as a golden file.
const POD: &str = include_str!("../../../control/inject/tests/golden/kserve-predictor.out.yaml");
/// Endpoints of a Service, and of its one slice: as many as Kubernetes puts into one.
const OF_SERVICE: usize = 100;
/// Writes to the API server at once.
const WRITES: usize = 48;
/// Between two changes: fifty a second, as when a few Deployments are rolled at once.
const BETWEEN: Duration = Duration::from_millis(20);
/// How long control may take to begin, and the proxies to be connected, on a small machine.
const START: Duration = Duration::from_secs(120);
const CONNECTED: Duration = Duration::from_secs(240);
/// After the last change everything has arrived, and what was needed for it was given back.
const SETTLED: Duration = Duration::from_secs(120);
/// All of the case.
const LIMIT: Duration = Duration::from_secs(900);

const RSS: Named = ("rss_mib", "MiB");
const PEAK: Named = ("rss_peak_mib", "MiB");
const CPU: Named = ("cpu_s_per_1k_changes", "s");

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Size {
    pub(super) endpoints: usize,
    pub(super) sidecars: usize,
    pub(super) changes: usize,
}

struct Cost {
    rss: f64,
    peak: f64,
    cpu: f64,
    /// Endpoints resources that the proxies have applied for the changes.
    applied: u64,
    seconds: f64,
}

/// One run; filling an API server takes longer than everything else.
pub(super) async fn rows(program: &Path, size: Size) -> Vec<Row> {
    let case = format!("endpoints-{}", size.endpoints);
    let cost = match timeout(LIMIT, once(program, size)).await {
        Ok(Ok(cost)) => cost,
        Ok(Err(error)) => {
            eprintln!("{case}  failed: {error:#}");
            return vec![Row::failed(&case, SUBJECT, RSS, format!("{error:#}"))];
        }
        Err(_) => return vec![Row::failed(&case, SUBJECT, RSS, format!("not done within {LIMIT:?}"))],
    };
    let note = format!(
        "{} sidecars connected; {} changes in {:.0} s, for which proxies applied {} resources",
        size.sidecars, size.changes, cost.seconds, cost.applied
    );
    eprintln!(
        "{case}  {:.1} MiB  (peak {:.1})  {:.2} s CPU for 1,000 changes  {note}",
        cost.rss, cost.peak, cost.cpu
    );
    [(RSS, cost.rss), (PEAK, cost.peak), (CPU, cost.cpu)]
        .into_iter()
        .filter_map(|(named, value)| {
            let mut row = Row::measured(&case, SUBJECT, named, &Summary::of(vec![value])?);
            row.note = Some(note.clone());
            Some(row)
        })
        .collect()
}

async fn once(program: &Path, size: Size) -> Result<Cost> {
    let dir = tempfile::Builder::new().prefix("penstock-bench-").tempdir()?;
    let server = ApiServer::start(dir.path()).await?;
    let client = server.client().await?;
    let began = Instant::now();
    let mut slices = fill(&client, size.endpoints).await.context("filling the API server")?;
    eprintln!("endpoints  {} pods are there after {:.0} s", size.endpoints, began.elapsed().as_secs_f64());

    let (mut process, listen, api) = start(program, dir.path(), server.kubeconfig()).await?;
    let ca = anchors(&client, dir.path(), &mut process).await?;
    let token = dir.path().join("token");
    std::fs::write(&token, bearer(&client).await?)?;
    let control =
        Control { address: listen.to_string(), ca, trust_domain: names::DEFAULT_TRUST_DOMAIN.to_owned() };
    let services = slices.len();
    let members = (0..size.sidecars)
        .map(|at| {
            let service: ServiceName = format!("{NAMESPACE}/{}", service(at % services)).parse()?;
            Ok(Member { node: format!("{NAMESPACE}/{}", pod(at)), service })
        })
        .collect::<Result<Vec<_>>>()?;
    let applied = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    let result = async {
        let counted = |store| Counted { store, applied: applied.clone() };
        connect_all(&mut tasks, members, &control, &token, CONNECTED, counted).await?;
        settle(api, size.sidecars, &mut process).await?;

        let pids = usage::tree(process.pid());
        let (before, began) = (usage::cpu_seconds(&pids)?, Instant::now());
        applied.store(0, Ordering::Relaxed);
        change(&client, &mut slices, size.changes).await?;
        let seconds = began.elapsed().as_secs_f64();
        settle(api, size.sidecars, &mut process).await?;
        let cpu = usage::cpu_seconds(&pids)? - before;
        let memory = usage::memory(&pids)?;
        let applied = applied.load(Ordering::Relaxed);
        ensure!(size.changes == 0 || applied > 0, "no proxy has heard of any change");
        Ok(Cost {
            rss: memory.now,
            peak: memory.peak,
            cpu: cpu * 1e3 / size.changes.max(1) as f64,
            applied,
            seconds,
        })
    }
    .await;
    tasks.abort_all();
    process.stop().await;
    result
}

fn pod(at: usize) -> String {
    format!("model-{at}")
}

fn service(at: usize) -> String {
    format!("model-{at}")
}

fn ip(at: usize) -> Ipv4Addr {
    let [high, low] = [at / 250, at % 250].map(|part| u8::try_from(part).unwrap_or(u8::MAX));
    Ipv4Addr::new(10, 200, high, low + 1)
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<T> {
    Ok(serde_json::from_value(value)?)
}

/// Writes all objects, and returns the slices as they were written.
async fn fill(client: &Client, endpoints: usize) -> Result<Vec<EndpointSlice>> {
    let params = PostParams::default();
    for name in [names::SYSTEM_NAMESPACE, NAMESPACE] {
        let object: Namespace = typed(json!({"metadata": {"name": name}}))?;
        Api::all(client.clone()).create(&params, &object).await?;
    }
    let account: ServiceAccount = typed(json!({"metadata": {"name": ACCOUNT}}))?;
    Api::namespaced(client.clone(), NAMESPACE).create(&params, &account).await?;
    let golden: Value = serde_saphyr::from_str(POD)?;
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    stream::iter(0..endpoints)
        .map(|at| write_pod(&pods, &golden, at))
        .buffer_unordered(WRITES)
        .try_collect::<Vec<()>>()
        .await?;
    let mut slices = Vec::new();
    for at in 0..endpoints.div_ceil(OF_SERVICE) {
        let object: Service = typed(json!({
            "metadata": {"name": service(at)},
            "spec": {"selector": {"app": service(at)}, "ports": [{"name": "http", "port": 80, "targetPort": 8080, "appProtocol": "http"}]},
        }))?;
        Api::namespaced(client.clone(), NAMESPACE).create(&params, &object).await?;
        let slice = slice(at, endpoints)?;
        slices.push(Api::namespaced(client.clone(), NAMESPACE).create(&params, &slice).await?);
    }
    Ok(slices)
}

async fn write_pod(pods: &Api<Pod>, golden: &Value, at: usize) -> Result<()> {
    let mut object = golden.clone();
    object["metadata"]["name"] = json!(pod(at));
    object["metadata"]["labels"]["app"] = json!(service(at / OF_SERVICE));
    object["spec"]["serviceAccountName"] = json!(ACCOUNT);
    object["spec"]["nodeName"] = json!(format!("node-{}", at % 50));
    pods.create(&PostParams::default(), &typed(object)?).await?;
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"]
        .map(|kind| json!({"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}));
    let status = json!({"status": {
        "phase": "Running", "podIP": ip(at), "podIPs": [{"ip": ip(at)}], "hostIP": "192.168.0.7", "qosClass": "Burstable",
        "conditions": conditions,
    }});
    pods.patch_status(&pod(at), &PatchParams::default(), &Patch::Merge(status)).await?;
    Ok(())
}

fn slice(at: usize, endpoints: usize) -> Result<EndpointSlice> {
    let of = at * OF_SERVICE..endpoints.min((at + 1) * OF_SERVICE);
    let all: Vec<Value> = of
        .map(|of| {
            json!({
                "addresses": [ip(of)], "nodeName": format!("node-{}", of % 50), "zone": "zone-a",
                "conditions": {"ready": true, "serving": true, "terminating": false},
                "targetRef": {"kind": "Pod", "namespace": NAMESPACE, "name": pod(of)},
            })
        })
        .collect();
    typed(json!({
        "metadata": {"name": format!("{}-a", service(at)), "labels": {"kubernetes.io/service-name": service(at)}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP", "appProtocol": "http"}],
        "endpoints": all,
    }))
}

/// Control as it is installed, but for its rights and its addresses.
async fn start(program: &Path, dir: &Path, kubeconfig: &Path) -> Result<(Process, SocketAddr, SocketAddr)> {
    let local = |port: u16| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let (listen, api, webhook) = (local(free_port()?), local(free_port()?), local(free_port()?));
    let args: Vec<OsString> = [
        format!("KUBECONFIG={}", kubeconfig.display()),
        "POD_NAME=penstock-control-bench".to_owned(),
        program.display().to_string(),
        "run".to_owned(),
        format!("--source=kubernetes:{CONTEXT}"),
        format!("--state={}", dir.join("state").display()),
        format!("--listen={listen}"),
        format!("--api={api}"),
        format!("--webhook={webhook}"),
        "--log-level=warn".to_owned(),
    ]
    .into_iter()
    .map(OsString::from)
    .collect();
    let mut process = process::spawn(None, "penstock-control", Path::new("env"), &args, dir, false)?;
    let deadline = Instant::now() + START;
    while tokio::net::TcpStream::connect(listen).await.is_err() {
        process.check()?;
        if Instant::now() > deadline {
            return Err(process.story(&format!("did not listen within {START:?}")));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok((process, listen, api))
}

/// The anchors that control has put into the cluster, in a file.
async fn anchors(client: &Client, dir: &Path, process: &mut Process) -> Result<std::path::PathBuf> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), names::SYSTEM_NAMESPACE);
    let deadline = Instant::now() + START;
    let file = dir.join("anchors.pem");
    loop {
        let map = maps.get_opt("penstock-anchors").await?;
        if let Some(pem) = map.and_then(|map| map.data?.remove("anchors.pem")) {
            std::fs::write(&file, pem)?;
            return Ok(file);
        }
        process.check()?;
        if Instant::now() > deadline {
            return Err(process.story(&format!("wrote no trust anchors within {START:?}")));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A token as the kubelet projects it.
async fn bearer(client: &Client) -> Result<String> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), NAMESPACE);
    let request: TokenRequest =
        typed(json!({"metadata": {}, "spec": {"audiences": ["penstock.io"], "expirationSeconds": 3600}}))?;
    let answer = accounts.create_token_request(ACCOUNT, &PostParams::default(), &request).await?;
    Ok(answer.status.context("the API server made no token")?.token)
}

/// A proxy's store that counts what it is told of endpoints.
struct Counted {
    store: Arc<Store>,
    applied: Arc<AtomicU64>,
}

impl Sink for Counted {
    fn apply(&self, changes: Vec<Change>) -> Vec<Refusal> {
        let endpoints = changes.iter().filter(|change| matches!(change.payload, Some(Payload::Endpoints(_))));
        self.applied.fetch_add(endpoints.count() as u64, Ordering::Relaxed);
        self.store.apply(changes)
    }

    fn set_ready(&self) {
        self.store.set_ready();
    }
}

/// Makes the changes, one Service after the other; each endpoint that is not ready is ready again with the next round.
async fn change(client: &Client, slices: &mut [EndpointSlice], changes: usize) -> Result<()> {
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), NAMESPACE);
    let services = slices.len();
    let mut due = Instant::now();
    for at in 0..changes {
        tokio::time::sleep_until(due).await;
        due += BETWEEN;
        let slice = slices.get_mut(at % services).context("there is no slice")?;
        let endpoint = slice.endpoints.first_mut().context("the slice is empty")?;
        let conditions = endpoint.conditions.as_mut().context("an endpoint has conditions")?;
        conditions.ready = Some(conditions.ready != Some(true));
        let name = slice.metadata.name.clone().unwrap_or_default();
        *slice = api.replace(&name, &PostParams::default(), slice).await?;
    }
    Ok(())
}

/// Waits until every proxy has all of the newest configuration and there is no newer one.
async fn settle(api: SocketAddr, sidecars: usize, process: &mut Process) -> Result<()> {
    let deadline = Instant::now() + SETTLED;
    let mut last = String::new();
    loop {
        // Longer than control waits for more changes, and than memory needs to be given back.
        tokio::time::sleep(Duration::from_secs(2)).await;
        process.check()?;
        let status = status(api).await?;
        let applied = status.proxies.iter().filter(|proxy| proxy.connected && proxy.applied).count();
        if applied == sidecars && status.snapshot == last {
            return Ok(());
        }
        last = status.snapshot;
        if Instant::now() > deadline {
            bail!("{applied} of {sidecars} proxies have the newest configuration after {SETTLED:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_pod_has_an_address_of_its_own_and_is_in_one_slice() {
        let addresses: BTreeSet<_> = (0..10_000).map(ip).collect();
        assert_eq!(addresses.len(), 10_000);
        let slices: Vec<_> = (0..3).map(|at| slice(at, 250).unwrap()).collect();
        let sizes: Vec<_> = slices.iter().map(|slice| slice.endpoints.len()).collect();
        assert_eq!(sizes, [100, 100, 50]);
        assert_eq!(slices[1].endpoints[0].addresses, [ip(100).to_string()]);
    }

    #[test]
    fn the_pod_is_an_injected_one() {
        let pod: Value = serde_saphyr::from_str(POD).unwrap();
        assert_eq!(pod["metadata"]["labels"][names::INJECTED_LABEL], "true");
        typed::<Pod>(pod).unwrap();
    }
}
