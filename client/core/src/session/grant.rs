//! The right to one slab, as the broker grants it.

use swiftcache_proto::{
    convert::{self, InvalidField},
    domain::{AllocationId, DeviceUuid, Generation, Handle, LeaseId, LinkKind, RegionId},
    v1,
};

/// The right to one slab.
#[derive(Clone, Debug)]
pub struct Grant {
    /// The lease.
    pub lease: LeaseId,
    /// Which leasing of the slab.
    pub generation: Generation,
    /// The region.
    pub region: RegionId,
    /// The slab's size, bytes.
    pub slab_bytes: u64,
    /// The allocation behind the handle: map it once.
    pub allocation: AllocationId,
    /// Where the slab starts in the allocation, bytes.
    pub offset: u64,
    /// The device that holds it.
    pub device: DeviceUuid,
    /// How to map it.
    pub opening: Opening,
    /// How the borrower's device reaches it.
    pub link: LinkKind,
    /// Block slots in the slab.
    pub slots: u32,
    /// Bytes of one block over all layers.
    pub block_bytes: u64,
    /// How much of the allocation to map from its base, bytes.
    pub map_bytes: u64,
}

/// How a granted allocation is opened. A bearer secret: its `Debug` form shows none of it.
#[derive(Clone)]
pub enum Opening {
    /// With opaque bytes.
    Opaque(Handle),
    /// With a descriptor, fetched with this token.
    Token([u8; 16]),
}

impl std::fmt::Debug for Opening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Opening(secret)")
    }
}

impl Grant {
    pub(super) fn read(grant: &v1::Grant) -> Result<Self, InvalidField> {
        let handle = (grant.handle.as_ref())
            .ok_or_else(|| InvalidField::new("grant.handle", "is missing"))?;
        let opening = match handle.kind() {
            v1::HandleKind::PosixFd => {
                let token = handle.grant_token.as_ref().try_into();
                Opening::Token(token.map_err(|_| {
                    InvalidField::new("grant.handle.grant_token", "is not 16 bytes")
                })?)
            }
            _ => Opening::Opaque(convert::offered_handle(Some(handle))?),
        };
        let read = Self {
            lease: LeaseId(grant.lease_id),
            generation: Generation(grant.generation),
            region: convert::region_id("grant.region_id", &grant.region_id)?,
            slab_bytes: grant.slab_bytes,
            allocation: convert::allocation_id("grant.allocation_id", &grant.allocation_id)?,
            offset: grant.offset,
            device: convert::device_uuid("grant.device_uuid", &grant.device_uuid)?,
            opening,
            link: grant.link().try_into()?,
            slots: grant.slots,
            block_bytes: grant.block_bytes,
            map_bytes: match grant.map_bytes {
                // A broker of the first release does not say: as much as this slab takes, then.
                0 => grant.offset.saturating_add(grant.slab_bytes),
                bytes => bytes,
            },
        };
        let end = read.offset.checked_add(read.slab_bytes);
        if end.is_none_or(|end| end > read.map_bytes) {
            let problem = format!(
                "is {}; the slab ends {} bytes after {}",
                read.map_bytes, read.slab_bytes, read.offset
            );
            return Err(InvalidField::new("grant.map_bytes", problem));
        }
        let used = u64::from(read.slots).checked_mul(read.block_bytes);
        if read.slots == 0 || used.is_none_or(|used| used > read.slab_bytes) {
            let problem = format!(
                "is {} of {} bytes in a slab of {}",
                read.slots, read.block_bytes, read.slab_bytes
            );
            return Err(InvalidField::new("grant.slots", problem));
        }
        Ok(read)
    }
}
