//! Replicas' leases: opened for reading in the background, once something was found in them. What is opened in vain is given back,
//! and not opened again.

use std::time::Instant;

use swiftcache_proto::domain::{Hold, LeaseId};
use tonic::Code;
use tracing::{debug, warn};

use super::{
    adopting::{Adopted, give_back},
    core::Leases,
    holder::Holder,
    unreadable::Lasting,
};
use crate::{
    Error,
    session::{Grant, Left, Session},
};

/// Why a replica's lease is not open for reading.
#[derive(Clone, Copy, Debug)]
struct NotShared {
    lasting: Lasting,
    /// The broker may take this session for a reader.
    opened: bool,
    /// This process cannot map its memory.
    unmappable: bool,
}

impl NotShared {
    /// Revoked meanwhile, or answered by an earlier connection.
    const NOT_NOW: Self = Self {
        lasting: Lasting::Moment,
        opened: true,
        unmappable: false,
    };
    const OTHER_LAYOUT: Self = Self {
        lasting: Lasting::ForGood,
        opened: true,
        unmappable: false,
    };

    /// The broker did not open it; or nobody knows, and then the session reconnects and tells what it reads.
    fn refused(error: &Error) -> Self {
        let lasting = match error {
            // Otherwise: being revoked, its donor has not come back yet, or too many readers.
            Error::Refused { status, .. }
                if !matches!(
                    status.code(),
                    Code::FailedPrecondition | Code::ResourceExhausted
                ) =>
            {
                Lasting::ForGood
            }
            _ => Lasting::Moment,
        };
        Self {
            lasting,
            opened: false,
            unmappable: false,
        }
    }

    fn unmapped(error: &Error) -> Self {
        let unmappable = matches!(error, Error::Device(_));
        Self {
            lasting: match unmappable {
                true => Lasting::ForGood,
                false => Lasting::Moment,
            },
            opened: true,
            unmappable,
        }
    }
}

impl Leases {
    /// Opens a replica's lease for reading. Blocks for the broker and the mapping.
    pub(super) fn open_share(&self, holder: &dyn Holder, lease: LeaseId) {
        if let Some(session) = self.connected() {
            self.state.lock().grants_in_flight += 1;
            let shared = session.share(lease, self.settings.device.clone()).wait();
            let failed = match shared {
                Ok((grant, epoch)) => self.adopt_share(holder, session, &grant, epoch).err(),
                Err(error) => {
                    debug!(%error, %lease, "a replica's lease cannot be read");
                    Some(NotShared::refused(&error))
                }
            };
            if let Some(failed) = failed {
                self.give_share_back(session, lease, failed);
            }
            self.state.lock().end_grant_call();
        }
        self.state.lock().opening.remove(&lease);
        self.opened.notify_all();
    }

    fn adopt_share(
        &self,
        holder: &dyn Holder,
        session: &Session,
        grant: &Grant,
        epoch: u64,
    ) -> Result<(), NotShared> {
        let lease = grant.lease;
        let own = self.settings.block_bytes();
        if grant.block_bytes != own {
            let theirs = grant.block_bytes;
            warn!(%lease, own, theirs, "a replica's lease holds blocks of another size");
            return Err(NotShared::OTHER_LAYOUT);
        }
        match self.adopt(holder, session, grant, Hold::Shared, epoch, Left::default()) {
            Adopted::Yes => Ok(()),
            Adopted::No => Err(NotShared::NOT_NOW),
            Adopted::Unmapped(error) => {
                warn!(%error, %lease, "a replica's slab cannot be mapped");
                Err(NotShared::unmapped(&error))
            }
        }
    }

    /// Nothing of the lease is read: remembers that, and tells the broker if it may take this session for a reader. The lease is
    /// not opened again before it has heard: a late giving back would take a mapping's right away.
    fn give_share_back(&self, session: &Session, lease: LeaseId, failed: NotShared) {
        let now = Instant::now();
        let mut state = self.state.lock();
        state.unreadable.expire(now);
        state.unreadable.add(lease, failed.lasting, now);
        drop(state);
        if failed.opened
            && let Err(error) = give_back(session, lease, failed.unmappable).wait()
        {
            // Nothing to give back, or the next connection's resumption gives it back.
            debug!(%error, %lease, "a replica's lease was not given back");
        }
    }
}
