//! Shows something again and again until the user stops it.

use std::{io::IsTerminal, thread, time::Duration};

use super::{CliError, output};

/// Reads the time between two looks.
pub(super) fn every(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if !time.is_zero() => Ok(time),
        _ => Err(format!(
            "{text:?} is no time between two looks; takes more than 0, for example 500ms"
        )),
    }
}

/// Prints the result of `text` once in every period `every`, until a signal ends the process. On a terminal it replaces the last one.
pub(super) fn repeat(
    every: Duration,
    mut text: impl FnMut() -> Result<String, CliError>,
) -> Result<(), CliError> {
    // There is nothing to put in order, also while the broker does not answer.
    super::end_on_signal()?;
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
        thread::sleep(every);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_time_between_two_looks() {
        assert_eq!(every("500ms"), Ok(Duration::from_millis(500)));
        for none in ["0", "0s", "", "soon", "-1s"] {
            assert!(
                every(none).unwrap_err().contains("takes more than 0"),
                "{none}"
            );
        }
    }
}
