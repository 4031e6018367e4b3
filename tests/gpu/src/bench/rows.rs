//! Measurements, and tables of them for people.

use std::fmt;

use anyhow::Result;
use serde::Serialize;
use swiftcache_client::device::cuda::Route;

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The kind of measurement.
    pub group: String,
    /// What was measured.
    pub case: String,
    /// Bytes that one operation moves.
    pub bytes: u64,
    /// Time of one operation, seconds.
    pub seconds: f64,
    /// The baseline.
    pub against: String,
    /// The time of the baseline (or the lower bound of the time) divided by the measured time: 1 is as good as the
    /// baseline, more is better.
    pub ratio: Option<f64>,
}

impl Row {
    /// Whether the row is about a time, not about a rate.
    fn is_time(&self) -> bool {
        self.group.ends_with("latency")
    }

    fn cells(&self) -> [String; 6] {
        let rate = match self.is_time() {
            true => String::new(),
            false => format!("{:.1}", self.bytes as f64 / self.seconds / 1e9),
        };
        let ratio = self.ratio.map(|ratio| format!("{ratio:.3}"));
        [
            self.group.clone(),
            self.case.clone(),
            time(self.seconds),
            rate,
            ratio.unwrap_or_default(),
            self.against.clone(),
        ]
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.cells().join(" | "))
    }
}

/// Collects measurements. It prints each at once, so that a run that is cut short has printed what it found.
pub struct Rows<'a> {
    pub(super) rows: Vec<Row>,
    /// The failures so far.
    pub(super) failures: Vec<String>,
    said: &'a mut dyn FnMut(&str),
}

impl fmt::Debug for Rows<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rows({})", self.rows.len())
    }
}

impl<'a> Rows<'a> {
    /// No measurements yet. `said` is called with a line for each.
    pub(super) fn new(said: &'a mut dyn FnMut(&str)) -> Self {
        Self {
            rows: Vec::new(),
            failures: Vec::new(),
            said,
        }
    }

    pub(super) fn push(&mut self, row: Row) {
        self.say(&row.to_string());
        self.rows.push(row);
    }

    /// Records a failure, if there is one, and lets the other measurements go on, because machines with two GPUs are
    /// rare.
    pub(super) fn check(&mut self, what: &str, outcome: Result<()>) {
        if let Err(error) = outcome {
            let failure = format!("{what}: {error:#}");
            self.say(&format!("FAILED: {failure}"));
            self.failures.push(failure);
        }
    }

    /// Prints a line that is not a measurement.
    pub(super) fn say(&mut self, line: &str) {
        (self.said)(line);
    }
}

/// A table of measurements for people.
pub fn table(rows: &[Row]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["what", "case", "time", "GB/s", "ratio", "against"]);
    for row in rows {
        table.add_row(row.cells());
    }
    table
}

/// All measurements, and the GPU that they are from.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The device's marketing name.
    pub device: String,
    /// The link to its neighbour, or why it has no neighbour.
    pub neighbour: String,
    /// The driver's version as CUDA writes it: 12080 is CUDA 12.8.
    pub driver: i32,
    /// Entry points that this driver does not have.
    pub absent: Vec<String>,
    /// For each route, the average size of pieces in bytes below which the kernel copies them, when no method was asked
    /// for and the driver has batched copies.
    pub kernel_below: Vec<(Route, u64)>,
    /// The measurements.
    pub rows: Vec<Row>,
    /// The measurements that failed, and why.
    pub failures: Vec<String>,
}

impl Report {
    /// The report for people.
    pub fn table(&self) -> String {
        let table = table(&self.rows);
        let absent = match self.absent.is_empty() {
            true => String::new(),
            false => format!(", without {}", self.absent.join(", ")),
        };
        let failures: String = (self.failures.iter())
            .map(|failure| format!("\nFAILED: {failure}"))
            .collect();
        format!(
            "{}, driver {}.{}{absent}; {}\n{table}{failures}",
            self.device,
            self.driver / 1000,
            self.driver % 1000 / 10,
            self.neighbour,
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
