//! A Kubernetes API: the real API server with etcd, on an address of their own. No controllers, no kubelet: what is in it is what a test
//! puts there.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use penstock_api::names::port;
use rcgen::KeyPair;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::peers::{gateway_definitions, kube_apiserver};
use super::process::{Process, program};
use super::wire::get;
use super::{PATIENCE, own_ip, wait_until};

/// The context of the kubeconfig.
pub const CONTEXT: &str = "test";
/// Whoever shows this is an administrator.
const ADMIN: &str = "the-tests-own-token";
/// What the API server signs tokens of service accounts for, unless they ask for another audience.
pub const ISSUER: &str = "https://kubernetes.default.svc";

/// The API server of a test.
#[derive(Debug)]
pub struct ApiServer {
    program: PathBuf,
    ip: Ipv4Addr,
    server: Option<Process>,
    _etcd: Process,
    /// Goes last: logs lie in it.
    folder: TempDir,
}

impl ApiServer {
    /// Starts both and waits until they are ready; `None` where peers are not wanted.
    pub async fn start() -> Option<Self> {
        let program = kube_apiserver()?;
        let (folder, ip) = (tempfile::tempdir().unwrap(), own_ip());
        let at = |name: &str| folder.path().join(name);
        // The key pair of all tokens of service accounts, and the administrator's own.
        let accounts = KeyPair::generate().unwrap();
        std::fs::write(at("accounts.key"), accounts.serialize_pem()).unwrap();
        std::fs::write(at("accounts.pub"), accounts.public_key_pem()).unwrap();
        std::fs::write(at("tokens.csv"), format!("{ADMIN},admin,admin,\"system:masters\"\n")).unwrap();
        let url = |port: u16| format!("http://{ip}:{port}");
        let etcd = Process::start(
            "etcd",
            Path::new("etcd"),
            &[
                format!("--data-dir={}", at("etcd").display()),
                format!("--listen-client-urls={}", url(2379)),
                format!("--advertise-client-urls={}", url(2379)),
                format!("--listen-peer-urls={}", url(2380)),
                format!("--initial-advertise-peer-urls={}", url(2380)),
                format!("--initial-cluster=default={}", url(2380)),
                // What it holds is gone with the test.
                "--unsafe-no-fsync".to_owned(),
            ],
            folder.path(),
        );
        let mut api = Self { program, ip, server: None, _etcd: etcd, folder };
        api.restart().await;
        Some(api)
    }

    /// Starts the API server again after [`stop`](Self::stop), with what etcd has.
    pub async fn restart(&mut self) {
        let at = |name: &str| self.folder.path().join(name).display().to_string();
        let args = [
            format!("--etcd-servers=http://{}:2379", self.ip),
            format!("--bind-address={}", self.ip),
            format!("--advertise-address={}", self.ip),
            "--secure-port=6443".to_owned(),
            format!("--cert-dir={}", at("serving")),
            format!("--token-auth-file={}", at("tokens.csv")),
            "--authorization-mode=RBAC".to_owned(),
            format!("--service-account-issuer={ISSUER}"),
            format!("--service-account-signing-key-file={}", at("accounts.key")),
            format!("--service-account-key-file={}", at("accounts.pub")),
            "--service-cluster-ip-range=10.96.0.0/16".to_owned(),
            // Nobody makes the accounts and the endpoints that these would wait for.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--endpoint-reconciler-type=none".to_owned(),
        ];
        let mut server = Process::start("kube-apiserver", &self.program, &args, self.folder.path());
        // Its certificate is its own, made at its first start.
        let certificate = self.folder.path().join("serving/apiserver.crt");
        wait_until("the API server has a certificate", PATIENCE * 2, async || {
            assert!(server.runs(), "the API server ended: {}", server.said());
            certificate.exists()
        })
        .await;
        std::fs::write(self.kubeconfig(), self.config(ADMIN)).unwrap();
        let client = self.client().await;
        wait_until("the API server is ready", PATIENCE * 2, async || {
            assert!(server.runs(), "the API server ended: {}", server.said());
            let ready = http::Request::get("/readyz").body(Vec::new()).unwrap();
            client.request_text(ready).await.is_ok_and(|said| said == "ok")
        })
        .await;
        self.server = Some(server);
    }

    /// Ends the API server at once; etcd stays.
    pub fn stop(&mut self) {
        self.server = None;
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("admin.yaml")
    }

    /// A kubeconfig for whoever has this token, with [`CONTEXT`].
    pub fn config(&self, token: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: {CONTEXT}\n\
             clusters: [{{name: {CONTEXT}, cluster: {{server: \"https://{}:6443\", certificate-authority: {:?}}}}}]\n\
             contexts: [{{name: {CONTEXT}, context: {{cluster: {CONTEXT}, user: {CONTEXT}}}}}]\n\
             users: [{{name: {CONTEXT}, user: {{token: \"{token}\"}}}}]\n",
            self.ip,
            self.folder.path().join("serving/apiserver.crt")
        )
    }

    /// The administrator's client.
    pub async fn client(&self) -> Client {
        let kubeconfig = Kubeconfig::read_from(self.kubeconfig()).unwrap();
        let config =
            kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        Client::try_from(config).unwrap()
    }
}

/// Makes an object so, or tries whether it could be. Fields that its schema does not have are errors, as for `kubectl apply`.
pub async fn apply(client: &Client, object: &Value, dry: bool) -> kube::Result<()> {
    let (api, name) = place(client, object);
    let mut params = PatchParams::apply("test").force().validation_strict();
    params.dry_run = dry;
    api.patch(&name, &params, &Patch::Apply(object)).await.map(drop)
}

/// Writes an object's status, as whoever runs it would.
pub async fn apply_status(client: &Client, object: &Value) -> kube::Result<()> {
    let (api, name) = place(client, object);
    let params = PatchParams::apply("test").force();
    api.patch_status(&name, &params, &Patch::Apply(object)).await.map(drop)
}

/// A token as the kubelet projects it: for an audience, and bound to a pod if one is named.
pub async fn token(
    client: &Client,
    namespace: &str,
    name: &str,
    audience: &str,
    pod: Option<&str>,
) -> String {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let bound = pod.map(|pod| json!({"kind": "Pod", "apiVersion": "v1", "name": pod}));
    let request: TokenRequest = serde_json::from_value(json!({
        "metadata": {},
        "spec": {"audiences": [audience], "expirationSeconds": 3600, "boundObjectRef": bound},
    }))
    .unwrap();
    let answer = accounts.create_token_request(name, &PostParams::default(), &request).await.unwrap();
    answer.status.unwrap().token
}

/// Where objects of its kind and namespace are, and its name.
pub fn place(client: &Client, object: &Value) -> (Api<DynamicObject>, String) {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
    let version = text("/apiVersion");
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, text("/kind")));
    let api = match text("/metadata/namespace") {
        "" => Api::all_with(client.clone(), &resource),
        namespace => Api::namespaced_with(client.clone(), namespace, &resource),
    };
    (api, text("/metadata/name").to_owned())
}

/// Installs the definitions of the Gateway API, of its Inference Extension, and our own, and waits until they are served.
pub async fn install_definitions(client: &Client) {
    let mut all = gateway_definitions().unwrap();
    for own in
        ["crd-accesspolicies.yaml", "crd-canaries.yaml", "crd-inferencepolicies.yaml", "crd-ratelimits.yaml"]
    {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/install").join(own);
        all.push(serde_saphyr::from_str(&std::fs::read_to_string(file).unwrap()).unwrap());
    }
    for mut definition in all {
        // What its generator writes of a status, which is the API server's.
        definition.as_object_mut().unwrap().remove("status");
        apply(client, &definition, false).await.unwrap();
        let (api, name) = place(client, &definition);
        wait_until(&format!("{name} is served"), PATIENCE, async || {
            let conditions = api.get(&name).await.unwrap().data["status"]["conditions"].clone();
            let all = conditions.as_array().cloned().unwrap_or_default();
            all.iter().any(|one| one["type"] == "Established" && one["status"] == "True")
        })
        .await;
    }
}

/// An object as the API server has it; null where there is none.
pub async fn read(client: &Client, object: &Value) -> Value {
    let (api, name) = place(client, object);
    api.get_opt(&name).await.unwrap().map(|found| serde_json::to_value(found).unwrap()).unwrap_or_default()
}

/// A service account.
pub fn account(namespace: &str, name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}})
}

/// Installs control's account with the rights that `manifests/install` gives it and no others, in its namespace; its kubeconfig, in `folder`.
pub async fn installed(server: &ApiServer, client: &Client, folder: &Path) -> PathBuf {
    let home = "penstock-system";
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": home}});
    apply(client, &namespace, false).await.unwrap();
    let rbac = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/install/rbac.yaml");
    for document in std::fs::read_to_string(rbac).unwrap().split("---\n") {
        apply(client, &serde_saphyr::from_str(document).unwrap(), false).await.unwrap();
    }
    let kubeconfig = folder.join("control.yaml");
    let token = token(client, home, "penstock-control", ISSUER, None).await;
    std::fs::write(&kubeconfig, server.config(&token)).unwrap();
    kubeconfig
}

/// A replica of control, as a process that reads the API, at `ip` on the usual ports, with further `options`; it answers.
pub async fn control(
    name: &str,
    ip: Ipv4Addr,
    folder: &Path,
    kubeconfig: &Path,
    options: &[String],
) -> Process {
    let at = |port: u16| SocketAddr::new(ip.into(), port);
    let api = at(port::CONTROL_API);
    let args = [
        "run".to_owned(),
        format!("--source=kubernetes:{CONTEXT}"),
        format!("--state={}", folder.join(name).display()),
        format!("--listen={}", at(port::CONTROL)),
        format!("--api={api}"),
    ];
    let args = [&args, options].concat();
    let variables = [("KUBECONFIG", kubeconfig.display().to_string()), ("POD_NAME", name.to_owned())];
    let mut process = Process::start_with(name, &program("penstock-control"), &args, &variables, folder);
    wait_until("control answers", PATIENCE, async || {
        assert!(process.runs(), "control ended at once: {}", process.said());
        get(api, "/healthz").await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    process
}

/// The sidecar of a pod at `ip`, with the anchors and the token that injection would mount; it is ready. Pod and account have one name.
pub async fn sidecar(
    client: &Client,
    control: Ipv4Addr,
    (namespace, pod): (&str, &str),
    (ip, audience): (Ipv4Addr, &str),
    folder: &Path,
) -> Process {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "penstock-system");
    let anchors_file = folder.join("anchors.pem");
    wait_until("the anchors are in the cluster", PATIENCE, async || {
        let Ok(map) = maps.get("penstock-anchors").await else { return false };
        let Some(anchors) = map.data.and_then(|mut data| data.remove("anchors.pem")) else { return false };
        std::fs::write(&anchors_file, anchors).unwrap();
        true
    })
    .await;
    let token_file = folder.join("token");
    std::fs::write(&token_file, token(client, namespace, pod, audience, Some(pod)).await).unwrap();
    let at = |port: u16| SocketAddr::new(ip.into(), port);
    let args = [
        "run".to_owned(),
        format!("--control={}", SocketAddr::new(control.into(), port::CONTROL)),
        format!("--control-ca={}", anchors_file.display()),
        format!("--token={}", token_file.display()),
        format!("--node={namespace}/{pod}"),
        format!("--service-account={pod}"),
        format!("--outbound={}", at(port::OUTBOUND)),
        format!("--inbound={}", at(port::INBOUND)),
        format!("--admin={}", at(port::ADMIN)),
        format!("--health={}", at(port::HEALTH)),
    ];
    let mut sidecar = Process::start("sidecar", &program("penstock-proxy"), &args, folder);
    wait_until("the sidecar is ready", PATIENCE, async || {
        assert!(sidecar.runs(), "the sidecar ended: {}", sidecar.said());
        get(at(port::ADMIN), "/ready").await.is_ok_and(|answer| answer.status() == 200)
    })
    .await;
    sidecar
}
