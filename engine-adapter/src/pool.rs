//! Where an engine's KV pool is, and its way into the device layer.

use std::collections::HashMap;

use swiftcache_client::{
    cache::{Layout, PagedKv, PagedLayer, PoolSpan},
    device::{DeviceLayer, Memory},
};
use swiftcache_proto::domain::DeviceUuid;

use crate::{
    failure::{Failure, Result},
    promised::{Blocks, EngineMemory, Lendable, UnusedRange},
};

/// A pool as the engine described it: the memory of each layer, and where its blocks are there.
#[derive(Debug)]
pub(crate) struct Pool {
    layers: Vec<(EngineMemory, Blocks)>,
    blocks: u32,
}

impl Pool {
    /// Checks what can be checked before there is a device layer.
    pub(crate) fn new(
        layers: Vec<(EngineMemory, Blocks)>,
        blocks: u32,
        layout: &Layout,
    ) -> Result<Self> {
        let spans: Vec<_> = layers
            .iter()
            .map(|(memory, (offset, block_stride))| PoolSpan {
                memory_bytes: memory.bytes(),
                offset: *offset,
                block_stride: *block_stride,
            })
            .collect();
        layout.check_pool(&spans, blocks)?;
        if blocks == 0 {
            return Err(Failure::argument("blocks", "takes at least one"));
        }
        let mut memories = layers.iter().map(|(memory, _)| memory);
        if let Some(null) = memories.position(|memory| memory.address() == 0) {
            return Err(Failure::argument(
                format!("layers[{null}]"),
                "has no address",
            ));
        }
        Ok(Self { layers, blocks })
    }

    /// Ranges of it that are to be lent, if all of them lie in its memories.
    pub(crate) fn lendable(&self, ranges: &[UnusedRange]) -> Result<Vec<Lendable>> {
        if self.layers.iter().any(|(memory, _)| memory.is_stitched()) {
            let problem = "nothing of a stitched pool can be lent";
            return Err(Failure::argument("ranges", problem));
        }
        let lendable = |(number, range): (usize, &UnusedRange)| {
            let mut found = (self.layers.iter()).filter_map(|(memory, _)| memory.part(*range));
            found.next().ok_or_else(|| {
                let problem = format!("{range} are no part of the pool");
                Failure::argument(format!("ranges[{number}]"), problem)
            })
        };
        ranges.iter().enumerate().map(lendable).collect()
    }

    /// Adopts its memories; layers in one memory share it.
    pub(crate) fn adopt(&self, layer: &dyn DeviceLayer, device: &DeviceUuid) -> Result<PagedKv> {
        let mut memories: HashMap<(u64, u64), Memory> = HashMap::new();
        let mut layers = Vec::with_capacity(self.layers.len());
        for (number, (said, (offset, block_stride))) in self.layers.iter().enumerate() {
            let key = (said.address(), said.bytes());
            let memory = match memories.get(&key) {
                Some(memory) => memory.clone(),
                None => {
                    let memory = said
                        .adopt(layer, device)
                        .map_err(|error| Failure::argument(format!("layers[{number}]"), error))?;
                    memories.insert(key, memory.clone());
                    memory
                }
            };
            layers.push(PagedLayer {
                memory,
                offset: *offset,
                block_stride: *block_stride,
            });
        }
        Ok(PagedKv {
            layers,
            blocks: self.blocks,
        })
    }
}
