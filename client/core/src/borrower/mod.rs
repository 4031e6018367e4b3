//! A borrower: an engine's prefix KV cache in leased HBM and a bounded host tier.
//!
//! The way of a block through this room:
//! * [`Borrower::store`] finds slots (`store`, `slots`, `evict`), copies layer by layer (`transfer`), and
//!   publishes when every byte is there (`publish`);
//! * [`Borrower::lookup`] finds own blocks in the local mirror and replicas' through the broker (`lookup`);
//! * [`Borrower::load`] copies them back, layer by layer (`load`, `transfer`);
//! * a revocation stops new copies at once (`drain`). A thread then rescues hot blocks (`rescue`), and unmaps and acknowledges
//!   when the last copy is over (`drain_loop`).
//!
//! `transfer::pipeline::issue_layer` is where a layer's bytes are put on their way.
//!
//! Everything that could be wrong is a miss. No copy touches a slab unless it is registered with it (`op`) under the
//! lock that revocations take too (`state`), and a slot is written only when nobody can read it any more.

mod blocks;
mod config;
mod core;
mod drain;
mod drain_loop;
mod evict;
mod failures;
mod hit;
mod keeper;
mod kept;
mod layout;
mod lease;
mod load;
mod lookup;
mod mapping;
mod op;
mod probe;
mod promote;
mod publish;
mod rescue;
mod settle;
mod slab;
mod slots;
mod state;
mod stats;
mod store;
#[cfg(test)]
mod tests;
mod unreadable;
mod value;

use std::{
    fmt,
    ops::Range,
    sync::{Arc, mpsc},
};

use swiftcache_proto::domain::{BlockHash, BorrowerId};

pub use config::{BorrowerConfig, DrainPolicy};
pub use hit::{Hit, HitRun, Tier};
pub use layout::Layout;
pub use load::{Load, LoadError, Loaded};
pub use stats::{BlocksByTier, BytesByLink, Latency, Stats};
pub use store::{Store, Stored};

pub use crate::transfer::{PagedKv, PagedLayer, PoolSpan};

use self::{
    core::Core,
    keeper::{KeeperTask, Threads},
};
use crate::{
    Error, Result,
    device::{DeviceLayer, Ticket},
    session::{Observer, Session},
};

/// An engine's prefix KV cache in leased HBM and a bounded host tier. Used from any thread.
///
/// Dropping it waits until its copies are known to be over, and gives its leases back: for ten seconds at most. Should the
/// device not say by then that they are, its threads go on until it does, and keep its leases and its session as long.
/// Blocks of the engine that a load or a store has not said are over must stay as they are even then.
pub struct Borrower {
    core: Arc<Core>,
    threads: Threads,
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
        if !layer.devices().iter().any(|d| d.uuid == config.device) {
            let problem = format!(
                "the {} backend has no device {}",
                layer.name(),
                config.device
            );
            return Err(Error::config("device", problem));
        }
        let (core, inboxes) = Core::new(session, layer, config);
        core.open_host_tier()?;
        if let Some(session) = &core.session {
            let observer: Arc<dyn Observer> = Arc::clone(&core) as _;
            session.observe(&observer);
        }
        let threads = Threads::start(&core, inboxes)?;
        core.grow_soon();
        Ok(Arc::new(Self { core, threads }))
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
        let (reply, answer) = mpsc::sync_channel(1);
        let bytes = bytes.min(self.core.config.max_leased_bytes);
        let asked = self.core.keeper.send(KeeperTask::Reserve { bytes, reply });
        match asked {
            Ok(()) => answer.recv().unwrap_or(0),
            Err(_) => 0,
        }
    }

    /// Finds the longest prefix run of `hashes`, over own leases, replicas' leases and the host tier. Trouble with the
    /// broker is a miss, never an error.
    ///
    /// Blocks for one round trip to the broker when own blocks do not answer it whole and
    /// [`share`](BorrowerConfig::share) is set; the first time that a replica's slab is found, for its mapping too.
    pub fn lookup(&self, hashes: &[BlockHash]) -> Hit {
        self.core.lookup(hashes)
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
        self.core.load(hit, layers, blocks, kv, None)
    }

    /// Like [`load`](Self::load), but no copy starts before `after`: for blocks that kernels queued earlier on the
    /// engine's stream may still touch.
    pub fn load_after(&self, hit: &Hit, blocks: &[u32], kv: &PagedKv, after: &Ticket) -> Load {
        let layers = 0..self.core.config.layout.layer_bytes.len();
        self.core.load(hit, layers, blocks, kv, Some(after))
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
        self.core.state.lock().stats()
    }
}

impl Drop for Borrower {
    fn drop(&mut self) {
        self.threads.stop(&self.core);
        self.core.routes.forget();
        self.core.report();
    }
}

impl fmt::Debug for Borrower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.core.fmt(f)
    }
}
