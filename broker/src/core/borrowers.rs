//! Borrowers: what each of them can load, as it said itself.
//!
//! An engine's scheduler and its workers are different processes with different sessions. A lookup that names a
//! borrower is answered as that borrower would be, whoever of its tenant asks.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
};

use foldhash::fast::RandomState;
use swiftcache_proto::domain::{BlockHash, BorrowerId, SessionId};

use super::{Keep, Refusal, Reply, check::hold, state::State};

/// Hashes of blocks.
pub(super) type Kept = HashSet<BlockHash, RandomState>;

#[derive(Clone, Debug)]
pub(super) struct Borrower {
    pub(super) session: SessionId,
    pub(super) namespace: Arc<str>,
    /// The device it computes on; `None`: one that is not among the node's.
    pub(super) device: Option<usize>,
    pub(super) block_bytes: u64,
    /// It reads leases of other sessions.
    pub(super) shares: bool,
    /// The blocks in its own host memory.
    pub(super) kept: Kept,
    /// Devices whose memory it cannot copy from now.
    pub(super) down: Vec<usize>,
    /// The same of its own host memory.
    pub(super) host_down: bool,
}

impl Borrower {
    fn is_like(&self, other: &Self) -> bool {
        (self.session, &self.namespace, self.device, self.block_bytes)
            == (
                other.session,
                &other.namespace,
                other.device,
                other.block_bytes,
            )
    }
}

/// All borrowers that said what they are.
#[derive(Clone, Debug, Default)]
pub(super) struct Borrowers {
    known: BTreeMap<BorrowerId, Borrower>,
    by_session: BTreeSet<(SessionId, BorrowerId)>,
    /// The blocks that all of them keep.
    kept: u64,
}

impl Borrowers {
    pub(super) fn get(&self, id: BorrowerId) -> Option<&Borrower> {
        self.known.get(&id)
    }

    /// The blocks in the host memory of all borrowers.
    pub(super) fn kept(&self) -> u64 {
        self.kept
    }

    /// Takes what a borrower is instead of what it was, with the blocks that it kept if it is still the same.
    fn open(&mut self, id: BorrowerId, mut borrower: Borrower) -> &mut Borrower {
        let before = self.known.remove(&id);
        match before {
            Some(before) if before.is_like(&borrower) => borrower.kept = before.kept,
            Some(before) => self.kept -= before.kept.len() as u64,
            None => {}
        }
        self.by_session.insert((borrower.session, id));
        self.known.entry(id).or_insert(borrower)
    }

    pub(super) fn close(&mut self, id: BorrowerId) {
        if let Some(borrower) = self.known.remove(&id) {
            self.by_session.remove(&(borrower.session, id));
            self.kept -= borrower.kept.len() as u64;
        }
    }

    /// The borrowers of a session.
    pub(super) fn of(&self, session: SessionId) -> impl Iterator<Item = (BorrowerId, &Borrower)> {
        let ids = [[0; 16], [u8::MAX; 16]].map(|id| (session, BorrowerId(id)));
        let its = self.by_session.range(ids[0]..=ids[1]);
        its.map(|(_, id)| (*id, &self.known[id]))
    }

    /// Verifies what is counted, and that every borrower's session satisfies `lives`.
    pub(super) fn check(&self, lives: impl Fn(SessionId) -> bool) -> Result<(), String> {
        let kept: usize = self
            .known
            .values()
            .map(|borrower| borrower.kept.len())
            .sum();
        hold!(kept as u64 == self.kept, "kept blocks are miscounted");
        let filed = self
            .known
            .iter()
            .map(|(id, borrower)| (borrower.session, *id));
        hold!(
            filed.collect::<BTreeSet<_>>() == self.by_session,
            "borrowers are misfiled"
        );
        for (id, borrower) in &self.known {
            hold!(lives(borrower.session), "borrower {id} belongs to nobody");
        }
        Ok(())
    }
}

impl State {
    pub(super) fn keep(&mut self, keep: Keep) -> Result<Reply, Refusal> {
        self.session_of(keep.caller)?;
        let session = keep.caller.session;
        let known = self.borrowers.get(keep.borrower);
        if known.is_some_and(|known| known.session != session) {
            return Err(Refusal::NotYours {
                what: "borrower",
                which: keep.borrower.to_string(),
            });
        }
        if keep.closed {
            self.borrowers.close(keep.borrower);
            return Ok(Reply::Done);
        }
        let limit = |what, limit| Err(Refusal::Limit { what, limit });
        let most = self.config.max_borrowers_per_session;
        if known.is_none() && self.borrowers.of(session).count() >= most {
            return limit("borrowers of one session", most as u64);
        }
        let findable = self.index.blocks() + self.borrowers.kept() + keep.kept.len() as u64;
        if findable > self.config.max_blocks {
            return limit("indexed blocks", self.config.max_blocks);
        }
        let borrower = Borrower {
            session,
            namespace: keep.namespace.into(),
            device: self.devices.number(&keep.device).ok(),
            block_bytes: keep.block_bytes,
            shares: keep.shares,
            kept: Kept::default(),
            // One that the broker does not know has nothing on it that could be found.
            down: (keep.down.iter())
                .filter_map(|uuid| self.devices.number(uuid).ok())
                .collect(),
            host_down: keep.host_down,
        };
        let borrower = self.borrowers.open(keep.borrower, borrower);
        let before = borrower.kept.len() as u64;
        if keep.anew {
            borrower.kept = Kept::default();
        }
        for hash in &keep.dropped {
            borrower.kept.remove(hash);
        }
        borrower.kept.extend(keep.kept);
        let after = borrower.kept.len() as u64;
        self.borrowers.kept = self.borrowers.kept + after - before;
        Ok(Reply::Done)
    }

    /// The session is over: so are its borrowers.
    pub(super) fn close_borrowers_of(&mut self, session: SessionId) {
        let its: Vec<_> = self.borrowers.of(session).map(|(id, _)| id).collect();
        for id in its {
            self.borrowers.close(id);
        }
    }
}
