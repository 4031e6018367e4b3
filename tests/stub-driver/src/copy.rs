//! Copies, one by one and in batches, and fills.

use crate::{
    Code, INVALID_VALUE, call,
    context::device_of,
    stream::{Work, queue},
};

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD8Async(
    address: u64,
    value: u8,
    bytes: usize,
    stream: usize,
) -> Code {
    call("cuMemsetD8Async", || {
        let work = Work::Set {
            address,
            value,
            bytes,
        };
        queue(stream, work)
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: usize) -> Code {
    call("cuMemcpyAsync", || {
        queue(stream, Work::Copy { to, from, bytes })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: u64,
    from: u64,
    bytes: usize,
    stream: usize,
) -> Code {
    call("cuMemcpyDtoDAsync_v2", || {
        queue(stream, Work::Copy { to, from, bytes })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyPeerAsync(
    to: u64,
    to_context: usize,
    from: u64,
    from_context: usize,
    bytes: usize,
    stream: usize,
) -> Code {
    call("cuMemcpyPeerAsync", || {
        device_of(to_context)?;
        device_of(from_context)?;
        queue(stream, Work::Copy { to, from, bytes })
    })
}

#[repr(C)]
pub struct CopyAttributes {
    order: u32,
    hints: [[u32; 2]; 2],
    flags: u32,
}

/// Many copies: lists of the same length, whose attributes are the first set's.
struct Batch {
    targets: *const u64,
    sources: *const u64,
    sizes: *const usize,
    count: usize,
    attributes: *const CopyAttributes,
    first: *const usize,
    attribute_count: usize,
}

impl Batch {
    fn queue(&self, stream: usize) -> Result<(), Code> {
        // SAFETY: the caller gives three lists of `count`, and one set of attributes with its index.
        let (targets, sources, sizes, order, first) = unsafe {
            (
                std::slice::from_raw_parts(self.targets, self.count),
                std::slice::from_raw_parts(self.sources, self.count),
                std::slice::from_raw_parts(self.sizes, self.count),
                (*self.attributes).order,
                *self.first,
            )
        };
        let odd = stream == 0 || self.count == 0 || self.attribute_count != 1 || first != 0;
        if odd || !(1..=3).contains(&order) || sizes.contains(&0) {
            return Err(INVALID_VALUE);
        }
        let copies = targets.iter().zip(sources).zip(sizes);
        let mut copies = copies.map(|((to, from), bytes)| Work::Copy {
            to: *to,
            from: *from,
            bytes: *bytes,
        });
        copies.try_for_each(|copy| queue(stream, copy))
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyBatchAsync_v2(
    targets: *const u64,
    sources: *const u64,
    sizes: *const usize,
    count: usize,
    attributes: *const CopyAttributes,
    first: *const usize,
    attribute_count: usize,
    stream: usize,
) -> Code {
    let batch = Batch {
        targets,
        sources,
        sizes,
        count,
        attributes,
        first,
        attribute_count,
    };
    call("cuMemcpyBatchAsync_v2", || batch.queue(stream))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyBatchAsync(
    targets: *const u64,
    sources: *const u64,
    sizes: *const usize,
    count: usize,
    attributes: *const CopyAttributes,
    first: *const usize,
    attribute_count: usize,
    _failed: *mut usize,
    stream: usize,
) -> Code {
    let batch = Batch {
        targets,
        sources,
        sizes,
        count,
        attributes,
        first,
        attribute_count,
    };
    call("cuMemcpyBatchAsync", || batch.queue(stream))
}
