//! The layer pipeline: issues each layer's copies, in layer order, and marks where each layer ends.
//!
//! [`issue_layers`] is the one place where layers' bytes are put on their way between an area and the engine.

use std::{ops::Range, sync::Arc};

use swiftcache_proto::{domain::Medium, traffic::BytesByLink};

use super::{area::BlockArea, plan::Plan, pool::PagedKv, queueing::Queueing, route::Route};
use crate::device::{DeviceError, Memory, Piece, Ticket};

/// Tickets of a load, layer by layer.
#[derive(Debug, Default)]
pub(crate) struct LayerTickets {
    /// Where each layer's tickets end in `tickets`.
    ends: Vec<usize>,
    tickets: Vec<Ticket>,
}

impl LayerTickets {
    pub(crate) fn layers(&self) -> usize {
        self.ends.len()
    }

    /// One ticket for each stream that carries part of the layer; none past the last layer.
    pub(crate) fn of(&self, layer: usize) -> &[Ticket] {
        let Some(end) = self.ends.get(layer) else {
            return &[];
        };
        let start = layer.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.tickets[start..*end]
    }

    /// The last layer's.
    pub(crate) fn last(&self) -> &[Ticket] {
        (self.layers().checked_sub(1)).map_or(&[], |last| self.of(last))
    }
}

/// Copies that could not be queued. What was queued before is in flight.
#[derive(Debug)]
pub(crate) struct Refused {
    /// What it is put down to, if that is known. A mark that the copies were to wait for, which failed, says nothing about a
    /// route.
    pub(crate) suspect: Option<Arc<Route>>,
    pub(crate) error: DeviceError,
}

impl Refused {
    fn on(route: &Arc<Route>, error: DeviceError) -> Self {
        let suspect = Some(Arc::clone(route));
        Self { suspect, error }
    }

    fn for_mark(error: DeviceError) -> Self {
        let suspect = None;
        Self { suspect, error }
    }
}

/// Pieces up to which layers that may start together are one batch: so many travel in a launch's own parameters.
const MOST_PIECES: u64 = 1024;

/// Queues the copies of some layers of a planned transfer: one batch for each stream, runs of blocks coalesced.
fn issue_layers(
    plan: &mut Plan,
    queueing: &Queueing<'_>,
    layers: Range<usize>,
    layer_bytes: &[u64],
    kv: &PagedKv,
    bytes: &mut BytesByLink,
) -> Result<(), Refused> {
    let direction = queueing.direction();
    for route in queueing.routes() {
        plan.clear_parts();
        for group in 0..plan.groups.len() {
            let area = &plan.groups[group].area;
            if !Arc::ptr_eq(&area.route, route) {
                continue;
            }
            let link = area.link;
            for layer in layers.clone() {
                bytes[link] += plan.groups[group].blocks * layer_bytes[layer];
                plan.add_part(
                    group,
                    layer,
                    layer_bytes[layer],
                    &kv.layers[layer],
                    direction,
                );
            }
        }
        let stream = route.stream(direction);
        let queued = stream.copy_parts(&plan.parts, &plan.pieces);
        queued.map_err(|error| Refused::on(route, error))?;
    }
    // A plan that is kept must keep no memory.
    plan.clear_parts();
    Ok(())
}

/// Which layers of a plan are loaded, and what must be over first.
pub(crate) struct LoadOrder<'a> {
    pub(crate) layers: Range<usize>,
    pub(crate) after: Option<&'a Ticket>,
}

/// Queues a load of layers, and marks the end of each on every stream in use. A block has `layer_bytes` in each layer.
pub(crate) fn issue_load(
    plan: &mut Plan,
    order: LoadOrder<'_>,
    layer_bytes: &[u64],
    kv: &PagedKv,
    queueing: &mut Queueing<'_>,
    bytes: &mut BytesByLink,
) -> Result<LayerTickets, Refused> {
    use_routes(plan, queueing);
    let LoadOrder { layers, after } = order;
    let mut tickets = LayerTickets::default();
    // Layers before the first are over as soon as they are asked for.
    tickets.ends.resize(layers.start, 0);
    if let Some(after) = after {
        wait_for(after, queueing)?;
    }
    for layer in layers {
        issue_layers(plan, queueing, layer..layer + 1, layer_bytes, kv, bytes)?;
        for route in queueing.routes() {
            let mark = route.stream(queueing.direction()).record();
            let mark = mark.map_err(|error| Refused::on(route, error))?;
            tickets.tickets.push(mark);
        }
        tickets.ends.push(tickets.tickets.len());
    }
    Ok(tickets)
}

/// Queues write-back of every layer, each after the ticket that says its bytes are computed. Layers that follow one another and
/// wait for the same ticket are queued together, as far as that is one launch: a block that was filled while decoding costs one in
/// all, where a call for each layer would cost the engine's step more than its hooks do otherwise.
pub(crate) fn issue_store(
    plan: &mut Plan,
    layer_bytes: &[u64],
    kv: &PagedKv,
    layer_ready: &dyn Fn(usize) -> Option<Ticket>,
    queueing: &mut Queueing<'_>,
    bytes: &mut BytesByLink,
) -> Result<(), Refused> {
    use_routes(plan, queueing);
    let together = (MOST_PIECES / plan.blocks().max(1)).max(1) as usize;
    let mut rest = 0..layer_bytes.len();
    while let Some(first) = rest.next() {
        let ready = layer_ready(first);
        while rest.start < first + together
            && rest.start < rest.end
            && same(ready.as_ref(), layer_ready(rest.start).as_ref())
        {
            rest.start += 1;
        }
        if let Some(ready) = &ready {
            wait_for(ready, queueing)?;
        }
        issue_layers(plan, queueing, first..rest.start, layer_bytes, kv, bytes)?;
    }
    Ok(())
}

/// Whether two marks are one, or none.
fn same(one: Option<&Ticket>, other: Option<&Ticket>) -> bool {
    match (one, other) {
        (Some(one), Some(other)) => one.is_same(other),
        (None, None) => true,
        _ => false,
    }
}

fn use_routes(plan: &Plan, queueing: &mut Queueing<'_>) {
    for group in &plan.groups {
        let route = &group.area.route;
        queueing.on(route, Some(route));
    }
}

/// Has all copies that are queued next wait for a ticket.
fn wait_for(ticket: &Ticket, queueing: &Queueing<'_>) -> Result<(), Refused> {
    let mut routes = queueing.routes();
    routes.try_for_each(|route| {
        let stream = route.stream(queueing.direction());
        stream.wait_for(ticket).map_err(Refused::for_mark)
    })
}

/// One block's move from a slot of an area to one of another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MoveStep<'a> {
    pub(crate) from: &'a Arc<BlockArea>,
    pub(crate) from_slot: u32,
    pub(crate) to: &'a Arc<BlockArea>,
    pub(crate) to_slot: u32,
}

/// Blocks on their way from one area to another.
#[derive(Debug)]
pub(crate) struct Move {
    from: Arc<BlockArea>,
    to: Arc<BlockArea>,
    runs: Vec<MoveRun>,
}

#[derive(Debug)]
struct MoveRun {
    from: u32,
    to: u32,
    count: u32,
}

impl Move {
    /// Adds one block's move, to the last one where slots follow one another.
    pub(crate) fn add(moves: &mut Vec<Self>, step: MoveStep<'_>) {
        let one = MoveRun {
            from: step.from_slot,
            to: step.to_slot,
            count: 1,
        };
        let same = moves
            .iter_mut()
            .find(|other| Arc::ptr_eq(&other.from, step.from) && Arc::ptr_eq(&other.to, step.to));
        let Some(same) = same else {
            moves.push(Self {
                from: Arc::clone(step.from),
                to: Arc::clone(step.to),
                runs: vec![one],
            });
            return;
        };
        match same.runs.last_mut() {
            Some(run) if run.from + run.count == one.from && run.to + run.count == one.to => {
                run.count += 1;
            }
            _ => same.runs.push(one),
        }
    }

    /// Where the blocks go.
    pub(crate) fn to(&self) -> &Arc<BlockArea> {
        &self.to
    }

    /// The last slot given out there: the next block best lies right after it.
    pub(crate) fn last_slot(&self) -> Option<u32> {
        self.runs.last().map(|run| run.to + run.count - 1)
    }

    /// What a failure is put down to. A move touches memory at both ends, on a stream of one of them. Between a device and host
    /// memory it is the device's; between devices nobody knows, and loads will show it.
    fn suspect(&self) -> Option<&Arc<Route>> {
        match (&self.from.route, &self.to.route) {
            (from, to) if Arc::ptr_eq(from, to) => Some(from),
            (from, to) if to.medium == Medium::Host => Some(from),
            (from, to) if from.medium == Medium::Host => Some(to),
            _ => None,
        }
    }

    /// The route whose stream a move is queued on: all writes of an area are queued on the stream of its own route, and so
    /// are the copies that make room in it.
    fn route(&self, lead: MoveLead) -> &Arc<Route> {
        match lead {
            MoveLead::Source => &self.from.route,
            MoveLead::Target => &self.to.route,
        }
    }
}

/// Whose stream carries a move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MoveLead {
    /// That of the area that the blocks leave: its slots are written again right behind the move.
    Source,
    /// That of the area that they come to.
    Target,
}

/// Queues a move of whole blocks, which have `layer_bytes` in each layer.
pub(crate) fn issue_move(
    step: &Move,
    lead: MoveLead,
    layer_bytes: &[u64],
    queueing: &mut Queueing<'_>,
) -> Result<(), Refused> {
    let suspect = step.suspect();
    let stream = queueing.on(step.route(lead), suspect);
    let mut pieces = Vec::with_capacity(step.runs.len());
    for (layer, bytes) in layer_bytes.iter().enumerate() {
        pieces.clear();
        pieces.extend(step.runs.iter().map(|run| Piece {
            from: step.from.layer_offsets[layer] + u64::from(run.from) * bytes,
            to: step.to.layer_offsets[layer] + u64::from(run.to) * bytes,
            bytes: u64::from(run.count) * bytes,
        }));
        let queued = stream.copy(&step.from.memory, &step.to.memory, &pieces);
        queued.map_err(|error| Refused {
            suspect: suspect.cloned(),
            error,
        })?;
    }
    Ok(())
}

/// Queues copies that show whether a route works, as loads make them: some of an area's first bytes in one piece, and in two,
/// which may go another way.
pub(crate) fn issue_probe(
    area: &BlockArea,
    scratch: &Memory,
    bytes: u64,
    queueing: &mut Queueing<'_>,
) -> Result<(), Refused> {
    let stream = queueing.on(&area.route, Some(&area.route));
    for count in [1, 2] {
        let size = bytes / count;
        let pieces: Vec<Piece> = (0..count)
            .map(|piece| Piece {
                from: area.layer_offsets[0] + piece * size,
                to: piece * size,
                bytes: size,
            })
            .collect();
        let queued = stream.copy(&area.memory, scratch, &pieces);
        queued.map_err(|error| Refused::on(&area.route, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use proptest::prelude::*;
    use swiftcache_device::{host::HostLayer, testing::Gate};
    use swiftcache_proto::{domain::LinkKind, topology::Topology};

    use super::*;
    use crate::{
        device::{CopyStream, DeviceLayer, Part, Result},
        transfer::{Routes, pool::PagedLayer, queueing::Transfer, route::Direction},
    };

    const LAYERS: [u64; 6] = [64, 16, 128, 32, 32, 8];
    const SLOTS: u32 = 600;

    /// A stream that notes what is asked of it.
    #[derive(Debug)]
    struct Noting {
        stream: Arc<dyn CopyStream>,
        /// Parts of each batch; None: a ticket that later ones wait for.
        calls: Mutex<Vec<Option<usize>>>,
    }

    impl CopyStream for Noting {
        fn device(&self) -> &swiftcache_proto::domain::DeviceUuid {
            self.stream.device()
        }

        fn copy(&self, from: &Memory, to: &Memory, pieces: &[Piece]) -> Result<()> {
            self.stream.copy(from, to, pieces)
        }

        fn copy_parts(&self, parts: &[Part], pieces: &[Piece]) -> Result<()> {
            self.calls.lock().push(Some(parts.len()));
            self.stream.copy_parts(parts, pieces)
        }

        fn zero(&self, memory: &Memory, offset: u64, bytes: u64) -> Result<()> {
            self.stream.zero(memory, offset, bytes)
        }

        fn record(&self) -> Result<Ticket> {
            self.stream.record()
        }

        fn end(&self) -> Ticket {
            self.stream.end()
        }

        fn wait_for(&self, ticket: &Ticket) -> Result<()> {
            self.calls.lock().push(None);
            self.stream.wait_for(ticket)
        }

        fn write(&self, memory: &Memory, offset: u64, bytes: &[u8]) -> Result<()> {
            self.stream.write(memory, offset, bytes)
        }

        fn read(&self, memory: &Memory, offset: u64, bytes: &mut [u8]) -> Result<()> {
            self.stream.read(memory, offset, bytes)
        }
    }

    /// A pool and an area of as many blocks, and the stream that stores are queued on.
    struct Stand {
        stream: Arc<Noting>,
        area: Arc<BlockArea>,
        kv: PagedKv,
    }

    impl Stand {
        fn new() -> Self {
            let topology = Topology::load("hgx-8").unwrap();
            let device = topology.devices[0].uuid.clone();
            let layer: Arc<dyn DeviceLayer> =
                Arc::new(HostLayer::from_topology(&topology, false).unwrap());
            let bytes = u64::from(SLOTS) * LAYERS.iter().sum::<u64>();
            let memory = || layer.allocate_host(&device, bytes).unwrap();
            let (slab, pool) = (memory(), memory());
            let routes = Routes::new(Arc::clone(&layer), device.clone());
            let route = routes.to(Medium::Host, &device).unwrap();
            let stream = Arc::new(Noting {
                stream: Arc::clone(&route.store),
                calls: Mutex::default(),
            });
            let route = Arc::new(Route {
                medium: route.medium,
                device: route.device.clone(),
                index: route.index,
                load: Arc::clone(&route.load),
                store: Arc::clone(&stream) as _,
            });
            let mut offset = 0;
            let layers = LAYERS.map(|bytes| {
                let layer = PagedLayer {
                    memory: pool.clone(),
                    offset,
                    block_stride: bytes,
                };
                offset += bytes * u64::from(SLOTS);
                layer
            });
            let content: Vec<u8> = (0..bytes).map(|at| (at / 8 % 251) as u8).collect();
            stream.write(&pool, 0, &content).unwrap();
            let area = BlockArea::new(slab, 0, SLOTS, &LAYERS, LinkKind::Host, route);
            Self {
                stream,
                area: Arc::new(area),
                kv: PagedKv {
                    layers: layers.to_vec(),
                    blocks: SLOTS,
                },
            }
        }

        /// The first blocks to the slots that are as far from the last one.
        fn store(&self, blocks: u32, ready: &dyn Fn(usize) -> Option<Ticket>) -> Transfer {
            let mut plan = Plan::default();
            for block in 0..blocks {
                plan.add(&self.area, SLOTS - 1 - block, block);
            }
            let transfer = Transfer::default();
            let mut queueing = Queueing::new(&transfer, Direction::Store);
            let mut bytes = BytesByLink::default();
            issue_store(
                &mut plan,
                &LAYERS,
                &self.kv,
                ready,
                &mut queueing,
                &mut bytes,
            )
            .unwrap();
            drop(queueing);
            assert_eq!(
                bytes[LinkKind::Host],
                u64::from(blocks) * LAYERS.iter().sum::<u64>()
            );
            transfer
        }

        /// Whether so many blocks have arrived.
        fn has(&self, blocks: u32) -> bool {
            let read = |memory, at, bytes: u64| {
                let mut content = vec![0; bytes as usize];
                self.stream.read(memory, at, &mut content).unwrap();
                content
            };
            (0..blocks).all(|block| {
                LAYERS.iter().enumerate().all(|(layer, bytes)| {
                    let from = self.kv.layers[layer].offset + u64::from(block) * bytes;
                    let slot = u64::from(SLOTS - 1 - block) * bytes;
                    let to = self.area.layer_offsets[layer] + slot;
                    read(&self.kv.layers[layer].memory, from, *bytes)
                        == read(&self.area.memory, to, *bytes)
                })
            })
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Layers in a row that wait for the same ticket are one batch, up to so many pieces, and no other ones are.
        #[test]
        fn layers_that_may_start_together_are_stored_together(
            blocks in prop_oneof![1_u32..4, 100_u32..SLOTS],
            marks in prop::collection::vec(prop::option::of(0_usize..2), LAYERS.len()),
        ) {
            let stand = Stand::new();
            let gates: [Arc<Gate>; 2] = Default::default();
            let ready = |layer: usize| marks[layer].map(|gate| gates[gate].ticket());
            let transfer = stand.store(blocks, &ready);
            let together = (MOST_PIECES / u64::from(blocks)).max(1) as usize;
            let mut expected = Vec::new();
            for run in marks.chunk_by(|one, other| one == other) {
                for layers in run.chunks(together) {
                    expected.extend(layers[0].map(|_gate| None));
                    expected.push(Some(layers.len()));
                }
            }
            prop_assert_eq!(&*stand.stream.calls.lock(), &expected);
            if marks.iter().any(Option::is_some) {
                prop_assert!(!transfer.is_over());
            }
            for gate in &gates {
                gate.open();
            }
            transfer.wait().unwrap();
            prop_assert!(stand.has(blocks));
        }
    }
}
