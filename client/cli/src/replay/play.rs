//! Replays a trace on a private node, or on a node that is already running.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use swiftcache_proto::domain::{Device, DeviceUuid, Link, LinkKind};

use super::{NodeArgs, ReplayArgs};
use crate::{
    CliError,
    admin::Admin,
    backend::{self, NodeShape},
    progress::Progress,
};
use swiftcache_client::session::SessionConfig;
use swiftcache_replay::{
    ReplayError,
    compare::{Place, Setup, Stage, Watch, compare},
    donor_load::{self, NeighbourRequest, TokensInFlight},
    models::ModelShape,
    neighbours::NeighbourUse,
    node::{NodePlan, PrivateNode},
    plan::Lending,
    report::Report,
    roofline::{Engine, Roofline},
    serving::LinkRates,
    sizing::{ACTIVATION_BYTES, Scale},
    tiered::{Interrupt, Neighbourhood},
    trace::Trace,
};

/// The load of the donors' own models that comes with SwiftCache.
pub(crate) const BUNDLED_LOAD: &[u8] = include_bytes!("../../../workloads/neighbours.csv");
/// How long a broker may be away before a replay fails.
const RESTART: Duration = Duration::from_secs(30);
/// How many sequences a neighbour decodes at a time. The time of its requests depends on this.
pub(crate) const NEIGHBOUR_BATCH: u64 = 8;

/// The setup of a replay, and the plan of its private node.
pub(crate) struct Play {
    setup: Setup,
    plan: NodePlan,
    load: Vec<NeighbourRequest>,
    donor_model: ModelShape,
}

impl Play {
    /// Checks the arguments.
    pub(crate) fn new(
        args: &NodeArgs,
        trace: Trace,
        directory: Option<PathBuf>,
    ) -> Result<Self, CliError> {
        let shard = args.model.shard(args.tensor_parallel);
        let model =
            shard.map_err(|error| CliError::Usage(format!("--tensor-parallel: {error}")))?;
        let scale = Scale::new(&model, trace.block_tokens, args.scale)?;
        let (load, donor_load) = match &args.donor_load {
            Some(path) => (donor_load::load(path), path.display().to_string()),
            None => (
                donor_load::read(BUNDLED_LOAD, "neighbours.csv"),
                "neighbours.csv (bundled)".to_owned(),
            ),
        };
        let host = args.gpu.host_bytes_per_second as f64;
        let setup = Setup {
            requests: trace.requests,
            block_tokens: trace.block_tokens,
            trace: trace.name,
            model,
            tensor_parallel: args.tensor_parallel,
            gpu: *args.gpu,
            scale,
            stretch: args.stretch.factor(),
            host_tier_bytes: args.host_tier,
            lease_limit_bytes: args.gpu.hbm_bytes * args.donors as u64,
            move_blocks: !args.drop_revoked,
            // Placeholders: the rates of the node's links replace them when the node is known.
            rates: LinkRates {
                nvlink: host,
                pcie: host,
                host,
            },
            topology: args.topology.clone(),
            donor_load: match args.donor.0 {
                Lending::Elastic => donor_load,
                lending => lending.to_string(),
            },
            donors: args.donors as u64,
            pace: args.pace,
        };
        let plan = NodePlan {
            topology: args.topology.clone(),
            gpu: *args.gpu,
            scale,
            donors: args.donors,
            pace: args.pace,
            headroom_bytes: args.donor_headroom,
            lending: args.donor.0,
            broker: beside_this("swiftcache-broker")?,
            swiftcache: this()?,
            directory,
        };
        Ok(Self {
            setup,
            plan,
            load: load.map_err(ReplayError::from)?,
            donor_model: *args.donor_model,
        })
    }

    /// Starts a private node, replays on it, and ends it. Calls `running` when the node runs.
    pub(crate) fn on_private_node(
        mut self,
        progress: &mut Progress,
        interrupt: &Interrupt,
        running: &dyn Fn(&PrivateNode),
    ) -> Result<Report, CliError> {
        let mut node = PrivateNode::launch(&self.plan)?;
        let donors = node.donor_devices().to_vec();
        let mut uses = self.neighbours(node.usage_dir(), &donors)?;
        // Before the donors start, so that they do not offer HBM that their own models already use.
        uses.set(0.0)?;
        let admin = Admin::connect(node.socket())?;
        node.start_donors(&self.plan, &mut || {
            let regions = admin.regions().map_err(|error| ReplayError::Process {
                process: "swiftcache-broker".to_owned(),
                problem: error.to_string(),
            })?;
            let lends = |uuid: &DeviceUuid| regions.iter().any(|r| r.device_uuid == uuid.as_str());
            Ok(donors.iter().all(|device| lends(&device.uuid)))
        })?;
        running(&node);
        let neighbourhood = Neighbourhood::new(uses, self.setup.pace);
        let device = node.busy_device().uuid.clone();
        let (session, shape) = backend::connect(session(node.socket()))?;
        self.setup.rates = self.rates(&shape, &device);
        let stage = Stage {
            place: Place {
                layer: backend::open(&shape, Some(node.usage_dir().to_owned()))?,
                device,
                interrupt: Arc::clone(interrupt),
            },
            session,
            neighbourhood: Some(neighbourhood),
            zombies: &|| zombies(&admin),
        };
        let result = compare(&self.setup, stage, progress);
        if let Err(error) = &result
            && !matches!(error, ReplayError::Interrupted)
        {
            // If a process has ended, that explains the failure better than the error itself.
            node.check_alive()?;
        }
        Ok(result?)
    }

    pub(super) fn on_running_node(
        mut self,
        args: &ReplayArgs,
        socket: &Path,
        progress: &mut dyn Watch,
        interrupt: Interrupt,
    ) -> Result<Report, CliError> {
        let admin = Admin::connect(socket)?;
        let (session, shape) = backend::connect(session(socket))?;
        let device = match (&args.device, shape.0.first()) {
            (Some(asked), _) if shape.0.iter().any(|known| known.uuid == *asked) => asked.clone(),
            (Some(asked), _) => {
                let known: Vec<&str> = shape.0.iter().map(|d| d.uuid.as_str()).collect();
                return Err(CliError::Usage(format!(
                    "--device: the node has no {asked}; takes one of {}",
                    known.join(", ")
                )));
            }
            (None, Some(first)) => first.uuid.clone(),
            (None, None) => return Err(CliError::Failed("the node has no device".to_owned())),
        };
        self.setup.rates = self.rates(&shape, &device);
        let node = admin.node()?;
        self.setup.topology = format!("the node ({})", node.probe);
        let regions = admin.regions()?;
        let mut lending: Vec<&str> = regions.iter().map(|r| r.device_uuid.as_str()).collect();
        lending.sort_unstable();
        lending.dedup();
        self.setup.donors = lending.len() as u64;
        let neighbourhood = match &args.usage_dir {
            None => {
                self.setup.donor_load = "the node's own".to_owned();
                None
            }
            Some(usage_dir) => {
                let donors: Vec<Device> = (shape.0.iter())
                    .filter(|known| lending.contains(&known.uuid.as_str()))
                    .cloned()
                    .collect();
                let uses = self.neighbours(usage_dir, &donors)?;
                Some(Neighbourhood::new(uses, self.setup.pace))
            }
        };
        let stage = Stage {
            place: Place {
                layer: backend::open(&shape, args.usage_dir.clone())?,
                device,
                interrupt,
            },
            session,
            neighbourhood,
            zombies: &|| zombies(&admin),
        };
        Ok(compare(&self.setup, stage, progress)?)
    }

    fn neighbours(&self, usage_dir: &Path, donors: &[Device]) -> Result<NeighbourUse, ReplayError> {
        let roofline = Roofline {
            model: self.donor_model,
            gpu: self.setup.gpu,
            engine: Engine::VLLM,
        };
        let curve = TokensInFlight::new(&self.load, &roofline, NEIGHBOUR_BATCH);
        let (base, token) = match self.plan.lending {
            Lending::Elastic => (
                self.donor_model.weight_bytes() + ACTIVATION_BYTES,
                self.donor_model.bytes_per_token(),
            ),
            // What others use of the GPU does not change what is lent.
            Lending::Fixed(_) | Lending::Idle => (0, 0),
        };
        NeighbourUse::new(usage_dir, donors, curve, base, token, self.setup.scale)
    }

    /// The rate of the best link of each kind into the busy device. If no link has a rate, NVLink and PCIe peers are as
    /// fast as host memory.
    fn rates(&self, (_, links): &NodeShape, busy: &DeviceUuid) -> LinkRates {
        let best = |kind: LinkKind| {
            let into = |link: &&Link| link.to == *busy && link.kind == kind;
            let rates = links.iter().filter(into).map(|link| link.bytes_per_second);
            rates.max().filter(|rate| *rate > 0)
        };
        let host = self.setup.gpu.host_bytes_per_second;
        LinkRates {
            nvlink: best(LinkKind::Nvlink).unwrap_or(host) as f64,
            pcie: best(LinkKind::Pcie).unwrap_or(host) as f64,
            host: host as f64,
        }
    }
}

/// The broker's count of zombies. If the broker is away, this waits for its restart, so that the replay is not lost.
fn zombies(admin: &Admin) -> Result<u64, ReplayError> {
    let began = Instant::now();
    loop {
        match admin.node() {
            Ok(node) => return Ok(node.counters.map_or(0, |counters| counters.zombies)),
            Err(CliError::NoBroker { .. }) if began.elapsed() < RESTART => {
                std::thread::sleep(RESTART / 100);
            }
            Err(error) => {
                return Err(ReplayError::Process {
                    process: "swiftcache-broker".to_owned(),
                    problem: error.to_string(),
                });
            }
        }
    }
}

fn session(socket: &Path) -> SessionConfig {
    SessionConfig {
        socket: socket.to_owned(),
        name: "replay".to_owned(),
        tenant: String::new(),
    }
}

fn this() -> Result<PathBuf, CliError> {
    std::env::current_exe()
        .map_err(|error| CliError::Failed(format!("cannot find this program's file: {error}")))
}

/// The path of a program that is installed beside this one.
fn beside_this(name: &str) -> Result<PathBuf, CliError> {
    let path = this()?.with_file_name(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(CliError::Failed(format!(
        "{} is missing: a private node needs it in the directory of swiftcache; install it there, or use a running node with --socket",
        path.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_load_is_sound() {
        assert!(donor_load::read(BUNDLED_LOAD, "bundled").unwrap().len() > 100);
    }
}
