//! A lookup's result: what was found, held in place until it is dropped.

use std::{sync::Arc, time::Instant};

use swiftcache_proto::domain::{Hold, LinkKind, Medium, PinId};

use super::{blocks::BlockId, core::Core};
use crate::{session::Coming, transfer::AreaId};

/// Consecutive blocks of a [`Hit`] that lie in one kind of memory behind one link, and whose hold is the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HitRun {
    /// The memory they lie in.
    pub medium: Medium,
    /// Whether it is the borrower's own, a lease or its host tier, or a lease of a replica.
    pub hold: Hold,
    /// The link they will cross; [`LinkKind::Host`] for the host tier.
    pub link: LinkKind,
    /// How many.
    pub blocks: u32,
}

/// The longest prefix run of a lookup's hashes that can be loaded.
///
/// Own blocks stay in the cache until the last clone of the hit is dropped, unless their donor takes them back.
/// A replica's blocks keep their bytes for a bounded time only: load soon. What cannot be loaded after all shows as
/// failed blocks of the [`Load`](super::Load).
#[derive(Clone, Debug)]
pub struct Hit(pub(super) Arc<HitBlocks>);

/// One found block.
#[derive(Clone, Copy, Debug)]
pub(super) enum HitBlock {
    /// Pinned in the table, wherever it may move.
    Own(BlockId),
    /// In a replica's slab, under the lookup's pin of that number.
    Shared { slab: AreaId, slot: u32, pin: u32 },
}

/// A broker's promise not to let slots of other sessions be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pin {
    pub(super) id: Option<PinId>,
    /// What is read later is worth nothing.
    pub(super) until: Instant,
}

/// What a hit holds. Loads hold it too, until their copies are over.
#[derive(Debug)]
pub(super) struct HitBlocks {
    pub(super) core: Arc<Core>,
    pub(super) blocks: Vec<HitBlock>,
    pub(super) runs: Vec<HitRun>,
    pub(super) pins: Vec<Pin>,
    pub(super) coming: Coming,
}

impl Hit {
    /// Blocks found: the first this many of the hashes asked for.
    pub fn blocks(&self) -> u32 {
        self.0.blocks.len() as u32
    }

    /// How many of the first blocks were the borrower's own. Only their donor can take these back, and no copy of theirs can
    /// come too late.
    pub fn own_blocks(&self) -> u32 {
        let own = self.0.runs.iter().take_while(|run| run.hold == Hold::Own);
        own.map(|run| run.blocks).sum()
    }

    /// Blocks right behind that are on their way from a disk: a lookup that is asked again soon finds them.
    pub fn coming(&self) -> Coming {
        self.0.coming
    }

    /// Where they lay at the time of the lookup, in prefix order.
    pub fn runs(&self) -> &[HitRun] {
        &self.0.runs
    }
}

impl HitBlocks {
    /// Nothing yet, with room for so many blocks.
    pub(super) fn new(core: &Arc<Core>, blocks: usize) -> Self {
        Self {
            core: Arc::clone(core),
            blocks: Vec::with_capacity(blocks),
            runs: Vec::new(),
            pins: Vec::new(),
            coming: Coming::default(),
        }
    }

    pub(super) fn push(&mut self, block: HitBlock, medium: Medium, link: LinkKind) {
        let hold = match block {
            HitBlock::Own(_) => Hold::Own,
            HitBlock::Shared { .. } => Hold::Shared,
        };
        self.blocks.push(block);
        let same = |run: &HitRun| run.medium == medium && run.hold == hold && run.link == link;
        match self.runs.last_mut() {
            Some(run) if same(run) => run.blocks += 1,
            _ => self.runs.push(HitRun {
                medium,
                hold,
                link,
                blocks: 1,
            }),
        }
    }
}

impl Drop for HitBlocks {
    fn drop(&mut self) {
        if !self.core.origin.is_here() {
            return;
        }
        let mut state = self.core.state.lock();
        for block in &self.blocks {
            if let HitBlock::Own(id) = block {
                state.blocks.unpin(*id);
            }
        }
        drop(state);
        let pins: Vec<PinId> = self.pins.iter().filter_map(|pin| pin.id).collect();
        if let Some(session) = &self.core.session {
            session.unpin(&pins);
        }
    }
}
