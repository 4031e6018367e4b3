//! Traces that name the blocks of their prompts: Mooncake's, and Qwen-Bailian's.

use std::io::BufRead;

use super::{
    Format, Gathered, Options, Request, Stamps, TraceError, ids,
    input::Lines,
    row::{Row, parse},
};

/// Block sizes that are worth a hint.
const USUAL: [u64; 7] = [16, 32, 64, 128, 256, 512, 1024];

pub(super) fn read(
    input: impl BufRead,
    origin: &str,
    format: Format,
    options: &Options,
) -> Result<Gathered, TraceError> {
    let stamps = match format {
        Format::Bailian => Stamps::Seconds,
        _ => Stamps::Milliseconds,
    };
    let mut gathered = Gathered::new(format, stamps, options);
    let mut lines = Lines::new(input, origin);
    let mut empty = 0_u64;
    while let Some((number, line)) = lines.next()? {
        if gathered.is_full() {
            break;
        }
        let request = request(line, format, &gathered);
        let added = request.and_then(|request| match request {
            Some(request) => gathered.add(request),
            None => {
                empty += 1;
                Ok(())
            }
        });
        added.map_err(|problem| TraceError::new(origin, Some(number), problem))?;
    }
    if empty > 0 {
        let note = format!("{empty} rows without a prompt are left out");
        gathered.notes.push(note);
    }
    Ok(gathered)
}

fn request(line: &[u8], format: Format, gathered: &Gathered) -> Result<Option<Request>, String> {
    let value = parse(line)?;
    let row = Row::of(&value, "")?;
    let stamp = row.number("timestamp", gathered.stamps.takes())?;
    if format == Format::Bailian {
        // Its blocks say which prefix a turn shares with its parent; the turn itself must still be one.
        for name in ["chat_id", "turn"] {
            row.number(name, "a number from 0")?;
        }
        let parent = row.field("parent_chat_id")?;
        if parent.as_i64().is_none_or(|id| id < -1) {
            return Err(format!(
                "parent_chat_id: is {}; takes a chat_id, or -1",
                super::row::short(parent)
            ));
        }
    }
    // Bailian's trace has requests that failed before their first token.
    let least = match format {
        Format::Bailian => 0,
        _ => 1,
    };
    let input_tokens = row.tokens("input_length", least)?;
    let output_tokens = row.tokens("output_length", 0)?;
    let list = row.list("hash_ids")?;
    if input_tokens == 0 {
        return Ok(None);
    }
    let size = gathered.block_tokens;
    if !fits(list.len(), input_tokens, size) {
        let hint = USUAL
            .iter()
            .find(|usual| fits(list.len(), input_tokens, **usual));
        let hint = hint.map_or(String::new(), |usual| {
            format!("; --block-tokens {usual} would fit this row")
        });
        return Err(format!(
            "hash_ids: has {} ids; input_length {input_tokens} takes {} or {} of {size} tokens each{hint}",
            list.len(),
            input_tokens / size,
            input_tokens.div_ceil(size),
        ));
    }
    Ok(Some(Request {
        arrival_s: gathered.stamps.seconds(stamp),
        input_tokens,
        output_tokens,
        blocks: ids::blocks(list, "hash_ids", line)?,
    }))
}

/// Whether so many ids name a prompt's blocks, with or without one for a partial last block.
pub(super) fn fits(ids: usize, tokens: u64, block_tokens: u64) -> bool {
    let ids = ids as u64;
    ids == tokens.div_ceil(block_tokens) || ids == tokens / block_tokens
}
