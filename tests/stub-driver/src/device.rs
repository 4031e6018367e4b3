//! The driver itself and its devices.

use std::ffi::{CStr, c_char, c_int};

use crate::{Code, INVALID_DEVICE, INVALID_VALUE, SUCCESS, call, call_anyway, faults, world};

/// HBM of a device, bytes.
pub(crate) const HBM_BYTES: usize = 1 << 30;

const VIRTUAL_MEMORY_SUPPORTED: c_int = 102;
const DESCRIPTORS_SUPPORTED: c_int = 103;
const MULTIPROCESSORS: c_int = 16;
const NATIVE_ATOMICS: c_int = 3;

fn count() -> c_int {
    let devices = faults::setting("devices").and_then(|count| count.parse().ok());
    devices.unwrap_or(2)
}

/// Checks a device's number.
pub(crate) fn check(device: c_int) -> Result<(), Code> {
    (0..count())
        .contains(&device)
        .then_some(())
        .ok_or(INVALID_DEVICE)
}

/// Whether `from` can reach `to`.
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
        unsafe { devices.write(count()) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Code {
    call("cuDeviceGet", || {
        check(ordinal)?;
        // SAFETY: the caller gives room for one device.
        unsafe { device.write(ordinal) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, length: c_int, device: c_int) -> Code {
    call("cuDeviceGetName", || {
        check(device)?;
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
        check(device)?;
        let mut bytes = *b"\x5a\x5astub-driver-0\0";
        bytes[15] = device as u8;
        // SAFETY: the caller gives room for one UUID.
        unsafe { uuid.write(bytes) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> Code {
    call("cuDeviceTotalMem_v2", || {
        check(device)?;
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
        check(device)?;
        let found = match attribute {
            VIRTUAL_MEMORY_SUPPORTED | DESCRIPTORS_SUPPORTED => 1,
            MULTIPROCESSORS => 4,
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
        check(device)?;
        check(peer)?;
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
        check(from)?;
        check(to)?;
        if attribute != NATIVE_ATOMICS {
            return Err(INVALID_VALUE);
        }
        let nvlink = faults::setting("peers").is_none_or(|peers| peers == "nvlink");
        // SAFETY: the caller gives room for one int.
        unsafe { value.write(c_int::from(nvlink)) };
        Ok(())
    })
}
