//! Legacy handles: the name of an allocation's file, and whose it is.

use std::fs::File;

use crate::{
    Code, INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, PEER_ACCESS_UNSUPPORTED,
    call,
    context::current,
    device::{ordinal, peers},
    faults,
    memory::{Allocation, Kind, is_alive, map_file},
    world,
};

const MAGIC: &[u8; 8] = b"stub-ipc";

/// As the driver passes it: by value.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Handle {
    bytes: [u8; 64],
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcGetMemHandle(handle: *mut Handle, address: u64) -> Code {
    call("cuIpcGetMemHandle", || {
        current()?;
        let world = world();
        let (_, found) = world.find(address, 1).ok_or(INVALID_VALUE)?;
        let Kind::Plain { file, .. } = &found.kind else {
            return Err(INVALID_VALUE);
        };
        let name = file.file_name().ok_or(INVALID_VALUE)?.as_encoded_bytes();
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..8 + name.len()].copy_from_slice(name);
        // SAFETY: the caller gives room for one handle.
        unsafe { handle.write(Handle { bytes }) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcOpenMemHandle_v2(
    address: *mut u64,
    handle: Handle,
    flags: u32,
) -> Code {
    call("cuIpcOpenMemHandle_v2", || {
        let device = current()?;
        let name = handle.bytes.strip_prefix(MAGIC).ok_or(INVALID_VALUE)?;
        let name = std::str::from_utf8(name).map_err(|_| INVALID_VALUE)?;
        let name = name.trim_end_matches('\0');
        let mut parts = name.split('-');
        let owner = parts
            .next()
            .and_then(|owner| owner.parse().ok())
            .ok_or(INVALID_VALUE)?;
        let process = parts.next().ok_or(INVALID_VALUE)?;
        if flags != 1 {
            return Err(INVALID_VALUE);
        }
        if process == std::process::id().to_string() {
            return Err(INVALID_CONTEXT);
        }
        if !is_alive(process) {
            return Err(INVALID_HANDLE);
        }
        ordinal(owner).map_err(|_| INVALID_DEVICE)?;
        if !peers(device, owner) {
            return Err(PEER_ACCESS_UNSUPPORTED);
        }
        let directory = faults::directory().ok_or(INVALID_VALUE)?;
        let mut options = File::options();
        let file = options.read(true).write(true).open(directory.join(name));
        let file = file.map_err(|_| INVALID_HANDLE)?;
        let size = file.metadata().map_err(|_| INVALID_HANDLE)?.len() as usize;
        let base = map_file(&file, size)?;
        let kind = Kind::Opened { device, owner };
        world().allocations.insert(base, Allocation { size, kind });
        // SAFETY: the caller gives room for one address.
        unsafe { address.write(base) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuIpcCloseMemHandle(address: u64) -> Code {
    call("cuIpcCloseMemHandle", || {
        let mut world = world();
        let opened = world.allocations.get(&address);
        if !opened.is_some_and(|found| matches!(found.kind, Kind::Opened { .. })) {
            return Err(INVALID_VALUE);
        }
        world.retire(address).map(|_| ())
    })
}
