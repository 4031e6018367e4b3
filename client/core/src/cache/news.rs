//! What the broker knows of the host tier, and what may be news to it.

use std::{collections::HashSet, time::Instant};

use foldhash::fast::RandomState;
use swiftcache_proto::domain::BlockHash;

use crate::transfer::RouteSet;

pub(super) type Hashes = HashSet<BlockHash, RandomState>;

/// What the broker knows of the host tier.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) kept: Hashes,
    /// The routes that it takes for up.
    pub(super) up: RouteSet,
    pub(super) phase: Phase,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Phase {
    /// It has to be told everything.
    #[default]
    Anew,
    /// It has to be told everything, but not before.
    Later(Instant),
    /// It has been told everything up to the news.
    Abreast,
    /// It cannot be told on this connection.
    Deaf,
}

impl Told {
    /// A connection is up: whatever the broker knew of this borrower, it may know no more.
    pub(super) fn start_anew(&mut self) {
        self.phase = Phase::Anew;
    }
}

/// Blocks that came to the host tier or left it.
#[derive(Debug, Default)]
pub(super) struct HostNews(Option<Hashes>);

impl HostNews {
    /// From here on news are gathered.
    pub(super) fn gather(&mut self) {
        self.0.get_or_insert_default();
    }

    pub(super) fn add(&mut self, hash: BlockHash) {
        if let Some(news) = &mut self.0 {
            news.insert(hash);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.as_ref().is_none_or(HashSet::is_empty)
    }

    pub(super) fn take(&mut self, most: usize) -> Vec<BlockHash> {
        let Some(news) = &mut self.0 else {
            return Vec::new();
        };
        if news.len() <= most {
            return std::mem::take(news).into_iter().collect();
        }
        let some: Vec<BlockHash> = news.iter().take(most).copied().collect();
        for hash in &some {
            news.remove(hash);
        }
        some
    }
}
