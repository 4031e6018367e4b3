//! `swiftcache replay`.

pub(crate) mod play;

use std::{path::PathBuf, str::FromStr};

use clap::Args;
use swiftcache_proto::{domain::DeviceUuid, size::size};

pub(super) use self::play::Play;
use super::{
    CliError, Naming,
    args::Donor,
    output,
    progress::Progress,
    report::{ReportArgs, ReportFile},
    trace::TraceArgs,
};
use swiftcache_replay::{html, models::ModelShape, report::Report, roofline::Gpu};

/// Replay a trace of a busy model against donors, and compare SwiftCache with offloading and recompute
///
/// Without --socket the replay starts a private node and ends it afterwards: a broker, and donors, usually elastic ones whose
/// own models' load rises and falls. Processes, leases, revocations and bytes are real; time is modelled, and the
/// report says how. Every byte that is read back is checked, and a wrong one ends the replay with status 1.
#[derive(Args, Debug)]
pub(super) struct ReplayArgs {
    #[command(flatten)]
    trace: TraceArgs,
    #[command(flatten)]
    node: NodeArgs,
    /// Use the donors of a running node instead of a private one
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// With --socket: the device that the busy model computes on [default: the node's first]
    #[arg(long, value_name = "UUID", requires = "socket")]
    device: Option<DeviceUuid>,
    /// With --socket on a simulated node: the topology's usage_dir, where the neighbours' HBM use is simulated
    #[arg(long, value_name = "DIR", requires = "socket")]
    usage_dir: Option<PathBuf>,
    #[command(flatten)]
    report: ReportArgs,
}

/// The node and its models.
#[derive(Args, Clone, Debug)]
pub(super) struct NodeArgs {
    /// The busy model: qwen3-8b, qwen3-14b, qwen3-32b, llama-3.1-8b, llama-3.1-70b, mistral-7b,
    /// mistral-small-24b, llama-2-7b, lwm-7b
    #[arg(long, value_name = "NAME", default_value = "qwen3-8b", value_parser = ModelShape::by_name)]
    model: &'static ModelShape,
    /// GPUs that the busy model is spread over; one of them is replayed, and communication is not modelled
    #[arg(long, value_name = "N", default_value_t = 1)]
    tensor_parallel: u32,
    /// The GPU: h100-sxm, h100-nvl, h200, a100-80g, l40s
    #[arg(long, value_name = "NAME", default_value = "h100-sxm", value_parser = Gpu::by_name)]
    gpu: &'static Gpu,
    /// The topology with the links: hgx-8, pcie-4, or a TOML file
    #[arg(long, value_name = "NAME|FILE", default_value = "hgx-8")]
    topology: String,
    /// Divide the model's bytes and all capacities by this number
    #[arg(long, value_name = "DIVISOR", default_value_t = 4096.0)]
    scale: f64,
    /// Multiply arrival times by this; auto: by the factor that keeps the recompute arm's server busy 80 %
    /// of the time
    #[arg(long, value_name = "auto|FACTOR", default_value = "auto")]
    stretch: Stretch,
    /// Host memory for KV blocks, full size, in the SwiftCache arm and the PCIe arm
    #[arg(long, value_name = "SIZE", default_value = "128GiB", value_parser = size)]
    host_tier: u64,
    /// Drop the blocks of revoked slabs instead of moving the hottest ones elsewhere during the drain window
    #[arg(long)]
    drop_revoked: bool,
    /// Donor processes, each on its own GPU
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(super) donors: usize,
    /// What each donor lends: a size all the time, full size (an engine with "lend", or donate --bytes), elastic (beside an
    /// engine with a load of its own), or idle (a GPU that nobody uses)
    #[arg(long, value_name = "SIZE|elastic|idle", default_value = "elastic")]
    donor: Donor,
    /// The elastic donors' own load: CSV of timestamp,input,output, or an Azure trace [default: a bundled load]
    #[arg(long, value_name = "FILE")]
    donor_load: Option<PathBuf>,
    /// The donors' own model
    #[arg(long, value_name = "NAME", default_value = "qwen3-8b", value_parser = ModelShape::by_name)]
    donor_model: &'static ModelShape,
    /// HBM that donors keep free for their own model's growth, full size
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = size)]
    donor_headroom: u64,
    /// The most trace seconds per second of wall clock, because donors need real time
    #[arg(long, value_name = "FACTOR", default_value_t = 60.0, value_parser = positive)]
    pub(super) pace: f64,
}

/// `--stretch`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Stretch {
    Auto,
    By(f64),
}

impl Stretch {
    /// The factor, unless it is to be found.
    pub(super) fn factor(self) -> Option<f64> {
        match self {
            Self::Auto => None,
            Self::By(factor) => Some(factor),
        }
    }
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

pub(super) fn run(args: &ReplayArgs) -> Result<(), CliError> {
    let file = ReportFile::open(args.report.report.as_deref())?;
    let trace = args.trace.load()?;
    let play = Play::new(&args.node, trace, None)?;
    let interrupt = super::interrupt()?;
    let mut progress = Progress::new(args.report.quiet);
    let report = match &args.socket {
        None => play.on_private_node(&mut progress, &interrupt, &|_| ())?,
        Some(socket) => play
            .on_running_node(args, socket, &mut progress, interrupt)
            .map_err(|error| error.with_naming(Naming::SocketFlag))?,
    };
    drop(progress);
    show(&report, &args.report, file)
}

/// Prints a report, and writes it to its file.
pub(super) fn show(
    report: &Report,
    args: &ReportArgs,
    file: Option<ReportFile>,
) -> Result<(), CliError> {
    match args.json {
        true => output::print_json(report)?,
        false => output::print(&report.text()).map(|_| ())?,
    }
    match file {
        Some(file) => file.write(&html::replay_page(report)),
        None => Ok(()),
    }
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
}
