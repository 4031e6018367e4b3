//! Choosing a backend.

use std::{path::PathBuf, str::FromStr, sync::Arc};

use swiftcache_proto::domain::{Device, Link};

use super::{
    DeviceLayer, Result,
    cuda::CudaLayer,
    host::{HostLayer, HostOptions},
};

/// When this is `1`, a missing GPU is an error even where the host backend would do.
pub const REQUIRE_GPU_VARIABLE: &str = "SWIFTCACHE_REQUIRE_GPU";

/// Which backend to use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// CUDA where there is a driver and a GPU, or else the host.
    #[default]
    Auto,
    /// Shared memory of this machine.
    Host,
    /// CUDA, or an error.
    Cuda,
}

impl FromStr for Choice {
    type Err = String;

    /// `auto`, `host` or `cuda`.
    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "host" => Ok(Self::Host),
            "cuda" => Ok(Self::Cuda),
            _ => Err(format!("{text:?} is no backend: use auto, host or cuda")),
        }
    }
}

/// Opens the backend that goes with a node, whose broker named these devices and links. With [`Choice::Auto`]: CUDA
/// when NVML named them all (`GPU-...`), or else shared memory; `usage_dir` is where simulated devices say how much of
/// them is used.
///
/// # Errors
/// When that backend cannot work here, and says why.
pub fn open_node(
    choice: Choice,
    devices: &[Device],
    links: &[Link],
    usage_dir: Option<PathBuf>,
) -> Result<Arc<dyn DeviceLayer>> {
    let real = (devices.iter()).all(|device| device.uuid.as_str().starts_with("GPU-"));
    match choice {
        Choice::Cuda => Ok(Arc::new(CudaLayer::open_on(links)?)),
        Choice::Auto if real => Ok(Arc::new(CudaLayer::open_on(links)?)),
        Choice::Auto | Choice::Host => {
            let options = HostOptions {
                usage_dir,
                ..HostOptions::default()
            };
            let layer = HostLayer::new(devices.to_vec(), links.to_vec(), options)?;
            Ok(Arc::new(layer))
        }
    }
}

/// Opens host memory of NUMA nodes (`HOST-n`) to lend it. Nothing computes there, so no driver is needed.
///
/// # Errors
/// When the backend cannot work here, and says why.
pub fn open_host_memory(devices: &[Device]) -> Result<Arc<dyn DeviceLayer>> {
    let layer = HostLayer::new(devices.to_vec(), Vec::new(), HostOptions::default())?;
    Ok(Arc::new(layer))
}

/// Opens a backend; `host` makes the host's, if it comes to that.
///
/// # Errors
/// When the backend that was asked for cannot work here, and says why. With `auto`, only when a GPU is required
/// ([`REQUIRE_GPU_VARIABLE`]) or the host backend fails too.
pub fn open(
    choice: Choice,
    host: impl FnOnce() -> Result<HostLayer>,
) -> Result<Arc<dyn DeviceLayer>> {
    let required = std::env::var_os(REQUIRE_GPU_VARIABLE).is_some_and(|value| value == "1");
    if choice == Choice::Host {
        return Ok(Arc::new(host()?));
    }
    match CudaLayer::open() {
        Ok(layer) => {
            let (version, absent) = layer.driver();
            tracing::info!(version, ?absent, "using the CUDA driver");
            Ok(Arc::new(layer))
        }
        Err(error) if choice == Choice::Cuda || required => Err(error),
        Err(error) => {
            tracing::info!(%error, "no GPU: going on with the host backend");
            Ok(Arc::new(host()?))
        }
    }
}
