//! This process's driver, and the calls that tests make.

use std::{
    ffi::c_int,
    fs, ptr,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use tempfile::TempDir;

unsafe extern "C" {
    pub(crate) fn cuInit(flags: u32) -> u32;
    pub(crate) fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> u32;
    pub(crate) fn cuCtxPushCurrent_v2(context: usize) -> u32;
    pub(crate) fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> u32;
    pub(crate) fn cuMemAlloc_v2(address: *mut u64, size: usize) -> u32;
    pub(crate) fn cuMemsetD8Async(address: u64, value: u8, bytes: usize, stream: usize) -> u32;
    pub(crate) fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: usize) -> u32;
    pub(crate) fn cuStreamCreateWithPriority(
        stream: *mut usize,
        flags: u32,
        priority: c_int,
    ) -> u32;
    pub(crate) fn cuStreamQuery(stream: usize) -> u32;
    pub(crate) fn cuStreamSynchronize(stream: usize) -> u32;
    pub(crate) fn cuEventCreate(event: *mut usize, flags: u32) -> u32;
    pub(crate) fn cuEventRecord(event: usize, stream: usize) -> u32;
    pub(crate) fn cuEventQuery(event: usize) -> u32;
    pub(crate) fn cuStreamWaitEvent(stream: usize, event: usize, flags: u32) -> u32;
    pub(crate) fn cuThreadExchangeStreamCaptureMode(mode: *mut u32) -> u32;
    pub(crate) fn cuStreamBeginCapture_v2(stream: usize, mode: u32) -> u32;
    pub(crate) fn cuStreamIsCapturing(stream: usize, status: *mut c_int) -> u32;
    pub(crate) fn cuStreamEndCapture(stream: usize, graph: *mut usize) -> u32;
    pub(crate) fn cuGraphInstantiateWithFlags(
        executable: *mut usize,
        graph: usize,
        flags: u64,
    ) -> u32;
    pub(crate) fn cuGraphLaunch(executable: usize, stream: usize) -> u32;
}

pub(crate) const NOT_READY: u32 = 600;
pub(crate) const SIZE: usize = 2 << 20;

/// This process's driver, which one test at a time uses.
pub(crate) struct Machine {
    directory: TempDir,
    states: u64,
}

pub(crate) fn machine() -> MutexGuard<'static, Machine> {
    static MACHINE: OnceLock<Mutex<Machine>> = OnceLock::new();
    let machine = MACHINE.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory");
        // SAFETY: tests read the environment behind this only.
        unsafe { std::env::set_var("SWIFTCACHE_STUB_DIR", directory.path()) };
        Mutex::new(Machine {
            directory,
            states: 0,
        })
    });
    let mut machine = machine.lock().unwrap_or_else(PoisonError::into_inner);
    machine.faults(&[]);
    let mut context = 0;
    // SAFETY: the signatures are the driver's; one context is written, to one of ours.
    unsafe {
        assert_eq!(cuInit(0), 0);
        assert_eq!(cuDevicePrimaryCtxRetain(&raw mut context, 0), 0);
        assert_eq!(cuCtxPushCurrent_v2(context), 0);
    }
    machine
}

impl Machine {
    pub(crate) fn faults(&mut self, lines: &[&str]) {
        self.states += 1;
        let file = self.directory.path().join("faults");
        let fresh = file.with_extension("new");
        // A size of its own tells each state from others.
        let padding = "\n".repeat(self.states as usize);
        fs::write(&fresh, lines.join("\n") + &padding).expect("a file of faults");
        fs::rename(fresh, file).expect("a file of faults");
    }

    pub(crate) fn trace(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.path().join("trace")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

pub(crate) fn info() -> u32 {
    let (mut free, mut total) = (0, 0);
    // SAFETY: two numbers are written, to two of ours.
    unsafe { cuMemGetInfo_v2(&raw mut free, &raw mut total) }
}

pub(crate) fn infos<const N: usize>() -> [u32; N] {
    [(); N].map(|()| info())
}

pub(crate) fn allocate() -> u64 {
    let mut address = 0;
    // SAFETY: one address is written, to one of ours.
    assert_eq!(unsafe { cuMemAlloc_v2(&raw mut address, SIZE) }, 0);
    address
}

pub(crate) fn stream() -> usize {
    let mut stream = 0;
    // SAFETY: one stream is written, to one of ours.
    let code = unsafe { cuStreamCreateWithPriority(&raw mut stream, 1, 0) };
    assert_eq!(code, 0);
    stream
}

/// The first byte of an allocation of the stub driver, which is memory of this process.
pub(crate) fn first(address: u64) -> u8 {
    // SAFETY: allocations are never unmapped here.
    unsafe { ptr::read_volatile(address as *const u8) }
}

pub(crate) fn event() -> usize {
    let mut event = 0;
    // SAFETY: one event is written, to one of ours.
    assert_eq!(unsafe { cuEventCreate(&raw mut event, 2) }, 0);
    event
}
