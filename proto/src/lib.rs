//! SwiftCache's protocol: generated messages and services, and the domain types that broker and client share.
//!
//! * [`v1`] is what travels: generated from `proto/swiftcache/v1/*.proto`.
//! * [`domain`] is what the two sides think in: validated identifiers, hashes and enums.
//! * [`topology`] describes a simulated node.
//! * [`fd_socket`] frames what travels beside gRPC.
//! * [`numa`] lists the machine's host memory.
//! * [`nvml`] says where NVML's library is: the broker's probe and `swiftcache doctor` load the same one.
//! * [`size`] reads sizes as people write them.
//! * [`traffic`] adds up what engines report of their copies.
//! * [`convert`] turns one into the other; every refusal names the field that broke its bound.

pub mod convert;
pub mod domain;
pub mod fd_socket;
pub mod numa;
pub mod nvml;
pub mod size;
pub mod topology;
pub mod traffic;

/// Generated messages and services of `swiftcache.v1`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated; documented in the .proto files"
)]
pub mod v1 {
    tonic::include_proto!("swiftcache.v1");

    /// The compiled descriptor set of `swiftcache.v1`, for server reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/swiftcache.v1.bin"));
}
