//! Fields of a JSON row, and what is said of those that cannot be read.

use serde_json::{Map, Value};

use super::MAX_TOKENS;

/// One JSON object.
#[derive(Clone, Copy)]
pub(super) struct Row<'a> {
    fields: &'a Map<String, Value>,
    /// Where it is inside its row: empty, or with a dot at its end.
    at: &'a str,
}

/// Reads a line as JSON.
pub(super) fn parse(line: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(line).map_err(|error| {
        // serde_json counts lines inside the row. The caller adds the line of the file.
        let text = error.to_string();
        let cut = text.find(" at line ").unwrap_or(text.len());
        format!("is not JSON: {} at column {}", &text[..cut], error.column())
    })
}

impl<'a> Row<'a> {
    pub(super) fn of(value: &'a Value, at: &'a str) -> Result<Self, String> {
        match value.as_object() {
            Some(fields) => Ok(Self { fields, at }),
            None => Err(format!(
                "{}is not a JSON object",
                match at {
                    "" => String::new(),
                    at => format!("{}: ", at.trim_end_matches('.')),
                }
            )),
        }
    }

    /// A field that may be absent or null.
    pub(super) fn maybe(&self, name: &str) -> Option<&'a Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    pub(super) fn field(&self, name: &str) -> Result<&'a Value, String> {
        self.fields
            .get(name)
            .ok_or_else(|| format!("{}{name}: is missing", self.at))
    }

    fn refuse(&self, name: &str, value: &Value, takes: &str) -> String {
        format!("{}{name}: is {}; takes {takes}", self.at, short(value))
    }

    /// A count of tokens.
    pub(super) fn tokens(&self, name: &str, least: u64) -> Result<u64, String> {
        let value = self.field(name)?;
        match value.as_u64() {
            Some(count) if (least..=MAX_TOKENS).contains(&count) => Ok(count),
            _ => {
                let takes = format!("{least} to {MAX_TOKENS} tokens");
                Err(self.refuse(name, value, &takes))
            }
        }
    }

    /// A number from 0.
    pub(super) fn number(&self, name: &str, takes: &str) -> Result<f64, String> {
        let value = self.field(name)?;
        let number = value
            .as_f64()
            .filter(|number| (0.0..=1e18).contains(number));
        number.ok_or_else(|| self.refuse(name, value, takes))
    }

    pub(super) fn text(&self, name: &str) -> Result<&'a str, String> {
        let value = self.field(name)?;
        value
            .as_str()
            .ok_or_else(|| self.refuse(name, value, "a text"))
    }

    pub(super) fn list(&self, name: &str) -> Result<&'a [Value], String> {
        let value = self.field(name)?;
        match value.as_array() {
            Some(list) => Ok(list),
            None => Err(self.refuse(name, value, "a list")),
        }
    }
}

/// The value for an error message, cut so that it is never a whole page.
pub(super) fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((cut, _)) => format!("{}...", &text[..cut]),
        None => text,
    }
}
