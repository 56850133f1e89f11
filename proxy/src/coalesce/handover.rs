//! How the tensors of an execution reach the model server: in shared memory, or as the pieces that they came in.
//!
//! A server that offers Triton's system shared memory extension is told the arena once, as one region. From then on large
//! inputs are written once, from where they came in to their rows of the batch, and the server reads them there; outputs
//! whose size is known before are written there by the server, and sliced. Small tensors, strings, servers that are asked
//! over gRPC, and everything while the arena is full, go as bytes: as pieces behind a JSON header, of which nothing is
//! joined.
//!
//! A server that was handed memory may use it until it answers. So such an execution is not given up half-way when its
//! clients leave: it goes on as a task of its own, and its memory is free when the answer is there. If there will be none
//! the memory stays in quarantine until the server has been told the region anew.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use penstock_api::Reason;
use penstock_inference::oip::batch::{self, Joined};
use penstock_inference::oip::shm::{self, Span};
use penstock_inference::oip::{InferRequest, Tensor, TensorMetadata};
use penstock_kernels::arena::{Access, Arena, Frozen, Kind, Lease, Sealed};
use tokio::time::Instant;

use super::call::{self, Answered, Outgoing, Trouble, Way};
use super::learn::Known;
use crate::failure::Failure;
use crate::worker::Worker;

/// Below, the way through shared memory costs more than it saves, bytes.
const WORTH_IT: usize = 16 << 10;
/// The unit of the arena: small enough that little is lost, large enough that there are few.
const SLOT: usize = 4096;
/// After a server refused the region it is asked again.
const REFUSED_FOR: Duration = Duration::from_secs(60);

/// The arena, and who has been told of it.
#[derive(Debug, Default)]
pub struct Memory {
    arena: OnceLock<Option<Arena>>,
    told: Mutex<HashMap<SocketAddr, Standing>>,
}

/// How a server stands to the region.
#[derive(Clone, Copy, Debug)]
enum Standing {
    /// It is being told.
    Asked,
    /// It knows it.
    Knows,
    /// It does not want it.
    Refused(Instant),
}

impl Memory {
    /// The arena, made when it is first needed, for tensors that are to be put there before they go to a server that reads it.
    pub fn arena(&self, worker: &Worker) -> Option<&Arena> {
        let make = || {
            let bytes = worker.shared.limits.arena_bytes;
            if bytes == 0 {
                return None;
            }
            let node = worker.shared.node.replace('/', "-");
            let kind = Kind::Shared { node: &node, name: "tensors", access: Access::Group(None) };
            Arena::new(kind, bytes, SLOT)
                .inspect_err(|error| tracing::warn!(%error, "tensors go to the model server as bytes"))
                .ok()
        };
        self.arena.get_or_init(make).as_ref()
    }

    /// How full the arena is, if there is one.
    pub fn occupancy(&self) -> Option<penstock_kernels::arena::Occupancy> {
        self.arena.get()?.as_ref().map(Arena::occupancy)
    }

    fn told(&self) -> MutexGuard<'_, HashMap<SocketAddr, Standing>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether that server knows the region. One that has not been told is told now, as a task of its own: nobody waits for
    /// that, and nobody's leaving stops it.
    fn is_known(&self, worker: &Rc<Worker>, way: &Way, server: SocketAddr) -> bool {
        let mut told = self.told();
        match told.get(&server) {
            Some(Standing::Knows) => return true,
            Some(Standing::Asked) => return false,
            Some(Standing::Refused(at)) if at.elapsed() < REFUSED_FOR => return false,
            Some(Standing::Refused(_)) | None => drop(told.insert(server, Standing::Asked)),
        }
        let (worker, way) = (Rc::clone(worker), way.clone());
        tokio::task::spawn_local(async move {
            worker.shared.sharing.memory.tell(&worker, &way, server).await;
        });
        false
    }

    async fn tell(&self, worker: &Rc<Worker>, way: &Way, server: SocketAddr) {
        let Some(arena) = self.arena(worker) else { return };
        let standing = match register(worker, way, arena).await {
            Ok(Registered::Anew) => {
                // Whoever had the memory before has forgotten it with the region.
                arena.amnesty_of(number(server));
                Standing::Knows
            }
            Ok(Registered::Still) => Standing::Knows,
            Err(why) => {
                tracing::info!(%server, why, "the model server takes no shared memory; tensors go as bytes");
                Standing::Refused(Instant::now())
            }
        };
        self.told().insert(server, standing);
    }

    /// The server may have been replaced by another.
    fn forget(&self, server: SocketAddr) {
        self.told().remove(&server);
    }
}

/// What the arena knows a server by.
fn number(server: SocketAddr) -> u64 {
    let ip = match server.ip() {
        IpAddr::V4(ip) => ip.to_bits().into(),
        IpAddr::V6(ip) => ip.to_bits() as u64,
    };
    (ip << 16) | u64::from(server.port())
}

/// The name of the region, which no other sidecar of the same server has.
fn region(arena: &Arena) -> String {
    arena.key().unwrap_or_default().trim_start_matches('/').to_owned()
}

/// How a server has come to know the region.
enum Registered {
    /// It has just been told.
    Anew,
    /// It knew it, and was using it, so that it would not forget it.
    Still,
}

async fn register(worker: &Rc<Worker>, way: &Way, arena: &Arena) -> Result<Registered, String> {
    let key = arena.key().ok_or("the arena is in no shared memory")?;
    let (path, body) = shm::register(&region(arena), key, arena.bytes() as u64);
    let post = |path: String, body: Bytes| {
        let outgoing =
            Outgoing { method: Method::POST, path, headers: HeaderMap::new(), parts: [body].into() };
        call::whole(worker, way, outgoing)
    };
    // A connection that broke looks like a server that was started anew, and need not be one.
    let forgotten = post(shm::unregister(&region(arena)), Bytes::from_static(b"{}")).await;
    if forgotten.is_ok_and(|answer| answer.status >= 500) {
        return Ok(Registered::Still);
    }
    let answer = post(path, body).await.map_err(|failure| failure.to_string())?;
    match answer.status {
        200 => Ok(Registered::Anew),
        status => Err(format!("{status}: {}", String::from_utf8_lossy(&answer.body))),
    }
}

/// Asks a model, of that name and version, for all of these together. `there`: where the inputs of the only one lie in the
/// arena already.
pub async fn infer<'a>(
    worker: &Rc<Worker>,
    way: &Way,
    model: (&str, &str),
    requests: impl IntoIterator<Item = &'a InferRequest>,
    headers: &HeaderMap,
    known: &Known,
    there: Option<&Frozen>,
) -> Result<Answered, Trouble> {
    let joined = batch::join(requests).ok_or_else(|| {
        let story = "requests were to share an execution that differ in more than their rows";
        Failure::new(Reason::Internal, story)
    })?;
    match place(worker, way, model, &joined, headers, known, there) {
        Some(placed) => by_memory(worker, way, model, joined, placed, headers, known).await,
        None => call::infer(worker, way, model, joined, headers, known.binary).await,
    }
}

/// A batch whose inputs are in their place.
struct Placed {
    outgoing: Outgoing,
    inputs: Lease,
    outputs: Option<Outputs>,
    server: SocketAddr,
}

/// Where a server is to write.
struct Outputs {
    lease: Lease,
    names: Vec<String>,
    rows: u32,
}

/// Writes the inputs into the arena, and makes room for the outputs. `None`: they go as bytes.
fn place(
    worker: &Rc<Worker>,
    way: &Way,
    model: (&str, &str),
    joined: &Joined,
    headers: &HeaderMap,
    known: &Known,
    there: Option<&Frozen>,
) -> Option<Placed> {
    let bytes: usize = joined.data.iter().flatten().map(Bytes::len).sum();
    if way.http2 || !known.shared_memory || bytes < WORTH_IT {
        return None;
    }
    let rows = u32::try_from(*joined.head.inputs.first()?.shape.first()?).ok()?;
    // Rows of strings differ in length.
    let row = |input: &Tensor| {
        let size = input.datatype.size()?;
        (input.shape.first() == Some(&u64::from(rows))).then_some(())?;
        input.shape[1..].iter().try_fold(size, |bytes, dimension| bytes.checked_mul(*dimension as usize))
    };
    let per_row: Vec<usize> = joined.head.inputs.iter().map(row).collect::<Option<_>>()?;
    let memory = &worker.shared.sharing.memory;
    let arena = memory.arena(worker)?;
    let server = way.endpoint().ok()?.address;
    if !memory.is_known(worker, way, server) {
        return None;
    }
    let inputs = match there {
        Some(there) => there.hand_over_to(number(server)),
        None => write(arena, joined, &per_row, rows)?.hand_over_to(number(server)),
    };
    let outputs = outputs(arena, &joined.head, rows, known, server);
    let outgoing = (|| {
        let places = (0..per_row.len()).map(|at| span(&inputs, at, rows)).collect::<Option<Vec<_>>>()?;
        let wanted = outputs.as_ref().map_or(Some(Vec::new()), Outputs::places)?;
        let mut head = joined.head.clone();
        if outputs.is_none() {
            call::binary_outputs(&mut head);
        }
        let head = shm::request_over_shm(head, &region(arena), places, wanted);
        call::placed(model, &head, headers).ok()
    })();
    let Some(outgoing) = outgoing else {
        // Nobody has been told of it.
        drop(inputs.returned());
        drop(outputs.map(|outputs| outputs.lease.returned()));
        return None;
    };
    Some(Placed { outgoing, inputs, outputs, server })
}

/// Writes the inputs, from the pieces that they came in.
fn write(arena: &Arena, joined: &Joined, per_row: &[usize], rows: u32) -> Option<Sealed> {
    let run = arena.run(per_row, rows)?;
    let mut place = run.rows(0, rows)?;
    for (input, pieces) in joined.data.iter().enumerate() {
        let pieces: Vec<&[u8]> = pieces.iter().map(Bytes::as_ref).collect();
        place.write_all(input, pieces).ok()?;
    }
    drop(place);
    run.seal()
}

fn span(lease: &Lease, at: usize, rows: u32) -> Option<Span> {
    let region = lease.region(at, 0..rows)?;
    Some(Span { offset: region.offset, bytes: region.bytes })
}

impl Outputs {
    fn places(&self) -> Option<Vec<(&str, Span)>> {
        let places = self.names.iter().enumerate();
        places.map(|(at, name)| Some((name.as_str(), span(&self.lease, at, self.rows)?))).collect()
    }
}

/// Room for the outputs, if it is known how large they will be, and worth it.
fn outputs(
    arena: &Arena,
    head: &InferRequest,
    rows: u32,
    known: &Known,
    server: SocketAddr,
) -> Option<Outputs> {
    let of = |name: &str| known.metadata.outputs.iter().find(|output| output.name == name);
    let wanted: Vec<&TensorMetadata> = match head.outputs.is_empty() {
        true => known.metadata.outputs.iter().collect(),
        false => head.outputs.iter().map(|wanted| of(&wanted.name)).collect::<Option<_>>()?,
    };
    let row = |output: &&TensorMetadata| {
        let (first, rest) = output.shape.split_first()?;
        (*first == -1).then_some(())?;
        rest.iter().try_fold(output.datatype.size()?, |bytes, dimension| {
            bytes.checked_mul(usize::try_from(*dimension).ok()?)
        })
    };
    let per_row: Vec<usize> = wanted.iter().map(row).collect::<Option<_>>()?;
    if per_row.iter().sum::<usize>().checked_mul(rows as usize)? < WORTH_IT {
        return None;
    }
    let lease = arena.run(&per_row, rows)?.seal()?.hand_over_to(number(server));
    let names = wanted.iter().map(|output| output.name.clone()).collect();
    Some(Outputs { lease, names, rows })
}

async fn by_memory(
    worker: &Rc<Worker>,
    way: &Way,
    model: (&str, &str),
    joined: Joined,
    placed: Placed,
    headers: &HeaderMap,
    known: &Known,
) -> Result<Answered, Trouble> {
    let Placed { outgoing, inputs, outputs, server } = placed;
    worker.shared.sharing.tally.placed.add(1);
    // On its own, so that memory that the server may still use is not forgotten when nobody waits any more.
    let call = {
        let (worker, way) = (Rc::clone(worker), way.clone());
        tokio::task::spawn_local(async move {
            let answer = call::whole(&worker, &way, outgoing).await;
            // A server that has said anything is done with it; of one that has not, nobody knows.
            let done = answer.as_ref().map_or_else(|failure| failure.unprocessed, |_| true);
            let outputs = done.then(|| {
                drop(inputs.returned());
                outputs.map(|Outputs { lease, names, rows }| (lease.returned(), names, rows))
            });
            answer.map(|answer| (answer, outputs.flatten()))
        })
    };
    let lost = |_| Failure::new(Reason::Internal, "an execution was lost");
    let memory = &worker.shared.sharing.memory;
    let (answer, outputs) = call.await.map_err(lost)?.inspect_err(|_| memory.forget(server))?;
    let place = |name: &str| {
        let (frozen, names, rows) = outputs.as_ref()?;
        frozen.bytes(names.iter().position(|known| known == name)?, 0..*rows)
    };
    match call::read_rest(way, &answer, place) {
        Err(Trouble::Model(error)) if error.message.contains("shared memory") => {
            // It was started anew and knows the region no more: it is told again, and until then there are bytes.
            memory.forget(server);
            call::infer(worker, way, model, joined, headers, known.binary).await
        }
        response => Ok(Answered { response: response?, headers: answer.headers }),
    }
}
