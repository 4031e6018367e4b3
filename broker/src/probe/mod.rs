//! Finds the node's devices: through the NVIDIA driver, or in a topology file that simulates a node. No probe creates a
//! CUDA context.

mod nvml;
mod simulated;

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use swiftcache_proto::domain::{Device, DeviceUuid, Link};

pub use nvml::Nvml;
pub use simulated::Simulated;

use crate::error::{BrokerError, Unusable};

/// The node that is simulated when there is no driver and no topology is named.
pub const DEFAULT_TOPOLOGY: &str = "hgx-8";

/// The source of a node's devices.
pub trait Probe: Send + Sync {
    /// The name of the source, for people: `nvml`, or `simulated (TOPOLOGY)`.
    fn source(&self) -> String;

    /// The devices, which are found once at start.
    fn devices(&self) -> &[Device];

    /// The links between the devices in both directions. Pairs that are not listed have no peer access.
    fn links(&self) -> &[Link];

    /// GPUs that the driver lists and the broker does not use.
    fn left_out(&self) -> &[LeftOut] {
        &[]
    }

    /// Says, for people, which facts about a device could not be read at start.
    fn doubts(&self, _device: &DeviceUuid) -> &[String] {
        &[]
    }

    /// The bytes of HBM that are in use on a device now. This includes donated regions: the broker knows of `donated`
    /// bytes, and a probe that sees the hardware counts those itself. May block for milliseconds.
    ///
    /// # Errors
    /// When the use cannot be read. The error says why, for people.
    fn used_bytes(&self, device: &DeviceUuid, donated: u64) -> Result<u64, String>;
}

/// A GPU that the driver lists and the broker does not use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOut {
    /// The driver's ordinal.
    pub ordinal: u32,
    /// The GPU's UUID, if the driver tells it.
    pub uuid: Option<DeviceUuid>,
    /// Why the broker does not use the GPU, for people.
    pub reason: String,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GPU {}", self.ordinal)?;
        if let Some(uuid) = &self.uuid {
            write!(f, " ({uuid})")?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// Which probe to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ProbeChoice {
    /// A simulated node when a topology is named. Otherwise NVML, or a simulated node when NVML's library is absent or
    /// lists no GPU.
    Auto,
    /// NVML. The broker does not start when NVML cannot be used.
    Nvml,
    /// A simulated node.
    Simulated,
}

/// Opens the probe that the settings ask for.
///
/// # Errors
/// When NVML was demanded and cannot be used, when NVML is there and does not work, or when the topology is wrong.
pub fn open(choice: ProbeChoice, topology: Option<&str>) -> Result<Arc<dyn Probe>, BrokerError> {
    let simulate = || Simulated::load(topology.unwrap_or(DEFAULT_TOPOLOGY));
    match choice {
        ProbeChoice::Nvml => Ok(Arc::new(Nvml::open()?)),
        ProbeChoice::Simulated => Ok(Arc::new(simulate()?)),
        ProbeChoice::Auto if topology.is_some() => Ok(Arc::new(simulate()?)),
        ProbeChoice::Auto => match Nvml::open() {
            Ok(nvml) => Ok(Arc::new(nvml)),
            // This machine has GPUs, and their driver does not work. Simulated devices would hide that.
            Err(problem @ Unusable::Failed(_)) => Err(problem.into()),
            Err(problem) => {
                tracing::warn!(
                    %problem,
                    topology = DEFAULT_TOPOLOGY,
                    "there is no GPU, so this broker SIMULATES its devices. --probe nvml demands real ones"
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
            assert!(matches!(problem, Unusable::Absent(_)), "{problem:?}");
            let text = problem.to_string();
            assert!(text.contains(path), "{text:?} lacks {path}");
        }
    }
}
