//! Virtual-memory allocations: physical memory, an address range, and the mapping between them.

use std::{ffi::c_int, os::fd::RawFd};

use parking_lot::Mutex;
use swiftcache_proto::domain::HandleKind;

use super::{
    context::{Context, Entered, report},
    driver::{Code, SUCCESS, VirtualMemory, sys, unavailable},
    refusal::{allocated, refuse_import},
};
use crate::{DeviceError, Result};

const FD: sys::CUmemAllocationHandleType =
    sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;

/// Physical memory of one device or of the host, mapped in an address range of its own.
#[derive(Debug)]
pub(super) struct VirtualRange {
    handle: sys::CUmemGenericAllocationHandle,
    address: u64,
    /// A multiple of the granularity.
    size: usize,
    /// Whether it can be exported: HBM that this process allocated.
    exportable: bool,
    /// The devices that may touch it.
    admitted: Mutex<Vec<sys::CUdevice>>,
}

impl VirtualRange {
    /// Takes physical memory of `context`'s device and maps it.
    pub(super) fn create(context: &Context, entered: &Entered<'_>, bytes: u64) -> Result<Self> {
        Self::create_with(context, entered, bytes, &properties(context))
    }

    /// Takes host memory of the node that is nearest to `context`'s device, and maps it.
    pub(super) fn create_on_host(
        context: &Context,
        entered: &Entered<'_>,
        bytes: u64,
    ) -> Result<Self> {
        let properties = host_properties(context, entered);
        Self::create_with(context, entered, bytes, &properties)
    }

    fn create_with(
        context: &Context,
        entered: &Entered<'_>,
        bytes: u64,
        properties: &sys::CUmemAllocationProp,
    ) -> Result<Self> {
        let calls = calls(context, entered)?;
        let size = round_up(context, calls, bytes, properties)?;
        let size = size.ok_or_else(|| DeviceError::OutOfMemory {
            uuid: context.uuid.clone(),
            bytes,
            problem: "no device has as much".to_owned(),
        })?;
        let mut handle = 0;
        // SAFETY: the context is current; the properties are ours and complete; one handle is written.
        let code = unsafe { (calls.create)(&raw mut handle, size, properties, 0) };
        allocated(context, code, "cuMemCreate", bytes)?;
        let exportable = properties.requestedHandleTypes == FD;
        Self::map(context, entered, handle, size, exportable)
    }

    /// Maps what another process exported as a descriptor.
    pub(super) fn import(
        context: &Context,
        entered: &Entered<'_>,
        descriptor: RawFd,
        bytes: u64,
    ) -> Result<Self> {
        let refuse = |problem: String| refuse_import(HandleKind::PosixFd, problem);
        let calls = calls(context, entered)?;
        let size = match bytes {
            0 => None,
            bytes => round_up(context, calls, bytes, &properties(context))?,
        };
        let size = size.ok_or_else(|| refuse(format!("{bytes} bytes cannot be mapped")))?;
        let mut handle = 0;
        // SAFETY: the descriptor is open during the call, and the driver checks that it is one of its own; it
        // travels as an integer in a pointer, as the driver's documentation says.
        let code = unsafe { (calls.import)(&raw mut handle, descriptor as usize as *mut _, FD) };
        if code != SUCCESS {
            let problem = context.driver.describe(code);
            return Err(refuse(format!(
                "{problem}; the descriptor must be the donor's CUDA export, and this process must have the device node \
                 of the donor's GPU (/dev/nvidiaN; in a container NVIDIA_VISIBLE_DEVICES=all, with \
                 CUDA_VISIBLE_DEVICES for the engine's own GPU)"
            )));
        }
        Self::map(context, entered, handle, size, false).map_err(|error| {
            refuse(format!(
                "{error}; perhaps it holds fewer than the {bytes} bytes promised, or {} has no peer access to its GPU",
                context.uuid
            ))
        })
    }

    fn map(
        context: &Context,
        entered: &Entered<'_>,
        handle: sys::CUmemGenericAllocationHandle,
        size: usize,
        exportable: bool,
    ) -> Result<Self> {
        let calls = calls(context, entered)?;
        let undo_create = || {
            // SAFETY: gives back our own reference, once.
            let code = unsafe { (calls.release)(handle) };
            report(&context.driver, code, "cuMemRelease", &context.uuid);
        };
        let mut address = 0;
        // SAFETY: the driver picks the range; one address is written, to one of ours.
        let code = unsafe { (calls.reserve)(&raw mut address, size, 0, 0, 0) };
        if let Err(error) = context.check(code, "cuMemAddressReserve") {
            undo_create();
            return Err(error);
        }
        // SAFETY: the range is ours, reserved and not yet mapped, and `size` long.
        let code = unsafe { (calls.map)(address, size, 0, handle, 0) };
        if let Err(error) = context.check(code, "cuMemMap") {
            // SAFETY: ends our own reservation, once.
            let code = unsafe { (calls.unreserve)(address, size) };
            report(&context.driver, code, "cuMemAddressFree", &context.uuid);
            undo_create();
            return Err(error);
        }
        let range = Self {
            handle,
            address,
            size,
            exportable,
            admitted: Mutex::default(),
        };
        if let Err(error) = range.admit(context, entered) {
            let code = range.unmap(context, entered);
            report(&context.driver, code, "cuMemUnmap", &context.uuid);
            return Err(error);
        }
        Ok(range)
    }

    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// What the driver maps elsewhere too.
    pub(super) fn handle(&self) -> sys::CUmemGenericAllocationHandle {
        self.handle
    }

    /// The allocation's size, bytes.
    pub(super) fn size(&self) -> u64 {
        self.size as u64
    }

    /// Lets `context`'s device touch the range.
    pub(super) fn admit(&self, context: &Context, entered: &Entered<'_>) -> Result<()> {
        let mut admitted = self.admitted.lock();
        if admitted.contains(&context.device) {
            return Ok(());
        }
        let access = access(context);
        let calls = calls(context, entered)?;
        // SAFETY: the range is ours and mapped; the description is ours and complete.
        let code = unsafe { (calls.set_access)(self.address, self.size, &raw const access, 1) };
        context.check(code, "cuMemSetAccess")?;
        admitted.push(context.device);
        Ok(())
    }

    /// A descriptor that opens the physical memory, for whoever calls to own.
    pub(super) fn export(&self, context: &Context, entered: &Entered<'_>) -> Result<RawFd> {
        let refuse = |problem: String| DeviceError::Handle {
            action: "export",
            kind: HandleKind::PosixFd,
            problem,
        };
        if !self.exportable {
            let problem = "only HBM can be exported, by the process that allocated it";
            return Err(refuse(problem.to_owned()));
        }
        let calls = calls(context, entered)?;
        let mut descriptor: c_int = -1;
        // SAFETY: for this handle type an int is written, to one of ours; the handle is ours and alive.
        let code = unsafe { (calls.export)((&raw mut descriptor).cast(), self.handle, FD, 0) };
        if code != SUCCESS {
            return Err(refuse(context.driver.describe(code)));
        }
        Ok(descriptor)
    }

    /// Undoes the mapping, the reservation and the reference. The range is of no use afterwards.
    pub(super) fn unmap(&self, context: &Context, entered: &Entered<'_>) -> Code {
        let Ok(calls) = calls(context, entered) else {
            return SUCCESS; // nothing could have been mapped
        };
        // SAFETY: our own range, mapping and handle, each ended once, in the reverse order of their making;
        // only the owner's drop and a failed construction come here.
        let codes = unsafe {
            [
                (calls.unmap)(self.address, self.size),
                (calls.unreserve)(self.address, self.size),
                (calls.release)(self.handle),
            ]
        };
        codes
            .into_iter()
            .find(|code| *code != SUCCESS)
            .unwrap_or(SUCCESS)
    }
}

/// The driver's entry points.
pub(super) fn calls<'a>(context: &Context, entered: &'a Entered<'_>) -> Result<&'a VirtualMemory> {
    let calls = entered.virtual_memory();
    calls.ok_or_else(|| {
        let absent = &context.driver.absent;
        unavailable(format!(
            "this driver has no {absent:?}, which PosixFd handles need: use CudaIpc"
        ))
    })
}

/// Reading and writing by `context`'s device.
pub(super) fn access(context: &Context) -> sys::CUmemAccessDesc {
    sys::CUmemAccessDesc {
        location: location(context),
        flags: sys::CUmemAccess_flags::CU_MEM_ACCESS_FLAGS_PROT_READWRITE,
    }
}

fn location(context: &Context) -> sys::CUmemLocation {
    sys::CUmemLocation {
        type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
        id: context.device,
    }
}

fn properties(context: &Context) -> sys::CUmemAllocationProp {
    sys::CUmemAllocationProp {
        type_: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
        requestedHandleTypes: FD,
        location: location(context),
        win32HandleMetaData: std::ptr::null_mut(),
        allocFlags: sys::CUmemAllocationProp_st__bindgen_ty_1 {
            compressionType: 0,
            gpuDirectRDMACapable: 0,
            usage: 0,
            reserved: [0; 4],
        },
    }
}

/// Host memory of the node that is nearest to `context`'s device. It is not exported.
fn host_properties(context: &Context, entered: &Entered<'_>) -> sys::CUmemAllocationProp {
    let mut node: c_int = 0;
    let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID;
    // SAFETY: one int is written, to one of ours.
    let code =
        unsafe { (entered.core().device_attribute)(&raw mut node, attribute, context.device) };
    // A machine without such nodes, or a driver that does not know them, has one.
    let node = if code == SUCCESS { node.max(0) } else { 0 };
    sys::CUmemAllocationProp {
        requestedHandleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
        location: sys::CUmemLocation {
            type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_HOST_NUMA,
            id: node,
        },
        ..properties(context)
    }
}

/// Pieces of an address space start and end at multiples of this, wherever their memory is.
pub(super) fn granularity_of_all(context: &Context, entered: &Entered<'_>) -> Result<u64> {
    let calls = calls(context, entered)?;
    let hbm = granularity(context, calls, &properties(context))?;
    let host = granularity(context, calls, &host_properties(context, entered))?;
    Ok(hbm.max(host))
}

fn granularity(
    context: &Context,
    calls: &VirtualMemory,
    properties: &sys::CUmemAllocationProp,
) -> Result<u64> {
    let mut granularity = 0;
    let option = sys::CUmemAllocationGranularity_flags::CU_MEM_ALLOC_GRANULARITY_RECOMMENDED;
    // SAFETY: the properties are ours and complete; one number is written, to one of ours.
    let code = unsafe { (calls.granularity)(&raw mut granularity, properties, option) };
    context.check(code, "cuMemGetAllocationGranularity")?;
    Ok((granularity as u64).max(1))
}

/// The size of a mapping that holds `bytes`; none if no number is that large.
fn round_up(
    context: &Context,
    calls: &VirtualMemory,
    bytes: u64,
    properties: &sys::CUmemAllocationProp,
) -> Result<Option<usize>> {
    let size = bytes.checked_next_multiple_of(granularity(context, calls, properties)?);
    Ok(size.and_then(|size| usize::try_from(size).ok()))
}
