//! Whether what was seen of a candidate is good enough.
//!
//! In: what must hold, where requests go, and what was seen in three windows. Out: a [`Verdict`]. Passing and failing are not opposites. A
//! candidate passes when enough was seen since the step was applied everywhere and the numbers are as they must be. It fails when, in any window, it
//! is surely worse than it may be; the shortest is there to tell within seconds, also after an hour in which all was well. Between the two it is
//! undecided, and the step's deadline decides.
//!
//! Of shares (failures, answers that differ) surely means that the lower end of Wilson's interval is above what is allowed. Windows
//! overlap and are looked at each second, so over a long step the interval alone would be passed by chance by a candidate that fails half as often as it
//! may; a floor of failures keeps that rare. A percentile is compared as a share too: of requests slower than its bound. Of a bucket of a
//! histogram a request is slower only if the whole bucket is, so a bound is exceeded by an eighth at most before that is noticed.

use std::time::Duration;

use penstock_api::latency::{Histogram, upper_bound};

use super::bounds::{Bounds, Plan};
use super::diary::Diary;
use super::walk::Facts;
use crate::fleet::seen::{Backend, Shadow};
use crate::objects::canary::Course;

/// Of Wilson's interval: one in two hundred is outside of its lower end by chance.
const Z: f64 = 2.58;
/// Fewer than this are an accident. Of 100 requests in two seconds, of which one in two hundred fails, four or more do every 20 minutes, and five every 3 hours.
const FLOOR: u64 = 5;
/// Observations beyond a percentile, so that it is one: 1,000 requests for the 99th.
const BEYOND: f64 = 10.0;
/// A percentile is exceeded for certain, however few requests there are, when more than this share is slower.
const GROSS: f64 = 0.5;
/// A median of fewer than this is none.
const MEDIAN: u64 = 20;
/// Reports that an average of loads is made of.
const REPORTS: u64 = 5;

/// What analysis says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is surely worse than it may be: why, in words with numbers.
    Fails(String),
    /// All that must hold holds, and enough was seen.
    Passes,
    /// Neither.
    Undecided(Vec<Missing>),
}

/// Something that is missing before a step may pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What, in words that stay the same as long as it is missing.
    pub what: String,
    /// How far it is, in numbers; may be empty.
    pub so_far: String,
}

/// Judges the candidate at the course that the diary tells.
pub fn judge(plan: &Plan, diary: &Diary, facts: &Facts) -> Verdict {
    let nothing = Course::default();
    let course = diary.course.as_ref().unwrap_or(&nothing);
    let looks = looks(plan, diary, facts);
    let seen = looks.iter().flatten().find_map(|look| failure(plan, course, look));
    // A load that is high for a moment is none: ten seconds, and whole ones.
    let load =
        looks[1].as_ref().filter(|look| look.duration >= LOAD_WINDOW).and_then(|look| overload(plan, look));
    if let Some(why) = seen.or(load).or_else(|| refusal(plan, diary, facts)) {
        return Verdict::Fails(why);
    }
    let mut missing = Vec::new();
    let empty = Look::default();
    let step = looks[2].as_ref().unwrap_or(&empty);
    of_requests(plan, course, step, &mut missing);
    of_copies(plan, course, step, &mut missing);
    of_checks(plan, diary, facts, &mut missing);
    if missing.is_empty() { Verdict::Passes } else { Verdict::Undecided(missing) }
}

/// Over this time loads are averaged before they count.
const LOAD_WINDOW: Duration = Duration::from_secs(10);

/// What was seen through one window.
#[derive(Clone, Copy, Default)]
pub(super) struct Look<'a> {
    pub(super) duration: Duration,
    pub(super) candidate: Option<&'a Backend>,
    pub(super) stable: Option<&'a Backend>,
    pub(super) shadow: Option<&'a Shadow>,
}

/// The windows that are about this run, and the last of them, about this step. One that reaches back further tells of another course.
pub(super) fn looks<'a>(plan: &Plan, diary: &Diary, facts: &'a Facts) -> [Option<Look<'a>>; 3] {
    let [first, second, third] = &facts.windows;
    [(first, diary.since), (second, diary.since), (third, diary.applied_since)].map(
        |((duration, seen), since)| {
            let known = since.map(|since| since.until(facts.now)).unwrap_or_default();
            if duration.is_zero() || *duration > known {
                return None;
            }
            let pair = |other: &String| (plan.service.clone(), other.clone());
            Some(Look {
                duration: *duration,
                candidate: seen.backends.get(&pair(&plan.candidate)),
                stable: seen.backends.get(&pair(&plan.stable)),
                shadow: seen.shadows.get(&pair(&plan.candidate)),
            })
        },
    )
}

impl Look<'_> {
    fn span(&self) -> String {
        let seconds = self.duration.as_secs_f64();
        if seconds < 10.0 { format!("{} s", round(seconds, 1)) } else { format!("{seconds:.0} s") }
    }
}

/// Of so many, how many are bad, and how many may be.
struct Share {
    /// What it is called: `success rate of team-a/resnet-v2`.
    name: String,
    bad: u64,
    of: u64,
    /// What they are: `requests`.
    unit: &'static str,
    /// From 0 to 1: of good ones.
    wanted: f64,
}

impl Share {
    fn surely_bad(&self) -> bool {
        surely_above(self.bad, self.of, 1.0 - self.wanted)
    }

    /// By what was seen alone.
    fn bad(&self) -> bool {
        // In these terms no rounding makes 99 of 100 less than 99 %.
        self.of > 0 && (self.of - self.bad) as f64 + 1e-9 * (self.of as f64) < self.wanted * self.of as f64
    }

    fn told(&self) -> String {
        let good = 100.0 * self.of.saturating_sub(self.bad) as f64 / self.of.max(1) as f64;
        format!("{good:.1} % of {} {}", self.of, self.unit)
    }
}

/// The shares that there are to look at.
fn shares(plan: &Plan, course: &Course, look: &Look<'_>) -> Vec<Share> {
    let Plan { candidate, bounds, .. } = plan;
    let mut all = Vec::new();
    if let Some(seen) = look.candidate {
        all.push(Share {
            name: format!("success rate of {candidate}"),
            bad: seen.total.failures.min(seen.total.requests),
            of: seen.total.requests,
            unit: "requests",
            wanted: bounds.success_rate,
        });
    }
    let Some(seen) = look.shadow.filter(|_| course.shadow > 0) else { return all };
    let shadow = &bounds.shadow;
    all.push(Share {
        name: format!("success rate of copies to {candidate}"),
        bad: seen.failures.min(seen.sent),
        of: seen.sent,
        unit: "copies",
        wanted: shadow.success_rate,
    });
    let pairs = [
        ("agreement", shadow.agreement, seen.compared, seen.agreed),
        ("sameness of the greatest element", shadow.same_top, seen.ranked, seen.same_top),
    ];
    for (name, wanted, of, good) in pairs {
        let Some(wanted) = wanted else { continue };
        let name = format!("{name} of {candidate}'s answers");
        all.push(Share { name, bad: of.saturating_sub(good), of, unit: "pairs", wanted });
    }
    all
}

/// Why what was seen through one window is surely not good enough.
fn failure(plan: &Plan, course: &Course, look: &Look<'_>) -> Option<String> {
    let Plan { candidate, bounds, .. } = plan;
    let span = look.span();
    let bad = shares(plan, course, look).into_iter().find(Share::surely_bad);
    if let Some(share) = bad {
        let Share { name, wanted, .. } = &share;
        return Some(format!("{name}: {} in {span}, at least {} are wanted", share.told(), percent(*wanted)));
    }
    for bound in percentiles(plan, course, look) {
        if bound.surely_exceeded(bounds.min_requests) {
            return Some(format!("{}: {} in {span}, {}", bound.name, bound.told(), bound.wanted));
        }
    }
    let shadow = look.shadow.filter(|_| course.shadow > 0)?;
    let enough = shadow.compared >= bounds.shadow.min_compared.max(MEDIAN);
    let ratio = ratios(bounds, candidate, shadow).into_iter().find(|ratio| ratio.exceeded && enough)?;
    let Ratio { name, told, wanted, .. } = ratio;
    Some(format!("{name}: {told} in {} pairs in {span}, {wanted}", shadow.compared))
}

/// A percentile beside what it may be.
struct Percentile<'a> {
    name: String,
    quantile: f64,
    seen: &'a Histogram,
    bound: Duration,
    /// Requests that the bound itself comes from.
    known: u64,
    wanted: String,
}

/// All that can be looked at: without requests of stable's there is nothing to hold the candidate against.
fn percentiles<'a>(plan: &Plan, course: &Course, look: &Look<'a>) -> Vec<Percentile<'a>> {
    let mut all = Vec::new();
    let Some(seen) = look.candidate.map(|seen| &seen.total.latency).filter(|seen| seen.total() > 0) else {
        return all;
    };
    for latency in &plan.bounds.latency {
        let quantile = latency.quantile;
        let name = format!("p{} latency of {}", round(quantile * 100.0, 3), plan.candidate);
        if let Some(bound) = latency.max {
            let wanted = format!("at most {} are wanted", milliseconds(bound));
            all.push(Percentile { name: name.clone(), quantile, seen, bound, known: u64::MAX, wanted });
        }
        let stable = look.stable.map(|seen| &seen.total.latency).filter(|_| course.weight < 100);
        let held_against = stable.and_then(|stable| Some((stable.total(), stable.quantile(quantile)?)));
        if let (Some(times), Some((known, of))) = (latency.of_stable, held_against) {
            let bound = Duration::try_from_secs_f64(of.as_secs_f64() * times).unwrap_or(Duration::MAX);
            let wanted =
                format!("at most {times} times the {} of {} are wanted", milliseconds(of), plan.stable);
            all.push(Percentile { name, quantile, seen, bound, known, wanted });
        }
    }
    all
}

impl Percentile<'_> {
    /// How many requests were slower than the bound for certain.
    fn slow(&self) -> u64 {
        let starts = |bucket: usize| bucket.checked_sub(1).map_or(Duration::ZERO, upper_bound);
        self.seen.nonzero().filter(|(bucket, _)| starts(*bucket) >= self.bound).map(|(_, count)| count).sum()
    }

    fn exceeded(&self) -> bool {
        self.slow() as f64 > (1.0 - self.quantile + 1e-9) * self.seen.total() as f64
    }

    fn surely_exceeded(&self, min_requests: u64) -> bool {
        let (slow, allowed) = (self.slow(), 1.0 - self.quantile);
        let known = self.known.min(self.seen.total());
        let enough = known as f64 >= BEYOND / allowed && surely_above(slow, self.seen.total(), allowed);
        enough || (known >= min_requests && surely_above(slow, self.seen.total(), allowed.max(GROSS)))
    }

    fn told(&self) -> String {
        let value = self.seen.quantile(self.quantile).unwrap_or_default();
        format!("{} of {} requests", milliseconds(value), self.seen.total())
    }
}

/// A number that may be at most so many times another.
struct Ratio {
    name: String,
    exceeded: bool,
    told: String,
    wanted: String,
}

fn ratios(bounds: &Bounds, candidate: &str, seen: &Shadow) -> Vec<Ratio> {
    let mut all = Vec::new();
    let medians = seen.latency.quantile(0.5).zip(seen.client_latency.quantile(0.5));
    if let (Some(wanted), Some((mine, theirs))) = (bounds.shadow.latency_ratio, medians) {
        // The same courtesy as to percentiles: `mine` is where the bucket ends, and an eighth is its width.
        let exceeded = mine.as_secs_f64() / 1.125 > wanted * theirs.as_secs_f64();
        all.push(Ratio {
            name: format!("median latency of copies to {candidate}"),
            exceeded,
            told: format!("{} against {} of the same requests", milliseconds(mine), milliseconds(theirs)),
            wanted: format!("at most {wanted} times as much is wanted"),
        });
    }
    if let Some(wanted) = bounds.shadow.size_ratio {
        let (mine, theirs) = (seen.bytes as f64, seen.client_bytes as f64);
        all.push(Ratio {
            name: format!("size of {candidate}'s answers"),
            exceeded: mine > wanted * theirs || theirs > wanted * mine,
            told: format!("{} bytes against {}", seen.bytes, seen.client_bytes),
            wanted: format!("between 1/{wanted} and {wanted} times as much is wanted"),
        });
    }
    all
}

fn overload(plan: &Plan, look: &Look<'_>) -> Option<String> {
    let seen = look.candidate.filter(|seen| seen.reports >= REPORTS)?;
    let (load, wanted) = (seen.load()?, plan.bounds.load?);
    (load > wanted).then(|| {
        let Plan { candidate, .. } = plan;
        let reports = seen.reports;
        format!(
            "load of {candidate}: {load:.2} in {reports} reports in {}, at most {wanted} is wanted",
            look.span()
        )
    })
}

/// Who of those outside said no for too long.
fn refusal(plan: &Plan, diary: &Diary, facts: &Facts) -> Option<String> {
    plan.bounds.checks.iter().find_map(|check| {
        let said = facts.checks.iter().find(|said| said.name == check.name)?;
        let of_this_run = diary.since.is_some_and(|since| said.at >= since.time());
        let words = said.answer.as_ref().err().filter(|_| of_this_run)?;
        let row = said.failures_in_a_row;
        (row >= check.failures).then(|| match row {
            1 => format!("check {}: {words}", check.name),
            _ => format!("check {}: {words}, {row} times in a row", check.name),
        })
    })
}

/// What is missing of requests before the step may pass.
fn of_requests(plan: &Plan, course: &Course, look: &Look<'_>, missing: &mut Vec<Missing>) {
    let Plan { candidate, stable, bounds, .. } = plan;
    let requests = look.candidate.map_or(0, |seen| seen.total.requests);
    if course.weight > 0 {
        enough(missing, requests, bounds.min_requests, &format!("requests to {candidate}"));
        let held_against = bounds.latency.iter().any(|latency| latency.of_stable.is_some());
        if held_against && course.weight < 100 {
            // What comes along with the candidate's, so that stable's are never what is waited for most.
            let (all, share) = (u128::from(bounds.min_requests), u128::from(course.weight));
            let wanted = (all * (100 - share) / share).clamp(1.min(all), all);
            let observed = look.stable.map_or(0, |seen| seen.total.latency.total());
            let unit = format!("requests to {stable}, to hold {candidate} against");
            enough(missing, observed, u64::try_from(wanted).unwrap_or(u64::MAX), &unit);
        }
        let load = look.candidate.and_then(Backend::load);
        match (bounds.load, load) {
            (Some(_), None) => {
                missing.push(Missing::of(format!("a load report of {candidate}"), String::new()));
            }
            (Some(wanted), Some(load)) if load > wanted => {
                let what = format!("a load of {candidate} of at most {wanted}");
                missing.push(Missing::of(what, format!("{load:.2} so far")));
            }
            _ => {}
        }
    }
    for share in shares(plan, course, look).iter().filter(|share| share.bad()) {
        let what = format!("{} of at least {}", share.name, percent(share.wanted));
        missing.push(Missing::of(what, format!("{} so far", share.told())));
    }
    for bound in percentiles(plan, course, look).iter().filter(|bound| bound.exceeded()) {
        let what = format!("{} within its bound", bound.name);
        missing.push(Missing::of(what, format!("{} so far, {}", bound.told(), bound.wanted)));
    }
}

/// What is missing of copies.
fn of_copies(plan: &Plan, course: &Course, look: &Look<'_>, missing: &mut Vec<Missing>) {
    if course.shadow == 0 {
        return;
    }
    let Plan { candidate, bounds, .. } = plan;
    let (shadow, nothing) = (&bounds.shadow, Shadow::default());
    let seen = look.shadow.unwrap_or(&nothing);
    if !shadow.compares {
        enough(missing, seen.sent, bounds.min_requests, &format!("copies to {candidate}"));
        return;
    }
    let answers = format!("answers of {candidate} that are compared");
    enough(missing, seen.compared, shadow.min_compared, &answers);
    if shadow.same_top.is_some() {
        let answers = format!("compared answers of {candidate} that have a greatest element");
        enough(missing, seen.ranked, shadow.min_compared, &answers);
    }
    for ratio in ratios(bounds, candidate, seen).into_iter().filter(|ratio| ratio.exceeded) {
        let Ratio { name, told, wanted, .. } = ratio;
        missing.push(Missing::of(format!("{name} within its bound"), format!("{told} so far, {wanted}")));
    }
}

/// Who has not said yes since the step was applied everywhere.
fn of_checks(plan: &Plan, diary: &Diary, facts: &Facts, missing: &mut Vec<Missing>) {
    for check in &plan.bounds.checks {
        let said = facts.checks.iter().find(|said| said.name == check.name);
        let of_this_step =
            said.filter(|said| diary.applied_since.is_some_and(|since| said.at >= since.time()));
        let so_far = match of_this_step.map(|said| &said.answer) {
            Some(Ok(_)) => continue,
            Some(Err(words)) => words.clone(),
            None => "not asked yet".to_owned(),
        };
        missing.push(Missing::of(format!("a yes of check {}", check.name), so_far));
    }
}

impl Missing {
    fn of(what: String, so_far: String) -> Self {
        Self { what, so_far }
    }
}

fn enough(missing: &mut Vec<Missing>, seen: u64, wanted: u64, unit: &str) {
    if seen < wanted {
        missing.push(Missing::of(format!("{wanted} {unit}"), format!("{seen} so far")));
    }
}

/// Whether the true share, of which `count` of `of` is a sample, is above `allowed`.
fn surely_above(count: u64, of: u64, allowed: f64) -> bool {
    count >= FLOOR && wilson(count.min(of), of) > allowed
}

/// The lower end of Wilson's interval.
fn wilson(count: u64, of: u64) -> f64 {
    if of == 0 {
        return 0.0;
    }
    let n = of as f64;
    let (p, zz) = (count as f64 / n, Z * Z);
    let half = Z * (p * (1.0 - p) / n + zz / (4.0 * n * n)).sqrt();
    ((p + zz / (2.0 * n) - half) / (1.0 + zz / n)).max(0.0)
}

pub(super) fn round(number: f64, places: i32) -> f64 {
    let factor = 10f64.powi(places);
    (number * factor).round() / factor
}

fn percent(share: f64) -> String {
    format!("{} %", round(share * 100.0, 3))
}

fn milliseconds(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1e3;
    if ms < 10.0 { format!("{} ms", round(ms, 2)) } else { format!("{ms:.0} ms") }
}
