//! The results of the bench: a table for people, JSON for programs, and Markdown for docs/benchmarks.md.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde::Serialize;

/// One result: a figure, the baseline from the same run, and the budget.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Line {
    /// What was measured.
    pub(crate) what: String,
    /// The figure, with its unit.
    pub(crate) measured: String,
    /// The baseline, measured in the same run, with its unit.
    pub(crate) baseline: String,
    /// measured / baseline.
    pub(crate) ratio: Option<f64>,
    /// The target in docs/architecture.md or DESIGN section 9.
    pub(crate) budget: String,
    /// Whether the budget was kept. `None`: there is no budget.
    pub(crate) kept: Option<bool>,
}

/// Latencies, nanoseconds.
pub(crate) struct Latencies(Histogram<u64>);

impl Latencies {
    /// An empty distribution for latencies up to a minute, with three significant digits.
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Histogram::new_with_bounds(1, 60_000_000_000, 3)?))
    }

    /// Adds a latency.
    pub(crate) fn add(&mut self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.0.saturating_record(nanos);
    }

    /// The latency that `quantile` (0 to 1) of the samples do not exceed.
    pub(crate) fn at(&self, quantile: f64) -> Duration {
        Duration::from_nanos(self.0.value_at_quantile(quantile))
    }
}

/// A duration for people, in µs or ms.
pub(crate) fn time(duration: Duration) -> String {
    let micros = duration.as_secs_f64() * 1e6;
    if micros < 1000.0 {
        format!("{micros:.1} µs")
    } else {
        format!("{:.2} ms", micros / 1e3)
    }
}

/// The lines as a Markdown table.
pub(crate) fn markdown(lines: &[Line]) -> String {
    let mut text = String::from(
        "| what | measured | baseline, same run | ratio | budget | kept |\n|---|---|---|---|---|---|\n",
    );
    for line in lines {
        let ratio = line
            .ratio
            .map_or(String::new(), |ratio| format!("{ratio:.2}"));
        let kept = match line.kept {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "",
        };
        text += &format!(
            "| {} | {} | {} | {ratio} | {} | {kept} |\n",
            line.what, line.measured, line.baseline, line.budget
        );
    }
    text
}

/// The lines as a table on a terminal.
pub(crate) fn table(lines: &[Line]) -> String {
    let mut table = comfy_table::Table::new();
    table
        .load_preset(comfy_table::presets::UTF8_FULL_CONDENSED)
        .set_header([
            "what",
            "measured",
            "baseline, same run",
            "ratio",
            "budget",
            "kept",
        ]);
    for line in lines {
        let kept = line.kept.map_or("", |kept| if kept { "yes" } else { "NO" });
        table.add_row([
            line.what.clone(),
            line.measured.clone(),
            line.baseline.clone(),
            line.ratio
                .map_or(String::new(), |ratio| format!("{ratio:.2}")),
            line.budget.clone(),
            kept.to_owned(),
        ]);
    }
    table.to_string()
}

const BEGIN: &str = "<!-- make bench: begin -->";
const END: &str = "<!-- make bench: end -->";

/// Replaces the text between the two markers in the document at `path`.
pub(crate) fn write_between_markers(path: &Path, text: &str) -> Result<()> {
    let (head, tail) = around_markers(path)?;
    fs::write(path, format!("{head}{BEGIN}\n{text}{END}{tail}"))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Checks that the document can be written: before minutes are spent on measuring.
pub(crate) fn check_markers(path: &Path) -> Result<()> {
    around_markers(path)?;
    let opened = fs::OpenOptions::new().append(true).open(path);
    opened.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// What stands before and after the two markers.
fn around_markers(path: &Path) -> Result<(String, String)> {
    let document =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let (head, rest) = document
        .split_once(BEGIN)
        .with_context(|| format!("{} has no line {BEGIN}", path.display()))?;
    let (_, tail) = rest
        .split_once(END)
        .with_context(|| format!("{} has no line {END}", path.display()))?;
    Ok((head.to_owned(), tail.to_owned()))
}
