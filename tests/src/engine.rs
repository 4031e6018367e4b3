//! An engine whose KV bytes are a function of block and layer, so that every byte that it gets back can be checked.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::{
    cache::{Borrower, BorrowerConfig, Hit, Layout, PagedKv, PagedLayer, Stored},
    device::{CopyStream, DeviceLayer, Ticket},
    session::Session,
};
use swiftcache_proto::domain::{BlockHash, DeviceUuid, HandleKind};

use crate::PATIENCE;

/// Bytes of a block in each layer.
pub const LAYERS: [u64; 4] = [4096, 2048, 8192, 2048];
/// Bytes of a block.
pub const BLOCK_BYTES: u64 = 16 << 10;
/// Bytes of a slab: 16 blocks.
pub const SLAB_BYTES: u64 = 16 * BLOCK_BYTES;
/// Blocks in an engine's pool. Sequences are computed in the lower half, and loaded into the upper half.
pub const POOL: u32 = 256;

/// The default namespace of engines.
pub const NAMESPACE: &str = "an engine under test";

/// An engine with its own pool and borrower.
#[derive(Debug)]
pub struct Engine {
    stream: Arc<dyn CopyStream>,
    kv: PagedKv,
    /// Its borrower.
    pub borrower: Arc<Borrower>,
}

/// The result of a fetch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fetched {
    /// Blocks that the lookup found.
    pub found: u32,
    /// How many of them were loaded. All their bytes were right.
    pub served: u32,
}

/// The hash of block `n`.
pub fn hash(n: u32) -> BlockHash {
    let mut bytes = [0xb1; 16];
    bytes[..4].copy_from_slice(&n.to_le_bytes());
    BlockHash(bytes)
}

/// The bytes of block `n` in a layer.
pub fn pattern(n: u32, layer: usize) -> Vec<u8> {
    let mut word = (u64::from(n) << 8 | layer as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut bytes = Vec::with_capacity(LAYERS[layer] as usize);
    while bytes.len() < LAYERS[layer] as usize {
        word = (word ^ (word >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// A borrower's settings for this engine: it leases up to `slabs` slabs, one at a time.
pub fn config(device: DeviceUuid, slabs: u64) -> BorrowerConfig {
    let layout = Layout {
        namespace: NAMESPACE.to_owned(),
        layer_bytes: LAYERS.to_vec(),
    };
    let mut config = BorrowerConfig::new(device, layout, slabs * SLAB_BYTES);
    config.lease_step_bytes = SLAB_BYTES;
    config.lookup_limit = PATIENCE;
    config.drain.move_for = PATIENCE;
    config
}

/// As [`config`], with up to `host_slabs` slabs of donors' host memory besides.
pub fn config_with_host(device: DeviceUuid, slabs: u64, host_slabs: u64) -> BorrowerConfig {
    let mut config = config(device, slabs);
    config.max_host_leased_bytes = host_slabs * SLAB_BYTES;
    config
}

impl Engine {
    /// An engine with a pool on the borrower's device. On CUDA the pool is in HBM, otherwise in host memory.
    ///
    /// # Errors
    /// When the pool or the borrower cannot be created.
    pub fn new(
        session: Option<Session>,
        layer: Arc<dyn DeviceLayer>,
        config: BorrowerConfig,
    ) -> Result<Self> {
        let borrower = Borrower::open(session, Arc::clone(&layer), config)?;
        Self::over(borrower, layer.as_ref())
    }

    /// Another engine thread, with its own pool, that shares a borrower with others.
    ///
    /// # Errors
    /// When the pool cannot be created.
    pub fn over(borrower: Arc<Borrower>, layer: &dyn DeviceLayer) -> Result<Self> {
        let device = borrower.config().device.clone();
        let real = layer.name() == "cuda";
        let layers = LAYERS
            .iter()
            .map(|layer_bytes| {
                let bytes = u64::from(POOL) * layer_bytes;
                Ok(PagedLayer {
                    // The HBM of a simulated device is counted, and tests expect that only donors use it.
                    memory: match real {
                        // As most engines allocate: with `cudaMalloc`.
                        true => layer.allocate(&device, bytes, HandleKind::CudaIpc)?,
                        false => layer.allocate_host(&device, bytes)?,
                    },
                    offset: 0,
                    block_stride: *layer_bytes,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            stream: layer.stream(&device)?,
            kv: PagedKv {
                layers,
                blocks: POOL,
            },
            borrower,
        })
    }

    /// The engine's pool.
    pub fn kv(&self) -> &PagedKv {
        &self.kv
    }

    /// Leases `slabs` slabs now. Tries until donors have offered that much.
    ///
    /// # Errors
    /// When they have not within [`PATIENCE`].
    pub fn reserve(&self, slabs: u64) -> Result<()> {
        eventually("slabs to lease", || {
            Ok(self.borrower.reserve(slabs * SLAB_BYTES) >= slabs * SLAB_BYTES)
        })
    }

    /// Writes the bytes of block `n` into pool block `block`, as computing it would.
    ///
    /// # Errors
    /// When the device layer fails.
    pub fn compute(&self, n: u32, block: u32) -> Result<()> {
        for (layer, kv) in self.kv.layers.iter().enumerate() {
            let at = u64::from(block) * kv.block_stride;
            self.stream.write(&kv.memory, at, &pattern(n, layer))?;
        }
        Ok(())
    }

    /// Whether pool block `block` holds the bytes of block `n` in a layer.
    ///
    /// # Errors
    /// When the device layer fails.
    pub fn holds(&self, n: u32, layer: usize, block: u32) -> Result<bool> {
        let kv = &self.kv.layers[layer];
        let mut bytes = vec![0; LAYERS[layer] as usize];
        let at = u64::from(block) * kv.block_stride;
        self.stream.read(&kv.memory, at, &mut bytes)?;
        Ok(bytes == pattern(n, layer))
    }

    /// A mark for each layer, as of a forward whose layers are computed one after the other.
    ///
    /// # Errors
    /// When the device layer fails.
    pub fn marks(&self) -> Result<Vec<Ticket>> {
        let marks = LAYERS.iter().map(|_| Ok(self.stream.record()?));
        marks.collect()
    }

    /// Flips one bit of a pool block.
    ///
    /// # Errors
    /// When the device layer fails.
    pub fn corrupt(&self, layer: usize, block: u32) -> Result<()> {
        let kv = &self.kv.layers[layer];
        let at = u64::from(block) * kv.block_stride + LAYERS[layer] / 2;
        let mut byte = [0];
        self.stream.read(&kv.memory, at, &mut byte)?;
        byte[0] ^= 1;
        Ok(self.stream.write(&kv.memory, at, &byte)?)
    }

    /// Computes a sequence and stores it.
    ///
    /// # Errors
    /// When the device layer fails.
    pub fn store(&self, sequence: &[u32]) -> Result<Stored> {
        for (n, block) in sequence.iter().zip(0..) {
            self.compute(*n, block)?;
        }
        Ok(self.store_computed(sequence))
    }

    /// Stores the pool's first blocks, with whatever bytes they hold, as a sequence.
    pub fn store_computed(&self, sequence: &[u32]) -> Stored {
        let blocks: Vec<_> = sequence.iter().map(|n| hash(*n)).zip(0..).collect();
        self.borrower.store(&blocks, &self.kv, &|_| None).finish()
    }

    /// Looks a sequence up. Waits until replicas' slabs are mapped.
    pub fn lookup(&self, sequence: &[u32]) -> Hit {
        let hashes: Vec<_> = sequence.iter().map(|n| hash(*n)).collect();
        self.borrower.lookup_within(&hashes, PATIENCE)
    }

    /// Looks a sequence up, loads the blocks that are found, and checks every byte of the blocks that did not fail.
    ///
    /// # Errors
    /// When a byte is wrong.
    pub fn fetch(&self, sequence: &[u32]) -> Result<Fetched> {
        let hit = self.lookup(sequence);
        self.load(&hit, sequence)
    }

    /// Loads a hit into the pool's upper half, and checks every byte of the blocks that did not fail.
    ///
    /// # Errors
    /// When a byte is wrong.
    pub fn load(&self, hit: &Hit, sequence: &[u32]) -> Result<Fetched> {
        let blocks: Vec<u32> = (POOL / 2..POOL).take(hit.blocks() as usize).collect();
        // Old bytes in the blocks must not look like loaded bytes.
        for block in &blocks {
            self.compute(u32::MAX, *block)?;
        }
        let load = self.borrower.load(hit, &blocks, &self.kv);
        for layer in 0..LAYERS.len() {
            let failed = load.wait_layer(layer).err().map(|error| error.failed);
            self.check(sequence, &blocks, &failed.unwrap_or_default(), layer)?;
        }
        let failed = load.finish().failed;
        Ok(Fetched {
            found: hit.blocks(),
            served: hit.blocks() - failed.len() as u32,
        })
    }

    fn check(&self, sequence: &[u32], blocks: &[u32], failed: &[u32], layer: usize) -> Result<()> {
        for ((n, block), index) in sequence.iter().zip(blocks).zip(0..) {
            if !failed.contains(&index) {
                let right = self.holds(*n, layer, *block)?;
                ensure!(right, "wrong bytes served: block {n}, layer {layer}");
            }
        }
        Ok(())
    }
}

/// Calls `holds` until it returns true.
///
/// # Errors
/// When it does not within [`PATIENCE`], or when it fails.
pub fn eventually(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !holds()? {
        let in_time = Instant::now() < deadline;
        in_time
            .then_some(())
            .with_context(|| format!("waited in vain for {what}"))?;
        // The pause only lets other processes run. Nothing depends on its length.
        std::thread::park_timeout(Duration::from_millis(2));
    }
    Ok(())
}
