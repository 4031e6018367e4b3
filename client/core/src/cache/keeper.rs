//! The keeper: a thread that keeps the index and the slots in order, and tells the broker what it should know.

use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

use super::core::{Core, KeeperTask};
use crate::session::{Connected, Observer};

/// How often slots that had to wait are looked at.
const TICK: Duration = Duration::from_millis(50);

/// How often blocks on their way to donors are looked after.
const PROMOTING: Duration = Duration::from_millis(5);

/// Called on the session's thread.
impl Observer for Core {
    fn connected(&self, connected: &Connected) {
        let restarted = connected.restarted;
        // A keeper that is gone means that the borrower is closing.
        let _ = self.keeper.send(KeeperTask::Connected { restarted });
    }
}

impl Core {
    pub(super) fn keep_loop(self: &Arc<Self>, inbox: &mpsc::Receiver<KeeperTask>) {
        let mut pause = TICK;
        let mut promotion = None;
        loop {
            match inbox.recv_timeout(pause) {
                Ok(KeeperTask::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Ok(KeeperTask::Connected { restarted }) => {
                    self.state.lock().told.start_anew();
                    self.tell_kept();
                    self.publish_again(restarted);
                }
                Ok(KeeperTask::Tell) | Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            self.tell_kept();
            promotion = self.promote(promotion);
            self.make_room_in_host();
            pause = match promotion {
                Some(_) => PROMOTING,
                None => TICK,
            };
            self.publish_due();
            self.unpublish_due();
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
