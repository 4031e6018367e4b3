//! The ledger's file: reads it back, appends to it, and replaces it in one step.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use rustix::fs::{FlockOperation, flock, fstatfs};
use serde::{Deserialize, Serialize};

use super::{Ledger, Storage, seal};
use crate::{core::Record, error::BrokerError};

/// The name of the format in the header.
const FORMAT: &str = "swiftcache-ledger";
/// The version of the format. A ledger of a later version is moved aside.
const VERSION: u32 = 2;
/// The version whose lines have no checksums. It is read and never written.
const UNSEALED: u32 = 1;
/// The file systems that keep files in memory, by their numbers in Linux's `magic.h`: tmpfs and ramfs.
const IN_MEMORY: [u64; 2] = [0x0102_1994, 0x8584_58f6];
/// Only the owner may read the file, because it names sessions and processes.
const MODE: u32 = 0o600;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    format: String,
    version: u32,
    /// The kernel's boot id. After a reboot, none of the ledger's processes lives any more.
    boot: String,
    /// The PID namespace of the ledger's pids. The kernel uses its number again only when no process is left in it.
    pid_namespace: u64,
}

/// A locked lock file. Drop unlocks it, and the kernel unlocks it when the process ends.
#[derive(Debug)]
pub struct Lock {
    held: File,
}

impl Drop for Lock {
    /// Unlocks explicitly, because a process that was just forked may still have a copy of the descriptor.
    fn drop(&mut self) {
        if let Err(error) = flock(&self.held, FlockOperation::Unlock) {
            tracing::warn!(%error, "a lock file could not be unlocked");
        }
    }
}

impl Lock {
    /// Locks a directory itself. Nobody can take that lock away by deleting a lock file. The arguments are as for
    /// [`Self::take`].
    ///
    /// # Errors
    /// [`BrokerError::Taken`] when another process holds it.
    pub fn take_directory(
        path: &Path,
        what: String,
        key: &'static str,
    ) -> Result<Self, BrokerError> {
        let directory = File::open(path).map_err(BrokerError::file("open", path))?;
        Self::hold(directory, path.to_owned(), what, key)
    }

    /// Takes the lock at `path`. `what` is the thing that it guards and `key` is its setting, for the error.
    ///
    /// # Errors
    /// [`BrokerError::Taken`] when another process holds it.
    pub fn take(path: PathBuf, what: String, key: &'static str) -> Result<Self, BrokerError> {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(MODE)
            .open(&path)
            .map_err(BrokerError::file("open", &path))?;
        Self::hold(file, path, what, key)
    }

    fn hold(
        file: File,
        path: PathBuf,
        what: String,
        key: &'static str,
    ) -> Result<Self, BrokerError> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { held: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(BrokerError::Taken {
                what,
                lock: path,
                key,
            }),
            Err(error) => Err(BrokerError::file("lock", path)(error.into())),
        }
    }
}

/// The open file.
pub struct Disk {
    path: PathBuf,
    header: Header,
    file: File,
    bytes: u64,
}

/// Opens the ledger in `directory`, which must exist, and returns its records. The records of an earlier boot are
/// dropped. A ledger that is corrupt, or that names processes by pids of another PID namespace, is moved aside.
///
/// # Errors
/// When the directory or the file cannot be used.
pub fn open(directory: &Path) -> Result<(Ledger, Vec<Record>), BrokerError> {
    let path = directory.join("ledger");
    let here = Header::here()?;
    let records = match fs::read(&path) {
        Ok(bytes) => match parse(&bytes, &here) {
            Ok(records) => records,
            Err(problem) => {
                set_aside(&path, &problem)?;
                Vec::new()
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(BrokerError::file("read", path)(error)),
    };
    let disk = Disk::create(&path, here).map_err(BrokerError::file("write", &path))?;
    let mut ledger = Ledger::new(&path, Box::new(disk));
    ledger.begin(&records);
    Ok((ledger, records))
}

/// Renames a ledger that cannot be used, so that people can examine it.
///
/// # Errors
/// When it cannot be renamed.
pub fn set_aside(path: &Path, problem: &str) -> Result<(), BrokerError> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let aside = path.with_extension(format!("corrupt-{}", now.as_millis()));
    fs::rename(path, &aside).map_err(BrokerError::file("rename", path))?;
    tracing::error!(
        ledger = %path.display(), aside = %aside.display(), problem,
        "the ledger cannot be used and was moved aside: earlier sessions get NOT_FOUND, drop their leases and \
         register again"
    );
    Ok(())
}

/// Creates a directory and its parents. Everyone may enter it, because the modes of the sockets in it decide who may
/// connect.
///
/// # Errors
/// When it cannot be created.
pub fn create_directory(path: &Path) -> Result<(), BrokerError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .map_err(BrokerError::file("create the directory", path))
}

fn parse(bytes: &[u8], here: &Header) -> Result<Vec<Record>, String> {
    let mut lines = bytes.split(|byte| *byte == b'\n');
    // After the last newline there is nothing, or a line that a crash of the broker has cut.
    let torn = lines.next_back().unwrap_or_default();
    let Some(first) = lines.next() else {
        return Ok(Vec::new());
    };
    let header: Header = serde_json::from_slice(seal::open(first).unwrap_or(first))
        .map_err(|error| format!("line 1: {error}"))?;
    if header.format != here.format || !(UNSEALED..=VERSION).contains(&header.version) {
        return Err(format!(
            "line 1: is {} version {}; takes {FORMAT} version {UNSEALED} to {VERSION}",
            header.format, header.version
        ));
    }
    let sealed = header.version != UNSEALED;
    let opened = |number: u64, line| match sealed {
        true => seal::open(line).map_err(|problem| format!("line {number}: {problem}")),
        false => Ok(line),
    };
    opened(1, first)?;
    if header.boot != here.boot {
        tracing::info!(
            "the ledger is from before the last boot of this machine, so its records are dropped"
        );
        return Ok(Vec::new());
    }
    // A crash can cut only the newline off. Then the line is whole, or it is damaged.
    let whole = (sealed && !seal::is_torn(torn)).then_some(torn);
    if whole.is_none() && !torn.is_empty() {
        tracing::warn!(
            bytes = torn.len(),
            "the ledger's last line is incomplete and was dropped; its request was never answered"
        );
    }
    let records: Vec<Record> = (2_u64..)
        .zip(lines.chain(whole))
        .map(|(number, line)| {
            let text = opened(number, line)?;
            serde_json::from_slice(text).map_err(|error| format!("line {number}: {error}"))
        })
        .collect::<Result<_, _>>()?;
    if header.pid_namespace != here.pid_namespace && names_a_pid(&records) {
        return Err("it names processes by pids of another PID namespace than the broker's".into());
    }
    Ok(records)
}

/// Whether a session in the records is identified by its pid. A session that is identified by the inode of its pidfd
/// means the same in every PID namespace.
fn names_a_pid(records: &[Record]) -> bool {
    let mut by_pid = HashSet::new();
    for record in records {
        match record {
            Record::Session {
                session, process, ..
            } if process.pid != 0 => {
                by_pid.insert(session);
            }
            Record::SessionOver { session } => {
                by_pid.remove(session);
            }
            _ => {}
        }
    }
    !by_pid.is_empty()
}

impl Header {
    /// The header of a ledger of this boot and this PID namespace.
    fn here() -> Result<Self, BrokerError> {
        let boot = "/proc/sys/kernel/random/boot_id";
        let id = fs::read_to_string(boot).map_err(BrokerError::file("read", boot))?;
        let namespace = "/proc/self/ns/pid";
        let namespace = fs::metadata(namespace).map_err(BrokerError::file("look at", namespace))?;
        Ok(Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            boot: id.trim().to_owned(),
            pid_namespace: namespace.ino(),
        })
    }
}

impl Disk {
    fn create(path: &Path, header: Header) -> io::Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(MODE)
            .open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self {
            path: path.to_owned(),
            header,
            file,
            bytes,
        })
    }
}

impl Storage for Disk {
    fn check(&self) -> io::Result<()> {
        let found = match fs::symlink_metadata(&self.path) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(io::Error::other("somebody deleted it"));
            }
            Err(error) => return Err(error),
        };
        let ours = self.file.metadata()?;
        if (found.dev(), found.ino()) != (ours.dev(), ours.ino()) {
            return Err(io::Error::other("somebody put another file in its place"));
        }
        if ours.len() != self.bytes {
            let problem = format!(
                "somebody changed it: it has {} bytes, not {}",
                ours.len(),
                self.bytes
            );
            return Err(io::Error::other(problem));
        }
        Ok(())
    }

    fn is_memory(&self) -> bool {
        // What cannot be told is taken for a disk.
        fstatfs(&self.file).is_ok_and(|found| IN_MEMORY.contains(&(found.f_type as u64)))
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        // What is appended to a file that nobody finds is lost.
        self.check()?;
        let written = self.file.write_all(bytes);
        match &written {
            Ok(()) => self.bytes += bytes.len() as u64,
            // If this fails, the incomplete bytes stay. That is fine: the ledger is rewritten before the next grant.
            Err(_) => drop(self.file.set_len(self.bytes)),
        }
        written
    }

    fn replace(&mut self, records: &[u8]) -> io::Result<u64> {
        let fresh = self.path.with_extension("new");
        let mut bytes = serde_json::to_vec(&self.header)?;
        seal::seal(&mut bytes, 0)?;
        bytes.extend_from_slice(records);
        // Never write to a file or link that somebody else left there.
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(MODE)
            .open(&fresh)?;
        file.write_all(&bytes)
            .and_then(|()| fs::rename(&fresh, &self.path))
            .inspect_err(|_| drop(fs::remove_file(&fresh)))?;
        self.file = file;
        self.bytes = bytes.len() as u64;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use swiftcache_proto::domain::SessionId;

    use super::*;

    fn over(id: u64) -> Record {
        Record::SessionOver {
            session: SessionId(id),
        }
    }

    /// A ledger of two records, closed again.
    fn written() -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let (mut ledger, records) = open(directory.path()).unwrap();
        assert!(records.is_empty());
        assert!(ledger.append(&[over(1), over(2)]));
        directory
    }

    fn append(directory: &Path, text: &str) {
        let path = directory.join("ledger");
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    /// Ends every line of a text with the checksum that it should have.
    fn sealed(text: &str) -> String {
        let mut lines = Vec::new();
        for line in text.lines() {
            let start = lines.len();
            lines.extend_from_slice(line.split('\t').next().unwrap().as_bytes());
            seal::seal(&mut lines, start).unwrap();
        }
        String::from_utf8(lines).unwrap()
    }

    fn asides(directory: &Path) -> usize {
        let names = fs::read_dir(directory).unwrap();
        names
            .filter(|name| {
                let name = name.as_ref().unwrap().file_name();
                name.to_string_lossy().starts_with("ledger.corrupt-")
            })
            .count()
    }

    #[test]
    fn what_was_appended_is_read_back_and_nobody_else_may_read_it() {
        let directory = written();
        let mode = fs::metadata(directory.path().join("ledger"))
            .unwrap()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let (_, records) = open(directory.path()).unwrap();
        assert_eq!(records, [over(1), over(2)]);
    }

    /// Linux mounts tmpfs at /dev/shm. What no file system of this kind holds is the twin.
    #[test]
    fn a_ledger_on_tmpfs_never_waits_for_a_device() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let (ledger, _) = open(directory.path()).unwrap();
        assert!(ledger.is_memory());
        let elsewhere = fstatfs(File::open("/proc/self/stat").unwrap()).unwrap();
        assert!(!IN_MEMORY.contains(&(elsewhere.f_type as u64)));
    }

    #[test]
    fn a_torn_last_line_is_dropped_and_appends_go_on_behind_the_whole_ones() {
        let directory = written();
        append(directory.path(), "{\"record\":\"session-ov");
        let (mut ledger, records) = open(directory.path()).unwrap();
        assert_eq!(records, [over(1), over(2)]);
        assert!(ledger.append(&[over(3)]));
        let (_, records) = open(directory.path()).unwrap();
        assert_eq!(records, [over(1), over(2), over(3)]);
        assert_eq!(asides(directory.path()), 0);
    }

    /// Nothing may be appended to what the next start does not read.
    #[test]
    fn a_ledger_that_cannot_be_begun_is_behind_until_it_is_rewritten() {
        let other_boot = |text: &str, boot: &str| sealed(&text.replace(boot, "another boot"));
        let files: [(&str, Vec<Record>); 3] = [
            ("none", vec![]),
            ("boot", vec![]),
            ("torn", vec![over(1), over(2)]),
        ];
        for (what, known) in files {
            let directory = written();
            let path = directory.path().join("ledger");
            match what {
                "none" => fs::remove_file(&path).unwrap(),
                "boot" => {
                    let text = fs::read_to_string(&path).unwrap();
                    fs::write(&path, other_boot(&text, &Header::here().unwrap().boot)).unwrap();
                }
                _ => append(directory.path(), "{\"record\":\"session-ov"),
            }
            let in_the_way = directory.path().join("ledger.new");
            fs::create_dir(&in_the_way).unwrap();
            let (mut ledger, records) = open(directory.path()).unwrap();
            assert_eq!(records, known, "{what}");
            assert!(
                ledger.behind().is_some() && ledger.wants_rewrite(),
                "{what}"
            );
            assert!(!ledger.append(&[over(3)]), "{what}");
            fs::remove_dir(&in_the_way).unwrap();
            assert!(
                ledger.rewrite(&records) && ledger.append(&[over(4)]),
                "{what}"
            );
            let (_, records) = open(directory.path()).unwrap();
            assert_eq!(records, [&known[..], &[over(4)]].concat(), "{what}");
            assert_eq!(asides(directory.path()), 0, "{what}");
        }
    }

    #[test]
    fn a_corrupt_line_that_is_not_the_last_moves_the_ledger_aside() {
        let directory = written();
        append(directory.path(), "garbage\n");
        let (_, records) = open(directory.path()).unwrap();
        assert!(records.is_empty());
        assert_eq!(asides(directory.path()), 1);
    }

    #[test]
    fn a_foreign_header_moves_the_ledger_aside_and_an_earlier_boot_voids_it() {
        for (from, to, set_aside) in [
            ("\"version\":2", "\"version\":9", 1),
            ("\"boot\":\"", "\"boot\":\"0", 0),
        ] {
            let directory = written();
            let path = directory.path().join("ledger");
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(from));
            fs::write(&path, sealed(&text.replace(from, to))).unwrap();
            let (_, records) = open(directory.path()).unwrap();
            assert!(records.is_empty());
            assert_eq!(asides(directory.path()), set_aside);
        }
    }

    #[test]
    fn pids_of_another_namespace_void_it_and_pidfds_do_not() {
        for (pid, over, kept) in [(7, false, false), (7, true, true), (0, false, true)] {
            let directory = written();
            let (mut ledger, _) = open(directory.path()).unwrap();
            assert!(ledger.append(&[Record::Session {
                session: SessionId(3),
                process: crate::core::Process {
                    pid,
                    birth: 1,
                    uid: 0,
                },
                name: "member".to_owned(),
                tenant: "0".to_owned(),
            }]));
            assert!(!over || ledger.append(&[self::over(3)]));
            let path = directory.path().join("ledger");
            let text = fs::read_to_string(&path).unwrap();
            let ours = Header::here().unwrap().pid_namespace;
            let (from, to) = (format!(":{ours}}}"), format!(":{}}}", ours + 1));
            assert!(text.contains(&from));
            fs::write(&path, sealed(&text.replacen(&from, &to, 1))).unwrap();
            let (_, records) = open(directory.path()).unwrap();
            assert_eq!(records.is_empty(), !kept, "pid {pid}");
            assert_eq!(asides(directory.path()), usize::from(!kept));
        }
    }

    #[test]
    fn a_replaced_ledger_takes_appends() {
        let directory = written();
        let (mut ledger, _) = open(directory.path()).unwrap();
        assert!(ledger.rewrite(&[over(9)]) && ledger.append(&[over(10)]));
        let (_, records) = open(directory.path()).unwrap();
        assert_eq!(records, [over(9), over(10)]);
    }

    /// Every way in which one bit of a ledger can flip. `reads` reads a ledger. Returns in how many of them it read
    /// other records than were written.
    fn mistaken(text: &str, reads: impl Fn(&[u8]) -> Result<Vec<Record>, String>) -> usize {
        let written = reads(text.as_bytes()).unwrap();
        assert!(written.len() > 2);
        let flips = (0..text.len()).flat_map(|at| (0..8).map(move |bit| (at, bit)));
        let mistaken = flips.filter(|(at, bit)| {
            let mut damaged = text.as_bytes().to_vec();
            damaged[*at] ^= 1 << bit;
            reads(&damaged).is_ok_and(|records| records != written)
        });
        mistaken.count()
    }

    #[test]
    fn no_flipped_bit_is_taken_for_what_was_written() {
        let directory = written();
        let (mut ledger, _) = open(directory.path()).unwrap();
        assert!(ledger.append(&[over(4_711)]));
        let text = fs::read_to_string(directory.path().join("ledger")).unwrap();
        let here = Header::here().unwrap();
        assert_eq!(mistaken(&text, |bytes| parse(bytes, &here)), 0);
        // The twin: without checksums some are.
        let lines = text.lines().map(|line| line.split('\t').next().unwrap());
        let unsealed = lines.map(|line| format!("{line}\n")).collect::<String>();
        let unsealed = unsealed.replace("\"version\":2", "\"version\":1");
        assert!(mistaken(&unsealed, |bytes| parse(bytes, &here)) > 0);
    }

    #[test]
    fn a_ledger_without_checksums_of_the_broker_before_is_read_and_sealed() {
        let directory = written();
        let path = directory.path().join("ledger");
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().map(|line| line.split('\t').next().unwrap());
        let unsealed = lines.map(|line| format!("{line}\n")).collect::<String>();
        fs::write(&path, unsealed.replace("\"version\":2", "\"version\":1")).unwrap();
        let (_, records) = open(directory.path()).unwrap();
        assert_eq!(records, [over(1), over(2)]);
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }

    #[test]
    fn a_line_that_lacks_only_its_newline_counts() {
        let directory = written();
        let path = directory.path().join("ledger");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.trim_end()).unwrap();
        let (_, records) = open(directory.path()).unwrap();
        assert_eq!(records, [over(1), over(2)]);
    }

    #[test]
    fn a_ledger_that_somebody_took_away_or_changed_is_noticed_and_written_anew() {
        type Deed = fn(&Path);
        let deeds: [Deed; 4] = [
            |path| fs::remove_file(path).unwrap(),
            |path| {
                let copy = path.with_extension("copy");
                fs::copy(path, &copy).unwrap();
                fs::rename(copy, path).unwrap();
            },
            |path| {
                OpenOptions::new()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .set_len(10)
                    .unwrap()
            },
            |path| append(path.parent().unwrap(), "more\n"),
        ];
        for deed in deeds {
            for check in [true, false] {
                let directory = written();
                let (mut ledger, _) = open(directory.path()).unwrap();
                ledger.check();
                assert_eq!(ledger.behind(), None);
                deed(&directory.path().join("ledger"));
                if check {
                    ledger.check();
                } else {
                    assert!(!ledger.append(&[over(3)]), "it was appended to a lost file");
                }
                assert!(ledger.behind().unwrap().contains("somebody"));
                assert!(ledger.rewrite(&[over(1), over(2), over(3)]));
                let (_, records) = open(directory.path()).unwrap();
                assert_eq!(records, [over(1), over(2), over(3)]);
                assert_eq!(asides(directory.path()), 0);
            }
        }
    }

    #[test]
    fn a_deleted_lock_file_lets_nobody_into_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let what = || "the directory".to_owned();
        let take = || Lock::take_directory(directory.path(), what(), "state_dir");
        let held = take().unwrap();
        assert!(matches!(take(), Err(BrokerError::Taken { .. })));
        // The twin: a lock file is another one once it was deleted.
        let file = directory.path().join("lock");
        let _first = Lock::take(file.clone(), what(), "state_dir").unwrap();
        fs::remove_file(&file).unwrap();
        let _second = Lock::take(file, what(), "state_dir").unwrap();
        assert!(matches!(take(), Err(BrokerError::Taken { .. })));
        drop(held);
        take().unwrap();
    }

    #[test]
    fn two_holders_of_one_lock_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let take = || Lock::take(path.clone(), "the thing".to_owned(), "state_dir");
        let first = take().unwrap();
        let refused = take().unwrap_err().to_string();
        assert!(refused.contains("the thing") && refused.contains("state_dir"));
        let copy = first.held.try_clone().unwrap();
        drop(first);
        take().unwrap();
        drop(copy);
    }
}
