//! Finds out which process is at the other end of a Unix socket. The kernel names the process, its birth distinguishes
//! it from every other process, and a pidfd reports its death.
//!
//! The process is the one that called `connect`. A child that inherits the connection counts as its parent, as with
//! every other descriptor that it inherits.
//!
//! A process that becomes another program by `exec` stays the same process, and has nothing of its memory any more. Where the
//! broker may look into it, it notices that by its [`Image`].

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use nix::{
    libc::{SYS_execve, SYS_execveat},
    sys::socket::{getsockopt, sockopt},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, pidfd_open},
};

use tokio_util::sync::CancellationToken;

use crate::{
    calls::Calls,
    core::{Connection, Process},
};

/// `statfs` type of the kernel's pidfs ("PIDF"; Linux 6.9). With pidfs, the inode of a pidfd identifies one process
/// until the next boot. Before, all pidfds have the same inode.
const PIDFS_MAGIC: i128 = 0x5049_4446;

/// The process at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    /// The process, as the core knows it.
    pub process: Process,
    /// Its group when it connected.
    pub gid: u32,
    /// Becomes readable when the process is gone.
    pub pidfd: Arc<OwnedFd>,
    /// The program that connected; `None` where the broker may not look into the process.
    pub image: Option<Image>,
    /// Ends the connection.
    pub cut: CancellationToken,
    /// The connection.
    pub connection: Connection,
    /// Its calls.
    pub calls: Calls,
}

/// The number of the last connection.
static CONNECTIONS: AtomicU64 = AtomicU64::new(0);

/// The number of the next connection. To be asked for in the order in which connections are accepted.
pub(crate) fn next_connection() -> Connection {
    Connection(1 + CONNECTIONS.fetch_add(1, Ordering::Relaxed))
}

impl Peer {
    /// Asks the kernel which process connected `socket`, and gives the connection the next number. To be called in the order in
    /// which connections are accepted.
    ///
    /// # Errors
    /// When the kernel does not say, or the process is already gone.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
        let pid = u32::try_from(credentials.pid()).unwrap_or(0);
        let pidfd = match getsockopt(&socket, sockopt::PeerPidfd) {
            Ok(pidfd) => pidfd,
            // Before Linux 6.5. Another process may have got the pid between connect and now. The check below makes
            // that less likely, but cannot exclude it.
            Err(nix::Error::ENOPROTOOPT) if pid != 0 => open_pidfd(pid)?,
            Err(error) => return Err(error.into()),
        };
        let (birth, image) = if pid == 0 {
            (inode_birth(&pidfd)?, None)
        } else {
            let stat = read_stat(pid)?;
            (birth_of(pid, &stat)?, Image::parse(&stat))
        };
        // The process is alive after its birth was read, so the birth is not that of a later process with this pid.
        if is_gone(&pidfd)? {
            return Err(io::Error::new(
                io::ErrorKind::NotConnected,
                format!("process {pid} is gone"),
            ));
        }
        Ok(Self {
            process: Process {
                pid,
                birth,
                uid: credentials.uid(),
            },
            gid: credentials.gid(),
            pidfd: Arc::new(pidfd),
            image,
            connection: next_connection(),
            cut: CancellationToken::new(),
            calls: Calls::default(),
        })
    }

    /// Whether the process is a member of the group. For a process whose pid the broker cannot see, only the group that it
    /// connected with counts.
    pub fn is_in_group(&self, group: u32) -> bool {
        if self.gid == group {
            return true;
        }
        let status = format!("/proc/{}/status", self.process.pid);
        let Some(status) = (self.process.pid != 0).then(|| fs::read_to_string(status)) else {
            return false;
        };
        let member = status.is_ok_and(|status| lists_group(&status, group));
        // While the process lives, its pid is nobody else's.
        member && is_gone(&self.pidfd).is_ok_and(|gone| !gone)
    }
}

/// Whether `/proc/<pid>/status` lists a supplementary group.
fn lists_group(status: &str, group: u32) -> bool {
    let groups = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    let mut groups = groups.unwrap_or_default().split_ascii_whitespace();
    groups.any(|listed| listed.parse() == Ok(group))
}

/// Opens a pidfd of a process that the ledger names. `None`: the process is gone.
///
/// # Errors
/// When the kernel does not say. Then the process counts as alive.
pub fn reopen(process: Process) -> io::Result<Option<OwnedFd>> {
    if process.pid == 0 {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "it runs in a PID namespace that the broker cannot see into",
        ));
    }
    let gone = |error: &io::Error| {
        error.kind() == io::ErrorKind::NotFound
            || error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error())
    };
    let pidfd = match open_pidfd(process.pid) {
        Ok(pidfd) => pidfd,
        Err(error) if gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    match stat_birth(process.pid) {
        Ok(birth) if birth == process.birth && !is_gone(&pidfd)? => Ok(Some(pidfd)),
        Ok(_) => Ok(None),
        Err(error) if gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether the process of a pidfd is gone: then the pidfd is readable.
fn is_gone(pidfd: &OwnedFd) -> io::Result<bool> {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    Ok(poll(&mut fds, Some(&now))? > 0)
}

/// Where a program has its code, its stack, its arguments and its environment: `exec` puts them elsewhere, as far as addresses
/// are random.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image([u64; 4]);

impl Image {
    /// The program that a process runs now; `None` where the broker may not look, and when the process is gone.
    pub fn of(process: Process) -> Option<Self> {
        let stat = read_stat(process.pid).ok()?;
        let same = parse_birth(&stat) == Some(process.birth);
        same.then(|| Self::parse(&stat)).flatten()
    }

    /// Reads it from `/proc/<pid>/stat`: fields 26, 28, 48 and 50. Who may not look reads zeros.
    fn parse(stat: &str) -> Option<Self> {
        let (_, fields) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse().ok();
        let [code, stack, arguments, environment] =
            [field(26)?, field(28)?, field(48)?, field(50)?];
        let known = stack != 0 && arguments != 0;
        known.then_some(Self([code, stack, arguments, environment]))
    }

    /// Whether the process is known to run another program than this, and to have nothing left of what this could reach:
    /// no memory, which is gone with `exec`, and no descriptor of a GPU or of shared memory that was inherited. A driver ends
    /// what the last program had under way when its descriptors are closed, at the end of `exec`: so the process must have been
    /// on from there.
    pub fn is_gone_from(self, process: Process) -> bool {
        let replaced = Self::of(process).is_some_and(|now| now != self);
        replaced && is_past_exec(process.pid) && !reaches_memory(process.pid).unwrap_or(true)
    }

    /// The same of a process that has connected since: that it has done after `exec`.
    pub fn is_gone_before(self, peer: &Peer) -> bool {
        let replaced = peer.image.is_some_and(|now| now != self);
        replaced && !reaches_memory(peer.process.pid).unwrap_or(true)
    }
}

/// Whether a process waits in a system call other than `exec`.
fn is_past_exec(pid: u32) -> bool {
    let Ok(call) = fs::read_to_string(format!("/proc/{pid}/syscall")) else {
        return false;
    };
    let call = call.split_ascii_whitespace().next();
    let call: Option<i64> = call.and_then(|number| number.parse().ok());
    call.is_some_and(|call| call >= 0 && ![SYS_execve, SYS_execveat].contains(&call))
}

/// Whether a process has a descriptor through which memory of donors could be reached.
fn reaches_memory(pid: u32) -> io::Result<bool> {
    for descriptor in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let target = fs::read_link(descriptor?.path())?;
        let target = target.to_string_lossy();
        if target.starts_with("/dev/nvidia") || target.starts_with("/memfd:") {
            return Ok(true);
        }
    }
    Ok(false)
}

fn read_stat(pid: u32) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/stat"))
}

/// The start time of a process, clock ticks since boot: field 22 of `/proc/<pid>/stat`.
fn stat_birth(pid: u32) -> io::Result<u64> {
    birth_of(pid, &read_stat(pid)?)
}

fn birth_of(pid: u32, stat: &str) -> io::Result<u64> {
    parse_birth(stat).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("/proc/{pid}/stat has no start time"),
        )
    })
}

/// Reads the start time from `/proc/<pid>/stat`. The second field is the command in parentheses, which may contain
/// anything, also parentheses. After it, the start time is the 20th field.
fn parse_birth(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(19)?.parse().ok()
}

/// The birth of a process whose pid cannot be seen.
fn inode_birth(pidfd: &OwnedFd) -> io::Result<u64> {
    if i128::from(rustix::fs::fstatfs(pidfd)?.f_type) != PIDFS_MAGIC {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the peer runs in a PID namespace that the broker cannot see into, and before Linux 6.9 such \
             processes cannot be identified; run both in one PID namespace (hostPID: true)",
        ));
    }
    Ok(rustix::fs::fstat(pidfd)?.st_ino)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn names_the_process_at_the_other_end() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!(peer.process.pid, std::process::id());
        assert_eq!(peer.process.uid, rustix::process::getuid().as_raw());
        assert_eq!(
            peer.process.birth,
            stat_birth(std::process::id()).unwrap(),
            "the birth is this process's own"
        );
        assert!(!is_gone(&peer.pidfd).unwrap());
    }

    #[test]
    fn a_command_with_parentheses_does_not_shift_the_birth() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20 21";
        assert_eq!(parse_birth(&format!("42 (cat) {tail}")), Some(4711));
        assert_eq!(parse_birth(&format!("42 (a) S 1) {tail}")), Some(4711));
        assert_eq!(parse_birth("42 (cat) S 1 2"), None);
    }

    #[test]
    fn supplementary_groups_are_read_whole_and_nothing_else() {
        let status = "Name:\tGroups: 7\nGid:\t8\t8\t8\t8\nGroups:\t4 27 1000 \nNStgid:\t9\n";
        for (group, listed) in [
            (27, true),
            (1_000, true),
            (2, false),
            (8, false),
            (9, false),
        ] {
            assert_eq!(lists_group(status, group), listed, "{group}");
        }
        assert!(!lists_group("Groups:\t\n", 0));
    }

    fn process_of(child: &std::process::Child) -> Process {
        Process {
            pid: child.id(),
            birth: stat_birth(child.id()).unwrap(),
            uid: 0,
        }
    }

    #[test]
    fn a_living_process_is_reopened_and_a_dead_or_different_one_is_gone() {
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let process = process_of(&child);
        assert!(reopen(process).unwrap().is_some());
        let reused = Process {
            birth: process.birth + 1,
            ..process
        };
        assert!(reopen(reused).unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(reopen(process).unwrap().is_none());
    }

    /// A child that becomes `cat` when it is told so.
    #[test]
    fn a_program_is_gone_when_its_process_runs_another_one() {
        use std::{
            io::Write,
            process::{Command, Stdio},
        };
        let mut child = Command::new("sh")
            .args(["-c", "read go; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let process = process_of(&child);
        // `spawn` returns when `sh` runs, or is about to.
        let before = loop {
            if is_past_exec(process.pid)
                && let Some(image) = Image::of(process)
            {
                break image;
            }
            std::thread::yield_now();
        };
        assert!(!before.is_gone_from(process));
        let mut input = child.stdin.take().unwrap();
        input.write_all(b"go\n").unwrap();
        while !before.is_gone_from(process) {
            std::thread::yield_now();
        }
        // The twins: a process of another birth, and one that is gone, say nothing of the program.
        let reused = Process {
            birth: process.birth + 1,
            ..process
        };
        assert!(!before.is_gone_from(reused));
        drop(input);
        child.wait().unwrap();
        assert!(!before.is_gone_from(process));
    }

    #[test]
    fn who_may_not_look_into_a_process_knows_no_program() {
        let fields = |stack: u64, arguments: u64| {
            let mut fields = vec!["1".to_owned(); 50];
            (fields[25], fields[45]) = (stack.to_string(), arguments.to_string());
            format!("42 (cat) {}", fields.join(" "))
        };
        assert!(Image::parse(&fields(7, 8)).is_some());
        assert_ne!(Image::parse(&fields(7, 8)), Image::parse(&fields(7, 9)));
        assert_eq!(Image::parse(&fields(0, 0)), None);
        assert_eq!(Image::parse("42 (cat) S 1 2"), None);
    }

    #[test]
    fn a_descriptor_of_shared_memory_reaches_memory() {
        let own = std::process::id();
        let file = rustix::fs::memfd_create("a slab", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(reaches_memory(own).unwrap());
        drop(file);
    }

    #[test]
    fn a_process_that_cannot_be_seen_is_not_declared_gone() {
        let unseen = Process {
            pid: 0,
            birth: 7,
            uid: 0,
        };
        assert!(reopen(unseen).is_err());
    }
}
