//! Totals since the broker started.

/// Totals since the broker started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Leases granted.
    pub leases_granted: u64,
    /// Demands that were granted nothing.
    pub leases_refused: u64,
    /// Revocations begun.
    pub revocations: u64,
    /// Acknowledgements of revocations, by lessees and readers.
    pub acknowledgements: u64,
    /// Leases that became zombies.
    pub zombies: u64,
    /// Lookups answered.
    pub lookups: u64,
    /// Blocks they asked for.
    pub lookup_blocks: u64,
    /// Blocks they found.
    pub hit_blocks: u64,
    /// Blocks published.
    pub published_blocks: u64,
    /// Leases whose lessees are gone, and that were kept for an heir.
    pub estate_leases: u64,
    /// Leases that an heir got.
    pub inherited_leases: u64,
}
