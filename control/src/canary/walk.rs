//! One look at a Canary: from its diary and the facts of the moment to its diary.
//!
//! Where requests go is a function of the phase and the step alone (`course`), so no weight outlives what it was for. There is one exception:
//! requests are never sent to a stable version that has no ready endpoint. A run that waits to begin leaves them where the one before has sent them
//! until there is one, and a canary that should go back stays, says so, and goes back as soon as it can. Everything that a look does it does until nothing
//! moves, so that the next one with the same facts finds nothing to do.
//!
//! Can go wrong: nothing. A diary that somebody has changed by hand is gone on from as far as it makes sense.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

use super::bounds::{Plan, Step, Wrong, words};
use super::diary::{Diary, Moment, Observed, Phase, ShadowObserved};
use super::judge::{Missing, Verdict, judge, looks};
use super::template::{Pair, Pods};
use crate::conditions::{Condition, Settle, cut};
use crate::fleet::Seen;
use crate::objects::canary::Course;
use crate::objects::decode::dotted;

/// The windows that end now.
const SHORT: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(10);
/// Of the window that begins when a step is applied: more is not kept of what proxies saw.
const STEP: Duration = Duration::from_secs(300);
/// A candidate without a ready endpoint for so long is gone. Until then it may be a pod that is being replaced; requests that fail meanwhile are judged.
pub(super) const UNREADY: Duration = Duration::from_secs(10);
/// A stable template of which all pods are there and none was ready for so long is mended by the next, and not held against it.
const BROKEN: Duration = Duration::from_secs(60);
/// What a proxy tells is of the second before. Of the first second of a run it may be about the run before, or about another candidate.
const TOLD: Duration = Duration::from_secs(1);

/// What is true at the moment.
#[derive(Clone, Debug)]
pub struct Facts {
    /// When.
    pub now: Timestamp,
    /// The newest version of the object.
    pub generation: Option<i64>,
    /// Why the newest version of the object is refused, if it is; empty otherwise. Then nothing moves but back, and no other run begins.
    pub refused: Vec<Wrong>,
    /// Services of the plan that do not exist, `<namespace>/<name>`.
    pub missing: Vec<String>,
    /// Ready endpoints of the candidate.
    pub ready: usize,
    /// Those of the stable version.
    pub stable_ready: usize,
    /// Of a Deployment, how many pods its two templates have.
    pub pods: Option<Pods>,
    /// How far the course has come.
    pub reach: Reached,
    /// What clients' proxies saw of the plan's `service`, over the times that [`windows`] asks for: two seconds, ten, and since the step was
    /// applied everywhere.
    pub windows: [(Duration, Seen); 3],
    /// What those outside said.
    pub checks: Vec<Checked>,
    /// The newest command to go on, `<run>/<anything>`.
    pub promote: Option<String>,
    /// The newest command to go back, likewise.
    pub abort: Option<String>,
}

/// How far a course has come with the proxies of all replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// The course that the snapshot in force was compiled from. Counts about any other than the diary's say nothing.
    pub of: Option<Course>,
    /// Connected proxies that it concerns.
    pub concerned: usize,
    /// Of these, those that have applied it.
    pub applied: usize,
    /// Replicas of control that have not said how far theirs are.
    pub unheard: usize,
    /// One that refused it, and why.
    pub refused: Option<String>,
}

/// What somebody outside said last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The check's name.
    pub name: String,
    /// When it answered.
    pub at: Timestamp,
    /// Yes or no, in words: `0.97, at least 0.99 is wanted`.
    pub answer: Result<String, String>,
    /// How often it was no, one after the other, until now.
    pub failures_in_a_row: u32,
}

/// The windows to look through at `now`: none reaches back to before the run, and the last not to before the step. Zero: it is too early.
pub fn windows(diary: &Diary, now: Timestamp) -> [Duration; 3] {
    let run = diary.since.map(|since| since.until(now).saturating_sub(TOLD)).unwrap_or_default();
    let step = diary.applied_since.map(|since| since.until(now)).unwrap_or_default();
    [SHORT.min(run), LONG.min(run), STEP.min(step)]
}

/// The diary as it should be. With the same facts, what it answers is what it answers again.
pub fn walk(plan: &Plan, diary: &Diary, facts: &Facts) -> Diary {
    if !facts.refused.is_empty() && diary.run != plan.run {
        // No run begins with what is not in force, and none ends for it.
        return refused(diary, facts.generation, &facts.refused, facts.now);
    }
    let mut walker = Walker { plan, facts, diary: diary.clone() };
    walker.begin();
    walker.commands();
    // Each round leaves a step or a phase; a plan is as long as it is, and a round more finds nothing to do.
    for _ in 0..2 * plan.steps.len() + 4 {
        let before = walker.diary.clone();
        walker.advance();
        if walker.diary == before {
            break;
        }
    }
    walker.tell();
    walker.diary
}

/// The diary of an object of which no version makes sense: where requests go, and what has become of its run, stays as it is.
pub fn refused(diary: &Diary, generation: Option<i64>, wrong: &[Wrong], now: Timestamp) -> Diary {
    let mut next = diary.clone();
    let why = told(wrong);
    if matches!(diary.phase, Phase::Waiting | Phase::Invalid) {
        let changed = diary.phase != Phase::Invalid;
        (next.phase, next.message) = (Phase::Invalid, why.clone());
        if changed {
            next.note(now);
        }
    }
    let wanted = [Condition::of("Accepted", false, "Invalid", why)];
    settle(&mut next, generation, now, &wanted);
    next
}

struct Walker<'a> {
    plan: &'a Plan,
    facts: &'a Facts,
    diary: Diary,
}

/// What a step waits for.
enum Wait {
    /// Time, proxies, or numbers.
    For(Vec<Missing>),
    /// A person.
    Person(String),
    /// Nothing.
    Nothing,
}

impl Walker<'_> {
    fn now(&self) -> Moment {
        Moment::of(self.facts.now)
    }

    /// Begins anew, if this is another run than the diary's.
    fn begin(&mut self) {
        let Self { plan, facts, diary } = self;
        diary.steps = plan.steps.len();
        if diary.run.is_empty() && diary.course.is_some() && plan.pair.is_none() {
            // An older control has written it, and called runs otherwise: this one goes on.
            diary.run.clone_from(&plan.run);
        }
        // The same template again, after it went back and the Deployment had none but the stable one.
        let course = diary.course.as_ref().filter(|course| course.is_whole());
        let idled =
            course.is_some_and(|course| plan.pair.as_ref().is_some_and(|pair| pair.stable == course.stable));
        let made = facts.pods.is_some_and(|pods| pods.candidate > 0);
        let again = idled && made && !plan.idles() && diary.phase == Phase::RolledBack;
        if diary.run == plan.run && !again {
            return self.steps_changed();
        }
        // What was told before there was such a run was not told to it, but to one before it of the same name.
        let stale = |command: &Option<String>| command.clone().filter(|text| of_run(text, &plan.run));
        let mut answered = diary.answered.clone();
        answered.promote = stale(&facts.promote).or(answered.promote);
        answered.abort = stale(&facts.abort).or(answered.abort);
        *diary = Diary {
            run: plan.run.clone(),
            course: diary.course.take(),
            steps: diary.steps,
            since: Some(Moment::of(facts.now)),
            answered,
            history: std::mem::take(&mut diary.history),
            conditions: std::mem::take(&mut diary.conditions),
            ..Diary::default()
        };
        if self.waits_to_begin().is_some() {
            self.wait_to_begin();
            self.diary.note(self.facts.now);
        }
    }

    /// Of a run that goes on with other steps: it goes on at the step that is nearest below where it is, at the first if there is none.
    fn steps_changed(&mut self) {
        let Self { plan, diary, .. } = self;
        let Some(before) = diary.in_force.as_ref().map(|spec| &spec.steps) else { return };
        let kept = before.get(diary.step) == plan.spec.steps.get(diary.step);
        diary.step = diary.step.min(plan.steps.len().saturating_sub(1));
        if kept || !matches!(diary.phase, Phase::Progressing | Phase::Paused) {
            return;
        }
        let weight = diary.course.as_ref().map_or(0, |course| course.weight);
        let below = plan.steps.iter().map(|step| step.weight).filter(|below| *below <= weight).max();
        let index = plan.steps.iter().position(|step| Some(step.weight) == below).unwrap_or(0);
        self.step(index);
    }

    /// Does what people have told since, each once.
    fn commands(&mut self) {
        let Self { plan, facts, diary } = self;
        let fresh = |command: &Option<String>, answered: &Option<String>| {
            command.clone().filter(|text| of_run(text, &plan.run) && Some(text) != answered.as_ref())
        };
        let promote = fresh(&facts.promote, &diary.answered.promote);
        let abort = fresh(&facts.abort, &diary.answered.abort);
        if promote.is_some() {
            diary.promoted |= diary.phase.judged();
            diary.answered.promote = promote;
        }
        if abort.is_some() {
            diary.answered.abort = abort;
            let may = diary.phase.judged() || matches!(diary.phase, Phase::Waiting | Phase::Succeeded);
            if may && !plan.idles() {
                self.back("aborted by a person".to_owned());
            }
        }
    }

    /// One round.
    fn advance(&mut self) {
        if let Some(why) = self.diary.stays.clone() {
            self.back(why);
        }
        self.one_left();
        self.steer();
        if self.applied() && self.diary.applied_since.is_none() {
            self.diary.applied_since = Some(self.now());
        }
        match self.diary.phase {
            Phase::Waiting | Phase::Invalid => self.wait_to_begin(),
            Phase::Progressing | Phase::Paused | Phase::Promoting => self.judged(),
            Phase::RollingBack if self.applied() => {
                let why = self.diary.message.clone();
                self.enter(Phase::RolledBack, why);
            }
            Phase::RollingBack | Phase::Succeeded | Phase::RolledBack => {}
        }
    }

    /// Sends requests where they go in this phase, whatever somebody wrote there.
    fn steer(&mut self) {
        let Self { plan, facts, diary } = self;
        if matches!(diary.phase, Phase::Waiting | Phase::Invalid) && facts.stable_ready == 0 {
            return;
        }
        // What went back and is gone is forgotten: see `one_left`.
        let alone = diary.course.as_ref().is_some_and(Course::is_whole);
        let none_left = facts.pods.is_some_and(|pods| pods.candidate == 0);
        if diary.phase == Phase::RolledBack && alone && none_left {
            return;
        }
        let mut wanted = course(plan, diary.phase, diary.step);
        if wanted.open > 0 {
            let before = diary.course.as_ref().map(|course| course.open).filter(|open| *open > 0);
            let pods = facts.pods.and_then(|pods| u32::try_from(pods.stable).ok());
            wanted.open = before.or(pods).unwrap_or_default().max(1);
        }
        if diary.course.as_ref() != Some(&wanted) {
            diary.course = Some(wanted);
            diary.applied_since = None;
        }
    }

    /// Whether every proxy has the course: told by all replicas, and about this one.
    fn applied(&self) -> bool {
        let Reached { of, concerned, applied, unheard, .. } = &self.facts.reach;
        *of == self.diary.course && of.is_some() && applied == concerned && *unheard == 0
    }

    fn waits_to_begin(&self) -> Option<String> {
        let Self { plan, facts, .. } = self;
        if !facts.refused.is_empty() {
            return Some(format!("waits to be mended: {}", told(&facts.refused)));
        }
        if !facts.missing.is_empty() {
            return Some(missing_services(&facts.missing));
        }
        if let Some(deployment) = plan.spec.deployment.as_ref().filter(|_| plan.idles()) {
            let there = facts.pods.is_some_and(|pods| pods.stable > 0);
            let what = if there { "waits for a change of" } else { "waits for a pod of" };
            return Some(format!("{what} the Deployment {deployment}"));
        }
        let endpoint = |of: &str| Some(format!("waits for a ready endpoint of {of}"));
        match (facts.stable_ready, facts.ready, plan.paused) {
            (0, ..) => endpoint(&plan.stable),
            (_, 0, _) => endpoint(&plan.candidate),
            (.., true) => Some("waits to begin until spec.paused is no longer true".to_owned()),
            (.., false) => None,
        }
    }

    fn wait_to_begin(&mut self) {
        let waits = self.waits_to_begin();
        if self.diary.phase == Phase::Invalid {
            return self.enter(Phase::Waiting, waits.unwrap_or_else(|| "it makes sense again".to_owned()));
        }
        match waits {
            _ if self.diary.stays.is_some() => {}
            None => self.step(0),
            Some(why) => self.diary.message = cut(why),
        }
    }

    /// Of a Deployment: a template that is the only one there serves, whatever was decided of it; and one that went back and is gone is forgotten.
    fn one_left(&mut self) {
        let now = self.now();
        let Self { plan, facts, diary } = self;
        let (Some(Pair { stable, candidate }), Some(pods)) = (&plan.pair, facts.pods) else { return };
        let course = diary.course.as_ref();
        let serves = course.is_some_and(|course| course.stable == *candidate);
        let forgotten = course.is_some_and(Course::is_whole);
        let may = facts.refused.is_empty() && !plan.paused;
        let broken = diary.phase == Phase::Waiting && pods.stable > 0 && facts.stable_ready == 0 && may;
        let (patience, serving) = match diary.phase {
            Phase::Promoting | Phase::Succeeded | Phase::Invalid => return,
            _ if stable == candidate || serves => return,
            _ if pods.stable == 0 && facts.ready > 0 => (UNREADY, candidate),
            _ if broken && facts.ready > 0 => (BROKEN, candidate),
            Phase::RolledBack if pods.candidate == 0 && !forgotten => (UNREADY, stable),
            _ => {
                diary.alone_since = None;
                return;
            }
        };
        let since = *diary.alone_since.get_or_insert(now);
        if since.until(facts.now) < patience {
            return;
        }
        let course = Course::stable_alone(plan.run.clone(), &plan.spec);
        diary.course = Some(Course { stable: serving.clone(), candidate: serving.clone(), ..course });
        (diary.alone_since, diary.applied_since) = (None, None);
        if serving == candidate {
            let words = words(patience);
            diary.message = cut(format!("no endpoint of {stable} was ready for {words}: {candidate} serves"));
            (diary.phase, diary.stays) = (Phase::Waiting, None);
            diary.note(facts.now);
        }
    }

    /// Goes into a phase with its course.
    fn enter(&mut self, phase: Phase, message: String) {
        let now = self.now();
        self.diary.phase = phase;
        self.diary.message = cut(message);
        self.steer();
        let diary = &mut self.diary;
        diary.step_since = Some(now);
        diary.deadline_since = phase.judged().then_some(now);
        (diary.unready_since, diary.left) = (None, None);
        diary.promoted = false;
        diary.note(self.facts.now);
    }

    /// Goes to a step.
    fn step(&mut self, index: usize) {
        let Some(step) = self.plan.steps.get(index) else { return };
        let shadow = match step.shadow {
            0 => String::new(),
            percent => format!(", copies of {percent} %"),
        };
        let message = format!("{}: {} %{shadow}", self.place(index), step.weight);
        self.diary.step = index;
        // Its own even if the step before had the same course: what a step asks for is seen in the step.
        self.diary.applied_since = None;
        self.enter(Phase::Progressing, message);
    }

    fn place(&self, index: usize) -> String {
        format!("step {} of {}", index + 1, self.plan.steps.len())
    }

    /// Goes back, if there is anything to go back to.
    fn back(&mut self, why: String) {
        let Self { plan, facts, diary } = self;
        // Each old pod gets at most twice what each got before.
        let open = diary.course.as_ref().map_or(0, |course| course.open);
        let enough = usize::try_from(open.div_ceil(2)).unwrap_or(usize::MAX).max(1);
        if facts.stable_ready >= enough {
            diary.stays = None;
            let asks =
                plan.spec.deployment.as_ref().filter(|_| facts.pods.is_some_and(|pods| pods.candidate > 0));
            let why = match asks {
                Some(name) => format!(
                    "{why}; the Deployment still asks for it: `kubectl rollout undo deployment/{name}`, or mend it"
                ),
                None => why,
            };
            return self.enter(Phase::RollingBack, why);
        }
        let wanted = match &plan.spec.deployment {
            Some(name) if open > 0 => format!(
                "half of the {open} pods of {} are back, as by `kubectl rollout undo deployment/{name}`",
                plan.stable
            ),
            _ => format!("an endpoint of {} is ready to go back to", plan.stable),
        };
        let message = cut(format!("{why}; it stays until {wanted}"));
        diary.message = message;
        if diary.stays.is_none() {
            diary.stays = Some(why);
            diary.note(facts.now);
        }
    }

    /// A step, or the promotion: back, if anything is wrong; on, if nothing is missing.
    fn judged(&mut self) {
        self.observe();
        let now = self.now();
        let Self { plan, facts, diary } = self;
        if diary.stays.is_some() {
            return;
        }
        let left = facts.pods.filter(|_| diary.phase == Phase::Promoting).map(|pods| pods.stable);
        if left != diary.left {
            // As long as Kubernetes replaces them it is not late.
            (diary.left, diary.deadline_since) = (left, Some(now));
        }
        diary.unready_since = (facts.ready == 0).then(|| diary.unready_since.unwrap_or(now));
        if diary.unready_since.is_some_and(|since| since.until(facts.now) >= UNREADY) {
            let why = match facts.pods {
                Some(Pods { candidate: 0, .. }) => {
                    format!("the Deployment went back: no pod of {} is left", plan.candidate)
                }
                _ => format!("no endpoint of {} was ready for {}", plan.candidate, words(UNREADY)),
            };
            return self.back(why);
        }
        match judge(plan, diary, facts) {
            Verdict::Fails(why) => self.back(why),
            verdict => self.go_on(verdict),
        }
    }

    /// Decides whether a step, or the promotion, is over, and says what it waits for.
    fn go_on(&mut self, verdict: Verdict) {
        let promoting = self.diary.phase == Phase::Promoting;
        let place = if promoting { "promotion".to_owned() } else { self.place(self.diary.step) };
        match self.wait(verdict) {
            Wait::Nothing if promoting => {
                let message = format!("all requests go to {}", self.plan.candidate);
                self.enter(Phase::Succeeded, message);
            }
            Wait::Nothing if self.diary.step + 1 < self.plan.steps.len() => self.step(self.diary.step + 1),
            Wait::Nothing => {
                let message = format!("promotion: all requests are to go to {}", self.plan.candidate);
                self.enter(Phase::Promoting, message);
            }
            Wait::Person(what) => {
                self.diary.deadline_since = None;
                let phase = if promoting { Phase::Promoting } else { Phase::Paused };
                self.waits_in(phase, format!("{place}: {what}"));
            }
            Wait::For(missing) => {
                let phase = if promoting { Phase::Promoting } else { Phase::Progressing };
                let what: Vec<&str> = missing.iter().map(|one| one.what.as_str()).collect();
                self.waits_in(phase, format!("{place}: waits for {}", what.join("; ")));
                let now = self.now();
                self.diary.deadline_since.get_or_insert(now);
                self.due(&place, &missing);
            }
        }
    }

    /// Is in a phase of the same step, with the same course.
    fn waits_in(&mut self, phase: Phase, message: String) {
        let changed = self.diary.phase != phase;
        self.diary.phase = phase;
        self.diary.message = cut(message);
        if changed {
            self.diary.note(self.facts.now);
        }
    }

    fn wait(&self, verdict: Verdict) -> Wait {
        let Self { plan, facts, diary } = self;
        let promoting = diary.phase == Phase::Promoting;
        // All requests go to the candidate: the stable version is wanted no more.
        let missing = facts.missing.iter().filter(|name| !(promoting && **name == plan.stable));
        let missing: Vec<String> = missing.cloned().collect();
        if !missing.is_empty() {
            // To go on would be wrong, and to go back would be to what is not there.
            return Wait::Person(missing_services(&missing));
        }
        if !facts.refused.is_empty() {
            return Wait::Person(format!("waits to be mended: {}", told(&facts.refused)));
        }
        if plan.paused {
            return Wait::Person("paused by spec.paused".to_owned());
        }
        let asks = self.at().is_some_and(|step| step.pause) && !diary.promoted;
        // Of a Deployment: since Kubernetes has replaced the last pod.
        let since =
            if promoting && facts.pods.is_some() { diary.deadline_since } else { diary.applied_since };
        let held = since.is_some_and(|since| since.until(facts.now) >= self.hold());
        let lets_go = || Wait::Person("waits for `penstock canary promote`".to_owned());
        // Once it has asked it goes on asking, also when nights are quiet.
        if asks && held && diary.phase == Phase::Paused {
            return lets_go();
        }
        if let Some(left) = facts.pods.map(|pods| pods.stable).filter(|left| promoting && *left > 0) {
            let (what, so_far) = (format!("no pod of {} to be left", plan.stable), format!("{left} are"));
            return Wait::For(vec![Missing { what, so_far }]);
        }
        if !self.applied() {
            return Wait::For(vec![self.unapplied()]);
        }
        if promoting && self.hold().is_zero() {
            return Wait::Nothing;
        }
        if !held && !diary.promoted {
            let what = format!("{} to pass", words(self.hold()));
            return Wait::For(vec![Missing { what, so_far: String::new() }]);
        }
        if facts.ready == 0 {
            let what = format!("a ready endpoint of {}", plan.candidate);
            return Wait::For(vec![Missing { what, so_far: String::new() }]);
        }
        match verdict {
            Verdict::Undecided(missing) => Wait::For(missing),
            _ if asks => lets_go(),
            _ => Wait::Nothing,
        }
    }

    /// The step that it is at; none while it is promoted.
    fn at(&self) -> Option<&Step> {
        self.plan.steps.get(self.diary.step).filter(|_| self.diary.phase != Phase::Promoting)
    }

    /// What the step, or the promotion, lasts at least.
    fn hold(&self) -> Duration {
        self.at().map_or(self.plan.promotion, |step| step.hold)
    }

    /// What to say while not every proxy has the course.
    fn unapplied(&self) -> Missing {
        let Reached { of, concerned, applied, unheard, refused } = &self.facts.reach;
        let what = "every proxy to have it".to_owned();
        let so_far = match (refused, unheard) {
            _ if *of != self.diary.course => "it is not compiled yet".to_owned(),
            (Some(why), _) => format!("{applied} of {concerned} so far; {why}"),
            (None, 0) => format!("{applied} of {concerned} so far"),
            (None, _) => {
                format!(
                    "{applied} of {concerned} so far; {unheard} of control's replicas have not said how far theirs are"
                )
            }
        };
        Missing { what, so_far }
    }

    /// Goes back if the time is over.
    fn due(&mut self, place: &str, missing: &[Missing]) {
        let Self { plan, facts, diary } = &*self;
        // What a step lasts at least is no time that it is late by.
        let deadline = self.hold() + plan.deadline;
        if diary.deadline_since.is_none_or(|since| since.until(facts.now) < deadline) {
            return;
        }
        let lacked = missing.iter().map(|Missing { what, so_far }| match so_far.as_str() {
            "" => what.clone(),
            so_far => format!("{what} ({so_far})"),
        });
        let lacked: Vec<String> = lacked.collect();
        let deadline = words(deadline);
        self.back(format!("{place} has not passed within {deadline}; it waited for {}", lacked.join("; ")));
    }

    /// Writes down what is seen of the two.
    fn observe(&mut self) {
        let Self { plan, facts, diary } = self;
        let [_, long, step] = looks(plan, diary, facts);
        let look = step.or(long).unwrap_or_default();
        diary.candidate = look.candidate.map(Observed::of);
        diary.stable = look.stable.map(Observed::of);
        // Whoever asks later why it went on is told what the last step with copies saw.
        if diary.course.as_ref().is_some_and(|course| course.shadow > 0) {
            diary.shadow = look.shadow.map(ShadowObserved::of);
        }
    }

    /// Fills in what follows from where it is.
    fn tell(&mut self) {
        let Self { facts, diary, .. } = self;
        diary.concerned = facts.reach.concerned;
        diary.applied = if facts.reach.of == diary.course { facts.reach.applied } else { 0 };
        // Of a run that is over, what was seen last stays.
        if self.diary.phase.judged() {
            self.observe();
        }
        let applied = self.applied();
        if self.facts.refused.is_empty() {
            self.diary.in_force = Some(self.plan.spec.clone());
        }
        let wanted = conditions(&self.diary, self.facts, applied);
        settle(&mut self.diary, self.facts.generation, self.facts.now, &wanted);
    }
}

/// Where requests go in a phase, at a step.
fn course(plan: &Plan, phase: Phase, step: usize) -> Course {
    let (weight, shadow, matching) = match (phase, plan.steps.get(step)) {
        (Phase::Progressing | Phase::Paused, Some(step)) => (step.weight, step.shadow, plan.matching),
        (Phase::Promoting | Phase::Succeeded, _) => (100, 0, plan.matching),
        _ => (0, 0, false),
    };
    let course = Course { weight, shadow, matching, ..Course::stable_alone(plan.run.clone(), &plan.spec) };
    let Some(Pair { stable, candidate }) = &plan.pair else { return course };
    // What has succeeded is what serves, and what another change is held against.
    let stable = if phase == Phase::Succeeded { candidate } else { stable };
    let open = u32::from(phase == Phase::Promoting);
    Course { stable: stable.clone(), candidate: candidate.clone(), open, ..course }
}

/// Whether a command is for a run.
fn of_run(command: &str, run: &str) -> bool {
    command.split_once('/').is_some_and(|(of, _)| of == run)
}

fn missing_services(names: &[String]) -> String {
    match names {
        [name] => format!("there is no Service {name}"),
        names => format!("there are no Services {}", names.join(", ")),
    }
}

/// What is wrong, each at its field.
fn told(wrong: &[Wrong]) -> String {
    let each = wrong.iter().map(|(pointer, message)| match pointer.as_str() {
        "" => message.clone(),
        pointer => format!("{}: {message}", dotted(pointer)),
    });
    cut(each.collect::<Vec<_>>().join("; "))
}

fn conditions(diary: &Diary, facts: &Facts, applied: bool) -> [Condition; 3] {
    let accepted = match facts.refused.as_slice() {
        [] => Condition::of("Accepted", true, "Accepted", String::new()),
        wrong => {
            let message = format!("{} (its last good version is in force)", told(wrong));
            Condition::of("Accepted", false, "Invalid", cut(message))
        }
    };
    let Reached { of, concerned, applied: have, unheard, refused } = &facts.reach;
    let counted = match concerned {
        _ if *of != diary.course => "it is not compiled yet".to_owned(),
        0 => "no connected proxy is concerned".to_owned(),
        _ => format!("applied by {have} of {concerned} connected proxies that it concerns"),
    };
    let (status, reason, message) = match (applied, refused, unheard) {
        (true, ..) => ("True", "Programmed", counted),
        (false, Some(why), _) => ("False", "Pending", format!("{counted}; {why}")),
        (false, None, 1..) if *of == diary.course && have == concerned => {
            let silent = format!("{unheard} of control's replicas have not said how far theirs are");
            ("Unknown", "Pending", format!("{counted}; {silent}"))
        }
        (false, None, _) => ("False", "Pending", counted),
    };
    let programmed = Condition { kind: "Programmed", status, reason, message: cut(message) };
    let (status, reason) = match diary.phase {
        Phase::Succeeded => ("True", "Succeeded"),
        Phase::RolledBack => ("False", "RolledBack"),
        Phase::RollingBack => ("False", "RollingBack"),
        Phase::Waiting | Phase::Invalid => ("Unknown", "Waiting"),
        Phase::Progressing => ("Unknown", "Progressing"),
        Phase::Paused => ("Unknown", "Paused"),
        Phase::Promoting => ("Unknown", "Promoting"),
    };
    let succeeded = Condition { kind: "Succeeded", status, reason, message: diary.message.clone() };
    [accepted, programmed, succeeded]
}

fn settle(diary: &mut Diary, generation: Option<i64>, now: Timestamp, wanted: &[Condition]) {
    diary.observed_generation = generation;
    let known = Value::Array(std::mem::take(&mut diary.conditions));
    if let Value::Array(all) = (Settle { generation, now }).conditions(Some(&known), wanted) {
        diary.conditions = all;
    }
}
