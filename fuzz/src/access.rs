//! Who may do what.

use http::{HeaderMap, HeaderName, HeaderValue};
use penstock_api::SpiffeId;
use penstock_api::access::{Access, Facts, Http, Model, Policy, RateLimit};
use penstock_api::v1;
use penstock_api::v1::access_policy::Effect;
use prost::Message as _;

use crate::{bounded, choice, says};

const CLIENTS: [&str; 3] =
    ["", "spiffe://cluster.local/ns/team-a/sa/front", "spiffe://cluster.local/ns/jobs/sa/batch"];
const PATHS: [&str; 4] = ["/", "/v2/models/m/infer", "/admin", "/inference.GRPCInferenceService/ModelInfer"];
const MODELS: [Model<'static>; 3] = [Model::None, Model::Named("m/1"), Model::Unknown];

/// Policies as control pushes them, behind a byte that draws who asks what. Whoever is refused hears of a policy that there is; a policy
/// that denies never lets anybody in, one that cannot be read lets in nobody, and what only reports changes nothing.
pub fn access(data: &[u8]) {
    let (ask, data) = choice(data);
    let Ok(message) = bounded(data, || v1::Access::decode(data)) else { return };
    for limit in &message.limits {
        if let Err(why) = bounded(data, || RateLimit::compile(limit)) {
            says(&why);
        }
    }
    let compiled = match bounded(data, || Access::compile(&message)) {
        Ok(compiled) => compiled,
        Err(why) => return says(&why),
    };
    let ask = usize::from(ask);
    let client: Option<SpiffeId> = CLIENTS[ask % 3].parse().ok();
    let header = (HeaderName::from_static("x-team"), HeaderValue::from_static("a"));
    let headers: HeaderMap = if ask & 64 == 0 { HeaderMap::new() } else { HeaderMap::from_iter([header]) };
    let http = Http {
        method: if ask & 32 == 0 { "GET" } else { "POST" },
        path: PATHS[ask / 3 % 4],
        model: MODELS[ask / 12 % 3],
        headers: &headers,
    };
    let facts = Facts { client: client.as_ref(), port: 8000, http: (ask < 224).then_some(http) };
    let decision = compiled.decide(&facts);
    if let Some(why) = decision.denied {
        says(&why);
        let known = |policy: &Policy| !policy.audit && *policy.name == *why.policy();
        assert!(compiled.policies().iter().any(known), "{why}");
        assert!(decision.allowed.is_none() && decision.would_deny.is_none(), "{decision:?}");
    } else {
        let mut in_force =
            compiled.policies().iter().filter(|policy| !policy.audit && policy.is_about(facts.port));
        assert!(
            !in_force.any(|policy| policy.unreadable.is_some()),
            "a policy that cannot be read lets somebody in"
        );
        assert!(facts.http.is_none() || compiled.may_ask_something(facts.client, facts.port), "{decision:?}");
    }
    let again = |change: &dyn Fn(&mut v1::Access)| {
        let mut message = message.clone();
        change(&mut message);
        Access::compile(&message).unwrap_or_else(|why| panic!("{why}")).decide(&facts).denied.is_some()
    };
    let denied = decision.denied.is_some();
    let audits = again(&|message| message.policies.retain(|policy| !policy.audit));
    assert_eq!(audits, denied, "what only reports decides");
    let denies =
        again(&|message| message.policies.retain(|policy| policy.effect() == Effect::Deny || policy.audit));
    assert!(denied || !denies, "a policy that allows hides one that denies");
    let everybody = v1::AccessPolicy {
        name: "test/nobody".into(),
        effect: Effect::Deny.into(),
        rules: vec![v1::AccessRule::default()],
        ..v1::AccessPolicy::default()
    };
    assert!(again(&|message| message.policies.push(everybody.clone())), "who is denied is let in");
}
