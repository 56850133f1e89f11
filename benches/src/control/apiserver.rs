//! The real API server with etcd, for cases whose source is a cluster. No controllers and no kubelet: what is in it is what the case writes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::Client;
use kube::config::{KubeConfigOptions, Kubeconfig};
use rcgen::KeyPair;
use tokio::time::Instant;

use crate::install;
use crate::process::{self, Process};
use crate::subject::free_port;

/// The context of the kubeconfig.
pub(super) const CONTEXT: &str = "bench";
/// Where the tests on a real API server leave it in the cache, built from the module of Kubernetes (`tests/cluster`).
const PROGRAM: &str = "kube-apiserver-1.34.4/kube-apiserver";
const ADMIN: &str = "the-bench-own-token";
/// It reads and writes all its own objects first.
const START: Duration = Duration::from_secs(120);

/// Both processes; gone with it.
pub(super) struct ApiServer {
    _etcd: Process,
    _server: Process,
    kubeconfig: PathBuf,
}

impl ApiServer {
    /// Starts both and waits until they answer.
    pub(super) async fn start(dir: &Path) -> Result<Self> {
        let program = install::cache()?.join(PROGRAM);
        ensure!(
            program.is_file(),
            "{} is not there: `cargo test -p penstock-tests --test installed` builds it, with Go",
            program.display()
        );
        let at = |name: &str| dir.join(name);
        let accounts = KeyPair::generate()?;
        std::fs::write(at("accounts.key"), accounts.serialize_pem())?;
        std::fs::write(at("accounts.pub"), accounts.public_key_pem())?;
        std::fs::write(at("tokens.csv"), format!("{ADMIN},admin,admin,\"system:masters\"\n"))?;
        let (clients, peers, port) = (free_port()?, free_port()?, free_port()?);
        let url = |port: u16| format!("http://127.0.0.1:{port}");
        let args = |all: &[String]| all.iter().map(Into::into).collect::<Vec<_>>();
        let mut etcd = process::spawn(
            None,
            "etcd",
            Path::new("etcd"),
            &args(&[
                format!("--data-dir={}", at("etcd").display()),
                format!("--listen-client-urls={}", url(clients)),
                format!("--advertise-client-urls={}", url(clients)),
                format!("--listen-peer-urls={}", url(peers)),
                format!("--initial-advertise-peer-urls={}", url(peers)),
                format!("--initial-cluster=default={}", url(peers)),
                // What it holds is gone with the case.
                "--unsafe-no-fsync".to_owned(),
            ]),
            dir,
            false,
        )
        .context("etcd (Debian's etcd-server)")?;
        let mut server = process::spawn(
            None,
            "kube-apiserver",
            &program,
            &args(&[
                format!("--etcd-servers={}", url(clients)),
                "--bind-address=127.0.0.1".to_owned(),
                "--advertise-address=127.0.0.1".to_owned(),
                format!("--secure-port={port}"),
                format!("--cert-dir={}", at("serving").display()),
                format!("--token-auth-file={}", at("tokens.csv").display()),
                "--authorization-mode=RBAC".to_owned(),
                "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
                format!("--service-account-signing-key-file={}", at("accounts.key").display()),
                format!("--service-account-key-file={}", at("accounts.pub").display()),
                "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
                // Nobody makes the accounts and the endpoints that these would wait for.
                "--disable-admission-plugins=ServiceAccount".to_owned(),
                "--endpoint-reconciler-type=none".to_owned(),
            ]),
            dir,
            false,
        )?;
        let kubeconfig = at("kubeconfig.yaml");
        let certificate = at("serving").join("apiserver.crt");
        let config = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: {CONTEXT}\n\
             clusters: [{{name: {CONTEXT}, cluster: {{server: \"https://127.0.0.1:{port}\", certificate-authority: {certificate:?}}}}}]\n\
             contexts: [{{name: {CONTEXT}, context: {{cluster: {CONTEXT}, user: {CONTEXT}}}}}]\n\
             users: [{{name: {CONTEXT}, user: {{token: \"{ADMIN}\"}}}}]\n"
        );
        std::fs::write(&kubeconfig, config)?;
        let deadline = Instant::now() + START;
        let server_is_up = async |certificate: &Path| -> Result<bool> {
            if !certificate.exists() {
                return Ok(false);
            }
            let ready = hyper::Request::get("/readyz").body(Vec::new())?;
            Ok(client(&kubeconfig).await?.request_text(ready).await.is_ok_and(|said| said == "ok"))
        };
        while !server_is_up(&certificate).await.unwrap_or(false) {
            etcd.check()?;
            server.check()?;
            if Instant::now() > deadline {
                return Err(server.story(&format!("was not ready within {START:?}")));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Ok(Self { _etcd: etcd, _server: server, kubeconfig })
    }

    /// The administrator's kubeconfig.
    pub(super) fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The administrator's client.
    pub(super) async fn client(&self) -> Result<Client> {
        client(&self.kubeconfig).await
    }
}

async fn client(kubeconfig: &Path) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(kubeconfig)?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}
