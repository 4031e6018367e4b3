//! Coding agents' conversations: one JSON document each, whose block ids mean something inside it only. A request of it may be a
//! subagent with requests of its own, which share the ids.

use std::io::BufRead;

use serde_json::Value;
use swiftcache_proto::domain::BlockHash;

use super::{
    Format, Gathered, Options, Request, Stamps, TraceError,
    hashed::fits,
    ids,
    row::{Row, short},
};

/// How deep subagents may be nested.
const MAX_DEPTH: usize = 16;

pub(super) fn read(
    input: impl BufRead,
    origin: &str,
    options: &Options,
) -> Result<Gathered, TraceError> {
    let mut gathered = Gathered::new(Format::Conversations, Stamps::Seconds, options);
    let mut documents = serde_json::Deserializer::from_reader(input).into_iter::<Value>();
    let mut number = 0_u64;
    let mut size: Option<u64> = options.block_tokens;
    while !gathered.is_full() {
        let Some(document) = documents.next() else {
            break;
        };
        let document = document.map_err(|error| {
            let text = error.to_string();
            let cut = text.find(" at line ").unwrap_or(text.len());
            let problem = format!("is not JSON: {} at column {}", &text[..cut], error.column());
            TraceError::new(origin, Some(error.line() as u64), problem)
        })?;
        number += 1;
        let mut conversation = Conversation {
            number,
            size: size.unwrap_or_default(),
            clock_s: 0.0,
            begins_s: (number - 1) as f64 / options.rate(),
            gathered: &mut gathered,
        };
        let read = conversation.read(&document, size.is_some());
        read.map_err(|problem| {
            let problem = format!("conversation {number}: {problem}");
            TraceError::new(origin, None, problem)
        })?;
        size = Some(conversation.size);
    }
    if let Some(size) = size {
        gathered.block_tokens = size;
    }
    if number > 1 {
        gathered.notes.push(format!(
            "times are of each conversation alone: {number} conversations begin {} a second (--rate)",
            options.rate()
        ));
    }
    Ok(gathered)
}

struct Conversation<'a> {
    number: u64,
    /// Tokens in a block.
    size: u64,
    /// When the request before was over, seconds of the conversation.
    clock_s: f64,
    begins_s: f64,
    gathered: &'a mut Gathered,
}

impl Conversation<'_> {
    fn read(&mut self, document: &Value, sized: bool) -> Result<(), String> {
        let row = Row::of(document, "")?;
        let said = match row.maybe("block_size") {
            Some(_) => Some(row.tokens("block_size", 1)?),
            None => None,
        };
        match (said, sized) {
            (Some(said), false) => self.size = said,
            (Some(said), true) if said != self.size => {
                return Err(format!(
                    "block_size: is {said}, and {} before or by --block-tokens; takes one size",
                    self.size
                ));
            }
            (None, false) => {
                return Err("block_size: is missing; use --block-tokens".to_owned());
            }
            _ => {}
        }
        if let Some(scope) = row.maybe("hash_id_scope")
            && !matches!(scope.as_str(), Some("local" | "global"))
        {
            let scope = short(scope);
            return Err(format!("hash_id_scope: is {scope}; takes local or global"));
        }
        let global = row.maybe("hash_id_scope").and_then(Value::as_str) == Some("global");
        self.requests(row.list("requests")?, "requests", global, 0)
    }

    fn requests(
        &mut self,
        list: &[Value],
        at: &str,
        global: bool,
        depth: usize,
    ) -> Result<(), String> {
        if depth > MAX_DEPTH {
            return Err(format!("{at}: is a subagent more than {MAX_DEPTH} deep"));
        }
        for (index, value) in list.iter().enumerate() {
            if self.gathered.is_full() {
                return Ok(());
            }
            let place = format!("{at}[{index}].");
            let row = Row::of(value, &place)?;
            if row.maybe("requests").is_some() {
                let inner = row.list("requests")?;
                let its = format!("{place}requests");
                self.requests(inner, &its, global, depth + 1)?;
                continue;
            }
            self.request(row, &place, global)?;
        }
        Ok(())
    }

    fn request(&mut self, row: Row<'_>, place: &str, global: bool) -> Result<(), String> {
        let seconds = |name: &str| match row.maybe(name) {
            Some(_) => row.number(name, "seconds from 0").map(Some),
            None => Ok(None),
        };
        let (api_s, think_s) = (seconds("api_time")?, seconds("think_time")?);
        // Without a stamp of its own, it comes when the one before was answered and thought about.
        let at_s = match seconds("t")? {
            Some(at_s) => at_s,
            None => self.clock_s + think_s.unwrap_or(0.0),
        };
        self.clock_s = at_s + api_s.unwrap_or(0.0);
        let input_tokens = row.tokens("in", 0)?;
        let output_tokens = row.tokens("out", 0)?;
        let list = row.list("hash_ids")?;
        if !fits(list.len(), input_tokens, self.size) {
            return Err(format!(
                "{place}hash_ids: has {} ids; in {input_tokens} takes {} or {} of {} tokens each",
                list.len(),
                input_tokens / self.size,
                input_tokens.div_ceil(self.size),
                self.size
            ));
        }
        if input_tokens == 0 {
            return Ok(());
        }
        let name = format!("{place}hash_ids");
        let mut blocks = ids::blocks(list, &name, b"")?;
        if !global {
            for block in &mut blocks {
                *block = local(self.number, *block);
            }
        }
        self.gathered.add(Request {
            arrival_s: self.begins_s + at_s,
            input_tokens,
            output_tokens,
            blocks,
        })
    }
}

/// A block of one conversation.
fn local(conversation: u64, block: BlockHash) -> BlockHash {
    ids::chain(block, &conversation.to_be_bytes())
}
