//! The page of a DCGM exporter: GPUs by their UUID.

use super::{Labels, lines};

/// The most GPUs that are read from one page; a node has up to 16.
pub const MAX_GPUS: usize = 64;

/// A GPU, as an exporter or NVML shows it. `None`: not told.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gpu {
    /// `GPU-…`; of a MIG slice, that of the GPU that it is a slice of.
    pub uuid: String,
    /// `namespace/pod` that the exporter says uses it; with time slicing it names one of several, or none.
    pub pod: Option<String>,
    /// Memory in use, bytes.
    pub memory_used: Option<f64>,
    /// Memory, bytes.
    pub memory_total: Option<f64>,
    /// Degrees Celsius.
    pub temperature: Option<f64>,
    /// Bits of NVML's clocks event reasons.
    pub throttle: Option<u64>,
    /// Counter: seconds that clocks were held down by heat.
    pub thermal_seconds: Option<f64>,
    /// The last Xid; 0: none yet.
    pub xid: Option<u64>,
    /// Counter: memory errors that were not corrected.
    pub uncorrected: Option<f64>,
    /// The hardware could not replace broken memory.
    pub remap_failed: Option<bool>,
    /// Share of the time that the compute engine was busy, 0 to 1.
    pub active: Option<f64>,
    /// The driver has lost it.
    pub lost: bool,
}

/// Reads the GPUs of a page, in the order of their first line; empty when it is no exporter's page.
pub fn read(page: &[u8]) -> Vec<Gpu> {
    let mut gpus: Vec<Gpu> = Vec::new();
    // Free and reserved memory make the total together with what is used.
    let mut rest_of_memory: Vec<Option<f64>> = Vec::new();
    for line in lines(page) {
        let Some(field) = line.name.strip_prefix("DCGM_") else { continue };
        let Some(uuid) = line.labels.get("UUID").filter(|uuid| !uuid.is_empty()) else { continue };
        if !line.value.is_finite() || line.value < 0.0 || blank(line.value) {
            continue;
        }
        let at = match gpus.iter().position(|gpu| gpu.uuid == uuid) {
            Some(at) => at,
            None if gpus.len() == MAX_GPUS => continue,
            None => {
                gpus.push(Gpu { uuid: uuid.to_owned(), pod: pod(line.labels), ..Gpu::default() });
                rest_of_memory.push(None);
                gpus.len() - 1
            }
        };
        let slice = line.labels.get("GPU_I_ID").is_some_and(|slice| !slice.is_empty());
        let (gpu, rest) = (&mut gpus[at], &mut rest_of_memory[at]);
        if gpu.pod.is_none() {
            gpu.pod = pod(line.labels);
        }
        let value = line.value;
        match field {
            // Of a GPU and of its slices: the largest of them is the GPU's own.
            "FI_DEV_FB_USED" => largest(&mut gpu.memory_used, value * MIB),
            "FI_DEV_FB_FREE" if !slice => *rest = Some(rest.unwrap_or_default() + value * MIB),
            "FI_DEV_FB_RESERVED" if !slice => *rest = Some(rest.unwrap_or_default() + value * MIB),
            "FI_DEV_GPU_TEMP" => largest(&mut gpu.temperature, value),
            "FI_DEV_CLOCK_THROTTLE_REASONS" | "FI_DEV_CLOCKS_EVENT_REASONS" => {
                gpu.throttle = Some(gpu.throttle.unwrap_or_default() | value as u64);
            }
            "FI_DEV_THERMAL_VIOLATION" => largest(&mut gpu.thermal_seconds, value * 1e-9),
            "FI_DEV_XID_ERRORS" => gpu.xid = Some(value as u64),
            "FI_DEV_UNCORRECTABLE_REMAPPED_ROWS" | "FI_DEV_ECC_DBE_VOL_TOTAL" => {
                gpu.uncorrected = Some(gpu.uncorrected.unwrap_or_default() + value);
            }
            "FI_DEV_ROW_REMAP_FAILURE" => {
                gpu.remap_failed = Some(gpu.remap_failed.unwrap_or_default() || value > 0.0);
            }
            "FI_PROF_GR_ENGINE_ACTIVE" => largest(&mut gpu.active, value),
            _ => {}
        }
    }
    for (gpu, rest) in gpus.iter_mut().zip(rest_of_memory) {
        gpu.memory_total = rest.zip(gpu.memory_used).map(|(rest, used)| rest + used);
    }
    gpus
}

const MIB: f64 = 1_048_576.0;

/// What DCGM writes where a GPU does not have a field: the last sixteen numbers of 31 and 63 bits, and 2^47 and the
/// three above it for fractions (`dcgm_structs.h`).
fn blank(value: f64) -> bool {
    const INT32: f64 = 2_147_483_632.0;
    const FRACTION: f64 = 140_737_488_355_328.0;
    const INT64: f64 = 9_223_372_036_854_775_792.0;
    (INT32..INT32 + 16.0).contains(&value) || (FRACTION..FRACTION + 4.0).contains(&value) || value >= INT64
}

fn largest(field: &mut Option<f64>, value: f64) {
    *field = Some(field.map_or(value, |before| before.max(value)));
}

fn pod(labels: Labels<'_>) -> Option<String> {
    let (namespace, pod) = (labels.get("namespace")?, labels.get("pod")?);
    (!pod.is_empty()).then(|| format!("{namespace}/{pod}"))
}
