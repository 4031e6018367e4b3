//! The blocks on a disk: which lie where, which go when there is no room, and what is still right when they are read.
//!
//! Whatever is wrong with the disk costs blocks, and nothing else: bytes count only when their checksum is the one that was written
//! for them; what cannot be written is not kept; and after a restart what is found in the file is what is there.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::domain::BlockHash;
use tracing::{info, warn};

use super::{
    file::{Aligned, BlockFile},
    format::{self, Entry, ExtentHeader, FirstPage, Geometry, PAGE, Superblock},
    room::{Gone, Room, Spot},
    runs::{Wanted, runs},
};
use crate::{Error, Result};

/// How long nothing is written after the disk has refused: twice as long each time.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MOST: Duration = Duration::from_secs(60);
/// How many pieces are read at a time: a disk that is asked for one after the other rests in between.
const READERS: usize = 4;

/// Where a store keeps its blocks, and for whom.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The directory of the file.
    pub path: std::path::PathBuf,
    /// The most that the file takes, bytes.
    pub bytes: u64,
    /// Whose blocks they are. A file of another tenant is refused.
    pub tenant: String,
    /// Blocks go past the kernel's cache where the file system lets them.
    pub direct: bool,
}

/// What a store has and what it has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// The most that the file takes, bytes.
    pub bytes: u64,
    /// What it takes now, bytes.
    pub used_bytes: u64,
    /// Blocks that can be found.
    pub blocks: u64,
    /// Blocks written.
    pub written_blocks: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Blocks read whose bytes were right.
    pub read_blocks: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Blocks whose bytes were not those that were written: none was given out.
    pub corrupt_blocks: u64,
    /// Blocks that the disk did not read or write.
    pub failed_blocks: u64,
    /// Blocks that made room for others.
    pub evicted_blocks: u64,
}

/// What became of a block that was to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Put {
    /// It can be found.
    Stored,
    /// It was there, or is being written.
    Known,
    /// There is no place for it: see [`DiskStore::problem`].
    Refused,
}

/// The blocks of one tenant in one file.
#[derive(Debug)]
pub struct DiskStore {
    file: BlockFile,
    extent_bytes: u64,
    state: Mutex<State>,
    /// What blocks are written from: fresh memory for each costs as much as the write on a fast disk.
    pages: Mutex<Aligned>,
}

/// Whose an extent is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Extent {
    namespace: Arc<str>,
    generation: u64,
}

#[derive(Debug, Default)]
struct State {
    extents: Vec<Option<Extent>>,
    rooms: BTreeMap<Arc<str>, Room>,
    /// Counts uses: those of all rooms in one order.
    clock: u64,
    /// Blocks that came or went and nobody was told of.
    news: Vec<(Arc<str>, BlockHash)>,
    counts: StoreStats,
    trouble: Option<Trouble>,
    /// Why the file is smaller than it may be.
    bounded: Option<String>,
    unsynced: bool,
}

/// The disk does not take what is written.
#[derive(Debug)]
struct Trouble {
    problem: String,
    pause: Duration,
    until: Instant,
}

/// A slot that was taken for a block.
struct Taken {
    id: u32,
    spot: Spot,
    generation: u64,
    geometry: Geometry,
    used: u64,
}

impl DiskStore {
    /// Opens the file in a directory and finds what is in it, or makes a new one.
    ///
    /// # Errors
    /// When the directory cannot be used, or holds a file that is not this program's to use: of another tenant, another layout, or
    /// another process.
    pub fn open(config: &StoreConfig) -> Result<Self> {
        let least = format::least_file_bytes();
        if config.bytes < least {
            let problem = format!("is {}; takes at least {least}", config.bytes);
            return Err(Error::config("bytes", problem));
        }
        let file = BlockFile::open(&config.path, config.direct)?;
        let extent_bytes = first_page(&file, config)?;
        let count = config.bytes.saturating_sub(PAGE) / extent_bytes;
        if count == 0 {
            let problem = format!(
                "is {}; {} has extents of {extent_bytes} bytes: allow at least one, or delete the file",
                config.bytes,
                file.path().display()
            );
            return Err(Error::config("bytes", problem));
        }
        let bound = PAGE + count * extent_bytes;
        // One that cannot be written stays as long as it is until a start that can cut it off.
        if file.read_only().is_none() {
            file.truncate(bound)
                .map_err(|error| unusable(&file, &error))?;
        }
        let store = Self {
            file,
            extent_bytes,
            state: Mutex::new(State {
                extents: vec![None; count as usize],
                ..State::default()
            }),
            pages: Mutex::default(),
        };
        store.scan();
        let mut state = store.state.lock();
        state.counts.bytes = bound;
        if let Some(error) = store.file.read_only() {
            state.in_trouble(&store.file, error);
        }
        let (blocks, models) = (state.blocks(), state.rooms.len());
        drop(state);
        info!(
            path = %store.file.path().display(), blocks, models, direct = store.file.is_direct(),
            "the disk's blocks are open"
        );
        Ok(store)
    }

    /// Takes in what lies in the file.
    fn scan(&self) {
        let present = self.file.bytes().unwrap_or(0);
        let mut state = self.state.lock();
        let mut found: BTreeMap<Arc<str>, Vec<(Entry, Spot)>> = BTreeMap::new();
        let mut page = vec![0; PAGE as usize];
        for extent in 0..state.extents.len() as u32 {
            let at = self.extent_at(extent);
            if at + self.extent_bytes > present || self.file.read_small(at, &mut page).is_err() {
                continue;
            }
            let Some(header) = ExtentHeader::read(&page) else {
                continue;
            };
            let Some(geometry) = Geometry::of(self.extent_bytes, &header.layer_bytes) else {
                continue;
            };
            let mut table = vec![0; geometry.table_bytes()];
            let read = self.file.read_small(at + Geometry::table_at(), &mut table);
            let namespace: Arc<str> = header.namespace.as_str().into();
            let room = state.rooms.entry(Arc::clone(&namespace));
            let room = room.or_insert_with(|| Room::new(header.layer_bytes.clone(), geometry));
            if read.is_err() || room.layer_bytes() != header.layer_bytes {
                continue;
            }
            room.add_extent(extent);
            let generation = header.generation;
            let entries = table.chunks_exact(format::ENTRY).zip(0..);
            for (bytes, slot) in entries {
                if let Some(entry) = Entry::read(bytes, generation, slot) {
                    let found = found.entry(Arc::clone(&namespace)).or_default();
                    found.push((entry, Spot { extent, slot }));
                }
            }
            state.extents[extent as usize] = Some(Extent {
                namespace,
                generation,
            });
        }
        state.rooms.retain(|_, room| room.extents() > 0);
        let mut clock = 0;
        for (namespace, mut entries) in found {
            // What was used last comes last, and is what is kept of two with one name.
            entries.sort_by_key(|(entry, _)| entry.used);
            clock = clock.max(entries.last().map_or(0, |(entry, _)| entry.used));
            if let Some(room) = state.rooms.get_mut(&namespace) {
                room.take_in(&entries);
            }
        }
        state.clock = clock;
    }

    fn extent_at(&self, extent: u32) -> u64 {
        PAGE + u64::from(extent) * self.extent_bytes
    }

    /// Keeps a block, `before` being the one that it follows. Its layers' bytes are those of `bytes`, one after the other.
    pub fn put(
        &self,
        namespace: &str,
        layer_bytes: &[u64],
        hash: BlockHash,
        before: Option<BlockHash>,
        bytes: &[u8],
    ) -> Put {
        let total: u64 = layer_bytes.iter().sum();
        if bytes.len() as u64 != total {
            return Put::Refused;
        }
        let taken = {
            let mut state = self.state.lock();
            let now = Instant::now();
            if state
                .trouble
                .as_ref()
                .is_some_and(|trouble| now < trouble.until)
            {
                return Put::Refused;
            }
            if let Some(room) = state.rooms.get(namespace)
                && room.find(&hash).is_some()
            {
                return Put::Known;
            }
            // Blocks that can be read do not make room for what a disk refuses.
            let taken = match state.trouble {
                Some(_) => self.file.try_writing(),
                None => Ok(()),
            };
            match taken.and_then(|()| self.take(&mut state, namespace, layer_bytes, hash)) {
                Ok(Some(taken)) => taken,
                Ok(None) => return Put::Refused,
                Err(error) => {
                    state.counts.failed_blocks += 1;
                    state.in_trouble(&self.file, &error);
                    return Put::Refused;
                }
            }
        };
        let (written, checksum) = self.write(&taken, hash, before, bytes);
        let mut state = self.state.lock();
        let Some(room) = state.rooms.get_mut(namespace) else {
            return Put::Refused;
        };
        match written {
            Ok(()) => {
                room.make_ready(taken.id, checksum, before, taken.used);
                state.counts.written_blocks += 1;
                state.counts.written_bytes += total;
                state.trouble = None;
                state.unsynced = true;
                state.news.push((namespace.into(), hash));
                Put::Stored
            }
            Err(error) => {
                room.lose(taken.id);
                state.counts.failed_blocks += 1;
                state.in_trouble(&self.file, &error);
                Put::Refused
            }
        }
    }

    /// Bytes first, then the entry that says so. What was said of the slot before is taken back first of all.
    fn write(
        &self,
        taken: &Taken,
        hash: BlockHash,
        before: Option<BlockHash>,
        bytes: &[u8],
    ) -> (io::Result<()>, u64) {
        let checksum = format::checksum(bytes, taken.generation);
        let entry = Entry {
            hash,
            before,
            used: taken.used,
            checksum,
        };
        let at = self.extent_at(taken.spot.extent);
        let entry_at = at + Geometry::entry_at(taken.spot.slot);
        let written = (self.file.write_small(entry_at, &[0; format::ENTRY])).and_then(|()| {
            let mut pages = self.pages.lock();
            pages.fit(taken.geometry.slot_bytes as usize);
            let (block, rest) = pages.get_mut().split_at_mut(bytes.len());
            block.copy_from_slice(bytes);
            rest.fill(0);
            let slot_at = at + taken.geometry.slot_at(taken.spot.slot);
            self.file.write_large(slot_at, pages.get())?;
            let entry = entry.write(taken.generation, taken.spot.slot);
            self.file.write_small(entry_at, &entry)
        });
        (written, checksum)
    }

    /// Takes a slot for a block, which nobody finds until it is ready. `None` for a layout that does not go with what is there.
    fn take(
        &self,
        state: &mut State,
        namespace: &str,
        layer_bytes: &[u64],
        hash: BlockHash,
    ) -> io::Result<Option<Taken>> {
        let Some(geometry) = Geometry::of(self.extent_bytes, layer_bytes) else {
            return Ok(None);
        };
        let room = state.rooms.entry(namespace.into());
        let room = room.or_insert_with(|| Room::new(layer_bytes.to_vec(), geometry));
        if room.layer_bytes() != layer_bytes {
            return Ok(None);
        }
        if !room.has_free_slot() {
            let fresh = self.take_extent(state, namespace, layer_bytes);
            let room = state.rooms.get_mut(namespace);
            let has_victims = room.as_ref().is_some_and(|room| room.extents() > 0);
            match fresh {
                Ok(_) => {}
                // What there is can still be written over.
                Err(error) if has_victims && is_full(&error) => {
                    state.in_trouble_growing(&self.file, &error);
                }
                Err(error) => {
                    if !has_victims {
                        state.rooms.remove(namespace);
                    }
                    return Err(error);
                }
            }
        }
        let clock = state.clock + 1;
        let Some(room) = state.rooms.get_mut(namespace) else {
            return Ok(None);
        };
        let gone = match room.has_free_slot() {
            true => None,
            false => room.make_room(),
        };
        let taken = room.take_slot(hash, clock);
        state.clock = clock;
        if let Some(gone) = gone {
            state.gone(namespace, [gone]);
        }
        let Some((id, spot)) = taken else {
            return Ok(None);
        };
        let generation = state.extents[spot.extent as usize].as_ref();
        Ok(generation.map(|extent| Taken {
            id,
            spot,
            generation: extent.generation,
            geometry,
            used: clock,
        }))
    }

    /// Gives a room an extent more: one that is nobody's, or one of another room that it may take from. False when there is none.
    fn take_extent(
        &self,
        state: &mut State,
        namespace: &str,
        layer_bytes: &[u64],
    ) -> io::Result<bool> {
        let free = state.extents.iter().position(Option::is_none);
        let extent = match free {
            Some(free) => free as u32,
            None => match state.taken_from_another(namespace) {
                Some(extent) => extent,
                None => return Ok(false),
            },
        };
        let at = self.extent_at(extent);
        // Drawn, not counted: the header that had the highest count may be the one that was damaged.
        let header = ExtentHeader {
            generation: rand::random(),
            namespace: namespace.to_owned(),
            layer_bytes: layer_bytes.to_vec(),
        };
        let Some(page) = header.write() else {
            return Ok(false);
        };
        self.file.provide(at, self.extent_bytes)?;
        self.file.write_small(at, &page)?;
        state.extents[extent as usize] = Some(Extent {
            namespace: namespace.into(),
            generation: header.generation,
        });
        if let Some(room) = state.rooms.get_mut(namespace) {
            room.add_extent(extent);
        }
        Ok(true)
    }

    /// Reads a block. `None` when it is not there, or not right any more: then it is forgotten.
    pub fn get(&self, namespace: &str, hash: &BlockHash) -> Option<Vec<u8>> {
        let read = Mutex::new(None);
        self.get_all(namespace, &[*hash], &|_, bytes| {
            *read.lock() = Some(bytes.to_vec());
        });
        read.into_inner()
    }

    /// Reads blocks, several at a time, and gives each that is right to `take`, with its index in `hashes`, in any order and on any
    /// thread. Those that are not there are left out, and those that are not right any more are forgotten.
    pub fn get_all(
        &self,
        namespace: &str,
        hashes: &[BlockHash],
        take: &(dyn Fn(usize, &[u8]) + Sync),
    ) {
        let Some((geometry, block_bytes, wanted)) = self.begin_reading(namespace, hashes) else {
            return;
        };
        let runs = runs(wanted, geometry.slot_bytes);
        let next = AtomicUsize::new(0);
        let read = || {
            let mut pages = Aligned::default();
            while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                self.read_run(
                    namespace,
                    &geometry,
                    block_bytes as usize,
                    run,
                    &mut pages,
                    take,
                );
            }
        };
        thread::scope(|scope| {
            for _ in 1..READERS.min(runs.len()) {
                // Where the system gives no thread, this one reads all.
                let _ = thread::Builder::new().spawn_scoped(scope, read);
            }
            read();
        });
    }

    /// Finds blocks, and keeps them in place until they are read.
    fn begin_reading(
        &self,
        namespace: &str,
        hashes: &[BlockHash],
    ) -> Option<(Geometry, u64, Vec<Wanted>)> {
        let mut state = self.state.lock();
        let State { extents, rooms, .. } = &mut *state;
        let room = rooms.get_mut(namespace)?;
        let mut wanted = Vec::with_capacity(hashes.len());
        for (index, hash) in hashes.iter().enumerate() {
            let Some(id) = room.find(hash) else { continue };
            let Some((spot, checksum)) = room.begin_reading(id) else {
                continue;
            };
            match &extents[spot.extent as usize] {
                Some(extent) => wanted.push(Wanted {
                    index,
                    id,
                    spot,
                    checksum,
                    generation: extent.generation,
                }),
                None => room.end_reading(id),
            }
        }
        Some((*room.geometry(), room.block_bytes(), wanted))
    }

    /// Reads blocks that lie side by side.
    fn read_run(
        &self,
        namespace: &str,
        geometry: &Geometry,
        block_bytes: usize,
        run: &[Wanted],
        pages: &mut Aligned,
        take: &(dyn Fn(usize, &[u8]) + Sync),
    ) {
        let slot_bytes = geometry.slot_bytes as usize;
        let Some(first) = run.first() else { return };
        pages.fit(run.len() * slot_bytes);
        let extent_at = self.extent_at(first.spot.extent);
        let at = extent_at + geometry.slot_at(first.spot.slot);
        let read = self.file.read_large(at, pages.get_mut());
        for (block, slot) in run.iter().zip(pages.get_mut().chunks_exact_mut(slot_bytes)) {
            if read.is_err() && run.len() > 1 {
                // Only one of them may be broken.
                let at = extent_at + geometry.slot_at(block.spot.slot);
                let again = self.file.read_large(at, slot);
                self.end_reading(namespace, block, &slot[..block_bytes], &again, take);
            } else {
                self.end_reading(namespace, block, &slot[..block_bytes], &read, take);
            }
        }
    }

    /// Gives out a block that is right, and forgets one that is not.
    fn end_reading(
        &self,
        namespace: &str,
        block: &Wanted,
        bytes: &[u8],
        read: &io::Result<()>,
        take: &(dyn Fn(usize, &[u8]) + Sync),
    ) {
        let Wanted {
            id,
            spot,
            generation,
            ..
        } = *block;
        let right = read.is_ok() && format::checksum(bytes, generation) == block.checksum;
        let entry_at = self.extent_at(spot.extent) + Geometry::entry_at(spot.slot);
        let mut state = self.state.lock();
        let clock = state.clock + 1;
        let Some(room) = state.rooms.get_mut(namespace) else {
            return;
        };
        room.end_reading(id);
        if right {
            let entry = room.found(id, clock);
            state.clock = clock;
            state.counts.read_blocks += 1;
            state.counts.read_bytes += bytes.len() as u64;
            drop(state);
            // Only for its order after a restart.
            let _ = (self.file).write_small(entry_at, &entry.write(generation, spot.slot));
            take(block.index, bytes);
            return;
        }
        if room.is_idle(id) {
            let hash = room.lose(id);
            state.news.push((namespace.into(), hash));
        }
        let path = self.file.path().display();
        match read {
            Ok(()) => {
                state.counts.corrupt_blocks += 1;
                warn!(%path, ?spot, "a block's bytes on disk are not those that were written: it is forgotten");
            }
            Err(error) => {
                state.counts.failed_blocks += 1;
                warn!(%path, ?spot, %error, "a block cannot be read from disk: it is forgotten");
            }
        }
        drop(state);
        let _ = self.file.write_small(entry_at, &[0; format::ENTRY]);
    }

    /// Says that these blocks follow one another.
    pub fn follow(&self, namespace: &str, hashes: &[BlockHash]) {
        if let Some(room) = self.state.lock().rooms.get_mut(namespace) {
            room.follow(hashes);
        }
    }

    /// The layers of a namespace's blocks, if there are any.
    pub fn layers(&self, namespace: &str) -> Option<Vec<u64>> {
        let state = self.state.lock();
        let room = state.rooms.get(namespace)?;
        Some(room.layer_bytes().to_vec())
    }

    /// All namespaces, the one that was used last first, each with the blocks that can be found, in the order in which they were used.
    /// What came or went until now is no news any more.
    pub fn all(&self) -> Vec<(Arc<str>, Vec<BlockHash>)> {
        let mut state = self.state.lock();
        state.news.clear();
        let rooms = state.rooms.iter();
        let mut all: Vec<_> = rooms
            .map(|(name, room)| (Reverse(room.last_used()), Arc::clone(name), room.uses()))
            .collect();
        // There may be millions of blocks: others need not wait for their order.
        drop(state);
        all.sort_unstable_by_key(|(used, ..)| *used);
        let in_order = |mut uses: Vec<(u64, BlockHash)>| {
            uses.sort_unstable_by_key(|(used, _)| *used);
            uses.into_iter().map(|(_, hash)| hash).collect()
        };
        all.into_iter()
            .map(|(_, name, uses)| (name, in_order(uses)))
            .collect()
    }

    /// What came or went since this was asked last, by namespace: what can be found now, and what cannot, or could not for a while.
    pub fn news(&self) -> BTreeMap<Arc<str>, News> {
        let mut state = self.state.lock();
        let mut told: BTreeMap<Arc<str>, News> = BTreeMap::new();
        let mut times: HashMap<(Arc<str>, BlockHash), u32> = HashMap::new();
        for (namespace, hash) in std::mem::take(&mut state.news) {
            let times = times.entry((Arc::clone(&namespace), hash)).or_default();
            *times += 1;
            let room = state.rooms.get(&namespace);
            let there = room.is_some_and(|room| room.has(&hash));
            let news = told.entry(namespace).or_default();
            match (*times, there) {
                (1, true) => news.stored.push(hash),
                (1, false) => news.dropped.push(hash),
                // It went and came again.
                (2, true) => news.dropped.push(hash),
                _ => {}
            }
        }
        told
    }

    /// What it has and what it has done.
    pub fn stats(&self) -> StoreStats {
        let state = self.state.lock();
        let extents = state.extents.iter().flatten().count() as u64;
        StoreStats {
            blocks: state.blocks(),
            used_bytes: PAGE + extents * self.extent_bytes,
            ..state.counts
        }
    }

    /// Why nothing is written now, or less is kept than may be, for people.
    pub fn problem(&self) -> Option<String> {
        let state = self.state.lock();
        let trouble = state.trouble.as_ref();
        let problem = trouble.map(|trouble| trouble.problem.clone());
        problem.or_else(|| state.bounded.clone())
    }

    /// Waits until what was written has reached the disk.
    pub fn sync(&self) {
        if !std::mem::take(&mut self.state.lock().unsynced) {
            return;
        }
        if let Err(error) = self.file.sync() {
            self.state.lock().in_trouble(&self.file, &error);
        }
    }
}

/// Blocks of a namespace that came or went.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// What was there before and went. It comes before what is stored, where some of it may be again.
    pub dropped: Vec<BlockHash>,
    /// Can be found now.
    pub stored: Vec<BlockHash>,
}

/// Checks the first page, or writes one. Gives the bytes of an extent.
fn first_page(file: &BlockFile, config: &StoreConfig) -> Result<u64> {
    let refuse = |problem: String| {
        let path = file.path().display();
        Err(Error::config("path", format!("{path} {problem}")))
    };
    let present = file.bytes().map_err(|error| unusable(file, &error))?;
    if present > 0 {
        let mut page = vec![0; PAGE as usize];
        let read = file.read_small(0, &mut page);
        match Superblock::read(&page) {
            FirstPage::Whole(first) if first.tenant == config.tenant => {
                return Ok(first.extent_bytes);
            }
            FirstPage::Whole(first) => {
                return refuse(format!(
                    "holds blocks of the tenant {:?}, and this is {:?}: use another directory",
                    first.tenant, config.tenant
                ));
            }
            FirstPage::OtherVersion(version) => {
                return refuse(format!(
                    "has layout version {version}, and this program reads and writes {}: delete it, or use another directory",
                    format::VERSION
                ));
            }
            FirstPage::Foreign if read.is_ok() => {
                return refuse(
                    "is not a file of SwiftCache's blocks: use another directory".to_owned(),
                );
            }
            FirstPage::Foreign | FirstPage::Damaged => {
                warn!(path = %file.path().display(), "the file's first page is damaged: it begins anew, empty");
                file.truncate(0).map_err(|error| unusable(file, &error))?;
            }
        }
    }
    let first = Superblock {
        extent_bytes: format::extent_bytes(config.bytes),
        tenant: config.tenant.clone(),
    };
    let page = first
        .write()
        .ok_or_else(|| Error::config("tenant", "is too long"))?;
    file.write_small(0, &page)
        .and_then(|()| file.sync())
        .map_err(|error| unusable(file, &error))?;
    Ok(first.extent_bytes)
}

/// Whether there is no more room, which is no trouble of the disk.
fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), FileTooLarge | QuotaExceeded | StorageFull)
}

fn unusable(file: &BlockFile, error: &io::Error) -> Error {
    let path = file.path().display();
    Error::config("path", format!("{path} cannot be used: {error}"))
}

impl State {
    fn blocks(&self) -> u64 {
        self.rooms.values().map(Room::blocks).sum()
    }

    fn gone(&mut self, namespace: &str, gone: impl IntoIterator<Item = Gone>) {
        for hash in gone {
            self.counts.evicted_blocks += 1;
            self.news.push((namespace.into(), hash));
        }
    }

    /// An extent of another room, empty. One that has less than its part takes from whoever has most; else a room takes from one
    /// that nobody has used since its own coldest block was used.
    fn taken_from_another(&mut self, namespace: &str) -> Option<u32> {
        let (have, coldest) = match self.rooms.get(namespace) {
            Some(room) => (room.extents(), room.coldest()),
            None => (0, None),
        };
        let part = self.extents.len() / self.rooms.len().max(1);
        let others = self
            .rooms
            .iter()
            .filter(|(name, room)| ***name != *namespace && room.extents() > 0);
        let from = match have < part {
            true => {
                let most = others.max_by_key(|(_, room)| room.extents());
                most.filter(|(_, room)| room.extents() > have + 1)
            }
            false => {
                let stalest = others.min_by_key(|(_, room)| room.last_used());
                stalest
                    .filter(|(_, room)| coldest.is_some_and(|coldest| room.last_used() < coldest))
            }
        };
        let from = Arc::clone(from?.0);
        let room = self.rooms.get_mut(&from)?;
        let (extent, gone) = room.give_extent()?;
        if room.extents() == 0 {
            self.rooms.remove(&from);
        }
        self.extents[extent as usize] = None;
        self.gone(&from, gone);
        Some(extent)
    }

    /// The disk did not take something: it is left alone for a while.
    fn in_trouble(&mut self, file: &BlockFile, error: &io::Error) {
        let before = self.trouble.as_ref();
        let pause = before.map_or(PAUSE, |trouble| (2 * trouble.pause).min(PAUSE_MOST));
        let problem = format!("cannot write to {}: {error}", file.path().display());
        if before.is_none_or(|trouble| trouble.problem != problem) {
            warn!(problem, ?pause, "the disk takes no blocks");
        }
        self.trouble = Some(Trouble {
            problem,
            pause,
            until: Instant::now() + pause,
        });
    }

    /// The file cannot become larger. What there is of it is used on.
    fn in_trouble_growing(&mut self, file: &BlockFile, error: &io::Error) {
        let extents = self.extents.iter().flatten().count();
        let problem = format!(
            "{} cannot grow beyond {} bytes, which are used on: {error}",
            file.path().display(),
            file.bytes().unwrap_or(0)
        );
        // It is not tried again before the next start: somebody else has the space.
        let most = self
            .extents
            .iter()
            .rposition(Option::is_some)
            .map_or(0, |last| last + 1);
        self.extents.truncate(most);
        warn!(problem, extents, "the disk takes fewer blocks than it may");
        self.bounded = Some(problem);
    }
}
