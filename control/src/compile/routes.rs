//! HTTPRoutes and GRPCRoutes with a Service as parent, and the traffic-split annotation: rules in their order, and their weights.
//!
//! A route in another namespace than its parent's is for the clients of that namespace alone ([`consumers`]).
//!
//! A route wins over the annotation. Where a Service has rules for some ports only, every other port gets a rule
//! of its own that does what would happen without routes: the proxy refuses what no rule matches.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use gateway_api::experimental::grpcroutes::{GRPCRoute, GrpcRouteRulesMatches};
use gateway_api::experimental::httproutes::{
    HTTPRoute, HttpRouteParentRefs, HttpRouteRules, HttpRouteRulesBackendRefs, HttpRouteRulesRetry,
    HttpRouteRulesSessionPersistence, HttpRouteRulesSessionPersistenceType,
};
use k8s_openapi::jiff::Timestamp;
use penstock_api::ServiceName;
use penstock_api::names::annotation;
use penstock_api::resource::{Kind, weights_name};
use penstock_api::v1::{self, string_match};

use super::annotations::{self, MAX_WEIGHT};
use super::canary::{self, Canaries};
use super::consumers;
use super::endpoints::Joined;
use super::faults::Faults;
use super::filters::{self, Level, same_shape};
use super::grpc;
use super::matches::{self, Place, Precedence};
use super::mirrors;
use super::services::{ServiceModel, Services};
use super::view::View;
use crate::objects::{Object, ObjectKind, annotation_pointer, pool};
use crate::outcome::Reason;
use crate::snapshot::Builder;

/// Rules, not yet in order.
type Unordered = Vec<(Precedence, v1::Rule)>;

/// The rules of one parent Service.
#[derive(Default)]
struct Attached {
    /// Of routes in its own namespace, for all its clients.
    everybodys: Unordered,
    /// Of routes in another namespace, for the clients in that one.
    consumers: BTreeMap<String, Unordered>,
}

/// A route, in what its kinds have in common.
struct Route<'a> {
    object: &'a Object,
    /// As rules and weights are named. The two kinds may have routes of one name.
    name: String,
    created: Option<Timestamp>,
    parents: Vec<HttpRouteParentRefs>,
    hostnames: &'a [String],
    rules: Vec<(Cow<'a, HttpRouteRules>, Matches<'a>)>,
}

/// What a rule matches.
#[derive(Clone, Copy)]
enum Matches<'a> {
    /// As the rule itself says.
    OfHttp,
    /// These.
    OfGrpc(&'a [GrpcRouteRulesMatches]),
}

impl<'a> Route<'a> {
    fn of_http(object: &'a Object, route: &'a HTTPRoute) -> Self {
        let rules = route.spec.rules.iter().flatten();
        Self {
            object,
            name: object.id.qualified(),
            created: route.metadata.creation_timestamp.as_ref().map(|time| time.0),
            parents: route.spec.parent_refs.clone().unwrap_or_default(),
            hostnames: route.spec.hostnames.as_deref().unwrap_or_default(),
            rules: rules.map(|rule| (Cow::Borrowed(rule), Matches::OfHttp)).collect(),
        }
    }

    fn of_grpc(object: &'a Object, route: &'a GRPCRoute, faults: &mut Faults) -> Self {
        let mut parents = Vec::new();
        for (index, parent) in route.spec.parent_refs.iter().flatten().enumerate() {
            match same_shape(parent) {
                Ok(parent) => parents.push(parent),
                Err((_, error)) => faults.refuse(object, format!("/spec/parentRefs/{index}"), error),
            }
        }
        let mut rules = Vec::new();
        for (index, rule) in route.spec.rules.iter().flatten().enumerate() {
            match grpc::as_http(rule) {
                Ok(read) => {
                    let matches = Matches::OfGrpc(rule.matches.as_deref().unwrap_or_default());
                    rules.push((Cow::Owned(read), matches));
                }
                Err((_, error)) => faults.refuse(object, format!("/spec/rules/{index}"), error),
            }
        }
        Self {
            object,
            name: format!("{}:grpc", object.id.qualified()),
            created: route.metadata.creation_timestamp.as_ref().map(|time| time.0),
            parents,
            hostnames: route.spec.hostnames.as_deref().unwrap_or_default(),
            rules,
        }
    }
}

/// Adds routes and weights.
pub(super) fn add(
    view: &View<'_>,
    services: &Services<'_>,
    joined: &Joined,
    builder: &mut Builder,
    faults: &mut Faults,
) {
    let mut attached: BTreeMap<ServiceName, Attached> = BTreeMap::new();
    let mut canaries = canary::read(view, services, joined, faults);
    let http: Vec<_> = view.routes.iter().map(|(object, route)| Route::of_http(object, route)).collect();
    let grpc = view.grpc_routes.iter();
    let grpc: Vec<_> = grpc.map(|(object, route)| Route::of_grpc(object, route, faults)).collect();
    for route in http.iter().chain(&grpc) {
        attach(route, view, services, &mut attached, &mut canaries, builder, faults);
    }
    for (name, service) in services {
        let Attached { everybodys, consumers } = attached.remove(name).unwrap_or_default();
        let mut rules = in_order(everybodys);
        rest(service, services, &mut rules, &mut canaries, builder, faults);
        for (namespace, own) in consumers {
            let seen = consumers::seen(in_order(own), &rules, service);
            builder.add_for(&namespace, name.as_str(), &v1::Routes { rules: canaries.finish(name, seen) });
        }
        let rules = canaries.finish(name, rules);
        if !rules.is_empty() {
            builder.add(Kind::Routes, name.as_str(), &v1::Routes { rules });
        }
    }
}

fn in_order(mut rules: Unordered) -> Vec<v1::Rule> {
    rules.sort_by(|a, b| a.0.cmp(&b.0));
    rules.into_iter().map(|(_, rule)| rule).collect()
}

/// Attaches the rules of a route to its parents.
fn attach(
    route: &Route<'_>,
    view: &View<'_>,
    services: &Services<'_>,
    attached: &mut BTreeMap<ServiceName, Attached>,
    canaries: &mut Canaries<'_>,
    builder: &mut Builder,
    faults: &mut Faults,
) {
    let Route { object, name, .. } = route;
    let parents = parents(object, &route.parents, services, faults);
    if parents.is_empty() {
        return;
    }
    let mut hostnames = Vec::new();
    for (index, text) in route.hostnames.iter().enumerate() {
        match matches::hostname(text) {
            Ok(name) => hostnames.push(Some(name)),
            Err(error) => faults.refuse(object, format!("/spec/hostnames/{index}"), error),
        }
    }
    if route.hostnames.is_empty() {
        hostnames.push(None);
    }
    for (index, (from, of)) in route.rules.iter().enumerate() {
        let pointer = format!("/spec/rules/{index}");
        let reader = RuleReader { object, parents: &parents, view, services, faults, pointer };
        let ReadRule { rule, matches, backends, mirrors } = reader.read(from, *of);
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        for (parent, ports) in &parents {
            builder.part_of(&object.id, Kind::Routes, parent.as_str());
            let mut rule = v1::Rule { route: name.clone(), index: number, ..rule.clone() };
            if let Some(backends) = backends.clone() {
                for backend in backends.iter().filter(|backend| backend.invalid.is_empty()) {
                    let target =
                        backend.service.parse().ok().and_then(|name: ServiceName| services.get(&name));
                    if let Some(pool) = target.filter(|one| one.object.id.kind == ObjectKind::InferencePool) {
                        builder.routes_to(parent, &pool.object.id);
                    }
                }
                let weights =
                    v1::Weights { route: name.clone(), rule: number, backends, mirrors: mirrors.clone() };
                rule.weights = add_weights(parent, weights, canaries, builder);
                builder.part_of(&object.id, Kind::Weights, rule.weights.as_str());
            }
            let of_parent = attached.entry(parent.clone()).or_default();
            let rules = match object.id.namespace.as_str() {
                own if own == parent.namespace() => &mut of_parent.everybodys,
                other => of_parent.consumers.entry(other.to_owned()).or_default(),
            };
            for port in ports {
                for (matched_at, (matched, method)) in matches.iter().enumerate() {
                    for (host_at, host) in hostnames.iter().enumerate() {
                        let place = Place {
                            route: name,
                            created: route.created,
                            method: *method,
                            rule: index,
                            matched: matched_at,
                            host: host_at,
                        };
                        let precedence = Precedence::of(matched.as_ref(), host.as_deref(), &place);
                        let rule = v1::Rule {
                            port: *port,
                            matches: matched.iter().cloned().collect(),
                            hostnames: host.iter().cloned().collect(),
                            ..rule.clone()
                        };
                        rules.push((precedence, rule));
                    }
                }
            }
        }
    }
}

/// Parent Services, and for which of their ports; port 0 = all.
type Parents = BTreeMap<ServiceName, BTreeSet<u32>>;

/// The parents of a route.
fn parents(
    object: &Object,
    refs: &[HttpRouteParentRefs],
    services: &Services<'_>,
    faults: &mut Faults,
) -> Parents {
    let mut parents = Parents::new();
    for (index, parent) in refs.iter().enumerate() {
        // A parent of another kind is a Gateway's business.
        if parent.kind.as_deref() != Some("Service") {
            continue;
        }
        let at = |field: &str| format!("/spec/parentRefs/{index}/{field}");
        if !matches!(parent.group.as_deref(), Some("" | "core")) {
            let message = "the group of a Service is empty, but a parentRef's is gateway.networking.k8s.io unless \
                           said; write group: \"\"";
            faults.refuse_as(Reason::NoMatchingParent(index), object, at("group"), message);
            continue;
        }
        let namespace = parent.namespace.as_deref().unwrap_or(&object.id.namespace);
        let service = ServiceName::new(namespace, &parent.name).ok().and_then(|name| services.get(&name));
        let Some(service) = service else {
            let message = format!(
                "its parent, the Service {namespace}/{}, does not exist; create it, or correct the name",
                parent.name
            );
            faults.refuse_as(Reason::NoMatchingParent(index), object, at("name"), message);
            continue;
        };
        let wanted = |port: &&v1::ServicePort| {
            parent.port.is_none_or(|number| u32::try_from(number) == Ok(port.port))
                && parent.section_name.as_ref().is_none_or(|section| *section == port.name)
        };
        let all = parent.port.is_none() && parent.section_name.is_none();
        let ports = parents.entry(service.name.clone()).or_default();
        if all {
            ports.insert(0);
        } else if let Some(port) = service.ports.iter().find(wanted) {
            ports.insert(port.port);
        } else {
            let field = if parent.port.is_some() { "port" } else { "sectionName" };
            let message = format!(
                "its parent, the Service {}, has no such port (it has: {}); correct the {field}",
                service.name,
                service.ports_in_words()
            );
            faults.refuse_as(Reason::NoMatchingParent(index), object, at(field), message);
        }
    }
    for ports in parents.values_mut() {
        if ports.contains(&0) {
            ports.retain(|port| *port == 0);
        }
    }
    parents.retain(|_, ports| !ports.is_empty());
    parents
}

/// Makes the weights of a rule; returns their name.
fn add_weights(
    parent: &ServiceName,
    mut weights: v1::Weights,
    canaries: &mut Canaries<'_>,
    builder: &mut Builder,
) -> String {
    for unnamed in weights.backends.iter_mut().filter(|backend| backend.service.is_empty()) {
        unnamed.service = parent.to_string();
    }
    let name = weights_name(parent, &weights.route, weights.rule);
    canaries.weigh(parent, &name, weights, builder);
    name
}

/// Reads one rule of a route.
struct RuleReader<'a> {
    object: &'a Object,
    parents: &'a Parents,
    view: &'a View<'a>,
    services: &'a Services<'a>,
    faults: &'a mut Faults,
    pointer: String,
}

/// A match, where `None` matches every request; of gRPC, how long its service and its method are.
type ReadMatch = (Option<v1::Match>, Option<(usize, usize)>);

/// A rule without what its parent adds.
struct ReadRule {
    rule: v1::Rule,
    /// At least one.
    matches: Vec<ReadMatch>,
    /// Absent when a filter answers. One that can't be named as a Service has an empty name.
    backends: Option<Vec<v1::Backend>>,
    mirrors: Vec<v1::Mirror>,
}

impl RuleReader<'_> {
    fn refuse(&mut self, below: &str, message: impl Into<String>) {
        self.refuse_as(Reason::Value, below, message);
    }

    fn refuse_as(&mut self, reason: Reason, below: &str, message: impl Into<String>) {
        self.faults.refuse_as(reason, self.object, format!("{}{below}", self.pointer), message);
    }

    fn read(mut self, from: &HttpRouteRules, of: Matches<'_>) -> ReadRule {
        let matches = match of {
            Matches::OfHttp => {
                let all = from.matches.as_deref().unwrap_or_default();
                self.matches(all, |one| (matches::read(one), None))
            }
            Matches::OfGrpc(all) => self.matches(all, |one| (grpc::read(one), Some(grpc::lengths(one)))),
        };
        let prefix = matches.iter().all(|(matched, _)| {
            let path = matched.as_ref().and_then(|matched| matched.path.as_ref()?.kind.as_ref());
            matches!(path, None | Some(string_match::Kind::Prefix(_)))
        });
        let (filters, mirrors, broken) = self.filters(from, Level::Rule { prefix });
        let redirect =
            filters.iter().any(|filter| matches!(filter.kind, Some(v1::filter::Kind::Redirect(_))));
        let rewrite = filters.iter().any(|filter| matches!(filter.kind, Some(v1::filter::Kind::Rewrite(_))));
        if redirect && (rewrite || from.backend_refs.as_ref().is_some_and(|refs| !refs.is_empty())) {
            let message =
                "a rule that redirects answers by itself; remove its backendRefs and its URLRewrite";
            self.refuse_as(Reason::IncompatibleFilters, "/filters", message);
        }
        let rule = v1::Rule {
            filters: if broken.is_some() { Vec::new() } else { filters },
            timeouts: self.timeouts(from),
            retry: from.retry.as_ref().and_then(|retry| self.retry(retry)),
            sticky: from.session_persistence.as_ref().and_then(|session| self.sticky(session)),
            ..v1::Rule::default()
        };
        let answers = redirect && broken.is_none();
        let mirrors = if broken.is_some() { Vec::new() } else { mirrors };
        let backends = (!answers).then(|| self.backends(from, broken));
        ReadRule { rule, matches, backends, mirrors }
    }

    /// Reads the matches; one that makes no sense matches nothing.
    fn matches<T>(
        &mut self,
        all: &[T],
        read: impl Fn(&T) -> (Result<Option<v1::Match>, (String, String)>, Option<(usize, usize)>),
    ) -> Vec<ReadMatch> {
        if all.is_empty() {
            return vec![(None, None)];
        }
        let mut made = Vec::new();
        for (index, one) in all.iter().enumerate() {
            match read(one) {
                (Ok(matched), lengths) => made.push((matched, lengths)),
                (Err((below, error)), _) => self.refuse(&format!("/matches/{index}{below}"), error),
            }
        }
        made
    }

    /// Reads the filters, and the mirrors among them; also why requests must not pass without one of them.
    fn filters(
        &mut self,
        from: &HttpRouteRules,
        level: Level,
    ) -> (Vec<v1::Filter>, Vec<v1::Mirror>, Option<String>) {
        let (mut read, mut mirrors, mut broken) = (Vec::new(), Vec::new(), None);
        for (index, filter) in from.filters.iter().flatten().enumerate() {
            if mirrors::asked(filter) {
                let at = format!("/filters/{index}");
                match mirrors::read(filter) {
                    // Without its copies a request is still a request.
                    Err((below, error)) => self.refuse(&format!("{at}{below}"), error),
                    Ok((to, share)) => {
                        let to = self.backend(&format!("{at}/requestMirror/backendRef"), &to);
                        mirrors.push(mirrors::to(to, share));
                    }
                }
                continue;
            }
            match filters::read(filter, level) {
                Ok(filter) => read.push(filter),
                Err((below, error)) => {
                    broken.get_or_insert_with(|| error.clone());
                    self.refuse(&format!("/filters/{index}{below}"), error);
                }
            }
        }
        (read, mirrors, broken)
    }

    fn timeouts(&mut self, from: &HttpRouteRules) -> Option<v1::Timeouts> {
        let from = from.timeouts.as_ref()?;
        let mut read = |text: &Option<String>, field: &str| {
            annotations::milliseconds(text.as_ref()?)
                .map_err(|error| self.refuse(&format!("/timeouts/{field}"), error))
                .ok()
        };
        let request_ms = read(&from.request, "request");
        let per_try_ms = read(&from.backend_request, "backendRequest");
        if let Err(error) = annotations::check_tries(request_ms, per_try_ms) {
            self.refuse("/timeouts/backendRequest", error);
            return None;
        }
        let timeouts = v1::Timeouts { request_ms, per_try_ms, ..v1::Timeouts::default() };
        (timeouts != v1::Timeouts::default()).then_some(timeouts)
    }

    fn retry(&mut self, from: &HttpRouteRulesRetry) -> Option<v1::Retry> {
        let mut retry = v1::Retry::default();
        if let Some(attempts) = from.attempts {
            match u32::try_from(attempts) {
                Ok(attempts) if attempts <= 10 => retry.attempts = Some(attempts),
                _ => self.refuse("/retry/attempts", format!("{attempts} is not a whole number from 0 to 10")),
            }
        }
        for (index, code) in from.codes.iter().flatten().enumerate() {
            match u32::try_from(*code) {
                Ok(code) if (400..=599).contains(&code) => retry.codes.push(code),
                _ => {
                    let message = format!("{code} is no error; write a status from 400 to 599");
                    self.refuse(&format!("/retry/codes/{index}"), message);
                }
            }
        }
        if from.backoff.is_some() {
            let message = "the backoff is not used: proxies choose it themselves, with jitter; remove it";
            self.faults.note(self.object, format!("{}/retry/backoff", self.pointer), message);
        }
        Some(retry)
    }

    fn sticky(&mut self, from: &HttpRouteRulesSessionPersistence) -> Option<v1::Sticky> {
        let Some(name) = &from.session_name else {
            let message = "there is nothing to recognise a session by; write sessionName";
            self.refuse("/sessionPersistence", message);
            return None;
        };
        let kind = match from.r#type {
            Some(HttpRouteRulesSessionPersistenceType::Header) => "header",
            _ => "cookie",
        };
        annotations::sticky(&format!("{kind}:{name}"))
            .map_err(|error| self.refuse("/sessionPersistence/sessionName", error))
            .ok()
    }

    /// Reads the backends. `broken`: why none of them may be reached.
    fn backends(mut self, from: &HttpRouteRules, broken: Option<String>) -> Vec<v1::Backend> {
        let refs = from.backend_refs.as_deref().unwrap_or_default();
        let mut read: Vec<_> = refs
            .iter()
            .enumerate()
            .map(|(index, to)| self.backend(&format!("/backendRefs/{index}"), to))
            .collect();
        if refs.is_empty() {
            let invalid = "the rule has no backends".to_owned();
            if broken.is_none() {
                let message = format!("{invalid}, so its requests are answered with 500; add backendRefs");
                self.refuse("/backendRefs", message);
            }
            read.push(v1::Backend { weight: 1, invalid, ..v1::Backend::default() });
        } else if refs.iter().all(|backend| backend.weight == Some(0)) {
            let message = "the weights sum to 0, so no request could go anywhere; give one backend more";
            self.refuse("/backendRefs/0/weight", message);
        }
        if let Some(reason) = broken {
            read.iter_mut().for_each(|backend| backend.invalid.clone_from(&reason));
        }
        read
    }

    /// Reads the backend that is referred to there.
    fn backend(&mut self, pointer: &str, from: &HttpRouteRulesBackendRefs) -> v1::Backend {
        let at = |field: &str| format!("{pointer}/{field}");
        let weight = u32::try_from(from.weight.unwrap_or(1)).ok().filter(|weight| *weight <= MAX_WEIGHT);
        let weight = weight.unwrap_or_else(|| {
            self.refuse(&at("weight"), format!("a weight is a whole number from 0 to {MAX_WEIGHT}"));
            0
        });
        let group = from.group.as_deref().unwrap_or("");
        let kind = from.kind.as_deref().unwrap_or("Service");
        let is_pool = (group, kind) == (pool::GROUP, "InferencePool");
        if !is_pool && (!matches!(group, "" | "core") || kind != "Service") {
            let reason = format!(
                "the backend {} is a {kind}; only Services and InferencePools are supported",
                from.name
            );
            self.refuse_as(Reason::InvalidKind, &at("kind"), reason.clone());
            return v1::Backend { weight, invalid: reason, ..v1::Backend::default() };
        }
        let own = &self.object.id.namespace;
        let namespace = from.namespace.as_deref().unwrap_or(own);
        let name = match is_pool {
            true => ServiceName::pool(namespace, &from.name),
            false => ServiceName::new(namespace, &from.name),
        };
        let Ok(name) = name else {
            let reason = format!("the backend {namespace}/{} is not the name of a {kind}", from.name);
            self.refuse_as(Reason::BackendNotFound, &at("name"), reason.clone());
            return v1::Backend { weight, invalid: reason, ..v1::Backend::default() };
        };
        let target = self.services.get(&name);
        let port = match is_pool {
            // It says itself where its pods serve; what a reference says of it is not looked at (Inference Extension).
            true => target.and_then(|pool| pool.ports.first()).map_or(0, |port| port.port),
            false => from.port.and_then(|port| u16::try_from(port).ok()).map_or(0, u32::from),
        };
        let mut backend = v1::Backend { service: name.to_string(), port, weight, ..v1::Backend::default() };
        let granted_as = if is_pool { (pool::GROUP, "InferencePool") } else { ("", "Service") };
        let granted = || self.view.granted(&self.object.id, namespace, granted_as, &from.name);
        // Clients of a Service call it anyway: that their own namespace's route leads to it gives them nothing.
        let parent = self.parents.contains_key(&name);
        let found = if namespace != own && !parent && !granted() {
            let kind = self.object.id.kind;
            let fix = format!("add a ReferenceGrant for {kind:?}s from {own} in namespace {namespace}");
            Err(("namespace", format!("the backend {name} is not permitted to namespace {own}"), fix))
        } else {
            match target {
                None => Err((
                    "name",
                    format!("the backend {name} does not exist"),
                    format!("create the {kind}, or correct the name"),
                )),
                Some(_) if is_pool => Ok(()),
                Some(_) if from.port.is_none() => {
                    Err(("port", format!("the backend {name} has no port said"), "write port".to_owned()))
                }
                Some(service) if !service.has_port(port) => Err((
                    "port",
                    format!("the backend {name} has no port {}", from.port.unwrap_or_default()),
                    format!("use one that it has: {}", service.ports_in_words()),
                )),
                Some(_) => Ok(()),
            }
        };
        if let Err((field, reason, fix)) = found {
            let kind = if field == "namespace" { Reason::RefNotPermitted } else { Reason::BackendNotFound };
            self.refuse_as(kind, &at(field), format!("{reason}; {fix}"));
            backend.invalid = reason;
        }
        for (filter_at, filter) in from.filters.iter().flatten().enumerate() {
            let read = filters::same_shape(filter).and_then(|filter| filters::read(&filter, Level::Backend));
            match read {
                Ok(filter) => backend.filters.push(filter),
                Err((below, error)) => {
                    self.refuse(&format!("{pointer}/filters/{filter_at}{below}"), error.clone());
                    backend.invalid = error;
                }
            }
        }
        if !backend.invalid.is_empty() {
            backend.filters.clear();
        }
        backend
    }
}

/// Adds rules for the ports of a Service that no route covers: the annotation's weights, or the Service itself
/// where other ports have rules.
fn rest(
    service: &ServiceModel<'_>,
    services: &Services<'_>,
    rules: &mut Vec<v1::Rule>,
    canaries: &mut Canaries<'_>,
    builder: &mut Builder,
    faults: &mut Faults,
) {
    let routed = !rules.is_empty();
    if rules.iter().any(|rule| rule.port == 0)
        || (!routed && service.split.is_none() && !canaries.has(&service.name))
    {
        return;
    }
    let route = service.name.to_string();
    // An HTTPRoute may have the name of its Service; its rules come first.
    let first = rules.iter().filter(|rule| rule.route == route).map(|rule| rule.index + 1).max().unwrap_or(0);
    let covered: BTreeSet<u32> = rules.iter().map(|rule| rule.port).collect();
    let open: Vec<_> = service.ports.iter().filter(|port| !covered.contains(&port.port)).collect();
    let one = service.ports.len() == 1;
    for (index, port) in (first..).zip(open) {
        let backends = match &service.split {
            Some(split) => split
                .iter()
                .map(|(name, weight)| split_backend(service, port, name, *weight, services, faults))
                .collect(),
            None => vec![v1::Backend {
                service: route.clone(),
                port: port.port,
                weight: 1,
                ..v1::Backend::default()
            }],
        };
        let weights = v1::Weights { route: route.clone(), rule: index, backends, mirrors: Vec::new() };
        let weights = add_weights(&service.name, weights, canaries, builder);
        let port = if one { 0 } else { port.port };
        rules.push(v1::Rule { route: route.clone(), index, port, weights, ..v1::Rule::default() });
    }
}

/// A backend of the traffic-split annotation.
fn split_backend(
    service: &ServiceModel<'_>,
    port: &v1::ServicePort,
    name: &str,
    weight: u32,
    services: &Services<'_>,
    faults: &mut Faults,
) -> v1::Backend {
    let namespace = service.name.namespace();
    let mut backend =
        v1::Backend { service: format!("{namespace}/{name}"), weight, ..v1::Backend::default() };
    let found = ServiceName::new(namespace, name).ok().and_then(|name| services.get(&name));
    let target = found.and_then(|target| target.port_for(port));
    match (found, target) {
        (_, Some(target)) => backend.port = target.port,
        (None, None) => backend.invalid = format!("the backend {} does not exist", backend.service),
        (Some(target), None) => {
            backend.invalid = format!(
                "the backend {} has no port for {} (it has: {})",
                backend.service,
                port.port,
                target.ports_in_words()
            );
        }
    }
    if !backend.invalid.is_empty() {
        let key = annotation::TRAFFIC_SPLIT;
        let message = format!("annotation {key}: {}; create it, or correct the annotation", backend.invalid);
        faults.refuse(service.object, annotation_pointer(key), message);
    }
    backend
}
