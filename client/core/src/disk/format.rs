//! What lies where in the file, and the bytes of its headers.
//!
//! ```text
//! superblock (one page) | extent 0 | extent 1 | ...
//! extent: header (one page) | table of entries | slot 0 | slot 1 | ...
//! ```
//!
//! An extent belongs to one namespace and says which; its slots are all of one size. An entry says which block lies in a slot, and
//! what the checksum of its bytes is. It is written after the bytes. Headers and entries have checksums of their own, into which
//! the generation of the extent goes: what an extent held in an earlier life counts for nothing.

use swiftcache_proto::{
    convert::{MAX_LAYERS, MAX_NAMESPACE_BYTES},
    domain::BlockHash,
};
use twox_hash::XxHash3_64;

/// The layout of this file. A file of another version is left alone.
pub(super) const VERSION: u32 = 1;
/// What direct I/O is aligned to, bytes.
pub(super) const PAGE: u64 = 4096;
/// Bytes of an extent, unless the whole file is small.
const EXTENT_BYTES: u64 = 64 << 20;
const LEAST_EXTENT_BYTES: u64 = 128 << 10;
/// Extents that a file has at least, so that several models find room.
const LEAST_EXTENTS: u64 = 8;
/// Bytes of an entry.
pub(super) const ENTRY: usize = 64;

const SUPERBLOCK: &[u8; 8] = b"SWIFTKV\x01";
const EXTENT: &[u8; 8] = b"SWIFTEX\x01";
const SUM: usize = 8;

/// The checksum of bytes.
pub(super) fn checksum(bytes: &[u8], seed: u64) -> u64 {
    XxHash3_64::oneshot_with_seed(seed, bytes)
}

/// The bytes of an extent of a new file that may become so large.
pub(super) fn extent_bytes(file_bytes: u64) -> u64 {
    let part = file_bytes.saturating_sub(PAGE) / LEAST_EXTENTS / PAGE * PAGE;
    part.clamp(LEAST_EXTENT_BYTES, EXTENT_BYTES)
}

/// The least that a file may be bounded to, bytes.
pub(super) fn least_file_bytes() -> u64 {
    PAGE + LEAST_EXTENT_BYTES
}

/// A page of headers: what is written, padding, and the checksum of both.
fn seal(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let end = PAGE as usize - SUM;
    if bytes.len() > end {
        return None;
    }
    bytes.resize(end, 0);
    let sum = checksum(&bytes, 0);
    bytes.extend(sum.to_le_bytes());
    Some(bytes)
}

/// What was sealed, if it is whole.
fn open(page: &[u8]) -> Option<Reader<'_>> {
    let (bytes, sum) = page.split_last_chunk::<SUM>()?;
    (checksum(bytes, 0) == u64::from_le_bytes(*sum)).then_some(Reader(bytes))
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn chunk<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u32(&mut self) -> Option<u32> {
        self.chunk().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.chunk().map(u64::from_le_bytes)
    }

    fn text(&mut self) -> Option<String> {
        let count = self.u32()? as usize;
        String::from_utf8(self.take(count)?.to_vec()).ok()
    }
}

fn put_text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u32).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) extent_bytes: u64,
    /// Whose blocks these are. Another tenant's agent does not touch them.
    pub(super) tenant: String,
}

/// What the first page of a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FirstPage {
    Whole(Superblock),
    OtherVersion(u32),
    /// One of these files, whose first page is damaged.
    Damaged,
    /// No file of this kind.
    Foreign,
}

impl Superblock {
    pub(super) fn write(&self) -> Option<Vec<u8>> {
        let mut bytes = SUPERBLOCK.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.extent_bytes.to_le_bytes());
        put_text(&mut bytes, &self.tenant);
        seal(bytes)
    }

    pub(super) fn read(page: &[u8]) -> FirstPage {
        if !page.starts_with(SUPERBLOCK) {
            return FirstPage::Foreign;
        }
        let Some(mut reader) = open(page) else {
            return FirstPage::Damaged;
        };
        let mut read = || {
            reader.take(SUPERBLOCK.len())?;
            let version = reader.u32()?;
            if version != VERSION {
                return Some(FirstPage::OtherVersion(version));
            }
            let extent_bytes = reader.u64()?;
            let tenant = reader.text()?;
            let sound = extent_bytes >= LEAST_EXTENT_BYTES && extent_bytes.is_multiple_of(PAGE);
            sound.then_some(FirstPage::Whole(Self {
                extent_bytes,
                tenant,
            }))
        };
        read().unwrap_or(FirstPage::Damaged)
    }
}

/// Whose an extent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ExtentHeader {
    /// Drawn at random: tells this life of the extent from earlier ones.
    pub(super) generation: u64,
    pub(super) namespace: String,
    pub(super) layer_bytes: Vec<u64>,
}

impl ExtentHeader {
    /// `None` for a layout that takes more than a page to say.
    pub(super) fn write(&self) -> Option<Vec<u8>> {
        let mut bytes = EXTENT.to_vec();
        bytes.extend(self.generation.to_le_bytes());
        put_text(&mut bytes, &self.namespace);
        let runs: Vec<&[u64]> = self.layer_bytes.chunk_by(|a, b| a == b).collect();
        bytes.extend((runs.len() as u32).to_le_bytes());
        for run in runs {
            bytes.extend(run[0].to_le_bytes());
            bytes.extend((run.len() as u32).to_le_bytes());
        }
        seal(bytes)
    }

    pub(super) fn read(page: &[u8]) -> Option<Self> {
        let mut reader = open(page)?;
        if reader.take(EXTENT.len())? != EXTENT {
            return None;
        }
        let generation = reader.u64()?;
        let namespace = reader.text()?;
        let mut layer_bytes = Vec::new();
        for _ in 0..reader.u32()? {
            let (bytes, count) = (reader.u64()?, reader.u32()? as usize);
            if layer_bytes.len() + count > MAX_LAYERS {
                return None;
            }
            layer_bytes.extend(std::iter::repeat_n(bytes, count));
        }
        let named = (1..=MAX_NAMESPACE_BYTES).contains(&namespace.len());
        named.then_some(Self {
            generation,
            namespace,
            layer_bytes,
        })
    }
}

/// How an extent is cut into slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    pub(super) slots: u32,
    pub(super) slot_bytes: u64,
    table_bytes: u64,
}

impl Geometry {
    /// `None` when no block fits.
    pub(super) fn of(extent_bytes: u64, layer_bytes: &[u64]) -> Option<Self> {
        let block_bytes =
            (layer_bytes.iter()).try_fold(0_u64, |sum, bytes| sum.checked_add(*bytes))?;
        if block_bytes == 0 || block_bytes > extent_bytes || layer_bytes.len() > MAX_LAYERS {
            return None;
        }
        let slot_bytes = block_bytes.next_multiple_of(PAGE);
        let room = extent_bytes.checked_sub(PAGE)?;
        let table = |slots: u64| (slots * ENTRY as u64).next_multiple_of(PAGE);
        let mut slots = room / (slot_bytes + ENTRY as u64);
        while slots > 0 && table(slots) + slots * slot_bytes > room {
            slots -= 1;
        }
        (slots > 0).then(|| Self {
            slots: slots as u32,
            slot_bytes,
            table_bytes: table(slots),
        })
    }

    pub(super) fn table_bytes(&self) -> usize {
        self.slots as usize * ENTRY
    }

    /// Where entries begin in an extent.
    pub(super) fn table_at() -> u64 {
        PAGE
    }

    pub(super) fn entry_at(slot: u32) -> u64 {
        PAGE + u64::from(slot) * ENTRY as u64
    }

    pub(super) fn slot_at(&self, slot: u32) -> u64 {
        PAGE + self.table_bytes + u64::from(slot) * self.slot_bytes
    }
}

/// What lies in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) hash: BlockHash,
    /// The block that it follows, where that is known.
    pub(super) before: Option<BlockHash>,
    /// When it was last used, on the file's own count.
    pub(super) used: u64,
    /// Of the block's bytes, with the extent's generation for a seed.
    pub(super) checksum: u64,
}

impl Entry {
    /// Entries of other generations and other slots are not this one.
    fn seed(generation: u64, slot: u32) -> u64 {
        generation.rotate_left(24) ^ u64::from(slot)
    }

    pub(super) fn write(&self, generation: u64, slot: u32) -> [u8; ENTRY] {
        let mut bytes = [0; ENTRY];
        let parts: [&[u8]; 5] = [
            &self.hash.0,
            &self.before.map_or([0; 16], |before| before.0),
            &self.used.to_le_bytes(),
            &self.checksum.to_le_bytes(),
            &u64::from(self.before.is_some()).to_le_bytes(),
        ];
        let mut at = 0;
        for part in parts {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        let sum = checksum(&bytes[..at], Self::seed(generation, slot));
        bytes[at..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    pub(super) fn read(bytes: &[u8], generation: u64, slot: u32) -> Option<Self> {
        let (said, sum) = bytes.split_last_chunk::<SUM>()?;
        if checksum(said, Self::seed(generation, slot)) != u64::from_le_bytes(*sum) {
            return None;
        }
        let mut reader = Reader(said);
        let (hash, before) = (BlockHash(reader.chunk()?), BlockHash(reader.chunk()?));
        let (used, checksum) = (reader.u64()?, reader.u64()?);
        Some(Self {
            hash,
            before: (reader.u64()? != 0).then_some(before),
            used,
            checksum,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn headers_are_read_as_they_were_written_and_any_other_byte_is_seen(
            generation: u64, namespace in "[a-z]{1,200}",
            layer_bytes in prop::collection::vec(1_u64..3, 1..100),
            at in 0_usize..PAGE as usize, flip in 1_u8..,
        ) {
            let header = ExtentHeader { generation, namespace: namespace.clone(), layer_bytes };
            let mut page = header.write().unwrap();
            prop_assert_eq!(ExtentHeader::read(&page), Some(header));
            page[at] ^= flip;
            prop_assert_eq!(ExtentHeader::read(&page), None);

            let first = Superblock { extent_bytes: 64 * PAGE, tenant: namespace };
            let mut page = first.write().unwrap();
            prop_assert_eq!(Superblock::read(&page), FirstPage::Whole(first));
            page[at] ^= flip;
            let read = Superblock::read(&page);
            prop_assert!(matches!(read, FirstPage::Damaged | FirstPage::Foreign), "{:?}", read);
        }

        #[test]
        fn an_entry_counts_in_its_own_slot_and_generation_only(
            hash: [u8; 16], before: Option<[u8; 16]>, used: u64, checksum: u64, generation: u64, slot: u32,
            at in 0_usize..ENTRY, flip in 1_u8..,
        ) {
            let entry = Entry { hash: BlockHash(hash), before: before.map(BlockHash), used, checksum };
            let mut bytes = entry.write(generation, slot);
            prop_assert_eq!(Entry::read(&bytes, generation, slot), Some(entry));
            prop_assert_eq!(Entry::read(&bytes, generation.wrapping_add(1), slot), None);
            prop_assert_eq!(Entry::read(&bytes, generation, slot.wrapping_add(1)), None);
            bytes[at] ^= flip;
            prop_assert_eq!(Entry::read(&bytes, generation, slot), None);
        }

        #[test]
        fn slots_lie_apart_and_inside_the_extent(extent in 32_u64..20_000, block in 1_u64..(1 << 24)) {
            let extent_bytes = extent * PAGE;
            let Some(geometry) = Geometry::of(extent_bytes, &[block]) else {
                prop_assert!(block + 3 * PAGE > extent_bytes);
                return Ok(());
            };
            let end = geometry.slot_at(geometry.slots - 1) + geometry.slot_bytes;
            prop_assert!(end <= extent_bytes && geometry.slot_bytes >= block);
            prop_assert!(Geometry::entry_at(geometry.slots) <= geometry.slot_at(0));
            prop_assert!(geometry.slot_at(0) % PAGE == 0 && geometry.slot_bytes % PAGE == 0);
        }
    }
}
