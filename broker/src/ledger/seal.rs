//! A checksum on every line of the ledger, so that a damaged line is never taken for what was written.
//!
//! A sealed line is JSON, a tab, and the CRC-32 of the JSON in eight hexadecimal digits. JSON escapes tabs, so the tab is
//! the only one. The checksum is the usual one of Ethernet and zlib, whose dozen lines are not worth a dependency.

use std::io::{self, Write};

/// Characters of a checksum.
const DIGITS: usize = 8;

/// Ends the line that begins at `start` with its checksum and a newline.
pub(super) fn seal(lines: &mut Vec<u8>, start: usize) -> io::Result<()> {
    let sum = crc32(&lines[start..]);
    writeln!(lines, "\t{sum:08x}")
}

/// What a sealed line, without its newline, holds.
///
/// # Errors
/// When it has no checksum, or another one. The error says so for people.
pub(super) fn open(line: &[u8]) -> Result<&[u8], String> {
    let at = line.iter().position(|byte| *byte == b'\t');
    let (text, sum) = line.split_at(at.ok_or("it has no checksum")?);
    match sum == format!("\t{:08x}", crc32(text)).as_bytes() {
        true => Ok(text),
        false => Err("it is damaged: its checksum is another".to_owned()),
    }
}

/// Whether a line without a newline is too short to be whole: writing it broke off.
pub(super) fn is_torn(line: &[u8]) -> bool {
    let at = line.iter().position(|byte| *byte == b'\t');
    at.is_none_or(|at| line.len() < at + 1 + DIGITS)
}

const TABLE: [u32; 256] = table();

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        let mut sum = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 == 1 {
                (sum >> 1) ^ 0xEDB8_8320
            } else {
                sum >> 1
            };
            bit += 1;
        }
        table[byte] = sum;
        byte += 1;
    }
    table
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        TABLE[((sum ^ u32::from(*byte)) & 0xFF) as usize] ^ (sum >> 8)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_the_known_one() {
        assert_eq!(crc32(b"123456789"), 0xCBF4_3926);
        assert_eq!(crc32(b""), 0);
    }

    #[test]
    fn what_was_sealed_is_opened_and_nothing_else() {
        let mut lines = b"before\n".to_vec();
        let start = lines.len();
        lines.extend_from_slice(b"{\"a\":1}");
        seal(&mut lines, start).unwrap();
        let line = &lines[start..lines.len() - 1];
        assert_eq!(open(line), Ok(&b"{\"a\":1}"[..]));
        assert!(!is_torn(line));
        for short in 0..line.len() {
            assert!(open(&line[..short]).is_err() && is_torn(&line[..short]));
        }
    }
}
