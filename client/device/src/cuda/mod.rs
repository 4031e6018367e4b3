//! Real HBM, through the CUDA driver.
//!
//! The driver is loaded at run time; nothing here needs a toolkit to build or a GPU to be compiled. A context
//! (some 500 MB of HBM) is made on a device only when something is allocated, imported or copied there, and
//! never on a donor's device: an importer maps with its own device current.

mod arena;
mod batch;
mod context;
mod driver;
mod gather;
mod gpu;
mod lane;
mod lent;
mod refusal;
mod route;
mod space;
mod stream;
mod ticket;
mod virtual_range;

use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_int},
    sync::Arc,
};

use parking_lot::Mutex;
use swiftcache_proto::domain::{
    Device, DeviceUuid, Handle, HandleKind, Link, LinkKind, OpaqueHandle,
};

use super::{
    AddressSpaces, Base, CopyStream, DeviceError, DeviceLayer, Export, Hbm, Memory, Result,
};
use arena::Arena;
use context::Context;
use driver::{Calls, Driver, sys, unavailable};
use gpu::Gpu;
use refusal::refuse_import;
use stream::CudaStream;

pub use driver::LIBRARY_VARIABLE;
pub use route::Route;
pub use stream::Method;

/// The GPUs that this process enumerates, and how far those of its node are that it does not.
#[derive(Debug)]
pub struct CudaLayer {
    driver: Arc<Driver>,
    devices: Vec<Device>,
    /// Those between the devices are the driver's. Those to others of the node are what the opener said.
    links: Vec<Link>,
    kinds: Vec<HandleKind>,
    /// The driver's number for each device.
    numbers: HashMap<DeviceUuid, sys::CUdevice>,
    /// Devices in use. Made on first use, and kept: making one takes 0.1 s or more.
    gpus: Mutex<HashMap<DeviceUuid, Arc<Gpu>>>,
    /// Legacy handles of this process, which it cannot open itself.
    exported: Mutex<Vec<OpaqueHandle>>,
}

impl CudaLayer {
    /// Loads the driver, the one that [`LIBRARY_VARIABLE`] names or the system's, and lists its devices.
    ///
    /// # Errors
    /// [`DeviceError::Unavailable`] when there is no driver or no GPU, naming what is missing.
    pub fn open() -> Result<Self> {
        Self::open_on(&[])
    }

    /// As [`open`](Self::open), on a node whose broker named these links. A process needs them for GPUs that it does not
    /// enumerate: it can map their memory by descriptor, and the driver tells nothing about them.
    ///
    /// # Errors
    /// As those of [`open`](Self::open).
    pub fn open_on(node: &[Link]) -> Result<Self> {
        let driver = Driver::load()?;
        let unlisted = |code| {
            let problem = driver.describe(code);
            unavailable(format!("the driver does not list its GPUs: {problem}"))
        };
        let listed = |code| match code {
            driver::SUCCESS => Ok(()),
            code => Err(unlisted(code)),
        };
        let calls = driver.calls().map_err(unlisted)?;
        let mut count: c_int = 0;
        // SAFETY: one int is written, to one of ours.
        listed(unsafe { (calls.core().device_count)(&raw mut count) })?;
        if count == 0 {
            return Err(unavailable(
                "the driver shows no GPU to this process; check CUDA_VISIBLE_DEVICES and the container's devices",
            ));
        }
        let mut devices = Vec::new();
        let mut numbers = HashMap::new();
        for ordinal in 0..count {
            let mut number = 0;
            // SAFETY: the ordinal is below the count; one number is written, to one of ours.
            listed(unsafe { (calls.core().device_get)(&raw mut number, ordinal) })?;
            let device = describe(&calls, number, ordinal.unsigned_abs())?;
            numbers.insert(device.uuid.clone(), number);
            devices.push(device);
        }
        let mut links = find_links(&calls, &devices, &numbers)?;
        let hidden = node
            .iter()
            .filter(|link| numbers.contains_key(&link.from) != numbers.contains_key(&link.to));
        links.extend(hidden.cloned());
        let kinds = find_kinds(&calls, &numbers);
        drop(calls);
        Ok(Self {
            driver,
            devices,
            links,
            kinds,
            numbers,
            gpus: Mutex::default(),
            exported: Mutex::default(),
        })
    }

    /// A stream that copies by one method whatever the pieces' size: for measuring which is best.
    ///
    /// # Errors
    /// When the device is unknown or the driver refuses.
    pub fn stream_by(&self, device: &DeviceUuid, method: Method) -> Result<Arc<dyn CopyStream>> {
        Ok(Arc::new(CudaStream::create(self.gpu(device)?, method)?))
    }

    /// The driver's version as it counts (12080 is CUDA 12.8), and which optional entry points it lacks.
    pub fn driver(&self) -> (i32, &[&'static str]) {
        (self.driver.version, &self.driver.absent)
    }

    fn number(&self, uuid: &DeviceUuid) -> Result<sys::CUdevice> {
        let number = self.numbers.get(uuid).copied();
        number.ok_or_else(|| DeviceError::UnknownDevice { uuid: uuid.clone() })
    }

    fn gpu(&self, uuid: &DeviceUuid) -> Result<Arc<Gpu>> {
        let number = self.number(uuid)?;
        let mut gpus = self.gpus.lock();
        if let Some(gpu) = gpus.get(uuid) {
            return Ok(Arc::clone(gpu));
        }
        let context = Context::retain(Arc::clone(&self.driver), uuid.clone(), number)?;
        let gpu = Gpu::new(context);
        gpus.insert(uuid.clone(), Arc::clone(&gpu));
        Ok(gpu)
    }

    fn context(&self, uuid: &DeviceUuid) -> Result<Arc<Context>> {
        Ok(Arc::clone(&self.gpu(uuid)?.context))
    }

    /// How far `device` is from memory of `owner` that is to be imported for it.
    fn route(&self, device: &DeviceUuid, owner: &DeviceUuid, kind: HandleKind) -> Result<Route> {
        let link = match self.numbers.contains_key(owner) {
            true => self.link_kind(device, owner),
            false => self.hidden_link(device, owner, kind)?,
        };
        match link {
            LinkKind::SameDevice => Ok(Route::Device),
            LinkKind::Nvlink => Ok(Route::Nvlink),
            LinkKind::Pcie => Ok(Route::Pcie),
            LinkKind::Host => Err(refuse_import(
                kind,
                format!(
                    "{device} has no peer access to {owner}: lease from a device that it reaches"
                ),
            )),
        }
    }

    /// The link to a GPU that this process does not enumerate: PCIe if nobody said, since the driver refuses the import
    /// where there is no peer access.
    fn hidden_link(
        &self,
        device: &DeviceUuid,
        owner: &DeviceUuid,
        kind: HandleKind,
    ) -> Result<LinkKind> {
        if kind != HandleKind::PosixFd {
            return Err(refuse_import(
                kind,
                format!(
                    "this process does not enumerate {owner}, and a legacy handle is opened only by one that does: \
                     have the donor lend by descriptor (swiftcache donate --handle posix-fd), or list that GPU in \
                     CUDA_VISIBLE_DEVICES"
                ),
            ));
        }
        let mut links = self.links.iter();
        let link = links.find(|link| link.from == *device && link.to == *owner);
        Ok(link.map_or(LinkKind::Pcie, |link| link.kind))
    }
}

impl DeviceLayer for CudaLayer {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn devices(&self) -> &[Device] {
        &self.devices
    }

    fn links(&self) -> &[Link] {
        &self.links
    }

    /// Makes a context on the device if this process has none there yet.
    fn hbm(&self, device: &DeviceUuid) -> Result<Hbm> {
        let context = self.context(device)?;
        let entered = context.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current; two numbers are written, to two of ours.
        let code = unsafe { (entered.core().memory_info)(&raw mut free, &raw mut total) };
        context.check(code, "asking for free HBM")?;
        Ok(Hbm {
            free: free as u64,
            total: total as u64,
        })
    }

    fn allocate(&self, device: &DeviceUuid, bytes: u64, kind: HandleKind) -> Result<Memory> {
        let context = self.context(device)?;
        if !self.kinds.contains(&kind) {
            return Err(DeviceError::Handle {
                action: "export",
                kind,
                problem: format!("this driver and device offer {:?}", self.kinds),
            });
        }
        Arena::allocate(&context, bytes, kind)
    }

    fn allocate_host(&self, device: &DeviceUuid, bytes: u64) -> Result<Memory> {
        Arena::host(&self.context(device)?, bytes)
    }

    fn handle_kinds(&self) -> &[HandleKind] {
        &self.kinds
    }

    fn export(&self, memory: &Memory) -> Result<Export> {
        let export = Arena::of(memory)?.export()?;
        if let Export::Opaque(Handle::CudaIpc(handle)) = &export {
            let mut exported = self.exported.lock();
            if !exported.contains(handle) {
                exported.push(handle.clone());
            }
        }
        Ok(export)
    }

    fn base(&self, memory: &Memory) -> Result<Base> {
        Arena::of(memory)?.base(memory)
    }

    fn import(
        &self,
        device: &DeviceUuid,
        owner: &DeviceUuid,
        export: Export,
        bytes: u64,
    ) -> Result<Memory> {
        match export {
            Export::Opaque(Handle::CudaIpc(handle)) => {
                let route = self.route(device, owner, HandleKind::CudaIpc)?;
                if self.exported.lock().contains(&handle) {
                    return Err(refuse_import(
                        HandleKind::CudaIpc,
                        "this process exported it, and CUDA opens a handle in other processes only: use the \
                         memory itself"
                            .to_owned(),
                    ));
                }
                Arena::open(&self.context(device)?, route, &handle, bytes)
            }
            Export::Fd(descriptor) if owner.host_node().is_some() => {
                Arena::register(&self.context(device)?, &descriptor, bytes)
            }
            Export::Fd(descriptor) => {
                let route = self.route(device, owner, HandleKind::PosixFd)?;
                Arena::import(&self.context(device)?, route, &descriptor, bytes)
            }
            Export::Opaque(handle) => Err(refuse_import(
                handle.kind(),
                "the cuda backend opens CudaIpc handles and descriptors".to_owned(),
            )),
        }
    }

    fn address_spaces(&self) -> Option<&dyn AddressSpaces> {
        let has = self.kinds.contains(&HandleKind::PosixFd);
        has.then_some(self as &dyn AddressSpaces)
    }

    fn stream(&self, device: &DeviceUuid) -> Result<Arc<dyn CopyStream>> {
        self.stream_by(device, Method::Pick)
    }

    unsafe fn adopt_memory(&self, device: &DeviceUuid, address: u64, bytes: u64) -> Result<Memory> {
        Arena::adopt(&self.context(device)?, address, bytes)
    }

    unsafe fn lend(&self, memory: &Memory, offset: u64, bytes: u64) -> Result<Memory> {
        // SAFETY: the caller promises the same.
        unsafe { Arena::lend(memory, offset, bytes) }
    }

    fn has_foreign_streams(&self) -> bool {
        true
    }

    unsafe fn adopt_stream(&self, device: &DeviceUuid, raw: u64) -> Result<Arc<dyn CopyStream>> {
        Ok(Arc::new(CudaStream::adopt(self.gpu(device)?, raw as usize)))
    }
}

fn describe(calls: &Calls<'_>, number: sys::CUdevice, ordinal: u32) -> Result<Device> {
    let (core, driver) = (calls.core(), calls.driver());
    let mut raw = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: one UUID is written, to one of ours.
    let code = unsafe { (core.device_uuid)(&raw mut raw, number) };
    let unlisted = |problem: String| unavailable(format!("GPU {ordinal}: {problem}"));
    if code != driver::SUCCESS {
        return Err(unlisted(driver.describe(code)));
    }
    let uuid = format_uuid(raw.bytes.map(|byte| byte as u8));
    let uuid: DeviceUuid = uuid.parse().map_err(unlisted)?;
    let mut total = 0;
    // SAFETY: one number is written, to one of ours.
    let code = unsafe { (core.device_total)(&raw mut total, number) };
    driver.check(code, "asking for total HBM", &uuid)?;
    let mut name: [c_char; 128] = [0; 128];
    // SAFETY: at most the given 128 bytes are written, to 128 of ours.
    let code = unsafe { (core.device_name)(name.as_mut_ptr(), name.len() as c_int, number) };
    driver.check(code, "asking for the name", &uuid)?;
    let name = name.map(|byte| byte as u8);
    let name = CStr::from_bytes_until_nul(&name).map_or("GPU".into(), CStr::to_string_lossy);
    Ok(Device {
        uuid,
        name: name.into_owned(),
        hbm_bytes: total as u64,
        ordinal,
    })
}

/// As NVML prints it, so that the broker's and this process's names agree.
fn format_uuid(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let [a, b, c, d, e] = [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ];
    format!("GPU-{a}-{b}-{c}-{d}-{e}")
}

/// Every pair with peer access.
fn find_links(
    calls: &Calls<'_>,
    devices: &[Device],
    numbers: &HashMap<DeviceUuid, sys::CUdevice>,
) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    for from in devices {
        for to in devices.iter().filter(|to| to.uuid != from.uuid) {
            let (near, far) = (numbers[&from.uuid], numbers[&to.uuid]);
            let mut access = 0;
            // SAFETY: both devices came from the driver; one int is written, to one of ours.
            let code = unsafe { (calls.core().can_access_peer)(&raw mut access, near, far) };
            (calls.driver()).check(code, "asking for peer access", &from.uuid)?;
            if access == 0 {
                continue;
            }
            let nvlink = calls.nvlink(near, far, &from.uuid)?;
            links.push(Link {
                from: from.uuid.clone(),
                to: to.uuid.clone(),
                kind: if nvlink {
                    LinkKind::Nvlink
                } else {
                    LinkKind::Pcie
                },
                bytes_per_second: 0,
            });
        }
    }
    Ok(links)
}

/// Descriptors, where the driver has virtual memory management and every device exports it: they open also in processes
/// that do not enumerate the device, and between PID namespaces. Then legacy handles, which every driver has.
fn find_kinds(calls: &Calls<'_>, numbers: &HashMap<DeviceUuid, sys::CUdevice>) -> Vec<HandleKind> {
    let attribute =
        sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED;
    let exports = numbers.values().all(|number| {
        let mut supported = 0;
        // SAFETY: one int is written, to one of ours.
        let code =
            unsafe { (calls.core().device_attribute)(&raw mut supported, attribute, *number) };
        code == driver::SUCCESS && supported != 0
    });
    match exports && calls.virtual_memory().is_some() {
        true => vec![HandleKind::PosixFd, HandleKind::CudaIpc],
        false => vec![HandleKind::CudaIpc],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_looks_as_nvml_prints_it() {
        let bytes = [
            0x5a, 0x0b, 0, 0x12, 0xde, 0xad, 0xbe, 0xef, 1, 2, 3, 4, 5, 6, 7, 0xff,
        ];
        let text = format_uuid(bytes);
        assert_eq!(text, "GPU-5a0b0012-dead-beef-0102-0304050607ff");
    }
}
