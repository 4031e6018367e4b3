//! Measures copies on this machine's GPU. Each is compared with a plain copy of the same bytes in the same run.
//!
//! With one GPU, every HBM copy stays on one device. It crosses no link, and shows the cost of the copy path itself.
//! With two GPUs, memory of another process on the other GPU is measured too. Only that memory is called a peer's.

mod copies;
mod course;
pub mod host;
mod latencies;
mod lent_host;
mod peers;
mod pipeline;
mod rows;
mod tune;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use swiftcache_client::device::{
    CopyStream, Memory,
    cuda::{CudaLayer, Route},
};
use swiftcache_proto::domain::DeviceUuid;

use crate::{
    engine::{Engine, EngineStream},
    subject::Subject,
};

use course::Course;
pub use rows::{Report, Row, Rows, table};

/// The sizes of the measurements.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Bytes of HBM on each of the two sides of a copy.
    pub memory: u64,
    /// Bytes of one scattered copy.
    pub bytes: u64,
    /// How long each measurement takes at least.
    pub time: Duration,
    /// Layers of the model in the layer pipeline.
    pub layers: u32,
}

impl Scale {
    /// The sizes for real figures.
    pub const FULL: Self = Self {
        memory: 4 << 30,
        bytes: 64 << 20,
        time: Duration::from_millis(120),
        layers: 36,
    };
    /// Small sizes, to test that the benchmarks run.
    pub const SMALL: Self = Self {
        memory: 16 << 20,
        bytes: 4 << 20,
        time: Duration::ZERO,
        layers: 3,
    };
}

/// The GPU, the engine and the memories that every benchmark uses.
struct Bench<'a> {
    subject: &'a Subject,
    layer: CudaLayer,
    device: DeviceUuid,
    engine: Engine,
    plain: EngineStream,
    /// Two allocations of the engine, as raw addresses and as memories of the device layer.
    addresses: [u64; 2],
    memories: [Memory; 2],
    scale: Scale,
}

type Part = fn(&Bench<'_>, &mut Rows<'_>) -> Result<()>;

/// The parts of the benchmark, by name.
const PARTS: [(&str, Part); 8] = [
    ("extents", |bench, rows| {
        copies::extents(&Course::within(bench), rows)
    }),
    ("scattered pieces", |bench, rows| {
        copies::scattered(&Course::within(bench), &copies::PIECES, rows)
    }),
    ("blocks of real models", |bench, rows| {
        copies::models(&Course::within(bench), rows)
    }),
    ("host memory", copies::host),
    ("lent host memory", lent_host::run),
    ("opening and closing", latencies::run),
    ("layer pipeline", pipeline::run),
    ("peers", peers::run),
];

/// Measures the parts whose names contain `only`, and calls `said` with a line for each figure. The report has the
/// figures and the failures.
///
/// # Errors
/// When the GPU cannot be used at all.
pub fn run(
    subject: &Subject,
    scale: Scale,
    only: &str,
    said: &mut dyn FnMut(&str),
) -> Result<Report> {
    let parts = PARTS.iter().filter(|(name, _)| name.contains(only));
    measure(subject, scale, &parts.collect::<Vec<_>>(), said)
}

/// Measures which method copies fastest from and to a peer. [`Route::kernel_below`] and the number of the kernel's
/// blocks are chosen from this.
///
/// # Errors
/// When the GPU cannot be used at all.
pub fn tune(subject: &Subject, scale: Scale, said: &mut dyn FnMut(&str)) -> Result<Report> {
    measure(subject, scale, &[&("tuning", tune::run as Part)], said)
}

fn measure(
    subject: &Subject,
    scale: Scale,
    parts: &[&(&str, Part)],
    said: &mut dyn FnMut(&str),
) -> Result<Report> {
    ensure!(
        !parts.is_empty(),
        "no part of the benchmark has a name that contains this word"
    );
    let bench = Bench::open(subject, scale)?;
    let mut rows = Rows::new(said);
    for (name, part) in parts {
        rows.say(&format!("measuring: {name}"));
        let outcome = part(&bench, &mut rows);
        rows.check(name, outcome);
    }
    let (driver, absent) = bench.layer.driver();
    Ok(Report {
        device: subject.layer.devices()[0].name.clone(),
        neighbour: match subject.neighbour() {
            Ok((_, link)) => format!("a neighbour over {link}"),
            Err(problem) => problem.to_string(),
        },
        driver,
        absent: absent.iter().map(ToString::to_string).collect(),
        kernel_below: Route::ALL
            .map(|route| (route, route.kernel_below(true)))
            .to_vec(),
        rows: rows.rows,
        failures: rows.failures,
    })
}

impl<'a> Bench<'a> {
    fn open(subject: &'a Subject, scale: Scale) -> Result<Self> {
        let layer = CudaLayer::open()?;
        let device = subject.device()?;
        let engine = Engine::start()?;
        let addresses = [
            engine.allocate(scale.memory)?,
            engine.allocate(scale.memory)?,
        ];
        let lend = |address| engine.lend_memory(&layer, &device, address, scale.memory);
        let memories = [lend(addresses[0])?, lend(addresses[1])?];
        let plain = engine.stream()?;
        Ok(Self {
            subject,
            device,
            plain,
            addresses,
            memories,
            scale,
            engine,
            layer,
        })
    }
}

impl Bench<'_> {
    /// Seconds of one call of `queue` when many follow one another: the median of several runs. Each run is long enough
    /// to be timed. `queue` gets a number that grows with every call.
    fn time(
        &self,
        mut queue: impl FnMut(u64) -> Result<()>,
        mut finish: impl FnMut() -> Result<()>,
    ) -> Result<f64> {
        let mut number = 0;
        let mut run = |count: u64| -> Result<Duration> {
            let start = Instant::now();
            for _ in 0..count {
                queue(number)?;
                number += 1;
            }
            finish()?;
            Ok(start.elapsed())
        };
        run(2)?; // The first run loads the kernel and grows the ring.
        let mut count = 2;
        let mut elapsed = run(count)?;
        while elapsed < self.scale.time / 5 && count < 1 << 16 {
            count *= 2;
            elapsed = run(count)?;
        }
        let mut samples = vec![elapsed];
        for _ in 0..4 {
            samples.push(run(count)?);
        }
        samples.sort();
        Ok(samples[2].as_secs_f64() / count as f64)
    }

    /// Seconds of one copy on `stream` when many follow one another.
    fn time_stream(
        &self,
        stream: &dyn CopyStream,
        queue: impl FnMut(u64) -> Result<()>,
    ) -> Result<f64> {
        self.time(queue, || Ok(stream.record()?.wait()?))
    }
}
