//! A CUDA driver made of shared memory: the entry points that SwiftCache calls, with the driver's rules.
//!
//! A device is an account of bytes; an allocation is a file in `SWIFTCACHE_STUB_DIR`, which other processes open by
//! a legacy handle, or a memfd, which travels as a descriptor. A stream is a thread, so that what is queued runs
//! later, in order. The rules a real driver enforces are enforced: a context must be current, memory of another
//! device needs peer access or a mapping's permission, freed memory is never touched (its addresses are not used
//! again, and touching them is a sticky error), a legacy handle cannot be opened by its own process or after its
//! process died, virtual memory has no legacy handle, the default stream takes no batches.
//!
//! Faults are injected by the file `faults` in that directory, read at every call:
//!
//! ```text
//! cuMemAlloc_v2=2     # this entry point returns that code
//! *=214               # every entry point does: the device is lost
//! execute=719         # work on streams fails with that code, for good
//! peers=none          # no peer access (pcie: peer access without native atomics; nvlink: the default)
//! devices=1           # how many devices there are (default 2)
//! ```

#![allow(
    unsafe_code,
    clippy::missing_safety_doc,
    missing_docs,
    unreachable_pub,
    reason = "this is a driver: C entry points over raw addresses, each with the contract that NVIDIA documents"
)]

mod context;
mod copy;
mod device;
mod faults;
mod ipc;
mod kernel;
mod memory;
mod stream;
mod virtual_memory;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Arc, LazyLock, Mutex, MutexGuard},
};

pub(crate) type Code = u32;

pub(crate) const SUCCESS: Code = 0;
pub(crate) const INVALID_VALUE: Code = 1;
pub(crate) const OUT_OF_MEMORY: Code = 2;
pub(crate) const NOT_INITIALIZED: Code = 3;
pub(crate) const INVALID_DEVICE: Code = 101;
pub(crate) const INVALID_CONTEXT: Code = 201;
pub(crate) const PEER_ACCESS_UNSUPPORTED: Code = 217;
pub(crate) const INVALID_HANDLE: Code = 400;
pub(crate) const NOT_FOUND: Code = 500;
pub(crate) const NOT_READY: Code = 600;
pub(crate) const ILLEGAL_ADDRESS: Code = 700;
pub(crate) const PEER_ACCESS_ALREADY_ENABLED: Code = 704;

/// Everything this process knows.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) initialised: bool,
    /// By first address.
    pub(crate) allocations: BTreeMap<u64, memory::Allocation>,
    pub(crate) physical: HashMap<u64, virtual_memory::Physical>,
    pub(crate) streams: HashMap<usize, Arc<stream::Stream>>,
    /// How often each device's primary context is retained.
    pub(crate) retained: HashMap<i32, u32>,
    /// Who may touch whose memory.
    pub(crate) peers: HashSet<(i32, i32)>,
    /// The next number of anything.
    pub(crate) next: u64,
    /// What broke the contexts, for good.
    pub(crate) broken: Option<Code>,
}

impl World {
    pub(crate) fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

static WORLD: LazyLock<Mutex<World>> = LazyLock::new(Mutex::default);

pub(crate) fn world() -> MutexGuard<'static, World> {
    // A panic while it was held has already ended the process: these are C entry points.
    WORLD
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What every entry point does first: injected faults, and the state of the driver.
pub(crate) fn begin(symbol: &str) -> Result<(), Code> {
    if let Some(code) = faults::injected(symbol) {
        return Err(code);
    }
    let world = world();
    if !world.initialised {
        return Err(NOT_INITIALIZED);
    }
    world.broken.map_or(Ok(()), Err)
}

pub(crate) fn code(result: Result<(), Code>) -> Code {
    result.err().unwrap_or(SUCCESS)
}
