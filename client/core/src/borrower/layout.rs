//! Where a block's bytes are: in the engine's own pool, and in a slab.

use swiftcache_proto::convert::MAX_NAMESPACE_BYTES;

use crate::{Error, Result, device::Memory};

/// What makes two KV blocks interchangeable, and how many bytes a block has in each layer.
///
/// An engine that keeps K and V apart lists each layer twice, K then V: a "layer" here is whatever the pipeline
/// fetches and waits for as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The model's fingerprint: weights, precision, parallel rank, block size, layer bytes. 1 to 256 bytes.
    pub namespace: String,
    /// Bytes of one block in each layer.
    pub layer_bytes: Vec<u64>,
}

impl Layout {
    /// Bytes of one block over all layers.
    pub fn block_bytes(&self) -> u64 {
        self.layer_bytes.iter().sum()
    }

    /// Checks that `blocks` blocks of a pool of such spans lie inside it.
    ///
    /// # Errors
    /// Names what does not fit.
    pub fn check_pool(&self, layers: &[PoolSpan], blocks: u32) -> Result<()> {
        if layers.len() != self.layer_bytes.len() {
            let problem = format!(
                "has {} layers; the layout has {}",
                layers.len(),
                self.layer_bytes.len()
            );
            return Err(Error::config("kv.layers", problem));
        }
        for (number, (layer, bytes)) in layers.iter().zip(&self.layer_bytes).enumerate() {
            if layer.block_stride < *bytes {
                let stride = layer.block_stride;
                let problem = format!("is {stride} in layer {number}; a block has {bytes} bytes");
                return Err(Error::config("kv.layers.block_stride", problem));
            }
            let last = u64::from(blocks.saturating_sub(1));
            let end = (last.checked_mul(layer.block_stride))
                .and_then(|start| start.checked_add(layer.offset))
                .and_then(|start| start.checked_add(*bytes));
            if blocks > 0 && end.is_none_or(|end| end > layer.memory_bytes) {
                let problem = format!(
                    "{blocks} blocks of layer {number} end outside a memory of {} bytes",
                    layer.memory_bytes
                );
                return Err(Error::config("kv.layers.memory", problem));
            }
        }
        Ok(())
    }

    pub(crate) fn check(&self) -> Result<()> {
        if !(1..=MAX_NAMESPACE_BYTES).contains(&self.namespace.len()) {
            let problem = format!("takes 1 to {MAX_NAMESPACE_BYTES} bytes");
            return Err(Error::config("layout.namespace", problem));
        }
        if self.layer_bytes.is_empty() || self.layer_bytes.contains(&0) {
            return Err(Error::config(
                "layout.layer_bytes",
                "takes at least one layer, each of at least one byte",
            ));
        }
        let total = (self.layer_bytes.iter()).try_fold(0_u64, |sum, bytes| sum.checked_add(*bytes));
        match total {
            Some(_) => Ok(()),
            None => Err(Error::config("layout.layer_bytes", "overflows 64 bits")),
        }
    }
}

/// The engine's own paged KV pool.
#[derive(Clone, Debug)]
pub struct PagedKv {
    /// One entry for each layer of the [`Layout`].
    pub layers: Vec<PagedLayer>,
    /// Blocks in the pool.
    pub blocks: u32,
}

/// Where a layer's blocks are in a memory, whichever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolSpan {
    /// The memory's size, bytes.
    pub memory_bytes: u64,
    /// Where block 0 starts in it, bytes.
    pub offset: u64,
    /// From one block to the next, bytes; at least the layer's block bytes.
    pub block_stride: u64,
}

/// One layer of the pool: block `b` starts at `offset + b * block_stride`.
#[derive(Clone, Debug)]
pub struct PagedLayer {
    /// The memory it lies in.
    pub memory: Memory,
    /// Where block 0 starts in it, bytes.
    pub offset: u64,
    /// From one block to the next, bytes; at least the layer's block bytes.
    pub block_stride: u64,
}

impl PagedKv {
    /// Checks the pool against a layout.
    ///
    /// # Errors
    /// Names what does not fit.
    pub fn check(&self, layout: &Layout) -> Result<()> {
        let spans: Vec<_> = (self.layers.iter())
            .map(|layer| PoolSpan {
                memory_bytes: layer.memory.bytes(),
                offset: layer.offset,
                block_stride: layer.block_stride,
            })
            .collect();
        layout.check_pool(&spans, self.blocks)
    }
}
