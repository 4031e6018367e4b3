//! What an engine promises and Rust cannot check: where its KV pool is, how long that stays so, and that a number is a
//! stream. The adapter's only `unsafe` is here.
//!
//! Addresses reach this process as Python's numbers, so somebody has to take Python's word for them: nobody below this
//! crate knows what was promised, and nobody above it is Rust. `_native.pyi` says what the promises are. Each becomes a
//! value here, which is made from a Python object only ([`read`](EngineStream::read)), and which holds what the promise
//! depends on. The rest of the crate uses the values and no numbers.

#![allow(
    unsafe_code,
    reason = "the door by which Python's addresses come in: see the module's documentation"
)]

use std::{any::Any, fmt, sync::Arc};

use pyo3::prelude::*;
use swiftcache_client::{
    device::{self, DeviceLayer, EngineWord, Memory, Steps, Ticket, foreign},
    donor::PoolRange,
};
use swiftcache_proto::domain::DeviceUuid;

use crate::{arguments, place::Place};

/// A memory that the engine's KV pool lies in. Its bytes stay allocated as long as this or what was adopted of it lives,
/// and Rust has no references into them: pools are tensors and buffers of Python's.
#[derive(Clone, Debug)]
pub(crate) struct EngineMemory {
    address: u64,
    bytes: u64,
    /// The tensors. Let go of without the GIL: Python's side forgets them when a thread next has it.
    owner: Arc<Py<PyAny>>,
    /// It lies in a stitched pool, which has these steps.
    steps: Option<Arc<Steps>>,
}

/// A layer as Python says it: address, bytes, offset of block 0, block stride.
type Said = (u64, u64, u64, u64);

/// Where a layer's blocks are in a memory: offset of block 0, and bytes from one block to the next.
pub(crate) type Blocks = (u64, u64);

impl EngineMemory {
    /// The memories of a pool, from the arguments of `Cache.register_pool`, each with where a layer is in it.
    pub(crate) fn read(
        layers: &Bound<'_, PyAny>,
        owner: Py<PyAny>,
        steps: Option<&Arc<Steps>>,
    ) -> PyResult<Vec<(Self, Blocks)>> {
        let said: Vec<Said> = arguments::number("layers", layers)?;
        let owner = Arc::new(owner);
        let memory = |(address, bytes, offset, block_stride)| {
            let owner = Arc::clone(&owner);
            let memory = Self {
                address,
                bytes,
                owner,
                steps: steps.cloned(),
            };
            (memory, (offset, block_stride))
        };
        Ok(said.into_iter().map(memory).collect())
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it lies in a stitched pool.
    pub(crate) fn is_stitched(&self) -> bool {
        self.steps.is_some()
    }

    /// A range of it, if all of that lies in it.
    pub(crate) fn part(&self, range: UnusedRange) -> Option<Lendable> {
        let at = range.address.checked_sub(self.address)?;
        let end = at.checked_add(range.bytes)?;
        (end <= self.bytes && range.bytes > 0).then(|| {
            Lendable(Self {
                address: range.address,
                bytes: range.bytes,
                owner: Arc::clone(&self.owner),
                steps: None,
            })
        })
    }

    /// Has copies reach it.
    pub(crate) fn adopt(
        &self,
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
    ) -> device::Result<Memory> {
        if let Some(steps) = &self.steps {
            let outside = device::DeviceError::OutOfRange {
                offset: self.address,
                bytes: self.bytes,
                size: steps.space().bytes(),
            };
            let offset = self.address.checked_sub(steps.space().address());
            return steps.memory(offset.ok_or(outside)?, self.bytes);
        }
        let owner = Box::new(Arc::clone(&self.owner));
        // SAFETY: `Cache.register_pool` promises that the bytes stay allocated as long as the owner lives, which is held
        // here and by the memory. Rust sees Python's bytes through raw pointers only.
        unsafe { foreign::adopt_pool(layer, device, self.address, self.bytes, owner) }
    }
}

/// A range that the engine has put out of use, but for what it did there before, until it is told that the range is back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnusedRange {
    address: u64,
    bytes: u64,
}

impl UnusedRange {
    /// The ranges of a loan, from the arguments of `Cache.lend`.
    pub(crate) fn read(ranges: &Bound<'_, PyAny>) -> PyResult<Vec<Self>> {
        let said: Vec<(u64, u64)> = arguments::number("ranges", ranges)?;
        let range = |(address, bytes)| Self { address, bytes };
        Ok(said.into_iter().map(range).collect())
    }
}

impl fmt::Display for UnusedRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.address)
    }
}

/// Such a range of the engine's pool.
#[derive(Clone, Debug)]
pub(crate) struct Lendable(EngineMemory);

impl PoolRange for Lendable {
    fn overlaps(&self, other: &Self) -> bool {
        let ends = |range: &EngineMemory| range.address.saturating_add(range.bytes);
        self.0.address < ends(&other.0) && other.0.address < ends(&self.0)
    }

    fn lend(
        &self,
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
        after: Option<&Ticket>,
        back: Box<dyn Any + Send + Sync>,
    ) -> swiftcache_client::Result<Memory> {
        if let Some(after) = after {
            after.wait()?;
        }
        let pool = self.0.adopt(layer, device)?;
        // SAFETY: `Cache.lend` promises that the engine leaves the range alone until `returned_loans` names the loan,
        // which waits for `back`, and that all it did there is over at `after`.
        Ok(unsafe { foreign::lend_pool(layer, &pool, 0, self.0.bytes, back) }?)
    }
}

impl fmt::Display for Lendable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.0.bytes, self.0.address)
    }
}

/// An engine's word that it touches a stitched pool within steps only.
pub(crate) fn engine_word() -> EngineWord {
    // SAFETY: `StreamPool.lay_out` promises it: the engine touches the tensors between `begin_step` and `end_step` only, what it has
    // queued on other streams than the one that `end_step` is told is over by then, and nothing follows `close`. The adapter's own
    // copies use `Steps::memory`.
    unsafe { EngineWord::given() }
}

/// A stream of the engine's, or the default one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EngineStream(u64);

impl EngineStream {
    pub(crate) fn read(stream: &Bound<'_, PyAny>) -> PyResult<Self> {
        arguments::number("stream", stream).map(Self)
    }

    /// Its present end; nothing where engines have no streams.
    pub(crate) fn mark(self, place: &Place) -> device::Result<Option<Ticket>> {
        // SAFETY: `Cache.mark` promises that the stream is one of this device's, and alive.
        unsafe { foreign::mark(&*place.layer, &place.device, self.0) }
    }

    /// Has it wait for tickets. Returns those that the caller has to wait for.
    pub(crate) fn gate(self, place: &Place, tickets: &[Ticket]) -> Vec<Ticket> {
        // SAFETY: `Load.gate_layer` promises that the stream is one of this device's, and alive.
        unsafe { foreign::gate(&*place.layer, &place.device, self.0, tickets) }
    }
}
