//! The client rules of the xDS protocol, one test each.

use penstock_api::discovery::Resource;
use penstock_api::resource::pack;
use penstock_api::v1;

use super::*;

const NODE: &str = "a/client";

fn state() -> State {
    let mut state = State::new(NODE, "a/client", "cluster.local");
    state.connect();
    state
}

fn service(name: &str) -> Demand {
    Demand::Service(name.parse().unwrap())
}

fn forget(name: &str) -> Demand {
    Demand::ForgetService(name.parse().unwrap())
}

fn resource(kind: Kind, name: &str, version: &str, aliases: &[&str]) -> Resource {
    let content = match kind {
        Kind::Access => pack(kind, &v1::Access::default()),
        Kind::Workload => pack(kind, &v1::Workload::default()),
        Kind::TrustBundle => pack(kind, &v1::TrustBundle::default()),
        Kind::Service => pack(kind, &v1::Service::default()),
        Kind::Endpoints => pack(kind, &v1::Endpoints::default()),
        Kind::Routes => pack(kind, &v1::Routes::default()),
        Kind::Weights => pack(kind, &v1::Weights::default()),
        Kind::Address => pack(kind, &v1::Address::default()),
    };
    Resource {
        version: version.into(),
        resource: Some(content),
        name: name.into(),
        aliases: aliases.iter().map(ToString::to_string).collect(),
    }
}

fn response(kind: Kind, nonce: &str, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: String::new(),
        resources,
        type_url: kind.type_url().into(),
        nonce: nonce.into(),
        removed_resources: removed.iter().map(ToString::to_string).collect(),
    }
}

/// Receives and applies, refusing the named resources.
fn take(
    state: &mut State,
    response: DeltaDiscoveryResponse,
    refuse: &[&str],
) -> (Vec<Change>, DeltaDiscoveryRequest) {
    let Received::Apply(incoming, changes) = state.receive(response) else { panic!("refused as a whole") };
    let refusals = changes
        .iter()
        .filter(|change| refuse.contains(&&*change.name))
        .map(|change| Refusal {
            kind: change.kind,
            name: change.name.clone(),
            reason: "makes no sense".into(),
        })
        .collect();
    let answer = state.applied(incoming, refusals);
    (changes, answer)
}

fn names(changes: &[Change]) -> Vec<&str> {
    changes.iter().map(|change| &*change.name).collect()
}

/// The versions of a kind that a new stream would claim to hold.
fn held(state: &mut State, kind: Kind) -> Vec<(String, String)> {
    let requests = state.connect();
    let request = requests.into_iter().find(|request| request.type_url == kind.type_url());
    let mut versions: Vec<_> = request.unwrap().initial_resource_versions.into_iter().collect();
    versions.sort();
    versions
}

#[test]
fn a_stream_begins_with_anchors_and_workload_and_says_once_who_asks() {
    let requests = State::new(NODE, "a/web", "cluster.local").connect();
    let asked: Vec<_> =
        requests.iter().map(|r| (r.type_url.as_str(), r.resource_names_subscribe.as_slice())).collect();
    assert_eq!(
        asked,
        [
            (Kind::TrustBundle.type_url(), ["cluster.local".to_owned()].as_slice()),
            (Kind::Access.type_url(), [NODE.to_owned()].as_slice()),
            (Kind::Workload.type_url(), [NODE.to_owned()].as_slice()),
        ]
    );
    let node = requests[0].node.as_ref().unwrap();
    assert_eq!((node.id.as_str(), node.cluster.as_str()), (NODE, "a/web"));
    assert!(requests[1].node.is_none());
}

#[test]
fn demands_that_come_together_make_one_request_a_kind() {
    let mut state = state();
    let requests =
        state.demand([service("a/x"), service("a/y"), Demand::Address("10.0.0.1:80".parse().unwrap())]);
    assert_eq!(requests.len(), 5, "address, and the four kinds of a service");
    for request in &requests {
        let expected: &[&str] =
            if request.type_url == Kind::Address.type_url() { &["10.0.0.1:80"] } else { &["a/x", "a/y"] };
        assert_eq!(request.resource_names_subscribe, expected);
        assert!(request.response_nonce.is_empty(), "it acknowledges nothing");
    }
}

#[test]
fn the_last_demand_for_a_name_wins() {
    let mut state = state();
    let request = state.demand([service("a/x"), forget("a/x")]).remove(0);
    assert!(request.resource_names_subscribe.is_empty());
    assert_eq!(request.resource_names_unsubscribe, ["a/x"]);
    let request = state.demand([forget("a/x"), service("a/x")]).remove(0);
    assert_eq!(request.resource_names_subscribe, ["a/x"], "asked for again, so that it is sent again");
    assert!(request.resource_names_unsubscribe.is_empty());
}

#[test]
fn every_response_is_acknowledged_once_with_its_nonce() {
    let mut state = state();
    for nonce in ["1", "2"] {
        let (_, answer) = take(
            &mut state,
            response(Kind::Workload, nonce, vec![resource(Kind::Workload, NODE, nonce, &[])], &[]),
            &[],
        );
        assert_eq!((answer.response_nonce.as_str(), &answer.error_detail), (nonce, &None));
        assert_eq!(answer.type_url, Kind::Workload.type_url());
    }
    let (changes, answer) = take(&mut state, response(Kind::Workload, "3", vec![], &[]), &[]);
    assert_eq!((changes.len(), answer.response_nonce.as_str()), (0, "3"), "an empty one too");
}

#[test]
fn a_refusal_names_the_resource_and_its_siblings_are_held() {
    let mut state = state();
    state.demand([service("a/x"), service("a/y")]);
    let both = |v: &str| vec![resource(Kind::Service, "a/x", v, &[]), resource(Kind::Service, "a/y", v, &[])];
    let (changes, answer) = take(&mut state, response(Kind::Service, "1", both("v1"), &[]), &["a/y"]);
    assert_eq!(names(&changes), ["a/x", "a/y"]);
    let status = answer.error_detail.unwrap();
    assert_eq!(status.message, "Service a/y: makes no sense");
    assert_eq!(held(&mut state, Kind::Service), [("a/x".to_owned(), "v1".to_owned())]);
}

#[test]
fn a_refused_version_is_never_held_and_the_one_before_stays() {
    let mut state = state();
    state.demand([service("a/x")]);
    let version = |v: &str| vec![resource(Kind::Service, "a/x", v, &[])];
    take(&mut state, response(Kind::Service, "1", version("good"), &[]), &[]);
    take(&mut state, response(Kind::Service, "2", version("bad"), &[]), &["a/x"]);
    assert_eq!(held(&mut state, Kind::Service), [("a/x".to_owned(), "good".to_owned())]);
}

#[test]
fn what_cannot_be_decoded_is_refused_while_its_siblings_apply() {
    let mut state = state();
    state.demand([service("a/x"), service("a/y"), service("a/z")]);
    let mut broken = resource(Kind::Service, "a/x", "1", &[]);
    broken.resource.as_mut().unwrap().value = vec![0xff];
    let mut other = resource(Kind::Service, "a/y", "1", &[]);
    other.resource = resource(Kind::Routes, "a/y", "1", &[]).resource;
    let fine = resource(Kind::Service, "a/z", "1", &[]);
    let (changes, answer) =
        take(&mut state, response(Kind::Service, "1", vec![broken, other, fine], &[]), &[]);
    assert_eq!(names(&changes), ["a/z"]);
    let message = answer.error_detail.unwrap().message;
    assert!(message.contains("Service a/x: its content cannot be decoded"), "{message}");
    assert!(message.contains("Service a/y: its content is of type"), "{message}");
    assert_eq!(held(&mut state, Kind::Service).len(), 1);
}

#[test]
fn an_unknown_type_is_refused_and_never_acknowledged() {
    let mut state = state();
    let mut unknown = response(Kind::Service, "9", vec![], &[]);
    unknown.type_url = "type.googleapis.com/penstock.v2.Shiny".into();
    let Received::Refuse(answer) = state.receive(unknown) else { panic!("accepted") };
    assert_eq!(
        (answer.type_url.as_str(), answer.response_nonce.as_str()),
        ("type.googleapis.com/penstock.v2.Shiny", "9")
    );
    assert!(answer.error_detail.unwrap().message.contains("penstock.v2.Shiny"));
}

#[test]
fn a_removal_and_an_absence_reach_the_store() {
    let mut state = state();
    state.demand([service("a/x"), service("a/nothing")]);
    take(&mut state, response(Kind::Service, "1", vec![resource(Kind::Service, "a/x", "1", &[])], &[]), &[]);
    let (changes, answer) =
        take(&mut state, response(Kind::Service, "2", vec![], &["a/x", "a/nothing"]), &[]);
    assert_eq!(names(&changes), ["a/x", "a/nothing"]);
    assert!(changes.iter().all(|change| change.payload.is_none()));
    assert_eq!(answer.error_detail, None);
    assert!(held(&mut state, Kind::Service).is_empty());
}

#[test]
fn a_new_stream_subscribes_to_everything_and_says_what_is_held() {
    let mut state = state();
    state.demand([service("a/x")]);
    let weights = resource(Kind::Weights, "a/x/a/canary/0", "w1", &["a/x"]);
    take(&mut state, response(Kind::Weights, "1", vec![weights], &[]), &[]);
    let backend = resource(Kind::Endpoints, "a/x-v2", "e1", &["a/x"]);
    take(&mut state, response(Kind::Endpoints, "2", vec![backend], &[]), &[]);
    let requests = state.connect();
    assert_eq!(requests.iter().filter(|request| request.node.is_some()).count(), 1);
    for request in &requests {
        assert!(request.response_nonce.is_empty(), "nonces end with their stream");
        let expected: &[(&str, &str)] = match Kind::from_type_url(&request.type_url).unwrap() {
            Kind::Weights => &[("a/x/a/canary/0", "w1")],
            Kind::Endpoints => &[("a/x-v2", "e1")],
            _ => &[],
        };
        let expected =
            expected.iter().map(|(name, version)| (name.to_string(), version.to_string())).collect();
        assert_eq!(request.initial_resource_versions, expected, "{}", request.type_url);
        assert_eq!(request.resource_names_subscribe.len(), 1);
    }
    assert_eq!(requests.len(), 7);
}

#[test]
fn what_only_a_forgotten_name_led_to_is_forgotten_with_it() {
    let mut state = state();
    state.demand([service("a/x"), service("a/y")]);
    let shared = resource(Kind::Endpoints, "a/shared", "1", &["a/x", "a/y"]);
    let own = resource(Kind::Endpoints, "a/only-x", "1", &["a/x"]);
    take(&mut state, response(Kind::Endpoints, "1", vec![shared, own], &[]), &[]);
    let request = state.demand([forget("a/x")]).remove(0);
    assert_eq!(request.resource_names_unsubscribe, ["a/x"]);
    let names = |held: Vec<(String, String)>| held.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(held(&mut state, Kind::Endpoints)), ["a/shared"]);
    state.demand([forget("a/y")]);
    let still = state.connect().into_iter().any(|request| request.type_url == Kind::Endpoints.type_url());
    assert!(!still, "nothing is wanted of that kind any more");
}

#[test]
fn a_resource_that_crosses_its_unsubscription_is_ignored_and_acknowledged() {
    let mut state = state();
    state.demand([service("a/x")]);
    state.demand([forget("a/x")]);
    let late = response(Kind::Service, "1", vec![resource(Kind::Service, "a/x", "1", &[])], &[]);
    let (changes, answer) = take(&mut state, late, &[]);
    assert!(changes.is_empty());
    assert_eq!((answer.response_nonce.as_str(), answer.error_detail), ("1", None));
}

#[test]
fn it_is_ready_when_anchors_access_and_workload_were_applied_even_across_streams() {
    let mut state = state();
    let anchors = |v: &str| vec![resource(Kind::TrustBundle, "cluster.local", v, &[])];
    take(&mut state, response(Kind::TrustBundle, "1", anchors("bad"), &[]), &["cluster.local"]);
    assert!(!state.ready(), "refused is not applied");
    take(&mut state, response(Kind::TrustBundle, "2", anchors("good"), &[]), &[]);
    assert!(!state.ready());
    state.connect();
    take(&mut state, response(Kind::Access, "1", vec![], &[NODE]), &[]);
    assert!(!state.ready());
    take(&mut state, response(Kind::Workload, "1", vec![], &[NODE]), &[]);
    assert!(state.ready(), "a pod that control does not know yet may begin all the same");
}
