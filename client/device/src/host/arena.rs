//! Shared memory: sealed memfds, their mappings, and what each is for the link model.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};
use swiftcache_proto::domain::{DeviceUuid, HandleKind};

use super::{DeviceError, Memory, Result, mapping::Mapping, numa, usage::Claim};

/// The magic number of tmpfs, which every memfd of ordinary pages lives on. Huge-page memfds are refused: a hole
/// punched by the other side turns into SIGBUS there.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Where bytes are, for the link model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// In a device's HBM.
    Device(DeviceUuid),
    /// In host memory, reached from a device over PCIe.
    Host(DeviceUuid),
}

/// Whose the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// This backend's: they can be exported.
    Exportable,
    /// This backend's, or another process's.
    Private,
    /// The caller's, who keeps them mapped.
    Adopted,
    /// Of the pieces of an address space.
    Space,
}

/// What keeps a range of shared memory mapped.
#[derive(Debug)]
pub(super) struct Arena {
    place: Place,
    origin: Origin,
    /// None for memory that somebody else keeps mapped. What is lent of it has one in its place.
    mapping: Option<Mapping>,
    /// What holds the pages, if a file does.
    memfd: Option<OwnedFd>,
    /// Gives the HBM back after the mapping is gone: fields drop in order.
    _claim: Option<Claim>,
}

impl Arena {
    /// Zeroed, exportable memory in the HBM of `device`.
    pub(super) fn allocate(device: &DeviceUuid, bytes: u64, claim: Claim) -> Result<Memory> {
        let memfd = sealed(device, bytes)?;
        let mapping =
            Mapping::shared(&memfd, bytes).map_err(|error| failed("mmap", device, &error))?;
        if let Some(node) = device.host_node() {
            numa::settle(device, node, &mapping)?;
        }
        Ok(Self {
            place: Place::Device(device.clone()),
            origin: Origin::Exportable,
            mapping: Some(mapping),
            memfd: Some(memfd),
            _claim: Some(claim),
        }
        .into_memory(device))
    }

    /// Zeroed host memory near `device`.
    pub(super) fn anonymous(device: &DeviceUuid, bytes: u64) -> Result<Memory> {
        let mapping = Mapping::anonymous(bytes).map_err(|error| failed("mmap", device, &error))?;
        Ok(Self {
            place: Place::Host(device.clone()),
            origin: Origin::Private,
            mapping: Some(mapping),
            memfd: None,
            _claim: None,
        }
        .into_memory(device))
    }

    /// Zeroed host memory near `device` that can be mapped in an address space.
    pub(super) fn host_piece(device: &DeviceUuid, bytes: u64) -> Result<Memory> {
        let memfd = sealed(device, bytes)?;
        let mapping =
            Mapping::shared(&memfd, bytes).map_err(|error| failed("mmap", device, &error))?;
        Ok(Self {
            place: Place::Host(device.clone()),
            origin: Origin::Private,
            mapping: Some(mapping),
            memfd: Some(memfd),
            _claim: None,
        }
        .into_memory(device))
    }

    /// Maps another process's memory, after checking that it can never fault.
    pub(super) fn import(
        device: &DeviceUuid,
        owner: &DeviceUuid,
        memfd: OwnedFd,
        bytes: u64,
    ) -> Result<Memory> {
        let mapping = map_sealed(&memfd, bytes)?;
        let place = match owner.host_node() {
            Some(_) => Place::Host(device.clone()),
            None => Place::Device(owner.clone()),
        };
        Ok(Self {
            place,
            origin: Origin::Private,
            mapping: Some(mapping),
            memfd: Some(memfd),
            _claim: None,
        }
        .into_memory(device))
    }

    /// Memory that the caller keeps mapped.
    pub(super) fn adopt(device: &DeviceUuid, address: u64, bytes: u64) -> Memory {
        let place = Place::Device(device.clone());
        Self::kept(Origin::Adopted, device, place, address, bytes)
    }

    /// A range of an address space, whose farthest bytes are at `place`.
    pub(super) fn of_space(device: &DeviceUuid, place: Place, address: u64, bytes: u64) -> Memory {
        Self::kept(Origin::Space, device, place, address, bytes)
    }

    fn kept(origin: Origin, device: &DeviceUuid, place: Place, address: u64, bytes: u64) -> Memory {
        let arena = Self {
            place,
            origin,
            mapping: None,
            memfd: None,
            _claim: None,
        };
        Memory::new(address, bytes, device.clone(), Box::new(arena))
    }

    /// Puts exportable pages in the place of adopted ones, for as long as the result lives.
    ///
    /// # Safety
    /// Nothing but copies with the result, and other processes, reads or writes the range meanwhile.
    pub(super) unsafe fn lend(memory: &Memory, offset: u64, bytes: u64) -> Result<Memory> {
        let device = memory.device();
        let refuse = |problem: String| DeviceError::Handle {
            action: "export",
            kind: HandleKind::PosixFd,
            problem,
        };
        let pool = Self::of(memory)?;
        if pool.origin != Origin::Adopted {
            let problem = "only an engine's own memory is lent in place";
            return Err(refuse(problem.to_owned()));
        }
        let address = memory.at(offset, bytes)?;
        let page = rustix::param::page_size() as u64;
        let first = address.next_multiple_of(page);
        let last = (address + bytes) / page * page;
        let Some(whole) = last.checked_sub(first).filter(|whole| *whole > 0) else {
            let problem =
                format!("{bytes} bytes at {offset} contain no whole page of {page} bytes");
            return Err(refuse(problem));
        };
        let memfd = sealed(device, whole)?;
        // SAFETY: the range lies in the adopted memory, which its owner keeps mapped and `memory` keeps the owner; the
        // caller promises that nobody else uses it.
        let mapping = unsafe { Mapping::instead(first, whole, memory, &memfd) }
            .map_err(|error| failed("mmap", device, &error))?;
        Ok(Self {
            place: pool.place.clone(),
            origin: Origin::Exportable,
            mapping: Some(mapping),
            memfd: Some(memfd),
            _claim: None,
        }
        .into_memory(device))
    }

    fn into_memory(self, device: &DeviceUuid) -> Memory {
        let (address, bytes) = self
            .mapping
            .as_ref()
            .map_or((0, 0), |mapping| (mapping.address(), mapping.bytes()));
        Memory::new(address, bytes, device.clone(), Box::new(self))
    }

    /// The arena behind a memory, which another backend's memory does not have.
    pub(super) fn of(memory: &Memory) -> Result<&Self> {
        memory.owner().ok_or_else(|| DeviceError::Failed {
            operation: "using memory",
            device: memory.device().clone(),
            problem: "it belongs to another backend; open one layer per process".to_owned(),
        })
    }

    /// Where the bytes are.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }

    /// The file that holds the bytes, if one does.
    pub(super) fn file(&self) -> Option<&OwnedFd> {
        self.memfd.as_ref()
    }

    /// A descriptor that opens the same bytes.
    pub(super) fn descriptor(&self) -> Result<OwnedFd> {
        let refuse = |problem: String| DeviceError::Handle {
            action: "export",
            kind: HandleKind::PosixFd,
            problem,
        };
        let own = self
            .memfd
            .as_ref()
            .filter(|_| self.origin == Origin::Exportable);
        let memfd = own.ok_or_else(|| {
            refuse(
                "only memory of `allocate` can be exported, by the process that allocated it"
                    .to_owned(),
            )
        })?;
        memfd.try_clone().map_err(|error| refuse(error.to_string()))
    }
}

/// Maps another process's memory, after checking that it can never fault.
pub(crate) fn map_sealed(memfd: &OwnedFd, bytes: u64) -> Result<Mapping> {
    let refuse = |problem: String| DeviceError::Handle {
        action: "import",
        kind: HandleKind::PosixFd,
        problem,
    };
    let stat = rustix::fs::fstat(memfd).map_err(|error| refuse(error.to_string()))?;
    let seals = rustix::fs::fcntl_get_seals(memfd).unwrap_or(SealFlags::empty());
    let tmpfs =
        rustix::fs::fstatfs(memfd).is_ok_and(|filesystem| filesystem.f_type as u64 == TMPFS_MAGIC);
    if !tmpfs || !seals.contains(SealFlags::SHRINK) {
        return Err(refuse(
            "it is not a memfd sealed against shrinking; only the host backend's exports are accepted".to_owned(),
        ));
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if bytes == 0 || bytes > size {
        return Err(refuse(format!(
            "{bytes} bytes were promised, but it holds {size}"
        )));
    }
    Mapping::shared(memfd, bytes).map_err(|error| refuse(format!("mmap of {bytes} bytes: {error}")))
}

/// A file of zeroes that keeps its size.
fn sealed(device: &DeviceUuid, bytes: u64) -> Result<OwnedFd> {
    let failed = |operation, error: rustix::io::Errno| failed(operation, device, &error);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memfd = rustix::fs::memfd_create("swiftcache-hbm", flags)
        .map_err(|error| failed("memfd_create", error))?;
    rustix::fs::ftruncate(&memfd, bytes).map_err(|error| failed("ftruncate", error))?;
    // Importers insist on these seals: a file that shrinks under a mapping kills its readers (SIGBUS).
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&memfd, seals).map_err(|error| failed("sealing", error))?;
    Ok(memfd)
}

fn failed(operation: &'static str, device: &DeviceUuid, error: &rustix::io::Errno) -> DeviceError {
    DeviceError::Failed {
        operation,
        device: device.clone(),
        problem: error.to_string(),
    }
}
