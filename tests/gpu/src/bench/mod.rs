//! What copies cost on this machine's GPU, each beside a plain copy of the same bytes measured in the same run.
//!
//! With one GPU every HBM copy is a same-device copy: it crosses no link, and says what the copy path itself costs.

mod copies;
pub mod host;
mod latencies;
mod pipeline;

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;
use swiftcache_client::device::{
    CopyStream, Memory,
    cuda::{CudaLayer, Route},
};
use swiftcache_proto::domain::DeviceUuid;

use crate::{
    engine::{Engine, EngineStream},
    subject::Subject,
};

/// How much is measured.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// HBM of each of the two sides, bytes.
    pub memory: u64,
    /// Bytes of one scattered copy.
    pub bytes: u64,
    /// The least time to measure one thing.
    pub time: Duration,
    /// Layers of the pipeline's model.
    pub layers: u32,
}

impl Scale {
    /// For figures.
    pub const FULL: Self = Self {
        memory: 4 << 30,
        bytes: 64 << 20,
        time: Duration::from_millis(120),
        layers: 36,
    };
    /// For seeing that it runs.
    pub const SMALL: Self = Self {
        memory: 64 << 20,
        bytes: 4 << 20,
        time: Duration::ZERO,
        layers: 3,
    };
}

/// One measurement.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What kind of thing was measured.
    pub group: &'static str,
    /// What exactly.
    pub case: String,
    /// Bytes moved once.
    pub bytes: u64,
    /// Time for them, seconds.
    pub seconds: f64,
    /// What it is compared with.
    pub against: String,
    /// This one's rate by the other's, or for times this one's bound by its time: 1 is as good, more is better.
    pub ratio: Option<f64>,
}

/// All measurements, and on what.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The device's marketing name.
    pub device: String,
    /// The driver's version as it counts: 12080 is CUDA 12.8.
    pub driver: i32,
    /// Entry points that this driver lacks.
    pub absent: Vec<String>,
    /// By route: pieces smaller than this on average, bytes, go through the kernel unless told otherwise.
    pub kernel_below: Vec<(Route, u64)>,
    /// The measurements.
    pub rows: Vec<Row>,
}

/// Measurements, for people.
pub fn table(rows: &[Row]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["what", "case", "time", "GB/s", "ratio", "against"]);
    for row in rows {
        let rate = match row.group {
            "latency" => String::new(),
            _ => format!("{:.1}", row.bytes as f64 / row.seconds / 1e9),
        };
        table.add_row([
            row.group.to_owned(),
            row.case.clone(),
            time(row.seconds),
            rate,
            row.ratio
                .map(|ratio| format!("{ratio:.3}"))
                .unwrap_or_default(),
            row.against.clone(),
        ]);
    }
    table
}

impl Report {
    /// For people.
    pub fn table(&self) -> String {
        let table = table(&self.rows);
        format!(
            "{}, driver {}.{}{}\n{table}",
            self.device,
            self.driver / 1000,
            self.driver % 1000 / 10,
            if self.absent.is_empty() {
                String::new()
            } else {
                format!(", without {}", self.absent.join(", "))
            },
        )
    }
}

fn time(seconds: f64) -> String {
    if seconds < 1e-3 {
        format!("{:.1} us", seconds * 1e6)
    } else {
        format!("{:.2} ms", seconds * 1e3)
    }
}

/// What every benchmark needs.
struct Bench<'a> {
    subject: &'a Subject,
    layer: CudaLayer,
    device: DeviceUuid,
    engine: Engine,
    plain: EngineStream,
    /// Two of the engine's allocations, as raw addresses and as the layer's memories.
    addresses: [u64; 2],
    memories: [Memory; 2],
    scale: Scale,
}

/// Measures everything.
///
/// # Errors
/// When the device refuses, or a copy arrives wrong.
pub fn run(subject: &Subject, scale: Scale, progress: &mut dyn FnMut(&str)) -> Result<Report> {
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
    let bench = Bench {
        subject,
        device,
        plain,
        addresses,
        memories,
        scale,
        engine,
        layer,
    };
    let mut rows = Vec::new();
    type Part = fn(&Bench<'_>, &mut Vec<Row>) -> Result<()>;
    let parts: [(&str, Part); 6] = [
        ("extents", copies::extents),
        ("scattered pieces", copies::scattered),
        ("blocks of real models", copies::models),
        ("host memory", copies::host),
        ("opening and closing", latencies::run),
        ("layer pipeline", pipeline::run),
    ];
    for (name, part) in parts {
        progress(name);
        part(&bench, &mut rows)?;
    }
    let (driver, absent) = bench.layer.driver();
    Ok(Report {
        device: subject.layer.devices()[0].name.clone(),
        driver,
        absent: absent.iter().map(ToString::to_string).collect(),
        kernel_below: Route::ALL
            .map(|route| (route, route.kernel_below()))
            .to_vec(),
        rows,
    })
}

impl Bench<'_> {
    /// Seconds that one `queue` takes when many follow one another: the median of several runs, each of them long
    /// enough to time. `queue` gets a number that grows.
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
        run(2)?; // warms up: loads the kernel, grows the ring
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

    /// Seconds for one of many copies on `stream`.
    fn time_stream(
        &self,
        stream: &dyn CopyStream,
        queue: impl FnMut(u64) -> Result<()>,
    ) -> Result<f64> {
        self.time(queue, || Ok(stream.record()?.wait()?))
    }

    /// Seconds for a plain device-to-device copy of `bytes`, one of many.
    fn plain_copy(&self, bytes: u64) -> Result<f64> {
        let [from, to] = self.addresses;
        let places = (self.scale.memory / bytes).max(1);
        self.time(
            |number| {
                let offset = (number % places) * bytes;
                self.engine
                    .copy(self.plain, to + offset, from + offset, bytes)
            },
            || self.engine.synchronize(self.plain),
        )
    }
}
