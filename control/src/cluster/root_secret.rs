//! The root as it lies in the Secret `penstock-ca`, and what follows from what is found there. Pure.
//!
//! In cert-manager's shape: `tls.crt` and `tls.key` are what signs, `ca.crt` is the anchor. One that control has made (it says so on its
//! label) has besides `root.key`, and during a rotation `next-tls.crt`, `next-tls.key`, `next-ca.crt`, `next-root.key`, all in one
//! object that is replaced at once. One that somebody else has made is never written to but for annotations: where the rotation stands, and which
//! anchor is still trusted that its data does not name any more.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};

use super::secret::{
    self, AUTHORITY as ROOT, CERTIFICATE as ISSUING, KEY as ISSUING_KEY, NEXT, is_own, text,
};
use crate::identity::material::{Material, Pairs, Retired};
use crate::identity::rotation::Phase;

/// The name of the Secret.
pub const NAME: &str = "penstock-ca";
/// Annotation, by whoever wants another root: `penstock rotate-root` writes it, control removes it once both are announced.
pub const ASK: &str = "penstock.io/rotate-root";
/// Annotation: where the rotation stands.
pub const ROTATION: &str = "penstock.io/rotation";
/// What annotations begin with in which each replica says how many of its proxies know both anchors.
pub const REPLICA_PREFIX: &str = "replica.penstock.io/";

const ROOT_KEY: &str = "root.key";

/// Where a rotation stands, as the annotation has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Noted {
    #[serde(flatten)]
    pub(super) phase: Phase,
    /// The anchor that is on its way out, where the data does not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) root: Option<String>,
}

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Found {
    pub(super) version: String,
    /// Whether control has made it, and so may change it.
    pub(super) own: bool,
    pub(super) pairs: Pairs,
    pub(super) next: Option<Pairs>,
    pub(super) noted: Option<Noted>,
    /// Whether somebody wants another root.
    pub(super) asked: bool,
    /// What replicas have said.
    pub(super) replicas: BTreeMap<String, String>,
}

fn needed(secret: &Secret, key: &str) -> Result<String> {
    text(secret, key)?.with_context(|| format!("{key} is missing"))
}

/// The anchor among those of `bundle` under which the certificate stands.
fn above(bundle: &str, issuing: &str) -> Result<String> {
    let below = CertificateDer::from_pem_slice(issuing.as_bytes()).context("it is not a PEM certificate")?;
    let (_, below) = x509_parser::parse_x509_certificate(&below).context("it is not X.509")?;
    for block in bundle.split_inclusive("-----END CERTIFICATE-----") {
        let Ok(anchor) = CertificateDer::from_pem_slice(block.as_bytes()) else { continue };
        let Ok((_, parsed)) = x509_parser::parse_x509_certificate(&anchor) else { continue };
        if below.verify_signature(Some(parsed.public_key())).is_ok() {
            return Ok(format!("{}\n", block.trim()));
        }
    }
    anyhow::bail!("none of the certificates in {ROOT} has signed it; it has to stand directly under one")
}

fn pairs(secret: &Secret, prefix: &str) -> Result<Pairs> {
    let name = |key: &str| format!("{prefix}{key}");
    let (issuing, bundle) = (needed(secret, &name(ISSUING))?, needed(secret, &name(ROOT))?);
    let pairs = Pairs {
        root: above(&bundle, &issuing).with_context(|| format!("{} cannot be used", name(ISSUING)))?,
        root_key: text(secret, &name(ROOT_KEY))?,
        issuing_key: needed(secret, &name(ISSUING_KEY))?,
        issuing,
    };
    pairs.issuing().with_context(|| format!("{} and {} cannot be used", name(ISSUING), name(ISSUING_KEY)))?;
    Ok(pairs)
}

/// Reads a Secret. What is wrong is told by its key, never by what is in it.
pub(super) fn read(secret: &Secret) -> Result<Found> {
    let own = is_own(secret);
    let none = BTreeMap::new();
    let annotations = secret.metadata.annotations.as_ref().unwrap_or(&none);
    let has_next = |key: &str| secret.data.as_ref().is_some_and(|data| data.contains_key(key));
    let next = match own && has_next(&format!("{NEXT}{ISSUING}")) {
        true => Some(pairs(secret, NEXT)?),
        false => None,
    };
    let mut current = pairs(secret, "")?;
    if !own {
        // Whoever made it rotates it, even if a key of that name is there.
        current.root_key = None;
    }
    Ok(Found {
        version: secret.metadata.resource_version.clone().unwrap_or_default(),
        own,
        pairs: current,
        next,
        noted: annotations.get(ROTATION).and_then(|json| serde_json::from_str(json).ok()),
        asked: annotations.contains_key(ASK),
        replicas: annotations
            .iter()
            .filter_map(|(key, said)| Some((key.strip_prefix(REPLICA_PREFIX)?.to_owned(), said.clone())))
            .collect(),
    })
}

/// How long the certificates live that are signed now, and how long somebody may sign who has not read of a step yet; in seconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lives {
    pub(super) leaf: i64,
    pub(super) margin: i64,
}

/// What is in force from now on. `held`: what was until now, by this replica.
pub(super) fn follow(found: &Found, held: Option<&Material>, lives: Lives, now: i64) -> Material {
    let until = now.saturating_add(lives.leaf).saturating_add(lives.margin);
    let mut material = if found.own { own(found) } else { supplied(found, held, until) };
    // An anchor that vanished without a rotation, because somebody put another Secret in its place: its certificates are about.
    if let Some(held) = held {
        let known = |root: &str| {
            material.current.root == root || material.next.as_ref().is_some_and(|next| next.root == root)
        };
        // Whoever ended the rotation has waited for the last certificate of the old root.
        let over = matches!(held.phase, Phase::Switched { .. })
            && held.next.as_ref().is_some_and(|next| next.root == material.current.root);
        if material.retired.is_none() {
            if !known(&held.current.root) && !over {
                material.retired = Some(Retired { root: held.current.root.clone(), until });
            } else if let Some(retired) = &held.retired
                && !known(&retired.root)
            {
                material.retired = Some(retired.clone());
            }
        }
    }
    material.forget(now);
    material
}

fn own(found: &Found) -> Material {
    let phase = match (&found.next, found.noted.as_ref().map(|noted| noted.phase)) {
        (None, _) => Phase::Steady,
        (Some(_), Some(phase @ Phase::Switched { .. })) => phase,
        // Without the annotation it begins anew, which costs time and nothing else.
        (Some(_), _) => Phase::Announced,
    };
    Material { next: found.next.clone(), phase, ..Material::steady(found.pairs.clone()) }
}

/// A root that somebody else replaces: the old one is in nobody's hands but those who read it before.
fn supplied(found: &Found, held: Option<&Material>, until: i64) -> Material {
    let noted = found.noted.as_ref().map(|noted| noted.phase);
    let Some(held) = held else {
        // An earlier life knew the old key; this one signs by the new one, and trusts both.
        let old = found.noted.as_ref().and_then(|noted| noted.root.clone());
        let until = match noted {
            Some(Phase::Switched { old_leaves_until }) => old_leaves_until,
            _ => until,
        };
        let retired = old.filter(|old| *old != found.pairs.root).map(|root| Retired { root, until });
        return Material { retired, ..Material::steady(found.pairs.clone()) };
    };
    let mut after = held.clone();
    match &mut after.next {
        None if held.current.root == found.pairs.root => after.current = found.pairs.clone(),
        None => {
            after.next = Some(found.pairs.clone());
            after.phase = Phase::Announced;
        }
        Some(next) if next.root == found.pairs.root => {
            *next = found.pairs.clone();
            match (held.phase, noted) {
                // The holder of the Lease has decided.
                (Phase::Announced, Some(phase @ Phase::Switched { .. })) => after.phase = phase,
                (Phase::Switched { .. }, None) => after = after.promoted(),
                _ => {}
            }
        }
        // A third root before the second was in force.
        Some(_) => {
            let old = after.current.root.clone();
            after = after.promoted();
            after.retired = Some(Retired { root: old, until });
            after.next = Some(found.pairs.clone());
            after.phase = Phase::Announced;
        }
    }
    after
}

/// What the annotation should say.
pub(super) fn noted(material: &Material, own: bool) -> Option<Noted> {
    let phase = material.phase;
    material.next.as_ref()?;
    Some(Noted { phase, root: (!own).then(|| material.current.root.clone()) })
}

/// The Secret that has this authority, on the ground of the one that was found.
pub(super) fn write(material: &Material, found: Option<Secret>) -> Result<Secret> {
    let mut secret = found.unwrap_or_else(|| secret::made(NAME));
    ensure!(is_own(&secret), "it was not made by control, so it is not written to");
    let data = secret.data.get_or_insert_default();
    data.retain(|key, _| !key.starts_with(NEXT));
    let mut put = |prefix: &str, pairs: &Pairs| {
        let keys = [
            (ISSUING, Some(&pairs.issuing)),
            (ISSUING_KEY, Some(&pairs.issuing_key)),
            (ROOT, Some(&pairs.root)),
            (ROOT_KEY, pairs.root_key.as_ref()),
        ];
        for (key, value) in keys {
            if let Some(value) = value {
                data.insert(format!("{prefix}{key}"), ByteString(value.clone().into_bytes()));
            }
        }
    };
    put("", &material.current);
    if let Some(next) = &material.next {
        put(NEXT, next);
    }
    let annotations = secret.metadata.annotations.get_or_insert_default();
    annotations.retain(|key, _| {
        key != ASK
            && key != ROTATION
            && (material.phase == Phase::Announced || !key.starts_with(REPLICA_PREFIX))
    });
    if let Some(noted) = noted(material, true) {
        annotations.insert(ROTATION.to_owned(), serde_json::to_string(&noted)?);
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

    use super::*;

    const NOW: i64 = 1_800_000_000;
    const LIVES: Lives = Lives { leaf: 40, margin: 10 };

    fn fresh() -> Material {
        Material::fresh(NOW).unwrap()
    }

    fn rotating(phase: Phase) -> Material {
        Material { next: Some(fresh().current), phase, ..fresh() }
    }

    /// As cert-manager writes one: no root key, no label.
    fn supplied(pairs: &Pairs, annotations: BTreeMap<String, String>) -> Secret {
        let data = [(ISSUING, &pairs.issuing), (ISSUING_KEY, &pairs.issuing_key), (ROOT, &pairs.root)];
        Secret {
            metadata: ObjectMeta { annotations: Some(annotations), ..ObjectMeta::default() },
            data: Some(
                data.into_iter()
                    .map(|(key, pem)| (key.to_owned(), ByteString(pem.clone().into_bytes())))
                    .collect(),
            ),
            ..Secret::default()
        }
    }

    fn taken(material: &Material, annotations: BTreeMap<String, String>) -> Found {
        read(&supplied(&material.current, annotations)).unwrap()
    }

    fn note(phase: Phase, root: &str) -> BTreeMap<String, String> {
        let noted = Noted { phase, root: Some(root.to_owned()) };
        [(ROTATION.to_owned(), serde_json::to_string(&noted).unwrap())].into()
    }

    #[test]
    fn what_is_written_is_what_is_read_in_every_phase() {
        let switched = Phase::Switched { old_leaves_until: NOW + 50 };
        for material in [fresh(), rotating(Phase::Announced), rotating(switched)] {
            let found = read(&write(&material, None).unwrap()).unwrap();
            assert!(found.own);
            assert_eq!(follow(&found, None, LIVES, NOW), material);
            assert_eq!(follow(&found, Some(&material), LIVES, NOW), material);
        }
    }

    #[test]
    fn a_step_leaves_what_others_wrote_and_nothing_of_the_rotation_when_it_is_over() {
        let mut secret = write(&rotating(Phase::Announced), None).unwrap();
        let annotations = secret.metadata.annotations.as_mut().unwrap();
        for key in [ASK, "example.com/owner", "replica.penstock.io/a"] {
            annotations.insert(key.to_owned(), "x".to_owned());
        }
        let last = write(&read(&secret).map(|found| own(&found)).unwrap().promoted(), Some(secret)).unwrap();
        assert_eq!(last.metadata.annotations.unwrap().into_keys().collect::<Vec<_>>(), ["example.com/owner"]);
        let keys: Vec<_> = last.data.unwrap().into_keys().collect();
        assert_eq!(keys, [ROOT, ROOT_KEY, ISSUING, ISSUING_KEY]);
    }

    #[test]
    fn a_rotation_whose_annotation_was_taken_away_begins_anew() {
        let mut secret = write(&rotating(Phase::Switched { old_leaves_until: NOW }), None).unwrap();
        secret.metadata.annotations = None;
        assert_eq!(own(&read(&secret).unwrap()).phase, Phase::Announced);
    }

    #[test]
    fn what_makes_no_sense_is_told_by_its_key_and_shows_no_key() {
        let good = write(&fresh(), None).unwrap();
        let other = write(&fresh(), None).unwrap();
        let broken = |change: &dyn Fn(&mut BTreeMap<String, ByteString>)| {
            let mut secret = good.clone();
            change(secret.data.as_mut().unwrap());
            format!("{:#}", read(&secret).unwrap_err())
        };
        let of_other = |key: &str| other.data.as_ref().unwrap()[key].clone();
        let told = [
            broken(&|data| drop(data.remove(ISSUING))),
            broken(&|data| drop(data.insert(ISSUING_KEY.into(), of_other(ISSUING_KEY)))),
            broken(&|data| drop(data.insert(ISSUING_KEY.into(), ByteString(b"no key".to_vec())))),
            broken(&|data| drop(data.insert(ROOT.into(), of_other(ROOT)))),
            broken(&|data| drop(data.insert(ISSUING.into(), ByteString(vec![0xff])))),
        ];
        for (told, words) in told.iter().zip([
            "tls.crt is missing",
            "the key does not belong to the certificate",
            "tls.crt and tls.key cannot be used",
            "none of the certificates in ca.crt has signed it",
            "tls.crt is not PEM",
        ]) {
            assert!(told.contains(words) && !told.contains("PRIVATE"), "{told}");
        }
    }

    #[test]
    fn a_supplied_root_is_used_as_it_is_and_never_written() {
        let material = fresh();
        let secret = supplied(&material.current, BTreeMap::new());
        let found = read(&secret).unwrap();
        let followed = follow(&found, None, LIVES, NOW);
        assert!(!found.own && !followed.can_rotate());
        assert!(write(&followed, Some(secret)).unwrap_err().to_string().contains("not made by control"));
    }

    #[test]
    fn of_a_bundle_the_anchor_is_the_one_that_signed() {
        let (material, other) = (fresh(), fresh());
        let mut pairs = material.current.clone();
        pairs.root = format!("{}{}", other.current.root, pairs.root);
        let found = read(&supplied(&pairs, BTreeMap::new())).unwrap();
        assert_eq!(found.pairs.anchor().unwrap(), material.current.anchor().unwrap());
    }

    #[test]
    fn a_supplied_root_that_is_replaced_is_announced_before_it_signs() {
        let (old, new) = (fresh(), fresh());
        let held = follow(&taken(&old, BTreeMap::new()), None, LIVES, NOW);
        let announced = follow(&taken(&new, BTreeMap::new()), Some(&held), LIVES, NOW);
        assert_eq!((announced.phase, &announced.current), (Phase::Announced, &held.current));
        assert_eq!(announced.trust().unwrap().anchors.len(), 2);
        // It stays so until the holder of the Lease has gone on.
        let root = &held.current.root;
        let again = follow(&taken(&new, note(Phase::Announced, root)), Some(&announced), LIVES, NOW);
        assert_eq!(again, announced);
        let phase = Phase::Switched { old_leaves_until: NOW + 50 };
        let switched = follow(&taken(&new, note(phase, root)), Some(&again), LIVES, NOW);
        assert_eq!((switched.phase, switched.retired.is_none()), (phase, true));
        let last = follow(&taken(&new, BTreeMap::new()), Some(&switched), LIVES, NOW + 51);
        assert_eq!((last.phase, last.retired, last.current.root), (Phase::Steady, None, new.current.root));
    }

    #[test]
    fn a_replica_that_starts_during_the_overlap_trusts_the_old_anchor_too() {
        let (old, new) = (fresh(), fresh());
        let phase = Phase::Switched { old_leaves_until: NOW + 7 };
        let material = follow(&taken(&new, note(phase, &old.current.root)), None, LIVES, NOW);
        assert_eq!(material.retired, Some(Retired { root: old.current.root.clone(), until: NOW + 7 }));
        let early = follow(&taken(&new, note(Phase::Announced, &old.current.root)), None, LIVES, NOW);
        assert_eq!(early.retired.map(|retired| retired.until), Some(NOW + 50));
    }

    #[test]
    fn an_intermediate_that_was_issued_anew_is_no_rotation() {
        let old = fresh();
        let held = follow(&taken(&old, BTreeMap::new()), None, LIVES, NOW);
        let late = old.advance(
            crate::identity::rotation::Facts {
                announced_for: std::time::Duration::ZERO,
                connected: 0,
                acknowledged: 0,
                leaf_lifetime: std::time::Duration::from_secs(40),
            },
            false,
            10,
            NOW + 300 * 86_400,
        );
        let late = late.unwrap().unwrap();
        let followed = follow(&taken(&late, BTreeMap::new()), Some(&held), LIVES, NOW);
        assert_eq!((followed.phase, followed.current.issuing), (Phase::Steady, late.current.issuing));
    }

    #[test]
    fn a_root_that_was_put_in_anothers_place_leaves_the_old_anchor_trusted_for_a_while() {
        let (old, new) = (fresh(), fresh());
        let found = read(&write(&new, None).unwrap()).unwrap();
        let followed = follow(&found, Some(&old), LIVES, NOW);
        assert_eq!(followed.retired, Some(Retired { root: old.current.root, until: NOW + 50 }));
        let later = follow(&found, Some(&followed), LIVES, NOW + 20);
        assert_eq!(later.retired, followed.retired, "its time does not begin anew");
    }
}
