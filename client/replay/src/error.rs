//! The errors of a replay.

use std::path::PathBuf;

use swiftcache_proto::{domain::BlockHash, topology::TopologyError};

use super::trace::TraceError;
use swiftcache_client::device::DeviceError;

/// Why a replay failed, on what, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A trace or load file.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The topology.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// A flag whose value does not work with the other flags.
    #[error("{flag}: {problem}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// Bytes came back that are not the bytes of the block. This is the worst error.
    #[error(
        "WRONG BYTES: block {block}, layer {layer} ({place}): byte {offset} is {found:#04x}, must be {expected:#04x}"
    )]
    WrongBytes {
        /// The block.
        block: BlockHash,
        /// The layer.
        layer: usize,
        /// Where the block was read from.
        place: &'static str,
        /// Position of the byte in the layer's bytes.
        offset: usize,
        /// The expected byte.
        expected: u8,
        /// The byte found.
        found: u8,
    },
    /// A file or directory.
    #[error("{}: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// A process of the private node.
    #[error("{process}: {problem}")]
    Process {
        /// Its name.
        process: String,
        /// What happened and what to do.
        problem: String,
    },
    /// The device layer.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The borrower or its session.
    #[error(transparent)]
    Client(#[from] swiftcache_client::Error),
    /// Somebody stopped the replay.
    #[error("interrupted")]
    Interrupted,
}
