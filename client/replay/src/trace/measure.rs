//! How many tokens a text is, and which blocks: by the model's own tokenizer, or by its length.

use std::path::Path;

use swiftcache_proto::domain::BlockHash;
use tokenizers::{Encoding, Tokenizer};

use super::{Options, TraceError, ids};

/// Bytes of text in a token, unless somebody knows better: about what English takes in common vocabularies.
const TOKEN_BYTES: f64 = 4.0;

/// What a token of a text is.
pub(super) enum Measure {
    /// So many bytes.
    Bytes(f64),
    /// What a tokenizer makes of it, and where that was read.
    Tokenizer(Box<Tokenizer>, String),
}

impl Measure {
    /// As the options say.
    ///
    /// # Errors
    /// The tokenizer cannot be read.
    pub(super) fn of(options: &Options) -> Result<Self, TraceError> {
        match &options.tokenizer {
            Some(file) => Self::read(file),
            None => Ok(Self::Bytes(options.bytes_per_token.unwrap_or(TOKEN_BYTES))),
        }
    }

    fn read(file: &Path) -> Result<Self, TraceError> {
        let name = file.display().to_string();
        match Tokenizer::from_file(file) {
            Ok(tokenizer) => Ok(Self::Tokenizer(Box::new(tokenizer), name)),
            Err(problem) => {
                let problem =
                    format!("is no tokenizer ({problem}); takes a model's tokenizer.json");
                Err(TraceError::new(&name, None, problem))
            }
        }
    }

    /// Tokens of a text.
    ///
    /// # Errors
    /// The tokenizer cannot take it.
    pub(super) fn tokens(&self, text: &str) -> Result<u64, String> {
        match self {
            Self::Bytes(size) => Ok((text.len() as f64 / size).ceil() as u64),
            Self::Tokenizer(tokenizer, _) => Ok(split(tokenizer, text)?.len() as u64),
        }
    }

    /// Tokens of a text, and the name of each of its blocks of so many tokens, a last one that is not full included.
    ///
    /// # Errors
    /// As [`Measure::tokens`].
    pub(super) fn blocks(
        &self,
        text: &str,
        block_tokens: u64,
    ) -> Result<(u64, Vec<BlockHash>), String> {
        match self {
            Self::Bytes(size) => {
                let piece = (block_tokens as f64 * size).round() as usize;
                Ok((self.tokens(text)?, chained(text.as_bytes(), piece)))
            }
            Self::Tokenizer(tokenizer, _) => {
                let tokens = split(tokenizer, text)?;
                let bytes: Vec<u8> = tokens
                    .get_ids()
                    .iter()
                    .flat_map(|token| token.to_le_bytes())
                    .collect();
                let piece = (block_tokens as usize).saturating_mul(size_of::<u32>());
                Ok((tokens.len() as u64, chained(&bytes, piece)))
            }
        }
    }

    /// For the report.
    pub(super) fn said(&self) -> String {
        match self {
            Self::Bytes(size) => {
                format!("no tokenizer was used: {size} bytes of text are taken for a token")
            }
            Self::Tokenizer(_, name) => {
                format!("tokens are those of {name}, without a chat template's own")
            }
        }
    }
}

fn split(tokenizer: &Tokenizer, text: &str) -> Result<Encoding, String> {
    let tokens = tokenizer.encode_fast(text, false);
    tokens.map_err(|problem| format!("the tokenizer refuses its text: {problem}"))
}

/// A name for each piece of so many bytes, which says all before it, too.
fn chained(bytes: &[u8], piece: usize) -> Vec<BlockHash> {
    let mut before = BlockHash([0x77; 16]);
    let pieces = bytes.chunks(piece.max(1)).map(|piece| {
        before = ids::chain(before, piece);
        before
    });
    pieces.collect()
}
