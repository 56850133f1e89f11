//! Who may be trusted, and what is said of those who may not.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use penstock_proxy::identity::{IdentityError, Material, explain, verified_peer};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, NamedGroup, ProtocolVersion, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use crate::authority::{Authority, DIGITS, Leaf, WEB};

type Ends = (io::Result<client::TlsStream<DuplexStream>>, io::Result<server::TlsStream<DuplexStream>>);

/// A handshake in memory. A client learns of its refusal only when it reads, so it reads a byte.
async fn shake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Ends {
    let (near, far) = tokio::io::duplex(64 << 10);
    let name = ServerName::try_from("port-8000.mesh.penstock.io").unwrap();
    let client = async move {
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        stream.read_exact(&mut [0]).await?;
        Ok(stream)
    };
    let server = async move {
        let mut stream = TlsAcceptor::from(server).accept(far).await?;
        stream.write_all(b"!").await?;
        stream.flush().await?;
        Ok(stream)
    };
    tokio::join!(client, server)
}

async fn meet(client: &Material, server: &Material) -> Ends {
    shake(Arc::clone(&client.client_h2), Arc::clone(&server.server)).await
}

fn story<T>(result: io::Result<T>) -> IdentityError {
    match result {
        Ok(_) => panic!("the handshake succeeded"),
        Err(error) => explain(&error).unwrap_or_else(|| panic!("not about identity: {error}")),
    }
}

#[tokio::test]
async fn two_of_one_mesh_prove_who_they_are() {
    let mesh = Authority::new("root");
    let (web, digits) = (mesh.material(WEB), mesh.material(DIGITS));
    let (client, server) = meet(&web, &digits).await;
    let (client, server) = (client.unwrap(), server.unwrap());
    let (seen_by_client, seen_by_server) = (client.get_ref().1, server.get_ref().1);
    assert_eq!(verified_peer(seen_by_client).unwrap().id().as_str(), DIGITS);
    assert_eq!(verified_peer(seen_by_server).unwrap().id().as_str(), WEB);
    assert_eq!(seen_by_server.alpn_protocol(), Some(b"penstock-h2".as_slice()));
    assert_eq!(seen_by_server.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let group = seen_by_server.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768, "safe against a quantum computer of later years");
    assert_eq!(
        seen_by_server.negotiated_cipher_suite().unwrap().suite(),
        rustls::CipherSuite::TLS13_AES_128_GCM_SHA256
    );
}

#[tokio::test]
async fn each_configuration_speaks_its_own_protocol() {
    let mesh = Authority::new("root");
    let (web, digits) = (mesh.material(WEB), mesh.material(DIGITS));
    for (config, alpn) in [
        (&web.client_h1, "penstock-h1"),
        (&web.client_tcp, "penstock-tcp"),
        (&web.client_plain_h2, "h2"),
        (&web.client_plain_h1, "http/1.1"),
    ] {
        let (_, server) = shake(Arc::clone(config), Arc::clone(&digits.server)).await;
        assert_eq!(server.unwrap().get_ref().1.alpn_protocol(), Some(alpn.as_bytes()));
    }
}

#[tokio::test]
async fn another_identity_than_expected_is_named_with_the_one_expected() {
    let mesh = Authority::new("root");
    let (client, _) = meet(&mesh.material(WEB), &mesh.material(DIGITS)).await;
    let peer = verified_peer(client.unwrap().get_ref().1).unwrap();
    assert_eq!(peer.expect(&DIGITS.parse().unwrap()), Ok(()));
    let error = peer.expect(&WEB.parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains(DIGITS) && error.contains(WEB), "{error}");
}

#[tokio::test]
async fn expired_certificates_are_refused_on_either_side() {
    let mesh = Authority::new("root");
    let now = SystemTime::now();
    let hour = Duration::from_secs(3600);
    let expired = Leaf { uris: &[DIGITS], not_before: now - 2 * hour, not_after: now - hour };
    let (old, fresh) = (mesh.material_of(&expired, &[&mesh]), mesh.material(WEB));
    let (client, _) = meet(&fresh, &old).await;
    let error = story(client);
    assert!(matches!(&error, IdentityError::Expired { id, .. } if id == DIGITS), "{error}");
    let (client, server) = meet(&old, &fresh).await;
    assert!(matches!(story(server), IdentityError::Expired { id, .. } if id == DIGITS));
    assert!(matches!(story(client), IdentityError::Refused(_)), "the client hears that it was refused");
}

#[tokio::test]
async fn a_certificate_of_tomorrow_points_at_the_clocks() {
    let mesh = Authority::new("root");
    let (now, hour) = (SystemTime::now(), Duration::from_secs(3600));
    let tomorrow = Leaf { uris: &[DIGITS], not_before: now + hour, not_after: now + 2 * hour };
    let (client, _) = meet(&mesh.material(WEB), &mesh.material_of(&tomorrow, &[&mesh])).await;
    let error = story(client);
    assert!(matches!(&error, IdentityError::NotYetValid { .. }), "{error}");
    assert!(error.to_string().contains("clocks"), "{error}");
}

#[tokio::test]
async fn a_stranger_is_refused_on_either_side_and_its_issuer_named() {
    let (mesh, other) = (Authority::new("root"), Authority::new("a stranger's root"));
    let (web, stranger) = (mesh.material(WEB), other.material(DIGITS));
    let trusting = other.material_of(&Leaf::of(&[DIGITS]), &[&mesh, &other]);
    let (client, _) = meet(&web, &stranger).await;
    let error = story(client);
    assert!(
        matches!(&error, IdentityError::UnknownAnchor { issuer, anchors: 1, .. } if issuer.contains("a stranger's root")),
        "{error}"
    );
    // The stranger accepts us, and we, as the server, do not accept it.
    let (_, server) = meet(&trusting, &web).await;
    assert!(matches!(story(server), IdentityError::UnknownAnchor { .. }));
}

#[tokio::test]
async fn exactly_one_spiffe_id_of_our_trust_domain_is_an_identity() {
    let mesh = Authority::new("root");
    let web = mesh.material(WEB);
    let table: [(&[&str], &str); 4] = [
        (&[], "no URI"),
        (&[WEB, DIGITS], "2 URIs"),
        (&["https://example.com/x"], "https://example.com/x"),
        (&["spiffe://elsewhere.org/ns/a/sa/digits"], "elsewhere.org"),
    ];
    for (uris, found) in table {
        let (certificate, key) = mesh.leaf(&Leaf::of(uris));
        let odd_server = ServerConfig::builder_with_provider(web.server.crypto_provider().clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], key.clone_key());
        let mut odd_server = odd_server.unwrap();
        odd_server.alpn_protocols = vec![b"penstock-h2".to_vec()];
        let (client, _) = shake(Arc::clone(&web.client_h2), Arc::new(odd_server)).await;
        let error = story(client);
        assert!(matches!(&error, IdentityError::NoIdentity { found: f, .. } if f.contains(found)), "{error}");
        let (_, server) = shake(odd_client(&mesh, Some((certificate, key))), Arc::clone(&web.server)).await;
        let error = story(server);
        assert!(matches!(&error, IdentityError::NoIdentity { found: f, .. } if f.contains(found)), "{error}");
    }
}

/// An ordinary client that asks for the mesh's ALPN.
fn odd_client(
    mesh: &Authority,
    certificate: Option<(
        rustls::pki_types::CertificateDer<'static>,
        rustls::pki_types::PrivateKeyDer<'static>,
    )>,
) -> Arc<ClientConfig> {
    let any = mesh.material(WEB);
    let builder = ClientConfig::builder_with_provider(any.server.crypto_provider().clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(
            penstock_proxy::identity::verify::MeshVerifier::new(&[mesh.anchor()], "cluster.local").unwrap(),
        ));
    let mut config = match certificate {
        Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"penstock-h2".to_vec()];
    Arc::new(config)
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let mesh = Authority::new("root");
    let (_, server) = shake(odd_client(&mesh, None), Arc::clone(&mesh.material(DIGITS).server)).await;
    assert_eq!(story(server), IdentityError::NoCertificate);
}

#[tokio::test]
async fn tls_1_2_is_not_spoken() {
    let mesh = Authority::new("root");
    let mut roots = RootCertStore::empty();
    roots.add(mesh.anchor()).unwrap();
    let old = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let (client, server) = shake(Arc::new(old), Arc::clone(&mesh.material(DIGITS).server)).await;
    assert!(client.is_err() && server.is_err());
}

#[tokio::test]
async fn roots_rotate_with_overlap_and_open_connections_stay() {
    let (old, new) = (Authority::new("old root"), Authority::new("new root"));
    let (web, digits) = (old.identity(WEB), old.identity(DIGITS));
    let now = |identity: &penstock_proxy::identity::Identity| identity.current().unwrap();
    let (client, server) = meet(&now(&web), &now(&digits)).await;
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    // Both roots are in force: old and new certificates meet in every combination.
    let both = vec![old.anchor(), new.anchor()];
    for identity in [&web, &digits] {
        let mut changed = identity.changed();
        identity.set_anchors(both.clone()).unwrap();
        assert!(changed.has_changed().unwrap());
        changed.mark_unchanged();
        identity.set_anchors(both.clone()).unwrap();
        assert!(!changed.has_changed().unwrap(), "the same anchors change nothing");
    }
    let renewed = new.material_of(&Leaf::of(&[DIGITS]), &[&old, &new]);
    for (client, server) in [(&*now(&web), &renewed), (&renewed, &*now(&web)), (&*now(&web), &*now(&digits))]
    {
        let (client, server) = meet(client, server).await;
        assert!(client.is_ok() && server.is_ok(), "{client:?} {server:?}");
    }
    // The old root is gone: what it signed is refused, and what was open goes on.
    web.set_anchors(vec![new.anchor()]).unwrap();
    let (refused, _) = meet(&now(&web), &now(&digits)).await;
    assert!(matches!(story(refused), IdentityError::UnknownAnchor { .. }));
    client.write_all(b"still here").await.unwrap();
    client.flush().await.unwrap();
    let mut heard = [0; 10];
    server.read_exact(&mut heard).await.unwrap();
    assert_eq!(&heard, b"still here");
}

#[tokio::test]
async fn anchors_that_make_no_sense_change_nothing() {
    let mesh = Authority::new("root");
    let identity = mesh.identity(WEB);
    for bad in [vec![], vec![b"not a certificate".to_vec().into()]] {
        assert!(identity.set_anchors(bad).is_err());
    }
    assert_eq!(identity.anchors(), [mesh.anchor()]);
    let shown = identity.certificates();
    let roles: Vec<_> = shown.iter().map(|certificate| (&*certificate.role, &*certificate.name)).collect();
    assert_eq!(roles[0], ("leaf", WEB));
    assert!(roles[1].0 == "anchor" && roles[1].1.contains("root"), "{roles:?}");
}

#[test]
fn files_that_do_not_belong_together_are_named() {
    let mesh = Authority::new("root");
    let (certificate, _) = mesh.leaf(&Leaf::of(&[WEB]));
    let (_, key) = mesh.leaf(&Leaf::of(&[WEB]));
    let error = Material::new(vec![certificate], key, vec![mesh.anchor()]).unwrap_err().to_string();
    assert!(error.contains(WEB) && error.contains("our key"), "{error}");
    let error = penstock_proxy::identity::material::certificates("/nowhere/leaf.pem".as_ref()).unwrap_err();
    assert!(error.to_string().contains("/nowhere/leaf.pem"), "{error}");
}
