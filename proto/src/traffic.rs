//! What engines have moved and found: totals, as a client counts them and a broker adds them up.

use std::ops::{AddAssign, Index, IndexMut};

use crate::{
    convert::InvalidField,
    domain::LinkKind,
    v1::{self, LinkTraffic},
};

/// The most entries that [`v1::Traffic`] may carry: more than there will ever be kinds of links.
pub const MAX_LINKS: usize = 16;

/// Every kind of link, best first.
pub const LINKS: [LinkKind; 4] = [
    LinkKind::SameDevice,
    LinkKind::Nvlink,
    LinkKind::Pcie,
    LinkKind::Host,
];

/// Bytes that crossed each kind of link. An engine's own host memory counts as [`LinkKind::Host`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BytesByLink([u64; 4]);

impl BytesByLink {
    /// Each kind of link with its bytes, best link first.
    pub fn iter(&self) -> impl Iterator<Item = (LinkKind, u64)> {
        LINKS.into_iter().zip(self.0)
    }

    /// Over all links.
    pub fn total(&self) -> u64 {
        self.0.into_iter().fold(0, u64::saturating_add)
    }

    fn at_most(&self, bytes: u64) -> Self {
        Self(self.0.map(|its| its.min(bytes)))
    }

    fn since(&self, before: &Self) -> Self {
        let mut more = *self;
        for (more, before) in more.0.iter_mut().zip(before.0) {
            *more = more.saturating_sub(before);
        }
        more
    }
}

impl Index<LinkKind> for BytesByLink {
    type Output = u64;

    fn index(&self, link: LinkKind) -> &u64 {
        &self.0[link as usize]
    }
}

impl IndexMut<LinkKind> for BytesByLink {
    fn index_mut(&mut self, link: LinkKind) -> &mut u64 {
        &mut self.0[link as usize]
    }
}

impl AddAssign for BytesByLink {
    fn add_assign(&mut self, other: Self) {
        for (mine, its) in self.0.iter_mut().zip(other.0) {
            *mine = mine.saturating_add(its);
        }
    }
}

/// What was moved and found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes brought into engines' pools.
    pub loaded: BytesByLink,
    /// Bytes written back from them.
    pub stored: BytesByLink,
    /// Blocks that were looked for.
    pub lookup_blocks: u64,
    /// Of these, found in an engine's own leases.
    pub own_blocks: u64,
    /// Found in leases of other sessions.
    pub replica_blocks: u64,
    /// Found in an engine's host memory.
    pub host_blocks: u64,
    /// Loads, stores and moves whose copies failed.
    pub failed_operations: u64,
}

/// Bytes a second and direction over a kind of link that no engine exceeds: more than twice NVLink 5.
const MOST_BYTES: u64 = 1 << 42;
/// Blocks a second that no engine looks up.
const MOST_BLOCKS: u64 = 1 << 30;
/// Operations a second that no engine makes.
const MOST_OPERATIONS: u64 = 1 << 20;

impl Traffic {
    /// As much of this as one engine can have moved and found in so many milliseconds.
    pub fn at_most_in(&self, ms: u64) -> Self {
        let most = |a_second: u64| {
            let most = u128::from(a_second) * u128::from(ms) / 1_000;
            u64::try_from(most).unwrap_or(u64::MAX)
        };
        let (bytes, blocks) = (most(MOST_BYTES), most(MOST_BLOCKS));
        Self {
            loaded: self.loaded.at_most(bytes),
            stored: self.stored.at_most(bytes),
            lookup_blocks: self.lookup_blocks.min(blocks),
            own_blocks: self.own_blocks.min(blocks),
            replica_blocks: self.replica_blocks.min(blocks),
            host_blocks: self.host_blocks.min(blocks),
            failed_operations: self.failed_operations.min(most(MOST_OPERATIONS)),
        }
    }

    /// What came to it since `before`. A total that fell counts as unchanged.
    pub fn since(&self, before: &Self) -> Self {
        let more = u64::saturating_sub;
        Self {
            loaded: self.loaded.since(&before.loaded),
            stored: self.stored.since(&before.stored),
            lookup_blocks: more(self.lookup_blocks, before.lookup_blocks),
            own_blocks: more(self.own_blocks, before.own_blocks),
            replica_blocks: more(self.replica_blocks, before.replica_blocks),
            host_blocks: more(self.host_blocks, before.host_blocks),
            failed_operations: more(self.failed_operations, before.failed_operations),
        }
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, more: Self) {
        self.loaded += more.loaded;
        self.stored += more.stored;
        for (mine, its) in [
            (&mut self.lookup_blocks, more.lookup_blocks),
            (&mut self.own_blocks, more.own_blocks),
            (&mut self.replica_blocks, more.replica_blocks),
            (&mut self.host_blocks, more.host_blocks),
            (&mut self.failed_operations, more.failed_operations),
        ] {
            // Whoever reports nonsense must not make the totals fall.
            *mine = mine.saturating_add(its);
        }
    }
}

impl From<&Traffic> for v1::Traffic {
    fn from(traffic: &Traffic) -> Self {
        let links = LINKS.map(|link| LinkTraffic {
            link: v1::LinkKind::from(link).into(),
            loaded_bytes: traffic.loaded[link],
            stored_bytes: traffic.stored[link],
        });
        let used = |link: &LinkTraffic| link.loaded_bytes > 0 || link.stored_bytes > 0;
        Self {
            links: links.into_iter().filter(used).collect(),
            lookup_blocks: traffic.lookup_blocks,
            own_blocks: traffic.own_blocks,
            replica_blocks: traffic.replica_blocks,
            host_blocks: traffic.host_blocks,
            failed_operations: traffic.failed_operations,
        }
    }
}

impl TryFrom<&v1::Traffic> for Traffic {
    type Error = InvalidField;

    /// A kind of link that is not known here yet is left out.
    fn try_from(traffic: &v1::Traffic) -> Result<Self, InvalidField> {
        if traffic.links.len() > MAX_LINKS {
            let entries = traffic.links.len();
            let problem = format!("has {entries} entries; takes at most {MAX_LINKS}");
            return Err(InvalidField::new("traffic.links", problem));
        }
        let mut read = Self {
            lookup_blocks: traffic.lookup_blocks,
            own_blocks: traffic.own_blocks,
            replica_blocks: traffic.replica_blocks,
            host_blocks: traffic.host_blocks,
            failed_operations: traffic.failed_operations,
            ..Self::default()
        };
        for entry in &traffic.links {
            if let Ok(link) = LinkKind::try_from(entry.link()) {
                read.loaded[link] = read.loaded[link].saturating_add(entry.loaded_bytes);
                read.stored[link] = read.stored[link].saturating_add(entry.stored_bytes);
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn traffic(nvlink: u64, own: u64) -> Traffic {
        let mut traffic = Traffic {
            own_blocks: own,
            ..Traffic::default()
        };
        traffic.loaded[LinkKind::Nvlink] = nvlink;
        traffic
    }

    #[test]
    fn what_travels_is_what_was_counted() {
        let mut counted = traffic(7, 3);
        counted.stored[LinkKind::Host] = 9;
        counted.lookup_blocks = 11;
        counted.replica_blocks = 2;
        counted.host_blocks = 1;
        counted.failed_operations = 4;
        let wire = v1::Traffic::from(&counted);
        assert_eq!(wire.links.len(), 2, "links without bytes are left out");
        assert_eq!(Traffic::try_from(&wire), Ok(counted));
    }

    #[test]
    fn totals_never_fall() {
        assert_eq!(traffic(9, 1).since(&traffic(4, 5)), traffic(5, 0));
        let mut sum = traffic(u64::MAX, 1);
        sum += traffic(5, 1);
        assert_eq!(sum, traffic(u64::MAX, 2));
    }

    #[test]
    fn links_are_bounded_and_unknown_ones_left_out() {
        let entry = |link| LinkTraffic {
            link,
            loaded_bytes: 7,
            stored_bytes: 0,
        };
        let wire = |links| v1::Traffic {
            links,
            ..v1::Traffic::default()
        };
        let nvlink = v1::LinkKind::Nvlink.into();
        let read = Traffic::try_from(&wire(vec![entry(90), entry(nvlink), entry(0)]));
        assert_eq!(read, Ok(traffic(7, 0)));
        let sprawling = Traffic::try_from(&wire(vec![entry(nvlink); MAX_LINKS + 1]));
        assert_eq!(sprawling.unwrap_err().field, "traffic.links");
    }
}
