//! What a scheduler asks before anything is loaded: how much of a prefix every rank has.

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use swiftcache_proto::{
    domain::{BlockHash, FoundRun, Hold, Medium},
    traffic::Traffic,
};
use tracing::debug;

use super::{Asker, Coming, Session};

/// An answer that comes this late is still taken, for the pins that it names.
const LATE: Duration = Duration::from_millis(250);

impl Session {
    /// The longest run of leading blocks that every one of `ranks` can load. The lookups are on their way together, and
    /// pin nothing. 0 on any trouble, and when they are not all there within `limit`.
    ///
    /// What was asked and found is reported to the broker, for operators: of each rank, since each loads its own part.
    ///
    /// Blocks the calling thread, which must not be the session's own.
    pub fn count_hits(&self, ranks: &[Asker], hashes: &[BlockHash], limit: Duration) -> u32 {
        self.count(ranks, hashes, limit).blocks
    }

    /// Like [`count_hits`](Self::count_hits), and how much more there would be if it were asked again soon.
    pub fn count(&self, ranks: &[Asker], hashes: &[BlockHash], limit: Duration) -> Counted {
        if ranks.is_empty() || hashes.is_empty() {
            return Counted::default();
        }
        let deadline = Instant::now() + limit;
        let (answers, heard) = mpsc::channel();
        for rank in ranks {
            let call = self.find(rank, hashes, limit.max(LATE), true);
            let (session, answers) = (self.clone(), answers.clone());
            // An older broker pins all the same: a late answer is waited for, whether or not anybody still wants it.
            let task = self.shared.runtime.spawn(async move {
                let found = match call.await {
                    Ok(found) => {
                        session.unpin(&Vec::from_iter(found.pin));
                        (found.runs, found.coming)
                    }
                    Err(error) => {
                        debug!(%error, "counting hits");
                        Default::default()
                    }
                };
                // Nobody is there any more after the deadline.
                let _ = answers.send(found);
            });
            drop(task);
        }
        drop(answers);
        let mut found = Vec::new();
        let mut least = u32::MAX;
        // With what is on its way to each.
        let mut least_soon = u32::MAX;
        let mut within = Duration::ZERO;
        for _ in ranks {
            let left = deadline.saturating_duration_since(Instant::now());
            let (runs, coming) = heard.recv_timeout(left).unwrap_or_default();
            let its: u32 = runs.iter().map(FoundRun::blocks).sum();
            least = least.min(its);
            least_soon = least_soon.min(its.saturating_add(coming.blocks));
            within = within.max(coming.within);
            found.push(runs);
            if least_soon == 0 {
                break;
            }
        }
        let mut looked = Traffic {
            lookup_blocks: (ranks.len() * hashes.len()) as u64,
            ..Traffic::default()
        };
        for runs in &found {
            count(runs, least, &mut looked);
        }
        self.moved(looked);
        Counted {
            blocks: least,
            coming: Coming {
                blocks: least_soon - least,
                within,
            },
        }
    }
}

/// How much of a prefix every rank has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Blocks that every rank can load now.
    pub blocks: u32,
    /// Blocks right behind that are on their way from a disk.
    pub coming: Coming,
}

/// Counts the first `blocks` of what one rank found, by tier.
fn count(runs: &[FoundRun], blocks: u32, looked: &mut Traffic) {
    let mut left = blocks;
    for run in runs {
        let blocks = run.blocks().min(left);
        left -= blocks;
        let tier = match run {
            FoundRun::Leased {
                hold: Hold::Shared, ..
            } => &mut looked.replica_blocks,
            FoundRun::Leased {
                medium: Medium::Hbm,
                ..
            } => &mut looked.own_blocks,
            FoundRun::Leased {
                medium: Medium::Host,
                ..
            }
            | FoundRun::Kept { .. } => &mut looked.host_blocks,
        };
        *tier += u64::from(blocks);
    }
}
