//! The certificate authority of the mesh: what lies in the state directory, which anchors are in force, and who
//! signs with which key.
//!
//! In: the state directory, facts about proxies, the time. Out: a [`Trust`] for everyone who signs, serves or pushes anchors. In a
//! cluster a Secret takes the directory's place: whoever follows it hands over the trust that it has ([`Authority::adopt`]).
//!
//! The files: `root.pem`, `root.key`, `intermediate.pem`, `intermediate.key`, and `anchors.pem`, which is derived.
//! A rotation adds the directory `next/` with the same four files, which appears at once, and `rotation.json`
//! with its phase. Each file is replaced atomically, and each step begins with the file that commits it or can be
//! done again from the start, so a kill at any moment is repaired by the next start. An operator may put the files there
//! before the first start; `root.key` may be missing, then intermediates are renewed by the operator.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use penstock_api::SpiffeId;
use rcgen::PublicKeyData;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::watch;

use super::ca::{self, Issuing, Leaf, Pair};
use super::material;
use super::rotation::{self, Facts, Phase, Step};
use super::state::{Readers, StateDir, is_exposed};

const ROOT: &str = "root.pem";
const ROOT_KEY: &str = "root.key";
const INTERMEDIATE: &str = "intermediate.pem";
const INTERMEDIATE_KEY: &str = "intermediate.key";
/// The bundle that a proxy is given to verify control.
pub const ANCHORS: &str = "anchors.pem";
const NEXT: &str = "next";
const ROTATION: &str = "rotation.json";

/// What is trusted and who signs, at one moment.
#[derive(Debug)]
pub struct Trust {
    /// Where a rotation stands.
    pub phase: Phase,
    /// The anchors in force.
    pub anchors: Vec<CertificateDer<'static>>,
    /// Signs the certificates of workloads.
    pub signer: Arc<Issuing>,
    /// Signs control's own certificate: the old root as long as there is one, because a proxy that was away
    /// during a rotation knows no other.
    pub serving: Arc<Issuing>,
}

impl Trust {
    /// What follows from a phase, of the root in force and of the new one.
    pub(super) fn of(phase: Phase, serving: Arc<Issuing>, next: Option<Arc<Issuing>>) -> Self {
        let mut anchors = vec![serving.root().clone()];
        anchors.extend(next.as_ref().map(|next| next.root().clone()));
        let signer = match (phase, next) {
            (Phase::Switched { .. }, Some(next)) => next,
            _ => serving.clone(),
        };
        Self { phase, anchors, signer, serving }
    }
}

/// The certificate authority.
#[derive(Debug)]
pub struct Authority {
    /// Where it lies, if nobody else keeps it.
    state: Option<StateDir>,
    trust_domain: String,
    leaf_lifetime: Duration,
    trust: watch::Sender<Arc<Trust>>,
}

impl Authority {
    /// Opens the state directory, making root and intermediate on the first start and finishing what a killed
    /// process began.
    pub fn open(
        state: StateDir,
        trust_domain: &str,
        leaf_lifetime: Duration,
        now: SystemTime,
    ) -> Result<Self> {
        state.sweep(now)?;
        for key in [ROOT_KEY, INTERMEDIATE_KEY] {
            if is_exposed(&state.path(key)) {
                bail!("{} may be read by others; run `chmod 600` on it", state.path(key).display());
            }
        }
        let now = super::epoch(now);
        if !state.has(ROOT) {
            // The certificate commits: a key without one has signed nothing.
            let root = ca::root(now, rand::random())?;
            write_pair(&state, ROOT, ROOT_KEY, &root)?;
        }
        if !state.has(INTERMEDIATE) {
            let root = read_pair(&state, ROOT, ROOT_KEY)?;
            write_pair(
                &state,
                INTERMEDIATE,
                INTERMEDIATE_KEY,
                &ca::intermediate(&root, None, now, rand::random())?,
            )?;
        }
        if phase(&state)? == Phase::Promoting {
            promote(&state)?;
        }
        renew_intermediate(&state, now)?;
        let trust = watch::Sender::new(Arc::new(load(&state)?));
        Ok(Self { state: Some(state), trust_domain: trust_domain.to_owned(), leaf_lifetime, trust })
    }

    /// Signs by `trust`, which somebody else keeps.
    pub fn kept(trust: Trust, trust_domain: &str, leaf_lifetime: Duration) -> Self {
        let trust = watch::Sender::new(Arc::new(trust));
        Self { state: None, trust_domain: trust_domain.to_owned(), leaf_lifetime, trust }
    }

    /// Signs by `trust` from now on.
    pub fn adopt(&self, trust: Trust) {
        self.trust.send_replace(Arc::new(trust));
    }

    /// What is trusted, now and from now on.
    pub fn trust(&self) -> watch::Receiver<Arc<Trust>> {
        self.trust.subscribe()
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &str {
        &self.trust_domain
    }

    /// How long workload certificates live at most.
    pub fn leaf_lifetime(&self) -> Duration {
        self.leaf_lifetime
    }

    /// Signs a certificate for a workload.
    pub fn sign(&self, id: &SpiffeId, key: &impl PublicKeyData, now: i64) -> Result<Leaf> {
        let signer = self.trust.borrow().signer.clone();
        signer.sign(id, key, self.leaf_lifetime, now, rand::random())
    }

    /// Goes one step on: notices a rotation that was asked for, moves it, renews the intermediate. Returns whether
    /// anything changed. Does nothing where somebody else keeps it.
    pub fn advance(&self, facts: Facts, now: i64) -> Result<bool> {
        let Some(state) = &self.state else { return Ok(false) };
        let before = self.trust.borrow().phase;
        let mut changed = match before {
            Phase::Steady => state.has(NEXT),
            _ => false,
        };
        if !changed {
            match rotation::next(before, facts, now) {
                Step::Stay => {}
                Step::Switch { old_leaves_until } => {
                    set_phase(state, Phase::Switched { old_leaves_until })?;
                    changed = true;
                }
                Step::Drop => {
                    set_phase(state, Phase::Promoting)?;
                    promote(state)?;
                    changed = true;
                }
            }
        }
        changed |= renew_intermediate(state, now)?;
        if changed {
            self.trust.send_replace(Arc::new(load(state)?));
        }
        Ok(changed)
    }
}

/// Puts a new root beside the one in force, for a running control (or the next start) to take up.
pub fn rotate_root(state: &StateDir, now: i64) -> Result<()> {
    if !state.has(ROOT) {
        bail!(
            "{} holds no root yet; `penstock-control run` makes one on its first start",
            state.path("").display()
        );
    }
    if state.has(NEXT) || state.has(ROTATION) {
        bail!(
            "a rotation is under way already ({}); it ends when the last certificate of the old root has expired",
            match phase(state)? {
                Phase::Switched { .. } => "the new root signs, the old one is still trusted",
                _ => "both roots are announced",
            }
        );
    }
    let root = ca::root(now, rand::random())?;
    let intermediate = ca::intermediate(&root, None, now, rand::random())?;
    state.create_dir(NEXT, |next| {
        write_pair(next, ROOT, ROOT_KEY, &root)?;
        write_pair(next, INTERMEDIATE, INTERMEDIATE_KEY, &intermediate)
    })?;
    Ok(())
}

fn write_pair(
    state: &StateDir,
    certificate: &str,
    key: &str,
    pair: &Pair,
) -> Result<(), super::state::StateError> {
    state.write(key, pair.key.serialize_pem().as_bytes(), Readers::Owner)?;
    state.write(certificate, pair.pem.as_bytes(), Readers::All)
}

fn read(state: &StateDir, name: &str) -> Result<Vec<u8>> {
    state.read(name)?.with_context(|| {
        format!(
            "{} is missing; restore it, or start with an empty state directory",
            state.path(name).display()
        )
    })
}

fn read_pair(state: &StateDir, certificate: &str, key: &str) -> Result<Pair> {
    ca::pair(&read(state, certificate)?, &read(state, key)?).with_context(|| {
        format!("{} and {} are unusable", state.path(certificate).display(), state.path(key).display())
    })
}

fn phase(state: &StateDir) -> Result<Phase> {
    match state.read(ROTATION)? {
        Some(json) => serde_json::from_slice(&json).with_context(|| {
            format!("{} cannot be read; remove it to begin the rotation anew", state.path(ROTATION).display())
        }),
        None if state.has(NEXT) => Ok(Phase::Announced),
        None => Ok(Phase::Steady),
    }
}

fn set_phase(state: &StateDir, phase: Phase) -> Result<()> {
    Ok(state.write(ROTATION, &serde_json::to_vec(&phase)?, Readers::All)?)
}

/// Puts the new root's files in the old ones' place. Can be done again from any point at which it was cut off.
fn promote(state: &StateDir) -> Result<()> {
    let next = state.inner(NEXT);
    if state.has(NEXT) {
        for (name, readers) in [
            (ROOT_KEY, Readers::Owner),
            (ROOT, Readers::All),
            (INTERMEDIATE_KEY, Readers::Owner),
            (INTERMEDIATE, Readers::All),
        ] {
            state.write(name, &read(&next, name)?, readers)?;
        }
        state.remove(NEXT)?;
    }
    Ok(state.remove(ROTATION)?)
}

/// Signs the intermediates anew when they are due, for the same keys: certificates under them stay good.
fn renew_intermediate(state: &StateDir, now: i64) -> Result<bool> {
    let mut renewed = false;
    for dir in [state.clone(), state.inner(NEXT)] {
        let Some(pem) = dir.read(INTERMEDIATE)? else { continue };
        if !dir.has(ROOT_KEY) {
            continue;
        }
        let root = read_pair(&dir, ROOT, ROOT_KEY)?;
        if !material::is_due(&root.certificate, &CertificateDer::from_pem_slice(&pem)?, now)? {
            continue;
        }
        let key = read_pair(&dir, INTERMEDIATE, INTERMEDIATE_KEY)?.key;
        let fresh = ca::intermediate(&root, Some(key), now, rand::random())?;
        dir.write(INTERMEDIATE, fresh.pem.as_bytes(), Readers::All)?;
        renewed = true;
    }
    Ok(renewed)
}

fn issuing(state: &StateDir) -> Result<Arc<Issuing>> {
    let root = CertificateDer::from_pem_slice(&read(state, ROOT)?)
        .with_context(|| format!("{} is not a PEM certificate", state.path(ROOT).display()))?;
    let intermediate = read_pair(state, INTERMEDIATE, INTERMEDIATE_KEY)?;
    let issuing = Issuing::new(root, intermediate)
        .with_context(|| format!("{} cannot be used", state.path(INTERMEDIATE).display()))?;
    Ok(Arc::new(issuing))
}

/// Reads what is in force, and writes the bundle of anchors if it is not what it should be.
fn load(state: &StateDir) -> Result<Trust> {
    let phase = phase(state)?;
    let serving = issuing(state)?;
    let mut bundle = read(state, ROOT)?;
    let next = match phase {
        Phase::Steady | Phase::Promoting => None,
        Phase::Announced | Phase::Switched { .. } => {
            let next = state.inner(NEXT);
            bundle.push(b'\n');
            bundle.extend(read(&next, ROOT)?);
            Some(issuing(&next)?)
        }
    };
    if state.read(ANCHORS)?.as_ref() != Some(&bundle) {
        state.write(ANCHORS, &bundle, Readers::All)?;
    }
    Ok(Trust::of(phase, serving, next))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rcgen::KeyPair;

    use super::*;

    const LEAF: Duration = Duration::from_secs(40);
    const START: i64 = 1_800_000_000;

    fn open(path: &std::path::Path) -> Authority {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(START as u64);
        Authority::open(StateDir::open(path).unwrap(), "cluster.local", LEAF, now).unwrap()
    }

    fn facts(connected: usize, acknowledged: usize) -> Facts {
        Facts { announced_for: Duration::from_secs(3_600), connected, acknowledged, leaf_lifetime: LEAF }
    }

    fn snapshot_of(path: &std::path::Path) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<_> = fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap())
            .filter(|entry| entry.file_type().unwrap().is_file())
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
            .collect();
        files.sort();
        files
    }

    #[test]
    fn a_restart_finds_the_same_authority() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(dir.path()).trust().borrow().anchors.clone();
        let files = snapshot_of(dir.path());
        assert_eq!(open(dir.path()).trust().borrow().anchors, first);
        assert_eq!(snapshot_of(dir.path()), files);
        for key in [ROOT_KEY, INTERMEDIATE_KEY] {
            assert!(!is_exposed(&dir.path().join(key)));
        }
    }

    #[test]
    fn a_start_that_was_killed_between_any_two_files_is_finished_by_the_next() {
        // In the order in which a first start writes them.
        let order = [ROOT_KEY, ROOT, INTERMEDIATE_KEY, INTERMEDIATE, ANCHORS];
        for written in 0..=order.len() {
            let dir = tempfile::tempdir().unwrap();
            open(dir.path());
            for name in &order[written..] {
                fs::remove_file(dir.path().join(name)).unwrap();
            }
            fs::write(dir.path().join(".root.key.1.2.tmp"), b"-----BEGIN PRIV").unwrap();
            let root = fs::read(dir.path().join(ROOT)).ok();
            let authority = open(dir.path());
            if let Some(root) = root {
                assert_eq!(fs::read(dir.path().join(ROOT)).unwrap(), root, "a root in use never changes");
            }
            let key = KeyPair::generate().unwrap();
            let id = SpiffeId::new("cluster.local", "a", "b").unwrap();
            assert!(authority.sign(&id, &key, START).is_ok(), "after {written} files");
        }
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        open(dir.path());
        fs::set_permissions(dir.path().join(ROOT_KEY), fs::Permissions::from_mode(0o644)).unwrap();
        let state = StateDir::open(dir.path()).unwrap();
        let error = Authority::open(state, "cluster.local", LEAF, SystemTime::now()).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_certificate_lives_no_longer_than_asked_and_no_longer_than_its_intermediate() {
        let dir = tempfile::tempdir().unwrap();
        let authority = open(dir.path());
        let (id, key) = (SpiffeId::new("cluster.local", "a", "b").unwrap(), KeyPair::generate().unwrap());
        let leaf = authority.sign(&id, &key, START).unwrap();
        assert_eq!((leaf.not_before, leaf.not_after), (START - 4, START + 40));
        let signer = authority.trust().borrow().signer.clone();
        let long = signer.sign(&id, &key, Duration::from_secs(1 << 40), START, [1; 16]).unwrap();
        assert_eq!(long.not_after, START + 365 * 86_400);
        let error = signer.sign(&id, &key, LEAF, START + 366 * 86_400, [1; 16]).unwrap_err();
        assert!(error.to_string().contains("intermediate has expired"), "{error}");
    }

    #[test]
    fn an_intermediate_is_renewed_for_the_same_key_before_it_expires() {
        let dir = tempfile::tempdir().unwrap();
        let authority = open(dir.path());
        let key = fs::read(dir.path().join(INTERMEDIATE_KEY)).unwrap();
        assert!(!authority.advance(facts(0, 0), START + 200 * 86_400).unwrap());
        assert!(authority.advance(facts(0, 0), START + 300 * 86_400).unwrap());
        assert_eq!(fs::read(dir.path().join(INTERMEDIATE_KEY)).unwrap(), key);
        let id = SpiffeId::new("cluster.local", "a", "b").unwrap();
        assert!(authority.sign(&id, &KeyPair::generate().unwrap(), START + 400 * 86_400).is_ok());
    }

    #[test]
    fn a_root_is_rotated_by_announcing_then_signing_then_dropping() {
        let dir = tempfile::tempdir().unwrap();
        let authority = open(dir.path());
        let state = StateDir::open(dir.path()).unwrap();
        let trust = || authority.trust().borrow().clone();
        let old = trust().anchors[0].clone();
        assert!(!authority.advance(facts(2, 2), START).unwrap());

        rotate_root(&state, START).unwrap();
        assert!(rotate_root(&state, START).unwrap_err().to_string().contains("under way"));
        assert!(authority.advance(facts(2, 2), START).unwrap());
        assert_eq!((trust().phase, trust().anchors.len()), (Phase::Announced, 2));
        assert_eq!(*trust().signer.root(), old);
        assert_eq!(
            String::from_utf8(fs::read(dir.path().join(ANCHORS)).unwrap()).unwrap().matches("BEGIN").count(),
            2
        );

        assert!(!authority.advance(facts(2, 1), START).unwrap(), "one proxy does not know both anchors yet");
        assert!(authority.advance(facts(2, 2), START).unwrap());
        let new = trust().signer.root().clone();
        assert!(new != old && *trust().serving.root() == old);

        // A restart in the middle goes on where it was.
        let again = open(dir.path()).trust().borrow().phase;
        assert_eq!(again, Phase::Switched { old_leaves_until: START + 40 });

        assert!(!authority.advance(facts(2, 2), START + 40).unwrap());
        assert!(authority.advance(facts(2, 2), START + 41).unwrap());
        assert_eq!((trust().phase, trust().anchors.clone()), (Phase::Steady, vec![new.clone()]));
        assert_eq!(*trust().serving.root(), new);
        assert!(!dir.path().join(NEXT).exists() && !dir.path().join(ROTATION).exists());
    }

    #[test]
    fn a_promotion_that_was_killed_is_finished_by_the_next_start() {
        for copied in 0..=5 {
            let dir = tempfile::tempdir().unwrap();
            open(dir.path());
            let state = StateDir::open(dir.path()).unwrap();
            rotate_root(&state, START).unwrap();
            let new = fs::read(dir.path().join(NEXT).join(ROOT)).unwrap();
            set_phase(&state, Phase::Promoting).unwrap();
            for name in [ROOT_KEY, ROOT, INTERMEDIATE_KEY, INTERMEDIATE].iter().take(copied) {
                fs::copy(dir.path().join(NEXT).join(name), dir.path().join(name)).unwrap();
            }
            if copied == 5 {
                state.remove(NEXT).unwrap();
            }
            let authority = open(dir.path());
            assert_eq!(authority.trust().borrow().phase, Phase::Steady, "after {copied} files");
            assert_eq!(fs::read(dir.path().join(ROOT)).unwrap(), new);
        }
    }
}
