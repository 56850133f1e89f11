//! Which endpoint serves the request.
//!
//! Comes in: an [`Ask`], the [`Members`] of the cluster, [`Settings`] and randomness. Goes out: a [`Picked`], or
//! [`NonePicked`] with the reason. A pick looks at no more than [`LOOKS`] endpoints however many there are, takes no
//! lock and allocates nothing; only if everything it looks at is unusable does it go through all of them.
//!
//! `gpu`: of up to eight endpoints drawn at random those with too much work in flight are hot; among the cold the
//! least predicted time to the first byte wins; what an endpoint is known to have of the prompt is taken off the work.
//! `prefix`: the same, where also those are looked at that have a part of the prompt or are its home by rendezvous
//! hashing, and nothing is hot: for a prompt that is computed already a queue can be worth waiting in.

use std::sync::OnceLock;
use std::time::Duration;

use rand::Rng;

use crate::cell::{AtomicU32, AtomicU64, Float, Ordering};
use crate::estimate::Cost;
use crate::heard::Views;
use crate::load::{EndpointState, Foretold, Outcome, Prediction, Sent, Usual};
use crate::members::Members;
use crate::memory::Memory;
use crate::outlier::Standing;
use crate::pick::{Candidate, NonePicked, Policy};
use crate::rendezvous::mix;
use crate::report::LoadReport;
use crate::wrr;
use Ordering::Relaxed;

/// Requests over which what is usual is averaged.
const MEMORY: f32 = 100.0;
/// Requests over which the trust in reports is learned.
const TRUST_MEMORY: f32 = 250.0;
/// Answers' worth of trust that reports have from the start.
const BELIEVED: f32 = 32.0;
/// `prefix`: work that is not in a cache yet counts so many times, since it delays everybody behind it as well.
const ANEW: f32 = 2.0;
/// `prefix`: of a prompt whose whereabouts are not known, its home is taken to have this share.
const PRESUMED: f32 = 0.9;
/// Where nothing would have to wait at the best, predictions within so much of it are as good: not noise decides who gets everything, but
/// whose turn it is.
const ALIKE: f32 = 1.0625;
/// The most endpoints a pick looks at.
pub const LOOKS: usize = 8;
/// Draws per look before the endpoints are scanned one by one.
const DRAWS: usize = 2 * LOOKS;
/// Who answered us within this time needs no exploration.
const EXPLORE_AFTER_MS: f32 = 1000.0;

/// A request that wants an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Its work: batch rows for tensor models, tokens for LLMs, else 1.
    pub units: f32,
    /// A session or another key that should stay where it is; 0 = none.
    pub key: u64,
    /// Chained hashes of the prompt's leading blocks: equal where everything up to there is equal.
    pub blocks: &'a [u64],
    /// The work that a block is.
    pub block_units: f32,
    /// The model and adapter it needs, hashed, for [`Candidate::serves`]; 0 = any.
    pub model: u64,
    /// Indices that this request has tried: picked again only if nothing else is there.
    pub avoid: &'a [usize],
    /// The time.
    pub now: Duration,
}

impl Ask<'_> {
    /// A request of one unit, now.
    pub fn one(now: Duration) -> Self {
        Self { units: 1.0, key: 0, blocks: &[], block_units: 0.0, model: 0, avoid: &[], now }
    }
}

/// How to choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// The policy.
    pub policy: Policy,
    /// How many endpoints are drawn; 2 to [`LOOKS`].
    pub choices: usize,
    /// Endpoints with more work in flight than this share of those seen lately are hot.
    pub hot_quantile: f32,
    /// Of a thousand picks, how many may go to an endpoint only because we have not asked it lately.
    pub explore_permille: u32,
    /// The most of the endpoints that may be out at once, percent.
    pub max_ejected_percent: u32,
    /// `ring-hash`: how much more than the mean an endpoint may have in flight (Mirrokni et al. 2018).
    pub bound: f32,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            policy: Policy::Gpu,
            choices: LOOKS,
            hot_quantile: 0.84,
            explore_permille: 10,
            max_ejected_percent: 50,
            bound: 1.25,
        }
    }
}

/// Why this endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It was its turn.
    Turn,
    /// The fewest requests of those drawn.
    FewestRequests,
    /// The least predicted time of those drawn.
    SoonestServed,
    /// The same, and it has a part of the prompt or is the key's home.
    Affinity,
    /// All that were drawn have too much work in flight, it the least.
    LeastHot,
    /// We have not asked it lately.
    Explored,
    /// It failed, and it is time to find out whether it still does.
    Probed,
    /// The key is at home there.
    Home,
    /// The key's home has too much in flight, this is the next.
    NextHome,
    /// Nothing that was drawn was usable, this was found.
    Found,
}

impl Why {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Turn => "turn",
            Self::FewestRequests => "fewest-requests",
            Self::SoonestServed => "soonest-served",
            Self::Affinity => "affinity",
            Self::LeastHot => "least-hot",
            Self::Explored => "explored",
            Self::Probed => "probed",
            Self::Home => "home",
            Self::NextHome => "next-home",
            Self::Found => "found",
        }
    }
}

/// An endpoint was picked, and the request counts as sent there.
#[derive(Clone, Copy, Debug)]
pub struct Picked {
    /// Its index.
    pub index: usize,
    /// Give this back when its first byte has come and when it is over.
    pub sent: Sent,
    /// Why it.
    pub why: Why,
    /// An endpoint, by index, of which less is known than of the others and would be worth knowing: if its load can be
    /// asked for without a request, ask, and hand the answer to [`Pool::told`].
    pub worth_asking: Option<usize>,
}

/// Whether an endpoint has too much work in flight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Heat {
    /// It has not.
    #[default]
    Cold,
    /// It has more than most.
    Hot,
    /// It has as much as its few answers so far allow.
    New,
}

impl Heat {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Hot => "hot",
            Self::New => "new",
        }
    }
}

/// One endpoint that was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Look {
    /// Its index.
    pub index: usize,
    /// What the request would meet.
    pub prediction: Prediction,
    /// What decides: the prediction with the way there and the neighbours on the same GPU, in milliseconds.
    pub score: f32,
    /// Units of work that it has already.
    pub matched: f32,
    /// Whether it has too much work in flight.
    pub heat: Heat,
    /// It was looked at for the key or the prompt, not by the draw.
    pub affine: bool,
}

impl Look {
    fn age_ms(&self) -> f32 {
        self.prediction.age_ms.unwrap_or(f32::INFINITY)
    }
}

/// A decision, for people to read: what was looked at, and what won.
#[derive(Clone, Copy, Debug, Default)]
pub struct Explained {
    looks: [Look; LOOKS],
    count: usize,
    /// The winner's index and the reason, once decided.
    pub winner: Option<(usize, Why)>,
}

impl Explained {
    fn note(&mut self, look: Look) {
        if self.count < LOOKS {
            self.looks[self.count] = look;
            self.count += 1;
        }
    }

    fn stalest(&self) -> Option<&Look> {
        self.looks().iter().max_by(|a, b| a.age_ms().total_cmp(&b.age_ms()))
    }

    fn has(&self, index: usize) -> bool {
        self.looks().iter().any(|look| look.index == index)
    }

    /// The endpoints looked at, in the order of looking.
    pub fn looks(&self) -> &[Look] {
        &self.looks[..self.count]
    }
}

/// What a cluster's picks share: turns, memory, counters.
#[derive(Debug, Default)]
pub struct Pool {
    turn: AtomicU32,
    in_flight: AtomicU64,
    /// The usual cost, to be assumed of endpoints that nobody knows yet.
    fixed_ms: Float,
    unit_ms: Float,
    /// The quantile of the work in flight, in milliseconds.
    hot_ms: Float,
    /// How long requests take, and their units of work.
    took_ms: Float,
    units: Float,
    /// Sums for the trust in reports.
    said_said: Float,
    said_came: Float,
    learned: AtomicU64,
    memory: OnceLock<Memory>,
    counters: Counters,
}

/// Sums since the start.
#[derive(Debug, Default)]
struct Counters {
    picks: AtomicU64,
    informed: AtomicU64,
    age_us: AtomicU64,
    explored: AtomicU64,
    regretted: AtomicU64,
    regret_us: AtomicU64,
    herded: AtomicU64,
}

/// How good the decisions were: sums since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quality {
    /// Picks.
    pub picks: u64,
    /// Of them, with a report of the winner at hand: the others went by what we ourselves saw.
    pub informed: u64,
    /// Staleness: the ages of those reports, added up.
    pub age: Duration,
    /// Picks that were exploration.
    pub explored: u64,
    /// Requests that took longer than was predicted for the second best.
    pub regretted: u64,
    /// Regret: by how much, added up.
    pub regret: Duration,
    /// Herd: reports by which the requests of others had more than doubled, and grown by more than two, since the
    /// report before, on which our pick stood.
    pub herded: u64,
}

impl Pool {
    /// Picks an endpoint and counts the request as sent there.
    pub fn pick<C: Candidate>(
        &self,
        members: &Members<C>,
        settings: &Settings,
        ask: &Ask<'_>,
        random: &mut impl Rng,
    ) -> Result<Picked, NonePicked> {
        self.explain(members, settings, ask, random, &mut Explained::default())
    }

    /// The same, and leaves in `looks` what was looked at.
    pub fn explain<C: Candidate>(
        &self,
        members: &Members<C>,
        settings: &Settings,
        ask: &Ask<'_>,
        random: &mut impl Rng,
        looks: &mut Explained,
    ) -> Result<Picked, NonePicked> {
        *looks = Explained::default();
        let mut picker = Picker { pool: self, members, settings, ask, random, looks };
        let chosen = match settings.policy {
            _ if members.is_empty() => None,
            Policy::RoundRobin => picker.in_turn(),
            Policy::OrcaWrr => picker.in_weighted_turn(),
            Policy::LeastRequest => picker.fewest(),
            Policy::RingHash => picker.at_home(),
            Policy::Gpu | Policy::Prefix => picker.soonest(),
        };
        let (index, why) = match chosen {
            Some(chosen) => chosen,
            None => (picker.scan()?, Why::Found),
        };
        looks.winner = Some((index, why));
        Ok(self.send(members, ask, looks, index, why))
    }

    /// Counts the request, and what the decision stood on.
    fn send<C: Candidate>(
        &self,
        members: &Members<C>,
        ask: &Ask<'_>,
        looks: &Explained,
        index: usize,
        why: Why,
    ) -> Picked {
        let state = members[index].state();
        let mut units = ask.units;
        let mut runner_up_ms = f32::INFINITY;
        let mut winner = None;
        for look in looks.looks() {
            if look.index == index {
                units = (units - look.matched).max(0.0);
                winner = Some(look.prediction);
            } else {
                runner_up_ms = runner_up_ms.min(look.score);
            }
        }
        self.units.approach(units, if self.units.get() == 0.0 { 1.0 } else { 1.0 / MEMORY });
        let usual = self.usual();
        let prediction = winner.unwrap_or_else(|| state.predict(units, &usual, ask.now));
        let counters = &self.counters;
        counters.picks.fetch_add(1, Relaxed);
        if let Some(age) = prediction.age_ms {
            counters.informed.fetch_add(1, Relaxed);
            counters.age_us.fetch_add((age * 1e3) as u64, Relaxed);
        }
        if why == Why::Explored {
            counters.explored.fetch_add(1, Relaxed);
        }
        if let Some(cost) = state.cost() {
            let share = if self.unit_ms.get() == 0.0 { 1.0 } else { 1.0 / 64.0 };
            self.fixed_ms.approach(cost.fixed_ms, share);
            self.unit_ms.approach(cost.unit_ms, share);
        }
        if !ask.blocks.is_empty()
            && let Some(memory) = self.memory.get()
        {
            memory.remember(ask.blocks, members.number(index), ask.now);
        }
        self.in_flight.fetch_add(1, Relaxed);
        let foretold = Foretold { ms: prediction.ms, runner_up_ms, views: prediction.views };
        let worth_asking = looks.stalest().filter(|look| look.age_ms() > usual.ms).map(|look| look.index);
        Picked { index, sent: state.send(units, foretold, &usual, ask.now), why, worth_asking }
    }

    /// The head of the response has come.
    pub fn first_byte(&self, state: &EndpointState, sent: &mut Sent, now: Duration) {
        let Some(took_ms) = state.first_byte(sent, now) else { return };
        self.took_ms.approach(took_ms, if self.took_ms.get() == 0.0 { 1.0 } else { 1.0 / MEMORY });
        if let Some(views) = sent.foretold.views {
            self.learn(views, took_ms);
        }
        let regret = took_ms - sent.foretold.runner_up_ms;
        if regret > 0.0 {
            self.counters.regretted.fetch_add(1, Relaxed);
            self.counters.regret_us.fetch_add((regret * 1e3) as u64, Relaxed);
        }
    }

    /// Least squares for the trust `t` in `took = usual + t × (known − usual)`.
    fn learn(&self, views: Views, took_ms: f32) {
        let (said, came) = (views.known_ms - views.usual_ms, took_ms - views.usual_ms);
        self.learned.fetch_add(1, Relaxed);
        self.said_said.approach(said * said, 1.0 / TRUST_MEMORY);
        self.said_came.approach(said * came, 1.0 / TRUST_MEMORY);
    }

    /// The request is over.
    pub fn over(&self, state: &EndpointState, mut sent: Sent, outcome: Outcome, now: Duration) {
        if outcome == Outcome::Served {
            self.first_byte(state, &mut sent, now);
        }
        state.over(sent, outcome, now);
        self.in_flight.fetch_sub(1, Relaxed);
    }

    /// A report of the endpoint has come.
    pub fn told(&self, state: &EndpointState, report: LoadReport, now: Duration) {
        let before = state.heard.others();
        state.told(report, &self.usual(), now);
        if state.heard.others() > 2.0 * before + 2.0 {
            self.counters.herded.fetch_add(1, Relaxed);
        }
    }

    /// How good the decisions were.
    pub fn quality(&self) -> Quality {
        let counters = &self.counters;
        Quality {
            picks: counters.picks.load(Relaxed),
            informed: counters.informed.load(Relaxed),
            age: Duration::from_micros(counters.age_us.load(Relaxed)),
            explored: counters.explored.load(Relaxed),
            regretted: counters.regretted.load(Relaxed),
            regret: Duration::from_micros(counters.regret_us.load(Relaxed)),
            herded: counters.herded.load(Relaxed),
        }
    }

    /// How much of what reports say comes true.
    pub fn trust(&self) -> f32 {
        let said = self.said_said.get();
        if said <= 0.0 {
            return 1.0;
        }
        // Until there are some dozens of answers to go by, reports are believed.
        let n = self.learned.load(Relaxed) as f32;
        let seen = (self.said_came.get() / said).clamp(0.0, 1.0);
        (n * seen + BELIEVED) / (n + BELIEVED)
    }

    fn usual(&self) -> Usual {
        let cost = Cost { fixed_ms: self.fixed_ms.get(), unit_ms: self.unit_ms.get() };
        Usual { cost, ms: self.took_ms.get(), units: self.units.get(), trust: self.trust() }
    }
}

/// One decision while it is made.
struct Picker<'a, C, R> {
    pool: &'a Pool,
    members: &'a Members<C>,
    settings: &'a Settings,
    ask: &'a Ask<'a>,
    random: &'a mut R,
    looks: &'a mut Explained,
}

type Chosen = Option<(usize, Why)>;

impl<C: Candidate, R: Rng> Picker<'_, C, R> {
    fn usable(&self, i: usize) -> bool {
        let state = self.members[i].state();
        !state.draining()
            && !state.is_leaving(self.ask.now)
            && state.ejection.standing(self.ask.now) != Standing::Out
            && !self.gpu_failed(i)
            && self.members[i].serves(self.ask)
            && !self.ask.avoid.contains(&i)
    }

    /// Whether its GPU is broken, by its own word or by that of a neighbour on it.
    fn gpu_failed(&self, i: usize) -> bool {
        self.members[i].state().gpu_failed()
            || self.members.siblings(i).any(|sibling| sibling.state().gpu_failed())
    }

    fn in_turn(&self) -> Chosen {
        let n = self.members.len();
        (0..n.min(LOOKS))
            .map(|_| self.pool.turn.fetch_add(1, Relaxed) as usize % n)
            .find(|i| self.usable(*i))
            .map(|i| (i, Why::Turn))
    }

    fn in_weighted_turn(&self) -> Chosen {
        wrr::next(self.members, &self.pool.turn, 8 * LOOKS, |i| self.usable(i)).map(|i| (i, Why::Turn))
    }

    /// Of two drawn at random the one with fewer requests (Mitzenmacher 2001).
    fn fewest(&mut self) -> Chosen {
        self.draw(2, |picker, i| {
            let in_flight = picker.members[i].state().work(picker.ask.now);
            let prediction = Prediction { in_flight, ..Prediction::default() };
            Look { index: i, prediction, score: in_flight, ..Look::default() }
        });
        if let Some(i) = self.due() {
            return Some((i, Why::Probed));
        }
        let best = self.looks.looks().iter().min_by(|a, b| a.score.total_cmp(&b.score))?;
        Some((best.index, Why::FewestRequests))
    }

    /// Where the key is at home, unless too much is in flight there; then at its next home, and so on.
    fn at_home(&mut self) -> Chosen {
        let n = self.members.len() as f32;
        let mean = (self.pool.in_flight.load(Relaxed) as f32 + 1.0) / n;
        let bound = (self.settings.bound * mean).ceil();
        let key = if self.ask.key == 0 { self.random.random() } else { self.ask.key };
        for round in 0..LOOKS as u64 {
            let i = self.members.home(nth(key, round))?;
            let in_flight = self.members[i].state().in_flight() as f32;
            if self.usable(i) && in_flight + 1.0 <= bound {
                return Some((i, if round == 0 { Why::Home } else { Why::NextHome }));
            }
        }
        None
    }

    /// Draws up to `count` usable endpoints, each once, and looks at them.
    fn draw(&mut self, count: usize, look: impl Fn(&Self, usize) -> Look) {
        let n = self.members.len();
        let count = count.min(LOOKS);
        if n <= count {
            let start = if n > 1 { self.random.random_range(0..n) } else { 0 };
            for i in (start..n).chain(0..start) {
                if self.usable(i) && !self.looks.has(i) {
                    let look = look(self, i);
                    self.looks.note(look);
                }
            }
            return;
        }
        for _ in 0..DRAWS {
            if self.looks.count >= count {
                break;
            }
            let i = self.random.random_range(0..n);
            if self.usable(i) && !self.looks.has(i) {
                let look = look(self, i);
                self.looks.note(look);
            }
        }
    }

    /// The least predicted time among the cold.
    fn soonest(&mut self) -> Chosen {
        let prefix = self.settings.policy == Policy::Prefix;
        if !self.ask.blocks.is_empty() {
            self.pool.memory.get_or_init(Memory::default);
        }
        if prefix && (self.ask.key != 0 || !self.ask.blocks.is_empty()) {
            self.look_where_the_prompt_is();
        }
        self.draw(self.settings.choices.max(2), |picker, i| picker.look(i, false));
        if !prefix {
            self.look_at_heat();
        }
        if let Some(i) = self.due() {
            return Some((i, Why::Probed));
        }
        if self.random.random_range(0..1000) < self.settings.explore_permille
            && let Some(i) = self.unasked()
        {
            return Some((i, Why::Explored));
        }
        let least = |heat: Heat| {
            let looks = self.looks.looks().iter().filter(move |look| look.heat == heat);
            let best = looks.clone().min_by(|a, b| a.score.total_cmp(&b.score))?;
            if prefix || best.score > best.prediction.this_ms * ALIKE {
                return Some(best);
            }
            let alike = looks.filter(|look| look.score <= best.score * ALIKE);
            alike.min_by_key(|look| self.members[look.index].state().sent_at())
        };
        if let Some(best) = least(Heat::Cold) {
            return Some((best.index, if best.matched > 0.0 { Why::Affinity } else { Why::SoonestServed }));
        }
        least(Heat::Hot).or_else(|| least(Heat::New)).map(|best| (best.index, Why::LeastHot))
    }

    fn look(&self, index: usize, affine: bool) -> Look {
        let ask = self.ask;
        let candidate = &self.members[index];
        let matched = match self.pool.memory.get() {
            Some(memory) if !ask.blocks.is_empty() => {
                memory.matched(ask.blocks, self.members.number(index), ask.now) as f32 * ask.block_units
            }
            _ => 0.0,
        };
        let presumed = if affine && !ask.blocks.is_empty() { PRESUMED * ask.units } else { 0.0 };
        let matched = matched.max(presumed).min(ask.units);
        let prediction = candidate.state().predict(ask.units - matched, &self.pool.usual(), ask.now);
        let again =
            if self.settings.policy == Policy::Prefix { (ANEW - 1.0) * prediction.work_ms } else { 0.0 };
        // Replicas of one GPU are one failure domain: if a neighbour stands still, so does this one.
        let neighbours = self.members.siblings(index).map(|sibling| sibling.state().overdue_ms(ask.now));
        let stuck = (neighbours.fold(0.0, f32::max) - prediction.overdue_ms).max(0.0);
        let score = prediction.ms + candidate.distance_ms() + again + stuck;
        Look {
            index,
            prediction,
            score,
            matched,
            heat: if candidate.state().holds_back() { Heat::New } else { Heat::Cold },
            affine,
        }
    }

    /// Looks at the endpoints that have, or should have, a part of the prompt.
    fn look_where_the_prompt_is(&mut self) {
        let (members, ask) = (self.members, self.ask);
        let memory = self.pool.memory.get_or_init(Memory::default);
        let holder = memory.holder(ask.blocks, ask.now).and_then(|number| members.numbered(number));
        let first = ask.blocks.first().copied().unwrap_or(ask.key);
        let key = if ask.key == 0 { first } else { ask.key };
        // Prompts that begin alike meet at two homes, between which the key decides, so that what they share is not in
        // every cache; the key has a home of its own for when both are full.
        let side = key & 1;
        let homes = [nth(first, side), nth(first, 1 - side), nth(key, 0)].map(|place| members.home(place));
        for (i, home) in homes.into_iter().chain([holder]).zip([true, false, false, false]) {
            if let Some(i) = i
                && self.usable(i)
                && !self.looks.has(i)
            {
                let look = self.look(i, home);
                self.looks.note(look);
            }
        }
    }

    /// Marks those with too much work in flight.
    fn look_at_heat(&mut self) {
        let edge = self.pool.hot_ms.get();
        for look in &mut self.looks.looks[..self.looks.count] {
            let in_flight_ms = (look.prediction.ms - look.prediction.this_ms).max(0.0);
            // Robbins and Monro's search for the quantile; its step follows the scale of what is seen.
            let (step, q) = ((edge + in_flight_ms) / 128.0, self.settings.hot_quantile);
            let edge_now =
                self.pool.hot_ms.get() + if in_flight_ms > edge { step * q } else { step * (q - 1.0) };
            self.pool.hot_ms.set(edge_now.max(0.0));
            if in_flight_ms > edge && edge > 0.0 && look.heat == Heat::Cold {
                look.heat = Heat::Hot;
            }
        }
    }

    /// One that failed, if it is time to find out whether it still does.
    fn due(&self) -> Option<usize> {
        let is_due = |i: &usize| self.members[*i].state().is_due(self.ask.now);
        self.looks.looks().iter().map(|look| look.index).find(is_due)
    }

    /// Of those where no request of ours is, and that are not busier than most, the one whose last answer to us is the oldest, if that is long
    /// ago. What it reports of its work for others, or has reported of a bad moment since which nobody has asked it, need not be what it would
    /// do for us.
    fn unasked(&self) -> Option<usize> {
        let silence = |look: &Look| self.members[look.index].state().silence_ms(self.ask.now);
        // One that fails has its own time to be asked again.
        let may = |look: &&Look| {
            let free = self.members[look.index].state().in_flight() == 0;
            free && look.heat == Heat::Cold && look.prediction.failing == 0.0
        };
        let looks = self.looks.looks().iter().filter(may).map(|look| (silence(look), look.index));
        let (longest, index) = looks.max_by(|a, b| a.0.total_cmp(&b.0))?;
        (longest > EXPLORE_AFTER_MS).then_some(index)
    }

    /// The slow path: every endpoint, from a random one on.
    fn scan(&mut self) -> Result<usize, NonePicked> {
        let (n, ask) = (self.members.len(), self.ask);
        let mut none = NonePicked { total: n, ..NonePicked::default() };
        let (mut ejected_one, mut probed_one, mut leaving_one, mut tried_one) = (None, None, None, None);
        let start = if n > 1 { self.random.random_range(0..n) } else { 0 };
        for i in (start..n).chain(0..start) {
            let state = self.members[i].state();
            if state.draining() {
                none.draining += 1;
            } else if !self.members[i].serves(ask) {
                none.unfit += 1;
            } else if state.ejection.standing(ask.now) == Standing::Out || self.gpu_failed(i) {
                none.ejected += 1;
                ejected_one.get_or_insert(i);
                if !state.ejection.is_out(ask.now) && !self.gpu_failed(i) {
                    probed_one.get_or_insert(i);
                }
            } else if ask.avoid.contains(&i) {
                none.tried += 1;
                tried_one.get_or_insert(i);
            } else if state.is_leaving(ask.now) {
                leaving_one.get_or_insert(i);
            } else {
                return Ok(i);
            }
        }
        let panic = none.ejected * 100 > n * self.settings.max_ejected_percent as usize;
        // Of those that are out, one whose time is over has been asked already: better than nobody.
        leaving_one.or(tried_one).or(probed_one).or(ejected_one.filter(|_| panic)).ok_or(none)
    }
}

/// The key's first home, its second, and so on.
fn nth(key: u64, round: u64) -> u64 {
    mix(key.wrapping_add(mix(round)))
}
