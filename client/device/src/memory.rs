//! Memory on a device: an address range that stays mapped as long as anyone holds it.

use std::{
    any::Any,
    fmt,
    sync::{Arc, OnceLock},
};

use parking_lot::Mutex;
use swiftcache_proto::domain::DeviceUuid;

use super::{DeviceError, Result, Steps};

/// A range of device (or pinned host) memory. Clones share it; the last one to go unmaps or frees it.
#[derive(Clone)]
pub struct Memory(Arc<Range>);

struct Range {
    address: u64,
    bytes: u64,
    device: DeviceUuid,
    /// Frees or unmaps the range when dropped. The backend downcasts it to find its own again.
    owner: Box<dyn Any + Send + Sync>,
    /// What else goes only after that: whoever allocated the bytes that an adopted range lies in.
    kept: Mutex<Vec<Box<dyn Any + Send + Sync>>>,
    /// An engine's steps, between which what is mapped here may change.
    steps: OnceLock<Arc<Steps>>,
}

impl Memory {
    /// Wraps a range that `owner` keeps mapped. Only backends call this.
    pub(crate) fn new(
        address: u64,
        bytes: u64,
        device: DeviceUuid,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Self {
        Self(Arc::new(Range {
            address,
            bytes,
            device,
            owner,
            kept: Mutex::default(),
            steps: OnceLock::new(),
        }))
    }

    /// Keeps `kept` alive until the last clone is gone.
    pub(crate) fn keep(&self, kept: Box<dyn Any + Send + Sync>) {
        self.0.kept.lock().push(kept);
    }

    /// What is mapped here changes between these steps.
    pub(crate) fn set_steps(&self, steps: Arc<Steps>) {
        let _ = self.0.steps.set(steps);
    }

    /// An engine's steps, between which what is mapped here may change. Copies with this memory are queued under
    /// [`Steps::touch`] then.
    pub fn steps(&self) -> Option<&Arc<Steps>> {
        self.0.steps.get()
    }

    /// The range's size, bytes.
    pub fn bytes(&self) -> u64 {
        self.0.bytes
    }

    /// The device whose copies may touch it.
    pub fn device(&self) -> &DeviceUuid {
        &self.0.device
    }

    /// Whether this and `other` are clones of one another.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// What keeps the range mapped, if it is a `T`.
    pub(crate) fn owner<T: Any>(&self) -> Option<&T> {
        self.0.owner.downcast_ref()
    }

    /// Where it starts, for offsets that were checked before.
    pub(crate) fn base(&self) -> u64 {
        self.0.address
    }

    /// Checks that `bytes` at `offset` lie inside, and gives their address.
    pub(crate) fn at(&self, offset: u64, bytes: u64) -> Result<u64> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.0.bytes => Ok(self.0.address + offset),
            _ => Err(DeviceError::OutOfRange {
                offset,
                bytes,
                size: self.0.bytes,
            }),
        }
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Memory({} bytes on {})", self.0.bytes, self.0.device)
    }
}
