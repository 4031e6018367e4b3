//! The file: bytes at offsets, its lock, and how it grows.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use rustix::{
    fs::{FallocateFlags, OFlags, fallocate},
    io::Errno,
};

use super::format::PAGE;
use crate::{Error, Result};

/// The name of the file in its directory.
pub(super) const FILE: &str = "swiftcache-kv.disk";

/// Bytes at an address that direct I/O takes.
#[derive(Default)]
pub(super) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// Makes it so long. What was in it stays there, or is lost.
    pub(super) fn fit(&mut self, len: usize) {
        if self.bytes.len() < len + PAGE as usize {
            self.bytes = vec![0; len + PAGE as usize];
            let start = self.bytes.as_ptr().align_offset(PAGE as usize);
            // An address that cannot be aligned is used as it is: then direct I/O fails, and is not used any more.
            self.start = if start < PAGE as usize { start } else { 0 };
        }
        self.len = len;
    }

    pub(super) fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub(super) fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl std::fmt::Debug for Aligned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Aligned({})", self.len)
    }
}

/// The file of a disk tier. This process alone has it.
#[derive(Debug)]
pub(super) struct BlockFile {
    path: PathBuf,
    /// With the lock.
    opened: Handles,
    /// Why these only read.
    read_only: Option<io::Error>,
    /// For writing, once the disk lets somebody write again.
    writes: OnceLock<Handles>,
    direct: AtomicBool,
}

#[derive(Debug)]
struct Handles {
    /// Headers and entries, through the kernel's cache.
    small: File,
    /// Blocks, past it where the file system lets them.
    large: Option<File>,
}

impl Handles {
    fn open(path: &Path, direct: bool, options: &OpenOptions) -> io::Result<Self> {
        let open = |flags: OFlags| {
            let mut options = options.clone();
            let flags = OFlags::NOFOLLOW | flags;
            options.custom_flags(flags.bits() as i32).open(path)
        };
        Ok(Self {
            small: open(OFlags::empty())?,
            large: direct.then(|| open(OFlags::DIRECT).ok()).flatten(),
        })
    }
}

fn problem(what: &str, path: &Path, error: &io::Error) -> Error {
    Error::config("path", format!("cannot {what} {}: {error}", path.display()))
}

impl BlockFile {
    /// Opens the file in a directory, or makes both.
    pub(super) fn open(dir: &Path, direct: bool) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|error| problem("make the directory", dir, &error))?;
        let path = dir.join(FILE);
        let mut writing = OpenOptions::new();
        writing.read(true).write(true).create(true).truncate(false);
        // What is in it is what prompts said.
        writing.mode(0o600);
        let mut read_only = None;
        let opened = match Handles::open(&path, direct, &writing) {
            Err(error) if error.kind() == ErrorKind::ReadOnlyFilesystem => {
                // What lies there already can be read.
                let reading = Handles::open(&path, direct, OpenOptions::new().read(true));
                let refused = reading.map_err(|_| problem("write to", &path, &error));
                read_only = Some(error);
                refused?
            }
            opened => opened.map_err(|error| problem("write to", &path, &error))?,
        };
        let small = &opened.small;
        let kind = small
            .metadata()
            .map_err(|error| problem("read", &path, &error))?;
        if !kind.is_file() {
            let problem = format!("{} is no plain file", path.display());
            return Err(Error::config("path", problem));
        }
        small.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::config(
                "path",
                format!(
                    "{} is in use by another process: one `swiftcache donate` for each directory",
                    path.display()
                ),
            ),
            TryLockError::Error(error) => problem("lock", &path, &error),
        })?;
        Ok(Self {
            path,
            direct: AtomicBool::new(opened.large.is_some()),
            opened,
            read_only,
            writes: OnceLock::new(),
        })
    }

    /// Why nothing could be written when it was opened.
    pub(super) fn read_only(&self) -> Option<&io::Error> {
        self.read_only.as_ref()
    }

    /// What to write with. The lock stays with what was opened first.
    fn writing(&self) -> io::Result<&Handles> {
        if self.read_only.is_none() {
            return Ok(&self.opened);
        }
        if let Some(writes) = self.writes.get() {
            return Ok(writes);
        }
        let direct = self.opened.large.is_some();
        let writes = Handles::open(
            &self.path,
            direct,
            OpenOptions::new().read(true).write(true),
        )?;
        let (locked, now) = (self.opened.small.metadata()?, writes.small.metadata()?);
        if (locked.dev(), locked.ino()) != (now.dev(), now.ino()) {
            return Err(io::Error::other("another file has taken its place"));
        }
        Ok(self.writes.get_or_init(|| writes))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether blocks go past the kernel's cache.
    pub(super) fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    pub(super) fn bytes(&self) -> io::Result<u64> {
        Ok(self.opened.small.metadata()?.len())
    }

    /// Has the file system set bytes aside, so that what is written there later finds room.
    pub(super) fn provide(&self, at: u64, bytes: u64) -> io::Result<()> {
        let file = &self.writing()?.small;
        match fallocate(file, FallocateFlags::empty(), at, bytes) {
            Ok(()) => Ok(()),
            // A file system that cannot: writing finds out.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let end = at + bytes;
                match self.bytes()? < end {
                    true => file.set_len(end),
                    false => Ok(()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Forgets what lies behind.
    pub(super) fn truncate(&self, bytes: u64) -> io::Result<()> {
        match self.bytes()? > bytes {
            true => self.writing()?.small.set_len(bytes),
            false => Ok(()),
        }
    }

    /// Reads headers or entries.
    pub(super) fn read_small(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.opened.small.read_exact_at(bytes, at)
    }

    pub(super) fn write_small(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.writing()?.small.write_all_at(bytes, at)
    }

    /// Whether something can be written now: what is at the beginning is written once more.
    pub(super) fn try_writing(&self) -> io::Result<()> {
        let mut page = vec![0; PAGE as usize];
        self.read_small(0, &mut page)?;
        self.write_small(0, &page)
    }

    /// Reads whole pages of blocks.
    pub(super) fn read_large(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        match self.past_cache(&self.opened, |file| file.read_exact_at(bytes, at)) {
            Some(done) => done,
            None => self.opened.small.read_exact_at(bytes, at),
        }
    }

    pub(super) fn write_large(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let writing = self.writing()?;
        match self.past_cache(writing, |file| file.write_all_at(bytes, at)) {
            Some(done) => done,
            None => writing.small.write_all_at(bytes, at),
        }
    }

    /// `None` where it is to go through the cache.
    fn past_cache(
        &self,
        handles: &Handles,
        work: impl FnOnce(&File) -> io::Result<()>,
    ) -> Option<io::Result<()>> {
        let large = handles.large.as_ref().filter(|_| self.is_direct())?;
        match work(large) {
            // The file system wants another alignment.
            Err(error) if error.kind() == ErrorKind::InvalidInput => {
                self.direct.store(false, Ordering::Relaxed);
                None
            }
            done => Some(done),
        }
    }

    /// Waits until what was written has reached the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.writing()?.small.sync_data()
    }
}
