//! Tells the broker what this borrower is and which blocks its host tier has, so that others of its tenant can ask what
//! it can load.
//!
//! The host tier itself is the truth; the broker's copy follows it within a tick of the keeper, which is the only one to
//! tell it and waits for each answer. After every connection, and after every answer that did not come, it is told anew.

use std::time::{Duration, Instant};

use swiftcache_proto::{
    convert::MAX_BLOCKS,
    domain::{BlockHash, Medium},
};
use tonic::Code;
use tracing::{debug, warn};

use super::{
    blocks::BlockId,
    core::{Core, KeeperTask},
    news::Phase,
    shelf::Shelf,
    state::State,
};
use crate::{
    Error,
    session::{Call, Keep, Session},
    transfer::{Route, RouteSet},
};

/// When to tell again after the broker did not take it.
const TELL_AGAIN: Duration = Duration::from_secs(1);

impl State {
    /// Whether the host tier has the block, all of it. What lies in leases is published instead.
    fn keeps(&self, hash: &BlockHash) -> bool {
        let in_tier = |id: BlockId| {
            let block = self.blocks.get(id);
            let place = block.place.filter(|_| block.ready);
            let shelf = place.and_then(|place| self.shelves.get(place.slab));
            shelf.is_some_and(Shelf::is_host_tier)
        };
        self.blocks.find(hash).is_some_and(in_tier)
    }

    fn all_kept(&self) -> Vec<BlockHash> {
        let hashes = self.blocks.all().map(|id| self.blocks.hash(id));
        hashes.filter(|hash| self.keeps(hash)).collect()
    }
}

impl Core {
    /// Tells the broker what it does not know yet.
    pub(super) fn tell_kept(&self) {
        while let Some(session) = self.connected() {
            let Some(keep) = self.next_to_tell() else {
                return;
            };
            let told = session.keep(keep.clone()).wait();
            if !self.was_told(keep, told) {
                return;
            }
        }
    }

    /// The next message, if there is anything to say.
    fn next_to_tell(&self) -> Option<Keep> {
        let mut state = self.state.lock();
        let anew = match state.told.phase {
            Phase::Abreast => false,
            Phase::Anew => true,
            Phase::Later(when) if Instant::now() >= when => true,
            Phase::Later(_) | Phase::Deaf => return None,
        };
        let up = state.routes_up();
        let mut keep = self.as_it_is(up);
        let routes_changed = std::mem::replace(&mut state.told.up, up) != up;
        if anew {
            state.told.kept.clear();
            state.blocks.host_news.take(usize::MAX);
            keep.anew = true;
            keep.kept = state.all_kept();
            // The rest is news like any other.
            for hash in keep.kept.split_off(keep.kept.len().min(MAX_BLOCKS)) {
                state.blocks.host_news.add(hash);
            }
            return Some(keep);
        }
        let news = state.blocks.host_news.take(MAX_BLOCKS);
        for hash in news {
            match (state.keeps(&hash), state.told.kept.contains(&hash)) {
                (true, false) => keep.kept.push(hash),
                (false, true) => keep.dropped.push(hash),
                _ => {}
            }
        }
        let news = !keep.kept.is_empty() || !keep.dropped.is_empty() || routes_changed;
        news.then_some(keep)
    }

    /// Takes note of the answer. Whether there is any point in going on.
    fn was_told(&self, keep: Keep, told: Result<(), Error>) -> bool {
        let mut state = self.state.lock();
        match told {
            Ok(()) => {
                for hash in &keep.dropped {
                    state.told.kept.remove(hash);
                }
                state.told.kept.extend(keep.kept);
                state.told.phase = Phase::Abreast;
                return true;
            }
            Err(Error::Refused { status, .. }) => match status.code() {
                Code::Unimplemented => {
                    debug!("the broker is too old to be told of the host tier");
                    state.told.phase = Phase::Deaf;
                }
                Code::PermissionDenied => {
                    let problem = status.message();
                    warn!(
                        borrower = %self.id, problem,
                        "another session has this borrower's id: its host tier is not found by others"
                    );
                    state.told.phase = Phase::Deaf;
                }
                _ => {
                    debug!(%status, "the broker did not take what the host tier has");
                    state.told.phase = Phase::Later(Instant::now() + TELL_AGAIN);
                }
            },
            Err(error) => {
                debug!(%error, "the broker was not told what the host tier has");
                state.told.phase = Phase::Later(Instant::now() + TELL_AGAIN);
            }
        }
        false
    }

    /// Has the keeper tell, if there is news.
    pub(super) fn tell_soon(&self) {
        if !self.state.lock().blocks.host_news.is_empty() {
            // A keeper that is gone means that the borrower is closing.
            let _ = self.keeper.send(KeeperTask::Tell);
        }
    }

    /// Tells the broker that the borrower is closed: it forgets it.
    pub(super) fn tell_closed(&self, session: &Session) -> Option<Call<()>> {
        if self.state.lock().told.phase == Phase::Deaf {
            return None;
        }
        let keep = Keep {
            closed: true,
            ..self.as_it_is(RouteSet::ALL)
        };
        Some(session.keep(keep))
    }

    fn as_it_is(&self, up: RouteSet) -> Keep {
        let down = self.routes.all_but(up);
        // The host memory of donors is a device like any other.
        let to_host =
            |route: &Route| route.medium == Medium::Host && route.device == self.config.device;
        Keep {
            borrower: self.id,
            namespace: self.config.layout.namespace.clone(),
            device: self.config.device.clone(),
            block_bytes: self.config.layout.block_bytes(),
            shares: self.config.share,
            anew: false,
            kept: Vec::new(),
            dropped: Vec::new(),
            closed: false,
            layer_bytes: self.config.layout.layer_bytes.clone(),
            host_down: down.iter().any(|route| to_host(route)),
            down: (down.iter())
                .filter(|route| !to_host(route))
                .map(|route| route.device.clone())
                .collect(),
        }
    }
}
