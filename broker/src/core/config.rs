//! What the core is told once, when it starts.

use std::collections::BTreeMap;

use swiftcache_proto::{
    convert::DEFAULT_DRAIN_MS,
    domain::{Device, Link},
};

/// The node's hardware, as the probe found it.
#[derive(Clone, Debug, Default)]
pub struct Node {
    /// Its devices.
    pub devices: Vec<Device>,
    /// The links between them, both directions. A pair that is not listed cannot reach each other.
    pub links: Vec<Link>,
}

/// Windows, quotas and bounds. [`Default`] is what a node runs with unless its operator says otherwise.
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// How long a lookup's pins last, milliseconds.
    pub pin_ms: u32,
    /// The drain window of revocations that nobody gave one, milliseconds.
    pub default_drain_ms: u32,
    /// How long an unmet demand is remembered after its session last asked, milliseconds.
    pub wait_ms: u32,
    /// How long what a borrower that is gone has published is kept for its heir, milliseconds; 0: not at all.
    pub estate_ttl_ms: u32,
    /// The id before the first pin's. Drawn at random by the shell, so that an `Unpin` meant for the broker before
    /// this one ends nobody's pin.
    pub pin_base: u64,
    /// The most a session may hold, bytes; `None` is no quota.
    pub session_quota_bytes: Option<u64>,
    /// The most a tenant's namespace may hold, bytes; `None` is no quota.
    pub namespace_quota_bytes: Option<u64>,
    /// How much more than others a user (`1000`) gets when there is not enough for all, and a label (`1000/batch`) than the
    /// user's other ones; 1 when not named.
    pub tenant_weights: BTreeMap<String, u32>,
    /// How much more than the tenant's others a namespace of this name gets then; 1 when not named.
    pub namespace_weights: BTreeMap<String, u32>,
    /// Sessions at a time.
    pub max_sessions: usize,
    /// Sessions of one user at a time. Root has no such bound: of its sessions, one process gets all but a few.
    pub max_sessions_per_user: usize,
    /// Regions at a time.
    pub max_regions: usize,
    /// Slabs at a time.
    pub max_slabs: usize,
    /// Leases at a time.
    pub max_leases: usize,
    /// Leases that one session holds or reads at a time: as many as it can name when it resumes.
    pub max_leases_per_session: usize,
    /// Slabs inherited by one reply.
    pub max_inherited: usize,
    /// Slabs granted by one reply.
    pub max_grants: usize,
    /// Sessions that read one lease at a time.
    pub max_readers: usize,
    /// Pins of one session at a time.
    pub max_pins_per_session: usize,
    /// Extents under the pins of one session at a time.
    pub max_pinned_extents_per_session: usize,
    /// Blocks in the index, and in the host memory that borrowers tell of.
    pub max_blocks: u64,
    /// The same for the blocks of one user, and for those of one process of root.
    pub max_blocks_per_user: u64,
    /// The last changes of the index that are kept, for who watches it.
    pub max_journal: usize,
    /// Borrowers that one session tells of at a time.
    pub max_borrowers_per_session: usize,
    /// The smallest blocks, bytes. A smaller one would cost the broker more than it holds.
    pub min_block_bytes: u64,
    /// Slots in one lease; a slab of smaller blocks has fewer slots than would fit.
    pub max_slots: u32,
}

impl Default for CoreConfig {
    fn default() -> Self {
        Self {
            pin_ms: 10_000,
            default_drain_ms: DEFAULT_DRAIN_MS,
            wait_ms: 2_000,
            estate_ttl_ms: 600_000,
            pin_base: 0,
            session_quota_bytes: None,
            namespace_quota_bytes: None,
            tenant_weights: BTreeMap::new(),
            namespace_weights: BTreeMap::new(),
            max_sessions: 1_024,
            max_sessions_per_user: 256,
            max_regions: 65_536,
            max_slabs: 1 << 20,
            max_leases: 262_144,
            max_leases_per_session: 65_536,
            max_inherited: 1_024,
            max_grants: 4_096,
            max_readers: 1_024,
            max_pins_per_session: 1_024,
            max_pinned_extents_per_session: 262_144,
            max_blocks: 16 << 20,
            max_blocks_per_user: 12 << 20,
            // 6 MiB.
            max_journal: 1 << 17,
            max_borrowers_per_session: 64,
            min_block_bytes: 64,
            // As many as one message publishes. A slab has 64 MiB or more, and a model's block tens of KiB.
            max_slots: 1 << 16,
        }
    }
}
