//! `AccessPolicy` of `penstock.io/v1alpha1`: which identities may ask which workloads for what.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::{Deserialize, Serialize};

/// An access policy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AccessPolicy {
    /// `penstock.io/v1alpha1`.
    pub api_version: String,
    /// `AccessPolicy`.
    pub kind: String,
    /// Name and namespace; it is about workloads of its own namespace only.
    pub metadata: ObjectMeta,
    /// What it asks for.
    pub spec: AccessPolicySpec,
}

/// What an access policy asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AccessPolicySpec {
    /// The Services whose workloads, on the ports that the Services lead to, it is about.
    pub target_refs: Option<Vec<TargetRef>>,
    /// The workloads that it is about. Neither `targetRefs` nor this: all of the namespace.
    pub selector: Option<Selector>,
    /// What it does with what its rules match.
    pub action: Action,
    /// What an Audit would be: `Allow` unless said.
    pub rehearse: Option<Rehearsed>,
    /// Any of them matches.
    pub rules: Option<Vec<Rule>>,
}

/// An object that a policy is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TargetRef {
    /// Empty: the core group.
    pub group: Option<String>,
    /// `Service`.
    pub kind: String,
    /// Its name in the policy's namespace.
    pub name: String,
}

/// Workloads by their labels.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Selector {
    /// All of them.
    pub match_labels: BTreeMap<String, String>,
}

/// What a policy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Action {
    /// Lets what matches through, and with it all that no policy allows is denied.
    Allow,
    /// Denies what matches, whatever else allows it.
    Deny,
    /// Reports what it would deny, and changes nothing.
    Audit,
}

/// What an Audit stands in for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rehearsed {
    /// An Allow.
    Allow,
    /// A Deny.
    Deny,
}

/// One rule: from one of these, to one of those, and when all of this is so. What is not said does not matter.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Rule {
    /// For stories.
    pub name: Option<String>,
    /// Who asks.
    pub from: Option<Vec<From>>,
    /// For what.
    pub to: Option<Vec<To>>,
    /// Further conditions.
    pub when: Option<When>,
}

type Texts = Option<Vec<String>>;

/// Who asks; of each list one, and of each `not` list none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "each field is what it is called")]
pub struct From {
    pub identities: Texts,
    pub not_identities: Texts,
    pub namespaces: Texts,
    pub not_namespaces: Texts,
    /// `<namespace>/<name>`, or the name of one of the policy's namespace.
    pub service_accounts: Texts,
    pub not_service_accounts: Texts,
}

/// What is asked for; of each list one, and of each `not` list none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[allow(missing_docs, reason = "each field is what it is called")]
pub struct To {
    pub methods: Texts,
    pub not_methods: Texts,
    pub paths: Texts,
    pub not_paths: Texts,
    /// Ports of the pod.
    pub ports: Option<Vec<u32>>,
    pub not_ports: Option<Vec<u32>>,
    pub models: Texts,
    pub not_models: Texts,
    pub grpc: Option<Vec<Grpc>>,
    pub not_grpc: Option<Vec<Grpc>>,
}

/// A gRPC method, or all of a service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Grpc {
    /// `<package>.<Service>`.
    pub service: String,
    /// Its method; all unless said.
    pub method: Option<String>,
}

/// Further conditions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct When {
    /// Each of them.
    pub headers: Option<Vec<Header>>,
}

/// A header and its value: what a client claims, which proves nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Header {
    /// Its name.
    pub name: String,
    /// One of them; neither this nor `notValues`: it is there.
    pub values: Texts,
    /// None of them.
    pub not_values: Texts,
}
