//! The objects in force, sorted by kind.

use std::collections::BTreeMap;
use std::sync::Arc;

use gateway_api::experimental::grpcroutes::GRPCRoute;
use gateway_api::experimental::httproutes::HTTPRoute;
use gateway_api::referencegrants::ReferenceGrant;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use crate::objects::access::AccessPolicy;
use crate::objects::canary::Canary;
use crate::objects::inference::InferencePolicy;
use crate::objects::pool::InferencePool;
use crate::objects::rate::RateLimit;
use crate::objects::{Body, Object, ObjectId};

/// An object and its typed content.
pub(super) type Of<'a, T> = (&'a Object, &'a T);

/// The objects in force. Every list is in the order of the names.
#[derive(Default)]
pub(super) struct View<'a> {
    pub pods: Vec<Of<'a, Pod>>,
    pub slices: Vec<Of<'a, EndpointSlice>>,
    pub services: Vec<Of<'a, Service>>,
    pub pools: Vec<Of<'a, InferencePool>>,
    pub routes: Vec<Of<'a, HTTPRoute>>,
    pub grpc_routes: Vec<Of<'a, GRPCRoute>>,
    pub grants: Vec<Of<'a, ReferenceGrant>>,
    pub inference: Vec<Of<'a, InferencePolicy>>,
    pub access: Vec<Of<'a, AccessPolicy>>,
    pub rates: Vec<Of<'a, RateLimit>>,
    pub canaries: Vec<Of<'a, Canary>>,
}

impl<'a> View<'a> {
    pub(super) fn new(objects: &'a BTreeMap<ObjectId, Arc<Object>>) -> Self {
        let mut view = Self::default();
        for object in objects.values() {
            match &object.body {
                Body::Pod(body) => view.pods.push((object, body)),
                Body::EndpointSlice(body) => view.slices.push((object, body)),
                Body::Service(body) => view.services.push((object, body)),
                Body::InferencePool(body) => view.pools.push((object, body)),
                Body::HTTPRoute(body) => view.routes.push((object, body)),
                Body::GRPCRoute(body) => view.grpc_routes.push((object, body)),
                Body::ReferenceGrant(body) => view.grants.push((object, body)),
                Body::InferencePolicy(body) => view.inference.push((object, body)),
                Body::AccessPolicy(body) => view.access.push((object, body)),
                Body::RateLimit(body) => view.rates.push((object, body)),
                Body::Canary(body) => view.canaries.push((object, body)),
            }
        }
        view
    }

    /// Whether a route may lead to what is called `name` in namespace `to`; `target`: its group and kind.
    pub(super) fn granted(&self, route: &ObjectId, to: &str, target: (&str, &str), name: &str) -> bool {
        let kind = format!("{:?}", route.kind);
        self.grants.iter().filter(|(object, _)| object.id.namespace == to).any(|(_, grant)| {
            let comes = grant.spec.from.iter().any(|source| {
                source.group == "gateway.networking.k8s.io"
                    && source.kind == kind
                    && source.namespace == route.namespace
            });
            let goes = grant.spec.to.iter().any(|granted| {
                (granted.group.as_str(), granted.kind.as_str()) == target
                    && granted.name.as_deref().is_none_or(|only| only == name)
            });
            comes && goes
        })
    }
}
