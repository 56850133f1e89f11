//! What was seen last, where the inbound report reads it.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption, Guard};
use http::HeaderValue;
use penstock_inference::orca::load::Load;
use penstock_inference::orca::{GpuHealth, GpuId};
use penstock_inference::page::{Rates, Reading};

/// The signals of the model server and of its GPUs. Written by [`run`](super::run), read by every worker without a
/// lock.
#[derive(Debug, Default)]
pub struct Signals {
    server: ArcSwap<ServerSeen>,
    gpu: ArcSwap<GpuSeen>,
    models: ArcSwapOption<ModelsSeen>,
}

/// What the model server has loaded, as other sidecars are told.
#[derive(Debug)]
struct ModelsSeen {
    header: HeaderValue,
    until: Duration,
}

/// The model server, at the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ServerSeen {
    /// What its page said.
    pub reading: Reading,
    /// What happened lately.
    pub rates: Rates,
    /// Until when this is believed; zero: it was never seen.
    pub until: Duration,
}

/// The pod's GPUs, at the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GpuSeen {
    /// Who they are. It holds when nothing else is known any more: a GPU does not change.
    pub id: Option<GpuId>,
    /// Share of their memory in use.
    pub memory: Option<f64>,
    /// The worst of them.
    pub health: Option<GpuHealth>,
    /// Degrees Celsius, of the hottest.
    pub temperature: Option<f64>,
    /// Until when memory, health and temperature are believed.
    pub until: Duration,
}

impl Signals {
    /// What they add to a load report at `now`: requests waiting inside the server, KV cache and GPU memory in use, which
    /// GPU it is and how it is. What is too old is not told.
    pub fn load(&self, now: Duration) -> Load {
        let (server, gpu) = (self.server.load(), self.gpu.load());
        let server = Some(&**server).filter(|server| now < server.until);
        let fresh = Some(&**gpu).filter(|gpu| now < gpu.until);
        let reading = server.map(|server| &server.reading);
        Load {
            // A server without a gauge tells in its counters how many waited.
            waiting: server.and_then(|server| server.reading.waiting.or(server.rates.waiting)),
            kv_usage: reading.and_then(|reading| reading.kv_usage),
            mem_utilization: fresh.and_then(|gpu| gpu.memory).or_else(|| reading.and_then(memory)),
            gpu: gpu.id,
            gpu_health: fresh.and_then(|gpu| gpu.health),
            ..Load::default()
        }
    }

    /// The model server, as last seen; see [`ServerSeen::until`].
    pub fn server(&self) -> Guard<Arc<ServerSeen>> {
        self.server.load()
    }

    /// The GPUs, as last seen; see [`GpuSeen::until`].
    pub fn gpu(&self) -> Guard<Arc<GpuSeen>> {
        self.gpu.load()
    }

    /// What the model server has loaded, for other sidecars; `None`: not known.
    pub fn models(&self, now: Duration) -> Option<HeaderValue> {
        let models = self.models.load();
        models.as_ref().filter(|models| now < models.until).map(|models| models.header.clone())
    }

    /// Takes in a look at what is loaded, which is believed until then.
    pub fn set_models(&self, header: HeaderValue, until: Duration) {
        self.models.store(Some(Arc::new(ModelsSeen { header, until })));
    }

    /// Takes in a look at the server.
    pub fn set_server(&self, seen: ServerSeen) {
        self.server.store(Arc::new(seen));
    }

    /// Takes in a look at the GPUs.
    pub fn set_gpu(&self, seen: GpuSeen) {
        self.gpu.store(Arc::new(seen));
    }

    /// For the admin page: everything that is known, with its age out.
    pub fn show(&self, now: Duration) -> serde_json::Value {
        let (server, gpu) = (self.server.load(), self.gpu.load());
        let health = |health: GpuHealth| match health {
            GpuHealth::Well => "well",
            GpuHealth::Throttled => "throttled",
            GpuHealth::Failed => "failed",
        };
        serde_json::json!({
            "server": {
                "kind": server.reading.kind.map(|kind| kind.name()),
                "fresh": now < server.until,
                "waiting": server.reading.waiting.or(server.rates.waiting),
                "running": server.reading.running,
                "kv_usage": server.reading.kv_usage,
                "queue_ms": server.rates.queue_ms,
                "compute_ms": server.rates.compute_ms,
                "first_token_ms": server.rates.first_token_ms,
                "token_ms": server.rates.token_ms,
                "batch_rows": server.rates.batch_rows,
                "prefix_hit_rate": server.rates.hit_rate,
                "preemptions_per_second": server.rates.preemptions,
            },
            "gpu": {
                "id": gpu.id.map(|id| format!("{:012x}", id.number() as u64)),
                "fresh": now < gpu.until,
                "memory": gpu.memory,
                "health": gpu.health.map(health),
                "temperature_celsius": gpu.temperature,
            },
        })
    }
}

/// Triton shows its GPUs' memory itself.
fn memory(reading: &Reading) -> Option<f64> {
    let total = reading.gpu_memory_total.filter(|total| *total > 0.0)?;
    Some((reading.gpu_memory_used? / total).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn what_was_never_seen_is_not_told() {
        assert_eq!(Signals::default().load(s(0)), Load::default());
    }

    #[test]
    fn what_is_old_is_not_told_but_a_gpu_stays_who_it_is() {
        let signals = Signals::default();
        let reading = Reading { waiting: Some(3.0), kv_usage: Some(0.5), ..Reading::default() };
        signals.set_server(ServerSeen { reading, until: s(12), ..ServerSeen::default() });
        let id = Some(GpuId::of_uuid("GPU-1"));
        signals.set_gpu(GpuSeen {
            id,
            memory: Some(0.25),
            health: Some(GpuHealth::Throttled),
            temperature: Some(80.0),
            until: s(15),
        });
        let load = signals.load(s(11));
        assert_eq!((load.waiting, load.kv_usage), (Some(3.0), Some(0.5)));
        assert_eq!((load.mem_utilization, load.gpu_health), (Some(0.25), Some(GpuHealth::Throttled)));
        let load = signals.load(s(12));
        assert_eq!((load.waiting, load.kv_usage, load.mem_utilization), (None, None, Some(0.25)));
        assert_eq!(signals.load(s(15)), Load { gpu: id, ..Load::default() });
        assert_eq!(signals.show(s(11))["gpu"]["health"], "throttled");
        assert_eq!(signals.show(s(15))["gpu"]["fresh"], false);
    }

    #[test]
    fn counters_and_the_servers_own_memory_stand_in() {
        let signals = Signals::default();
        let reading =
            Reading { gpu_memory_used: Some(20.0), gpu_memory_total: Some(80.0), ..Reading::default() };
        let rates = Rates { waiting: Some(1.5), ..Rates::default() };
        signals.set_server(ServerSeen { reading, rates, until: s(1) });
        let load = signals.load(s(0));
        assert_eq!((load.waiting, load.mem_utilization), (Some(1.5), Some(0.25)));
    }
}
