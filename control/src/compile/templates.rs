//! The templates of Deployments that Canaries are about: Services of the mesh that have no address and no DNS name, and are backends of canaries
//! alone.
//!
//! In: the Canaries that name a Deployment, the Services that are asked for them, and pods. Out: for each template of which there are pods a Service with the
//! ports and the policy of the one that is asked, and the slices that a controller would keep for it. A pod serves here as soon as all of its
//! containers do: a gate that is closed keeps Kubernetes from it, and not a canary. Can go wrong: the Deployment has no pods, or two Canaries.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use penstock_api::ServiceName;

use super::canary::oldest_first;
use super::faults::Faults;
use super::pods::{PodModel, Pods};
use super::pools;
use super::services::{ServiceModel, Services};
use super::view::View;
use crate::canary::template::{Template, made};
use crate::objects::{Body, Object};
use crate::outcome::Reason;
use crate::snapshot::Builder;

/// The pods of a template.
struct Made<'a, 'p> {
    canary: &'a Object,
    /// The Service that is asked.
    service: &'a core::Service,
    pods: Vec<&'p PodModel<'a>>,
}

/// All of them.
#[derive(Default)]
pub(super) struct Templates<'a, 'p>(BTreeMap<ServiceName, Made<'a, 'p>>);

/// The pods of each template of each Deployment, by namespace and name.
type Deployments<'a, 'p> = BTreeMap<(&'p str, &'p str), BTreeMap<ServiceName, Vec<&'p PodModel<'a>>>>;

/// Adds the templates to the Services, and tells of each Canary which there are.
pub(super) fn read<'a, 'p>(
    view: &View<'a>,
    pods: &'p Pods<'a>,
    services: &mut Services<'a>,
    builder: &mut Builder,
    faults: &mut Faults,
) -> Templates<'a, 'p> {
    let mut templates = Templates::default();
    let canaries = oldest_first(view).into_iter();
    let named: Vec<_> = canaries
        .filter_map(|(object, canary)| Some((object, canary, canary.spec.deployment.as_deref()?)))
        .collect();
    if named.is_empty() {
        return templates;
    }
    let deployments = deployments(pods);
    let mut taken: BTreeMap<(&str, &str), &Object> = BTreeMap::new();
    for (object, canary, deployment) in named {
        let at = (object.id.namespace.as_str(), deployment);
        let called = format!("the Deployment {}/{deployment}", object.id.namespace);
        if let Some(first) = taken.get(&at) {
            let message = format!("{} is about {called} already; remove one of the two", first.id);
            faults.refuse_as(Reason::Conflicted, object, "/spec/deployment", message);
            continue;
        }
        taken.insert(at, object);
        let Some(found) = deployments.get(&at) else {
            let message = format!(
                "{called} has no pod (with a ReplicaSet for its owner and the label pod-template-hash); create it, or correct the name. \
                 Where objects come from a directory nobody makes any: name two Services, as stable and candidate"
            );
            faults.note_as(Reason::TargetNotFound, object, "/spec/deployment", message);
            continue;
        };
        builder.has_templates(&object.id, found.iter().map(|(name, pods)| told(name, pods)).collect());
        let asked = ServiceName::new(&object.id.namespace, &canary.spec.service).ok();
        let Some(asked) = asked.and_then(|name| services.get(&name)) else { continue };
        let Body::Service(service) = &asked.object.body else { continue };
        let model = |name: &ServiceName| ServiceModel {
            object,
            name: name.clone(),
            ports: asked.ports.clone(),
            indices: asked.indices.clone(),
            policy: asked.policy.clone(),
            inference: asked.inference,
            split: None,
            addresses: Vec::new(),
        };
        let models: Vec<_> = found.keys().map(|name| (name.clone(), model(name))).collect();
        services.extend(models);
        let all = found
            .iter()
            .map(|(name, pods)| (name.clone(), Made { canary: object, service, pods: pods.clone() }));
        templates.0.extend(all);
    }
    templates
}

fn deployments<'a, 'p>(pods: &'p Pods<'a>) -> Deployments<'a, 'p> {
    let mut all = Deployments::new();
    for pod in pods.values() {
        let namespace = pod.object.id.namespace.as_str();
        let Some(made) = made(namespace, pod.object.metadata()) else { continue };
        all.entry((namespace, made.deployment)).or_default().entry(made.template).or_default().push(pod);
    }
    all
}

/// A template, as whoever chooses between them looks at it.
fn told(name: &ServiceName, pods: &[&PodModel<'_>]) -> Template {
    let living = || pods.iter().filter(|pod| !pod.terminating);
    let created = |pod: &&&PodModel<'_>| pod.object.metadata().creation_timestamp.as_ref().map(|at| at.0);
    Template {
        name: name.name().to_owned(),
        pods: living().count(),
        since: living().map(|pod| created(&pod)).min().flatten(),
    }
}

impl<'a> Templates<'a, '_> {
    /// The slices of each.
    pub(super) fn slices(
        &self,
        services: &Services<'_>,
    ) -> BTreeMap<ServiceName, (&'a Object, Vec<EndpointSlice>)> {
        let of = |(name, made): (&ServiceName, &Made<'a, '_>)| {
            let slices = services.get(name).map(|service| slices(service, made)).unwrap_or_default();
            (name.clone(), (made.canary, slices))
        };
        self.0.iter().map(of).collect()
    }
}

/// One slice for all pods of which the ports are the same numbers.
fn slices(template: &ServiceModel<'_>, made: &Made<'_, '_>) -> Vec<EndpointSlice> {
    let mut by_ports: BTreeMap<Vec<(String, u16)>, Vec<Endpoint>> = BTreeMap::new();
    for pod in &made.pods {
        let ports = template.ports.iter().zip(&template.indices);
        let numbers =
            ports.filter_map(|(port, index)| Some((port.name.clone(), target(made.service, *index, pod)?)));
        let endpoint = pools::endpoint(pod, pod.ready || pod.gated);
        by_ports.entry(numbers.collect()).or_default().extend(endpoint);
    }
    let port = |(name, number): (String, u16)| EndpointPort {
        name: Some(name),
        port: Some(i32::from(number)),
        ..EndpointPort::default()
    };
    let slice = |(ports, endpoints): (Vec<(String, u16)>, Vec<Endpoint>)| EndpointSlice {
        address_type: "IPv4".to_owned(),
        endpoints,
        ports: Some(ports.into_iter().map(port).collect()),
        ..EndpointSlice::default()
    };
    by_ports.into_iter().map(slice).collect()
}

/// Where a port of the Service leads in a pod.
fn target(service: &core::Service, index: usize, pod: &PodModel<'_>) -> Option<u16> {
    let port = service.spec.as_ref()?.ports.as_ref()?.get(index)?;
    match &port.target_port {
        Some(IntOrString::String(name)) => pod.port_of(name),
        Some(IntOrString::Int(number)) => u16::try_from(*number).ok(),
        None => u16::try_from(port.port).ok(),
    }
}
