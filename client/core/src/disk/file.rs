//! The file: bytes at offsets, its lock, and how it grows.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
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
    /// Headers and entries, through the kernel's cache.
    small: File,
    /// Blocks, past it where the file system lets them.
    large: Option<File>,
    direct: AtomicBool,
}

fn problem(what: &str, path: &Path, error: &io::Error) -> Error {
    Error::config("path", format!("cannot {what} {}: {error}", path.display()))
}

impl BlockFile {
    /// Opens the file in a directory, or makes both.
    pub(super) fn open(dir: &Path, direct: bool) -> Result<Self> {
        fs::create_dir_all(dir).map_err(|error| problem("make the directory", dir, &error))?;
        let path = dir.join(FILE);
        let options = |flags: OFlags| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            // What is in it is what prompts said.
            options.mode(0o600).custom_flags(flags.bits() as i32);
            options
        };
        let small = (options(OFlags::NOFOLLOW).open(&path))
            .map_err(|error| problem("write to", &path, &error))?;
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
        let large = direct
            .then(|| options(OFlags::NOFOLLOW | OFlags::DIRECT).open(&path).ok())
            .flatten();
        Ok(Self {
            path,
            small,
            direct: AtomicBool::new(large.is_some()),
            large,
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether blocks go past the kernel's cache.
    pub(super) fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    pub(super) fn bytes(&self) -> io::Result<u64> {
        Ok(self.small.metadata()?.len())
    }

    /// Has the file system set bytes aside, so that what is written there later finds room.
    pub(super) fn provide(&self, at: u64, bytes: u64) -> io::Result<()> {
        match fallocate(&self.small, FallocateFlags::empty(), at, bytes) {
            Ok(()) => Ok(()),
            // A file system that cannot: writing finds out.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let end = at + bytes;
                match self.bytes()? < end {
                    true => self.small.set_len(end),
                    false => Ok(()),
                }
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Forgets what lies behind.
    pub(super) fn truncate(&self, bytes: u64) -> io::Result<()> {
        match self.bytes()? > bytes {
            true => self.small.set_len(bytes),
            false => Ok(()),
        }
    }

    /// Reads headers or entries.
    pub(super) fn read_small(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.small.read_exact_at(bytes, at)
    }

    pub(super) fn write_small(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.small.write_all_at(bytes, at)
    }

    /// Reads whole pages of blocks.
    pub(super) fn read_large(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        match self.past_cache(|file| file.read_exact_at(bytes, at)) {
            Some(done) => done,
            None => self.small.read_exact_at(bytes, at),
        }
    }

    pub(super) fn write_large(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match self.past_cache(|file| file.write_all_at(bytes, at)) {
            Some(done) => done,
            None => self.small.write_all_at(bytes, at),
        }
    }

    /// `None` where it is to go through the cache.
    fn past_cache(&self, work: impl FnOnce(&File) -> io::Result<()>) -> Option<io::Result<()>> {
        let large = self.large.as_ref().filter(|_| self.is_direct())?;
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
        self.small.sync_data()
    }
}
