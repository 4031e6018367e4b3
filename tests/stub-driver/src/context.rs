//! Primary contexts, and the one that is current on each thread.

use std::{cell::RefCell, ffi::c_int, fs::File, path::PathBuf};

use crate::{
    Code, INVALID_CONTEXT, INVALID_VALUE, OUT_OF_MEMORY, PEER_ACCESS_ALREADY_ENABLED,
    PEER_ACCESS_UNSUPPORTED, call, call_anyway, device, faults, world,
};

thread_local! {
    static STACK: RefCell<Vec<c_int>> = const { RefCell::new(Vec::new()) };
}

/// The device whose context is current, by its number in the machine.
pub(crate) fn current() -> Result<c_int, Code> {
    STACK
        .with_borrow(|stack| stack.last().copied())
        .ok_or(INVALID_CONTEXT)
}

/// Contexts are devices' numbers in the machine, from 1 on.
pub(crate) fn device_of(context: usize) -> Result<c_int, Code> {
    let device = c_int::try_from(context).map_err(|_| INVALID_CONTEXT)? - 1;
    let retained = world().retained.get(&device).copied().unwrap_or(0);
    if retained == 0 {
        Err(INVALID_CONTEXT)
    } else {
        Ok(device)
    }
}

/// HBM of a process's context on a device, bytes; a real one takes some 500 MB.
const CONTEXT_BYTES: u64 = 64 << 20;

/// What accounts for a context: a file like those of allocations, empty on disk.
fn hbm_file(device: c_int) -> Option<PathBuf> {
    let name = format!("{device}-{}-context", std::process::id());
    Some(faults::directory()?.join(name))
}

fn take_hbm(device: c_int) -> Result<(), Code> {
    let path = hbm_file(device).ok_or(OUT_OF_MEMORY)?;
    let file = File::create(path).map_err(|_| OUT_OF_MEMORY)?;
    file.set_len(CONTEXT_BYTES).map_err(|_| OUT_OF_MEMORY)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut usize, number: c_int) -> Code {
    call("cuDevicePrimaryCtxRetain", || {
        let number = device::known(number)?;
        let mut world = world();
        let retained = world.retained.entry(number).or_default();
        *retained += 1;
        if *retained == 1 {
            take_hbm(number)?;
        }
        // SAFETY: the caller gives room for one context.
        unsafe { context.write(number as usize + 1) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRelease_v2(number: c_int) -> Code {
    call("cuDevicePrimaryCtxRelease_v2", || {
        let number = device::known(number)?;
        let mut world = world();
        let retained = world.retained.get_mut(&number).filter(|count| **count > 0);
        let retained = retained.ok_or(INVALID_CONTEXT)?;
        *retained -= 1;
        if *retained == 0
            && let Some(file) = hbm_file(number)
        {
            std::fs::remove_file(file).map_err(|_| INVALID_CONTEXT)?;
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPushCurrent_v2(context: usize) -> Code {
    // A broken context can still be made current: what is done in it fails.
    call_anyway("cuCtxPushCurrent_v2", || {
        let device = device_of(context)?;
        STACK.with_borrow_mut(|stack| stack.push(device));
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut usize) -> Code {
    call_anyway("cuCtxPopCurrent_v2", || {
        let device = STACK.with_borrow_mut(Vec::pop).ok_or(INVALID_CONTEXT)?;
        // SAFETY: the caller gives room for one context.
        unsafe { context.write(device as usize + 1) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxEnablePeerAccess(peer: usize, flags: u32) -> Code {
    call("cuCtxEnablePeerAccess", || {
        let (here, there) = (current()?, device_of(peer)?);
        if flags != 0 || here == there {
            return Err(INVALID_VALUE);
        }
        if !device::peers(here, there) {
            return Err(PEER_ACCESS_UNSUPPORTED);
        }
        let fresh = world().peers.insert((here, there));
        fresh.then_some(()).ok_or(PEER_ACCESS_ALREADY_ENABLED)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxGetStreamPriorityRange(
    least: *mut c_int,
    greatest: *mut c_int,
) -> Code {
    call("cuCtxGetStreamPriorityRange", || {
        current()?;
        // SAFETY: the caller gives room for two ints.
        unsafe {
            least.write(0);
            greatest.write(-5);
        }
        Ok(())
    })
}
