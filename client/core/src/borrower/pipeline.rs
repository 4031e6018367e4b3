//! The layer pipeline: issues each layer's copies, in layer order, and marks where each layer ends.
//!
//! [`issue_layer`] is the one place where a layer's bytes are put on their way between a slab and the engine.

use std::{ops::Range, sync::Arc};

use super::{
    blocks::Place,
    layout::{Layout, PagedKv},
    op::Queueing,
    plan::{Direction, Plan},
    slab::{SlabIndex, SlabMemory},
    stats::BytesByLink,
};
use crate::device::{CopyStream, DeviceError, Memory, Piece, Ticket};

/// Tickets of a load, layer by layer.
#[derive(Debug, Default)]
pub(super) struct LayerTickets {
    /// Where each layer's tickets end in `tickets`.
    ends: Vec<usize>,
    tickets: Vec<Ticket>,
}

impl LayerTickets {
    pub(super) fn layers(&self) -> usize {
        self.ends.len()
    }

    /// One ticket for each stream that carries part of the layer; none past the last layer.
    pub(super) fn of(&self, layer: usize) -> &[Ticket] {
        let Some(end) = self.ends.get(layer) else {
            return &[];
        };
        let start = layer.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.tickets[start..*end]
    }

    /// The last layer's.
    pub(super) fn last(&self) -> &[Ticket] {
        (self.layers().checked_sub(1)).map_or(&[], |last| self.of(last))
    }
}

/// Copies that could not be queued. What was queued before is in flight.
#[derive(Debug)]
pub(super) struct Refused {
    /// The stream that did not take them. `None`: a mark that they were to wait for has failed, which says nothing about the
    /// stream.
    pub(super) stream: Option<Arc<dyn CopyStream>>,
    pub(super) error: DeviceError,
}

impl Refused {
    fn by(stream: &Arc<dyn CopyStream>, error: DeviceError) -> Self {
        let stream = Some(Arc::clone(stream));
        Self { stream, error }
    }

    fn for_mark(error: DeviceError) -> Self {
        Self {
            stream: None,
            error,
        }
    }
}

/// Queues the copies of one layer of a planned transfer: one batch for each stream, runs of blocks coalesced.
fn issue_layer(
    plan: &mut Plan,
    streams: &[Arc<dyn CopyStream>],
    layer: usize,
    layout: &Layout,
    kv: &PagedKv,
    direction: Direction,
    bytes: &mut BytesByLink,
) -> Result<(), Refused> {
    let layer_bytes = layout.layer_bytes[layer];
    let engine = &kv.layers[layer];
    for stream in streams {
        plan.clear_parts();
        for group in 0..plan.groups.len() {
            let slab = &plan.groups[group].slab;
            if Arc::ptr_eq(direction.stream(slab), stream) {
                bytes[slab.link] += plan.groups[group].blocks * layer_bytes;
                plan.add_part(group, layer, layer_bytes, engine, direction);
            }
        }
        let queued = stream.copy_parts(&plan.parts, &plan.pieces);
        queued.map_err(|error| Refused::by(stream, error))?;
    }
    // A plan that is kept must keep no memory.
    plan.clear_parts();
    Ok(())
}

/// Queues a load of layers, after a ticket if there is one, and marks the end of each on every stream in use.
pub(super) fn issue_load(
    plan: &mut Plan,
    (layers, after): (Range<usize>, Option<&Ticket>),
    layout: &Layout,
    kv: &PagedKv,
    queueing: &mut Queueing<'_>,
    bytes: &mut BytesByLink,
) -> Result<LayerTickets, Refused> {
    use_streams(plan, Direction::Load, queueing);
    let streams = queueing.streams();
    let mut tickets = LayerTickets::default();
    // Layers before the first are over as soon as they are asked for.
    tickets.ends.resize(layers.start, 0);
    if let Some(after) = after {
        for stream in streams {
            stream.wait_for(after).map_err(Refused::for_mark)?;
        }
    }
    for layer in layers {
        issue_layer(plan, streams, layer, layout, kv, Direction::Load, bytes)?;
        for stream in streams {
            let mark = stream.record();
            let mark = mark.map_err(|error| Refused::by(stream, error))?;
            tickets.tickets.push(mark);
        }
        tickets.ends.push(tickets.tickets.len());
    }
    Ok(tickets)
}

/// Queues write-back of every layer, each after the ticket that says its bytes are computed.
pub(super) fn issue_store(
    plan: &mut Plan,
    layout: &Layout,
    kv: &PagedKv,
    layer_ready: &dyn Fn(usize) -> Option<Ticket>,
    queueing: &mut Queueing<'_>,
    bytes: &mut BytesByLink,
) -> Result<(), Refused> {
    use_streams(plan, Direction::Store, queueing);
    let streams = queueing.streams();
    for layer in 0..layout.layer_bytes.len() {
        if let Some(ready) = layer_ready(layer) {
            for stream in streams {
                stream.wait_for(&ready).map_err(Refused::for_mark)?;
            }
        }
        issue_layer(plan, streams, layer, layout, kv, Direction::Store, bytes)?;
    }
    Ok(())
}

/// Blocks on their way from one slab to another.
#[derive(Debug)]
pub(super) struct Move {
    pub(super) from: Arc<SlabMemory>,
    pub(super) to: Arc<SlabMemory>,
    to_index: SlabIndex,
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
    pub(super) fn add(
        moves: &mut Vec<Self>,
        from: (Place, &Arc<SlabMemory>),
        to: (Place, &Arc<SlabMemory>),
    ) {
        let one = MoveRun {
            from: from.0.slot,
            to: to.0.slot,
            count: 1,
        };
        let same = moves
            .iter_mut()
            .find(|step| Arc::ptr_eq(&step.from, from.1) && Arc::ptr_eq(&step.to, to.1));
        let Some(step) = same else {
            moves.push(Self {
                from: Arc::clone(from.1),
                to: Arc::clone(to.1),
                to_index: to.0.slab,
                runs: vec![one],
            });
            return;
        };
        match step.runs.last_mut() {
            Some(run) if run.from + run.count == one.from && run.to + run.count == one.to => {
                run.count += 1;
            }
            _ => step.runs.push(one),
        }
    }

    /// The last place given out: the next block best lies right after it.
    pub(super) fn next_to(&self) -> Option<Place> {
        self.runs.last().map(|run| Place {
            slab: self.to_index,
            slot: run.to + run.count - 1,
        })
    }
}

/// Queues a move of whole blocks.
pub(super) fn issue_move(
    step: &Move,
    layer_bytes: &[u64],
    stream: &Arc<dyn CopyStream>,
    queueing: &mut Queueing<'_>,
) -> Result<(), Refused> {
    queueing.on(stream);
    let mut pieces = Vec::with_capacity(step.runs.len());
    for (layer, bytes) in layer_bytes.iter().enumerate() {
        pieces.clear();
        pieces.extend(step.runs.iter().map(|run| Piece {
            from: step.from.layer_offsets[layer] + u64::from(run.from) * bytes,
            to: step.to.layer_offsets[layer] + u64::from(run.to) * bytes,
            bytes: u64::from(run.count) * bytes,
        }));
        let queued = stream.copy(&step.from.memory, &step.to.memory, &pieces);
        queued.map_err(|error| Refused::by(stream, error))?;
    }
    Ok(())
}

/// Queues a copy of a slab's first bytes, in so many pieces, on the stream that loads from it.
pub(super) fn issue_probe(
    slab: &SlabMemory,
    scratch: &Memory,
    bytes: u64,
    pieces: u64,
    queueing: &mut Queueing<'_>,
) -> Result<(), Refused> {
    queueing.on(&slab.load);
    let size = bytes / pieces;
    let pieces: Vec<Piece> = (0..pieces)
        .map(|piece| Piece {
            from: slab.layer_offsets[0] + piece * size,
            to: piece * size,
            bytes: size,
        })
        .collect();
    let queued = slab.load.copy(&slab.memory, scratch, &pieces);
    queued.map_err(|error| Refused::by(&slab.load, error))
}

impl Direction {
    fn stream(self, slab: &SlabMemory) -> &Arc<dyn CopyStream> {
        match self {
            Self::Load => &slab.load,
            Self::Store => &slab.store,
        }
    }
}

fn use_streams(plan: &Plan, direction: Direction, queueing: &mut Queueing<'_>) {
    for group in &plan.groups {
        queueing.on(direction.stream(&group.slab));
    }
}
