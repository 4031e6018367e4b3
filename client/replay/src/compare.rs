//! Replays one trace through all arms and writes one report.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use swiftcache_proto::domain::{DeviceUuid, LinkKind};

use super::{
    ReplayError,
    models::ModelShape,
    plan::{OFFLOAD_SHARE_OF_RATE, Offload},
    pool::Pool,
    report::{
        ArmReport, Capacity, Compute, Donors, Holds, LentPoint, Links, Report, SCHEMA, Workload,
    },
    roofline::{Engine, Gpu, Roofline},
    serving::{
        LinkRates, Loading, MAX_DECODING, PASS_TOKENS, Recompute, Serving, TARGET_UTILISATION,
        serve, stretch_for,
    },
    sizing::{Scale, pool_blocks},
    tiered::{Interrupt, Neighbourhood, Tiered},
    trace::{Request, unbounded_hits},
};
use swiftcache_client::{
    cache::{Borrower, BorrowerConfig, BytesByLink, DrainPolicy, Layout, Stats},
    device::DeviceLayer,
    session::Session,
};

/// How many slabs the borrower asks for at a time.
const LEASE_STEP_SLABS: u64 = 4;

/// What is replayed.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The trace.
    pub requests: Vec<Request>,
    /// Tokens in a block of the trace.
    pub block_tokens: u64,
    /// The name of the trace, for the report.
    pub trace: String,
    /// The busy model. When it is spread over several GPUs, this is one rank of it.
    pub model: ModelShape,
    /// The number of GPUs that the model is spread over.
    pub tensor_parallel: u32,
    /// The type of every GPU on the node.
    pub gpu: Gpu,
    /// The ratio between full-size bytes and the bytes that really move.
    pub scale: Scale,
    /// The factor for arrival times. When it is absent, [`TARGET_UTILISATION`] determines it.
    pub stretch: Option<f64>,
    /// The size of the host tier in full-size bytes.
    pub host_tier_bytes: u64,
    /// The most full-size bytes that the borrower leases from donors.
    pub lease_limit_bytes: u64,
    /// Whether the hottest blocks move elsewhere when their slabs are revoked. Otherwise all blocks there are dropped.
    pub move_blocks: bool,
    /// Modelled link rates.
    pub rates: LinkRates,
    /// The topology that the link rates come from.
    pub topology: String,
    /// The neighbours' load, for the report.
    pub donor_load: String,
    /// The number of donor processes, for the report.
    pub donors: u64,
    /// The pace of the [`Neighbourhood`], for the report.
    pub pace: f64,
}

/// The busy model's device.
pub struct Place {
    /// The node's devices.
    pub layer: Arc<dyn DeviceLayer>,
    /// The device that the busy model computes on.
    pub device: DeviceUuid,
    /// The replay stops early when this is set.
    pub interrupt: Interrupt,
}

/// Where the trace is replayed.
pub struct Stage<'a> {
    /// The busy model's device.
    pub place: Place,
    /// The busy model's session with the node's broker.
    pub session: Session,
    /// The neighbours, when they are simulated.
    pub neighbourhood: Option<Neighbourhood>,
    /// Returns the number of zombies that the broker has counted so far.
    pub zombies: &'a dyn Fn() -> Result<u64, ReplayError>,
}

/// Receives the progress of a replay.
pub trait Watch {
    /// An arm begins, and will replay this many requests.
    fn arm(&mut self, name: &str, requests: u64);
    /// This many of the arm's requests are done.
    fn done(&mut self, requests: u64);
}

impl Setup {
    fn serving(&self) -> Result<Serving, ReplayError> {
        let serving = Serving {
            roofline: Roofline {
                model: self.model,
                gpu: self.gpu,
                engine: Engine::VLLM,
            },
            rates: self.rates,
            pool_blocks: pool_blocks(
                &self.model,
                &self.gpu,
                self.gpu.hbm_bytes,
                self.block_tokens,
            )?,
            block_tokens: self.block_tokens,
            prefix_caching: true,
            loading: Loading::LayerByLayer,
            stretch: self.stretch.unwrap_or(1.0),
        };
        match self.stretch {
            Some(_) => Ok(serving),
            None => Ok(Serving {
                stretch: stretch_for(&self.requests, &serving, TARGET_UTILISATION)?,
                ..serving
            }),
        }
    }

    fn layout(&self, arm: &str) -> Layout {
        let model = &self.model;
        Layout {
            namespace: format!(
                "replay/{arm}/{}/tp{}/{}x{}",
                model.name, self.tensor_parallel, self.block_tokens, self.scale.layer_bytes
            ),
            layer_bytes: vec![self.scale.layer_bytes; model.layers],
        }
    }

    /// Says what is modelled and what is real. The text belongs beside every figure of the report.
    fn basis(&self, backend: &str) -> String {
        format!(
            "Modelled: compute is a roofline of {} ({:.0} % of peak FLOP/s, {:.0} % of peak HBM rate), loads run at the rates of topology {}'s links and overlap compute layer by layer, in every arm but vllm-offload, which loads before it computes at {:.0} % of the rate, as measured. Real: processes, leases, revocations and bytes (1/{:.0} of full size), moved on the {backend} backend.",
            self.gpu.name,
            Engine::VLLM.compute_efficiency * 100.0,
            Engine::VLLM.memory_efficiency * 100.0,
            self.topology,
            OFFLOAD_SHARE_OF_RATE * 100.0,
            self.scale.ratio,
        )
    }
}

/// Replays the trace through all arms.
///
/// # Errors
/// When a byte that was read back is wrong, and when the node, the device or a file fails.
pub fn compare(
    setup: &Setup,
    stage: Stage<'_>,
    watch: &mut dyn Watch,
) -> Result<Report, ReplayError> {
    let serving = setup.serving()?;
    let total = setup.requests.len() as u64;
    let backend = stage.place.layer.name();
    let basis = setup.basis(backend);

    watch.arm("recompute", total);
    let outcome = serve(&setup.requests, &serving, &mut Recompute, &mut |done| {
        watch.done(done);
    })?;
    let recompute = ArmReport {
        holds: holds(setup, &serving, 0, 0),
        ..ArmReport::modelled("recompute", &outcome)
    };
    let refused = outcome.refused;

    let place = &stage.place;
    let pcie = tiered("pcie-offload", setup, &serving, place, None, None, watch)?;
    let zombies = (stage.zombies)()?;
    let session = Some(stage.session);
    let neighbours = stage.neighbourhood;
    let swiftcache = tiered(
        "swiftcache",
        setup,
        &serving,
        place,
        session,
        neighbours,
        watch,
    )?;
    let zombies = (stage.zombies)()?.saturating_sub(zombies);
    let leased_peak = setup.scale.grow(swiftcache.leased_peak_bytes);
    let equal = Setup {
        host_tier_bytes: setup.host_tier_bytes + leased_peak,
        ..setup.clone()
    };
    let equal = tiered(
        "offload-equal-bytes",
        &equal,
        &serving,
        place,
        None,
        None,
        watch,
    )?;
    let measured = as_measured(setup, &serving)?;

    let (hits, blocks) = unbounded_hits(&setup.requests);
    Ok(Report {
        schema: SCHEMA,
        simulated: backend == "host",
        basis,
        compute: Compute {
            model: setup.model.name.to_owned(),
            tensor_parallel: setup.tensor_parallel,
            gpu: setup.gpu.name.to_owned(),
            gpu_source: setup.gpu.source.to_owned(),
            compute_efficiency: Engine::VLLM.compute_efficiency,
            memory_efficiency: Engine::VLLM.memory_efficiency,
            interference: format!(
                "each {PASS_TOKENS} new tokens of a prefill carry one token of every decoding sequence, at most {MAX_DECODING}"
            ),
        },
        links: Links {
            topology: setup.topology.clone(),
            nvlink_bytes_per_second: setup.rates.nvlink,
            pcie_bytes_per_second: setup.rates.pcie,
            host_bytes_per_second: setup.rates.host,
        },
        workload: Workload {
            trace: setup.trace.clone(),
            requests: total,
            refused,
            blocks,
            unbounded_hits: hits,
            unbounded_hit_rate: hits as f64 / blocks.max(1) as f64,
            stretch: serving.stretch,
            donor_load: setup.donor_load.clone(),
            pace: setup.pace,
        },
        capacity: Capacity {
            scale: setup.scale.ratio,
            block_full_bytes: setup.scale.full_block_bytes,
            block_moved_bytes: setup.scale.block_bytes,
            local_blocks: serving.pool_blocks.into(),
            host_blocks: setup.host_tier_bytes / setup.scale.full_block_bytes,
            donors: setup.donors,
            leased_peak_blocks: swiftcache.leased_peak_bytes / setup.scale.block_bytes,
        },
        donors: Donors::new(&swiftcache.stats, zombies),
        arms: vec![
            swiftcache.report,
            pcie.report,
            equal.report,
            measured,
            recompute,
        ],
        lent: swiftcache.lent,
    })
}

/// What an arm holds blocks in, full-size bytes.
fn holds(setup: &Setup, serving: &Serving, donor_bytes: u64, host_bytes: u64) -> Holds {
    Holds {
        pool_bytes: u64::from(serving.pool_blocks) * setup.scale.full_block_bytes,
        donor_bytes,
        host_bytes,
    }
}

/// vLLM's offloading with the same host memory: modelled as it was measured, without bytes.
fn as_measured(setup: &Setup, serving: &Serving) -> Result<ArmReport, ReplayError> {
    let serving = Serving {
        loading: Loading::Before {
            share_of_rate: OFFLOAD_SHARE_OF_RATE,
        },
        ..*serving
    };
    let blocks = setup.host_tier_bytes / setup.scale.full_block_bytes;
    let mut arm = Offload::new(u32::try_from(blocks).unwrap_or(u32::MAX));
    let outcome = serve(&setup.requests, &serving, &mut arm, &mut |_| ())?;
    Ok(ArmReport {
        holds: holds(setup, &serving, 0, setup.host_tier_bytes),
        ..ArmReport::modelled("vllm-offload", &outcome)
    })
}

struct TieredArm {
    report: ArmReport,
    stats: Stats,
    leased_peak_bytes: u64,
    lent: Vec<LentPoint>,
}

fn tiered(
    name: &str,
    setup: &Setup,
    serving: &Serving,
    place: &Place,
    session: Option<Session>,
    neighbourhood: Option<Neighbourhood>,
    watch: &mut dyn Watch,
) -> Result<TieredArm, ReplayError> {
    let started = Instant::now();
    let scale = &setup.scale;
    let layout = setup.layout(name);
    let layer = place.layer.as_ref();
    let pool = Pool::open(layer, &place.device, &layout, serving.pool_blocks)?;
    let leased = match session {
        Some(_) => scale.shrink(setup.lease_limit_bytes),
        None => 0,
    };
    let config = BorrowerConfig {
        lease_step_bytes: LEASE_STEP_SLABS * scale.slab_bytes(),
        host_tier_bytes: scale.shrink(setup.host_tier_bytes),
        share: session.is_some(),
        drain: DrainPolicy {
            move_blocks: setup.move_blocks,
            ..DrainPolicy::default()
        },
        ..BorrowerConfig::new(place.device.clone(), layout, leased)
    };
    let borrower = Borrower::open(session, Arc::clone(&place.layer), config)?;
    let interrupt = Arc::clone(&place.interrupt);
    let mut arm = Tiered::new(Arc::clone(&borrower), pool, neighbourhood, interrupt);
    watch.arm(name, setup.requests.len() as u64);
    let outcome = serve(&setup.requests, serving, &mut arm, &mut |done| {
        watch.done(done);
    })?;
    let stats = borrower.stats();
    let mut stored = stats.stored;
    // Blocks also cross PCIe when they move from a donor to the host tier: to make room, or from a revoked slab.
    stored[LinkKind::Host] += (stats.demoted_blocks + stats.moved_to_host) * scale.block_bytes;
    Ok(TieredArm {
        report: ArmReport {
            loaded_full_bytes: by_link(&stats.loaded, scale),
            stored_full_bytes: by_link(&stored, scale),
            verified_moved_bytes: arm.moved.verified_loaded_bytes + arm.moved.verified_local_bytes,
            failed_blocks: arm.moved.failed_blocks,
            unplaced_blocks: arm.moved.unplaced_blocks,
            wall_s: started.elapsed().as_secs_f64(),
            holds: holds(
                setup,
                serving,
                scale.grow(arm.moved.leased_peak_bytes),
                setup.host_tier_bytes,
            ),
            ..ArmReport::modelled(name, &outcome)
        },
        stats,
        leased_peak_bytes: arm.moved.leased_peak_bytes,
        lent: arm.lent.points(scale.full_block_bytes),
    })
}

fn by_link(moved: &BytesByLink, scale: &Scale) -> BTreeMap<String, u64> {
    let name = |link| match link {
        LinkKind::SameDevice => "same-device",
        LinkKind::Nvlink => "nvlink",
        LinkKind::Pcie => "pcie",
        LinkKind::Host => "host",
    };
    moved
        .iter()
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(link, bytes)| (name(link).to_owned(), scale.grow(bytes)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        chat::{Chat, write_chat},
        report::Ttft,
        serving::Tier,
        trace::{self, BLOCK_TOKENS},
    };
    use swiftcache_client::device::host::{HostLayer, HostOptions};
    use swiftcache_proto::domain::Device;

    struct Nobody;

    impl Watch for Nobody {
        fn arm(&mut self, _name: &str, _requests: u64) {}
        fn done(&mut self, _requests: u64) {}
    }

    fn setup() -> Setup {
        let chat = Chat {
            seed: 5,
            rate: 0.5,
            duration_s: 120.0,
            documents: 0.125,
        };
        let mut file = Vec::new();
        write_chat(&chat, &mut file).unwrap();
        let trace = trace::read(&file[..], "chat", &trace::Options::default()).unwrap();
        let model = *ModelShape::by_name("qwen3-8b").unwrap();
        Setup {
            requests: trace.requests,
            block_tokens: BLOCK_TOKENS,
            trace: "chat".to_owned(),
            model,
            tensor_parallel: 1,
            // The GPU is small, so that the pool is soon full.
            gpu: Gpu {
                hbm_bytes: 32 << 30,
                ..*Gpu::by_name("h100-sxm").unwrap()
            },
            scale: Scale::new(&model, BLOCK_TOKENS, 65536.0).unwrap(),
            stretch: None,
            host_tier_bytes: 8 << 30,
            lease_limit_bytes: 0,
            move_blocks: true,
            rates: LinkRates {
                nvlink: 380e9,
                pcie: 50e9,
                host: 50e9,
            },
            topology: "none".to_owned(),
            donor_load: "none".to_owned(),
            donors: 0,
            pace: 1.0,
        }
    }

    #[test]
    fn the_host_tier_gives_back_what_the_pool_could_not_keep_every_byte_of_it() {
        let setup = setup();
        let device = Device {
            uuid: "SIM-0".parse().unwrap(),
            name: "simulated".to_owned(),
            hbm_bytes: setup.scale.shrink(setup.gpu.hbm_bytes),
            ordinal: 0,
        };
        let layer = HostLayer::new(vec![device.clone()], Vec::new(), HostOptions::default());
        let serving = setup.serving().unwrap();
        let interrupt = Interrupt::default();
        let stage = Place {
            layer: Arc::new(layer.unwrap()),
            device: device.uuid,
            interrupt: Arc::clone(&interrupt),
        };
        let run = |stage: &Place| {
            tiered(
                "pcie-offload",
                &setup,
                &serving,
                stage,
                None,
                None,
                &mut Nobody,
            )
        };
        let arm = run(&stage).unwrap().report;
        let recompute = serve(&setup.requests, &serving, &mut Recompute, &mut |_| ()).unwrap();
        let host = arm.hit_blocks[&Tier::Host];
        assert!(host > 10, "{host}");
        // Every block that was found was read back, whichever tier it came from.
        let hits: u64 = arm.hit_blocks.values().sum();
        assert_eq!(arm.verified_moved_bytes, hits * setup.scale.block_bytes);
        assert!(arm.ttft.mean_ms < Ttft::of(&recompute.ttft_s).mean_ms);

        interrupt.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(matches!(run(&stage).err(), Some(ReplayError::Interrupted)));
    }
}
