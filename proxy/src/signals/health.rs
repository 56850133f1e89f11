//! What a GPU's readings mean for those who would send it work. Pure: time is passed in.
//!
//! | Reading | Means |
//! |---|---|
//! | lost by the driver, or broken memory that cannot be replaced | failed, as long as it is so |
//! | an Xid that is not the application's own | failed for [`FAILED_HOLD`] |
//! | another memory error that was not corrected | failed for [`FAILED_HOLD`] |
//! | clocks held down by heat, by the hardware or by its power supply | throttled for [`THROTTLED_HOLD`] |
//!
//! A power cap is not throttling: a GPU that works hard runs at its cap. Whatever is old at the first look (the last
//! Xid of an exporter may be of last month) is remembered and not counted.

use std::time::Duration;

use penstock_inference::orca::GpuHealth;
use penstock_inference::page::dcgm::Gpu;

/// After an error that ended work: by then the GPU was reset, its jobs are elsewhere, or it shows the error again.
pub const FAILED_HOLD: Duration = Duration::from_secs(300);
/// After clocks were seen held down: heat comes and goes within seconds, and a policy must not flap with it.
pub const THROTTLED_HOLD: Duration = Duration::from_secs(5);
/// The same, when it shows in a counter: exporters look every 30 s.
pub const THROTTLED_HOLD_COUNTED: Duration = Duration::from_secs(60);

/// NVML's clocks event reasons that slow a GPU down for its own protection: hardware slowdown, software thermal,
/// hardware thermal, power brake (`nvml.h`). Not counted: idle, application clocks, power cap, sync boost, display.
const THROTTLED: u64 = 0x08 | 0x20 | 0x40 | 0x80;

/// Held down for more than this share of the time, a GPU is throttled.
const THROTTLED_SHARE: f64 = 0.1;

/// Xids that an application brings on itself and that leave the GPU well: graphics exception, MMU fault, stopped
/// processing, preemptive clean-up, video processor exception, context switch timeout. NVIDIA's device plugin for
/// Kubernetes does not take a GPU out for them either.
const OF_THE_APPLICATION: [u64; 6] = [13, 31, 43, 45, 68, 109];

/// Whether an Xid says that the GPU itself is not to be trusted.
pub fn ends_trust(xid: u64) -> bool {
    xid != 0 && !OF_THE_APPLICATION.contains(&xid)
}

/// Follows one GPU.
#[derive(Clone, Debug, Default)]
pub struct Watch {
    xid: Option<u64>,
    uncorrected: Option<f64>,
    /// Seconds held down by heat, and when they last grew.
    thermal: Option<(f64, Duration)>,
    failed_until: Duration,
    throttled_until: Duration,
}

impl Watch {
    /// The driver has just told of this Xid.
    pub fn xid(&mut self, xid: u64, now: Duration) {
        if ends_trust(xid) {
            self.failed_until = now + FAILED_HOLD;
        }
    }

    /// Another look: how the GPU is.
    pub fn look(&mut self, gpu: &Gpu, now: Duration) -> GpuHealth {
        if let Some(xid) = gpu.xid
            && self.xid.replace(xid).is_some_and(|before| before != xid)
        {
            self.xid(xid, now);
        }
        if let Some(count) = gpu.uncorrected
            && self.uncorrected.replace(count).is_some_and(|before| count > before)
        {
            self.failed_until = now + FAILED_HOLD;
        }
        if gpu.throttle.is_some_and(|reasons| reasons & THROTTLED != 0) {
            self.throttled_until = self.throttled_until.max(now + THROTTLED_HOLD);
        }
        if let Some(seconds) = gpu.thermal_seconds {
            self.heat(seconds, now);
        }
        if gpu.lost || gpu.remap_failed == Some(true) || now < self.failed_until {
            GpuHealth::Failed
        } else if now < self.throttled_until {
            GpuHealth::Throttled
        } else {
            GpuHealth::Well
        }
    }

    fn heat(&mut self, seconds: f64, now: Duration) {
        /// What an exporter adds, it adds for the time since its last look, not since the last heat.
        const LONGEST: f64 = 30.0;
        match self.thermal {
            Some((before, at)) if seconds > before => {
                let elapsed = now.saturating_sub(at).as_secs_f64().clamp(0.001, LONGEST);
                if (seconds - before) / elapsed > THROTTLED_SHARE {
                    self.throttled_until = now + THROTTLED_HOLD_COUNTED;
                }
                self.thermal = Some((seconds, now));
            }
            Some((before, _)) if seconds == before => {}
            _ => self.thermal = Some((seconds, now)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn gpu() -> Gpu {
        Gpu { uuid: "GPU-1".to_owned(), ..Gpu::default() }
    }

    #[test]
    fn a_new_xid_ends_trust_for_a_while_and_an_old_one_does_not() {
        let mut watch = Watch::default();
        let with = |xid| Gpu { xid: Some(xid), ..gpu() };
        assert_eq!(watch.look(&with(94), s(0)), GpuHealth::Well, "it may be of last month");
        assert_eq!(watch.look(&with(31), s(1)), GpuHealth::Well, "the application's own fault");
        assert_eq!(watch.look(&with(48), s(2)), GpuHealth::Failed);
        assert_eq!(watch.look(&with(48), s(301)), GpuHealth::Failed);
        assert_eq!(watch.look(&with(48), s(302)), GpuHealth::Well);
        watch.xid(48, s(400));
        assert_eq!(watch.look(&with(48), s(400)), GpuHealth::Failed, "the driver told of it again");
    }

    #[test]
    fn memory_errors_count_when_they_grow() {
        let mut watch = Watch::default();
        let with = |count| Gpu { uncorrected: Some(count), ..gpu() };
        assert_eq!(watch.look(&with(2.0), s(0)), GpuHealth::Well);
        assert_eq!(watch.look(&with(2.0), s(1)), GpuHealth::Well);
        assert_eq!(watch.look(&with(3.0), s(2)), GpuHealth::Failed);
        let broken = Gpu { remap_failed: Some(true), ..gpu() };
        assert_eq!(Watch::default().look(&broken, s(0)), GpuHealth::Failed);
        let lost = Gpu { lost: true, ..gpu() };
        assert_eq!(Watch::default().look(&lost, s(0)), GpuHealth::Failed);
    }

    #[test]
    fn heat_throttles_and_a_power_cap_does_not() {
        let mut watch = Watch::default();
        let with = |reasons| Gpu { throttle: Some(reasons), ..gpu() };
        for harmless in [0x1, 0x2, 0x4, 0x10, 0x100] {
            assert_eq!(watch.look(&with(harmless), s(0)), GpuHealth::Well, "{harmless:#x}");
        }
        for reason in [0x8, 0x20, 0x40, 0x80, 0x44] {
            let mut watch = Watch::default();
            assert_eq!(watch.look(&with(reason), s(1)), GpuHealth::Throttled, "{reason:#x}");
            assert_eq!(watch.look(&with(0), s(5)), GpuHealth::Throttled, "no flapping");
            assert_eq!(watch.look(&with(0), s(6)), GpuHealth::Well);
        }
    }

    #[test]
    fn heat_that_is_only_counted_is_noticed_too() {
        let mut watch = Watch::default();
        let with = |seconds| Gpu { thermal_seconds: Some(seconds), ..gpu() };
        assert_eq!(watch.look(&with(500.0), s(0)), GpuHealth::Well);
        assert_eq!(watch.look(&with(500.5), s(30)), GpuHealth::Well, "half a second in thirty");
        assert_eq!(watch.look(&with(510.5), s(60)), GpuHealth::Throttled);
        assert_eq!(watch.look(&with(510.5), s(119)), GpuHealth::Throttled);
        assert_eq!(watch.look(&with(510.5), s(120)), GpuHealth::Well);
        assert_eq!(watch.look(&with(520.5), s(100_000)), GpuHealth::Throttled, "after a long time of cool");
        assert_eq!(watch.look(&with(0.0), s(200_000)), GpuHealth::Well, "the driver started anew");
    }

    #[test]
    fn what_is_not_told_is_well() {
        assert_eq!(Watch::default().look(&gpu(), s(0)), GpuHealth::Well);
    }
}
