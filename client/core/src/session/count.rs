//! What a scheduler asks before anything is loaded: how much of a prefix every rank has.

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::{BlockHash, FoundRun};
use tracing::debug;

use super::{Asker, Session};

/// An answer that comes this late is still taken, for the pins that it names.
const LATE: Duration = Duration::from_millis(250);

impl Session {
    /// The longest run of leading blocks that every one of `ranks` can load. The lookups are on their way together, and
    /// pin nothing. 0 on any trouble, and when they are not all there within `limit`.
    ///
    /// Blocks the calling thread, which must not be the session's own.
    pub fn count_hits(&self, ranks: &[Asker], hashes: &[BlockHash], limit: Duration) -> u32 {
        if ranks.is_empty() || hashes.is_empty() {
            return 0;
        }
        let deadline = Instant::now() + limit;
        let (answers, counts) = mpsc::channel();
        for rank in ranks {
            let call = self.find(rank, hashes, limit.max(LATE), true);
            let (session, answers) = (self.clone(), answers.clone());
            // An older broker pins all the same: a late answer is waited for, whether or not anybody still wants it.
            let task = self.shared.runtime.spawn(async move {
                let count = match call.await {
                    Ok(found) => {
                        session.unpin(&Vec::from_iter(found.pin));
                        found.runs.iter().map(FoundRun::blocks).sum()
                    }
                    Err(error) => {
                        debug!(%error, "counting hits");
                        0
                    }
                };
                // Nobody is there any more after the deadline.
                let _ = answers.send(count);
            });
            drop(task);
        }
        drop(answers);
        let mut least = u32::MAX;
        for _ in ranks {
            let left = deadline.saturating_duration_since(Instant::now());
            least = least.min(counts.recv_timeout(left).unwrap_or(0));
            if least == 0 {
                break;
            }
        }
        least
    }
}
