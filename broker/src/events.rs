//! A log of the last events, for people.

use std::{
    collections::VecDeque,
    time::{SystemTime, UNIX_EPOCH},
};

use swiftcache_proto::{convert::InvalidField, domain::Shortfall, v1};

use crate::core::{Note, QuotaTarget};

/// How many events are kept: those of the last minutes of a busy node.
const KEPT: usize = 4_096;
/// The most events in one answer (`ListEventsRequest.limit`).
const MOST: usize = 1_000;
/// How many events are in one answer if the request gives no limit.
const DEFAULT: usize = 100;

/// All kinds of events.
const KINDS: [&str; 19] = [
    "register",
    "leave",
    "gone",
    "offer",
    "withdraw",
    "return",
    "lease",
    "estate",
    "inherit",
    "short",
    "revoke",
    "acknowledge",
    "zombie",
    "cannot-map",
    "drain",
    "undrain",
    "evict",
    "quota",
    "hold",
];

/// Which events a client wants to see.
#[derive(Debug, Default)]
pub struct Wanted {
    /// Only events after this sequence number.
    after: u64,
    limit: usize,
    /// Only events of these kinds. Empty: of all kinds.
    kinds: Vec<String>,
}

impl Wanted {
    /// Checks a client's request.
    ///
    /// # Errors
    /// When it has a kind that does not exist. The error names it.
    pub fn new(request: v1::ListEventsRequest) -> Result<Self, InvalidField> {
        let unknown = |kind: &&String| !KINDS.contains(&kind.as_str());
        if let Some(kind) = request.kinds.iter().find(unknown) {
            let problem = format!("names {kind:?}; there are {}", KINDS.join(", "));
            return Err(InvalidField::new("kinds", problem));
        }
        Ok(Self {
            after: request.after_sequence,
            limit: match request.limit as usize {
                0 => DEFAULT,
                limit => limit.min(MOST),
            },
            kinds: request.kinds,
        })
    }
}

/// The log: a ring of events.
#[derive(Default)]
pub struct EventLog {
    ring: VecDeque<v1::EventRecord>,
    sequence: u64,
}

impl EventLog {
    /// Adds an event.
    pub fn push(&mut self, kind: &'static str, text: String, lease_short: Option<v1::LeaseShort>) {
        if self.ring.len() == KEPT {
            self.ring.pop_front();
        }
        self.sequence += 1;
        self.ring.push_back(v1::EventRecord {
            sequence: self.sequence,
            unix_ms: unix_ms(),
            kind: kind.to_owned(),
            text,
            lease_short,
        });
    }

    /// The newest of the wanted events, up to the limit. The oldest of them is first.
    pub fn list(&self, wanted: &Wanted) -> Vec<v1::EventRecord> {
        let newest = self.ring.iter().rev();
        let mut events: Vec<_> = newest
            .take_while(|event| event.sequence > wanted.after)
            .filter(|event| wanted.kinds.is_empty() || wanted.kinds.contains(&event.kind))
            .take(wanted.limit)
            .cloned()
            .collect();
        events.reverse();
        events
    }
}

/// The time now, milliseconds since 1970.
pub fn unix_ms() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// The kind and the line of an event. `None`: the event is too frequent for people, and only metrics count it.
pub fn describe(note: &Note) -> Option<(&'static str, String)> {
    Some(match note {
        Note::Registered {
            session,
            name,
            resumed,
        } => {
            let verb = if *resumed { "resumed" } else { "registered" };
            ("register", format!("{session:?} ({name}) {verb}"))
        }
        Note::Left { session } => ("leave", format!("{session:?} left")),
        Note::Gone { session, name } => (
            "gone",
            format!("the process of {session:?} ({name}) is gone"),
        ),
        Note::Offered {
            region,
            device,
            bytes,
        } => (
            "offer",
            format!("region {region}: {} on {device}", Bytes(*bytes)),
        ),
        Note::Withdrawing { region, bytes } => (
            "withdraw",
            format!("region {region}: {} asked back", Bytes(*bytes)),
        ),
        Note::Returned { region, bytes } => (
            "return",
            format!("region {region}: {} are the donor's own", Bytes(*bytes)),
        ),
        Note::Leased {
            lease,
            region,
            device,
            bytes,
            link,
        } => (
            "lease",
            format!(
                "lease {lease}: {} of region {region} on {device} over {link}",
                Bytes(*bytes)
            ),
        ),
        Note::LeftEstate {
            lease,
            tenant,
            namespace,
            bytes,
            blocks,
        } => (
            "estate",
            format!(
                "lease {lease}: {} with {blocks} blocks of {namespace} are kept for an heir of tenant {tenant}",
                Bytes(*bytes)
            ),
        ),
        Note::Inherited {
            lease,
            heir,
            name,
            bytes,
            blocks,
        } => (
            "inherit",
            format!(
                "lease {lease}: {} with {blocks} blocks go to {heir:?} ({name})",
                Bytes(*bytes)
            ),
        ),
        Note::LeaseShort {
            session,
            name,
            namespace,
            asked_bytes,
            granted_bytes,
            shortfall,
            ..
        } => (
            "short",
            format!(
                "{session:?} ({name}) was granted {} of {} for {namespace}: {}",
                Bytes(*granted_bytes),
                Bytes(*asked_bytes),
                why(*shortfall)
            ),
        ),
        Note::Revoked {
            lease,
            reason,
            bytes,
        } => (
            "revoke",
            format!("lease {lease}: {}, {reason}", Bytes(*bytes)),
        ),
        Note::LeaseEnded { lease, after_ms } => (
            "acknowledge",
            match after_ms {
                Some(ms) => {
                    format!("lease {lease}: everyone has let go, {ms} ms after the revocation")
                }
                None => format!("lease {lease}: given back"),
            },
        ),
        Note::Zombie { lease, bytes, pids } => (
            "zombie",
            format!(
                "lease {lease}: {} still mapped past the drain window by {pids:?}",
                Bytes(*bytes)
            ),
        ),
        Note::Drained { target } => ("drain", format!("{target} is drained")),
        Note::Undrained { target } => ("undrain", format!("{target} lends again")),
        Note::Evicted { blocks } => ("evict", format!("{blocks} blocks dropped from the index")),
        Note::QuotaSet { target, bytes } => {
            let whose = match target {
                QuotaTarget::Namespace(name) => format!("namespace {name}"),
                QuotaTarget::Tenant(tenant) => format!("tenant {tenant}"),
            };
            let most = match bytes {
                Some(bytes) => format!("may hold {}", Bytes(*bytes)),
                None => "has the configured quota again".to_owned(),
            };
            ("quota", format!("{whose} {most}"))
        }
        Note::CannotMap {
            region,
            device,
            session,
            name,
            donor,
        } => (
            "cannot-map",
            format!(
                "session {} ({name}) cannot map region {region} of {donor} on {device}, and is lent no more of it; its log \
                 says why",
                session.label()
            ),
        ),
        Note::Held {
            device,
            free_bytes,
            for_ms,
        } => (
            "hold",
            format!(
                "device {device} is held for {:.1} s with {} free",
                f64::from(*for_ms) / 1000.0,
                Bytes(*free_bytes)
            ),
        ),
        Note::HoldEnded { device } => ("hold", format!("device {device} is no longer held")),
        Note::Published { .. }
        | Note::Unpublished { .. }
        | Note::Looked { .. }
        | Note::DiskWork
        | Note::Refused { .. } => return None,
    })
}

/// The details of an event in addition to its line.
pub fn detail(note: &Note) -> Option<v1::LeaseShort> {
    let Note::LeaseShort {
        session,
        name,
        tenant,
        namespace,
        device,
        asked_bytes,
        granted_bytes,
        shortfall,
    } = note
    else {
        return None;
    };
    Some(v1::LeaseShort {
        session_label: session.label(),
        session_name: name.clone(),
        tenant: tenant.clone(),
        namespace: namespace.clone(),
        device_uuid: device.to_string(),
        asked_bytes: *asked_bytes,
        granted_bytes: *granted_bytes,
        shortfall: v1::Shortfall::from(*shortfall).into(),
    })
}

/// The reason of a shortfall, for people.
fn why(shortfall: Shortfall) -> &'static str {
    match shortfall {
        Shortfall::None => "nothing is missing",
        Shortfall::NoFreeSlab => "no free slab is left on a device it can reach",
        Shortfall::Quota => "it is at a quota or a bound",
        Shortfall::Scrubbing => "slabs are being zeroed for it",
        Shortfall::Fairness => "it has its fair share, and others wait",
        Shortfall::BlockTooLarge => "no slab on offer can hold one of its blocks",
    }
}

/// A number of bytes, written for people.
struct Bytes(u64);

impl std::fmt::Display for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match units.iter().find(|(_, shift)| self.0 >> shift > 0) {
            Some((unit, shift)) => {
                let whole = (1_u64 << shift) as f64;
                write!(f, "{:.1} {unit}", self.0 as f64 / whole)
            }
            None => write!(f, "{} bytes", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use swiftcache_proto::domain::{DeviceUuid, SessionId};

    use super::*;

    #[test]
    fn the_newest_are_kept_and_given_oldest_first() {
        let mut log = EventLog::default();
        for number in 0..KEPT + 10 {
            log.push("lease", number.to_string(), None);
        }
        let sequences = |after_sequence, limit| -> Vec<u64> {
            let request = v1::ListEventsRequest {
                after_sequence,
                limit,
                ..v1::ListEventsRequest::default()
            };
            let events = log.list(&Wanted::new(request).unwrap());
            events.iter().map(|event| event.sequence).collect()
        };
        let last = (KEPT + 10) as u64;
        assert_eq!(sequences(0, 2), [last - 1, last]);
        assert_eq!(sequences(last - 1, 0), [last]);
        assert_eq!(sequences(0, 0).len(), DEFAULT);
        assert_eq!(sequences(0, u32::MAX).len(), MOST);
        assert!(sequences(last, 0).is_empty());
        assert_eq!(log.ring.len(), KEPT);
    }

    #[test]
    fn kinds_narrow_before_the_limit_counts_and_must_exist() {
        let mut log = EventLog::default();
        for number in 0..9 {
            let kind = if number % 3 == 0 { "short" } else { "lease" };
            log.push(kind, number.to_string(), None);
        }
        let list = |kinds: &[&str]| {
            let request = v1::ListEventsRequest {
                limit: 2,
                kinds: kinds.iter().map(|kind| (*kind).to_owned()).collect(),
                ..v1::ListEventsRequest::default()
            };
            Wanted::new(request).map(|wanted| -> Vec<String> {
                log.list(&wanted).into_iter().map(|e| e.text).collect()
            })
        };
        assert_eq!(list(&["short"]).unwrap(), ["3", "6"]);
        assert_eq!(list(&["short", "lease"]).unwrap(), ["7", "8"]);
        assert!(list(&["zombie"]).unwrap().is_empty());
        let error = list(&["shorts"]).unwrap_err().to_string();
        assert!(
            error.contains("kinds") && error.contains("short, revoke"),
            "{error}"
        );
    }

    #[test]
    fn every_described_kind_can_be_asked_for() {
        let target = QuotaTarget::Tenant("1000".to_owned());
        let bytes = Some(3 << 30);
        let (kind, text) = describe(&Note::QuotaSet { target, bytes }).unwrap();
        assert_eq!(text, "tenant 1000 may hold 3.0 GiB");
        let short = Note::LeaseShort {
            session: SessionId(0x0123_4567_89ab_cdef),
            name: "engine".to_owned(),
            tenant: "1000".to_owned(),
            namespace: "model".to_owned(),
            device: "SIM-0".parse().unwrap(),
            asked_bytes: 2 << 30,
            granted_bytes: 1 << 30,
            shortfall: Shortfall::Fairness,
        };
        let detail = detail(&short).unwrap();
        assert_eq!(
            (detail.session_label.as_str(), detail.granted_bytes),
            ("0123", 1 << 30)
        );
        assert_eq!(detail.shortfall(), v1::Shortfall::Fairness);
        let (short, text) = describe(&short).unwrap();
        assert!(
            text.contains("1.0 GiB of 2.0 GiB for model: it has its fair share"),
            "{text}"
        );
        let device: DeviceUuid = "SIM-0".parse().unwrap();
        let held = Note::Held {
            device: device.clone(),
            free_bytes: 1 << 30,
            for_ms: 90_000,
        };
        let (held, text) = describe(&held).unwrap();
        assert_eq!(text, "device SIM-0 is held for 90.0 s with 1.0 GiB free");
        let (ended, _) = describe(&Note::HoldEnded { device }).unwrap();
        for kind in [kind, short, held, ended] {
            assert!(KINDS.contains(&kind), "{kind}");
        }
    }

    #[test]
    fn an_event_never_shows_a_whole_session_id() {
        let session = SessionId(0x0123_4567_89ab_cdef);
        let (_, text) = describe(&Note::Left { session }).unwrap();
        assert_eq!(text, "session 0123 left");
        assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(Bytes(1000).to_string(), "1000 bytes");
    }
}
