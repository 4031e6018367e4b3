//! Measurements, and how people see them.

use std::fmt;

use anyhow::Result;
use serde::Serialize;
use swiftcache_client::device::cuda::Route;

/// One measurement.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What kind of thing was measured.
    pub group: String,
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

impl Row {
    /// Whether it is a time rather than a rate.
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

/// Measurements as they come: each is told at once, so that a run that is cut short has said what it found.
pub struct Rows<'a> {
    pub(super) rows: Vec<Row>,
    /// What went wrong meanwhile.
    pub(super) failures: Vec<String>,
    said: &'a mut dyn FnMut(&str),
}

impl fmt::Debug for Rows<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Rows({})", self.rows.len())
    }
}

impl<'a> Rows<'a> {
    /// None yet; `said` gets a line for each.
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

    /// Notes what went wrong, if it did, and lets the rest go on: a machine with two GPUs is not had every day.
    pub(super) fn check(&mut self, what: &str, outcome: Result<()>) {
        if let Err(error) = outcome {
            let failure = format!("{what}: {error:#}");
            self.say(&format!("FAILED: {failure}"));
            self.failures.push(failure);
        }
    }

    /// Tells people something that is no measurement.
    pub(super) fn say(&mut self, line: &str) {
        (self.said)(line);
    }
}

/// Measurements, for people.
pub fn table(rows: &[Row]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::ASCII_MARKDOWN);
    table.set_header(["what", "case", "time", "GB/s", "ratio", "against"]);
    for row in rows {
        table.add_row(row.cells());
    }
    table
}

/// All measurements, and on what.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The device's marketing name.
    pub device: String,
    /// How it reaches its neighbour, or why it has none.
    pub neighbour: String,
    /// The driver's version as it counts: 12080 is CUDA 12.8.
    pub driver: i32,
    /// Entry points that this driver lacks.
    pub absent: Vec<String>,
    /// By route: pieces smaller than this on average, bytes, go through the kernel unless told otherwise, where the
    /// driver has batched copies.
    pub kernel_below: Vec<(Route, u64)>,
    /// The measurements.
    pub rows: Vec<Row>,
    /// What could not be measured, and why.
    pub failures: Vec<String>,
}

impl Report {
    /// For people.
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
