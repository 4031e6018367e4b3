//! Shows something again and again until the user stops it.

use std::{
    io::IsTerminal,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use super::{CliError, output};

/// Prints the result of `text` once in every period `every`, until interrupted. On a terminal it replaces the last one.
pub(super) fn repeat(
    every: Duration,
    mut text: impl FnMut() -> Result<String, CliError>,
) -> Result<(), CliError> {
    let interrupt = super::interrupt()?;
    let terminal = std::io::stdout().is_terminal();
    loop {
        let shown = match text() {
            // The broker may come back, so go on watching.
            Err(error @ CliError::NoBroker { .. }) => format!("{error}\n"),
            other => other?,
        };
        let read = match terminal {
            true => output::print_anew(&shown)?,
            false => output::print(&shown)?,
        };
        if !read {
            return Ok(());
        }
        let shown_at = Instant::now();
        while shown_at.elapsed() < every {
            if interrupt.load(Ordering::Relaxed) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(20).min(every));
        }
    }
}
