//! What a borrower's blocks look like.

use swiftcache_proto::convert::MAX_NAMESPACE_BYTES;

use crate::{
    Error, Result,
    transfer::{PoolSpan, check_pool},
};

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
        check_pool(&self.layer_bytes, layers, blocks)
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
