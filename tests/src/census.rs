//! Counts what a process holds in the kernel, so that a test can see what the process leaks.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::fd::AsFd,
    path::PathBuf,
};

use anyhow::{Context, Result};

/// The names of threads that start under load, so they are no leak: of tokio's pool for blocking calls, which end when idle, and of
/// the broker's allocator, of which there is one for each core at most.
const POOL_THREADS: [&str; 2] = ["tokio-rt-worker", "jemalloc_bg_thd"];

/// Descriptors by kind, mappings of shared memory by inode, threads by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// How many open descriptors there are of each kind: "socket", "pidfd", a memfd's name, a file's path, ...
    pub descriptors: BTreeMap<String, usize>,
    /// Inodes of the mapped memfds.
    pub mapped: BTreeSet<u64>,
    /// How many threads there are of each name.
    pub threads: BTreeMap<String, usize>,
}

impl Census {
    /// Counts a process.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn of(pid: u32) -> Result<Self> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let mut census = Self {
            mapped: mapped(pid)?,
            ..Self::default()
        };
        for entry in fs::read_dir(proc.join("fd")).context("descriptors")? {
            // A descriptor that was closed meanwhile does not count. The one of this directory is such a descriptor.
            if let Ok(target) = fs::read_link(entry?.path()) {
                *census
                    .descriptors
                    .entry(kind(&target.to_string_lossy()))
                    .or_default() += 1;
            }
        }
        for entry in fs::read_dir(proc.join("task")).context("threads")? {
            if let Ok(name) = fs::read_to_string(entry?.path().join("comm"))
                && !POOL_THREADS.contains(&name.trim_end())
            {
                *census
                    .threads
                    .entry(name.trim_end().to_owned())
                    .or_default() += 1;
            }
        }
        Ok(census)
    }

    /// What this census has more of than `idle`, for people.
    #[must_use]
    pub fn beyond(&self, idle: &Self) -> Vec<String> {
        let more = |what: &str, now: &BTreeMap<String, usize>, then: &BTreeMap<String, usize>| {
            // The account files of simulated devices have the process in their name, so no two processes have the same.
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

    /// How many descriptors there are of a kind.
    pub fn count(&self, kind: &str) -> usize {
        self.descriptors.get(kind).copied().unwrap_or(0)
    }
}

/// Resident memory of a process, bytes.
///
/// # Errors
/// When the process is gone.
pub fn resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.context("no VmRSS")?.trim().trim_end_matches(" kB");
    Ok(kib.parse::<u64>()? << 10)
}

/// Inodes of the memfds that a process has mapped.
///
/// # Errors
/// When the process is gone.
pub fn mapped(pid: u32) -> Result<BTreeSet<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).context("mappings")?;
    let memfds = maps.lines().filter(|line| line.contains("/memfd:"));
    // The fields of a line are: address, permissions, offset, device, inode, path.
    let inodes = memfds.filter_map(|line| line.split_ascii_whitespace().nth(4)?.parse().ok());
    Ok(inodes.collect())
}

/// The inode of an open file.
///
/// # Errors
/// When the kernel does not answer.
pub fn inode(file: impl AsFd) -> Result<u64> {
    Ok(rustix::fs::fstat(file)?.st_ino)
}

/// The kind of a descriptor: "socket" for "socket:[4711]", "[pidfd]" for "anon_inode:[pidfd]", and a path unchanged.
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
