//! Revokes every slab of a borrower, and counts the blocks that it still finds. This shows what moving blocks out of
//! revoked slabs gains.

use anyhow::{Result, ensure};
use swiftcache_client::donor::{Donor, DonorConfig};

use crate::{
    PATIENCE,
    engine::{self, BLOCK_BYTES, Engine, SLAB_BYTES, eventually},
    node::Node,
};

/// Conversations. Each fills one slab.
pub const CONVERSATIONS: u32 = 8;
/// Blocks of each conversation.
pub const BLOCKS: u32 = 16;
/// Conversations that the host tier has room for.
pub const ROOM: u32 = 2;

/// How often a conversation is asked for. The first two are hot.
#[must_use]
pub fn asked(conversation: u32) -> u32 {
    if conversation < ROOM { 3 } else { 1 }
}

fn sequence(conversation: u32) -> Vec<u32> {
    (0..BLOCKS).map(|n| conversation * 1_000 + n).collect()
}

/// How many blocks of each conversation are found after all slabs were revoked. `move_blocks` says whether the borrower
/// moves blocks out of revoked slabs.
///
/// # Errors
/// When a byte is wrong, or the donor does not get everything back.
pub fn found_after_revocation(move_blocks: bool) -> Result<Vec<u32>> {
    let node = Node::start(&[])?;
    let config = DonorConfig {
        device: node.device(1),
        slab_bytes: SLAB_BYTES,
        drain: PATIENCE,
        handle: None,
    };
    let donor = Donor::open(node.session("donor")?, node.layer()?, config)?;
    donor.grow(u64::from(CONVERSATIONS) * SLAB_BYTES)?;
    let mut config = engine::config(node.device(0), CONVERSATIONS.into());
    config.host_tier_bytes = u64::from(ROOM * BLOCKS) * BLOCK_BYTES;
    config.drain.move_blocks = move_blocks;
    let engine = Engine::new(Some(node.session("engine")?), node.layer()?, config)?;
    engine.reserve(CONVERSATIONS.into())?;
    for conversation in 0..CONVERSATIONS {
        ensure!(engine.store(&sequence(conversation))?.stored == BLOCKS);
    }
    // The conversations that are fetched most often are not those that are fetched last.
    for conversation in 0..CONVERSATIONS {
        for _ in 0..asked(conversation) {
            ensure!(engine.fetch(&sequence(conversation))?.served == BLOCKS);
        }
    }
    donor.shrink(u64::from(CONVERSATIONS) * SLAB_BYTES)?;
    eventually("every slab to be back", || {
        Ok(donor.status().returned == u64::from(CONVERSATIONS))
    })?;
    let found = |conversation| {
        let fetched = engine.fetch(&sequence(conversation))?;
        ensure!(fetched.found == fetched.served, "{fetched:?}");
        Ok(fetched.served)
    };
    (0..CONVERSATIONS).map(found).collect()
}
