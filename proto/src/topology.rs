//! The topology of a simulated node: its devices, their HBM and their links. It is read from a TOML file.
//!
//! ```toml
//! name = "two GPUs on one NVLink"
//! usage_dir = "/run/swiftcache/usage"   # optional: directory with the neighbours' simulated HBM use
//!
//! [[device]]
//! uuid = "SIM-0"
//! name = "simulated H200"
//! hbm_gib = 141.0                       # or hbm_bytes = 150000000
//!
//! [[link]]                              # both directions
//! between = ["SIM-0", "SIM-1"]
//! kind = "nvlink"
//! gigabytes_per_second = 380.0
//!
//! [all_pairs]                           # optional: every pair that no [[link]] names
//! kind = "pcie"
//! gigabytes_per_second = 50.0
//! ```

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::domain::{Device, DeviceUuid, Link, LinkKind, Medium};

/// The most devices that a topology may have.
pub const MAX_DEVICES: usize = 64;

/// A simulated node.
#[derive(Clone, Debug, PartialEq)]
pub struct Topology {
    /// A name for people to read.
    pub name: String,
    /// Its devices, in the order of the file.
    pub devices: Vec<Device>,
    /// Its links, both directions.
    pub links: Vec<Link>,
    /// The directory with the simulated neighbours' HBM use: one file per device, named by the device's UUID, that
    /// holds the bytes in use as a decimal number.
    pub usage_dir: Option<PathBuf>,
}

/// Why a topology is refused. The text names the topology.
#[derive(Debug, thiserror::Error)]
#[error("topology {origin}: {problem}")]
pub struct TopologyError {
    origin: String,
    problem: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    name: String,
    usage_dir: Option<PathBuf>,
    #[serde(default)]
    device: Vec<FileDevice>,
    #[serde(default)]
    link: Vec<FileLink>,
    all_pairs: Option<FileRate>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileDevice {
    uuid: DeviceUuid,
    name: String,
    hbm_gib: Option<f64>,
    hbm_bytes: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileLink {
    between: [DeviceUuid; 2],
    kind: LinkKind,
    gigabytes_per_second: f64,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileRate {
    kind: LinkKind,
    gigabytes_per_second: f64,
}

impl Topology {
    /// The topologies that come with SwiftCache, by name.
    pub const BUNDLED: [(&str, &str); 2] = [
        ("hgx-8", include_str!("../topologies/hgx-8.toml")),
        ("pcie-4", include_str!("../topologies/pcie-4.toml")),
    ];

    /// Loads a bundled topology by its name, or else the file at that path.
    ///
    /// # Errors
    /// When the file cannot be read or does not describe a node. The text names the file and the problem.
    pub fn load(name_or_path: &str) -> Result<Self, TopologyError> {
        if let Some((name, text)) = Self::BUNDLED.iter().find(|(name, _)| *name == name_or_path) {
            return Self::parse(text, name);
        }
        let text =
            std::fs::read_to_string(Path::new(name_or_path)).map_err(|error| TopologyError {
                origin: name_or_path.to_owned(),
                problem: format!(
                    "cannot read a file of this name: {error}; use a TOML file, hgx-8 or pcie-4"
                ),
            })?;
        Self::parse(&text, name_or_path)
    }

    /// Reads a topology from TOML; `origin` names it in errors.
    ///
    /// # Errors
    /// When the text does not describe a node.
    pub fn parse(text: &str, origin: &str) -> Result<Self, TopologyError> {
        let refuse = |problem: String| TopologyError {
            origin: origin.to_owned(),
            problem,
        };
        let file: File = toml::from_str(text).map_err(|error| refuse(error.to_string()))?;
        let devices = devices(&file.device).map_err(refuse)?;
        let links = links(&file, &devices).map_err(refuse)?;
        Ok(Self {
            name: file.name,
            devices,
            links,
            usage_dir: file.usage_dir,
        })
    }
}

fn devices(list: &[FileDevice]) -> Result<Vec<Device>, String> {
    if !(1..=MAX_DEVICES).contains(&list.len()) {
        return Err(format!(
            "has {} devices; takes 1 to {MAX_DEVICES}",
            list.len()
        ));
    }
    let mut devices: Vec<Device> = Vec::with_capacity(list.len());
    for (ordinal, entry) in (0..).zip(list) {
        let uuid = entry.uuid.clone();
        if devices.iter().any(|device| device.uuid == uuid) {
            return Err(format!("device {uuid} appears twice"));
        }
        if uuid.medium() == Medium::Host {
            return Err(format!(
                "device {uuid}: a UUID cannot be HOST-n, which names host memory"
            ));
        }
        if uuid.as_str().contains('/') {
            return Err(format!("device {uuid}: a UUID cannot contain '/'"));
        }
        let hbm_bytes = match (entry.hbm_gib, entry.hbm_bytes) {
            (None, Some(bytes)) => bytes,
            (Some(gib), None) if gib.is_finite() && gib > 0.0 => (gib * f64::from(1 << 30)) as u64,
            _ => 0,
        };
        if hbm_bytes == 0 {
            return Err(format!(
                "device {uuid}: needs either hbm_gib or hbm_bytes, above 0"
            ));
        }
        devices.push(Device {
            uuid,
            name: entry.name.clone(),
            hbm_bytes,
            ordinal,
        });
    }
    Ok(devices)
}

fn links(file: &File, devices: &[Device]) -> Result<Vec<Link>, String> {
    let mut links: Vec<Link> = Vec::new();
    for entry in &file.link {
        let [a, b] = &entry.between;
        for end in [a, b] {
            if !devices.iter().any(|device| device.uuid == *end) {
                return Err(format!("link {a} - {b}: no device {end}"));
            }
        }
        if a == b {
            return Err(format!("link {a} - {b}: connects a device with itself"));
        }
        if links.iter().any(|link| link.from == *a && link.to == *b) {
            return Err(format!("link {a} - {b} appears twice"));
        }
        add(&mut links, a, b, entry.kind, entry.gigabytes_per_second)?;
    }
    if let Some(rate) = &file.all_pairs {
        for (index, a) in devices.iter().enumerate() {
            for b in &devices[index + 1..] {
                let named = |link: &Link| link.from == a.uuid && link.to == b.uuid;
                if !links.iter().any(named) {
                    let speed = rate.gigabytes_per_second;
                    add(&mut links, &a.uuid, &b.uuid, rate.kind, speed)?;
                }
            }
        }
    }
    Ok(links)
}

/// Adds both directions of a link.
fn add(
    links: &mut Vec<Link>,
    a: &DeviceUuid,
    b: &DeviceUuid,
    kind: LinkKind,
    gigabytes_per_second: f64,
) -> Result<(), String> {
    if kind == LinkKind::SameDevice {
        return Err(format!(
            "link {a} - {b}: kind is same-device, which is not a link between two devices"
        ));
    }
    if !(gigabytes_per_second.is_finite() && gigabytes_per_second > 0.0) {
        return Err(format!(
            "link {a} - {b}: gigabytes_per_second is {gigabytes_per_second}; takes more than 0"
        ));
    }
    for (from, to) in [(a, b), (b, a)] {
        links.push(Link {
            from: from.clone(),
            to: to.clone(),
            kind,
            bytes_per_second: (gigabytes_per_second * 1e9) as u64,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO: &str = r#"
        name = "two"
        [[device]]
        uuid = "SIM-0"
        name = "simulated"
        hbm_bytes = 1000
        [[device]]
        uuid = "SIM-1"
        name = "simulated"
        hbm_gib = 1.5
        [[link]]
        between = ["SIM-0", "SIM-1"]
        kind = "nvlink"
        gigabytes_per_second = 380.0
    "#;

    #[test]
    fn reads_devices_and_both_directions_of_a_link() {
        let topology = Topology::parse(TWO, "test").unwrap();
        assert_eq!(topology.devices[1].hbm_bytes, 3 << 29);
        assert_eq!(topology.links.len(), 2);
        assert_eq!(topology.links[1].from.as_str(), "SIM-1");
        assert_eq!(topology.links[1].bytes_per_second, 380_000_000_000);
    }

    #[test]
    fn bundled_topologies_are_whole() {
        for (name, devices) in [("hgx-8", 8), ("pcie-4", 4)] {
            let topology = Topology::load(name).unwrap();
            assert_eq!(topology.devices.len(), devices);
            assert_eq!(topology.links.len(), devices * (devices - 1));
        }
    }

    #[test]
    fn refuses_what_is_no_node_and_says_why() {
        let cases = [
            ("name = \"empty\"".to_owned(), "has 0 devices"),
            (TWO.replace("SIM-1\"\n", "SIM-0\"\n"), "appears twice"),
            (TWO.replace("hbm_bytes = 1000", "hbm_bytes = 0"), "hbm_gib"),
            (TWO.replace("hbm_gib = 1.5", "hbm_gib = -1"), "hbm_gib"),
            (TWO.replace("[\"SIM-0\"", "[\"SIM-9\""), "no device SIM-9"),
            (TWO.replace("\"SIM-1\"]", "\"SIM-0\"]"), "with itself"),
            (TWO.replace("380.0", "nan"), "gigabytes_per_second"),
            (TWO.replace("nvlink", "carrier-pigeon"), "carrier-pigeon"),
            (TWO.replace("hbm_bytes", "hbm_bites"), "hbm_bites"),
        ];
        for (text, expected) in cases {
            let error = Topology::parse(&text, "test").unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Topology::load("/nowhere.toml").unwrap_err().to_string();
        assert!(error.contains("/nowhere.toml"), "{error}");
    }
}
