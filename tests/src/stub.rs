//! The stub driver of a test's processes: it injects faults, holds copies, and records calls. The crate
//! `swiftcache_stub_driver` describes the lines of its files.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU64, Ordering},
    time::SystemTime,
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::device::cuda::LIBRARY_VARIABLE;

use crate::engine::eventually;

/// The environment variable with the stub driver's directory.
const DIRECTORY_VARIABLE: &str = "SWIFTCACHE_STUB_DIR";

/// The stub driver's two devices and the link between them, as a topology file.
pub const TOPOLOGY: &str = r#"
name = "two stub GPUs"

[[device]]
uuid = "GPU-5a5a7374-7562-2d64-7269-7665722d3000"
name = "stub GPU"
hbm_gib = 1.0

[[device]]
uuid = "GPU-5a5a7374-7562-2d64-7269-7665722d3001"
name = "stub GPU"
hbm_gib = 1.0

[all_pairs]
kind = "nvlink"
gigabytes_per_second = 380.0
"#;

/// A directory of the stub driver. All processes that share it are on one simulated machine.
#[derive(Debug)]
pub struct Stub {
    directory: PathBuf,
    /// Removes the directory when dropped. None in a process that was given the directory.
    _own: Option<tempfile::TempDir>,
}

/// Which work of streams is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// Gather launches. Plain copies and fills go on.
    Kernels,
    /// Gather launches and copies. Fills, which zero new memory, go on.
    Copies,
    /// All work.
    All,
}

/// A line in the file of faults. It stays there until [`Stub::lift`] removes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Injected(String);

/// A call that a process has made, or is making.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The entry point.
    pub symbol: String,
    /// The process.
    pub process: u32,
    /// The thread's number.
    pub thread: u32,
    /// The code that it returned. None: it has begun, and only calls that wait record this.
    pub result: Option<u32>,
    /// The thread's name, cut to the 15 bytes that the kernel keeps.
    pub thread_name: String,
}

/// The number of the next line, which distinguishes lines that would be equal otherwise.
static LINES: AtomicU64 = AtomicU64::new(1);

impl Stub {
    /// A new simulated machine.
    ///
    /// # Errors
    /// When the directory cannot be created.
    pub fn new() -> Result<Self> {
        let own = tempfile::tempdir().context("a directory for the stub driver")?;
        Ok(Self {
            directory: own.path().to_owned(),
            _own: Some(own),
        })
    }

    /// The machine that this process is on, if the environment names one.
    pub fn of_environment() -> Option<Self> {
        let directory = env::var_os(DIRECTORY_VARIABLE)?.into();
        Some(Self {
            directory,
            _own: None,
        })
    }

    /// The directory with allocations and faults.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The environment variables of a process on this machine.
    ///
    /// # Errors
    /// When the stub driver is not built beside this test. It is built for every package that depends on it.
    pub fn environment(&self) -> Result<BTreeMap<String, OsString>> {
        let library = "libswiftcache_stub_driver.so";
        let test = env::current_exe().context("where is this test?")?;
        let mut folders = test.ancestors().skip(1).take(2);
        let library = folders.find_map(|folder| {
            let candidates = [folder.join(library), folder.join("deps").join(library)];
            candidates.into_iter().find(|candidate| candidate.is_file())
        });
        let library = library.context("the stub driver is not built")?;
        Ok(BTreeMap::from([
            (LIBRARY_VARIABLE.to_owned(), library.into()),
            (
                DIRECTORY_VARIABLE.to_owned(),
                self.directory.clone().into_os_string(),
            ),
        ]))
    }

    /// Writes the devices to a topology file in the directory, for a broker.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn topology_file(&self) -> Result<PathBuf> {
        let file = self.directory.join("topology.toml");
        fs::write(&file, TOPOLOGY)?;
        Ok(file)
    }

    /// Adds a line to the faults. Its count of calls begins now, even if the same line was there before. `process`
    /// limits it to one process.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn inject(&self, process: Option<u32>, line: &str) -> Result<Injected> {
        let process = process.map_or_else(String::new, |process| format!("{process}/"));
        let number = LINES.fetch_add(1, Ordering::Relaxed);
        let fault = format!("{process}{line} # {}.{number}", std::process::id());
        self.change(|lines| lines.push(fault.clone()))?;
        Ok(Injected(fault))
    }

    /// Removes a line.
    ///
    /// # Errors
    /// When it is not there.
    pub fn lift(&self, fault: &Injected) -> Result<()> {
        let mut lifted = false;
        self.change(|lines| {
            let before = lines.len();
            lines.retain(|line| *line != fault.0);
            lifted = lines.len() < before;
        })?;
        ensure!(lifted, "{} is not in force", fault.0);
        Ok(())
    }

    /// Holds the streams of a process, or of all processes. Work that they have not begun when the process next reads
    /// the faults stays queued until the hold is lifted.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn hold(&self, process: Option<u32>, held: Held) -> Result<Injected> {
        let kind = match held {
            Held::Kernels => "kernels",
            Held::Copies => "copies",
            Held::All => "all",
        };
        self.inject(process, &format!("hold={kind}"))
    }

    /// Records the calls of these entry points from now on.
    ///
    /// # Errors
    /// When the directory is gone.
    pub fn trace(&self, symbols: &[&str]) -> Result<Injected> {
        self.inject(None, &format!("trace={}", symbols.join(",")))
    }

    /// The recorded calls, in the order in which they ended.
    ///
    /// # Errors
    /// When a line is not one of the stub driver.
    pub fn calls(&self) -> Result<Vec<Call>> {
        let text = match fs::read_to_string(self.directory.join("trace")) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).context("the stub driver's trace"),
        };
        // A process may be writing the last line just now.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(Call::read).collect()
    }

    /// Waits until `holds` is true for the recorded calls, and returns them.
    ///
    /// # Errors
    /// When it does not become true.
    pub fn wait_for(&self, what: &str, holds: impl Fn(&[Call]) -> bool) -> Result<Vec<Call>> {
        let mut calls = Vec::new();
        eventually(what, || {
            calls = self.calls()?;
            Ok(holds(&calls))
        })?;
        Ok(calls)
    }

    /// Replaces the file of faults in one step. Each version has another modification time, by which processes notice a
    /// change.
    fn change(&self, change: impl FnOnce(&mut Vec<String>)) -> Result<()> {
        let lock = File::create(self.directory.join("faults.lock"))?;
        lock.lock()?;
        let (file, fresh) = (
            self.directory.join("faults"),
            self.directory.join("faults.new"),
        );
        let text = fs::read_to_string(&file).unwrap_or_default();
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        change(&mut lines);
        let mut written = File::create(&fresh)?;
        for line in lines {
            writeln!(written, "{line}")?;
        }
        written.set_modified(SystemTime::now())?;
        Ok(fs::rename(fresh, file)?)
    }
}

/// Runs a test's body in a separate process on a new stub machine, because a process has only one driver, which its
/// environment names. `test` is the full name of the test. The process runs this test again.
///
/// # Errors
/// When the body fails.
pub fn alone(test: &str, body: impl FnOnce(&Stub) -> Result<()>) -> Result<()> {
    if let Some(stub) = Stub::of_environment() {
        return body(&stub);
    }
    let stub = Stub::new()?;
    let output = Command::new(env::current_exe().context("where is this test?")?)
        .args([test, "--exact", "--nocapture"])
        .envs(stub.environment()?)
        .output()?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    ensure!(output.status.success(), "{said}");
    ensure!(said.contains("1 passed"), "there is no test {test}: {said}");
    Ok(())
}

impl Call {
    fn read(line: &str) -> Result<Self> {
        let mut words = line.splitn(5, ' ');
        let mut word = || words.next().with_context(|| format!("no call: {line:?}"));
        Ok(Self {
            symbol: word()?.to_owned(),
            process: word()?.parse()?,
            thread: word()?.parse()?,
            result: match word()? {
                "began" => None,
                code => Some(code.parse()?),
            },
            thread_name: word()?.to_owned(),
        })
    }

    /// Whether this is a call of this entry point by this process, ended or not.
    pub fn is(&self, process: u32, symbol: &str) -> bool {
        self.process == process && self.symbol == symbol
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_added_and_lifted_one_by_one() {
        let stub = Stub::new().unwrap();
        let file = || fs::read_to_string(stub.directory().join("faults")).unwrap();
        fs::write(stub.directory().join("faults"), "devices=1\n").unwrap();
        let first = stub.inject(None, "cuLaunchKernel=719@1").unwrap();
        let again = stub.inject(None, "cuLaunchKernel=719@1").unwrap();
        let held = stub.hold(Some(7), Held::Copies).unwrap();
        assert_ne!(first, again, "the same fault is armed anew");
        assert!(file().contains("\n7/hold=copies # "));
        stub.lift(&first).unwrap();
        stub.lift(&held).unwrap();
        assert_eq!(file(), format!("devices=1\n{}\n", again.0));
    }

    #[test]
    fn a_trace_is_read_whole() {
        let stub = Stub::new().unwrap();
        assert_eq!(stub.calls().unwrap(), []);
        let text = "cuEventSynchronize 7 8 began a drain\ncuEventSynchronize 7 8 0 a drain\n";
        fs::write(stub.directory().join("trace"), text).unwrap();
        let calls = stub.calls().unwrap();
        assert_eq!(
            calls.iter().map(|call| call.result).collect::<Vec<_>>(),
            [None, Some(0)]
        );
        assert!(calls[0].is(7, "cuEventSynchronize") && calls[0].thread_name == "a drain");
    }
}
