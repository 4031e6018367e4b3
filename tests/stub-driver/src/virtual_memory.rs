//! Virtual memory management: physical memory in memfds, mapped in reserved ranges.

use std::{
    ffi::c_int,
    fs::File,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd},
    path::PathBuf,
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
const DESCRIPTOR: u32 = 1;
const READ_WRITE: u32 = 3;
const NAME: &str = "swiftcache-stub-";

/// Memory of a device.
pub(crate) struct Physical {
    file: File,
    pub(crate) size: usize,
    device: c_int,
    /// What accounts for it, if it is this process's own: a file like those of plain allocations, empty on disk.
    account: Option<PathBuf>,
}

impl Drop for Physical {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            // The machine may be gone already: its directory is a test's.
            let _ = std::fs::remove_file(account);
        }
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
    fn device(&self) -> Result<c_int, Code> {
        if self.kind != PINNED || self.location.kind != ON_DEVICE || self.flags != [0; 8] {
            return Err(INVALID_VALUE);
        }
        device::known(self.location.id)
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
        if odd || properties.handle_types != DESCRIPTOR {
            return Err(INVALID_VALUE);
        }
        let mut world = world();
        World::check_room(device, size)?;
        let name = format!("{NAME}{device}\0");
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
            account: Some(account(device, number, size)?),
            file,
            size,
            device,
        };
        world.physical.insert(number, physical);
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
        if kind != DESCRIPTOR || flags != 0 {
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
            device,
            account: None,
        };
        world.physical.insert(number, physical);
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
        let kind = Kind::Virtual {
            mapped: None,
            admitted: Vec::new(),
        };
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
        if !reserved.is_some_and(|found| matches!(found.kind, Kind::Virtual { mapped: None, .. })) {
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
        let physical = world.physical.get(&handle).ok_or(INVALID_VALUE)?;
        if offset != 0 || flags != 0 || size > physical.size {
            return Err(INVALID_VALUE);
        }
        let (device, descriptor) = (physical.device, physical.file.as_raw_fd());
        let range = world.allocations.get_mut(&address).ok_or(INVALID_VALUE)?;
        let Kind::Virtual { mapped, .. } = &mut range.kind else {
            return Err(INVALID_VALUE);
        };
        if range.size != size || mapped.is_some() {
            return Err(INVALID_VALUE);
        }
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        // SAFETY: replaces a reservation of the stub's own, of this very size.
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
        *mapped = Some((handle, device));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemUnmap(address: u64, size: usize) -> Code {
    call("cuMemUnmap", || {
        let mut world = world();
        let range = world.allocations.get_mut(&address).ok_or(INVALID_VALUE)?;
        let Kind::Virtual { mapped, admitted } = &mut range.kind else {
            return Err(INVALID_VALUE);
        };
        if range.size != size || mapped.take().is_none() {
            return Err(INVALID_VALUE);
        }
        admitted.clear();
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
        let range = world.allocations.get_mut(&address).ok_or(INVALID_VALUE)?;
        let Kind::Virtual {
            mapped: Some((_, owner)),
            admitted,
        } = &mut range.kind
        else {
            return Err(INVALID_VALUE);
        };
        if range.size != size {
            return Err(INVALID_VALUE);
        }
        for access in access {
            let device = device::known(access.location.id)?;
            if access.location.kind != ON_DEVICE || access.flags != READ_WRITE {
                return Err(INVALID_VALUE);
            }
            if !device::peers(device, *owner) {
                return Err(INVALID_DEVICE);
            }
            admitted.push(device);
        }
        // SAFETY: a mapping of the stub's own, of this very size.
        unsafe {
            libc::mprotect(address as *mut _, size, libc::PROT_READ | libc::PROT_WRITE);
        }
        Ok(())
    })
}
