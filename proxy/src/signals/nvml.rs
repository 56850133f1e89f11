//! The driver's library, loaded when it is there: on a thread of its own, since its calls block and one of them waits
//! for events.
//!
//! What a look yields is the same [`Gpu`] that an exporter's page yields, so nothing behind it knows the difference.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enum_wrappers::device::{EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::event::EventSet;
use nvml_wrapper::{Device, Nvml};
use penstock_inference::page::dcgm::Gpu;
use tokio::sync::mpsc;

/// Between two looks. Memory and temperature move slowly; an Xid is an event and ends the wait.
const EVERY: Duration = Duration::from_secs(1);
/// After a library that loads and a driver that does not answer: it may be starting.
const AGAIN: Duration = Duration::from_secs(30);

/// What the thread tells.
#[derive(Debug)]
pub(super) enum Heard {
    /// A look at every GPU, and the errors since the last one.
    Looked {
        /// The GPUs that the container may see.
        gpus: Vec<Gpu>,
        /// UUID and number of each Xid.
        xids: Vec<(String, u64)>,
    },
    /// There is no library, or it fails.
    Failed(String),
}

/// Starts the thread. It ends when the receiver is gone, or for good when there is no library.
pub(super) fn start(library: PathBuf) -> mpsc::Receiver<Heard> {
    let (tell, heard) = mpsc::channel(4);
    let failed = tell.clone();
    let thread = std::thread::Builder::new().name("nvml".to_owned()).spawn(move || follow(&library, &tell));
    if let Err(error) = thread {
        // The channel is new and empty.
        let _ =
            failed.try_send(Heard::Failed(format!("the thread for the GPU driver cannot start: {error}")));
    }
    heard
}

fn follow(library: &Path, tell: &mpsc::Sender<Heard>) {
    loop {
        let (why, final_word) = match load(library) {
            Ok(nvml) => match look(&nvml, tell) {
                // Nobody listens any more.
                Ok(()) => return,
                Err(error) => (format!("the GPU driver fails: {error}"), false),
            },
            Err(NotLoaded { why, absent }) => (why, absent),
        };
        if tell.blocking_send(Heard::Failed(why)).is_err() || final_word {
            return;
        }
        std::thread::park_timeout(AGAIN);
    }
}

/// Why the library is of no use.
#[derive(Debug)]
struct NotLoaded {
    why: String,
    /// It is not there, and will not be: what a container may see is fixed at its start.
    absent: bool,
}

fn load(library: &Path) -> Result<Nvml, NotLoaded> {
    Nvml::builder().lib_path(library.as_os_str()).init().map_err(|error| {
        let absent = matches!(error, NvmlError::LibloadingError(_) | NvmlError::LibraryNotFound);
        let why = match absent {
            true => format!("the GPU driver's library does not load: {error}"),
            false => format!("the GPU driver does not answer: {error}"),
        };
        NotLoaded { why, absent }
    })
}

/// Looks until nobody listens, or the driver fails as a whole.
fn look(nvml: &Nvml, tell: &mpsc::Sender<Heard>) -> Result<(), NvmlError> {
    let devices: Vec<_> = (0..nvml.device_count()?)
        .filter_map(|index| {
            // One that the container may not see is no error.
            let device = nvml.device_by_index(index).ok()?;
            let uuid = device.uuid().ok()?;
            Some((device, uuid))
        })
        .collect();
    let events = register(nvml, &devices);
    let mut names = HashMap::new();
    loop {
        let gpus = devices.iter().map(|(device, uuid)| gpu(device, uuid)).collect();
        let xids = match &events {
            Some(events) => wait(events, &mut names),
            None => {
                std::thread::park_timeout(EVERY);
                Vec::new()
            }
        };
        if tell.blocking_send(Heard::Looked { gpus, xids }).is_err() {
            return Ok(());
        }
    }
}

/// Asks to be told of Xids; without that (a container may not be allowed to) errors show in the counters only.
fn register<'nvml>(nvml: &'nvml Nvml, devices: &[(Device<'nvml>, String)]) -> Option<EventSet<'nvml>> {
    let mut set = nvml.create_event_set().ok()?;
    for (device, uuid) in devices {
        set = match device.register_events(EventTypes::CRITICAL_XID_ERROR, set) {
            Ok(set) => set,
            Err(error) => {
                tracing::info!(gpu = %uuid, error = %error.error, "the driver does not tell of Xids");
                return None;
            }
        };
    }
    (!devices.is_empty()).then_some(set)
}

/// The Xids of the next second.
fn wait(events: &EventSet<'_>, names: &mut HashMap<u32, String>) -> Vec<(String, u64)> {
    let mut xids = Vec::new();
    let mut limit = EVERY.as_millis() as u32;
    loop {
        let event = match events.wait(limit) {
            Ok(event) => event,
            Err(NvmlError::Timeout) => break,
            Err(_) => {
                // It comes back at once; the pace stays the same, and the looks say what is wrong.
                std::thread::park_timeout(EVERY);
                break;
            }
        };
        // More may have come with it, and are waited for no longer.
        limit = 0;
        let (Ok(index), Some(error)) = (event.device.index(), event.event_data) else { continue };
        let uuid = names.entry(index).or_insert_with(|| event.device.uuid().unwrap_or_default());
        let xid = match error {
            XidError::Value(xid) => xid,
            XidError::Unknown => 999,
        };
        xids.push((uuid.clone(), xid));
        if xids.len() == 64 {
            break;
        }
    }
    xids
}

/// One GPU. What the driver does not tell is not told.
fn gpu(device: &Device<'_>, uuid: &str) -> Gpu {
    let memory = slices(device).or_else(|| {
        let memory = device.memory_info().ok()?;
        Some((memory.used, memory.total))
    });
    let temperature = device.temperature(TemperatureSensor::Gpu);
    let lost = matches!(temperature, Err(NvmlError::GpuLost | NvmlError::ResetRequired));
    Gpu {
        uuid: uuid.to_owned(),
        memory_used: memory.map(|(used, _)| used as f64),
        memory_total: memory.map(|(_, total)| total as f64),
        temperature: temperature.ok().map(f64::from),
        throttle: device.current_throttle_reasons().ok().map(|reasons| reasons.bits()),
        uncorrected: device
            .total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)
            .ok()
            .map(|count| count as f64),
        lost,
        ..Gpu::default()
    }
}

/// Memory used and total of the MIG slices that we may see; `None`: it is not sliced.
fn slices(device: &Device<'_>) -> Option<(u64, u64)> {
    let mut sum = None;
    for index in 0..device.mig_device_count().ok()? {
        let Ok(slice) = device.mig_device_by_index(index) else { continue };
        let Ok(memory) = slice.memory_info() else { continue };
        let (used, total) = sum.unwrap_or((0, 0));
        sum = Some((used + memory.used, total + memory.total));
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_library_that_is_not_there_is_said_once_and_the_thread_ends() {
        let mut heard = start("/nowhere/libnvidia-ml.so.1".into());
        let Some(Heard::Failed(why)) = heard.recv().await else { panic!("it cannot have loaded") };
        assert!(why.contains("does not load") && why.contains("/nowhere/libnvidia-ml.so.1"), "{why}");
        assert!(heard.recv().await.is_none(), "the thread has ended");
    }

    #[test]
    fn a_file_that_is_no_library_is_an_error_too() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "no library").unwrap();
        let NotLoaded { why, absent } = load(file.path()).err().unwrap();
        assert!(absent && why.contains("does not load"), "{why}");
    }
}
