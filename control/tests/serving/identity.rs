//! Who gets a certificate, whose certificate opens a stream, and how a root is replaced.

use std::time::Duration;

use penstock_api::resource::Kind;
use penstock_api::v1;
use penstock_control::identity::state::StateDir;
use penstock_control::identity::{rotate_root, rotation::Phase};
use prost::Message;
use rcgen::KeyPair;
use tonic::Code;

use crate::mesh::{Ads, DOMAIN, Mesh, csr, eventually, id, now};

const HOUR: Duration = Duration::from_secs(3_600);

#[tokio::test(flavor = "multi_thread")]
async fn a_token_gets_a_certificate_for_its_own_identity_only() {
    let mesh = Mesh::start(HOUR).await;
    let key = KeyPair::generate().unwrap();
    let good = mesh.token("team-a", "resnet", now() + 60);
    let signed = mesh.sign(Some(&good), csr(&key, &id("team-a", "resnet"))).await.unwrap();
    assert_eq!((signed.chain.len(), signed.anchors.len()), (2, 1));
    assert!((signed.not_after - now() - 3_600).abs() < 5, "{}", signed.not_after);

    let expired = mesh.token("team-a", "resnet", now() - 60);
    let table = [
        (Some(&*good), id("team-a", "admin"), Code::PermissionDenied, "the token proves"),
        (Some(&*expired), id("team-a", "resnet"), Code::Unauthenticated, "expired 6"),
        (Some("penstock-v1.e30.e30"), id("team-a", "resnet"), Code::Unauthenticated, "malformed"),
        (None, id("team-a", "resnet"), Code::Unauthenticated, "bearer token"),
    ];
    for (token, name, code, words) in table {
        let status = mesh.sign(token, csr(&key, &name)).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(words), "{status:?}");
    }
    let status = mesh.sign(Some(&good), vec![0; 20_000]).await.unwrap_err();
    assert!(status.message().contains("20000 bytes"), "{status:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_needs_a_certificate_and_a_node_of_its_namespace() {
    let mesh = Mesh::start(HOUR).await;
    let names = [DOMAIN];
    let refused = |channel, node: &'static str| async move {
        match Ads::open(channel, node, Kind::TrustBundle, &names).await {
            Err(status) => status,
            Ok(mut ads) => ads.responses.message().await.unwrap_err(),
        }
    };
    let status = refused(mesh.channel(None).await, "team-a/p").await;
    assert_eq!(status.code(), Code::Unauthenticated);
    assert!(status.message().contains("client certificate"), "{status:?}");
    let status = refused(mesh.proxy_channel("team-a").await, "team-b/p").await;
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("--node team-a/p"), "{status:?}");
    let status = refused(mesh.proxy_channel("team-a").await, "").await;
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_foreign_or_unknown_client_certificate_opens_nothing() {
    let mesh = Mesh::start(HOUR).await;
    let other = Mesh::start(HOUR).await;
    let good = mesh.forge(&id("team-a", "client"), HOUR, now());
    let expired = mesh.forge(&id("team-a", "client"), Duration::from_secs(60), now() - 600);
    let unknown = other.forge(&id("team-a", "client"), HOUR, now());
    let foreign = "spiffe://elsewhere/ns/team-a/sa/client".parse().unwrap();
    let foreign = mesh.forge(&foreign, HOUR, now());
    for (what, (leaf, key), fine) in [
        ("good", good, true),
        ("expired", expired, false),
        ("unknown", unknown, false),
        ("foreign", foreign, false),
    ] {
        let channel = mesh.channel(Some((leaf.chain, key))).await;
        let opened = match Ads::open(channel, "team-a/p", Kind::TrustBundle, &[DOMAIN]).await {
            Err(_) => false,
            Ok(mut ads) => ads.responses.message().await.is_ok_and(|response| response.is_some()),
        };
        assert_eq!(opened, fine, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_is_rotated_under_a_connected_proxy_without_a_restart() {
    let mesh = Mesh::start(Duration::from_secs(4)).await;
    let phase = || mesh.control.authority.trust().borrow().phase;
    let mut ads = Ads::open(mesh.proxy_channel("team-a").await, "team-a/p", Kind::TrustBundle, &[DOMAIN])
        .await
        .unwrap();
    let anchors = |response: &penstock_api::discovery::DeltaDiscoveryResponse| {
        let any = response.resources[0].resource.clone().unwrap();
        v1::TrustBundle::decode(&*any.value).unwrap().anchors
    };
    let old = anchors(&ads.take().await);
    assert_eq!(old.len(), 1);

    rotate_root(&StateDir::open(mesh.state.path()).unwrap(), now()).unwrap();
    let both = ads.next().await;
    assert_eq!(anchors(&both).len(), 2);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(phase(), Phase::Announced, "the proxy has not acknowledged both anchors");
    let (_, _, signed) = mesh.certificate("team-a", "client").await;
    assert_eq!(signed.anchors.len(), 2);

    ads.send(penstock_api::discovery::DeltaDiscoveryRequest {
        type_url: both.type_url.clone(),
        response_nonce: both.nonce.clone(),
        ..Default::default()
    })
    .await;
    eventually("the switch", || async { matches!(phase(), Phase::Switched { .. }) }).await;
    // A proxy that knows the old anchor only, and one with a certificate of the new root, are both let in.
    let (chain, key, _) = mesh.certificate("team-a", "client").await;
    let again =
        Ads::open(mesh.channel(Some((chain, key))).await, "team-a/q", Kind::TrustBundle, &[DOMAIN]).await;
    again.unwrap().take().await;

    let new = anchors(&ads.take().await);
    assert_eq!(new.len(), 1);
    assert_ne!(new, old);
    assert_eq!(phase(), Phase::Steady);
    // Control shows a certificate of the new root now, and goes on renewing it.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let (chain, key, _) = mesh.certificate("team-a", "client").await;
    let channel = mesh.channel(Some((chain, key))).await;
    Ads::open(channel, "team-a/r", Kind::TrustBundle, &[DOMAIN]).await.unwrap().take().await;
}
