//! Having certificates signed, and signed again before they are over.
//!
//! In: where control is, the file of the token, our id. Out: a new key and certificate in the [`Identity`], time and
//! again. The key is made here, for each certificate anew, and never leaves the process. When control is gone, the
//! certificate in force stays in use until it really expires, and control is asked again and again, with backoff.
//!
//! The same when control's clock and ours disagree so much that what it signs is of no use here, which [`renewal::judge`] says: a
//! certificate that has not begun is kept, comes into force when it begins, and until then the one that was in force stays so.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use penstock_api::SpiffeId;
use penstock_api::v1::SignRequest;
use penstock_api::v1::identity_client::IdentityClient;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::time::Instant;
use tonic::{Code, Request, Status};

use super::control::Control;
use super::material::Material;
use super::renewal::Untimely;
use super::{Identity, IdentityError, renewal};
use crate::backoff::Backoff;
use crate::telemetry::metric;

/// Signing is one small question.
const SIGN_TIMEOUT: Duration = Duration::from_secs(10);
/// Timers stand still while a machine sleeps; the wall clock, which certificates follow, does not.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);

/// What it takes to have a certificate signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signer {
    /// Where control is.
    pub control: Control,
    /// The file of the bearer token, read anew each time: the kubelet replaces it.
    pub token: PathBuf,
    /// The identity that the token proves.
    pub id: SpiffeId,
}

impl Signer {
    /// Makes a key and has it certified.
    pub async fn sign(&self, identity: &Identity) -> Result<Material, IdentityError> {
        let not_signed = |why: String| IdentityError::NotSigned { id: self.id.clone(), why };
        let (key, csr) = request(&self.id).map_err(|error| not_signed(error.to_string()))?;
        let token = std::fs::read_to_string(&self.token).map_err(|error| {
            not_signed(format!("the token {} cannot be read: {error}", self.token.display()))
        })?;
        let bearer = format!("Bearer {}", token.trim())
            .parse()
            .map_err(|_| not_signed(format!("{} holds something that is no token", self.token.display())))?;
        let channel =
            self.control.connect_unproven(identity).await.map_err(|error| not_signed(error.to_string()))?;
        let mut request = Request::new(SignRequest { csr });
        request.metadata_mut().insert("authorization", bearer);
        request.set_timeout(SIGN_TIMEOUT);
        let call =
            tokio::time::timeout(SIGN_TIMEOUT, async { IdentityClient::new(channel).sign(request).await });
        let answer = match call.await {
            Ok(answer) => answer.map_err(|status| not_signed(self.refusal(&status)))?.into_inner(),
            Err(_) => return Err(not_signed(format!("no answer for {SIGN_TIMEOUT:?}"))),
        };
        let der = |certificates: Vec<Vec<u8>>| certificates.into_iter().map(CertificateDer::from).collect();
        let material = Material::new(der(answer.chain), key, der(answer.anchors))?;
        if material.id != self.id {
            return Err(not_signed(format!("the certificate that came is for {}", material.id)));
        }
        Ok(material)
    }

    fn refusal(&self, status: &Status) -> String {
        match status.code() {
            Code::Unauthenticated | Code::PermissionDenied => format!(
                "the token {} was refused: {}; make a new one with `penstock-control token`, or look at the pod's \
                 projected token",
                self.token.display(),
                status.message()
            ),
            _ => format!("{}: {}", status.code().description(), status.message()),
        }
    }
}

/// Keeps the identity signed. Runs until it is dropped.
pub async fn keep_signed(identity: Arc<Identity>, signer: Signer) {
    let (identity, signer) = (&*identity, &signer);
    keep(identity, || signer.sign(identity), SystemTime::now).await;
}

async fn keep<F>(identity: &Identity, sign: impl Fn() -> F, clock: impl Fn() -> SystemTime)
where
    F: Future<Output = Result<Material, IdentityError>>,
{
    let mut keeper = Keeper { identity, backoff: Backoff::default(), early: None, clocks_told: false };
    loop {
        let signed = sign().await;
        let mut next = Some(keeper.take(signed, clock()));
        while let Some(wait) = next {
            next = tokio::select! {
                () = sleep(wait, &clock) => keeper.begin(clock()),
                () = identity.renew_asked() => None,
            };
        }
    }
}

/// What is known between two certificates.
struct Keeper<'a> {
    identity: &'a Identity,
    backoff: Backoff,
    /// Of those that came and have not begun, the one that begins first, and when it came.
    early: Option<(Material, SystemTime)>,
    /// Whether it was said that the clocks disagree, since they last agreed.
    clocks_told: bool,
}

impl Keeper<'_> {
    /// Takes in what came of asking control; how long until there is something to do again.
    fn take(&mut self, signed: Result<Material, IdentityError>, now: SystemTime) -> Duration {
        match signed {
            Ok(material) => match self.judge(&material, now) {
                Ok(()) => {
                    count("ok");
                    self.early = None;
                    self.clocks_told = false;
                    self.put_in_force(material, now, now)
                }
                Err(how) => self.untimely(material, how, now),
            },
            Err(error) => {
                count("failed");
                self.again(error, true, Duration::ZERO, now)
            }
        }
    }

    /// The wait is over. If that was for a certificate to begin, it comes into force; `None`: control is to be asked.
    fn begin(&mut self, now: SystemTime) -> Option<Duration> {
        let (early, signed) = self.early.take()?;
        match self.judge(&early, now) {
            Ok(()) => Some(self.put_in_force(early, signed, now)),
            Err(how) => {
                self.early = matches!(how, Untimely::Early(_)).then_some((early, signed));
                None
            }
        }
    }

    fn judge(&self, material: &Material, now: SystemTime) -> Result<(), Untimely> {
        let in_force = self.identity.current().map(|current| current.validity());
        renewal::judge(material.validity(), in_force, now)
    }

    fn put_in_force(&mut self, material: Material, signed: SystemTime, now: SystemTime) -> Duration {
        self.backoff.reset();
        let valid = material.validity();
        self.identity.set(material, now);
        renewal::until_renewal(valid, signed, now, rand::random())
    }

    fn untimely(&mut self, material: Material, how: Untimely, now: SystemTime) -> Duration {
        count("clocks");
        let at = |seconds| humantime::format_rfc3339_seconds(renewal::moment(seconds)).to_string();
        let (from, until) = (at(material.not_before), at(material.not_after));
        let error = IdentityError::Untimely { id: material.id.clone(), how, from, until };
        if let Untimely::Early(_) = how
            && self.early.as_ref().is_none_or(|(other, _)| material.not_before < other.not_before)
        {
            self.early = Some((material, now));
        }
        // With one in force that is said once; without, whoever waits for us is told why each time.
        let in_force = self.identity.current();
        let aloud = in_force.is_none() || !std::mem::replace(&mut self.clocks_told, true);
        let at_least = match (how, in_force) {
            // What is in force is the better one, until it would be renewed anyhow.
            (Untimely::Older(_), Some(current)) => {
                renewal::until_renewal(current.validity(), now, now, rand::random())
            }
            _ => Duration::ZERO,
        };
        self.again(error, aloud, at_least, now)
    }

    /// There is no new certificate, or none that has begun: how long until there is something to do again.
    fn again(&mut self, error: IdentityError, aloud: bool, at_least: Duration, now: SystemTime) -> Duration {
        let backoff = self.backoff.next(rand::random());
        let in_force = self.identity.current();
        let (mut wait, state) = match &in_force {
            Some(material) => (
                renewal::until_retry(backoff, material.not_after, now).max(at_least),
                if material.not_after > renewal::unix(now) { "in force" } else { "expired" },
            ),
            None => (backoff, "none yet"),
        };
        if let Some((early, _)) = &self.early {
            let begins = renewal::moment(early.not_before).duration_since(now).unwrap_or_default();
            // Control has done what it can if one follows the other without a gap.
            let follows = in_force.is_some_and(|current| current.not_after > early.not_before);
            wait = if follows { begins } else { begins.min(wait) };
        }
        if aloud {
            tracing::warn!(%error, certificate = state, again_in = ?wait, "no new certificate");
        } else {
            tracing::debug!(%error, certificate = state, again_in = ?wait, "no new certificate");
        }
        self.identity.wanting.store(Some(Arc::new(error)));
        wait
    }
}

fn count(result: &'static str) {
    metrics::counter!(metric::CERTIFICATE_RENEWALS.name, "result" => result).increment(1);
}

/// Until the clock has gone on by `wait`, or so much time has passed: one that was put back must not make anything late.
async fn sleep(wait: Duration, clock: &impl Fn() -> SystemTime) {
    let (due, at_latest) = (clock() + wait, Instant::now() + wait);
    while let Ok(left) = due.duration_since(clock()) {
        let left = left.min(at_latest.saturating_duration_since(Instant::now()));
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(LONGEST_SLEEP)).await;
    }
}

/// A new P-256 key, and the request for a certificate that names nothing but `id`.
fn request(id: &SpiffeId) -> Result<(PrivateKeyDer<'static>, Vec<u8>), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into()?)];
    let csr = params.serialize_request(&key)?.der().to_vec();
    Ok((PrivatePkcs8KeyDer::from(key.serialize_der()).into(), csr))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI64, AtomicU32, Ordering::Relaxed};

    use super::*;

    const START: u64 = 1_800_000_000;
    const HOUR: u64 = 3_600;
    const ID: &str = "spiffe://cluster.local/ns/a/sa/web";

    /// A machine, control, and how far their clocks are off.
    struct World {
        began: Instant,
        here: AtomicI64,
        control: AtomicI64,
        lifetime: u64,
        signed: AtomicU32,
        identity: Identity,
    }

    fn off(time: SystemTime, by: &AtomicI64) -> SystemTime {
        let by = by.load(Relaxed);
        let span = Duration::from_secs(by.unsigned_abs());
        if by < 0 { time - span } else { time + span }
    }

    impl World {
        fn new(lifetime: u64) -> Self {
            Self {
                began: Instant::now(),
                here: AtomicI64::new(0),
                control: AtomicI64::new(0),
                lifetime,
                signed: AtomicU32::new(0),
                identity: Identity::new(),
            }
        }

        /// By the clock of everybody else.
        fn true_time(&self) -> SystemTime {
            renewal::moment(START) + self.began.elapsed()
        }

        fn now(&self) -> SystemTime {
            off(self.true_time(), &self.here)
        }

        async fn sign(&self) -> Result<Material, IdentityError> {
            self.signed.fetch_add(1, Relaxed);
            let now = off(self.true_time(), &self.control);
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::default();
            params.subject_alt_names = vec![SanType::URI(ID.try_into().unwrap())];
            params.not_before = (now - Duration::from_secs(30)).into();
            params.not_after = (now + Duration::from_secs(self.lifetime)).into();
            let leaf = params.self_signed(&key).unwrap().der().clone();
            let key = PrivatePkcs8KeyDer::from(key.serialize_der()).into();
            Material::new(vec![leaf.clone()], key, vec![leaf])
        }

        /// For so long; the minutes in which no certificate was in force that is valid by our clock.
        async fn runs(&self, seconds: u64) -> u32 {
            let kept = keep(&self.identity, || self.sign(), || self.now());
            let watched = async {
                let mut without = 0;
                for _ in 0..seconds / 60 {
                    tokio::time::sleep(Duration::from_secs(60)).await;
                    let now = renewal::unix(self.now());
                    let current = self.identity.current();
                    let valid =
                        |current: Arc<Material>| (current.not_before..current.not_after).contains(&now);
                    without += u32::from(!current.is_some_and(valid));
                }
                without
            };
            tokio::select! {
                () = kept => unreachable!(),
                without = watched => without,
            }
        }

        fn signed(&self) -> u32 {
            self.signed.swap(0, Relaxed)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_signed_by_a_clock_that_is_ahead_comes_into_force_when_it_begins() {
        let world = World::new(12 * HOUR);
        assert_eq!(world.runs(60).await, 0);
        let first = world.identity.current().unwrap();
        world.control.store(HOUR as i64, Relaxed);
        world.signed();
        assert_eq!(world.runs(48 * HOUR).await, 0, "minutes without a valid certificate");
        assert_ne!(world.identity.current().unwrap().chain, first.chain);
        let signed = world.signed();
        assert!((4..20).contains(&signed), "{signed} signed in two days");
    }

    #[tokio::test(start_paused = true)]
    async fn at_the_start_one_that_has_not_begun_is_not_taken_and_control_is_asked_again() {
        let world = World::new(12 * HOUR);
        world.control.store(HOUR as i64, Relaxed);
        assert_eq!(world.runs(600).await, 10, "there is none");
        let why = world.identity.wanting().unwrap().to_string();
        assert!(why.contains("control's clock is ") && why.contains(" ahead of this machine's: "), "{why}");
        let signed = world.signed();
        assert!((20..60).contains(&signed), "{signed} signed in ten minutes");
        world.control.store(0, Relaxed);
        assert_eq!(world.runs(600).await, 0, "it is asked again soon");
        assert_eq!(world.identity.wanting(), None);
        // If nobody sets it right, what was signed first begins after an hour.
        let world = World::new(12 * HOUR);
        world.control.store(HOUR as i64, Relaxed);
        let without = world.runs(2 * HOUR).await;
        assert!((58..=60).contains(&without), "{without} minutes without");
    }

    #[tokio::test(start_paused = true)]
    async fn whatever_lives_long_enough_is_in_force_in_time_and_control_signs_at_its_pace() {
        // (lifetime, control's clock jumps by, ours jumps by, the most that is signed in two days)
        let (hour, table) = (
            HOUR as i64,
            [
                (12 * HOUR, -1, 0, 20),
                (12 * HOUR, 0, 1, 20),
                // What control signs is about to end when it comes.
                (HOUR + 120, -1, 0, 5_000),
                (HOUR + 120, 0, 1, 5_000),
                (2 * HOUR, -1, 0, 500),
                (2 * HOUR, 1, 0, 200),
            ],
        );
        for (lifetime, control, here, most) in table {
            let world = World::new(lifetime);
            world.runs(60).await;
            world.control.store(control * hour, Relaxed);
            world.here.store(here * hour, Relaxed);
            let without = world.runs(48 * HOUR).await;
            // While our own clock jumps, what is in force may be over at once.
            let allowed = u32::from(here != 0);
            let case = format!("{lifetime} s, control {control} h, here {here} h");
            assert!(without <= allowed, "{case}: {without} minutes without");
            let signed = world.signed();
            assert!(signed <= most, "{case}: {signed} signed");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_is_over_or_older_than_what_is_in_force_is_not_taken() {
        let world = World::new(HOUR / 2);
        world.runs(60).await;
        let first = world.identity.current().unwrap();
        world.control.store(-(HOUR as i64), Relaxed);
        world.runs(25 * 60).await;
        assert_eq!(
            world.identity.current().unwrap().chain,
            first.chain,
            "it is better than one that is over"
        );
        let why = world.identity.wanting().unwrap().to_string();
        assert!(why.contains("behind this machine's"), "{why}");
        let signed = world.signed();
        assert!(signed < 150, "{signed} signed");
        world.control.store(0, Relaxed);
        assert_eq!(world.runs(600).await, 0, "it is asked again soon");
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_put_back_makes_no_renewal_late() {
        let world = World::new(2 * HOUR);
        let jumps = async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            world.here.store(-(HOUR as i64), Relaxed);
        };
        tokio::join!(world.runs(90 * 60), jumps);
        assert!(world.signed() > 1, "others go by another clock than we do");
    }
}
