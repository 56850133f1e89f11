//! What a cluster has to be before Penstock is installed on it. `penstock check` looks at it later too.

use serde_json::Value;

use super::facts::{EXEMPT, Fact, Facts, INJECT, annotation, label};
use super::{Check, Rule, Verdict, many};
use crate::cluster::{Answer, name, namespace, text};
use crate::install::NAMESPACE;

/// Native sidecars are there without a gate since this minor version of Kubernetes 1.
const SIDECARS: u32 = 29;
/// Kernels from this on have all of nf_tables that the redirect uses, for containers of any distribution.
const KERNEL: (u32, u32) = (5, 4);
/// Tokens and certificates are good from a moment on, and this much is forgiven nowhere.
const SKEW: f64 = 30.0;

/// Before installing.
pub(super) const ALL: [Rule; 24] = [
    version,
    clock,
    admission,
    reviews,
    definitions,
    slices,
    leases,
    gateway,
    rights,
    nodes,
    systems,
    kubelets,
    kernels,
    room,
    priority,
    families,
    meshes,
    injectors,
    sockets,
    own_definitions,
    own_namespace,
    leftovers,
    security,
    host_network,
];

/// Those that are worth a look afterwards too.
pub(super) const STAYING: [Rule; 14] = [
    version,
    clock,
    admission,
    reviews,
    gateway,
    nodes,
    kubelets,
    kernels,
    families,
    meshes,
    injectors,
    sockets,
    security,
    host_network,
];

/// Something could not be read, so nothing is said of it.
pub(super) fn unknown(name: &'static str, what: &str, answer: &Answer) -> Check {
    let found = format!("not known: {}", answer.trouble());
    let fix = format!("Run this as someone who may read {what}: kubectl auth can-i list {what}");
    Check::bad(Verdict::Warning, name, found, Vec::new(), &fix)
        .because("What cannot be read cannot be checked.")
}

/// The list that a check needs, or what to say without it.
pub(super) fn listed<'a>(
    facts: &'a Facts,
    fact: Fact,
    name: &'static str,
    what: &str,
) -> Result<&'a [Value], Check> {
    match facts.get(fact) {
        Answer::Found(_) => Ok(facts.items(fact)),
        other => Err(unknown(name, what, other)),
    }
}

/// `v1.34.4+k3s1`: 1 and 34.
pub(super) fn minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split(['.', '+', '-']);
    let mut number =
        || parts.next()?.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok();
    Some((number()?, number()?))
}

pub(super) fn version(facts: &Facts) -> Check {
    let check = "Kubernetes";
    let Some(found) = facts.get(Fact::Version).found() else {
        let fix = "Say which cluster is meant, and whether it is up: kubectl --context NAME version";
        let told = format!("the API server does not answer: {}", facts.get(Fact::Version).trouble());
        return Check::bad(Verdict::Problem, check, told, Vec::new(), fix)
            .because("Everything else is asked of it.");
    };
    let version = text(found, "/gitVersion");
    match minor(version) {
        Some(known) if known >= (1, SIDECARS) => Check::ok(check, version),
        _ => Check::bad(
            Verdict::Problem,
            check,
            format!("{version}, and 1.{SIDECARS} is needed"),
            Vec::new(),
            "Upgrade the cluster's control plane, then its nodes: kubectl version",
        )
        .because("A sidecar that is no native one starts after the application's init containers, and keeps Jobs from ending."),
    }
}

pub(super) fn clock(facts: &Facts) -> Check {
    let check = "clocks";
    match facts.ahead {
        None => Check::ok(check, "the API server does not tell its time"),
        Some(ahead) if ahead.abs() <= SKEW => Check::ok(check, format!("{:.0} s apart", ahead.abs())),
        Some(ahead) => {
            let way = if ahead > 0.0 { "ahead of" } else { "behind" };
            let found = format!("the API server's is {:.0} s {way} this machine's", ahead.abs());
            Check::bad(
                Verdict::Warning,
                check,
                found,
                Vec::new(),
                "Set both by NTP: timedatectl set-ntp true",
            )
            .because("A certificate is not yet good, or no longer, where the clock is another.")
        }
    }
}

/// Whether a version of a group is served.
fn served(facts: &Facts, group: &str, version: &str) -> Option<bool> {
    let groups = facts.get(Fact::Groups).found()?["groups"].as_array()?;
    let found = groups.iter().find(|known| text(known, "/name") == group);
    Some(found.is_some_and(|found| {
        found["versions"].as_array().into_iter().flatten().any(|known| text(known, "/version") == version)
    }))
}

fn group(facts: &Facts, check: &'static str, name: &str, version: &str, why: &'static str) -> Check {
    match served(facts, name, version) {
        None => unknown(check, "the API's groups", facts.get(Fact::Groups)),
        Some(true) => Check::ok(check, format!("{name}/{version}")),
        Some(false) => Check::bad(
            Verdict::Problem,
            check,
            format!("{name}/{version} is not served"),
            Vec::new(),
            "Have the API server serve it (--runtime-config): kubectl api-versions",
        )
        .because(why),
    }
}

fn admission(facts: &Facts) -> Check {
    let why = "Sidecars are injected by a webhook that is registered there.";
    group(facts, "admission", "admissionregistration.k8s.io", "v1", why)
}

fn reviews(facts: &Facts) -> Check {
    let why = "Control asks there whom a pod's token speaks for, before it signs a certificate.";
    group(facts, "token reviews", "authentication.k8s.io", "v1", why)
}

fn definitions(facts: &Facts) -> Check {
    group(facts, "custom resources", "apiextensions.k8s.io", "v1", "Policies are custom resources.")
}

fn slices(facts: &Facts) -> Check {
    group(facts, "endpoint slices", "discovery.k8s.io", "v1", "Endpoints are read from slices alone.")
}

fn leases(facts: &Facts) -> Check {
    let why = "A Lease says which replica of control writes.";
    group(facts, "leases", "coordination.k8s.io", "v1", why)
}

fn gateway(facts: &Facts) -> Check {
    let check = "Gateway API";
    match served(facts, "gateway.networking.k8s.io", "v1") {
        None => unknown(check, "the API's groups", facts.get(Fact::Groups)),
        Some(true) => {
            Check::ok(check, "v1, so HTTPRoutes and GRPCRoutes with a Service as parent are followed")
        }
        // Nothing is wrong without it, and control takes it up when it comes.
        Some(false) => Check::ok(
            check,
            "not installed: traffic is split by the annotation penstock.io/traffic-split alone",
        ),
    }
}

fn rights(facts: &Facts) -> Check {
    let check = "rights to install";
    let missing: Vec<String> = facts
        .rights
        .iter()
        .filter(|(_, allowed)| !allowed)
        .map(|(what, _)| format!("create {what}"))
        .collect();
    if facts.rights.is_empty() {
        return Check::bad(
            Verdict::Warning,
            check,
            "not known: the API server reviews no access".to_owned(),
            Vec::new(),
            "Try: kubectl auth can-i create clusterroles",
        )
        .because("An installation that stops in the middle leaves half of it.");
    }
    if missing.is_empty() {
        return Check::ok(check, format!("all {} kinds may be created", facts.rights.len()));
    }
    Check::bad(
        Verdict::Problem,
        check,
        format!("{} missing", many(missing.len(), "right is", "rights are")),
        missing,
        "Install as an administrator: kubectl create clusterrolebinding installer --clusterrole cluster-admin --user YOU",
    )
    .because("An installation that stops in the middle leaves half of it.")
}

fn ready(node: &Value) -> bool {
    node.pointer("/status/conditions")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .any(|condition| text(condition, "/type") == "Ready" && text(condition, "/status") == "True")
}

fn nodes(facts: &Facts) -> Check {
    let check = "nodes";
    let nodes = match listed(facts, Fact::Nodes, check, "nodes") {
        Ok(nodes) => nodes,
        Err(check) => return check,
    };
    let down: Vec<String> =
        nodes.iter().filter(|node| !ready(node)).map(|node| name(node).to_owned()).collect();
    let gpus = nodes.iter().filter(|node| !text(node, "/status/capacity/nvidia.com~1gpu").is_empty()).count();
    if nodes.is_empty() || down.len() == nodes.len() {
        let fix = "Look at what the kubelets say: kubectl describe nodes";
        return Check::bad(Verdict::Problem, check, "none is ready".to_owned(), down, fix)
            .because("Control has to run somewhere.");
    }
    if !down.is_empty() {
        let found = format!("{} of {} not ready", down.len(), nodes.len());
        return Check::bad(Verdict::Warning, check, found, down, "Look at why: kubectl describe node NAME")
            .because("Their pods count as endpoints until Kubernetes takes them away.");
    }
    Check::ok(check, format!("{} ready, {gpus} with GPUs", nodes.len()))
}

/// Nodes for which `wrong` has something to say.
fn of_nodes(
    facts: &Facts,
    check: &'static str,
    wrong: impl Fn(&Value) -> Option<String>,
) -> Result<Vec<String>, Check> {
    let nodes = listed(facts, Fact::Nodes, check, "nodes")?;
    Ok(nodes.iter().filter_map(|node| wrong(node).map(|what| format!("{}: {what}", name(node)))).collect())
}

fn systems(facts: &Facts) -> Check {
    let check = "systems of nodes";
    let wrong = of_nodes(facts, check, |node| {
        let (system, machine) =
            (text(node, "/status/nodeInfo/operatingSystem"), text(node, "/status/nodeInfo/architecture"));
        let fits = system == "linux" && ["amd64", "arm64"].contains(&machine);
        (!fits).then(|| format!("{system}/{machine}"))
    });
    match wrong {
        Err(check) => check,
        Ok(wrong) if wrong.is_empty() => Check::ok(check, "Linux on amd64 or arm64"),
        Ok(wrong) => Check::bad(
            Verdict::Warning,
            check,
            format!("{} of another kind", many(wrong.len(), "node is", "nodes are")),
            wrong,
            "Keep meshed pods off them: kubectl taint node NAME penstock.io/no-sidecar=:NoSchedule",
        )
        .because("There is no image of the sidecar for them, so a pod that got one would not start there."),
    }
}

fn kubelets(facts: &Facts) -> Check {
    let check = "kubelets";
    let wrong = of_nodes(facts, check, |node| {
        let version = text(node, "/status/nodeInfo/kubeletVersion");
        minor(version).is_none_or(|known| known < (1, SIDECARS)).then(|| version.to_owned())
    });
    match wrong {
        Err(check) => check,
        Ok(wrong) if wrong.is_empty() => Check::ok(check, format!("all know native sidecars (1.{SIDECARS})")),
        Ok(wrong) => Check::bad(
            Verdict::Problem,
            check,
            format!("{} before 1.{SIDECARS}", many(wrong.len(), "is", "are")),
            wrong,
            "Upgrade the nodes: kubectl drain NODE --ignore-daemonsets, then the kubelet",
        )
        .because(
            "They take a native sidecar for an init container that never ends, so the pod never starts.",
        ),
    }
}

fn kernels(facts: &Facts) -> Check {
    let check = "kernels";
    let wrong = of_nodes(facts, check, |node| {
        let version = text(node, "/status/nodeInfo/kernelVersion");
        minor(version).is_none_or(|known| known < KERNEL).then(|| version.to_owned())
    });
    let (major, least) = KERNEL;
    match wrong {
        Err(check) => check,
        Ok(wrong) if wrong.is_empty() => Check::ok(check, format!("{major}.{least} or newer, with nf_tables as far as versions tell")),
        Ok(wrong) => Check::bad(
            Verdict::Warning,
            check,
            format!("{} older than {major}.{least}", many(wrong.len(), "is", "are")),
            wrong,
            "Try it there: kubectl debug node/NAME -it --image busybox -- grep nf_tables /proc/modules",
        )
        .because("The redirect is laid with nf_tables; where the kernel has none, penstock-init fails and the pod does not start."),
    }
}

fn room(facts: &Facts) -> Check {
    let check = "room for two replicas";
    let nodes = match listed(facts, Fact::Nodes, check, "nodes") {
        Ok(nodes) => nodes,
        Err(check) => return check,
    };
    let open = nodes
        .iter()
        .filter(|node| {
            ready(node) && node.pointer("/spec/unschedulable").and_then(Value::as_bool) != Some(true)
        })
        .count();
    if open >= 2 {
        return Check::ok(check, format!("{open} nodes take pods"));
    }
    let fix = "Add a node, or accept it: penstock install --replicas 1 | kubectl apply -f -";
    Check::bad(Verdict::Warning, check, many(open, "node takes pods", "nodes take pods"), Vec::new(), fix)
        .because(
            "Where both replicas are on one node, no pod is injected while it is away; those that run go on.",
        )
}

fn priority(facts: &Facts) -> Check {
    let check = "priority class";
    match facts.get(Fact::PriorityClass) {
        Answer::Found(_) => Check::ok(check, "system-cluster-critical"),
        Answer::Absent => Check::bad(
            Verdict::Problem,
            check,
            "there is no system-cluster-critical".to_owned(),
            Vec::new(),
            "It is made by the API server; look what keeps it from that: kubectl get priorityclasses",
        )
        .because("Control's pods are refused without it."),
        other => unknown(check, "priorityclasses", other),
    }
}

fn families(facts: &Facts) -> Check {
    let check = "IP families";
    let Some(service) = facts.get(Fact::Kubernetes).found() else {
        return unknown(check, "services", facts.get(Fact::Kubernetes));
    };
    let addresses: Vec<&str> =
        service["spec"]["clusterIPs"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let (six, four) = (
        addresses.iter().any(|address| address.contains(':')),
        addresses.iter().any(|address| address.contains('.')),
    );
    match (four, six) {
        (true, true) => Check::ok(check, "IPv4 and IPv6"),
        (false, true) => Check::bad(
            Verdict::Problem,
            check,
            "IPv6 alone".to_owned(),
            Vec::new(),
            "Have control listen on IPv6: penstock install | sed 's/=0\\.0\\.0\\.0:/=[::]:/' | kubectl apply -f -",
        )
        .because("Control listens on IPv4 unless told otherwise, so nobody would reach it."),
        _ => Check::ok(check, "IPv4"),
    }
}

/// Whether the pod has a container of this name.
fn has_container(pod: &Value, name: &str) -> bool {
    ["/spec/containers", "/spec/initContainers"].into_iter().any(|list| {
        pod.pointer(list)
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .any(|one| text(one, "/name") == name)
    })
}

fn meshes(facts: &Facts) -> Check {
    let check = "other meshes";
    let namespaces = match listed(facts, Fact::Namespaces, check, "namespaces") {
        Ok(namespaces) => namespaces,
        Err(check) => return check,
    };
    let others = |namespace: &Value| {
        [
            ("istio-injection", "enabled"),
            ("istio.io/dataplane-mode", "ambient"),
            ("kuma.io/sidecar-injection", "enabled"),
        ]
        .iter()
        .any(|(key, value)| label(namespace, key) == *value)
            || annotation(namespace, "linkerd.io/inject") == "enabled"
    };
    let mut twice: Vec<String> = namespaces
        .iter()
        .filter(|namespace| others(namespace) && label(namespace, INJECT) == "enabled")
        .map(|namespace| format!("namespace {}", name(namespace)))
        .collect();
    twice.extend(facts.injected().filter_map(|pod| {
        let other = ["istio-proxy", "linkerd-proxy", "kuma-sidecar"]
            .into_iter()
            .find(|name| has_container(pod, name))?;
        Some(format!("pod {}/{} has {other} too", namespace(pod), name(pod)))
    }));
    if !twice.is_empty() {
        return Check::bad(
            Verdict::Problem,
            check,
            "two meshes for the same pods".to_owned(),
            twice,
            "Choose one of them: kubectl label namespace NAME penstock.io/inject-",
        )
        .because("Each redirects the same traffic to itself, and only one of them gets it.");
    }
    let beside = namespaces.iter().filter(|namespace| others(namespace)).count();
    Check::ok(
        check,
        if beside == 0 {
            "none".to_owned()
        } else {
            format!("in {} that Penstock leaves alone", many(beside, "namespace", "namespaces"))
        },
    )
}

/// What other injectors are called.
const INJECTORS: [&str; 5] = ["istio", "linkerd", "kuma", "consul", "osm"];

fn injectors(facts: &Facts) -> Check {
    let check = "other injectors";
    let webhooks = match listed(facts, Fact::Webhooks, check, "mutatingwebhookconfigurations") {
        Ok(webhooks) => webhooks,
        Err(check) => return check,
    };
    let pods = |hook: &Value| {
        hook["rules"].as_array().into_iter().flatten().any(|rule| {
            rule["resources"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|of| [Some("pods"), Some("*"), Some("*/*")].contains(&of.as_str()))
        })
    };
    // A webhook for all pods that fails closed and has no answer keeps control itself from starting.
    let wide: Vec<String> = webhooks
        .iter()
        .filter(|webhook| name(webhook) != "penstock-injector")
        .flat_map(|webhook| {
            webhook["webhooks"].as_array().into_iter().flatten().map(move |hook| (webhook, hook))
        })
        .filter(|(_, hook)| {
            let everywhere = hook["namespaceSelector"].as_object().is_none_or(serde_json::Map::is_empty)
                && hook["objectSelector"].as_object().is_none_or(serde_json::Map::is_empty);
            pods(hook) && everywhere && text(hook, "/failurePolicy") != "Ignore"
        })
        .map(|(webhook, hook)| format!("{}: {}", name(webhook), text(hook, "/name")))
        .collect();
    if !wide.is_empty() {
        return Check::bad(
            Verdict::Warning,
            check,
            format!(
                "{} pods of every namespace and fails closed",
                many(wide.len(), "webhook changes", "webhooks change")
            ),
            wide,
            "Exempt penstock-system in its namespaceSelector: kubectl edit mutatingwebhookconfiguration NAME",
        )
        .because("While it does not answer, control's pods cannot start, and no pod of the mesh either.");
    }
    let known =
        webhooks.iter().filter(|webhook| INJECTORS.iter().any(|mesh| name(webhook).contains(mesh))).count();
    Check::ok(
        check,
        if known == 0 { "none".to_owned() } else { format!("{known}, in namespaces of their own") },
    )
}

fn sockets(facts: &Facts) -> Check {
    let check = "load balancing in sockets";
    let pods = match listed(facts, Fact::Pods, check, "pods") {
        Ok(pods) => pods,
        Err(check) => return check,
    };
    let cilium = pods.iter().any(|pod| label(pod, "k8s-app") == "cilium");
    if !cilium {
        return Check::ok(check, "none");
    }
    let fix = "Have it leave pods alone: kubectl -n kube-system patch configmap cilium-config --type merge -p \
               '{\"data\":{\"bpf-lb-sock-hostns-only\":\"true\"}}', then restart its pods";
    Check::bad(Verdict::Warning, check, "Cilium is here; whether it is on in pods cannot be seen".to_owned(), Vec::new(), fix)
        .because("It replaces a Service's address by a pod's before the sidecar sees it, so routes of the Service do not hold.")
}

fn own_definitions(facts: &Facts) -> Check {
    let check = "definitions that are there";
    let all = match listed(facts, Fact::Definitions, check, "customresourcedefinitions") {
        Ok(all) => all,
        Err(check) => return check,
    };
    let ours: Vec<&Value> = all.iter().filter(|one| text(one, "/spec/group") == "penstock.io").collect();
    let strange: Vec<String> = ours
        .iter()
        .filter(|one| {
            let stored = one.pointer("/status/storedVersions").and_then(Value::as_array);
            stored.into_iter().flatten().any(|version| version != "v1alpha1")
        })
        .map(|one| name(one).to_owned())
        .collect();
    if strange.is_empty() {
        return Check::ok(
            check,
            if ours.is_empty() { "none".to_owned() } else { format!("{}, which are kept", ours.len()) },
        );
    }
    Check::bad(
        Verdict::Problem,
        check,
        "objects are stored in versions that this one does not know".to_owned(),
        strange,
        "Use the penstock that installed them: kubectl get crd -o custom-columns=N:.metadata.name,V:.status.storedVersions",
    )
    .because("The API server refuses a definition without a version that it has stored.")
}

fn own_namespace(facts: &Facts) -> Check {
    let check = "penstock-system";
    let all = match listed(facts, Fact::Namespaces, check, "namespaces") {
        Ok(all) => all,
        Err(check) => return check,
    };
    match all.iter().find(|namespace| name(namespace) == NAMESPACE) {
        None => Check::ok(check, "not there yet"),
        Some(found) if text(found, "/status/phase") == "Terminating" => Check::bad(
            Verdict::Problem,
            check,
            "it is being deleted".to_owned(),
            Vec::new(),
            "Wait until it is gone: kubectl wait --for=delete namespace/penstock-system --timeout=5m",
        )
        .because("Nothing can be made in it until then."),
        Some(_) => Check::ok(check, "there; what is in it is brought up to date"),
    }
}

fn leftovers(facts: &Facts) -> Check {
    let check = "leftovers";
    let webhook = facts.items(Fact::Webhooks).iter().any(|webhook| name(webhook) == "penstock-injector");
    if webhook && facts.get(Fact::Deployment) == &Answer::Absent {
        return Check::bad(
            Verdict::Problem,
            check,
            "the webhook is registered, and no control is there to answer it".to_owned(),
            Vec::new(),
            "Install, or delete it: kubectl delete mutatingwebhookconfiguration penstock-injector",
        )
        .because("It fails closed, so pods that ask for a sidecar cannot be made.");
    }
    Check::ok(check, "none")
}

/// Where a pod's own init container, which lays the redirect, is allowed.
fn security(facts: &Facts) -> Check {
    let check = "pod security";
    if let Err(check) = listed(facts, Fact::Namespaces, check, "namespaces") {
        return check;
    }
    let strict: Vec<String> = facts
        .injecting()
        .filter_map(|namespace| {
            let level = label(namespace, "pod-security.kubernetes.io/enforce");
            ["baseline", "restricted"].contains(&level).then(|| format!("{}: {level}", name(namespace)))
        })
        .collect();
    if strict.is_empty() {
        return Check::ok(check, "no namespace that asks for sidecars forbids them");
    }
    Check::bad(
        Verdict::Problem,
        check,
        format!("{} sidecars and forbids them", many(strict.len(), "namespace asks for", "namespaces ask for")),
        strict,
        "Let the redirect be laid: kubectl label namespace NAME pod-security.kubernetes.io/enforce=privileged --overwrite",
    )
    .because("penstock-init needs NET_ADMIN, which these standards refuse, so the pods would not be made.")
}

fn host_network(facts: &Facts) -> Check {
    let check = "host network";
    let pods = match listed(facts, Fact::Pods, check, "pods") {
        Ok(pods) => pods,
        Err(check) => return check,
    };
    let outside: Vec<String> = pods
        .iter()
        .filter(|pod| facts.wanted(namespace(pod)) && !EXEMPT.contains(&namespace(pod)))
        .filter(|pod| pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) == Some(true))
        .map(|pod| format!("{}/{}", namespace(pod), name(pod)))
        .collect();
    if outside.is_empty() {
        return Check::ok(check, "no pod of the mesh is on it");
    }
    Check::bad(
        Verdict::Warning,
        check,
        format!("{} it in namespaces that ask for sidecars", many(outside.len(), "pod uses", "pods use")),
        outside,
        "Say that it is meant: kubectl label pod NAME penstock.io/inject=disabled, in its template",
    )
    .because("Rules in its network would be the node's, so they get no sidecar, and speak plaintext.")
}
