//! A simulated node: a topology file describes its devices, and small files say how much HBM neighbours use.

use std::{fs, io};

use swiftcache_proto::{
    domain::{Device, DeviceUuid, Link},
    topology::{Topology, TopologyError},
};

use super::Probe;

/// A node that exists only in a topology file.
pub struct Simulated {
    topology: Topology,
}

impl Simulated {
    /// Loads a bundled topology by name, or a file.
    ///
    /// # Errors
    /// When the file cannot be read or does not describe a node.
    pub fn load(name_or_path: &str) -> Result<Self, TopologyError> {
        let topology = Topology::load(name_or_path)?;
        Ok(Self { topology })
    }
}

impl Probe for Simulated {
    fn source(&self) -> String {
        format!("simulated ({})", self.topology.name)
    }

    fn devices(&self) -> &[Device] {
        &self.topology.devices
    }

    fn links(&self) -> &[Link] {
        &self.topology.links
    }

    fn used_bytes(&self, device: &DeviceUuid, donated: u64) -> Result<u64, String> {
        let Some(directory) = &self.topology.usage_dir else {
            return Ok(donated);
        };
        let path = directory.join(device.as_str());
        let neighbours = match fs::read_to_string(&path) {
            Ok(text) => text
                .trim()
                .parse::<u64>()
                .map_err(|error| error.to_string()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(error.to_string()),
        };
        match neighbours {
            Ok(bytes) => Ok(bytes.saturating_add(donated)),
            Err(error) => {
                tracing::warn!(path = %path.display(), error, "this file must hold the HBM bytes in use, in decimal");
                Err(format!(
                    "{}: {error}; this file must hold the HBM bytes in use, in decimal",
                    path.display()
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_files_tell_neighbours_use() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("node.toml");
        let text = format!(
            "name = \"n\"\nusage_dir = {:?}\n[[device]]\nuuid = \"SIM-0\"\nname = \"s\"\nhbm_bytes = 1000\n",
            directory.path()
        );
        fs::write(&file, text).unwrap();
        let node = Simulated::load(file.to_str().unwrap()).unwrap();
        let device = node.devices()[0].uuid.clone();
        assert_eq!(node.used_bytes(&device, 5), Ok(5));
        fs::write(directory.path().join("SIM-0"), "100\n").unwrap();
        assert_eq!(node.used_bytes(&device, 5), Ok(105));
        fs::write(directory.path().join("SIM-0"), "lots").unwrap();
        let problem = node.used_bytes(&device, 5).unwrap_err();
        assert!(problem.contains("SIM-0"), "{problem}");
    }
}
