//! Where NVML's library is.

use std::ffi::OsString;

/// Names another library than the system's: a stub, in tests.
pub const LIBRARY_VARIABLE: &str = "SWIFTCACHE_LIBNVML";

/// The system's library. Its major version has been 1 since there is NVML.
const SYSTEM_LIBRARY: &str = "libnvidia-ml.so.1";

/// The library to load: the one that [`LIBRARY_VARIABLE`] names, or the system's.
pub fn library() -> OsString {
    let named = std::env::var_os(LIBRARY_VARIABLE).filter(|name| !name.is_empty());
    named.unwrap_or_else(|| SYSTEM_LIBRARY.into())
}
