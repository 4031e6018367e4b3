//! The file `trace`: calls of every process, as they end.

use std::{
    fs::File,
    io::Write,
    sync::{Mutex, PoisonError},
};

use rustix::thread::gettid;

use crate::{Code, faults};

static FILE: Mutex<Option<File>> = Mutex::new(None);

/// What stands where the result will be, of a call that blocks.
const BEGAN: &str = "began";

/// Whether calls of `symbol` are written down.
fn wanted(symbol: &str) -> bool {
    let symbols = faults::setting("trace");
    symbols.is_some_and(|symbols| {
        let mut symbols = symbols.split(',').map(str::trim);
        symbols.any(|wanted| wanted == "*" || wanted == symbol)
    })
}

/// A call that may block has begun.
pub(crate) fn began(symbol: &str) {
    if wanted(symbol) {
        write(symbol, BEGAN);
    }
}

/// A call has ended.
pub(crate) fn ended(symbol: &str, code: Code) {
    if wanted(symbol) {
        write(symbol, &code.to_string());
    }
}

fn write(symbol: &str, result: &str) {
    let (process, thread, name) = (std::process::id(), gettid().as_raw_pid(), name());
    let line = format!("{symbol} {process} {thread} {result} {name}\n");
    let mut file = FILE.lock().unwrap_or_else(PoisonError::into_inner);
    if file.is_none() {
        let path = faults::directory().map(|directory| directory.join("trace"));
        let open = |path| File::options().create(true).append(true).open(path);
        *file = path.and_then(|path| open(path).ok());
    }
    // One write at the file's end, so that no line is torn by another process's.
    let written = (file.as_mut()).is_some_and(|file| file.write_all(line.as_bytes()).is_ok());
    assert!(written, "stub driver: the trace cannot be written");
}

/// The calling thread's name, as the kernel knows it: 15 bytes of it.
fn name() -> String {
    let name = rustix::thread::name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
