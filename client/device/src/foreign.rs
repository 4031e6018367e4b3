//! What an engine in the same process owns and the cache uses: its KV pool and its streams.
//!
//! What can be checked is checked. The rest is the engine's word, so each function here is `unsafe` and says what its
//! caller vouches for. Without `unsafe` nobody can have copies reach memory that may be freed:
//!
//! ```compile_fail,E0133
//! #![forbid(unsafe_code)]
//! # use swiftcache_device::{DeviceLayer, Memory, Result, foreign};
//! # use swiftcache_proto::domain::DeviceUuid;
//! fn adopt(layer: &dyn DeviceLayer, device: &DeviceUuid) -> Result<Memory> {
//!     let block = vec![0_u8; 1 << 16];
//!     let address = block.as_ptr() as u64;
//!     foreign::adopt_pool(layer, device, address, 1 << 16, Box::new(())) // `block` is freed, and written later
//! }
//! ```
//!
//! ```compile_fail,E0133
//! #![forbid(unsafe_code)]
//! # use swiftcache_device::{Memory, DeviceLayer, Result, foreign};
//! fn lend(layer: &dyn DeviceLayer, pool: &Memory) -> Result<Memory> {
//!     foreign::lend_pool(layer, pool, 0, 1 << 16, Box::new(())) // zeroed, whoever uses it
//! }
//! ```
//!
//! ```compile_fail,E0133
//! #![forbid(unsafe_code)]
//! # use swiftcache_device::{DeviceLayer, Result, Ticket, foreign};
//! # use swiftcache_proto::domain::DeviceUuid;
//! fn mark(layer: &dyn DeviceLayer, device: &DeviceUuid) -> Result<Option<Ticket>> {
//!     foreign::mark(layer, device, 0xdead) // no stream
//! }
//! ```
//!
//! ```compile_fail,E0133
//! #![forbid(unsafe_code)]
//! # use swiftcache_device::{DeviceLayer, Ticket, foreign};
//! # use swiftcache_proto::domain::DeviceUuid;
//! fn gate(layer: &dyn DeviceLayer, device: &DeviceUuid, tickets: &[Ticket]) -> Vec<Ticket> {
//!     foreign::gate(layer, device, 0xdead, tickets) // no stream
//! }
//! ```
//!
//! With it, and with an owner that holds the block, the same is right:
//!
//! ```
//! # use swiftcache_device::{DeviceLayer, Memory, Result, Ticket, foreign};
//! # use swiftcache_proto::domain::DeviceUuid;
//! fn adopt(layer: &dyn DeviceLayer, device: &DeviceUuid) -> Result<Memory> {
//!     let block = vec![0_u8; 1 << 16];
//!     let address = block.as_ptr() as u64;
//!     // SAFETY: the owner is the block itself, whose bytes nobody else reaches from now on.
//!     unsafe { foreign::adopt_pool(layer, device, address, 1 << 16, Box::new(block)) }
//! }
//! fn lend(layer: &dyn DeviceLayer, pool: &Memory) -> Result<Memory> {
//!     // SAFETY: only copies reach the pool's bytes, and none of this range is queued or will be.
//!     unsafe { foreign::lend_pool(layer, pool, 0, 1 << 16, Box::new(())) }
//! }
//! fn mark(layer: &dyn DeviceLayer, device: &DeviceUuid) -> Result<Option<Ticket>> {
//!     // SAFETY: the default stream is always alive.
//!     unsafe { foreign::mark(layer, device, 0) }
//! }
//! fn gate(layer: &dyn DeviceLayer, device: &DeviceUuid, tickets: &[Ticket]) -> Vec<Ticket> {
//!     // SAFETY: as above.
//!     unsafe { foreign::gate(layer, device, 0, tickets) }
//! }
//! ```

use std::{any::Any, sync::Arc};

use swiftcache_proto::domain::DeviceUuid;

use super::{CopyStream, DeviceLayer, Memory, Result, Ticket};

/// Wraps part of an engine's KV pool so that copies may reach it. `owner` is kept alive until the last clone of the
/// [`Memory`] is gone and every copy queued with it is over.
///
/// # Safety
/// As long as `owner` lives:
/// * the `bytes` bytes from `address` on (a `CUdeviceptr`, or a host pointer on the host backend) stay allocated;
/// * nothing holds Rust references into them.
///
/// # Errors
/// When the device is unknown, or the range is not all mapped for reading and writing (on CUDA: not all on that
/// device, as far as its driver knows).
pub unsafe fn adopt_pool(
    layer: &dyn DeviceLayer,
    device: &DeviceUuid,
    address: u64,
    bytes: u64,
    owner: Box<dyn Any + Send + Sync>,
) -> Result<Memory> {
    // SAFETY: the caller promises it for as long as `owner` lives. Streams keep the memory, and with it the owner, until
    // their copies are over.
    let memory = unsafe { layer.adopt_memory(device, address, bytes) }?;
    memory.keep(owner);
    Ok(memory)
}

/// Turns a range of an engine's pool that the engine does not use now into memory that can be lent to other processes.
/// What is lent may be a little less: the [`Memory`] says how much. `back` is dropped when the range is the engine's own
/// again, and zero: after the last clone is gone, and not before.
///
/// # Safety
/// The range is left alone until `back` is dropped: nothing reads or writes it but copies with the result, and other
/// processes. What was queued before that touches it is over.
///
/// # Errors
/// When the range cannot be exported, and says why.
pub unsafe fn lend_pool(
    layer: &dyn DeviceLayer,
    pool: &Memory,
    offset: u64,
    bytes: u64,
    back: Box<dyn Any + Send + Sync>,
) -> Result<Memory> {
    // SAFETY: the caller promises the same, until `back` says that it need not any more.
    let memory = unsafe { layer.lend(pool, offset, bytes) }?;
    memory.keep(back);
    Ok(memory)
}

/// Marks the present end of an engine's stream, a raw `CUstream` of the device's primary context (0: the default
/// stream). `None` where engines have no streams: what they have computed is there.
///
/// # Errors
/// When the device is unknown or the driver refuses, and while the stream is captured into a CUDA graph: its work does not
/// run then, so there is no point to mark. The capture goes on.
///
/// # Safety
/// Where there are streams ([`DeviceLayer::has_foreign_streams`]), `raw` is a live one of `device`'s primary context, or 0.
pub unsafe fn mark(
    layer: &dyn DeviceLayer,
    device: &DeviceUuid,
    raw: u64,
) -> Result<Option<Ticket>> {
    // SAFETY: the caller promises the same.
    unsafe { adopt(layer, device, raw) }?
        .map(|stream| stream.record())
        .transpose()
}

/// Makes an engine's stream wait for tickets, on the device, and waits for nothing itself. Returns those for which that is
/// not possible: the caller [waits](Ticket::wait) for them, so that nothing queued later can overtake them. Whether tickets
/// failed is for whoever owns them to find out: copies that failed are over, too.
///
/// While the stream is captured into a CUDA graph that is all of them, and the capture goes on. That graph's launches wait
/// for nothing: gate the stream before each.
///
/// # Safety
/// As for [`mark`].
#[must_use = "what the stream does not wait for the caller has to wait for"]
pub unsafe fn gate(
    layer: &dyn DeviceLayer,
    device: &DeviceUuid,
    raw: u64,
    tickets: &[Ticket],
) -> Vec<Ticket> {
    // SAFETY: the caller promises the same.
    let stream = unsafe { adopt(layer, device, raw) }.unwrap_or_else(|error| {
        tracing::warn!(%error, "waiting for a layer on the engine's own thread");
        None
    });
    let gated = |ticket: &Ticket| {
        let stream = stream.as_ref();
        stream.is_some_and(|stream| stream.wait_for(ticket).is_ok())
    };
    let left = tickets.iter().filter(|ticket| !gated(ticket));
    left.cloned().collect()
}

/// A wrapper for one use: the stream is the engine's, and may be gone when the call that names it is over.
///
/// # Safety
/// As for [`mark`].
unsafe fn adopt(
    layer: &dyn DeviceLayer,
    device: &DeviceUuid,
    raw: u64,
) -> Result<Option<Arc<dyn CopyStream>>> {
    if !layer.has_foreign_streams() {
        return Ok(None);
    }
    // SAFETY: the caller promises that it is alive now. That is long enough: the wrapper does not leave this module,
    // nothing is copied through it, and a ticket is an event, which outlives the stream that it was recorded on.
    unsafe { layer.adopt_stream(device, raw) }.map(Some)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use swiftcache_proto::domain::Device;

    use super::*;
    use crate::{
        Piece,
        host::{HostLayer, HostOptions},
    };

    fn adopt_pool(
        layer: &HostLayer,
        device: &DeviceUuid,
        address: u64,
        bytes: u64,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Memory> {
        // SAFETY: the tests' pools are pages of the layer's own, which outlive what is made of them, and which they
        // reach through streams only.
        unsafe { super::adopt_pool(layer, device, address, bytes, owner) }
    }

    fn lend_pool(
        layer: &HostLayer,
        pool: &Memory,
        offset: u64,
        bytes: u64,
        back: Box<dyn Any + Send + Sync>,
    ) -> Result<Memory> {
        // SAFETY: the tests read what is lent through streams, and write it nowhere.
        unsafe { super::lend_pool(layer, pool, offset, bytes, back) }
    }

    fn layer() -> HostLayer {
        let device = Device {
            uuid: "SIM-0".parse().unwrap(),
            name: "simulated GPU".to_owned(),
            hbm_bytes: 1 << 20,
            ordinal: 0,
        };
        HostLayer::new(vec![device], Vec::new(), HostOptions::default()).unwrap()
    }

    #[test]
    fn an_owner_stays_until_the_last_copy_is_over() {
        let layer = layer();
        let device = layer.devices()[0].uuid.clone();
        let other = layer.allocate_host(&device, 4096).unwrap();
        // Pages of their own, which the test reads through the stream only.
        let pages = layer.allocate_host(&device, 4096).unwrap();
        let address = pages.at(0, 4096).unwrap();
        let owner = Arc::new(pages);
        let pool =
            adopt_pool(&layer, &device, address, 4096, Box::new(Arc::clone(&owner))).unwrap();
        let (stream, gate) = (
            layer.stream(&device).unwrap(),
            layer.stream(&device).unwrap(),
        );
        gate.write(&pool, 0, b"swift").unwrap();
        let piece = Piece {
            from: 0,
            to: 0,
            bytes: 5,
        };
        stream.copy(&pool, &other, &[piece]).unwrap();
        let copied = stream.record().unwrap();
        drop(pool);
        copied.wait().unwrap();
        assert_eq!(Arc::strong_count(&owner), 1);
        let mut bytes = [0; 5];
        stream.read(&other, 0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"swift");
    }

    #[test]
    fn a_clone_keeps_the_owner_and_memory_that_is_not_there_is_refused() {
        let layer = layer();
        let device = layer.devices()[0].uuid.clone();
        let owner = Arc::new(());
        let refused = adopt_pool(&layer, &device, 4096, 64, Box::new(Arc::clone(&owner)));
        assert!(refused.is_err());
        assert_eq!(Arc::strong_count(&owner), 1);
        let pages = layer.allocate_host(&device, 4096).unwrap();
        let address = pages.at(0, 1).unwrap();
        let pool = adopt_pool(&layer, &device, address, 64, Box::new(Arc::clone(&owner))).unwrap();
        let clone = pool.clone();
        drop(pool);
        assert_eq!(Arc::strong_count(&owner), 2);
        drop(clone);
        assert_eq!(Arc::strong_count(&owner), 1);
    }

    #[test]
    fn what_is_lent_is_zero_for_others_and_zero_when_it_is_back() {
        let layer = layer();
        let device = layer.devices()[0].uuid.clone();
        let pages = layer.allocate_host(&device, 5 * 4096).unwrap();
        let address = pages.at(0, 5 * 4096).unwrap();
        let pool = adopt_pool(&layer, &device, address, 5 * 4096, Box::new(pages.clone())).unwrap();
        let stream = layer.stream(&device).unwrap();
        stream.write(&pool, 0, &[7; 5 * 4096]).unwrap();

        let back = Arc::new(());
        let lent = lend_pool(&layer, &pool, 100, 4 * 4096, Box::new(Arc::clone(&back))).unwrap();
        assert_eq!(lent.bytes(), 3 * 4096, "the whole pages between");
        let export = layer.export(&lent).unwrap();
        // As another process would: by the descriptor alone.
        let theirs = layer.import(&device, &device, export, 3 * 4096).unwrap();
        let mut bytes = [1; 3 * 4096];
        stream.read(&theirs, 0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0), "the engine's own KV");
        stream.write(&theirs, 4096, b"theirs").unwrap();
        let mut bytes = [0; 6];
        stream.read(&pool, 2 * 4096, &mut bytes).unwrap();
        assert_eq!(&bytes, b"theirs", "lent in place: the same bytes");

        let clone = lent.clone();
        drop(lent);
        assert_eq!(Arc::strong_count(&back), 2, "a clone is left");
        drop(clone);
        assert_eq!(Arc::strong_count(&back), 1);
        let mut bytes = [1; 5 * 4096];
        stream.read(&pool, 0, &mut bytes).unwrap();
        assert!(bytes[4096..4 * 4096].iter().all(|byte| *byte == 0));
        let own = bytes[..4096].iter().chain(&bytes[4 * 4096..]);
        assert_eq!(own.filter(|byte| **byte == 7).count(), 2 * 4096);
        // Whoever kept it mapped against the rules reaches the engine no more.
        stream.write(&theirs, 0, b"late").unwrap();
        stream.read(&pool, 4096, &mut bytes[..4]).unwrap();
        assert_eq!(bytes[..4], [0; 4]);
    }

    #[test]
    fn less_than_a_page_and_what_is_no_pool_is_not_lent() {
        let layer = layer();
        let device = layer.devices()[0].uuid.clone();
        let pages = layer.allocate_host(&device, 2 * 4096).unwrap();
        let address = pages.at(0, 1).unwrap();
        let pool = adopt_pool(&layer, &device, address, 2 * 4096, Box::new(())).unwrap();
        for (memory, offset, bytes) in [(&pool, 1, 4096), (&pool, 0, 3 * 4096), (&pages, 0, 4096)] {
            assert!(lend_pool(&layer, memory, offset, bytes, Box::new(())).is_err());
        }
        assert!(lend_pool(&layer, &pool, 1, 2 * 4096 - 1, Box::new(())).is_ok());
    }

    #[test]
    fn without_streams_whoever_gates_is_told_to_wait() {
        let layer = layer();
        let device = layer.devices()[0].uuid.clone();
        // SAFETY: here and below: there are no streams on this backend.
        let marked = unsafe { mark(&layer, &device, 7) };
        assert!(marked.unwrap().is_none());
        let memory = layer.allocate_host(&device, 1 << 16).unwrap();
        let stream = layer.stream(&device).unwrap();
        stream.zero(&memory, 0, 1 << 16).unwrap();
        let ticket = stream.record().unwrap();
        // SAFETY: as above.
        let left = unsafe { gate(&layer, &device, 7, &[ticket.clone(), ticket]) };
        assert_eq!(left.len(), 2);
        for ticket in left {
            ticket.wait().unwrap();
        }
        // Its twin: a failure does not pass for copies in flight.
        layer.lose(&device, "pulled out").unwrap();
        stream.zero(&memory, 0, 1).unwrap();
        let failed = stream.record().unwrap();
        // SAFETY: as above.
        let left = unsafe { gate(&layer, &device, 7, std::slice::from_ref(&failed)) };
        assert!(
            left.iter().all(|ticket| ticket.wait().is_err()) && failed.outcome().unwrap().is_err()
        );
    }
}
