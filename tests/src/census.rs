//! What a process holds of the kernel's: so that what it leaks shows.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::AsFd,
    path::PathBuf,
};

use anyhow::{Context, Result};

/// Threads of tokio's pool for blocking calls: they come with load and go when idle, and are no leak.
const POOL_THREAD: &str = "tokio-rt-worker";

/// Descriptors by kind, mappings of shared memory by inode, threads by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// "socket", "pidfd", a memfd's name, a file's path, ... and how many.
    pub descriptors: BTreeMap<String, usize>,
    /// Inodes of the memfds it has mapped.
    pub mapped: BTreeSet<u64>,
    /// Names of its threads, and how many of each.
    pub threads: BTreeMap<String, usize>,
}

impl Census {
    /// Counts a process.
    ///
    /// # Errors
    /// When it is gone.
    pub fn of(pid: u32) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let mut census = Self {
            mapped: mapped(pid)?,
            ..Self::default()
        };
        for entry in fs::read_dir(proc.join("fd")).context("descriptors")? {
            // One that was closed meanwhile, like this directory's own, is none.
            if let Ok(target) = fs::read_link(entry?.path()) {
                *census
                    .descriptors
                    .entry(kind(&target.to_string_lossy()))
                    .or_default() += 1;
            }
        }
        for entry in fs::read_dir(proc.join("task")).context("threads")? {
            if let Ok(name) = fs::read_to_string(entry?.path().join("comm"))
                && name.trim_end() != POOL_THREAD
            {
                *census
                    .threads
                    .entry(name.trim_end().to_owned())
                    .or_default() += 1;
            }
        }
        Ok(census)
    }

    /// What it holds more of than `idle`, for people.
    #[must_use]
    pub fn beyond(&self, idle: &Self) -> Vec<String> {
        let more = |what: &str, now: &BTreeMap<String, usize>, then: &BTreeMap<String, usize>| {
            // Named by the process, as simulated devices' accounts are: no two processes have the same.
            let own = |kind: &str| kind.contains("/usage/");
            let more = now
                .iter()
                .filter(|(kind, _)| !own(kind))
                .filter_map(|(kind, count)| {
                    let before = then.get(kind).copied().unwrap_or(0);
                    (*count > before).then(|| format!("{count} instead of {before} {what} {kind}"))
                });
            more.collect::<Vec<_>>()
        };
        let mut all = more("descriptors", &self.descriptors, &idle.descriptors);
        all.extend(more("threads", &self.threads, &idle.threads));
        if self.mapped.len() > idle.mapped.len() {
            let (now, then) = (self.mapped.len(), idle.mapped.len());
            all.push(format!("{now} instead of {then} mappings"));
        }
        all
    }

    /// Descriptors of a kind.
    pub fn count(&self, kind: &str) -> usize {
        self.descriptors.get(kind).copied().unwrap_or(0)
    }
}

/// Resident memory of a process, bytes.
///
/// # Errors
/// When it is gone.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.context("no VmRSS")?.trim().trim_end_matches(" kB");
    Ok(kib.parse::<u64>()? << 10)
}

/// Inodes of the memfds that a process has mapped.
///
/// # Errors
/// When it is gone.
pub fn mapped(pid: u32) -> Result<BTreeSet<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("mappings")?;
    let memfds = maps.lines().filter(|line| line.contains("/memfd:"));
    // address, permissions, offset, device, inode, path
    let inodes = memfds.filter_map(|line| line.split_ascii_whitespace().nth(4)?.parse().ok());
    Ok(inodes.collect())
}

/// The inode of an open file.
///
/// # Errors
/// When the kernel will not say.
pub fn inode(file: impl AsFd) -> Result<u64> {
    Ok(rustix::fs::fstat(file)?.st_ino)
}

/// "socket" of "socket:[4711]", "[pidfd]" of "anon_inode:[pidfd]", a path as it is.
fn kind(target: &str) -> String {
    match target.split_once(':') {
        Some(("anon_inode", what)) => what.to_owned(),
        Some((what, _)) if !target.starts_with('/') => what.to_owned(),
        _ => target.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_leaked_is_counted() {
        let pid = std::process::id();
        let name = "/memfd:leak (deleted)";
        let before = Census::of(pid).unwrap();
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let leaks = [1, 2].map(|_| rustix::fs::memfd_create("leak", flags).unwrap());
        let after = Census::of(pid).unwrap();
        assert_eq!((before.count(name), after.count(name)), (0, 2));
        assert_ne!(before, after);
        drop(leaks);
        assert_eq!(Census::of(pid).unwrap().count(name), 0);
        assert!(resident_bytes(pid).unwrap() > 1 << 20);
    }

    #[test]
    fn a_kind_says_what_it_is() {
        assert_eq!(kind("socket:[4711]"), "socket");
        assert_eq!(kind("anon_inode:[pidfd]"), "[pidfd]");
        assert_eq!(kind("/a:b"), "/a:b");
    }
}
