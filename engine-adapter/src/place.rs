//! Where copies go.

use std::{fmt, sync::Arc};

use swiftcache_client::device::DeviceLayer;
use swiftcache_proto::domain::DeviceUuid;

/// A device, and the backend that copies to and from it.
pub(crate) struct Place {
    pub(crate) layer: Arc<dyn DeviceLayer>,
    pub(crate) device: DeviceUuid,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.device, self.layer.name())
    }
}
