//! Faults and settings, from the file `faults`. What each line means: see the crate's documentation.

use std::{
    ffi::CStr,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::Code;

/// What a line may be about, apart from entry points and `*`.
const SETTINGS: [&str; 8] = [
    "execute",
    "peer_copies",
    "peers",
    "devices",
    "nodes",
    "hold",
    "trace",
    "capture_mode",
];

/// Where allocations and faults lie.
pub(crate) fn directory() -> Option<PathBuf> {
    std::env::var_os("SWIFTCACHE_STUB_DIR").map(PathBuf::from)
}

/// The file as this process read it last.
#[derive(Default)]
struct Faults {
    /// What tells one state of the file from another; none before the first look, and where there is no file.
    stamp: Option<[i64; 5]>,
    lines: Vec<Line>,
}

static FAULTS: Mutex<Faults> = Mutex::new(Faults {
    stamp: None,
    lines: Vec::new(),
});

/// A line, and how often it has applied to a call of this process.
struct Line {
    text: String,
    process: Option<u32>,
    key: String,
    value: String,
    /// The first and the last call that fails, counted from 1 since this process first saw the line.
    calls: (u64, u64),
    counted: u64,
}

impl Line {
    /// Reads a line; nothing where there is only a remark.
    fn read(text: &str) -> Result<Option<Self>, &'static str> {
        let said = text.split_once('#').map_or(text, |(said, _)| said).trim();
        if said.is_empty() {
            return Ok(None);
        }
        let (key, value) = said.split_once('=').ok_or("it has no =")?;
        let (process, key) = match key.split_once('/') {
            Some((process, key)) => {
                let process = process.trim().parse();
                (
                    Some(process.map_err(|_| "no process has that number")?),
                    key,
                )
            }
            None => (None, key),
        };
        let key = key.trim();
        if key != "*" && !key.starts_with("cu") && !SETTINGS.contains(&key) {
            return Err("it is about nothing that the stub driver knows");
        }
        let (value, calls) = match value.split_once('@') {
            Some((value, calls)) => (value, range(calls.trim()).ok_or("@ takes N, N-M or N-")?),
            None => (value, (1, u64::MAX)),
        };
        Ok(Some(Self {
            text: text.to_owned(),
            process,
            key: key.to_owned(),
            value: value.trim().to_owned(),
            calls,
            counted: 0,
        }))
    }

    fn is_ours(&self) -> bool {
        self.process
            .is_none_or(|process| process == std::process::id())
    }
}

/// `3`, `3-5` or `3-`.
fn range(text: &str) -> Option<(u64, u64)> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let first = first.parse().ok()?;
    let last = match last {
        "" => u64::MAX,
        last => last.parse().ok()?,
    };
    Some((first, last))
}

impl Faults {
    /// Reads the file again if it has changed. A line that was there before goes on counting.
    fn refresh(&mut self) {
        let Some(path) = directory().map(|directory| directory.join("faults")) else {
            return;
        };
        let data = std::fs::metadata(&path).ok();
        let stamp = data.map(|data| {
            let time = [data.mtime(), data.mtime_nsec(), data.ctime_nsec()];
            let [modified, nanoseconds, changed] = time;
            let (inode, size) = (data.ino() as i64, data.size() as i64);
            [modified, nanoseconds, changed, inode, size]
        });
        if stamp == self.stamp {
            return;
        }
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        let mut before = std::mem::take(&mut self.lines);
        for text in text.lines() {
            let line = Line::read(text)
                .unwrap_or_else(|problem| panic!("stub driver: fault {text:?}: {problem}"));
            let Some(mut line) = line else { continue };
            if let Some(known) = before.iter().position(|known| known.text == line.text) {
                line.counted = before.swap_remove(known).counted;
            }
            self.lines.push(line);
        }
        self.stamp = stamp;
    }
}

fn faults() -> MutexGuard<'static, Faults> {
    let mut faults = FAULTS.lock().unwrap_or_else(PoisonError::into_inner);
    faults.refresh();
    faults
}

/// The value of a setting.
pub(crate) fn setting(name: &str) -> Option<String> {
    let faults = faults();
    let mut lines = faults.lines.iter();
    let found = lines.find(|line| line.key == name && line.is_ours())?;
    Some(found.value.clone())
}

/// The code that this call of `symbol` is to return, or that this piece of a stream's work is to be refused
/// (`peer_copies`) or to fail (`execute`) with. Every line about it counts the call; the first one whose calls these are decides.
pub(crate) fn injected(symbol: &str) -> Option<Code> {
    let mut decided = None;
    let mut faults = faults();
    for line in faults.lines.iter_mut().filter(|line| line.is_ours()) {
        let any = line.key == "*" && symbol.starts_with("cu");
        if line.key != symbol && !any {
            continue;
        }
        line.counted += 1;
        let (first, last) = line.calls;
        if decided.is_none() && (first..=last).contains(&line.counted) {
            decided = line.value.parse().ok();
        }
    }
    decided
}

/// Names of codes, and words for them.
pub(crate) fn describe(code: Code) -> Option<(&'static CStr, &'static CStr)> {
    Some(match code {
        0 => (c"CUDA_SUCCESS", c"no error"),
        1 => (c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
        2 => (c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        3 => (c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
        100 => (
            c"CUDA_ERROR_NO_DEVICE",
            c"no CUDA-capable device is detected",
        ),
        101 => (c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
        201 => (c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
        214 => (
            c"CUDA_ERROR_ECC_UNCORRECTABLE",
            c"uncorrectable ECC error encountered",
        ),
        217 => (
            c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
            c"peer access is not supported between these two devices",
        ),
        400 => (c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
        500 => (c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
        600 => (c"CUDA_ERROR_NOT_READY", c"device not ready"),
        700 => (
            c"CUDA_ERROR_ILLEGAL_ADDRESS",
            c"an illegal memory access was encountered",
        ),
        719 => (c"CUDA_ERROR_LAUNCH_FAILED", c"unspecified launch failure"),
        900 => (
            c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
            c"operation not permitted when stream is capturing",
        ),
        901 => (
            c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
            c"operation failed due to a previous error during capture",
        ),
        905 => (
            c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
            c"dependency created on uncaptured work in another stream",
        ),
        906 => (
            c"CUDA_ERROR_STREAM_CAPTURE_IMPLICIT",
            c"operation would make the legacy stream depend on a capturing blocking stream",
        ),
        907 => (
            c"CUDA_ERROR_CAPTURED_EVENT",
            c"operation not permitted on an event last recorded in a capturing stream",
        ),
        801 => (c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
        _ => return None,
    })
}
