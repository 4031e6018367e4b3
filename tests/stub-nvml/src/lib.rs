//! A stub of NVML's library. It answers the calls of the broker's probe and of `swiftcache doctor` for GPUs that do not
//! exist. `SWIFTCACHE_LIBNVML` names the library. `SWIFTCACHE_STUB_DIR` names a directory, whose file `nvml` is read at
//! every call:
//!
//! ```text
//! devices=2                       # the number of GPUs (default 3)
//! used@1=5000000                  # bytes in use on GPU 1 (default 100 MiB), without the driver's own
//! name@1=                         # the name of GPU 1 is not valid text
//! nvmlDeviceGetMemoryInfo_v2@1=15 # this call returns code 15 for GPU 1
//! nvmlDeviceGetName=999           # this call returns code 999 for every GPU
//! *@1=15                          # every call about GPU 1 returns code 15: it is lost
//! ```
//!
//! The GPUs have the same UUIDs as those of the stub driver.

#![allow(
    unsafe_code,
    clippy::missing_safety_doc,
    missing_docs,
    unreachable_pub,
    reason = "this has the C entry points of NVIDIA's library, with the contracts that NVIDIA documents"
)]

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_ulonglong},
    path::PathBuf,
};

type Code = c_uint;
/// A GPU's handle: its ordinal plus one, so that no handle is null.
type Handle = usize;

const SUCCESS: Code = 0;
const INVALID_ARGUMENT: Code = 2;
const NOT_SUPPORTED: Code = 3;
const NOT_FOUND: Code = 6;
const INSUFFICIENT_SIZE: Code = 7;
const GPU_IS_LOST: Code = 15;

/// The bytes of HBM on a GPU, the same as in the stub driver.
pub const HBM_BYTES: u64 = 1 << 30;
/// The bytes of HBM that the driver reserves for itself.
pub const RESERVED_BYTES: u64 = 16 << 20;
/// The other bytes of HBM that are in use, unless the file sets them.
pub const USED_BYTES: u64 = 100 << 20;
/// The number of a GPU's active NVLinks, which all lead to a switch.
const NVLINKS: c_uint = 4;
/// The `nvmlNvlinkVersion_t` of an H100.
const NVLINK_VERSION: c_uint = 6;

fn text() -> String {
    let directory = std::env::var_os("SWIFTCACHE_STUB_DIR").map(PathBuf::from);
    let text = directory.and_then(|path| std::fs::read_to_string(path.join("nvml")).ok());
    text.unwrap_or_default()
}

fn setting(key: &str) -> Option<String> {
    let text = text();
    let mut lines = text.lines().filter_map(|line| line.split_once('='));
    let (_, value) = lines.find(|(found, _)| *found == key)?;
    Some(value.trim().to_owned())
}

fn fault(key: &str) -> Option<Code> {
    setting(key)?.parse().ok()
}

fn count() -> c_uint {
    let devices = setting("devices").and_then(|count| count.parse().ok());
    devices.unwrap_or(3)
}

/// The start of every call that is about no GPU. Fails with the code that the file sets.
fn begin(symbol: &str) -> Result<(), Code> {
    fault(symbol).map_or(Ok(()), Err)
}

/// The start of every call about a GPU. Returns the GPU's ordinal, or fails with the code that the file sets.
fn about(symbol: &str, handle: Handle) -> Result<c_uint, Code> {
    let ordinal = c_uint::try_from(handle.wrapping_sub(1)).map_err(|_| INVALID_ARGUMENT)?;
    about_ordinal(symbol, ordinal)
}

fn about_ordinal(symbol: &str, ordinal: c_uint) -> Result<c_uint, Code> {
    if ordinal >= count() {
        return Err(INVALID_ARGUMENT);
    }
    let one = fault(&format!("{symbol}@{ordinal}"));
    let injected = one.or_else(|| fault(&format!("*@{ordinal}")));
    match injected.or_else(|| fault(symbol)) {
        Some(code) => Err(code),
        None => Ok(ordinal),
    }
}

fn code(result: Result<(), Code>) -> Code {
    result.err().unwrap_or(SUCCESS)
}

/// Copies a text and a final zero byte to `to`.
///
/// # Safety
/// There is room for `length` bytes at `to`.
unsafe fn write_text(text: &[u8], to: *mut c_char, length: c_uint) -> Result<(), Code> {
    if length as usize <= text.len() {
        return Err(INSUFFICIENT_SIZE);
    }
    // SAFETY: the caller gives room for `length` bytes, and the text with its final zero byte is not longer.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, text.len());
        to.add(text.len()).write(0);
    }
    Ok(())
}

/// The UUID of a GPU in this stub and in the stub driver.
pub fn uuid(ordinal: u32) -> String {
    format!("GPU-5a5a7374-7562-2d64-7269-7665722d30{ordinal:02x}")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlInit_v2() -> Code {
    code(begin("nvmlInit_v2"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlShutdown() -> Code {
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlErrorString(_code: Code) -> *const c_char {
    CStr::as_ptr(c"an error of the stub")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetDriverVersion(version: *mut c_char, length: c_uint) -> Code {
    code(begin("nvmlSystemGetDriverVersion").and_then(|()| {
        // SAFETY: the caller gives room for `length` bytes.
        unsafe { write_text(b"570.00", version, length) }
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetCount_v2(devices: *mut c_uint) -> Code {
    code(begin("nvmlDeviceGetCount_v2").map(|()| {
        // SAFETY: the caller gives room for one number.
        unsafe { devices.write(count()) };
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, handle: *mut Handle) -> Code {
    let symbol = "nvmlDeviceGetHandleByIndex_v2";
    code(about_ordinal(symbol, index).map(|ordinal| {
        // SAFETY: the caller gives room for one handle.
        unsafe { handle.write(ordinal as Handle + 1) };
    }))
}

/// As NVIDIA documents, this fails with "lost" when *any* GPU is lost.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByUUID(
    wanted: *const c_char,
    handle: *mut Handle,
) -> Code {
    let symbol = "nvmlDeviceGetHandleByUUID";
    // SAFETY: the caller gives a text that ends with a zero byte.
    let wanted = unsafe { CStr::from_ptr(wanted) }.to_string_lossy();
    let all: Vec<c_uint> = (0..count()).collect();
    let lost = |ordinal: &c_uint| fault(&format!("*@{ordinal}")) == Some(GPU_IS_LOST);
    code(if all.iter().any(lost) {
        Err(GPU_IS_LOST)
    } else {
        let found = all.iter().find(|ordinal| uuid(**ordinal) == *wanted);
        found.ok_or(NOT_FOUND).and_then(|ordinal| {
            let ordinal = about_ordinal(symbol, *ordinal)?;
            // SAFETY: the caller gives room for one handle.
            unsafe { handle.write(ordinal as Handle + 1) };
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(
    device: Handle,
    text: *mut c_char,
    length: c_uint,
) -> Code {
    code(about("nvmlDeviceGetUUID", device).and_then(|ordinal| {
        // SAFETY: the caller gives room for `length` bytes.
        unsafe { write_text(uuid(ordinal).as_bytes(), text, length) }
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetName(
    device: Handle,
    text: *mut c_char,
    length: c_uint,
) -> Code {
    code(about("nvmlDeviceGetName", device).and_then(|ordinal| {
        let name: &[u8] = match setting(&format!("name@{ordinal}")) {
            Some(_) => b"\xff\xfe",
            None => b"stub GPU",
        };
        // SAFETY: the caller gives room for `length` bytes.
        unsafe { write_text(name, text, length) }
    }))
}

#[repr(C)]
pub struct Memory {
    version: c_uint,
    total: c_ulonglong,
    reserved: c_ulonglong,
    free: c_ulonglong,
    used: c_ulonglong,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(device: Handle, memory: *mut Memory) -> Code {
    code(about("nvmlDeviceGetMemoryInfo_v2", device).map(|ordinal| {
        let used = setting(&format!("used@{ordinal}")).and_then(|bytes| bytes.parse().ok());
        let used = used.unwrap_or(USED_BYTES);
        // SAFETY: the caller gives one structure of this version.
        unsafe {
            (*memory).total = HBM_BYTES;
            (*memory).reserved = RESERVED_BYTES;
            (*memory).used = used;
            (*memory).free = HBM_BYTES - RESERVED_BYTES - used;
        }
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMigMode(
    device: Handle,
    current: *mut c_uint,
    pending: *mut c_uint,
) -> Code {
    code(about("nvmlDeviceGetMigMode", device).map(|_| {
        // SAFETY: the caller gives room for both.
        unsafe {
            current.write(0);
            pending.write(0);
        }
    }))
}

#[repr(C)]
pub struct Pci {
    legacy: [c_char; 16],
    domain: c_uint,
    bus: c_uint,
    device: c_uint,
    id: c_uint,
    subsystem: c_uint,
    bus_id: [c_char; 32],
}

/// The PCI address of a GPU or of the switch.
fn pci(bus: c_uint) -> Pci {
    let mut bus_id: [c_char; 32] = [0; 32];
    for (to, byte) in bus_id
        .iter_mut()
        .zip(format!("00000000:{bus:02X}:00.0").bytes())
    {
        *to = byte.cast_signed();
    }
    Pci {
        legacy: [0; 16],
        domain: 0,
        bus,
        device: 0,
        id: 0,
        subsystem: 0,
        bus_id,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(device: Handle, info: *mut Pci) -> Code {
    code(about("nvmlDeviceGetPciInfo_v3", device).map(|ordinal| {
        // SAFETY: the caller gives room for one structure.
        unsafe { info.write(pci(ordinal + 1)) };
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetP2PStatus(
    from: Handle,
    to: Handle,
    _capability: c_uint,
    status: *mut c_uint,
) -> Code {
    let symbol = "nvmlDeviceGetP2PStatus";
    let both = about(symbol, from).and_then(|_| about(symbol, to));
    code(both.map(|_| {
        // SAFETY: the caller gives room for one number. 0 is OK.
        unsafe { status.write(0) };
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkState(
    device: Handle,
    link: c_uint,
    active: *mut c_uint,
) -> Code {
    code(about("nvmlDeviceGetNvLinkState", device).map(|_| {
        // SAFETY: the caller gives room for one number.
        unsafe { active.write(c_uint::from(link < NVLINKS)) };
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkVersion(
    device: Handle,
    _link: c_uint,
    version: *mut c_uint,
) -> Code {
    code(about("nvmlDeviceGetNvLinkVersion", device).map(|_| {
        // SAFETY: the caller gives room for one number.
        unsafe { version.write(NVLINK_VERSION) };
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetNvLinkRemotePciInfo_v2(
    device: Handle,
    _link: c_uint,
    info: *mut Pci,
) -> Code {
    code(
        about("nvmlDeviceGetNvLinkRemotePciInfo_v2", device).map(|_| {
            // SAFETY: the caller gives room for one structure.
            unsafe { info.write(pci(0xf0)) };
        }),
    )
}

/// This driver has no such fields, so the broker computes speeds from the version of the links.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetFieldValues(
    device: Handle,
    _count: c_int,
    _values: *mut u8,
) -> Code {
    code(about("nvmlDeviceGetFieldValues", device).and(Err(NOT_SUPPORTED)))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxPcieLinkGeneration(
    device: Handle,
    generation: *mut c_uint,
) -> Code {
    code(
        about("nvmlDeviceGetMaxPcieLinkGeneration", device).map(|_| {
            // SAFETY: the caller gives room for one number.
            unsafe { generation.write(5) };
        }),
    )
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetMaxPcieLinkWidth(device: Handle, width: *mut c_uint) -> Code {
    code(about("nvmlDeviceGetMaxPcieLinkWidth", device).map(|_| {
        // SAFETY: the caller gives room for one number.
        unsafe { width.write(16) };
    }))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetComputeMode(device: Handle, mode: *mut c_uint) -> Code {
    code(about("nvmlDeviceGetComputeMode", device).map(|_| {
        // SAFETY: the caller gives room for one number. 0 is the default mode.
        unsafe { mode.write(0) };
    }))
}
