//! The busy model's requests, from the traces that people have.
//!
//! A format is named, or known by a file's first row ([`Format`]). Files are read as a stream, also compressed with gzip. What
//! cannot be read is refused with the file, the line and the field; what had to be assumed or left out is in
//! [`Trace::notes`].
//!
//! A prompt is a list of blocks. Equal blocks mean equal prefixes up to the end of that block. The last block of a prompt may be
//! partial.

mod clock;
mod conversations;
mod hashed;
mod ids;
mod input;
mod measure;
mod row;
mod table;
mod texts;

use std::{
    collections::HashSet,
    io::BufRead,
    path::{Path, PathBuf},
    str::FromStr,
};

use swiftcache_proto::{convert::MAX_BLOCKS, domain::BlockHash};

pub(crate) use clock::Stamps;
pub(crate) use input::{first_line, open};
pub(crate) use table::rows;

/// Tokens in a block, where a format does not say otherwise.
pub const BLOCK_TOKENS: u64 = 512;
/// The longest prompt or answer accepted, tokens. It is far beyond any model, and small enough that sums of it cannot
/// overflow.
pub(crate) const MAX_TOKENS: u64 = 1 << 32;
/// The most blocks of all requests together: a gigabyte of hashes.
const MAX_ALL_BLOCKS: usize = 1 << 26;
/// The longest time from the first request to the last, seconds: about a year.
pub(crate) const MAX_SPAN_S: f64 = 3.2e7;

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

/// A whole trace, in order of arrival.
#[derive(Clone, Debug, PartialEq)]
pub struct Trace {
    /// Its file, or what it is.
    pub name: String,
    /// Its format, for people.
    pub format: &'static str,
    /// What the reader had to assume or to leave out.
    pub notes: Vec<String>,
    /// Tokens in a block.
    pub block_tokens: u64,
    /// The requests.
    pub requests: Vec<Request>,
}

/// The formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JSON lines of `timestamp` (ms), `input_length`, `output_length`, `hash_ids`.
    Mooncake,
    /// JSON lines of `chat_id`, `parent_chat_id`, `turn`, `timestamp` (s), and the same fields, 16 tokens a block.
    Bailian,
    /// One JSON document a conversation: `block_size` and `requests`, some of them subagents with requests of their own.
    Conversations,
    /// JSON lines of `messages` (chat completions, batches), `conversations` (ShareGPT) or `prompt`.
    Messages,
    /// JSON lines of `session_id`, `timestamp` (us), `input` and `output`, both texts.
    AgentTexts,
    /// CSV of `TIMESTAMP,ContextTokens,GeneratedTokens`.
    Azure,
    /// CSV of `Timestamp`, `Request tokens`, `Response tokens`, and more.
    BurstGpt,
    /// CSV of `timestamp` (s), `input_tokens`, `output_tokens`, and more.
    ServeGen,
}

impl Format {
    /// All of them, by the name of `--format`.
    pub const ALL: [(&str, Self); 8] = [
        ("mooncake", Self::Mooncake),
        ("bailian", Self::Bailian),
        ("conversations", Self::Conversations),
        ("messages", Self::Messages),
        ("agent-texts", Self::AgentTexts),
        ("azure", Self::Azure),
        ("burstgpt", Self::BurstGpt),
        ("servegen", Self::ServeGen),
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        let known = Self::ALL.iter().find(|(_, format)| *format == self);
        known.map_or("", |(name, _)| name)
    }

    fn names() -> String {
        Self::ALL.map(|(name, _)| name).join(", ")
    }

    /// Tokens in a block, where neither the file nor the user says otherwise.
    fn block_tokens(self) -> u64 {
        match self {
            Self::Bailian => 16,
            Self::Conversations | Self::Messages | Self::AgentTexts => 64,
            _ => BLOCK_TOKENS,
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.iter().find(|(name, _)| *name == text);
        known
            .map(|(_, format)| *format)
            .ok_or_else(|| format!("no format {text:?}; takes one of {}", Self::names()))
    }
}

/// How to read a trace.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Its format. `None`: found from its first row.
    pub format: Option<Format>,
    /// Tokens in a block. `None`: the format's.
    pub block_tokens: Option<u64>,
    /// Requests a second, or conversations a second, where there are no time stamps. `None`: one.
    pub rate: Option<f64>,
    /// Only so many rows of the file.
    pub first: Option<usize>,
    /// Bytes of text in a token, for traces that have the texts. `None`: four.
    pub bytes_per_token: Option<f64>,
    /// The model's `tokenizer.json`, for traces that have the texts. Then their tokens are counted, and
    /// `bytes_per_token` counts for nothing.
    pub tokenizer: Option<PathBuf>,
}

impl Options {
    fn rate(&self) -> f64 {
        self.rate.unwrap_or(1.0)
    }
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

/// Requests as they are read.
struct Gathered {
    stamps: Stamps,
    /// Each with its time stamp in seconds; 0 where there are none.
    requests: Vec<Request>,
    blocks: usize,
    notes: Vec<String>,
    block_tokens: u64,
    /// What the file is, where that is more than its format.
    most: usize,
}

impl Gathered {
    fn new(format: Format, stamps: Stamps, options: &Options) -> Self {
        Self {
            stamps,
            requests: Vec::new(),
            blocks: 0,
            notes: Vec::new(),
            block_tokens: options.block_tokens.unwrap_or(format.block_tokens()),
            most: options.first.unwrap_or(usize::MAX),
        }
    }

    fn is_full(&self) -> bool {
        self.requests.len() >= self.most
    }

    /// Adds a request, or says why it cannot.
    fn add(&mut self, request: Request) -> Result<(), String> {
        if request.blocks.len() > MAX_BLOCKS {
            let count = request.blocks.len();
            return Err(format!("has {count} blocks; takes {MAX_BLOCKS} at most"));
        }
        self.blocks += request.blocks.len();
        if self.blocks > MAX_ALL_BLOCKS {
            return Err(format!(
                "the trace has more than {MAX_ALL_BLOCKS} blocks up to here; use --requests {}",
                self.requests.len()
            ));
        }
        self.requests.push(request);
        Ok(())
    }
}

/// Reads a whole trace, in order of arrival.
///
/// # Errors
/// Fails on the first row that is not a request, on a format that is not known, and on a trace without requests.
pub fn load(path: &Path, options: &Options) -> Result<Trace, TraceError> {
    let origin = path.display().to_string();
    read(open(path)?, &origin, options)
}

/// Reads a whole trace from `input`; `origin` names it in errors.
///
/// # Errors
/// As [`load`].
pub fn read(mut input: impl BufRead, origin: &str, options: &Options) -> Result<Trace, TraceError> {
    if options.block_tokens == Some(0) {
        let problem = "--block-tokens: is 0; takes 1 token or more";
        return Err(TraceError::new(origin, None, problem));
    }
    if options.first == Some(0) {
        let problem = "--requests: is 0; takes 1 row or more";
        return Err(TraceError::new(origin, None, problem));
    }
    let first = first_line(&mut input, origin)?;
    let format = match options.format {
        Some(format) => format,
        None => sniff(&first).map_err(|problem| TraceError::new(origin, Some(1), problem))?,
    };
    let input = std::io::Cursor::new(first).chain(input);
    let gathered = match format {
        Format::Mooncake | Format::Bailian => hashed::read(input, origin, format, options),
        Format::Conversations => conversations::read(input, origin, options),
        Format::Messages | Format::AgentTexts => texts::read(input, origin, format, options),
        Format::Azure | Format::BurstGpt | Format::ServeGen => {
            table::read(input, origin, format, options)
        }
    }?;
    finish(gathered, format, origin, options)
}

use std::io::Read as _;

/// Puts requests in order of arrival.
fn finish(
    gathered: Gathered,
    format: Format,
    origin: &str,
    options: &Options,
) -> Result<Trace, TraceError> {
    let Gathered {
        stamps,
        mut requests,
        mut notes,
        block_tokens,
        ..
    } = gathered;
    let refuse = |problem: String| TraceError::new(origin, None, problem);
    if requests.is_empty() {
        let left_out = notes.join("; ");
        return Err(refuse(match left_out.is_empty() {
            true => "holds no request".to_owned(),
            false => format!("holds no request ({left_out})"),
        }));
    }
    match stamps {
        Stamps::None => {
            let rate = options.rate();
            for (index, request) in requests.iter_mut().enumerate() {
                request.arrival_s = index as f64 / rate;
            }
            notes.push(format!(
                "there are no time stamps: rows arrive in their order, {rate} a second (--rate)"
            ));
        }
        stamps => {
            if !requests.is_sorted_by(|a, b| a.arrival_s <= b.arrival_s) {
                notes.push("rows are not in order of time, and were sorted".to_owned());
                requests.sort_by(|a, b| a.arrival_s.total_cmp(&b.arrival_s));
            }
            let zero_s = stamps.zero_s(requests[0].arrival_s).map_err(refuse)?;
            for request in &mut requests {
                request.arrival_s -= zero_s;
            }
        }
    }
    let span_s = requests.last().map_or(0.0, |last| last.arrival_s);
    if span_s > MAX_SPAN_S {
        let days = span_s / 86_400.0;
        return Err(refuse(format!(
            "spans {days:.0} days from its first to its last time stamp, which is more than a year"
        )));
    }
    Ok(Trace {
        name: origin.to_owned(),
        format: format.name(),
        notes,
        block_tokens,
        requests,
    })
}

/// The format of a file whose first line this is.
fn sniff(line: &[u8]) -> Result<Format, String> {
    let text = String::from_utf8_lossy(line);
    let text = text.trim();
    let unknown = || {
        let begin: String = text.chars().take(60).collect();
        format!(
            "begins with {begin:?}, which is no format known here; --format takes one of {}",
            Format::names()
        )
    };
    if text.starts_with('[') {
        return Err(
            "is one JSON list; takes one JSON document a line (jq -c '.[]' FILE)".to_owned(),
        );
    }
    if !text.starts_with('{') {
        return table::sniff(text).ok_or_else(unknown);
    }
    let Ok(row) = serde_json::from_str::<serde_json::Value>(text) else {
        // A document over several lines is a conversation; a broken line is refused by name.
        return match text.len() < 3 {
            true => Ok(Format::Conversations),
            false if text.contains("\"requests\"") || text.ends_with(['{', ',']) => {
                Ok(Format::Conversations)
            }
            false => Ok(Format::Mooncake),
        };
    };
    let has = |name: &str| row.get(name).is_some();
    if has("requests") {
        Ok(Format::Conversations)
    } else if has("chat_id") && has("hash_ids") {
        Ok(Format::Bailian)
    } else if has("messages") || has("body") || has("conversations") || has("prompt") {
        Ok(Format::Messages)
    } else if has("session_id") && has("input") && has("output") {
        Ok(Format::AgentTexts)
    } else if has("hash_ids") || has("input_length") || has("timestamp") {
        Ok(Format::Mooncake)
    } else {
        Err(unknown())
    }
}

/// How many blocks of the trace an unbounded cache would find, and how many blocks the trace has.
pub fn unbounded_hits(requests: &[Request]) -> (u64, u64) {
    let mut seen = HashSet::new();
    let mut blocks = requests.iter().flat_map(|request| &request.blocks);
    blocks.by_ref().fold((0, 0), |(hits, all), block| {
        (hits + u64::from(!seen.insert(*block)), all + 1)
    })
}

#[cfg(test)]
mod tests;
