//! Plays an inference engine: a part of the process that calls the driver itself, has its own memory, streams and
//! kernels, and knows nothing of SwiftCache. It also makes the plain copies that SwiftCache's copies are compared with.

#![allow(
    unsafe_code,
    reason = "an engine calls the CUDA driver directly; this fixture does so in its place"
)]

mod graph;
mod peer;

use std::{
    ffi::{CStr, c_int, c_void},
    path::PathBuf,
};

use anyhow::{Context, Result, ensure};
use libloading::Library;
use swiftcache_client::device::{
    AddressSpace, CopyStream, DeviceLayer, Memory, Standstill, Ticket, cuda::LIBRARY_VARIABLE,
    foreign,
};
use swiftcache_proto::domain::DeviceUuid;

const PTX: &str = concat!(include_str!("../busy.ptx"), "\0");

pub use graph::{Graph, THREAD_LOCAL};
pub use peer::Place;

type Call<A> = unsafe extern "C" fn(A) -> u32;

/// An engine on the first device.
#[derive(Debug)]
pub struct Engine {
    library: Library,
    /// The first device's primary context.
    context: usize,
    /// One kernel for each footprint.
    busy: [usize; 2],
    /// The address where the busy kernel would write. It never writes.
    unused: u64,
    processors: u32,
}

/// How much of a multiprocessor compute takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Footprint {
    /// All registers, like a matrix product. A kernel that runs beside it takes multiprocessors away from it.
    Full,
    /// It leaves room for other blocks, but keeps every multiplier just as busy.
    Light,
}

impl Footprint {
    /// How many blocks a multiprocessor holds at a time.
    fn blocks(self) -> u32 {
        match self {
            Self::Full => 2,
            Self::Light => 8,
        }
    }
}

/// Waves of blocks in the compute of one layer. Kernels of real engines also have many short blocks, and not one long
/// block for each multiprocessor.
pub const WAVES: u32 = 16;

/// A stream of the engine.
#[derive(Clone, Copy, Debug)]
pub struct EngineStream(usize);

impl EngineStream {
    /// The raw `CUstream`.
    pub fn raw(self) -> u64 {
        self.0 as u64
    }
}

fn check(code: u32, operation: &str) -> Result<()> {
    ensure!(code == 0, "{operation}: CUDA error {code}");
    Ok(())
}

impl Engine {
    /// Opens the driver, and makes the primary context of the first device current on this thread, as engines do.
    ///
    /// # Errors
    /// When there is no driver.
    pub fn start() -> Result<Self> {
        let path = std::env::var_os(LIBRARY_VARIABLE).map_or("libcuda.so.1".into(), PathBuf::from);
        // SAFETY: loads the driver that the backend under test has loaded already.
        let library = unsafe { Library::new(path) }?;
        let mut engine = Self {
            library,
            context: 0,
            busy: [0; 2],
            unused: 0,
            processors: 1,
        };
        let (mut module, mut processors) = (0_usize, 0 as c_int);
        // SAFETY: the signatures are the driver's; every pointer is to a local of the right size, and the text and
        // names are NUL-terminated.
        unsafe {
            let init: Call<u32> = engine.find("cuInit")?;
            check(init(0), "cuInit")?;
            let retain: unsafe extern "C" fn(*mut usize, c_int) -> u32 =
                engine.find("cuDevicePrimaryCtxRetain")?;
            let code = retain(&raw mut engine.context, 0);
            check(code, "cuDevicePrimaryCtxRetain")?;
            let push: Call<usize> = engine.find("cuCtxPushCurrent_v2")?;
            check(push(engine.context), "cuCtxPushCurrent")?;
            let attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> u32 =
                engine.find("cuDeviceGetAttribute")?;
            check(
                attribute(&raw mut processors, 16, 0),
                "cuDeviceGetAttribute",
            )?;
            let load: unsafe extern "C" fn(*mut usize, *const c_void) -> u32 =
                engine.find("cuModuleLoadData")?;
            check(
                load(&raw mut module, PTX.as_ptr().cast()),
                "cuModuleLoadData",
            )?;
            let function: unsafe extern "C" fn(*mut usize, usize, *const i8) -> u32 =
                engine.find("cuModuleGetFunction")?;
            let names: [&CStr; 2] = [c"swiftcache_busy_full", c"swiftcache_busy_light"];
            for (busy, name) in engine.busy.iter_mut().zip(names) {
                let code = function(&raw mut *busy, module, name.as_ptr());
                check(code, "cuModuleGetFunction")?;
            }
        }
        engine.unused = engine.allocate(4096)?;
        engine.processors = u32::try_from(processors)?;
        Ok(engine)
    }

    fn find<T: Copy>(&self, symbol: &str) -> Result<T> {
        // SAFETY: callers name the symbol's own signature, as NVIDIA documents it.
        let found = unsafe { self.library.get::<T>(symbol.as_bytes()) };
        found
            .map(|found| *found)
            .with_context(|| format!("{symbol} is missing"))
    }

    /// Makes the first device's context current on another thread of the engine.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: the signature is the driver's, and the context stays retained.
        unsafe {
            let push: Call<usize> = self.find("cuCtxPushCurrent_v2")?;
            check(push(self.context), "cuCtxPushCurrent")
        }
    }

    /// Allocates HBM. The engine never frees it.
    ///
    /// # Errors
    /// When there is not enough.
    pub fn allocate(&self, bytes: u64) -> Result<u64> {
        let mut address = 0;
        // SAFETY: the signature is the driver's; one address is written, to one of ours.
        unsafe {
            let allocate: unsafe extern "C" fn(*mut u64, usize) -> u32 =
                self.find("cuMemAlloc_v2")?;
            check(
                allocate(&raw mut address, usize::try_from(bytes)?),
                "cuMemAlloc",
            )?;
        }
        Ok(address)
    }

    /// A stream for compute.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn stream(&self) -> Result<EngineStream> {
        let mut stream = 0;
        // SAFETY: the signature is the driver's; one stream is written, to one of ours.
        unsafe {
            let create: unsafe extern "C" fn(*mut usize, u32, c_int) -> u32 =
                self.find("cuStreamCreateWithPriority")?;
            check(create(&raw mut stream, 1, 0), "cuStreamCreateWithPriority")?;
        }
        Ok(EngineStream(stream))
    }

    /// Queues compute that fills the device: [`WAVES`] waves of blocks, with `rounds` rounds in each block.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn compute(&self, stream: EngineStream, footprint: Footprint, rounds: u32) -> Result<()> {
        let (mut unused, mut rounds) = (self.unused, rounds);
        let mut parameters: [*mut c_void; 2] = [(&raw mut unused).cast(), (&raw mut rounds).cast()];
        // SAFETY: the signature is the driver's; the kernel takes these two parameters, which are copied.
        unsafe {
            let launch: unsafe extern "C" fn(
                usize,
                u32,
                u32,
                u32,
                u32,
                u32,
                u32,
                u32,
                usize,
                *mut *mut c_void,
                *mut *mut c_void,
            ) -> u32 = self.find("cuLaunchKernel")?;
            let code = launch(
                self.busy[footprint as usize],
                self.processors * footprint.blocks() * WAVES,
                1,
                1,
                256,
                1,
                1,
                0,
                stream.0,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            );
            check(code, "cuLaunchKernel")
        }
    }

    /// Queues a fill, which plays compute that writes KV.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill(&self, stream: EngineStream, address: u64, byte: u8, bytes: u64) -> Result<()> {
        // SAFETY: the signature is the driver's; callers fill memory of `allocate` only.
        unsafe {
            let fill: unsafe extern "C" fn(u64, u8, usize, usize) -> u32 =
                self.find("cuMemsetD8Async")?;
            check(
                fill(address, byte, usize::try_from(bytes)?, stream.0),
                "cuMemsetD8Async",
            )
        }
    }

    /// Queues a plain device-to-device copy.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn copy(&self, stream: EngineStream, to: u64, from: u64, bytes: u64) -> Result<()> {
        // SAFETY: the signature is the driver's; callers copy between memory of `allocate` only.
        unsafe {
            let copy: unsafe extern "C" fn(u64, u64, usize, usize) -> u32 =
                self.find("cuMemcpyDtoDAsync_v2")?;
            check(
                copy(to, from, usize::try_from(bytes)?, stream.0),
                "cuMemcpyDtoDAsync",
            )
        }
    }

    /// Waits for a stream.
    ///
    /// # Errors
    /// When its work failed.
    pub fn synchronize(&self, stream: EngineStream) -> Result<()> {
        // SAFETY: the signature is the driver's, and the stream is the engine's.
        unsafe {
            let synchronize: Call<usize> = self.find("cuStreamSynchronize")?;
            check(synchronize(stream.0), "cuStreamSynchronize")
        }
    }

    /// Gives SwiftCache a part of the engine's memory.
    ///
    /// # Errors
    /// When the layer refuses.
    pub fn lend_memory(
        &self,
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
        address: u64,
        bytes: u64,
    ) -> Result<Memory> {
        // SAFETY: the engine never frees what it allocated, and holds no references into it.
        Ok(unsafe { layer.adopt_memory(device, address, bytes) }?)
    }

    /// Marks one of the engine's streams, as an engine in another language does.
    ///
    /// # Errors
    /// When the layer refuses.
    pub fn mark(
        &self,
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
        stream: EngineStream,
    ) -> Result<Ticket> {
        // SAFETY: the stream is of the first device's primary context, and the engine never destroys it.
        let marked = unsafe { foreign::mark(layer, device, stream.raw()) }?;
        marked.context("no mark")
    }

    /// Makes one of the engine's streams wait for tickets, as an engine in another language does.
    pub fn gate(
        &self,
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
        stream: EngineStream,
        tickets: &[Ticket],
    ) {
        // SAFETY: the stream is of the first device's primary context, and the engine never destroys it.
        let left = unsafe { foreign::gate(layer, device, stream.raw(), tickets) };
        for ticket in left {
            // Whether it failed is for whoever owns it to find out.
            let _ = ticket.wait();
        }
    }

    /// Gives SwiftCache one of the engine's streams.
    ///
    /// # Errors
    /// When the layer refuses.
    pub fn lend_stream(
        &self,
        layer: &dyn DeviceLayer,
        device: &DeviceUuid,
        stream: EngineStream,
    ) -> Result<std::sync::Arc<dyn CopyStream>> {
        // SAFETY: the stream is of the first device's primary context, and the engine never destroys it.
        Ok(unsafe { layer.adopt_stream(device, stream.raw()) }?)
    }
}

/// What an engine promises between two steps. The checks queue nothing that touches a piece which they move.
pub fn still(space: &AddressSpace) -> Standstill<'_> {
    // SAFETY: every check waits for its copies before it moves or unmaps a piece, and uses no memory of it until something is
    // mapped there again.
    unsafe { space.stand_still() }
}
