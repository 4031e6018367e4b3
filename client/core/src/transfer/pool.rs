//! The engine's own paged KV pool: where its blocks are.

use crate::{
    Error, Result,
    device::{Memory, Touching},
};

/// The engine's own paged KV pool.
#[derive(Clone, Debug)]
pub struct PagedKv {
    /// One entry for each layer of a block.
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
    /// Checks the pool against the bytes that a block has in each layer.
    ///
    /// # Errors
    /// Names what does not fit.
    pub(crate) fn check(&self, layer_bytes: &[u64]) -> Result<()> {
        let spans: Vec<_> = (self.layers.iter())
            .map(|layer| PoolSpan {
                memory_bytes: layer.memory.bytes(),
                offset: layer.offset,
                block_stride: layer.block_stride,
            })
            .collect();
        check_pool(layer_bytes, &spans, self.blocks)
    }

    /// Whether what is mapped in it changes between an engine's steps. Who queues copies with it may have to wait until it does
    /// not.
    pub fn is_stitched(&self) -> bool {
        self.layers
            .iter()
            .any(|layer| layer.memory.steps().is_some())
    }

    /// Checks it as [`check`](Self::check) does. Where what is mapped in it changes between an engine's steps, waits until it does not,
    /// and keeps it so: copies are queued under the result, which is told how to know their end.
    ///
    /// # Errors
    /// Names what does not fit, or says that the engine has closed the pool.
    pub(crate) fn touch(&self, layer_bytes: &[u64]) -> Result<Option<Touching>> {
        self.check(layer_bytes)?;
        let mut steps = self.layers.iter().filter_map(|layer| layer.memory.steps());
        let Some(steps) = steps.next() else {
            return Ok(None);
        };
        match steps.touch() {
            Some(touching) => Ok(Some(touching)),
            None => Err(Error::config(
                "kv.layers",
                "lie in a stitched pool that is closed",
            )),
        }
    }
}

/// Checks that `blocks` blocks, of so many bytes in each layer, lie inside the memories of such spans.
///
/// # Errors
/// Names what does not fit.
pub(crate) fn check_pool(layer_bytes: &[u64], layers: &[PoolSpan], blocks: u32) -> Result<()> {
    if layers.len() != layer_bytes.len() {
        let problem = format!(
            "has {} layers; the layout has {}",
            layers.len(),
            layer_bytes.len()
        );
        return Err(Error::config("kv.layers", problem));
    }
    for (number, (layer, bytes)) in layers.iter().zip(layer_bytes).enumerate() {
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
