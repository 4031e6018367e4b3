//! `swiftcache watch`: the blocks that lookups can find, and what changes of that.

use std::fmt::Write as _;

use clap::Args;
use serde_json::json;
use swiftcache_proto::v1;

use super::{CliError, operate::BrokerArg, output};

/// Bytes of a block's hash.
const HASH_BYTES: usize = 16;

/// Print the blocks that can be found, and what changes of that as it happens
///
/// Each line of text is a block that can be found now (+) or no more (-), with its kind of memory, tenant, namespace and hash.
#[derive(Args, Debug)]
pub(super) struct WatchArgs {
    #[command(flatten)]
    broker: BrokerArg,
    /// Only of namespaces of this name; may be given several times
    #[arg(long, value_name = "NAME")]
    namespace: Vec<String>,
    /// Only of this tenant: a uid, or a uid and a label (1000/batch)
    #[arg(
        long,
        value_name = "TENANT",
        default_value = "",
        hide_default_value = true
    )]
    tenant: String,
    /// Go on from where an earlier watch ended, as it said then
    #[arg(long, value_name = "PLACE", value_parser = Place::read)]
    after: Option<Place>,
    /// Stop when all there is now is printed
    #[arg(long)]
    once: bool,
    /// Print one JSON document a line, for each message of the broker
    #[arg(long)]
    json: bool,
}

/// Where somebody who goes on begins: at a number of a broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    boot_id: u64,
    sequence: u64,
}

impl Place {
    fn read(text: &str) -> Result<Self, String> {
        let place = text.split_once('.').and_then(|(boot_id, sequence)| {
            Some(Self {
                boot_id: u64::from_str_radix(boot_id, 16).ok()?,
                sequence: sequence.parse().ok()?,
            })
        });
        place.ok_or_else(|| format!("{text:?} is no place; takes what an earlier watch printed"))
    }

    fn of(message: &v1::WatchResponse) -> Option<Self> {
        Some(Self {
            boot_id: message.boot_id,
            sequence: message.sequence?,
        })
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016x}.{}", self.boot_id, self.sequence)
    }
}

pub(super) fn run(args: &WatchArgs) -> Result<(), CliError> {
    super::end_on_signal()?;
    let request = v1::WatchRequest {
        boot_id: args.after.map_or(0, |place| place.boot_id),
        after_sequence: args.after.map(|place| place.sequence),
        tenant: args.tenant.clone(),
        namespaces: args.namespace.clone(),
        session_id: 0,
    };
    args.broker.connect()?.watch(request, |message| {
        let shown = match args.json {
            true => document(&message),
            false => lines(&message),
        };
        let read = output::print(&shown)?;
        Ok(read && !(args.once && message.current))
    })
}

fn medium(change: &v1::IndexChange) -> &'static str {
    match change.medium() {
        v1::Medium::Hbm => "hbm",
        v1::Medium::Host => "host",
        v1::Medium::Unspecified => "unknown",
    }
}

fn hashes(change: &v1::IndexChange) -> impl Iterator<Item = String> {
    let hashes = change.hashes.chunks(HASH_BYTES);
    hashes.map(|hash| hash.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn document(message: &v1::WatchResponse) -> String {
    let changes = message.changes.iter().map(|change| {
        json!({
            "removed": change.removed,
            "medium": medium(change),
            "tenant": change.tenant,
            "namespace": change.namespace,
            "hashes": hashes(change).collect::<Vec<_>>(),
        })
    });
    let document = json!({
        "place": Place::of(message).map(|place| place.to_string()),
        "anew": message.anew,
        "current": message.current,
        "changes": changes.collect::<Vec<_>>(),
    });
    format!("{document}\n")
}

fn lines(message: &v1::WatchResponse) -> String {
    let mut text = String::new();
    if message.anew {
        text += "# all blocks from here on, whatever was printed before\n";
    }
    for change in &message.changes {
        let sign = if change.removed { '-' } else { '+' };
        let (medium, tenant, namespace) = (medium(change), &change.tenant, &change.namespace);
        for hash in hashes(change) {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{sign} {medium:<4} {tenant} {namespace} {hash}");
        }
    }
    if let Some(place) = Place::of(message).filter(|_| message.current) {
        let _ = writeln!(
            text,
            "# that is all now; to go on from here: --after {place}"
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> v1::WatchResponse {
        let change = |removed, byte| v1::IndexChange {
            tenant: "1000".to_owned(),
            namespace: "model".to_owned(),
            medium: v1::Medium::Hbm.into(),
            removed,
            hashes: vec![byte; HASH_BYTES].into(),
        };
        v1::WatchResponse {
            boot_id: 0xab,
            anew: true,
            changes: vec![change(false, 0x1f), change(true, 0x20)],
            sequence: Some(7),
            current: true,
        }
    }

    #[test]
    fn a_place_is_read_as_it_is_printed() {
        let text = lines(&message());
        let (_, place) = text.trim_end().rsplit_once(' ').unwrap();
        let place = Place::read(place).unwrap();
        assert_eq!(Some(place), Place::of(&message()));
        for wrong in ["", "ab", "ab.", ".7", "zz.7", "ab.-7"] {
            assert!(Place::read(wrong).unwrap_err().contains("is no place"));
        }
    }

    #[test]
    fn text_and_json_say_the_same() {
        let text = lines(&message());
        let expected = format!(
            "+ hbm  1000 model {}\n- hbm  1000 model {}\n",
            "1f".repeat(16),
            "20".repeat(16)
        );
        assert!(text.contains(&expected), "{text}");
        let read: serde_json::Value = serde_json::from_str(&document(&message())).unwrap();
        assert_eq!(read["place"], "00000000000000ab.7");
        assert_eq!(read["changes"][1]["removed"], true);
        assert_eq!(read["changes"][0]["hashes"][0], "1f".repeat(16));
    }
}
