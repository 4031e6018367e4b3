//! What a stitched pool is told.

use std::time::Duration;

use swiftcache_proto::{convert::MAX_NAMESPACE_BYTES, domain::DeviceUuid};

use crate::{Error, Result};

/// A stitched pool's settings.
#[derive(Clone, Debug)]
pub struct StreamConfig {
    /// Names the leases, for quotas and status: 1 to 256 bytes. Nothing is published in it.
    pub namespace: String,
    /// The device the engine computes on.
    pub device: DeviceUuid,
    /// The most that lies in leased slabs, bytes: whole units of it are used.
    pub stream_bytes: u64,
    /// The size of a unit: that of the slabs it lies in, bytes. `None`: of the first slab that can be had.
    pub unit_bytes: Option<u64>,
    /// Slabs of local HBM for units whose slabs are asked back.
    pub spare_units: u32,
    /// What moving units may cost one step of the engine.
    pub step: Duration,
    /// How long opening waits for the broker, and for slabs.
    pub patience: Duration,
}

impl StreamConfig {
    /// The default of [`step`](Self::step).
    pub const STEP: Duration = Duration::from_millis(10);
    /// The default of [`patience`](Self::patience).
    pub const PATIENCE: Duration = Duration::from_secs(30);

    /// Settings for a pool on `device` that has up to `stream_bytes` in leased slabs, and no spare units.
    pub fn new(device: DeviceUuid, namespace: impl Into<String>, stream_bytes: u64) -> Self {
        Self {
            namespace: namespace.into(),
            device,
            stream_bytes,
            unit_bytes: None,
            spare_units: 0,
            step: Self::STEP,
            patience: Self::PATIENCE,
        }
    }

    /// Checks what can be checked without slabs; pieces of the device's address spaces are multiples of `granularity`.
    pub(super) fn check(&self, granularity: u64) -> Result<()> {
        if !(1..=MAX_NAMESPACE_BYTES).contains(&self.namespace.len()) {
            let problem = format!("takes 1 to {MAX_NAMESPACE_BYTES} bytes");
            return Err(Error::config("namespace", problem));
        }
        if let Some(unit) = self.unit_bytes
            && (unit == 0 || !unit.is_multiple_of(granularity))
        {
            let problem = format!("is {unit}; takes a multiple of {granularity}");
            return Err(Error::config("unit_bytes", problem));
        }
        let least = self.unit_bytes.unwrap_or(granularity);
        if self.stream_bytes < least {
            let problem = format!("is {}; takes at least one unit: {least}", self.stream_bytes);
            return Err(Error::config("stream_bytes", problem));
        }
        Ok(())
    }
}

/// A part of the pool for one tensor: local memory, and units behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its size, bytes.
    pub bytes: u64,
    /// How many units lie at its end.
    pub units: u32,
}

/// Where a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaidOut {
    /// Its first address.
    pub address: u64,
    /// Its size as it was asked for, bytes.
    pub bytes: u64,
    /// How much of it, from its beginning, is local for ever, bytes. Units follow.
    pub local_bytes: u64,
}
