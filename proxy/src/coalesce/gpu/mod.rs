//! Tensors in memory of a GPU that the model server sees too, by CUDA IPC (Triton's "CUDA shared memory extension").
//!
//! In: an execution, as [`handover`] gets it. Out: the same answer. Whoever runs a pod asks for it
//! (`penstock.io/gpu: ipc`), because both containers must see the same device and each other; then the device is opened
//! and tested once, as a task of its own, and a server is told of a region of its memory. The first execution of each model
//! goes both ways, and only if the answers are the same is the GPU's way used for that model: that is the one test that
//! shows that the server reads what was written. Afterwards [`cost`] decides; so it does where JPEGs are decoded, if the pod asks
//! for nvJPEG.
//!
//! Can go wrong: no driver, no device, no memory, a server that wants no such region, a device that is lost or does not
//! answer. Each is told in one line of the log, and the execution goes through shared memory of the host, or as bytes: no
//! request is lost for it, and none waits longer than `PATIENCE` for the device, nor for files to be unpacked. Outputs take
//! the host's way always: a client wants them there.
//!
//! ```text
//! infer ─▶ decide ─┬─ Device ─▶ fill (a thread: copies, kernels, wait) ─▶ by_memory ─▶ answer
//!                  │               └─ any failure ─┐
//!                  └─ Host ──────────────────────▶ without ─▶ answer
//! ```

pub mod cost;
mod device;
mod execute;
mod jpegs;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use penstock_inference::oip::InferResponse;
use penstock_inference::oip::shm;
use penstock_kernels::arena::{Arena, DeviceArena, Occupancy};
use penstock_kernels::cuda::{Context, Error, JpegError, JpegKind, Kind as Fault, Order};
use rand::Rng as _;
use tokio::time::Instant;

use super::call::{self, Answered, Outgoing, Trouble, Way};
use super::handover;
use super::told::{self, Next, Said, Told};
use super::wire::Asked;
use crate::config;
use crate::prepare::{Prepare, pictures};
use crate::telemetry::counter::Counter;
use crate::telemetry::metric;
use crate::worker::Worker;

use cost::Cost;
use device::{Device, Unfit};
use execute::Execution;
pub use execute::infer;

/// Memory of the device for tensors unless the annotation says: the same as of the host.
const BYTES: usize = 128 << 20;
/// After a failure that may pass, tensors take the other way for so long.
const REST: Duration = Duration::from_secs(10);
/// A test of a model that nobody finished, because its clients left, is begun anew after so long.
const TESTED_WITHIN: Duration = Duration::from_secs(30);
/// Models whose costs are known; above, further ones do without.
const MAX_MODELS: usize = 256;
/// When a rest never ends.
const FOR_EVER: u64 = u64::MAX;

/// The GPU, and what is known of its use.
#[derive(Debug)]
pub struct Gpu {
    library: PathBuf,
    /// nvJPEG; `None`: the one that the machine has.
    nvjpeg: Option<PathBuf>,
    state: Mutex<State>,
    /// By caller, where callers have regions of their own.
    regions: Mutex<HashMap<Option<u64>, Option<Arc<Region>>>>,
    models: Mutex<HashMap<(SocketAddr, String), Model>>,
    /// Somebody looks for nvJPEG, or has.
    looking: AtomicBool,
    /// Milliseconds since the epoch until when it rests.
    rests_until: AtomicU64,
    /// The same of nvJPEG; [`FOR_EVER`]: it does not work here.
    jpegs_rest_until: AtomicU64,
    handed: Counter,
    prepared: Counter,
    decoded: Counter,
    refused: Counter,
    failed: Counter,
}

#[derive(Debug, Default)]
enum State {
    /// Nobody has asked for it.
    #[default]
    Idle,
    /// It is being opened and tested.
    Opening,
    /// It is ready.
    Ready(Arc<Device>),
    /// It is of no use to this process, for ever.
    Off,
}

/// Memory that servers map.
#[derive(Debug)]
struct Region {
    name: String,
    arena: DeviceArena,
    handle: [u8; 64],
    device: u32,
    told: Told,
}

/// What is known of a model on a server.
#[derive(Debug, Default)]
struct Model {
    test: Test,
    cost: Cost,
    /// The same for where its inputs are prepared.
    preparing: Cost,
    /// The same for where JPEGs are decoded that are prepared on the GPU.
    decoding: Cost,
}

/// Whether a model answers the same.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
enum Test {
    #[default]
    Open,
    /// Since then.
    Running(Duration),
    Passed,
    /// Until it, or its server, is another.
    Failed,
}

/// How an execution goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// The host's way, and nobody asks how long it took.
    Plain,
    /// The host's way, to compare.
    Host,
    /// The GPU's way.
    Device,
    /// Both ways, to see that the answers are the same.
    Both,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// With a driver's library, and nvJPEG's, unless it is where it usually is; nothing is opened yet.
    pub fn new(library: PathBuf, nvjpeg: Option<PathBuf>) -> Self {
        Self {
            library,
            nvjpeg,
            state: Mutex::default(),
            regions: Mutex::default(),
            models: Mutex::default(),
            looking: AtomicBool::new(false),
            rests_until: AtomicU64::new(0),
            jpegs_rest_until: AtomicU64::new(0),
            handed: Counter::default(),
            prepared: Counter::default(),
            decoded: Counter::default(),
            refused: Counter::default(),
            failed: Counter::default(),
        }
    }

    /// Opens the device, and nvJPEG, when it is first asked for.
    pub fn follow(self: &Arc<Self>, asked: Option<config::Gpu>) {
        let Some(asked) = asked else { return };
        {
            let mut state = lock(&self.state);
            match &*state {
                State::Idle => *state = State::Opening,
                State::Ready(device) if asked.nvjpeg && self.is_first_to_look() => {
                    let (gpu, device) = (Arc::clone(self), Arc::clone(device));
                    tokio::task::spawn_blocking(move || device.open_jpegs(gpu.nvjpeg.as_deref()));
                    return;
                }
                State::Opening | State::Ready(_) | State::Off => return,
            }
        }
        let gpu = Arc::clone(self);
        // A driver that hangs when it is opened keeps this one thread, and tensors go as if there were none.
        tokio::task::spawn_blocking(move || {
            let opened = Device::open(&gpu.library, asked.device);
            let ready = opened.as_ref().is_ok();
            *lock(&gpu.state) = match opened {
                Ok(device) => {
                    let (of, kernels) = (device.context.device(), device.kernels.is_some());
                    tracing::info!(device = %of.name, number = of.number, kernels, "tensors may be handed over in the GPU's memory");
                    State::Ready(Arc::new(device))
                }
                Err(Unfit::Absent(absent)) => {
                    tracing::info!("{absent}");
                    State::Off
                }
                Err(error) => {
                    tracing::warn!(%error, "no GPU is used; tensors go through shared memory, or as bytes");
                    State::Off
                }
            };
            // What has no need of it does not wait for it.
            if ready
                && asked.nvjpeg
                && let Some(device) = gpu.device()
                && gpu.is_first_to_look()
            {
                device.open_jpegs(gpu.nvjpeg.as_deref());
            }
        });
    }

    /// Whether nobody has looked for nvJPEG yet. A library that hangs when it is opened, or in its test, keeps the one thread
    /// that does, and is not there for anybody else.
    fn is_first_to_look(&self) -> bool {
        !self.looking.swap(true, Relaxed)
    }

    fn device(&self) -> Option<Arc<Device>> {
        match &*lock(&self.state) {
            State::Ready(device) => Some(Arc::clone(device)),
            State::Idle | State::Opening | State::Off => None,
        }
    }

    /// The device, for arenas of the host that it reads by itself.
    pub fn context(&self) -> Option<Context> {
        self.device().map(|device| device.context.clone())
    }

    /// It is of no use any more.
    fn off(&self, why: &str) {
        let before = std::mem::replace(&mut *lock(&self.state), State::Off);
        if matches!(before, State::Ready(_)) {
            tracing::warn!(
                why,
                "the GPU is not used any more; tensors go through shared memory, or as bytes"
            );
        }
        // Its regions stay: servers have mapped them, and no driver says what becomes of a mapping whose memory is freed.
    }

    /// A failure while something was handed over.
    fn fails(&self, unfit: &Unfit, now: Duration) {
        self.failed.add(1);
        let lost = |error: &Error| error.kind() == Fault::DeviceLost;
        match unfit {
            Unfit::Driver(error)
            | Unfit::Order(Order::Driver(error))
            | Unfit::Jpeg(JpegError::Driver(error))
                if lost(error) =>
            {
                return self.off(&unfit.to_string());
            }
            Unfit::Full | Unfit::Left => return,
            Unfit::Late => return self.jpegs_rest(unfit, Some(now + REST), now),
            Unfit::Pixels => return self.jpegs_rest(unfit, None, now),
            Unfit::Jpeg(error) if error.kind() != JpegKind::Driver => return self.jpeg_fails(error, now),
            _ => {}
        }
        let until = (now + REST).as_millis() as u64;
        if self.rests_until.swap(until, Relaxed) < now.as_millis() as u64 {
            tracing::warn!(error = %unfit, "tensors do not go through the GPU's memory for {REST:?}");
        }
    }

    /// nvJPEG did not decode something, and it is not the file's fault: what is doubtful it said of the picture that is built
    /// in as well.
    fn jpeg_fails(&self, error: &JpegError, now: Duration) {
        let until = match error.kind() {
            JpegKind::File | JpegKind::Busy => return,
            JpegKind::Passing | JpegKind::Driver => Some(now + REST),
            // NVJPEG_STATUS_EXECUTION_FAILED: a device that is short of something has more of it later.
            JpegKind::Doubtful if matches!(error, JpegError::Said { status: 6, .. }) => Some(now + REST),
            JpegKind::Doubtful | JpegKind::Broken => None,
        };
        self.jpegs_rest(error, until, now);
    }

    /// Files of a batch were not unpacked in time, by the thread that nvJPEG had for it.
    fn jpegs_are_late(&self, now: Duration) {
        let why = format!("the JPEGs of a batch were not unpacked within {:?}", execute::PATIENCE);
        self.jpegs_rest(&why, Some(now + REST), now);
    }

    /// JPEGs go another way until then; `None`: for ever. The GPU is well.
    fn jpegs_rest(&self, why: &dyn std::fmt::Display, until: Option<Duration>, now: Duration) {
        let until = until.map_or(FOR_EVER, |until| until.as_millis() as u64);
        let before = self.jpegs_rest_until.fetch_max(until, Relaxed);
        if before < now.as_millis() as u64 || (until == FOR_EVER && before != FOR_EVER) {
            let how_long = if until == FOR_EVER { "from now on".to_owned() } else { format!("for {REST:?}") };
            tracing::warn!(error = %why, "JPEGs are decoded on the CPU {how_long}");
        }
    }

    /// Whether nvJPEG may be asked now.
    fn decodes(&self, device: &Device, now: Duration) -> bool {
        device.has_jpegs() && self.jpegs_rest_until.load(Relaxed) <= now.as_millis() as u64
    }

    /// The region for a caller, made when it is first needed.
    fn region(&self, worker: &Worker, asked: &config::Gpu, tenant: Option<u64>) -> Option<Arc<Region>> {
        let most = worker.workload().map_or(0, |workload| workload.tenant_regions);
        let mut regions = lock(&self.regions);
        if let Some(known) = regions.get(&tenant) {
            return known.clone();
        }
        let device = self.device()?;
        if tenant.is_some() && regions.len() >= most {
            return None;
        }
        let bytes = asked.bytes.unwrap_or(BYTES) / if tenant.is_some() { most } else { 1 };
        let node: String =
            worker.shared.node.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let name = format!("penstock-{node}-{}-gpu-{}", std::process::id(), regions.len());
        let made = device.region(bytes).map(|(arena, handle)| {
            let device = asked.device;
            Arc::new(Region { name, arena, handle: handle.0, device, told: Told::default() })
        });
        let made = made
            .inspect_err(|error| {
                tracing::warn!(%error, "tensors go through shared memory, or as bytes");
            })
            .ok();
        regions.insert(tenant, made.clone());
        made
    }

    /// Whether that server knows the region; one that does not is told as a task of its own.
    fn is_known(
        self: &Arc<Self>,
        worker: &Rc<Worker>,
        way: &Way,
        server: SocketAddr,
        region: &Arc<Region>,
    ) -> bool {
        match region.told.next(server, Instant::now()) {
            Next::Use => return true,
            Next::Wait => return false,
            Next::Tell => {}
        }
        let (worker, way, region) = (Rc::clone(worker), way.clone(), Arc::clone(region));
        tokio::task::spawn_local(async move {
            let bytes = region.arena.memory().bytes() as u64;
            let call = shm::register_cuda(&region.name, &region.handle, region.device, bytes);
            leave(&worker, &way, &region.name).await;
            let said = told::register(&worker, &way, shm::unregister_cuda(&region.name), call).await;
            said.log(server, "memory of the GPU", "through shared memory, or as bytes");
            if matches!(said, Said::Anew) {
                region.arena.amnesty_of(told::number(server));
                tracing::info!(%server, region = region.name, "the model server reads memory of the GPU");
            }
            region.told.is_told(server, &said, Instant::now());
        });
        false
    }

    /// The server may have been replaced by another, which is told and tested anew.
    fn forget(&self, server: SocketAddr) {
        let regions: Vec<_> = lock(&self.regions).values().flatten().cloned().collect();
        if regions.iter().fold(false, |known, region| region.told.forget(server) | known) {
            lock(&self.models).iter_mut().filter(|((of, _), _)| *of == server).for_each(|(_, model)| {
                model.test = Test::Open;
            });
        }
    }

    /// Something with what is known of a model; `None`: there are too many.
    fn model<T>(&self, server: SocketAddr, name: &str, with: impl FnOnce(&mut Model) -> T) -> Option<T> {
        let mut models = lock(&self.models);
        let full = models.len() >= MAX_MODELS;
        let key = (server, name.to_owned());
        match models.get_mut(&key) {
            Some(model) => Some(with(model)),
            None if full => None,
            None => Some(with(models.entry(key).or_default())),
        }
    }

    /// How an execution goes.
    fn decide(&self, run: &Execution<'_>, always: bool, now: Duration, chance: f64) -> Turn {
        let turn = self.model(run.server, run.model.0, |model| match model.test {
            Test::Running(since) if now.saturating_sub(since) < TESTED_WITHIN => Turn::Plain,
            // One of a sequence is executed once, or the sequence is another.
            Test::Open | Test::Running(_) if !run.is_repeatable => Turn::Plain,
            Test::Open | Test::Running(_) => {
                model.test = Test::Running(now);
                Turn::Both
            }
            Test::Failed => Turn::Plain,
            Test::Passed if always => Turn::Device,
            Test::Passed => match model.cost.choose(run.bytes, now, chance) {
                cost::Way::Host => Turn::Host,
                cost::Way::Device => Turn::Device,
            },
        });
        turn.unwrap_or(Turn::Plain)
    }

    /// Both ways were gone.
    fn tested(
        &self,
        run: &Execution<'_>,
        device: &Result<Answered, Trouble>,
        host: &Result<Answered, Trouble>,
    ) {
        let test = match (device, host) {
            (Ok(device), Ok(host)) if same(&device.response, &host.response) => Test::Passed,
            (Ok(_), Ok(_)) => Test::Failed,
            // What the model refuses says nothing of the way, and neither does a server that is not there.
            _ => Test::Open,
        };
        if test == Test::Failed {
            let (model, server) = (run.model.0, run.server);
            tracing::warn!(model, %server, "its answer is another when its tensors lie in the GPU's memory, so they do not");
        }
        self.model(run.server, run.model.0, |model| model.test = test);
    }

    /// Tells the metrics, and lets go of what the device is done with and nobody waited for.
    pub fn tell(&self) {
        let regions: Vec<Occupancy> =
            lock(&self.regions).values().flatten().map(|region| region.arena.occupancy()).collect();
        if !regions.is_empty() || self.handed.get() > 0 {
            let sum = |of: fn(&Occupancy) -> usize| regions.iter().map(of).sum::<usize>() as f64;
            let gauge = |state: &'static str, bytes: f64| {
                metrics::gauge!(metric::GPU_ARENA_BYTES.name, "state" => state).set(bytes);
            };
            gauge("used", sum(|occupancy| occupancy.in_use - occupancy.quarantined));
            gauge("quarantined", sum(|occupancy| occupancy.quarantined));
        }
        if let Some((states, pixels)) = self.device().and_then(|device| device.jpegs_room()) {
            metrics::gauge!(metric::NVJPEG_STATES.name).set(states as f64);
            metrics::gauge!(metric::NVJPEG_PIXELS.name).set(pixels as f64);
        }
        if let Some(context) = self.context()
            && regions.iter().any(|occupancy| occupancy.in_use > 0)
        {
            tokio::task::spawn_blocking(move || context.reap());
        }
        for (metric, counter) in [
            (&metric::EXECUTIONS_GPU, &self.handed),
            (&metric::PREPARED_GPU, &self.prepared),
            (&metric::DECODED_GPU, &self.decoded),
            (&metric::REFUSED_GPU, &self.refused),
            (&metric::GPU_FAILURES, &self.failed),
        ] {
            metrics::counter!(metric.name).absolute(counter.get());
        }
    }
}

/// Has the server let go of what processes before this one had it map, which would keep memory of the device.
async fn leave(worker: &Rc<Worker>, way: &Way, ours: &str) {
    let ask = |method: Method, path: String, body: &'static str| {
        let parts =
            if body.is_empty() { Default::default() } else { [Bytes::from_static(body.as_bytes())].into() };
        call::whole(worker, way, Outgoing { method, path, headers: HeaderMap::new(), parts })
    };
    let Ok(listed) = ask(Method::GET, shm::status_cuda().to_owned(), "").await else { return };
    let listed: Vec<shm::RegisteredCuda> = serde_json::from_slice(&listed.body).unwrap_or_default();
    // `penstock-<node>-<pid>-gpu-<number>`: the same node, and another process.
    let of_node = |name: &str| name.rsplitn(4, '-').nth(3).map(str::to_owned);
    let of_process = |name: &str| name.rsplitn(3, '-').nth(2).map(str::to_owned);
    for shm::RegisteredCuda { name } in listed {
        if of_node(&name) == of_node(ours) && of_process(&name) != of_process(ours) {
            let _ = ask(Method::POST, shm::unregister_cuda(&name), "{}").await;
        }
    }
}

/// Whether two answers are the same, bit for bit.
fn same(one: &InferResponse, other: &InferResponse) -> bool {
    let find = |name: &str| other.outputs.iter().find(|output| output.name == name);
    one.outputs.len() == other.outputs.len()
        && one.outputs.iter().all(|output| {
            find(&output.name).is_some_and(|other| {
                (output.datatype, &output.shape, &output.data) == (other.datatype, &other.shape, &other.data)
            })
        })
}

/// Where the images of a request become tensors, and when that began.
#[derive(Debug, PartialEq)]
pub struct Preparing {
    on_the_gpu: bool,
    /// Bytes of the JPEGs, if it may be asked where they are decoded, and where they are.
    jpegs: Option<(usize, cost::Way)>,
    /// Whose costs are compared; `None`: nobody's.
    measured: Option<(SocketAddr, String, usize, Duration)>,
}

impl Preparing {
    /// By a kernel.
    pub fn is_on_the_gpu(&self) -> bool {
        self.on_the_gpu
    }

    /// JPEGs stay as they are, for nvJPEG.
    pub fn leaves_jpegs(&self) -> bool {
        matches!(self.jpegs, Some((_, cost::Way::Device)))
    }

    /// Whether any did: of those that nvJPEG does not take nothing is learnt.
    pub fn left(&mut self, any: bool) {
        if self.leaves_jpegs() && !any {
            self.jpegs = None;
        }
    }
}

impl Gpu {
    /// Pinned memory for decoded pictures.
    pub fn staging(&self) -> Option<Arena> {
        self.device()?.staging.clone()
    }

    /// Whether a request's images are to become tensors on the GPU; `None`: it is not asked.
    pub fn prepares(
        &self,
        worker: &Worker,
        way: &Way,
        asked: &Asked,
        pipelines: &[Arc<Prepare>],
        gpu_memory: bool,
    ) -> Option<Preparing> {
        let rule = worker.workload()?.gpu?;
        let device = self.device().filter(|device| gpu_memory && device.kernels.is_some())?;
        let now = worker.now();
        if way.http2 || (now.as_millis() as u64) < self.rests_until.load(Relaxed) {
            return None;
        }
        // Without room for pixels the memory that waits would grow with the line.
        let room = device.staging.as_ref()?.occupancy();
        let rows = asked.request.inputs.first()?.shape.first().copied()? as usize;
        let bytes = pictures::are_pictures(pipelines)?.checked_mul(rows)?;
        if room.in_use > room.bytes / 4 * 3 || bytes < handover::WORTH_IT {
            return None;
        }
        let server = way.endpoint().ok()?.address;
        let chance = worker.with_random(|random| random.random::<f64>());
        let turn = self.model(server, &asked.model, |model| match model.test {
            Test::Passed if rule.always => Some(cost::Way::Device),
            Test::Passed => Some(model.preparing.choose(bytes, now, chance)),
            Test::Open | Test::Running(_) | Test::Failed => None,
        })??;
        let measured = (!rule.always).then(|| (server, asked.model.clone(), bytes, now));
        let on_the_gpu = turn == cost::Way::Device;
        let jpegs = (on_the_gpu && rule.nvjpeg && self.decodes(&device, now))
            .then(|| pictures::jpegs(pipelines, &asked.request))
            .filter(|bytes| *bytes > 0);
        let chance = worker.with_random(|random| random.random::<f64>());
        let way = |bytes| match rule.always {
            true => Some(cost::Way::Device),
            false => self.model(server, &asked.model, |model| model.decoding.choose(bytes, now, chance)),
        };
        let jpegs = jpegs.and_then(|bytes| Some((bytes, way(bytes)?)));
        Some(Preparing { on_the_gpu, jpegs, measured })
    }

    /// A request whose images were prepared so was answered.
    pub fn prepared(&self, how: Preparing, now: Duration) {
        let Some((server, name, bytes, begun)) = how.measured else { return };
        let way = if how.on_the_gpu { cost::Way::Device } else { cost::Way::Host };
        self.model(server, &name, |model| {
            let took = now.saturating_sub(begun);
            model.preparing.took(bytes, way, took, now);
            if let Some((bytes, way)) = how.jpegs {
                model.decoding.took(bytes, way, took, now);
            }
        });
    }
}

#[cfg(test)]
mod tests;
