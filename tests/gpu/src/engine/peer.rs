//! The engine on two GPUs: the plain copies between them that SwiftCache's copies are compared with.

use std::ffi::c_int;

use anyhow::Result;

use super::{Call, Engine, EngineStream, check};

/// The driver's code for peer access that is already enabled.
const ALREADY_ENABLED: u32 = 704;

/// Memory of the engine, on one of its GPUs.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    context: usize,
    address: u64,
}

impl Engine {
    /// Memory of the first device, as a place.
    pub fn near(&self, address: u64) -> Place {
        Place {
            context: self.context,
            address,
        }
    }

    /// Allocates HBM of the device with this ordinal. Enables peer access between it and the first device in both
    /// directions, so that plain copies between the two are not staged. The engine never frees the memory.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn allocate_far(&self, ordinal: u32, bytes: u64) -> Result<Place> {
        let mut context = 0;
        let enable = |peer: usize| -> Result<()> {
            // SAFETY: the signature is the driver's; both contexts are retained, one of them current.
            let code = unsafe {
                let enable: unsafe extern "C" fn(usize, u32) -> u32 =
                    self.find("cuCtxEnablePeerAccess")?;
                enable(peer, 0)
            };
            match code {
                ALREADY_ENABLED => Ok(()),
                code => check(code, "cuCtxEnablePeerAccess"),
            }
        };
        // SAFETY: the signatures are the driver's; one context is written, to one of ours.
        unsafe {
            let retain: unsafe extern "C" fn(*mut usize, c_int) -> u32 =
                self.find("cuDevicePrimaryCtxRetain")?;
            let code = retain(&raw mut context, c_int::try_from(ordinal)?);
            check(code, "cuDevicePrimaryCtxRetain")?;
        }
        enable(context)?;
        // SAFETY: the signature is the driver's, and the context was just retained.
        unsafe {
            let push: Call<usize> = self.find("cuCtxPushCurrent_v2")?;
            check(push(context), "cuCtxPushCurrent")?;
        }
        let outcome = enable(self.context).and_then(|()| self.allocate(bytes));
        let mut popped = 0;
        // SAFETY: the signature is the driver's; one context is written, to one of ours. It undoes the push.
        unsafe {
            let pop: Call<*mut usize> = self.find("cuCtxPopCurrent_v2")?;
            check(pop(&raw mut popped), "cuCtxPopCurrent")?;
        }
        outcome.map(|address| Place { context, address })
    }

    /// Queues a plain copy between two places on a stream of the first device.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn copy_across(
        &self,
        stream: EngineStream,
        to: Place,
        from: Place,
        offset: u64,
        bytes: u64,
    ) -> Result<()> {
        if to.context == from.context {
            let (to, from) = (to.address + offset, from.address + offset);
            return self.copy(stream, to, from, bytes);
        }
        // SAFETY: the signature is the driver's; callers copy between memory of `allocate` and `allocate_far` only.
        unsafe {
            let copy: unsafe extern "C" fn(u64, usize, u64, usize, usize, usize) -> u32 =
                self.find("cuMemcpyPeerAsync")?;
            let code = copy(
                to.address + offset,
                to.context,
                from.address + offset,
                from.context,
                usize::try_from(bytes)?,
                stream.0,
            );
            check(code, "cuMemcpyPeerAsync")
        }
    }
}
