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
use std::collections::hash_map::Entry;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use bytes::Bytes;
use http::HeaderMap;
use penstock_api::Reason;
use penstock_inference::oip::batch::{self, Joined};
use penstock_inference::oip::shm::{self, Span};
use penstock_inference::oip::{InferRequest, Tensor, TensorMetadata};
use penstock_kernels::arena::{Access, Arena, DeviceLease, Frozen, Kind, Lease, Occupancy, Sealed};
use tokio::time::Instant;

use super::call::{self, Answered, Outgoing, Trouble, Way};
use super::learn::Known;
use super::told::{self, Next, Said, Told, number};
use super::{can_be_sent, gpu};
use crate::failure::Failure;
use crate::prepare::pictures::Pictures;
use crate::worker::Worker;

/// Below, the way through shared memory costs more than it saves, bytes.
pub(super) const WORTH_IT: usize = 16 << 10;
/// The unit of the arena: small enough that little is lost, large enough that there are few.
const SLOT: usize = 4096;

/// The regions, and who has been told of them.
#[derive(Debug, Default)]
pub struct Memory {
    common: Arc<Ground>,
    /// Of callers that have one of their own.
    tenants: Mutex<HashMap<u64, Arc<Ground>>>,
}

/// An arena in shared memory, and who has been told of it.
#[derive(Debug, Default)]
pub struct Ground {
    arena: OnceLock<Option<Arena>>,
    /// Which of several it is.
    number: usize,
    told: Told,
}

impl Memory {
    /// The region of a caller, or that of all. `None`: this caller came too late for one of his own, and shares none.
    pub fn ground(&self, worker: &Worker, tenant: Option<u64>) -> Option<Arc<Ground>> {
        let Some(tenant) = tenant else { return Some(Arc::clone(&self.common)) };
        let most = worker.workload().map_or(0, |workload| workload.tenant_regions);
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        let number = tenants.len() + 1;
        match tenants.entry(tenant) {
            Entry::Occupied(known) => Some(Arc::clone(known.get())),
            Entry::Vacant(place) if number <= most => {
                Some(Arc::clone(place.insert(Arc::new(Ground { number, ..Ground::default() }))))
            }
            Entry::Vacant(_) => None,
        }
    }

    /// How full the arenas are, if there are any.
    pub fn occupancy(&self) -> Option<Occupancy> {
        let tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        let all = tenants.values().chain([&self.common]);
        all.filter_map(|ground| Some(ground.arena.get()?.as_ref()?.occupancy())).reduce(Occupancy::and)
    }
}

impl Ground {
    /// The arena, made when it is first needed, for tensors that are to be put there before they go to a server that reads it.
    pub fn arena(&self, worker: &Worker) -> Option<&Arena> {
        let make = || {
            let regions = match self.number {
                0 => 1,
                _ => worker.workload().map_or(1, |workload| workload.tenant_regions.max(1)),
            };
            let bytes = worker.shared.limits.arena_bytes / regions;
            if bytes == 0 {
                return None;
            }
            let node = worker.shared.node.replace('/', "-");
            let name =
                if self.number == 0 { "tensors".to_owned() } else { format!("tensors-{}", self.number) };
            let access = Access::Group(None);
            let shared = Kind::Shared { node: &node, name: &name, access };
            // Pages that a GPU's driver knows are copied by the GPU itself.
            let registered = worker.shared.sharing.gpu.context().and_then(|context| {
                let kind = Kind::Registered { context: &context, node: &node, name: &name, access };
                Arena::new(kind, bytes, SLOT)
                    .inspect_err(|error| tracing::warn!(%error, "shared memory is not pinned"))
                    .ok()
            });
            registered.or_else(|| {
                Arena::new(shared, bytes, SLOT)
                    .inspect_err(|error| tracing::warn!(%error, "tensors go to the model server as bytes"))
                    .ok()
            })
        };
        self.arena.get_or_init(make).as_ref()
    }

    /// Whether that server knows the region. One that has not been told is told now, as a task of its own: nobody waits for
    /// that, and nobody's leaving stops it.
    fn is_known(self: &Arc<Self>, worker: &Rc<Worker>, way: &Way, server: SocketAddr) -> bool {
        match self.told.next(server, Instant::now()) {
            Next::Use => return true,
            Next::Wait => return false,
            Next::Tell => {}
        }
        let (ground, worker, way) = (Arc::clone(self), Rc::clone(worker), way.clone());
        tokio::task::spawn_local(async move {
            let Some(arena) = ground.arena(&worker) else { return };
            let said = match arena.key() {
                Some(key) => {
                    let name = region(arena);
                    let call = shm::register(&name, key, arena.bytes() as u64);
                    told::register(&worker, &way, shm::unregister(&name), call).await
                }
                None => Said::Refused("the arena is in no shared memory".to_owned()),
            };
            said.log(server, "shared memory", "as bytes");
            if matches!(said, Said::Anew) {
                // Whoever had the memory before has forgotten it with the region.
                arena.amnesty_of(number(server));
            }
            ground.told.is_told(server, &said, Instant::now());
        });
        false
    }
}

impl Memory {
    /// The server may have been replaced by another.
    fn forget(&self, server: SocketAddr) {
        let tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        for ground in tenants.values().chain([&self.common]) {
            ground.told.forget(server);
        }
    }
}

/// The name of the region, which no other sidecar of the same server has.
fn region(arena: &Arena) -> String {
    arena.key().unwrap_or_default().trim_start_matches('/').to_owned()
}

/// What is said of an execution besides its requests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hand<'a> {
    /// Where the inputs of the only request lie in the arena already.
    pub there: Option<&'a Frozen>,
    /// Whose they are, where callers have regions of their own.
    pub tenant: Option<u64>,
    /// Of each request, in their order, the inputs that have no data yet.
    pub pictures: &'a [Option<&'a Pictures>],
}

/// Asks a model, of that name and version, for all of these together.
pub async fn infer<'a>(
    worker: &Rc<Worker>,
    way: &Way,
    model: (&str, &str),
    requests: impl IntoIterator<Item = &'a InferRequest>,
    headers: &HeaderMap,
    known: &Known,
    hand: Hand<'_>,
) -> Result<Answered, Trouble> {
    let joined = batch::join(requests).ok_or_else(|| {
        let story = "requests were to share an execution that differ in more than their rows";
        Failure::new(Reason::Internal, story)
    })?;
    gpu::infer(worker, way, model, joined, headers, known, &hand).await
}

/// The same without a GPU: through shared memory of the host, or as bytes.
pub(super) async fn without(
    worker: &Rc<Worker>,
    way: &Way,
    model: (&str, &str),
    joined: Joined,
    headers: &HeaderMap,
    known: &Known,
    hand: &Hand<'_>,
) -> Result<Answered, Trouble> {
    if let Some(placed) = place(worker, way, model, &joined, headers, known, hand)
        && let Some(answered) = by_memory(worker, way, placed).await?
    {
        return Ok(answered);
    }
    let binary = goes_behind(known, &joined.head);
    call::infer(worker, way, model, joined, headers, binary).await
}

/// Whether tensors go behind the JSON: where the server takes them so; and where it has not told yet, if JSON has no form for them.
fn goes_behind(known: &Known, head: &InferRequest) -> bool {
    known.binary || (*known == Known::default() && !can_be_sent(head, false))
}

/// A batch whose inputs are in their place.
pub(super) struct Placed {
    /// The request.
    pub(super) outgoing: Outgoing,
    /// Where its inputs are.
    pub(super) inputs: Inputs,
    /// Where its outputs are to go.
    pub(super) outputs: Option<Outputs>,
    /// Whom it goes to.
    pub(super) server: SocketAddr,
}

/// Where the tensors of an execution lie, of which nobody has been told.
pub(super) struct Places<'a> {
    /// The region of the inputs.
    pub(super) region: &'a str,
    /// The inputs.
    pub(super) inputs: Inputs,
    /// Their rows.
    pub(super) rows: u32,
    /// Where the outputs are to go.
    pub(super) outputs: Option<Outputs>,
    /// Who will read and write there.
    pub(super) server: SocketAddr,
}

impl Places<'_> {
    /// The request that names them. `None`: it cannot be written, and they are given back.
    pub(super) fn ask(self, model: (&str, &str), head: &InferRequest, headers: &HeaderMap) -> Option<Placed> {
        let Self { region, inputs, rows, outputs, server } = self;
        let write = || {
            let spans = (0..head.inputs.len()).map(|at| inputs.span(at, rows)).collect::<Option<Vec<_>>>()?;
            let mut head = head.clone();
            if outputs.is_none() {
                call::binary_outputs(&mut head);
            }
            let head = shm::request_over_shm(head, region, spans, []);
            let head = match &outputs {
                Some(outputs) => shm::request_over_shm(head, &outputs.region, [], outputs.places()?),
                None => head,
            };
            call::placed(model, &head, headers).ok()
        };
        match write() {
            Some(outgoing) => Some(Placed { outgoing, inputs, outputs, server }),
            None => {
                inputs.give_back();
                outputs.into_iter().for_each(Outputs::give_back);
                None
            }
        }
    }
}

/// Where inputs are while the server has them.
#[derive(Debug)]
pub(super) enum Inputs {
    /// In shared memory.
    Host(Lease),
    /// In memory of a GPU.
    Device(DeviceLease),
}

impl Inputs {
    fn span(&self, at: usize, rows: u32) -> Option<Span> {
        let region = match self {
            Self::Host(lease) => lease.region(at, 0..rows),
            Self::Device(lease) => lease.region(at, 0..rows),
        }?;
        Some(Span { offset: region.offset, bytes: region.bytes })
    }

    /// The server is done with them.
    fn give_back(self) {
        match self {
            Self::Host(lease) => drop(lease.returned()),
            Self::Device(lease) => drop(lease.returned()),
        }
    }
}

/// Where a server is to write.
pub(super) struct Outputs {
    lease: Lease,
    names: Vec<String>,
    rows: u32,
    region: String,
}

/// Rows of an execution, and bytes of a row of each input; `None`: rows of strings, which differ in length.
pub(super) fn rows(head: &InferRequest) -> Option<(u32, Vec<usize>)> {
    let rows = u32::try_from(*head.inputs.first()?.shape.first()?).ok()?;
    let alike = head.inputs.iter().all(|input| input.shape.first() == Some(&u64::from(rows)));
    alike.then_some(())?;
    Some((rows, head.inputs.iter().map(row).collect::<Option<_>>()?))
}

/// Bytes of a row of an input.
pub(super) fn row(input: &Tensor) -> Option<usize> {
    let (_, dimensions) = input.shape.split_first()?;
    dimensions
        .iter()
        .try_fold(input.datatype.size()?, |bytes, dimension| bytes.checked_mul(*dimension as usize))
}

/// Writes the inputs into the arena, and makes room for the outputs. `None`: they go as bytes.
fn place(
    worker: &Rc<Worker>,
    way: &Way,
    model: (&str, &str),
    joined: &Joined,
    headers: &HeaderMap,
    known: &Known,
    hand: &Hand<'_>,
) -> Option<Placed> {
    let bytes: usize = joined.data.iter().flatten().map(Bytes::len).sum();
    if way.http2 || !known.shared_memory || bytes < WORTH_IT {
        return None;
    }
    let (rows, per_row) = rows(&joined.head)?;
    let ground = worker.shared.sharing.memory.ground(worker, hand.tenant)?;
    let arena = ground.arena(worker)?;
    let server = way.endpoint().ok()?.address;
    if !ground.is_known(worker, way, server) {
        return None;
    }
    let inputs = match hand.there {
        Some(there) => there.hand_over_to(number(server)),
        None => write(arena, joined, &per_row, rows)?.hand_over_to(number(server)),
    };
    let outputs = outputs_in(arena, &joined.head, rows, known, server);
    let places = Places { region: &region(arena), inputs: Inputs::Host(inputs), rows, outputs, server };
    places.ask(model, &joined.head, headers)
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

impl Outputs {
    /// Nobody has been told of them.
    fn give_back(self) {
        drop(self.lease.returned());
    }

    /// Their names and places.
    fn places(&self) -> Option<Vec<(&str, Span)>> {
        let places = self.names.iter().enumerate().map(|(at, name)| {
            let region = self.lease.region(at, 0..self.rows)?;
            Some((name.as_str(), Span { offset: region.offset, bytes: region.bytes }))
        });
        places.collect()
    }
}

/// Room for the outputs in shared memory, if the server reads that and it is worth it.
pub(super) fn outputs(
    worker: &Rc<Worker>,
    way: &Way,
    head: &InferRequest,
    rows: u32,
    known: &Known,
    server: SocketAddr,
    hand: &Hand<'_>,
) -> Option<Outputs> {
    let ground = worker.shared.sharing.memory.ground(worker, hand.tenant).filter(|_| known.shared_memory)?;
    let arena = ground.arena(worker)?;
    if ground.is_known(worker, way, server) { outputs_in(arena, head, rows, known, server) } else { None }
}

/// Room for the outputs, if it is known how large they will be, and worth it.
fn outputs_in(
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
    // Zeroed, since a server that writes less than it said would show what another's request left there.
    let lease = arena.zeroing().run(&per_row, rows)?.seal()?.hand_over_to(number(server));
    let names = wanted.iter().map(|output| output.name.clone()).collect();
    Some(Outputs { lease, names, rows, region: region(arena) })
}

/// Asks with tensors in memory. `None`: the server does not know the region, and has done nothing.
pub(super) async fn by_memory(
    worker: &Rc<Worker>,
    way: &Way,
    placed: Placed,
) -> Result<Option<Answered>, Trouble> {
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
                inputs.give_back();
                outputs.map(|Outputs { lease, names, rows, .. }| (lease.returned(), names, rows))
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
            Ok(None)
        }
        response => Ok(Some(Answered { response: response?, headers: answer.headers })),
    }
}

#[cfg(test)]
mod tests {
    use penstock_inference::oip::Datatype;

    use super::*;

    #[test]
    fn halves_go_behind_the_json_unless_the_server_has_told_that_it_takes_none() {
        let head = |datatype| InferRequest {
            inputs: vec![Tensor { datatype, ..Tensor::fp32("x", vec![1, 2], [1.0, 2.0]) }],
            ..InferRequest::default()
        };
        let told = |binary| Known { binary, max_rows: Some(8), ..Known::default() };
        assert!(goes_behind(&Known::default(), &head(Datatype::Fp16)));
        assert!(goes_behind(&Known::default(), &head(Datatype::Bf16)));
        assert!(!goes_behind(&Known::default(), &head(Datatype::Fp32)));
        assert!(goes_behind(&told(true), &head(Datatype::Fp32)));
        assert!(!goes_behind(&told(false), &head(Datatype::Fp16)));
    }
}
