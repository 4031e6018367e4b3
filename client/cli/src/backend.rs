//! The device layer that goes with a node.

use std::{path::PathBuf, sync::Arc, time::Duration};

use swiftcache_proto::domain::{Device, Link};

use super::CliError;
use swiftcache_client::{
    device::{self, Choice, DeviceLayer},
    session::{Session, SessionConfig},
};

/// How long a broker may take to answer the first time.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// A node's devices and links, as its broker says.
pub(super) type NodeShape = (Vec<Device>, Vec<Link>);

/// Opens a session and waits until the broker has said what the node looks like.
pub(super) fn connect(config: SessionConfig) -> Result<(Session, NodeShape), CliError> {
    let socket = config.socket.clone();
    let session = Session::connect(config)?;
    session.wait_connected(CONNECT_LIMIT)?;
    let node = session.node().ok_or_else(|| CliError::NoBroker {
        socket,
        problem: "the connection was lost at once".to_owned(),
    })?;
    Ok((session, node))
}

/// CUDA for devices that NVML named (`GPU-...`), shared memory for simulated ones; `usage_dir` is where the
/// latter say how much of them is used.
pub(super) fn open(
    (devices, links): &NodeShape,
    usage_dir: Option<PathBuf>,
) -> Result<Arc<dyn DeviceLayer>, CliError> {
    device::open_node(Choice::Auto, devices, links, usage_dir)
        .map_err(|error| CliError::Failed(error.to_string()))
}
