//! The report for people: tables, and numbers with readable units.

use std::collections::BTreeMap;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets::UTF8_BORDERS_ONLY};

use super::{ArmReport, Report};
use crate::serving::Tier;

/// The width of a report.
const COLUMNS: usize = 80;

impl ArmReport {
    /// The share of all blocks that was found in these tiers.
    pub(crate) fn hit_share(&self, tiers: &[Tier]) -> f64 {
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

/// A text in lines of `columns` at most. A word that is longer has a line of its own.
pub fn fold(text: &str, columns: usize) -> String {
    let mut folded = String::new();
    let mut width = 0;
    for word in text.split(' ') {
        let length = word.chars().count();
        if width > 0 && width + 1 + length > columns {
            folded.push('\n');
            width = 0;
        } else if width > 0 {
            folded.push(' ');
            width += 1;
        }
        folded.push_str(word);
        width += length;
    }
    folded
}

/// A time with a readable unit, such as `1.50 s`.
pub fn duration(ms: f64) -> String {
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

/// A table with a header. All columns but the first are numbers. On a terminal that is narrower, longer cells are folded.
pub fn table<const N: usize>(
    header: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> Table {
    let mut table = Table::new();
    table
        .load_preset(UTF8_BORDERS_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(header);
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

    /// The report for people, 80 columns wide.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut say = |part: &str| {
            text.push_str(part);
            text.push('\n');
        };
        say(&fold(&self.traffic(), COLUMNS));
        say("");
        for table in [
            self.ttft_table(),
            self.hits_table(),
            self.capacities_table(),
            self.bytes_table(),
            self.stored_table(),
        ] {
            say(&format!("{table}\n"));
        }
        say(&fold(&self.revoked(), COLUMNS));
        say("");
        say(&fold(&self.basis, COLUMNS));
        text
    }

    /// What SwiftCache's p99 is beside the others', in one sentence.
    pub(crate) fn headline(&self) -> String {
        let Some(first) = self.arms.first() else {
            return String::new();
        };
        let others = self.arms.iter().skip(1).map(|arm| {
            let change = change(first.ttft.p99_ms, arm.ttft.p99_ms);
            format!("{change} beside {}", arm.name)
        });
        let others: Vec<String> = others.collect();
        format!(
            "{}'s p99 time to first token is {} (modelled): {}.",
            first.name,
            duration(first.ttft.p99_ms),
            others.join(", ")
        )
    }

    /// What was served, and with what.
    pub(crate) fn traffic(&self) -> String {
        let workload = &self.workload;
        let capacity = &self.capacity;
        let refused = match workload.refused {
            0 => String::new(),
            refused => format!("; {refused} requests too long for the local pool, left out"),
        };
        format!(
            "{} requests of {}, arrivals stretched x{:.2}; an unbounded cache would find {:.3} of {} blocks{refused}. {} on {}, {} donors, {} a block.",
            workload.requests,
            workload.trace,
            workload.stretch,
            workload.unbounded_hit_rate,
            workload.blocks,
            self.compute.model,
            self.compute.gpu,
            capacity.donors,
            bytes(capacity.block_full_bytes),
        )
    }

    /// What became of revoked slabs, and what was checked.
    pub(crate) fn revoked(&self) -> String {
        let donors = &self.donors;
        let verified: u64 = self.arms.iter().map(|arm| arm.verified_moved_bytes).sum();
        format!(
            "Revocations: {} (acknowledged in p50 {}, p99 {} of wall-clock time), zombies: {}. Blocks of revoked slabs: {} moved to other donors, {} to the host tier, {} dropped. Verified: {} read back, every byte right.",
            donors.revocations,
            wall(donors.acknowledge_wall.p50_us),
            wall(donors.acknowledge_wall.p99_us),
            donors.zombies,
            donors.moved_to_donor_blocks,
            donors.moved_to_host_blocks,
            donors.dropped_blocks,
            bytes(verified)
        )
    }

    pub(crate) fn ttft_table(&self) -> Table {
        let base = self.arms.first().map(|arm| arm.ttft).unwrap_or_default();
        let heading = self.heading("first token");
        let header = [heading.as_str(), "p50", "p95", "p99", "SwiftCache", "busy"];
        let rows = self.arms.iter().enumerate().map(|(index, arm)| {
            [
                arm.name.clone(),
                duration(arm.ttft.p50_ms),
                duration(arm.ttft.p95_ms),
                duration(arm.ttft.p99_ms),
                match index {
                    0 => String::new(),
                    _ => change(base.p99_ms, arm.ttft.p99_ms),
                },
                format!("{:.0} %", arm.utilisation * 100.0),
            ]
        });
        table(header, rows)
    }

    pub(crate) fn hits_table(&self) -> Table {
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
        let heading = self.heading("found");
        let header = [
            heading.as_str(),
            "all",
            "local",
            "donors",
            "host",
            "lost",
            "no room",
        ];
        table(header, rows)
    }

    pub(crate) fn capacities_table(&self) -> Table {
        let rows = self.arms.iter().map(|arm| {
            [
                arm.name.clone(),
                bytes(arm.holds.pool_bytes),
                bytes(arm.holds.donor_bytes),
                bytes(arm.holds.host_bytes),
                bytes(arm.holds.total()),
            ]
        });
        let heading = self.heading("holds at most");
        let header = [heading.as_str(), "local", "donors", "host", "in all"];
        table(header, rows)
    }

    pub(crate) fn bytes_table(&self) -> Table {
        let rows = self.arms.iter().map(|arm| {
            [
                arm.name.clone(),
                over(&arm.loaded_full_bytes, "nvlink"),
                over(&arm.loaded_full_bytes, "pcie"),
                over(&arm.loaded_full_bytes, "host"),
                bytes(arm.verified_moved_bytes),
                format!("{:.1} s", arm.wall_s),
            ]
        });
        let heading = self.heading("loaded");
        let header = [
            heading.as_str(),
            "NVLink",
            "PCIe",
            "host",
            "verified",
            "took",
        ];
        table(header, rows)
    }

    pub(crate) fn stored_table(&self) -> Table {
        let rows = self.arms.iter().map(|arm| {
            [
                arm.name.clone(),
                over(&arm.stored_full_bytes, "nvlink"),
                over(&arm.stored_full_bytes, "pcie"),
                over(&arm.stored_full_bytes, "host"),
            ]
        });
        let heading = self.heading("written back");
        table([heading.as_str(), "NVLink", "PCIe", "host"], rows)
    }
}

fn over(map: &BTreeMap<String, u64>, link: &str) -> String {
    map.get(link).map_or("-".to_owned(), |count| bytes(*count))
}

/// By how much `of` is more or less than `to`.
fn change(of: f64, to: f64) -> String {
    match to > 0.0 {
        // Adding zero turns -0 into 0.
        true => format!("{:+.0} %", ((of / to - 1.0) * 100.0).round() + 0.0),
        false => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_folds_where_a_terminal_is_narrow() {
        let name = "GPU-12345678-1234-1234-1234-123456789abc (NVIDIA H100 80GB HBM3), drained";
        let row = [name, "71.2 GB of 85.9 GB", "24.0 GB", "12.0 GB", "0 B"].map(str::to_owned);
        let header = ["device", "HBM used", "offered", "free", "zombie"];
        let widest = |table: &Table| {
            let text = table.to_string();
            text.lines().map(|line| line.chars().count()).max()
        };
        let mut shown = table(header, [row]);
        // The twin: where nobody says how wide, nothing is folded.
        assert!(widest(&shown) > Some(80), "{shown}");
        shown.set_width(80);
        assert!(widest(&shown) <= Some(80), "{shown}");
        for part in ["24.0 GB", "drained", "HBM3"] {
            assert!(shown.to_string().contains(part), "{shown}");
        }
    }

    #[test]
    fn a_text_folds_between_words() {
        assert_eq!(fold("one two three", 7), "one two\nthree");
        assert_eq!(fold("", 7), "");
        assert_eq!(fold("immeasurable x", 7), "immeasurable\nx");
    }
}
