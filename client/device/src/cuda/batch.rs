//! Batched copies: many pieces in one call of the driver.

use std::ptr;

use super::driver::{Batching, Code, SUCCESS, sys};
use crate::{Part, Piece, Result};

/// The lists that a batched call reads, kept for the next one.
#[derive(Default)]
pub(super) struct BatchLists {
    targets: Vec<u64>,
    sources: Vec<u64>,
    sizes: Vec<usize>,
}

impl BatchLists {
    /// Queues `pieces`, which lie inside the memories of their parts, on a stream that is not the default one. Some
    /// piece has bytes, and the driver has batches.
    pub(super) fn queue(
        &mut self,
        batching: &Batching,
        stream: sys::CUstream,
        parts: &[Part],
        pieces: &[Piece],
    ) -> Result<Code> {
        self.targets.clear();
        self.sources.clear();
        self.sizes.clear();
        for (part, its) in Part::split(parts, pieces) {
            for piece in its.iter().filter(|piece| piece.bytes > 0) {
                self.sources.push(part.from.at(piece.from, piece.bytes)?);
                self.targets.push(part.to.at(piece.to, piece.bytes)?);
                self.sizes.push(piece.bytes as usize);
            }
        }
        // One set of attributes for all, from the first copy on: sources are read in the stream's order.
        let unknown = sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID,
            id: 0,
        };
        let mut attributes = sys::CUmemcpyAttributes {
            srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: unknown,
            dstLocHint: unknown,
            flags: 0,
        };
        let mut first = 0;
        let count = self.sizes.len();
        let targets = self.targets.as_mut_ptr();
        let sources = self.sources.as_mut_ptr();
        let sizes = self.sizes.as_mut_ptr();
        // SAFETY: the three lists are `count` long and the driver copies them before it returns; the ranges were
        // just checked, and the stream's holds keep all memories mapped until an event behind this is over.
        let code = unsafe {
            match batching {
                Batching::Current(batch) => (batch.copy)(
                    targets,
                    sources,
                    sizes,
                    count,
                    &raw mut attributes,
                    &raw mut first,
                    1,
                    stream,
                ),
                Batching::First(batch) => (batch.copy)(
                    targets,
                    sources,
                    sizes,
                    count,
                    &raw mut attributes,
                    &raw mut first,
                    1,
                    ptr::null_mut(),
                    stream,
                ),
                Batching::Absent => SUCCESS,
            }
        };
        Ok(code)
    }
}
