//! The flag `--device`: one device of the node, or all.

use std::str::FromStr;

use swiftcache_proto::domain::{Device, DeviceUuid};

use super::CliError;

/// Which devices to lend from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Chosen {
    All,
    One(DeviceUuid),
}

impl FromStr for Chosen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "all" => Ok(Self::All),
            uuid => uuid.parse().map(Self::One),
        }
    }
}

impl Chosen {
    /// The chosen devices among `known`: one at least, or an error.
    pub(super) fn among<'a>(&self, known: &'a [Device]) -> Result<Vec<&'a Device>, CliError> {
        let chosen: Vec<&Device> = known
            .iter()
            .filter(|device| match self {
                Self::All => true,
                Self::One(uuid) => device.uuid == *uuid,
            })
            .collect();
        if !chosen.is_empty() {
            return Ok(chosen);
        }
        let known: Vec<&str> = known.iter().map(|device| device.uuid.as_str()).collect();
        Err(CliError::Usage(match self {
            Self::All => "--device: the node has no device".to_owned(),
            Self::One(uuid) => format!(
                "--device: the node has no {uuid}; takes one of {}, or all",
                known.join(", ")
            ),
        }))
    }
}
