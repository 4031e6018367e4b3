//! The agent of a disk: it moves blocks between host memory that donors lend and a file.
//!
//! It is a borrower like any other, of its own tenant: what it writes it has found and read as a replica does, and what it brings
//! back it stores and publishes in host memory that it has leased. The broker tells it which blocks, and passes no byte.
//!
//! Two threads share the file. One writes what has come to host memory, the other brings back what a lookup wanted, so that a wanted
//! block waits for no writing. Each has borrowers of its own, one for each namespace, for as long as there is something to do for it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use swiftcache_proto::{
    convert::{MAX_PROBLEM_BYTES, reorders},
    domain::{BlockHash, DeviceUuid},
    v1,
};
use tracing::{debug, warn};

use super::{
    store::{DiskStore, StoreConfig, StoreStats},
    telling::{Agent, Telling},
};
use crate::{
    Error, Result,
    cache::{Borrower, BorrowerConfig, Layout, PagedKv, PagedLayer},
    device::{CopyStream, DeviceLayer},
    session::{DiskBlocks, DiskCall, DiskWork, Session},
    threads::Threads,
};

/// How long the broker may wait with its answer when there is nothing to do.
const WAIT: Duration = Duration::from_millis(1_000);
/// How long a thread pauses when the broker could not be told or asked.
const AGAIN: Duration = Duration::from_millis(100);
/// How long a wanted block waits for host memory to be leased, once for each batch.
const ROOM: Duration = Duration::from_millis(500);
const NAP: Duration = Duration::from_millis(5);
/// How often a block that is to be written is looked for.
const TRIES: u32 = 4;
/// Bytes that are moved at a time, at least one block.
const BATCH_BYTES: u64 = 32 << 20;
/// Blocks that are moved at a time at most.
const BATCH: u64 = 64;
/// A namespace for which there was nothing to do for so long has no borrower any more.
const IDLE: Duration = Duration::from_secs(60);
/// How often it is seen to that what was written reaches the disk.
const SYNC: Duration = Duration::from_secs(5);

/// What an agent does, and where.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// The disk's name: `DISK-0`.
    pub name: String,
    /// The file.
    pub store: StoreConfig,
    /// The node of host memory that it works in: `HOST-n`.
    pub device: DeviceUuid,
    /// The most host memory that it leases for blocks of one namespace that were wanted back, bytes.
    pub memory_bytes: u64,
}

/// A disk that is lent. Ends when it is dropped: then what it has published is left to the tenant's engines.
#[derive(Debug)]
pub struct DiskAgent {
    shared: Arc<Shared>,
    threads: Threads,
}

struct Shared {
    session: Session,
    layer: Arc<dyn DeviceLayer>,
    config: DiskConfig,
    store: DiskStore,
    /// The whole name of the file's directory, for people.
    path: String,
    telling: Telling,
    bytes_per_second: AtomicU64,
    closing: AtomicBool,
    /// Why nothing comes back.
    problem: Mutex<Option<String>>,
}

/// The borrowers of one thread.
struct Hands<'a> {
    shared: &'a Shared,
    stream: Arc<dyn CopyStream>,
    /// The most host memory that each leases, bytes.
    memory_bytes: u64,
    by_namespace: BTreeMap<String, Hand>,
}

/// A borrower of one namespace, and the memory that it loads to and stores from.
struct Hand {
    borrower: Arc<Borrower>,
    kv: PagedKv,
    layer_bytes: Vec<u64>,
    used: Instant,
}

impl Hand {
    fn block_bytes(&self) -> u64 {
        self.layer_bytes.iter().sum()
    }
}

impl DiskAgent {
    /// Opens the file, and begins.
    ///
    /// # Errors
    /// When the file cannot be used: see [`DiskStore::open`]; or when the system gives no threads.
    pub fn start(
        session: Session,
        layer: Arc<dyn DeviceLayer>,
        config: DiskConfig,
    ) -> Result<Self> {
        crate::check::check_device(&*layer, &config.device)?;
        let store = DiskStore::open(&config.store)?;
        let path = &config.store.path;
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
        let streams = [layer.stream(&config.device)?, layer.stream(&config.device)?];
        let shared = Arc::new(Shared {
            session,
            layer,
            store,
            path: shown(&path.to_string_lossy()),
            telling: Telling::new(config.name.clone()),
            config,
            bytes_per_second: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            problem: Mutex::new(None),
        });
        let mut threads = Threads::new();
        let [writing, reading] = streams;
        let its = Arc::clone(&shared);
        threads.start("swiftcache-disk-write", move || its.write_loop(writing))?;
        let its = Arc::clone(&shared);
        threads.start("swiftcache-disk-read", move || its.read_loop(reading))?;
        Ok(Self { shared, threads })
    }

    /// What it has and what it has done.
    pub fn stats(&self) -> StoreStats {
        self.shared.store.stats()
    }

    /// Why it takes or gives no blocks now, or keeps fewer than it may, for people.
    pub fn problem(&self) -> Option<String> {
        self.shared.problem()
    }
}

impl Drop for DiskAgent {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Relaxed);
        self.threads.join();
        self.shared.store.sync();
    }
}

/// Text as the broker takes it: a path may hold any character, and be longer.
fn shown(text: &str) -> String {
    let plain = text.chars().map(
        |character| match character.is_control() || reorders(character) {
            true => char::REPLACEMENT_CHARACTER,
            false => character,
        },
    );
    let mut plain: String = plain.collect();
    plain.truncate(plain.floor_char_boundary(MAX_PROBLEM_BYTES));
    plain
}

impl Shared {
    fn problem(&self) -> Option<String> {
        let own = self.problem.lock().clone();
        let unconnected = || self.session.problem();
        let untold = || self.telling.problem();
        (self.store.problem())
            .or(own)
            .or_else(untold)
            .or_else(unconnected)
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    fn call(&self) -> DiskCall {
        DiskCall {
            name: self.config.name.clone(),
            ..DiskCall::default()
        }
    }

    /// Waits for something to do. `None` after a pause when the broker cannot be asked.
    fn take(&self, take_to_store: u32, take_wanted: u32) -> Option<DiskWork> {
        if !self.telling.tell(&self.store, self) {
            std::thread::sleep(AGAIN);
            return None;
        }
        let call = DiskCall {
            take_to_store,
            take_wanted,
            wait: WAIT,
            ..self.call()
        };
        match self.session.disk(call).wait() {
            Ok(work) => Some(work),
            Err(error) => {
                debug!(%error, "the disk was told nothing to do");
                std::thread::sleep(AGAIN);
                None
            }
        }
    }

    fn write_loop(&self, stream: Arc<dyn CopyStream>) {
        // It reads others' memory, and leases none.
        let mut hands = Hands::new(self, stream, 0);
        let mut synced = Instant::now();
        while !self.is_closing() {
            let work = self.take(BATCH as u32, 0).unwrap_or_default();
            for blocks in &work.to_store {
                hands.write(blocks);
            }
            if synced.elapsed() >= SYNC {
                self.store.sync();
                synced = Instant::now();
            }
            hands.close_idle();
        }
    }

    fn read_loop(&self, stream: Arc<dyn CopyStream>) {
        let mut hands = Hands::new(self, stream, self.config.memory_bytes);
        while !self.is_closing() {
            let work = self.take(0, BATCH as u32).unwrap_or_default();
            for blocks in &work.wanted {
                hands.bring_back(blocks);
            }
            hands.close_idle();
        }
    }
}

impl Agent for Shared {
    fn epoch(&self) -> u64 {
        self.session.epoch()
    }

    fn state(&self) -> v1::DiskState {
        let stats = self.store.stats();
        v1::DiskState {
            bytes: stats.bytes,
            used_bytes: stats.used_bytes,
            memory_bytes: self.config.memory_bytes,
            bytes_per_second: self.bytes_per_second.load(Ordering::Relaxed),
            problem: shown(&self.problem().unwrap_or_default()),
            written_blocks: stats.written_blocks,
            read_blocks: stats.read_blocks,
            corrupt_blocks: stats.corrupt_blocks,
            failed_blocks: stats.failed_blocks,
            evicted_blocks: stats.evicted_blocks,
            path: self.path.clone(),
        }
    }

    fn say(&self, call: DiskCall) -> Result<()> {
        self.session.disk(call).wait().map(drop)
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

impl<'a> Hands<'a> {
    fn new(shared: &'a Shared, stream: Arc<dyn CopyStream>, memory_bytes: u64) -> Self {
        Self {
            shared,
            stream,
            memory_bytes,
            by_namespace: BTreeMap::new(),
        }
    }

    fn close_idle(&mut self) {
        self.by_namespace
            .retain(|_, hand| hand.used.elapsed() < IDLE);
    }

    /// The borrower of a namespace. One of another layout is closed first.
    fn hand(&mut self, namespace: &str, layer_bytes: &[u64]) -> Result<&Hand> {
        let known = self.by_namespace.get(namespace);
        if known.is_none_or(|hand| hand.layer_bytes != layer_bytes) {
            self.by_namespace.remove(namespace);
            let hand = self.open(namespace, layer_bytes)?;
            self.by_namespace.insert(namespace.to_owned(), hand);
        }
        let missing = || Error::config("namespace", "has no borrower");
        let hand = self.by_namespace.get_mut(namespace).ok_or_else(missing)?;
        hand.used = Instant::now();
        Ok(hand)
    }

    fn open(&self, namespace: &str, layer_bytes: &[u64]) -> Result<Hand> {
        let device = self.shared.config.device.clone();
        let layout = Layout {
            namespace: namespace.to_owned(),
            layer_bytes: layer_bytes.to_vec(),
        };
        let block_bytes = layout.block_bytes();
        let mut config = BorrowerConfig::new(device.clone(), layout, 0);
        config.max_host_leased_bytes = self.memory_bytes;
        config.lease_step_bytes = self.memory_bytes.max(1);
        config.lookup_limit = WAIT;
        // What engines have left is their heirs'.
        config.inherit = false;
        let layer = Arc::clone(&self.shared.layer);
        let borrower = Borrower::open(Some(self.shared.session.clone()), layer, config)?;
        let blocks = (BATCH_BYTES / block_bytes.max(1)).clamp(1, BATCH);
        let memory = self
            .shared
            .layer
            .allocate_host(&device, blocks * block_bytes)?;
        // Block by block, as they lie on the disk.
        let mut offset = 0;
        let layers = layer_bytes.iter().map(|bytes| {
            let layer = PagedLayer {
                memory: memory.clone(),
                offset,
                block_stride: block_bytes,
            };
            offset += bytes;
            layer
        });
        Ok(Hand {
            kv: PagedKv {
                layers: layers.collect(),
                blocks: blocks as u32,
            },
            borrower,
            layer_bytes: layer_bytes.to_vec(),
            used: Instant::now(),
        })
    }

    /// Writes blocks that lie in host memory, as far as they still do.
    fn write(&mut self, blocks: &DiskBlocks) {
        let (shared, stream) = (self.shared, Arc::clone(&self.stream));
        let namespace = &blocks.namespace;
        let layers = match blocks.layer_bytes.is_empty() {
            true => shared.store.layers(namespace),
            false => Some(blocks.layer_bytes.clone()),
        };
        let Some(layers) = layers else { return };
        let hand = match self.hand(namespace, &layers) {
            Ok(hand) => hand,
            Err(error) => {
                warn!(namespace, %error, "blocks of this namespace are not written to disk");
                return;
            }
        };
        let mut left = blocks.hashes.clone();
        for _ in 0..TRIES {
            if left.is_empty() || shared.is_closing() {
                return;
            }
            left = write_once(hand, &stream, shared, namespace, &layers, &left);
        }
        debug!(
            namespace,
            blocks = left.len(),
            "gone before they were written"
        );
    }

    /// Brings wanted blocks to host memory, in their order. A block that is wrong on the disk is not there, and so nothing behind it
    /// is of use.
    fn bring_back(&mut self, blocks: &DiskBlocks) {
        let (shared, stream) = (self.shared, Arc::clone(&self.stream));
        let namespace = &blocks.namespace;
        let Some(layers) = shared.store.layers(namespace) else {
            return;
        };
        let hand = match self.hand(namespace, &layers) {
            Ok(hand) => hand,
            Err(error) => {
                warn!(namespace, %error, "blocks of this namespace do not come back from disk");
                return;
            }
        };
        shared.store.follow(namespace, &blocks.hashes);
        let block_bytes = hand.block_bytes();
        for batch in blocks.hashes.chunks(hand.kv.blocks as usize) {
            let began = Instant::now();
            let memory = &hand.kv.layers[0].memory;
            let came: Mutex<Vec<usize>> = Mutex::default();
            shared.store.get_all(namespace, batch, &|index, bytes| {
                if stream
                    .write(memory, index as u64 * block_bytes, bytes)
                    .is_ok()
                {
                    came.lock().push(index);
                }
            });
            let mut came = came.into_inner();
            came.sort_unstable();
            let stored: Vec<(BlockHash, u32)> = came
                .into_iter()
                .map(|index| (batch[index], index as u32))
                .collect();
            if store_all(hand, &stored, shared) {
                *shared.problem.lock() = None;
                shared.came_back(stored.len() as u64 * block_bytes, began.elapsed());
            }
            if shared.is_closing() {
                return;
            }
        }
    }
}

/// Writes those of the blocks that are found and read in time. Gives the others: they have left host memory meanwhile, or this
/// process or the broker was too slow.
fn write_once(
    hand: &Hand,
    stream: &Arc<dyn CopyStream>,
    shared: &Shared,
    namespace: &str,
    layers: &[u64],
    hashes: &[BlockHash],
) -> Vec<BlockHash> {
    let block_bytes = hand.block_bytes();
    let memory = &hand.kv.layers[0].memory;
    let mut bytes = vec![0; block_bytes as usize];
    let mut others = Vec::new();
    let mut left = hashes;
    while let (Some(first), false) = (left.first(), shared.is_closing()) {
        let hit = hand.borrower.lookup_within(left, WAIT);
        let count = hit.blocks().min(hand.kv.blocks);
        if count == 0 {
            others.push(*first);
            left = &left[1..];
            continue;
        }
        let places: Vec<u32> = (0..count).collect();
        let loaded = hand.borrower.load(&hit, &places, &hand.kv).finish();
        drop(hit);
        for place in 0..count {
            let hash = left[place as usize];
            let at = u64::from(place) * block_bytes;
            let read =
                !loaded.failed.contains(&place) && stream.read(memory, at, &mut bytes).is_ok();
            if !read {
                others.push(hash);
                continue;
            }
            // In which order they were published says nothing of which follows which: lookups do.
            let put = shared.store.put(namespace, layers, hash, None, &bytes);
            debug!(namespace, ?hash, ?put, "from host memory");
        }
        left = &left[count as usize..];
    }
    others
}

/// Stores blocks in leased host memory, and waits a moment for some to be leased. True when all of them are there.
fn store_all(hand: &Hand, blocks: &[(BlockHash, u32)], shared: &Shared) -> bool {
    let deadline = Instant::now() + ROOM;
    while !blocks.is_empty() {
        let stored = hand.borrower.store(blocks, &hand.kv, &|_| None).finish();
        if stored.unplaced == 0 {
            return true;
        }
        if Instant::now() >= deadline || shared.is_closing() {
            let problem = "no host memory is to be had for what lookups want: lend some (swiftcache donate --device HOST-0)";
            *shared.problem.lock() = Some(problem.to_owned());
            return false;
        }
        std::thread::sleep(NAP);
    }
    false
}

impl Shared {
    /// Takes note of how fast blocks come back: half of what is known is this.
    fn came_back(&self, bytes: u64, took: Duration) {
        let micros = (took.as_micros() as u64).max(1);
        let rate = bytes.saturating_mul(1_000_000) / micros;
        let known = self.bytes_per_second.load(Ordering::Relaxed);
        let now = match known {
            0 => rate,
            known => known / 2 + rate / 2,
        };
        self.bytes_per_second.store(now.max(1), Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DiskAgent({})", self.config.name)
    }
}
