//! Address spaces on CUDA: a reserved range, with whole allocations mapped over parts of it.

use std::sync::Arc;

use swiftcache_proto::domain::DeviceUuid;

use super::{
    CudaLayer,
    arena::{Arena, Kind},
    context::Context,
    driver::{Code, VirtualMemory},
    route::Route,
    virtual_range::{self, VirtualRange},
};
use crate::{
    AddressSpaces, DeviceError, Memory, Result,
    address_space::{AddressSpace, RawSpace},
};

/// Addresses of a context's device, and of no memory.
#[derive(Debug)]
struct Reservation {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
    granularity: u64,
}

impl Reservation {
    fn new(context: &Arc<Context>, bytes: u64, granularity: u64) -> Result<Self> {
        let entered = context.enter()?;
        let calls = virtual_range::calls(context, &entered)?;
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        let mut address = 0;
        // SAFETY: the driver picks the range; one address is written, to one of ours.
        let code = unsafe { (calls.reserve)(&raw mut address, size, 0, 0, 0) };
        context.check(code, "cuMemAddressReserve")?;
        Ok(Self {
            context: Arc::clone(context),
            address,
            bytes: size,
            granularity,
        })
    }

    /// Calls the driver about a part of the range.
    fn call(
        &self,
        operation: &'static str,
        call: impl FnOnce(&VirtualMemory) -> Code,
    ) -> Result<()> {
        let entered = self.context.enter()?;
        let calls = virtual_range::calls(&self.context, &entered)?;
        self.context.check(call(calls), operation)
    }

    fn at(&self, offset: u64) -> u64 {
        self.address + offset
    }
}

/// What is mapped of a memory: an allocation, whole.
fn range<'a>(context: &Context, memory: &'a Memory) -> Result<&'a VirtualRange> {
    let refuse = |problem: String| DeviceError::Failed {
        operation: "mapping a piece",
        device: context.uuid.clone(),
        problem,
    };
    let Kind::Virtual(range) = &Arena::of(memory)?.kind else {
        return Err(refuse(
            "only memory that was allocated as PosixFd, imported by descriptor or allocated as a host piece can be mapped in \
             an address space"
                .to_owned(),
        ));
    };
    // The driver maps whole allocations.
    if range.size() != memory.bytes() {
        return Err(refuse(format!(
            "its allocation has {} bytes, and the memory only {}",
            range.size(),
            memory.bytes()
        )));
    }
    Ok(range)
}

impl RawSpace for Reservation {
    fn device(&self) -> &DeviceUuid {
        &self.context.uuid
    }

    fn address(&self) -> u64 {
        self.address
    }

    fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    fn granularity(&self) -> u64 {
        self.granularity
    }

    fn accept(&self, memory: &Memory) -> Result<()> {
        range(&self.context, memory).map(|_| ())
    }

    unsafe fn map(&self, offset: u64, memory: &Memory) -> Result<()> {
        let (handle, size) = (
            range(&self.context, memory)?.handle(),
            memory.bytes() as usize,
        );
        self.call("cuMemMap", |calls| {
            // SAFETY: the caller promises that the range is in the reservation and that nothing is mapped there. The handle is
            // the memory's, which outlives the mapping.
            unsafe { (calls.map)(self.at(offset), size, 0, handle, 0) }
        })
    }

    unsafe fn open(&self, offset: u64, bytes: u64) -> Result<()> {
        let access = virtual_range::access(&self.context);
        self.call("cuMemSetAccess", |calls| {
            // SAFETY: the caller promises that a piece of this size is mapped there. The description is ours and complete.
            unsafe { (calls.set_access)(self.at(offset), bytes as usize, &raw const access, 1) }
        })
    }

    unsafe fn unmap(&self, offset: u64, bytes: u64) -> Result<()> {
        self.call("cuMemUnmap", |calls| {
            // SAFETY: the caller promises that a piece of this size is mapped there, and that nobody touches it.
            unsafe { (calls.unmap)(self.at(offset), bytes as usize) }
        })
    }

    fn memory(&self, offset: u64, bytes: u64, pieces: &[Memory]) -> Memory {
        // How a copy is issued goes by the farthest piece.
        let routes = pieces.iter().filter_map(|piece| Arena::of(piece).ok());
        let route = routes.map(|arena| arena.route).max();
        let route = route.unwrap_or(Route::Device);
        Arena::new(&self.context, self.at(offset), Kind::Space, route).into_memory(bytes)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let freed = self.call("cuMemAddressFree", |calls| {
            // SAFETY: ends our own reservation, once. The space has unmapped its pieces.
            unsafe { (calls.unreserve)(self.address, self.bytes) }
        });
        if let Err(error) = freed {
            tracing::debug!(%error, "while letting go of an address space");
        }
    }
}

impl AddressSpaces for CudaLayer {
    fn granularity(&self, device: &DeviceUuid) -> Result<u64> {
        let context = self.context(device)?;
        let entered = context.enter()?;
        virtual_range::granularity_of_all(&context, &entered)
    }

    fn reserve(&self, device: &DeviceUuid, bytes: u64) -> Result<Arc<AddressSpace>> {
        let granularity = self.whole(device, bytes)?;
        let reserved = Reservation::new(&self.context(device)?, bytes, granularity)?;
        Ok(AddressSpace::new(Box::new(reserved)))
    }

    fn allocate_host_piece(&self, device: &DeviceUuid, bytes: u64) -> Result<Memory> {
        self.whole(device, bytes)?;
        Arena::host_piece(&self.context(device)?, bytes)
    }

    fn accepts(&self, device: &DeviceUuid, memory: &Memory) -> Result<()> {
        let context = self.context(device)?;
        range(&context, memory).map(|_| ())
    }
}

impl CudaLayer {
    /// Checks a size, and returns the granularity.
    fn whole(&self, device: &DeviceUuid, bytes: u64) -> Result<u64> {
        let granularity = self.granularity(device)?;
        if bytes > 0 && bytes.is_multiple_of(granularity) {
            return Ok(granularity);
        }
        Err(DeviceError::Failed {
            operation: "reserving addresses",
            device: device.clone(),
            problem: format!("{bytes} bytes: use a multiple of {granularity}"),
        })
    }
}
