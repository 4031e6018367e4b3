//! The journal of the index: what has become findable and what is found no more, so that those who watch need not ask again
//! and again. Its length is bounded: who falls behind takes the index anew.

use std::{collections::VecDeque, sync::Arc};

use swiftcache_proto::domain::{BlockHash, Medium};

/// Whose blocks these are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    /// The whole tenant.
    pub tenant: Arc<str>,
    /// The model fingerprint.
    pub namespace: Arc<str>,
}

/// A block that can be found in a kind of memory from now on, or no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Whose it is.
    pub scope: Arc<Scope>,
    /// The kind of memory.
    pub medium: Medium,
    /// The block.
    pub hash: BlockHash,
    /// It has a copy more there. Otherwise its last copy there is gone.
    pub added: bool,
}

/// The last changes. They are numbered from 1.
#[derive(Clone, Debug)]
pub(super) struct Journal {
    changes: VecDeque<Change>,
    /// The number of the last one.
    sequence: u64,
    /// How many are kept.
    most: usize,
}

impl Journal {
    pub(super) fn new(most: usize) -> Self {
        Self {
            changes: VecDeque::new(),
            sequence: 0,
            most,
        }
    }

    /// The number of the last change.
    pub(super) fn sequence(&self) -> u64 {
        self.sequence
    }

    pub(super) fn push(&mut self, change: Change) {
        if self.changes.len() >= self.most {
            self.changes.pop_front();
        }
        self.changes.push_back(change);
        self.sequence += 1;
    }

    /// The changes after the one with a number, the oldest first. `None`: some of them are forgotten, or the number is not
    /// of this journal.
    pub(super) fn after(&self, number: u64) -> Option<impl Iterator<Item = &Change>> {
        let missing = usize::try_from(self.sequence.checked_sub(number)?).ok()?;
        let first = self.changes.len().checked_sub(missing)?;
        Some(self.changes.range(first..))
    }
}
