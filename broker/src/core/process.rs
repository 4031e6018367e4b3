//! A process as the kernel tells it apart from every other.

use serde::{Deserialize, Serialize};

/// A process as the kernel tells it apart from every other: a pid alone is reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Process {
    /// As the broker's PID namespace sees it; 0 when it cannot.
    pub pid: u32,
    /// What tells two processes with one pid apart: the start time in clock ticks since boot
    /// (`/proc/<pid>/stat` field 22), or the pidfd's inode where the pid cannot be seen.
    pub birth: u64,
    /// Whose process it is.
    pub uid: u32,
}
