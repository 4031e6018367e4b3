//! Compares what CUDA and NVML say about the links between GPUs. Borrowers rely on CUDA, and the broker relies on NVML.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use swiftcache_broker::probe::Probe;
use swiftcache_client::device::DeviceLayer;
use swiftcache_proto::domain::{DeviceUuid, LinkKind};

/// What both say about every link, by UUID, and whether they agree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Comparison {
    /// A line for each device and each pair, for people.
    pub lines: Vec<String>,
    /// How many devices or pairs they disagree about.
    pub disagreements: usize,
}

/// Compares the links that CUDA shows to this process with those of a probe. A device that only the probe sees is
/// hidden from this process, which is not a disagreement.
///
/// # Errors
/// When CUDA shows no device.
pub fn compare(layer: &dyn DeviceLayer, probe: &dyn Probe) -> Result<Comparison> {
    let (source, devices) = (probe.source(), layer.devices());
    ensure!(!devices.is_empty(), "no device");
    let known: BTreeSet<&str> = (probe.devices().iter())
        .map(|device| device.uuid.as_str())
        .collect();
    let mut comparison = Comparison {
        lines: Vec::new(),
        disagreements: 0,
    };
    for device in devices {
        let found = known.contains(device.uuid.as_str());
        let shown = if found {
            "shows it too"
        } else {
            "does not show it"
        };
        let line = format!("{} ({}): {source} {shown}", device.uuid, device.name);
        comparison.add(line, found);
    }
    for from in devices {
        for to in devices.iter().filter(|to| to.uuid != from.uuid) {
            let (from, to) = (&from.uuid, &to.uuid);
            let ours = layer.link_kind(from, to);
            let (theirs, speed) = link(probe, from, to);
            let line = format!(
                "{from} -> {to}: CUDA says {ours}, {source} says {theirs} ({:.0} GB/s nominal)",
                speed as f64 / 1e9
            );
            comparison.add(line, ours == theirs);
        }
    }
    Ok(comparison)
}

fn link(probe: &dyn Probe, from: &DeviceUuid, to: &DeviceUuid) -> (LinkKind, u64) {
    let mut links = probe.links().iter();
    let link = links.find(|link| link.from == *from && link.to == *to);
    link.map_or((LinkKind::Host, 0), |link| {
        (link.kind, link.bytes_per_second)
    })
}

impl Comparison {
    fn add(&mut self, line: String, agrees: bool) {
        let mark = if agrees { "ok     " } else { "FAILED " };
        self.lines.push(format!("{mark} {line}"));
        self.disagreements += usize::from(!agrees);
    }
}
