//! A revocation keeps what is hot, of all slabs that are revoked together, whole; and only where blocks are moved.

use anyhow::{Result, ensure};
use swiftcache_tests::rescue::{BLOCKS, ROOM, found_after_revocation};

const ATTEMPTS: u32 = 10;

#[test]
fn the_hottest_survive_a_revocation_whole_and_only_where_blocks_are_moved() -> Result<()> {
    // The hottest of those that the borrower has heard of: a machine that hands it one revocation at a time decides
    // otherwise, and is asked again.
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
    // Its twin: dropped at once.
    let dropped = found_after_revocation(false)?;
    ensure!(dropped.iter().all(|blocks| *blocks == 0), "{dropped:?}");
    Ok(())
}
