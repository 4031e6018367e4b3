//! The layer pipeline: fetching a layer while the one before computes on an engine's stream, and writing one back
//! while the next computes.

use std::time::Instant;

use anyhow::Result;
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use swiftcache_client::device::{CopyStream, DeviceLayer, Memory, Piece, cuda::Method};

use super::{Bench, Course, Row, Rows, copies};
use crate::{engine::Footprint, pattern};

/// One side of a 16-token block of one layer, bytes; K and V lie apart in the engine's pool.
#[derive(Clone, Copy)]
struct Model {
    name: &'static str,
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

/// Which way the KV goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the slab to the engine's pool.
    Fetch,
    /// From the engine's pool to the slab.
    WriteBack,
}

/// What every byte is a function of, beside its place.
const SEED: u64 = 7;

pub(super) fn run(bench: &Bench<'_>, rows: &mut Rows<'_>) -> Result<()> {
    let layers = u64::from(bench.scale.layers);
    let host = (bench.layer).allocate_host(&bench.device, bench.scale.memory / 4)?;
    let slab = &bench.memories[0];
    let whole = (slab.bytes() / layers / (2 * QWEN.side)).clamp(1, 2048);
    let (full, light) = (Footprint::Full, Footprint::Light);
    for (place, other, model, blocks, footprint) in [
        ("HBM of the same device", slab, QWEN, whole, full),
        ("HBM of the same device", slab, QWEN, whole, light),
        ("HBM of the same device", slab, QWEN, whole.min(128), full),
        (
            "pinned host memory",
            &host,
            QWEN,
            fitting(bench, QWEN),
            full,
        ),
        ("pinned host memory", &host, LWM, fitting(bench, LWM), full),
    ] {
        both_ways(bench, (other, place), (model, blocks), footprint, rows)?;
    }
    Ok(())
}

/// Between the first GPU and memory of a peer.
pub(super) fn across(
    bench: &Bench<'_>,
    theirs: &Memory,
    place: &str,
    rows: &mut Rows<'_>,
) -> Result<()> {
    let (full, light) = (Footprint::Full, Footprint::Light);
    let whole = fitting(bench, QWEN);
    for (model, blocks, footprint) in [
        (QWEN, whole, full),
        (QWEN, whole, light),
        (QWEN, whole.min(128), full),
        (LWM, fitting(bench, LWM), full),
    ] {
        both_ways(bench, (theirs, place), (model, blocks), footprint, rows)?;
    }
    Ok(())
}

/// Each method beside compute that takes as long as a plain copy: what copies cost the engine, and are worth.
pub(super) fn tune(
    course: &Course<'_>,
    (theirs, way): (&Memory, Way),
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
            let plan = Plan::new(bench, theirs, (model, blocks), (way, Footprint::Full))?;
            let plan = plan.copying_by(method)?;
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

/// Blocks of a model that fit a quarter of the memory, as an engine's step may move.
fn fitting(bench: &Bench<'_>, model: Model) -> u64 {
    let layers = u64::from(bench.scale.layers);
    (bench.scale.memory / 4 / layers / (2 * model.side)).clamp(1, 2048)
}

fn both_ways(
    bench: &Bench<'_>,
    (other, place): (&Memory, &str),
    (model, blocks): (Model, u64),
    footprint: Footprint,
    rows: &mut Rows<'_>,
) -> Result<()> {
    for way in [Way::Fetch, Way::WriteBack] {
        let plan = Plan::new(bench, other, (model, blocks), (way, footprint))?;
        plan.prepare()?;
        plan.measure(place, rows)?;
        rows.check(place, plan.verify());
    }
    Ok(())
}

struct Plan<'a> {
    bench: &'a Bench<'a>,
    other: &'a Memory,
    model: Model,
    blocks: u64,
    way: Way,
    footprint: Footprint,
    copies: std::sync::Arc<dyn CopyStream>,
    compute: std::sync::Arc<dyn CopyStream>,
    /// The pieces of each layer, from the slab to the pool or the other way round.
    layers: Vec<Vec<Piece>>,
}

impl<'a> Plan<'a> {
    fn new(
        bench: &'a Bench<'a>,
        other: &'a Memory,
        (model, blocks): (Model, u64),
        (way, footprint): (Way, Footprint),
    ) -> Result<Self> {
        let layers = u64::from(bench.scale.layers);
        let mut order: Vec<u64> = (0..blocks).collect();
        order.shuffle(&mut StdRng::seed_from_u64(blocks));
        let pieces = |layer: u64| {
            (0..2 * blocks)
                .map(|index| {
                    // Layer-major in the slab; in the pool K and V apart, and blocks in an order of their own.
                    let slab = (layer * blocks * 2 + index) * model.side;
                    let block = order[(index / 2) as usize];
                    let pool = (layer * blocks * 2 + (index % 2) * blocks + block) * model.side;
                    let (from, to) = match way {
                        Way::Fetch => (slab, pool),
                        Way::WriteBack => (pool, slab),
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
            model,
            blocks,
            way,
            footprint,
            copies: bench.layer.stream(&bench.device)?,
            compute: lent,
            layers: (0..layers).map(pieces).collect(),
        })
    }

    /// With another method than the one that piece size picks.
    fn copying_by(mut self, method: Method) -> Result<Self> {
        self.copies = self.bench.layer.stream_by(&self.bench.device, method)?;
        Ok(self)
    }

    /// Bytes of all layers.
    fn bytes(&self) -> u64 {
        self.layers.len() as u64 * self.blocks * 2 * self.model.side
    }

    /// Fresh bytes at the source, and none of them at the target.
    fn prepare(&self) -> Result<()> {
        let pool = &self.bench.memories[1];
        let (from, to) = match self.way {
            Way::Fetch => (self.other, pool),
            Way::WriteBack => (pool, self.other),
        };
        pattern::write(&*self.copies, from, 0, self.bytes(), SEED)?;
        self.copies.zero(to, 0, self.bytes())?;
        Ok(self.copies.record()?.wait()?)
    }

    /// Looks at every byte that the last pass left.
    fn verify(&self) -> Result<()> {
        let to = match self.way {
            Way::Fetch => &self.bench.memories[1],
            Way::WriteBack => self.other,
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
            // The first layer's fetch, or the last one's write-back, has nothing to hide behind.
            let bound = compute.max(transfer) + compute.min(transfer) / layers as f64;
            rows.push(Row {
                group: match place.starts_with("a peer") {
                    true => "peer layer pipeline".to_owned(),
                    false => "layer pipeline".to_owned(),
                },
                case: format!(
                    "{} {place}, {} x {} tokens, beside {} compute of {:.1} x transfer",
                    match self.way {
                        Way::Fetch => "from",
                        Way::WriteBack => "to",
                    },
                    self.model.name,
                    self.blocks * 16,
                    match self.footprint {
                        Footprint::Full => "full",
                        Footprint::Light => "light",
                    },
                    // As it came out: many short launches take longer than they should.
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

    /// Seconds for all layers, with `rounds` of compute each; 0 is none at all.
    fn once(&self, rounds: u32) -> Result<f64> {
        let pool = &self.bench.memories[1];
        let start = Instant::now();
        for pieces in &self.layers {
            match self.way {
                Way::Fetch => {
                    self.copies.copy(self.other, pool, pieces)?;
                    if rounds > 0 {
                        self.compute.wait_for(&self.copies.record()?)?;
                        self.bench
                            .engine
                            .compute(self.bench.plain, self.footprint, rounds)?;
                    }
                }
                Way::WriteBack => {
                    if rounds > 0 {
                        self.bench
                            .engine
                            .compute(self.bench.plain, self.footprint, rounds)?;
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

    /// Seconds for the compute of all layers alone.
    fn compute_only(&self, rounds: u32) -> Result<f64> {
        let once = || -> Result<f64> {
            let start = Instant::now();
            for _ in &self.layers {
                self.bench
                    .engine
                    .compute(self.bench.plain, self.footprint, rounds)?;
            }
            self.bench.engine.synchronize(self.bench.plain)?;
            Ok(start.elapsed().as_secs_f64())
        };
        once()?;
        let mut samples = (0..7).map(|_| once()).collect::<Result<Vec<f64>>>()?;
        samples.sort_by(f64::total_cmp);
        Ok(samples[3])
    }

    /// How many rounds take one layer about `seconds`.
    fn calibrate(&self, seconds: f64) -> Result<u32> {
        const TRIAL: u32 = 1000;
        let layer =
            |rounds| Ok::<_, anyhow::Error>(self.compute_only(rounds)? / self.layers.len() as f64);
        let (none, trial) = (layer(1)?, layer(TRIAL)?);
        let rounds = f64::from(TRIAL) * (seconds - none) / (trial - none).max(1e-9);
        Ok((rounds as u32).clamp(1, 1 << 30))
    }
}
