//! Ranges of pages in this process, and what becomes of them in the end.

use std::os::fd::AsFd;

use rustix::{
    io::{Errno, Result},
    mm::{MapFlags, ProtFlags},
};

use super::Memory;
use crate::Origin;

const READ_WRITE: ProtFlags = ProtFlags::READ.union(ProtFlags::WRITE);

/// Keeps a range from children of `fork`. One would still have it when its parent is gone, and the broker has lent the pages to
/// somebody else by then. A GPU's memory is not inherited either: a CUDA context does not survive a fork.
pub(super) fn keep_from_children(address: usize, bytes: usize) {
    // SAFETY: only children are affected, and one has no use for the range: it has neither streams nor leases of its own.
    let kept =
        unsafe { rustix::mm::madvise(address as *mut _, bytes, rustix::mm::Advice::LinuxDontFork) };
    if let Err(error) = kept {
        tracing::warn!(%error, "children of this process inherit memory of the cache");
    }
}

/// A range of pages. When dropped it is unmapped, or the owner of the range has fresh pages there.
#[derive(Debug)]
pub(crate) struct Mapping {
    address: usize,
    bytes: usize,
    /// The memory that these pages are a part of, if it is another's.
    lent_of: Option<Memory>,
    /// A child of this process may have something else at these addresses.
    origin: Origin,
}

impl Mapping {
    pub(crate) fn shared(memfd: impl AsFd, bytes: u64) -> Result<Self> {
        let size = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
        // SAFETY: the kernel picks the address, so no existing mapping is touched. The pages are reached
        // through raw pointers only, never through references that would assume nobody else writes.
        let address = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                size,
                READ_WRITE,
                MapFlags::SHARED,
                memfd,
                0,
            )
        }?;
        keep_from_children(address as usize, size);
        Ok(Self {
            address: address as usize,
            bytes: size,
            lent_of: None,
            origin: Origin::here(),
        })
    }

    pub(super) fn anonymous(bytes: u64) -> Result<Self> {
        let size = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
        // SAFETY: as above; the kernel picks the address.
        let address = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), size, READ_WRITE, MapFlags::PRIVATE)
        }?;
        keep_from_children(address as usize, size);
        Ok(Self {
            address: address as usize,
            bytes: size,
            lent_of: None,
            origin: Origin::here(),
        })
    }

    /// Puts a file's pages in the place of those of `memory`, which are lost.
    ///
    /// # Safety
    /// The range is whole pages of `memory`, and nobody else reads or writes it as long as the result lives.
    pub(super) unsafe fn instead(
        address: u64,
        bytes: u64,
        memory: &Memory,
        memfd: impl AsFd,
    ) -> Result<Self> {
        let size = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
        let place = usize::try_from(address).map_err(|_| Errno::NOMEM)?;
        // SAFETY: the caller promises that the range is the memory's, whose owner stays until this mapping is gone, and
        // that its bytes are of no use to anybody.
        unsafe {
            rustix::mm::mmap(
                place as *mut _,
                size,
                READ_WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                memfd,
                0,
            )
        }?;
        Ok(Self {
            address: place,
            bytes: size,
            lent_of: Some(memory.clone()),
            origin: Origin::here(),
        })
    }

    pub(crate) fn address(&self) -> u64 {
        self.address as u64
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Gives the owner of the range private pages of zeroes, as it had: no other process has those.
    fn restore(&self) {
        // SAFETY: the range is the owner's, which `lent_of` keeps, and nobody uses it until this is done.
        let restored = unsafe {
            rustix::mm::mmap_anonymous(
                self.address as *mut _,
                self.bytes,
                READ_WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED,
            )
        };
        if let Err(error) = restored {
            // The kernel is out of mappings. The shared pages do as well: everybody has let go of them.
            tracing::warn!(%error, "lent pages come back as they are");
            // SAFETY: the range is mapped and writable, and nobody else uses it.
            unsafe { std::ptr::write_bytes(self.address as *mut u8, 0, self.bytes) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.origin.is_here() {
            return;
        }
        if self.lent_of.is_some() {
            return self.restore();
        }
        // SAFETY: the range is ours since `mmap` returned it, and whoever could still copy in it would hold the
        // `Memory` that owns this mapping.
        let unmapped = unsafe { rustix::mm::munmap(self.address as *mut _, self.bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping: {unmapped:?}");
    }
}
