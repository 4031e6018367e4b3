//! A donor's thread, and what the session tells it.

use std::{
    collections::VecDeque,
    sync::mpsc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::RegionId;
use tracing::warn;

use super::{core::Core, scrub::Scrubs, state::Task, target::TopUp};
use crate::session::{Connected, Observer, Scrub};

/// How often offers and withdrawals that failed on the way are made again.
const TICK: Duration = Duration::from_millis(200);

/// Called on the session's thread: takes note under a lock, and passes on what takes longer.
impl Observer for Core {
    fn regions(&self) -> Vec<RegionId> {
        self.state.lock().regions.keys().copied().collect()
    }

    fn connected(&self, connected: &Connected) {
        let sequel = self.state.lock().take_note(connected, self.source);
        self.tell(Task::Connected(sequel));
    }

    fn returned(&self, region: RegionId) {
        self.tell(Task::Returned(region));
    }

    /// The donor's owner may know why: memory of another PID namespace, a device node that a container lacks.
    fn cannot_map(&self, id: RegionId, sessions: u32) {
        let mut state = self.state.lock();
        let Some(region) = state.regions.get_mut(&id) else {
            return;
        };
        if sessions > region.unmappable_by {
            warn!(
                device = %self.device, region = %id, sessions,
                "borrowers say that they cannot map a slab; they are lent no more of it, and others are"
            );
        }
        region.unmappable_by = sessions;
    }

    fn scrub(&self, scrub: &Scrub) {
        self.tell(Task::Scrub(*scrub));
    }
}

impl Core {
    /// The donor's thread. Between two offers it looks whether there is something else: somebody waits for what is asked
    /// back.
    pub(super) fn work(&self, inbox: &mpsc::Receiver<Task>) {
        let mut scrubs = Scrubs::default();
        let mut top_up = TopUp::new();
        let mut due = VecDeque::new();
        let mut ticked = Instant::now();
        loop {
            let tick = match due.is_empty() {
                true => TICK.saturating_sub(ticked.elapsed()),
                false => Duration::ZERO,
            };
            let waits = [scrubs.pause(), top_up.pause(self)];
            let pause = waits.into_iter().flatten().fold(tick, Duration::min);
            let mut told = false;
            match inbox.recv_timeout(pause) {
                Ok(Task::Returned(region)) => {
                    self.take_back(region);
                    top_up.hasten();
                }
                Ok(Task::Scrub(scrub)) => scrubs.ask(self, &scrub),
                Ok(Task::Connected(sequel)) => {
                    self.follow_up(sequel, self.source);
                    top_up.hasten();
                    told = true;
                }
                Ok(Task::Tell) => {
                    top_up.hasten();
                    told = true;
                }
                Ok(Task::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => match due.pop_front() {
                    Some(region) => self.offer_again(region),
                    None => top_up.advance(self),
                },
            }
            if told || ticked.elapsed() >= TICK {
                self.withdraw_unheard();
                scrubs.clean_soiled(self);
                if told || due.is_empty() {
                    due = self.due_offers();
                }
                ticked = Instant::now();
            }
            scrubs.advance(self);
        }
    }
}
