//! The model server's metrics page: found, and then looked at again and again.

use std::time::Duration;

use penstock_inference::page::{Kind, Rates, Reading};
use tokio::time::Instant;

use super::fetch::{FetchError, Fetcher};
use super::find::{self, Fruitless, Patience, Target, Where};
use super::source::Source;
use super::{Config, Port, ServerSeen, Signals};
use crate::loaded::{self, Loaded};

/// A look that took a tenth of the time would cost the server as much as a small tenant.
const REST: u32 = 10;
/// Counters are compared over at least this long: over less, one request makes a rate.
const WINDOW: Duration = Duration::from_secs(1);
/// What was read is believed for three looks, and at least so long.
const BELIEVED: Duration = Duration::from_secs(2);
/// A page that has been gone for so long is searched anew: the server may have moved to another port.
const LOST: Duration = Duration::from_secs(5);
/// How often a change of the pod's ports is noticed while nothing is found.
const NOTICE: Duration = Duration::from_secs(1);

/// How often a server is asked what it has loaded.
const MODELS_EVERY: Duration = Duration::from_secs(2);

/// Finds the page and looks at it, for ever.
pub(super) async fn watch(config: &Config, signals: &Signals, ports: impl Fn() -> Vec<Port>, epoch: Instant) {
    if config.server == Where::Off {
        return;
    }
    let mut source = Source::new("server");
    loop {
        let (target, fetcher) = search(config, &mut source, &ports).await;
        follow(config, signals, &mut source, &target, fetcher, epoch).await;
    }
}

/// Tries the places where the page may be until one has it.
async fn search(config: &Config, source: &mut Source, ports: &impl Fn() -> Vec<Port>) -> (Target, Fetcher) {
    let mut patience = Patience::default();
    let mut tried = Vec::new();
    loop {
        let targets = find::targets(&config.server, &ports());
        if targets != tried {
            patience = Patience::default();
        }
        tried = targets;
        if tried.is_empty() {
            // Nobody asked us to look anywhere, so nothing is missing.
            tokio::time::sleep(NOTICE).await;
            continue;
        }
        let (end, why) = match round(&tried, config.timeout).await {
            Ok(found) => return found,
            Err(end) => end,
        };
        source.down(|| {
            format!(
                "no metrics of a model server at {}: {why}; requests are balanced by what this proxy counts itself. \
                 If there is a page elsewhere, declare it, as vllm:8000/metrics",
                places(&tried)
            )
        });
        let wait = Instant::now() + patience.next(end, rand::random());
        while Instant::now() < wait && find::targets(&config.server, &ports()) == tried {
            tokio::time::sleep_until(wait.min(Instant::now() + NOTICE)).await;
        }
    }
}

/// Tries each place once.
async fn round(targets: &[Target], timeout: Duration) -> Result<(Target, Fetcher), (Fruitless, String)> {
    // While one is silent the server may be starting, whatever the others say; but what they say is the better story.
    let (mut silence, mut strangeness) = (None, None);
    for target in targets {
        let mut fetcher = Fetcher::new(target.address.to_string());
        match fetcher.get(&target.path, timeout).await.map(|page| Reading::read(page, target.kind)) {
            Ok(Some(_)) => return Ok((target.clone(), fetcher)),
            Ok(None) => strangeness = Some(strange(target)),
            Err(error) if error.answered() => strangeness = strangeness.or(Some(error.to_string())),
            Err(error) => silence = Some(error.to_string()),
        }
    }
    let end = if silence.is_some() { Fruitless::Silent } else { Fruitless::Strange };
    Err((end, strangeness.or(silence).unwrap_or_default()))
}

fn strange(target: &Target) -> String {
    match target.kind {
        Some(kind) => format!("{target} is no metrics page of {kind}, as was declared"),
        None => format!("{target} is no metrics page of a server that is known"),
    }
}

/// The places of a round, for a log line.
fn places(targets: &[Target]) -> String {
    let mut places: Vec<_> = targets.iter().map(|target| target.address.to_string()).collect();
    places.dedup();
    places.join(", ")
}

/// Looks at the page until it is lost.
async fn follow(
    config: &Config,
    signals: &Signals,
    source: &mut Source,
    target: &Target,
    mut fetcher: Fetcher,
    epoch: Instant,
) {
    let mut history = History::default();
    let mut seen_at = Instant::now();
    let (mut lists, mut listed_at) = (Fetcher::new(target.address.to_string()), None);
    loop {
        let began = Instant::now();
        let fetched = fetcher.get(&target.path, config.timeout).await;
        let pause = config.every.max(began.elapsed() * REST);
        match fetched.map(|page| Reading::read(page, target.kind)) {
            Ok(Some(reading)) => {
                seen_at = Instant::now();
                let now = epoch.elapsed();
                let rates = history.add(reading, now);
                signals.set_server(ServerSeen { reading, rates, until: now + BELIEVED.max(pause * 3) });
                source.up(|| {
                    let kind = reading.kind.map_or("a model server", |kind| kind.name());
                    format!("reading the metrics of {kind} at {target}")
                });
                if reading.kind == Some(Kind::Vllm)
                    && listed_at.is_none_or(|at: Instant| at.elapsed() >= MODELS_EVERY)
                {
                    listed_at = Some(seen_at);
                    let page = lists.get(loaded::PAGE, config.timeout).await.ok();
                    if let Some(header) = page.and_then(Loaded::of_page).and_then(|list| list.to_header()) {
                        signals.set_models(header, epoch.elapsed() + MODELS_EVERY * 3);
                    }
                }
            }
            failed => {
                let story = || story(target, failed);
                // One look that fails says little; what was read is believed meanwhile.
                if epoch.elapsed() >= signals.server().until {
                    source.down(story);
                }
                if seen_at.elapsed() >= LOST {
                    return;
                }
            }
        }
        tokio::time::sleep(pause).await;
    }
}

fn story(target: &Target, failed: Result<Option<Reading>, FetchError>) -> String {
    let why = match failed {
        Err(error) => error.to_string(),
        Ok(_) => strange(target),
    };
    format!("the model server's metrics cannot be read: {why}; requests are balanced without them")
}

/// Readings to compare with.
#[derive(Debug, Default)]
struct History {
    /// The one to compare with, and the one to compare with later.
    base: Option<(Duration, Reading)>,
    next: Option<(Duration, Reading)>,
    rates: Rates,
}

impl History {
    /// Takes in a reading, and says what happened over the last second or two.
    fn add(&mut self, reading: Reading, now: Duration) -> Rates {
        let old = |seen: &Option<(Duration, Reading)>| {
            seen.as_ref().is_none_or(|(at, _)| now.saturating_sub(*at) >= WINDOW)
        };
        if old(&self.next) {
            self.base = self.next.replace((now, reading));
        }
        if let Some((at, base)) = &self.base {
            self.rates = Rates::between(base, &reading, now.saturating_sub(*at));
        }
        self.rates
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_taken_over_a_second_or_two() {
        let mut history = History::default();
        let reading =
            |count: f64| Reading { kind: Some(Kind::Triton), requests: Some(count), ..Reading::default() };
        let mut rates = Rates::default();
        for look in 0..=20u32 {
            rates = history.add(reading(f64::from(look) * 10.0), Duration::from_millis(250) * look);
            if look < 4 {
                assert_eq!(rates.requests, None, "too early to tell at look {look}");
            } else {
                assert_eq!(rates.requests, Some(40.0), "look {look}");
            }
        }
        let again = history.add(reading(0.0), Duration::from_millis(5250));
        assert_eq!(again.requests, None, "the server started anew");
        assert_eq!(rates.failures, None);
    }
}
