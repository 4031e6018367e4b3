//! The cache: an engine's prefix KV blocks, by hash, in leased HBM, leased host memory and a bounded host tier of its own.
//!
//! The way of a block through this room:
//! * [`Borrower::store`] finds slots (`store`, `slots`, `evict`), copies layer by layer (`transfer`), and
//!   publishes when every byte is there (`settle`, `publish`);
//! * [`Borrower::lookup`] finds own blocks in the local mirror and replicas' through the broker (`lookup`);
//! * [`Borrower::load`] copies them back, layer by layer (`load`, `transfer`); [`Borrower::claim`] finds and holds at once what an
//!   engine is to rely on before the copies begin (`claim`);
//! * when a lease is asked back, hot blocks are moved out while there is time (`holder`, `rescue`), and the rest is forgotten.
//!
//! `blocks` says where each block lies, `shelf` who lies in each slot of a slab, and `value` what each block is worth. `model` is the
//! same without a node, for planners.
//!
//! Everything that could be wrong is a miss. No copy touches a slab unless it is registered with it while it is open
//! (`leases`), and a slot is written only when nobody can read it any more. The cache's lock (`state`) is taken before the leases'.

mod blocks;
mod claim;
mod config;
mod core;
mod evict;
mod heir;
mod hit;
mod holder;
mod keeper;
mod kept;
mod layout;
mod load;
mod lookup;
mod model;
mod news;
mod promote;
mod publish;
mod rescue;
mod settle;
mod shelf;
mod slots;
mod state;
mod stats;
mod store;
#[cfg(test)]
mod tests;
pub(crate) mod value;
mod write;

use std::{
    fmt,
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::{BlockHash, BorrowerId, LeaseClass, LinkKind};
use tracing::warn;

pub use claim::Claim;
pub use config::{BorrowerConfig, DrainPolicy};
pub use hit::{Hit, HitRun};
pub use layout::Layout;
pub use load::{Load, LoadError, Loaded};
pub use model::{CacheModel, ModelRun};
pub use stats::{BlocksByTier, BytesByLink, Latency, Stats};
pub use store::{Store, Stored};
pub use swiftcache_proto::domain::{Hold, Medium};
pub use value::Retention;

pub use crate::transfer::{PagedKv, PagedLayer, PoolSpan};

use self::{
    core::{Core, Inboxes, KeeperTask},
    holder::CacheHolder,
    load::Wanted,
    shelf::Shelf,
};
use crate::{
    Result,
    check::check_device,
    device::{DeviceLayer, Ticket},
    leases::{Holder, LeaseSettings, LeaseThreads, Leases},
    session::{Observer, Session},
    threads::Threads,
    transfer::{BlockArea, Pace, Routes},
};

/// How long closing a borrower waits for its last copies and calls.
const CLOSING: Duration = Duration::from_secs(10);

/// An engine's prefix KV cache in leased HBM and a bounded host tier. Used from any thread, but of the process that opened it
/// only: a child of `fork` finds nothing, loads and stores nothing, and has to open a borrower of its own.
///
/// Dropping it waits until its copies are known to be over, and gives its leases back: for ten seconds at most. Should the
/// device not say by then that they are, its threads go on until it does, and keep its leases and its session as long.
/// Blocks of the engine that a load or a store has not said are over must stay as they are even then.
pub struct Borrower {
    core: Arc<Core>,
    leasing: LeaseThreads,
    keeper: Threads,
    settler: Threads,
}

impl Borrower {
    /// Opens a borrower. Without a session it has its host tier only.
    ///
    /// # Errors
    /// For settings that cannot work, a device that is not there, or no room for the host tier.
    pub fn open(
        session: Option<Session>,
        layer: Arc<dyn DeviceLayer>,
        config: BorrowerConfig,
    ) -> Result<Arc<Self>> {
        config.check()?;
        check_device(&*layer, &config.device)?;
        let routes = Arc::new(Routes::new(Arc::clone(&layer), config.device.clone()));
        let settings = LeaseSettings {
            namespace: config.layout.namespace.clone(),
            device: config.device.clone(),
            layer_bytes: config.layout.layer_bytes.clone(),
            max_bytes: config.max_leased_bytes,
            max_host_bytes: config.max_host_leased_bytes,
            step_bytes: config.lease_step_bytes,
            class: LeaseClass::Cache,
            inherit: config.inherit,
        };
        let (leases, lease_inboxes) = Leases::new(
            session.clone(),
            Arc::clone(&layer),
            Arc::clone(&routes),
            settings,
        );
        let (core, inboxes) = Core::new(session, leases, routes, config);
        core.open_host_tier(layer.as_ref())?;
        if let Some(session) = &core.session {
            core.leases.observe(session);
            let observer: Arc<dyn Observer> = Arc::clone(&core) as _;
            session.observe(&observer);
        }
        let holder: Arc<dyn Holder> = Arc::new(CacheHolder::new(&core));
        let mut borrower = Self {
            leasing: LeaseThreads::start(&core.leases, &holder, lease_inboxes)?,
            keeper: Threads::new(),
            settler: Threads::new(),
            core,
        };
        borrower.start(inboxes)?;
        borrower.core.leases.grow_soon();
        Ok(Arc::new(borrower))
    }

    fn start(&mut self, inboxes: Inboxes) -> Result<()> {
        let Inboxes { keeper, leftovers } = inboxes;
        let core = Arc::clone(&self.core);
        (self.settler).start("swiftcache-settle", move || core.settle_loop(&leftovers))?;
        let core = Arc::clone(&self.core);
        (self.keeper).start("swiftcache-keep", move || core.keep_loop(&keeper))
    }

    /// Names it at the broker.
    pub fn id(&self) -> BorrowerId {
        self.core.id
    }

    /// What it was opened with.
    pub fn config(&self) -> &BorrowerConfig {
        &self.core.config
    }

    /// Leases up to `bytes` in all now, rather than as stores need them, and maps them; blocks. Returns the bytes it
    /// holds, which may be fewer.
    pub fn reserve(&self, bytes: u64) -> u64 {
        if !self.core.origin.is_here() {
            return 0;
        }
        self.core.leases.reserve(bytes)
    }

    /// Finds the longest prefix run of `hashes`, over own leases, replicas' leases and the host tier. Trouble with the
    /// broker is a miss, never an error.
    ///
    /// Blocks for one round trip to the broker when own blocks do not answer it whole and
    /// [`share`](BorrowerConfig::share) is set. Blocks in a replica's slab that is not mapped here yet are a miss, and the slab is
    /// mapped in the background.
    pub fn lookup(&self, hashes: &[BlockHash]) -> Hit {
        self.core.lookup(hashes, Some(Instant::now()), false)
    }

    /// Like [`lookup`](Self::lookup), but waits for the mapping, once for each replica's slab and for at most `patience` in all. For
    /// blocks that somebody was promised: computing them anew would take longer.
    pub fn lookup_within(&self, hashes: &[BlockHash], patience: Duration) -> Hit {
        let deadline = Some(Instant::now() + patience);
        self.core.lookup(hashes, deadline, false)
    }

    /// Like [`lookup_within`](Self::lookup_within), for blocks that an engine's scheduler found by
    /// [`Session::count_hits`]: what was asked and found is counted there, and not again here.
    pub fn lookup_promised(&self, hashes: &[BlockHash], patience: Duration) -> Hit {
        let deadline = Some(Instant::now() + patience);
        self.core.lookup(hashes, deadline, true)
    }

    /// Like [`lookup`](Self::lookup), but over own leases and the host tier only: asks nobody and waits for nothing.
    pub fn lookup_own(&self, hashes: &[BlockHash]) -> Hit {
        self.core.lookup(hashes, None, false)
    }

    /// Claims the longest prefix run of `hashes` in own leases of HBM, of which no slab is given back before it is loaded; asks nobody
    /// and waits for nothing. It ends before memory that goes with its donor (legacy handles), host memory, and memory behind PCIe.
    /// `None` if nothing is left, or more than `most_bytes` are. It is counted as a lookup when it is loaded.
    pub fn claim(&self, hashes: &[BlockHash], most_bytes: u64) -> Option<Claim> {
        self.core.claim(hashes, most_bytes)
    }

    /// Queues the copies of the first `blocks.len()` blocks of `hit` into the engine's `blocks`, layer by layer,
    /// and returns at once. May be called any number of times for one hit.
    pub fn load(&self, hit: &Hit, blocks: &[u32], kv: &PagedKv) -> Load {
        let layers = 0..self.core.config.layout.layer_bytes.len();
        self.load_layers(hit, layers, blocks, kv)
    }

    /// Like [`load`](Self::load), for some layers only: an engine that keeps few layers in its own HBM calls it again
    /// and again.
    pub fn load_layers(
        &self,
        hit: &Hit,
        layers: Range<usize>,
        blocks: &[u32],
        kv: &PagedKv,
    ) -> Load {
        let wanted = Wanted {
            layers,
            blocks,
            kv,
            after: None,
        };
        self.core.load(hit, &wanted)
    }

    /// Like [`load`](Self::load), but no copy starts before `after`: for blocks that kernels queued earlier on the
    /// engine's stream may still touch.
    pub fn load_after(&self, hit: &Hit, blocks: &[u32], kv: &PagedKv, after: &Ticket) -> Load {
        let layers = 0..self.core.config.layout.layer_bytes.len();
        let wanted = Wanted {
            layers,
            blocks,
            kv,
            after: Some(after),
        };
        self.core.load(hit, &wanted)
    }

    /// Whether [`store`](Self::store) of so many blocks may have to wait: for the broker, which is to forget blocks that make room,
    /// or for a [stitched pool](PagedKv::is_stitched).
    pub fn store_may_wait(&self, blocks: u32, kv: &PagedKv) -> bool {
        kv.is_stitched() || !self.core.has_free(blocks)
    }

    /// Queues write-back of a sequence's consecutive blocks, layer by layer: layer `l` after the ticket that
    /// `layer_ready(l)` gives, which marks its bytes as computed (`None`: they are already).
    ///
    /// Blocks that are there already are skipped; so is the rest of the sequence when room runs out. Blocks for one
    /// round trip to the broker when published blocks must go to make room.
    pub fn store(
        &self,
        blocks: &[(BlockHash, u32)],
        kv: &PagedKv,
        layer_ready: &dyn Fn(usize) -> Option<Ticket>,
    ) -> Store {
        self.core.store(blocks, kv, layer_ready)
    }

    /// What it has done, and what it holds now.
    pub fn stats(&self) -> Stats {
        if !self.core.origin.is_here() {
            return Stats::default();
        }
        let leases = self.core.leases.counts();
        Stats {
            revocations: leases.revocations,
            refused_leases: leases.refused,
            drain: Latency::from(&leases.drain),
            acknowledge: Latency::from(&leases.acknowledge),
            leases: leases.own,
            leased_bytes: leases.own_bytes,
            host_leased_bytes: leases.own_host_bytes,
            shared_leases: leases.shared,
            ..self.core.state.lock().stats()
        }
    }
}

impl Drop for Borrower {
    /// On return no copy of it is in flight and no lease of it is mapped. Or that is not known after ten seconds: then the threads
    /// go on by themselves until it is, and keep the session and the leases as long.
    fn drop(&mut self) {
        let core = &self.core;
        if !core.origin.is_here() {
            // The cache goes on in the process that it belongs to, with all its threads.
            return;
        }
        // A thread that is gone needs no telling.
        let _ = core.keeper.send(KeeperTask::Stop);
        self.keeper.join();
        self.leasing.stop_growing(&core.leases);
        let deadline = Instant::now() + CLOSING;
        let told = core
            .connected()
            .and_then(|session| core.tell_closed(session));
        core.leases.close();
        let _ = core.leftovers.send(None);
        let let_go = self.leasing.recall().join_by(deadline);
        if !(self.settler.join_by(deadline) && let_go) {
            warn!(
                "a borrower is closed whose copies are not known to be over: its leases stay until they are"
            );
        }
        if let Some(mut told) = told {
            let pace = Pace::start();
            while told.try_take().is_none() && Instant::now() < deadline {
                std::thread::sleep(pace.nap());
            }
        }
        core.routes.forget();
        core.report();
    }
}

impl Core {
    /// Takes the host tier's memory into use.
    fn open_host_tier(&self, layer: &dyn DeviceLayer) -> Result<()> {
        let block_bytes = self.config.layout.block_bytes();
        let slots = self.config.host_tier_bytes / block_bytes;
        let slots = u32::try_from(slots).unwrap_or(u32::MAX);
        if slots == 0 {
            return Ok(());
        }
        let bytes = u64::from(slots) * block_bytes;
        let memory = layer.allocate_host(&self.config.device, bytes)?;
        let route = self.routes.to(Medium::Host, &self.config.device)?;
        let layers = &self.config.layout.layer_bytes;
        let area = BlockArea::new(memory, 0, slots, layers, LinkKind::Host, route);
        let area = Arc::new(area);
        self.leases.add_host(Arc::clone(&area));
        let mut state = self.state.lock();
        state.shelves.insert(Shelf::new(area, Hold::Own, None));
        if self.session.is_some() {
            state.blocks.host_news.gather();
        }
        Ok(())
    }
}

impl fmt::Debug for Borrower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.core.fmt(f)
    }
}
