//! `penstock-proxy`: the sidecar's command line.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use penstock_api::SpiffeId;
use penstock_api::names::{DEFAULT_TRUST_DOMAIN, PROXY_UID, port};
use penstock_kernels::allocated::Counting;
use penstock_proxy::admin::{self, Audience, Pages};
use penstock_proxy::config::{Store, static_file};
use penstock_proxy::identity::Identity;
use penstock_proxy::identity::control::Control;
use penstock_proxy::identity::sign::{Signer, keep_signed};
use penstock_proxy::limits::Limits;
use penstock_proxy::run::{self, Listen, Proxy, Serves, Setup};
use penstock_proxy::telemetry::level::Level;
use penstock_proxy::telemetry::{AccessLog, Options, Telemetry};
use penstock_proxy::worker::Shared;
use penstock_proxy::{fleet, memory, signals, xds};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

mod init;
#[cfg(test)]
mod injected;
mod leave;

#[global_allocator]
static ALLOCATOR: Counting<mimalloc::MiMalloc> = Counting(mimalloc::MiMalloc);

/// The Penstock sidecar: routes, balances and secures the traffic of one pod.
#[derive(Parser)]
#[command(name = "penstock-proxy", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve until SIGTERM, then drain.
    ///
    /// With control:
    ///   penstock-proxy run --control 127.0.0.1:15010 --control-ca state/anchors.pem \
    ///     --token token --node demo/client --service-account client
    /// Without:
    ///   penstock-proxy run --static proxy.yaml
    #[command(verbatim_doc_comment)]
    Run(Box<Run>),
    /// Redirect this pod's connections to the proxy, by nftables rules in the current network namespace.
    ///
    /// Needs CAP_NET_ADMIN and nothing else; run it before the application, and again to change the
    /// rules, which are replaced as a whole. The proxy is then started as the user --proxy-uid, with
    /// `run --redirected`.
    ///   penstock-proxy init --skip-inbound-ports 9090 --skip-subnets 169.254.169.254
    ///   penstock-proxy init --dry-run     # show the rules, change nothing; needs no right
    ///   penstock-proxy init --check       # try what is laid; exit status 1 if connections go astray
    #[command(verbatim_doc_comment)]
    Init(init::Init),
    /// Have the mesh go elsewhere, and go on serving: the preStop hook of a native sidecar.
    ///
    /// A pod's proxy is told to end only after its application has. Peers should know earlier, before
    /// any EndpointSlice has travelled. This tells them; nothing is closed, and nothing of the
    /// application's own is touched.
    ///   penstock-proxy drain
    #[command(verbatim_doc_comment)]
    Drain(leave::Drain),
}

#[derive(Args)]
struct Run {
    /// Start from this file, without a control plane
    #[arg(long = "static", value_name = "FILE", conflicts_with_all = ["control", "token", "node", "service_account"])]
    static_file: Option<PathBuf>,
    /// Where control takes proxies, its --listen
    #[arg(long, value_name = "HOST:PORT", env = "PENSTOCK_CONTROL", value_parser = control_address)]
    control: Option<String>,
    /// The anchors that control is verified against, PEM
    #[arg(long, value_name = "FILE")]
    control_ca: Option<PathBuf>,
    /// The bearer token that proves who we are; read anew for each certificate
    #[arg(long, value_name = "FILE")]
    token: Option<PathBuf>,
    /// This pod, <namespace>/<name>
    #[arg(long, value_name = "NS/POD", env = "PENSTOCK_NODE")]
    node: Option<String>,
    /// This pod's service account
    #[arg(long, value_name = "NAME", default_value = "default")]
    service_account: String,
    /// The mesh's trust domain
    #[arg(long, value_name = "NAME", default_value = DEFAULT_TRUST_DOMAIN)]
    trust_domain: String,
    /// Listen where `penstock-proxy init` sends this pod's traffic: outbound on loopback, inbound on all addresses, of
    /// both families
    #[arg(long, conflicts_with_all = ["static_file", "outbound", "inbound"])]
    redirected: bool,
    /// The user whose connections the rules let pass, as `penstock-proxy init` was told; with --redirected nobody else is
    /// started, since what a proxy of another user sends would come back to it
    #[arg(long, value_name = "UID", default_value_t = PROXY_UID, requires = "redirected")]
    proxy_uid: u32,
    /// Listener for the application's traffic
    #[arg(long, value_name = "ADDR", default_value_t = loopback(port::OUTBOUND))]
    outbound: SocketAddr,
    /// Listener for the mesh's traffic
    #[arg(long, value_name = "ADDR", default_value_t = loopback(port::INBOUND))]
    inbound: SocketAddr,
    /// Admin pages; loopback only
    #[arg(long, value_name = "ADDR", default_value_t = loopback(port::ADMIN))]
    admin: SocketAddr,
    /// Health and metrics
    #[arg(long, value_name = "ADDR", default_value_t = loopback(port::HEALTH))]
    health: SocketAddr,
    /// Worker threads; the default is a quarter of the cores, at least one
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Requests to log on standard output, as JSON
    #[arg(long, value_enum, default_value_t = AccessLog::Errors)]
    access_log: AccessLog,
    /// Send traces to this collector, http://host:4317
    #[arg(long, value_name = "URL")]
    otlp: Option<String>,
    /// Share of requests to trace when the caller has not decided, 0 to 1
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    trace_sample: f64,
    /// How long to wait for requests and connections on SIGTERM
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    drain_timeout: Duration,
    /// The model server's metrics page: [KIND:]PORT[/PATH] (vllm:8000/metrics), detect (the pod's own ports are tried) or off
    #[arg(long, value_name = "WHERE", default_value = "detect")]
    metrics: signals::Where,
    /// A DCGM exporter's page, for where the NVIDIA driver's library cannot be loaded
    #[arg(long, value_name = "HOST:PORT/PATH")]
    dcgm: Option<String>,
    /// A GPU of this pod by its UUID, if it cannot be told otherwise; may be repeated
    #[arg(long, value_name = "UUID")]
    gpu: Vec<String>,
    /// Open connections, each listener
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections)]
    max_connections: u32,
    /// Of these, inbound, from one address; 0 = as many as in all
    #[arg(long, value_name = "N", default_value_t = Limits::default().connections_per_peer)]
    peer_connections: u32,
    /// Refuse new requests (503) while the proxy has so many bytes of memory; 0 = never [default: 85 % of its container's limit, if it has one]
    #[arg(long, value_name = "BYTES")]
    max_memory: Option<u64>,
    /// Largest request body, bytes; 0 = no limit
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    max_body: u64,
    /// Shared memory in which tensors are handed to a model server that reads it (Triton), bytes; 0 = none
    #[arg(long, value_name = "BYTES", default_value_t = Limits::default().arena_bytes)]
    arena: usize,
    /// The library of NVIDIA's driver, opened where a pod asks for a GPU (penstock.io/gpu)
    #[arg(long, value_name = "FILE", env = "PENSTOCK_CUDA_DRIVER", default_value = "libcuda.so.1")]
    cuda_driver: PathBuf,
    /// nvJPEG, opened where a pod asks for it (penstock.io/gpu: ipc,nvjpeg) [default: libnvjpeg.so.12, .13 or .11]
    #[arg(long, value_name = "FILE", env = "PENSTOCK_NVJPEG")]
    nvjpeg: Option<PathBuf>,
    /// Images and other inputs that are prepared at once, each by a thread of its own (InferencePolicy)
    #[arg(long, value_name = "N", default_value_t = Limits::default().prepare_threads)]
    prepare_threads: usize,
    /// How long a request's headers may take to arrive, and a connection may rest between two requests
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = humantime::parse_duration)]
    header_timeout: Duration,
    /// How long a connection that comes before certificate and configuration is held for them
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = humantime::parse_duration)]
    start_timeout: Duration,
    /// Ask HTTP connections of the mesh to go elsewhere (GOAWAY) at this age, give or take a tenth; 0s = never
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    max_connection_age: Duration,
    /// End gRPC streams of the mesh with UNAVAILABLE at this age, give or take a tenth, so that they are opened again
    /// where there is room; 0s = never
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = humantime::parse_duration)]
    max_stream_age: Duration,
    /// error, warn, info, debug, or a filter such as info,penstock_proxy::xds=debug
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log_level: String,
}

/// `host:port` as the connection wants it; a URL of the right kind means the same.
fn control_address(text: &str) -> Result<String, String> {
    if text.starts_with("http://") {
        return Err("proxies speak TLS to control's --listen (port 15010), and plain HTTP is that of its --api (port \
                    8080); write HOST:PORT"
            .into());
    }
    let address = text.strip_prefix("https://").unwrap_or(text).trim_end_matches('/');
    match address.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok() => {
            Ok(address.to_owned())
        }
        _ => Err("write HOST:PORT, for example 127.0.0.1:15010".into()),
    }
}

/// A proxy starts from a file or from control, and control needs all of four things.
fn complete(options: &Run) -> Result<(), String> {
    let given = [
        ("--control", options.control.is_some()),
        ("--control-ca", options.control_ca.is_some()),
        ("--token", options.token.is_some()),
        ("--node", options.node.is_some()),
    ];
    let missing: Vec<_> = given.iter().filter(|(_, given)| !given).map(|(name, _)| *name).collect();
    if options.static_file.is_some() || missing.is_empty() {
        return Ok(());
    }
    let without = "To start without control: --static FILE";
    Err(if missing.len() == given.len() {
        format!(
            "run needs --static FILE, to start without control, or all of {} to start with it",
            missing.join(", ")
        )
    } else {
        format!("to start with control, {} is missing. {without}", missing.join(", "))
    })
}

/// A proxy that the rules do not let pass would take its own connections for the application's, without end.
fn let_pass(options: &Run, user: u32) -> Result<(), String> {
    match options.redirected && user != options.proxy_uid {
        true => Err(format!(
            "this runs as user {user}, and the rules let user {} pass, so what it sends would come back to it without \
             end; start it as that user (`runAsUser: {1}`, `setpriv --reuid {1}`), or give `init` and `run` another \
             --proxy-uid",
            options.proxy_uid, options.proxy_uid
        )),
        false => Ok(()),
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Where redirected connections arrive: those of the application on loopback, which nobody else can reach, and the
/// mesh's on the pod's own addresses, whichever it has.
fn redirected(has_ipv6: bool) -> (Vec<SocketAddr>, SocketAddr) {
    let outbound = SocketAddr::from((Ipv6Addr::LOCALHOST, port::OUTBOUND));
    match has_ipv6 {
        // A listener on all addresses takes IPv4 too.
        true => (
            vec![loopback(port::OUTBOUND), outbound],
            SocketAddr::from((Ipv6Addr::UNSPECIFIED, port::INBOUND)),
        ),
        false => (vec![loopback(port::OUTBOUND)], SocketAddr::from((Ipv4Addr::UNSPECIFIED, port::INBOUND))),
    }
}

fn main() -> ExitCode {
    // Huge pages round a sidecar's few megabytes up to two each. Where the kernel has none there is nothing to do. First of all, since
    // what has become one stays one.
    let _ = rustix::thread::disable_transparent_huge_pages(true);
    let options = match Cli::parse().command {
        Command::Run(options) => options,
        Command::Init(options) => return init::run(&options),
        Command::Drain(options) => return leave::run(&options),
    };
    if let Err(missing) = complete(&options) {
        Cli::command().error(ErrorKind::MissingRequiredArgument, missing).exit();
    }
    if let Err(endless) = let_pass(&options, rustix::process::geteuid().as_raw()) {
        eprintln!("penstock-proxy: {endless}");
        return ExitCode::FAILURE;
    }
    let level = match Level::install(&options.log_level) {
        Ok(level) => level,
        Err(error) => {
            eprintln!("penstock-proxy: --log-level: {error}");
            return ExitCode::from(2);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.context("cannot start a runtime").and_then(|runtime| {
        let result = runtime.block_on(serve(*options, level));
        // Blocking work that hangs (a name look-up) must not hold up the end.
        runtime.shutdown_timeout(Duration::from_millis(100));
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstock-proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(options: Run, level: Level) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let drain_timeout = options.drain_timeout;
    let level = Arc::new(level);
    let Started { proxy, last_words, stop } = match &options.static_file {
        Some(file) => start_static(file, &options, level).await?,
        None => start_with_control(&options, level).await?,
    };
    let telemetry = Arc::clone(&proxy.shared.telemetry);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("draining for at most {drain_timeout:?}");
    tokio::select! {
        () = proxy.drain(drain_timeout) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    stop.cancel();
    if let Some(last_words) = last_words {
        let _ = tokio::time::timeout(LAST_WORDS, last_words).await;
    }
    let _ = tokio::task::spawn_blocking(move || telemetry.flush(LAST_WORDS)).await;
    Ok(())
}

/// How long the last outcomes, log lines and spans may take to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);

struct Started {
    proxy: Proxy,
    /// Ends when the last outcomes have been told.
    last_words: Option<JoinHandle<()>>,
    stop: CancellationToken,
}

/// Where the model server and the GPU are looked at.
fn looked_at(options: &Run, node: &str) -> signals::Config {
    signals::Config {
        server: options.metrics.clone(),
        dcgm: options.dcgm.clone(),
        owned: signals::Owned {
            uuids: options.gpu.clone(),
            visible: std::env::var("NVIDIA_VISIBLE_DEVICES").ok(),
            pod: node.to_owned(),
        },
        ..signals::Config::default()
    }
}

async fn start_static(file: &std::path::Path, options: &Run, level: Arc<Level>) -> anyhow::Result<Started> {
    let file = static_file::read(file)?;
    let identity = Arc::new(match &file.identity {
        Some([certificate, key, anchors]) => Identity::from_files(certificate, key, anchors)?,
        None => Identity::new(),
    });
    let telemetry =
        Arc::new(Telemetry::new(&Options { access_log: file.access_log, ..told(options, "static/proxy") })?);
    let store = Arc::new(Store::default());
    store.set_ready();
    let proxy = Proxy::start(Setup {
        listen: run::static_listeners(&file),
        cuda_driver: options.cuda_driver.clone(),
        nvjpeg: options.nvjpeg.clone(),
        workers: file.workers,
        node: "static/proxy".to_owned(),
        limits: limits(options),
        store,
        identity,
        telemetry,
        // No control has said which ports are ours, so nothing is found by trying.
        signals: match options.metrics {
            signals::Where::Detect => {
                signals::Config { server: signals::Where::Off, ..looked_at(options, "static/proxy") }
            }
            _ => looked_at(options, "static/proxy"),
        },
    })?;
    let stop = CancellationToken::new();
    if let Some(address) = file.admin {
        serve_pages(address, Audience::Admin, &pages(&proxy.shared, level), &stop).await?;
    }
    for (listener, address) in file.listeners.iter().zip(&proxy.addresses) {
        tracing::info!(listener = %listener.name, %address, "listening");
    }
    Ok(Started { proxy, last_words: None, stop })
}

async fn start_with_control(options: &Run, level: Arc<Level>) -> anyhow::Result<Started> {
    let (Some(address), Some(ca), Some(token), Some(node)) =
        (&options.control, &options.control_ca, &options.token, &options.node)
    else {
        bail!("--control, --control-ca, --token and --node belong together");
    };
    let Some((namespace, _)) = node.split_once('/') else {
        bail!("--node {node:?} is not <namespace>/<pod>");
    };
    let id = SpiffeId::new(&options.trust_domain, namespace, &options.service_account)?;
    let control =
        Control { address: address.clone(), ca: ca.clone(), trust_domain: options.trust_domain.clone() };
    let identity = Arc::new(Identity::new());
    let telemetry = Arc::new(Telemetry::new(&told(options, node))?);
    let store = Arc::new(Store::default());
    let (outbound, inbound) = match options.redirected {
        true => redirected(std::net::TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok()),
        false => (vec![options.outbound], options.inbound),
    };
    let outbound = outbound.into_iter().map(|address| ("outbound", address, Serves::Outbound(None)));
    let listen = outbound
        .chain([("inbound", inbound, Serves::Inbound(None))])
        .map(|(name, address, serves)| Listen { name, address, serves })
        .collect();
    let proxy = Proxy::start(Setup {
        listen,
        workers: options.workers.unwrap_or_else(default_workers),
        node: node.clone(),
        limits: limits(options),
        store: Arc::clone(&store),
        identity: Arc::clone(&identity),
        telemetry,
        signals: looked_at(options, node),
        cuda_driver: options.cuda_driver.clone(),
        nvjpeg: options.nvjpeg.clone(),
    })?;
    let stop = CancellationToken::new();
    let pages = pages(&proxy.shared, level);
    serve_pages(options.admin, Audience::Admin, &pages, &stop).await?;
    serve_pages(options.health, Audience::Health, &pages, &stop).await?;

    let signer = Signer { control: control.clone(), token: token.clone(), id };
    tokio::spawn(keep_signed(Arc::clone(&identity), signer));
    let demands = store.demands().context("the configuration's demands are taken already")?;
    let account = format!("{namespace}/{}", options.service_account);
    let config = xds::Config { control, node: node.clone(), account };
    let client = xds::Client::new(config, Arc::clone(&identity));
    let last_words = tokio::spawn(fleet::keep_attached(client.way(), node.clone(), pages, stop.clone()));
    tokio::spawn(client.run(Arc::clone(&store), demands));
    let [outbound @ .., inbound] = proxy.addresses.as_slice() else { bail!("nothing to listen on") };
    tracing::info!(%node, ?outbound, %inbound, "listening");
    Ok(Started { proxy, last_words: Some(last_words), stop })
}

fn pages(shared: &Shared, level: Arc<Level>) -> Arc<Pages> {
    Arc::new(Pages {
        store: Arc::clone(&shared.store),
        identity: Arc::clone(&shared.identity),
        telemetry: Arc::clone(&shared.telemetry),
        level: Some(level),
        draining: shared.drain.starter(),
        epoch: shared.epoch,
    })
}

async fn serve_pages(
    address: SocketAddr,
    audience: Audience,
    pages: &Arc<Pages>,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    let listener = admin::listen(address, audience).await?;
    tracing::info!(address = %listener.local_addr()?, ?audience, "serving pages");
    tokio::spawn(admin::serve(listener, Arc::clone(pages), audience, stop.clone()));
    Ok(())
}

fn told(options: &Run, node: &str) -> Options {
    Options {
        access_log: options.access_log,
        otlp: options.otlp.clone(),
        trace_sample: options.trace_sample,
        node: node.to_owned(),
        service: format!("penstock-proxy {}", options.service_account),
    }
}

fn limits(options: &Run) -> Limits {
    Limits {
        connections: options.max_connections,
        connections_per_peer: options.peer_connections,
        memory_bytes: options.max_memory.unwrap_or_else(memory::allowed),
        body_bytes: options.max_body,
        arena_bytes: options.arena,
        prepare_threads: options.prepare_threads,
        header_time: options.header_timeout,
        early_time: options.start_timeout,
        connection_age: options.max_connection_age,
        stream_age: options.max_stream_age,
        ..Limits::default()
    }
}

/// A sidecar shares its node with the application; a quarter of the cores serves tens of thousands of requests a
/// second.
fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, |cores| (cores.get() / 4).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Run, clap::Error> {
        match Cli::try_parse_from(line.split_whitespace())?.command {
            Command::Run(options) => Ok(*options),
            Command::Init(_) | Command::Drain(_) => panic!("{line} is no run"),
        }
    }

    #[test]
    fn what_is_missing_is_named_and_so_is_the_start_without_control() {
        let told = complete(&options("penstock-proxy run").unwrap()).unwrap_err();
        assert!(
            told.contains("--static FILE") && told.contains("--control, --control-ca, --token, --node"),
            "{told}"
        );
        let some = "penstock-proxy run --control a:1 --node a/b --token t";
        let told = complete(&options(some).unwrap()).unwrap_err();
        assert!(told.contains("--control-ca is missing") && told.contains("--static FILE"), "{told}");
        assert_eq!(complete(&options("penstock-proxy run --static f.yaml").unwrap()), Ok(()));
        let all = "penstock-proxy run --control a:1 --node a/b --token t --control-ca c";
        assert_eq!(complete(&options(all).unwrap()), Ok(()));
    }

    #[test]
    fn only_the_user_whom_the_rules_let_pass_serves_what_they_redirect() {
        let line = "penstock-proxy run --control a:1 --node a/b --token t --control-ca c";
        let asked = |more: &str, user| let_pass(&options(&format!("{line}{more}")).unwrap(), user);
        assert_eq!(asked(" --redirected", PROXY_UID), Ok(()));
        assert!(asked(" --redirected", 0).unwrap_err().contains("setpriv --reuid 2102"));
        assert_eq!(asked(" --redirected --proxy-uid 4711", 4711), Ok(()));
        assert!(asked(" --redirected --proxy-uid 4711", PROXY_UID).is_err());
        assert_eq!(asked("", 0), Ok(()), "nothing is redirected");
        assert!(options(&format!("{line} --proxy-uid 7")).is_err(), "it means nothing without --redirected");
    }

    #[test]
    fn control_may_be_an_address_or_a_url_but_not_its_api() {
        for text in ["control:15010", "https://control:15010", "https://control:15010/"] {
            assert_eq!(control_address(text).as_deref(), Ok("control:15010"));
        }
        assert_eq!(control_address("[::1]:15010").as_deref(), Ok("[::1]:15010"));
        assert!(control_address("http://127.0.0.1:8080").unwrap_err().contains("--listen"));
        for text in ["control", ":15010", "control:x", "https://control:1/path", ""] {
            assert!(control_address(text).unwrap_err().contains("HOST:PORT"), "{text}");
        }
    }
}
