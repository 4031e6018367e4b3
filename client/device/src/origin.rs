//! Which process something belongs to. A child of `fork` has a copy of all that its parent has, but for the threads: locks that
//! nobody will open again, streams on which nothing happens, and a connection that is the parent's.

/// The process in which something was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin(u32);

impl Origin {
    /// This process.
    pub fn here() -> Self {
        Self(std::process::id())
    }

    /// Whether this still is the process. To be asked before a lock is taken, since a thread of the parent may have held it
    /// when the child was made.
    pub fn is_here(self) -> bool {
        self == Self::here()
    }
}
