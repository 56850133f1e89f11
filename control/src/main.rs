//! `penstock-control`: the command line of the control plane.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};
use penstock_api::SpiffeId;
use penstock_control::canary::{Local, To};
use penstock_control::cluster::{Cluster, Place, Told};
use penstock_control::identity::state::StateDir;
use penstock_control::identity::token::{TokenKey, Workload};
use penstock_control::identity::{epoch, rotate_root};
use penstock_control::namespaces::Namespaces;
use penstock_control::objects::ObjectSet;
use penstock_control::serve::{Options, start};
use penstock_control::source::{Opened, Source};
use penstock_control::webhook::{Listening, Webhook, certificate, missed};
use penstock_control::{compile, metric};
use penstock_inject::Settings;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const EXAMPLE: &str = "\
Example:
  penstock-control run --source dir:manifests/demo --state /tmp/penstock &
  penstock-control token --state /tmp/penstock --namespace team-a --service-account web > web.token
  penstock-proxy run --control 127.0.0.1:15010 --control-ca /tmp/penstock/anchors.pem \\
      --token web.token --node team-a/web-0 --service-account web
  curl -s 127.0.0.1:8080/status

Exit status: 0 fine, 1 something failed and was said why, 2 wrong usage.";

/// The control plane of Penstock: reads Kubernetes objects, pushes configuration to sidecars, signs their identities.
#[derive(Debug, Parser)]
#[command(name = "penstock-control", version, after_help = EXAMPLE)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the control plane until SIGTERM or SIGINT.
    Run(Box<Run>),
    /// Print a bearer token with which a proxy gets its certificate.
    Token(Token),
    /// Replace the root, with overlap: no proxy restarts and no connection breaks.
    RotateRoot(RotateRoot),
}

#[derive(Debug, Args)]
struct Run {
    /// Where objects come from: dir:PATH, a directory of Kubernetes YAML; kubernetes, the API of the cluster that this runs
    /// in; or kubernetes:CONTEXT of the kubeconfig. With the latter two, tokens are those of service accounts
    #[arg(long)]
    source: Source,
    /// Directory with keys and certificates; made on the first start. With a source of Kubernetes these are in Secrets, and the
    /// directory has the last good versions of objects alone
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Where proxies connect: xDS, identity and fleet, TLS 1.3
    #[arg(long, default_value = "127.0.0.1:15010", value_name = "IP:PORT")]
    listen: SocketAddr,
    /// Where the `penstock` command line and Prometheus connect: plain HTTP, on loopback
    #[arg(long, default_value = "127.0.0.1:8080", value_name = "IP:PORT")]
    api: SocketAddr,
    /// Let --api be an address off loopback, where whoever reaches it may ask everything
    #[arg(long)]
    api_unprotected: bool,
    /// The trust domain of all identities
    #[arg(long, default_value = penstock_api::names::DEFAULT_TRUST_DOMAIN)]
    trust_domain: String,
    /// How long workload certificates live; proxies renew them well before
    #[arg(long, default_value = "12h", value_parser = humantime::parse_duration)]
    leaf_lifetime: Duration,
    /// How long the source must be quiet before it is read again
    #[arg(long, default_value = "10ms", value_parser = humantime::parse_duration)]
    debounce: Duration,
    /// Whom queries and webhooks of canaries may ask, comma-separated or repeated: hosts (gate.test, *.monitoring.svc) and addresses
    /// (10.0.0.0/8) [default: all but this machine, its link, the API server and control]
    #[arg(long, value_delimiter = ',', value_name = "WHERE")]
    analysis_to: Vec<To>,
    #[command(flatten)]
    webhook: Injection,
    /// error, warn, info, debug, or per module: info,penstock_control::push=debug
    #[arg(long, default_value = "info")]
    log_level: String,
}

/// How pods are injected.
#[derive(Debug, Args)]
struct Injection {
    /// Where the API server asks about pods that are being made: HTTPS; with --source kubernetes alone
    #[arg(long, value_name = "IP:PORT")]
    webhook: Option<SocketAddr>,
    /// Directory with the webhook's tls.crt and tls.key, as a Secret is mounted; taken up anew when they change [default:
    /// control makes one, and tells the API server whom to trust]
    #[arg(long, value_name = "DIR", requires = "webhook")]
    webhook_certificate: Option<PathBuf>,
    /// The image that injected pods get [default: penstock.io/proxy:VERSION]
    #[arg(long, value_name = "IMAGE")]
    proxy_image: Option<String>,
    /// Where injected proxies find control [default: penstock-control.penstock-system.svc:15010]
    #[arg(long, value_name = "HOST:PORT")]
    control_address: Option<String>,
}

#[derive(Debug, Args)]
struct Token {
    /// The state directory of the control plane
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// The workload's namespace
    #[arg(long, value_name = "NS")]
    namespace: String,
    /// The workload's service account
    #[arg(long, value_name = "SA")]
    service_account: String,
    /// The pod that the token is for, for the log
    #[arg(long, value_name = "NAME")]
    pod: Option<String>,
    /// How long the token is good
    #[arg(long, default_value = "24h", value_parser = humantime::parse_duration)]
    lifetime: Duration,
}

#[derive(Debug, Args)]
struct RotateRoot {
    /// The state directory of the control plane, which may be running
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
}

/// Lists of ten thousand objects come and go on several threads. glibc keeps what each has used once, this gives it back.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    // A huge page stays whole as long as one object lies in it. Where the kernel has none there is nothing to do.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let outcome = match Cli::parse().command {
        Command::Run(run) => serve(*run),
        Command::Token(args) => token(args),
        Command::RotateRoot(RotateRoot { state }) => rotate(state),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstock-control: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The API has no authentication, so it is on loopback unless the operator says that he knows.
fn protected(api: SocketAddr, unprotected: bool) -> Result<()> {
    anyhow::ensure!(
        unprotected || api.ip().to_canonical().is_loopback(),
        "--api {api} is not on loopback: the API is plain HTTP and asks nobody who he is, so whoever reaches it reads \
         live requests and the whole configuration and can make every proxy renew. Write an address of 127.0.0.0/8, \
         or add --api-unprotected where something else keeps strangers away"
    );
    Ok(())
}

#[tokio::main]
async fn serve(run: Run) -> Result<()> {
    protected(run.api, run.api_unprotected)?;
    // What the client of Kubernetes meets is told by who asked for it, once.
    let filter =
        tracing_subscriber::EnvFilter::try_new(format!("kube_client=off,kube_runtime=off,{}", run.log_level))
            .with_context(|| format!("--log-level {:?} is none; write for example info", run.log_level))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let metrics = PrometheusBuilder::new()
        .set_buckets_for_metric(
            Matcher::Full(metric::PUSH.name.to_owned()),
            &[0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0],
        )?
        .set_buckets_for_metric(
            Matcher::Full(metric::WEBHOOK.name.to_owned()),
            &[0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.5],
        )?
        .install_recorder()?;
    metric::describe();

    let stop = CancellationToken::new();
    // Before the push listens, which is what is asked whether control has started.
    let listening = match run.webhook.webhook {
        Some(address) => Some(Listening::on(address).await?),
        None => None,
    };
    let Opened { objects, review, client, api_server, statuses } = run.source.open(run.debounce).await?;
    let pods = objects.clone();
    // Of a cluster's canaries the objects say where they are.
    let (objects, canaries) = match &client {
        Some(_) => (objects, None),
        None => {
            let (local, joined) = Local::open(run.state.join("canaries.json"), objects)?;
            (joined, Some(local))
        }
    };
    let namespaces = client.clone().map(|client| Namespaces::follow(client, stop.clone()));
    let variable = |name: &str| std::env::var(name).ok();
    let cluster = client.clone().zip(namespaces.clone()).map(|(client, namespaces)| Cluster {
        place: Place::new(client, variable("POD_NAMESPACE"), variable("POD_NAME")),
        objects: objects.clone(),
        api_server,
        statuses,
        namespaces,
        certifies_webhook: run.webhook.webhook_certificate.is_none(),
    });
    // What was good in an earlier life stays in force when a file is broken while control starts.
    let accepted = run.state.join("accepted.json");
    let snapshots = |trust| compile::resume(objects, trust, accepted);
    let options = Options {
        state: run.state,
        listen: run.listen,
        api: run.api,
        trust_domain: run.trust_domain.clone(),
        leaf_lifetime: run.leaf_lifetime,
        review,
        cluster,
        analysis_to: run.analysis_to,
        canaries,
    };
    let mut control = start(options, snapshots, Some(metrics), stop.clone()).await?;
    if let Some(listening) = listening {
        let address = listening.address;
        let of_cluster = namespaces.zip(control.told.clone());
        let webhook = injecting(&run.webhook, &run.trust_domain, listening, of_cluster, pods, &stop)?;
        control.with(webhook);
        tracing::info!(webhook = %address, "pods are injected");
    }
    tracing::info!(proxies = %control.address, api = %control.api, "control is ready");
    let signalled = async {
        let mut term = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = term.recv() => tracing::info!("SIGTERM: ending streams; proxies go on with what they have"),
            interrupt = tokio::signal::ctrl_c() => {
                interrupt?;
                tracing::info!("interrupted: ending streams; proxies go on with what they have");
            }
        }
        stop.cancel();
        anyhow::Ok(())
    };
    let (signalled, finished) = tokio::join!(
        async {
            tokio::select! {
                signalled = signalled => signalled,
                // A part that failed has stopped the others.
                () = stop.cancelled() => Ok(()),
            }
        },
        control.finished(),
    );
    signalled.and(finished)
}

/// The webhook and the watch over pods that it missed, ready to run beside the other parts.
fn injecting(
    options: &Injection,
    trust_domain: &str,
    listening: Listening,
    cluster: Option<(Namespaces, Told)>,
    objects: watch::Receiver<Arc<ObjectSet>>,
    stop: &CancellationToken,
) -> Result<impl Future<Output = Result<()>> + Send + use<>> {
    let (namespaces, told) =
        cluster.context("--webhook injects pods of a cluster; it needs --source kubernetes")?;
    let certificate = match &options.webhook_certificate {
        Some(directory) => certificate::of_directory(directory.clone(), stop.clone())?,
        None => told.webhook,
    };
    let mut settings = Settings { trust_domain: trust_domain.to_owned(), ..Settings::default() };
    for (given, setting) in
        [(&options.proxy_image, &mut settings.image), (&options.control_address, &mut settings.control)]
    {
        if let Some(given) = given {
            setting.clone_from(given);
        }
    }
    let events = told.events;
    let webhook = Webhook::new(settings, namespaces.clone()).holding(told.published);
    let stop = stop.clone();
    Ok(async move {
        let missed = missed::watch(objects, namespaces, events, stop.clone());
        let ((), served) = tokio::join!(missed, listening.serve(certificate, webhook, stop));
        served
    })
}

fn token(args: Token) -> Result<()> {
    // The names are checked here already, where the operator sees it.
    SpiffeId::new(penstock_api::names::DEFAULT_TRUST_DOMAIN, &args.namespace, &args.service_account)?;
    let key = TokenKey::open(&StateDir::open(args.state)?)?;
    let lifetime = i64::try_from(args.lifetime.as_secs()).unwrap_or(i64::MAX);
    let expires = epoch(SystemTime::now()).saturating_add(lifetime);
    let workload = Workload { namespace: args.namespace, account: args.service_account, pod: args.pod };
    println!("{}", key.issue(workload, expires)?);
    Ok(())
}

fn rotate(state: PathBuf) -> Result<()> {
    anyhow::ensure!(
        state.is_dir(),
        "{} is not a directory; give the --state of the control plane",
        state.display()
    );
    rotate_root(&StateDir::open(state)?, epoch(SystemTime::now()))?;
    println!(
        "A new root stands beside the old one. A running control announces it now, signs with it once every connected \
         proxy knows it, and drops the old one when its last certificate has expired."
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn the_api_leaves_loopback_only_when_told_to() {
        for inside in ["127.0.0.1:8080", "127.9.9.9:1", "[::1]:8080", "[::ffff:127.0.0.1]:8080"] {
            assert!(protected(inside.parse().unwrap(), false).is_ok(), "{inside}");
        }
        for outside in ["0.0.0.0:8080", "[::]:8080", "10.0.0.1:8080", "[::ffff:10.0.0.1]:8080"] {
            let told = protected(outside.parse().unwrap(), false).unwrap_err().to_string();
            assert!(told.contains("asks nobody who he is") && told.contains("--api-unprotected"), "{told}");
            assert!(protected(outside.parse().unwrap(), true).is_ok());
        }
    }
}
