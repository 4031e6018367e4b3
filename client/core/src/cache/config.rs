//! What a borrower is told when it opens.

use std::time::Duration;

use swiftcache_proto::domain::{BorrowerId, DeviceUuid};

use super::Layout;
use crate::{Error, Result};

/// A borrower's settings.
#[derive(Clone, Debug)]
pub struct BorrowerConfig {
    /// Names the borrower at the broker, so that others of its tenant can ask what it can load: an engine's scheduler,
    /// for one. No two borrowers that are open have the same. `None`: drawn at random.
    pub id: Option<BorrowerId>,
    /// The device the engine computes on.
    pub device: DeviceUuid,
    /// What its blocks look like.
    pub layout: Layout,
    /// The most HBM that it leases from donors, bytes. 0: none.
    pub max_leased_bytes: u64,
    /// The most host memory that it leases from donors (`swiftcache donate --device HOST-n`), where they lend too little HBM,
    /// bytes. Others of the namespace find what lies there. 0: none.
    pub max_host_leased_bytes: u64,
    /// How much it asks for at a time, bytes; the broker rounds up to slabs.
    pub lease_step_bytes: u64,
    /// Host memory taken at the start for blocks that donors have no room for, bytes. 0: none.
    pub host_tier_bytes: u64,
    /// Look for blocks that replicas of the same namespace have published. Costs one RPC for every lookup that
    /// this borrower's own blocks do not answer whole.
    pub share: bool,
    /// The longest that such an RPC may take: past it, computing is the better choice.
    pub lookup_limit: Duration,
    /// What happens to hot blocks when a lease is revoked.
    pub drain: DrainPolicy,
    /// A lease that has held no block for this long is given back.
    pub idle_release: Duration,
    /// Takes over what borrowers of its tenant and namespace have left that are gone.
    pub inherit: bool,
}

/// How much of a revocation's drain window goes into rescuing blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DrainPolicy {
    /// Move blocks to other leases and the host tier, hottest first. Otherwise they are dropped at once.
    pub move_blocks: bool,
    /// The longest the moving may take, whatever window the broker grants; half of that window at most.
    pub move_for: Duration,
}

impl Default for DrainPolicy {
    fn default() -> Self {
        Self {
            move_blocks: true,
            move_for: Duration::from_millis(500),
        }
    }
}

impl BorrowerConfig {
    /// The default of [`lookup_limit`](Self::lookup_limit).
    pub const LOOKUP_LIMIT: Duration = Duration::from_millis(250);

    /// Settings for `layout` on `device`, leasing up to `max_leased_bytes` and without a host tier.
    pub fn new(device: DeviceUuid, layout: Layout, max_leased_bytes: u64) -> Self {
        Self {
            id: None,
            device,
            layout,
            max_leased_bytes,
            max_host_leased_bytes: 0,
            lease_step_bytes: (max_leased_bytes / 8).max(1),
            host_tier_bytes: 0,
            share: true,
            lookup_limit: Self::LOOKUP_LIMIT,
            drain: DrainPolicy::default(),
            idle_release: Duration::from_secs(60),
            inherit: true,
        }
    }

    /// Slots of one step, at least one.
    pub(super) fn step_slots(&self) -> u64 {
        (self.lease_step_bytes / self.layout.block_bytes()).max(1)
    }

    /// Checks what needs no device to be checked.
    ///
    /// # Errors
    /// Names the setting that cannot work.
    pub fn check(&self) -> Result<()> {
        self.layout.check()?;
        let leases = self.max_leased_bytes > 0 || self.max_host_leased_bytes > 0;
        if leases && self.lease_step_bytes == 0 {
            return Err(Error::config("lease_step_bytes", "takes more than 0"));
        }
        Ok(())
    }
}
