//! Files as streams of lines: plain or gzip, with or without a byte order mark.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    path::Path,
};

use flate2::read::MultiGzDecoder;

use super::TraceError;

/// The longest line accepted, bytes: a conversation of a million tokens of text fits.
pub(super) const MAX_LINE_BYTES: u64 = 16 << 20;
/// What gzip begins with.
const GZIP: [u8; 2] = [0x1f, 0x8b];
/// The byte order mark of UTF-8.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// Opens a file, which may be compressed with gzip.
///
/// # Errors
/// When it cannot be opened.
pub(crate) fn open(path: &Path) -> Result<Box<dyn BufRead>, TraceError> {
    let failed = |error: std::io::Error| {
        TraceError::new(&path.display().to_string(), None, error.to_string())
    };
    let mut file = BufReader::new(File::open(path).map_err(failed)?);
    let begins = file.fill_buf().map_err(failed)?;
    Ok(match begins.starts_with(&GZIP) {
        true => Box::new(BufReader::new(MultiGzDecoder::new(file))),
        false => Box::new(file),
    })
}

/// Takes the first line that is not blank, without a byte order mark. Blank lines before it stay, so that lines keep their
/// numbers.
///
/// # Errors
/// When the input fails, or the line is longer than any row.
pub(crate) fn first_line(input: &mut impl BufRead, origin: &str) -> Result<Vec<u8>, TraceError> {
    let mut lines = Vec::new();
    let mut number = 0;
    loop {
        number += 1;
        let begin = lines.len();
        let length = line(input, origin, number, &mut lines)?;
        if number == 1 && lines.starts_with(MARK) {
            lines.drain(..MARK.len());
        }
        let blank = lines[begin.min(lines.len())..]
            .iter()
            .all(u8::is_ascii_whitespace);
        if length == 0 || !blank {
            return Ok(lines);
        }
    }
}

/// Appends one line. Returns its length, 0 at the end.
fn line(
    input: &mut impl BufRead,
    origin: &str,
    number: u64,
    buffer: &mut Vec<u8>,
) -> Result<u64, TraceError> {
    let refuse = |problem: String| TraceError::new(origin, Some(number), problem);
    let mut bounded = Read::take(&mut *input, MAX_LINE_BYTES);
    let length = bounded
        .read_until(b'\n', buffer)
        .map_err(|error| refuse(error.to_string()))? as u64;
    match length == MAX_LINE_BYTES && !buffer.ends_with(b"\n") {
        true => Err(refuse(format!("is longer than {MAX_LINE_BYTES} bytes"))),
        false => Ok(length),
    }
}

/// Lines that are not blank, each with its number from 1.
pub(super) struct Lines<'a, R> {
    input: R,
    origin: &'a str,
    number: u64,
    buffer: Vec<u8>,
}

impl<'a, R: BufRead> Lines<'a, R> {
    pub(super) fn new(input: R, origin: &'a str) -> Self {
        Self {
            input,
            origin,
            number: 0,
            buffer: Vec::new(),
        }
    }

    /// The next line.
    pub(super) fn next(&mut self) -> Result<Option<(u64, &[u8])>, TraceError> {
        loop {
            self.number += 1;
            self.buffer.clear();
            let length = line(&mut self.input, self.origin, self.number, &mut self.buffer)?;
            if length == 0 {
                return Ok(None);
            }
            if !self.buffer.iter().all(u8::is_ascii_whitespace) {
                return Ok(Some((self.number, &self.buffer)));
            }
        }
    }
}
