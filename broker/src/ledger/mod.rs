//! The ledger file records who may be accessing which slab, so that a restarted broker knows which bytes are lent to
//! whom before it listens. Each [`Record`] is a line of JSON with a checksum. The file is written at once but never synced: it only has
//! to survive the broker, because a crash of the machine ends every process that the ledger names.

mod disk;
mod seal;

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::core::Record;

pub use disk::{Disk, Lock, create_directory, open, set_aside};

/// The ledger is rewritten when it has grown by more than this many bytes, and to more than twice its size after the
/// last rewrite.
const REWRITE_GROWTH_BYTES: u64 = 1 << 20;

/// The storage of the ledger's bytes.
pub trait Storage: Send {
    /// Adds bytes at the end: all of them, or none and an error.
    ///
    /// # Errors
    /// When the storage is full or broken.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Replaces the whole content by a new header and `records`: all of them, or none and an error. Returns how many
    /// bytes the storage has then.
    ///
    /// # Errors
    /// When the storage is full or broken.
    fn replace(&mut self, records: &[u8]) -> io::Result<u64>;

    /// Whether writing never waits for a device, because the storage is memory.
    fn is_memory(&self) -> bool {
        false
    }

    /// Checks that what was written is still where a restarted broker reads it.
    ///
    /// # Errors
    /// When it is not: somebody deleted, replaced or changed it.
    fn check(&self) -> io::Result<()> {
        Ok(())
    }
}

/// The open ledger.
///
/// When an append fails, the ledger is *behind*: something that the core has done is missing in it. From then on
/// nothing is appended until a rewrite from the core's state succeeds, because a later line could contradict a missing
/// line. While the ledger is behind, no grant may be sent.
pub struct Ledger {
    path: PathBuf,
    storage: Box<dyn Storage>,
    bytes: u64,
    bytes_after_rewrite: u64,
    behind: Option<String>,
}

impl Ledger {
    /// A ledger in `storage`. `path` names it in errors.
    pub fn new(path: &Path, storage: Box<dyn Storage>) -> Self {
        Self {
            path: path.to_owned(),
            storage,
            bytes: 0,
            bytes_after_rewrite: 0,
            behind: None,
        }
    }

    /// The ledger's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The error because of which the ledger is behind, if it is.
    pub fn behind(&self) -> Option<&str> {
        self.behind.as_deref()
    }

    /// Whether writing never waits for a device.
    pub fn is_memory(&self) -> bool {
        self.storage.is_memory()
    }

    /// Appends records, unless the ledger is behind. Returns false if it is behind afterwards.
    pub fn append(&mut self, records: &[Record]) -> bool {
        if self.behind.is_some() {
            return false;
        }
        let written = lines(records).and_then(|lines| {
            self.storage.append(&lines)?;
            self.bytes += lines.len() as u64;
            Ok(())
        });
        self.note(written)
    }

    /// Notices that somebody deleted, replaced or changed what was written. Then the ledger is behind.
    pub fn check(&mut self) {
        if self.behind.is_none() {
            let checked = self.storage.check();
            self.note(checked);
        }
    }

    /// Whether the owner should call [`Self::rewrite`], because the ledger has grown enough or is behind.
    pub fn wants_rewrite(&self) -> bool {
        self.behind.is_some()
            || (self.bytes > self.bytes_after_rewrite + REWRITE_GROWTH_BYTES
                && self.bytes > 2 * self.bytes_after_rewrite)
    }

    /// Replaces the ledger by `records`, from which the core's state can be restored. Returns false if the ledger is
    /// behind afterwards.
    pub fn rewrite(&mut self, records: &[Record]) -> bool {
        let was_behind = self.behind.is_some();
        let written = self.replace(records);
        // A rewrite that fails leaves the old file complete, so the ledger is behind only if it was before.
        if let (Err(error), false) = (&written, was_behind) {
            tracing::warn!(ledger = %self.path.display(), %error, "the ledger could not be compacted");
            self.bytes_after_rewrite = self.bytes;
            return true;
        }
        self.note(written)
    }

    /// Writes a ledger that was just opened: its file may be empty, be of an earlier boot or end in a torn line, and what is appended
    /// to such a file is lost. Returns false if that fails: the ledger is behind until it is [rewritten](Self::rewrite).
    pub(super) fn begin(&mut self, records: &[Record]) -> bool {
        let written = self.replace(records);
        self.note(written)
    }

    fn replace(&mut self, records: &[Record]) -> io::Result<()> {
        self.bytes = self.storage.replace(&lines(records)?)?;
        self.bytes_after_rewrite = self.bytes;
        Ok(())
    }

    fn note(&mut self, written: io::Result<()>) -> bool {
        let problem = written.err().map(|error| error.to_string());
        if problem.is_some() != self.behind.is_some() {
            match &problem {
                Some(problem) => {
                    tracing::error!(ledger = %self.path.display(), problem, "the ledger cannot be written: no slab is lent until it can be written again");
                }
                None => {
                    tracing::info!(ledger = %self.path.display(), "the ledger is complete again");
                }
            }
        }
        self.behind = problem;
        self.behind.is_none()
    }
}

fn lines(records: &[Record]) -> io::Result<Vec<u8>> {
    let mut lines = Vec::with_capacity(records.len() * 256);
    for record in records {
        let start = lines.len();
        serde_json::to_writer(&mut lines, record)?;
        seal::seal(&mut lines, start)?;
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use parking_lot::Mutex;
    use swiftcache_proto::domain::SessionId;

    use super::*;

    #[derive(Clone, Default)]
    struct Memory {
        bytes: Arc<Mutex<Vec<u8>>>,
        full: Arc<AtomicBool>,
    }

    impl Memory {
        fn check(&self) -> io::Result<()> {
            if self.full.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            Ok(())
        }
    }

    impl Storage for Memory {
        fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
            self.check()?;
            self.bytes.lock().extend_from_slice(bytes);
            Ok(())
        }

        fn replace(&mut self, records: &[u8]) -> io::Result<u64> {
            self.check()?;
            *self.bytes.lock() = records.to_vec();
            Ok(records.len() as u64)
        }
    }

    fn over(id: u64) -> Record {
        Record::SessionOver {
            session: SessionId(id),
        }
    }

    #[test]
    fn a_failed_append_stops_all_until_a_rewrite_succeeds() {
        let memory = Memory::default();
        let mut ledger = Ledger::new(Path::new("ledger"), Box::new(memory.clone()));
        assert!(ledger.append(&[over(1)]));
        memory.full.store(true, Ordering::Relaxed);
        assert!(!ledger.append(&[over(2)]));
        assert!(ledger.wants_rewrite());
        assert!(!ledger.rewrite(&[over(1), over(2)]));
        memory.full.store(false, Ordering::Relaxed);
        assert!(
            !ledger.append(&[over(3)]),
            "a line after a missing one could contradict it"
        );
        assert!(ledger.rewrite(&[over(1), over(2), over(3)]));
        assert!(ledger.behind().is_none() && ledger.append(&[over(4)]));
        assert_eq!(memory.bytes.lock().split(|byte| *byte == b'\n').count(), 5);
    }

    #[test]
    fn growth_asks_for_a_rewrite_and_a_failed_one_loses_nothing() {
        let memory = Memory::default();
        let mut ledger = Ledger::new(Path::new("ledger"), Box::new(memory.clone()));
        assert!(ledger.append(&[over(1)]) && !ledger.wants_rewrite());
        while !ledger.wants_rewrite() {
            assert!(ledger.append(&vec![over(2); 1_000]));
        }
        assert!(memory.bytes.lock().len() as u64 > REWRITE_GROWTH_BYTES);
        memory.full.store(true, Ordering::Relaxed);
        assert!(ledger.rewrite(&[over(1)]) && ledger.behind().is_none());
        memory.full.store(false, Ordering::Relaxed);
        assert!(ledger.rewrite(&[over(1)]) && !ledger.wants_rewrite());
        assert!(memory.bytes.lock().len() < 100);
    }
}
