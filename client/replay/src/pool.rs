//! The busy model's paged KV pool on its device. Its bytes can be checked.

use std::sync::Arc;

use swiftcache_proto::domain::{BlockHash, DeviceUuid};

use super::{ReplayError, pattern::Pattern};
use swiftcache_client::{
    cache::{Layout, PagedKv, PagedLayer},
    device::{CopyStream, DeviceError, DeviceLayer, Memory, Piece},
};

/// How many blocks the staging memory holds.
const STAGED_BLOCKS: usize = 64;

/// The pool. All blocks of one layer lie together, as in a serving engine.
#[derive(Debug)]
pub struct Pool {
    kv: PagedKv,
    layer_bytes: Vec<u64>,
    pattern: Pattern,
    memory: Memory,
    staging: Memory,
    stream: Arc<dyn CopyStream>,
    bytes: Vec<u8>,
}

impl Pool {
    /// Allocates a pool of `blocks` blocks on `device`.
    ///
    /// # Errors
    /// When the device has no room for it.
    pub fn open(
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
        layout: &Layout,
        blocks: u32,
    ) -> Result<Self, ReplayError> {
        let kind = layer.handle_kinds().first().copied();
        let kind = kind.ok_or_else(|| DeviceError::Unavailable {
            backend: layer.name(),
            problem: "it cannot allocate device memory".to_owned(),
        })?;
        let block_bytes = layout.block_bytes();
        let memory = layer.allocate(device, block_bytes * u64::from(blocks), kind)?;
        let mut offset = 0;
        let layers = layout.layer_bytes.iter().map(|bytes| {
            let layer = PagedLayer {
                memory: memory.clone(),
                offset,
                block_stride: *bytes,
            };
            offset += bytes * u64::from(blocks);
            layer
        });
        let kv = PagedKv {
            layers: layers.collect(),
            blocks,
        };
        let staged = block_bytes * STAGED_BLOCKS as u64;
        Ok(Self {
            kv,
            layer_bytes: layout.layer_bytes.clone(),
            pattern: Pattern::new(&layout.namespace),
            memory,
            staging: layer.allocate_host(device, staged)?,
            stream: layer.stream(device)?,
            bytes: vec![0; staged as usize],
        })
    }

    /// The pool as the borrower sees it.
    pub fn kv(&self) -> &PagedKv {
        &self.kv
    }

    /// Writes each block's bytes into its slot, as the model's prefill would. `blocks` are pairs of block and slot.
    ///
    /// # Errors
    /// When the device fails.
    pub fn compute(&mut self, blocks: &[(BlockHash, u32)]) -> Result<(), ReplayError> {
        for blocks in blocks.chunks(STAGED_BLOCKS) {
            let mut at = 0;
            for (block, _) in blocks {
                for (layer, bytes) in self.layer_bytes.iter().enumerate() {
                    let end = at + *bytes as usize;
                    self.pattern.fill(block, layer, &mut self.bytes[at..end]);
                    at = end;
                }
            }
            self.stream.write(&self.staging, 0, &self.bytes[..at])?;
            let pieces = self.pieces(blocks);
            self.stream.copy(&self.staging, &self.memory, &pieces)?;
            self.stream.record()?.wait()?;
        }
        Ok(())
    }

    /// Checks every byte of the blocks in their slots. `place` says where the blocks came from, for the error.
    /// Returns how many bytes it checked.
    ///
    /// # Errors
    /// On the first wrong byte, which the error names with its block and layer. When the device fails.
    pub fn verify(
        &mut self,
        blocks: &[(BlockHash, u32)],
        place: &'static str,
    ) -> Result<u64, ReplayError> {
        let mut checked = 0;
        for blocks in blocks.chunks(STAGED_BLOCKS) {
            let back = self.pieces(blocks).into_iter().map(|piece| Piece {
                from: piece.to,
                to: piece.from,
                ..piece
            });
            let back: Vec<_> = back.collect();
            self.stream.copy(&self.memory, &self.staging, &back)?;
            let total: u64 = back.iter().map(|piece| piece.bytes).sum();
            let bytes = &mut self.bytes[..total as usize];
            self.stream.read(&self.staging, 0, bytes)?;
            let mut rest = &self.bytes[..total as usize];
            for (block, _) in blocks {
                for (layer, bytes) in self.layer_bytes.iter().enumerate() {
                    let (these, after) = rest.split_at(*bytes as usize);
                    let result = self.pattern.check(block, layer, these);
                    result.map_err(|wrong| ReplayError::WrongBytes {
                        block: *block,
                        layer,
                        place,
                        offset: wrong.offset,
                        expected: wrong.expected,
                        found: wrong.found,
                    })?;
                    rest = after;
                }
            }
            checked += total;
        }
        Ok(checked)
    }

    /// The copies from the staging memory, where the layers of a block follow one another, to the pool.
    fn pieces(&self, blocks: &[(BlockHash, u32)]) -> Vec<Piece> {
        let mut from = 0;
        let mut pieces = Vec::with_capacity(blocks.len() * self.kv.layers.len());
        for (_, slot) in blocks {
            for (layer, bytes) in self.kv.layers.iter().zip(&self.layer_bytes) {
                pieces.push(Piece {
                    from,
                    to: layer.offset + u64::from(*slot) * layer.block_stride,
                    bytes: *bytes,
                });
                from += bytes;
            }
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use swiftcache_client::device::host::{HostLayer, HostOptions};
    use swiftcache_proto::domain::Device;

    const BLOCKS: u32 = 200;

    fn pool(layer_bytes: &[u64]) -> Pool {
        let uuid: DeviceUuid = "SIM-0".parse().unwrap();
        let device = Device {
            uuid: uuid.clone(),
            name: "simulated".to_owned(),
            hbm_bytes: 1 << 24,
            ordinal: 0,
        };
        let layer = HostLayer::new(vec![device], Vec::new(), HostOptions::default()).unwrap();
        let layout = Layout {
            namespace: "test".to_owned(),
            layer_bytes: layer_bytes.to_vec(),
        };
        Pool::open(&layer, &uuid, &layout, BLOCKS).unwrap()
    }

    fn placed(slots: impl Iterator<Item = u32>) -> Vec<(BlockHash, u32)> {
        let hash = |index: u8| BlockHash([index; 16]);
        (1..).map(hash).zip(slots).collect()
    }

    #[test]
    fn what_was_computed_verifies_wherever_it_lies() {
        let mut pool = pool(&[48, 16, 80]);
        // More blocks than the staging memory holds, in scattered slots.
        let blocks = placed((0..150).map(|index| index * 7 % BLOCKS));
        pool.compute(&blocks).unwrap();
        assert_eq!(pool.verify(&blocks, "test").unwrap(), 150 * 144);
    }

    #[test]
    fn one_damaged_byte_is_caught_and_named() {
        let mut pool = pool(&[48, 16]);
        let blocks = placed(3..10);
        pool.compute(&blocks).unwrap();
        // Layer 1, slot 5 (the third block), byte 9.
        let at = 48 * u64::from(BLOCKS) + 5 * 16 + 9;
        let mut byte = [0];
        pool.stream.read(&pool.memory, at, &mut byte).unwrap();
        pool.stream.write(&pool.memory, at, &[byte[0] ^ 1]).unwrap();
        let error = pool.verify(&blocks, "test").unwrap_err();
        let ReplayError::WrongBytes {
            block,
            layer,
            offset,
            expected,
            found,
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((block, layer, offset), (BlockHash([3; 16]), 1, 9));
        assert_eq!((expected, found), (byte[0], byte[0] ^ 1));
    }

    #[test]
    fn a_block_in_anothers_slot_is_caught() {
        let mut pool = pool(&[32]);
        pool.compute(&placed(0..2)).unwrap();
        let swapped = [(BlockHash([1; 16]), 1)];
        assert!(pool.verify(&swapped, "test").is_err());
    }
}
