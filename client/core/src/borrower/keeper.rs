//! A borrower's background threads: one that lets go, one that settles copies nobody waited for, and one that keeps
//! the leases, the index and the slots in order.

use std::{
    sync::{Arc, mpsc},
    thread::{self, JoinHandle},
    time::Duration,
};

use parking_lot::Mutex;
use swiftcache_proto::domain::LeaseId;
use tracing::warn;

use super::{
    core::{Core, Inboxes},
    drain::DrainTask,
    probe::Prober,
};
use crate::{Error, Result};

/// How often slots that had to wait are looked at, and room is checked.
const TICK: Duration = Duration::from_millis(50);

/// How often the keeper's own copies are looked after.
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

/// How long closing a borrower waits for its last copies and calls.
const CLOSING: Duration = Duration::from_secs(10);

/// The threads.
#[derive(Debug)]
pub(super) struct Threads {
    keeper: Option<JoinHandle<()>>,
    /// Those that wait for copies.
    copies: Vec<JoinHandle<()>>,
    /// Disconnected when the last of these has ended.
    ended: Mutex<mpsc::Receiver<()>>,
}

impl Threads {
    pub(super) fn start(core: &Arc<Core>, inboxes: Inboxes) -> Result<Self> {
        let Inboxes {
            drains,
            keeper,
            leftovers,
        } = inboxes;
        let (lives, ended) = mpsc::channel();
        let mut threads = Self {
            keeper: None,
            copies: Vec::new(),
            ended: Mutex::new(ended),
        };
        let life = lives.clone();
        let start = || {
            let drain = spawn(core, "swiftcache-drain", move |core| {
                core.drain_loop(&drains);
                drop(life);
            })?;
            threads.copies.push(drain);
            let settle = spawn(core, "swiftcache-settle", move |core| {
                core.settle_loop(&leftovers);
                drop(lives);
            })?;
            threads.copies.push(settle);
            let keep = spawn(core, "swiftcache-keep", move |core| core.keep_loop(&keeper))?;
            threads.keeper = Some(keep);
            Ok(())
        };
        match start() {
            Ok(()) => Ok(threads),
            Err(error) => {
                threads.stop(core);
                Err(error)
            }
        }
    }

    /// Closes the borrower. On return no copy of it is in flight and no lease of it is mapped. Or that is not known after
    /// ten seconds: then the threads go on by themselves until it is, and keep the session and the leases as long.
    pub(super) fn stop(&mut self, core: &Core) {
        // A thread that is gone needs no telling, and one that panicked has said so.
        let _ = core.keeper.send(KeeperTask::Stop);
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
        let _ = core.drains.send(DrainTask::Close);
        let _ = core.leftovers.send(None);
        match self.ended.get_mut().recv_timeout(CLOSING) {
            Err(mpsc::RecvTimeoutError::Timeout) => warn!(
                "a borrower is closed whose copies are not known to be over: its leases stay until they are"
            ),
            _ => {
                for thread in self.copies.drain(..) {
                    let _ = thread.join();
                }
            }
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
        let mut prober = Prober::default();
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
            prober.advance(self);
            pause = match promotion.is_some() || prober.is_busy() {
                true => PROMOTING,
                false => TICK,
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
            let down = self.routes.down();
            let before = std::mem::replace(&mut state.reported_down, down);
            drop(state);
            session.moved(more);
            session.routes_down(before, down);
        }
    }
}
