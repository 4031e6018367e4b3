//! Describes the machine that the figures are from.

use std::fs;

/// One line with processor, cores, memory, kernel and SwiftCache's version.
pub(crate) fn describe() -> String {
    let field = |path: &str, key: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_once(':')).map_or_else(
            || "unknown".to_owned(),
            |(_, value)| value.trim().to_owned(),
        )
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "Machine: {}, {cores} cores, {} of memory, Linux {}; SwiftCache {}; no GPU.",
        field("/proc/cpuinfo", "model name"),
        field("/proc/meminfo", "MemTotal"),
        kernel.trim(),
        env!("CARGO_PKG_VERSION"),
    )
}
