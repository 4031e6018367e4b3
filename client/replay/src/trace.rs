//! The busy model's requests, in the Mooncake trace format: one JSON object per line.
//!
//! A request has `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`. `hash_ids` has one id per
//! 512-token block of the prompt. Equal ids mean equal prefixes up to the end of that block. The last block may be
//! partial; every id counts as a block.

use std::{
    collections::HashSet,
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use serde_json::Value;
use swiftcache_proto::{convert::MAX_BLOCKS, domain::BlockHash};

use super::pattern::mix;

/// Tokens in one block of the format.
pub const BLOCK_TOKENS: u64 = 512;
/// The longest prompt or answer accepted, tokens. It is far beyond any model, and small enough that sums of it cannot
/// overflow.
const MAX_TOKENS: u64 = 1 << 32;
/// The latest arrival accepted, milliseconds: about a year.
pub(crate) const MAX_TIMESTAMP_MS: f64 = 3.2e10;
/// The longest line accepted, bytes. 65,536 ids of 20 digits fit.
const MAX_LINE_BYTES: u64 = 2 << 20;

/// One request of the trace.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Arrival time, seconds since the start of the trace.
    pub arrival_s: f64,
    /// Length of the prompt, tokens: at least 1.
    pub input_tokens: u64,
    /// Length of the answer, tokens.
    pub output_tokens: u64,
    /// The prompt's blocks in order.
    pub blocks: Vec<BlockHash>,
}

/// Why a trace cannot be read: the place, the field, and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{origin}{}: {problem}", line.map_or(String::new(), |line| format!(", line {line}")))]
pub struct TraceError {
    /// The file.
    pub origin: String,
    /// The line, counted from 1. None: the error is about the file as a whole.
    pub line: Option<u64>,
    /// The field, and what is wrong with it.
    pub problem: String,
}

impl TraceError {
    pub(crate) fn new(origin: &str, line: Option<u64>, problem: impl Into<String>) -> Self {
        Self {
            origin: origin.to_owned(),
            line,
            problem: problem.into(),
        }
    }
}

/// Reads requests one line at a time. It skips blank lines, and ends after the first error.
pub struct TraceReader<R> {
    input: R,
    origin: String,
    line: u64,
    buffer: Vec<u8>,
    over: bool,
}

impl TraceReader<BufReader<File>> {
    /// Opens a trace file.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, TraceError> {
        let origin = path.display().to_string();
        match File::open(path) {
            Ok(file) => Ok(Self::new(BufReader::new(file), origin)),
            Err(error) => Err(TraceError::new(&origin, None, error.to_string())),
        }
    }
}

impl<R: BufRead> TraceReader<R> {
    /// Reads from `input`; `origin` names it in errors.
    pub fn new(input: R, origin: impl Into<String>) -> Self {
        Self {
            input,
            origin: origin.into(),
            line: 0,
            buffer: Vec::new(),
            over: false,
        }
    }

    fn fail(&mut self, problem: impl Into<String>) -> TraceError {
        self.over = true;
        TraceError::new(&self.origin, Some(self.line), problem)
    }
}

impl<R: BufRead> Iterator for TraceReader<R> {
    type Item = Result<Request, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.over {
            self.line += 1;
            self.buffer.clear();
            let mut bounded = std::io::Read::take(&mut self.input, MAX_LINE_BYTES);
            match bounded.read_until(b'\n', &mut self.buffer) {
                Err(error) => return Some(Err(self.fail(error.to_string()))),
                Ok(0) => self.over = true,
                Ok(length) if length as u64 == MAX_LINE_BYTES && !self.buffer.ends_with(b"\n") => {
                    let problem = format!("is longer than {MAX_LINE_BYTES} bytes");
                    return Some(Err(self.fail(problem)));
                }
                Ok(_) if self.buffer.iter().all(u8::is_ascii_whitespace) => {}
                Ok(_) => {
                    let request = parse(&self.buffer);
                    return Some(request.map_err(|problem| self.fail(problem)));
                }
            }
        }
        None
    }
}

/// Reads a whole trace, in order of arrival.
///
/// # Errors
/// Fails on the first line that is not a request, and on a trace without requests.
pub fn load(path: &Path) -> Result<Vec<Request>, TraceError> {
    let mut requests = TraceReader::open(path)?.collect::<Result<Vec<_>, _>>()?;
    if requests.is_empty() {
        let origin = path.display().to_string();
        return Err(TraceError::new(&origin, None, "holds no request"));
    }
    requests.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
    Ok(requests)
}

/// How many blocks of the trace an unbounded cache would find, and how many blocks the trace has.
pub fn unbounded_hits(requests: &[Request]) -> (u64, u64) {
    let mut seen = HashSet::new();
    let mut blocks = requests.iter().flat_map(|request| &request.blocks);
    blocks.by_ref().fold((0, 0), |(hits, all), block| {
        (hits + u64::from(!seen.insert(*block)), all + 1)
    })
}

fn parse(line: &[u8]) -> Result<Request, String> {
    let row: Value = serde_json::from_slice(line).map_err(|error| {
        // serde_json counts lines inside the row. The caller adds the line of the file.
        let text = error.to_string();
        let cut = text.find(" at line ").unwrap_or(text.len());
        format!("is not JSON: {} at column {}", &text[..cut], error.column())
    })?;
    let row = row
        .as_object()
        .ok_or_else(|| "is not a JSON object".to_owned())?;
    let field = |name: &str| row.get(name).ok_or_else(|| format!("{name}: is missing"));
    let tokens = |name: &str, least: u64| -> Result<u64, String> {
        let value = field(name)?;
        match value.as_u64() {
            Some(count) if (least..=MAX_TOKENS).contains(&count) => Ok(count),
            _ => Err(format!(
                "{name}: is {}; takes {least} to {MAX_TOKENS} tokens",
                short(value)
            )),
        }
    };
    let timestamp = field("timestamp")?;
    let timestamp_ms = timestamp
        .as_f64()
        .filter(|ms| (0.0..=MAX_TIMESTAMP_MS).contains(ms))
        .ok_or_else(|| {
            format!(
                "timestamp: is {}; takes 0 to {MAX_TIMESTAMP_MS:.0} milliseconds",
                short(timestamp)
            )
        })?;
    let input_tokens = tokens("input_length", 1)?;
    let output_tokens = tokens("output_length", 0)?;
    let ids = field("hash_ids")?;
    let ids = ids
        .as_array()
        .ok_or_else(|| format!("hash_ids: is {}; takes a list", short(ids)))?;
    let expected = input_tokens.div_ceil(BLOCK_TOKENS);
    if ids.len() as u64 != expected || ids.len() > MAX_BLOCKS {
        return Err(format!(
            "hash_ids: has {} ids; input_length {input_tokens} takes {expected}, and at most {MAX_BLOCKS}",
            ids.len()
        ));
    }
    let blocks = ids.iter().enumerate().map(|(index, id)| {
        id.as_u64().map(block_hash).ok_or_else(|| {
            format!(
                "hash_ids[{index}]: is {}; takes an integer from 0",
                short(id)
            )
        })
    });
    Ok(Request {
        arrival_s: timestamp_ms / 1e3,
        input_tokens,
        output_tokens,
        blocks: blocks.collect::<Result<_, _>>()?,
    })
}

/// The value for an error message, cut so that it is never a whole page.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}

/// The 16-byte hash that stands for an id of the trace.
fn block_hash(id: u64) -> BlockHash {
    let mut hash = [0; 16];
    hash[..8].copy_from_slice(&mix(id ^ 0x5357_4946_5443_4143).to_le_bytes());
    hash[8..].copy_from_slice(&id.to_be_bytes());
    BlockHash(hash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &[u8]) -> Vec<Result<Request, TraceError>> {
        TraceReader::new(text, "t.jsonl").collect()
    }

    const GOOD: &str =
        r#"{"timestamp": 27, "input_length": 513, "output_length": 2, "hash_ids": [4, 9]}"#;

    #[test]
    fn reads_a_row_and_skips_blank_lines() {
        let rows = read(format!("{GOOD}\n\n  \n{GOOD}").as_bytes());
        assert_eq!(rows.len(), 2);
        let row = rows[1].as_ref().unwrap();
        assert_eq!((row.arrival_s, row.input_tokens), (0.027, 513));
        assert_eq!((row.output_tokens, row.blocks.len()), (2, 2));
        assert_ne!(row.blocks[0], row.blocks[1]);
    }

    #[test]
    fn a_bad_row_is_named_by_line_and_field_and_ends_the_trace() {
        let cases = [
            ("{\"timestamp\": 27", "is not JSON"),
            ("[1]", "not a JSON object"),
            (&GOOD.replace("timestamp", "time"), "timestamp: is missing"),
            (&GOOD.replace("27", "-1"), "timestamp: is -1"),
            (&GOOD.replace("27", "1e300"), "timestamp: is 1e+300"),
            (&GOOD.replace("513", "0"), "input_length: is 0"),
            (&GOOD.replace("513", "1e18"), "input_length: is 1e+18"),
            (&GOOD.replace("513", "\"513\""), "input_length: is \"513\""),
            (&GOOD.replace("513", "1025"), "hash_ids: has 2 ids"),
            (&GOOD.replace(": 2,", ": 2.5,"), "output_length: is 2.5"),
            (&GOOD.replace("[4, 9]", "7"), "hash_ids: is 7"),
            (&GOOD.replace("9]", "-9]"), "hash_ids[1]: is -9"),
            (&GOOD.replace("9]", "null]"), "hash_ids[1]: is null"),
        ];
        for (line, expected) in cases {
            let rows = read(format!("{GOOD}\n{line}\n{GOOD}\n").as_bytes());
            assert_eq!(rows.len(), 2, "{line}");
            let error = rows[1].as_ref().unwrap_err().to_string();
            assert!(error.starts_with("t.jsonl, line 2: "), "{error}");
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn an_endless_line_is_refused_within_bounds() {
        let rows = read(&vec![b' '; MAX_LINE_BYTES as usize + 9]);
        let error = rows[0].as_ref().unwrap_err().to_string();
        assert!(error.contains("is longer than"), "{error}");
    }

    #[test]
    fn the_unbounded_hit_rate_counts_ids_seen_before() {
        let line = |ids: &str, tokens: u64| {
            format!(
                r#"{{"timestamp":0,"input_length":{tokens},"output_length":1,"hash_ids":{ids}}}"#
            )
        };
        let text = [
            line("[0,1,2]", 1536),
            line("[0,1,3]", 1500),
            line("[0,4]", 1024),
            line("[0,1,3,5]", 2048),
        ];
        let rows = read(text.join("\n").as_bytes());
        let requests: Vec<_> = rows.into_iter().map(Result::unwrap).collect();
        // The second row finds 0 and 1, the third finds 0, the fourth finds 0, 1 and 3: six of twelve.
        assert_eq!(unbounded_hits(&requests), (6, 12));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            for row in read(&bytes) {
                let _ = row.map_err(|error| error.to_string());
            }
        }

        #[test]
        fn no_damaged_row_makes_it_panic(at in 0usize..80, byte: u8, cut in 0usize..90) {
            let mut line = GOOD.as_bytes().to_vec();
            let at = at % line.len();
            line[at] = byte;
            line.truncate(cut);
            for request in read(&line).into_iter().flatten() {
                let expected = request.input_tokens.div_ceil(BLOCK_TOKENS);
                prop_assert_eq!(request.blocks.len() as u64, expected);
            }
        }
    }
}
