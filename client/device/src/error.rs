//! What can go wrong on a device.

use swiftcache_proto::domain::{DeviceUuid, HandleKind};

/// A device operation that failed: what, on what, and what to do.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DeviceError {
    /// The backend cannot work here.
    #[error("the {backend} backend is not available: {problem}")]
    Unavailable {
        /// Which backend.
        backend: &'static str,
        /// Why, and what to do.
        problem: String,
    },
    /// No such device in this process.
    #[error(
        "device {uuid} is not visible to this process: list it in CUDA_VISIBLE_DEVICES, and give a container \
         NVIDIA_VISIBLE_DEVICES=all"
    )]
    UnknownDevice {
        /// The device asked for.
        uuid: DeviceUuid,
    },
    /// Not enough memory.
    #[error("device {uuid}: no room for {bytes} bytes ({problem})")]
    OutOfMemory {
        /// The device.
        uuid: DeviceUuid,
        /// What was asked for.
        bytes: u64,
        /// The driver's word.
        problem: String,
    },
    /// A copy reaches outside its memory: a bug in the caller.
    #[error("{bytes} bytes at offset {offset} reach outside a memory of {size} bytes")]
    OutOfRange {
        /// Where it starts.
        offset: u64,
        /// Its size.
        bytes: u64,
        /// The memory's size.
        size: u64,
    },
    /// This memory or handle cannot be shared that way.
    #[error("cannot {action} a {kind:?} handle: {problem}")]
    Handle {
        /// "export" or "import".
        action: &'static str,
        /// Which kind.
        kind: HandleKind,
        /// Why, and what to do.
        problem: String,
    },
    /// The driver or the operating system refused.
    #[error("{operation} failed on {device}: {problem}")]
    Failed {
        /// The call that failed.
        operation: &'static str,
        /// The device it failed on.
        device: DeviceUuid,
        /// The driver's word.
        problem: String,
    },
}
