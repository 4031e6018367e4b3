//! The report for people: tables, and numbers with readable units.

use std::{collections::BTreeMap, fmt::Write as _};

use comfy_table::{Cell, CellAlignment, Table, presets::UTF8_BORDERS_ONLY};

use super::{ArmReport, Report};
use crate::serving::Tier;

impl ArmReport {
    fn hit_share(&self, tiers: &[Tier]) -> f64 {
        let all: u64 = self.hit_blocks.values().sum();
        let these: u64 = tiers
            .iter()
            .filter_map(|tier| self.hit_blocks.get(tier))
            .sum();
        self.hit_rate * these as f64 / all.max(1) as f64
    }
}

/// Bytes with a readable unit, such as `1.5 GB`.
pub fn bytes(count: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1e3;
        unit += 1;
    }
    let decimals = if unit == 0 || value >= 99.95 { 0 } else { 1 };
    format!("{value:.decimals$} {}", units[unit])
}

fn duration(ms: f64) -> String {
    match ms {
        ..1e3 => format!("{ms:.0} ms"),
        ..1e5 => format!("{:.2} s", ms / 1e3),
        _ => format!("{:.0} s", ms / 1e3),
    }
}

fn wall(us: u64) -> String {
    if us < 1000 {
        format!("{us} us")
    } else {
        format!("{:.1} ms", us as f64 / 1e3)
    }
}

/// A table with a header. All columns but the first are numbers.
pub fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_BORDERS_ONLY).set_header(header);
    for row in rows {
        let cells = row.into_iter().enumerate().map(|(index, text)| {
            let alignment = if index == 0 {
                CellAlignment::Left
            } else {
                CellAlignment::Right
            };
            Cell::new(text).set_alignment(alignment)
        });
        table.add_row(cells);
    }
    table
}

impl Report {
    /// The heading of a table's first column. It says `(SIMULATED)` for a simulated node, so that nobody takes a copy
    /// of the table for results of a real node.
    fn heading(&self, what: &str) -> String {
        if self.simulated {
            format!("{what} (SIMULATED)")
        } else {
            what.to_owned()
        }
    }

    /// The report for people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let workload = &self.workload;
        let capacity = &self.capacity;
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{} requests of {}, arrivals stretched x{:.2}; an unbounded cache would find {:.3} of {} blocks{}",
            workload.requests,
            workload.trace,
            workload.stretch,
            workload.unbounded_hit_rate,
            workload.blocks,
            match workload.refused {
                0 => String::new(),
                refused => format!("; {refused} requests too long for the local pool, left out"),
            }
        );
        let _ = writeln!(
            text,
            "{} on {}, local pool {} blocks, host tier {} blocks, {} donors lending up to {} blocks ({} a block)\n",
            self.compute.model,
            self.compute.gpu,
            capacity.local_blocks,
            capacity.host_blocks,
            capacity.donors,
            capacity.leased_peak_blocks,
            bytes(capacity.block_full_bytes),
        );
        let _ = writeln!(text, "{}\n", self.ttft_table());
        let _ = writeln!(text, "{}\n", self.hits_table());
        let _ = writeln!(text, "{}\n", self.bytes_table());
        let donors = &self.donors;
        let _ = writeln!(
            text,
            "Revocations: {} (acknowledged in p50 {}, p99 {} of wall-clock time), zombies: {}",
            donors.revocations,
            wall(donors.acknowledge_wall.p50_us),
            wall(donors.acknowledge_wall.p99_us),
            donors.zombies
        );
        let _ = writeln!(
            text,
            "Blocks of revoked slabs: {} moved to other donors, {} to the host tier, {} dropped",
            donors.moved_to_donor_blocks, donors.moved_to_host_blocks, donors.dropped_blocks
        );
        let verified: u64 = self.arms.iter().map(|arm| arm.verified_moved_bytes).sum();
        let _ = writeln!(
            text,
            "Verified: {} read back, every byte right\n",
            bytes(verified)
        );
        let _ = writeln!(text, "{}", self.basis);
        text
    }

    fn ttft_table(&self) -> Table {
        let base = self.arms.first().map(|arm| arm.ttft).unwrap_or_default();
        let change = |of: f64, to: f64| {
            if to > 0.0 {
                // Adding zero turns -0 into 0.
                format!("{:+.0} %", ((of / to - 1.0) * 100.0).round() + 0.0)
            } else {
                "-".to_owned()
            }
        };
        let heading = self.heading("time to first token");
        let header = [
            heading.as_str(),
            "p50",
            "p95",
            "p99",
            "SwiftCache's p99",
            "server busy",
        ];
        let rows = self.arms.iter().enumerate().map(|(index, arm)| {
            [
                arm.name.clone(),
                duration(arm.ttft.p50_ms),
                duration(arm.ttft.p95_ms),
                duration(arm.ttft.p99_ms),
                if index == 0 {
                    String::new()
                } else {
                    change(base.p99_ms, arm.ttft.p99_ms)
                },
                format!("{:.0} %", arm.utilisation * 100.0),
            ]
        });
        table(header, rows)
    }

    fn hits_table(&self) -> Table {
        let donor = [Tier::DonorNvlink, Tier::DonorPcie, Tier::DonorHost];
        let rows = self.arms.iter().map(|arm| {
            let share = |tiers: &[Tier]| format!("{:.1} %", arm.hit_share(tiers) * 100.0);
            [
                arm.name.clone(),
                format!("{:.1} %", arm.hit_rate * 100.0),
                share(&[Tier::Local]),
                share(&donor),
                share(&[Tier::Host]),
                arm.failed_blocks.to_string(),
                arm.unplaced_blocks.to_string(),
            ]
        });
        let heading = self.heading("blocks found");
        let header = [
            heading.as_str(),
            "all",
            "local",
            "donors",
            "host tier",
            "lost on the way",
            "no room",
        ];
        table(header, rows)
    }

    fn bytes_table(&self) -> Table {
        let rows = self.arms.iter().map(|arm| {
            let over = |map: &BTreeMap<String, u64>, link: &str| {
                map.get(link).map_or("-".to_owned(), |count| bytes(*count))
            };
            [
                arm.name.clone(),
                over(&arm.loaded_full_bytes, "nvlink"),
                over(&arm.loaded_full_bytes, "pcie"),
                over(&arm.loaded_full_bytes, "host"),
                over(&arm.stored_full_bytes, "nvlink"),
                over(&arm.stored_full_bytes, "pcie"),
                over(&arm.stored_full_bytes, "host"),
                bytes(arm.verified_moved_bytes),
                format!("{:.1} s", arm.wall_s),
            ]
        });
        let heading = self.heading("full-size bytes");
        let header = [
            heading.as_str(),
            "from NVLink",
            "from PCIe peers",
            "from host",
            "to NVLink",
            "to PCIe peers",
            "to host",
            "really moved, verified",
            "wall time",
        ];
        table(header, rows)
    }
}
