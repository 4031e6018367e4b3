//! The mover: carries plans out while nobody touches the pool, at the beginning of a step or on a thread of its own while the engine is
//! idle.

use std::{
    sync::{Arc, atomic::Ordering},
    thread,
    time::{Duration, Instant},
};

use tracing::{debug, warn};

use super::{
    core::Core,
    home::{Landed, Move},
    state::Places,
};
use crate::{
    device::{Change, Left, Memory, Steps, Still},
    transfer::{AreaId, Direction, Queueing},
};

/// How long a step waits for the engine's own work, and for copies of its cache.
const STILL: Duration = Duration::from_secs(10);
/// How long a step waits for a copy that it has queued. After that the copy goes on, and counts as failed.
const COPY: Duration = Duration::from_secs(2);
/// How often the mover's thread looks whether the engine is idle.
const NAP: Duration = Duration::from_millis(5);
/// How long nothing is moved after everything failed: twice as long each time.
const PAUSES: [Duration; 2] = [Duration::from_millis(20), Duration::from_secs(5)];
/// A step that waited in vain for a standstill is not held up again before this many times as long.
const STILL_SHARE: u32 = 9;

/// A move, and the memories at its ends.
#[derive(Debug)]
struct Order {
    moved: Move,
    /// Where the unit is in the address space, bytes.
    offset: u64,
    from: Memory,
    to: Memory,
    /// The slabs among them.
    slabs: Vec<AreaId>,
    /// The slab that it goes to, if it is one, is being let go of.
    closed: bool,
}

impl Core {
    /// Moves units while the engine is idle. Ends when the pool is closed and nothing is mapped any more.
    pub(super) fn move_loop(&self) {
        loop {
            let mut state = self.state.lock();
            while !state.closing && !self.due.load(Ordering::Acquire) {
                self.changed.wait(&mut state);
            }
            let closing = state.closing;
            drop(state);
            if closing {
                if self.unmap_all() {
                    self.leases.close();
                    return;
                }
                thread::sleep(NAP);
            } else if self.boundary(Duration::ZERO) == 0 {
                // Asked again rather than woken: an engine that is at work moves units itself, at its steps.
                thread::sleep(NAP);
            }
        }
    }

    /// A step begins: moves what is due, as much as one step may cost. Returns how many units have moved.
    pub(super) fn step(&self) -> u32 {
        self.boundary(STILL)
    }

    fn boundary(&self, patience: Duration) -> u32 {
        let Some(steps) = self.steps.get() else {
            return 0;
        };
        if !self.may_move() {
            return 0;
        }
        let began = Instant::now();
        match steps.still(patience) {
            Some(still) => self.move_units(steps, &still, self.config.step),
            None => {
                // Whoever is in the way is not waited for at each step.
                self.state.lock().quiet_until = Instant::now() + began.elapsed() * STILL_SHARE;
                0
            }
        }
    }

    /// Whether it is of use to stop the engine. A copy that was not over is asked first.
    fn may_move(&self) -> bool {
        let unfinished = {
            let state = self.state.lock();
            if Instant::now() < state.quiet_until && !state.homes.is_adrift() {
                return false;
            }
            state.unfinished.clone()
        };
        let Some(flight) = unfinished else {
            return true;
        };
        if !flight.transfer.is_over() {
            return false;
        }
        self.leases.end(&flight);
        let mut state = self.state.lock();
        state.unfinished = None;
        self.note(&state);
        true
    }

    /// Carries out one plan. Returns how many units have moved.
    pub(super) fn move_units(&self, steps: &Steps, still: &Still<'_>, budget: Duration) -> u32 {
        let began = Instant::now();
        let mut state = self.state.lock();
        if state.unfinished.is_some() {
            return 0;
        }
        let plan = state.homes.plan(budget);
        let orders: Vec<Option<Order>> = plan
            .iter()
            .map(|moved| {
                let places = state.places.as_ref()?;
                let offset = *places.offsets.get(moved.unit.0 as usize)?;
                let (from, from_slab) = state.memory(moved.unit, moved.from)?;
                let (to, to_slab) = state.memory(moved.unit, moved.to)?;
                Some(Order {
                    moved: *moved,
                    offset,
                    from,
                    to,
                    slabs: from_slab
                        .into_iter()
                        .chain(to_slab)
                        .map(|area| area.id)
                        .collect(),
                    closed: to_slab.is_some_and(|area| !area.is_open()),
                })
            })
            .collect();
        drop(state);
        if plan.is_empty() {
            return 0;
        }
        let mut landed = Vec::with_capacity(plan.len());
        let mut took = Vec::with_capacity(plan.len());
        let mut stuck = false;
        for order in &orders {
            let start = Instant::now();
            let over = !landed.is_empty() && began.elapsed() >= budget;
            landed.push(match order {
                None => Landed::Stayed,
                Some(order) if order.moved.adrift => anchor(steps, still, order),
                Some(_) if over || stuck => Landed::Later,
                Some(order) if order.closed => Landed::Later,
                Some(order) => match self.copy(order) {
                    Copied::Well => exchange(still, order),
                    Copied::Failed => Landed::Stayed,
                    Copied::Unfinished => {
                        stuck = true;
                        Landed::Stayed
                    }
                },
            });
            took.push(start.elapsed());
        }
        self.settle(&plan, &landed, &took, began)
    }

    /// Notes what became of a plan. Returns how many units have moved.
    fn settle(&self, plan: &[Move], landed: &[Landed], took: &[Duration], began: Instant) -> u32 {
        let mut state = self.state.lock();
        if let Err(error) = state.homes.settle(landed) {
            // Nobody else plans: a bug here.
            self.lose(&mut state, error.to_string());
        }
        let mut moved = 0;
        for ((its, landed), took) in plan.iter().zip(landed).zip(took) {
            match landed {
                Landed::Moved => {
                    moved += 1;
                    state.homes.learn(its, *took);
                }
                Landed::Stayed | Landed::Adrift => state.happened.failed_moves += 1,
                Landed::Later => {}
            }
        }
        state.failures = match moved {
            0 => state.failures.saturating_add(1),
            _ => 0,
        };
        if moved == 0 {
            let pause = PAUSES[0] * 2_u32.saturating_pow((state.failures - 1).min(16));
            state.quiet_until = Instant::now() + pause.min(PAUSES[1]);
        }
        state.happened.moved_units += u64::from(moved);
        let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        state.happened.batches.saturating_record(micros);
        let gone = state.take_vacated();
        self.generation
            .fetch_add(u64::from(moved > 0), Ordering::AcqRel);
        if moved > 0 {
            self.tell_homes(&mut state);
        }
        self.note(&state);
        drop(state);
        drop(gone);
        debug!(moved, planned = plan.len(), took_us = micros, "units moved");
        moved
    }

    /// Puts a unit's bytes into its new home, too.
    fn copy(&self, order: &Order) -> Copied {
        let bytes = self.unit_bytes;
        let flight = self.leases.registering().begin(order.slabs.clone());
        let mut queueing = Queueing::new(&flight.transfer, Direction::Store);
        let queued = match order.moved.copies {
            true => queueing.copy(&self.route, &order.from, &order.to, bytes),
            false => queueing.zero(&self.route, &order.to, bytes),
        };
        drop(queueing);
        let outcome = flight.transfer.wait_until(Instant::now() + COPY);
        let Some(outcome) = outcome else {
            let unit = order.moved.unit.0;
            warn!(
                unit,
                "the copy of a unit does not end; nothing moves before it has"
            );
            self.state.lock().unfinished = Some(flight);
            return Copied::Unfinished;
        };
        self.leases.end(&flight);
        match queued.and(outcome) {
            Ok(()) => Copied::Well,
            Err(error) => {
                warn!(%error, unit = order.moved.unit.0, "a unit could not be copied");
                Copied::Failed
            }
        }
    }

    /// Unmaps everything, if nobody touches the pool. The engine has promised not to begin again.
    fn unmap_all(&self) -> bool {
        let Some(steps) = self.steps.get() else {
            return true;
        };
        let Some(still) = steps.still(Duration::ZERO) else {
            return false;
        };
        if !unmap_pieces(steps, &still) {
            return false;
        }
        let mut state = self.state.lock();
        // Its slabs are not let go of before it is known to be over.
        state.unfinished = None;
        state.homes.clear();
        let gone: (Option<Places>, _) = (state.places.take(), std::mem::take(&mut state.slabs));
        self.tell_homes(&mut state);
        self.note(&state);
        drop(state);
        drop(gone);
        true
    }
}

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copied {
    Well,
    Failed,
    /// It is not known to be over.
    Unfinished,
}

/// Puts a unit's new home in the place of the old one.
fn exchange(still: &Still<'_>, order: &Order) -> Landed {
    let change = Change {
        offset: order.offset,
        memory: order.to.clone(),
    };
    let Err(failed) = still.standstill().replace(&[change]) else {
        return Landed::Moved;
    };
    warn!(error = %failed, unit = order.moved.unit.0, "a unit could not be remapped");
    match failed.left.first() {
        Some(Left::New) => Landed::Moved,
        Some(Left::Nothing | Left::Closed) => Landed::Adrift,
        Some(Left::Old) | None => Landed::Stayed,
    }
}

/// Maps a unit that is mapped nowhere, at either end of its way.
fn anchor(steps: &Steps, still: &Still<'_>, order: &Order) -> Landed {
    let space = steps.space();
    // One of the two may be there, where the device may not touch it.
    if space
        .pieces()
        .iter()
        .any(|piece| piece.offset == order.offset)
        && let Err(error) = still.standstill().unmap(order.offset)
    {
        warn!(%error, unit = order.moved.unit.0, "a unit is mapped nowhere");
        return Landed::Adrift;
    }
    match space.map(order.offset, &order.to) {
        Ok(()) => Landed::Moved,
        Err(error) => match space.map(order.offset, &order.from) {
            Ok(()) => Landed::Stayed,
            Err(_) => {
                warn!(%error, unit = order.moved.unit.0, "a unit is mapped nowhere");
                Landed::Adrift
            }
        },
    }
}

/// Unmaps every piece. False if the driver refuses one.
fn unmap_pieces(steps: &Arc<Steps>, still: &Still<'_>) -> bool {
    let pieces = steps.space().pieces();
    let refused = pieces.into_iter().filter(|piece| {
        let unmapped = still.standstill().unmap(piece.offset);
        if let Err(error) = &unmapped {
            warn!(%error, offset = piece.offset, "while closing a stitched pool");
        }
        unmapped.is_err()
    });
    refused.count() == 0
}
