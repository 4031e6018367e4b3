//! Virtual memory management: physical memory in memfds, mapped in reserved ranges.

use std::{
    collections::BTreeMap,
    ffi::c_int,
    fs::File,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd},
    path::PathBuf,
    sync::Arc,
};

use crate::{
    Code, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, OUT_OF_MEMORY, World, call, device,
    faults,
    memory::{Allocation, Kind, reserve_at},
    world,
};

const GRANULARITY: usize = 2 << 20;
const PINNED: u32 = 1;
const ON_DEVICE: u32 = 1;
const ON_HOST_NODE: u32 = 3;
const NOT_SHARED: u32 = 0;
const DESCRIPTOR: u32 = 1;
const READ_WRITE: u32 = 3;
const NAME: &str = "swiftcache-stub-";

/// Memory of a device, or of the host. It lives as long as it has a handle or is mapped.
pub(crate) struct Physical {
    file: File,
    size: usize,
    /// None: the host's.
    device: Option<c_int>,
    /// What accounts for it, if it is this process's own: a file like those of plain allocations, empty on disk.
    account: Option<PathBuf>,
    /// Whether it was made to be exported.
    shared: bool,
}

impl Drop for Physical {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            // The machine may be gone already: its directory is a test's.
            let _ = std::fs::remove_file(account);
        }
    }
}

/// What is mapped in a reserved range, by address.
#[derive(Default)]
pub(crate) struct Pieces(BTreeMap<u64, Piece>);

struct Piece {
    physical: Arc<Physical>,
    /// Of the mapping, bytes.
    size: usize,
    /// The devices that may touch it.
    admitted: Vec<c_int>,
}

impl Pieces {
    fn find(&self, address: u64) -> Option<(u64, &Piece)> {
        let (start, piece) = self.0.range(..=address).next_back()?;
        (address < start + piece.size as u64).then_some((*start, piece))
    }

    /// Where the piece at an address starts, and its size.
    pub(crate) fn at(&self, address: u64) -> Option<(u64, usize)> {
        let (start, piece) = self.find(address)?;
        Some((start, piece.size))
    }

    /// The device whose memory is at an address.
    pub(crate) fn device_at(&self, address: u64) -> Option<c_int> {
        self.find(address)?.1.physical.device
    }

    /// Whether a device may touch all of a range.
    pub(crate) fn admits(&self, device: c_int, address: u64, bytes: usize) -> bool {
        let mut reached = address;
        while reached < address + bytes as u64 {
            match self.find(reached) {
                Some((start, piece)) if piece.admitted.contains(&device) => {
                    reached = start + piece.size as u64;
                }
                _ => return false,
            }
        }
        true
    }

    /// The addresses of the pieces that make up exactly a range.
    fn exactly(&self, address: u64, size: usize) -> Result<Vec<u64>, Code> {
        let end = address + size as u64;
        let mut reached = address;
        let mut found = Vec::new();
        for (start, piece) in self.0.range(address..end) {
            if *start != reached {
                return Err(INVALID_VALUE);
            }
            found.push(*start);
            reached += piece.size as u64;
        }
        if found.is_empty() || reached != end {
            return Err(INVALID_VALUE);
        }
        Ok(found)
    }
}

/// What is mapped in the reservation that holds a range.
fn pieces(world: &mut World, address: u64, size: usize) -> Result<&mut Pieces, Code> {
    let (base, _) = world.find(address, size).ok_or(INVALID_VALUE)?;
    let range = world.allocations.get_mut(&base).ok_or(INVALID_VALUE)?;
    match &mut range.kind {
        Kind::Virtual(pieces) => Ok(pieces),
        _ => Err(INVALID_VALUE),
    }
}

#[repr(C)]
pub struct Location {
    kind: u32,
    id: c_int,
}

#[repr(C)]
pub struct Properties {
    kind: u32,
    handle_types: u32,
    location: Location,
    windows: *mut u8,
    flags: [u8; 8],
}

#[repr(C)]
pub struct Access {
    location: Location,
    flags: u32,
}

impl Properties {
    /// The device that it is about; none for the host.
    fn device(&self) -> Result<Option<c_int>, Code> {
        if self.kind != PINNED || self.flags != [0; 8] {
            return Err(INVALID_VALUE);
        }
        match self.location.kind {
            ON_DEVICE => device::known(self.location.id).map(Some),
            ON_HOST_NODE if self.location.id == 0 => Ok(None),
            _ => Err(INVALID_VALUE),
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemGetAllocationGranularity(
    granularity: *mut usize,
    properties: *const Properties,
    _option: u32,
) -> Code {
    call("cuMemGetAllocationGranularity", || {
        // SAFETY: the caller gives complete properties, and room for one number.
        unsafe {
            (*properties).device()?;
            granularity.write(GRANULARITY);
        }
        Ok(())
    })
}

fn account(device: c_int, number: u64, size: usize) -> Result<PathBuf, Code> {
    let name = format!("{device}-{}-{number}", std::process::id());
    let path = faults::directory().ok_or(OUT_OF_MEMORY)?.join(name);
    let file = File::create(&path).map_err(|_| OUT_OF_MEMORY)?;
    file.set_len(size as u64).map_err(|_| OUT_OF_MEMORY)?;
    Ok(path)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemCreate(
    handle: *mut u64,
    size: usize,
    properties: *const Properties,
    flags: u64,
) -> Code {
    call("cuMemCreate", || {
        // SAFETY: the caller gives complete properties.
        let properties = unsafe { &*properties };
        let device = properties.device()?;
        let odd = size == 0 || !size.is_multiple_of(GRANULARITY) || flags != 0;
        let shared = properties.handle_types == DESCRIPTOR;
        if odd || !(shared || properties.handle_types == NOT_SHARED) {
            return Err(INVALID_VALUE);
        }
        let mut world = world();
        if let Some(device) = device {
            World::check_room(device, size)?;
        }
        let owner = device.map_or_else(|| "host".to_owned(), |device| device.to_string());
        let name = format!("{NAME}{owner}\0");
        // SAFETY: the name is NUL-terminated.
        let descriptor = unsafe { libc::memfd_create(name.as_ptr().cast(), libc::MFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(OUT_OF_MEMORY);
        }
        // SAFETY: the descriptor was just made, and nobody else owns it.
        let file = unsafe { File::from_raw_fd(descriptor) };
        file.set_len(size as u64).map_err(|_| OUT_OF_MEMORY)?;
        let number = world.number();
        let physical = Physical {
            account: match device {
                Some(device) => Some(account(device, number, size)?),
                None => None,
            },
            file,
            size,
            device,
            shared,
        };
        world.physical.insert(number, Arc::new(physical));
        // SAFETY: the caller gives room for one handle.
        unsafe { handle.write(number) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemRelease(handle: u64) -> Code {
    call("cuMemRelease", || {
        let released = world().physical.remove(&handle);
        released.map(|_| ()).ok_or(INVALID_VALUE)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemExportToShareableHandle(
    shared: *mut c_int,
    handle: u64,
    kind: u32,
    flags: u64,
) -> Code {
    call("cuMemExportToShareableHandle", || {
        let world = world();
        let physical = world.physical.get(&handle).ok_or(INVALID_VALUE)?;
        if kind != DESCRIPTOR || flags != 0 || !physical.shared {
            return Err(INVALID_VALUE);
        }
        let file = physical.file.try_clone().map_err(|_| OUT_OF_MEMORY)?;
        // SAFETY: the caller gives room for one descriptor, and owns it from now on.
        unsafe { shared.write(file.into_raw_fd()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemImportFromShareableHandle(
    handle: *mut u64,
    shared: usize,
    kind: u32,
) -> Code {
    call("cuMemImportFromShareableHandle", || {
        let descriptor = c_int::try_from(shared).map_err(|_| INVALID_VALUE)?;
        let path = std::fs::read_link(format!("/proc/self/fd/{descriptor}"));
        let path = path.map_err(|_| INVALID_VALUE)?;
        let name = path.to_string_lossy();
        let ours = name.split_once(NAME).map(|(_, rest)| rest);
        let device = ours.and_then(|rest| rest.split(' ').next()?.parse().ok());
        let device: c_int = device.filter(|_| kind == DESCRIPTOR).ok_or(INVALID_VALUE)?;
        if !device::has_node(device) {
            return Err(INVALID_DEVICE);
        }
        // SAFETY: the link above shows that it is open, and the caller keeps it open during the call.
        let borrowed = unsafe { BorrowedFd::borrow_raw(descriptor) };
        let file = File::from(borrowed.try_clone_to_owned().map_err(|_| INVALID_HANDLE)?);
        let size = file.metadata().map_err(|_| INVALID_HANDLE)?.len() as usize;
        let mut world = world();
        let number = world.number();
        let physical = Physical {
            file,
            size,
            device: Some(device),
            account: None,
            shared: true,
        };
        world.physical.insert(number, Arc::new(physical));
        // SAFETY: the caller gives room for one handle.
        unsafe { handle.write(number) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressReserve(
    address: *mut u64,
    size: usize,
    alignment: usize,
    wanted: u64,
    flags: u64,
) -> Code {
    call("cuMemAddressReserve", || {
        let odd = !size.is_multiple_of(GRANULARITY) || alignment != 0 || wanted != 0 || flags != 0;
        if size == 0 || odd {
            return Err(INVALID_VALUE);
        }
        let base = reserve_at(std::ptr::null_mut(), size);
        if base == libc::MAP_FAILED as u64 {
            return Err(OUT_OF_MEMORY);
        }
        let kind = Kind::Virtual(Pieces::default());
        world().allocations.insert(base, Allocation { size, kind });
        // SAFETY: the caller gives room for one address.
        unsafe { address.write(base) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAddressFree(address: u64, size: usize) -> Code {
    call("cuMemAddressFree", || {
        let mut world = world();
        let reserved = world
            .allocations
            .get(&address)
            .filter(|found| found.size == size);
        let empty = |found: &Allocation| match &found.kind {
            Kind::Virtual(pieces) => pieces.0.is_empty(),
            _ => false,
        };
        if !reserved.is_some_and(empty) {
            return Err(INVALID_VALUE);
        }
        world.retire(address).map(|_| ())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemMap(
    address: u64,
    size: usize,
    offset: usize,
    handle: u64,
    flags: u64,
) -> Code {
    call("cuMemMap", || {
        let mut world = world();
        let physical = world.physical.get(&handle).map(Arc::clone);
        let physical = physical.ok_or(INVALID_VALUE)?;
        let (base, _) = world.find(address, size).ok_or(INVALID_VALUE)?;
        let place = (address - base) as usize;
        let odd = !size.is_multiple_of(GRANULARITY) || !place.is_multiple_of(GRANULARITY);
        if offset != 0 || flags != 0 || size == 0 || size > physical.size || odd {
            return Err(INVALID_VALUE);
        }
        let descriptor = physical.file.as_raw_fd();
        let pieces = pieces(&mut world, address, size)?;
        let last = pieces.0.range(..address + size as u64).next_back();
        if last.is_some_and(|(start, piece)| start + piece.size as u64 > address) {
            return Err(INVALID_VALUE);
        }
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: replaces a part of a reservation of the stub's own, where nothing is mapped.
        let base = unsafe {
            libc::mmap(
                address as *mut _,
                size,
                libc::PROT_NONE,
                flags,
                descriptor,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(OUT_OF_MEMORY);
        }
        let piece = Piece {
            physical,
            size,
            admitted: Vec::new(),
        };
        pieces.0.insert(address, piece);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemUnmap(address: u64, size: usize) -> Code {
    call("cuMemUnmap", || {
        let mut world = world();
        let pieces = pieces(&mut world, address, size)?;
        for start in pieces.exactly(address, size)? {
            pieces.0.remove(&start);
        }
        reserve_at(address as *mut _, size);
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemSetAccess(
    address: u64,
    size: usize,
    access: *const Access,
    count: usize,
) -> Code {
    call("cuMemSetAccess", || {
        // SAFETY: the caller gives `count` complete descriptions.
        let access = unsafe { std::slice::from_raw_parts(access, count) };
        let mut world = world();
        let pieces = pieces(&mut world, address, size)?;
        let covered = pieces.exactly(address, size)?;
        for access in access {
            let device = device::known(access.location.id)?;
            if access.location.kind != ON_DEVICE || access.flags != READ_WRITE {
                return Err(INVALID_VALUE);
            }
            for start in &covered {
                let piece = pieces.0.get_mut(start).ok_or(INVALID_VALUE)?;
                let owner = piece.physical.device;
                if owner.is_some_and(|owner| !device::peers(device, owner)) {
                    return Err(INVALID_DEVICE);
                }
                piece.admitted.push(device);
            }
        }
        // SAFETY: mappings of the stub's own, which make up this range.
        unsafe {
            libc::mprotect(address as *mut _, size, libc::PROT_READ | libc::PROT_WRITE);
        }
        Ok(())
    })
}
