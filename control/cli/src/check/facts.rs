//! What is known of a cluster, gathered before any check looks at it.
//!
//! In: a cluster. Out: [`Facts`], nothing but the API's answers and two clocks. Checks are functions of them, so that a table can test each.
//! What may not be read is a fact too.

use std::collections::BTreeMap;
use std::time::SystemTime;

use penstock_api::names::INJECTED_LABEL;
pub(super) use penstock_api::names::annotation::INJECT;
use serde_json::{Value, json};

use crate::cluster::{Answer, Cluster, name, namespace, text};
use crate::install::NAMESPACE;

/// Namespaces whose pods never get one.
pub(super) const EXEMPT: [&str; 2] = [NAMESPACE, "kube-system"];

/// One question to the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each is what it is called")]
pub(super) enum Fact {
    Version,
    Groups,
    Nodes,
    Namespaces,
    Pods,
    Webhooks,
    Definitions,
    PriorityClass,
    Kubernetes,
    Deployment,
    Lease,
    Root,
    WebhookCertificate,
    Anchors,
    ClusterRole,
    ClusterRoleBinding,
    Role,
    RoleBinding,
    Account,
    ControlService,
    WebhookService,
    Slices,
    Budget,
    NetworkPolicy,
    Routes,
    GrpcRoutes,
    Pools,
    AccessPolicies,
    Canaries,
    InferencePolicies,
    RateLimits,
    Events,
    Injection,
}

impl Fact {
    /// Those that are lists, and where each is.
    fn path(self) -> (bool, String) {
        let own = |group: &str, kind: &str| format!("/{group}/namespaces/{NAMESPACE}/{kind}");
        let rbac = "apis/rbac.authorization.k8s.io/v1";
        let one = |path: String| (false, path);
        let all = |path: &str| (true, path.to_owned());
        match self {
            Self::Version => one("/version".to_owned()),
            Self::Groups => one("/apis".to_owned()),
            Self::Nodes => all("/api/v1/nodes"),
            Self::Namespaces => all("/api/v1/namespaces"),
            Self::Pods => all("/api/v1/pods"),
            Self::Webhooks => all("/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations"),
            Self::Definitions => all("/apis/apiextensions.k8s.io/v1/customresourcedefinitions"),
            Self::PriorityClass => {
                one("/apis/scheduling.k8s.io/v1/priorityclasses/system-cluster-critical".to_owned())
            }
            Self::Kubernetes => one("/api/v1/namespaces/default/services/kubernetes".to_owned()),
            Self::Deployment => one(own("apis/apps/v1", "deployments/penstock-control")),
            Self::Lease => one(own("apis/coordination.k8s.io/v1", "leases/penstock-control")),
            Self::Root => one(own("api/v1", "secrets/penstock-ca")),
            Self::WebhookCertificate => one(own("api/v1", "secrets/penstock-webhook-tls")),
            Self::Anchors => all("/api/v1/configmaps?fieldSelector=metadata.name%3Dpenstock-anchors"),
            Self::ClusterRole => one(format!("/{rbac}/clusterroles/penstock-control")),
            Self::ClusterRoleBinding => one(format!("/{rbac}/clusterrolebindings/penstock-control")),
            Self::Role => one(own(rbac, "roles/penstock-control")),
            Self::RoleBinding => one(own(rbac, "rolebindings/penstock-control")),
            Self::Account => one(own("api/v1", "serviceaccounts/penstock-control")),
            Self::ControlService => one(own("api/v1", "services/penstock-control")),
            Self::WebhookService => one(own("api/v1", "services/penstock-webhook")),
            Self::Slices => (true, own("apis/discovery.k8s.io/v1", "endpointslices")),
            Self::Budget => one(own("apis/policy/v1", "poddisruptionbudgets/penstock-control")),
            Self::NetworkPolicy => one(own("apis/networking.k8s.io/v1", "networkpolicies/penstock-control")),
            Self::Routes => all("/apis/gateway.networking.k8s.io/v1/httproutes"),
            Self::GrpcRoutes => all("/apis/gateway.networking.k8s.io/v1/grpcroutes"),
            Self::Pools => all("/apis/inference.networking.k8s.io/v1/inferencepools"),
            Self::AccessPolicies => all("/apis/penstock.io/v1alpha1/accesspolicies"),
            Self::Canaries => all("/apis/penstock.io/v1alpha1/canaries"),
            Self::InferencePolicies => all("/apis/penstock.io/v1alpha1/inferencepolicies"),
            Self::RateLimits => all("/apis/penstock.io/v1alpha1/ratelimits"),
            Self::Events => all("/apis/events.k8s.io/v1/events?fieldSelector=reason%3DNotInjected"),
            Self::Injection => one("/api/v1/namespaces/default/pods?dryRun=All".to_owned()),
        }
    }
}

/// What has to be known before installing.
const BEFORE: [Fact; 13] = [
    Fact::Groups,
    Fact::Nodes,
    Fact::Namespaces,
    Fact::Pods,
    Fact::Webhooks,
    Fact::Definitions,
    Fact::PriorityClass,
    Fact::Kubernetes,
    Fact::ClusterRole,
    Fact::Deployment,
    Fact::WebhookService,
    Fact::Account,
    Fact::Role,
];

/// What has to be known besides once it is installed.
const INSTALLED: [Fact; 18] = [
    Fact::Lease,
    Fact::Root,
    Fact::WebhookCertificate,
    Fact::Anchors,
    Fact::ClusterRoleBinding,
    Fact::RoleBinding,
    Fact::ControlService,
    Fact::Slices,
    Fact::Budget,
    Fact::NetworkPolicy,
    Fact::Routes,
    Fact::GrpcRoutes,
    Fact::Pools,
    Fact::AccessPolicies,
    Fact::Canaries,
    Fact::InferencePolicies,
    Fact::RateLimits,
    Fact::Events,
];

/// What whoever installs has to be allowed to create: group and resource.
const RIGHTS: [(&str, &str); 14] = [
    ("", "namespaces"),
    ("", "serviceaccounts"),
    ("", "services"),
    ("", "resourcequotas"),
    ("apps", "deployments"),
    ("policy", "poddisruptionbudgets"),
    ("networking.k8s.io", "networkpolicies"),
    ("apiextensions.k8s.io", "customresourcedefinitions"),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations"),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("rbac.authorization.k8s.io", "clusterrolebindings"),
    ("rbac.authorization.k8s.io", "roles"),
    ("rbac.authorization.k8s.io", "rolebindings"),
    ("coordination.k8s.io", "leases"),
];

/// Everything that checks look at.
#[derive(Clone, Debug, Default)]
pub(super) struct Facts {
    answers: BTreeMap<Fact, Answer>,
    /// By how many seconds the API server's clock is ahead.
    pub ahead: Option<f64>,
    /// Seconds since the epoch.
    pub now: f64,
    /// `group/resource` that whoever asks may create, or not; none: that was not asked.
    pub rights: Vec<(String, bool)>,
}

impl Facts {
    /// Asks everything; of the version alone, where nobody answers.
    pub(super) async fn gather(cluster: &Cluster, installed: bool) -> Self {
        let (version, ahead) = cluster.version().await;
        let now =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
        let mut facts = Self { ahead, now, ..Self::default() };
        let answers = matches!(version, Answer::Found(_));
        facts.answers.insert(Fact::Version, version);
        if !answers {
            return facts;
        }
        let wanted = BEFORE.iter().chain(INSTALLED.iter().filter(|_| installed));
        let asked = futures_util::future::join_all(wanted.map(|fact| async move {
            let (list, path) = fact.path();
            (*fact, if list { cluster.list(&path).await } else { cluster.get(&path).await })
        }))
        .await;
        facts.answers.extend(asked);
        if installed {
            let path = Fact::Injection.path().1;
            facts.answers.insert(Fact::Injection, cluster.post(&path, &trial()).await);
        } else {
            let rights = RIGHTS.iter().map(|right| may_create(cluster, *right));
            facts.rights = futures_util::future::join_all(rights).await.into_iter().flatten().collect();
        }
        facts
    }

    /// What was answered.
    pub(super) fn get(&self, fact: Fact) -> &Answer {
        self.answers.get(&fact).unwrap_or(&Answer::Absent)
    }

    /// The items of a list.
    pub(super) fn items(&self, fact: Fact) -> &[Value] {
        self.get(fact).items()
    }

    /// The pods of control.
    pub(super) fn control(&self) -> impl Iterator<Item = &Value> {
        self.items(Fact::Pods).iter().filter(|pod| {
            namespace(pod) == NAMESPACE
                && text(pod, "/metadata/labels/app.kubernetes.io~1component") == "control"
        })
    }

    /// Whether pods of a namespace get a sidecar unless they say otherwise.
    pub(super) fn wanted(&self, of: &str) -> bool {
        self.injecting().any(|namespace| name(namespace) == of)
    }

    /// The namespaces whose pods get a sidecar.
    pub(super) fn injecting(&self) -> impl Iterator<Item = &Value> {
        let asks =
            |namespace: &&Value| label(namespace, INJECT) == "enabled" && !EXEMPT.contains(&name(namespace));
        self.items(Fact::Namespaces).iter().filter(asks)
    }

    /// The pods that have a sidecar.
    pub(super) fn injected(&self) -> impl Iterator<Item = &Value> {
        self.items(Fact::Pods).iter().filter(|pod| label(pod, INJECTED_LABEL) == "true")
    }

    /// For tables.
    #[cfg(test)]
    pub(super) fn with(mut self, fact: Fact, answer: Answer) -> Self {
        self.answers.insert(fact, answer);
        self
    }

    /// For tables: a list.
    #[cfg(test)]
    pub(super) fn list(self, fact: Fact, items: Value) -> Self {
        self.with(fact, Answer::Found(json!({ "items": items })))
    }
}

/// The value of a label; empty where there is none.
pub(super) fn label<'a>(object: &'a Value, key: &str) -> &'a str {
    text(object, &format!("/metadata/labels/{}", key.replace('~', "~0").replace('/', "~1")))
}

/// The value of an annotation; empty where there is none.
pub(super) fn annotation<'a>(object: &'a Value, key: &str) -> &'a str {
    text(object, &format!("/metadata/annotations/{}", key.replace('~', "~0").replace('/', "~1")))
}

/// A pod that asks for a sidecar, which is never made: the API server sends it through the webhook and drops it.
fn trial() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"generateName": "penstock-check-", "namespace": "default", "labels": {INJECT: "enabled"}},
        "spec": {"containers": [{"name": "main", "image": "none"}]},
    })
}

async fn may_create(cluster: &Cluster, (group, resource): (&str, &str)) -> Option<(String, bool)> {
    let review = json!({
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": {"verb": "create", "group": group, "resource": resource, "namespace": NAMESPACE}},
    });
    let answer = cluster.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", &review).await;
    let allowed = answer.found()?.pointer("/status/allowed")?.as_bool()?;
    let name = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
    Some((name, allowed))
}
