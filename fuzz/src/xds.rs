//! What control pushes.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;

use futures_util::FutureExt as _;
use http::Request;
use penstock_api::discovery::{DeltaDiscoveryResponse, Resource};
use penstock_api::resource::{Kind, Payload};
use penstock_api::v1;
use penstock_proxy::config::store::Demand;
use penstock_proxy::config::{Known, Snapshot, Store};
use penstock_proxy::xds::state::{Received, State};
use prost::Message as _;

use crate::{ALWAYS, choice, says, served, within};

/// A resource costs more memory than other input: four bytes may be a port, for which a cluster with all its counters is made, once
/// to look at it and once to keep it.
const LARGEST: usize = 8 * crate::LARGEST;

const SERVICES: [&str; 2] = ["team-a/resnet", "team-a/llama"];
const ADDRESS: &str = "10.0.0.1:80";
const NODE: &str = "team-a/client";
const NAMES: [&str; 8] =
    [NODE, "cluster.local", SERVICES[0], SERVICES[1], ADDRESS, "team-a/resnet/route/0", "team-a/other", "?"];

/// Responses one after the other, each a byte for its kind, one for its name and form, two for its length, and its bytes: a message, or a
/// pipeline's declaration, which is JSON within one. Each is answered once, by an acknowledgement or by what is wrong; what is
/// refused changes nothing, and what a new stream would say is in force is what was acknowledged last.
pub fn xds_resources(data: &[u8]) {
    served::run(async {
        let (store, mut state) = (Store::default(), State::new(NODE, NODE, "cluster.local"));
        let services = SERVICES.map(|name| name.parse().unwrap());
        for name in &services {
            assert!(store.service(name).now_or_never().is_none(), "nobody has said what {name} is");
        }
        let _ = store.address(ADDRESS.parse().unwrap()).now_or_never();
        let services = services.into_iter().map(Demand::Service);
        state.demand(services.chain([Demand::Address(ADDRESS.parse().unwrap())]));
        let (mut rest, mut held, mut number) = (data, BTreeMap::new(), 0);
        while let Some((&[kind, form, low, high], after)) = rest.split_first_chunk::<4>() {
            let (bytes, after) =
                after.split_at(after.len().min(usize::from(u16::from_le_bytes([low, high]))));
            rest = after;
            number += 1;
            respond(
                &store,
                &mut state,
                &mut held,
                number,
                Kind::PUSH_ORDER[usize::from(kind) % 8],
                form,
                bytes,
            );
        }
        let mut said = BTreeMap::new();
        for request in state.connect() {
            let kind = Kind::from_type_url(&request.type_url).unwrap();
            said.extend(
                request.initial_resource_versions.into_iter().map(|(name, version)| ((kind, name), version)),
            );
        }
        assert_eq!(said, held, "what a new stream says is in force");
        asked(&store.snapshot());
    });
}

fn respond(
    store: &Store,
    state: &mut State,
    held: &mut BTreeMap<(Kind, String), String>,
    number: u32,
    kind: Kind,
    form: u8,
    bytes: &[u8],
) {
    let name = NAMES[usize::from(form) % 8];
    let has = |bit: u8| form >> bit & 1 == 1;
    let value = if has(6) { declared(bytes) } else { bytes.to_vec() };
    if let Ok(payload) = within(value.len() * LARGEST + ALWAYS, &value, || Payload::decode(kind, &value)) {
        let written = encoded(&payload);
        let again = Payload::decode(kind, &written).map(|again| encoded(&again));
        assert_eq!(again, Ok(written), "written and read again");
    }
    let inside = if has(4) { Kind::Weights } else { kind };
    let resource = Resource {
        name: name.into(),
        version: number.to_string(),
        resource: Some(prost_types::Any { type_url: inside.type_url().into(), value: value.clone() }),
        aliases: SERVICES[..usize::from(has(7))].iter().map(ToString::to_string).collect(),
    };
    let removes = has(3);
    let response = DeltaDiscoveryResponse {
        type_url: if has(5) { "type.googleapis.com/other".into() } else { kind.type_url().into() },
        nonce: number.to_string(),
        resources: if removes { Vec::new() } else { vec![resource] },
        removed_resources: if removes { vec![name.into()] } else { Vec::new() },
        ..DeltaDiscoveryResponse::default()
    };
    let before = Arc::clone(&store.snapshot());
    let answer = match state.receive(response) {
        Received::Refuse(answer) => {
            assert!(has(5) && answer.error_detail.is_some(), "{kind:?} is not known");
            answer
        }
        Received::Apply(incoming, changes) => {
            let told = changes.first().map(|change| change.payload.is_some());
            let most = value.len() * LARGEST + (1 << 20);
            let refusals = within(most, &value, || store.apply(changes));
            assert!(refusals.len() <= usize::from(told.is_some()), "{refusals:?}");
            let reasons: Vec<_> = refusals.iter().map(|refusal| refusal.reason.clone()).collect();
            let answer = state.applied(incoming, refusals);
            let error = answer.error_detail.as_ref().map(|status| status.message.as_str());
            assert!(
                reasons.iter().all(|reason| error.is_some_and(|error| error.contains(reason))),
                "{reasons:?}"
            );
            match (error, told) {
                (None, Some(true)) => drop(held.insert((kind, name.into()), number.to_string())),
                (None, Some(false)) => drop(held.remove(&(kind, name.into()))),
                (Some(_), _) => stays(kind, &before, &store.snapshot()),
                (None, None) => {}
            }
            answer
        }
    };
    assert_eq!(answer.response_nonce, number.to_string());
    if let Some(status) = answer.error_detail {
        says(&status.message);
    }
}

/// What was in force before a refusal is in force after it.
fn stays(kind: Kind, before: &Snapshot, after: &Snapshot) {
    fn same<T>(one: &Option<Arc<T>>, other: &Option<Arc<T>>) -> bool {
        one.as_ref().map(Arc::as_ptr) == other.as_ref().map(Arc::as_ptr)
    }
    fn known<T>(one: &Known<T>, other: Option<&Known<T>>) -> bool {
        match (one, other) {
            (Known::Here(one), Some(Known::Here(other))) => Arc::ptr_eq(one, other),
            (Known::Absent, Some(Known::Absent)) => true,
            _ => false,
        }
    }
    assert!(same(&before.workload, &after.workload), "the workload");
    // Policies are in force whatever becomes of the limits beside them.
    assert!(kind == Kind::Access || same(&before.access, &after.access), "who may call");
    assert!(
        before.services.iter().all(|(name, service)| known(service, after.services.get(name))),
        "services"
    );
    assert!(
        before.addresses.iter().all(|(at, address)| known(address, after.addresses.get(at))),
        "addresses"
    );
}

/// Requests are routed by what is in force.
fn asked(snapshot: &Snapshot) {
    let (head, ()) = Request::get("http://resnet.team-a/v2/models?x=1")
        .header("x-team", "a")
        .body(())
        .unwrap()
        .into_parts();
    for service in snapshot.services.values() {
        let Known::Here(service) = service else { continue };
        for rule in &service.rules {
            black_box(rule.hostnames.iter().any(|hostname| hostname.matches("resnet.team-a")));
            black_box(rule.matches.iter().any(|like| like.matches(&head)));
        }
    }
}

/// A workload with a pipeline that is declared so.
fn declared(bytes: &[u8]) -> Vec<u8> {
    let (shape, declaration) = choice(bytes);
    let pipeline = v1::Pipeline {
        model: "m".into(),
        input: "image".into(),
        declaration: String::from_utf8_lossy(declaration).into_owned(),
        shape: vec![1, 3, u64::from(shape), u64::from(shape)],
        ..v1::Pipeline::default()
    };
    let port = v1::WorkloadPort {
        port: 8000,
        application: "127.0.0.1:8000".into(),
        pipelines: vec![pipeline],
        ..v1::WorkloadPort::default()
    };
    v1::Workload { namespace: "team-a".into(), ports: vec![port], ..v1::Workload::default() }.encode_to_vec()
}

fn encoded(payload: &Payload) -> Vec<u8> {
    match payload {
        Payload::TrustBundle(message) => message.encode_to_vec(),
        Payload::Access(message) => message.encode_to_vec(),
        Payload::Workload(message) => message.encode_to_vec(),
        Payload::Address(message) => message.encode_to_vec(),
        Payload::Service(message) => message.encode_to_vec(),
        Payload::Endpoints(message) => message.encode_to_vec(),
        Payload::Routes(message) => message.encode_to_vec(),
        Payload::Weights(message) => message.encode_to_vec(),
    }
}
