//! The only module that prints.

use std::io::{self, Write};

/// Writes `text` to standard output. Returns false when the reader has closed it, for example `| head`, which is not an
/// error.
pub(super) fn print(text: &str) -> Result<bool, super::CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(super::CliError::Failed(format!(
            "cannot write to standard output: {error}"
        ))),
    }
}

/// Writes a value as indented JSON.
pub(super) fn print_json(value: &impl serde::Serialize) -> Result<(), super::CliError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| super::CliError::Failed(format!("cannot write JSON: {error}")))?;
    print(&format!("{text}\n")).map(|_| ())
}

/// Writes a line to standard error. An error does not matter: nobody may be reading.
pub(super) fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{line}");
}
