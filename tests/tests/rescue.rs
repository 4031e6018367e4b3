//! When many slabs are revoked together, the hottest conversations survive as a whole, and only if blocks are moved.

use anyhow::{Result, ensure};
use swiftcache_tests::rescue::{BLOCKS, ROOM, found_after_revocation};

const ATTEMPTS: u32 = 10;

#[test]
fn the_hottest_survive_a_revocation_whole_and_only_where_blocks_are_moved() -> Result<()> {
    // The borrower chooses among the revocations that it has received. On a slow machine it may receive them one at a
    // time and choose otherwise, so this tries again.
    let mut hottest_survived = false;
    let mut moved = Vec::new();
    for _ in 0..ATTEMPTS {
        moved = found_after_revocation(true)?;
        let (hot, cold) = moved.split_at(ROOM as usize);
        hottest_survived =
            hot.iter().all(|blocks| *blocks == BLOCKS) && cold.iter().all(|blocks| *blocks == 0);
        if hottest_survived {
            break;
        }
    }
    ensure!(hottest_survived, "{moved:?}");
    // Its twin: all blocks are dropped at once.
    let dropped = found_after_revocation(false)?;
    ensure!(dropped.iter().all(|blocks| *blocks == 0), "{dropped:?}");
    Ok(())
}
