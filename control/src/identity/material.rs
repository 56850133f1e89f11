//! What a certificate authority consists of, as one value: roots, intermediates, their keys, and where a rotation stands.
//!
//! In: such a value, facts about proxies, the time. Out: what is trusted and who signs, or the value that comes next. Whoever keeps it replaces
//! it as a whole and at once (a Secret does), so there is no half of a step. Pure but for the keys that it draws.

use std::fmt;

use anyhow::{Context, Result};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use std::sync::Arc;

use super::authority::Trust;
use super::ca::{self, Issuing, Pair};
use super::rotation::{self, Facts, Phase, Step};

/// A root and what signs under it, as PEM.
#[derive(Clone, PartialEq, Eq)]
pub struct Pairs {
    /// The anchor.
    pub root: String,
    /// Its key; absent where somebody else has it, who then renews what signs.
    pub root_key: Option<String>,
    /// What signs: an intermediate directly under the root, or the root itself.
    pub issuing: String,
    /// Its key.
    pub issuing_key: String,
}

impl fmt::Debug for Pairs {
    /// Without the keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pairs({})", fingerprint(std::iter::once(self.root.as_bytes())))
    }
}

/// An anchor under which nothing is signed any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retired {
    /// As PEM.
    pub root: String,
    /// When its last certificate expires, seconds since the epoch.
    pub until: i64,
}

/// A certificate authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Material {
    /// In force; during a rotation the old ones.
    pub current: Pairs,
    /// The new ones.
    pub next: Option<Pairs>,
    /// Where a rotation stands.
    pub phase: Phase,
    /// Trusted besides, for those who still show its certificates.
    pub retired: Option<Retired>,
}

/// A short name for a list of anchors.
pub fn fingerprint<'a>(anchors: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hasher = blake3::Hasher::new();
    for anchor in anchors {
        hasher.update(&(anchor.len() as u64).to_le_bytes()).update(anchor);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

impl Pairs {
    /// A new root with an intermediate.
    pub fn fresh(now: i64) -> Result<Self> {
        let root = ca::root(now, rand::random())?;
        let issuing = ca::intermediate(&root, None, now, rand::random())?;
        Ok(Self {
            root: root.pem,
            root_key: Some(root.key.serialize_pem()),
            issuing: issuing.pem,
            issuing_key: issuing.key.serialize_pem(),
        })
    }

    /// The root.
    pub fn anchor(&self) -> Result<CertificateDer<'static>> {
        CertificateDer::from_pem_slice(self.root.as_bytes()).context("the root is not a PEM certificate")
    }

    /// Checks that it can sign.
    pub fn issuing(&self) -> Result<Arc<Issuing>> {
        let pair = ca::pair(self.issuing.as_bytes(), self.issuing_key.as_bytes())
            .context("the certificate and the key that sign are unusable")?;
        Ok(Arc::new(Issuing::new(self.anchor()?, pair)?))
    }

    /// The same with an intermediate that lasts longer, if this one is due and can be had anew.
    fn renewed(&self, now: i64) -> Result<Option<Self>> {
        let Some(root_key) = &self.root_key else { return Ok(None) };
        let issuing = CertificateDer::from_pem_slice(self.issuing.as_bytes())?;
        if !is_due(&self.anchor()?, &issuing, now)? {
            return Ok(None);
        }
        let root = ca::pair(self.root.as_bytes(), root_key.as_bytes()).context("the root is unusable")?;
        let key = ca::pair(self.issuing.as_bytes(), self.issuing_key.as_bytes())?.key;
        let fresh: Pair = ca::intermediate(&root, Some(key), now, rand::random())?;
        Ok(Some(Self { issuing: fresh.pem, ..self.clone() }))
    }
}

/// Whether an intermediate should be signed anew: it has little time left, and under a root that ends with it a new one would be
/// no better.
pub(super) fn is_due(root: &CertificateDer<'_>, intermediate: &CertificateDer<'_>, now: i64) -> Result<bool> {
    let ((_, root_until), (_, until)) = (ca::validity(root)?, ca::validity(intermediate)?);
    Ok(ca::is_due(intermediate, now)? && root_until > until)
}

impl Material {
    /// An authority that has just been made.
    pub fn fresh(now: i64) -> Result<Self> {
        Ok(Self::steady(Pairs::fresh(now)?))
    }

    /// One root, no rotation.
    pub fn steady(current: Pairs) -> Self {
        Self { current, next: None, phase: Phase::Steady, retired: None }
    }

    /// The root that is in force, or will be.
    pub fn newest(&self) -> &Pairs {
        self.next.as_ref().unwrap_or(&self.current)
    }

    /// What is trusted and who signs.
    pub fn trust(&self) -> Result<Trust> {
        let next = self.next.as_ref().map(Pairs::issuing).transpose().context("of the new root")?;
        let mut trust = Trust::of(self.phase, self.current.issuing()?, next);
        if let Some(retired) = &self.retired {
            let anchor = CertificateDer::from_pem_slice(retired.root.as_bytes())
                .context("the retired root is not a PEM certificate")?;
            if !trust.anchors.contains(&anchor) {
                trust.anchors.push(anchor);
            }
        }
        Ok(trust)
    }

    /// The state after this one, if it is time for it. `asked`: somebody wants another root. `margin`: for how long, in seconds, somebody
    /// who has not yet read of a step may sign as before it.
    pub fn advance(&self, facts: Facts, asked: bool, margin: i64, now: i64) -> Result<Option<Self>> {
        let mut after = self.clone();
        match rotation::next(self.phase, facts, now) {
            Step::Stay if asked && self.can_rotate() => {
                after.next = Some(Pairs::fresh(now)?);
                after.phase = Phase::Announced;
            }
            Step::Stay => {}
            Step::Switch { old_leaves_until } => {
                after.phase = Phase::Switched { old_leaves_until: old_leaves_until.saturating_add(margin) };
            }
            Step::Drop => after = after.promoted(),
        }
        if let Some(renewed) = after.current.renewed(now)? {
            after.current = renewed;
        }
        if let Some(renewed) = after.next.as_ref().map(|next| next.renewed(now)).transpose()?.flatten() {
            after.next = Some(renewed);
        }
        after.forget(now);
        Ok((after != *self).then_some(after))
    }

    /// Whether another root can be made here: not where somebody else has the root's key, nor while a rotation is under way.
    pub fn can_rotate(&self) -> bool {
        self.phase == Phase::Steady && self.next.is_none() && self.current.root_key.is_some()
    }

    /// The new root in the place of the old one.
    pub fn promoted(mut self) -> Self {
        if let Some(next) = self.next.take() {
            self.current = next;
        }
        self.phase = Phase::Steady;
        self
    }

    /// Drops a retired anchor whose time is over.
    pub fn forget(&mut self, now: i64) {
        self.retired.take_if(|retired| now > retired.until);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use penstock_api::SpiffeId;
    use rcgen::KeyPair;

    use super::*;

    const NOW: i64 = 1_800_000_000;
    const LEAF: Duration = Duration::from_secs(40);

    fn facts(connected: usize, acknowledged: usize) -> Facts {
        Facts { announced_for: Duration::from_secs(3_600), connected, acknowledged, leaf_lifetime: LEAF }
    }

    fn step(material: &Material, facts: Facts, asked: bool, now: i64) -> Option<Material> {
        material.advance(facts, asked, 10, now).unwrap()
    }

    #[test]
    fn a_root_is_rotated_in_steps_each_of_which_is_one_value() {
        let first = Material::fresh(NOW).unwrap();
        assert_eq!(step(&first, facts(2, 2), false, NOW), None);
        let announced = step(&first, facts(2, 2), true, NOW).unwrap();
        assert_eq!((announced.phase, announced.current == first.current), (Phase::Announced, true));
        let (old, trust) = (first.trust().unwrap(), announced.trust().unwrap());
        assert_eq!((trust.anchors.len(), trust.signer.root() == old.signer.root()), (2, true));
        assert_eq!(step(&announced, facts(2, 1), true, NOW), None, "asked again, and one knows too little");

        let switched = step(&announced, facts(2, 2), false, NOW).unwrap();
        assert_eq!(switched.phase, Phase::Switched { old_leaves_until: NOW + 50 });
        let trust = switched.trust().unwrap();
        assert!(trust.signer.root() != old.signer.root() && trust.serving.root() == old.signer.root());
        assert_eq!(step(&switched, facts(0, 0), false, NOW + 50), None);
        let last = step(&switched, facts(0, 0), false, NOW + 51).unwrap();
        assert_eq!(
            (last.phase, &last.current, last.next.is_none()),
            (Phase::Steady, switched.next.as_ref().unwrap(), true)
        );
        assert_eq!(last.trust().unwrap().anchors.len(), 1);
    }

    #[test]
    fn an_intermediate_is_renewed_for_the_same_key_unless_the_roots_key_is_elsewhere() {
        let first = Material::fresh(NOW).unwrap();
        let late = NOW + 300 * 86_400;
        assert_eq!(step(&first, facts(0, 0), false, NOW + 200 * 86_400), None);
        let renewed = step(&first, facts(0, 0), false, late).unwrap();
        assert_eq!(renewed.current.issuing_key, first.current.issuing_key);
        let (id, key) = (SpiffeId::new("cluster.local", "a", "b").unwrap(), KeyPair::generate().unwrap());
        let signer = renewed.trust().unwrap().signer;
        assert!(signer.sign(&id, &key, LEAF, NOW + 400 * 86_400, [1; 16]).is_ok());

        let supplied = Material::steady(Pairs { root_key: None, ..first.current });
        assert_eq!(step(&supplied, facts(0, 0), true, late), None, "it is not ours to rotate or renew");
    }

    #[test]
    fn a_root_that_signs_itself_is_an_authority_too() {
        let root = ca::root(NOW, [3; 16]).unwrap();
        let key = root.key.serialize_pem();
        let pairs = Pairs { root: root.pem.clone(), root_key: None, issuing: root.pem, issuing_key: key };
        let trust = Material::steady(pairs).trust().unwrap();
        let (id, key) = (SpiffeId::new("cluster.local", "a", "b").unwrap(), KeyPair::generate().unwrap());
        assert!(trust.signer.sign(&id, &key, LEAF, NOW, [1; 16]).is_ok());
    }

    #[test]
    fn a_retired_anchor_is_trusted_until_its_time_and_signs_nothing() {
        let retired = Retired { root: Pairs::fresh(NOW).unwrap().root, until: NOW + 5 };
        let material = Material { retired: Some(retired), ..Material::fresh(NOW).unwrap() };
        let trust = material.trust().unwrap();
        assert_eq!((trust.anchors.len(), trust.signer.root()), (2, &trust.anchors[0]));
        assert_eq!(step(&material, facts(0, 0), false, NOW + 5), None);
        assert_eq!(step(&material, facts(0, 0), false, NOW + 6).unwrap().retired, None);
    }

    #[test]
    fn no_key_is_in_what_is_printed() {
        let material = Material::fresh(NOW).unwrap();
        let printed = format!("{material:?}");
        assert!(!printed.contains("PRIVATE"), "{printed}");
    }
}
