//! Whether control is installed whole, runs, and keeps what it writes up to date.

use serde_json::Value;

use super::before::{minor, unknown};
use super::certificates::{self, Held};
use super::facts::{EXEMPT, Fact, Facts, label};
use super::{Check, Rule, Verdict, many};
use crate::cluster::{Answer, name, namespace, text};
use crate::install::{self, APPLY, APPLY_CRDS, NAMESPACE};
use crate::units;

/// Of control and what it keeps.
pub(super) const ALL: [Rule; 26] = [
    own_namespace,
    defined,
    definitions_current,
    account,
    cluster_rights,
    own_rights,
    bindings,
    deployed,
    replicas,
    rollout,
    version,
    probes,
    restarts,
    spread,
    budget,
    services,
    reached,
    network_policy,
    held,
    renewed,
    root,
    root_kept,
    anchors,
    webhook,
    webhook_certificate,
    bundle,
];

fn missing(check: &'static str, what: &str, answer: &Answer, why: &'static str) -> Check {
    match answer {
        Answer::Absent => {
            Check::bad(Verdict::Problem, check, format!("there is no {what}"), Vec::new(), APPLY).because(why)
        }
        other => unknown(check, what, other),
    }
}

/// The objects of one kind that this program installs.
pub(super) fn ours(kind: &str) -> Vec<Value> {
    let text = install::manifest(&install::Args::default()).unwrap_or_default();
    let documents = text.split("---\n").filter_map(|document| serde_saphyr::from_str::<Value>(document).ok());
    documents.filter(|object| object["kind"] == kind).collect()
}

fn own_namespace(facts: &Facts) -> Check {
    let check = "penstock-system";
    let found = facts.items(Fact::Namespaces).iter().find(|namespace| name(namespace) == NAMESPACE);
    let why = "Nothing of control is there without it.";
    let Some(found) = found else {
        return match facts.get(Fact::Namespaces) {
            Answer::Found(_) => missing(check, "namespace penstock-system", &Answer::Absent, why),
            other => unknown(check, "namespaces", other),
        };
    };
    if text(found, "/status/phase") == "Terminating" {
        let fix = "Wait, then install anew: kubectl wait --for=delete namespace/penstock-system --timeout=5m";
        return Check::bad(Verdict::Problem, check, "it is being deleted".to_owned(), Vec::new(), fix)
            .because(why);
    }
    if label(found, "pod-security.kubernetes.io/enforce") != "restricted" {
        return Check::bad(
            Verdict::Warning,
            check,
            "pods of any kind may run in it".to_owned(),
            Vec::new(),
            APPLY,
        )
        .because("The keys of the root lie here; whoever may start any pod here may read them.");
    }
    Check::ok(check, "there, for restricted pods alone")
}

fn defined(facts: &Facts) -> Check {
    let check = "definitions";
    let all = match facts.get(Fact::Definitions) {
        Answer::Found(_) => facts.items(Fact::Definitions),
        other => return unknown(check, "customresourcedefinitions", other),
    };
    let bad: Vec<String> = ours("CustomResourceDefinition")
        .iter()
        .filter_map(|wanted| {
            let Some(found) = all.iter().find(|one| name(one) == name(wanted)) else {
                return Some(format!("{} is not there", name(wanted)));
            };
            let conditions = found.pointer("/status/conditions").and_then(Value::as_array);
            let so = |kind: &str| {
                conditions
                    .into_iter()
                    .flatten()
                    .any(|one| text(one, "/type") == kind && text(one, "/status") == "True")
            };
            (!so("Established") || !so("NamesAccepted"))
                .then(|| format!("{} is not served yet", name(wanted)))
        })
        .collect();
    if bad.is_empty() {
        return Check::ok(check, "served");
    }
    Check::bad(Verdict::Problem, check, "not all are served".to_owned(), bad, APPLY_CRDS)
        .because("Policies of these kinds cannot be written, and those that are there are not in force.")
}

/// Whether all that is in `wanted` is in `found`; the API server adds defaults.
fn within(wanted: &Value, found: &Value) -> bool {
    match (wanted, found) {
        (Value::Object(wanted), Value::Object(found)) => wanted.iter().all(|(key, wanted)| {
            within(wanted, found.get(key).unwrap_or(&Value::Null))
                || empty(wanted) && !found.contains_key(key)
        }),
        (Value::Array(wanted), Value::Array(found)) => {
            wanted.len() == found.len()
                && wanted.iter().zip(found).all(|(wanted, found)| within(wanted, found))
        }
        (Value::Number(wanted), Value::Number(found)) => wanted.as_f64() == found.as_f64(),
        _ => wanted == found,
    }
}

fn empty(value: &Value) -> bool {
    value.as_object().is_some_and(serde_json::Map::is_empty) || value == ""
}

fn definitions_current(facts: &Facts) -> Check {
    let check = "schemas";
    let all = facts.items(Fact::Definitions);
    let other: Vec<String> = ours("CustomResourceDefinition")
        .iter()
        .filter(|wanted| {
            let found = all.iter().find(|one| name(one) == name(wanted));
            found.is_some_and(|found| !within(&wanted["spec"]["versions"], &found["spec"]["versions"]))
        })
        .map(|one| name(one).to_owned())
        .collect();
    if other.is_empty() {
        return Check::ok(check, format!("those of {}", env!("CARGO_PKG_VERSION")));
    }
    Check::bad(Verdict::Warning, check, "of another version than this program".to_owned(), other, APPLY_CRDS)
        .because("Fields that control knows may be refused, and what it refuses may be accepted.")
}

fn account(facts: &Facts) -> Check {
    let check = "control's account";
    match facts.get(Fact::Account) {
        Answer::Found(_) => Check::ok(check, "penstock-control"),
        other => missing(
            check,
            "service account penstock-control",
            other,
            "Control's pods cannot start without it.",
        ),
    }
}

/// Compares the rules of a role.
fn compared(check: &'static str, kind: &str, answer: &Answer) -> Check {
    let why = "One right too few and control stops at what it may not do; one too many is whatever somebody who takes it over may do.";
    let Some(found) = answer.found() else { return missing(check, &kind.to_lowercase(), answer, why) };
    let wanted = ours(kind);
    let wanted = wanted.first().map(|role| granted(&role["rules"])).unwrap_or_default();
    let found = granted(&found["rules"]);
    let lists = |rights: &[String], others: &[String], word: &str| -> Vec<String> {
        rights.iter().filter(|right| !others.contains(right)).map(|right| format!("{word} {right}")).collect()
    };
    let (few, much) = (lists(&wanted, &found, "missing:"), lists(&found, &wanted, "too many:"));
    match (few.is_empty(), much.is_empty()) {
        (true, true) => {
            Check::ok(check, format!("{}, no more and no less", many(wanted.len(), "right", "rights")))
        }
        (false, _) => {
            let found = format!("{} missing", many(few.len(), "right is", "rights are"));
            Check::bad(Verdict::Problem, check, found, [few, much].concat(), APPLY).because(why)
        }
        _ => {
            let found = format!("{} not needed", many(much.len(), "right is", "rights are"));
            Check::bad(Verdict::Warning, check, found, much, APPLY).because(why)
        }
    }
}

/// The rules of a role one by one, sorted: `get pods`, `patch configmaps/penstock-anchors`.
pub(super) fn granted(rules: &Value) -> Vec<String> {
    let words = |rule: &Value, key: &str| -> Vec<String> {
        rule[key].as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let mut all = Vec::new();
    for rule in rules.as_array().into_iter().flatten() {
        let mut names = words(rule, "resourceNames");
        if names.is_empty() {
            names.push(String::new());
        }
        for (group, resource) in words(rule, "apiGroups")
            .iter()
            .flat_map(|group| words(rule, "resources").into_iter().map(move |of| (group.clone(), of)))
        {
            for (verb, name) in
                words(rule, "verbs").iter().flat_map(|verb| names.iter().map(move |name| (verb, name)))
            {
                let of = if group.is_empty() { resource.clone() } else { format!("{resource}.{group}") };
                let only = if name.is_empty() { String::new() } else { format!(" {name}") };
                all.push(format!("{verb} {of}{only}"));
            }
        }
    }
    all.sort();
    all.dedup();
    all
}

fn cluster_rights(facts: &Facts) -> Check {
    compared("rights in the cluster", "ClusterRole", facts.get(Fact::ClusterRole))
}

fn own_rights(facts: &Facts) -> Check {
    compared("rights at home", "Role", facts.get(Fact::Role))
}

fn bindings(facts: &Facts) -> Check {
    let check = "bindings";
    let why = "Control has its rights by them alone.";
    for fact in [Fact::ClusterRoleBinding, Fact::RoleBinding] {
        let Some(found) = facts.get(fact).found() else {
            return missing(check, "binding penstock-control", facts.get(fact), why);
        };
        let subjects = found["subjects"].as_array();
        let bound = subjects.into_iter().flatten().any(|subject| {
            text(subject, "/name") == "penstock-control" && text(subject, "/namespace") == NAMESPACE
        });
        if !bound || text(found, "/roleRef/name") != "penstock-control" {
            let told = format!("{} binds another account, or another role", text(found, "/kind"));
            return Check::bad(Verdict::Problem, check, told, Vec::new(), APPLY).because(why);
        }
    }
    Check::ok(check, "both roles are bound to control's account")
}

fn number(object: &Value, pointer: &str) -> u64 {
    object.pointer(pointer).and_then(Value::as_u64).unwrap_or_default()
}

fn deployed(facts: &Facts) -> Check {
    let check = "control";
    match facts.get(Fact::Deployment) {
        Answer::Found(found) => Check::ok(
            check,
            format!(
                "deployed, {} wanted",
                many(number(found, "/spec/replicas") as usize, "replica", "replicas")
            ),
        ),
        other => missing(check, "Deployment penstock-control", other, "It is what all else talks to."),
    }
}

/// What pods of control wait for or died of, one a line.
fn states(facts: &Facts) -> Vec<String> {
    facts
        .control()
        .flat_map(|pod| {
            let statuses = pod.pointer("/status/containerStatuses").and_then(Value::as_array);
            let waiting = statuses.into_iter().flatten().filter_map(|status| {
                let state = status.pointer("/state/waiting")?;
                Some(format!(
                    "{}: {} {}",
                    text(state, "/reason"),
                    text(state, "/message"),
                    text(status, "/image")
                ))
            });
            let pending = pod.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
            let pending = pending
                .filter(|one| text(one, "/type") == "PodScheduled" && text(one, "/status") == "False")
                .map(|one| text(one, "/message").to_owned());
            waiting.chain(pending).map(|what| format!("{}: {what}", name(pod))).collect::<Vec<_>>()
        })
        .collect()
}

fn replicas(facts: &Facts) -> Check {
    let check = "replicas";
    let Some(found) = facts.get(Fact::Deployment).found() else {
        return missing(
            check,
            "Deployment penstock-control",
            facts.get(Fact::Deployment),
            "Nobody would answer.",
        );
    };
    let (wanted, ready) = (number(found, "/spec/replicas"), number(found, "/status/readyReplicas"));
    let fix = "Look at what keeps them: kubectl -n penstock-system describe pods";
    let why =
        "Without any, no pod is injected and no certificate renewed; proxies go on with what they have.";
    match (ready, wanted) {
        (0, _) => Check::bad(Verdict::Problem, check, format!("0 of {wanted} ready"), states(facts), fix)
            .because(why),
        (ready, wanted) if ready < wanted => {
            Check::bad(Verdict::Warning, check, format!("{ready} of {wanted} ready"), states(facts), fix)
                .because(why)
        }
        (1, _) => Check::bad(
            Verdict::Warning,
            check,
            "1 ready, and no other".to_owned(),
            Vec::new(),
            "kubectl -n penstock-system scale deployment penstock-control --replicas 2",
        )
        .because("While it starts anew, no pod that asks for a sidecar can be made."),
        _ => Check::ok(check, format!("{ready} of {wanted} ready")),
    }
}

fn rollout(facts: &Facts) -> Check {
    let check = "rollout";
    let Some(found) = facts.get(Fact::Deployment).found() else {
        return Check::ok(check, "nothing to roll out");
    };
    let seen = number(found, "/status/observedGeneration") >= number(found, "/metadata/generation");
    let (all, updated) = (number(found, "/spec/replicas"), number(found, "/status/updatedReplicas"));
    if seen && updated >= all {
        return Check::ok(check, "all replicas are of the newest template");
    }
    let fix =
        "Wait for it, or take it back: kubectl -n penstock-system rollout status deployment/penstock-control";
    Check::bad(
        Verdict::Warning,
        check,
        format!("{updated} of {all} replicas are of the newest template"),
        Vec::new(),
        fix,
    )
    .because("Two versions push and inject side by side.")
}

fn version(facts: &Facts) -> Check {
    let check = "version";
    let Some(found) = facts.get(Fact::Deployment).found() else {
        return Check::ok(check, "nothing is deployed");
    };
    let image = text(found, "/spec/template/spec/containers/0/image");
    let tag = image.rsplit_once(':').map_or("", |(_, tag)| tag);
    if tag == env!("CARGO_PKG_VERSION") {
        return Check::ok(check, format!("{tag}, as this program"));
    }
    let fix = &format!("Use the program of that version, or upgrade: {APPLY}");
    let told = format!("{image}, and this program is {}", env!("CARGO_PKG_VERSION"));
    Check::bad(Verdict::Warning, check, told, Vec::new(), fix)
        .because("What this program says and installs is that of its own version.")
}

fn probes(facts: &Facts) -> Check {
    let check = "probes of control";
    let Some(found) = facts.get(Fact::Deployment).found() else {
        return Check::ok(check, "nothing is deployed");
    };
    const CONTAINER: &str = "/spec/template/spec/containers/0";
    let wanted = ours("Deployment");
    let other: Vec<String> = ["startupProbe", "readinessProbe", "livenessProbe"]
        .into_iter()
        .filter(|probe| {
            let of =
                |object: &Value| object.pointer(&format!("{CONTAINER}/{probe}")).cloned().unwrap_or_default();
            wanted.first().is_some_and(|wanted| !within(&of(wanted), &of(found)))
        })
        .map(str::to_owned)
        .collect();
    if other.is_empty() {
        return Check::ok(check, "a replica is ready when it serves the webhook");
    }
    Check::bad(Verdict::Warning, check, "not as this program installs them".to_owned(), other, APPLY)
        .because("A replica that cannot serve the webhook and counts as ready keeps pods that ask for a sidecar from being made.")
}

fn restarts(facts: &Facts) -> Check {
    let check = "restarts";
    let died: Vec<String> = facts
        .control()
        .filter_map(|pod| {
            let status = pod.pointer("/status/containerStatuses/0")?;
            let count = number(status, "/restartCount");
            let last = text(status, "/lastState/terminated/reason");
            (count > 0).then(|| format!("{}: {} times, last {last}", name(pod), count))
        })
        .collect();
    if died.is_empty() {
        return Check::ok(check, "none");
    }
    let fix = "Read its last words: kubectl -n penstock-system logs -p deployment/penstock-control";
    Check::bad(
        Verdict::Warning,
        check,
        format!("{} anew", many(died.len(), "replica has started", "replicas have started")),
        died,
        fix,
    )
    .because("Proxies connect again by themselves, but pods cannot be injected meanwhile.")
}

fn spread(facts: &Facts) -> Check {
    let check = "spread";
    let mut nodes: Vec<&str> = facts.control().map(|pod| text(pod, "/spec/nodeName")).collect();
    let pods = nodes.len();
    nodes.sort_unstable();
    nodes.dedup();
    if pods < 2 || nodes.len() > 1 {
        return Check::ok(
            check,
            format!("{} on {}", many(pods, "replica", "replicas"), many(nodes.len(), "node", "nodes")),
        );
    }
    let fix =
        "Once another node has room: kubectl -n penstock-system rollout restart deployment/penstock-control";
    Check::bad(Verdict::Warning, check, format!("all {pods} replicas are on {}", nodes[0]), Vec::new(), fix)
        .because("They go with that node.")
}

fn budget(facts: &Facts) -> Check {
    let check = "disruption budget";
    match facts.get(Fact::Budget) {
        Answer::Found(_) => Check::ok(check, "one replica at a time"),
        other => missing(
            check,
            "PodDisruptionBudget penstock-control",
            other,
            "A drain of nodes could take all replicas at once.",
        ),
    }
}

fn services(facts: &Facts) -> Check {
    let check = "Services";
    let why = "Sidecars and the API server find control by them.";
    for (fact, wanted) in [(Fact::ControlService, 15010), (Fact::WebhookService, 443)] {
        let Some(found) = facts.get(fact).found() else {
            return missing(check, "Service of control's", facts.get(fact), why);
        };
        let ports = found["spec"]["ports"].as_array();
        if !ports.into_iter().flatten().any(|port| number(port, "/port") == wanted) {
            let told = format!("{} has no port {wanted}", name(found));
            return Check::bad(Verdict::Problem, check, told, Vec::new(), APPLY).because(why);
        }
    }
    Check::ok(check, "penstock-control and penstock-webhook")
}

fn reached(facts: &Facts) -> Check {
    let check = "endpoints of control";
    if let other @ (Answer::Denied(_) | Answer::Failed(_)) = facts.get(Fact::Slices) {
        return unknown(check, "endpointslices", other);
    }
    let ready = |service: &str| -> usize {
        let slices = facts
            .items(Fact::Slices)
            .iter()
            .filter(|slice| label(slice, "kubernetes.io/service-name") == service);
        let endpoints = slices.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        endpoints
            .filter(|one| one.pointer("/conditions/ready").and_then(Value::as_bool) != Some(false))
            .count()
    };
    let (control, webhook) = (ready("penstock-control"), ready("penstock-webhook"));
    if control > 0 && webhook > 0 {
        return Check::ok(check, format!("{control} for sidecars, {webhook} for the webhook"));
    }
    let fix = "Is a replica ready, and do the labels fit? kubectl -n penstock-system get pods,endpointslices --show-labels";
    let told = format!("{control} for sidecars, {webhook} for the webhook");
    Check::bad(Verdict::Problem, check, told, Vec::new(), fix)
        .because("Nobody is reached through a Service without any: no injection, no certificates.")
}

fn network_policy(facts: &Facts) -> Check {
    let check = "network policy";
    match facts.get(Fact::NetworkPolicy) {
        Answer::Found(_) => Check::ok(check, "there; whether it holds is the network's doing"),
        Answer::Absent => Check::bad(Verdict::Warning, check, "there is none for control".to_owned(), Vec::new(), APPLY)
            .because("Any port of control's pods is reached from everywhere; its API is on loopback alone all the same."),
        other => unknown(check, "networkpolicies", other),
    }
}

fn held(facts: &Facts) -> Check {
    let check = "Lease";
    let fix = "Read what control says of it: kubectl -n penstock-system logs deployment/penstock-control";
    let why =
        "Whoever holds it writes statuses, certificates and trust anchors; without a holder nobody does.";
    let lease = match facts.get(Fact::Lease) {
        Answer::Found(lease) => lease,
        Answer::Absent => {
            return Check::bad(Verdict::Problem, check, "there is none yet".to_owned(), Vec::new(), fix)
                .because(why);
        }
        other => return unknown(check, "leases", other),
    };
    let holder = text(lease, "/spec/holderIdentity");
    if holder.is_empty() {
        return Check::bad(Verdict::Problem, check, "nobody holds it".to_owned(), Vec::new(), fix)
            .because(why);
    }
    if facts.control().any(|pod| holder.starts_with(name(pod))) {
        return Check::ok(check, format!("held by {holder}"));
    }
    Check::bad(
        Verdict::Warning,
        check,
        format!("held by {holder}, which is no pod of control"),
        Vec::new(),
        fix,
    )
    .because("Another replica takes it once it has ended.")
}

/// Seconds since the epoch of a time of the API.
fn seconds(time: &str) -> Option<f64> {
    time.parse::<k8s_openapi::jiff::Timestamp>().ok().map(|time| time.as_millisecond() as f64 / 1000.0)
}

fn renewed(facts: &Facts) -> Check {
    let check = "Lease renewed";
    let Some(lease) = facts.get(Fact::Lease).found() else {
        return Check::ok(check, "there is none to renew");
    };
    let length = number(lease, "/spec/leaseDurationSeconds").max(1) as f64;
    let Some(renewed) = seconds(text(lease, "/spec/renewTime")) else {
        return Check::ok(check, "it was never held");
    };
    // Written by the clock of control's node, seen by the API server's.
    let age = facts.now + facts.ahead.unwrap_or_default() - renewed;
    if age <= 2.0 * length {
        return Check::ok(check, format!("{} ago", units::age(age)));
    }
    let fix = "See why the holder cannot reach the API server: kubectl -n penstock-system logs deployment/penstock-control";
    let told = format!("{} ago, and it is good for {}", units::age(age), units::age(length));
    Check::bad(Verdict::Problem, check, told, Vec::new(), fix)
        .because("No replica writes: statuses are old, and trust anchors do not reach new namespaces.")
}

fn root(facts: &Facts) -> Check {
    let check = "root";
    let why = "It signs every identity of the mesh.";
    let secret = match facts.get(Fact::Root) {
        Answer::Found(secret) => secret,
        Answer::Absent => {
            let fix = "Control makes it when it starts: kubectl -n penstock-system logs deployment/penstock-control";
            return Check::bad(
                Verdict::Problem,
                check,
                "there is no Secret penstock-ca".to_owned(),
                Vec::new(),
                fix,
            )
            .because(why);
        }
        other => return unknown(check, "secrets", other),
    };
    match certificates::of_secret(secret, "tls.crt").into_iter().next() {
        Some(root) if !root.authority => Check::bad(
            Verdict::Problem,
            check,
            format!("{} may not sign others", root.subject),
            Vec::new(),
            "Supply one that may (basicConstraints CA:TRUE), in cert-manager `isCA: true`: kubectl -n penstock-system edit certificate",
        )
        .because(why),
        Some(root) => certificates::life(check, &root, facts.now, "penstock rotate-root").because(why),
        None => Check::bad(
            Verdict::Problem,
            check,
            "tls.crt of Secret penstock-ca is no certificate".to_owned(),
            Vec::new(),
            "Supply another, or have control make one: kubectl -n penstock-system delete secret penstock-ca",
        )
        .because(why),
    }
}

fn root_kept(facts: &Facts) -> Check {
    let check = "key of the root";
    let Some(secret) = facts.get(Fact::Root).found() else {
        return Check::ok(check, "there is none to keep");
    };
    let present = |key: &str| secret.pointer(&format!("/data/{key}")).is_some_and(|value| value != "");
    if let Some(missing) = ["tls.key", "ca.crt"].into_iter().find(|key| !present(key)) {
        let fix = "Supply it as cert-manager does: kubectl -n penstock-system create secret generic penstock-ca --type=kubernetes.io/tls \
                   --from-file=tls.crt --from-file=tls.key --from-file=ca.crt";
        let told = format!("Secret penstock-ca has no {missing}");
        return Check::bad(Verdict::Problem, check, told, Vec::new(), fix)
            .because("tls.key signs, and ca.crt is what others trust: control goes on with what it knew, and does not start anew.");
    }
    let made = label(secret, "penstock.io/made-by") == "control";
    Check::ok(
        check,
        if made { "made and rotated by control" } else { "supplied; whoever supplies it rotates it" },
    )
}

/// The text of a key of a ConfigMap.
fn bundle_of(map: &Value) -> &str {
    map.pointer("/data/anchors.pem").and_then(Value::as_str).unwrap_or_default()
}

fn anchors(facts: &Facts) -> Check {
    let check = "trust anchors";
    let maps = match facts.get(Fact::Anchors) {
        Answer::Found(_) => facts.items(Fact::Anchors),
        other => return unknown(check, "configmaps", other),
    };
    let why = "Injected pods mount them to know control; without them a pod does not start.";
    let fix = "Control writes them while it holds the Lease: kubectl -n penstock-system logs deployment/penstock-control";
    let Some(own) = maps.iter().find(|map| namespace(map) == NAMESPACE) else {
        return Check::bad(
            Verdict::Problem,
            check,
            "there is no ConfigMap penstock-anchors in penstock-system".to_owned(),
            Vec::new(),
            fix,
        )
        .because(why);
    };
    let known = certificates::read(bundle_of(own).as_bytes());
    if known.is_empty() {
        return Check::bad(
            Verdict::Problem,
            check,
            "anchors.pem has no certificate".to_owned(),
            Vec::new(),
            fix,
        )
        .because(why);
    }
    if let Some(root) =
        facts.get(Fact::Root).found().and_then(|root| certificates::of_secret(root, "tls.crt").pop())
        && !known.iter().any(|anchor| anchor.subject == root.issuer || anchor.subject == root.subject)
    {
        let told = format!("{} signs, and is not among them", root.subject);
        return Check::bad(Verdict::Problem, check, told, Vec::new(), fix)
            .because("Nobody would accept what is signed now.");
    }
    let mut places: Vec<&str> = facts.injecting().map(name).collect();
    places.extend(facts.injected().map(namespace));
    places.sort_unstable();
    places.dedup();
    let bad: Vec<String> = places
        .into_iter()
        .filter(|place| !EXEMPT.contains(place))
        .filter_map(|place| match maps.iter().find(|map| namespace(map) == place) {
            None => Some(format!("{place}: there are none")),
            Some(map) if bundle_of(map) != bundle_of(own) => Some(format!("{place}: other ones")),
            Some(_) => None,
        })
        .collect();
    if bad.is_empty() {
        return Check::ok(
            check,
            format!(
                "{} in {}",
                many(known.len(), "anchor", "anchors"),
                many(maps.len(), "namespace", "namespaces")
            ),
        );
    }
    Check::bad(Verdict::Problem, check, "not in every namespace that asks for sidecars".to_owned(), bad, fix)
        .because(why)
}

/// The webhook's registration.
fn registration(facts: &Facts) -> Option<&Value> {
    facts.items(Fact::Webhooks).iter().find(|webhook| name(webhook) == "penstock-injector")
}

fn webhook(facts: &Facts) -> Check {
    let check = "webhook";
    let why = "Pods get their sidecar from it; where it is another, some get none, or pods that never asked are held up.";
    let Some(found) = registration(facts) else {
        return match facts.get(Fact::Webhooks) {
            Answer::Found(_) => {
                missing(check, "MutatingWebhookConfiguration penstock-injector", &Answer::Absent, why)
            }
            other => unknown(check, "mutatingwebhookconfigurations", other),
        };
    };
    let wanted = ours("MutatingWebhookConfiguration");
    let other: Vec<String> = wanted
        .iter()
        .flat_map(|wanted| wanted["webhooks"].as_array().into_iter().flatten())
        .filter(|wanted| {
            let hooks = found["webhooks"].as_array();
            let same = hooks.into_iter().flatten().find(|hook| hook["name"] == wanted["name"]);
            same.is_none_or(|hook| !within(wanted, hook))
        })
        .map(|hook| text(hook, "/name").to_owned())
        .collect();
    if other.is_empty() {
        return Check::ok(check, "registered, and fails closed for whoever asked alone");
    }
    Check::bad(Verdict::Problem, check, "not as this program registers it".to_owned(), other, APPLY)
        .because(why)
}

/// The name by which the API server calls the webhook.
const HOST: &str = "penstock-webhook.penstock-system.svc";

fn webhook_certificate(facts: &Facts) -> Check {
    let check = "webhook's certificate";
    let secret = match facts.get(Fact::WebhookCertificate) {
        Answer::Found(secret) => secret,
        Answer::Absent => {
            let fix = "Control makes it once it holds the Lease: kubectl -n penstock-system logs deployment/penstock-control";
            return Check::bad(Verdict::Problem, check, "there is none".to_owned(), Vec::new(), fix)
                .because("The API server calls no webhook without one, and pods that ask for a sidecar cannot be made.");
        }
        other => return unknown(check, "secrets", other),
    };
    let fix = "kubectl -n penstock-system delete secret penstock-webhook-tls";
    match certificates::of_secret(secret, "tls.crt").into_iter().next() {
        Some(Held { names, .. }) if !names.iter().any(|name| name == HOST) => {
            let told = format!("it is for {}, and not for {HOST}", names.join(", "));
            Check::bad(Verdict::Problem, check, told, Vec::new(), fix)
        }
        Some(certificate) => certificates::life(check, &certificate, facts.now, fix),
        None => Check::bad(Verdict::Problem, check, "tls.crt is no certificate".to_owned(), Vec::new(), fix),
    }
    .because("The API server refuses the webhook, and with it all pods that ask for a sidecar.")
}

fn bundle(facts: &Facts) -> Check {
    let check = "caBundle";
    let Some(found) = registration(facts) else { return Check::ok(check, "no webhook is registered") };
    let Some(secret) = facts.get(Fact::WebhookCertificate).found() else {
        return Check::ok(check, "not compared: the webhook's certificate is not known");
    };
    let Some(serving) = certificates::of_secret(secret, "tls.crt").into_iter().next() else {
        return Check::ok(check, "not compared: there is no certificate");
    };
    let hooks = found["webhooks"].as_array();
    let bad: Vec<String> = hooks
        .into_iter()
        .flatten()
        .filter(|hook| {
            let trusted = certificates::of_base64(text(hook, "/clientConfig/caBundle"));
            !trusted.iter().any(|anchor| certificates::signs(anchor, &serving))
        })
        .map(|hook| text(hook, "/name").to_owned())
        .collect();
    if bad.is_empty() {
        return Check::ok(check, "has who signed the webhook's certificate");
    }
    let fix = "Control writes it while it holds the Lease: kubectl -n penstock-system rollout restart deployment/penstock-control";
    Check::bad(
        Verdict::Problem,
        check,
        "the webhook's certificate is signed by nobody in it".to_owned(),
        bad,
        fix,
    )
    .because("The API server refuses the webhook, and with it all pods that ask for a sidecar.")
}

/// Whether a version of the program is that of this one, or so near that both speak with each other.
pub(super) fn near(version: &str) -> bool {
    match (minor(version), minor(env!("CARGO_PKG_VERSION"))) {
        (Some(theirs), Some(ours)) => theirs.0 == ours.0 && theirs.1.abs_diff(ours.1) <= 1,
        _ => false,
    }
}
