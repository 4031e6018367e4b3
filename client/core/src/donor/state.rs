//! What a donor knows: its regions, what it has asked for, what it keeps on offer, and what its thread is told.

use std::{collections::HashMap, time::Instant};

use hdrhistogram::Histogram;
use swiftcache_proto::domain::RegionId;

use super::region::Region;
use crate::session::{Call, Scrub, Withdrawing};

/// What the donor's thread is told.
#[derive(Debug)]
pub(super) enum Task {
    /// A connection is up, and what it says has been taken note of.
    Connected(Sequel),
    Returned(RegionId),
    Scrub(Scrub),
    /// Regions were added or asked back.
    Tell,
    Stop,
}

/// What is left to do about a connection, on the donor's thread. The regions in it are counted as being freed.
#[derive(Debug, Default)]
pub(super) struct Sequel {
    /// They were returned, and the word got lost. With the time they were asked for.
    pub(super) returned: Vec<(Region, Option<Instant>)>,
    /// A broker that knows nothing of them took this session's place at the last one's.
    pub(super) forgotten: Vec<Region>,
    /// How many slabs to take and offer in their place.
    pub(super) anew: usize,
}

/// A withdrawal of so many bytes whose outcome is not known.
pub(super) struct Asking {
    pub(super) since: Instant,
    pub(super) bytes: u64,
    pub(super) answer: Answer,
}

pub(super) enum Answer {
    /// It is on its way.
    Awaited(Call<Withdrawing>),
    /// It never came. Offering these regions again tells which of them are on their way back.
    Lost(Vec<RegionId>),
}

/// What is to be on offer.
#[derive(Debug)]
pub(super) struct Target {
    /// Whole slabs, bytes.
    pub(super) bytes: u64,
    pub(super) slab_bytes: u64,
    /// What the last try met, while something is missing.
    pub(super) problem: Option<String>,
}

pub(super) struct State {
    pub(super) regions: HashMap<RegionId, Region>,
    /// The last connection whose list of regions was taken note of. Offers are made on no other, or a list that is older
    /// than an offer could be taken for what the broker says of it.
    pub(super) connection: u64,
    /// When bytes were last asked for: a region may come back before the answer says which.
    pub(super) asked: Option<Instant>,
    pub(super) asking: Vec<Asking>,
    pub(super) give_back: Histogram<u64>,
    pub(super) returned: u64,
    /// Regions that are this donor's own again, and whose memory is being freed.
    pub(super) freeing: usize,
    pub(super) scrubbed: u64,
    pub(super) failed_scrubs: u64,
    /// What a fixed donor keeps on offer. Nobody keeps up what a donor without a target has on offer.
    pub(super) target: Option<Target>,
}

impl State {
    pub(super) fn new() -> Self {
        Self {
            regions: HashMap::new(),
            connection: 0,
            asked: None,
            asking: Vec::new(),
            // One microsecond to an hour.
            give_back: Histogram::new_with_max(3_600_000_000, 3)
                .expect("constants that hdrhistogram accepts"),
            returned: 0,
            freeing: 0,
            scrubbed: 0,
            failed_scrubs: 0,
            target: None,
        }
    }

    /// Asked for, and not known to be on its way back, nor known not to be, bytes.
    pub(super) fn asked_bytes(&self) -> u64 {
        self.asking.iter().map(|asking| asking.bytes).sum()
    }
}
