//! `swiftcache replay`.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use clap::Args;
use swiftcache_proto::domain::{DeviceUuid, Link, LinkKind};

use super::{
    CliError,
    admin::Admin,
    backend::{self, NodeShape},
    output,
    progress::Progress,
    size::size,
};
use crate::{
    replay::{
        ReplayError,
        compare::{Place, Setup, Stage, Watch, compare},
        donor_load::{self, NeighbourRequest, TokensInFlight},
        models::ModelShape,
        neighbours::NeighbourUse,
        node::{NodePlan, PrivateNode},
        report::Report,
        roofline::{Gpu, Roofline},
        serving::LinkRates,
        sizing::{ACTIVATION_BYTES, Scale},
        tiered::{Interrupt, Neighbourhood},
        trace::{self, Request},
    },
    session::SessionConfig,
};

/// The neighbours' load that comes with SwiftCache.
const BUNDLED_LOAD: &[u8] = include_bytes!("../../workloads/neighbours.csv");
/// Decoding sequences of a neighbour, for how long its requests last.
const NEIGHBOUR_BATCH: u64 = 8;

/// Replay a trace of a busy model against donors, and compare SwiftCache, PCIe offload and recompute
///
/// Without --socket a private node is started for the replay and torn down after it: a broker and elastic
/// donors whose own models' load rises and falls. Processes, leases, revocations and bytes are real; time is
/// modelled, and the report says how. Every byte read back is checked: a wrong one ends the replay with status 1.
#[derive(Args, Debug)]
pub(super) struct ReplayArgs {
    /// The busy model's requests: JSON lines of timestamp, input_length, output_length, hash_ids (Mooncake)
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Only the first so many requests
    #[arg(long, value_name = "N")]
    requests: Option<usize>,
    #[command(flatten)]
    node: NodeArgs,
    /// Use the donors of a running node instead of a private one
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// With --socket: the device that the busy model computes on [default: the node's first]
    #[arg(long, value_name = "UUID", requires = "socket")]
    device: Option<DeviceUuid>,
    /// With --socket on a simulated node: where to play the neighbours' HBM use; the topology's usage_dir
    #[arg(long, value_name = "DIR", requires = "socket")]
    usage_dir: Option<PathBuf>,
    #[command(flatten)]
    report: ReportArgs,
}

/// How a report is shown.
#[derive(Args, Clone, Debug)]
pub(super) struct ReportArgs {
    /// Print the report as JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Show no progress
    #[arg(long, short)]
    pub(super) quiet: bool,
}

/// What the node and its models are.
#[derive(Args, Clone, Debug)]
pub(super) struct NodeArgs {
    /// The busy model: qwen3-8b, qwen3-14b, qwen3-32b, llama-3.1-8b, llama-3.1-70b, mistral-7b,
    /// mistral-small-24b, llama-2-7b, lwm-7b
    #[arg(long, value_name = "NAME", default_value = "qwen3-8b", value_parser = ModelShape::by_name)]
    model: &'static ModelShape,
    /// GPUs that the busy model is spread over; one of them is replayed, communication is not modelled
    #[arg(long, value_name = "N", default_value_t = 1)]
    tensor_parallel: u32,
    /// The GPU: h100-sxm, h100-nvl, h200, a100-80g, l40s
    #[arg(long, value_name = "NAME", default_value = "h100-sxm", value_parser = Gpu::by_name)]
    gpu: &'static Gpu,
    /// Where the links come from: hgx-8, pcie-4, or a TOML file
    #[arg(long, value_name = "NAME|FILE", default_value = "hgx-8")]
    topology: String,
    /// Move one byte for so many of the full-size model; capacities shrink alike
    #[arg(long, value_name = "DIVISOR", default_value_t = 4096.0)]
    scale: f64,
    /// Multiply arrival times by this; auto: until the recompute arm's server is taken 80 %
    /// of the time
    #[arg(long, value_name = "auto|FACTOR", default_value = "auto")]
    stretch: Stretch,
    /// Host memory for KV blocks, full size, in the SwiftCache and PCIe arms alike
    #[arg(long, value_name = "SIZE", default_value = "128GiB", value_parser = size)]
    host_tier: u64,
    /// Drop what lies in revoked slabs, instead of moving the hottest blocks elsewhere while the window lasts
    #[arg(long)]
    drop_revoked: bool,
    /// Donor processes, each on its own GPU
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(super) donors: usize,
    /// The donors' own load: CSV of timestamp,input,output, or Azure's [default: a bundled one]
    #[arg(long, value_name = "FILE")]
    donor_load: Option<PathBuf>,
    /// The donors' own model
    #[arg(long, value_name = "NAME", default_value = "qwen3-8b", value_parser = ModelShape::by_name)]
    donor_model: &'static ModelShape,
    /// HBM that donors keep free for their own model's growth, full size
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = size)]
    donor_headroom: u64,
    /// Trace seconds per second of wall clock, at most: donors follow in real time
    #[arg(long, value_name = "FACTOR", default_value_t = 60.0, value_parser = positive)]
    pub(super) pace: f64,
}

/// `--stretch`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stretch {
    Auto,
    By(f64),
}

impl FromStr for Stretch {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            _ => positive(text)
                .map(Self::By)
                .map_err(|_| format!("{text:?} is no stretch; takes auto, or a factor above 0")),
        }
    }
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    let number = number.filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| format!("{text:?} is not a number above 0"))
}

/// A trace and its name.
pub(super) struct Trace {
    pub(super) name: String,
    pub(super) requests: Vec<Request>,
}

/// A setup with what the node needs beside it.
pub(super) struct Play {
    setup: Setup,
    plan: NodePlan,
    load: Vec<NeighbourRequest>,
    donor_model: ModelShape,
}

pub(super) fn run(args: &ReplayArgs) -> Result<(), CliError> {
    let mut requests = trace::load(&args.trace).map_err(ReplayError::from)?;
    if let Some(first) = args.requests {
        requests.truncate(first.max(1));
    }
    let trace = Trace {
        name: args.trace.display().to_string(),
        requests,
    };
    let play = Play::new(&args.node, trace, None)?;
    let interrupt = super::interrupt()?;
    let mut progress = Progress::new(args.report.quiet);
    let report = match &args.socket {
        None => play.on_private_node(&mut progress, &interrupt, &|_| ())?,
        Some(socket) => play.on_running_node(args, socket, &mut progress, interrupt)?,
    };
    drop(progress);
    show(&report, &args.report)
}

/// Prints a report.
pub(super) fn show(report: &Report, args: &ReportArgs) -> Result<(), CliError> {
    if args.json {
        output::print_json(report)
    } else {
        output::print(&report.text()).map(|_| ())
    }
}

impl Play {
    /// Checks what was asked for.
    pub(super) fn new(
        args: &NodeArgs,
        trace: Trace,
        directory: Option<PathBuf>,
    ) -> Result<Self, CliError> {
        let shard = args.model.shard(args.tensor_parallel);
        let model =
            shard.map_err(|error| CliError::Usage(format!("--tensor-parallel: {error}")))?;
        let scale = Scale::new(&model, args.scale)?;
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
            trace: trace.name,
            model,
            tensor_parallel: args.tensor_parallel,
            gpu: *args.gpu,
            scale,
            stretch: match args.stretch {
                Stretch::Auto => None,
                Stretch::By(factor) => Some(factor),
            },
            host_tier_bytes: args.host_tier,
            lease_limit_bytes: args.gpu.hbm_bytes * args.donors as u64,
            move_blocks: !args.drop_revoked,
            // The node's own links replace these once it is known.
            rates: LinkRates {
                nvlink: host,
                pcie: host,
                host,
            },
            topology: args.topology.clone(),
            donor_load,
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

    /// Starts a node, replays on it, and takes it down. `running` hears when it is up.
    pub(super) fn on_private_node(
        mut self,
        progress: &mut Progress,
        interrupt: &Interrupt,
        running: &dyn Fn(&PrivateNode),
    ) -> Result<Report, CliError> {
        let mut node = PrivateNode::launch(&self.plan)?;
        let donors: Vec<(DeviceUuid, u64)> = (node.donor_devices().iter())
            .map(|device| (device.uuid.clone(), device.hbm_bytes))
            .collect();
        let mut uses = self.neighbours(node.usage_dir(), &donors)?;
        // Neighbours first: donors must not offer what their models already use.
        uses.set(0.0)?;
        let admin = Admin::connect(node.socket())?;
        node.start_donors(&self.plan, &mut || {
            let regions = admin.regions().map_err(|error| ReplayError::Process {
                process: "swiftcache-broker".to_owned(),
                problem: error.to_string(),
            })?;
            let lends = |uuid: &DeviceUuid| regions.iter().any(|r| r.device_uuid == uuid.as_str());
            Ok(donors.iter().all(|(uuid, _)| lends(uuid)))
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
            // A process that fell over explains more than what its absence broke.
            node.check_alive()?;
        }
        Ok(result?)
    }

    fn on_running_node(
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
                let donors: Vec<(DeviceUuid, u64)> = (shape.0.iter())
                    .filter(|known| lending.contains(&known.uuid.as_str()))
                    .map(|known| (known.uuid.clone(), known.hbm_bytes))
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

    fn neighbours(
        &self,
        usage_dir: &Path,
        donors: &[(DeviceUuid, u64)],
    ) -> Result<NeighbourUse, ReplayError> {
        let roofline = Roofline {
            model: self.donor_model,
            gpu: self.setup.gpu,
        };
        let curve = TokensInFlight::new(&self.load, &roofline, NEIGHBOUR_BATCH);
        let base = self.donor_model.weight_bytes() + ACTIVATION_BYTES;
        let token = self.donor_model.bytes_per_token();
        NeighbourUse::new(usage_dir, donors, curve, base, token, self.setup.scale)
    }

    /// The best link of each kind into the busy device; PCIe peers are as fast as host memory unless a link
    /// says otherwise.
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

fn zombies(admin: &Admin) -> Result<u64, ReplayError> {
    let node = admin.node().map_err(|error| ReplayError::Process {
        process: "swiftcache-broker".to_owned(),
        problem: error.to_string(),
    })?;
    Ok(node.counters.map_or(0, |counters| counters.zombies))
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

/// A program that was installed with this one.
fn beside_this(name: &str) -> Result<PathBuf, CliError> {
    let path = this()?.with_file_name(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(CliError::Failed(format!(
        "{} is missing: a private node needs it beside swiftcache; install it there, or name a running node by --socket",
        path.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stretch_is_auto_or_a_factor() {
        assert_eq!("auto".parse(), Ok(Stretch::Auto));
        assert_eq!("2.5".parse(), Ok(Stretch::By(2.5)));
        for text in ["", "0", "-1", "inf", "automatic"] {
            assert!(text.parse::<Stretch>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_bundled_load_is_sound() {
        assert!(donor_load::read(BUNDLED_LOAD, "bundled").unwrap().len() > 100);
    }
}
