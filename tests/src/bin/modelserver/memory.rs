//! Tensors in memory that the client shares: Triton's extensions `system_shared_memory` and `cuda_shared_memory`, as far as a
//! sidecar uses them, over REST.
//!
//! In: which regions there are, and requests whose tensors lie there. Out: requests with data, and outputs written where
//! they were wanted. Can go wrong: a region that nobody has registered, bytes outside of it, a handle that the driver does
//! not open; the words are those that Triton has for it.
//!
//! FOR TESTS: without a GPU the driver is the STAND-IN of `kernels/standin`, which maps the other process's memory.

use crate::refusal::Refusal;
use bytes::Bytes;
use penstock_inference::oip::shm::{self, RegisteredCuda};
use penstock_inference::oip::{InferResponse, Parameter, Parameters, RequestedOutput};
use penstock_kernels::arena::{Arena, Kind};
use penstock_kernels::cuda::{Context, DeviceMemory, Driver, IpcHandle, Stream};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The regions of one server.
pub(crate) struct Memory {
    system: bool,
    gpu: Option<Gpu>,
    regions: Mutex<BTreeMap<String, Region>>,
}

struct Gpu {
    context: Context,
    stream: Stream,
}

enum Region {
    System(File, u64),
    Cuda(DeviceMemory),
}

/// What registers shared memory of the system.
#[derive(serde::Deserialize)]
pub(crate) struct System {
    key: String,
    #[serde(default)]
    offset: u64,
    byte_size: u64,
}

/// What registers memory of a GPU.
#[derive(serde::Deserialize)]
pub(crate) struct Cuda {
    raw_handle: RawHandle,
    device_id: u32,
    byte_size: usize,
}

#[derive(serde::Deserialize)]
struct RawHandle {
    b64: String,
}

impl Memory {
    /// Serves shared memory of the system, and that of the first GPU of a driver.
    pub(crate) fn new(system: bool, driver: Option<&Path>) -> anyhow::Result<Self> {
        let gpu = driver.map(|driver| {
            let context = Driver::open(driver)?.context(0)?;
            tracing::warn!("memory of {:?} is served", context.device().name);
            anyhow::Ok(Gpu { stream: context.stream()?, context })
        });
        Ok(Self { system, gpu: gpu.transpose()?, regions: Mutex::default() })
    }

    /// What the server says that it can.
    pub(crate) fn extensions(&self) -> impl Iterator<Item = String> {
        let cuda = self.gpu.is_some().then(|| "cuda_shared_memory".to_owned());
        self.system.then(|| "system_shared_memory".to_owned()).into_iter().chain(cuda)
    }

    fn regions(&self) -> MutexGuard<'_, BTreeMap<String, Region>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, name: String, make: impl FnOnce() -> Result<Region, Refusal>) -> Result<(), Refusal> {
        let mut regions = self.regions();
        if regions.contains_key(&name) {
            return Err(Refusal::Invalid(format!("shared memory region '{name}' already in manager")));
        }
        regions.insert(name, make()?);
        Ok(())
    }

    /// Registers a file in `/dev/shm`.
    pub(crate) fn add_system(&self, name: String, asked: &System) -> Result<(), Refusal> {
        let refuse = |what: String| Refusal::Invalid(format!("Unable to open shared memory region: {what}"));
        if !self.system {
            return Err(refuse("it is not served here".into()));
        }
        self.add(name, || {
            let flat = asked.key.strip_prefix('/').filter(|key| !key.contains('/') && asked.offset == 0);
            let flat = flat.ok_or_else(|| refuse(format!("'{}'", asked.key)))?;
            let path = Path::new("/dev/shm").join(flat);
            let file = File::options().read(true).write(true).open(path);
            let file = file.map_err(|error| refuse(error.to_string()))?;
            Ok(Region::System(file, asked.byte_size))
        })
    }

    /// Opens memory of a GPU.
    pub(crate) fn add_cuda(&self, name: String, asked: &Cuda) -> Result<(), Refusal> {
        use base64::Engine as _;
        let refuse = |what: &dyn std::fmt::Display| {
            Refusal::Invalid(format!("failed to open CUDA IPC handle: {what}"))
        };
        let gpu = self.gpu.as_ref().ok_or_else(|| refuse(&"there is no GPU"))?;
        if asked.device_id != gpu.context.device().number {
            return Err(refuse(&"invalid device id"));
        }
        let handle = base64::engine::general_purpose::STANDARD.decode(&asked.raw_handle.b64);
        let handle = handle.ok().and_then(|handle| <[u8; 64]>::try_from(handle).ok());
        let handle = IpcHandle(handle.ok_or_else(|| refuse(&"invalid argument"))?);
        self.add(name, || {
            gpu.context.open_ipc(&handle, asked.byte_size).map(Region::Cuda).map_err(|error| refuse(&error))
        })
    }

    /// Lets go of a region, if there is such a one.
    pub(crate) fn remove(&self, name: &str) {
        drop(self.regions().remove(name));
    }

    /// The regions of GPUs.
    pub(crate) fn list_cuda(&self) -> Vec<RegisteredCuda> {
        let regions = self.regions();
        let cuda = regions.iter().filter(|(_, region)| matches!(region, Region::Cuda(_)));
        cuda.map(|(name, _)| RegisteredCuda { name: name.clone() }).collect()
    }

    /// What lies where an input says that it lies.
    pub(crate) fn read(&self, parameters: &Parameters) -> Result<Bytes, Refusal> {
        let (name, offset, bytes) = place(parameters)?;
        let regions = self.regions();
        let failed = |what: String| Refusal::Failed(format!("shared memory region '{name}': {what}"));
        match regions.get(name).ok_or_else(|| unknown(name))? {
            Region::System(_, size) if offset.saturating_add(bytes as u64) > *size => Err(outside(name)),
            Region::System(file, _) => {
                let mut data = vec![0; bytes];
                file.read_exact_at(&mut data, offset).map_err(|error| failed(error.to_string()))?;
                Ok(data.into())
            }
            Region::Cuda(memory) => {
                let offset = usize::try_from(offset)
                    .ok()
                    .filter(|offset| memory.span(*offset..offset + bytes).is_some());
                let offset = offset.ok_or_else(|| outside(name))?;
                let gpu = self.gpu.as_ref().ok_or_else(|| unknown(name))?;
                gpu.read(memory, offset, bytes).map_err(|error| failed(format!("CUDA: {error}")))
            }
        }
    }

    /// Writes outputs where they were wanted, and takes them out of the answer.
    pub(crate) fn write(
        &self,
        wanted: &[RequestedOutput],
        response: &mut InferResponse,
    ) -> Result<(), Refusal> {
        for output in &mut response.outputs {
            let wanted = wanted.iter().find(|wanted| wanted.name == output.name);
            let Some(wanted) = wanted.filter(|wanted| wanted.parameters.contains_key(shm::REGION)) else {
                continue;
            };
            let (name, offset, bytes) = place(&wanted.parameters)?;
            match self.regions().get(name).ok_or_else(|| unknown(name))? {
                Region::System(file, size)
                    if output.data.len() <= bytes && offset.saturating_add(bytes as u64) <= *size =>
                {
                    let written = file.write_all_at(&output.data, offset);
                    written.map_err(|error| Refusal::Failed(format!("shared memory: {error}")))?;
                }
                Region::System(..) => return Err(outside(name)),
                Region::Cuda(_) => {
                    return Err(Refusal::Invalid(
                        "outputs are not written to CUDA shared memory here".into(),
                    ));
                }
            }
            output.data = Bytes::new();
            output.parameters.clone_from(&wanted.parameters);
        }
        Ok(())
    }
}

impl Gpu {
    fn read(&self, memory: &DeviceMemory, at: usize, bytes: usize) -> anyhow::Result<Bytes> {
        let landing = Arena::new(Kind::Heap, bytes.max(1), 4096)?.run(&[bytes], 1).and_then(|run| run.seal());
        let landing = landing.ok_or_else(|| anyhow::anyhow!("no room"))?;
        let (landed, _) = self.stream.download(memory, at, landing, 0, 0..1)?.wait()?;
        landed.freeze().bytes(0, 0..1).ok_or_else(|| anyhow::anyhow!("nothing came"))
    }
}

fn unknown(name: &str) -> Refusal {
    Refusal::NotFound(format!("Unable to find shared memory region: '{name}'"))
}

fn outside(name: &str) -> Refusal {
    Refusal::Invalid(format!("Invalid offset + byte size for shared memory region: '{name}'"))
}

/// Region, offset and bytes.
fn place(parameters: &Parameters) -> Result<(&str, u64, usize), Refusal> {
    let missing = || Refusal::Invalid("a tensor in shared memory needs a region and a byte size".into());
    let number = |name: &str| match parameters.get(name) {
        Some(Parameter::Int(value)) => u64::try_from(*value).ok(),
        Some(Parameter::Uint(value)) => Some(*value),
        _ => None,
    };
    let Some(Parameter::String(region)) = parameters.get(shm::REGION) else { return Err(missing()) };
    let bytes = number(shm::SIZE).and_then(|bytes| usize::try_from(bytes).ok()).ok_or_else(missing)?;
    Ok((region, number(shm::OFFSET).unwrap_or_default(), bytes))
}
