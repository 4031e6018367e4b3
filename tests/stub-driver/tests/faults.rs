//! What the file of faults does to a process that runs.

#![allow(unsafe_code, reason = "calls the driver as an engine does")]

use std::{
    ffi::c_int,
    fs, ptr,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use swiftcache_stub_driver as _; // linked, not loaded
use tempfile::TempDir;

unsafe extern "C" {
    fn cuInit(flags: u32) -> u32;
    fn cuDevicePrimaryCtxRetain(context: *mut usize, device: c_int) -> u32;
    fn cuCtxPushCurrent_v2(context: usize) -> u32;
    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) -> u32;
    fn cuMemAlloc_v2(address: *mut u64, size: usize) -> u32;
    fn cuMemsetD8Async(address: u64, value: u8, bytes: usize, stream: usize) -> u32;
    fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: usize) -> u32;
    fn cuStreamCreateWithPriority(stream: *mut usize, flags: u32, priority: c_int) -> u32;
    fn cuStreamQuery(stream: usize) -> u32;
    fn cuStreamSynchronize(stream: usize) -> u32;
    fn cuEventCreate(event: *mut usize, flags: u32) -> u32;
    fn cuEventRecord(event: usize, stream: usize) -> u32;
    fn cuEventQuery(event: usize) -> u32;
}

const NOT_READY: u32 = 600;
const SIZE: usize = 2 << 20;

/// This process's driver, which one test at a time uses.
struct Machine {
    directory: TempDir,
    states: u64,
}

fn machine() -> MutexGuard<'static, Machine> {
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
    fn faults(&mut self, lines: &[&str]) {
        self.states += 1;
        let file = self.directory.path().join("faults");
        let fresh = file.with_extension("new");
        // A size of its own tells each state from others.
        let padding = "\n".repeat(self.states as usize);
        fs::write(&fresh, lines.join("\n") + &padding).expect("a file of faults");
        fs::rename(fresh, file).expect("a file of faults");
    }

    fn trace(&self) -> Vec<String> {
        let text = fs::read_to_string(self.directory.path().join("trace")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }
}

fn info() -> u32 {
    let (mut free, mut total) = (0, 0);
    // SAFETY: two numbers are written, to two of ours.
    unsafe { cuMemGetInfo_v2(&raw mut free, &raw mut total) }
}

fn infos<const N: usize>() -> [u32; N] {
    [(); N].map(|()| info())
}

fn allocate() -> u64 {
    let mut address = 0;
    // SAFETY: one address is written, to one of ours.
    assert_eq!(unsafe { cuMemAlloc_v2(&raw mut address, SIZE) }, 0);
    address
}

fn stream() -> usize {
    let mut stream = 0;
    // SAFETY: one stream is written, to one of ours.
    let code = unsafe { cuStreamCreateWithPriority(&raw mut stream, 1, 0) };
    assert_eq!(code, 0);
    stream
}

/// The first byte of an allocation of the stub driver, which is memory of this process.
fn first(address: u64) -> u8 {
    // SAFETY: allocations are never unmapped here.
    unsafe { ptr::read_volatile(address as *const u8) }
}

#[test]
fn only_the_calls_that_a_line_names_fail() {
    let mut machine = machine();
    machine.faults(&["cuMemGetInfo_v2=719@3"]);
    assert_eq!(infos(), [0, 0, 719, 0]);
    // The same text goes on counting; another remark begins anew, at the first call behind the change.
    machine.faults(&["cuMemGetInfo_v2=719@3", "peers=none"]);
    assert_eq!(infos(), [0, 0, 0, 0]);
    machine.faults(&["cuMemGetInfo_v2=719@1-2 # again"]);
    assert_eq!(infos(), [719, 719, 0]);
    machine.faults(&["cuMemGetInfo_v2=2@2-"]);
    assert_eq!(infos(), [0, 2, 2]);
    // Each line counts for itself, and the first that applies decides.
    machine.faults(&["cuMemGetInfo_v2=1@2", "cuMemGetInfo_v2=2@2-3"]);
    assert_eq!(infos(), [0, 1, 2, 0]);
    // Nothing was broken by all this.
    machine.faults(&[]);
    assert_eq!(info(), 0);
}

#[test]
fn a_line_of_another_process_is_not_ours() {
    let mut machine = machine();
    let own = std::process::id();
    let theirs = format!("{}/cuMemGetInfo_v2=2", own + 1);
    let ours = format!("{own}/cuMemGetInfo_v2=3");
    machine.faults(&[&theirs]);
    assert_eq!(info(), 0);
    machine.faults(&[&theirs, &ours]);
    assert_eq!(info(), 3);
}

#[test]
fn what_is_held_stays_queued_until_it_is_let_go_of() {
    let mut machine = machine();
    let (from, to, stream, other) = (allocate(), allocate(), stream(), stream());
    let mut event = 0;
    let hold = format!("{}/hold=copies", std::process::id());
    // SAFETY: the signatures are the driver's; the event is ours, and so are both allocations, of `SIZE` bytes.
    unsafe {
        assert_eq!(cuEventCreate(&raw mut event, 2), 0);
        assert_eq!(cuMemsetD8Async(to, 1, SIZE, stream), 0);
        assert_eq!(cuStreamSynchronize(stream), 0);
        machine.faults(&[&hold]);
        assert_eq!(cuMemsetD8Async(from, 7, SIZE, stream), 0);
        assert_eq!(cuMemcpyAsync(to, from, SIZE, stream), 0);
        assert_eq!(cuEventRecord(event, stream), 0);
        // Other streams go on, and so do fills; the copy does not.
        assert_eq!(cuMemsetD8Async(from, 8, 1, other), 0);
        assert_eq!(cuStreamSynchronize(other), 0);
        assert_eq!(
            (cuStreamQuery(other), cuStreamQuery(stream)),
            (0, NOT_READY)
        );
        assert_eq!((cuEventQuery(event), first(to)), (NOT_READY, 1));
        machine.faults(&[]);
        assert_eq!(cuStreamSynchronize(stream), 0);
        assert_eq!((cuEventQuery(event), cuStreamQuery(stream)), (0, 0));
    }
    assert!(matches!(first(to), 7 | 8));
}

#[test]
fn a_stream_that_was_waited_for_is_idle() {
    let _machine = machine();
    let (memory, stream) = (allocate(), stream());
    for round in 0..200 {
        // SAFETY: the signatures are the driver's; the memory is ours, of `SIZE` bytes.
        unsafe {
            assert_eq!(cuMemsetD8Async(memory, round, 64, stream), 0);
            assert_eq!(cuStreamSynchronize(stream), 0);
            assert_eq!(cuStreamQuery(stream), 0);
        }
    }
}

#[test]
fn calls_are_written_down_with_who_made_them_and_how_they_ended() {
    let mut machine = machine();
    machine.faults(&["trace=cuMemGetInfo_v2,cuStreamSynchronize"]);
    let stream = stream();
    let thread = std::thread::Builder::new().name("a longer name than 15".to_owned());
    let outcome = thread.spawn(info).unwrap().join().unwrap();
    assert_eq!(outcome, 201, "no context is current there");
    // SAFETY: the signature is the driver's.
    assert_eq!(unsafe { cuStreamSynchronize(stream) }, 0);
    let own = std::process::id();
    let lines = machine.trace();
    let [.., failed, began, ended] = &lines[..] else {
        panic!("{lines:?}");
    };
    assert!(failed.starts_with(&format!("cuMemGetInfo_v2 {own} ")));
    assert!(failed.ends_with(" 201 a longer name t"), "{failed}");
    assert!(began.starts_with(&format!("cuStreamSynchronize {own} ")));
    assert!(began.contains(" began ") && ended.contains(" 0 "));
    machine.faults(&[]);
    assert_eq!(info(), 0);
    assert_eq!(machine.trace(), lines);
}
