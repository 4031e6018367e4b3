//! The layer pipeline: issues each layer's copies, in layer order, and marks where each layer ends.
//!
//! [`issue_layer`] is the one place where a layer's bytes are put on their way between an area and the engine.

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

/// Queues the copies of one layer of a planned transfer: one batch for each stream, runs of blocks coalesced.
fn issue_layer(
    plan: &mut Plan,
    queueing: &Queueing<'_>,
    layer: usize,
    layer_bytes: u64,
    kv: &PagedKv,
    bytes: &mut BytesByLink,
) -> Result<(), Refused> {
    let direction = queueing.direction();
    let engine = &kv.layers[layer];
    for route in queueing.routes() {
        plan.clear_parts();
        for group in 0..plan.groups.len() {
            let area = &plan.groups[group].area;
            if Arc::ptr_eq(&area.route, route) {
                bytes[area.link] += plan.groups[group].blocks * layer_bytes;
                plan.add_part(group, layer, layer_bytes, engine, direction);
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
        issue_layer(plan, queueing, layer, layer_bytes[layer], kv, bytes)?;
        for route in queueing.routes() {
            let mark = route.stream(queueing.direction()).record();
            let mark = mark.map_err(|error| Refused::on(route, error))?;
            tickets.tickets.push(mark);
        }
        tickets.ends.push(tickets.tickets.len());
    }
    Ok(tickets)
}

/// Queues write-back of every layer, each after the ticket that says its bytes are computed.
pub(crate) fn issue_store(
    plan: &mut Plan,
    layer_bytes: &[u64],
    kv: &PagedKv,
    layer_ready: &dyn Fn(usize) -> Option<Ticket>,
    queueing: &mut Queueing<'_>,
    bytes: &mut BytesByLink,
) -> Result<(), Refused> {
    use_routes(plan, queueing);
    for (layer, block_bytes) in layer_bytes.iter().enumerate() {
        if let Some(ready) = layer_ready(layer) {
            wait_for(&ready, queueing)?;
        }
        issue_layer(plan, queueing, layer, *block_bytes, kv, bytes)?;
    }
    Ok(())
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
