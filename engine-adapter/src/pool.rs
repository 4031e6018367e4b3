//! Where an engine's KV pool is, and its way into the device layer.

use std::{collections::HashMap, sync::Arc};

use pyo3::prelude::*;
use swiftcache_client::{
    borrower::{Layout, PagedKv, PagedLayer, PoolSpan},
    device::{DeviceLayer, Memory, foreign},
};
use swiftcache_proto::domain::DeviceUuid;

use crate::failure::{Failure, Result};

/// A pool as the engine described it.
#[derive(Debug)]
pub(crate) struct Pool {
    layers: Vec<(u64, PoolSpan)>,
    blocks: u32,
    /// The tensors. Let go of without the GIL: Python's side forgets them when a thread next has it.
    owner: Arc<Py<PyAny>>,
}

/// A layer as Python says it: address, bytes, offset of block 0, block stride.
pub(crate) type Said = (u64, u64, u64, u64);

impl Pool {
    /// Checks what can be checked before there is a device layer.
    pub(crate) fn new(
        layers: &[Said],
        blocks: u32,
        owner: Py<PyAny>,
        layout: &Layout,
    ) -> Result<Self> {
        let layers: Vec<_> = layers
            .iter()
            .map(|&(address, memory_bytes, offset, block_stride)| {
                let span = PoolSpan {
                    memory_bytes,
                    offset,
                    block_stride,
                };
                (address, span)
            })
            .collect();
        let spans: Vec<_> = layers.iter().map(|(_, span)| *span).collect();
        layout.check_pool(&spans, blocks)?;
        if blocks == 0 {
            return Err(Failure::argument("blocks", "takes at least one"));
        }
        if let Some(null) = layers.iter().position(|(address, _)| *address == 0) {
            return Err(Failure::argument(
                format!("layers[{null}]"),
                "has no address",
            ));
        }
        Ok(Self {
            layers,
            blocks,
            owner: Arc::new(owner),
        })
    }

    /// Checks that ranges lie in its memories.
    pub(crate) fn check_ranges(&self, ranges: &[(u64, u64)]) -> Result<()> {
        for (number, (address, bytes)) in ranges.iter().enumerate() {
            let inside = self.layers.iter().any(|(first, span)| {
                let end = (address.checked_sub(*first)).and_then(|at| at.checked_add(*bytes));
                end.is_some_and(|end| end <= span.memory_bytes)
            });
            if !inside || *bytes == 0 {
                let problem = format!("{bytes} bytes at {address:#x} are no part of the pool");
                return Err(Failure::argument(format!("ranges[{number}]"), problem));
            }
        }
        Ok(())
    }

    /// Adopts a range of its memories, to be lent.
    pub(crate) fn adopt_range(
        &self,
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
        (address, bytes): (u64, u64),
    ) -> swiftcache_client::Result<Memory> {
        let owner = Box::new(Arc::clone(&self.owner));
        Ok(foreign::adopt_pool(layer, device, address, bytes, owner)?)
    }

    /// Adopts its memories; layers in one memory share it.
    pub(crate) fn adopt(&self, layer: &dyn DeviceLayer, device: &DeviceUuid) -> Result<PagedKv> {
        let mut memories: HashMap<(u64, u64), Memory> = HashMap::new();
        let mut layers = Vec::with_capacity(self.layers.len());
        for (number, (address, span)) in self.layers.iter().enumerate() {
            let key = (*address, span.memory_bytes);
            let memory = match memories.get(&key) {
                Some(memory) => memory.clone(),
                None => {
                    let owner = Box::new(Arc::clone(&self.owner));
                    let memory = foreign::adopt_pool(layer, device, key.0, key.1, owner)
                        .map_err(|error| Failure::argument(format!("layers[{number}]"), error))?;
                    memories.insert(key, memory.clone());
                    memory
                }
            };
            layers.push(PagedLayer {
                memory,
                offset: span.offset,
                block_stride: span.block_stride,
            });
        }
        Ok(PagedKv {
            layers,
            blocks: self.blocks,
        })
    }
}
