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

use super::check::hold;

/// Hashes of blocks.
pub(super) type Kept = HashSet<BlockHash, RandomState>;

#[derive(Clone, Debug)]
pub(super) struct Borrower {
    nature: Nature,
    /// The blocks in its own host memory.
    kept: Kept,
}

/// What a borrower is.
#[derive(Clone, Debug)]
pub(super) struct Nature {
    pub(super) session: SessionId,
    pub(super) namespace: Arc<str>,
    /// The device it computes on; `None`: one that is not among the node's.
    pub(super) device: Option<usize>,
    pub(super) block_bytes: u64,
    /// It reads leases of other sessions.
    pub(super) shares: bool,
    /// Devices whose memory it cannot copy from now.
    pub(super) down: Vec<usize>,
    /// The same of its own host memory.
    pub(super) host_down: bool,
    /// It can map host memory of donors.
    pub(super) host_memory: bool,
    /// Bytes of one block in each layer; empty when it did not say.
    pub(super) layer_bytes: Arc<[u64]>,
}

impl Borrower {
    pub(super) fn session(&self) -> SessionId {
        self.nature.session
    }

    pub(super) fn namespace(&self) -> &Arc<str> {
        &self.nature.namespace
    }

    /// The device it computes on; `None`: one that is not among the node's.
    pub(super) fn device(&self) -> Option<usize> {
        self.nature.device
    }

    pub(super) fn block_bytes(&self) -> u64 {
        self.nature.block_bytes
    }

    /// Whether it reads leases of other sessions.
    pub(super) fn shares(&self) -> bool {
        self.nature.shares
    }

    /// Devices whose memory it cannot copy from now.
    pub(super) fn down(&self) -> &[usize] {
        &self.nature.down
    }

    /// Whether it can map host memory of donors.
    pub(super) fn maps_host_memory(&self) -> bool {
        self.nature.host_memory
    }

    /// Bytes of one block in each layer, if it said.
    pub(super) fn layer_bytes(&self) -> Option<&Arc<[u64]>> {
        let layers = &self.nature.layer_bytes;
        (!layers.is_empty()).then_some(layers)
    }

    /// The blocks in its own host memory, if it can copy from there now.
    pub(super) fn kept(&self) -> Option<&Kept> {
        (!self.nature.host_down).then_some(&self.kept)
    }
}

impl Nature {
    /// Whether blocks kept by one are blocks of the other.
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

    pub(super) fn iter(&self) -> impl Iterator<Item = &Borrower> {
        self.known.values()
    }

    /// The blocks in the host memory of a session's borrowers.
    pub(super) fn kept_by(&self, session: SessionId) -> u64 {
        let its = self.of(session).map(|(_, borrower)| borrower.kept.len());
        its.sum::<usize>() as u64
    }

    /// The blocks in the host memory of all borrowers.
    pub(super) fn kept(&self) -> u64 {
        self.kept
    }

    /// Takes what a borrower is, in place of what it was, and what is new about the blocks that it keeps. Those that it
    /// kept before stay if it is still the same and does not begin `anew`.
    pub(super) fn keep(
        &mut self,
        id: BorrowerId,
        nature: Nature,
        anew: bool,
        dropped: &[BlockHash],
        kept: Vec<BlockHash>,
    ) {
        let before = self.known.get_mut(&id);
        let before = before.map(|known| (std::mem::take(&mut known.kept), &known.nature));
        let mut all = match before {
            Some((blocks, known)) => {
                self.kept -= blocks.len() as u64;
                let same = known.is_like(&nature) && !anew;
                if same { blocks } else { Kept::default() }
            }
            None => Kept::default(),
        };
        for hash in dropped {
            all.remove(hash);
        }
        all.extend(kept);
        self.kept += all.len() as u64;
        self.by_session.insert((nature.session, id));
        let borrower = Borrower { nature, kept: all };
        self.known.insert(id, borrower);
    }

    pub(super) fn close(&mut self, id: BorrowerId) {
        if let Some(borrower) = self.known.remove(&id) {
            self.by_session.remove(&(borrower.session(), id));
            self.kept -= borrower.kept.len() as u64;
        }
    }

    /// The borrowers of a session.
    pub(super) fn of(&self, session: SessionId) -> impl Iterator<Item = (BorrowerId, &Borrower)> {
        let ids = [[0; 16], [u8::MAX; 16]].map(|id| (session, BorrowerId(id)));
        let its = self.by_session.range(ids[0]..=ids[1]);
        its.map(|(_, id)| (*id, &self.known[id]))
    }

    /// The session is over: so are its borrowers.
    pub(super) fn close_all_of(&mut self, session: SessionId) {
        let its: Vec<_> = self.of(session).map(|(id, _)| id).collect();
        for id in its {
            self.close(id);
        }
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
            .map(|(id, borrower)| (borrower.session(), *id));
        hold!(
            filed.collect::<BTreeSet<_>>() == self.by_session,
            "borrowers are misfiled"
        );
        for (id, borrower) in &self.known {
            hold!(lives(borrower.session()), "borrower {id} belongs to nobody");
        }
        Ok(())
    }
}
