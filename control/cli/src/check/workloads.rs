//! Whether pods have the sidecars that they asked for, those work, and routes and policies are in force.

use std::collections::BTreeMap;

use penstock_api::names::annotation::INJECTED_BY;
use penstock_inject::{INIT, PROXY};
use serde_json::Value;

use super::before::{listed, unknown};
use super::facts::{EXEMPT, Fact, Facts, INJECT, annotation, label};
use super::installed::near;
use super::{Check, Rule, Verdict, many};
use crate::cluster::{Answer, name, namespace, text};
use crate::install::APPLY;

/// Of what runs in the mesh.
pub(super) const ALL: [Rule; 11] = [
    injects,
    missed,
    not_injected,
    versions,
    ready,
    restarts,
    redirected,
    accounts,
    routes,
    accepted,
    programmed,
];

/// Lines of details at most; a cluster has thousands of pods.
const SHOWN: usize = 20;

fn cut(mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > SHOWN {
        let more = lines.len() - SHOWN;
        lines.truncate(SHOWN);
        lines.push(format!("and {more} more"));
    }
    lines
}

fn place(object: &Value) -> String {
    format!("{}/{}", namespace(object), name(object))
}

/// Sends a pod through the webhook that is never made.
fn injects(facts: &Facts) -> Check {
    let check = "injection";
    let fix = "Is the webhook reached from the API server (a firewall, port 9443)? kubectl -n penstock-system logs deployment/penstock-control";
    let why = "It fails closed, so pods that ask for a sidecar cannot be made.";
    match facts.get(Fact::Injection) {
        Answer::Found(pod) if sidecar(pod).is_some() => Check::ok(check, "a pod on trial got its sidecar"),
        Answer::Found(_) => {
            Check::bad(Verdict::Problem, check, "a pod on trial got no sidecar".to_owned(), Vec::new(), APPLY)
                .because("Pods that ask for a sidecar start without one, and speak plaintext.")
        }
        Answer::Failed(said) => {
            Check::bad(Verdict::Problem, check, said.clone(), Vec::new(), fix).because(why)
        }
        other => unknown(check, "pods", other),
    }
}

/// The spec of a pod's sidecar.
fn sidecar(pod: &Value) -> Option<&Value> {
    pod["spec"]["initContainers"].as_array()?.iter().find(|one| text(one, "/name") == PROXY)
}

/// What is known of one of a pod's init containers, sidecars among them.
fn status<'a>(pod: &'a Value, container: &str) -> Option<&'a Value> {
    pod["status"]["initContainerStatuses"].as_array()?.iter().find(|one| text(one, "/name") == container)
}

fn over(pod: &Value) -> bool {
    ["Succeeded", "Failed"].contains(&text(pod, "/status/phase"))
}

fn missed(facts: &Facts) -> Check {
    let check = "pods without sidecars";
    let pods = match listed(facts, Fact::Pods, check, "pods") {
        Ok(pods) => pods,
        Err(check) => return check,
    };
    let bare: Vec<String> = pods
        .iter()
        .filter(|pod| !EXEMPT.contains(&namespace(pod)) && !over(pod) && sidecar(pod).is_none())
        .filter(|pod| pod.pointer("/spec/hostNetwork").and_then(Value::as_bool) != Some(true))
        .filter_map(|pod| Some(format!("{}{}: {}", place(pod), owner(pod), slipped(facts, pod)?)))
        .collect();
    if bare.is_empty() {
        return Check::ok(
            check,
            format!("none; {} a sidecar", many(facts.injected().count(), "pod has", "pods have")),
        );
    }
    Check::bad(
        Verdict::Problem,
        check,
        format!("{} for one and without", many(bare.len(), "pod asks", "pods ask")),
        cut(bare),
        "Have it made anew, now that the webhook is there: kubectl -n NAMESPACE rollout restart KIND NAME, or delete a pod that nobody owns",
    )
    .because("They speak plaintext, and pods that ask for mutual TLS refuse them.")
}

/// Why a pod that asks for a sidecar may have none; none: it asks for none.
fn slipped(facts: &Facts, pod: &Value) -> Option<&'static str> {
    let (labelled, annotated) = (label(pod, INJECT), annotation(pod, INJECT));
    if [labelled, annotated].contains(&"disabled") {
        return None;
    }
    if labelled == "enabled" {
        return Some("it has the label, and was made while no webhook was registered");
    }
    if facts.wanted(namespace(pod)) {
        return Some("its namespace asks; it is older than that, or than the webhook");
    }
    // API servers choose by labels whom they ask a webhook for.
    (annotated == "enabled").then_some(
        "it asks by its annotation, which counts in labelled namespaces alone: write the label of that name into its template",
    )
}

/// Who makes it anew, in brackets.
fn owner(pod: &Value) -> String {
    let owners = pod.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    let controls = |one: &&Value| one["controller"] == true;
    match owners.and_then(|owners| owners.iter().find(controls)) {
        Some(one) => format!(" ({} {})", text(one, "/kind"), text(one, "/name")),
        None => String::new(),
    }
}

fn not_injected(facts: &Facts) -> Check {
    let check = "told not to be injected";
    if let other @ (Answer::Denied(_) | Answer::Failed(_)) = facts.get(Fact::Events) {
        return unknown(check, "events", other);
    }
    let told: Vec<String> = facts
        .items(Fact::Events)
        .iter()
        .map(|event| {
            format!(
                "{}/{}: {}",
                text(event, "/regarding/namespace"),
                text(event, "/regarding/name"),
                text(event, "/note")
            )
        })
        .collect();
    if told.is_empty() {
        return Check::ok(check, "no pod lately");
    }
    let fix = "Read why: kubectl get events -A --field-selector reason=NotInjected";
    Check::bad(Verdict::Warning, check, many(told.len(), "event", "events"), cut(told), fix)
        .because("These pods asked for a sidecar and could have none.")
}

fn versions(facts: &Facts) -> Check {
    let check = "versions of sidecars";
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut far = Vec::new();
    for pod in facts.injected() {
        let version = annotation(pod, INJECTED_BY);
        *counts.entry(version).or_default() += 1;
        if !near(version) {
            far.push(format!("{}: {version:?}", place(pod)));
        }
    }
    let told: Vec<String> = counts.iter().map(|(version, count)| format!("{count} of {version}")).collect();
    if !far.is_empty() {
        let fix = "Start their workloads anew: kubectl -n NAMESPACE rollout restart deployment";
        return Check::bad(Verdict::Warning, check, told.join(", "), cut(far), fix)
            .because("Sidecars and control of neighbouring minor versions speak with each other; of others that is not tested.");
    }
    Check::ok(check, if told.is_empty() { "no pod has one".to_owned() } else { told.join(", ") })
}

fn ready(facts: &Facts) -> Check {
    let check = "sidecars ready";
    let (mut all, mut not) = (0, Vec::new());
    for pod in facts.injected().filter(|pod| !over(pod)) {
        all += 1;
        let state = status(pod, PROXY);
        if state.and_then(|state| state["ready"].as_bool()) != Some(true) {
            let waits = state.map_or("", |state| text(state, "/state/waiting/reason"));
            not.push(format!("{}: {}", place(pod), if waits.is_empty() { "not ready" } else { waits }));
        }
    }
    if not.is_empty() {
        return Check::ok(check, format!("all {all}"));
    }
    let fix = "Read what it waits for: kubectl -n NAMESPACE logs POD -c penstock-proxy";
    Check::bad(Verdict::Problem, check, format!("{} of {all} not", not.len()), cut(not), fix)
        .because("The application does not start before its sidecar has a certificate and a configuration.")
}

fn restarts(facts: &Facts) -> Check {
    let check = "sidecars started anew";
    let died: Vec<String> = facts
        .injected()
        .filter_map(|pod| {
            let state = status(pod, PROXY)?;
            let count = state["restartCount"].as_u64().filter(|count| *count > 0)?;
            Some(format!(
                "{}: {count} times, last {}",
                place(pod),
                text(state, "/lastState/terminated/reason")
            ))
        })
        .collect();
    if died.is_empty() {
        return Check::ok(check, "none");
    }
    let fix = "Read its last words, and give it more memory where it was OOMKilled (penstock.io/proxy-memory): kubectl -n NAMESPACE logs POD -c penstock-proxy -p";
    Check::bad(Verdict::Warning, check, many(died.len(), "sidecar", "sidecars"), cut(died), fix)
        .because("Requests that were in flight were lost with it.")
}

fn redirected(facts: &Facts) -> Check {
    let check = "redirect";
    let failed: Vec<String> = facts
        .injected()
        .filter_map(|pod| {
            let state = status(pod, INIT)?;
            let ends = ["/state/terminated", "/lastState/terminated"];
            let end = ends.into_iter().find_map(|pointer| state.pointer(pointer))?;
            let code = end["exitCode"].as_i64().filter(|code| *code != 0)?;
            (state["ready"].as_bool() != Some(true)).then(|| format!("{}: exit status {code}", place(pod)))
        })
        .collect();
    if failed.is_empty() {
        return Check::ok(check, "laid wherever it was tried");
    }
    let fix = "Read why: kubectl -n NAMESPACE logs POD -c penstock-init";
    Check::bad(
        Verdict::Problem,
        check,
        format!("{} without it", many(failed.len(), "pod is", "pods are")),
        cut(failed),
        fix,
    )
    .because("A pod whose traffic is not redirected must not start, and does not.")
}

fn accounts(facts: &Facts) -> Check {
    let check = "identities";
    let shared: Vec<String> = facts
        .injected()
        .filter(|pod| ["", "default"].contains(&text(pod, "/spec/serviceAccountName")))
        .map(place)
        .collect();
    if shared.is_empty() {
        return Check::ok(check, "each has a service account of its own choosing");
    }
    let fix = "kubectl -n NAMESPACE create serviceaccount NAME && kubectl -n NAMESPACE set serviceaccount deployment NAME NAME";
    Check::bad(
        Verdict::Warning,
        check,
        format!("{} the account `default`", many(shared.len(), "pod has", "pods have")),
        cut(shared),
        fix,
    )
    .because("The service account is the identity: no policy can tell these pods apart.")
}

/// Conditions of an object that control wrote and that say no.
fn refused(conditions: &Value, kinds: &[&str]) -> Option<String> {
    conditions.as_array()?.iter().find_map(|one| {
        let said = kinds.contains(&text(one, "/type")) && text(one, "/status") == "False";
        said.then(|| format!("{}: {}", text(one, "/reason"), text(one, "/message")))
    })
}

/// Routes of both kinds, and the pools that they lead to.
const ROUTES: [Fact; 3] = [Fact::Routes, Fact::GrpcRoutes, Fact::Pools];

fn routes(facts: &Facts) -> Check {
    let check = "routes";
    if ROUTES.iter().all(|fact| matches!(facts.get(*fact), Answer::Absent)) {
        return Check::ok(check, "no Gateway API, so none");
    }
    for fact in ROUTES {
        if let other @ (Answer::Denied(_) | Answer::Failed(_)) = facts.get(fact) {
            return unknown(check, "httproutes,grpcroutes,inferencepools", other);
        }
    }
    let all = || ROUTES.iter().flat_map(|fact| facts.items(*fact));
    let bad: Vec<String> = all()
        .filter_map(|route| {
            let parents = route.pointer("/status/parents").and_then(Value::as_array)?;
            let ours =
                parents.iter().filter(|parent| text(parent, "/controllerName") == "penstock.io/control");
            let why = ours
                .into_iter()
                .find_map(|parent| refused(&parent["conditions"], &["Accepted", "ResolvedRefs"]))?;
            Some(format!("{}: {why}", place(route)))
        })
        .collect();
    if bad.is_empty() {
        return Check::ok(
            check,
            format!("{}, none refused", many(all().count(), "route or pool", "routes and pools")),
        );
    }
    let fix =
        "Correct what its status names: kubectl -n NAMESPACE describe httproutes,grpcroutes,inferencepools";
    Check::bad(Verdict::Problem, check, format!("{} refused", many(bad.len(), "is", "are")), cut(bad), fix)
        .because("Its last good version is in force, or none.")
}

/// Objects of Penstock's own.
const POLICIES: [Fact; 4] = [Fact::AccessPolicies, Fact::Canaries, Fact::InferencePolicies, Fact::RateLimits];

/// The same, as `kubectl` takes them.
const POLICY_KINDS: &str = "accesspolicies,canaries,inferencepolicies,ratelimits";

/// Policies for which `wrong` has something to say.
fn policies(facts: &Facts, kinds: &[&str]) -> Vec<String> {
    POLICIES
        .into_iter()
        .flat_map(|fact| facts.items(fact))
        .filter_map(|policy| {
            Some(format!(
                "{} {}: {}",
                text(policy, "/kind"),
                place(policy),
                refused(&policy["status"]["conditions"], kinds)?
            ))
        })
        .collect()
}

fn accepted(facts: &Facts) -> Check {
    let check = "policies";
    for fact in POLICIES {
        if let other @ (Answer::Denied(_) | Answer::Failed(_)) = facts.get(fact) {
            return unknown(check, POLICY_KINDS, other);
        }
    }
    let bad = policies(facts, &["Accepted", "ResolvedRefs"]);
    let count: usize = POLICIES.into_iter().map(|fact| facts.items(fact).len()).sum();
    if bad.is_empty() {
        return Check::ok(check, format!("{}, none refused", many(count, "policy", "policies")));
    }
    let fix = format!("Correct what its status names: kubectl -n NAMESPACE describe {POLICY_KINDS}");
    Check::bad(Verdict::Problem, check, format!("{} refused", many(bad.len(), "is", "are")), cut(bad), &fix)
        .because("An access policy that makes no sense denies everything to whom it is about; a canary moves nothing any more.")
}

fn programmed(facts: &Facts) -> Check {
    let check = "policies in force";
    let bad = policies(facts, &["Programmed"]);
    if bad.is_empty() {
        return Check::ok(check, "none says otherwise");
    }
    let fix = "See which proxies lag: kubectl -n penstock-system port-forward svc/penstock-control 8080 & penstock status";
    Check::bad(
        Verdict::Warning,
        check,
        format!("{} yet in force everywhere", many(bad.len(), "is not", "are not")),
        cut(bad),
        fix,
    )
    .because("Until then some proxies hold the version before.")
}
