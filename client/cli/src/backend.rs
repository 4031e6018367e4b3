//! Opens a session with a node's broker, and the device layer for the node's devices.

use std::{path::PathBuf, sync::Arc, time::Duration};

use swiftcache_proto::domain::{Device, Link};

use super::CliError;
use swiftcache_client::{
    device::{self, Choice, DeviceLayer},
    session::{Session, SessionConfig},
};

/// How long a broker may take for its first answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A node's devices and links, from its broker.
pub(super) type NodeShape = (Vec<Device>, Vec<Link>);

/// Opens a session, and waits for the broker's description of the node.
pub(super) fn connect(config: SessionConfig) -> Result<(Session, NodeShape), CliError> {
    let socket = config.socket.clone();
    let session = Session::connect(config)?;
    session.wait_connected(CONNECT_LIMIT)?;
    let node = session.node().ok_or_else(|| {
        CliError::no_broker_at(&socket, "the connection was lost at once".to_owned())
    })?;
    Ok((session, node))
}

/// Opens CUDA for devices that NVML named (`GPU-...`), and shared memory for simulated devices. `usage_dir` is the
/// directory with the HBM use of simulated devices.
pub(super) fn open(
    (devices, links): &NodeShape,
    usage_dir: Option<PathBuf>,
) -> Result<Arc<dyn DeviceLayer>, CliError> {
    device::open_node(Choice::Auto, devices, links, usage_dir)
        .map_err(|error| CliError::Failed(error.to_string()))
}
