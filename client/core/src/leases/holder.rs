//! What leases ask of whoever uses the slabs.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::{Hold, RegionId};

use super::slabs::LeaseKey;
use crate::{
    Result,
    session::Left,
    transfer::{AreaId, BlockArea},
};

/// A slab that is mapped. It is not open before [`Holder::granted`] has returned.
#[derive(Clone, Debug)]
pub(crate) struct Arrival {
    pub(crate) area: Arc<BlockArea>,
    pub(crate) key: LeaseKey,
    pub(crate) region: RegionId,
    pub(crate) hold: Hold,
    /// What a lessee before this one has left in it. Nothing here knows what that is.
    pub(crate) left: Left,
}

/// Which slabs a holder would use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wants {
    /// Slabs of HBM.
    pub(crate) hbm: bool,
    /// Slabs of host memory, where HBM is not to be had.
    pub(crate) host: bool,
}

/// How far a holder got in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Nothing is under way.
    Idle,
    /// Something is under way, and nothing has changed.
    Waiting,
    /// Something has changed: more may follow soon.
    Changed,
}

/// Uses slabs. Called from the threads of [`Leases`](super::Leases), with none of their locks held. No method waits for copies.
///
/// The course of a slab that is asked back: it is closed; [`evacuate`](Self::evacuate); [`advance`](Self::advance) as long as the holder
/// [`is_moving`](Self::is_moving) something out and there is time; [`forget`](Self::forget); unmapped.
pub(crate) trait Holder: Send + Sync {
    /// A slab has arrived.
    ///
    /// # Errors
    /// When it is of no use. It is given back, and nothing more is said of it. A device's error means that no slab of its
    /// region is.
    fn granted(&self, slab: Arrival) -> Result<()>;

    /// Which slabs would be used besides those that there are.
    fn wants(&self) -> Wants;

    /// Gives up slabs of its own that have held nothing for a while, and does not use them any more.
    fn give_up_unused(&self) -> Vec<AreaId>;

    /// An own slab is asked back, with so much time left to give it back. Begins to move out what is worth moving. Says until when it
    /// wants to do so, if at all.
    fn evacuate(&self, slab: AreaId, window: Duration) -> Option<Instant>;

    /// Whether it is not through with moving out of the slab: something waits, or is on its way, or is not known yet where it went.
    fn is_moving(&self, slab: AreaId) -> bool;

    /// Takes what is moved out one step further.
    fn advance(&self) -> Progress;

    /// Nothing in these slabs is worth anything any more. It keeps nothing of them, and begins nothing with them. All at once: a
    /// holder's lock is one that an engine takes all the time.
    fn forget(&self, slabs: &[AreaId]);
}
