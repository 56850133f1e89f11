//! Access policies: which workloads each is about, and what its rules are.
//!
//! A policy that cannot be understood is refused as every object is: its last good version stays in force. Where there is
//! none, it fails safe: it denies everything to the workloads that it is about, to all of its namespace if even those
//! cannot be read, and says so in every answer. An Audit, which changes nothing, is left out.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use penstock_api::ServiceName;
use penstock_api::access::{self, Pattern};
use penstock_api::names::{self, annotation};
use penstock_api::resource::Kind;
use penstock_api::v1::{self, access_policy::Effect};
use serde::{Deserialize, Serialize};

use super::Unread;
use super::endpoints::Joined;
use super::faults::Faults;
use super::pods::{PodModel, Pods};
use super::rates;
use super::services::Services;
use super::view::View;
use crate::objects::access::{AccessPolicy, Action, Grpc, Rehearsed, Rule, Selector, TargetRef};
use crate::objects::{Object, ObjectKind};
use crate::outcome::Reason;
use crate::snapshot::Builder;

/// What a Service that a policy or a rate limit names leads to, kept for when it is gone: what was protected must not be open because a
/// Service was renamed, or deleted before the object that names it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Protected {
    spec: Option<ServiceSpec>,
    /// The pods that its slices led to, with the ports: a Service without a selector has nothing else.
    pods: BTreeMap<String, BTreeSet<u16>>,
}

/// The Services that policies and rate limits name, as `<namespace>/<name>`.
pub(super) type Memory = BTreeMap<String, Protected>;

/// The pods that a policy or a rate limit is about, each with the ports (none = all).
pub(super) type Targets<'a> = BTreeMap<&'a str, BTreeSet<u16>>;

/// What each pod of the mesh is told.
pub(super) type Told<'a> = BTreeMap<&'a str, v1::Access>;

/// What is known of the mesh besides the policies.
pub(super) struct Mesh<'a, 'o> {
    pub view: &'a View<'o>,
    pub pods: &'a Pods<'o>,
    pub services: &'a Services<'o>,
    pub joined: &'a Joined,
    /// What Services led to when they were last there.
    pub before: &'a Memory,
}

/// Adds the policies and rate limits of each pod of the mesh. One without any is told so: that a proxy has not heard of policies must
/// never mean that there are none. Returns what the Services that are named lead to, or last led to.
pub(super) fn add(
    mesh: &Mesh<'_, '_>,
    unread: &[Unread],
    builder: &mut Builder,
    faults: &mut Faults,
) -> Memory {
    let Mesh { view, pods, .. } = mesh;
    let mut memory = Memory::new();
    let told = || v1::Access { level: access::LEVEL, ..v1::Access::default() };
    let injected = pods.iter().filter(|(_, pod)| pod.injected);
    let mut of_pods: Told<'_> = injected.map(|(name, _)| (name.as_str(), told())).collect();
    for unread in unread {
        let policy = closed(&unread.id.qualified(), &unread.why);
        let in_namespace = |(name, _): &(&&str, &mut v1::Access)| namespace(name) == unread.id.namespace;
        for (_, access) in of_pods.iter_mut().filter(in_namespace) {
            access.policies.push(policy.clone());
        }
    }
    let mut allowing = Allowing::new();
    for (object, policy) in &view.access {
        let spec = &policy.spec;
        let targets =
            targets(object, spec.selector.as_ref(), spec.target_refs.as_deref(), mesh, &mut memory, faults);
        let compiled = compiled(object, policy, faults);
        let mut selects = false;
        let allows = policy.spec.action == Action::Allow;
        let (targets, open) = match targets {
            Some(targets) => (targets, false),
            // What it is about cannot be read: all that it may be about.
            None => (everything(object, pods), true),
        };
        for (pod, ports) in targets {
            let Some(access) = of_pods.get_mut(pod) else { continue };
            selects = true;
            builder.part_of(&object.id, Kind::Access, pod);
            past_proxy(object, pod, &ports, pods, faults);
            if allows || open {
                allowing.entry(pod).or_default().push((object, ports.clone()));
            }
            let ports = ports.into_iter().map(u32::from).collect();
            let name = object.id.qualified();
            let policy = match &compiled {
                Some(compiled) if !open => v1::AccessPolicy { ports, ..compiled.clone() },
                _ if policy.spec.action == Action::Audit => continue,
                _ => {
                    let why = "penstock check says what is wrong with it";
                    let (file, line) = (&object.origin.file, object.origin.line);
                    v1::AccessPolicy { ports, ..closed(&name, &format!("{file}:{line}: {why}")) }
                }
            };
            access.policies.push(policy);
        }
        if !selects {
            faults.note(
                object,
                "/spec",
                "no workload of the mesh is one that it is about, so it protects nothing",
            );
        }
    }
    left_open(&allowing, pods, faults);
    rates::add(mesh, &mut of_pods, &mut memory, builder, faults);
    for (name, access) in of_pods {
        builder.add(Kind::Access, name, &access);
    }
    memory
}

/// Says of which ports nothing can be enforced.
pub(super) fn past_proxy(
    object: &Object,
    pod: &str,
    ports: &BTreeSet<u16>,
    pods: &Pods<'_>,
    faults: &mut Faults,
) {
    for port in ports.iter().filter(|port| pods[pod].is_past_proxy(**port)) {
        let message = format!(
            "port {port} of Pod {pod} is reached past its proxy ({}), so nothing is enforced there",
            annotation::SKIP_INBOUND_PORTS
        );
        faults.note(object, "/spec", message);
    }
}

/// The Allow policies about each pod, with the ports (none = all).
type Allowing<'a> = BTreeMap<&'a str, Vec<(&'a Object, BTreeSet<u16>)>>;

/// Says of which declared ports an Allow says nothing: all else is denied on the ports that it is about, and on no other.
fn left_open(allowing: &Allowing<'_>, pods: &Pods<'_>, faults: &mut Faults) {
    // Replicas are alike, so each policy tells of its ports once.
    let mut open: BTreeMap<String, (&Object, &str, BTreeSet<u16>)> = BTreeMap::new();
    for (&name, policies) in allowing {
        if policies.iter().any(|(_, ports)| ports.is_empty()) {
            continue;
        }
        let pod = &pods[name];
        let asked = |port: u16| policies.iter().any(|(_, ports)| ports.contains(&port));
        let left = pod.declared().filter(|port| !asked(*port) && !pod.is_past_proxy(*port));
        if let Some((object, _)) = policies.first() {
            let told = open.entry(object.id.qualified()).or_insert((object, name, BTreeSet::new()));
            told.2.extend(left);
        }
    }
    for (object, pod, ports) in open.into_values().filter(|(.., ports)| !ports.is_empty()) {
        let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
        let message = format!(
            "Pod {pod} declares {0} too, which no Allow is about, so whoever no Deny names may call there; select the workload by its \
             labels instead, or say that this is meant: an Allow by labels with `to: [{{ports: [{0}]}}]`",
            ports.join(", ")
        );
        faults.note(object, "/spec/targetRefs", message);
    }
}

fn namespace(pod: &str) -> &str {
    pod.split('/').next().unwrap_or_default()
}

/// A policy that denies everything.
fn closed(name: &str, why: &str) -> v1::AccessPolicy {
    v1::AccessPolicy {
        name: name.to_owned(),
        effect: Effect::Deny.into(),
        rules: vec![v1::AccessRule::default()],
        unreadable: why.to_owned(),
        ..v1::AccessPolicy::default()
    }
}

/// All pods of the object's namespace.
fn everything<'a>(object: &Object, pods: &'a Pods<'_>) -> Targets<'a> {
    let own = pods.keys().filter(|name| namespace(name) == object.id.namespace);
    own.map(|name| (name.as_str(), BTreeSet::new())).collect()
}

/// What the object is, and what becomes of the workloads that it is about.
fn what(object: &Object) -> (&'static str, &'static str) {
    match object.id.kind {
        ObjectKind::RateLimit => ("a RateLimit", "limited"),
        _ => ("an AccessPolicy", "protected"),
    }
}

/// What an AccessPolicy or a RateLimit is about; `None`: that makes no sense.
pub(super) fn targets<'a>(
    object: &Object,
    selector: Option<&Selector>,
    refs: Option<&[TargetRef]>,
    mesh: &Mesh<'a, '_>,
    memory: &mut Memory,
    faults: &mut Faults,
) -> Option<Targets<'a>> {
    let pods = mesh.pods;
    let refs = refs.unwrap_or_default();
    match selector {
        Some(_) if !refs.is_empty() => {
            faults.refuse(object, "/spec/selector", "it has targetRefs too; keep one of the two");
            return None;
        }
        Some(selector) => {
            let all = everything(object, pods).into_iter();
            return Some(all.filter(|(name, _)| has_labels(&pods[*name], &selector.match_labels)).collect());
        }
        None if refs.is_empty() => return Some(everything(object, pods)),
        None => {}
    }
    let mut targets = Targets::new();
    for (index, target) in refs.iter().enumerate() {
        let pointer = format!("/spec/targetRefs/{index}");
        if target.kind != "Service" || !target.group.as_deref().unwrap_or_default().is_empty() {
            let message = format!(
                "{} is no kind that {} can be about; write kind: Service, or a selector",
                target.kind,
                what(object).0
            );
            faults.refuse(object, format!("{pointer}/kind"), message);
            return None;
        }
        let key = format!("{}/{}", object.id.namespace, target.name);
        let service = ServiceName::new(&object.id.namespace, &target.name).ok();
        let service = service.filter(|service| mesh.services.contains_key(service));
        let protected = match (service, mesh.before.get(&key)) {
            (Some(service), _) => protected(object, mesh, &service),
            (None, Some(before)) => {
                let message = format!(
                    "there is no Service {key} any more; what it last led to is {} as before. Name a Service that \
                     exists, or select the workloads by label",
                    what(object).1
                );
                faults.note(object, format!("{pointer}/name"), message);
                before.clone()
            }
            (None, None) => {
                let message = format!(
                    "there is no Service {} in {}, so nothing of it is {}; create it, or select the workloads by label",
                    target.name,
                    object.id.namespace,
                    what(object).1
                );
                faults.note_as(Reason::TargetNotFound, object, format!("{pointer}/name"), message);
                continue;
            }
        };
        for pod in everything(object, pods).into_keys() {
            let mut ports = protected.pods.get(pod).cloned().unwrap_or_default();
            ports.extend(by_selector(protected.spec.as_ref(), &pods[pod]));
            if !ports.is_empty() {
                targets.entry(pod).or_default().extend(ports);
            }
        }
        memory.insert(key, protected);
    }
    Some(targets)
}

/// What a Service leads to.
fn protected(object: &Object, mesh: &Mesh<'_, '_>, service: &ServiceName) -> Protected {
    let slices =
        everything(object, mesh.pods).into_keys().map(|pod| (pod, by_slices(mesh.joined, pod, service)));
    let pods = slices.filter(|(_, ports)| !ports.is_empty()).map(|(pod, ports)| (pod.to_owned(), ports));
    let mut found =
        mesh.view.services.iter().filter(|(object, _)| {
            object.id.namespace == service.namespace() && object.id.name == service.name()
        });
    let spec = found.next().and_then(|(_, service)| service.spec.clone());
    let spec =
        spec.map(|spec| ServiceSpec { selector: spec.selector, ports: spec.ports, ..ServiceSpec::default() });
    Protected { spec, pods: pods.collect() }
}

/// The ports of a pod that a Service's slices lead to.
fn by_slices(joined: &Joined, pod: &str, service: &ServiceName) -> BTreeSet<u16> {
    let targets = joined.targets.get(pod).into_iter().flatten();
    let leading = targets.filter(|(_, services)| services.iter().any(|(name, _)| name == service));
    leading.map(|(port, _)| *port).collect()
}

/// The ports of a pod that a Service's selector leads to, whether a slice lists it or not: a pod that is about to go, or not
/// ready, is protected all the same.
fn by_selector(spec: Option<&ServiceSpec>, pod: &PodModel<'_>) -> BTreeSet<u16> {
    let Some(spec) = spec else { return BTreeSet::new() };
    let labels = spec.selector.as_ref().filter(|labels| !labels.is_empty() && has_labels(pod, labels));
    if labels.is_none() {
        return BTreeSet::new();
    }
    let number = |port: &ServicePort| match &port.target_port {
        Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
        Some(IntOrString::String(name)) => pod.port_of(name),
        None => u16::try_from(port.port).ok(),
    };
    spec.ports.iter().flatten().filter_map(number).collect()
}

fn has_labels(pod: &PodModel<'_>, wanted: &BTreeMap<String, String>) -> bool {
    let labels = pod.object.metadata().labels.as_ref();
    wanted.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
}

/// A policy as proxies take it; `None`: it makes no sense.
fn compiled(object: &Object, policy: &AccessPolicy, faults: &mut Faults) -> Option<v1::AccessPolicy> {
    let spec = &policy.spec;
    let audit = spec.action == Action::Audit;
    let denies = match (spec.action, spec.rehearse) {
        (Action::Deny, None) | (Action::Audit, Some(Rehearsed::Deny)) => true,
        (Action::Allow, None) | (Action::Audit, _) => false,
        (Action::Allow | Action::Deny, Some(_)) => {
            faults.refuse(object, "/spec/rehearse", "only an Audit stands in for another action; remove it");
            return None;
        }
    };
    let rules = spec.rules.as_deref().unwrap_or_default();
    if denies && rules.is_empty() {
        faults.refuse(object, "/spec/rules", "it denies nothing; write a rule, or `- {}` to deny everything");
        return None;
    }
    let mut sound = true;
    let mut written = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        let mut read = Reading::new(object, faults, format!("/spec/rules/{index}"));
        written.push(read.rule(rule));
        sound &= read.sound;
    }
    let effect = if denies { Effect::Deny } else { Effect::Allow };
    sound.then(|| v1::AccessPolicy {
        name: object.id.qualified(),
        effect: effect.into(),
        audit,
        rules: written,
        ..v1::AccessPolicy::default()
    })
}

/// A rule as it is read.
pub(super) struct Reading<'a, 'o> {
    object: &'o Object,
    faults: &'a mut Faults,
    pointer: String,
    /// Nothing was refused.
    pub(super) sound: bool,
}

type Texts<'a> = &'a Option<Vec<String>>;

impl<'a, 'o> Reading<'a, 'o> {
    /// One that stands there.
    pub(super) fn new(object: &'o Object, faults: &'a mut Faults, pointer: String) -> Self {
        Self { object, faults, pointer, sound: true }
    }

    pub(super) fn rule(&mut self, rule: &Rule) -> v1::AccessRule {
        self.not_empty("from", rule.from.as_deref());
        self.not_empty("to", rule.to.as_deref());
        self.not_empty("when/headers", rule.when.as_ref().and_then(|when| when.headers.as_deref()));
        let from = rule.from.iter().flatten().enumerate().map(|(index, from)| {
            let at = |field: &str| format!("from/{index}/{field}");
            let own = self.object.id.namespace.clone();
            let accounts = |texts: Texts<'_>| {
                let whole = |text: &String| match text.contains('/') {
                    true => text.clone(),
                    false => format!("{own}/{text}"),
                };
                texts.as_ref().map(|texts| texts.iter().map(whole).collect())
            };
            v1::AccessFrom {
                identities: self.texts(at("identities"), &from.identities, Pattern::identity),
                not_identities: self.texts(at("notIdentities"), &from.not_identities, Pattern::identity),
                namespaces: self.texts(at("namespaces"), &from.namespaces, Pattern::namespace),
                not_namespaces: self.texts(at("notNamespaces"), &from.not_namespaces, Pattern::namespace),
                service_accounts: self.texts(
                    at("serviceAccounts"),
                    &accounts(&from.service_accounts),
                    Pattern::account,
                ),
                not_service_accounts: self.texts(
                    at("notServiceAccounts"),
                    &accounts(&from.not_service_accounts),
                    Pattern::account,
                ),
            }
        });
        let from = from.collect();
        let to = rule.to.iter().flatten().enumerate().map(|(index, to)| {
            let at = |field: &str| format!("to/{index}/{field}");
            v1::AccessTo {
                methods: self.texts(at("methods"), &to.methods, Pattern::method),
                not_methods: self.texts(at("notMethods"), &to.not_methods, Pattern::method),
                paths: self.texts(at("paths"), &to.paths, Pattern::path),
                not_paths: self.texts(at("notPaths"), &to.not_paths, Pattern::path),
                ports: self.ports(&at("ports"), to.ports.as_ref()),
                not_ports: self.ports(&at("notPorts"), to.not_ports.as_ref()),
                models: self.texts(at("models"), &to.models, Pattern::model),
                not_models: self.texts(at("notModels"), &to.not_models, Pattern::model),
                grpc: self.texts(at("grpc"), &calls(to.grpc.as_ref()), Pattern::grpc),
                not_grpc: self.texts(at("notGrpc"), &calls(to.not_grpc.as_ref()), Pattern::grpc),
            }
        });
        let to = to.collect();
        let headers = rule.when.iter().flat_map(|when| when.headers.iter().flatten()).enumerate();
        let headers = headers.map(|(index, header)| {
            let at = |field: &str| format!("when/headers/{index}/{field}");
            if header.name.parse::<http::HeaderName>().is_err() {
                self.refuse(&at("name"), &format!("{:?} is not the name of a header", header.name));
            }
            if let Some(why) = never_there(&header.name.to_ascii_lowercase()) {
                let pointer = format!("{}/{}", self.pointer, at("name"));
                let message = format!("{} never comes so far: {why}; ask for something else", header.name);
                self.faults.note(self.object, pointer, message);
            }
            v1::AccessHeader {
                name: header.name.clone(),
                values: self.texts(at("values"), &header.values, Pattern::text),
                not_values: self.texts(at("notValues"), &header.not_values, Pattern::text),
            }
        });
        let headers = headers.collect();
        v1::AccessRule { name: rule.name.clone().unwrap_or_default(), from, to, headers }
    }

    /// A list that is written and has nothing in it, or an entry that says nothing, would match everybody.
    fn not_empty<T: Default + PartialEq>(&mut self, field: &str, list: Option<&[T]>) {
        let Some(list) = list else { return };
        if list.is_empty() {
            self.refuse(
                field,
                "it is empty, which would be everybody and everything; name something, or leave it out",
            );
        }
        for at in list.iter().enumerate().filter(|(_, entry)| **entry == T::default()).map(|(at, _)| at) {
            let message =
                "it says nothing, which would be everybody and everything; name something, or remove it";
            self.refuse(&format!("{field}/{at}"), message);
        }
    }

    pub(super) fn refuse(&mut self, field: &str, message: &str) {
        self.sound = false;
        self.faults.refuse(self.object, format!("{}/{field}", self.pointer), message);
    }

    /// A list. An empty one would ask for nothing, and whoever writes it means the opposite.
    fn texts(
        &mut self,
        field: String,
        texts: Texts<'_>,
        read: impl Fn(&str) -> Result<Pattern, String>,
    ) -> Vec<String> {
        let Some(texts) = texts else { return Vec::new() };
        if texts.is_empty() {
            self.refuse(&field, "an empty list would match everything; name something, or remove it");
        }
        for (index, text) in texts.iter().enumerate() {
            if let Err(error) = read(text) {
                self.refuse(&format!("{field}/{index}"), &error);
            }
        }
        texts.clone()
    }

    fn ports(&mut self, field: &str, ports: Option<&Vec<u32>>) -> Vec<u32> {
        let Some(ports) = ports else { return Vec::new() };
        if ports.is_empty() || ports.iter().any(|port| !(1..=65535).contains(port)) {
            self.refuse(field, "write ports of the pod, from 1 to 65535");
        }
        ports.clone()
    }
}

/// Why a header is never there when policies are asked.
fn never_there(name: &str) -> Option<&'static str> {
    let ours = name.starts_with(names::HEADER_PREFIX)
        && name != names::header::CLIENT_ID
        && !names::ASKED.contains(&name);
    match name {
        "connection" | "keep-alive" | "proxy-connection" | "te" | "transfer-encoding" => {
            Some("it belongs to a single connection, and proxies remove it")
        }
        names::header::FORWARDED_CLIENT_CERT_ALIAS => {
            Some("proxies take nobody's word for it, and remove it")
        }
        _ => ours.then_some("proxies speak with each other by such names, and take them from nobody else"),
    }
}

fn calls(grpc: Option<&Vec<Grpc>>) -> Option<Vec<String>> {
    let text = |call: &Grpc| format!("{}/{}", call.service, call.method.as_deref().unwrap_or("*"));
    grpc.map(|calls| calls.iter().map(text).collect())
}
