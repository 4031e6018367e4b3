//! Checks of settings that several rooms share.

use swiftcache_proto::domain::DeviceUuid;

use crate::{Error, Result, device::DeviceLayer};

/// Refuses a device that the backend does not have.
pub(crate) fn check_device(layer: &dyn DeviceLayer, device: &DeviceUuid) -> Result<()> {
    if layer.devices().iter().any(|known| known.uuid == *device) {
        return Ok(());
    }
    let problem = format!("the {} backend has no device {device}", layer.name());
    Err(Error::config("device", problem))
}
