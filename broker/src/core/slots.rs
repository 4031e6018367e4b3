//! Which block lies in which slot of a lease.

use swiftcache_proto::domain::BlockHash;

/// Slots that share one allocation: few enough that a lone block in a large lease costs little.
const CHUNK: u32 = 16;

#[derive(Clone, Debug)]
struct Chunk {
    occupied: u16,
    hashes: [BlockHash; CHUNK as usize],
}

/// The published blocks of one lease by slot. Memory follows the blocks, not the slots.
#[derive(Clone, Debug)]
pub(super) struct BlockSlots {
    slots: u32,
    published: u32,
    chunks: Vec<Option<Box<Chunk>>>,
}

impl BlockSlots {
    pub(super) fn new(slots: u32) -> Self {
        Self {
            slots,
            published: 0,
            chunks: Vec::new(),
        }
    }

    /// How many slots the slab has.
    pub(super) fn slots(&self) -> u32 {
        self.slots
    }

    /// How many of them hold a published block.
    pub(super) fn published(&self) -> u32 {
        self.published
    }

    pub(super) fn get(&self, slot: u32) -> Option<&BlockHash> {
        let chunk = self.chunks.get((slot / CHUNK) as usize)?.as_ref()?;
        let place = slot % CHUNK;
        (chunk.occupied & 1 << place != 0).then(|| &chunk.hashes[place as usize])
    }

    /// Fills an empty slot.
    pub(super) fn set(&mut self, slot: u32, hash: BlockHash) {
        let index = (slot / CHUNK) as usize;
        if self.chunks.len() <= index {
            self.chunks.resize_with(index + 1, || None);
        }
        let chunk = self.chunks[index].get_or_insert_with(|| {
            Box::new(Chunk {
                occupied: 0,
                hashes: [BlockHash([0; 16]); CHUNK as usize],
            })
        });
        let place = slot % CHUNK;
        self.published += u32::from(chunk.occupied & 1 << place == 0);
        chunk.occupied |= 1 << place;
        chunk.hashes[place as usize] = hash;
    }

    /// Empties a slot.
    pub(super) fn clear(&mut self, slot: u32) -> Option<BlockHash> {
        let hash = *self.get(slot)?;
        let index = (slot / CHUNK) as usize;
        if let Some(chunk) = &mut self.chunks[index] {
            chunk.occupied &= !(1 << (slot % CHUNK));
            self.published -= 1;
            if chunk.occupied == 0 {
                self.chunks[index] = None;
            }
        }
        Some(hash)
    }

    /// Every published block with its slot.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &BlockHash)> {
        self.iter_from(0)
    }

    /// Every published block with its slot, from a slot on.
    pub(super) fn iter_from(&self, from: u32) -> impl Iterator<Item = (u32, &BlockHash)> {
        let chunks = (0u32..).step_by(CHUNK as usize).zip(&self.chunks);
        let chunks = chunks.skip((from / CHUNK) as usize);
        chunks.flat_map(move |(first, chunk)| {
            let occupied = chunk.is_some() as u32 * CHUNK;
            (first.max(from)..first + occupied)
                .filter_map(move |slot| Some((slot, self.get(slot)?)))
        })
    }

    /// Bytes on the heap, allocator overhead aside.
    #[cfg(test)]
    pub(super) fn heap_bytes(&self) -> usize {
        self.chunks.capacity() * size_of::<Option<Box<Chunk>>>()
            + self.chunks.iter().flatten().count() * size_of::<Chunk>()
    }
}
