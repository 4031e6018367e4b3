//! Traces that have the texts themselves: message logs and prompts.

use std::io::BufRead;

use serde_json::Value;

use super::{
    Format, Gathered, Options, Request, Stamps, TraceError,
    input::Lines,
    measure::Measure,
    row::{Row, parse, short},
};

/// One row's texts.
struct Texts {
    stamp_s: Option<f64>,
    prompt: String,
    output_tokens: u64,
}

pub(super) fn read(
    input: impl BufRead,
    origin: &str,
    format: Format,
    options: &Options,
) -> Result<Gathered, TraceError> {
    let stamps = match format {
        Format::AgentTexts => Stamps::Microseconds,
        _ => Stamps::Seconds,
    };
    let measure = Measure::of(options)?;
    let mut gathered = Gathered::new(format, stamps, options);
    let mut lines = Lines::new(input, origin);
    let mut stamped: Option<bool> = None;
    let mut empty = 0_u64;
    while let Some((number, line)) = lines.next()? {
        if gathered.is_full() {
            break;
        }
        let refuse = |problem: String| TraceError::new(origin, Some(number), problem);
        let texts = parse(line).and_then(|value| match format {
            Format::AgentTexts => agent_texts(&value, &measure),
            _ => messages(&value, &measure),
        });
        let texts = texts.map_err(refuse)?;
        let here = texts.stamp_s.is_some();
        if *stamped.get_or_insert(here) != here {
            let problem = "timestamp: some rows have one and some have none; takes all or none";
            return Err(refuse(problem.to_owned()));
        }
        if texts.prompt.is_empty() {
            empty += 1;
            continue;
        }
        let (tokens, blocks) = measure
            .blocks(&texts.prompt, gathered.block_tokens)
            .map_err(refuse)?;
        let request = Request {
            arrival_s: texts.stamp_s.unwrap_or(0.0),
            input_tokens: tokens.max(1),
            output_tokens: texts.output_tokens,
            blocks,
        };
        gathered.add(request).map_err(refuse)?;
    }
    if stamped == Some(false) {
        gathered.stamps = Stamps::None;
    }
    if empty > 0 {
        let note = format!("{empty} rows without a prompt are left out");
        gathered.notes.push(note);
    }
    gathered.notes.push(measure.said());
    Ok(gathered)
}

/// A row of `timestamp`, `input` and `output`.
fn agent_texts(value: &Value, measure: &Measure) -> Result<Texts, String> {
    let row = Row::of(value, "")?;
    row.text("session_id")?;
    let stamp = row.number("timestamp", Stamps::Microseconds.takes())?;
    Ok(Texts {
        stamp_s: Some(Stamps::Microseconds.seconds(stamp)),
        prompt: row.text("input")?.to_owned(),
        output_tokens: measure.tokens(row.text("output")?)?,
    })
}

/// A row of `messages`, of a batch's `body`, of ShareGPT's `conversations`, or of a `prompt`.
fn messages(value: &Value, measure: &Measure) -> Result<Texts, String> {
    let outer = Row::of(value, "")?;
    let (row, at) = match outer.maybe("body") {
        Some(body) => (Row::of(body, "body.")?, "body."),
        None => (outer, ""),
    };
    let stamps = ["timestamp", "created", "created_at"];
    let stamp = stamps.iter().find(|name| outer.maybe(name).is_some());
    let stamp_s =
        match stamp {
            Some(name) => match outer.field(name)? {
                Value::String(text) => Some(Stamps::Wall.read(text).ok_or_else(|| {
                    format!("{name}: is {text:?}; takes {}", Stamps::Wall.takes())
                })?),
                _ => Some(outer.number(name, Stamps::Seconds.takes())?),
            },
            None => None,
        };
    let (prompt, answer) = if row.maybe("messages").is_some() {
        said(
            row.list("messages")?,
            &format!("{at}messages"),
            "role",
            "content",
        )?
    } else if row.maybe("conversations").is_some() {
        let list = row.list("conversations")?;
        said(list, &format!("{at}conversations"), "from", "value")?
    } else {
        let problem = || format!("{at}messages: is missing, and so are conversations and prompt");
        let prompt = row.maybe("prompt").ok_or_else(problem)?;
        let prompt = prompt
            .as_str()
            .ok_or_else(|| format!("{at}prompt: is {}; takes a text", short(prompt)))?;
        (prompt.to_owned(), None)
    };
    Ok(Texts {
        stamp_s,
        prompt,
        output_tokens: match answer {
            Some(answer) => measure.tokens(&answer)?,
            None => asked_tokens(row, measure)?,
        },
    })
}

/// How long the answer is, where it is not there itself.
fn asked_tokens(row: Row<'_>, measure: &Measure) -> Result<u64, String> {
    for name in [
        "output_tokens",
        "output_length",
        "max_completion_tokens",
        "max_tokens",
    ] {
        if row.maybe(name).is_some() {
            return row.tokens(name, 0);
        }
    }
    match row.maybe("completion").and_then(Value::as_str) {
        Some(text) => measure.tokens(text),
        None => Ok(0),
    }
}

/// What was said before the last answer, and that answer.
fn said(
    list: &[Value],
    at: &str,
    who: &str,
    what: &str,
) -> Result<(String, Option<String>), String> {
    let mut prompt = String::new();
    let mut answer = None;
    for (index, message) in list.iter().enumerate() {
        let place = format!("{at}[{index}].");
        let row = Row::of(message, &place)?;
        let role = row.text(who)?;
        let text = content(row, &place, what)?;
        let last = index + 1 == list.len();
        if last && matches!(role, "assistant" | "gpt") {
            answer = Some(text);
        } else {
            prompt.push_str(role);
            prompt.push('\n');
            prompt.push_str(&text);
            prompt.push('\n');
        }
    }
    Ok((prompt, answer))
}

/// A message's text: one text, or a list of parts that are texts.
fn content(row: Row<'_>, place: &str, what: &str) -> Result<String, String> {
    // A message that only calls tools has no content.
    let calls = || row.maybe("tool_calls").map(Value::to_string);
    let Some(value) = row.maybe(what) else {
        return calls().ok_or_else(|| format!("{place}{what}: is missing"));
    };
    let Some(parts) = value.as_array() else {
        let text = row.text(what)?;
        return Ok(calls().map_or(text.to_owned(), |calls| format!("{text}{calls}")));
    };
    let mut text = String::new();
    for (index, part) in parts.iter().enumerate() {
        let its = format!("{place}{what}[{index}].");
        text.push_str(Row::of(part, &its)?.text("text")?);
    }
    Ok(text)
}
