//! Inheriting: slabs that borrowers of this tenant and namespace have left that are gone. The leasing thread asks for them before it
//! leases anything, and for a while again: what its predecessor held is left only when the broker knows that it is gone.

use std::time::{Duration, Instant};

use swiftcache_proto::domain::{Hold, LeaseId, Medium};
use tonic::Code;
use tracing::{debug, info};

use super::{
    adopting::{Adopted, give_back},
    core::Leases,
    holder::Holder,
};
use crate::{Error, session::Session};

/// When to ask again: twice as long each time.
const ASK_AGAIN: Duration = Duration::from_millis(100);
const ASK_AGAIN_MOST: Duration = Duration::from_secs(5);
/// How long after each connection. An engine takes longer to start than the kernel to report the last one's death.
const ASKING: Duration = Duration::from_secs(60);

/// How far asking has come. The leasing thread's alone.
#[derive(Debug)]
pub(super) struct Heir {
    /// The connection on which it asks.
    epoch: Option<u64>,
    pause: Duration,
    next: Instant,
    until: Instant,
    /// The broker is too old to keep anything for heirs.
    deaf: bool,
}

impl Default for Heir {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            epoch: None,
            pause: ASK_AGAIN,
            next: now,
            until: now,
            deaf: false,
        }
    }
}

impl Heir {
    /// Whether it is time to ask on the connection of this number.
    fn is_due(&mut self, epoch: u64, now: Instant) -> bool {
        if self.epoch != Some(epoch) {
            *self = Self {
                epoch: Some(epoch),
                until: now + ASKING,
                next: now,
                ..Self::default()
            };
        }
        !self.deaf && self.next <= now && now < self.until
    }

    fn asked(&mut self, now: Instant) {
        self.next = now + self.pause;
        self.pause = (2 * self.pause).min(ASK_AGAIN_MOST);
    }
}

impl Leases {
    /// Takes over what was left, when it is time to ask.
    pub(super) fn inherit(&self, holder: &dyn Holder, heir: &mut Heir) {
        let Some(session) = self.connected() else {
            return;
        };
        if !self.settings.inherit || !heir.is_due(session.epoch(), Instant::now()) {
            return;
        }
        // In pages, as long as each brings something.
        while self.inherit_page(holder, session, heir) {}
        heir.asked(Instant::now());
    }

    /// True when there is more to have at once.
    fn inherit_page(&self, holder: &dyn Holder, session: &Session, heir: &mut Heir) -> bool {
        let demand = {
            let mut state = self.state.lock();
            let left =
                |medium| (self.settings.most(medium)).saturating_sub(state.leased_bytes(medium));
            let (bytes, host_bytes) = (left(Medium::Hbm), left(Medium::Host));
            if bytes + host_bytes == 0 {
                return false;
            }
            state.grants_in_flight += 1;
            self.settings.demand(bytes, host_bytes)
        };
        let mut more = false;
        match session.inherit(demand).wait() {
            Ok(inheritance) => {
                let mut turned_down: Vec<(LeaseId, bool)> = Vec::new();
                let (mut slabs, mut blocks) = (0, 0);
                // The broker names first what was found last; it is to be the last used here.
                for its in inheritance.leases.into_iter().rev() {
                    let (grant, epoch) = (its.grant, inheritance.epoch);
                    let found = its.left.blocks.len();
                    match self.adopt(holder, session, &grant, Hold::Own, epoch, its.left) {
                        Adopted::Yes => {
                            slabs += 1;
                            blocks += found;
                        }
                        Adopted::No => turned_down.push((grant.lease, false)),
                        Adopted::Unmapped(error) => {
                            debug!(%error, lease = %grant.lease, "an inherited slab cannot be mapped");
                            let unmappable = matches!(error, Error::Device(_));
                            turned_down.push((grant.lease, unmappable));
                        }
                    }
                }
                more = inheritance.more && slabs > 0;
                if slabs > 0 {
                    info!(slabs, blocks, "inherited");
                }
                for (lease, unmappable) in turned_down {
                    // As in growing: nobody minds when it is over already.
                    let _ = give_back(session, lease, unmappable).wait();
                }
            }
            Err(Error::Refused { status, .. }) if status.code() == Code::Unimplemented => {
                debug!("the broker is too old to keep anything for heirs");
                heir.deaf = true;
            }
            Err(error) => debug!(%error, "nothing inherited"),
        }
        self.state.lock().end_grant_call();
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_asks_less_and_less_often_for_a_while_and_anew_on_another_connection() {
        let start = Instant::now();
        let mut heir = Heir::default();
        let mut asked = Vec::new();
        for ms in 0..120_000 {
            let now = start + Duration::from_millis(ms);
            if heir.is_due(1, now) {
                asked.push(ms);
                heir.asked(now);
            }
        }
        assert_eq!(asked[..5], [0, 100, 300, 700, 1_500]);
        assert!(asked.len() < 20 && asked.last() < Some(&60_000));
        let now = start + Duration::from_secs(120);
        assert!(heir.is_due(2, now));
        heir.asked(now);
        assert!(!heir.is_due(2, now));
        heir.deaf = true;
        assert!(!heir.is_due(2, now + ASK_AGAIN));
        assert!(heir.is_due(3, now + ASK_AGAIN));
    }
}
