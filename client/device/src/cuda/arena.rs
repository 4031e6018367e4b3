//! HBM and pinned host memory: allocated, exported, imported or adopted, and given back in the right way.

use std::{
    ffi::{c_int, c_uint, c_void},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    sync::Arc,
};

use swiftcache_proto::domain::{DeviceUuid, Handle, HandleKind, OpaqueHandle};

use super::{
    context::{Context, Entered, report},
    driver::{SUCCESS, sys},
    lane::Lane,
    refusal::{allocated, refuse_export, refuse_import},
    route::Route,
    ticket::Point,
    virtual_range::VirtualRange,
};
use crate::{
    Base, DeviceError, Export, Memory, Result,
    host::{map_sealed, mapping::Mapping},
    stream::Completion,
};

/// Plain allocations are multiples of this, so that none shares its pages with a neighbour: a legacy handle opens
/// whole pages.
const PLAIN_GRANULARITY: u64 = 2 << 20;

/// What keeps a range mapped, and how it goes.
#[derive(Debug)]
pub(super) struct Arena {
    pub(super) context: Arc<Context>,
    address: u64,
    pub(super) kind: Kind,
    /// How far the bytes are from the context's device.
    pub(super) route: Route,
}

#[derive(Debug)]
pub(super) enum Kind {
    /// `cuMemAlloc`: exported by legacy IPC.
    Plain,
    /// `cuMemCreate`, own or imported, of HBM or of host memory, mapped in its own address range.
    Virtual(VirtualRange),
    /// A range of an address space, which keeps what is mapped there.
    Space,
    /// `cuMemHostAlloc`.
    Host,
    /// `cuMemHostRegister`: a donor's host memory, which is unmapped after it is unregistered.
    Registered(Mapping),
    /// Another process's plain allocation.
    Opened,
    /// Somebody else in this process frees it.
    Adopted,
    /// So many bytes of an adopted range, which somebody else in this process leaves alone meanwhile.
    Lent(u64),
}

impl Arena {
    /// Zeroed HBM, exportable as `kind`.
    pub(super) fn allocate(context: &Arc<Context>, bytes: u64, kind: HandleKind) -> Result<Memory> {
        let entered = context.enter()?;
        let refuse = |problem: String| DeviceError::OutOfMemory {
            uuid: context.uuid.clone(),
            bytes,
            problem,
        };
        if bytes == 0 {
            return Err(refuse("an allocation has at least one byte".to_owned()));
        }
        let arena = if kind == HandleKind::PosixFd {
            let range = VirtualRange::create(context, &entered, bytes)?;
            Self::new(
                context,
                range.address(),
                Kind::Virtual(range),
                Route::Device,
            )
        } else {
            let size = bytes
                .checked_next_multiple_of(PLAIN_GRANULARITY)
                .and_then(|size| usize::try_from(size).ok())
                .ok_or_else(|| refuse("no device has as much".to_owned()))?;
            let mut address = 0;
            // SAFETY: the context is current; one address is written, to one of ours.
            let code = unsafe { (entered.core().allocate)(&raw mut address, size) };
            allocated(context, code, "cuMemAlloc", bytes)?;
            Self::new(context, address, Kind::Plain, Route::Device)
        };
        drop(entered);
        arena.zero(bytes)?;
        Ok(arena.into_memory(bytes))
    }

    /// Zeroed, pinned host memory.
    pub(super) fn host(context: &Arc<Context>, bytes: u64) -> Result<Memory> {
        let entered = context.enter()?;
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let mut address: *mut c_void = std::ptr::null_mut();
        // SAFETY: the context is current; one address is written, to one of ours.
        let code = unsafe { (entered.core().allocate_host)(&raw mut address, size, flags) };
        allocated(context, code, "cuMemHostAlloc", bytes)?;
        // SAFETY: the range was just allocated, `size` long, in this process's own address space.
        unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, size) };
        Ok(Self::new(context, address as u64, Kind::Host, Route::Pcie).into_memory(bytes))
    }

    /// Zeroed host memory that can be mapped in an address space.
    pub(super) fn host_piece(context: &Arc<Context>, bytes: u64) -> Result<Memory> {
        let entered = context.enter()?;
        let range = VirtualRange::create_on_host(context, &entered, bytes)?;
        drop(entered);
        let arena = Self::new(context, range.address(), Kind::Virtual(range), Route::Pcie);
        arena.zero(bytes)?;
        Ok(arena.into_memory(bytes))
    }

    /// Maps another process's plain allocation, which is `route` away.
    pub(super) fn open(
        context: &Arc<Context>,
        route: Route,
        handle: &OpaqueHandle,
        bytes: u64,
    ) -> Result<Memory> {
        let entered = context.enter()?;
        let core = entered.core();
        let handle = sys::CUipcMemHandle {
            reserved: handle.0.map(|byte| byte as std::ffi::c_char),
        };
        let mut address = 0;
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
        // SAFETY: the importer's own context is current, so no other is created; one address is written, to one of
        // ours. The driver checks the handle's bytes.
        let code = unsafe { (core.ipc_open)(&raw mut address, handle, flags) };
        if code != SUCCESS {
            let problem = context.driver.describe(code);
            return Err(refuse_import(
                HandleKind::CudaIpc,
                format!(
                    "{problem}; legacy IPC needs the donor alive and in another process, its GPU visible here \
                     ({}), no MIG and no confidential mode. Between separate PID namespaces it has failed where \
                     both processes had the same PID value (this one's is {}): share the PID namespace, or \
                     have the donor export PosixFd",
                    context.uuid,
                    std::process::id()
                ),
            ));
        }
        let arena = Self::new(context, address, Kind::Opened, route);
        let (mut base, mut size) = (0, 0);
        // SAFETY: the address was just mapped; two numbers are written, to two of ours.
        let code = unsafe { (core.address_range)(&raw mut base, &raw mut size, address) };
        context.check(code, "measuring an opened allocation")?;
        let mapped = (base + size as u64).saturating_sub(address);
        if bytes == 0 || bytes > mapped {
            return Err(refuse_import(
                HandleKind::CudaIpc,
                format!("{bytes} bytes were promised, but it holds {mapped}"),
            ));
        }
        Ok(arena.into_memory(bytes))
    }

    /// Maps another process's virtual-memory allocation, which is `route` away.
    pub(super) fn import(
        context: &Arc<Context>,
        route: Route,
        descriptor: &OwnedFd,
        bytes: u64,
    ) -> Result<Memory> {
        let entered = context.enter()?;
        let range = VirtualRange::import(context, &entered, descriptor.as_raw_fd(), bytes)?;
        let arena = Self::new(context, range.address(), Kind::Virtual(range), route);
        Ok(arena.into_memory(bytes))
    }

    /// Maps a donor's host memory, and pins it for every device of this process.
    pub(super) fn register(
        context: &Arc<Context>,
        descriptor: &OwnedFd,
        bytes: u64,
    ) -> Result<Memory> {
        let mapping = map_sealed(descriptor, bytes)?;
        let entered = context.enter()?;
        let core = entered.core();
        let refuse = |code| {
            let problem = context.driver.describe(code);
            refuse_import(
                HandleKind::PosixFd,
                format!(
                    "cuMemHostRegister of {bytes} bytes of host memory: {problem}; the driver pins the donor's pages for this \
                     process, so the machine must have them to spare (check the memory limit of this container, and \
                     ulimit -l)"
                ),
            )
        };
        let start = mapping.address() as *mut c_void;
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the context is current; the range is mapped, ours, and stays so until it is unregistered.
        match unsafe { (core.register_host)(start, bytes as usize, flags) } {
            SUCCESS => {}
            code => return Err(refuse(code)),
        }
        let mut address = 0;
        // SAFETY: the range was registered for devices a moment ago; one address is written, to one of ours.
        let code = unsafe { (core.host_pointer)(&raw mut address, start, 0) };
        if code != SUCCESS {
            // SAFETY: ends our own registration, once.
            let ended = unsafe { (core.unregister_host)(start) };
            report(&context.driver, ended, "cuMemHostUnregister", &context.uuid);
            return Err(refuse(code));
        }
        drop(entered);
        let kind = Kind::Registered(mapping);
        Ok(Self::new(context, address, kind, Route::Pcie).into_memory(bytes))
    }

    /// Memory that an engine of this process allocated.
    pub(super) fn adopt(context: &Arc<Context>, address: u64, bytes: u64) -> Result<Memory> {
        let entered = context.enter()?;
        let failed = |problem: String| DeviceError::Failed {
            operation: "adopting memory",
            device: context.uuid.clone(),
            problem,
        };
        let end = bytes
            .checked_sub(1)
            .and_then(|last| address.checked_add(last));
        let last = end.ok_or_else(|| failed("it is empty or wraps around".to_owned()))?;
        for byte in [address, last] {
            let mut device: c_int = -1;
            let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL;
            // SAFETY: the attribute is an int; one is written, to one of ours. Any address may be asked about.
            let code = unsafe {
                (entered.core().pointer_attribute)((&raw mut device).cast(), attribute, byte)
            };
            context.check(code, "adopting memory")?;
            if device != context.device {
                return Err(failed(format!(
                    "the driver finds it on device {device}, not on {}",
                    context.device
                )));
            }
        }
        // Between them there may be gaps: a pool of expandable segments is many mappings side by side.
        let mut reached = address;
        while reached <= last {
            let (mut base, mut size) = (0, 0);
            // SAFETY: two numbers are written, to two of ours; any address may be asked about.
            let code =
                unsafe { (entered.core().address_range)(&raw mut base, &raw mut size, reached) };
            context.check(code, "adopting memory")?;
            reached = (base.checked_add(size as u64))
                .filter(|end| *end > reached)
                .ok_or_else(|| failed("the driver's range for it is empty".to_owned()))?;
        }
        Ok(Self::new(context, address, Kind::Adopted, Route::Device).into_memory(bytes))
    }

    pub(super) fn new(context: &Arc<Context>, address: u64, kind: Kind, route: Route) -> Self {
        Self {
            context: Arc::clone(context),
            address,
            kind,
            route,
        }
    }

    pub(super) fn into_memory(self, bytes: u64) -> Memory {
        let (address, device) = (self.address, self.context.uuid.clone());
        Memory::new(address, bytes, device, Box::new(self))
    }

    /// Zeroes the beginning of the range. Nothing writes there any more when it returns, however it went.
    pub(super) fn zero(&self, bytes: u64) -> Result<()> {
        let context = &self.context;
        let lane = Lane::create(context)?;
        let entered = context.enter()?;
        // SAFETY: the range is `bytes` long or more, and nobody else uses it: it was just allocated, or is being lent
        // or given back. It stays until the ticket below is over.
        let code =
            unsafe { (entered.core().set_bytes)(self.address, 0, bytes as usize, lane.raw()) };
        let queued = context.check(code, "zeroing memory");
        let mark = lane.mark(&entered).ok();
        drop(entered);
        let done = Point::new(&lane, 1, mark).wait();
        queued.and(done)
    }

    /// The arena behind a memory, which another backend's memory does not have.
    pub(super) fn of(memory: &Memory) -> Result<&Self> {
        memory.owner().ok_or_else(|| DeviceError::Failed {
            operation: "using memory",
            device: memory.device().clone(),
            problem: "it belongs to another backend; open one layer per process".to_owned(),
        })
    }

    /// How far the bytes are from `context`; nothing if its kernels may not touch them, as the driver's copies may in
    /// any case. Sees to it that they may where that is possible.
    pub(super) fn reachable_from(
        &self,
        context: &Context,
        entered: &Entered<'_>,
    ) -> Result<Option<Route>> {
        if context.device == self.context.device {
            return Ok(Some(self.route));
        }
        match &self.kind {
            Kind::Host | Kind::Registered(_) => Ok(Some(self.route)),
            Kind::Plain | Kind::Adopted | Kind::Lent(_) => context.reach(&self.context, entered),
            Kind::Virtual(range) => {
                range.admit(context, entered)?;
                Ok(Some(self.route.max(context.route(&self.context, entered)?)))
            }
            Kind::Opened | Kind::Space => Err(self.foreign(&context.uuid)),
        }
    }

    fn foreign(&self, device: &DeviceUuid) -> DeviceError {
        DeviceError::Failed {
            operation: "copying",
            device: device.clone(),
            problem: format!(
                "the memory was imported or reserved for {}: do the same for this device",
                self.context.uuid
            ),
        }
    }

    /// Where the range lies in its allocation, which is what a legacy handle opens.
    pub(super) fn base(&self, memory: &Memory) -> Result<Base> {
        let whole = Base {
            offset: 0,
            bytes: memory.bytes(),
        };
        let (Kind::Adopted | Kind::Lent(_)) = self.kind else {
            return Ok(whole);
        };
        let entered = self.context.enter()?;
        let (mut base, mut size) = (0, 0);
        // SAFETY: two numbers are written, to two of ours; any address may be asked about.
        let code =
            unsafe { (entered.core().address_range)(&raw mut base, &raw mut size, self.address) };
        self.context.check(code, "finding an allocation's base")?;
        Ok(Base {
            offset: self.address - base,
            bytes: size as u64,
        })
    }

    /// Makes the allocation openable by other processes.
    pub(super) fn export(&self) -> Result<Export> {
        let entered = self.context.enter()?;
        match &self.kind {
            Kind::Plain | Kind::Adopted | Kind::Lent(_) => {
                self.export_ipc(&entered).map(Export::Opaque)
            }
            Kind::Virtual(range) => {
                let descriptor = range.export(&self.context, &entered)?;
                // SAFETY: the driver made this descriptor for us a moment ago; nobody else owns it.
                Ok(Export::Fd(unsafe { OwnedFd::from_raw_fd(descriptor) }))
            }
            Kind::Host | Kind::Registered(_) | Kind::Opened | Kind::Space => Err(refuse_export(
                HandleKind::CudaIpc,
                "only HBM can be exported, by the process that allocated it",
            )),
        }
    }

    fn export_ipc(&self, entered: &Entered<'_>) -> Result<Handle> {
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        let driver = &self.context.driver;
        // SAFETY: one handle is written, to one of ours; the driver checks the address.
        let code = unsafe { (entered.core().ipc_export)(&raw mut handle, self.address) };
        if code != SUCCESS {
            let problem = driver.describe(code);
            return Err(refuse_export(
                HandleKind::CudaIpc,
                &format!(
                    "{problem}; legacy IPC takes plain cuMemAlloc memory only, and no MIG device. An engine's \
                     pool must not be virtual-memory or stream-ordered (PyTorch: leave expandable_segments \
                     and cudaMallocAsync off; vLLM: no sleep mode)"
                ),
            ));
        }
        let bytes = handle.reserved.map(|byte| byte as u8);
        Ok(Handle::CudaIpc(OpaqueHandle(bytes)))
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        let Ok(entered) = self.context.enter() else {
            return; // the driver is gone or the device lost, and the memory with it
        };
        let core = entered.core();
        // SAFETY: each range ends once, in the way it began; whoever could still copy in it would hold the
        // `Memory` that owns this arena.
        let (code, operation) = unsafe {
            match &self.kind {
                Kind::Plain => ((core.free)(self.address), "cuMemFree"),
                Kind::Host => (
                    (core.free_host)(self.address as *mut c_void),
                    "cuMemFreeHost",
                ),
                Kind::Registered(mapping) => (
                    (core.unregister_host)(mapping.address() as *mut c_void),
                    "cuMemHostUnregister",
                ),
                Kind::Opened => ((core.ipc_close)(self.address), "cuIpcCloseMemHandle"),
                Kind::Virtual(range) => (range.unmap(&self.context, &entered), "cuMemUnmap"),
                Kind::Adopted | Kind::Space => return,
                Kind::Lent(bytes) => {
                    drop(entered);
                    return self.zero_returned(*bytes);
                }
            }
        };
        report(&self.context.driver, code, operation, &self.context.uuid);
    }
}
