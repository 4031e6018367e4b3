//! The layer pipeline: a layer is fetched while the layer before it computes on an engine's stream, or it is written
//! back while the next layer computes.

use std::time::Instant;

use anyhow::Result;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use swiftcache_client::device::{CopyStream, DeviceLayer, Memory, Piece, cuda::Method};

use super::{Bench, Course, Row, Rows, copies};
use crate::{engine::Footprint, pattern};

/// A model. K and V lie apart in the engine's pool.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
    /// Bytes of K (or of V) of a 16-token block in one layer.
    side: u64,
}

const QWEN: Model = Model {
    name: "qwen3-8b",
    side: 32 << 10,
};
/// 32 KV heads: pieces large enough for the copy engines.
const LWM: Model = Model {
    name: "lwm-7b",
    side: 128 << 10,
};

/// The direction of the copies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// From the slab to the engine's pool.
    Fetch,
    /// From the engine's pool to the slab.
    WriteBack,
}

/// The seed of the pattern. Every byte is a function of the seed and the byte's place.
const SEED: u64 = 7;

/// The KV that is copied, and the compute beside it.
#[derive(Clone, Copy)]
struct Workload {
    model: Model,
    /// 16-token blocks in each layer.
    blocks: u64,
    footprint: Footprint,
}

impl Workload {
    fn new(model: Model, blocks: u64, footprint: Footprint) -> Self {
        Self {
            model,
            blocks,
            footprint,
        }
    }
}

pub(super) fn run(bench: &Bench<'_>, rows: &mut Rows<'_>) -> Result<()> {
    let layers = u64::from(bench.scale.layers);
    let host = (bench.layer).allocate_host(&bench.device, bench.scale.memory / 4)?;
    let slab = &bench.memories[0];
    let whole = (slab.bytes() / layers / (2 * QWEN.side)).clamp(1, 2048);
    let (full, light) = (Footprint::Full, Footprint::Light);
    for workload in [
        Workload::new(QWEN, whole, full),
        Workload::new(QWEN, whole, light),
        Workload::new(QWEN, whole.min(128), full),
    ] {
        both_ways(bench, slab, "HBM of the same device", workload, rows)?;
    }
    for model in [QWEN, LWM] {
        let workload = Workload::new(model, fitting(bench, model), full);
        both_ways(bench, &host, "pinned host memory", workload, rows)?;
    }
    Ok(())
}

/// Measures the pipeline between the first GPU and memory of a peer.
pub(super) fn across(
    bench: &Bench<'_>,
    theirs: &Memory,
    place: &str,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let (full, light) = (Footprint::Full, Footprint::Light);
    let whole = fitting(bench, QWEN);
    for workload in [
        Workload::new(QWEN, whole, full),
        Workload::new(QWEN, whole, light),
        Workload::new(QWEN, whole.min(128), full),
        Workload::new(LWM, fitting(bench, LWM), full),
    ] {
        both_ways(bench, theirs, place, workload, rows)?;
    }
    Ok(())
}

/// Measures the pipeline with each method, beside compute that takes as long as a plain copy. This shows how much the
/// copies slow the engine, and how much they gain.
pub(super) fn tune(
    course: &Course<'_>,
    theirs: &Memory,
    direction: Direction,
    methods: &[Method],
    rows: &mut Rows<'_>,
) -> Result<()> {
    let bench = course.bench;
    let layers = f64::from(bench.scale.layers);
    for model in [QWEN, LWM] {
        let blocks = fitting(bench, model);
        let plain = course.plain(blocks * 2 * model.side)? * layers;
        let mut rounds = None;
        for &method in methods {
            let workload = Workload::new(model, blocks, Footprint::Full);
            let plan = Plan::new(bench, theirs, workload, direction)?.copying_by(method)?;
            let rounds = match rounds {
                Some(rounds) => rounds,
                None => *rounds.insert(plan.calibrate(plain / layers)?),
            };
            let (transfer, compute) = (plan.median(0)?, plan.compute_only(rounds)?);
            let whole = plan.median(rounds)?;
            let bound = compute.max(plain) + compute.min(plain) / layers;
            rows.push(Row {
                group: "peer tune pipeline".to_owned(),
                case: format!(
                    "{}{} x {} tokens, {}, beside full compute, alone {:.2} ms",
                    course.way,
                    model.name,
                    blocks * 16,
                    copies::name(method),
                    transfer * 1e3
                ),
                bytes: plan.bytes(),
                seconds: whole,
                against: format!(
                    "max(compute {:.2} ms, plain copies {:.2} ms) + one layer",
                    compute * 1e3,
                    plain * 1e3
                ),
                ratio: Some(bound / whole),
            });
        }
    }
    Ok(())
}

/// How many blocks of a model fit into a quarter of the memory. An engine may move this much in one step.
fn fitting(bench: &Bench<'_>, model: Model) -> u64 {
    let layers = u64::from(bench.scale.layers);
    (bench.scale.memory / 4 / layers / (2 * model.side)).clamp(1, 2048)
}

/// Measures the pipeline in both directions between the engine's pool and `other`, which lies in `place`.
fn both_ways(
    bench: &Bench<'_>,
    other: &Memory,
    place: &str,
    workload: Workload,
    rows: &mut Rows<'_>,
) -> Result<()> {
    for direction in [Direction::Fetch, Direction::WriteBack] {
        let plan = Plan::new(bench, other, workload, direction)?;
        plan.prepare()?;
        plan.measure(place, rows)?;
        rows.check(place, plan.verify());
    }
    Ok(())
}

struct Plan<'a> {
    bench: &'a Bench<'a>,
    other: &'a Memory,
    workload: Workload,
    direction: Direction,
    copies: std::sync::Arc<dyn CopyStream>,
    compute: std::sync::Arc<dyn CopyStream>,
    /// The pieces of each layer, from the slab to the pool or from the pool to the slab.
    layers: Vec<Vec<Piece>>,
}

impl<'a> Plan<'a> {
    fn new(
        bench: &'a Bench<'a>,
        other: &'a Memory,
        workload: Workload,
        direction: Direction,
    ) -> Result<Self> {
        let Workload { model, blocks, .. } = workload;
        let layers = u64::from(bench.scale.layers);
        let mut order: Vec<u64> = (0..blocks).collect();
        order.shuffle(&mut StdRng::seed_from_u64(blocks));
        let pieces = |layer: u64| {
            (0..2 * blocks)
                .map(|index| {
                    // The slab is layer-major. In the pool K and V lie apart, and the blocks are in random order.
                    let slab = (layer * blocks * 2 + index) * model.side;
                    let block = order[(index / 2) as usize];
                    let pool = (layer * blocks * 2 + (index % 2) * blocks + block) * model.side;
                    let (from, to) = match direction {
                        Direction::Fetch => (slab, pool),
                        Direction::WriteBack => (pool, slab),
                    };
                    Piece {
                        from,
                        to,
                        bytes: model.side,
                    }
                })
                .collect()
        };
        let lent = bench
            .engine
            .lend_stream(&bench.layer, &bench.device, bench.plain)?;
        Ok(Self {
            bench,
            other,
            workload,
            direction,
            copies: bench.layer.stream(&bench.device)?,
            compute: lent,
            layers: (0..layers).map(pieces).collect(),
        })
    }

    /// Copies by `method`, not by the method that is picked for the size of the pieces.
    fn copying_by(mut self, method: Method) -> Result<Self> {
        self.copies = self.bench.layer.stream_by(&self.bench.device, method)?;
        Ok(self)
    }

    /// Bytes of all layers.
    fn bytes(&self) -> u64 {
        self.layers.len() as u64 * self.workload.blocks * 2 * self.workload.model.side
    }

    /// Writes the pattern to the source, and zeros to the target.
    fn prepare(&self) -> Result<()> {
        let pool = &self.bench.memories[1];
        let (from, to) = match self.direction {
            Direction::Fetch => (self.other, pool),
            Direction::WriteBack => (pool, self.other),
        };
        pattern::write(&*self.copies, from, 0, self.bytes(), SEED)?;
        self.copies.zero(to, 0, self.bytes())?;
        Ok(self.copies.record()?.wait()?)
    }

    /// Checks every byte that the last pass copied.
    fn verify(&self) -> Result<()> {
        let to = match self.direction {
            Direction::Fetch => &self.bench.memories[1],
            Direction::WriteBack => self.other,
        };
        let mut layers = self.layers.iter();
        layers.try_for_each(|pieces| pattern::verify_pieces(&*self.copies, to, pieces, SEED))
    }

    fn measure(&self, place: &str, rows: &mut Rows<'_>) -> Result<()> {
        let layers = self.layers.len() as u64;
        let transfer = self.median(0)?;
        for share in [0.5, 1.0, 2.0] {
            let rounds = self.calibrate(share * transfer / layers as f64)?;
            let compute = self.compute_only(rounds)?;
            let whole = self.median(rounds)?;
            // No compute can overlap the fetch of the first layer, or the write-back of the last layer.
            let bound = compute.max(transfer) + compute.min(transfer) / layers as f64;
            rows.push(Row {
                group: match place.starts_with("a peer") {
                    true => "peer layer pipeline".to_owned(),
                    false => "layer pipeline".to_owned(),
                },
                case: format!(
                    "{} {place}, {} x {} tokens, beside {} compute of {:.1} x transfer",
                    match self.direction {
                        Direction::Fetch => "from",
                        Direction::WriteBack => "to",
                    },
                    self.workload.model.name,
                    self.workload.blocks * 16,
                    match self.workload.footprint {
                        Footprint::Full => "full",
                        Footprint::Light => "light",
                    },
                    // The measured ratio, not `share`: many short launches take longer than calibrated.
                    compute / transfer,
                ),
                bytes: self.bytes(),
                seconds: whole,
                against: format!(
                    "max(compute {:.2} ms, transfer {:.2} ms) + one layer",
                    compute * 1e3,
                    transfer * 1e3
                ),
                ratio: Some(bound / whole),
            });
        }
        Ok(())
    }

    /// Seconds of one pass over all layers, with `rounds` of compute for each layer. With 0 rounds nothing computes.
    fn once(&self, rounds: u32) -> Result<f64> {
        let pool = &self.bench.memories[1];
        let start = Instant::now();
        for pieces in &self.layers {
            match self.direction {
                Direction::Fetch => {
                    self.copies.copy(self.other, pool, pieces)?;
                    if rounds > 0 {
                        self.compute.wait_for(&self.copies.record()?)?;
                        self.bench.engine.compute(
                            self.bench.plain,
                            self.workload.footprint,
                            rounds,
                        )?;
                    }
                }
                Direction::WriteBack => {
                    if rounds > 0 {
                        self.bench.engine.compute(
                            self.bench.plain,
                            self.workload.footprint,
                            rounds,
                        )?;
                        self.copies.wait_for(&self.compute.record()?)?;
                    }
                    self.copies.copy(pool, self.other, pieces)?;
                }
            }
        }
        self.copies.record()?.wait()?;
        self.compute.record()?.wait()?;
        Ok(start.elapsed().as_secs_f64())
    }

    fn median(&self, rounds: u32) -> Result<f64> {
        self.once(rounds)?;
        let mut samples = (0..7)
            .map(|_| self.once(rounds))
            .collect::<Result<Vec<f64>>>()?;
        samples.sort_by(f64::total_cmp);
        Ok(samples[3])
    }

    /// Seconds of the compute of all layers, without copies.
    fn compute_only(&self, rounds: u32) -> Result<f64> {
        let once = || -> Result<f64> {
            let start = Instant::now();
            for _ in &self.layers {
                self.bench
                    .engine
                    .compute(self.bench.plain, self.workload.footprint, rounds)?;
            }
            self.bench.engine.synchronize(self.bench.plain)?;
            Ok(start.elapsed().as_secs_f64())
        };
        once()?;
        let mut samples = (0..7).map(|_| once()).collect::<Result<Vec<f64>>>()?;
        samples.sort_by(f64::total_cmp);
        Ok(samples[3])
    }

    /// How many rounds of compute take about `seconds` for one layer.
    fn calibrate(&self, seconds: f64) -> Result<u32> {
        const TRIAL: u32 = 1000;
        let layer =
            |rounds| Ok::<_, anyhow::Error>(self.compute_only(rounds)? / self.layers.len() as f64);
        let (none, trial) = (layer(1)?, layer(TRIAL)?);
        let rounds = f64::from(TRIAL) * (seconds - none) / (trial - none).max(1e-9);
        Ok((rounds as u32).clamp(1, 1 << 30))
    }
}
