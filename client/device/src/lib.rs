//! The device layer: memory on devices, copies between it, and nothing about leases or gRPC.
//!
//! [`DeviceLayer`] is what a backend offers; validation (bounds, lifetimes) lives in the safe types here, above
//! the backends' raw addresses.
//!
//! * `host`: always compiled. A device is an arena of shared memory (memfd); another process maps the same
//!   bytes. A link model can pace copies.
//! * `cuda`: real HBM through the CUDA driver, loaded at run time.

#![allow(
    unsafe_code,
    reason = "devices are raw addresses and driver calls; this is the only room that may touch them"
)]

mod address_space;
pub mod cuda;
mod error;
pub mod foreign;
pub mod host;
mod memory;
mod open;
mod origin;
mod steps;
mod stream;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::sync::Arc;

use swiftcache_proto::domain::{Device, DeviceUuid, Handle, HandleKind, Link, LinkKind};

pub use address_space::{
    AddressSpace, AddressSpaces, Change, Left, NotReplaced, SpacePiece, Standstill,
};
pub use error::DeviceError;
pub use memory::Memory;
pub use open::{Choice, REQUIRE_GPU_VARIABLE, open, open_host_memory, open_node};
pub use origin::Origin;
pub use steps::{EngineWord, StepEnd, Steps, Still, Touching};
pub use stream::{CopyStream, Part, Piece, Ticket, nap};

/// The result of every device operation.
pub type Result<T> = std::result::Result<T, DeviceError>;

/// How to open another process's allocation: what a donor exports, and what a lessee imports.
#[derive(Debug)]
pub enum Export {
    /// Opaque bytes that travel in the gRPC message.
    Opaque(Handle),
    /// A descriptor that travels over the fd socket.
    Fd(std::os::fd::OwnedFd),
}

/// Devices, their memory and their streams. One per process; cheap to share.
pub trait DeviceLayer: Send + Sync {
    /// `"host"` or `"cuda"`, for people.
    fn name(&self) -> &'static str;

    /// The devices this process can use.
    fn devices(&self) -> &[Device];

    /// The links between them, both directions; pairs not listed have no peer access.
    fn links(&self) -> &[Link];

    /// How `from`'s memory reaches `to`; [`LinkKind::Host`] where there is no peer access.
    fn link_kind(&self, from: &DeviceUuid, to: &DeviceUuid) -> LinkKind {
        if from == to {
            return LinkKind::SameDevice;
        }
        let mut links = self.links().iter();
        links
            .find(|link| link.from == *from && link.to == *to)
            .map_or(LinkKind::Host, |link| link.kind)
    }

    /// Free and total HBM, bytes, as this process sees it.
    fn hbm(&self, device: &DeviceUuid) -> Result<Hbm>;

    /// Takes `bytes` of zeroed HBM, exportable as `kind`. Freed when the last clone of the [`Memory`] goes.
    fn allocate(&self, device: &DeviceUuid, bytes: u64, kind: HandleKind) -> Result<Memory>;

    /// Takes `bytes` of zeroed host memory that `device` can copy to and from at full speed (pinned, on CUDA).
    fn allocate_host(&self, device: &DeviceUuid, bytes: u64) -> Result<Memory>;

    /// The handle kinds this layer can export, best first.
    fn handle_kinds(&self) -> &[HandleKind];

    /// Makes an allocation of [`allocate`](Self::allocate) openable by another process.
    fn export(&self, memory: &Memory) -> Result<Export>;

    /// Where `memory` lies in the allocation that [`export`](Self::export) opens: an engine's pool may start inside
    /// a larger one.
    fn base(&self, memory: &Memory) -> Result<Base> {
        Ok(Base {
            offset: 0,
            bytes: memory.bytes(),
        })
    }

    /// Maps another process's allocation: `bytes` from its base, which lie on `owner`, for use by `device`. Every backend
    /// maps host memory (`HOST-n`).
    /// Unmapped when the last clone of the [`Memory`] goes. Expensive: once per allocation.
    fn import(
        &self,
        device: &DeviceUuid,
        owner: &DeviceUuid,
        export: Export,
        bytes: u64,
    ) -> Result<Memory>;

    /// Ranges of addresses in which memories are mapped side by side. None where the driver has no virtual memory.
    fn address_spaces(&self) -> Option<&dyn AddressSpaces>;

    /// A queue of copies on `device`, run in order, independent of other streams.
    fn stream(&self, device: &DeviceUuid) -> Result<Arc<dyn CopyStream>>;

    /// Wraps memory that another part of this process allocated on `device`, such as an engine's KV pool, so that
    /// copies may reach it. Dropping the [`Memory`] does not free it.
    ///
    /// # Safety
    /// * `address` is the first of `bytes` readable and writable bytes on `device`: a `CUdeviceptr`, or a host
    ///   pointer on the host backend.
    /// * They stay allocated until the last clone of the [`Memory`] is gone and every copy queued with it is over.
    /// * Nothing holds Rust references into them meanwhile.
    ///
    /// # Errors
    /// When the device is unknown, or the driver (on the host backend the kernel) does not know the whole range.
    unsafe fn adopt_memory(&self, device: &DeviceUuid, address: u64, bytes: u64) -> Result<Memory>;

    /// Makes a range of adopted memory one that other processes can be given with [`export`](Self::export): as much of
    /// it as the backend can export by itself (on the host backend whole pages), zeroed. It is zeroed again when the
    /// last clone goes, before whatever the memory keeps.
    ///
    /// # Safety
    /// Nothing but copies with the result, and other processes, reads or writes the range until the last clone of the
    /// result is gone.
    ///
    /// # Errors
    /// When the memory is not an adopted one, the range lies outside, or nothing of it can be exported.
    unsafe fn lend(&self, memory: &Memory, offset: u64, bytes: u64) -> Result<Memory>;

    /// Whether an engine's work runs on streams of its own, which [`adopt_stream`](Self::adopt_stream) wraps. On other
    /// backends it is done when the engine's call returns.
    fn has_foreign_streams(&self) -> bool;

    /// Wraps a stream that another part of this process created, such as an engine's compute stream: what is
    /// recorded marks its work, and it can be made to wait for tickets. Dropping the wrapper does not destroy it.
    ///
    /// While the stream is captured into a graph, every use of the wrapper fails, and the capture goes on: what is
    /// recorded in a capture is a node of the graph and no point in the stream.
    ///
    /// # Safety
    /// * `raw` is a live `CUstream` of `device`'s primary context (0: the default stream).
    /// * It stays alive until the wrapper is gone, and every ticket of its [`end`](CopyStream::end). A mark that was
    ///   [`record`](CopyStream::record)ed outlives it.
    /// * Its capture into a graph is not begun while copies queued through the wrapper may still run.
    ///
    /// # Errors
    /// When the backend has no foreign streams.
    unsafe fn adopt_stream(&self, device: &DeviceUuid, raw: u64) -> Result<Arc<dyn CopyStream>>;
}

/// Where a memory lies in its allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Where it starts, bytes from the allocation's base.
    pub offset: u64,
    /// The allocation's size, bytes.
    pub bytes: u64,
}

/// HBM of one device, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hbm {
    /// Not used by anybody.
    pub free: u64,
    /// All of it.
    pub total: u64,
}
