//! The CUDA driver, opened at run time: the only module that names cudarc or libloading.
//!
//! cudarc's own loader panics when the library or a symbol is missing, so only its types are used: every entry
//! point is looked up here, once, and one that is missing is an error that names it.

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    marker::PhantomData,
    path::PathBuf,
    sync::Arc,
};

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_P2PAttribute, CUdevice_attribute, CUdeviceptr, CUevent,
    CUfunction, CUipcMemHandle, CUmemAccessDesc, CUmemAllocationGranularity_flags,
    CUmemAllocationHandleType, CUmemAllocationProp, CUmemGenericAllocationHandle,
    CUmemcpyAttributes, CUmodule, CUpointer_attribute, CUstream, CUuuid,
};
use libloading::{Library, Symbol};
use swiftcache_proto::domain::DeviceUuid;

pub(super) use cudarc::driver::sys;

use crate::{DeviceError, Result};

/// Names the library to load in place of the system's.
pub const LIBRARY_VARIABLE: &str = "SWIFTCACHE_LIBCUDA";
const SYSTEM_LIBRARY: &str = "libcuda.so.1";

/// What an entry point returns. Not cudarc's enum: a newer driver may return a code that it does not list.
pub(super) type Code = c_uint;

pub(super) const SUCCESS: Code = 0;
pub(super) const OUT_OF_MEMORY: Code = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as Code;
pub(super) const NOT_READY: Code = sys::CUresult::CUDA_ERROR_NOT_READY as Code;
pub(super) const PEER_ACCESS_ALREADY_ENABLED: Code =
    sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED as Code;

/// Codes that end a context, as far as CUDA's documentation of `CUresult` says so. Of most it says: "This leaves the
/// process in an inconsistent state and any further CUDA work will return the same error. To continue using CUDA, the
/// process must be terminated and relaunched." Of a failed assertion: "The context cannot be used anymore". Of the first
/// two it says that hardware has lost bytes; drivers end the context then. None is believed before a second call has
/// answered with one of them too: see `Context::suspect`.
pub(super) const FATAL: [Code; 13] = [
    sys::CUresult::CUDA_ERROR_ECC_UNCORRECTABLE as Code,
    sys::CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE as Code,
    sys::CUresult::CUDA_ERROR_CONTAINED as Code,
    sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS as Code,
    sys::CUresult::CUDA_ERROR_LAUNCH_TIMEOUT as Code,
    sys::CUresult::CUDA_ERROR_ASSERT as Code,
    sys::CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR as Code,
    sys::CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION as Code,
    sys::CUresult::CUDA_ERROR_MISALIGNED_ADDRESS as Code,
    sys::CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE as Code,
    sys::CUresult::CUDA_ERROR_INVALID_PC as Code,
    sys::CUresult::CUDA_ERROR_LAUNCH_FAILED as Code,
    sys::CUresult::CUDA_ERROR_TENSOR_MEMORY_LEAK as Code,
];

/// Declares a table of entry points and how to look it up.
macro_rules! entry_points {
    ($(#[$doc:meta])* $table:ident { $($(#[$note:meta])* $name:ident = $symbol:literal ($($argument:ty),*);)* }) => {
        $(#[$doc])*
        pub(super) struct $table {
            $($(#[$note])* pub(super) $name: unsafe extern "C" fn($($argument),*) -> Code,)*
        }

        impl $table {
            /// Looks every entry point up, or names the first one that is missing.
            fn find(library: &Library) -> std::result::Result<Self, &'static str> {
                Ok(Self {
                    // SAFETY: the driver's ABI gives this symbol this signature; the types are cudarc's,
                    // generated from the driver's own header.
                    $($name: *unsafe {
                        let found: std::result::Result<Symbol<'_, unsafe extern "C" fn($($argument),*) -> Code>, _> =
                            library.get($symbol.as_bytes());
                        found
                    }
                    .map_err(|_| $symbol)?,)*
                })
            }
        }
    };
}

entry_points! {
    /// What every supported driver has.
    Core {
        init = "cuInit" (c_uint);
        version = "cuDriverGetVersion" (*mut c_int);
        error_name = "cuGetErrorName" (Code, *mut *const c_char);
        error_text = "cuGetErrorString" (Code, *mut *const c_char);
        device_count = "cuDeviceGetCount" (*mut c_int);
        device_get = "cuDeviceGet" (*mut CUdevice, c_int);
        device_name = "cuDeviceGetName" (*mut c_char, c_int, CUdevice);
        device_uuid = "cuDeviceGetUuid_v2" (*mut CUuuid, CUdevice);
        device_total = "cuDeviceTotalMem_v2" (*mut usize, CUdevice);
        device_attribute = "cuDeviceGetAttribute" (*mut c_int, CUdevice_attribute, CUdevice);
        can_access_peer = "cuDeviceCanAccessPeer" (*mut c_int, CUdevice, CUdevice);
        p2p_attribute = "cuDeviceGetP2PAttribute" (*mut c_int, CUdevice_P2PAttribute, CUdevice, CUdevice);
        context_retain = "cuDevicePrimaryCtxRetain" (*mut CUcontext, CUdevice);
        context_release = "cuDevicePrimaryCtxRelease_v2" (CUdevice);
        context_push = "cuCtxPushCurrent_v2" (CUcontext);
        context_pop = "cuCtxPopCurrent_v2" (*mut CUcontext);
        enable_peer = "cuCtxEnablePeerAccess" (CUcontext, c_uint);
        stream_priorities = "cuCtxGetStreamPriorityRange" (*mut c_int, *mut c_int);
        memory_info = "cuMemGetInfo_v2" (*mut usize, *mut usize);
        allocate = "cuMemAlloc_v2" (*mut CUdeviceptr, usize);
        free = "cuMemFree_v2" (CUdeviceptr);
        allocate_host = "cuMemHostAlloc" (*mut *mut c_void, usize, c_uint);
        free_host = "cuMemFreeHost" (*mut c_void);
        register_host = "cuMemHostRegister_v2" (*mut c_void, usize, c_uint);
        unregister_host = "cuMemHostUnregister" (*mut c_void);
        host_pointer = "cuMemHostGetDevicePointer_v2" (*mut CUdeviceptr, *mut c_void, c_uint);
        address_range = "cuMemGetAddressRange_v2" (*mut CUdeviceptr, *mut usize, CUdeviceptr);
        pointer_attribute = "cuPointerGetAttribute" (*mut c_void, CUpointer_attribute, CUdeviceptr);
        set_bytes = "cuMemsetD8Async" (CUdeviceptr, u8, usize, CUstream);
        copy = "cuMemcpyAsync" (CUdeviceptr, CUdeviceptr, usize, CUstream);
        stream_capturing = "cuStreamIsCapturing" (CUstream, *mut c_uint);
        thread_capture_mode = "cuThreadExchangeStreamCaptureMode" (*mut c_uint);
        stream_create = "cuStreamCreateWithPriority" (*mut CUstream, c_uint, c_int);
        stream_destroy = "cuStreamDestroy_v2" (CUstream);
        stream_query = "cuStreamQuery" (CUstream);
        stream_wait = "cuStreamWaitEvent" (CUstream, CUevent, c_uint);
        event_create = "cuEventCreate" (*mut CUevent, c_uint);
        event_destroy = "cuEventDestroy_v2" (CUevent);
        event_record = "cuEventRecord" (CUevent, CUstream);
        event_query = "cuEventQuery" (CUevent);
        event_synchronize = "cuEventSynchronize" (CUevent);
        module_load = "cuModuleLoadData" (*mut CUmodule, *const c_void);
        module_function = "cuModuleGetFunction" (*mut CUfunction, CUmodule, *const c_char);
        launch = "cuLaunchKernel" (
            CUfunction, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, CUstream,
            *mut *mut c_void, *mut *mut c_void
        );
        ipc_export = "cuIpcGetMemHandle" (*mut CUipcMemHandle, CUdeviceptr);
        ipc_open = "cuIpcOpenMemHandle_v2" (*mut CUdeviceptr, CUipcMemHandle, c_uint);
        ipc_close = "cuIpcCloseMemHandle" (CUdeviceptr);
    }
}

entry_points! {
    /// Virtual memory management: allocations that are exported as descriptors.
    VirtualMemory {
        granularity = "cuMemGetAllocationGranularity" (
            *mut usize, *const CUmemAllocationProp, CUmemAllocationGranularity_flags
        );
        create = "cuMemCreate" (
            *mut CUmemGenericAllocationHandle, usize, *const CUmemAllocationProp, u64
        );
        release = "cuMemRelease" (CUmemGenericAllocationHandle);
        export = "cuMemExportToShareableHandle" (
            *mut c_void, CUmemGenericAllocationHandle, CUmemAllocationHandleType, u64
        );
        import = "cuMemImportFromShareableHandle" (
            *mut CUmemGenericAllocationHandle, *mut c_void, CUmemAllocationHandleType
        );
        reserve = "cuMemAddressReserve" (*mut CUdeviceptr, usize, usize, CUdeviceptr, u64);
        unreserve = "cuMemAddressFree" (CUdeviceptr, usize);
        map = "cuMemMap" (CUdeviceptr, usize, usize, CUmemGenericAllocationHandle, u64);
        unmap = "cuMemUnmap" (CUdeviceptr, usize);
        set_access = "cuMemSetAccess" (CUdeviceptr, usize, *const CUmemAccessDesc, usize);
    }
}

entry_points! {
    /// Batched copies as CUDA 13 has them.
    Batch {
        copy = "cuMemcpyBatchAsync_v2" (
            *mut CUdeviceptr, *mut CUdeviceptr, *mut usize, usize, *mut CUmemcpyAttributes,
            *mut usize, usize, CUstream
        );
    }
}

entry_points! {
    /// Batched copies as CUDA 12.8 and 12.9 have them: they also say which copy is at fault.
    FirstBatch {
        copy = "cuMemcpyBatchAsync" (
            *mut CUdeviceptr, *mut CUdeviceptr, *mut usize, usize, *mut CUmemcpyAttributes,
            *mut usize, usize, *mut usize, CUstream
        );
    }
}

/// The driver's way of batching copies, if it has one.
pub(super) enum Batching {
    Current(Batch),
    First(FirstBatch),
    Absent,
}

/// A loaded driver that `cuInit` accepted. Its entry points are reached through [`Calls`].
pub(super) struct Driver {
    core: Core,
    virtual_memory: Option<VirtualMemory>,
    batching: Batching,
    /// As the driver counts: 12080 is CUDA 12.8.
    pub(super) version: i32,
    /// Entry points that newer drivers have and this one lacks.
    pub(super) absent: Vec<&'static str>,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Driver(CUDA {}, without {:?})",
            self.version, self.absent
        )
    }
}

/// A thread that calls the driver: the only way to its entry points.
///
/// An engine may be capturing a graph, on this thread or on another one. In the mode that captures are begun in by
/// default, as vLLM does, a call of any thread that might wait or allocate is refused *and* makes the capture fail, unless
/// that thread's own mode is relaxed. So it is relaxed as long as this lives, and what it was before afterwards: the thread
/// is an engine's. What that does not permit is work on a stream that is itself captured: see `Lane::check_uncaptured`.
pub(super) struct Calls<'a> {
    driver: &'a Driver,
    before: c_uint,
    /// Neither Send nor Sync: the mode is a property of the thread.
    _thread: PhantomData<*const ()>,
}

impl Calls<'_> {
    pub(super) fn driver(&self) -> &Driver {
        self.driver
    }

    pub(super) fn core(&self) -> &Core {
        &self.driver.core
    }

    pub(super) fn virtual_memory(&self) -> Option<&VirtualMemory> {
        self.driver.virtual_memory.as_ref()
    }

    pub(super) fn batching(&self) -> &Batching {
        &self.driver.batching
    }

    /// Whether two GPUs with peer access, `near` being `device`, are on NVLink: it has native atomics between the
    /// two, which PCIe lacks.
    pub(super) fn nvlink(
        &self,
        near: CUdevice,
        far: CUdevice,
        device: &DeviceUuid,
    ) -> Result<bool> {
        let mut atomics = 0;
        let attribute = CUdevice_P2PAttribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED;
        // SAFETY: both devices came from the driver; one int is written, to one of ours.
        let code = unsafe { (self.core().p2p_attribute)(&raw mut atomics, attribute, near, far) };
        (self.driver).check(code, "asking for the link's kind", device)?;
        Ok(atomics != 0)
    }
}

impl Drop for Calls<'_> {
    fn drop(&mut self) {
        // SAFETY: one mode is read from and written to one of ours: the one that this thread had before.
        let code = unsafe { (self.core().thread_capture_mode)(&raw mut self.before) };
        if code != SUCCESS {
            let problem = self.driver.describe(code);
            tracing::debug!(problem, "restoring a thread's capture mode");
        }
    }
}

/// The backend cannot work, and why.
pub(super) fn unavailable(problem: impl Into<String>) -> DeviceError {
    DeviceError::Unavailable {
        backend: "cuda",
        problem: problem.into(),
    }
}

impl Driver {
    /// Opens the driver that [`LIBRARY_VARIABLE`] names, or the system's, and initialises it.
    pub(super) fn load() -> Result<Arc<Self>> {
        let named = std::env::var_os(LIBRARY_VARIABLE).map(PathBuf::from);
        let path = named.unwrap_or_else(|| SYSTEM_LIBRARY.into());
        // SAFETY: loading runs the library's initialisers. The path is the NVIDIA driver's, or what the operator
        // of this process named in its place.
        let library = unsafe { Library::new(&path) }.map_err(|error| {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            let cause = cause.unwrap_or_else(|| error.to_string());
            unavailable(format!(
                "no CUDA driver: {cause}; install the NVIDIA driver, and give containers access to it"
            ))
        })?;
        let core = Core::find(&library).map_err(|symbol| {
            unavailable(format!(
                "the driver {} has no {symbol}: it is older than CUDA 12.0; update it",
                path.display()
            ))
        })?;
        let mut absent = Vec::new();
        let virtual_memory = VirtualMemory::find(&library);
        let virtual_memory = virtual_memory.map_err(|symbol| absent.push(symbol)).ok();
        let batching = match (Batch::find(&library), FirstBatch::find(&library)) {
            (Ok(batch), _) => Batching::Current(batch),
            (Err(_), Ok(batch)) => Batching::First(batch),
            (Err(symbol), Err(_)) => {
                absent.push(symbol);
                Batching::Absent
            }
        };
        // The tables point into it, and a driver cannot be unloaded safely anyway.
        std::mem::forget(library);
        let mut driver = Self {
            core,
            virtual_memory,
            batching,
            version: 0,
            absent,
        };
        driver.initialise()?;
        Ok(Arc::new(driver))
    }

    fn initialise(&mut self) -> Result<()> {
        // SAFETY: the first call to a driver, with the only flags it knows.
        let code = unsafe { (self.core.init)(0) };
        if code != SUCCESS {
            let problem = self.describe(code);
            return Err(unavailable(format!(
                "the CUDA driver does not start: {problem}"
            )));
        }
        // SAFETY: writes one int, to one of ours.
        let code = unsafe { (self.core.version)(&raw mut self.version) };
        if code != SUCCESS {
            return Err(unavailable(self.describe(code)));
        }
        Ok(())
    }

    /// Lets this thread call the driver until the result is dropped.
    ///
    /// # Errors
    /// The driver's code.
    pub(super) fn calls(&self) -> std::result::Result<Calls<'_>, Code> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as c_uint;
        // SAFETY: one mode is read from and written to one of ours.
        match unsafe { (self.core.thread_capture_mode)(&raw mut mode) } {
            SUCCESS => Ok(Calls {
                driver: self,
                before: mode,
                _thread: PhantomData,
            }),
            code => Err(code),
        }
    }

    /// Whether many copies can be one call.
    pub(super) fn has_batches(&self) -> bool {
        !matches!(self.batching, Batching::Absent)
    }

    /// The driver's own words for a code.
    pub(super) fn describe(&self, code: Code) -> String {
        let ask = |question: unsafe extern "C" fn(Code, *mut *const c_char) -> Code| {
            let mut text = std::ptr::null();
            // SAFETY: writes one pointer, to one of ours; the string it points to is the driver's constant.
            let found = unsafe { question(code, &raw mut text) };
            // SAFETY: the driver gave a NUL-terminated string that is never freed.
            (found == SUCCESS && !text.is_null()).then(|| unsafe { CStr::from_ptr(text) })
        };
        let name = ask(self.core.error_name).map(CStr::to_string_lossy);
        let text = ask(self.core.error_text).map(CStr::to_string_lossy);
        match (name, text) {
            (Some(name), Some(text)) => format!("{text} ({name})"),
            _ => format!("CUDA error {code}"),
        }
    }

    /// An error of `operation` on `device`.
    pub(super) fn error(
        &self,
        code: Code,
        operation: &'static str,
        device: &DeviceUuid,
    ) -> DeviceError {
        DeviceError::Failed {
            operation,
            device: device.clone(),
            problem: self.describe(code),
        }
    }

    /// Fails unless `code` is success.
    pub(super) fn check(
        &self,
        code: Code,
        operation: &'static str,
        device: &DeviceUuid,
    ) -> Result<()> {
        match code {
            SUCCESS => Ok(()),
            code => Err(self.error(code, operation, device)),
        }
    }
}
