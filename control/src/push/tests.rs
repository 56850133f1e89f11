//! The rules of the protocol, each a test on the pure machine.

use std::sync::Arc;
use std::time::Duration;

use penstock_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status};
use penstock_api::resource::Kind;
use penstock_api::v1;
use tokio::time::Instant;

use super::{Fault, Published, Stream};
use crate::snapshot::{Builder, Snapshot};

const NODE: &str = "team-a/client-0";

/// A client and the machine that serves it.
struct Client {
    stream: Stream,
    published: Published,
    now: Instant,
}

fn snapshot(build: impl FnOnce(&mut Builder)) -> Snapshot {
    let mut builder = Builder::default();
    build(&mut builder);
    builder.build(Vec::new())
}

fn service(builder: &mut Builder, name: &str, ips: &[&str]) {
    let (namespace, short) = name.split_once('/').unwrap();
    let service = v1::Service { namespace: namespace.into(), name: short.into(), ..v1::Service::default() };
    builder.add(Kind::Service, name, &service);
    let endpoint =
        |ip: &&str| v1::Endpoint { name: format!("p-{ip}"), ip: (*ip).into(), ..v1::Endpoint::default() };
    builder.add(Kind::Endpoints, name, &v1::Endpoints { endpoints: ips.iter().map(endpoint).collect() });
}

fn weights(builder: &mut Builder, parent: &str, rule: u32, backends: &[(&str, u32)]) -> String {
    let name = format!("{parent}/{parent}/{rule}");
    let backend = |(service, weight): &(&str, u32)| {
        builder.leads_to(parent, service);
        v1::Backend { service: (*service).into(), weight: *weight, ..v1::Backend::default() }
    };
    let backends = backends.iter().map(backend).collect();
    builder.add(
        Kind::Weights,
        &*name,
        &v1::Weights { route: parent.into(), rule, backends, ..Default::default() },
    );
    name
}

fn routes(builder: &mut Builder, parent: &str, weights: &[&str]) {
    let rule =
        |weights: &&str| v1::Rule { route: parent.into(), weights: (*weights).into(), ..v1::Rule::default() };
    builder.add(Kind::Routes, parent, &v1::Routes { rules: weights.iter().map(rule).collect() });
}

/// `a/s` splits over `a/v1` and `a/v2`.
fn canary(v2: u32, v2_ips: &[&str]) -> Snapshot {
    snapshot(|builder| {
        service(builder, "a/s", &[]);
        service(builder, "a/v1", &["10.0.0.1"]);
        service(builder, "a/v2", v2_ips);
        let name = weights(builder, "a/s", 0, &[("a/v1", 100 - v2), ("a/v2", v2)]);
        routes(builder, "a/s", &[&name]);
    })
}

impl Client {
    fn new(snapshot: Snapshot) -> Self {
        let now = Instant::now();
        let published = Published { snapshot: Arc::new(snapshot), sequence: 1, at: now };
        Self { stream: Stream::new(NODE, now), published, now }
    }

    fn publish(&mut self, snapshot: Snapshot) -> Vec<DeltaDiscoveryResponse> {
        self.published =
            Published { snapshot: Arc::new(snapshot), sequence: self.published.sequence + 1, at: self.now };
        self.due()
    }

    fn due(&mut self) -> Vec<DeltaDiscoveryResponse> {
        self.stream.responses(&self.published, self.now)
    }

    fn send(&mut self, request: DeltaDiscoveryRequest) -> Vec<DeltaDiscoveryResponse> {
        self.stream.request(&request).unwrap();
        self.due()
    }

    fn subscribe(&mut self, kind: Kind, names: &[&str]) -> Vec<DeltaDiscoveryResponse> {
        self.send(request(kind, names, &[]))
    }

    fn ack(&mut self, response: &DeltaDiscoveryResponse) -> Vec<DeltaDiscoveryResponse> {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            ..DeltaDiscoveryRequest::default()
        })
    }

    fn nack(&mut self, response: &DeltaDiscoveryResponse, reason: &str) -> Vec<DeltaDiscoveryResponse> {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: Some(Status { message: reason.into(), ..Status::default() }),
            ..DeltaDiscoveryRequest::default()
        })
    }

    /// Acknowledges everything until nothing is due; answers what came, in order.
    fn settle(&mut self, first: Vec<DeltaDiscoveryResponse>) -> Vec<String> {
        let (mut queue, mut seen) = (std::collections::VecDeque::from(first), Vec::new());
        while let Some(response) = queue.pop_front() {
            seen.push(short(&response));
            queue.extend(self.ack(&response));
        }
        seen
    }

    fn subscribe_service(&mut self, name: &str) -> Vec<String> {
        for kind in Kind::OF_SERVICE {
            self.stream.request(&request(kind, &[name], &[])).unwrap();
        }
        let due = self.due();
        self.settle(due)
    }

    fn applied(&self) -> bool {
        self.stream.applied(&self.published.snapshot)
    }
}

fn request(kind: Kind, subscribe: &[&str], unsubscribe: &[&str]) -> DeltaDiscoveryRequest {
    let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    DeltaDiscoveryRequest {
        type_url: kind.type_url().into(),
        resource_names_subscribe: owned(subscribe),
        resource_names_unsubscribe: owned(unsubscribe),
        ..DeltaDiscoveryRequest::default()
    }
}

fn names(response: &DeltaDiscoveryResponse) -> Vec<&str> {
    response.resources.iter().map(|resource| &*resource.name).collect()
}

/// `Endpoints a/v1 a/v2 -a/v3`.
fn short(response: &DeltaDiscoveryResponse) -> String {
    let kind = response.type_url.rsplit('.').next().unwrap();
    let removed = response.removed_resources.iter().map(|name| format!("-{name}"));
    let words = names(response).into_iter().map(str::to_owned).chain(removed);
    std::iter::once(kind.to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

fn shorts(responses: &[DeltaDiscoveryResponse]) -> Vec<String> {
    responses.iter().map(short).collect()
}

fn two() -> Snapshot {
    snapshot(|builder| {
        service(builder, "a/x", &["10.0.0.1"]);
        service(builder, "a/y", &["10.0.0.2"]);
    })
}

#[test]
fn each_type_is_a_stream_of_its_own_and_every_nonce_is_fresh() {
    let mut client = Client::new(two());
    let services = client.subscribe(Kind::Service, &["a/x"]);
    let endpoints = client.subscribe(Kind::Endpoints, &["a/x"]);
    assert_eq!(shorts(&services), ["Service a/x"]);
    assert_eq!(shorts(&endpoints), ["Endpoints a/x"]);
    assert_ne!(services[0].nonce, endpoints[0].nonce);
    // The nonce of one type says nothing about another.
    let mut wrong = request(Kind::Endpoints, &[], &[]);
    wrong.response_nonce = services[0].nonce.clone();
    client.send(wrong);
    assert_eq!(client.stream.resources(), 0);
}

#[test]
fn a_nack_is_known_by_its_error_and_an_ack_by_its_absence() {
    let mut client = Client::new(two());
    let sent = client.subscribe(Kind::Service, &["a/x"]);
    assert!(!client.applied());
    assert!(client.ack(&sent[0]).is_empty(), "an acknowledgement is not answered");
    assert!(client.applied() && client.stream.refused().is_empty());

    let mut client = Client::new(two());
    let sent = client.subscribe(Kind::Service, &["a/x"]);
    assert!(client.nack(&sent[0], "a/x: no such port").is_empty(), "what was refused is not sent again");
    assert!(!client.applied());
    let refused = client.stream.refused();
    assert_eq!((&*refused[0].kind, &*refused[0].reason), ("Service", "a/x: no such port"));
}

#[test]
fn a_nack_of_one_resource_leaves_its_siblings_applied() {
    let mut client = Client::new(two());
    let sent = client.subscribe(Kind::Endpoints, &["a/x", "a/y"]);
    client.nack(&sent[0], "a/y: 10.0.0.2 is no address");
    assert_eq!(client.stream.held(Kind::Endpoints, &two()), [("a/x", true), ("a/y", false)]);
    // A better version of it is sent, and clears the refusal.
    let better = client.publish(snapshot(|builder| {
        service(builder, "a/x", &["10.0.0.1"]);
        service(builder, "a/y", &["10.0.0.3"]);
    }));
    assert_eq!(shorts(&better), ["Endpoints a/y"]);
    client.ack(&better[0]);
    assert!(client.applied() && client.stream.refused().is_empty());
}

#[test]
fn a_stale_nonce_acknowledges_nothing_but_its_subscriptions_count() {
    let mut client = Client::new(two());
    client.subscribe(Kind::Service, &["a/x"]);
    let mut stale = request(Kind::Service, &["a/y"], &[]);
    stale.response_nonce = "long-gone".into();
    assert_eq!(shorts(&client.send(stale)), ["Service a/y"]);
    assert_eq!(client.stream.resources(), 0);
}

#[test]
fn a_spontaneous_request_is_no_acknowledgement() {
    let mut client = Client::new(two());
    client.subscribe(Kind::Service, &["a/x"]);
    client.subscribe(Kind::Service, &["a/y"]);
    assert_eq!(client.stream.resources(), 0);
}

#[test]
fn what_is_subscribed_again_is_sent_again() {
    let mut client = Client::new(two());
    client.subscribe_service("a/x");
    let again = client.subscribe(Kind::Service, &["a/x"]);
    assert_eq!(shorts(&again), ["Service a/x"]);
    client.settle(again);
    assert!(client.due().is_empty() && client.applied());
}

#[test]
fn what_is_subscribed_again_under_another_name_is_sent_with_both() {
    let mut client = Client::new(canary(10, &["10.0.0.2"]));
    client.subscribe_service("a/s");
    let again = client.subscribe(Kind::Endpoints, &["a/v2"]);
    assert_eq!(shorts(&again), ["Endpoints a/v2"]);
    assert_eq!(again[0].resources[0].aliases, ["a/s"]);
}

#[test]
fn unsubscribing_from_an_unknown_name_is_ignored() {
    let mut client = Client::new(two());
    client.subscribe_service("a/x");
    assert!(client.send(request(Kind::Service, &[], &["a/unknown"])).is_empty());
    assert!(client.applied());
}

#[test]
fn what_was_unsubscribed_is_neither_answered_nor_sent_any_more() {
    let mut client = Client::new(two());
    client.subscribe_service("a/x");
    client.subscribe_service("a/y");
    assert!(client.send(request(Kind::Endpoints, &[], &["a/x"])).is_empty());
    let next = client.publish(snapshot(|builder| {
        service(builder, "a/x", &["10.1.0.1"]);
        service(builder, "a/y", &["10.1.0.2"]);
    }));
    assert_eq!(shorts(&next), ["Endpoints a/y"]);
}

#[test]
fn a_resource_under_two_names_stays_until_both_are_unsubscribed() {
    let mut client = Client::new(canary(10, &["10.0.0.2"]));
    client.subscribe_service("a/s");
    client.subscribe_service("a/v2");
    client.send(request(Kind::Endpoints, &[], &["a/s"]));
    let snapshot = client.published.snapshot.clone();
    let held = client.stream.held(Kind::Endpoints, &snapshot);
    assert_eq!(held, [("a/v2", true)]);
    client.send(request(Kind::Endpoints, &[], &["a/v2"]));
    assert!(client.stream.held(Kind::Endpoints, &client.published.snapshot.clone()).is_empty());
}

#[test]
fn a_name_unsubscribed_beside_a_wildcard_is_answered() {
    let mut client = Client::new(two());
    let first = client.subscribe(Kind::Service, &["*", "a/x", "a/gone"]);
    assert_eq!(shorts(&first), ["Service a/x a/y -a/gone"]);
    client.settle(first);
    let answer = client.send(request(Kind::Service, &[], &["a/x", "a/gone"]));
    assert_eq!(shorts(&answer), ["Service a/x -a/gone"]);
    client.settle(answer);
    assert!(client.applied());
}

#[test]
fn a_wildcard_is_everything_of_the_type_spoken_or_not() {
    let mut client = Client::new(two());
    let spoken = client.subscribe(Kind::Service, &["*"]);
    let silent = client.subscribe(Kind::Endpoints, &[]);
    assert_eq!(
        (short(&spoken[0]), short(&silent[0])),
        ("Service a/x a/y".into(), "Endpoints a/x a/y".into())
    );
    assert!(spoken[0].resources.iter().all(|resource| resource.aliases.is_empty()));
    client.settle(spoken);
    client.settle(silent);
    let next = client.publish(snapshot(|builder| {
        service(builder, "a/y", &["10.0.0.2"]);
        service(builder, "a/z", &["10.0.0.3"]);
    }));
    assert_eq!(client.settle(next), ["Service a/z -a/x", "Endpoints a/z -a/x"]);
}

#[test]
fn a_wildcard_over_nothing_is_answered_so_that_nobody_waits() {
    let mut client = Client::new(snapshot(|_| {}));
    assert_eq!(shorts(&client.subscribe(Kind::Service, &["*"])), ["Service"]);
    assert_eq!(shorts(&client.subscribe(Kind::Endpoints, &[])), ["Endpoints"]);
}

#[test]
fn once_a_name_was_given_an_empty_set_means_nothing() {
    let mut client = Client::new(two());
    let first = client.subscribe(Kind::Service, &[]);
    client.settle(first);
    let named = client.subscribe(Kind::Service, &["a/x"]);
    client.settle(named);
    assert_eq!(client.stream.held(Kind::Service, &two()), [("a/x", true)]);
    client.send(request(Kind::Service, &[], &["a/x"]));
    assert!(client.subscribe(Kind::Service, &[]).is_empty());
    assert!(client.stream.held(Kind::Service, &two()).is_empty());
}

#[test]
fn subscribing_and_unsubscribing_the_wildcard_at_once_means_nothing() {
    let mut client = Client::new(two());
    assert!(client.send(request(Kind::Service, &["*"], &["*"])).is_empty());
    assert!(client.publish(canary(10, &["10.0.0.2"])).is_empty());
}

#[test]
fn what_does_not_exist_is_said_at_once_and_pushed_when_it_appears() {
    let mut client = Client::new(two());
    let absent = client.subscribe(Kind::Service, &["a/later"]);
    assert_eq!(shorts(&absent), ["Service -a/later"]);
    client.settle(absent);
    assert!(client.due().is_empty() && client.applied());
    let appeared = client.publish(snapshot(|builder| service(builder, "a/later", &[])));
    assert_eq!(shorts(&appeared), ["Service a/later"]);
    client.settle(appeared);
    let gone = client.publish(two());
    assert_eq!(client.settle(gone), ["Service -a/later"]);
    assert!(client.applied());
}

#[test]
fn a_reconnecting_client_is_sent_nothing_that_it_has() {
    let mut first = Client::new(canary(10, &["10.0.0.2"]));
    let mut have = std::collections::BTreeMap::new();
    for kind in Kind::OF_SERVICE {
        let sent = first.subscribe(kind, &["a/s"]);
        for resource in sent.iter().flat_map(|response| &response.resources) {
            have.insert((kind, resource.name.clone()), resource.version.clone());
        }
        first.settle(sent);
    }
    let again = |client: &mut Client, kind: Kind| {
        let mut request = request(kind, &["a/s"], &[]);
        let of_kind = have.iter().filter(|((k, _), _)| *k == kind);
        request.initial_resource_versions =
            of_kind.map(|((_, name), version)| (name.clone(), version.clone())).collect();
        client.send(request)
    };
    // Another replica, or control after a restart.
    let mut client = Client::new(canary(10, &["10.0.0.2"]));
    for kind in Kind::OF_SERVICE {
        assert!(again(&mut client, kind).is_empty(), "{kind:?}");
    }
    assert!(client.applied());
    assert_eq!(shorts(&client.publish(canary(20, &["10.0.0.2"]))), ["Weights a/s/a/s/0"]);

    // What changed or vanished meanwhile is said, and only that.
    let mut client = Client::new(snapshot(|builder| {
        service(builder, "a/s", &[]);
        service(builder, "a/v1", &["10.0.0.9"]);
        let name = weights(builder, "a/s", 0, &[("a/v1", 1)]);
        routes(builder, "a/s", &[&name]);
    }));
    for kind in Kind::OF_SERVICE {
        let mut request = request(kind, &["a/s"], &[]);
        request.initial_resource_versions =
            have.iter().filter(|((k, _), _)| *k == kind).map(|((_, n), v)| (n.clone(), v.clone())).collect();
        client.stream.request(&request).unwrap();
    }
    let due = client.due();
    let seen = client.settle(due);
    assert_eq!(seen, ["Endpoints a/v1", "Weights a/s/a/s/0", "Service -a/v2", "Endpoints -a/v2"]);
    assert!(client.applied());
}

#[test]
fn no_name_is_twice_in_a_response_and_an_unchanged_snapshot_sends_nothing() {
    let mut client = Client::new(canary(10, &["10.0.0.2"]));
    let sent = client.subscribe(Kind::Endpoints, &["a/s", "a/v1", "a/v2"]);
    assert_eq!(shorts(&sent), ["Endpoints a/s a/v1 a/v2"]);
    client.settle(sent);
    assert!(client.publish(canary(10, &["10.0.0.2"])).is_empty());
    assert!(client.applied());
}

#[test]
fn a_subscription_to_a_service_is_answered_with_what_its_routes_lead_to() {
    let mut client = Client::new(canary(10, &["10.0.0.2"]));
    let seen = client.subscribe_service("a/s");
    assert_eq!(seen, ["Service a/s a/v1 a/v2", "Endpoints a/s a/v1 a/v2", "Routes a/s", "Weights a/s/a/s/0"]);
    assert!(client.applied());
}

#[test]
fn resources_name_the_subscriptions_that_they_answer() {
    let mut client = Client::new(canary(10, &["10.0.0.2"]));
    let sent = client.subscribe(Kind::Endpoints, &["a/s"]);
    let aliases: Vec<_> = sent[0].resources.iter().map(|r| (&*r.name, r.aliases.clone())).collect();
    assert_eq!(
        aliases,
        [("a/s", vec![]), ("a/v1", vec!["a/s".to_owned()]), ("a/v2", vec!["a/s".to_owned()])]
    );
}

#[test]
fn a_weight_is_the_only_thing_that_a_canary_step_sends() {
    let mut client = Client::new(canary(0, &["10.0.0.2"]));
    client.subscribe_service("a/s");
    let step = client.publish(canary(10, &["10.0.0.2"]));
    assert_eq!(shorts(&step), ["Weights a/s/a/s/0"]);
    let bytes = prost::Message::encoded_len(&step[0]);
    assert!(bytes < 250, "{bytes} bytes");
    let payload = step[0].resources[0].resource.as_ref().unwrap().value.len();
    assert!(payload < 40, "{payload} bytes");
}

#[test]
fn weights_wait_until_the_endpoints_they_need_are_acknowledged() {
    let mut client = Client::new(canary(0, &[]));
    client.subscribe_service("a/s");
    let step = client.publish(canary(50, &["10.0.0.2"]));
    assert_eq!(
        shorts(&step),
        ["Endpoints a/v2"],
        "nothing may point at endpoints that are still on their way"
    );
    assert!(client.due().is_empty());
    let next = client.ack(&step[0]);
    assert_eq!(shorts(&next), ["Weights a/s/a/s/0"]);
    client.settle(next);
    assert!(client.applied());
}

#[test]
fn weights_do_not_wait_for_ever_for_endpoints_that_keep_changing() {
    let mut client = Client::new(canary(0, &[]));
    client.subscribe_service("a/s");
    let first = client.publish(canary(50, &["10.0.0.2"]));
    // Before the client acknowledges, the endpoints have moved on.
    assert!(client.publish(canary(50, &["10.0.0.3"])).is_empty());
    let next = client.ack(&first[0]);
    assert_eq!(shorts(&next), ["Endpoints a/v2", "Weights a/s/a/s/0"]);
}

#[test]
fn weights_wait_for_refused_endpoints_only_if_there_are_no_older_ones() {
    let mut client = Client::new(canary(0, &["10.0.0.2"]));
    client.subscribe_service("a/s");
    let step = client.publish(canary(50, &["bad"]));
    let next = client.nack(&step[0], "a/v2: bad is no address");
    assert_eq!(shorts(&next), ["Weights a/s/a/s/0"], "the older endpoints serve");

    let mut client = Client::new(canary(0, &["bad"]));
    for kind in Kind::OF_SERVICE {
        client.stream.request(&request(kind, &["a/s"], &[])).unwrap();
    }
    for response in client.due() {
        let next = client.nack(&response, "a/v2: bad is no address");
        assert!(next.is_empty(), "{next:?}");
    }
    assert!(!client.applied());
}

#[test]
fn endpoints_are_removed_after_the_weights_that_named_them_are_gone() {
    let mut client = Client::new(canary(50, &["10.0.0.2"]));
    client.subscribe_service("a/s");
    let without_v2 = || {
        snapshot(|builder| {
            service(builder, "a/s", &[]);
            service(builder, "a/v1", &["10.0.0.1"]);
            let name = weights(builder, "a/s", 0, &[("a/v1", 100)]);
            routes(builder, "a/s", &[&name]);
        })
    };
    let step = client.publish(without_v2());
    assert_eq!(shorts(&step), ["Weights a/s/a/s/0"]);
    let after = client.ack(&step[0]);
    assert_eq!(shorts(&after), ["Service -a/v2", "Endpoints -a/v2"]);
    client.settle(after);
    assert!(client.applied());

    // A client that refuses the new weights keeps what the old ones lead to.
    let mut client = Client::new(canary(50, &["10.0.0.2"]));
    client.subscribe_service("a/s");
    let step = client.publish(without_v2());
    assert!(client.nack(&step[0], "a/s/a/s/0: no").is_empty());
}

#[test]
fn routes_in_use_wait_for_the_weights_that_they_name_anew() {
    let mut client = Client::new(canary(10, &["10.0.0.2"]));
    client.subscribe_service("a/s");
    let step = client.publish(snapshot(|builder| {
        service(builder, "a/s", &[]);
        service(builder, "a/v1", &["10.0.0.1"]);
        service(builder, "a/v2", &["10.0.0.2"]);
        let old = weights(builder, "a/s", 0, &[("a/v1", 90), ("a/v2", 10)]);
        let new = weights(builder, "a/s", 1, &[("a/v2", 1)]);
        routes(builder, "a/s", &[&new, &old]);
    }));
    assert_eq!(shorts(&step), ["Weights a/s/a/s/1"]);
    assert_eq!(client.settle(step), ["Weights a/s/a/s/1", "Routes a/s"]);
    // And the way back: the route lets go before the weights do.
    let back = client.publish(canary(10, &["10.0.0.2"]));
    assert_eq!(client.settle(back), ["Routes a/s", "Weights -a/s/a/s/1"]);
    assert!(client.applied());
}

#[test]
fn a_deleted_service_is_taken_down_from_what_refers_to_what_is_referred_to() {
    let mut client = Client::new(canary(10, &["10.0.0.2"]));
    client.subscribe_service("a/s");
    let gone = client.publish(snapshot(|_| {}));
    let seen = client.settle(gone);
    assert_eq!(
        seen,
        ["Routes -a/s", "Weights -a/s -a/s/a/s/0", "Service -a/s -a/v1 -a/v2", "Endpoints -a/s -a/v1 -a/v2",]
    );
    assert!(client.applied());
}

#[test]
fn two_snapshots_in_a_row_merge_while_an_acknowledgement_is_outstanding() {
    let mut client = Client::new(canary(0, &["10.0.0.2"]));
    client.subscribe_service("a/s");
    let first = client.publish(canary(10, &["10.0.0.2"]));
    assert!(client.publish(canary(20, &["10.0.0.2"])).is_empty());
    assert!(client.publish(canary(30, &["10.0.0.2"])).is_empty());
    let merged = client.ack(&first[0]);
    assert_eq!(shorts(&merged), ["Weights a/s/a/s/0"]);
    let newest = canary(30, &["10.0.0.2"]);
    assert_eq!(merged[0].resources[0].version, newest.get(Kind::Weights, "a/s/a/s/0").unwrap().version);
    assert!(client.ack(&merged[0]).is_empty() && client.applied());
}

#[test]
fn a_new_subscription_overtakes_an_acknowledgement_but_only_so_often() {
    let mut client = Client::new(two());
    client.subscribe(Kind::Service, &["a/x"]);
    let mut answered = 0;
    for _ in 0..20 {
        answered += client.subscribe(Kind::Service, &["a/y"]).len();
    }
    assert_eq!(answered, 7, "eight responses may be unacknowledged");
}

#[test]
fn an_unknown_type_is_answered_and_the_stream_lives_on() {
    let mut client = Client::new(two());
    let mut unknown = request(Kind::Service, &["a", "b"], &[]);
    unknown.type_url = "type.googleapis.com/envoy.config.cluster.v3.Cluster".into();
    let answer = client.send(unknown.clone());
    assert_eq!(shorts(&answer), ["Cluster -a -b"]);
    assert!(client.ack(&answer[0]).is_empty(), "its acknowledgement is not answered");
    assert_eq!(shorts(&client.subscribe(Kind::Service, &["a/x"])), ["Service a/x"]);
}

#[test]
fn a_proxy_sees_its_own_workload_only() {
    let world = || {
        snapshot(|builder| {
            for name in [NODE, "team-b/other-0"] {
                builder.add(
                    Kind::Workload,
                    name,
                    &v1::Workload { name: name.into(), ..v1::Workload::default() },
                );
            }
        })
    };
    let mut client = Client::new(world());
    assert_eq!(shorts(&client.subscribe(Kind::Workload, &[NODE])), ["Workload team-a/client-0"]);
    assert_eq!(shorts(&Client::new(world()).subscribe(Kind::Workload, &["*"])), ["Workload team-a/client-0"]);
    let fault = client.stream.request(&request(Kind::Workload, &["team-b/other-0"], &[])).unwrap_err();
    assert_eq!(
        fault,
        Fault::Forbidden(
            "team-a/client-0 may see what is its own pod's only, not team-b/other-0; check the node id of the proxy".into()
        )
    );
}

#[test]
fn what_a_client_can_make_control_remember_is_bounded() {
    let mut client = Client::new(two());
    let long = "x".repeat(2_000);
    assert!(matches!(
        client.stream.request(&request(Kind::Service, &[&long], &[])),
        Err(Fault::Malformed(_))
    ));
    let many: Vec<String> = (0..60_000).map(|i| format!("a/s{i}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    assert!(matches!(client.stream.request(&request(Kind::Service, &many, &[])), Err(Fault::Malformed(_))));
}

#[test]
fn a_large_answer_comes_in_parts() {
    let ips: Vec<String> =
        (0..20_000).map(|i| format!("10.{}.{}.{}", i >> 16, (i >> 8) & 255, i & 255)).collect();
    let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
    let mut client = Client::new(snapshot(|builder| {
        for name in 0..8 {
            service(builder, &format!("a/s{name}"), &ips);
        }
    }));
    let first = client.subscribe(Kind::Endpoints, &["*"]);
    assert!(names(&first[0]).len() < 8 && prost::Message::encoded_len(&first[0]) < 3 << 20);
    let seen = client.settle(first);
    assert!(seen.len() > 1, "{seen:?}");
    assert!(client.applied());
}

#[test]
fn how_long_a_snapshot_took_to_be_applied_is_remembered() {
    let mut client = Client::new(canary(0, &["10.0.0.2"]));
    assert!(!client.applied(), "nothing is applied before anything is subscribed");
    client.subscribe_service("a/s");
    assert_eq!(client.stream.applied_after(1), Some(Duration::ZERO));
    let step = client.publish(canary(10, &["10.0.0.2"]));
    assert_eq!(client.stream.applied_after(2), None);
    assert_eq!(client.stream.waiting_since(), Some(client.now));
    client.now += Duration::from_millis(7);
    client.ack(&step[0]);
    assert_eq!(client.stream.applied_after(2), Some(Duration::from_millis(7)));
    assert_eq!(client.stream.waiting_since(), None);
}
