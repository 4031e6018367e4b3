//! The subject of the checks: a backend, and how a second process opens the same backend.

use std::{fmt, path::PathBuf, sync::Arc};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use swiftcache_client::device::{
    CopyStream, DeviceError, DeviceLayer,
    cuda::CudaLayer,
    host::{HostLayer, HostOptions},
};
use swiftcache_proto::domain::{Device, DeviceUuid, Link, LinkKind};
use swiftcache_tests::stub::Stub;
use thiserror::Error;

/// A backend to open, in this process or in another.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Backend {
    /// Two simulated devices on one simulated NVLink.
    Host {
        /// The directory where the processes account for their HBM.
        usage_dir: PathBuf,
    },
    /// The GPUs of the driver that the environment names, or else of the system's driver.
    Cuda,
}

/// HBM of each simulated device, bytes.
pub const SIMULATED_HBM: u64 = 1 << 30;

impl Backend {
    /// Opens the backend.
    ///
    /// # Errors
    /// When the backend cannot work here.
    pub fn open(&self) -> Result<Arc<dyn DeviceLayer>> {
        match self {
            Self::Host { usage_dir } => Ok(Arc::new(simulated(usage_dir.clone())?)),
            Self::Cuda => Ok(Arc::new(CudaLayer::open()?)),
        }
    }
}

/// Two simulated devices, `SIM-0` and `SIM-1`.
///
/// # Errors
/// When the usage directory cannot be used.
pub fn simulated(usage_dir: PathBuf) -> swiftcache_client::device::Result<HostLayer> {
    let named = |text: &str| {
        text.parse::<DeviceUuid>()
            .map_err(|problem| DeviceError::Unavailable {
                backend: "host",
                problem,
            })
    };
    let (a, b) = (named("SIM-0")?, named("SIM-1")?);
    let device = |uuid: &DeviceUuid, ordinal| Device {
        uuid: uuid.clone(),
        name: "simulated GPU".to_owned(),
        hbm_bytes: SIMULATED_HBM,
        ordinal,
    };
    let link = |from: &DeviceUuid, to: &DeviceUuid| Link {
        from: from.clone(),
        to: to.clone(),
        kind: LinkKind::Nvlink,
        bytes_per_second: 380_000_000_000,
    };
    let options = HostOptions {
        usage_dir: Some(usage_dir),
        ..HostOptions::default()
    };
    let devices = vec![device(&a, 0), device(&b, 1)];
    HostLayer::new(devices, vec![link(&a, &b), link(&b, &a)], options)
}

/// A backend under test.
pub struct Subject {
    /// The backend, opened in this process.
    pub layer: Arc<dyn DeviceLayer>,
    /// How a second process opens it.
    pub backend: Backend,
    /// The program of the second process: `swiftcache-gpu-check`.
    pub peer_program: PathBuf,
    /// Makes a device fail for good, if that is possible.
    pub lose: Option<LoseDevice>,
}

/// Makes a device fail for good.
pub type LoseDevice = Box<dyn Fn(&DeviceUuid) -> Result<()> + Send + Sync>;

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Subject({:?})", self.backend)
    }
}

/// When this is `1`, it is a failure if no GPU of the machine reaches the memory of another.
pub const REQUIRE_PEERS_VARIABLE: &str = "SWIFTCACHE_REQUIRE_PEERS";

/// Why nothing can be copied between two devices here.
#[derive(Clone, Debug, Error)]
#[error("{0}")]
pub struct NoPeers(String);

impl NoPeers {
    /// The text for users, if it is not a failure that there are no peers.
    ///
    /// # Errors
    /// When peers are required by [`REQUIRE_PEERS_VARIABLE`].
    pub fn excused(self) -> Result<String> {
        if std::env::var_os(REQUIRE_PEERS_VARIABLE).is_some_and(|value| value == "1") {
            bail!("{self}, and {REQUIRE_PEERS_VARIABLE}=1 demands them");
        }
        Ok(self.0)
    }
}

impl Subject {
    /// The GPUs, for this process and for peers that run `peer_program`. A GPU of the stub driver can be lost.
    ///
    /// # Errors
    /// When there is no driver or no GPU.
    pub fn cuda(peer_program: PathBuf) -> Result<Self> {
        let lose = Stub::of_environment()
            .map(|stub| -> LoseDevice { Box::new(move |_| stub.inject(None, "*=214").map(drop)) });
        Ok(Self {
            layer: Backend::Cuda.open()?,
            backend: Backend::Cuda,
            peer_program,
            lose,
        })
    }

    /// The first device.
    ///
    /// # Errors
    /// When there is none.
    pub fn device(&self) -> Result<DeviceUuid> {
        let device = self.layer.devices().first().context("no device")?;
        Ok(device.uuid.clone())
    }

    /// The last device. If there are several, it is not the first one.
    ///
    /// # Errors
    /// When there is none.
    pub fn other_device(&self) -> Result<DeviceUuid> {
        let device = self.layer.devices().last().context("no device")?;
        Ok(device.uuid.clone())
    }

    /// The other device whose memory the first one reaches, and the link to it.
    ///
    /// # Errors
    /// When there is no such device. The error says why.
    pub fn neighbour(&self) -> Result<(DeviceUuid, LinkKind), NoPeers> {
        let [first, .., last] = self.layer.devices() else {
            return Err(NoPeers("one GPU: no peer copies".to_owned()));
        };
        match self.layer.link_kind(&first.uuid, &last.uuid) {
            LinkKind::Host => Err(NoPeers(format!(
                "{} has no peer access to {}: no peer copies",
                first.uuid, last.uuid
            ))),
            link => Ok((last.uuid.clone(), link)),
        }
    }

    /// A stream of the first device.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn stream(&self) -> Result<Arc<dyn CopyStream>> {
        Ok(self.layer.stream(&self.device()?)?)
    }
}
