//! The only module that prints. What others wrote is shown as it is: a name or a message can neither move the cursor nor turn
//! the text around it.

use std::{
    borrow::Cow,
    io::{self, Write},
};

use swiftcache_proto::convert::reorders;

/// Writes `text` to standard output. Returns false when the reader has closed it, for example `| head`, which is not an
/// error.
pub(super) fn print(text: &str) -> Result<bool, super::CliError> {
    write(&visible(text))
}

/// The same in place of what the terminal shows.
pub(super) fn print_anew(text: &str) -> Result<bool, super::CliError> {
    write(&format!("{CLEAR}{}", visible(text)))
}

/// Clears the screen and moves the cursor to the top left corner.
const CLEAR: &str = "\x1b[2J\x1b[H";

fn write(text: &str) -> Result<bool, super::CliError> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(super::CliError::Failed(format!(
            "cannot write to standard output: {error}"
        ))),
    }
}

/// A text as it may be shown on a terminal.
pub(super) fn shown(text: &str) -> Cow<'_, str> {
    visible(text)
}

/// Whether somebody looks at standard error on a terminal.
pub(super) fn is_terminal() -> bool {
    io::IsTerminal::is_terminal(&io::stderr())
}

/// Writes a value as indented JSON.
pub(super) fn print_json(value: &impl serde::Serialize) -> Result<(), super::CliError> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| super::CliError::Failed(format!("cannot write JSON: {error}")))?;
    write(&format!("{}\n", visible_json(&text))).map(|_| ())
}

/// Writes a line to standard error. An error does not matter: nobody may be reading.
pub(super) fn complain(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", visible(line));
}

/// Whether a terminal shows something else for a character, or does something else.
pub(super) fn deceives(character: char) -> bool {
    let plain = matches!(character, '\n' | '\t');
    !plain && (character.is_control() || reorders(character))
}

/// The text with such characters as `\u{1b}`.
fn visible(text: &str) -> Cow<'_, str> {
    escaped(text, |character| character.escape_unicode().to_string())
}

/// The same for JSON, in which they stand in strings only. All are of 16 bits.
fn visible_json(text: &str) -> Cow<'_, str> {
    escaped(text, |character| format!("\\u{:04x}", u32::from(character)))
}

fn escaped(text: &str, escape: impl Fn(char) -> String) -> Cow<'_, str> {
    if !text.chars().any(deceives) {
        return text.into();
    }
    let escaped = text.chars().map(|character| match deceives(character) {
        true => escape(character),
        false => character.to_string(),
    });
    escaped.collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What terminals obey: an escape sequence, a backspace, C1 codes, and marks that turn text.
    const DECEIVING: &str = "\u{1b}[2Ja\u{8}\r\u{9b}31m\u{202e}b\u{2066}\u{200f}\u{7f}";

    #[test]
    fn names_cannot_command_a_terminal() {
        let shown = visible(DECEIVING);
        assert!(!shown.chars().any(deceives), "{shown:?}");
        assert_eq!(
            shown,
            "\\u{1b}[2Ja\\u{8}\\u{d}\\u{9b}31m\\u{202e}b\\u{2066}\\u{200f}\\u{7f}"
        );
        let json = serde_json::to_string(DECEIVING).unwrap();
        // The twin: JSON alone escapes some of them only.
        assert!(json.chars().any(deceives));
        let shown = visible_json(&json);
        assert!(!shown.chars().any(deceives), "{shown:?}");
        let read: String = serde_json::from_str(&shown).unwrap();
        assert_eq!(read, DECEIVING, "it means the same");
    }

    #[test]
    fn plain_text_is_left_alone() {
        for plain in ["", "a table\n\twith a tab", "Grüße, 漢字, שלום"] {
            assert!(matches!(visible(plain), Cow::Borrowed(text) if text == plain));
        }
    }
}
