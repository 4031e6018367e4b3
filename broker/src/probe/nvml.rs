//! Devices as the NVIDIA driver reports them through NVML. The library is opened at run time. When it lacks something,
//! the broker says so and does not panic.
//!
//! NVML answers for each GPU by itself. When an answer is missing, that figure is unknown. When a GPU is lost, or NVML
//! cannot tell its UUID, that GPU is left out and the others are used.

use std::{collections::HashSet, ffi::OsStr};

use nvml_wrapper::{
    enum_wrappers::device::{P2pCapabilitiesIndex, P2pStatus},
    enums::device::SampleValue,
    error::NvmlError,
    structs::device::FieldId,
};
use parking_lot::Mutex;
use swiftcache_proto::domain::{Device, DeviceUuid, Link, LinkKind};

use super::{LeftOut, Probe};
use crate::error::Unusable;

/// The most NVLinks a GPU has (`NVML_NVLINK_MAX_LINKS`).
const MAX_NVLINKS: u32 = 18;
/// The fields with the speed of each active NVLink, in MB/s in one direction: `NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON`,
/// and `NVML_FI_DEV_NVLINK_GET_SPEED` (of link 0). Some GPUs support neither.
const NVLINK_SPEEDS: [FieldId; 2] = [FieldId(90), FieldId(164)];

/// The node as NVML sees it. Link speeds are the nominal speeds that the driver tells.
pub struct Nvml {
    library: nvml_wrapper::Nvml,
    devices: Vec<Device>,
    /// The facts about each device that could not be read at start, for people, in the order of `devices`.
    doubts: Vec<Vec<String>>,
    left_out: Vec<LeftOut>,
    links: Vec<Link>,
    /// Devices whose HBM use could not be read the last time. The log names each of them once.
    unread: Mutex<HashSet<DeviceUuid>>,
}

type Gpu<'nvml> = nvml_wrapper::Device<'nvml>;

impl Nvml {
    /// Opens the driver's library and reads its devices and links.
    ///
    /// # Errors
    /// When NVML cannot be used.
    pub fn open() -> Result<Self, Unusable> {
        Self::open_at(&swiftcache_proto::nvml::library())
    }

    /// Opens the library at `path`.
    ///
    /// # Errors
    /// When NVML cannot be used.
    pub fn open_at(path: &OsStr) -> Result<Self, Unusable> {
        let name = path.to_string_lossy();
        let failed = |error: NvmlError| Unusable::Failed(format!("{name}: {error}"));
        let library = nvml_wrapper::Nvml::builder()
            .lib_path(path)
            .init()
            .map_err(|error| match error {
                NvmlError::LibloadingError(error) => {
                    Unusable::Absent(format!("{name} cannot be loaded: {error}"))
                }
                error => failed(error),
            })?;
        let count = library.device_count().map_err(failed)?;
        if count == 0 {
            return Err(Unusable::NoDevice(format!("{name} lists no GPU")));
        }
        let (gpus, left_out) = look(&library, count);
        if gpus.is_empty() {
            let reasons: Vec<String> = left_out.iter().map(LeftOut::to_string).collect();
            return Err(Unusable::Failed(format!(
                "{name} lists {count} GPUs, and none can be used: {}",
                reasons.join("; ")
            )));
        }
        let mut doubts: Vec<Vec<String>> = gpus.iter().map(|seen| seen.doubts.clone()).collect();
        let links = links(&gpus, &mut doubts);
        let devices = gpus.into_iter().map(|seen| seen.device).collect();
        Ok(Self {
            devices,
            doubts,
            left_out,
            links,
            unread: Mutex::default(),
            library,
        })
    }

    /// Asks for the GPU by its ordinal. Asked by UUID, NVML finds no GPU at all while one of them is lost.
    fn read_use(&self, device: &Device) -> Result<u64, NvmlError> {
        let gpu = self.library.device_by_index(device.ordinal)?;
        if gpu.uuid()? != device.uuid.as_str() {
            return Err(NvmlError::NotFound);
        }
        let memory = gpu.memory_info()?;
        // The memory that the driver keeps for itself is in use too.
        Ok(memory.total.saturating_sub(memory.free))
    }
}

impl Probe for Nvml {
    fn source(&self) -> String {
        "nvml".to_owned()
    }

    fn devices(&self) -> &[Device] {
        &self.devices
    }

    fn links(&self) -> &[Link] {
        &self.links
    }

    fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    fn doubts(&self, device: &DeviceUuid) -> &[String] {
        let number = self.devices.iter().position(|known| known.uuid == *device);
        number.map_or(&[], |number| &self.doubts[number])
    }

    fn used_bytes(&self, device: &DeviceUuid, _donated: u64) -> Result<u64, String> {
        let Some(known) = self.devices.iter().find(|known| known.uuid == *device) else {
            return Err("it is left out".to_owned());
        };
        let used = self.read_use(known);
        let mut unread = self.unread.lock();
        match used {
            Ok(bytes) => {
                if unread.remove(device) {
                    tracing::info!(%device, "HBM use can be read again");
                }
                Ok(bytes)
            }
            Err(error) => {
                if unread.insert(device.clone()) {
                    tracing::warn!(%device, %error, "HBM use cannot be read");
                }
                Err(format!("HBM use cannot be read: {error}"))
            }
        }
    }
}

/// A GPU that was found at start.
struct Seen<'nvml> {
    gpu: Gpu<'nvml>,
    device: Device,
    /// The GPU's place on the PCI bus, if it can be read.
    bus_id: Option<String>,
    /// The facts that could not be read, for people.
    doubts: Vec<String>,
}

/// Returns the GPUs that can be used and those that cannot. The log says why.
fn look(library: &nvml_wrapper::Nvml, count: u32) -> (Vec<Seen<'_>>, Vec<LeftOut>) {
    let mut gpus = Vec::new();
    let mut left_out = Vec::new();
    for ordinal in 0..count {
        match inspect(library, ordinal) {
            Ok(seen) => {
                for doubt in &seen.doubts {
                    tracing::warn!(ordinal, device = %seen.device.uuid, "{doubt}");
                }
                gpus.push(seen);
            }
            Err(gpu) => {
                tracing::warn!("{gpu}; the broker does not use it");
                left_out.push(gpu);
            }
        }
    }
    (gpus, left_out)
}

fn inspect(library: &nvml_wrapper::Nvml, ordinal: u32) -> Result<Seen<'_>, LeftOut> {
    let refuse = |uuid: Option<&DeviceUuid>, reason: String| LeftOut {
        ordinal,
        uuid: uuid.cloned(),
        reason,
    };
    let gpu = library
        .device_by_index(ordinal)
        .map_err(|error| refuse(None, format!("it cannot be opened: {error}")))?;
    let uuid = gpu
        .uuid()
        .map_err(|error| refuse(None, format!("its UUID cannot be read: {error}")))?;
    let uuid: DeviceUuid = uuid.parse().map_err(|problem| refuse(None, problem))?;
    let mut doubts = Vec::new();
    let mut figures = || -> Result<_, NvmlError> {
        // Most GPUs have no MIG mode, and answer that it is not supported.
        let mig = match gpu.mig_mode() {
            Err(NvmlError::NotSupported) => None,
            answer => known("its MIG mode", answer, &mut doubts)?,
        };
        let name = known("its name", gpu.name(), &mut doubts)?;
        let memory = known("its memory", gpu.memory_info(), &mut doubts)?;
        let pci = known("its place on the PCI bus", gpu.pci_info(), &mut doubts)?;
        Ok((mig, name, memory, pci))
    };
    let (mig, name, memory, pci) =
        figures().map_err(|error| refuse(Some(&uuid), error.to_string()))?;
    if mig.is_some_and(|mode| mode.current != 0) {
        let reason = "MIG is on, and MIG devices cannot share memory between processes";
        return Err(refuse(Some(&uuid), reason.to_owned()));
    }
    Ok(Seen {
        gpu,
        device: Device {
            uuid,
            name: name.unwrap_or_else(|| "unknown".to_owned()),
            hbm_bytes: memory.map_or(0, |memory| memory.total),
            ordinal,
        },
        bus_id: pci.map(|pci| pci.bus_id),
        doubts,
    })
}

/// Returns NVML's answer, or adds to `doubts` why there is none. Fails only when the GPU is lost: then no answer about
/// it is reliable.
fn known<T>(
    what: &str,
    answer: Result<T, NvmlError>,
    doubts: &mut Vec<String>,
) -> Result<Option<T>, NvmlError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(NvmlError::GpuLost) => Err(NvmlError::GpuLost),
        Err(error) => {
            doubts.push(format!("{what} cannot be read: {error}"));
            Ok(None)
        }
    }
}

/// The links between all pairs. When NVML does not tell a link, this becomes a doubt about the device that it starts
/// from.
fn links(gpus: &[Seen<'_>], doubts: &mut [Vec<String>]) -> Vec<Link> {
    let mut links = Vec::new();
    for (from, doubts) in gpus.iter().zip(doubts) {
        let others = (gpus.iter()).filter(|to| to.device.uuid != from.device.uuid);
        for to in others {
            let (kind, bytes_per_second) = match link(from, to, gpus) {
                Ok(found) => found,
                Err(error) => {
                    let doubt = format!(
                        "peer access to {} cannot be read, so nothing is lent over this link: {error}",
                        to.device.uuid
                    );
                    tracing::warn!(device = %from.device.uuid, "{doubt}");
                    doubts.push(doubt);
                    (LinkKind::Host, 0)
                }
            };
            let (from, to) = (&from.device.uuid, &to.device.uuid);
            tracing::debug!(%from, %to, %kind, bytes_per_second, "link");
            links.push(Link {
                from: from.clone(),
                to: to.clone(),
                kind,
                bytes_per_second,
            });
        }
    }
    links
}

/// The link from one GPU to another, and its nominal speed in bytes per second in one direction, or 0 when it is
/// unknown.
fn link(from: &Seen<'_>, to: &Seen<'_>, all: &[Seen<'_>]) -> Result<(LinkKind, u64), NvmlError> {
    let can = |capability| match from.gpu.p2p_status(&to.gpu, capability) {
        Ok(status) => Ok(status == P2pStatus::Ok),
        Err(NvmlError::NotSupported) => Ok(false),
        Err(error) => Err(error),
    };
    if !(can(P2pCapabilitiesIndex::Read)? && can(P2pCapabilitiesIndex::Write)?) {
        return Ok((LinkKind::Host, 0));
    }
    if can(P2pCapabilitiesIndex::NvLink)? {
        return Ok((LinkKind::Nvlink, nvlink_speed(from, to, all).unwrap_or(0)));
    }
    let speed = |seen: &Seen<'_>| pcie_speed(&seen.gpu).unwrap_or(0);
    Ok((LinkKind::Pcie, speed(from).min(speed(to))))
}

/// Adds up the direct links to the peer. When there are none, adds up the links to the switch.
fn nvlink_speed(from: &Seen<'_>, to: &Seen<'_>, all: &[Seen<'_>]) -> Option<u64> {
    let peer = to.bus_id.as_ref()?;
    let (mut direct, mut switched, mut version) = (0, 0, None);
    for link in (0..MAX_NVLINKS).map(|link| from.gpu.link_wrapper_for(link)) {
        if !link.is_active().unwrap_or(false) {
            continue;
        }
        version = version.or_else(|| link.version().ok());
        match link.remote_pci_info() {
            Ok(remote) if remote.bus_id == *peer => direct += 1,
            Ok(remote) if is_gpu(&remote.bus_id, all) => {}
            // The other end is a switch. In a virtual machine, NVML cannot tell its place on the bus.
            _ => switched += 1,
        }
    }
    let links = if direct > 0 { direct } else { switched };
    let speed = reported_nvlink_speed(&from.gpu).or_else(|| nvlink_speed_of(version?));
    Some(links * speed?)
}

fn reported_nvlink_speed(gpu: &Gpu<'_>) -> Option<u64> {
    let fields = gpu.field_values_for(&NVLINK_SPEEDS).ok()?;
    let megabytes = fields.into_iter().find_map(|field| {
        let speed = match field.ok()?.value.ok()? {
            SampleValue::U32(speed) => u64::from(speed),
            SampleValue::U64(speed) => speed,
            SampleValue::I64(speed) => u64::try_from(speed).ok()?,
            SampleValue::F64(speed) => speed as u64,
        };
        (speed > 0).then_some(speed)
    });
    Some(megabytes? * 1_000_000)
}

/// Bytes per second of one NVLink in one direction, by `nvmlNvlinkVersion_t`. These are the speeds that `nvidia-smi
/// nvlink
/// -s` prints for P100, V100, A100, H100 and B200.
fn nvlink_speed_of(version: u32) -> Option<u64> {
    match version {
        1 => Some(19_531_000_000),
        2..=5 => Some(25_781_000_000),
        6 => Some(26_562_000_000),
        7 => Some(53_125_000_000),
        _ => None,
    }
}

fn is_gpu(bus_id: &str, all: &[Seen<'_>]) -> bool {
    all.iter()
        .any(|seen| seen.bus_id.as_deref() == Some(bus_id))
}

fn pcie_speed(gpu: &Gpu<'_>) -> Option<u64> {
    let lanes = u64::from(gpu.max_pcie_link_width().ok()?);
    Some(lanes * pcie_lane_speed(gpu.max_pcie_link_gen().ok()?))
}

/// Bytes per second of one PCIe lane in one direction, without the overhead of line coding, by generation.
fn pcie_lane_speed(generation: u32) -> u64 {
    match generation {
        1 => 250_000_000,
        2 => 500_000_000,
        3 => 984_600_000,
        4 => 1_969_200_000,
        5 => 3_938_500_000,
        6 => 7_563_000_000,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_of_nvlink_has_its_rate_and_an_unknown_one_has_none() {
        // An H100 and a B200 have 18 links. In one direction, their datasheets say 450 and 900 GB/s without coding.
        let eighteen = |version| nvlink_speed_of(version).map(|speed| 18 * speed / 1_000_000_000);
        assert_eq!((eighteen(6), eighteen(7)), (Some(478), Some(956)));
        assert_eq!((eighteen(0), eighteen(8)), (None, None));
    }
}
