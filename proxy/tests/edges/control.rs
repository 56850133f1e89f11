//! Certificates and configuration from control, over real connections.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use penstock_api::discovery::{DeltaDiscoveryResponse, Resource};
use penstock_api::resource::{Kind, pack};
use penstock_api::v1;
use penstock_proxy::config::store::{Change, Demand, Refusal};
use penstock_proxy::identity::Identity;
use penstock_proxy::identity::control::ControlError;
use penstock_proxy::identity::sign::keep_signed;
use penstock_proxy::xds::{Client, Config, Sink};
use tokio::sync::{mpsc, watch};

use crate::authority::{Authority, CONTROL, DIGITS, WEB};
use crate::played::{Played, Push, within};

const HOUR: Duration = Duration::from_secs(3600);

/// Remembers what it was given, and refuses what the test says.
#[derive(Clone, Default)]
struct Recorder {
    applied: Arc<Mutex<Vec<Change>>>,
    refuse: &'static str,
}

impl Sink for Recorder {
    fn apply(&self, changes: Vec<Change>) -> Vec<Refusal> {
        let refused = |change: &Change| change.name == self.refuse;
        let refusals = changes.iter().filter(|change| refused(change)).map(|change| Refusal {
            kind: change.kind,
            name: change.name.clone(),
            reason: "makes no sense".into(),
        });
        let refusals = refusals.collect();
        self.applied.lock().unwrap().extend(changes);
        refusals
    }
}

impl Recorder {
    fn names(&self) -> Vec<String> {
        self.applied.lock().unwrap().iter().map(|change| change.name.clone()).collect()
    }
}

struct Proxy {
    played: Played,
    identity: Arc<Identity>,
    sink: Recorder,
    demands: mpsc::Sender<Demand>,
    ready: watch::Receiver<bool>,
}

async fn proxy(refuse: &'static str) -> Proxy {
    let played = Played::start(Authority::new("root"), CONTROL, HOUR).await;
    let identity = Arc::new(Identity::new());
    tokio::spawn(keep_signed(Arc::clone(&identity), played.signer(WEB)));
    let config = Config { control: played.control.clone(), node: "a/web-1".into(), account: "a/web".into() };
    let client = Client::new(config, Arc::clone(&identity));
    let ready = client.ready();
    let sink = Recorder { refuse, ..Recorder::default() };
    let (demands, wanted) = mpsc::channel(8);
    tokio::spawn(client.run(sink.clone(), wanted));
    Proxy { played, identity, sink, demands, ready }
}

fn service(name: &str, version: &str) -> Resource {
    let (namespace, short) = name.split_once('/').unwrap();
    let service = v1::Service { namespace: namespace.into(), name: short.into(), ..Default::default() };
    Resource {
        version: version.into(),
        resource: Some(pack(Kind::Service, &service)),
        name: name.into(),
        aliases: vec![],
    }
}

async fn send(push: &Push, kind: Kind, nonce: &str, resources: Vec<Resource>, removed: &[&str]) {
    let response = DeltaDiscoveryResponse {
        type_url: kind.type_url().into(),
        nonce: nonce.into(),
        resources,
        removed_resources: removed.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    push.say.send(Ok(response)).await.unwrap();
}

/// Anchors and a workload, each acknowledged.
async fn begin(push: &mut Push, anchors: Vec<Vec<u8>>) {
    let bundle = Resource {
        version: "1".into(),
        resource: Some(pack(Kind::TrustBundle, &v1::TrustBundle { anchors })),
        name: "cluster.local".into(),
        aliases: vec![],
    };
    send(push, Kind::TrustBundle, "t", vec![bundle], &[]).await;
    send(push, Kind::Access, "a", vec![], &["a/web-1"]).await;
    send(push, Kind::Workload, "w", vec![], &["a/web-1"]).await;
    for (kind, nonce) in [(Kind::TrustBundle, "t"), (Kind::Access, "a"), (Kind::Workload, "w")] {
        let answer = push.next().await;
        assert_eq!((answer.type_url.as_str(), answer.response_nonce.as_str()), (kind.type_url(), nonce));
        assert_eq!(answer.error_detail, None);
    }
}

#[tokio::test]
async fn a_proxy_comes_to_certificate_configuration_and_readiness() {
    let mut proxy = proxy("a/bad").await;
    let mut push = proxy.played.push().await;
    let first = push.next().await;
    assert_eq!(first.node.unwrap().id, "a/web-1");
    assert_eq!(first.resource_names_subscribe, ["cluster.local"]);
    for kind in [Kind::Access, Kind::Workload] {
        let own = push.next().await;
        assert_eq!(
            (own.type_url.as_str(), &own.resource_names_subscribe[..]),
            (kind.type_url(), &["a/web-1".to_owned()][..])
        );
    }
    assert!(!*proxy.ready.borrow());

    let other = Authority::new("next root");
    begin(&mut push, vec![Authority::new("x").anchor().to_vec(), other.anchor().to_vec()]).await;
    within(proxy.ready.wait_for(|ready| *ready)).await.unwrap();
    assert!(proxy.identity.anchors().contains(&other.anchor()), "pushed anchors are in force");

    for name in ["a/good", "a/bad"] {
        proxy.demands.send(Demand::Service(name.parse().unwrap())).await.unwrap();
    }
    let mut wanted = Vec::new();
    while wanted.len() < 2 {
        let request = push.next().await;
        if request.type_url == Kind::Service.type_url() {
            wanted.extend(request.resource_names_subscribe);
        }
    }
    send(&push, Kind::Service, "s", vec![service("a/good", "1"), service("a/bad", "1")], &[]).await;
    let answer = loop {
        let request = push.next().await;
        if !request.response_nonce.is_empty() {
            break request;
        }
    };
    assert_eq!(answer.response_nonce, "s");
    assert_eq!(answer.error_detail.unwrap().message, "Service a/bad: makes no sense");
    assert_eq!(proxy.sink.names(), ["a/web-1", "a/web-1", "a/good", "a/bad"]);

    // The stream ends; the next one says what is held, and only that.
    drop(push);
    let mut push = proxy.played.push().await;
    let held = loop {
        let request = push.next().await;
        if request.type_url == Kind::Service.type_url() {
            break request;
        }
    };
    assert_eq!(held.resource_names_subscribe, ["a/bad", "a/good"]);
    assert_eq!(held.initial_resource_versions, [("a/good".to_owned(), "1".to_owned())].into());
}

#[tokio::test]
async fn bad_anchors_are_refused_and_the_good_ones_stay() {
    let mut proxy = proxy("").await;
    let mut push = proxy.played.push().await;
    for _subscription in [Kind::TrustBundle, Kind::Access, Kind::Workload] {
        push.next().await;
    }
    let before = proxy.identity.anchors();
    for (nonce, anchors) in [("1", vec![]), ("2", vec![b"nonsense".to_vec()])] {
        let bundle = Resource {
            version: nonce.into(),
            resource: Some(pack(Kind::TrustBundle, &v1::TrustBundle { anchors })),
            name: "cluster.local".into(),
            aliases: vec![],
        };
        send(&push, Kind::TrustBundle, nonce, vec![bundle], &[]).await;
        let answer = push.next().await;
        assert!(answer.error_detail.unwrap().message.starts_with("TrustBundle cluster.local: "));
    }
    send(&push, Kind::TrustBundle, "3", vec![], &["cluster.local"]).await;
    assert!(push.next().await.error_detail.unwrap().message.contains("cannot be removed"));
    assert_eq!(proxy.identity.anchors(), before);
    assert!(!*proxy.ready.borrow());
}

#[tokio::test]
async fn a_refused_token_is_named_and_read_anew() {
    let played = Played::start(Authority::new("root"), CONTROL, HOUR).await;
    let (identity, signer) = (Identity::new(), played.signer(WEB));
    played.change_token("stale");
    let error = signer.sign(&identity).await.unwrap_err().to_string();
    assert!(error.contains(WEB) && error.contains("signature does not match"), "{error}");
    assert!(error.contains(&*signer.token.to_string_lossy()), "{error}");
    played.change_token("good");
    assert_eq!(signer.sign(&identity).await.unwrap().id.as_str(), WEB);
    std::fs::remove_file(&signer.token).unwrap();
    assert!(signer.sign(&identity).await.unwrap_err().to_string().contains("cannot be read"));
}

#[tokio::test]
async fn something_else_in_controls_place_gets_no_token() {
    let played = Played::start(Authority::new("root"), DIGITS, HOUR).await;
    let error = played.control.connect_unproven(&Identity::new()).await.unwrap_err();
    assert!(matches!(&error, ControlError::Identity { .. }));
    let text = error.to_string();
    assert!(text.contains(DIGITS) && text.contains(CONTROL), "{text}");
    assert!(played.signer(WEB).sign(&Identity::new()).await.is_err());
    assert_eq!(played.signed(), 0);
}

#[tokio::test]
async fn a_control_under_a_strange_root_is_refused() {
    let mut played = Played::start(Authority::new("root"), CONTROL, HOUR).await;
    let strange = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(strange.path(), Authority::new("strange").pem()).unwrap();
    played.control.ca = strange.path().to_owned();
    let error = played.control.connect_unproven(&Identity::new()).await.unwrap_err().to_string();
    assert!(error.contains("trust anchors"), "{error}");
}

#[tokio::test]
async fn control_is_followed_to_the_next_root_by_what_it_pushed() {
    let (old, new) = (Authority::new("old root"), Authority::new("new root"));
    let identity = old.identity(WEB);
    identity.set_anchors(vec![old.anchor(), new.anchor()]).unwrap();
    let mut played = Played::start(new, CONTROL, HOUR).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), old.pem()).unwrap();
    played.control.ca = file.path().to_owned();
    played.control.connect_unproven(&identity).await.unwrap();
    std::fs::remove_file(file.path()).unwrap();
    played.control.connect_unproven(&identity).await.unwrap();
}

#[tokio::test]
async fn certificates_are_renewed_in_time_and_on_demand_and_outlive_control() {
    let played = Played::start(Authority::new("root"), CONTROL, Duration::from_secs(4)).await;
    let identity = Arc::new(Identity::new());
    let mut changed = identity.changed();
    tokio::spawn(keep_signed(Arc::clone(&identity), played.signer(WEB)));
    within(changed.changed()).await.unwrap();
    let first = identity.current().unwrap();
    // Between a half and two thirds of four seconds.
    within(changed.changed()).await.unwrap();
    let second = identity.current().unwrap();
    assert_ne!(first.chain, second.chain);
    assert!(second.not_after > first.not_after);
    identity.renew_now();
    within(changed.changed()).await.unwrap();
    assert!(played.signed() >= 3);
    played.kill();
    identity.renew_now();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(identity.current().is_some(), "it stays in use while control is gone");
}
