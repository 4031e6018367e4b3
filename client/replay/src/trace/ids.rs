//! Hashes of blocks: from the ids that traces name them by, and from text.

use serde_json::Value;
use swiftcache_proto::domain::BlockHash;

use super::row::short;
use crate::pattern::mix;

/// The most digits of an id.
const MAX_DIGITS: usize = 128;

/// The 16-byte hash that stands for an id of the trace.
pub(super) fn of_number(id: u64) -> BlockHash {
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&mix(id ^ 0x5357_4946_5443_4143).to_le_bytes());
    hash[8..].copy_from_slice(&id.to_be_bytes());
    BlockHash(hash)
}

/// A block that follows others.
pub(super) fn chain(before: BlockHash, bytes: &[u8]) -> BlockHash {
    let mut halves = [0_u64; 2];
    for (half, word) in halves.iter_mut().zip(before.0.chunks(8)) {
        *half = word
            .iter()
            .fold(0, |sum, byte| (sum << 8) | u64::from(*byte));
    }
    for chunk in bytes.chunks(8) {
        let word = chunk
            .iter()
            .fold(0, |sum, byte| (sum << 8) | u64::from(*byte));
        halves[0] = mix(halves[0] ^ word);
        halves[1] = mix(halves[1].wrapping_add(word).rotate_left(23));
    }
    halves[0] = mix(halves[0] ^ bytes.len() as u64);
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&halves[0].to_be_bytes());
    hash[8..].copy_from_slice(&halves[1].to_be_bytes());
    BlockHash(hash)
}

/// A block that no other prompt has.
pub(super) fn unique(request: u64, block: u64) -> BlockHash {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&request.to_be_bytes());
    bytes[8..].copy_from_slice(&block.to_be_bytes());
    chain(BlockHash([0xA5; 16]), &bytes)
}

/// The blocks that a list of ids names. An id is a whole number from 0 of any size, or a text of hexadecimal digits. `line` is
/// the text that the list is from.
pub(super) fn blocks(ids: &[Value], name: &str, line: &[u8]) -> Result<Vec<BlockHash>, String> {
    let refuse = |index: usize, value: &Value| {
        format!(
            "{name}[{index}]: is {}; takes an integer from 0, or hexadecimal digits",
            short(value)
        )
    };
    // Numbers beyond 64 bits have lost their last digits by now.
    let large = ids.iter().any(|id| id.is_number() && id.as_u64().is_none());
    if large {
        let exact = exact(line).filter(|exact| exact.len() == ids.len());
        let exact = exact.unwrap_or_default();
        let blocks = ids.iter().enumerate().map(|(index, value)| {
            let digits = exact.get(index).copied().unwrap_or_default();
            let whole = !digits.is_empty() && digits.len() <= MAX_DIGITS;
            match value.as_u64() {
                Some(id) => Ok(of_number(id)),
                None if whole && digits.iter().all(u8::is_ascii_digit) => {
                    Ok(chain(BlockHash([0x5A; 16]), digits))
                }
                None => of_text(value).ok_or_else(|| refuse(index, value)),
            }
        });
        return blocks.collect();
    }
    let blocks = ids.iter().enumerate().map(|(index, value)| {
        let number = value.as_u64().map(of_number);
        number
            .or_else(|| of_text(value))
            .ok_or_else(|| refuse(index, value))
    });
    blocks.collect()
}

fn of_text(value: &Value) -> Option<BlockHash> {
    let text = value.as_str()?;
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let fits = (1..=MAX_DIGITS).contains(&digits.len());
    (fits && digits.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| {
        let lower = digits.to_ascii_lowercase();
        chain(BlockHash([0x33; 16]), lower.as_bytes())
    })
}

/// The entries of the list `hash_ids` of a JSON row, as they are written.
fn exact(line: &[u8]) -> Option<Vec<&[u8]>> {
    const NAME: &[u8] = b"\"hash_ids\"";
    let mut at = None;
    for begin in 0..line.len().saturating_sub(NAME.len()) {
        let escaped = begin > 0 && line[begin - 1] == b'\\';
        if !escaped && line[begin..].starts_with(NAME) {
            at = Some(begin + NAME.len());
        }
    }
    let rest = &line[at?..];
    let open = rest.iter().position(|byte| *byte == b'[')?;
    let close = rest.iter().position(|byte| *byte == b']')?;
    let list = rest.get(open + 1..close)?;
    let entries = list.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
    Some(entries.collect())
}
