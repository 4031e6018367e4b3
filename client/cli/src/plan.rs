//! `swiftcache plan`.

use std::path::PathBuf;

use clap::Args;

use super::{
    CliError,
    args::Donor,
    output,
    progress::Progress,
    replay::{
        Stretch,
        play::{BUNDLED_LOAD, NEIGHBOUR_BATCH},
    },
    report::{ReportArgs, ReportFile},
    trace::TraceArgs,
};
use swiftcache_client::cache::Retention;
use swiftcache_proto::size::size;
use swiftcache_replay::{
    ReplayError,
    compare::Watch,
    donor_load::{self, TokensInFlight},
    html,
    models::ModelShape,
    plan::{Lenders, NodeShape, Plan},
    roofline::{Engine, Gpu, Roofline},
    sizing::{ACTIVATION_BYTES, SLAB_BYTES},
};

/// Say what SwiftCache would give on a trace, before anything is installed
///
/// Nothing runs and no GPU is needed: the trace is served by a model of an engine, with the cache's and the donors' own
/// rules. `swiftcache replay` does the same with real processes.
#[derive(Args, Debug)]
pub(super) struct PlanArgs {
    #[command(flatten)]
    trace: TraceArgs,
    /// The node: hgx-h100, hgx-h200, hgx-a100, pcie-h100-nvl, pcie-l40s
    #[arg(long, value_name = "NAME", default_value = "hgx-h100", value_parser = NodeShape::by_name)]
    node: NodeShape,
    /// A node with links of its own: hgx-8, pcie-4, or a TOML file; --gpu says what its GPUs are
    #[arg(long, value_name = "NAME|FILE", conflicts_with = "node")]
    topology: Option<String>,
    /// With --topology, the GPU: h100-sxm, h100-nvl, h200, a100-80g, l40s
    #[arg(long, value_name = "NAME", default_value = "h100-sxm", value_parser = Gpu::by_name, requires = "topology")]
    gpu: &'static Gpu,
    /// The busy model: qwen3-8b, qwen3-14b, qwen3-32b, llama-3.1-8b, llama-3.1-70b, mistral-7b,
    /// mistral-small-24b, llama-2-7b, lwm-7b
    #[arg(long, value_name = "NAME", default_value = "qwen3-8b", value_parser = ModelShape::by_name)]
    model: &'static ModelShape,
    /// GPUs that the busy model is spread over; one of them is planned for
    #[arg(long, value_name = "N", default_value_t = 1)]
    tensor_parallel: u32,
    /// Plan for 0 to N donors [default: 3, or as many as the node has]
    #[arg(long, value_name = "N")]
    donors: Option<usize>,
    /// What each donor lends: a size all the time (an engine with "lend", or donate --bytes), elastic (beside an engine
    /// with a load of its own), or idle (a GPU that nobody uses)
    #[arg(long, value_name = "SIZE|elastic|idle", default_value = "elastic")]
    donor: Donor,
    /// The elastic donors' own load: CSV of timestamp,input,output, or an Azure trace [default: a bundled load]
    #[arg(long, value_name = "FILE")]
    donor_load: Option<PathBuf>,
    /// The elastic donors' own model
    #[arg(long, value_name = "NAME", default_value = "qwen3-8b", value_parser = ModelShape::by_name)]
    donor_model: &'static ModelShape,
    /// HBM that elastic donors keep free for their own model's growth
    #[arg(long, value_name = "SIZE", default_value = "4GiB", value_parser = size)]
    donor_headroom: u64,
    /// Host memory for KV blocks
    #[arg(long, value_name = "SIZE", default_value = "128GiB", value_parser = size)]
    host_tier: u64,
    /// Multiply arrival times by this; auto: by the factor that keeps the server of vLLM as it is busy 80 % of the time
    #[arg(long, value_name = "auto|FACTOR", default_value = "auto")]
    stretch: Stretch,
    /// What decides which of SwiftCache's blocks go first: value, as it does, or age, as most caches do, to compare
    #[arg(long, value_name = "value|age", default_value = "value", value_parser = retention)]
    retention: Retention,
    #[command(flatten)]
    report: ReportArgs,
}

fn retention(name: &str) -> Result<Retention, String> {
    match name {
        "value" => Ok(Retention::Value),
        "age" => Ok(Retention::Age),
        _ => Err("is neither value nor age".to_owned()),
    }
}

pub(super) fn run(args: &PlanArgs) -> Result<(), CliError> {
    let file = ReportFile::open(args.report.report.as_deref())?;
    let trace = args.trace.load()?;
    let node = match &args.topology {
        Some(topology) => NodeShape::of_topology(topology, *args.gpu)?,
        None => args.node.clone(),
    };
    let model = args.model.shard(args.tensor_parallel);
    let model = model.map_err(|error| CliError::Usage(format!("--tensor-parallel: {error}")))?;
    let load = match &args.donor_load {
        Some(path) => donor_load::load(path),
        None => donor_load::read(BUNDLED_LOAD, "neighbours.csv"),
    };
    let roofline = Roofline {
        model: *args.donor_model,
        gpu: node.gpu,
        engine: Engine::VLLM,
    };
    let load = load.map_err(ReplayError::from)?;
    let lenders = Lenders {
        lending: args.donor.0,
        hbm_bytes: node.gpu.hbm_bytes,
        slab_bytes: SLAB_BYTES,
        headroom_bytes: args.donor_headroom,
        load: TokensInFlight::new(&load, &roofline, NEIGHBOUR_BATCH),
        base_bytes: args.donor_model.weight_bytes() + ACTIVATION_BYTES,
        token_bytes: args.donor_model.bytes_per_token(),
    };
    let most = node.others.len();
    let plan = Plan {
        trace: &trace,
        model,
        tensor_parallel: args.tensor_parallel,
        donors: args.donors.unwrap_or(3.min(most)),
        node,
        lenders,
        host_bytes: args.host_tier,
        stretch: args.stretch.factor(),
        move_blocks: true,
        retention: args.retention,
    };
    let mut progress = Progress::new(args.report.quiet || !output::is_terminal());
    let report = plan.run(&mut |step, steps| {
        if step == 1 {
            progress.arm("plan", steps);
        }
        progress.done(step);
    })?;
    drop(progress);
    match args.report.json {
        true => output::print_json(&report)?,
        false => output::print(&report.text()).map(|_| ())?,
    }
    match file {
        Some(file) => file.write(&html::plan_page(&report)),
        None => Ok(()),
    }
}
