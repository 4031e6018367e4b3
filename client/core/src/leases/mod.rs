//! Leases: slabs that donors lend, mapped once and given back, and replicas' slabs opened for reading.
//!
//! * [`Leases`] keeps the table of slabs behind a lock of its own (`state`, `slabs`).
//! * A thread takes over what its predecessor left (`inheriting`), leases more and gives back what nobody uses (`growth`), and opens
//!   replicas' slabs (`sharing`). What it is granted, it maps (`adopting`).
//! * Another one lets go of slabs that are asked back: no transfer that touches one begins from the moment of the revocation on
//!   (`recall`), its [`Holder`] moves out what is worth it, and it is unmapped and acknowledged when the last transfer is known to be
//!   over (`drain`).
//!
//! What lies in a slab is its holder's business: nothing here knows what a block's hash is. A holder may call in here with its own
//! lock held. It is called with none of this room's locks held.

mod adopting;
mod core;
mod drain;
mod growth;
mod holder;
mod inheriting;
mod mapping;
mod probe;
mod recall;
mod sharing;
mod slabs;
mod state;
#[cfg(test)]
mod tests;
mod unreadable;

use std::sync::Arc;

use self::core::{GrowthTask, Inboxes, RecallTask};
use crate::{
    Result,
    session::{Observer, Session},
    threads::Threads,
};

pub(crate) use self::core::{LeaseSettings, Leases};
pub(crate) use holder::{Arrival, Holder, Progress, Wants};
pub(crate) use slabs::{Flight, LeaseKey};

/// The threads of [`Leases`].
#[derive(Debug)]
pub(crate) struct LeaseThreads {
    growth: Threads,
    recall: Threads,
}

impl LeaseThreads {
    /// Begins to lease slabs for `holder`, and to let go of what is asked back.
    ///
    /// # Errors
    /// When the system gives no more threads: none is left then.
    pub(crate) fn start(
        leases: &Arc<Leases>,
        holder: &Arc<dyn Holder>,
        inboxes: Inboxes,
    ) -> Result<Self> {
        let mut threads = Self {
            growth: Threads::new(),
            recall: Threads::new(),
        };
        let (leases_of, holder_of) = (Arc::clone(leases), Arc::clone(holder));
        let recalls = inboxes.recalls;
        threads.recall.start("swiftcache-drain", move || {
            leases_of.drain_loop(&*holder_of, &recalls);
        })?;
        let (leases_of, holder_of) = (Arc::clone(leases), Arc::clone(holder));
        let tasks = inboxes.tasks;
        let growth = threads.growth.start("swiftcache-lease", move || {
            leases_of.growth_loop(&*holder_of, &tasks);
        });
        if let Err(error) = growth {
            threads.stop_growing(leases);
            leases.close();
            threads.recall.join();
            return Err(error);
        }
        Ok(threads)
    }

    /// Takes no more leases, from when this returns on.
    pub(crate) fn stop_growing(&mut self, leases: &Leases) {
        // A thread that is gone needs no telling.
        let _ = leases.tasks.send(GrowthTask::Stop);
        self.growth.join();
    }

    /// The threads that end when every slab is let go of, which [`Leases::close`] begins.
    pub(crate) fn recall(&mut self) -> &mut Threads {
        &mut self.recall
    }
}

impl Leases {
    /// Follows what the session says of leases.
    pub(crate) fn observe(self: &Arc<Self>, session: &Session) {
        let observer: Arc<dyn Observer> = Arc::clone(self) as _;
        session.observe(&observer);
    }

    /// Begins to let go of every slab: no transfer begins any more.
    pub(crate) fn close(&self) {
        let _ = self.recalls.send(RecallTask::Close);
    }
}
