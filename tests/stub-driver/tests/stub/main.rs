//! What the stub driver does to a process that calls it as an engine does.

#![allow(unsafe_code, reason = "calls the driver as an engine does")]

mod capture;
mod faults;
mod machine;

use swiftcache_stub_driver as _; // linked, not loaded
