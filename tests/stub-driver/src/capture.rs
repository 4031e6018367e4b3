//! How threads and captures of streams into graphs get on with each other.

use std::cell::Cell;

use crate::{Code, INVALID_VALUE, call_anyway};

/// `CU_STREAM_CAPTURE_MODE_GLOBAL`, what threads begin with, and `CU_STREAM_CAPTURE_MODE_RELAXED`.
const GLOBAL: u32 = 0;
const RELAXED: u32 = 2;

thread_local! {
    static MODE: Cell<u32> = const { Cell::new(GLOBAL) };
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) -> Code {
    call_anyway("cuThreadExchangeStreamCaptureMode", || {
        // SAFETY: the caller gives one mode, and takes another in its place.
        let wanted = unsafe { mode.read() };
        if wanted > RELAXED {
            return Err(INVALID_VALUE);
        }
        let before = MODE.replace(wanted);
        // SAFETY: as above.
        unsafe { mode.write(before) };
        Ok(())
    })
}
