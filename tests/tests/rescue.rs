//! A revocation keeps what is hot, of all slabs that are revoked together, whole; and only where blocks are moved.

use anyhow::{Result, ensure};
use swiftcache_tests::rescue::{BLOCKS, ROOM, found_after_revocation};

#[test]
fn the_hottest_survive_a_revocation_whole_and_only_where_blocks_are_moved() -> Result<()> {
    let moved = found_after_revocation(true)?;
    let (hot, cold) = moved.split_at(ROOM as usize);
    ensure!(hot.iter().all(|blocks| *blocks == BLOCKS), "{moved:?}");
    ensure!(cold.iter().all(|blocks| *blocks == 0), "{moved:?}");
    // Its twin: dropped at once.
    let dropped = found_after_revocation(false)?;
    ensure!(dropped.iter().all(|blocks| *blocks == 0), "{dropped:?}");
    Ok(())
}
