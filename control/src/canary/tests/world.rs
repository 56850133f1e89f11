//! A mesh that does what it is told, after a while, and reports each second.

use std::collections::VecDeque;
use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use penstock_api::latency::bucket_of;
use penstock_api::v1::SeenWindow;
use serde_json::{Value, json};

use crate::canary::template::Template;
use crate::canary::{Checked, Diary, Facts, Phase, Plan, Reached, walk, windows};
use crate::fleet::Seen;
use crate::fleet::seen::{Backend, Shadow};
use crate::objects::canary::{Course, Spec};

/// Between two looks of control, as of its task.
const LOOK: Duration = Duration::from_millis(500);
/// Looks between two reports of the proxies.
const REPORT: usize = 2;

/// The object, of which a test says what is not as usual.
pub(super) fn spec(change: Value) -> Spec {
    let mut spec = json!({
        "service": "resnet", "stable": "resnet-v1", "candidate": "resnet-v2",
        "steps": [{"weight": 10, "hold": "10s"}, {"weight": 50, "hold": "10s"}],
        "promotion": "0s",
    });
    json_patch::merge(&mut spec, &change);
    serde_json::from_value(spec).unwrap()
}

pub(super) fn pair(backend: &str) -> (String, String) {
    ("team-a/resnet".to_owned(), format!("team-a/{backend}"))
}

/// The mesh, and what is wrong with it.
pub(super) struct World {
    pub(super) now: Timestamp,
    pub(super) spec: Spec,
    pub(super) diary: Diary,
    /// What proxies do: the course that they have, once they have it.
    course: Option<Course>,
    looks: usize,
    reports: VecDeque<(Timestamp, SeenWindow)>,
    /// Not yet reported.
    seen: Seen,
    /// Requests a second, and of those, how many match.
    pub(super) rate: f64,
    pub(super) matching: f64,
    /// Of the candidate's.
    pub(super) failing: f64,
    pub(super) differing: f64,
    pub(super) latency: Duration,
    pub(super) load: f64,
    pub(super) ready: usize,
    pub(super) stable_ready: usize,
    /// Of a Deployment.
    pub(super) templates: Vec<Template>,
    pub(super) missing: Vec<String>,
    pub(super) proxies: usize,
    /// Proxies that apply nothing any more.
    pub(super) hung: usize,
    pub(super) unheard: usize,
    pub(super) checks: Vec<Checked>,
    pub(super) promote: Option<String>,
    pub(super) abort: Option<String>,
    /// Fractions of requests that are still to come.
    owed: [f64; 7],
}

impl World {
    pub(super) fn of(change: Value) -> Self {
        Self {
            now: Timestamp::from_second(1_800_000_000).unwrap(),
            spec: spec(change),
            diary: Diary::default(),
            course: None,
            looks: 0,
            reports: VecDeque::new(),
            seen: Seen::default(),
            rate: 100.0,
            matching: 0.0,
            failing: 0.0,
            differing: 0.0,
            latency: Duration::from_millis(40),
            load: 0.5,
            ready: 1,
            stable_ready: 1,
            templates: Vec::new(),
            missing: Vec::new(),
            proxies: 3,
            hung: 0,
            unheard: 0,
            checks: Vec::new(),
            promote: None,
            abort: None,
            owed: [0.0; 7],
        }
    }

    pub(super) fn plan(&self) -> Plan {
        Plan::read("team-a", &self.spec).unwrap().between("team-a", &self.diary, &self.templates)
    }

    pub(super) fn weight(&self) -> u32 {
        self.diary.course.as_ref().map_or(0, |course| course.weight)
    }

    /// A command for the run that is on.
    pub(super) fn command(&self, rest: &str) -> Option<String> {
        Some(format!("{}/{rest}", self.plan().run))
    }

    fn whole(&mut self, which: usize, count: f64) -> u64 {
        self.owed[which] += count;
        let whole = self.owed[which].floor();
        self.owed[which] -= whole;
        whole as u64
    }

    /// What the proxies do until the next look.
    fn serve(&mut self) {
        let course = self.course.clone().unwrap_or_default();
        let share = LOOK.as_secs_f64();
        let matching = if course.matching { self.matching } else { 0.0 };
        let split = (self.rate - matching) * f64::from(course.weight) / 100.0;
        let candidate = self.whole(0, (matching + split) * share);
        let stable = self.whole(1, (self.rate - matching - split) * share);
        let copies = self.whole(2, self.rate * f64::from(course.shadow) / 100.0 * share);
        let failures = self.whole(3, candidate as f64 * self.failing);
        let lost = self.whole(4, copies as f64 * self.failing);
        let differs = self.whole(5, (copies - lost) as f64 * self.differing);
        let (latency, load) = (self.latency, (self.load * 1e3) as u64);
        let mut add = |backend: &str, requests: u64, failures: u64, latency: Duration| {
            let seen: &mut Backend = self.seen.backends.entry(pair(backend)).or_default();
            seen.total.requests += requests;
            seen.total.failures += failures;
            seen.total.latency.add(bucket_of(latency), requests);
            if requests > 0 {
                seen.load_permille += load;
                seen.reports += 1;
            }
        };
        let [of_stable, of_candidate] = match course.stable.is_empty() {
            true => ["resnet-v1", "resnet-v2"],
            false => [course.stable.as_str(), course.candidate.as_str()],
        };
        add(of_candidate, candidate, failures, latency);
        add(of_stable, stable, 0, Duration::from_millis(40));
        if copies > 0 {
            let seen: &mut Shadow = self.seen.shadows.entry(pair(of_candidate)).or_default();
            let pairs = copies - lost;
            seen.sent += copies;
            seen.failures += lost;
            seen.compared += pairs;
            seen.agreed += pairs - differs;
            seen.ranked += pairs;
            seen.same_top += pairs - differs;
            seen.latency.add(bucket_of(latency), pairs);
            seen.client_latency.add(bucket_of(Duration::from_millis(40)), pairs);
            seen.bytes += 100 * pairs;
            seen.client_bytes += 100 * pairs;
        }
        self.now += SignedDuration::try_from(LOOK).unwrap();
        self.looks += 1;
        if self.looks.is_multiple_of(REPORT) {
            let told = std::mem::take(&mut self.seen).wire(&["team-a/resnet".to_owned()]);
            self.reports.push_back((self.now, told));
            if self.reports.len() > 300 {
                self.reports.pop_front();
            }
        }
    }

    /// As the fleet sums up what proxies told in a window.
    fn seen(&self, window: Duration) -> Seen {
        let mut sum = Seen::default();
        let recent =
            |(at, _): &&(Timestamp, SeenWindow)| self.now.duration_since(*at).unsigned_abs() < window;
        for (_, told) in self.reports.iter().rev().take_while(recent) {
            sum.add(told.clone());
        }
        sum
    }

    pub(super) fn facts(&self) -> Facts {
        let all = self.course == self.diary.course;
        let applied = if all { self.proxies } else { self.proxies - self.hung };
        Facts {
            now: self.now,
            generation: Some(1),
            refused: Vec::new(),
            missing: self.missing.clone(),
            ready: self.ready,
            stable_ready: self.stable_ready,
            pods: self.plan().pair.map(|pair| pair.pods(&self.templates)),
            reach: Reached {
                of: self.diary.course.clone(),
                concerned: self.proxies,
                applied,
                unheard: self.unheard,
                refused: None,
            },
            windows: windows(&self.diary, self.now).map(|window| (window, self.seen(window))),
            checks: self.checks.clone(),
            promote: self.promote.clone(),
            abort: self.abort.clone(),
        }
    }

    /// One look. What control knows besides the object it forgets each time, as if it had been killed.
    pub(super) fn look(&mut self) {
        self.serve();
        // What was written at the look before has arrived meanwhile.
        if self.hung == 0 {
            self.course = self.diary.course.clone();
        }
        let (plan, facts) = (self.plan(), self.facts());
        let next = walk(&plan, &self.diary, &facts);
        assert_eq!(walk(&plan, &next, &facts), next, "a second look finds something to do");
        let written = serde_json::to_string(&next).unwrap();
        self.diary = serde_json::from_str(&written).unwrap();
        assert_eq!(self.diary, next, "{written}");
    }

    pub(super) fn run(&mut self, seconds: u64) {
        for _ in 0..2 * seconds {
            self.look();
        }
    }

    /// Looks until `phase`; answers after how long.
    pub(super) fn until(&mut self, phase: Phase, within: u64) -> Duration {
        let start = self.now;
        for _ in 0..2 * within {
            self.look();
            if self.diary.phase == phase {
                return self.now.duration_since(start).unsigned_abs();
            }
        }
        panic!("not {phase:?} within {within} s: {:#?}", self.diary)
    }

    /// `phase step weight` of each transition.
    pub(super) fn told(&self) -> Vec<String> {
        let told = self.diary.history.iter();
        told.map(|one| format!("{:?} {} {}", one.phase, one.step, one.weight)).collect()
    }
}
