//! Publishing and unpublishing: what replicas can find.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use swiftcache_proto::{convert::MAX_BLOCKS, domain::BlockHash};
use tracing::debug;

use super::{
    blocks::{BlockId, Place, Published},
    core::Core,
    state::State,
};
use crate::{
    Error,
    leases::LeaseKey,
    session::{Call, Session, Unpublished},
    transfer::AreaId,
};

/// When to ask again after a publishing or an unpublishing whose outcome is not known: later than any call's deadline, so
/// that nothing sent before can arrive after.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// Slots of one lease whose blocks are gone, and which the broker must forget before they are written.
#[derive(Debug)]
pub(super) struct Vacated {
    pub(super) slab: AreaId,
    pub(super) key: LeaseKey,
    pub(super) slots: Vec<u32>,
}

/// One block to publish.
#[derive(Clone, Copy, Debug)]
struct ToPublish {
    id: BlockId,
    hash: BlockHash,
    place: Place,
    /// What was known of it before.
    before: Published,
}

/// Blocks of one lease to publish, each pinned.
struct Batch {
    slab: AreaId,
    key: LeaseKey,
    ids: Vec<BlockId>,
    hashes: Vec<BlockHash>,
    slots: Vec<u32>,
    /// What was known of each before.
    before: Vec<Published>,
}

/// Blocks that the broker is being told of. Each is pinned until its answer was taken in, so it is to be asked until all
/// were: the calls have deadlines.
#[derive(Default)]
pub(super) struct Publishing {
    waiting: Vec<(Batch, Call<Vec<u32>>)>,
    duplicates: u32,
}

impl Core {
    /// Publishes those of `ready` that lie in own leases, and takes one pin off each of them all. Returns how many a
    /// replica had published first: they are gone.
    pub(super) fn publish(&self, ready: Vec<BlockId>) -> u32 {
        let publishing = self.begin_publishing(ready);
        self.wait_published(publishing)
    }

    /// Waits for the answers. Returns how many blocks a replica had published first.
    pub(super) fn wait_published(&self, publishing: Publishing) -> u32 {
        let mut duplicates = publishing.duplicates;
        for (batch, call) in publishing.waiting {
            duplicates += self.published(&batch, call.wait());
        }
        duplicates
    }

    /// Puts [`publish`](Self::publish) on its way.
    pub(super) fn begin_publishing(&self, ready: Vec<BlockId>) -> Publishing {
        if ready.is_empty() {
            return Publishing::default();
        }
        let session = self.connected();
        let mut batches: Vec<Batch> = Vec::new();
        {
            let mut state = self.state.lock();
            for id in ready {
                let place = state.place_of(id);
                let place = place.map(|(place, shelf)| (place, shelf.own_lease()));
                match (place, session) {
                    (Some((place, Some(key))), Some(_)) => {
                        let hash = state.blocks.hash(id);
                        let block = state.blocks.get_mut(id);
                        let before = std::mem::replace(&mut block.published, Published::Maybe);
                        let one = ToPublish {
                            id,
                            hash,
                            place,
                            before,
                        };
                        add(&mut batches, key, one);
                    }
                    // Nobody to tell: the session's next connection will make it known.
                    _ => state.blocks.unpin(id),
                }
            }
        }
        let Some(session) = session else {
            return Publishing::default();
        };
        let waiting = (batches.into_iter()).map(|batch| {
            let key = batch.key;
            let call = session.publish(
                key.lease,
                key.generation,
                &batch.hashes,
                batch.slots.clone(),
            );
            (batch, call)
        });
        Publishing {
            waiting: waiting.collect(),
            duplicates: 0,
        }
    }

    /// Takes in the answers that are there, without waiting. True when all were.
    pub(super) fn is_published(&self, publishing: &mut Publishing) -> bool {
        let Publishing {
            waiting,
            duplicates,
        } = publishing;
        waiting.retain_mut(|(batch, call)| match call.try_take() {
            Some(outcome) => {
                *duplicates += self.published(batch, outcome);
                false
            }
            None => true,
        });
        waiting.is_empty()
    }

    fn published(&self, batch: &Batch, outcome: Result<Vec<u32>, Error>) -> u32 {
        let mut state = self.state.lock();
        let mut duplicates = 0;
        // A block that a revocation has moved meanwhile is published anew where it lies now: this outcome is not its.
        let here: Vec<usize> = (0..batch.ids.len())
            .filter(|index| {
                let slot = batch.slots[*index];
                let place = state.blocks.get(batch.ids[*index]).place;
                place.is_some_and(|place| place.slab == batch.slab && place.slot == slot)
            })
            .collect();
        match outcome {
            Ok(taken) => {
                let taken: HashSet<usize> = taken.iter().map(|index| *index as usize).collect();
                for index in here {
                    let id = batch.ids[index];
                    let block = state.blocks.get_mut(id);
                    if !taken.contains(&index) {
                        block.published = Published::Yes;
                        continue;
                    }
                    block.published = batch.before[index];
                    // A load may be reading it besides: then it stays, for this borrower alone.
                    if block.pins == 1
                        && let Some(place) = state.lose_duplicate(id)
                    {
                        state.retire(place, batch.before[index]);
                        state.counts.duplicate_blocks += 1;
                        duplicates += 1;
                    }
                }
            }
            Err(error) => {
                debug!(%error, lease = %batch.key.lease, "blocks not published");
                if error.may_be_done() {
                    let again = Instant::now() + ASK_AGAIN;
                    state.publish_after.get_or_insert(again);
                } else {
                    for index in here {
                        let block = state.blocks.get_mut(batch.ids[index]);
                        block.published = batch.before[index];
                    }
                }
            }
        }
        for id in &batch.ids {
            state.blocks.unpin(*id);
        }
        duplicates
    }

    /// After a connection: makes known what the broker does not know, everything if it restarted.
    pub(super) fn publish_again(&self, restarted: bool) {
        let unknown = self.state.lock().pin_unknown(restarted);
        debug!(blocks = unknown.len(), restarted, "publishing again");
        self.publish(unknown);
    }

    /// Makes known again, after a while, what the broker may not know by this connection.
    pub(super) fn publish_due(&self) {
        let unknown = {
            let mut state = self.state.lock();
            let due = state
                .publish_after
                .is_some_and(|when| when <= Instant::now());
            if !due || self.connected().is_none() {
                return;
            }
            state.publish_after = None;
            state.pin_unknown(false)
        };
        debug!(
            blocks = unknown.len(),
            "publishing again what was not answered"
        );
        self.publish(unknown);
    }

    /// Makes vacated slots unfindable and gives them back, now or when their readers are through. A slot whose
    /// outcome stays unknown is asked for again.
    pub(super) fn unpublish(&self, vacated: Vec<Vacated>) {
        let Some(session) = self.connected() else {
            let later = Instant::now() + ASK_AGAIN;
            for Vacated { slab, slots, .. } in vacated {
                self.ask_again(slab, slots, later);
            }
            return;
        };
        let calls: Vec<_> = (vacated.into_iter())
            .map(|vacated| {
                let call = unpublish(session, &vacated);
                (vacated, call)
            })
            .collect();
        for (Vacated { slab, slots, .. }, call) in calls {
            match call.wait() {
                Ok(unpublished) => self.unpublished(slab, slots, &unpublished),
                Err(error) => {
                    debug!(%error, "slots not unpublished");
                    self.ask_again(slab, slots, Instant::now() + ASK_AGAIN);
                }
            }
        }
    }

    fn unpublished(&self, slab: AreaId, slots: Vec<u32>, outcome: &Unpublished) {
        let until = Instant::now() + outcome.retry_after;
        // After a broker's restart this can be every slot.
        let pinned: HashSet<u32> = outcome.pinned.iter().copied().collect();
        let mut state = self.state.lock();
        if let Some(shelf) = state.shelves.get_mut(slab) {
            for slot in slots {
                if pinned.contains(&slot) {
                    shelf.cooling.push((until, slot));
                } else {
                    shelf.slots.give(slot);
                }
            }
        }
    }

    fn ask_again(&self, slab: AreaId, slots: Vec<u32>, when: Instant) {
        if let Some(shelf) = self.state.lock().shelves.get_mut(slab) {
            shelf
                .unconfirmed
                .extend(slots.into_iter().map(|slot| (when, slot)));
        }
    }

    /// Asks again for every slot that is due.
    pub(super) fn unpublish_due(&self) {
        let now = Instant::now();
        let mut due = Vec::new();
        if self.connected().is_none() {
            return;
        }
        for shelf in self.state.lock().shelves.iter_mut() {
            shelf.cool(now);
            let Some(key) = shelf.own_lease() else {
                continue;
            };
            let slots: Vec<u32> = (shelf.unconfirmed)
                .extract_if(.., |(when, _)| *when <= now)
                .map(|(_, slot)| slot)
                .take(MAX_BLOCKS)
                .collect();
            if !slots.is_empty() {
                let slab = shelf.area.id;
                due.push(Vacated { slab, key, slots });
            }
        }
        self.unpublish(due);
    }
}

impl State {
    /// Pins the blocks in own leases that the broker may not know. If it restarted, it knows none.
    fn pin_unknown(&mut self, restarted: bool) -> Vec<BlockId> {
        let mut own = Vec::new();
        for shelf in self.shelves.iter() {
            if shelf.is_open() && shelf.own_lease().is_some() {
                own.extend(shelf.blocks());
            }
        }
        own.retain(|id| {
            let block = self.blocks.get_mut(*id);
            if restarted && block.published == Published::Yes {
                block.published = Published::Maybe;
            }
            let unknown = block.ready && block.published != Published::Yes;
            if unknown {
                block.pins += 1;
            }
            unknown
        });
        own
    }
}

fn unpublish(session: &Session, vacated: &Vacated) -> Call<Unpublished> {
    let LeaseKey { lease, generation } = vacated.key;
    session.unpublish(lease, generation, vacated.slots.clone())
}

/// Adds a block to its lease's batch; a full one is followed by another.
fn add(batches: &mut Vec<Batch>, key: LeaseKey, one: ToPublish) {
    let open = (batches.iter()).rposition(|batch| batch.key == key && batch.ids.len() < MAX_BLOCKS);
    let at = open.unwrap_or_else(|| {
        batches.push(Batch {
            slab: one.place.slab,
            key,
            ids: Vec::new(),
            hashes: Vec::new(),
            slots: Vec::new(),
            before: Vec::new(),
        });
        batches.len() - 1
    });
    let batch = &mut batches[at];
    batch.ids.push(one.id);
    batch.hashes.push(one.hash);
    batch.slots.push(one.place.slot);
    batch.before.push(one.before);
}
