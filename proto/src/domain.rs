//! The words of DESIGN as types. Cheap to copy, validated where they are made, printed for people.

use std::{fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

/// Names a session. Drawn at random by the broker, so that guessing another's is hopeless; the broker also
/// checks that the message comes from the session's own process.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SessionId(pub u64);

impl fmt::Debug for SessionId {
    /// Prints the short label only: the whole id is half a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "session {}", self.label())
    }
}

impl SessionId {
    /// The session's name for people: its first four hexadecimal digits. Shown in status,
    /// logs and Admin replies in place of the id.
    pub fn label(&self) -> String {
        format!("{:04x}", (self.0 >> 48) as u16)
    }

    /// The smallest id that has this label. `None`: it is not the label of any id.
    pub fn first_labelled(label: &str) -> Option<Self> {
        let bits = u16::from_str_radix(label, 16).ok()?;
        let first = Self(u64::from(bits) << 48);
        (first.label() == label).then_some(first)
    }
}

/// A 16-byte identifier drawn at random.
macro_rules! id16 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

id16! {
    /// Names a region: bytes of one allocation on offer.
    RegionId
}
id16! {
    /// Names an allocation: what one handle maps. Regions of one allocation never overlap.
    AllocationId
}
id16! {
    /// Names a borrower: one engine's cache in one process. Drawn at random by the borrower.
    BorrowerId
}
id16! {
    /// What the engine calls a block's content: 16 bytes of its prefix hash. Longer hashes are truncated;
    /// two of 2^32 blocks of one namespace collide with probability 2^-65.
    BlockHash
}

impl FromStr for RegionId {
    type Err = String;

    /// Reads the hexadecimal form that [`fmt::Display`] prints.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut id = [0; 16];
        if text.len() != 32 || !text.is_ascii() {
            return Err(format!("{text:?} is not 32 hexadecimal digits"));
        }
        for (byte, pair) in id.iter_mut().zip(0..) {
            *byte = u8::from_str_radix(&text[pair * 2..pair * 2 + 2], 16)
                .map_err(|_| format!("{text:?} is not 32 hexadecimal digits"))?;
        }
        Ok(Self(id))
    }
}

/// Names a lease. Unique over the broker's whole life, restarts included.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default,
)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How many times a slab has been leased.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, Default,
)]
pub struct Generation(pub u64);

/// Names a pin: a lookup's bounded right to read what it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PinId(pub u64);

/// A device's identity: `GPU-<uuid>` as NVML prints it, or `SIM-...`. Never an ordinal: processes number the
/// same GPUs differently.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceUuid(Arc<str>);

impl TryFrom<String> for DeviceUuid {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<DeviceUuid> for String {
    fn from(uuid: DeviceUuid) -> Self {
        uuid.0.as_ref().to_owned()
    }
}

impl DeviceUuid {
    /// The longest identity accepted, bytes.
    pub const MAX_BYTES: usize = 64;

    /// The identity as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The host memory of a NUMA node: `HOST-n`.
    pub fn of_host(node: u32) -> Self {
        Self(format!("HOST-{node}").into())
    }

    /// The NUMA node whose host memory this names, if it is of that form.
    pub fn host_node(&self) -> Option<u32> {
        let digits = self.0.strip_prefix("HOST-")?;
        let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
        let padded = digits.len() > 1 && digits.starts_with('0');
        (plain && !padded).then(|| digits.parse().ok()).flatten()
    }

    /// The kind of memory that the device has.
    pub fn medium(&self) -> Medium {
        match self.host_node() {
            Some(_) => Medium::Host,
            None => Medium::Hbm,
        }
    }
}

impl FromStr for DeviceUuid {
    type Err = String;

    /// 1 to 64 printable ASCII characters without spaces.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fits = (1..=Self::MAX_BYTES).contains(&text.len());
        if !fits || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!(
                "{text:?} is not a device UUID: 1 to {} printable characters",
                Self::MAX_BYTES
            ));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for DeviceUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How two devices reach each other, best first: the order of the variants is the order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkKind {
    /// The same GPU: no link is crossed.
    SameDevice,
    /// NVLink, direct or through NVSwitch.
    Nvlink,
    /// Peer access across PCIe.
    Pcie,
    /// Host memory, reached over PCIe; or, between two GPUs, no peer access.
    Host,
}

impl fmt::Display for LinkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::SameDevice => "same device",
            Self::Nvlink => "NVLink",
            Self::Pcie => "PCIe",
            Self::Host => "host",
        })
    }
}

/// How an exported allocation can be opened by another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandleKind {
    /// 64 opaque bytes of legacy CUDA IPC.
    CudaIpc,
    /// A file descriptor, passed over the fd socket.
    PosixFd,
    /// 64 opaque bytes of a CUDA fabric handle. Reserved.
    Fabric,
}

/// The opaque bytes of a `CudaIpc` or `Fabric` handle. A bearer secret: its `Debug` form shows none of it.
#[derive(Clone, PartialEq, Eq)]
pub struct OpaqueHandle(pub [u8; 64]);

impl fmt::Debug for OpaqueHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OpaqueHandle(secret)")
    }
}

/// What a donor hands the broker so that lessees can map its allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Handle {
    /// Legacy CUDA IPC.
    CudaIpc(OpaqueHandle),
    /// A descriptor that travels over the fd socket.
    PosixFd,
    /// CUDA fabric.
    Fabric(OpaqueHandle),
}

impl Handle {
    /// Which kind of handle this is.
    pub fn kind(&self) -> HandleKind {
        match self {
            Self::CudaIpc(_) => HandleKind::CudaIpc,
            Self::PosixFd => HandleKind::PosixFd,
            Self::Fabric(_) => HandleKind::Fabric,
        }
    }
}

/// Why a lease is being revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RevokeReason {
    /// The donor wants its bytes back.
    Withdrawn,
    /// The donor's process is gone.
    DonorGone,
    /// An operator drains the device, the donor or the region.
    Drained,
    /// Another borrower below its fair share needs the slab.
    Fairness,
    /// The lessee is gone; readers must let go.
    LesseeGone,
    /// The lessee gave the lease up; readers must let go.
    Released,
}

impl fmt::Display for RevokeReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Withdrawn => "withdrawn by the donor",
            Self::DonorGone => "donor gone",
            Self::Drained => "drained by an operator",
            Self::Fairness => "fairness",
            Self::LesseeGone => "lessee gone",
            Self::Released => "released by the lessee",
        })
    }
}

/// Why a lease request was granted less than it asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shortfall {
    /// Nothing is missing.
    None,
    /// No free slab is left on a reachable device.
    NoFreeSlab,
    /// The namespace or session is at its quota.
    Quota,
    /// Free slabs are being zeroed for this tenant. Ask again shortly.
    Scrubbing,
    /// Free slabs exist, but this session is at its fair share and others are waiting.
    Fairness,
    /// No slab on offer can hold one block of this size.
    BlockTooLarge,
}

/// Consecutive blocks in consecutive slots of one lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The lease whose slab holds the blocks.
    pub lease: LeaseId,
    /// Which leasing of the slab this is.
    pub generation: Generation,
    /// The first block's slot.
    pub first_slot: u32,
    /// How many blocks follow one another.
    pub count: u32,
}

/// What a lease is for, which decides who may take it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum LeaseClass {
    /// Blocks that can be computed again. Fairness may take it.
    #[default]
    Cache,
    /// Bytes that a running engine works with. Only the donor and operators may take it.
    WorkingSet,
}

impl LeaseClass {
    /// Whether it is [`Cache`](Self::Cache).
    pub fn is_cache(&self) -> bool {
        *self == Self::Cache
    }
}

/// Where the bytes of stitched pools are, without what lies in the engines' own parts of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HomeBytes {
    /// In leased slabs.
    pub leased: u64,
    /// In spare slabs on the engine's own device.
    pub spare: u64,
    /// In host memory, until a slab can be leased for them.
    pub host: u64,
}

impl HomeBytes {
    /// Each of them changed by `change`, which is given this one's and the other's.
    #[must_use]
    pub fn zip(self, other: Self, change: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            leased: change(self.leased, other.leased),
            spare: change(self.spare, other.spare),
            host: change(self.host, other.host),
        }
    }
}

/// A kind of memory that blocks lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Medium {
    /// A device's.
    Hbm,
    /// The host's.
    Host,
}

/// Whose a tier is, as a borrower sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hold {
    /// The borrower's own.
    Own,
    /// Another session's of the same namespace, open for reading.
    Shared,
}

/// Consecutive blocks that a lookup found in one tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FoundRun {
    /// In consecutive slots of a lease.
    Leased {
        /// The slots.
        extent: Extent,
        /// The kind of memory that the lease is of.
        medium: Medium,
        /// Whose lease it is.
        hold: Hold,
    },
    /// In the host memory of the borrower that the lookup named, which knows their places itself.
    Kept {
        /// How many blocks.
        count: u32,
    },
}

impl FoundRun {
    /// How many blocks.
    pub fn blocks(&self) -> u32 {
        match self {
            Self::Leased { extent, .. } => extent.count,
            Self::Kept { count } => *count,
        }
    }
}

/// A GPU, or a simulated one; or a NUMA node's host memory, which computes nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its identity.
    pub uuid: DeviceUuid,
    /// Marketing name.
    pub name: String,
    /// Its memory in all, bytes; 0 when the driver does not say.
    pub hbm_bytes: u64,
    /// The broker's ordinal, or the NUMA node's number; for people only.
    pub ordinal: u32,
}

/// One direction of a link between two devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// The device at this end.
    pub from: DeviceUuid,
    /// The device at the other end.
    pub to: DeviceUuid,
    /// What kind of link it is.
    pub kind: LinkKind,
    /// Usable bandwidth in one direction, bytes per second; 0 when unknown.
    pub bytes_per_second: u64,
}
