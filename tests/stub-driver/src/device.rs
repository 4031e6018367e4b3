//! The driver itself and its devices.

use std::ffi::{CStr, c_char, c_int};

use crate::{Code, INVALID_DEVICE, INVALID_VALUE, SUCCESS, call, call_anyway, faults, world};

/// HBM of a device, bytes.
pub(crate) const HBM_BYTES: usize = 1 << 30;

const VIRTUAL_MEMORY_SUPPORTED: c_int = 102;
const DESCRIPTORS_SUPPORTED: c_int = 103;
const MULTIPROCESSORS: c_int = 16;
const HOST_NUMA_ID: c_int = 134;
const NATIVE_ATOMICS: c_int = 3;

/// The variable that says which devices a process enumerates, in which order.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

/// The machine's devices whose nodes this process has, in the machine's order.
fn nodes() -> Vec<c_int> {
    let devices = faults::setting("devices").and_then(|count| count.parse().ok());
    let all = 0..devices.unwrap_or(2);
    let Some(nodes) = faults::setting("nodes") else {
        return all.collect();
    };
    let nodes: Vec<c_int> = (nodes.split(','))
        .filter_map(|node| node.trim().parse().ok())
        .collect();
    all.filter(|device| nodes.contains(device)).collect()
}

/// The devices that this process enumerates, by their numbers in the machine. As the real driver does, it counts those
/// whose nodes are there, takes the beginning of a UUID for the whole, and stops at the first that it does not know.
fn visible() -> Vec<c_int> {
    let nodes = nodes();
    let Ok(chosen) = std::env::var(VISIBLE) else {
        return nodes;
    };
    let find = |name: &str| match name.parse::<usize>() {
        Ok(number) => nodes.get(number).copied(),
        Err(_) => (nodes.iter().copied())
            .find(|device| !name.is_empty() && uuid_text(*device).starts_with(name)),
    };
    chosen
        .split(',')
        .map_while(|name| find(name.trim()))
        .collect()
}

/// The number in the machine of a device that this process calls `ordinal`.
pub(crate) fn known(ordinal: c_int) -> Result<c_int, Code> {
    let ordinal = usize::try_from(ordinal).map_err(|_| INVALID_DEVICE)?;
    visible().get(ordinal).copied().ok_or(INVALID_DEVICE)
}

/// What this process calls a device of the machine, if it enumerates it.
pub(crate) fn ordinal(device: c_int) -> Result<c_int, Code> {
    let found = visible().iter().position(|visible| *visible == device);
    let found = found.and_then(|found| c_int::try_from(found).ok());
    found.ok_or(INVALID_DEVICE)
}

/// Whether this process has the node of a device of the machine. Without it, the driver maps none of its memory.
pub(crate) fn has_node(device: c_int) -> bool {
    nodes().contains(&device)
}

fn uuid(device: c_int) -> [u8; 16] {
    let mut bytes = *b"\x5a\x5astub-driver-0\0";
    bytes[15] = device as u8;
    bytes
}

/// As `nvidia-smi` prints it.
fn uuid_text(device: c_int) -> String {
    let mut text = "GPU-".to_owned();
    for (at, byte) in uuid(device).iter().enumerate() {
        if [4, 6, 8, 10].contains(&at) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// Whether `from` can reach `to`, both by their numbers in the machine.
pub(crate) fn peers(from: c_int, to: c_int) -> bool {
    from == to || faults::setting("peers").is_none_or(|peers| peers != "none")
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuInit(flags: u32) -> Code {
    call_anyway("cuInit", || {
        if flags != 0 || faults::directory().is_none() {
            return Err(INVALID_VALUE);
        }
        world().initialised = true;
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Code {
    // SAFETY: the caller gives room for one int.
    unsafe { version.write(12_080) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: Code, text: *mut *const c_char) -> Code {
    let found = faults::describe(error).map(|(name, _)| name);
    // SAFETY: the caller gives room for one pointer.
    unsafe { text.write(found.map_or(std::ptr::null(), CStr::as_ptr)) };
    if found.is_some() {
        SUCCESS
    } else {
        INVALID_VALUE
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(error: Code, text: *mut *const c_char) -> Code {
    let found = faults::describe(error).map(|(_, words)| words);
    // SAFETY: the caller gives room for one pointer.
    unsafe { text.write(found.map_or(std::ptr::null(), CStr::as_ptr)) };
    if found.is_some() {
        SUCCESS
    } else {
        INVALID_VALUE
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(devices: *mut c_int) -> Code {
    call("cuDeviceGetCount", || {
        // SAFETY: the caller gives room for one int.
        unsafe { devices.write(visible().len() as c_int) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    call("cuDeviceGet", || {
        known(ordinal)?;
        // SAFETY: the caller gives room for one device.
        unsafe { device.write(ordinal) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int) -> Code {
    call("cuDeviceGetName", || {
        known(device)?;
        let text = c"stub GPU".to_bytes_with_nul();
        if (length as usize) < text.len() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller gives room for `length` bytes, and the text is shorter.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: c_int) -> Code {
    call("cuDeviceGetUuid_v2", || {
        let bytes = self::uuid(known(device)?);
        // SAFETY: the caller gives room for one UUID.
        unsafe { uuid.write(bytes) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> Code {
    call("cuDeviceTotalMem_v2", || {
        known(device)?;
        // SAFETY: the caller gives room for one number.
        unsafe { bytes.write(HBM_BYTES) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(
    value: *mut c_int,
    attribute: c_int,
    device: c_int,
) -> Code {
    call("cuDeviceGetAttribute", || {
        known(device)?;
        let found = match attribute {
            VIRTUAL_MEMORY_SUPPORTED | DESCRIPTORS_SUPPORTED => 1,
            MULTIPROCESSORS => 4,
            HOST_NUMA_ID => 0,
            _ => return Err(INVALID_VALUE),
        };
        // SAFETY: the caller gives room for one int.
        unsafe { value.write(found) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceCanAccessPeer(
    can: *mut c_int,
    device: c_int,
    peer: c_int,
) -> Code {
    call("cuDeviceCanAccessPeer", || {
        let (device, peer) = (known(device)?, known(peer)?);
        // SAFETY: the caller gives room for one int.
        unsafe { can.write(c_int::from(device != peer && peers(device, peer))) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetP2PAttribute(
    value: *mut c_int,
    attribute: c_int,
    from: c_int,
    to: c_int,
) -> Code {
    call("cuDeviceGetP2PAttribute", || {
        known(from)?;
        known(to)?;
        if attribute != NATIVE_ATOMICS {
            return Err(INVALID_VALUE);
        }
        let nvlink = faults::setting("peers").is_none_or(|peers| peers == "nvlink");
        // SAFETY: the caller gives room for one int.
        unsafe { value.write(c_int::from(nvlink)) };
        Ok(())
    })
}
