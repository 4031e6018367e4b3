//! Between wire and domain. Every function checks its field's bound; a refusal names the field.

use std::time::Duration;

use crate::{
    domain::{
        AllocationId, BlockHash, BorrowerId, Device, DeviceUuid, Extent, FoundRun, Generation,
        Handle, HandleKind, Hold, HomeBytes, LeaseClass, LeaseId, Link, LinkKind, Medium,
        OpaqueHandle, RegionId, RevokeReason, Shortfall,
    },
    v1,
};

/// The most hashes, slots or leases one message may carry: a prompt of one million tokens in 16-token blocks.
pub const MAX_BLOCKS: usize = 65_536;
/// Bytes of one packed block hash.
pub const HASH_BYTES: usize = 16;
/// The longest session name, bytes.
pub const MAX_NAME_BYTES: usize = 128;
/// The longest tenant label, bytes.
pub const MAX_TENANT_BYTES: usize = 64;
/// The longest namespace, bytes.
pub const MAX_NAMESPACE_BYTES: usize = 256;
/// Longest name of a disk, bytes.
pub const MAX_DEVICE_BYTES: usize = 64;
/// Longest text that a disk's agent says about its troubles, or where its file is, bytes.
pub const MAX_PROBLEM_BYTES: usize = 512;
/// Layers that a block may have.
pub const MAX_LAYERS: usize = 4_096;
/// The longest that an answer to a disk waits until there is work, milliseconds.
pub const MAX_DISK_WAIT_MS: u32 = 1_000;
/// The smallest and largest slab, bytes.
pub const SLAB_BYTES: std::ops::RangeInclusive<u64> = 64 << 10..=16 << 30;
/// The drain window of a broker whose operator has not set one, milliseconds.
pub const DEFAULT_DRAIN_MS: u32 = 5_000;
/// The longest drain window, milliseconds.
pub const MAX_DRAIN_MS: u32 = 600_000;
/// The largest message either side accepts, bytes: [`MAX_BLOCKS`] hashes and as many slots, and some.
pub const MAX_MESSAGE_BYTES: usize = 2 << 20;

/// A field that broke its bound. The broker answers INVALID_ARGUMENT with this text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidField {
    /// The field's name as the .proto spells it.
    pub field: &'static str,
    /// What is wrong with it and what it takes.
    pub problem: String,
}

impl InvalidField {
    /// A refusal of `field`, saying what is wrong.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self {
            field,
            problem: problem.into(),
        }
    }
}

type Checked<T> = Result<T, InvalidField>;

fn bytes16(field: &'static str, bytes: &[u8]) -> Checked<[u8; 16]> {
    bytes
        .try_into()
        .map_err(|_| InvalidField::new(field, format!("is {} bytes; takes 16", bytes.len())))
}

/// A 16-byte region id.
pub fn region_id(field: &'static str, bytes: &[u8]) -> Checked<RegionId> {
    bytes16(field, bytes).map(RegionId)
}

/// A 16-byte allocation id.
pub fn allocation_id(field: &'static str, bytes: &[u8]) -> Checked<AllocationId> {
    bytes16(field, bytes).map(AllocationId)
}

/// A 16-byte borrower id.
pub fn borrower_id(field: &'static str, bytes: &[u8]) -> Checked<BorrowerId> {
    bytes16(field, bytes).map(BorrowerId)
}

/// A device UUID.
pub fn device_uuid(field: &'static str, text: &str) -> Checked<DeviceUuid> {
    text.parse()
        .map_err(|problem: String| InvalidField::new(field, problem))
}

/// Whether a character changes how the text around it is shown: the formatting characters of bidirectional text. With them
/// a name could look like another one in every list.
pub fn reorders(character: char) -> bool {
    matches!(character, '\u{061c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Text of `1..=max` bytes without control characters.
pub fn text(field: &'static str, text: &str, max: usize) -> Checked<String> {
    if text.is_empty() {
        return Err(InvalidField::new(
            field,
            format!("is empty; takes 1 to {max} bytes"),
        ));
    }
    optional_text(field, text, max)
}

/// Text of `0..=max` bytes without control characters.
pub fn optional_text(field: &'static str, text: &str, max: usize) -> Checked<String> {
    if text.len() > max {
        let problem = format!("is {} bytes; takes at most {max}", text.len());
        return Err(InvalidField::new(field, problem));
    }
    if text.chars().any(char::is_control) {
        return Err(InvalidField::new(field, "holds a control character"));
    }
    if text.chars().any(reorders) {
        let problem = "holds a character that changes the direction of text";
        return Err(InvalidField::new(field, problem));
    }
    Ok(text.to_owned())
}

/// A list of at most [`MAX_BLOCKS`] entries.
pub fn bounded<'a, T>(field: &'static str, list: &'a [T]) -> Checked<&'a [T]> {
    if list.len() > MAX_BLOCKS {
        let problem = format!("has {} entries; takes at most {MAX_BLOCKS}", list.len());
        return Err(InvalidField::new(field, problem));
    }
    Ok(list)
}

/// Packed block hashes, read in place: 16 bytes each, at most [`MAX_BLOCKS`].
pub fn hashes<'a>(
    field: &'static str,
    packed: &'a [u8],
) -> Checked<impl ExactSizeIterator<Item = BlockHash> + Clone + 'a> {
    let (whole, rest) = packed.as_chunks::<HASH_BYTES>();
    if !rest.is_empty() {
        let problem = format!(
            "is {} bytes; takes a multiple of {HASH_BYTES}",
            packed.len()
        );
        return Err(InvalidField::new(field, problem));
    }
    bounded(field, whole)?;
    Ok(whole.iter().map(|hash| BlockHash(*hash)))
}

/// Packs block hashes for the wire.
pub fn pack_hashes(hashes: &[BlockHash]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| hash.0).collect()
}

/// A drain window as a request names it, milliseconds: 0 stands for the broker's default, so that a window shorter than
/// a millisecond is one. At most [`MAX_DRAIN_MS`].
pub fn drain_request_ms(drain: Duration) -> u32 {
    let whole = drain.as_nanos().div_ceil(1_000_000);
    u32::try_from(whole).map_or(MAX_DRAIN_MS, |ms| ms.min(MAX_DRAIN_MS))
}

/// The drain window that a request names, milliseconds; 0 stands for `default_ms`.
pub fn drain_ms(field: &'static str, ms: u32, default_ms: u32) -> Checked<u32> {
    match ms {
        0 => Ok(default_ms),
        1..=MAX_DRAIN_MS => Ok(ms),
        _ => Err(InvalidField::new(
            field,
            format!("is {ms}; takes at most {MAX_DRAIN_MS}"),
        )),
    }
}

/// The handle in an offer.
pub fn offered_handle(handle: Option<&v1::Handle>) -> Checked<Handle> {
    let handle = handle.ok_or_else(|| InvalidField::new("handle", "is missing"))?;
    let opaque = || -> Checked<OpaqueHandle> {
        let bytes = handle.opaque.as_ref().try_into().map_err(|_| {
            let problem = format!("is {} bytes; takes 64", handle.opaque.len());
            InvalidField::new("handle.opaque", problem)
        })?;
        Ok(OpaqueHandle(bytes))
    };
    match handle.kind() {
        v1::HandleKind::CudaIpc => Ok(Handle::CudaIpc(opaque()?)),
        v1::HandleKind::Fabric => Ok(Handle::Fabric(opaque()?)),
        v1::HandleKind::PosixFd if handle.opaque.is_empty() => Ok(Handle::PosixFd),
        v1::HandleKind::PosixFd => Err(InvalidField::new(
            "handle.opaque",
            "must be empty: the descriptor travels over the fd socket",
        )),
        v1::HandleKind::Unspecified => Err(InvalidField::new(
            "handle.kind",
            format!("is {}, which is no handle kind", handle.kind),
        )),
    }
}

impl From<HandleKind> for v1::HandleKind {
    fn from(kind: HandleKind) -> Self {
        match kind {
            HandleKind::CudaIpc => Self::CudaIpc,
            HandleKind::PosixFd => Self::PosixFd,
            HandleKind::Fabric => Self::Fabric,
        }
    }
}

impl From<LinkKind> for v1::LinkKind {
    fn from(kind: LinkKind) -> Self {
        match kind {
            LinkKind::SameDevice => Self::SameDevice,
            LinkKind::Nvlink => Self::Nvlink,
            LinkKind::Pcie => Self::Pcie,
            LinkKind::Host => Self::Host,
        }
    }
}

impl TryFrom<v1::LinkKind> for LinkKind {
    type Error = InvalidField;

    fn try_from(kind: v1::LinkKind) -> Checked<Self> {
        match kind {
            v1::LinkKind::SameDevice => Ok(Self::SameDevice),
            v1::LinkKind::Nvlink => Ok(Self::Nvlink),
            v1::LinkKind::Pcie => Ok(Self::Pcie),
            v1::LinkKind::Host => Ok(Self::Host),
            v1::LinkKind::Unspecified => Err(InvalidField::new("link", "is unspecified")),
        }
    }
}

impl From<RevokeReason> for v1::RevokeReason {
    fn from(reason: RevokeReason) -> Self {
        match reason {
            RevokeReason::Withdrawn => Self::Withdrawn,
            RevokeReason::DonorGone => Self::DonorGone,
            RevokeReason::Drained => Self::Drained,
            RevokeReason::Fairness => Self::Fairness,
            RevokeReason::LesseeGone => Self::LesseeGone,
            RevokeReason::Released => Self::Released,
        }
    }
}

impl TryFrom<v1::RevokeReason> for RevokeReason {
    type Error = InvalidField;

    fn try_from(reason: v1::RevokeReason) -> Checked<Self> {
        match reason {
            v1::RevokeReason::Withdrawn => Ok(Self::Withdrawn),
            v1::RevokeReason::DonorGone => Ok(Self::DonorGone),
            v1::RevokeReason::Drained => Ok(Self::Drained),
            v1::RevokeReason::Fairness => Ok(Self::Fairness),
            v1::RevokeReason::LesseeGone => Ok(Self::LesseeGone),
            v1::RevokeReason::Released => Ok(Self::Released),
            v1::RevokeReason::Unspecified => Err(InvalidField::new("reason", "is unspecified")),
        }
    }
}

impl From<Shortfall> for v1::Shortfall {
    fn from(shortfall: Shortfall) -> Self {
        match shortfall {
            Shortfall::None => Self::None,
            Shortfall::NoFreeSlab => Self::NoFreeSlab,
            Shortfall::Quota => Self::Quota,
            Shortfall::Scrubbing => Self::Scrubbing,
            Shortfall::Fairness => Self::Fairness,
            Shortfall::BlockTooLarge => Self::BlockTooLarge,
        }
    }
}

impl From<v1::Shortfall> for Shortfall {
    /// An unknown reason from a newer broker reads as "no free slab": the caller can only ask again later.
    fn from(shortfall: v1::Shortfall) -> Self {
        match shortfall {
            v1::Shortfall::None => Self::None,
            v1::Shortfall::NoFreeSlab | v1::Shortfall::Unspecified => Self::NoFreeSlab,
            v1::Shortfall::Quota => Self::Quota,
            v1::Shortfall::Scrubbing => Self::Scrubbing,
            v1::Shortfall::Fairness => Self::Fairness,
            v1::Shortfall::BlockTooLarge => Self::BlockTooLarge,
        }
    }
}

impl From<LeaseClass> for v1::LeaseClass {
    fn from(class: LeaseClass) -> Self {
        match class {
            LeaseClass::Cache => Self::Cache,
            LeaseClass::WorkingSet => Self::WorkingSet,
        }
    }
}

/// What a lease is for. One that this build does not know is refused: a lease that is taken away by rules that its holder does not
/// expect would be worse than none.
pub fn lease_class(field: &'static str, class: i32) -> Result<LeaseClass, InvalidField> {
    match v1::LeaseClass::try_from(class) {
        Ok(v1::LeaseClass::Unspecified | v1::LeaseClass::Cache) => Ok(LeaseClass::Cache),
        Ok(v1::LeaseClass::WorkingSet) => Ok(LeaseClass::WorkingSet),
        Err(_) => Err(InvalidField::new(
            field,
            format!("is {class}; takes 0 to 2"),
        )),
    }
}

impl From<HomeBytes> for v1::Homes {
    fn from(homes: HomeBytes) -> Self {
        Self {
            leased_bytes: homes.leased,
            spare_bytes: homes.spare,
            host_bytes: homes.host,
        }
    }
}

impl From<v1::Homes> for HomeBytes {
    fn from(homes: v1::Homes) -> Self {
        Self {
            leased: homes.leased_bytes,
            spare: homes.spare_bytes,
            host: homes.host_bytes,
        }
    }
}

impl From<Medium> for v1::Medium {
    fn from(medium: Medium) -> Self {
        match medium {
            Medium::Hbm => Self::Hbm,
            Medium::Host => Self::Host,
        }
    }
}

impl From<Hold> for v1::Hold {
    fn from(hold: Hold) -> Self {
        match hold {
            Hold::Own => Self::Own,
            Hold::Shared => Self::Shared,
        }
    }
}

impl From<FoundRun> for v1::Extent {
    fn from(run: FoundRun) -> Self {
        match run {
            FoundRun::Leased {
                extent,
                medium,
                hold,
            } => Self {
                lease_id: extent.lease.0,
                generation: extent.generation.0,
                first_slot: extent.first_slot,
                count: extent.count,
                medium: v1::Medium::from(medium).into(),
                hold: v1::Hold::from(hold).into(),
            },
            FoundRun::Kept { count } => Self {
                lease_id: 0,
                generation: 0,
                first_slot: 0,
                count,
                medium: v1::Medium::Host.into(),
                hold: v1::Hold::Own.into(),
            },
        }
    }
}

impl From<&v1::Extent> for FoundRun {
    /// What an older broker does not say reads as what it finds: HBM, leased by anybody.
    fn from(extent: &v1::Extent) -> Self {
        if extent.lease_id == 0 {
            return Self::Kept {
                count: extent.count,
            };
        }
        Self::Leased {
            extent: Extent {
                lease: LeaseId(extent.lease_id),
                generation: Generation(extent.generation),
                first_slot: extent.first_slot,
                count: extent.count,
            },
            medium: match extent.medium() {
                v1::Medium::Host => Medium::Host,
                v1::Medium::Hbm | v1::Medium::Unspecified => Medium::Hbm,
            },
            hold: match extent.hold() {
                v1::Hold::Own => Hold::Own,
                v1::Hold::Shared | v1::Hold::Unspecified => Hold::Shared,
            },
        }
    }
}

impl From<&Device> for v1::Device {
    fn from(device: &Device) -> Self {
        Self {
            uuid: device.uuid.to_string(),
            name: device.name.clone(),
            hbm_bytes: device.hbm_bytes,
            ordinal: device.ordinal,
        }
    }
}

impl TryFrom<&v1::Device> for Device {
    type Error = InvalidField;

    fn try_from(device: &v1::Device) -> Checked<Self> {
        Ok(Self {
            uuid: device_uuid("device.uuid", &device.uuid)?,
            name: device.name.clone(),
            hbm_bytes: device.hbm_bytes,
            ordinal: device.ordinal,
        })
    }
}

impl From<&Link> for v1::Link {
    fn from(link: &Link) -> Self {
        Self {
            from_uuid: link.from.to_string(),
            to_uuid: link.to.to_string(),
            kind: v1::LinkKind::from(link.kind).into(),
            bytes_per_second: link.bytes_per_second,
        }
    }
}

impl TryFrom<&v1::Link> for Link {
    type Error = InvalidField;

    fn try_from(link: &v1::Link) -> Checked<Self> {
        Ok(Self {
            from: device_uuid("link.from_uuid", &link.from_uuid)?,
            to: device_uuid("link.to_uuid", &link.to_uuid)?,
            kind: link.kind().try_into()?,
            bytes_per_second: link.bytes_per_second,
        })
    }
}
