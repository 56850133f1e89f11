//! The case `sidecar-services-N`: how much a sidecar grows while its cluster grows from ten Services to N, of which it goes on using one.
//!
//! Control and `penstock-proxy` are real processes and read a directory; each Service has a pod outside of the mesh behind it. The sidecar carries
//! the same requests before and after, so that what is compared is two proxies that are equally warm.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use penstock_api::names::port;
use tokio::net::TcpListener;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::Instant;

use super::{SUBJECT, issue_token, outside, start_with_api, status};
use crate::load::{self, h1};
use crate::mesh::sidecars::{self, NAMESPACE, Pod};
use crate::process;
use crate::report::{Named, Row, Summary};
use crate::usage;

/// Services at first.
const FEW: usize = 10;
const CONNECTIONS: usize = 8;
/// Requests on each connection in a round, and rounds before each reading: after that nothing grows any more that grows by use.
const REQUESTS: usize = 500;
const ROUNDS: usize = 4;
/// How long ten thousand Services may take to be read and told.
const TOLD: Duration = Duration::from_secs(120);
/// Memory that is given back is given back by then.
const REST: Duration = Duration::from_secs(3);

const GROWTH: Named = ("rss_growth_mib", "MiB");
const RSS: Named = ("rss_mib", "MiB");

struct Grown {
    before: f64,
    after: f64,
    /// Resources that control says it holds, before and after.
    holds: [usize; 2],
}

/// All runs.
pub(super) async fn rows(control: &Path, proxy: &Path, services: usize, runs: usize) -> Vec<Row> {
    let case = format!("sidecar-services-{services}");
    let (mut growth, mut after, mut note) = (Vec::new(), Vec::new(), String::new());
    for turn in 1..=runs {
        match once(control, proxy, services).await {
            Ok(grown) => {
                let [few, many] = grown.holds;
                note = format!("the sidecar holds {few} resources of {FEW} Services, {many} of {services}");
                let by = grown.after - grown.before;
                eprintln!("{case}  run {turn}/{runs}  {:.2} MiB, {by:+.2}  {note}", grown.before);
                growth.push(by);
                after.push(grown.after);
            }
            Err(error) => {
                eprintln!("{case}  run {turn}/{runs}  failed: {error:#}");
                return vec![Row::failed(&case, SUBJECT, GROWTH, format!("{error:#}"))];
            }
        }
    }
    [(GROWTH, growth), (RSS, after)]
        .into_iter()
        .filter_map(|(named, values)| {
            let mut row = Row::measured(&case, SUBJECT, named, &Summary::of(values)?);
            row.note = Some(note.clone());
            Some(row)
        })
        .collect()
}

async fn once(control: &Path, proxy: &Path, services: usize) -> Result<Grown> {
    let dir = tempfile::Builder::new().prefix("penstock-bench-").tempdir()?;
    let source = dir.path().join("source");
    fs::create_dir(&source)?;
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let application = server.local_addr()?;
    let client = Pod { name: "client".to_owned(), ip: Ipv4Addr::new(127, 79, 0, 1), account: "client" };
    fs::write(source.join("client.yaml"), outside::client(&client))?;
    write(&source, FEW, application)?;
    let (mut running, push, api) = start_with_api(control, dir.path(), &source).await?;
    let token = dir.path().join("token");
    fs::write(&token, issue_token(control, dir.path(), client.account).await?)?;
    let args = sidecars::arguments(&client, push, &dir.path().join("state/anchors.pem"), &token);
    let mut sidecar = process::spawn(None, "penstock-proxy", proxy, &args, dir.path(), false)?;
    let mut tasks = JoinSet::new();
    tasks.spawn(outside::answer(server, || "200 OK"));
    let grown = async {
        LocalSet::new().run_until(sidecars::ready(&client, &mut sidecar)).await?;
        let (before, few) = read(&client, api, sidecar.pid()).await?;
        let told = status(api).await?.snapshot;
        write(&source, services, application)?;
        let deadline = Instant::now() + TOLD;
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            running.check()?;
            sidecar.check()?;
            let status = status(api).await?;
            if status.snapshot != told && status.all_applied() {
                break;
            }
            ensure!(Instant::now() < deadline, "control has not told {services} Services within {TOLD:?}");
        }
        let (after, many) = read(&client, api, sidecar.pid()).await?;
        Ok(Grown { before, after, holds: [few, many] })
    }
    .await;
    tasks.abort_all();
    sidecar.stop().await;
    running.stop().await;
    grown
}

/// Has the sidecar work, and reads what it needs of memory then, and how many resources it holds.
async fn read(client: &Pod, api: SocketAddr, pid: u32) -> Result<(f64, usize)> {
    for _ in 0..ROUNDS {
        let mut asking = JoinSet::new();
        for _ in 0..CONNECTIONS {
            asking.spawn(round(client.at(port::OUTBOUND)));
        }
        while let Some(ended) = asking.join_next().await {
            ended??;
        }
    }
    tokio::time::sleep(REST).await;
    let holds = status(api).await?.proxies.iter().map(|proxy| proxy.resources).sum();
    Ok((usage::memory(&[pid].into())?.now, holds))
}

async fn round(outbound: SocketAddr) -> Result<()> {
    let head = format!("GET / HTTP/1.1\r\nhost: {}.{NAMESPACE}\r\n\r\n", service(0));
    let request = h1::Request::of_bytes(head.into_bytes());
    let mut connection = h1::Connection::new(load::connect(outbound).await?);
    for _ in 0..REQUESTS {
        let answer = connection.exchange(&request).await?;
        if answer.status != 200 {
            bail!("the sidecar answers {}: {}", answer.status, String::from_utf8_lossy(answer.body));
        }
    }
    Ok(())
}

fn service(at: usize) -> String {
    format!("model-{at}")
}

/// So many Services, moved into place whole. The first is the application's; nobody answers for the others.
fn write(source: &Path, services: usize, application: SocketAddr) -> Result<()> {
    let mut yaml = String::new();
    for at in 0..services {
        let name = service(at);
        let (ip, port) = match at {
            0 => (application.ip(), application.port()),
            _ => {
                let [high, low] = [at / 250, at % 250].map(|part| u8::try_from(part).unwrap_or(u8::MAX));
                (Ipv4Addr::new(10, 201, high, low + 1).into(), 8080)
            }
        };
        yaml += &outside::served(&name, SocketAddr::new(ip, port));
    }
    let beside = source.join(".services.yaml.new");
    fs::write(&beside, yaml)?;
    fs::rename(&beside, source.join("services.yaml")).context("could not move the Services into place")
}
