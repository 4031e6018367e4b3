//! Sizes: those of the full-size node, and those of the same node scaled down until it fits on a laptop.
//!
//! Every capacity (HBM, local pool, slabs, host tier) and the bytes of a block are divided by the same factor, the
//! [`Scale::ratio`]. So capacities counted in blocks are those of the full-size node, and so are hit rates. Modelled
//! times always use full-size bytes.

use super::{ReplayError, models::ModelShape, roofline::Gpu};

/// Share of HBM that a serving engine takes for itself.
pub const ENGINE_SHARE: f64 = 0.9;
/// HBM that a serving engine needs beside weights and KV: activations, graphs, workspaces. Full-size bytes.
pub const ACTIVATION_BYTES: u64 = 2 << 30;
/// A slab, full-size bytes.
pub const SLAB_BYTES: u64 = 1 << 30;
/// The smallest pool that an engine can usefully serve from, tokens: one prompt.
const LEAST_POOL_TOKENS: u64 = 4096;
/// Scaled sizes are multiples of this.
const PAGE_BYTES: u64 = 4096;
/// The smallest slab that a broker accepts.
const LEAST_SLAB_BYTES: u64 = 64 << 10;

/// How much smaller the bytes that move are than those of the full-size model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Full-size bytes for each byte that moves.
    pub ratio: f64,
    /// Bytes of one block in one layer that move.
    pub layer_bytes: u64,
    /// Bytes of one block over all layers that move.
    pub block_bytes: u64,
    /// Bytes of one block over all layers of the full-size model.
    pub full_block_bytes: u64,
}

impl Scale {
    /// Divides the bytes of a block of `block_tokens` by about `divisor`. A layer of a block keeps a multiple of 16
    /// bytes, at least 16.
    ///
    /// # Errors
    /// When `divisor` is not at least 1.
    pub fn new(model: &ModelShape, block_tokens: u64, divisor: f64) -> Result<Self, ReplayError> {
        if !(divisor.is_finite() && divisor >= 1.0) {
            return Err(ReplayError::Flag {
                flag: "--scale",
                problem: format!("is {divisor}; takes 1 (full size) or more"),
            });
        }
        let full_layer = block_tokens * model.layer_bytes_per_token();
        let layer_bytes = ((full_layer as f64 / divisor / 16.0).round() as u64).max(1) * 16;
        let layers = model.layers as u64;
        Ok(Self {
            ratio: full_layer as f64 / layer_bytes as f64,
            layer_bytes,
            block_bytes: layer_bytes * layers,
            full_block_bytes: full_layer * layers,
        })
    }

    /// The size of `full` bytes on the scaled node, rounded up to whole pages.
    pub fn shrink(&self, full: u64) -> u64 {
        ((full as f64 / self.ratio) as u64).next_multiple_of(PAGE_BYTES)
    }

    /// The full-size bytes that `moved` bytes stand for.
    pub fn grow(&self, moved: u64) -> u64 {
        (moved as f64 * self.ratio) as u64
    }

    /// The slab of the scaled node: [`SLAB_BYTES`] scaled down, but large enough for the broker and for one block.
    pub fn slab_bytes(&self) -> u64 {
        let least = self.block_bytes.next_multiple_of(PAGE_BYTES);
        self.shrink(SLAB_BYTES).max(LEAST_SLAB_BYTES).max(least)
    }
}

/// How many blocks of `block_tokens` the local pool of `model` holds on a `gpu` with `hbm_bytes`.
///
/// # Errors
/// When the weights leave no room for a pool.
pub fn pool_blocks(
    model: &ModelShape,
    gpu: &Gpu,
    hbm_bytes: u64,
    block_tokens: u64,
) -> Result<u32, ReplayError> {
    let engine = (hbm_bytes as f64 * ENGINE_SHARE) as u64;
    let room = engine.saturating_sub(model.weight_bytes() + ACTIVATION_BYTES);
    let blocks = room / (block_tokens * model.bytes_per_token());
    match u32::try_from(blocks) {
        Ok(count) if blocks * block_tokens >= LEAST_POOL_TOKENS => Ok(count),
        _ => Err(ReplayError::Flag {
            flag: "--model",
            problem: format!(
                "{}: {} GB of weights leave no room for a KV pool in the {} GiB of {}; use more GPUs (--tensor-parallel) or a larger one (--gpu)",
                model.name,
                model.weight_bytes() / 1_000_000_000,
                hbm_bytes >> 30,
                gpu.name
            ),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::BLOCK_TOKENS;

    fn model(name: &str) -> &'static ModelShape {
        ModelShape::by_name(name).unwrap()
    }

    #[test]
    fn a_power_of_two_shrinks_exactly() {
        let scale = Scale::new(model("qwen3-8b"), BLOCK_TOKENS, 1024.0).unwrap();
        assert_eq!((scale.layer_bytes, scale.ratio), (2048, 1024.0));
        assert_eq!(scale.block_bytes, 36 * 2048);
        assert_eq!(scale.slab_bytes(), 1 << 20);
        assert_eq!(scale.shrink(80 << 30), 80 << 20);
    }

    #[test]
    fn capacities_in_blocks_are_those_of_the_full_size() {
        for divisor in [1.0, 3.0, 1000.0, 4096.0, 1e9] {
            let scale = Scale::new(model("llama-3.1-8b"), BLOCK_TOKENS, divisor).unwrap();
            assert!(scale.layer_bytes >= 16 && scale.layer_bytes.is_multiple_of(16));
            let full = 1000 * scale.full_block_bytes;
            let blocks = scale.shrink(full) / scale.block_bytes;
            assert!((1000..1010).contains(&blocks), "{blocks} at 1/{divisor}");
        }
    }

    #[test]
    fn a_divisor_below_one_is_refused() {
        for divisor in [0.0, 0.5, -1.0, f64::NAN, f64::INFINITY] {
            let error = Scale::new(model("qwen3-8b"), BLOCK_TOKENS, divisor).unwrap_err();
            assert!(error.to_string().starts_with("--scale"), "{error}");
        }
    }

    #[test]
    fn weights_that_do_not_fit_are_refused_and_sharding_helps() {
        let gpu = Gpu::by_name("h100-sxm").unwrap();
        let large = model("llama-3.1-70b");
        let error = pool_blocks(large, gpu, gpu.hbm_bytes, BLOCK_TOKENS).unwrap_err();
        assert!(error.to_string().contains("141 GB"), "{error}");
        let shard = large.shard(4).unwrap();
        assert!(pool_blocks(&shard, gpu, gpu.hbm_bytes, BLOCK_TOKENS).unwrap() > 500);
    }

    #[test]
    fn the_local_pool_is_what_weights_and_activations_leave() {
        let gpu = Gpu::by_name("h100-sxm").unwrap();
        // 0.9 * 80 GiB - 16.38 GB - 2 GiB = 58.78 GB; a block has 75.5 MB.
        assert_eq!(
            pool_blocks(model("qwen3-8b"), gpu, 80 << 30, BLOCK_TOKENS).unwrap(),
            778
        );
    }
}
