//! A node for a test: a real broker on real sockets in a separate directory, with simulated or real devices.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    io::{Read, Write},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use anyhow::{Context, Result, ensure};
use swiftcache_client::{
    device::{DeviceLayer, host::HostLayer},
    session::{Session, SessionConfig},
};
use swiftcache_proto::{
    domain::{Device, DeviceUuid},
    topology::Topology,
};
use tempfile::TempDir;

use crate::{
    PATIENCE,
    engine::eventually,
    programs::{Program, program},
};

/// Three devices: the first two on NVLink, the third across PCIe. The Python suites use it too.
const TOPOLOGY: &str = include_str!("../harness/topology.toml");

/// A broker and its directory.
#[derive(Debug)]
pub struct Node {
    directory: TempDir,
    topology: Topology,
    setup: Setup,
    broker: Option<Program>,
}

/// The devices of a node.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Devices {
    /// Three simulated devices. Two of them are on NVLink.
    #[default]
    Simulated,
    /// The devices of a topology file. Borrowers use CUDA when the file names GPUs.
    File(PathBuf),
    /// GPUs. The broker finds them through NVML, borrowers through CUDA.
    Gpus(Vec<Device>),
}

/// Which GPUs a process enumerates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Sight {
    /// As many as this process.
    #[default]
    All,
    /// Those that `CUDA_VISIBLE_DEVICES` names: numbers or UUIDs with commas between them.
    Only(String),
}

impl Sight {
    /// One GPU.
    pub fn of(device: &DeviceUuid) -> Self {
        Self::Only(device.to_string())
    }

    /// What the process has in its environment.
    pub fn environment(&self) -> Option<(&'static str, &str)> {
        match self {
            Self::All => None,
            Self::Only(devices) => Some(("CUDA_VISIBLE_DEVICES", devices)),
        }
    }
}

/// How to run a node's broker.
#[derive(Clone, Debug, Default)]
pub struct Setup {
    /// The node's devices.
    pub devices: Devices,
    /// Further options of the broker.
    pub options: Vec<String>,
    /// The log level or filter. Empty: warnings.
    pub log: String,
    /// The file that the log is appended to. None: the test's own standard error.
    pub log_file: Option<PathBuf>,
    /// Shell commands that run first, in the broker's own process, for example to set limits.
    pub shell: Option<String>,
    /// HBM of each device, bytes. None: 1 GiB.
    pub hbm_bytes: Option<u64>,
    /// Where the node's directory is made. None: where the system keeps temporary files.
    pub parent: Option<PathBuf>,
    /// What every process of the node has in its environment in addition to the test's own, for example which driver to
    /// load.
    pub environment: BTreeMap<String, OsString>,
}

impl Node {
    /// Starts a node whose broker has these further `options`.
    ///
    /// # Errors
    /// When the broker is not built or cannot start.
    pub fn start(options: &[&str]) -> Result<Self> {
        Self::start_with(Setup {
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Setup::default()
        })
    }

    /// Starts a node with this setup.
    ///
    /// # Errors
    /// When the broker is not built or cannot start.
    pub fn start_with(setup: Setup) -> Result<Self> {
        let parent = setup.parent.clone().unwrap_or_else(std::env::temp_dir);
        let directory = tempfile::tempdir_in(parent).context("a directory for the node")?;
        let usage = directory.path().join("usage");
        fs::create_dir(&usage)?;
        let hbm_bytes = setup.hbm_bytes.unwrap_or(1 << 30);
        let simulated = TOPOLOGY
            .replace("USAGE", &usage.display().to_string())
            .replace("1073741824", &hbm_bytes.to_string());
        let topology = match &setup.devices {
            Devices::Simulated => Some(simulated),
            Devices::File(path) => Some(fs::read_to_string(path)?),
            Devices::Gpus(_) => None,
        };
        if let Some(text) = &topology {
            fs::write(directory.path().join("topology.toml"), text)?;
        }
        let mut node = Self {
            topology: match (&setup.devices, topology) {
                (_, Some(text)) => Topology::parse(&text, "the test's topology")?,
                (Devices::Gpus(gpus), None) => found(gpus),
                (_, None) => found(&[]),
            },
            directory,
            setup,
            broker: None,
        };
        node.start_broker()?;
        Ok(node)
    }

    /// Starts the broker, for the first time or again, in the node's directory, and waits until it listens.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn start_broker(&mut self) -> Result<()> {
        let path = program("swiftcache-broker")?;
        let mut command = match &self.setup.shell {
            None => Command::new(path),
            Some(shell) => {
                let mut command = Command::new("sh");
                command.args(["-c", &format!("{shell}; exec \"$0\" \"$@\"")]);
                command.arg(path);
                command
            }
        };
        let log = match self.setup.log.as_str() {
            "" => "warn",
            log => log,
        };
        command
            .envs(&self.setup.environment)
            .args(["--log", log, "--probe", self.probe()])
            .arg("--socket")
            .arg(self.socket())
            .args(&self.setup.options);
        // What engines leave is freed at once, unless a test is about that.
        let names = |option: &String| option.starts_with("--estate-ttl-ms");
        if !self.setup.options.iter().any(names) {
            command.args(["--estate-ttl-ms", "0"]);
        }
        self.name_topology(&mut command);
        if let Some(file) = &self.setup.log_file {
            command.stderr(fs::File::options().create(true).append(true).open(file)?);
        }
        let mut broker = Program::start(&mut command)?;
        let listens = eventually("the broker to listen", || {
            ensure!(!broker.has_ended()?, "the broker ended early");
            Ok(UnixStream::connect(self.socket()).is_ok())
        });
        self.broker = Some(broker);
        listens
    }

    fn probe(&self) -> &'static str {
        match self.setup.devices {
            Devices::Simulated | Devices::File(_) => "simulated",
            Devices::Gpus(_) => "nvml",
        }
    }

    /// Adds the node's topology file to a program's options, unless the devices are GPUs.
    pub fn name_topology(&self, command: &mut Command) {
        if !matches!(self.setup.devices, Devices::Gpus(_)) {
            command.arg("--topology").arg(self.topology_file());
        }
    }

    /// What the node's processes have in their environment in addition to the test's own.
    pub fn environment(&self) -> &BTreeMap<String, OsString> {
        &self.setup.environment
    }

    /// Sends SIGKILL to the broker.
    ///
    /// # Errors
    /// When there is no broker.
    pub fn kill_broker(&mut self) -> Result<()> {
        self.broker.take().context("no broker")?.kill()
    }

    /// The broker's process.
    ///
    /// # Errors
    /// When there is no broker.
    pub fn broker(&self) -> Result<&Program> {
        self.broker.as_ref().context("no broker")
    }

    /// The broker's process, for a test that waits for its end.
    ///
    /// # Errors
    /// When there is no broker.
    pub fn broker_mut(&mut self) -> Result<&mut Program> {
        self.broker.as_mut().context("no broker")
    }

    /// Removes the ledger, as if its directory had been lost.
    ///
    /// # Errors
    /// When it is not there.
    pub fn lose_ledger(&self) -> Result<()> {
        Ok(fs::remove_file(self.directory.path().join("ledger"))?)
    }

    /// The address of the broker's metrics, from its log. The setup must log level info to a file.
    ///
    /// # Errors
    /// When the log does not have the address.
    pub fn metrics_address(&self) -> Result<String> {
        let log = self.setup.log_file.as_ref().context("no log file")?;
        let mut address = String::new();
        eventually("the broker to say its address", || {
            let log = fs::read_to_string(log)?;
            let said = log.rsplit_once("metrics=").map(|(_, rest)| rest);
            let said = said.and_then(|rest| rest.split_whitespace().next());
            address = said
                .unwrap_or_default()
                .trim_matches(|c: char| !c.is_ascii_digit())
                .to_owned();
            Ok(!address.is_empty())
        })?;
        Ok(address)
    }

    /// The broker's metrics, with the status line and headers of the HTTP answer.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn metrics(&self) -> Result<String> {
        let mut stream = TcpStream::connect(self.metrics_address()?)?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    }

    /// The broker's socket.
    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("broker.sock")
    }

    /// What `swiftcache status` prints with these arguments.
    ///
    /// # Errors
    /// When it fails.
    pub fn status(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program("swiftcache")?);
        command.arg("status").arg("--socket").arg(self.socket());
        let shown = command.args(arguments).output()?;
        ensure!(shown.status.success(), "{shown:?}");
        Ok(String::from_utf8(shown.stdout)?)
    }

    /// The node's topology file.
    pub fn topology_file(&self) -> PathBuf {
        self.directory.path().join("topology.toml")
    }

    /// The node's directory.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A new device layer with the node's devices.
    ///
    /// # Errors
    /// When the node's directory is gone.
    pub fn layer(&self) -> Result<Arc<dyn DeviceLayer>> {
        Ok(Arc::new(HostLayer::from_topology(&self.topology, false)?))
    }

    /// A device of the node.
    pub fn device(&self, number: usize) -> DeviceUuid {
        self.topology.devices[number].uuid.clone()
    }

    /// Makes a simulated neighbour use this much of a device's HBM.
    ///
    /// # Errors
    /// When the node's directory is gone.
    pub fn neighbour_uses(&self, number: usize, bytes: u64) -> Result<()> {
        let file = self
            .directory
            .path()
            .join("usage")
            .join(self.device(number).as_str());
        let fresh = file.with_extension("new");
        fs::write(&fresh, bytes.to_string())?;
        Ok(fs::rename(fresh, file)?)
    }

    /// Connects a session of this process.
    ///
    /// # Errors
    /// When the broker does not answer.
    pub fn session(&self, name: &str) -> Result<Session> {
        connect(self.socket(), name)
    }
}

/// Connects a session. Waits long enough for a busy machine.
///
/// # Errors
/// When the broker does not answer.
pub fn connect(socket: PathBuf, name: &str) -> Result<Session> {
    let session = Session::start(SessionConfig {
        socket,
        name: name.to_owned(),
        tenant: String::new(),
    })?;
    session.wait_connected(PATIENCE)?;
    Ok(session)
}

fn found(gpus: &[Device]) -> Topology {
    Topology {
        name: "this machine's GPUs".to_owned(),
        devices: gpus.to_vec(),
        links: Vec::new(),
        usage_dir: None,
    }
}
