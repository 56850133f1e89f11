//! What the pool promises, tried from outside.

use std::ops::Range;
use std::time::Duration;

use penstock_balance::estimate::Watched;
use penstock_balance::pick::Candidate;
use penstock_balance::{
    Ask, EndpointState, Estimator, Explained, GpuHealth, LoadReport, Members, Outcome, OutlierPolicy, Policy,
    Pool, Sent, Settings, Why,
};
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

const ALL: [Policy; 6] = [
    Policy::Gpu,
    Policy::Prefix,
    Policy::LeastRequest,
    Policy::RoundRobin,
    Policy::RingHash,
    Policy::OrcaWrr,
];

#[derive(Default)]
struct Replica {
    name: u64,
    far_ms: f32,
    without_model: bool,
    state: EndpointState,
}

impl Candidate for Replica {
    fn state(&self) -> &EndpointState {
        &self.state
    }

    fn name(&self) -> u64 {
        self.name
    }

    fn serves(&self, _ask: &Ask<'_>) -> bool {
        !self.without_model
    }

    fn distance_ms(&self) -> f32 {
        self.far_ms
    }
}

fn replicas(n: u64) -> Vec<Replica> {
    (0..n).map(|name| Replica { name, ..Replica::default() }).collect()
}

fn settings(policy: Policy) -> Settings {
    Settings { policy, ..Settings::default() }
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A report of a server that works one by one, 10 ms each, with so much to do.
fn backlog(ms: f32) -> LoadReport {
    LoadReport {
        in_flight: Some(ms / 10.0),
        units: Some(ms / 10.0),
        backlog_ms: Some(ms),
        closes_ms: Some(ms),
        room: Some(1.0),
        fixed_ms: Some(0.0),
        unit_ms: Some(10.0),
        rps: Some(50.0),
        utilization: Some(0.5),
        ..LoadReport::default()
    }
}

fn eject(replica: &Replica) {
    for _ in 0..5 {
        replica.state.ejection.failure(&OutlierPolicy::default(), Duration::ZERO, Duration::ZERO);
    }
}

/// Sends and answers so many requests one after the other, and says how many each replica got.
fn serve(members: &Members<Replica>, settings: &Settings, count: u32, seed: u64) -> Vec<u32> {
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(seed));
    let mut got = vec![0; members.len()];
    for i in 0..count {
        let now = ms(1000 + 10 * u64::from(i));
        if i % 100 == 0 {
            members.tend(now);
        }
        if let Ok(picked) = pool.pick(members, settings, &Ask::one(now), &mut random) {
            got[picked.index] += 1;
            pool.over(&members[picked.index].state, picked.sent, Outcome::Served, now + ms(10));
        }
    }
    got
}

#[test]
fn equal_endpoints_get_equal_shares_under_every_policy() {
    for policy in ALL {
        let got = serve(&Members::new(replicas(5)), &settings(policy), 5000, 1);
        assert!(got.iter().all(|got| (800..1250).contains(got)), "{policy:?}: {got:?}");
    }
}

#[test]
fn no_endpoint_starves() {
    // The second is slow, not dead: it keeps being tried, and keeps its share of what exploration gives.
    let members = Members::new(replicas(3));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    let mut got = [0; 3];
    for i in 0..20_000u64 {
        let now = ms(5 * i);
        let picked = pool.pick(&members, &settings(Policy::Gpu), &Ask::one(now), &mut random).unwrap();
        got[picked.index] += 1;
        let took = if picked.index == 1 { ms(200) } else { ms(4) };
        let state = &members[picked.index].state;
        pool.told(
            state,
            LoadReport { unit_ms: Some(if picked.index == 1 { 200.0 } else { 4.0 }), ..backlog(0.0) },
            now + took,
        );
        pool.over(state, picked.sent, Outcome::Served, now + took);
    }
    assert!(got[1] > 20 && got[1] < 500, "{got:?}");
}

/// A request: when it is over, its Service, its server.
type Underway = (Duration, usize, usize, Sent, Watched);

/// Two equal servers that work on all that is there at once, 7 ms each, `first_us` their first request, behind sidecars that report. Two Services of one
/// client lead to both, each asked every 20 ms or so, the second `behind_us` after the first. How many of the requests of each Service each server
/// got, in each ten seconds.
fn two_services(seed: u64, first_us: [u64; 2], behind_us: Range<u64>) -> Vec<[[u32; 2]; 2]> {
    let members = [Members::new(replicas(2)), Members::new(replicas(2))];
    let (pools, servers) = ([Pool::default(), Pool::default()], [Estimator::default(), Estimator::default()]);
    let mut random = SmallRng::seed_from_u64(seed);
    let (mut got, mut under_way) = (vec![[[0; 2]; 2]; 6], Vec::<Underway>::new());
    let mut now = Duration::ZERO;
    for i in 0..6_000 {
        let service = i % 2;
        let pause = if service == 0 { 9_600..29_600 } else { behind_us.clone() };
        now += Duration::from_micros(rand::Rng::random_range(&mut random, pause));
        under_way.sort_by_key(|(at, ..)| *at);
        while under_way.first().is_some_and(|(at, ..)| *at <= now) {
            let (at, service, server, sent, watched) = under_way.remove(0);
            servers[server].finished(watched, false, at);
            let state = &members[service][server].state;
            pools[service].told(state, LoadReport::of(&servers[server], at), at);
            pools[service].over(state, sent, Outcome::Served, at);
        }
        let settings = settings(Policy::Gpu);
        let picked = pools[service].pick(&members[service], &settings, &Ask::one(now), &mut random);
        let picked = picked.unwrap_or_else(|nobody| panic!("nobody was picked: {nobody:?}"));
        let server = picked.index;
        got[i / 1_000][service][server] += 1;
        let took = if servers[server].samples() == 0 { first_us[server] } else { 7_000 };
        let noise = rand::Rng::random_range(&mut random, 0..300);
        let watched = servers[server].arrived(1.0, now);
        under_way.push((now + Duration::from_micros(took + noise), service, server, picked.sent, watched));
        if let Some(asked) = picked.worth_asking {
            pools[service].told(&members[service][asked].state, LoadReport::of(&servers[asked], now), now);
        }
    }
    got
}

#[test]
fn of_two_that_have_time_neither_starves_because_the_other_looks_faster_under_load() {
    // What the client sees of a server depends on which of its Services asks that just then.
    for (seed, first_us) in (0..20).flat_map(|seed| [(seed, [30_000, 50_000]), (seed, [7_000; 2])]) {
        let got = two_services(seed, first_us, 300..500);
        for got in got.windows(2) {
            let least = (0..4).map(|i| got[0][i / 2][i % 2] + got[1][i / 2][i % 2]).min();
            assert!(least > Some(0), "seed {seed}: {got:?}");
        }
    }
}

#[test]
fn two_that_are_alike_and_have_time_take_turns() {
    for seed in 0..20 {
        // For a while a Service may see one of them always when the other Service is there.
        for got in &two_services(seed, [7_000; 2], 300..9_500)[3..] {
            assert!(got.iter().flatten().all(|got| *got > 150), "seed {seed}: {got:?}");
        }
    }
}

#[test]
fn whom_we_have_not_asked_lately_is_asked_though_another_has_a_request_of_ours_that_hangs() {
    let members = Members::new(replicas(3));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(7));
    let settings = settings(Policy::Gpu);
    let mut got = [0; 3];
    for i in 0..10_000u64 {
        let now = ms(10 * i);
        for (replica, unit_ms) in members.iter().zip([5.0, 50.0, 500.0]) {
            let report = LoadReport { unit_ms: Some(unit_ms), ..backlog(0.0) };
            pool.told(&replica.state, report, now);
        }
        let picked = pool.pick(&members, &settings, &Ask::one(now), &mut random).unwrap();
        got[picked.index] += 1;
        // The third hangs for ever.
        if picked.index != 2 {
            pool.over(&members[picked.index].state, picked.sent, Outcome::Served, now + ms(5));
        }
    }
    assert!(got[2] == 1 && got[1] > 40 && got[1] < 120, "{got:?}");
}

#[test]
fn orca_wrr_follows_the_weights() {
    let members = Members::new(replicas(3));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    let tell = |now| {
        for (replica, utilization) in members.iter().zip([0.2, 0.4, 0.8]) {
            let report =
                LoadReport { rps: Some(100.0), utilization: Some(utilization), ..LoadReport::default() };
            pool.told(&replica.state, report, now);
        }
        members.tend(now);
    };
    let mut share = |now| {
        let mut got = [0u32; 3];
        for _ in 0..7000 {
            let picked =
                pool.pick(&members, &settings(Policy::OrcaWrr), &Ask::one(now), &mut random).unwrap();
            got[picked.index] += 1;
        }
        got
    };
    tell(ms(1000));
    assert!(share(ms(1000)).iter().all(|got| (2330..2340).contains(got)), "round robin during the blackout");
    tell(ms(12_000));
    let got = share(ms(12_000));
    let near = |got: u32, asked: u32| got.abs_diff(asked) < 30;
    assert!(near(got[0], 4000) && near(got[1], 2000) && near(got[2], 1000), "{got:?}");
    members.tend(ms(12_000 + 181_000));
    assert!(share(ms(193_000)).iter().all(|got| (2330..2340).contains(got)), "round robin after the expiry");
}

#[test]
fn a_key_stays_at_home_until_too_much_is_there() {
    let members = Members::new(replicas(10));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    let ask = Ask { key: 77, ..Ask::one(ms(1)) };
    let mut pick = || pool.pick(&members, &settings(Policy::RingHash), &ask, &mut random).unwrap();
    let first = pick();
    assert_eq!(first.why, Why::Home);
    let second = pick();
    assert_eq!(second.why, Why::NextHome, "1.25 × the mean is one request");
    pool.over(&members[first.index].state, first.sent, Outcome::Served, ms(2));
    assert_eq!(pick().index, first.index);
}

#[test]
fn a_replica_that_fails_fast_never_looks_fast() {
    let members = Members::new(replicas(4));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    let mut failed = 0;
    for i in 0..5000u64 {
        let now = ms(1000 + 3 * i);
        let picked = pool.pick(&members, &settings(Policy::Gpu), &Ask::one(now), &mut random).unwrap();
        let state = &members[picked.index].state;
        if picked.index == 2 {
            failed += 1;
            pool.told(state, backlog(0.0), now + ms(1));
            pool.over(state, picked.sent, Outcome::Failed, now + ms(1));
        } else {
            pool.told(state, backlog(40.0), now + ms(50));
            pool.over(state, picked.sent, Outcome::Served, now + ms(50));
        }
    }
    assert!(failed < 100, "{failed} of 5000 went to the replica that answers everything with an error");
}

#[test]
fn one_that_stands_still_is_left_alone_and_so_is_its_neighbour_on_the_gpu() {
    let members = Members::new(replicas(4));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    for (replica, gpu) in members.iter().zip([1, 1, 2, 3]) {
        pool.told(&replica.state, LoadReport { gpu: Some(gpu), ..backlog(0.0) }, ms(0));
    }
    members.tend(ms(0));
    // Everything that goes to replica 0 stays there for ever.
    let mut got = [0; 4];
    for i in 0..2000u64 {
        let now = ms(10 * i);
        let picked = pool.pick(&members, &settings(Policy::Gpu), &Ask::one(now), &mut random).unwrap();
        if i > 200 {
            got[picked.index] += 1;
        }
        if picked.index != 0 {
            let report = LoadReport { gpu: members[picked.index].state.gpu(), ..backlog(0.0) };
            pool.told(&members[picked.index].state, report, now + ms(10));
            pool.over(&members[picked.index].state, picked.sent, Outcome::Served, now + ms(10));
        }
    }
    assert!(got[0] <= 1 && got[1] < 40 && got[2] > 300 && got[3] > 300, "{got:?}");
}

#[test]
fn a_broken_gpu_takes_all_its_replicas_out() {
    let members = Members::new(replicas(3));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    for (replica, gpu) in members.iter().zip([1, 1, 2]) {
        pool.told(&replica.state, LoadReport { gpu: Some(gpu), ..backlog(0.0) }, ms(0));
    }
    members.tend(ms(0));
    let broken = LoadReport { gpu: Some(1), health: Some(GpuHealth::Failed), ..backlog(0.0) };
    pool.told(&members[0].state, broken, ms(0));
    for policy in ALL {
        for _ in 0..50 {
            assert_eq!(
                pool.pick(&members, &settings(policy), &Ask::one(ms(1)), &mut random).unwrap().index,
                2
            );
        }
    }
}

#[test]
fn a_far_endpoint_is_taken_when_the_near_one_is_that_much_slower() {
    let mut all = replicas(2);
    all[1].far_ms = 20.0;
    let members = Members::new(all);
    let pick = |near: f32| {
        let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
        pool.told(&members[0].state, backlog(near), ms(0));
        pool.told(&members[1].state, backlog(0.0), ms(0));
        pool.pick(&members, &settings(Policy::Gpu), &Ask::one(ms(0)), &mut random).unwrap().index
    };
    assert_eq!(pick(10.0), 0);
    assert_eq!(pick(40.0), 1);
}

#[test]
fn the_prompt_goes_where_it_was_unless_that_costs_more_than_it_saves() {
    let members = Members::new(replicas(6));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    let report = |busy: f32| LoadReport {
        unit_ms: Some(0.1),
        fixed_ms: Some(10.0),
        room: Some(4096.0),
        ..backlog(busy)
    };
    members.iter().for_each(|replica| pool.told(&replica.state, report(0.0), ms(0)));
    let blocks: Vec<u64> = (0..50).map(|i| 1000 + i).collect();
    let ask = |now| Ask { units: 3200.0, blocks: &blocks, block_units: 64.0, ..Ask::one(now) };
    let mut looks = Explained::default();
    let first =
        pool.explain(&members, &settings(Policy::Prefix), &ask(ms(1)), &mut random, &mut looks).unwrap();
    pool.over(&members[first.index].state, first.sent, Outcome::Served, ms(100));
    let again =
        pool.explain(&members, &settings(Policy::Prefix), &ask(ms(200)), &mut random, &mut looks).unwrap();
    assert_eq!((again.index, again.why), (first.index, Why::Affinity), "{looks:?}");
    assert!(
        looks.looks().iter().any(|look| look.index == first.index && look.matched == 3200.0),
        "{looks:?}"
    );
    pool.over(&members[first.index].state, again.sent, Outcome::Served, ms(300));
    pool.told(&members[first.index].state, report(5000.0), ms(300));
    let away =
        pool.explain(&members, &settings(Policy::Prefix), &ask(ms(301)), &mut random, &mut looks).unwrap();
    assert_ne!(away.index, first.index, "{looks:?}");
}

#[test]
fn all_sidecars_agree_on_the_home_of_a_conversation() {
    let home = |seed| {
        let members = Members::new(replicas(20));
        let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(seed));
        members.iter().for_each(|replica| {
            pool.told(
                &replica.state,
                LoadReport { unit_ms: Some(0.1), room: Some(4096.0), ..backlog(0.0) },
                ms(0),
            );
        });
        let ask = Ask { units: 3200.0, blocks: &[1, 2, 3], block_units: 64.0, key: 99, ..Ask::one(ms(0)) };
        pool.pick(&members, &settings(Policy::Prefix), &ask, &mut random).unwrap().index
    };
    assert!((0..50).all(|seed| home(seed) == home(1000)));
}

#[test]
fn a_new_endpoint_gets_no_more_than_it_has_answered() {
    let members = Members::new(replicas(3));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    // Two are known and busy, the third is new.
    for (i, replica) in members.iter().take(2).enumerate() {
        for k in 0..10 {
            let only = Ask { avoid: if i == 0 { &[1, 2] } else { &[0, 2] }, ..Ask::one(ms(20 * k)) };
            let picked = pool.pick(&members, &settings(Policy::Gpu), &only, &mut random).unwrap();
            pool.told(&replica.state, backlog(200.0), ms(20 * k + 10));
            pool.over(&replica.state, picked.sent, Outcome::Served, ms(20 * k + 10));
        }
    }
    let mut new = 0;
    for _ in 0..20 {
        new += usize::from(
            pool.pick(&members, &settings(Policy::Gpu), &Ask::one(ms(210)), &mut random).unwrap().index == 2,
        );
    }
    assert_eq!(new, 1, "one, until it has answered");
}

#[test]
fn the_quality_of_decisions_is_counted() {
    let members = Members::new(replicas(2));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    members.iter().for_each(|replica| pool.told(&replica.state, backlog(10.0), ms(0)));
    let picked = pool.pick(&members, &settings(Policy::Gpu), &Ask::one(ms(30)), &mut random).unwrap();
    pool.over(&members[picked.index].state, picked.sent, Outcome::Served, ms(530));
    pool.told(&members[0].state, backlog(500.0), ms(530));
    let quality = pool.quality();
    assert_eq!((quality.picks, quality.informed, quality.age), (1, 1, ms(30)));
    assert_eq!((quality.regretted, quality.herded), (1, 1));
    assert!(quality.regret > ms(400), "{quality:?}");
}

fn choose(members: &Members<Replica>, avoid: &[usize], seed: u64) -> Result<usize, String> {
    let mut random = SmallRng::seed_from_u64(seed);
    let ask = Ask { avoid, ..Ask::one(ms(1)) };
    let picked = Pool::default().pick(members, &settings(Policy::Gpu), &ask, &mut random);
    picked.map(|picked| picked.index).map_err(|none| none.to_string())
}

#[test]
fn a_retry_goes_elsewhere_unless_there_is_no_elsewhere() {
    let members = Members::new(replicas(2));
    assert!((0..100).all(|seed| choose(&members, &[0], seed) == Ok(1)));
    assert!(choose(&members, &[0, 1], 1).is_ok());
}

#[test]
fn one_that_is_leaving_is_a_last_resort() {
    let members = Members::new(replicas(2));
    members[0].state.leaving(Duration::ZERO);
    assert!((0..100).all(|seed| choose(&members, &[], seed) == Ok(1)));
    members[1].state.set_draining(true);
    assert_eq!(choose(&members, &[], 1), Ok(0));
}

#[test]
fn nothing_ready_says_why() {
    let mut all = replicas(4);
    all[3].without_model = true;
    let members = Members::new(all);
    members[0].state.set_draining(true);
    members[1].state.set_draining(true);
    eject(&members[2]);
    let said = choose(&members, &[], 1).unwrap_err();
    assert_eq!(said, "0 of 4 ready: 2 draining, 1 ejected, 1 without the model");
    assert_eq!(choose(&Members::new(replicas(0)), &[], 1).unwrap_err(), "0 of 0 ready");
}

#[test]
fn too_many_ejections_are_ignored() {
    let members = Members::new(replicas(3));
    members.iter().for_each(eject);
    assert!(choose(&members, &[], 1).is_ok());
}

/// A server among fast ones that hangs for five seconds, and answers late what it was asked last, or that answers with errors as long. Returns how
/// many requests it was asked meanwhile, and how long after the end it had half of its share again.
fn after_a_fault(policy: Policy, servers: u64, every_ms: u64, hangs: bool, seed: u64) -> (u32, Duration) {
    const TIMEOUT: u64 = 1000;
    let members = Members::new(replicas(servers));
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(seed));
    let outliers = OutlierPolicy::default();
    let (begins, ends) = (ms(10_000), ms(15_000));
    let mut under_way: Vec<(Duration, Duration, usize, Sent, Outcome)> = Vec::new();
    let (mut asked, mut recent) = (0, std::collections::VecDeque::new());
    for i in 0.. {
        let now = ms(every_ms * i);
        if i % 100 == 0 {
            members.tend(now);
        }
        under_way.sort_by_key(|(at, ..)| *at);
        while under_way.first().is_some_and(|(at, ..)| *at <= now) {
            let (at, began, index, sent, outcome) = under_way.remove(0);
            let state = &members[index].state;
            match outcome {
                Outcome::Served => {
                    state.ejection.success();
                    pool.told(state, LoadReport { unit_ms: Some(5.0), ..backlog(0.0) }, at);
                }
                _ => _ = state.ejection.failure(&outliers, began, at),
            }
            pool.over(state, sent, outcome, at);
        }
        let picked = pool.pick(&members, &settings(policy), &Ask::one(now), &mut random);
        let picked = picked.unwrap_or_else(|nobody| panic!("nobody was picked: {nobody:?}"));
        let faulty = picked.index == 0 && now >= begins && now < ends;
        let (took, outcome) = match faulty {
            true if hangs && ends - now > ms(TIMEOUT) => (ms(TIMEOUT), Outcome::Failed),
            true if hangs => (ends - now, Outcome::Served),
            true => (ms(1), Outcome::Failed),
            false => (ms(5), Outcome::Served),
        };
        asked += u32::from(faulty);
        under_way.push((now + took, now, picked.index, picked.sent, outcome));
        recent.push_back(picked.index == 0);
        if recent.len() > 40 * servers as usize {
            recent.pop_front();
        }
        let share = recent.iter().filter(|here| **here).count();
        if now > ends + ms(40 * servers * every_ms) && share > 20 || now > ms(120_000) {
            return (asked, now - ends);
        }
    }
    unreachable!()
}

#[test]
fn a_server_that_was_ejected_is_probed_when_its_time_is_over_and_has_its_share_again_soon() {
    for policy in [Policy::Gpu, Policy::Prefix, Policy::LeastRequest, Policy::RoundRobin, Policy::RingHash] {
        for (servers, every_ms) in [(2, 20), (5, 10)] {
            for hangs in [false, true] {
                for seed in 0..5 {
                    let (asked, back) = after_a_fault(policy, servers, every_ms, hangs, seed);
                    let case = format!("{policy:?}, {servers} servers, hangs: {hangs}, seed {seed}");
                    // What was sent before the first failures came, and a probe after one second, two, and four.
                    let first = if hangs { 1000 / every_ms as u32 + 5 } else { 5 };
                    assert!(asked <= first + 4, "{case}: asked {asked} times");
                    // It may have been ejected just before its end, for as long as it lasted.
                    assert!(back < ms(8_000), "{case}: {back:?} after the end");
                }
            }
        }
    }
}

#[test]
fn one_whose_probe_has_no_answer_is_better_than_nobody() {
    let members = Members::new(replicas(2));
    members.iter().for_each(eject);
    let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(3));
    for policy in ALL {
        let mut pick = || pool.pick(&members, &settings(policy), &Ask::one(ms(1000)), &mut random);
        assert!((0..10).all(|_| pick().is_ok()), "{policy:?}");
    }
}

fn report() -> impl Strategy<Value = LoadReport> {
    let value = || prop_oneof![Just(None), any::<f32>().prop_map(Some), (0.0f32..1e4).prop_map(Some)];
    (value(), value(), value(), value(), value(), value(), value(), value(), any::<Option<u64>>()).prop_map(
        |(in_flight, units, backlog_ms, fixed_ms, unit_ms, room, closes_ms, rps, gpu)| LoadReport {
            in_flight,
            units,
            backlog_ms,
            fixed_ms,
            unit_ms,
            room,
            closes_ms,
            rps,
            utilization: rps,
            eps: fixed_ms,
            gpu,
            ..LoadReport::default()
        },
    )
}

proptest! {
    /// Whatever endpoints say and whatever state they are in: a usable one is picked if there is one, nothing that drains
    /// is ever picked, and no number in the decision is a NaN.
    #[test]
    fn only_what_is_usable_is_picked(
        all in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>(), report(), 0u64..5000), 0..40),
        policy in 0usize..6,
        key: u64,
        units in 0.0f32..1e5,
        seed: u64,
    ) {
        let mut replicas = replicas(all.len() as u64);
        let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(seed));
        for (replica, (draining, ejected, without, report, at)) in replicas.iter_mut().zip(&all) {
            replica.without_model = *without;
            replica.state.set_draining(*draining);
            pool.told(&replica.state, *report, ms(*at));
            if *ejected {
                eject(replica);
            }
        }
        let members = Members::new(replicas);
        members.tend(ms(5000));
        let ask = Ask { units, key, blocks: &[key, seed], block_units: 64.0, ..Ask::one(ms(500)) };
        let mut looks = Explained::default();
        match pool.explain(&members, &settings(ALL[policy]), &ask, &mut random, &mut looks) {
            Ok(picked) => {
                let (draining, ejected, without, ..) = &all[picked.index];
                prop_assert!(!draining && !without);
                let better = all.iter().any(|(draining, ejected, without, ..)| !draining && !ejected && !without);
                prop_assert!(!(*ejected && better), "an ejected one although another was ready");
                prop_assert!(looks.looks().iter().all(|look| !look.score.is_nan() && !look.prediction.ms.is_nan()));
                pool.over(&members[picked.index].state, picked.sent, Outcome::Served, ms(600));
                prop_assert!(!pool.trust().is_nan());
            }
            Err(none) => {
                prop_assert_eq!(none.draining + none.ejected + none.unfit, all.len());
            }
        }
    }

    /// More work never makes an endpoint look sooner, and neither does more work in flight.
    #[test]
    fn predictions_are_monotone_in_work(
        fixed in 0.0f32..50.0,
        unit in 0.1f32..50.0,
        busy in 0.0f32..1000.0,
        age in 0u64..3000,
        less in 0.0f32..100.0,
        more in 0.0f32..100.0,
        sent in 0usize..10,
    ) {
        let members = Members::new(replicas(1));
        let (pool, mut random) = (Pool::default(), SmallRng::seed_from_u64(1));
        let report = LoadReport { fixed_ms: Some(fixed), unit_ms: Some(unit), ..backlog(busy) };
        pool.told(&members[0].state, report, ms(0));
        let now = ms(age);
        let usual = penstock_balance::load::Usual::default();
        let predict = |units| members[0].state.predict(units, &usual, now).ms;
        prop_assert!(predict(less) <= predict(less + more) * (1.0 + 1e-5));
        let mut before = predict(less);
        for _ in 0..sent {
            pool.pick(&members, &settings(Policy::Gpu), &Ask::one(now), &mut random).unwrap();
            let after = predict(less);
            prop_assert!(before <= after * (1.0 + 1e-5), "{before} {after}");
            before = after;
        }
    }
}
