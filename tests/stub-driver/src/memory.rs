//! Allocations of every kind, and who may touch them.

use std::{
    ffi::{c_int, c_void},
    fs::File,
    os::fd::AsRawFd,
    path::PathBuf,
};

use crate::{
    Code, HOST_MEMORY_ALREADY_REGISTERED, HOST_MEMORY_NOT_REGISTERED, INVALID_VALUE, OUT_OF_MEMORY,
    World, call,
    context::current,
    device::{HBM_BYTES, ordinal},
    faults,
    virtual_memory::Pieces,
    world,
};

/// A range of addresses.
pub(crate) struct Allocation {
    pub(crate) size: usize,
    pub(crate) kind: Kind,
}

pub(crate) enum Kind {
    /// `cuMemAlloc`: a file.
    Plain { device: c_int, file: PathBuf },
    /// Another process's file, opened for one device.
    Opened { device: c_int, owner: c_int },
    /// A reserved range, and what is mapped there.
    Virtual(Pieces),
    /// Pinned host memory.
    Host,
    /// The process's own host memory, pinned for the time being.
    Registered,
    /// Freed. The addresses stay taken, so that a late copy is noticed.
    Gone,
}

impl World {
    /// The allocation that holds the whole range, and where it starts.
    pub(crate) fn find(&self, address: u64, bytes: usize) -> Option<(u64, &Allocation)> {
        let (base, allocation) = self.allocations.range(..=address).next_back()?;
        let end = base + allocation.size as u64;
        (address + bytes as u64 <= end).then_some((*base, allocation))
    }

    /// The device whose memory an address is in, if it is any's.
    pub(crate) fn home(&self, address: u64) -> Option<c_int> {
        match &self.find(address, 1)?.1.kind {
            Kind::Plain { device, .. } => Some(*device),
            Kind::Opened { owner, .. } => Some(*owner),
            Kind::Virtual(pieces) => pieces.device_at(address),
            Kind::Host | Kind::Registered | Kind::Gone => None,
        }
    }

    /// Whether `device` may touch a range: by a kernel, or by a copy engine, which stages where there is no peer
    /// access and reaches ordinary host memory too.
    pub(crate) fn may_touch(
        &self,
        device: c_int,
        address: u64,
        bytes: usize,
        kernel: bool,
    ) -> bool {
        let overlapping = |address: u64| {
            let found = self.allocations.range(..address + bytes as u64).next_back();
            found.is_some_and(|(base, found)| base + found.size as u64 > address)
        };
        let Some((_, allocation)) = self.find(address, bytes) else {
            return !kernel && !overlapping(address);
        };
        match &allocation.kind {
            Kind::Plain { device: owner, .. } => {
                !kernel || *owner == device || self.peers.contains(&(device, *owner))
            }
            Kind::Opened { device: opener, .. } => *opener == device,
            Kind::Virtual(pieces) => pieces.admits(device, address, bytes),
            Kind::Host | Kind::Registered => true,
            Kind::Gone => false,
        }
    }

    /// HBM of `device` in use: the files of every process that lives.
    fn used(device: c_int) -> usize {
        let Some(directory) = faults::directory() else {
            return 0;
        };
        let prefix = format!("{device}-");
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        let bytes: u64 = entries
            .filter(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                let process = name
                    .strip_prefix(&prefix)
                    .and_then(|rest| rest.split('-').next());
                process.is_some_and(is_alive)
            })
            .filter_map(|entry| entry.metadata().ok())
            .map(|data| data.len())
            .sum();
        bytes as usize
    }

    /// Fails if `bytes` more do not fit.
    pub(crate) fn check_room(device: c_int, bytes: usize) -> Result<(), Code> {
        let sum = Self::used(device).checked_add(bytes);
        sum.filter(|sum| *sum <= HBM_BYTES)
            .map(|_| ())
            .ok_or(OUT_OF_MEMORY)
    }

    /// Makes a range inaccessible and never uses its addresses again.
    pub(crate) fn retire(&mut self, base: u64) -> Result<Kind, Code> {
        let allocation = self.allocations.get_mut(&base).ok_or(INVALID_VALUE)?;
        let kind = std::mem::replace(&mut allocation.kind, Kind::Gone);
        reserve_at(base as *mut c_void, allocation.size);
        Ok(kind)
    }
}

/// Whether a process lives, by its number as text.
pub(crate) fn is_alive(process: &str) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{process}/stat"));
    // A killed process that nobody has waited for is as dead as any.
    status.is_ok_and(|status| !status.contains(") Z"))
}

/// Maps a file, shared.
pub(crate) fn map_file(file: &File, size: usize) -> Result<u64, Code> {
    // SAFETY: the kernel picks the address; the descriptor is open during the call.
    let address = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if address == libc::MAP_FAILED {
        Err(OUT_OF_MEMORY)
    } else {
        Ok(address as u64)
    }
}

/// Reserves addresses; with null the kernel picks them.
pub(crate) fn reserve_at(address: *mut c_void, size: usize) -> u64 {
    let fixed = if address.is_null() {
        0
    } else {
        libc::MAP_FIXED
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
    // SAFETY: the kernel picks the address, or the caller replaces a mapping of the stub's own.
    unsafe { libc::mmap(address, size, libc::PROT_NONE, flags, -1, 0) as u64 }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> Code {
    call("cuMemGetInfo_v2", || {
        let used = World::used(current()?);
        // SAFETY: the caller gives room for two numbers.
        unsafe {
            free.write(HBM_BYTES.saturating_sub(used));
            total.write(HBM_BYTES);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, size: usize) -> Code {
    call("cuMemAlloc_v2", || {
        let device = current()?;
        let mut world = world();
        if size == 0 {
            return Err(INVALID_VALUE);
        }
        World::check_room(device, size)?;
        let number = world.number();
        let directory = faults::directory().ok_or(OUT_OF_MEMORY)?;
        let path = directory.join(format!("{device}-{}-{number}", std::process::id()));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|_| OUT_OF_MEMORY)?;
        file.set_len(size as u64).map_err(|_| OUT_OF_MEMORY)?;
        let base = map_file(&file, size)?;
        // Real HBM is full of somebody's old bytes.
        // SAFETY: the range was just mapped, at least a page of it.
        unsafe { std::ptr::write_bytes(base as *mut u8, 0xdb, size.min(1 << 20)) };
        let kind = Kind::Plain { device, file: path };
        world.allocations.insert(base, Allocation { size, kind });
        // SAFETY: the caller gives room for one address.
        unsafe { address.write(base) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(address: u64) -> Code {
    call("cuMemFree_v2", || {
        current()?;
        let mut world = world();
        let plain = world.allocations.get(&address);
        if !plain.is_some_and(|found| matches!(found.kind, Kind::Plain { .. })) {
            return Err(INVALID_VALUE);
        }
        if let Kind::Plain { file, .. } = world.retire(address)? {
            std::fs::remove_file(file).map_err(|_| INVALID_VALUE)?;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostAlloc(
    address: *mut *mut c_void,
    size: usize,
    _flags: u32,
) -> Code {
    call("cuMemHostAlloc", || {
        current()?;
        if size == 0 || size > isize::MAX as usize {
            return Err(OUT_OF_MEMORY);
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel picks the address.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(OUT_OF_MEMORY);
        }
        let kind = Kind::Host;
        world()
            .allocations
            .insert(base as u64, Allocation { size, kind });
        // SAFETY: the caller gives room for one address.
        unsafe { address.write(base) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFreeHost(address: u64) -> Code {
    call("cuMemFreeHost", || {
        let mut world = world();
        let host = world.allocations.get(&address);
        if !host.is_some_and(|found| matches!(found.kind, Kind::Host)) {
            return Err(INVALID_VALUE);
        }
        world.retire(address).map(|_| ())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostRegister_v2(address: u64, size: usize, _flags: u32) -> Code {
    call("cuMemHostRegister_v2", || {
        current()?;
        let mut world = world();
        let mut below = world.allocations.range(..address + size as u64);
        let taken = below.next_back();
        if size == 0 || taken.is_some_and(|(base, found)| base + found.size as u64 > address) {
            return Err(HOST_MEMORY_ALREADY_REGISTERED);
        }
        let kind = Kind::Registered;
        world.allocations.insert(address, Allocation { size, kind });
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostUnregister(address: u64) -> Code {
    call("cuMemHostUnregister", || {
        current()?;
        let mut world = world();
        let known = world.allocations.get(&address);
        if !known.is_some_and(|found| matches!(found.kind, Kind::Registered)) {
            return Err(HOST_MEMORY_NOT_REGISTERED);
        }
        world.allocations.remove(&address);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemHostGetDevicePointer_v2(
    device_address: *mut u64,
    address: u64,
    _flags: u32,
) -> Code {
    call("cuMemHostGetDevicePointer_v2", || {
        current()?;
        let world = world();
        let (_, found) = world.find(address, 1).ok_or(INVALID_VALUE)?;
        if !matches!(found.kind, Kind::Host | Kind::Registered) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller gives room for one address.
        unsafe { device_address.write(address) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAddressRange_v2(
    base: *mut u64,
    length: *mut usize,
    address: u64,
) -> Code {
    call("cuMemGetAddressRange_v2", || {
        let world = world();
        let (start, found) = world.find(address, 1).ok_or(INVALID_VALUE)?;
        let (start, size) = match &found.kind {
            Kind::Gone => return Err(INVALID_VALUE),
            Kind::Virtual(pieces) => pieces.at(address).ok_or(INVALID_VALUE)?,
            _ => (start, found.size),
        };
        // SAFETY: the caller gives room for two numbers.
        unsafe {
            base.write(start);
            length.write(size);
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuPointerGetAttribute(
    data: *mut c_int,
    attribute: u32,
    address: u64,
) -> Code {
    const DEVICE_ORDINAL: u32 = 9;
    const UNKNOWN_DEVICE: c_int = -1;
    call("cuPointerGetAttribute", || {
        let world = world();
        let (_, found) = world.find(address, 1).ok_or(INVALID_VALUE)?;
        let device = match &found.kind {
            Kind::Plain { device, .. } => *device,
            Kind::Opened { owner, .. } => *owner,
            Kind::Virtual(pieces) => pieces.device_at(address).ok_or(INVALID_VALUE)?,
            Kind::Host | Kind::Registered | Kind::Gone => return Err(INVALID_VALUE),
        };
        if attribute != DEVICE_ORDINAL {
            return Err(INVALID_VALUE);
        }
        let ordinal = ordinal(device).unwrap_or(UNKNOWN_DEVICE);
        // SAFETY: the attribute is an int, and the caller gives room for it.
        unsafe { data.write(ordinal) };
        Ok(())
    })
}
