//! Where the broker learns about devices: the NVIDIA driver, or a topology file that simulates a node. Never a
//! CUDA context.

mod nvml;
mod simulated;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use swiftcache_proto::domain::{Device, DeviceUuid, Link};

pub use nvml::Nvml;
pub use simulated::Simulated;

use crate::error::BrokerError;

/// The node simulated when there is no driver and no topology is named.
pub const DEFAULT_TOPOLOGY: &str = "hgx-8";

/// A node's devices.
pub trait Probe: Send + Sync {
    /// For people: "nvml", or `simulated (TOPOLOGY)`.
    fn source(&self) -> String;

    /// The devices, found once at start.
    fn devices(&self) -> &[Device];

    /// The links between them, both directions; pairs not listed have no peer access.
    fn links(&self) -> &[Link];

    /// HBM in use on a device now, bytes, donated regions included. `donated` of them are known to the broker;
    /// a probe that sees the hardware counts them itself. May block for milliseconds. `None`: it cannot tell.
    fn used_bytes(&self, device: &DeviceUuid, donated: u64) -> Option<u64>;
}

/// Which probe to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeChoice {
    /// A simulated node when a topology is named; otherwise NVML, or a simulated node when there is none.
    Auto,
    /// NVML or nothing.
    Nvml,
    /// A simulated node.
    Simulated,
}

/// Opens the probe that the settings ask for.
///
/// # Errors
/// When NVML was demanded and cannot be used, or the topology is refused.
pub fn open(choice: ProbeChoice, topology: Option<&str>) -> Result<Arc<dyn Probe>, BrokerError> {
    let simulate = || Simulated::load(topology.unwrap_or(DEFAULT_TOPOLOGY));
    match choice {
        ProbeChoice::Nvml => Ok(Arc::new(Nvml::open().map_err(BrokerError::Nvml)?)),
        ProbeChoice::Simulated => Ok(Arc::new(simulate()?)),
        ProbeChoice::Auto if topology.is_some() => Ok(Arc::new(simulate()?)),
        ProbeChoice::Auto => match Nvml::open() {
            Ok(nvml) => Ok(Arc::new(nvml)),
            Err(problem) => {
                tracing::warn!(
                    problem,
                    topology = DEFAULT_TOPOLOGY,
                    "NVML cannot be used: this broker SIMULATES its devices. --probe nvml demands real ones"
                );
                Ok(Arc::new(simulate()?))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_topology_is_simulated_without_asking_nvml() {
        let probe = open(ProbeChoice::Auto, Some("pcie-4")).unwrap();
        assert!(probe.source().starts_with("simulated ("));
        assert_eq!(probe.devices().len(), 4);
        let refused = open(ProbeChoice::Simulated, Some("/nowhere.toml"));
        assert!(matches!(refused.err(), Some(BrokerError::Topology(_))));
    }

    #[test]
    fn a_library_that_is_missing_or_none_is_a_reason_and_not_a_panic() {
        for path in ["/nowhere/libnvidia-ml.so.1", "/proc/self/maps"] {
            let problem = Nvml::open_at(path.as_ref()).err().unwrap();
            assert!(problem.contains(path), "{problem:?} lacks {path}");
        }
    }
}
