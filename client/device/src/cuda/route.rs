//! What lies between the two sides of a copy, and what that means for how to copy.
//!
//! Measured on an NVIDIA H200 (132 multiprocessors, driver 580.159, PCIe 5.0) on 2026-11-23, and across NVLink on two
//! H100 (18 links, CUDA 13.0) on 2026-11-25: docs/benchmarks.md.

use std::ffi::c_uint;

use serde::Serialize;

/// The slowest way that a copy takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Route {
    /// Both sides are HBM of the device that copies.
    Device,
    /// One side is a peer's HBM, across NVLink.
    Nvlink,
    /// One side is pinned host memory, or a peer's HBM across PCIe.
    Pcie,
}

impl Route {
    /// Every route.
    pub const ALL: [Self; 3] = [Self::Device, Self::Nvlink, Self::Pcie];

    /// Pieces smaller than this on average, bytes, go through the gather kernel; larger ones to the copy engines,
    /// which leave the multiprocessors to the engine: in one batch where the driver has batches, else one by one.
    pub const fn kernel_below(self, batches: bool) -> u64 {
        match (self, batches) {
            // 4 MiB pieces: 0.87 of a plain copy through the kernel, 0.42 batched. 32 MiB: 0.99 one by one.
            (Self::Device, _) => 32 << 20,
            // 64 KiB pieces: 0.90 to 0.97 of a plain copy through the kernel, 0.17 to 0.35 batched. 256 KiB: 0.90 to
            // 0.97, and 0.99 to 1.03.
            (Self::Nvlink, true) => 256 << 10,
            // 4 MiB pieces: 0.91 to 0.97 through the kernel, 0.75 to 0.81 one by one, 3 to 4 us each.
            (Self::Nvlink, false) => 16 << 20,
            // 32 KiB pieces: 0.92 of a plain copy through the kernel; batched 0.68 to 0.97 from run to run, since the
            // driver spends 0.5 to 0.9 us of the CPU on each. 64 KiB: 0.92, and 0.98 in every run.
            (Self::Pcie, true) => 64 << 10,
            // 256 KiB pieces: 0.89 to 0.92 through the kernel, 0.64 to 0.68 one by one, 2 to 3 us each.
            (Self::Pcie, false) => 1 << 20,
        }
    }

    /// How many blocks of the gather kernel saturate the route on a device of so many multiprocessors. More would
    /// only take multiprocessors from the engine.
    pub(super) fn blocks(self, multiprocessors: c_uint) -> c_uint {
        let blocks = match self {
            // One on each: 0.98 of the rate of two, and compute beside it loses a third as much.
            Self::Device => multiprocessors,
            // 24 saturate an idle device when it reads, 96 when it writes. Beside full compute 48 come closest to the
            // pipeline's bound, 0.84 to 0.90; 24 reach 0.80 to 0.88 and 132 0.64 to 0.72.
            Self::Nvlink => 48,
            // 4 saturate an idle device, and 12 a busy one, whose blocks must end before these start: of the
            // pipeline's bound, 12 reach 0.957 at worst, 8 0.82, and 16 and more take too much from compute.
            Self::Pcie => 12,
        };
        blocks.min(multiprocessors)
    }
}
