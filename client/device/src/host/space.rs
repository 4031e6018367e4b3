//! Address spaces of the host backend: a reservation, with memfds mapped over parts of it.

use std::{os::fd::OwnedFd, sync::Arc};

use rustix::{
    io::{Errno, Result as Answer},
    mm::{MapFlags, MprotectFlags, ProtFlags},
};
use swiftcache_proto::domain::DeviceUuid;

use super::{
    HostLayer,
    arena::{Arena, Place},
    mapping::keep_from_children,
};
use crate::{
    AddressSpaces, DeviceError, Memory, Origin, Result,
    address_space::{AddressSpace, RawSpace},
};

/// Addresses that nobody can touch, but where something is mapped.
#[derive(Debug)]
struct Reservation {
    device: DeviceUuid,
    address: usize,
    bytes: usize,
    origin: Origin,
}

impl Reservation {
    fn new(device: &DeviceUuid, bytes: u64) -> Answer<Self> {
        let bytes = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
        // SAFETY: the kernel picks the address, so no existing mapping is touched.
        let address = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), bytes, ProtFlags::empty(), NOTHING)
        }?;
        Ok(Self {
            device: device.clone(),
            address: address as usize,
            bytes,
            origin: Origin::here(),
        })
    }

    fn at(&self, offset: u64) -> *mut std::ffi::c_void {
        (self.address + offset as usize) as *mut _
    }

    fn answer(&self, operation: &'static str, answer: Answer<()>) -> Result<()> {
        answer.map_err(|error| DeviceError::Failed {
            operation,
            device: self.device.clone(),
            problem: error.to_string(),
        })
    }
}

/// What holds the pages of a memory.
fn file<'a>(device: &DeviceUuid, memory: &'a Memory) -> Result<&'a OwnedFd> {
    Arena::of(memory)?
        .file()
        .ok_or_else(|| DeviceError::Failed {
            operation: "mapping a piece",
            device: device.clone(),
            problem:
                "only exportable memory, imports and host pieces can be mapped in an address space"
                    .to_owned(),
        })
}

const NOTHING: MapFlags = MapFlags::PRIVATE.union(MapFlags::NORESERVE);

impl RawSpace for Reservation {
    fn device(&self) -> &DeviceUuid {
        &self.device
    }

    fn address(&self) -> u64 {
        self.address as u64
    }

    fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    fn granularity(&self) -> u64 {
        page()
    }

    fn accept(&self, memory: &Memory) -> Result<()> {
        file(&self.device, memory).map(|_| ())
    }

    unsafe fn map(&self, offset: u64, memory: &Memory) -> Result<()> {
        let file = file(&self.device, memory)?;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        let bytes = memory.bytes() as usize;
        // SAFETY: the caller promises that the range is in the reservation, where nothing is mapped that anybody uses.
        let mapped =
            unsafe { rustix::mm::mmap(self.at(offset), bytes, ProtFlags::empty(), flags, file, 0) };
        if mapped.is_ok() {
            keep_from_children(self.at(offset) as usize, bytes);
        }
        self.answer("mapping a piece", mapped.map(|_| ()))
    }

    unsafe fn open(&self, offset: u64, bytes: u64) -> Result<()> {
        let access = MprotectFlags::READ | MprotectFlags::WRITE;
        // SAFETY: the caller promises that a piece is mapped there.
        let opened = unsafe { rustix::mm::mprotect(self.at(offset), bytes as usize, access) };
        self.answer("opening a piece", opened)
    }

    unsafe fn unmap(&self, offset: u64, bytes: u64) -> Result<()> {
        let flags = NOTHING | MapFlags::FIXED;
        // SAFETY: the caller promises that this is a piece, which nobody touches.
        let unmapped = unsafe {
            rustix::mm::mmap_anonymous(self.at(offset), bytes as usize, ProtFlags::empty(), flags)
        };
        self.answer("unmapping a piece", unmapped.map(|_| ()))
    }

    fn memory(&self, offset: u64, bytes: u64, pieces: &[Memory]) -> Memory {
        // For the link model, a range is as far away as its farthest piece.
        let own = Place::Device(self.device.clone());
        let places = pieces.iter().filter_map(|piece| Arena::of(piece).ok());
        let mut far = places.map(Arena::place).filter(|place| **place != own);
        let place = far.next().unwrap_or(&own).clone();
        Arena::of_space(&self.device, place, self.address as u64 + offset, bytes)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.origin.is_here() {
            return;
        }
        // SAFETY: the range is ours since `mmap` returned it. Whoever could copy in it would hold the space.
        let unmapped = unsafe { rustix::mm::munmap(self.at(0), self.bytes) };
        debug_assert!(unmapped.is_ok(), "munmap of a reservation: {unmapped:?}");
    }
}

fn page() -> u64 {
    rustix::param::page_size() as u64
}

fn check_whole(device: &DeviceUuid, bytes: u64) -> Result<()> {
    if bytes > 0 && bytes.is_multiple_of(page()) {
        return Ok(());
    }
    Err(DeviceError::Failed {
        operation: "reserving addresses",
        device: device.clone(),
        problem: format!("{bytes} bytes: use a multiple of {}", page()),
    })
}

impl AddressSpaces for HostLayer {
    fn granularity(&self, device: &DeviceUuid) -> Result<u64> {
        self.device(device).map(|_| page())
    }

    fn reserve(&self, device: &DeviceUuid, bytes: u64) -> Result<Arc<AddressSpace>> {
        self.device(device)?;
        check_whole(device, bytes)?;
        let reserved =
            Reservation::new(device, bytes).map_err(|error| DeviceError::OutOfMemory {
                uuid: device.clone(),
                bytes,
                problem: format!("reserving addresses: {error}"),
            })?;
        Ok(AddressSpace::new(Box::new(reserved)))
    }

    fn allocate_host_piece(&self, device: &DeviceUuid, bytes: u64) -> Result<Memory> {
        self.device(device)?;
        check_whole(device, bytes)?;
        Arena::host_piece(device, bytes)
    }
    fn accepts(&self, device: &DeviceUuid, memory: &Memory) -> Result<()> {
        file(device, memory).map(|_| ())
    }
}
