//! Which replica writes: the Lease `penstock-control`, held as client-go's leader election holds one.
//!
//! In: the Lease as the API has it, the time. Out: whether this replica holds it. Every replica pushes, signs and injects; what is
//! written for all of them (a rotation's next step, trust anchors, the webhook's certificate) is written by the holder, and
//! each of those writes names the version that it rests on, so that two who think that they hold it for a moment do no harm.
//!
//! Nobody's clock is compared with anybody else's: a holder is gone when the Lease has not changed for its own length on the *observer's*
//! clock, and a holder stops believing in itself earlier, 10 s after its last renewal was begun, whether an answer came or not. The crate
//! `kube-leader-election` compares the time in the Lease with the local clock, so this is our own.

use std::time::Duration;

use anyhow::Result;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use metrics::gauge;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::{Outcome, Place, outcome};
use crate::metric;
use crate::trouble::Trouble;

/// The name of the Lease.
const NAME: &str = "penstock-control";
/// How long a holder that says nothing is still taken for one, in seconds.
const LENGTH: i32 = 15;
/// How long a holder that cannot renew goes on writing: less than [`LENGTH`], so that it has stopped before another begins.
const DEADLINE: Duration = Duration::from_secs(10);
/// How often it is renewed, and tried for.
const RETRY: Duration = Duration::from_secs(2);
/// An answer that takes longer is tried again.
const ATTEMPT: Duration = Duration::from_secs(5);

/// What one replica knows of the Lease. Pure.
#[derive(Debug)]
struct Election {
    me: String,
    /// The version last seen, and when it was seen first.
    seen: Option<(String, Instant)>,
    /// When the last renewal that succeeded was begun.
    renewed: Option<Instant>,
}

/// What to do.
#[derive(Debug, PartialEq)]
enum Move {
    /// There is none: make it.
    Create(LeaseSpec),
    /// Take it, or renew it.
    Replace(LeaseSpec),
    /// Somebody else holds it.
    Wait(String),
}

impl Election {
    fn new(me: &str) -> Self {
        Self { me: me.to_owned(), seen: None, renewed: None }
    }

    /// What to do about what was found at `now`; `wall` is for people who read the Lease.
    fn decide(&mut self, found: Option<&Lease>, now: Instant, wall: Timestamp) -> Move {
        let mine = |acquired, transitions| LeaseSpec {
            holder_identity: Some(self.me.clone()),
            lease_duration_seconds: Some(LENGTH),
            acquire_time: Some(acquired),
            renew_time: Some(MicroTime(wall)),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        };
        let Some(lease) = found else { return Move::Create(mine(MicroTime(wall), 0)) };
        let version = lease.metadata.resource_version.clone().unwrap_or_default();
        let since = match &self.seen {
            Some((known, since)) if *known == version => *since,
            _ => now,
        };
        let spec = lease.spec.clone().unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or_default();
        let holder = spec.holder_identity.unwrap_or_default();
        let length = u64::try_from(spec.lease_duration_seconds.unwrap_or(LENGTH)).unwrap_or_default();
        let decided = if holder == self.me {
            Move::Replace(mine(spec.acquire_time.unwrap_or(MicroTime(wall)), transitions))
        } else if !holder.is_empty() && now < since + Duration::from_secs(length) {
            self.renewed = None;
            Move::Wait(holder)
        } else {
            self.renewed = None;
            Move::Replace(mine(MicroTime(wall), transitions.saturating_add(1)))
        };
        self.seen = Some((version, since));
        decided
    }

    /// A write that was begun at `begun` has succeeded.
    fn held(&mut self, begun: Instant) {
        self.renewed = Some(begun);
    }

    /// Until when this replica may take itself for the holder.
    fn until(&self) -> Option<Instant> {
        self.renewed.map(|renewed| renewed + DEADLINE)
    }

    fn leads(&self, now: Instant) -> bool {
        self.until().is_some_and(|until| now < until)
    }
}

/// Tries for the Lease until told to stop, then gives it back, so that nobody has to wait for it to run out.
pub(super) async fn run(place: Place, leads: watch::Sender<bool>, stop: CancellationToken) -> Result<()> {
    let api: Api<Lease> = Api::namespaced(place.client.clone(), &place.namespace);
    let mut election = Election::new(&place.replica);
    let mut trouble = Trouble::new("the Lease penstock-control");
    loop {
        let begun = Instant::now();
        // An attempt that hangs must not keep a holder believing.
        let end = election.until().filter(|_| election.leads(begun)).unwrap_or(begun + ATTEMPT);
        let tried = tokio::select! {
            () = stop.cancelled() => break,
            tried = timeout_at(end.min(begun + ATTEMPT), attempt(&api, &mut election, begun)) => tried,
        };
        match tried {
            Ok(Ok(())) => trouble.over(),
            Ok(Err(error)) => trouble.met(&error),
            Err(_) => trouble.met(&anyhow::anyhow!("the API server has not answered in time")),
        }
        tell(&leads, election.leads(Instant::now()), &place.replica);
        let mut next = begun + RETRY;
        if let Some(until) = election.until().filter(|_| election.leads(Instant::now())) {
            next = next.min(until);
        }
        tokio::select! {
            () = stop.cancelled() => break,
            () = sleep_until(next.max(Instant::now() + RETRY / 10)) => {}
        }
        tell(&leads, election.leads(Instant::now()), &place.replica);
    }
    leads.send_replace(false);
    // If this fails, whoever waits takes it when it has run out.
    if let Ok(Ok(true)) = timeout(RETRY, give_back(&api, &place.replica)).await {
        tracing::info!("the Lease is given back");
    }
    Ok(())
}

/// Gives it back, if it is this replica's, so that whoever waits takes it at once; answers whether it was. A renewal that was under way when
/// this replica was told to end may have been written without an answer, or be written yet, so what is there is looked at and not remembered.
async fn give_back(api: &Api<Lease>, me: &str) -> Result<bool> {
    loop {
        let Some(mut lease) = api.get_opt(NAME).await? else { return Ok(false) };
        let spec = lease.spec.get_or_insert_default();
        if spec.holder_identity.as_deref() != Some(me) {
            return Ok(false);
        }
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        match outcome(api.replace(NAME, &PostParams::default(), &lease).await)? {
            Outcome::Done(_) => return Ok(true),
            Outcome::Overtaken => {}
        }
    }
}

/// Looks, and writes if it may.
async fn attempt(api: &Api<Lease>, election: &mut Election, begun: Instant) -> Result<()> {
    let found = api.get_opt(NAME).await?;
    let written = match election.decide(found.as_ref(), Instant::now(), Timestamp::now()) {
        Move::Wait(holder) => {
            tracing::debug!("{holder} holds the Lease");
            return Ok(());
        }
        Move::Create(spec) => {
            let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
            api.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await
        }
        Move::Replace(spec) => {
            let lease = Lease { spec: Some(spec), ..found.unwrap_or_default() };
            api.replace(NAME, &PostParams::default(), &lease).await
        }
    };
    match outcome(written)? {
        Outcome::Done(_) => election.held(begun),
        // Somebody was faster; what he wrote is seen next time.
        Outcome::Overtaken => {}
    }
    Ok(())
}

fn tell(leads: &watch::Sender<bool>, now: bool, me: &str) {
    let changed = leads.send_if_modified(|known| std::mem::replace(known, now) != now);
    if changed {
        gauge!(metric::LEADS.name).set(f64::from(u8::from(now)));
        if now {
            tracing::info!("{me} holds the Lease: this replica writes");
        } else {
            tracing::warn!("{me} does not hold the Lease any more: another replica writes");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use kube::Client;
    use serde_json::json;

    use super::*;

    fn wall() -> Timestamp {
        Timestamp::UNIX_EPOCH
    }

    fn lease(version: &str, holder: &str, length: i32, transitions: i32) -> Lease {
        Lease {
            metadata: ObjectMeta { resource_version: Some(version.to_owned()), ..ObjectMeta::default() },
            spec: Some(LeaseSpec {
                holder_identity: Some(holder.to_owned()),
                lease_duration_seconds: Some(length),
                lease_transitions: Some(transitions),
                // A holder whose clock is decades off.
                renew_time: Some(MicroTime(Timestamp::UNIX_EPOCH)),
                ..LeaseSpec::default()
            }),
        }
    }

    fn taken(decided: Move) -> (String, i32) {
        match decided {
            Move::Create(spec) | Move::Replace(spec) => {
                (spec.holder_identity.unwrap(), spec.lease_transitions.unwrap())
            }
            Move::Wait(holder) => panic!("{holder} holds it"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_does_not_exist_is_made_and_one_s_own_is_renewed() {
        let mut election = Election::new("a");
        assert!(!election.leads(Instant::now()));
        assert!(matches!(election.decide(None, Instant::now(), wall()), Move::Create(_)));
        assert!(!election.leads(Instant::now()), "wanting is not having");
        election.held(Instant::now());
        assert!(election.leads(Instant::now()));
        assert_eq!(
            taken(election.decide(Some(&lease("1", "a", 15, 4)), Instant::now(), wall())),
            ("a".into(), 4)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_holder_is_gone_when_the_lease_has_not_changed_for_its_length_on_the_observers_clock() {
        let mut election = Election::new("b");
        let wait = Move::Wait("a".to_owned());
        for (version, after) in [("1", 0), ("1", 14), ("2", 2), ("2", 14)] {
            tokio::time::advance(Duration::from_secs(after)).await;
            let found = lease(version, "a", 15, 0);
            assert_eq!(
                election.decide(Some(&found), Instant::now(), wall()),
                wait,
                "{version} after {after}"
            );
        }
        tokio::time::advance(Duration::from_secs(1)).await;
        let found = lease("2", "a", 15, 0);
        assert_eq!(taken(election.decide(Some(&found), Instant::now(), wall())), ("b".into(), 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_that_was_given_back_is_taken_at_once() {
        let mut election = Election::new("b");
        let found = lease("9", "", 1, 7);
        assert_eq!(taken(election.decide(Some(&found), Instant::now(), wall())), ("b".into(), 8));
    }

    #[tokio::test(start_paused = true)]
    async fn a_holder_that_cannot_renew_stops_before_another_may_begin() {
        let mut election = Election::new("a");
        election.held(Instant::now());
        let mut other = Election::new("b");
        let found = lease("1", "a", LENGTH, 0);
        assert!(matches!(other.decide(Some(&found), Instant::now(), wall()), Move::Wait(_)));
        tokio::time::advance(DEADLINE).await;
        assert!(!election.leads(Instant::now()));
        assert!(matches!(other.decide(Some(&found), Instant::now(), wall()), Move::Wait(_)));
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_sees_another_holder_does_not_lead() {
        let mut election = Election::new("a");
        election.held(Instant::now());
        election.decide(Some(&lease("5", "b", 15, 1)), Instant::now(), wall());
        assert!(!election.leads(Instant::now()));
    }

    /// One Lease, which is replaced by whoever names its version; and how often it was.
    type Kept = Arc<Mutex<(Lease, u32)>>;

    /// `None`: it has another version.
    fn replaced(kept: &Kept, mut by: Lease) -> Option<u32> {
        let (known, writes) = &mut *kept.lock().unwrap();
        (known.metadata.resource_version == by.metadata.resource_version).then(|| {
            *writes += 1;
            by.metadata.resource_version = Some(writes.to_string());
            *known = by;
            *writes
        })
    }

    /// The API server's part of it. The second write is done, and never answered.
    fn server(kept: Kept) -> Client {
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let kept = kept.clone();
            async move {
                let put = request.method() == http::Method::PUT;
                let body = request.into_body().collect_bytes().await?;
                let written = if put { replaced(&kept, serde_json::from_slice(&body)?) } else { Some(0) };
                if written == Some(2) {
                    std::future::pending::<()>().await;
                }
                let conflict =
                    json!({"status": "Failure", "reason": "Conflict", "code": 409, "message": "overtaken"});
                let (status, answer) = match written {
                    Some(_) => (200, serde_json::to_vec(&kept.lock().unwrap().0)?),
                    None => (409, serde_json::to_vec(&conflict)?),
                };
                let answer =
                    http::Response::builder().status(status).body(kube::client::Body::from(answer))?;
                Ok::<_, tower::BoxError>(answer)
            }
        });
        Client::new(service, "penstock-system")
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewal_that_was_under_way_at_the_end_does_not_keep_the_lease_from_being_given_back() {
        let kept = Arc::new(Mutex::new((lease("0", "", 1, 0), 0)));
        let client = server(kept.clone());
        let place = Place { client, namespace: "penstock-system".to_owned(), replica: "a".to_owned() };
        let (leads, mut led) = watch::channel(false);
        let stop = CancellationToken::new();
        let holder = tokio::spawn(run(place, leads, stop.clone()));
        led.wait_for(|leads| *leads).await.unwrap();
        while kept.lock().unwrap().1 < 2 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        stop.cancel();
        holder.await.unwrap().unwrap();
        let found = kept.lock().unwrap().0.spec.clone().unwrap();
        assert_eq!((found.holder_identity.as_deref(), found.lease_duration_seconds), (Some(""), Some(1)));
        assert!(!*led.borrow());
    }
}
