//! InferencePools: Services of the mesh that have no address and no DNS name, and are backends of routes alone.
//!
//! In: pools and pods. Out: a Service for each pool, and the slice that a controller would keep for it: the pods that its labels select, with
//! their readiness. From there on nothing tells it from a Service, so it is balanced as one: by what the GPUs behind each pod are doing.
//! Can go wrong: it selects nothing at all, or every pod of its namespace.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use penstock_api::ServiceName;
use penstock_api::v1::{self, Protocol};

use super::faults::Faults;
use super::pods::{PodModel, Pods};
use super::services::{ServiceModel, Services, policy};
use super::view::{Of, View};
use crate::objects::Object;
use crate::objects::pool::InferencePool;

/// Adds the pools to the Services.
pub(super) fn read<'a>(view: &View<'a>, services: &mut Services<'a>, faults: &mut Faults) {
    for &(object, pool) in &view.pools {
        let Ok(name) = ServiceName::pool(&object.id.namespace, &object.id.name) else {
            let message = "the name of a pool that is a backend is one DNS label of at most 63 characters; give it another";
            faults.refuse(object, "/metadata/name", message);
            continue;
        };
        let Some(number) = port(object, pool, faults) else { continue };
        if pool.spec.selector.match_labels.is_empty() {
            let message = "it selects every pod of its namespace; name the labels of the model servers";
            faults.refuse(object, "/spec/selector/matchLabels", message);
            continue;
        }
        let port =
            v1::ServicePort { port: number.into(), name: String::new(), protocol: Protocol::Http.into() };
        let service = ServiceModel {
            object,
            name: name.clone(),
            ports: vec![port],
            indices: vec![0],
            policy: policy(object, faults),
            inference: None,
            split: None,
            addresses: Vec::new(),
        };
        services.insert(name, service);
    }
}

/// The port that serves.
fn port(object: &Object, pool: &InferencePool, faults: &mut Faults) -> Option<u16> {
    let Some(first) = pool.spec.target_ports.first() else {
        faults.refuse(object, "/spec/targetPorts", "it has no port; name the one on which its pods serve");
        return None;
    };
    let number = u16::try_from(first.number).ok().filter(|number| *number > 0);
    if number.is_none() {
        let message = format!("{} is not a port; write a number from 1 to 65535", first.number);
        faults.refuse(object, "/spec/targetPorts/0/number", message);
    } else if pool.spec.target_ports.len() > 1 {
        let message = format!(
            "only the first port ({}) is called: a proxy has one load report of a pod, not one of each port",
            first.number
        );
        faults.note(object, "/spec/targetPorts/1", message);
    }
    number
}

/// The slice of each pool.
pub(super) fn slices<'a>(
    view: &View<'a>,
    pods: &Pods<'_>,
    services: &Services<'_>,
) -> BTreeMap<ServiceName, (&'a Object, EndpointSlice)> {
    let mut slices = BTreeMap::new();
    for &(object, pool) in &view.pools {
        let name = ServiceName::pool(&object.id.namespace, &object.id.name).ok();
        let Some(name) = name.filter(|name| services.contains_key(name)) else { continue };
        slices.insert(name, (object, slice((object, pool), pods)));
    }
    slices
}

fn slice((object, pool): Of<'_, InferencePool>, pods: &Pods<'_>) -> EndpointSlice {
    let wanted = &pool.spec.selector.match_labels;
    let selected = pods.values().filter(|pod| {
        let labels = pod.object.metadata().labels.as_ref();
        pod.object.id.namespace == object.id.namespace
            && wanted.iter().all(|(key, value)| labels.and_then(|labels| labels.get(key)) == Some(value))
    });
    let port = EndpointPort {
        port: pool.spec.target_ports.first().map(|port| port.number),
        ..EndpointPort::default()
    };
    EndpointSlice {
        address_type: "IPv4".to_owned(),
        endpoints: selected.filter_map(|pod| endpoint(pod, pod.ready)).collect(),
        ports: Some(vec![port]),
        ..EndpointSlice::default()
    }
}

/// A pod as the slice of what selects it has it; `None` as long as it has no address.
pub(super) fn endpoint(pod: &PodModel<'_>, serves: bool) -> Option<Endpoint> {
    let address = pod.address()?;
    let conditions = EndpointConditions {
        ready: Some(serves && !pod.terminating),
        serving: Some(serves),
        terminating: Some(pod.terminating),
    };
    let target = ObjectReference {
        kind: Some("Pod".to_owned()),
        namespace: Some(pod.object.id.namespace.clone()),
        name: Some(pod.object.id.name.clone()),
        ..ObjectReference::default()
    };
    Some(Endpoint {
        addresses: vec![address.to_string()],
        conditions: Some(conditions),
        target_ref: Some(target),
        ..Endpoint::default()
    })
}
