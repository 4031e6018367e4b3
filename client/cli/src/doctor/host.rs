//! The kernel and the limits that this process runs under.

use std::fs;

use nix::sys::resource::{Resource, getrlimit};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use super::report::{Finding, Report};
use swiftcache_replay::report::bytes;

/// `statfs` type of the kernel's pidfs ("PIDF").
const PIDFS_MAGIC: i128 = 0x5049_4446;
/// How many bytes a process may lock by default since Linux 5.16.
const USUAL_MEMLOCK: u64 = 8 << 20;
/// With fewer descriptors, a process with its sockets and libraries runs out of them.
const FEW_FILES: u64 = 256;
/// So many descriptors are enough for the allocations of a node.
const ENOUGH_FILES: u64 = 4_096;
/// Bytes of shared memory. Container runtimes give 64 MB, but engines with several ranks need more.
const ENOUGH_SHM: u64 = 1 << 30;

pub(super) fn examine(report: &mut Report) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    report.add(kernel(release.trim(), pidfs()));
    report.add(locked(limit(Resource::RLIMIT_MEMLOCK)));
    report.add(files(limit(Resource::RLIMIT_NOFILE)));
    let shm = rustix::fs::statvfs("/dev/shm");
    report.add(shared(
        shm.ok().map(|fs| fs.f_frsize.saturating_mul(fs.f_blocks)),
    ));
    report.add(users(
        &fs::read_to_string("/proc/self/uid_map").unwrap_or_default(),
    ));
}

/// Whether the kernel has pidfs. With pidfs, the inode of a pidfd identifies its process.
fn pidfs() -> bool {
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty());
    let fs = pidfd.and_then(rustix::fs::fstatfs);
    fs.is_ok_and(|fs| i128::from(fs.f_type) == PIDFS_MAGIC)
}

/// The soft limit; `None` when it cannot be read.
fn limit(resource: Resource) -> Option<u64> {
    getrlimit(resource).ok().map(|(soft, _)| soft)
}

fn kernel(release: &str, pidfs: bool) -> Finding {
    const CHECK: &str = "kernel";
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next().and_then(|digits| digits.parse::<u32>().ok());
    let version = (next().unwrap_or_default(), next().unwrap_or_default());
    if version < (5, 3) {
        return Finding::fail(
            CHECK,
            format!("Linux {release} has no pidfd"),
            "the broker cannot notice that a process dies; use Linux 6.9 or later",
        );
    }
    if !pidfs {
        return Finding::warn(
            CHECK,
            format!("Linux {release} has no pidfs"),
            "broker and engines must share a PID namespace (chart: deathWatch.hostPID=true), or use Linux 6.9 or later",
        );
    }
    Finding::ok(CHECK, format!("Linux {release}, with pidfs"))
}

fn locked(soft: Option<u64>) -> Finding {
    const CHECK: &str = "memlock";
    match soft {
        Some(libc::RLIM_INFINITY) => Finding::ok(CHECK, "unlimited"),
        Some(soft) if soft >= USUAL_MEMLOCK => Finding::ok(CHECK, bytes(soft)),
        Some(soft) => Finding::warn(
            CHECK,
            format!("RLIMIT_MEMLOCK is {}", bytes(soft)),
            "this does not limit SwiftCache's host tier, which the CUDA driver pins, but RDMA libraries of an engine: ulimit -l unlimited",
        ),
        None => Finding::warn(
            CHECK,
            "RLIMIT_MEMLOCK cannot be read",
            "check it with ulimit -l",
        ),
    }
}

fn files(soft: Option<u64>) -> Finding {
    const CHECK: &str = "nofile";
    let advice = "every allocation, process and stream needs a descriptor: ulimit -n 65536, or LimitNOFILE= in the unit";
    match soft {
        Some(soft) if soft < FEW_FILES => {
            Finding::fail(CHECK, format!("RLIMIT_NOFILE is {soft}"), advice)
        }
        // The default of most shells is enough for an engine. A broker does not raise its limit by itself.
        Some(soft) if soft < ENOUGH_FILES => {
            Finding::warn(CHECK, format!("RLIMIT_NOFILE is {soft}"), advice)
        }
        Some(libc::RLIM_INFINITY) => Finding::ok(CHECK, "unlimited"),
        Some(soft) => Finding::ok(CHECK, soft.to_string()),
        None => Finding::warn(
            CHECK,
            "RLIMIT_NOFILE cannot be read",
            "check it with ulimit -n",
        ),
    }
}

fn shared(total: Option<u64>) -> Finding {
    const CHECK: &str = "shm";
    let advice = "SwiftCache does not need more, but engines with several ranks do: --shm-size, or an emptyDir with medium: Memory";
    match total {
        Some(total) if total >= ENOUGH_SHM => {
            Finding::ok(CHECK, format!("/dev/shm holds {}", bytes(total)))
        }
        Some(total) => Finding::warn(CHECK, format!("/dev/shm holds {}", bytes(total)), advice),
        None => Finding::warn(CHECK, "there is no /dev/shm", advice),
    }
}

/// If containers have their own user namespaces, the broker may see the processes of all of them as one user.
fn users(uid_map: &str) -> Finding {
    const CHECK: &str = "user-namespace";
    let words: Vec<&str> = uid_map.split_whitespace().collect();
    if words.starts_with(&["0", "0"]) {
        return Finding::ok(CHECK, "this process is in the host's user namespace");
    }
    Finding::warn(
        CHECK,
        "this process is in a user namespace",
        "the broker may see all engines as one tenant: do not set hostUsers, or give each engine its own tenant label",
    )
}

#[cfg(test)]
mod tests {
    use super::{super::report::Verdict, *};

    #[test]
    fn kernels_are_told_apart() {
        assert_eq!(kernel("6.12.8+deb13", true).verdict, Verdict::Ok);
        assert_eq!(kernel("5.15.0-91-generic", false).verdict, Verdict::Warn);
        assert_eq!(kernel("5.2.0", false).verdict, Verdict::Fail);
        assert_eq!(kernel("what", true).verdict, Verdict::Fail);
    }

    #[test]
    fn limits_are_judged() {
        use Verdict::{Fail, Ok, Warn};
        let verdicts = |of: fn(Option<u64>) -> Finding, limits: [u64; 3]| {
            limits.map(|limit| of(Some(limit)).verdict)
        };
        assert_eq!(verdicts(files, [64, 1_024, 1 << 20]), [Fail, Warn, Ok]);
        assert_eq!(
            verdicts(locked, [64 << 10, 8 << 20, u64::MAX]),
            [Warn, Ok, Ok]
        );
        assert_eq!(
            verdicts(shared, [64 << 20, 1 << 30, 1 << 40]),
            [Warn, Ok, Ok]
        );
        for unknown in [files(None), locked(None), shared(None)] {
            assert_eq!(unknown.verdict, Warn);
        }
    }

    #[test]
    fn a_user_namespace_is_noticed() {
        assert_eq!(
            users("         0          0 4294967295\n").verdict,
            Verdict::Ok
        );
        assert_eq!(
            users("         0     100000      65536\n").verdict,
            Verdict::Warn
        );
    }
}
