//! Reads the recording. Its lines are `<client><what> <rpc> <message in protobuf's text format>`.
//!
//! | what | |
//! |---|---|
//! | `>` | the client calls |
//! | `~` | the client calls, again and again until the answer is the recorded one |
//! | `<` | the answer |
//! | `!` | the answer is this gRPC status |
//! | `>>` | the client sends on its session stream |
//! | `<<` | the client receives on its session stream |

use prost_reflect::{DynamicMessage, Kind, MessageDescriptor, ReflectMessage, Value};

use std::collections::HashMap;

/// A line of the recording.
pub(crate) struct Step {
    pub(crate) client: String,
    pub(crate) what: What,
    pub(crate) rpc: String,
    pub(crate) text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Call,
    CallUntil,
    Answer,
    Status,
    Send,
    Receive,
}

impl What {
    const ALL: [(Self, &'static str); 6] = [
        // The longer signs come first, so that `>>` is not read as `>`.
        (Self::Send, ">>"),
        (Self::Receive, "<<"),
        (Self::Call, ">"),
        (Self::CallUntil, "~"),
        (Self::Answer, "<"),
        (Self::Status, "!"),
    ];

    pub(crate) fn sign(self) -> &'static str {
        Self::ALL.iter().find(|(what, _)| *what == self).unwrap().1
    }
}

pub(crate) fn parse(line: &str) -> Option<Step> {
    if line.is_empty() || line.starts_with('#') {
        return None;
    }
    let (who, rest) = line.split_once(' ').unwrap_or((line, ""));
    let (what, sign) = What::ALL
        .into_iter()
        .find(|(_, sign)| who.ends_with(sign))
        .unwrap_or_else(|| panic!("{line}: has none of the signs that say what happens"));
    let (rpc, text) = rest.split_once(' ').unwrap_or((rest, ""));
    Some(Step {
        client: who.trim_end_matches(sign).to_owned(),
        what,
        rpc: rpc.to_owned(),
        text: text.to_owned(),
    })
}

/// Numbers that every broker draws at random. Maps those of this broker to those of the recording, and back.
#[derive(Default)]
pub(crate) struct Names {
    actual: HashMap<(&'static str, u64), u64>,
    recorded: HashMap<(&'static str, u64), u64>,
}

/// The kind of number that a field with this name holds, if the broker draws it.
fn drawn(field: &str) -> Option<&'static str> {
    match field {
        "session_id" | "resume_session_id" => Some("session"),
        "boot_id" => Some("boot"),
        "lease_id" | "lease_ids" | "held_lease_ids" | "shared_lease_ids" | "refused_lease_ids" => {
            Some("lease")
        }
        "pin_id" | "pin_ids" => Some("pin"),
        _ => None,
    }
}

/// A field with a path in this run's directory.
const PLACE: &str = "fd_socket";

impl Names {
    /// The message that the recording's client would send to this broker.
    pub(crate) fn sent_as(&self, message: &DynamicMessage) -> DynamicMessage {
        self.translated(message, &mut |names, kind, number| {
            let known = names.actual.get(&(kind, number)).copied();
            known.unwrap_or_else(|| panic!("{kind} {number} was never answered"))
        })
    }

    /// The answer of this broker as it would be in the recording. Numbers that appear for the first time are named in
    /// the order in which they appear, as when the recording was made.
    pub(crate) fn recorded_as(&mut self, message: &DynamicMessage) -> DynamicMessage {
        let mut names = std::mem::take(self);
        let translated = Self::default().translated(message, &mut |_, kind, number| {
            if let Some(name) = names.recorded.get(&(kind, number)) {
                return *name;
            }
            let taken = names.recorded.keys().filter(|(other, _)| *other == kind);
            let name = taken.count() as u64 + 1;
            names.recorded.insert((kind, number), name);
            names.actual.insert((kind, name), number);
            name
        });
        *self = names;
        translated
    }

    fn translated(
        &self,
        message: &DynamicMessage,
        number: &mut dyn FnMut(&Self, &'static str, u64) -> u64,
    ) -> DynamicMessage {
        let mut result = DynamicMessage::new(message.descriptor());
        for (field, value) in message.fields() {
            let value = match (field.kind(), value) {
                (Kind::Message(_), Value::Message(inner)) => {
                    Value::Message(self.translated(inner, number))
                }
                (Kind::Message(_), Value::List(inner)) => Value::List(
                    inner
                        .iter()
                        .map(|inner| {
                            Value::Message(self.translated(inner.as_message().unwrap(), number))
                        })
                        .collect(),
                ),
                (_, value) => match (drawn(field.name()), value) {
                    (Some(kind), Value::U64(drawn)) => Value::U64(number(self, kind, *drawn)),
                    (Some(kind), Value::List(list)) => Value::List(
                        list.iter()
                            .map(|drawn| Value::U64(number(self, kind, drawn.as_u64().unwrap())))
                            .collect(),
                    ),
                    (None, Value::String(_)) if field.name() == PLACE => {
                        Value::String("broker-fd.sock".to_owned())
                    }
                    (_, value) => value.clone(),
                },
            };
            result.set_field(&field, value);
        }
        result
    }
}

/// Reads a message of the recording.
pub(crate) fn message(descriptor: MessageDescriptor, text: &str) -> DynamicMessage {
    DynamicMessage::parse_text_format(descriptor, text)
        .unwrap_or_else(|error| panic!("{text}: {error}"))
}
