//! Modules and kernels: those that SwiftCache has, and those of the tests' engine, known by their names.

use std::ffi::{CStr, c_char, c_void};

use crate::{
    Code, INVALID_HANDLE, INVALID_VALUE, NOT_FOUND, call,
    context::current,
    stream::{self, Work},
};

const MODULE: usize = 0x6d6f_6475;
const GATHER: usize = 0x6761_7468;
const GATHER_FEW: usize = 0x6761_7466;
/// Pieces that the parameters of `GATHER_FEW` hold.
const FEW: usize = 1360;
const BUSY: usize = 0x6275_7379;

/// One piece, as the kernel reads it.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) bytes: u64,
}

/// Where a launch's pieces are.
#[derive(Clone)]
pub(crate) enum Pieces {
    /// So many, at an address that the kernel reads when it runs.
    At(u64, usize),
    /// In the launch itself.
    Copied(Vec<Piece>),
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut usize, image: *const c_char) -> Code {
    call("cuModuleLoadData", || {
        current()?;
        // SAFETY: the image is NUL-terminated text.
        let text = unsafe { CStr::from_ptr(image) }.to_string_lossy();
        if !text.contains(".version") || !text.contains(".entry swiftcache_") {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller gives room for one module.
        unsafe { module.write(MODULE) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut usize,
    module: usize,
    name: *const c_char,
) -> Code {
    call("cuModuleGetFunction", || {
        // SAFETY: the name is NUL-terminated.
        let name = unsafe { CStr::from_ptr(name) };
        if module != MODULE {
            return Err(INVALID_HANDLE);
        }
        let found = match name.to_bytes() {
            b"swiftcache_gather" => GATHER,
            b"swiftcache_gather_few" => GATHER_FEW,
            b"swiftcache_busy_full" | b"swiftcache_busy_light" => BUSY,
            _ => return Err(NOT_FOUND),
        };
        // SAFETY: the caller gives room for one function.
        unsafe { function.write(found) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: usize,
    blocks: u32,
    blocks_y: u32,
    blocks_z: u32,
    threads: u32,
    threads_y: u32,
    threads_z: u32,
    _shared_bytes: u32,
    stream: usize,
    parameters: *mut *mut c_void,
    extra: *mut *mut c_void,
) -> Code {
    call("cuLaunchKernel", || {
        let flat = [blocks_y, blocks_z, threads_y, threads_z] == [1; 4];
        let expected = if function == BUSY { 256 } else { 512 };
        if !flat || blocks == 0 || threads != expected || !extra.is_null() {
            return Err(INVALID_VALUE);
        }
        if function == BUSY {
            return Ok(()); // it has no result, and on this device it takes no time
        }
        // SAFETY: both kernels have four parameters, the last three of them numbers, and the caller points to each.
        let (first, [tiles, split, tile]) = unsafe {
            let parameters = std::slice::from_raw_parts(parameters, 4);
            let number = |index: usize| parameters[index].cast::<u32>().read();
            (parameters[0], [number(1), number(2), number(3)])
        };
        if split == 0 || tile == 0 || tiles % split != 0 {
            return Err(INVALID_VALUE);
        }
        let count = (tiles / split) as usize;
        let most = u64::from(split) * u64::from(tile);
        let pieces = match function {
            // SAFETY: the first parameter is a pointer.
            GATHER => Pieces::At(unsafe { first.cast::<u64>().read() }, count),
            GATHER_FEW if count <= FEW => {
                // SAFETY: the first parameter is an array of that many pieces, which a launch copies.
                let pieces = unsafe { std::slice::from_raw_parts(first.cast::<Piece>(), FEW) };
                Pieces::Copied(pieces[..count].to_vec())
            }
            GATHER_FEW => return Err(INVALID_VALUE),
            _ => return Err(INVALID_HANDLE),
        };
        stream::queue(stream, Work::Gather { pieces, most })
    })
}
