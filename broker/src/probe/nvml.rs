//! Devices as the NVIDIA driver reports them through NVML. The library is opened at run time; what it lacks is
//! a reason in words, never a panic.

use std::ffi::OsStr;

use nvml_wrapper::{
    enum_wrappers::device::{P2pCapabilitiesIndex, P2pStatus},
    enums::device::SampleValue,
    error::NvmlError,
    structs::device::FieldId,
};
use swiftcache_proto::domain::{Device, DeviceUuid, Link, LinkKind};

use super::Probe;

/// The library's name; its major version has been 1 since there is NVML.
const LIBRARY: &str = "libnvidia-ml.so.1";
/// The most NVLinks a GPU has (`NVML_NVLINK_MAX_LINKS`).
const MAX_NVLINKS: u32 = 18;
/// The speed of each active NVLink, MB/s in one direction: `NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON`, and
/// `NVML_FI_DEV_NVLINK_GET_SPEED` (of link 0), of which a GPU may support neither.
const NVLINK_SPEEDS: [FieldId; 2] = [FieldId(90), FieldId(164)];

/// The node as NVML sees it. Link speeds are the driver's nominal ones.
pub struct Nvml {
    library: nvml_wrapper::Nvml,
    devices: Vec<Device>,
    links: Vec<Link>,
}

type Gpu<'nvml> = nvml_wrapper::Device<'nvml>;

impl Nvml {
    /// Opens the driver's library and looks at its devices and links.
    ///
    /// # Errors
    /// Why it cannot be used, for people.
    pub fn open() -> Result<Self, String> {
        Self::open_at(LIBRARY.as_ref())
    }

    /// Opens the library at `path`.
    ///
    /// # Errors
    /// Why it cannot be used, for people.
    pub fn open_at(path: &OsStr) -> Result<Self, String> {
        let name = path.to_string_lossy();
        let library = nvml_wrapper::Nvml::builder()
            .lib_path(path)
            .init()
            .map_err(|error| match error {
                NvmlError::LibloadingError(error) => format!("{name} cannot be loaded: {error}"),
                error => format!("{name}: {error}"),
            })?;
        let (devices, links) = look(&library).map_err(|error| format!("{name}: {error}"))?;
        if devices.is_empty() {
            return Err(format!("{name} reports no usable GPU"));
        }
        Ok(Self {
            library,
            devices,
            links,
        })
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

    fn used_bytes(&self, device: &DeviceUuid, _donated: u64) -> Option<u64> {
        let memory = self
            .library
            .device_by_uuid(device.as_str())
            .and_then(|gpu| gpu.memory_info());
        memory
            .inspect_err(|error| tracing::warn!(%device, %error, "HBM use cannot be read"))
            .ok()
            .map(|memory| memory.used)
    }
}

fn look(library: &nvml_wrapper::Nvml) -> Result<(Vec<Device>, Vec<Link>), NvmlError> {
    let mut gpus = Vec::new();
    for ordinal in 0..library.device_count()? {
        let gpu = library.device_by_index(ordinal)?;
        let uuid = gpu.uuid()?;
        let Ok(uuid) = uuid.parse::<DeviceUuid>() else {
            tracing::warn!(ordinal, uuid, "left out: its UUID is no device UUID");
            continue;
        };
        if gpu.mig_mode().is_ok_and(|mode| mode.current != 0) {
            tracing::warn!(%uuid, "left out: MIG is on, and MIG devices cannot share memory between processes");
            continue;
        }
        let device = Device {
            uuid,
            name: gpu.name()?,
            hbm_bytes: gpu.memory_info()?.total,
            ordinal,
        };
        gpus.push((device, gpu));
    }
    let mut links = Vec::new();
    for (from, gpu) in &gpus {
        for (to, other) in gpus.iter().filter(|(to, _)| to.uuid != from.uuid) {
            let (kind, bytes_per_second) = link(gpu, other, &gpus);
            tracing::debug!(from = %from.uuid, to = %to.uuid, %kind, bytes_per_second, "link");
            links.push(Link {
                from: from.uuid.clone(),
                to: to.uuid.clone(),
                kind,
                bytes_per_second,
            });
        }
    }
    let devices = gpus.into_iter().map(|(device, _)| device).collect();
    Ok((devices, links))
}

/// The link from one GPU to another and its nominal speed, bytes per second in one direction; 0 when unknown.
fn link(from: &Gpu<'_>, to: &Gpu<'_>, all: &[(Device, Gpu<'_>)]) -> (LinkKind, u64) {
    let can = |capability| matches!(from.p2p_status(to, capability), Ok(P2pStatus::Ok));
    if !(can(P2pCapabilitiesIndex::Read) && can(P2pCapabilitiesIndex::Write)) {
        return (LinkKind::Host, 0);
    }
    if can(P2pCapabilitiesIndex::NvLink) {
        return (LinkKind::Nvlink, nvlink_speed(from, to, all).unwrap_or(0));
    }
    let speed = |gpu| pcie_speed(gpu).unwrap_or(0);
    (LinkKind::Pcie, speed(from).min(speed(to)))
}

/// Direct links to the peer count; when there are none, the links to the switch do.
fn nvlink_speed(from: &Gpu<'_>, to: &Gpu<'_>, all: &[(Device, Gpu<'_>)]) -> Option<u64> {
    let peer = to.pci_info().ok()?.bus_id;
    let (mut direct, mut switched, mut version) = (0, 0, None);
    for link in (0..MAX_NVLINKS).map(|link| from.link_wrapper_for(link)) {
        if !link.is_active().unwrap_or(false) {
            continue;
        }
        version = version.or_else(|| link.version().ok());
        match link.remote_pci_info() {
            Ok(remote) if remote.bus_id == peer => direct += 1,
            Ok(remote) if is_gpu(&remote.bus_id, all) => {}
            // A switch; in a virtual machine it cannot be named.
            _ => switched += 1,
        }
    }
    let links = if direct > 0 { direct } else { switched };
    let speed = reported_nvlink_speed(from).or_else(|| nvlink_speed_of(version?));
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

/// Bytes per second of one NVLink in one direction, by `nvmlNvlinkVersion_t`: what `nvidia-smi nvlink -s` prints for
/// P100, V100, A100, H100 and B200.
fn nvlink_speed_of(version: u32) -> Option<u64> {
    match version {
        1 => Some(19_531_000_000),
        2..=5 => Some(25_781_000_000),
        6 => Some(26_562_000_000),
        7 => Some(53_125_000_000),
        _ => None,
    }
}

fn is_gpu(bus_id: &str, all: &[(Device, Gpu<'_>)]) -> bool {
    all.iter()
        .any(|(_, gpu)| gpu.pci_info().is_ok_and(|pci| pci.bus_id == bus_id))
}

fn pcie_speed(gpu: &Gpu<'_>) -> Option<u64> {
    let lanes = u64::from(gpu.max_pcie_link_width().ok()?);
    Some(lanes * pcie_lane_speed(gpu.max_pcie_link_gen().ok()?))
}

/// Bytes per second of one PCIe lane in one direction after line coding, by generation.
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
        // 18 links of an H100 and of a B200 in one direction: the 450 and 900 GB/s of their datasheets, and coding.
        let eighteen = |version| nvlink_speed_of(version).map(|speed| 18 * speed / 1_000_000_000);
        assert_eq!((eighteen(6), eighteen(7)), (Some(478), Some(956)));
        assert_eq!((eighteen(0), eighteen(8)), (None, None));
    }
}
