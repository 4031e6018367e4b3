//! A CUDA driver made of shared memory: the entry points that SwiftCache calls, with the driver's rules.
//!
//! A device is an account of bytes; an allocation is a file in `SWIFTCACHE_STUB_DIR`, which other processes open by
//! a legacy handle, or a memfd, which travels as a descriptor. A stream is a thread, so that what is queued runs
//! later, in order. The rules a real driver enforces are enforced: a context must be current, memory of another
//! device needs peer access or a mapping's permission, freed memory is never touched (its addresses are not used
//! again, and touching them is a sticky error), a legacy handle cannot be opened by its own process or after its
//! process died, virtual memory has no legacy handle, the default stream takes no batches.
//!
//! # Faults
//!
//! Each line of the file `faults` in that directory is a fault or a setting. Every process looks at every call whether
//! the file has changed, so a test can change it while they run; one that renames a new file into its place is never
//! read half-written (`swiftcache_tests::stub` does that, and takes back what it injected).
//!
//! ```text
//! cuMemAlloc_v2=2          # this entry point does nothing and returns that code
//! cuLaunchKernel=719@3     # only the third call does, ...
//! cuLaunchKernel=719@1-2   # ... only the next two, ...
//! cuLaunchKernel=719@3-    # ... or all from the third on
//! 4711/cuEventQuery=999@1  # only in the process of that number
//! *=214                    # every entry point fails: the device is lost
//! peer_copies=701          # what is to copy to or from another device's memory is refused with that code
//! execute=719              # work on streams fails with that code, and so does every call from then on
//! execute=719@2            # the second piece of work does
//! hold=kernels             # no stream goes on to a gather launch, ...
//! hold=copies              # ... nor to a copy, ...
//! hold=all                 # ... nor to anything, until the line is gone
//! trace=cuMemFree_v2,cuMemUnmap   # calls of these, or of all (*), are written to the file `trace`
//! capture_mode=ignored     # threads' capture modes do not count: each is as strict as new ones are
//! peers=none               # no peer access (pcie: peer access without native atomics; nvlink: the default)
//! devices=1                # how many devices there are (default 2)
//! nodes=0                  # the device nodes that there are, by the devices' numbers (default: all)
//! ```
//!
//! `CUDA_VISIBLE_DEVICES` says which of these a process enumerates, by number or by UUID, as it does for the real driver.
//! A descriptor opens whatever device it is of, if its node is there. A legacy handle opens only if the process enumerates
//! the device.
//!
//! * `PROCESS/` in front limits any line to one process.
//! * `@` counts the calls of one process from when it first sees the line. It sees a line at its first call of any entry
//!   point after the file has changed, and that call counts: a line that is added while a process runs fails the n-th
//!   call that begins after that, and needs no waiting. Pieces of work are counted as they run.
//! * A line counts on as long as its text is in the file. A remark is part of the text, so `#` and a number that was not
//!   used before arm the same fault once more.
//! * Every line about an entry point counts each call of it. The first whose calls include this one decides.
//! * A code that an entry point returns breaks nothing: the next call works. Only `execute`, and work that touches what
//!   it may not, break the contexts for good, as a sticky error does.
//! * A hold keeps a stream from *beginning* a piece of work, so what is in the queue stays there, and all behind it.
//!   Calls that wait for the stream wait; calls that ask answer `CUDA_ERROR_NOT_READY`. Streams on which nothing is
//!   held go on.
//! * A line of `trace` is written when a call ends: `SYMBOL PROCESS THREAD RESULT NAME`, where the last is the name of
//!   the thread. A call that waits writes another one before it waits, with `began` in place of the result.
//!
//! # Captures
//!
//! A stream that is captured takes what it is asked to do into a graph, which is run when it is launched. The driver's
//! rules hold: as long as a stream is captured in global mode, no thread may call what might wait, allocate or map, but
//! those whose own mode is relaxed (`cuThreadExchangeStreamCaptureMode`). Such a call fails and spoils the capture, whose
//! end then fails too. So does asking a captured stream how far it is, having it wait for what is not captured, and using
//! the default stream while a stream is captured that it waits for. An event that is recorded in a captured stream never
//! fires, and a stream that waits for it is captured too.

#![allow(
    unsafe_code,
    clippy::missing_safety_doc,
    missing_docs,
    unreachable_pub,
    reason = "this is a driver: C entry points over raw addresses, each with the contract that NVIDIA documents"
)]

mod capture;
mod context;
mod copy;
mod device;
mod faults;
mod ipc;
mod kernel;
mod memory;
mod stream;
mod trace;
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
pub(crate) const HOST_MEMORY_ALREADY_REGISTERED: Code = 712;
pub(crate) const HOST_MEMORY_NOT_REGISTERED: Code = 713;

/// Everything this process knows.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) initialised: bool,
    /// By first address.
    pub(crate) allocations: BTreeMap<u64, memory::Allocation>,
    pub(crate) physical: HashMap<u64, Arc<virtual_memory::Physical>>,
    pub(crate) streams: HashMap<usize, Arc<stream::Stream>>,
    /// How often each device's primary context is retained.
    pub(crate) retained: HashMap<i32, u32>,
    /// Who may touch whose memory.
    pub(crate) peers: HashSet<(i32, i32)>,
    /// The next number of anything.
    pub(crate) next: u64,
    pub(crate) captures: capture::Captures,
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

/// Every entry point: an injected fault in its place, else what it does, if the driver is in a state to do it.
pub(crate) fn call(symbol: &str, body: impl FnOnce() -> Result<(), Code>) -> Code {
    call_anyway(symbol, || {
        let mut world = world();
        if !world.initialised {
            return Err(NOT_INITIALIZED);
        }
        world.broken.map_or(Ok(()), Err)?;
        world.captures.permit(symbol)?;
        drop(world);
        body()
    })
}

/// As [`call`], in whatever state the driver is.
pub(crate) fn call_anyway(symbol: &str, body: impl FnOnce() -> Result<(), Code>) -> Code {
    let result = faults::injected(symbol).map_or_else(body, Err);
    let code = result.err().unwrap_or(SUCCESS);
    trace::ended(symbol, code);
    code
}
