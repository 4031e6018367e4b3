//! Traces that are tables: when a request came, and how many tokens it had. They name no prefixes.

use std::io::{BufRead, Read};

use csv::{ReaderBuilder, StringRecord, Trim};

use super::{Format, Gathered, MAX_TOKENS, Options, Request, Stamps, TraceError, ids};

/// The columns of a kind of table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Columns {
    pub(crate) format: Option<Format>,
    pub(crate) stamps: Stamps,
    /// The names of the columns with the stamp, the prompt's tokens and the answer's.
    pub(crate) names: [&'static str; 3],
}

/// The kinds of tables. The last one is what `swiftcache generate neighbours` writes.
const KINDS: [Columns; 4] = [
    Columns {
        format: Some(Format::Azure),
        stamps: Stamps::Wall,
        names: ["TIMESTAMP", "ContextTokens", "GeneratedTokens"],
    },
    Columns {
        format: Some(Format::BurstGpt),
        stamps: Stamps::Seconds,
        names: ["Timestamp", "Request tokens", "Response tokens"],
    },
    Columns {
        format: Some(Format::ServeGen),
        stamps: Stamps::Seconds,
        names: ["timestamp", "input_tokens", "output_tokens"],
    },
    Columns {
        format: None,
        stamps: Stamps::Milliseconds,
        names: ["timestamp", "input", "output"],
    },
];

impl Columns {
    /// The kind of table with this header, and where its columns are.
    pub(crate) fn of(header: &StringRecord) -> Result<(Self, [usize; 3]), String> {
        let place = |kind: &Self| -> Option<[usize; 3]> {
            let at = |name: &str| header.iter().position(|column| column == name);
            let [stamp, input, output] = kind.names.map(at);
            Some([stamp?, input?, output?])
        };
        let known = KINDS.iter().find_map(|kind| Some((*kind, place(kind)?)));
        known.ok_or_else(|| {
            let kinds = KINDS.map(|kind| kind.names.join(","));
            format!("header: takes the columns {}", kinds.join(" or "))
        })
    }
}

/// One row of a table.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Cells {
    pub(crate) line: Option<u64>,
    pub(crate) stamp_s: f64,
    pub(crate) input_tokens: u64,
    pub(crate) output_tokens: u64,
}

/// Hands the rows of a table to `row` until it says that it has enough. Returns what table it is.
///
/// # Errors
/// Fails on the first row that cannot be read, and names its line and field.
pub(crate) fn rows(
    input: impl Read,
    origin: &str,
    mut row: impl FnMut(&Columns, Cells) -> Result<bool, String>,
) -> Result<Columns, TraceError> {
    let mut reader = ReaderBuilder::new().trim(Trim::All).from_reader(input);
    let refuse = |line: Option<u64>, problem: String| TraceError::new(origin, line, problem);
    let csv_error = |error: csv::Error| {
        let line = error.position().map(csv::Position::line);
        refuse(line, error.to_string())
    };
    let mut header = reader.headers().map_err(csv_error)?.clone();
    if let Some(first) = header
        .get(0)
        .and_then(|first| first.strip_prefix('\u{feff}'))
    {
        let rest = header.iter().skip(1);
        header = std::iter::once(first).chain(rest).collect();
    }
    let (columns, at) = Columns::of(&header).map_err(|problem| refuse(Some(1), problem))?;
    for record in reader.records() {
        let record = record.map_err(csv_error)?;
        let line = record.position().map(csv::Position::line);
        let read = cells(&record, line, &columns, at);
        let more = read.and_then(|cells| row(&columns, cells));
        if !more.map_err(|problem| refuse(line, problem))? {
            break;
        }
    }
    Ok(columns)
}

fn cells(
    record: &StringRecord,
    line: Option<u64>,
    columns: &Columns,
    at: [usize; 3],
) -> Result<Cells, String> {
    let names = columns.names;
    let text = |column: usize| record.get(at[column]).unwrap_or_default();
    let short = |text: &str| text.chars().take(40).collect::<String>();
    let tokens = |column: usize| {
        let parsed = text(column).parse().ok();
        parsed
            .filter(|count: &u64| *count <= MAX_TOKENS)
            .ok_or_else(|| {
                format!(
                    "{}: is {:?}; takes 0 to {MAX_TOKENS} tokens",
                    names[column],
                    short(text(column))
                )
            })
    };
    let stamp = text(0);
    let stamp_s = columns.stamps.read(stamp).ok_or_else(|| {
        let takes = columns.stamps.takes();
        format!("{}: is {:?}; takes {takes}", names[0], short(stamp))
    })?;
    Ok(Cells {
        line,
        stamp_s,
        input_tokens: tokens(1)?,
        output_tokens: tokens(2)?,
    })
}

/// The format of a table with this header.
pub(super) fn sniff(header: &str) -> Option<Format> {
    let columns = header.split(',').map(|name| name.trim().trim_matches('"'));
    let (columns, _) = Columns::of(&columns.collect()).ok()?;
    columns.format
}

pub(super) fn read(
    input: impl BufRead,
    origin: &str,
    format: Format,
    options: &Options,
) -> Result<Gathered, TraceError> {
    let mut gathered = Gathered::new(format, Stamps::Seconds, options);
    let mut empty = 0_u64;
    let mut number = 0_u64;
    let columns = rows(input, origin, |columns, cells| {
        if columns.format != Some(format) {
            let named = format.name();
            return Err(format!("header: is no {named} table"));
        }
        // A failed request of BurstGPT has no tokens.
        if cells.input_tokens == 0 || cells.output_tokens == 0 {
            empty += 1;
            return Ok(true);
        }
        number += 1;
        let blocks = 0..cells.input_tokens.div_ceil(gathered.block_tokens);
        if blocks.end > swiftcache_proto::convert::MAX_BLOCKS as u64 {
            return Err(format!(
                "{}: is {}; use a larger --block-tokens",
                columns.names[1], cells.input_tokens
            ));
        }
        gathered.add(Request {
            arrival_s: cells.stamp_s,
            input_tokens: cells.input_tokens,
            output_tokens: cells.output_tokens,
            blocks: blocks.map(|block| ids::unique(number, block)).collect(),
        })?;
        Ok(!gathered.is_full())
    })?;
    gathered.stamps = columns.stamps;
    if empty > 0 {
        let note = format!("{empty} rows with zero tokens are left out");
        gathered.notes.push(note);
    }
    let note = "the trace names no prefixes: every prompt is taken for one that shares nothing, so no cache finds anything";
    gathered.notes.push(note.to_owned());
    Ok(gathered)
}
