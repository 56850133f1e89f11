//! The pod's GPUs: from the driver's library, else from an exporter's page.

use std::collections::BTreeMap;
use std::time::Duration;

use penstock_inference::orca::{GpuHealth, GpuId};
use penstock_inference::page::dcgm::{self, Gpu};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::fetch::Fetcher;
use super::health::Watch;
use super::nvml::{self, Heard};
use super::source::Source;
use super::{Config, GpuSeen, Signals};

/// An exporter looks at its GPUs every 30 s by default; this is soon enough after that.
const PAGE_EVERY: Duration = Duration::from_secs(5);
/// Three looks, of either source.
const BELIEVED: Duration = Duration::from_secs(15);

/// How it is known which GPUs are this pod's. An exporter shows those of the whole node, and so may the driver.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Owned {
    /// Their UUIDs, declared.
    pub uuids: Vec<String>,
    /// What `NVIDIA_VISIBLE_DEVICES` says, if it is set.
    pub visible: Option<String>,
    /// `<namespace>/<pod>`, as exporters label them.
    pub pod: String,
}

/// Who shows GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// The driver: what the container may see.
    Driver,
    /// An exporter: the node's.
    Exporter,
}

/// Follows the GPUs, for ever.
pub(super) async fn watch(config: &Config, signals: &Signals, epoch: Instant) {
    let mut driver = config.nvml.clone().map(nvml::start);
    let mut driver_source = Source::new("nvml");
    let mut driver_up = driver.is_some();
    let mut page_source = Source::new("dcgm");
    let mut page = config.dcgm.as_deref().map(exporter);
    let mut follower = Follower { owned: &config.owned, watches: BTreeMap::new() };
    let mut ticks = tokio::time::interval(PAGE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            heard = next(&mut driver) => match heard {
                Some(Heard::Looked { gpus, xids }) => {
                    let now = epoch.elapsed();
                    follower.told(&xids, now);
                    driver_up = follower.take(&gpus, Shown::Driver, signals, &mut driver_source, now);
                }
                Some(Heard::Failed(why)) => {
                    driver_up = false;
                    let instead = match &page {
                        Some(_) => "the exporter's page is read instead",
                        None => "nothing is known of the GPU, and requests are balanced without it",
                    };
                    driver_source.down(|| format!("{why}; {instead}"));
                }
                None => (driver, driver_up) = (None, false),
            },
            _ = ticks.tick(), if page.is_some() && !driver_up => {
                let Some((fetcher, path)) = &mut page else { continue };
                let fetched = fetcher.get(path, config.timeout).await.map(dcgm::read);
                match fetched {
                    Ok(gpus) => {
                        follower.take(&gpus, Shown::Exporter, signals, &mut page_source, epoch.elapsed());
                    }
                    Err(error) => {
                        page_source.down(|| format!("the DCGM exporter's page cannot be read: {error}"));
                    }
                }
            },
        }
    }
}

/// What the driver's thread says next; never, when there is none.
async fn next(driver: &mut Option<mpsc::Receiver<Heard>>) -> Option<Heard> {
    match driver {
        Some(driver) => driver.recv().await,
        None => std::future::pending().await,
    }
}

/// `host:port/path` or `http://host:port/path`.
fn exporter(place: &str) -> (Fetcher, String) {
    let place = place.strip_prefix("http://").unwrap_or(place);
    match place.split_once('/') {
        Some((server, path)) => (Fetcher::new(server), format!("/{path}")),
        None => (Fetcher::new(place), "/metrics".to_owned()),
    }
}

/// What is remembered of GPUs between two looks.
struct Follower<'a> {
    owned: &'a Owned,
    watches: BTreeMap<String, Watch>,
}

impl Follower<'_> {
    /// The driver tells of errors.
    fn told(&mut self, xids: &[(String, u64)], now: Duration) {
        for (uuid, xid) in xids {
            tracing::warn!(gpu = %uuid, xid, "the driver tells of an Xid");
            self.watches.entry(uuid.clone()).or_default().xid(*xid, now);
        }
    }

    /// A look at GPUs; whether it is known which of them are ours.
    fn take(
        &mut self,
        gpus: &[Gpu],
        shown: Shown,
        signals: &Signals,
        source: &mut Source,
        now: Duration,
    ) -> bool {
        let mine = match mine(gpus, self.owned, shown) {
            Ok(mine) => mine,
            Err(why) => {
                source.down(|| format!("{why}; requests are balanced without the GPU"));
                return false;
            }
        };
        // Not more watches than GPUs, whatever a page shows over time.
        self.watches.retain(|uuid, _| mine.iter().any(|gpu| gpu.uuid == *uuid));
        let mut seen = summary(&mine, now + BELIEVED);
        let health = mine.iter().map(|gpu| self.watches.entry(gpu.uuid.clone()).or_default().look(gpu, now));
        seen.health = health.max();
        let before = signals.gpu().health;
        if before != seen.health && (before.is_some() || seen.health != Some(GpuHealth::Well)) {
            tracing::warn!(?before, now = ?seen.health, gpus = ?uuids(&mine), "the GPU's health has changed");
        }
        signals.set_gpu(seen);
        source.up(|| format!("watching {}", uuids(&mine).join(", ")));
        true
    }
}

fn uuids<'a>(gpus: &[&'a Gpu]) -> Vec<&'a str> {
    gpus.iter().map(|gpu| gpu.uuid.as_str()).collect()
}

/// Memory and identity of a pod's GPUs together. A replica on several GPUs is one with whoever is on the same ones.
fn summary(gpus: &[&Gpu], until: Duration) -> GpuSeen {
    let mut uuids = uuids(gpus);
    uuids.sort_unstable();
    uuids.dedup();
    let total: Option<f64> = gpus.iter().map(|gpu| gpu.memory_total).sum();
    let used: Option<f64> = gpus.iter().map(|gpu| gpu.memory_used).sum();
    GpuSeen {
        id: (!uuids.is_empty()).then(|| GpuId::of_uuid(&uuids.join(","))),
        memory: used
            .zip(total)
            .filter(|(_, total)| *total > 0.0)
            .map(|(used, total)| (used / total).min(1.0)),
        health: None,
        temperature: gpus.iter().filter_map(|gpu| gpu.temperature).reduce(f64::max),
        until,
    }
}

/// Which of the GPUs are ours. A wrong answer would tie us to a stranger's fate, so doubt is an answer too.
fn mine<'a>(gpus: &'a [Gpu], owned: &Owned, shown: Shown) -> Result<Vec<&'a Gpu>, String> {
    let named = |uuids: &[&str], whence: &str| {
        let found: Vec<_> = gpus.iter().filter(|gpu| uuids.contains(&gpu.uuid.as_str())).collect();
        match found.len() {
            0 => {
                Err(format!("none of {} ({whence}) is among the {} GPUs shown", uuids.join(", "), gpus.len()))
            }
            _ => Ok(found),
        }
    };
    if !owned.uuids.is_empty() {
        let declared: Vec<_> = owned.uuids.iter().map(String::as_str).collect();
        return named(&declared, "declared");
    }
    let visible: Vec<_> = owned.visible.iter().flat_map(|list| list.split(',')).map(str::trim).collect();
    let full = |name: &&&str| name.starts_with("GPU-");
    if !visible.is_empty() && visible.iter().filter(full).count() == visible.len() {
        return named(&visible, "NVIDIA_VISIBLE_DEVICES");
    }
    match shown {
        Shown::Exporter => {
            let of_pod = gpus.iter().filter(|gpu| gpu.pod.as_deref() == Some(&owned.pod));
            let of_pod: Vec<_> = of_pod.collect();
            if of_pod.is_empty() {
                return Err(format!(
                    "none of the {} GPUs on the exporter's page is labelled with {}, as happens with time slicing; \
                     declare the UUIDs of this pod's GPUs",
                    gpus.len(),
                    owned.pod
                ));
            }
            Ok(of_pod)
        }
        Shown::Driver => {
            let chosen = visible.iter().any(|name| name.parse::<u32>().is_ok() || name.starts_with("MIG-"));
            match gpus.len() {
                0 => Err("the driver shows this container no GPU".to_owned()),
                1 => Ok(gpus.iter().collect()),
                _ if chosen => Ok(gpus.iter().collect()),
                many => Err(format!(
                    "the driver shows {many} GPUs, and nothing says which are this pod's; declare their UUIDs"
                )),
            }
        }
    }
}

#[cfg(test)]
#[path = "gpus_tests.rs"]
mod tests;
