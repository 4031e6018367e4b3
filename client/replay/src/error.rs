//! What can go wrong in a replay.

use std::path::PathBuf;

use swiftcache_proto::{domain::BlockHash, topology::TopologyError};

use super::trace::TraceError;
use swiftcache_client::device::DeviceError;

/// A replay that failed: what, on what, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A trace or load file.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The topology.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// A flag that does not go with the rest.
    #[error("{flag}: {problem}")]
    Flag {
        /// The flag.
        flag: &'static str,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The worst: bytes came back that are not the block's.
    #[error(
        "WRONG BYTES: block {block}, layer {layer} ({place}): byte {offset} is {found:#04x}, must be {expected:#04x}"
    )]
    WrongBytes {
        /// Which block.
        block: BlockHash,
        /// Which layer.
        layer: usize,
        /// Where it was read from.
        place: &'static str,
        /// Where in the layer.
        offset: usize,
        /// What must be there.
        expected: u8,
        /// What is there.
        found: u8,
    },
    /// A file or directory.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A process of the private node.
    #[error("{process}: {problem}")]
    Process {
        /// Which one.
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
    /// Somebody asked it to stop.
    #[error("interrupted")]
    Interrupted,
}
