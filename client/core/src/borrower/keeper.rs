//! A borrower's background threads: one that lets go, one that settles copies nobody waited for, and one that keeps
//! the leases, the index and the slots in order.

use std::{
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use swiftcache_proto::domain::LeaseId;

use super::{
    core::{Core, Inboxes, Leftover},
    drain::DrainTask,
};
use crate::{Error, Result};

/// How often slots that had to wait are looked at, and room is checked.
const TICK: Duration = Duration::from_millis(50);

/// How often blocks on their way to donors are looked after.
const PROMOTING: Duration = Duration::from_millis(5);

/// What the keeper is asked to do.
#[derive(Debug)]
pub(super) enum KeeperTask {
    /// Stores are short of room.
    Grow,
    /// Lease up to this many bytes in all, and say how many there are.
    Reserve {
        bytes: u64,
        reply: mpsc::SyncSender<u64>,
    },
    /// The session is connected (again).
    Connected {
        restarted: bool,
    },
    /// The broker does not know yet what the host tier has.
    Tell,
    /// A replica's lease is not read after all.
    GiveBack {
        lease: LeaseId,
        /// This process cannot map it.
        unmappable: bool,
    },
    Stop,
}

/// The threads, to be joined when the borrower closes.
#[derive(Debug)]
pub(super) struct Threads(Vec<JoinHandle<()>>);

impl Threads {
    pub(super) fn start(core: &Arc<Core>, inboxes: Inboxes) -> Result<Self> {
        let Inboxes {
            drains,
            keeper,
            leftovers,
        } = inboxes;
        let mut threads = Self(Vec::new());
        let started = [
            spawn(core, "swiftcache-drain", move |core| {
                core.drain_loop(&drains);
            }),
            spawn(core, "swiftcache-keep", move |core| core.keep_loop(&keeper)),
            spawn(core, "swiftcache-settle", move |core| {
                core.settle_loop(&leftovers);
            }),
        ];
        let mut refused = None;
        for thread in started {
            match thread {
                Ok(thread) => threads.0.push(thread),
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            None => Ok(threads),
            Some(error) => {
                threads.stop(core);
                Err(error)
            }
        }
    }

    /// Stops the threads after what they have begun, and waits for them.
    pub(super) fn stop(&mut self, core: &Core) {
        // A thread that is gone needs no telling.
        let _ = core.drains.send(DrainTask::Stop);
        let _ = core.keeper.send(KeeperTask::Stop);
        let _ = core.leftovers.send(None);
        for thread in self.0.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn spawn(
    core: &Arc<Core>,
    name: &str,
    work: impl FnOnce(&Arc<Core>) + Send + 'static,
) -> Result<JoinHandle<()>> {
    let core = Arc::clone(core);
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || work(&core))
        .map_err(Error::Thread)
}

impl Core {
    fn keep_loop(self: &Arc<Self>, inbox: &mpsc::Receiver<KeeperTask>) {
        let mut pause = TICK;
        let mut promotion = None;
        loop {
            match inbox.recv_timeout(pause) {
                Ok(KeeperTask::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Ok(KeeperTask::Connected { restarted }) => {
                    {
                        let mut state = self.state.lock();
                        state.grow_after = std::time::Instant::now();
                        state.told.start_anew();
                    }
                    self.tell_kept();
                    self.publish_again(restarted);
                }
                Ok(KeeperTask::Reserve { bytes, reply }) => {
                    while self.state.lock().usable_bytes() < bytes && self.grow() {}
                    // The caller may have given up.
                    let _ = reply.send(self.state.lock().usable_bytes());
                }
                Ok(KeeperTask::GiveBack { lease, unmappable }) => {
                    self.tell_unread(lease, unmappable);
                }
                Ok(KeeperTask::Grow | KeeperTask::Tell) | Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            self.tell_kept();
            while self.wants_room(&self.state.lock()) && self.grow() {}
            promotion = self.promote(promotion);
            pause = match &promotion {
                Some(_) => PROMOTING,
                None => TICK,
            };
            self.unpublish_due();
            self.release_idle();
            self.report();
        }
    }

    /// Passes on to the session what was moved since it last was: here, and not where it is moved.
    pub(super) fn report(&self) {
        if let Some(session) = &self.session {
            let mut state = self.state.lock();
            let traffic = state.counts.traffic();
            let more = traffic.since(&state.reported);
            state.reported = traffic;
            drop(state);
            session.moved(more);
        }
    }

    fn settle_loop(self: &Arc<Self>, inbox: &mpsc::Receiver<Option<Leftover>>) {
        while let Ok(Some(leftover)) = inbox.recv() {
            self.settle(&leftover.op);
        }
    }
}
