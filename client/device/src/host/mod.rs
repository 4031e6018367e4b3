//! Devices made of shared memory: a working backend for machines without a GPU.
//!
//! An allocation is a sealed memfd, mapped shared; another process maps the same bytes through its descriptor.
//! Copies are plain memory copies on one thread per stream. A link model can pace them (see [`HostOptions`]), so
//! that overlap and ratios of links can be measured; figures from it are figures of the model.
//!
//! Host memory of a NUMA node (`HOST-n`) is lent by this backend too, whatever backend borrows it: its device is real.

mod arena;
pub(crate) mod mapping;
mod maps;
mod numa;
mod pacing;
mod space;
mod stream;
mod usage;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use swiftcache_proto::{
    domain::{Device, DeviceUuid, HandleKind, Link},
    topology::Topology,
};

use super::{AddressSpaces, CopyStream, DeviceError, DeviceLayer, Export, Hbm, Memory, Result};
use arena::Arena;
pub(crate) use arena::map_sealed;
use pacing::LinkModel;
use stream::HostStream;
use usage::Usage;

/// What PCIe 5.0 x16 moves in one direction in practice, bytes per second: the default pace of host memory.
pub const PCIE_5_BYTES_PER_SECOND: u64 = 55_000_000_000;

/// How the host backend behaves.
#[derive(Clone, Debug)]
pub struct HostOptions {
    /// Where processes and simulated neighbours say how much HBM they use: `<dir>/<uuid>` holds a neighbour's
    /// bytes in decimal, `<dir>/alloc/<uuid>.<pid>` a process's own. Without it a process sees only itself.
    pub usage_dir: Option<PathBuf>,
    /// Whether a copy completes no earlier than its link would allow. The links' rates come from the topology;
    /// links of this process's streams are shared between them, other processes' copies are not modelled.
    pub pacing: bool,
    /// The rate of copies to and from host memory, and between devices without a link, bytes per second. Only
    /// with `pacing`.
    pub host_bytes_per_second: u64,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            usage_dir: None,
            pacing: false,
            host_bytes_per_second: PCIE_5_BYTES_PER_SECOND,
        }
    }
}

/// Devices made of shared memory.
#[derive(Debug)]
pub struct HostLayer {
    devices: Vec<Device>,
    links: Vec<Link>,
    usage: Arc<Usage>,
    pace: Option<Arc<LinkModel>>,
    lost: HashMap<DeviceUuid, Arc<Lost>>,
}

/// Why a device is lost, once it is.
#[derive(Debug, Default)]
struct Lost(OnceLock<DeviceError>);

impl Lost {
    fn check(&self) -> Result<()> {
        self.0.get().map_or(Ok(()), |error| Err(error.clone()))
    }
}

impl HostLayer {
    /// A layer of these devices, joined by these links (both directions listed).
    ///
    /// # Errors
    /// When a device's UUID cannot be a file name, or the usage directory cannot be used.
    pub fn new(devices: Vec<Device>, links: Vec<Link>, options: HostOptions) -> Result<Self> {
        let usage = Usage::open(options.usage_dir.as_deref(), &devices)?;
        let pace = options
            .pacing
            .then(|| Arc::new(LinkModel::new(&links, options.host_bytes_per_second)));
        let lost = devices
            .iter()
            .map(|device| (device.uuid.clone(), Arc::default()))
            .collect();
        Ok(Self {
            devices,
            links,
            usage,
            pace,
            lost,
        })
    }

    /// The simulated node of a topology file.
    ///
    /// # Errors
    /// See [`new`](Self::new).
    pub fn from_topology(topology: &Topology, pacing: bool) -> Result<Self> {
        Self::new(
            topology.devices.clone(),
            topology.links.clone(),
            HostOptions {
                usage_dir: topology.usage_dir.clone(),
                pacing,
                ..HostOptions::default()
            },
        )
    }

    /// Makes a device fail for good, as a GPU that falls off its bus does: every later operation on it, and
    /// every stream of it, returns an error with this problem.
    ///
    /// # Errors
    /// When there is no such device.
    pub fn lose(&self, device: &DeviceUuid, problem: &str) -> Result<()> {
        let error = DeviceError::Failed {
            operation: "every operation",
            device: device.clone(),
            problem: format!("the device is lost: {problem}"),
        };
        // Losing a device twice keeps the first reason.
        let _ = self.lost(device)?.0.set(error);
        Ok(())
    }

    fn device(&self, uuid: &DeviceUuid) -> Result<&Device> {
        let device = self.devices.iter().find(|device| device.uuid == *uuid);
        let device = device.ok_or_else(|| DeviceError::UnknownDevice { uuid: uuid.clone() })?;
        self.lost(uuid)?.check()?;
        Ok(device)
    }

    fn lost(&self, uuid: &DeviceUuid) -> Result<&Arc<Lost>> {
        self.lost
            .get(uuid)
            .ok_or_else(|| DeviceError::UnknownDevice { uuid: uuid.clone() })
    }
}

impl DeviceLayer for HostLayer {
    fn name(&self) -> &'static str {
        "host"
    }

    fn devices(&self) -> &[Device] {
        &self.devices
    }

    fn links(&self) -> &[Link] {
        &self.links
    }

    fn hbm(&self, device: &DeviceUuid) -> Result<Hbm> {
        let total = self.device(device)?.hbm_bytes;
        let used = self.usage.used(device)?;
        Ok(Hbm {
            free: total.saturating_sub(used),
            total,
        })
    }

    fn allocate(&self, device: &DeviceUuid, bytes: u64, kind: HandleKind) -> Result<Memory> {
        let total = self.device(device)?.hbm_bytes;
        if kind != HandleKind::PosixFd {
            return Err(DeviceError::Handle {
                action: "export",
                kind,
                problem: "the host backend exports descriptors: ask for PosixFd".to_owned(),
            });
        }
        if device.host_node().is_some() {
            numa::check_room(device, bytes)?;
        }
        let claim = Usage::claim(&self.usage, device, bytes, total)?;
        Arena::allocate(device, bytes, claim)
    }

    fn allocate_host(&self, device: &DeviceUuid, bytes: u64) -> Result<Memory> {
        self.device(device)?;
        Arena::anonymous(device, bytes)
    }

    fn handle_kinds(&self) -> &[HandleKind] {
        &[HandleKind::PosixFd]
    }

    fn export(&self, memory: &Memory) -> Result<Export> {
        self.device(memory.device())?;
        Ok(Export::Fd(Arena::of(memory)?.descriptor()?))
    }

    fn import(
        &self,
        device: &DeviceUuid,
        owner: &DeviceUuid,
        export: Export,
        bytes: u64,
    ) -> Result<Memory> {
        self.device(device)?;
        // Every device reaches host memory, which is none of this layer's devices.
        if owner.host_node().is_none() {
            self.device(owner)?;
        }
        match export {
            Export::Fd(descriptor) => Arena::import(device, owner, descriptor, bytes),
            Export::Opaque(handle) => Err(DeviceError::Handle {
                action: "import",
                kind: handle.kind(),
                problem: "the host backend opens descriptors only; run this process with the cuda backend, or the donor with the host one".to_owned(),
            }),
        }
    }

    fn stream(&self, device: &DeviceUuid) -> Result<Arc<dyn CopyStream>> {
        self.device(device)?;
        let lost = Arc::clone(self.lost(device)?);
        let stream = HostStream::start(device.clone(), self.pace.clone(), lost)?;
        Ok(Arc::new(stream))
    }

    unsafe fn adopt_memory(&self, device: &DeviceUuid, address: u64, bytes: u64) -> Result<Memory> {
        self.device(device)?;
        maps::check(address, bytes).map_err(|problem| DeviceError::Failed {
            operation: "adopting memory",
            device: device.clone(),
            problem,
        })?;
        Ok(Arena::adopt(device, address, bytes))
    }

    unsafe fn lend(&self, memory: &Memory, offset: u64, bytes: u64) -> Result<Memory> {
        self.device(memory.device())?;
        // SAFETY: the caller promises the same.
        unsafe { Arena::lend(memory, offset, bytes) }
    }

    fn address_spaces(&self) -> Option<&dyn AddressSpaces> {
        Some(self)
    }

    fn has_foreign_streams(&self) -> bool {
        false
    }

    unsafe fn adopt_stream(&self, device: &DeviceUuid, _raw: u64) -> Result<Arc<dyn CopyStream>> {
        self.device(device)?;
        Err(DeviceError::Unavailable {
            backend: "host",
            problem: "there are no foreign streams here: use the layer's own".to_owned(),
        })
    }
}
