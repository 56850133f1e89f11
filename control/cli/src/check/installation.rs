//! What the checks of control say of an installation in which one thing is other than it should be.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use serde_json::{Value, json};

use super::facts::{Fact, Facts};
use super::installed::{self, ours};
use super::tables::{empty, found, table};
use super::{Verdict, judged};
use crate::cluster::Answer;

/// The middle of 2026, when the certificates of these tests are good.
const NOW: f64 = 1_782_864_000.0;

fn params(names: &[&str], years: (i32, i32)) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    (params.not_before, params.not_after) = (date_time_ymd(years.0, 1, 1), date_time_ymd(years.1, 1, 1));
    params
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

fn authority(name: &str, years: (i32, i32)) -> Authority {
    let mut params = params(&[], years);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
}

impl Authority {
    fn pem(&self) -> String {
        self.0.pem()
    }

    fn serving(&self, name: &str, years: (i32, i32)) -> String {
        params(&[name], years).signed_by(&KeyPair::generate().unwrap(), &self.0).unwrap().pem()
    }
}

fn secret(pem: &str) -> Answer {
    found(json!({
        "metadata": {"labels": {"penstock.io/made-by": "control"}},
        "data": {"tls.crt": STANDARD.encode(pem), "tls.key": "eA==", "ca.crt": STANDARD.encode(pem)},
    }))
}

fn anchors(namespace: &str, pem: &str) -> Value {
    json!({"metadata": {"name": "penstock-anchors", "namespace": namespace}, "data": {"anchors.pem": pem}})
}

fn one(kind: &str, name: &str) -> Value {
    let all = ours(kind);
    all.into_iter().find(|object| object["metadata"]["name"] == name).unwrap()
}

fn control(node: &str, restarts: u32) -> Value {
    json!({
        "metadata": {
            "name": format!("penstock-control-{node}"), "namespace": "penstock-system", "labels": {"app.kubernetes.io/component": "control"},
        },
        "spec": {"nodeName": node},
        "status": {"containerStatuses": [{"restartCount": restarts, "lastState": {"terminated": {"reason": "OOMKilled"}}}]},
    })
}

const HOST: &str = "penstock-webhook.penstock-system.svc";

struct World {
    root: Authority,
    good: Facts,
}

fn world() -> World {
    let (root, signer) = (authority("root", (2026, 2027)), authority("webhook", (2026, 2027)));
    let name = "penstock-control";
    let mut webhook = one("MutatingWebhookConfiguration", "penstock-injector");
    for hook in webhook["webhooks"].as_array_mut().unwrap() {
        hook["clientConfig"]["caBundle"] = json!(STANDARD.encode(signer.pem()));
    }
    let mut deployment = one("Deployment", name);
    deployment["status"] = json!({"readyReplicas": 2, "updatedReplicas": 2});
    let definitions: Vec<Value> = ours("CustomResourceDefinition")
        .into_iter()
        .map(|mut definition| {
            let so = |kind: &str| json!({"type": kind, "status": "True"});
            definition["status"] = json!({"conditions": [so("Established"), so("NamesAccepted")]});
            definition
        })
        .collect();
    let slice = |service: &str| json!({"metadata": {"labels": {"kubernetes.io/service-name": service}}, "endpoints": [{"conditions": {"ready": true}}]});
    let lease = json!({"spec": {
        "holderIdentity": "penstock-control-a", "leaseDurationSeconds": 15, "renewTime": "2026-07-01T00:00:00.000000Z",
    }});
    let mut good = empty()
        .list(
            Fact::Namespaces,
            json!([one("Namespace", "penstock-system"), {"metadata": {"name": "team-a", "labels": {"penstock.io/inject": "enabled"}}}]),
        )
        .list(Fact::Definitions, json!(definitions))
        .list(Fact::Webhooks, json!([webhook]))
        .list(Fact::Pods, json!([control("a", 0), control("b", 0)]))
        .list(Fact::Slices, json!([slice("penstock-control"), slice("penstock-webhook")]))
        .list(Fact::Anchors, json!([anchors("penstock-system", &root.pem()), anchors("team-a", &root.pem())]))
        .with(Fact::Deployment, found(deployment))
        .with(Fact::Account, found(json!({})))
        .with(Fact::ClusterRole, found(one("ClusterRole", name)))
        .with(Fact::ClusterRoleBinding, found(one("ClusterRoleBinding", name)))
        .with(Fact::Role, found(one("Role", name)))
        .with(Fact::RoleBinding, found(one("RoleBinding", name)))
        .with(Fact::Budget, found(json!({})))
        .with(Fact::NetworkPolicy, found(json!({})))
        .with(Fact::ControlService, found(one("Service", name)))
        .with(Fact::WebhookService, found(one("Service", "penstock-webhook")))
        .with(Fact::Lease, found(lease))
        .with(Fact::Root, secret(&root.pem()))
        .with(Fact::WebhookCertificate, secret(&signer.serving(HOST, (2026, 2027))));
    good.now = NOW;
    World { root, good }
}

#[test]
fn the_middle_of_2026_is_what_it_says() {
    let at: k8s_openapi::jiff::Timestamp = "2026-07-01T00:00:00Z".parse().unwrap();
    assert_eq!(at.as_second() as f64, NOW);
}

#[test]
fn of_an_installation_each_thing_that_is_wrong_is_named() {
    use Verdict::{Problem, Warning};
    let World { root, good } = world();
    let absent = |fact| good.clone().with(fact, Answer::Absent);
    let changed = |fact, change: &dyn Fn(&mut Value)| {
        let mut object = good.get(fact).found().unwrap().clone();
        change(&mut object);
        good.clone().with(fact, found(object))
    };
    let items = |fact, change: &dyn Fn(&mut Value)| {
        let mut items = json!(good.items(fact));
        change(&mut items);
        good.clone().list(fact, items)
    };
    let mut stale = good.clone();
    stale.now = NOW + 600.0;
    let leaf = root.serving("x", (2026, 2027));
    let rows = vec![
        (
            items(Fact::Namespaces, &|all| all[0] = json!({"metadata": {"name": "x"}})),
            "penstock-system",
            Problem,
            "no namespace",
        ),
        (
            items(Fact::Namespaces, &|all| all[0]["metadata"]["labels"] = json!({})),
            "penstock-system",
            Warning,
            "any kind",
        ),
        (
            items(Fact::Definitions, &|all| all[1]["status"] = json!({})),
            "definitions",
            Problem,
            "not served yet",
        ),
        (
            items(Fact::Definitions, &|all| all[0]["spec"]["versions"][0]["schema"] = json!({})),
            "schemas",
            Warning,
            "accesspolicies.penstock.io",
        ),
        (absent(Fact::Account), "control's account", Problem, "no service account"),
        (
            changed(Fact::ClusterRole, &|role| role["rules"][0]["verbs"] = json!(["get"])),
            "rights in the cluster",
            Problem,
            "missing: list pods",
        ),
        (
            changed(Fact::Role, &|role| {
                role["rules"]
                    .as_array_mut()
                    .unwrap()
                    .push(json!({"apiGroups": [""], "resources": ["pods"], "verbs": ["delete"]}))
            }),
            "rights at home",
            Warning,
            "too many: delete pods",
        ),
        (
            changed(Fact::RoleBinding, &|binding| binding["subjects"][0]["name"] = json!("x")),
            "bindings",
            Problem,
            "another account",
        ),
        (absent(Fact::Deployment), "control", Problem, "no Deployment"),
        (
            changed(Fact::Deployment, &|one| one["status"]["readyReplicas"] = json!(0)),
            "replicas",
            Problem,
            "0 of 2",
        ),
        (
            changed(Fact::Deployment, &|one| one["status"]["readyReplicas"] = json!(1)),
            "replicas",
            Warning,
            "1 of 2",
        ),
        (
            changed(Fact::Deployment, &|one| {
                one["spec"]["template"]["spec"]["containers"][0]["readinessProbe"] =
                    json!({"tcpSocket": {"port": "grpc-push"}});
            }),
            "probes of control",
            Warning,
            "readinessProbe",
        ),
        (
            changed(Fact::Deployment, &|one| one["status"]["updatedReplicas"] = json!(1)),
            "rollout",
            Warning,
            "1 of 2",
        ),
        (
            changed(Fact::Deployment, &|one| {
                one["spec"]["template"]["spec"]["containers"][0]["image"] = json!("x/control:0.0.1")
            }),
            "version",
            Warning,
            "x/control:0.0.1",
        ),
        (
            good.clone().list(Fact::Pods, json!([control("a", 4), control("b", 0)])),
            "restarts",
            Warning,
            "4 times, last OOMKilled",
        ),
        (good.clone().list(Fact::Pods, json!([control("a", 0), control("a", 0)])), "spread", Warning, "on a"),
        (absent(Fact::Budget), "disruption budget", Problem, "no PodDisruptionBudget"),
        (
            changed(Fact::ControlService, &|one| one["spec"]["ports"] = json!([])),
            "Services",
            Problem,
            "no port 15010",
        ),
        (
            items(Fact::Slices, &|all| all[1]["endpoints"] = json!([])),
            "endpoints of control",
            Problem,
            "0 for the webhook",
        ),
        (absent(Fact::NetworkPolicy), "network policy", Warning, "none for control"),
        (absent(Fact::Lease), "Lease", Problem, "none yet"),
        (
            changed(Fact::Lease, &|lease| lease["spec"]["holderIdentity"] = json!("gone-1")),
            "Lease",
            Warning,
            "gone-1",
        ),
        (stale, "Lease renewed", Problem, "10m"),
        (good.clone().with(Fact::Root, secret("x")), "root", Problem, "is no certificate"),
        (good.clone().with(Fact::Root, secret(&leaf)), "root", Problem, "may not sign"),
        (
            changed(Fact::Root, &|secret| secret["data"]["tls.key"] = json!("")),
            "key of the root",
            Problem,
            "no tls.key",
        ),
        (
            changed(Fact::Root, &|secret| secret["data"]["ca.crt"] = json!("")),
            "key of the root",
            Problem,
            "no ca.crt",
        ),
        (
            good.clone().with(Fact::Root, secret(&authority("new", (2026, 2027)).pem())),
            "trust anchors",
            Problem,
            "is not among them",
        ),
        (
            items(Fact::Anchors, &|all| all[1]["data"] = json!({})),
            "trust anchors",
            Problem,
            "team-a: other ones",
        ),
        (
            items(Fact::Anchors, &|all| drop(all.as_array_mut().unwrap().pop())),
            "trust anchors",
            Problem,
            "team-a: there are none",
        ),
        (
            items(Fact::Webhooks, &|all| all[0]["webhooks"][0]["failurePolicy"] = json!("Ignore")),
            "webhook",
            Problem,
            "namespace.penstock.io",
        ),
        (
            good.clone().with(Fact::WebhookCertificate, secret(&root.serving("x", (2026, 2027)))),
            "webhook's certificate",
            Problem,
            "and not for",
        ),
        (
            good.clone().with(Fact::WebhookCertificate, secret(&root.serving(HOST, (2024, 2025)))),
            "webhook's certificate",
            Problem,
            "ended",
        ),
        (
            good.clone().with(Fact::WebhookCertificate, secret(&root.serving(HOST, (2026, 2027)))),
            "caBundle",
            Problem,
            "signed by nobody",
        ),
        (
            good.clone().with(Fact::Root, Answer::Denied("you may not".to_owned())),
            "root",
            Warning,
            "you may not",
        ),
    ];
    let rows: Vec<_> = rows
        .into_iter()
        .map(|(facts, name, verdict, told)| {
            let checks = judged(&facts, &[&installed::ALL]);
            // `penstock …` is a command too.
            let fix = &checks.iter().find(|check| check.name == name).unwrap().fix;
            assert!(fix.contains("kubectl"), "{name}: {fix}");
            (facts, name, verdict, told)
        })
        .collect();
    table(&good, &[&installed::ALL], rows);
}
