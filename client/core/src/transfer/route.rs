//! A route: the streams to one memory.

use std::{fmt, sync::Arc};

use swiftcache_proto::domain::{DeviceUuid, Medium};

use super::breaker::{RouteIndex, RouteSet};
use crate::device::CopyStream;

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Out of areas, into the engine's pool.
    Load,
    /// Into areas.
    Store,
}

/// The way to a device's memory, or to host memory: one pair of streams for each, so that links work side by side.
#[derive(Debug)]
pub(crate) struct Route {
    /// The kind of memory it leads to.
    pub(crate) medium: Medium,
    /// The device whose memory that is; of this process's own host memory, the device that reaches it.
    pub(crate) device: DeviceUuid,
    pub(super) index: RouteIndex,
    pub(super) load: Arc<dyn CopyStream>,
    pub(super) store: Arc<dyn CopyStream>,
}

impl Route {
    /// The stream for copies out of the memory, or the one for copies into it. Copies that must precede a write are queued with
    /// the writes: a slot whose old bytes are still being copied away on that stream can be taken again at once.
    pub(crate) fn stream(&self, direction: Direction) -> &Arc<dyn CopyStream> {
        match direction {
            Direction::Load => &self.load,
            Direction::Store => &self.store,
        }
    }

    /// Whether it is one of `routes`.
    pub(crate) fn is_in(&self, routes: RouteSet) -> bool {
        routes.contains(self.index)
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.medium {
            Medium::Hbm => self.device.fmt(f),
            Medium::Host if self.device.medium() == Medium::Host => self.device.fmt(f),
            Medium::Host => f.write_str("host memory"),
        }
    }
}
